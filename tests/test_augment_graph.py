"""RandAugment and three-augment on whole batches: the images of the version by groups, in a few operations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from compilers import needs_cxx

from vitlocal.bench.augment import RECIPES, OperatorCount, compiled_calls
from vitlocal.data import augment_graph as graph
from vitlocal.data import augment_groups as groups
from vitlocal.data.augment import Augment, AugmentParams
from vitlocal.data.shares import Share

CHANCE = graph.slot_chance(groups.TIMM)


def photos(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Smooth images with some noise: (B, 3, S, S) uint8, channels-last."""
    draw = torch.Generator().manual_seed(seed)
    coarse = 255 * torch.rand(count, 3, 4, 4, generator=draw)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    noisy = smooth + 4 * torch.randn(smooth.shape, generator=draw)
    return noisy.clamp(0, 255).to(torch.uint8).contiguous(memory_format=torch.channels_last)


def by_graph(
    augment: Augment, x: torch.Tensor, step: int, places: np.ndarray | None = None, strength: float = 1.0
) -> torch.Tensor:
    places = np.arange(len(x)) if places is None else places
    values = augment.draw(1, step, places, len(x), x.shape[-1], operations=strength).operations
    return augment._operate(x, values)


def both_move(step: int, count: int, strength: float, operations: groups.OperationSet) -> np.ndarray:
    """Whether both turns move an image, (B,)."""
    turns = groups.draw_turns(9, 1, step, np.arange(count), strength, operations)
    moved = [(turn.variants >= groups.MOVING) & (turn.variants < groups.CUTTING) for turn in turns]
    return np.logical_and.reduce([turn.applied & moves for turn, moves in zip(turns, moved, strict=True)])


@pytest.mark.parametrize(("size", "count", "steps"), [(32, 64, 6), (32, 7, 4), (32, 2, 4), (32, 1, 4), (224, 7, 2)])
@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("name", groups.OPERATION_SETS)
def test_randaugment_gives_the_images_of_the_groups(name: str, size: int, count: int, steps: int, strength: float):
    augment, moved_twice = Augment(randaugment=9, randaugment_ops=name), 0
    for step in range(steps):
        x = photos(count, size, step)
        expected = augment.prepare(x, 1, step, np.arange(count), strength)
        got = by_graph(augment, x, step, strength=strength)
        assert got.dtype == torch.uint8 and got.is_contiguous(memory_format=torch.channels_last)
        error, twice = (got.int() - expected.int()).abs(), both_move(step, count, strength, groups.OPERATION_SETS[name])
        # A grey level that is rounded otherwise becomes more than one if, for example, posterize comes next.
        once = error[~twice]
        assert (once > 0).sum() <= 1e-3 * once.numel() and (once > 2).sum() <= 1e-4 * once.numel()
        # These are interpolated once instead of twice: what the moves change is the same.
        for image in np.flatnonzero(twice):
            change = (expected[image].int() - x[image].int()).abs().float().mean()
            assert error[image].float().mean() < max(1.0, 0.2 * change)
        moved_twice += twice.sum()
    assert count < 64 or moved_twice >= 3


@pytest.mark.parametrize(("size", "count"), [(32, 64), (32, 7), (32, 2), (32, 1), (224, 7)])
@pytest.mark.parametrize("strength", [1.0, 0.4])
def test_three_augment_gives_the_images_of_the_groups(size: int, count: int, strength: float):
    augment = Augment(three_augment=True)
    for step in range(3):
        x = photos(count, size, step)
        error = by_graph(augment, x, step, strength=strength).int()
        error -= augment.prepare(x, 1, step, np.arange(count), strength).int()
        assert error.abs().max() <= 1 and (error != 0).sum() <= 0.05 * error.numel()  # half-precision numbers between


@pytest.mark.parametrize("operations", groups.OPERATION_SETS.values(), ids=groups.OPERATION_SETS)
@pytest.mark.parametrize("name", groups.COLOURS)
def test_each_colour_operation_is_that_of_the_groups(name: str, operations: groups.OperationSet):
    assert graph.COLOURS.keys() == groups.COLOURS.keys()
    levels, signs = np.repeat([0.0, 0.1, 0.5, 0.93, 1.0], 2), np.tile([-1, 1], 5)
    x = photos(10, 24)
    x[1] = 100  # of one colour: nothing to stretch
    x[2, 1] = x[2, 1] // 8 + 3
    both = zip(levels.tolist(), signs.tolist(), strict=True)
    arguments = [operations.arguments[name](level, sign) for level, sign in both]
    numbers = np.array([graph.COLOURS[name](argument) for argument in arguments])
    colour = graph.Colour(*torch.from_numpy(numbers.astype(np.float32)).unbind(1))
    got = graph._colour(x.permute(0, 2, 3, 1), colour, CHANCE).permute(0, 3, 1, 2)
    for image, argument in enumerate(arguments):
        expected = groups.COLOURS[name](x[image : image + 1], argument)[0]
        error = (got[image].int() - expected.int()).abs()
        # A sum that is a whole number may be cut off to the one below, here or there.
        assert error.max() <= 1 and (error > 0).float().mean() <= 0.05


@pytest.mark.parametrize("size", [24, 224])
def test_without_an_operation_an_image_stays_bit_for_bit(size: int):
    x = photos(3, size)
    assert torch.equal(by_graph(Augment(randaugment=9), x, 0, strength=0.0), x)
    assert torch.equal(by_graph(Augment(three_augment=True), x, 0, strength=0.0), x)


def test_what_left_the_image_does_not_return():
    """One move shifts an image by its whole width, the other one shifts it back."""
    x = photos(1, 24)
    shift = torch.tensor([[1.0, 0, 24], [0, 1, 0]])
    identity, shifted = torch.eye(3)[None, :2], shift[None]
    moved = graph._moved(x.permute(0, 2, 3, 1), identity, shifted).permute(0, 3, 1, 2)
    assert (moved == moved[:, :, :1, :1]).all()  # padding everywhere
    assert torch.equal(graph._moved(x.permute(0, 2, 3, 1), identity, identity).permute(0, 3, 1, 2), x)


def test_slots_are_enough_and_the_first_images_of_a_batch_get_them():
    def chance_of_more(count: int, chance: float, slots: int) -> float:
        def log_term(k: int) -> float:
            ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
            return ways + k * math.log(chance) + (count - k) * math.log1p(-chance)

        return sum(math.exp(log_term(k)) for k in range(slots + 1, count + 1))

    for chance in (*map(graph.slot_chance, groups.OPERATION_SETS.values()), graph.BLUR_CHANCE):
        for count in (*range(1, 200), 256, 512, 1000, 1024, 2048, 4096):
            slots = graph.slot_count(count, chance)
            assert slots <= count and chance_of_more(count, chance, slots) < 1e-8
    needed = torch.tensor([False, *[True] * 80])
    images, slot, has_slot = graph._slots(needed, 0.1)
    slots = graph.slot_count(81, 0.1)
    assert images.tolist() == list(range(1, slots + 1)) and slots < 80
    assert has_slot.tolist() == [False, *[True] * slots, *[False] * (80 - slots)]
    assert slot[1 : slots + 1].tolist() == list(range(slots))
    # Images without a slot stay as they are, and free slots change nothing.
    x, some = photos(81, 24).permute(0, 2, 3, 1), torch.full((81,), 2.0)
    for name in ("autocontrast", "equalize", "sharpness"):
        colour = graph.Colour(*(some * 0 + value for value in graph.COLOURS[name](1.8)))
        out = graph._colour(x, colour, CHANCE)
        assert torch.equal(out[slots:], x[slots:]) and not torch.equal(out[slots - 1], x[slots - 1])
        alone = colour._replace(kind=colour.kind * (torch.arange(81) == 80))
        assert torch.equal(
            graph._colour(x, alone, CHANCE)[80],
            graph._colour(x[80:], graph.Colour(*(v[80:] for v in colour)), CHANCE)[0],
        )


@pytest.mark.parametrize("recipe", RECIPES)
def test_parts_of_a_batch_are_augmented_as_the_whole(recipe: str):
    """The parts of two processes, and micro-batches."""
    augment, x = Augment(**RECIPES[recipe], random_erasing=0.5, mixup=0.8), photos(20, 24)
    for step in range(3):
        whole = by_graph(augment, x, step)
        params = augment.draw(1, step, np.arange(20), 20, 24, operations=1.0)
        for rank in range(2):
            places = Share(rank, 2).places(20)
            assert torch.equal(by_graph(augment, x[places], step, places), whole[places])
            part = params.part(torch.from_numpy(places))
            own = augment.draw(1, step, places, 20, 24, operations=1.0)
            assert all(map(torch.equal, part, own))
    assert by_graph(augment, x[:0], 0).shape == (0, 3, 24, 24)
    assert not torch.equal(by_graph(augment, x, 0), by_graph(augment, x, 1))
    assert torch.equal(by_graph(augment, x, 1), by_graph(augment, x, 1))


def test_one_rule_says_which_version_runs():
    on_cpu, elsewhere = Augment(randaugment=9), Augment(randaugment=9).to("meta")
    assert elsewhere.in_forward and not on_cpu.in_forward
    drawn = elsewhere.draw(0, 0, np.arange(4), 4, 24, operations=1.0).operations
    assert drawn.device.type == "meta"  # on any accelerator, not only CUDA
    assert Augment().draw(0, 0, np.arange(4), 4, 24, operations=1.0) == AugmentParams()
    # At strength 0, a compiled step gets operands of the same form.
    assert on_cpu.draw(0, 0, np.arange(4), 4, 24, operations=0.0).operations.shape == (4, 28)
    holes = Augment(randaugment=9, randaugment_ops="big_vision").draw(0, 0, np.arange(99), 99, 24, operations=0.0)
    assert holes.operations.shape == (99, 28 + 8) and not holes.operations[:, 28:].any()


def test_prepare_on_another_device_runs_the_graph(monkeypatch: pytest.MonkeyPatch):
    """For evaluations of augmented batches, outside of a training step."""
    x = photos(16, 24)
    for options in RECIPES.values():
        augment = Augment(**options)
        expected = by_graph(augment, x, 3)
        with monkeypatch.context() as patch:
            patch.setattr(Augment, "in_forward", True)
            assert torch.equal(augment.prepare(x, 1, 3, np.arange(16)), expected)
            assert not torch.equal(augment.prepare(x, 1, 3, np.arange(16), 0.5), expected)


@pytest.mark.parametrize(
    ("recipe", "limit"), [("randaugment", 300), ("randaugment, big_vision", 330), ("three-augment", 80)]
)
def test_the_operations_are_the_same_in_each_step(recipe: str, limit: int):
    augment, found = Augment(**RECIPES[recipe]), set()
    for step in range(4):
        params = augment.draw(1, step, np.arange(9), 9, 24, operations=1.0)
        with OperatorCount() as count:
            augment(photos(9, 24), params)
        found.add((count.others, count.views))
    assert len(found) == 1 and found.pop()[0] <= limit


@pytest.mark.parametrize("recipe", RECIPES)
def test_torch_compile_makes_one_graph_for_all_steps(recipe: str):
    """No graph break, so nothing depends on values or waits for them."""
    augment, x = Augment(**RECIPES[recipe]), photos(9, 24)
    torch.compiler.reset()
    compiled = torch.compile(augment, backend="aot_eager", fullgraph=True, dynamic=False)
    for step, strength in enumerate((1.0, 0.5, 0.0)):
        params = augment.draw(1, step, np.arange(9), 9, 24, operations=strength)
        with torch.compiler.set_stance("default" if step == 0 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(x, params), augment(x, params), rtol=0, atol=0.02)


@needs_cxx
@pytest.mark.parametrize("recipe", ["randaugment", "three-augment"])
def test_a_compiler_needs_few_kernels(recipe: str):
    """At most 40 for RandAugment, which has 525 operations by groups. A GPU's kernels are smaller: it needs 19."""
    augment, x = Augment(**RECIPES[recipe]), photos(9, 24)
    params = augment.draw(1, 2, np.arange(9), 9, 24, operations=1.0)
    torch.compiler.reset()
    compiled = torch.compile(augment, fullgraph=True, dynamic=False)
    with torch._inductor.config.patch({"cpp.simdlen": 0}):  # without vectors it compiles faster
        assert 2 <= compiled_calls(compiled, x, params) <= 40
    error = (compiled(x, params) - augment(x, params)).abs()
    assert error.max() < 0.02 and (error > 1e-5).float().mean() < 1e-3  # 0.02: one grey level
