"""Which part of a model runs, and what new parts start as."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from vitlocal.errors import ConfigError
from vitlocal.models.flops import count_macs
from vitlocal.models.shape import (
    add_stage_table,
    check_shape,
    grow,
    in_shape,
    parts_of,
    plain_state,
    put,
    set_trainable,
    slices,
)
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import WHOLE_MODEL, Growth, Shape, StageEmbedding, deepen, duplicated_layers, growth_sources

FAMILIES = ("vitlocal_tiny_patch8_64", "vitlocal_deit_tiny_patch8_64")
DEIT_S = "vitlocal_deit_small_patch16_224"
BUDGETED = (Shape(heads=2, hidden=384, grid=10), Shape(heads=4, hidden=768, grid=12), WHOLE_MODEL)  # of DeiT-S


def a_model(name: str = FAMILIES[0], **options) -> VisionTransformer:
    torch.manual_seed(0)
    defaults = dict(img_size=48, embed_dim=32, depth=4, num_heads=4, num_classes=5)
    return timm.create_model(name, **defaults | options).eval()


def some_images(size: int = 48, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module, images: torch.Tensor, optimizer: torch.optim.Optimizer, steps: int = 1) -> None:
    for step in range(steps):
        loss = nn.functional.cross_entropy(model(images), torch.arange(len(images)) + step % 2)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def small_copy(model: VisionTransformer, heads: int, hidden: int) -> VisionTransformer:
    """A model that is as large as the active part, with its weights: the slow twin of slices."""
    small = a_model((type(model).__name__ == "DeiT" and FAMILIES[1]) or FAMILIES[0], mlp_ratio=hidden / 32)
    state = {}
    width = 32 // 4 * heads
    for name, tensor in model.state_dict().items():
        if "fc1" in name or "mlp.conv" in name:
            tensor = tensor[:hidden]
        elif "fc2.weight" in name:
            tensor = tensor[:, :hidden]
        elif "qkv" in name:  # heads that do not run get zero values
            parts = tensor.clone().view(3, 32, *tensor.shape[1:])
            parts[2, width:] = 0
            tensor = parts.view(tensor.shape)
        state[name] = tensor
    small.load_state_dict(state)
    for block in small.blocks:
        block.attn.proj.weight.data[:, width:] = 0
    return small


@pytest.mark.parametrize("name", FAMILIES)
def test_slices_compute_what_a_smaller_model_does(name: str):
    model, images = a_model(name), some_images()
    small = small_copy(model, heads=2, hidden=48)
    put(model, Shape(heads=2, hidden=48))
    torch.testing.assert_close(model(images), small(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("crops_images", [False, True])
def test_the_grids_centre(name: str, pool: str, crops_images: bool):
    """The centre of the tokens, with the centre's rows of the position table."""
    model, images = a_model(name, pool=pool), some_images()
    with in_shape(model, Shape(grid=3, crop_before_embedding=crops_images), WHOLE_MODEL):
        tokens, grid = model.embed(images)
    assert grid == (3, 3)
    whole, _ = model.embed(images)
    num_prefix_tokens = pool == "token"
    centre = whole[:, num_prefix_tokens:].unflatten(1, (6, 6))[:, 1:4, 1:4].flatten(1, 2)
    torch.testing.assert_close(tokens[:, num_prefix_tokens:], centre)
    assert torch.equal(tokens[:, :num_prefix_tokens], whole[:, :num_prefix_tokens])


def test_costs_of_the_published_stages():
    model = timm.create_model(DEIT_S)
    costs = []
    for shape in BUDGETED:
        with in_shape(model, shape, WHOLE_MODEL):
            costs.append(count_macs(model, 224) / 1e9)
    assert costs == pytest.approx([0.69, 1.91, 4.61], rel=0.03)
    for epochs, published in (((86, 105, 243), 1379.1), ((55, 55, 193), 1032.1), ((49, 71, 113), 689.8),
                              ((29, 49, 50), 343.7)):  # fmt: skip
        # With their layer norms at 5 operations an element, as the published figures seem to count.
        norms = [5 * 25 * 384 * (side * side + 1) / 1e9 for side in (10, 12, 14)]
        total = sum((cost + norm) * count for cost, norm, count in zip(costs, norms, epochs, strict=True))
        assert total == pytest.approx(published, rel=0.003)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_does_not_run_has_no_gradient_and_no_moments(name: str):
    model, images = a_model(name, pool="avg").train(), some_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    put(model, Shape(heads=2, hidden=48))
    trained(model, images, optimizer, 3)
    for part in slices(model):
        new = part.of(optimizer.state[part.parameter]["exp_avg_sq"]).movedim(part.axis, 0)
        active = {"heads": 2, "hidden": 48}[part.unit]
        assert new[:active].any() and not new[active:].any()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("moments", ["zero", "copy", "reset"])
def test_growth(name: str, moments: str):
    """Old slots stay bit for bit, new ones equal their sources, and part from them at the first step: unless moments
    are copied, too, and the part that goes out is the same."""
    options = dict(pool="avg", qkv_bias=False)  # a bias of keys has no effect, and noise for a gradient
    model, images = a_model(name, **options).train(), some_images()
    average = a_model(name, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    small, larger = Shape(heads=2, hidden=48), Shape(heads=3, hidden=112)
    put(model, small)
    trained(model, images, optimizer, 3)
    before = {part.parameter: part.parameter.detach().clone() for part in slices(model)}
    old_moments = {p: optimizer.state[p]["exp_avg"].clone() for p in before}
    grow(model, small, larger, Growth(1, moments=moments), lambda p: optimizer.state[p], [average])
    put(model, larger)
    limits = {"heads": (2, 3), "hidden": (48, 112)}

    def slots(part, tensor):
        return part.of(tensor).movedim(part.axis, 0)

    for part in slices(model):
        old, new = limits[part.unit]
        now = slots(part, part.parameter)
        was = slots(part, before[part.parameter])
        assert torch.equal(now[:old], was[:old]) and torch.equal(now[new:], was[new:])
        sources = [place % old for place in range(new - old)]
        assert torch.equal(now[old:new], was[sources])
        state = optimizer.state[part.parameter]
        for value in (state["exp_avg"], state["exp_avg_sq"]):
            fresh = slots(part, value)[old:new]
            if moments == "copy":
                assert torch.equal(fresh, slots(part, value)[sources])
            else:
                assert not fresh.any()
        kept = slots(part, state["exp_avg"])[:old]
        assert torch.equal(kept, slots(part, old_moments[part.parameter])[:old]) == (moments != "reset")
        assert (state["step"] == 0) == (moments == "reset")
    mirrored = {part.parameter: theirs.parameter for part, theirs in zip(slices(model), slices(average), strict=True)}
    for part in slices(model):  # an average grows from itself
        old, new = limits[part.unit]
        theirs = slots(part, mirrored[part.parameter])
        assert torch.equal(theirs[old:new], theirs[[place % old for place in range(new - old)]])
    trained(model, images, optimizer)
    tied = []
    for part in slices(model):
        old, new = limits[part.unit]
        now = slots(part, part.parameter)
        tied.append(torch.allclose(now[old:new], now[[place % old for place in range(new - old)]], rtol=1e-3))
    assert all(tied) if moments == "copy" else not any(tied) if moments == "zero" else True


def test_halved_copies_keep_the_function():
    model, images = a_model().train(), some_images()
    small = Shape(heads=2, hidden=64)
    put(model, small)
    before = model(images)
    larger = Shape(heads=4, hidden=128)
    grow(model, small, larger, Growth(1, scale=0.5), lambda p: {})
    put(model, larger)
    torch.testing.assert_close(model(images), before, rtol=1e-4, atol=1e-5)


def test_the_slots_that_are_copied():
    assert growth_sources(4, 6) == [0, 1] and growth_sources(4, 6, "last") == [2, 3]
    assert growth_sources(2, 4, "last") == [0, 1] and growth_sources(2, 7, "last") == [0, 1, 0, 1, 0]
    model = a_model()
    grow(model, Shape(hidden=96), WHOLE_MODEL, Growth(1, sources="last"), lambda p: {})
    weight = model.blocks[0].mlp.fc1.weight
    assert torch.equal(weight[96:], weight[64:96])


def test_random_slots_are_drawn_as_at_the_start():
    """Whatever decay did to them while they did not run; and the same in every process."""
    grown = []
    for _ in range(2):
        model = a_model()
        with torch.no_grad():
            for part in slices(model):
                part.parameter.mul_(0.1)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        grow(model, Shape(hidden=64), WHOLE_MODEL, Growth(1, weights="random"), lambda p: {}, [a_model()], seed=3)
        grown.append(dict(model.named_parameters()))
        weight, was = model.blocks[0].mlp.fc1.weight, before["blocks.0.mlp.fc1.weight"]
        assert torch.equal(weight[:64], was[:64]) and float(weight[64:].detach().std()) == pytest.approx(0.02, rel=0.1)
        assert torch.equal(model.blocks[0].attn.qkv.weight, before["blocks.0.attn.qkv.weight"])
    assert all(torch.equal(grown[0][name], grown[1][name]) for name in grown[0])


def test_a_model_from_its_average_keeps_its_own_drop_path():
    model, average = a_model(drop_path_rate=0.4), a_model(drop_path_rate=0.4)
    put(model, Shape(block_order=(0, 1)))
    model.set_drop_path(0.4)
    rates = model.drop_path_rates.clone()
    grow(model, WHOLE_MODEL, WHOLE_MODEL, Growth(1, average=0), lambda p: {}, [average])
    assert torch.equal(model.drop_path_rates, rates)
    assert torch.equal(model.head.weight, average.head.weight)


def test_timms_heads_are_found_whatever_they_are_called():
    model = timm.create_model("efficientnet_b0", num_classes=5)
    set_trainable(model, Shape(trainable_blocks=(6,), head_only=True))
    trained = {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"blocks", "conv_head", "bn2", "classifier"}


def test_the_head_alone_is_trained():
    model = a_model(pool="token")
    assert set_trainable(model, Shape(trainable_blocks=(3,), head_only=True))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {"blocks", "norm", "head"}
    assert {name.split(".")[1] for name in trained if name.startswith("blocks")} == {"3"}
    features = []
    model.blocks[2].register_forward_hook(lambda module, given, found: features.append(found))
    model(some_images()).sum().backward()
    assert not features[0].requires_grad  # nothing below has a backward


def test_noise_is_the_same_everywhere():
    grown = []
    for _ in range(2):
        model = a_model()
        grow(model, Shape(hidden=64), WHOLE_MODEL, Growth(1, noise=0.1), lambda p: {}, seed=3)
        grown.append(model.state_dict())
    assert all(torch.equal(grown[0][name], grown[1][name]) for name in grown[0])
    fc1 = grown[0]["blocks.0.mlp.fc1.weight"]
    assert 0 < (fc1[64:] - fc1[:64]).std() / fc1[:64].std() < 0.2


def test_growth_maps():
    assert duplicated_layers(9, 12) == [0, 1, 2, 3, 4, 5, 6, 6, 7, 7, 8, 8]
    assert duplicated_layers(6, 8) == [0, 1, 2, 3, 4, 4, 5, 5]
    assert duplicated_layers(6, 12) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert duplicated_layers(12, 12) == list(range(12))
    order, pairs = deepen((0, 1, 2, 3, 4, 5), 8, 12)
    assert order == (0, 1, 2, 3, 4, 6, 5, 7) and pairs == ((6, 4), (7, 5))
    assert deepen((0, 7, 2), 3, 8) == ((0, 7, 2), ())


def test_blocks_that_do_not_run_and_copies_of_blocks():
    model, images = a_model().train(), some_images()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    order, pairs = deepen((0, 1), 4, 4)
    start = Shape(block_order=(0, 1))
    put(model, start)
    assert set_trainable(model, start) and not set_trainable(model, start)
    frozen = {name: tensor.clone() for name, tensor in model.blocks[2].state_dict().items()}
    trained(model, images, optimizer, 2)
    assert all(p.grad is None for p in model.blocks[2].parameters())
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in model.blocks[2].state_dict().items())
    whole = Shape(block_order=order)
    grow(model, start, whole, Growth(1, blocks=pairs), lambda p: optimizer.state[p])
    put(model, whole)
    set_trainable(model, whole)
    for new, source in pairs:
        for mine, theirs in zip(model.blocks[new].parameters(), model.blocks[source].parameters(), strict=True):
            assert torch.equal(mine, theirs) and not optimizer.state[mine]
    deep = model(images)
    put(model, Shape(block_order=order, skipped_blocks=tuple(slot for slot, _ in pairs)))
    two = model(images)
    assert not torch.allclose(deep, two)
    put(model, start)
    assert torch.equal(model(images), two)


def test_a_net_taken_out_is_a_plain_net():
    """The state of the active blocks, renumbered, in a model that has no others: the same logits."""
    model, images = a_model(), some_images()
    for order in ((0, 2, 1), (3,), (1, 3, 2, 0)):
        put(model, Shape(block_order=order))
        plain = a_model(depth=len(order))
        plain.load_state_dict(plain_state(model))
        torch.testing.assert_close(plain(images), model(images))


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_stage_that_a_model_is_told(pool: str):
    model, images = a_model(pool=pool), some_images()
    before = model(images)
    add_stage_table(model, StageEmbedding(5, 0.0, 0.1, "all"))
    assert model.stage_table.shape == (5, 32)
    torch.testing.assert_close(model(images), before)
    nn.init.normal_(model.stage_table)
    put(model, Shape(stage=1))
    one = model(images)
    put(model, Shape(stage=3))
    three = model(images)
    assert not torch.allclose(one, three)
    plain = a_model(pool=pool)
    plain.load_state_dict(plain_state(model))
    torch.testing.assert_close(plain(images), three, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(plain(some_images(32)), model(some_images(32)), rtol=1e-4, atol=1e-5)
    model.train()  # of images whose draw is below 0.1 the stage is not told
    noise = torch.full((3, 5, 2), 0.5)
    noise[1, -1, 0] = 0.05
    mixed = model(images, noise)
    model.eval()
    put(model, Shape(stage=4))  # the last row: no stage
    torch.testing.assert_close(mixed[1], model(images)[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[0], three[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape", "problem"),
    [
        ("vitlocal_localvit_tiny_patch8_64", Shape(hidden=4), "a part of its hidden width"),
        (
            "vitlocal_localvit_tiny_patch8_64",
            Shape(token_keep_rate=0.5, pruned_blocks=(1,)),
            "a part of its hidden width or tokens",
        ),
        (FAMILIES[0], Shape(heads=5), "heads 5 of 4"),
        (FAMILIES[0], Shape(grid=7), "grid 7 of 6"),
        (FAMILIES[0], Shape(block_order=(0, 4)), "no block 4"),
    ],
)
def test_parts_that_are_not_there(name: str, shape: Shape, problem: str):
    with pytest.raises(ConfigError, match=problem):
        check_shape(a_model(name), shape)


def test_timms_own_models_have_blocks_alone():
    model = timm.create_model("vit_tiny_patch16_224", depth=2)
    assert parts_of(model) is None
    check_shape(model, Shape(trainable_blocks=(1,)))
    with pytest.raises(ConfigError, match="timm's own: heads"):
        check_shape(model, Shape(heads=1))
    assert set_trainable(model, Shape(trainable_blocks=(1,)))
    assert not any(p.requires_grad for p in model.blocks[0].parameters())
    with pytest.raises(ConfigError, match="no blocks"):
        check_shape(timm.create_model("resnet10t"), Shape(trainable_blocks=(1,)))
