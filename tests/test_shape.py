"""Shapes of a model: slices, crops, block orders, growth, freezing and stage embeddings."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vitlocal.errors import ConfigError
from vitlocal.models.counts import count_macs
from vitlocal.models.shape import (
    add_stage_table,
    check_shape,
    exported_state_dict,
    grow,
    model_parts,
    parameter_slices,
    set_shape,
    set_trainable,
    temporary_shape,
)
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import WHOLE_MODEL, Growth, Shape, StageEmbedding, deepen, growth_sources

FAMILIES = ("vitlocal_tiny_patch8_64", "vitlocal_deit_tiny_patch8_64")
DEIT_S = "vitlocal_deit_small_patch16_224"
BUDGETED = (
    Shape(heads=(2,), hidden=(384,), grid=10),
    Shape(heads=(4,), hidden=(768,), grid=12),
    WHOLE_MODEL,
)  # of DeiT-S


def small_model(name: str = FAMILIES[0], **options) -> VisionTransformer:
    torch.manual_seed(0)
    defaults = dict(img_size=48, embed_dim=32, depth=4, num_heads=4, num_classes=5)
    return timm.create_model(name, **defaults | options).eval()


def some_images(size: int = 48, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def train_steps(model: nn.Module, images: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(images), torch.arange(len(images)) + step % 2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def small_copy(model: VisionTransformer, heads: int, hidden: int) -> VisionTransformer:
    """Builds a model as large as the active part, with its weights: the reference for slices."""
    small = small_model((type(model).__name__ == "DeiT" and FAMILIES[1]) or FAMILIES[0], mlp_ratio=hidden / 32)
    state = {}
    width = 32 // 4 * heads
    for name, tensor in model.state_dict().items():
        if "fc1" in name or "mlp.conv" in name:
            tensor = tensor[:hidden]
        elif "fc2.weight" in name:
            tensor = tensor[:, :hidden]
        elif "qkv" in name:  # the values of inactive heads are zero
            parts = tensor.clone().view(3, 32, *tensor.shape[1:])
            parts[2, width:] = 0
            tensor = parts.view(tensor.shape)
        state[name] = tensor
    small.load_state_dict(state)
    for block in small.blocks:
        block.attn.proj.weight.data[:, width:] = 0
    return small


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_equal_a_smaller_model(name: str):
    model, images = small_model(name), some_images()
    small = small_copy(model, heads=2, hidden=48)
    set_shape(model, Shape(heads=(2,), hidden=(48,)))
    torch.testing.assert_close(model(images), small(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("before", [False, True])
def test_center_crop_of_the_grid(name: str, pool: str, before: bool):
    """The crop keeps the central tokens, with their rows of the position table."""
    model, images = small_model(name, pool=pool), some_images()
    with temporary_shape(model, Shape(grid=3, crop_before_embedding=before), WHOLE_MODEL):
        tokens, grid = model.embed(images)
    assert grid == (3, 3)
    whole, _ = model.embed(images)
    num_prefix_tokens = pool == "token"
    centre = whole[:, num_prefix_tokens:].unflatten(1, (6, 6))[:, 1:4, 1:4].flatten(1, 2)
    torch.testing.assert_close(tokens[:, num_prefix_tokens:], centre)
    assert torch.equal(tokens[:, :num_prefix_tokens], whole[:, :num_prefix_tokens])


def test_macs_equal_the_published_stages():
    model = timm.create_model(DEIT_S)
    costs = []
    for shape in BUDGETED:
        with temporary_shape(model, shape, WHOLE_MODEL):
            costs.append(count_macs(model, 224) / 1e9)
    assert costs == pytest.approx([0.69, 1.91, 4.61], rel=0.03)
    for epochs, published in (((86, 105, 243), 1379.1), ((55, 55, 193), 1032.1), ((49, 71, 113), 689.8),
                              ((29, 49, 50), 343.7)):  # fmt: skip
        # The published figures seem to count the layer norms, with 5 operations per element.
        norms = [5 * 25 * 384 * (side * side + 1) / 1e9 for side in (10, 12, 14)]
        total = sum((cost + norm) * count for cost, norm, count in zip(costs, norms, epochs, strict=True))
        assert total == pytest.approx(published, rel=0.003)


@pytest.mark.parametrize("name", FAMILIES)
def test_inactive_slices_have_no_gradient_and_no_moments(name: str):
    model, images = small_model(name, pool="avg").train(), some_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    set_shape(model, Shape(heads=(2,), hidden=(48,)))
    train_steps(model, images, optimizer, 3)
    for part in parameter_slices(model):
        new = part.of(optimizer.state[part.parameter]["exp_avg_sq"]).movedim(1, 0)
        active = {"heads": 2, "hidden": 48}[part.unit]
        assert new[:active].any() and not new[active:].any()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("moments", ["zero", "copy", "reset"])
def test_growth(name: str, moments: str):
    """Old slices keep their bits. New slices equal their sources, with copied moments also after the next step."""
    options = dict(pool="avg", qkv_bias=False)  # the bias of keys has no effect, so its gradient is noise
    model, images = small_model(name, **options).train(), some_images()
    average = small_model(name, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    small, larger = Shape(heads=(2,), hidden=(48,)), Shape(heads=(3,), hidden=(112,))
    set_shape(model, small)
    train_steps(model, images, optimizer, 3)
    before = {part.parameter: part.parameter.detach().clone() for part in parameter_slices(model)}
    old_moments = {p: optimizer.state[p]["exp_avg"].clone() for p in before}
    grow(model, small, larger, Growth(1, moments=moments), lambda p: optimizer.state[p], [average])
    set_shape(model, larger)
    limits = {"heads": (2, 3), "hidden": (48, 112)}

    def by_slice(part, tensor):
        return part.of(tensor).movedim(1, 0)

    for part in parameter_slices(model):
        old, new = limits[part.unit]
        now = by_slice(part, part.parameter)
        was = by_slice(part, before[part.parameter])
        assert torch.equal(now[:old], was[:old]) and torch.equal(now[new:], was[new:])
        sources = [place % old for place in range(new - old)]
        assert torch.equal(now[old:new], was[sources])
        state = optimizer.state[part.parameter]
        for value in (state["exp_avg"], state["exp_avg_sq"]):
            fresh = by_slice(part, value)[old:new]
            if moments == "copy":
                assert torch.equal(fresh, by_slice(part, value)[sources])
            else:
                assert not fresh.any()
        kept = by_slice(part, state["exp_avg"])[:old]
        assert torch.equal(kept, by_slice(part, old_moments[part.parameter])[:old]) == (moments != "reset")
        assert (state["step"] == 0) == (moments == "reset")
    mirrored = {
        part.parameter: theirs.parameter
        for part, theirs in zip(parameter_slices(model), parameter_slices(average), strict=True)
    }
    for part in parameter_slices(model):  # an average grows from its own slices
        old, new = limits[part.unit]
        theirs = by_slice(part, mirrored[part.parameter])
        assert torch.equal(theirs[old:new], theirs[[place % old for place in range(new - old)]])
    train_steps(model, images, optimizer)
    tied = []
    for part in parameter_slices(model):
        old, new = limits[part.unit]
        now = by_slice(part, part.parameter)
        tied.append(torch.allclose(now[old:new], now[[place % old for place in range(new - old)]], rtol=1e-3))
    assert all(tied) if moments == "copy" else not any(tied) if moments == "zero" else True


def test_halved_copies_keep_the_outputs():
    model, images = small_model().train(), some_images()
    small = Shape(heads=(2,), hidden=(64,))
    set_shape(model, small)
    before = model(images)
    larger = Shape(heads=(4,), hidden=(128,))
    grow(model, small, larger, Growth(1, scale=0.5), lambda p: {})
    set_shape(model, larger)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_sources_of_new_slices():
    assert growth_sources(4, 6) == [0, 1] and growth_sources(4, 6, "last") == [2, 3]
    assert growth_sources(2, 4, "last") == [0, 1] and growth_sources(2, 7, "last") == [0, 1, 0, 1, 0]
    model = small_model()
    grow(model, Shape(hidden=(96,)), WHOLE_MODEL, Growth(1, sources="last"), lambda p: {})
    weight = model.blocks[0].mlp.fc1.weight
    assert torch.equal(weight[96:], weight[64:96])


def test_random_slices_have_initial_weights():
    """Weight decay, while they did not run, does not matter. Every process draws the same."""
    grown = []
    for _ in range(2):
        model = small_model()
        with torch.no_grad():
            for part in parameter_slices(model):
                part.parameter.mul_(0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grow(
            model, Shape(hidden=(64,)), WHOLE_MODEL, Growth(1, weights="random"), lambda p: {}, [small_model()], seed=3
        )
        grown.append(dict(model.named_parameters()))
        weight, was = model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"]
        assert torch.equal(weight[:64], was[:64]) and float(weight[64:].detach().std()) == pytest.approx(0.02, rel=0.1)
        assert torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])
    assert all(torch.equal(grown[0][name], grown[1][name]) for name in grown[0])


def test_taking_the_average_keeps_drop_path_rates():
    model, average = small_model(drop_path_rate=0.4), small_model(drop_path_rate=0.4)
    set_shape(model, Shape(block_order=(0, 1)))
    model.set_drop_path(0.4)
    rates = model.drop_path_rates.clone()
    grow(model, WHOLE_MODEL, WHOLE_MODEL, Growth(1, average=0), lambda p: {}, [average])
    assert torch.equal(model.drop_path_rates, rates)
    assert torch.equal(model.head.weight, average.head.weight)


def test_head_only_finds_the_heads_of_timms_models():
    model = timm.create_model("efficientnet_b0", num_classes=5)
    set_trainable(model, Shape(trainable_blocks=(6,), head_only=True))
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "conv_head", "bn2", "classifier"}


def test_head_only():
    model = small_model(pool="token")
    assert set_trainable(model, Shape(trainable_blocks=(3,), head_only=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {"3"}
    features = []
    model.blocks[2].register_forward_hook(lambda module, given, found: features.append(found))
    model(some_images()).sum().backward()
    assert not features[0].requires_grad  # the blocks below have no backward pass


def test_noise_is_the_same_in_every_process():
    grown = []
    for _ in range(2):
        model = small_model()
        grow(model, Shape(hidden=(64,)), WHOLE_MODEL, Growth(1, noise=0.1), lambda p: {}, seed=3)
        grown.append(model.state_dict())
    assert all(torch.equal(grown[0][name], grown[1][name]) for name in grown[0])
    fc1 = grown[0]["blocks.0.mlp.fc1.weight"]
    assert 0 < (fc1[64:] - fc1[:64]).std() / fc1[:64].std() < 0.2


def test_sources_of_new_blocks():
    def duplicated_layers(before: int, after: int) -> list[int]:
        order, pairs = deepen(range(before), after, after)
        return [dict(pairs).get(block, block) for block in order]

    assert duplicated_layers(9, 12) == [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8]
    assert duplicated_layers(6, 8) == [0, 1, 2, 3, 4, 4, 5, 5]
    assert duplicated_layers(6, 12) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert duplicated_layers(12, 12) == list(range(12))
    order, pairs = deepen((0, 1, 2, 3, 4, 5), 8, 12)
    assert order == (0, 1, 2, 3, 4, 6, 5, 7) and pairs == ((6, 4), (7, 5))
    assert deepen((0, 7, 2), 3, 8) == ((0, 7, 2), ())


@pytest.mark.parametrize("options", [{}, dict(init_values=0.5)])
def test_inactive_blocks_and_copies_of_blocks(options: dict):
    model, images = small_model(**options).train(), some_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    order, pairs = deepen((0, 1), 4, 4)
    start = Shape(block_order=(0, 1))
    set_shape(model, start)
    assert set_trainable(model, start) and not set_trainable(model, start)
    frozen = {name: tensor.clone() for name, tensor in model.blocks[2].state_dict().items()}
    train_steps(model, images, optimizer, 2)
    assert all(p.grad is None for p in model.blocks[2].parameters())
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.blocks[2].state_dict().items())
    whole = Shape(block_order=order)
    grow(model, start, whole, Growth(1, blocks=pairs), lambda p: optimizer.state[p])
    set_shape(model, whole)
    set_trainable(model, whole)
    for new, source in pairs:
        for mine, theirs in zip(model.blocks[new].parameters(), model.blocks[source].parameters(), strict=True):
            assert torch.equal(mine, theirs) and not optimizer.state[mine]
    deep = model(images)
    set_shape(model, Shape(block_order=order, skipped_blocks=tuple(new for new, _ in pairs)))
    two = model(images)
    assert not torch.allclose(deep, two)
    set_shape(model, start)
    assert torch.equal(model(images), two)


@pytest.mark.parametrize("options", [{}, dict(init_values=0.5)])
def test_exported_state_dict_is_that_of_a_smaller_model(options: dict):
    """A model with only the active blocks, renumbered, gives the same logits."""
    model, images = small_model(**options), some_images()
    for name, parameter in model.named_parameters():
        if name.endswith(".gamma"):
            nn.init.normal_(parameter)
    for order in ((0, 2, 1), (3,), (1, 3, 2, 0)):
        set_shape(model, Shape(block_order=order))
        plain = small_model(depth=len(order), **options)
        plain.load_state_dict(exported_state_dict(model))
        torch.testing.assert_close(plain(images), model(images))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_stage_embedding(pool: str):
    model, images = small_model(pool=pool), some_images()
    before = model(images)
    add_stage_table(model, StageEmbedding(5, 0.0, 0.1, "all"))
    assert model.stage_table.shape == (5, 32)
    torch.testing.assert_close(model(images), before)
    nn.init.normal_(model.stage_table)
    set_shape(model, Shape(stage=1))
    one = model(images)
    set_shape(model, Shape(stage=3))
    three = model(images)
    assert not torch.allclose(one, three)
    plain = small_model(pool=pool)
    plain.load_state_dict(exported_state_dict(model))
    torch.testing.assert_close(plain(images), three, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain(some_images(32)), model(some_images(32)), rtol=1e-4, atol=1e-5)
    model.train()  # images whose draw is below 0.1 get no stage
    noise = torch.full((3, 5, 2), 0.5)
    noise[1, -1, 0] = 0.05
    mixed = model(images, noise)
    model.eval()
    set_shape(model, Shape(stage=4))  # the last row: no stage
    torch.testing.assert_close(mixed[1], model(images)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], three[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("vitlocal_localvit_tiny_patch8_64", Shape(hidden=(4,)), "a part of its hidden width"),
        (
            "vitlocal_localvit_tiny_patch8_64",
            Shape(token_keep_rate=0.5, pruned_blocks=(1,)),
            "a part of its hidden width or tokens",
        ),
        (FAMILIES[0], Shape(heads=(5,)), "got heads 5, expected 1 to 4"),
        (FAMILIES[0], Shape(grid=7), "got grid 7, expected 1 to 6"),
        (FAMILIES[0], Shape(block_order=(0, 4)), "no block 4"),
    ],
)
def test_shapes_that_the_model_lacks_are_errors(name: str, shape: Shape, problem: str):
    with pytest.raises(ConfigError, match=problem):
        check_shape(small_model(name), shape)


def test_timms_models_can_only_change_blocks():
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    assert model_parts(model) is None
    check_shape(model, Shape(trainable_blocks=(1,)))
    with pytest.raises(ConfigError, match="timm's own model.* heads"):
        check_shape(model, Shape(heads=(1,)))
    assert set_trainable(model, Shape(trainable_blocks=(1,)))
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    with pytest.raises(ConfigError, match="no blocks"):
        check_shape(timm.create_model("resnet10t"), Shape(trainable_blocks=(1,)))
