"""timm's PVTv2 and Swin, which can run in part: whole, in stages, at other sizes, growing, exported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from narrow_models import NARROW_PVT, NARROW_SWIN
from safetensors.torch import save_file
from timm.models.beit import Beit
from torch import nn

from vitlocal.bench.sizes import trained_models
from vitlocal.config import read_config
from vitlocal.data.batch import Batch
from vitlocal.errors import ConfigError
from vitlocal.models.counts import count_macs
from vitlocal.models.factory import adopt, build_model, export_model, load_weights, patch_side, size_multiple
from vitlocal.models.pyramid import PyramidModel
from vitlocal.models.shape import (
    check_shape,
    exported_state_dict,
    grow,
    model_parts,
    parameter_slices,
    set_shape,
    set_trainable,
    temporary_shape,
)
from vitlocal.models.swin import Swin
from vitlocal.plan import WHOLE_MODEL, Growth, ModelParts, Shape
from vitlocal.train.build import build_step
from vitlocal.train.build_checks import check_image_sizes
from vitlocal.train.optim import block_matrices, build_optimizer, optimizer_state

PVT, PVT_LINEAR, SWIN = "pvt_v2_b0", "pvt_v2_b2_li", "swin_tiny_patch4_window7_224"
SWIN_SMALL = "swin_small_patch4_window7_224"
HEADS = {PVT: (1, 2, 5, 8), SWIN: (3, 6, 12, 24)}
# The stages of the paper's table 6. Hidden widths: a quarter, half and all of each level's own.
PUBLISHED = {
    PVT_LINEAR: (((1, 1, 2, 2), (1, 2, 4, 4), (1, 2, 5, 8)), (512, 1024, 1280, 2048)),
    SWIN_SMALL: (((1, 2, 4, 8), (2, 4, 8, 16), (3, 6, 12, 24)), (384, 768, 1536, 3072)),
}


def published_stages(name: str) -> list[Shape]:
    heads, hidden = PUBLISHED[name]
    parts = (tuple(width // divisor for width in hidden) for divisor in (4, 2, 1))
    return [Shape(*sizes, grid) for *sizes, grid in zip(heads, parts, (40, 48, 56), strict=True)]


def small_model(name: str, size: int = 64, **options) -> PyramidModel:
    """PVTv2-B0, or a Swin 24 wide, for images of ``size`` px. A Swin has patches of 2 px, so that its window has 4."""
    torch.manual_seed(0)
    arguments = dict(img_size=size, drop_path_rate=0.0) | options
    model, _ = build_model(name, arguments | (dict(patch_size=2, embed_dim=24) if name == SWIN else {}), 5)
    assert isinstance(model, PyramidModel)
    for name, p in model.named_parameters():  # biases too, so that tests see them
        if p.ndim == 1 and not name.endswith("norm.weight"):
            nn.init.normal_(p, mean=float("norm" in name and "weight" in name), std=0.02)
    return model.eval()


def some_images(size: int, count: int = 1) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def train_step(model: nn.Module, images: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(model(images), torch.arange(len(images))).backward()
    optimizer.step()


def slices_of(model: nn.Module) -> Iterator[tuple[str, int, torch.Tensor, torch.Tensor]]:
    """The unit and level of each sliced parameter, with its slices and those of its gradient in the first dimension."""
    for part in parameter_slices(model):
        p = part.parameter
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        yield part.unit, part.level, part.of(p).movedim(1, 0), part.of(grad).movedim(1, 0)


# --- the whole model --------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("name", [PVT, "pvt_v2_b2", PVT_LINEAR, SWIN, SWIN_SMALL])
def test_the_whole_model_is_timms(name: str):
    """At 224 px, with the same names of weights, and for PVTv2 also at a size that nothing divides."""
    plain = timm.create_model(name, num_classes=5).eval()
    with torch.device("meta"):  # initial weights of its own would take a second
        model, arguments = build_model(name, dict(img_size=224, drop_path_rate=0.1), 5)
    assert isinstance(model, PyramidModel) and list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict(), assign=True)
    model.eval()
    for size in (224,) if isinstance(model, Swin) else (224, 75):
        images = some_images(size)
        torch.testing.assert_close(model(images), plain(images), rtol=0, atol=1e-5)
    assert arguments.get("window_size", 7) == 7 and size_multiple(model) == (32 if isinstance(model, Swin) else 1)
    assert patch_side(model) == 4


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *product([PVT, SWIN], [{}, dict(norm=True, indices=[3, 1])]),
        (PVT, dict(indices=[0, 2], stop_early=True)),  # with it, Swin of older versions of timm fails
    ],
)
def test_outputs_of_levels_are_timms(name: str, options: dict[str, Any]):
    plain = timm.create_model(name, num_classes=5).eval()
    model, _ = build_model(name, dict(img_size=224), 5)
    model.load_state_dict(plain.state_dict())
    images = some_images(224)
    (features, levels), (expected, others) = (m.eval().forward_intermediates(images, **options) for m in (model, plain))
    torch.testing.assert_close([features, *levels], [expected, *others], rtol=0, atol=1e-5)
    only = model.forward_intermediates(images, intermediates_only=True, **options)
    torch.testing.assert_close(only, levels)
    with pytest.raises(ConfigError, match="output_fmt"):
        model.forward_intermediates(images, output_fmt="NLC")


@torch.inference_mode()
def test_swin_at_a_smaller_size_reads_the_middle_of_its_tables():
    """At 160 px its windows have 5 tokens, as those of timm's Swin for 160 px, and the biases of the same offsets."""
    model, _ = build_model(SWIN, dict(img_size=224), 5)
    plain = timm.create_model(SWIN, num_classes=5, img_size=160, window_size=5).eval()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in state:
        if name.endswith("bias_table"):
            state[name] = state[name].view(13, 13, -1)[2:11, 2:11].flatten(0, 1)
    plain.load_state_dict(state)
    images = some_images(160)
    torch.testing.assert_close(model.eval()(images), plain(images), rtol=0, atol=1e-5)


def test_swin_never_pads():
    with torch.device("meta"):
        model, _ = build_model(SWIN, dict(img_size=224), 5)
    for size in range(32, 225, 32):
        for level, blocks in enumerate(model.levels):
            side, width = size // 4 // 2**level, size // 32
            for place, block in enumerate(blocks):
                shift = width // 2 if place % 2 and width < side else 0
                assert block.attn.window_of((side, side)) == ((width, width), (shift, shift)) and side % width == 0
    for level, side, windows in ((0, 9, "8x8"), (0, 12, "8x8"), (2, 3, "2x2"), (0, 64, "8x8")):
        with pytest.raises(ConfigError, match=f"a grid of {side}x{side} tokens cannot be divided into {windows} equal"):
            model.levels[level][0].attn.window_of((side, side))


def test_windows_of_a_swin_follow_its_size_and_patches():
    for arguments, window in ((dict(img_size=64, patch_size=2), 4), (dict(img_size=384), 12)):
        with torch.device("meta"):
            _, used = build_model(SWIN, arguments, 5)
        assert used["window_size"] == window
    with torch.device("meta"):
        _, used = build_model("swin_s3_tiny_224", dict(img_size=96), 5)
    assert used["window_size"] == [3, 3, 6, 3]


def test_drop_path_is_keyed_by_place():
    """The given numbers decide which branches are dropped, at timm's rates. Without numbers, PyTorch draws them."""
    model = small_model(PVT, 32, drop_path_rate=0.5).train()
    assert model.drop_path_rates.tolist() == pytest.approx([block * 0.5 / 7 for block in range(8)])
    assert not model.drops_out
    images, noise = some_images(32, 2), torch.rand(2, 8, 2)
    assert torch.equal(model(images, noise), model(images, noise))
    torch.testing.assert_close(model(images, noise)[:1], model(images[:1], noise[:1]))
    assert not torch.equal(model(images), model(images))
    model.set_drop_path(0.0)
    torch.testing.assert_close(model(images), model.eval()(images))


def test_traced_gradients_of_a_swin_are_the_eager_ones():
    """The windows of its levels have masks of their own."""
    two_levels = dict(depths=(2, 2), num_heads=(1, 2), embed_dim=16, patch_size=2, window_size=4, img_size=32)
    model = adopt(timm.create_model(SWIN, drop_path_rate=0.2, **two_levels), 32).train()
    images, noise, found = some_images(32, 2), torch.rand(2, 4, 2), []
    for call in (model, torch.compile(model, dynamic=False, backend="aot_eager")):
        model.zero_grad()
        call(images, noise).square().sum().backward()
        found.append({key: weight.grad for key, weight in model.named_parameters()})
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "macs", "printed", "schedules"),
    [
        (PVT_LINEAR, (0.784, 1.772, 3.889), (0.80, 1.79, 3.91),
         {(65, 87, 246): 1169.1, (51, 118, 160): 877.1, (25, 27, 132): 584.3, (27, 28, 56): 290.5}),
        (SWIN_SMALL, (1.303, 3.622, 8.741), (1.32, 3.64, 8.77),
         {(38, 124, 242): 2623.9, (42, 123, 167): 1967.9, (41, 42, 126): 1311.9, (29, 35, 55): 648.0}),
    ],
)  # fmt: skip
def test_macs_equal_the_published_stages(name: str, macs, printed, schedules):
    """The paper also counts norms, 5 operations an element, and pooling, 1 an element. With these, it is exact."""
    with torch.device("meta"):
        model, _ = build_model(name, dict(img_size=224), 1000)
    costs, others = [], []
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda _, inputs, output: others.append(5 * output.numel()))
        elif isinstance(module, nn.AdaptiveAvgPool2d):
            module.register_forward_hook(lambda _, inputs, output: others.append(inputs[0].numel()))
    for shape, published in zip(published_stages(name), printed, strict=True):
        check_shape(model, shape)
        others.clear()
        with temporary_shape(model, shape, WHOLE_MODEL):
            costs.append(count_macs(model, 224) / 1e9)
        assert round(costs[-1] + sum(others) / 1e9, 2) == published
        # Without norms and pooling, the first stage of PVTv2 is 2.05 % below the rounded number, others up to 1.3 %.
        if (name, published) != (PVT_LINEAR, 0.80):
            assert costs[-1] == pytest.approx(published, rel=0.02)
    assert costs == pytest.approx(macs, rel=1e-3)
    for epochs, cost in schedules.items():
        assert sum(c * t for c, t in zip(costs, epochs, strict=True)) == pytest.approx(cost, rel=0.02)
        assert sum(c * t for c, t in zip(printed, epochs, strict=True)) == pytest.approx(cost, rel=1e-3)


@torch.inference_mode()
@pytest.mark.parametrize("name", [PVT, SWIN])
def test_the_crop_keeps_the_centre_of_each_levels_grid(name: str):
    model = build_model(name, dict(img_size=224), 5)[0].eval()
    seen: list[tuple[int, tuple[int, int]]] = []
    for blocks in model.levels:
        blocks[0].register_forward_pre_hook(lambda module, given: seen.append((given[0].shape[1], given[1])))
    images = some_images(224)
    for grid, counts in ((40, [1600, 400, 100, 25]), (48, [2304, 576, 144, 36]), (56, [3136, 784, 196, 49])):
        seen.clear()
        with temporary_shape(model, Shape(grid=grid), WHOLE_MODEL):
            after = model(images)
            assert model.embed(images).equal(
                model.patch_embed(images)[:, (56 - grid) // 2 :][:, :grid, (56 - grid) // 2 :][:, :, :grid]
            )
        assert [count for count, _ in seen] == counts and all(rows * columns == n for n, (rows, columns) in seen)
    before = Shape(grid=48, crop_before_embedding=True)
    if name == PVT:
        with pytest.raises(ConfigError, match="cannot change crop_before_embedding to True: its patches overlap"):
            check_shape(model, before)
        return
    with temporary_shape(model, before, WHOLE_MODEL):
        cropped = model(images)
    with temporary_shape(model, Shape(grid=48), WHOLE_MODEL):
        torch.testing.assert_close(cropped, model(images), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(cropped, after)


SMALL = {
    PVT: Shape(heads=(1, 1, 2, 2), hidden=(64, 128, 160, 256), grid=8),
    SWIN: Shape(heads=(1, 2, 4, 8), hidden=(24, 48, 96, 192), grid=24),
}
LARGER = {
    PVT: Shape(heads=(1, 2, 5, 4), hidden=(128, 256, 320, 256)),
    SWIN: Shape(heads=(2, 4, 8, 16), hidden=(48, 96, 192, 384)),
}


@pytest.mark.parametrize("name", [PVT, SWIN])
def test_slices_that_do_not_run_have_no_gradient(name: str):
    model, shape = small_model(name).train(), SMALL[name]
    check_shape(model, shape)
    set_shape(model, shape)
    model(some_images(64, 2)).square().sum().backward()
    for unit, level, _, gradient in slices_of(model):
        count = getattr(shape, unit)[level]
        assert gradient[:count].flatten(1).any(1).all() and not gradient[count:].any()
    cut = set()
    for level, blocks in enumerate(model.levels):
        for path, weight in ((path, weight) for block in blocks for path, weight in block.named_parameters()):
            runs = running_part(path, weight, shape.heads[level], HEADS[name][level], shape.hidden[level])
            assert weight.grad[runs].any() and not weight.grad[~runs].any(), (level, path)
            cut |= set() if runs.all() else {(path.removeprefix("attn.").removeprefix("mlp."), level)}
    heads = ["q.weight", "q.bias", "kv.weight", "kv.bias"] if name == PVT else ["qkv.weight", "qkv.bias"]
    hidden = ["fc1.weight", "fc1.bias", "fc2.weight", *(["dwconv.weight", "dwconv.bias"] if name == PVT else [])]
    # PVTv2's first level has one head, which runs.
    expected = {*product(hidden, range(4)), *product([*heads, "proj.weight"], range(int(name == PVT), 4))}
    assert cut == expected | set(product(["relative_position_bias_table"] if name == SWIN else [], range(4)))


def running_part(path: str, weight: torch.Tensor, active: int, heads: int, hidden: int) -> torch.Tensor:
    """Which numbers of a block's ``weight`` run: those of ``active`` heads of ``heads``, and of ``hidden`` units.

    Written out by the weight's name, without the code that trains. A Swin has windows of 3 instead of 4 tokens.
    """
    runs = torch.zeros(weight.shape, dtype=torch.bool)
    kind, path = path.split(".", 1)
    if kind == "attn" and path.startswith(("q.", "kv.", "qkv.")):
        stacked = {"q": 1, "kv": 2, "qkv": 3}[path.split(".")[0]]  # one after the other
        rows = len(weight) // stacked
        for first in range(0, len(weight), rows):
            runs[first : first + rows * active // heads] = True
    elif path == "proj.weight":
        runs[:, : weight.shape[1] * active // heads] = True
    elif path == "relative_position_bias_table":  # the offsets from -2 to 2, of -3 to 3
        runs.view(7, 7, heads)[1:6, 1:6, :active] = True
    elif path.startswith(("fc1.", "dwconv.")):
        runs[:hidden] = True
    elif path == "fc2.weight":
        runs[:, :hidden] = True
    else:  # norms, the reduction of keys, biases of outputs
        runs[:] = True
    return runs


@pytest.mark.parametrize("options", [NARROW_PVT, NARROW_SWIN], ids=["pvt", "swin"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_parameters_stay_the_same_objects_in_all_stages(options: list[str], optimizer: str):
    """Each in its group of the optimizer, and with its state, through stages and image sizes of a training step."""
    config = read_config(
        [*options, "--model.size=64", f"--train.optimizer={optimizer}", "--train.ema_decay=0.9", "--methods=none"], {}
    )
    step = build_step(config, 5, torch.device("cpu"))
    heads, hidden = model_parts(step.model).heads, model_parts(step.model).hidden
    quarter, half = (tuple(count // divisor for count in hidden) for divisor in (4, 2))
    small, larger = Shape((1, 1, 2, 2), quarter, 8), Shape((1, 2, 4, heads[-1]), half, 24 if heads[0] > 1 else 8)
    stages = ((small, 64), (replace(small, grid=None), 32), (larger, 64), (replace(larger, grid=None), 48))

    def identities() -> tuple[Any, ...]:
        groups = [(group["weight_decay"], list(map(id, group["params"]))) for group in step.optimizer.param_groups]
        return groups, *([(name, id(p), p.shape, p.data_ptr()) for name, p in m.named_parameters()] for m in models)

    models = step.model, step.ema.model
    before = identities()
    assert sorted(key for _, keys in before[0] for key in keys) == sorted(map(id, step.model.parameters()))
    for number, (shape, size) in enumerate((*stages, (WHOLE_MODEL, 48), (WHOLE_MODEL, 64))):
        states = optimizer_state(step.optimizer)
        kept = [(p, dict(states(p))) for p in step.model.parameters()]
        grow(step.model, step.shape, shape, Growth(number), states, [step.ema.model])
        step.set_shape(shape)
        images = torch.full((2, 3, size, size), 7, dtype=torch.uint8)
        step(Batch.whole(images, torch.tensor([1, 3]), torch.arange(2)), number, 1e-3)
        assert identities() == before
        assert all(states(p)[key] is value for p, old in kept for key, value in old.items())
    owners = step.optimizer.members if optimizer == "muon" else [step.optimizer]
    assert sorted(id(p) for owner in owners for p in owner.state) == sorted(map(id, step.model.parameters()))


@torch.no_grad()
@pytest.mark.parametrize("name", [PVT, SWIN])
def test_slices_equal_weights_of_zero(name: str):
    """The part that runs computes what the whole computes if nothing comes out of the rest."""
    model, images = small_model(name), some_images(64)
    shape = Shape(heads=SMALL[name].heads, hidden=SMALL[name].hidden)
    set_shape(model, shape)
    part = model(images)
    state = exported_state_dict(model)
    set_shape(model, WHOLE_MODEL)
    assert not torch.allclose(model(images), part, atol=1e-3)
    model.load_state_dict(state)
    torch.testing.assert_close(model(images), part, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [PVT, SWIN])
def test_growth_by_level(name: str):
    """Old slices keep their bits and moments. New ones equal their sources, without moments, until the next step."""
    model, images = small_model(name).train(), some_images(64, 2)
    average, small, larger = small_model(name), SMALL[name], LARGER[name]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    objects = list(model.parameters())
    set_shape(model, small)
    for _ in range(2):
        train_step(model, images, optimizer)
    before = [values.detach().clone() for *_, values, _ in slices_of(model)]
    moments = [part.of(optimizer.state[part.parameter]["exp_avg"]).clone() for part in parameter_slices(model)]
    whole = [unsliced(grown, optimizer) for grown in (model, average)]
    grow(model, small, larger, Growth(1), lambda p: optimizer.state[p], [average])
    for grown, expected in zip((model, average), whole, strict=True):
        torch.testing.assert_close(unsliced(grown, optimizer), expected, rtol=0, atol=0)
    set_shape(model, larger)
    grown = []
    for part, was, moment in zip(parameter_slices(model), before, moments, strict=True):
        old, new = getattr(small, part.unit)[part.level], getattr(larger, part.unit)[part.level]
        now = part.of(part.parameter).movedim(1, 0)
        sources = [place % old for place in range(new - old)]
        assert torch.equal(now[:old], was[:old]) and torch.equal(now[new:], was[new:])
        assert torch.equal(now[old:new], was[sources])
        state = optimizer.state[part.parameter]
        kept = part.of(state["exp_avg"])
        assert torch.equal(kept[:, :old], moment[:, :old]) and not kept[:, old:new].any()
        assert not part.of(state["exp_avg_sq"])[:, old:new].any()
        if new > old:
            grown.append((part, old, new, sources))
    train_step(model, images, optimizer)
    for part, old, new, sources in grown:
        now = part.of(part.parameter).movedim(1, 0)
        assert not torch.equal(now[old:new], now[sources])
    assert {part.level for part, *_ in grown} == {0, 1, 2, 3}
    assert all(one is other for one, other in zip(objects, model.parameters(), strict=True))


SLICED = re.compile(r"attn\.(q|kv|qkv)\.|attn\.proj\.weight|bias_table|mlp\.(fc1|dwconv)\.|mlp\.fc2\.weight")


def unsliced(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Copies of all parameters whose names say that they have no slices, and of their moments."""
    found = {}
    for name, p in model.named_parameters():
        if not SLICED.search(name):
            found[name] = p.detach().clone()
            found |= {f"{name} {key}": value.clone() for key, value in optimizer.state.get(p, {}).items()}
    return found


def test_random_slices_have_initial_weights():
    for name in (PVT, SWIN):
        model = small_model(name, 32)
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        grow(model, SMALL[name], WHOLE_MODEL, Growth(1, weights="random"), lambda p: {})
        fc1 = model.levels[0][0].mlp.fc1.weight
        key = next(key for key, p in model.named_parameters() if p is fc1)
        old = SMALL[name].hidden[0]
        assert torch.equal(fc1[:old], before[key][:old]) and not torch.equal(fc1[old:], before[key][old:])


@pytest.mark.parametrize("name", [PVT, SWIN])
@pytest.mark.parametrize("optimizer", ["muon", "soap"])
def test_optimizers_of_matrices_train_slices(name: str, optimizer: str):
    """Moments of slices are set at growth. Muon takes keys and values as two matrices."""
    model, images = small_model(name, 32).train(), some_images(32, 2)
    chosen = build_optimizer(model, optimizer)
    for group in chosen.param_groups:
        group["lr"] = 1e-3
    states = {id(p): member for member in chosen.members for group in member.param_groups for p in group["params"]}
    small = Shape(heads=SMALL[name].heads, hidden=SMALL[name].hidden)
    set_shape(model, small)
    train_step(model, images, Steps(chosen, model))
    grow(model, small, WHOLE_MODEL, Growth(1), lambda p: states[id(p)].state[p])
    set_shape(model, WHOLE_MODEL)
    train_step(model, images, Steps(chosen, model))
    matrices = block_matrices(model)
    assert all(p.isfinite().all() for p in model.parameters()) and not any("bias_table" in path for path in matrices)
    if name == PVT and optimizer == "muon":
        assert {chosen.members[1].parts[id(p)] for path, p in matrices.items() if path.endswith(".kv.weight")} == {2}
    elif name == PVT:  # its square queries have the width as columns, and its square projections as rows
        columns = chosen.members[1].columns
        assert all(id(p) in columns for path, p in matrices.items() if path.endswith(".q.weight"))
        assert not any(id(p) in columns for path, p in matrices.items() if path.endswith(".proj.weight"))


class Steps:
    """``optimizer`` with PyTorch's ``zero_grad``."""

    def __init__(self, optimizer, model: nn.Module):
        self.step, self.zero_grad = optimizer.step, model.zero_grad


# --- what the trainer relies on ---------------------------------------------------------------------------------------


def test_blocks_of_all_levels_can_be_frozen():
    model = small_model(SWIN, 32)
    assert model_parts(model) == ModelParts((3, 6, 12, 24), (96, 192, 384, 768), 16, (2, 2, 6, 2), 8)
    assert set_trainable(model, Shape(trainable_blocks=(3, 11), head_only=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {".".join(name.split(".")[:4]) for name in trained if "blocks." in name} == {
        "layers.1.blocks.1", "layers.3.blocks.1",
    }  # fmt: skip
    assert {name.split(".")[0] for name in trained if "blocks." not in name} == {"norm", "head"}


@pytest.mark.parametrize(
    ("shape", "problem"),
    [
        (Shape(heads=(1, 2)), "Pvt: got heads 1,2, expected 1 to 1,2,5,8, a number for each of 4 levels"),
        (Shape(heads=(1, 2, 6, 8)), "got heads 1,2,6,8"),
        (Shape(grid=12), "got grid 12, expected 1 to 16, a multiple of 8"),
        (Shape(block_order=(0, 1)), "Pvt cannot change block_order to .*blocks of different sizes"),
        (Shape(token_keep_rate=0.5, pruned_blocks=(1,)), "Pvt cannot change token_keep_rate .*no class token"),
    ],
)
def test_shapes_that_the_model_lacks_are_errors(shape: Shape, problem: str):
    with pytest.raises(ConfigError, match=problem):
        check_shape(small_model(PVT), shape)


@pytest.mark.parametrize(
    ("size", "problem"),
    [(96, r"evaluate.size 96: expected at most model.size \(64\)"), (40, "evaluate.size 40: expected multiples of 32")],
)
def test_image_sizes_that_swin_cannot_take(size: int, problem: str):
    options = ["model.size=64", f"model.name={SWIN}", f"evaluate.size={size}", "methods=none"]
    config = read_config([f"--{option}" for option in options], {})
    with torch.device("meta"):
        model, _ = build_model(SWIN, config.model.arguments(), 5)
    with pytest.raises(ConfigError, match=problem):
        check_image_sizes(config, model)


@torch.inference_mode()
@pytest.mark.parametrize("name", [PVT, SWIN])
def test_bench_sizes_runs_exports_at_other_sizes(name: str, tmp_path):
    model = small_model(name)
    options = dict(img_size=64, patch_size=2, embed_dim=24) if name == SWIN else {}
    export_model(tmp_path, model, name, options, list("abcde"), size=64, crop_pct=1.0)
    run: Any = SimpleNamespace(folder=tmp_path, records=[{"epoch": 1.0}])
    ((_, loaded),) = trained_models(run, read_config([], {}), 5)
    assert size_multiple(loaded) == size_multiple(model)
    torch.testing.assert_close(loaded(some_images(48)), model(some_images(48)), rtol=0, atol=1e-5)


@torch.no_grad()
def test_weights_of_smaller_windows_are_interpolated(tmp_path):
    """So weights for 224 px can be fine-tuned at 256 px. A table that rises evenly does so afterwards."""
    plain = timm.create_model(SWIN, num_classes=5, embed_dim=24)
    for layer in plain.layers:
        for block in layer.blocks:
            block.attn.relative_position_bias_table.copy_(torch.arange(13.0).repeat_interleave(13)[:, None])
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    model, _ = build_model(SWIN, dict(img_size=256, embed_dim=24), 5)
    load_weights(model, str(tmp_path / "weights.safetensors"))
    for block in model.blocks:
        table = block.attn.relative_position_bias_table.view(15, 15, -1)
        rising = 6 + torch.arange(-4.0, 5)[:, None, None] * 13 / 15
        torch.testing.assert_close(table[3:12], rising.expand(9, 15, table.shape[2]), rtol=0, atol=0.05)
    assert torch.equal(model.head.fc.weight, plain.head.fc.weight)


def test_tables_of_other_models_are_not_cropped(tmp_path):
    """BEiT's have rows for the class token. Weights for another size are an error that names the table."""
    options = dict(patch_size=8, embed_dim=16, depth=1, num_heads=2, use_rel_pos_bias=True, num_classes=5)
    large, small = (Beit(img_size=size, use_abs_pos_emb=False, **options) for size in (64, 32))
    save_file(large.state_dict(), tmp_path / "weights.safetensors")
    with pytest.raises(ConfigError, match=r"relative_position_bias_table has shape \(228, 2\), but .* \(52, 2\)"):
        load_weights(small, str(tmp_path / "weights.safetensors"))


def test_images_too_small_for_the_keys_of_pvt():
    """The linear ones pool keys, so they take all sizes."""
    for name in (PVT, PVT_LINEAR):
        with torch.device("meta"):
            model, _ = build_model(name, dict(img_size=28), 5)
        if name == PVT:
            with pytest.raises(ConfigError, match="PVTv2: a grid of 7x7 tokens is smaller than the 8x8"):
                count_macs(model, 28)
        assert count_macs(model, 28 if name == PVT_LINEAR else 29) > 0


def test_only_swin_takes_a_width():
    with pytest.raises(ConfigError, match="pvt_v2_b0 is timm's own model, .*: add --model.width=none"):
        build_model(PVT, dict(img_size=64, embed_dim=16), 5)


@torch.inference_mode()
@pytest.mark.parametrize(("name", "size"), [(PVT, 64), (SWIN, 64), (SWIN, 48)])
def test_timm_loads_the_export_without_us(name: str, size: int, tmp_path):
    """Also if the evaluation's images are smaller than model.size."""
    model = small_model(name)
    arguments = dict(img_size=64, drop_path_rate=0.1)
    if name == PVT:
        arguments.pop("img_size")
    else:
        arguments |= dict(patch_size=2, embed_dim=24, window_size=4)
    export_model(tmp_path, model, name, arguments, list("abcde"), size=size, crop_pct=1.0)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert type(loaded).__module__.startswith("timm.")
    images = some_images(size)
    torch.testing.assert_close(loaded(images), model(images), rtol=0, atol=1e-5)
    if isinstance(model, Swin):  # a model for smaller images loads the middles of the tables
        smaller = small_model(name, 48)
        assert load_weights(smaller, str(tmp_path), list("abcde")) == []
        torch.testing.assert_close(smaller(some_images(48)), model(some_images(48)), rtol=0, atol=1e-5)
