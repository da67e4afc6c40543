"""The training step: its variants agree with the plain one, and none waits for the device."""

from __future__ import annotations

import copy
import gc
import math
import warnings
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from compilers import needs_cxx

from vitlocal.data.augment import Augment
from vitlocal.data.batch import Batch
from vitlocal.errors import ConfigError
from vitlocal.models.local_mix import can_fuse
from vitlocal.plan import WHOLE_MODEL, Dials, Feed
from vitlocal.train.build import build_step, compiles
from vitlocal.train.devices import (
    CACHE_VARIABLES,
    EAGER,
    Mode,
    StepCompiler,
    choose_device,
    choose_precision,
    compile_cache,
    fast_attention,
)  # fmt: skip
from vitlocal.train.distributed import Ranks
from vitlocal.train.probes import layer_gradients
from vitlocal.train.step import TrainStep, micro_batches

CLASSES = 10
CPU = torch.device("cpu")
AUGMENTED = ["--augment.randaugment=9", "--augment.mixup=0.8", "--augment.cutmix=1", "--augment.random_erasing=0.5"]


def a_batch(count: int, size: int = 24, device: torch.device = CPU) -> Batch:
    draw = np.random.default_rng(count)
    images = torch.from_numpy(draw.integers(0, 256, (count, size, size, 3), np.uint8)).permute(0, 3, 1, 2)
    labels = torch.from_numpy(draw.integers(0, CLASSES, count))
    return Batch.whole(images.to(device), labels.to(device), torch.arange(count))


def a_step(configure, *options: str, device: torch.device = CPU) -> TrainStep:
    """A step with the same weights each time; options override."""
    config = configure("--model.size=24", "--methods=none", "--model.drop_path=0.3", *AUGMENTED, *options)
    return build_step(config, CLASSES, device)


def trained(step: TrainStep, mode: Mode = EAGER, steps: int = 3, count: int = 12) -> tuple[list[float], dict]:
    losses = [float(step(a_batch(count, device=step.device), number, 1e-3, mode).loss) for number in range(steps)]
    return losses, step.model.state_dict()


def close(first, second, tolerance: float = 2e-6) -> None:
    assert first[0] == pytest.approx(second[0], rel=1e-5)
    for name, value in first[1].items():
        torch.testing.assert_close(value, second[1][name], atol=tolerance, rtol=1e-4, msg=name)


@pytest.fixture
def in_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps augment whole batches, as on an accelerator."""
    monkeypatch.setattr(Augment, "in_forward", True)


def test_compiled_code_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for variable in CACHE_VARIABLES:
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache() == tmp_path / "vitlocal" / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert compile_cache() == tmp_path / "mine"


@needs_cxx
def test_the_compiled_step_is_the_eager_one(configure):
    eager, compiled = a_step(configure, "--model.depth=2"), a_step(configure, "--model.depth=2", "--train.compile=yes")
    assert compiled.mode(Feed(24, 12)) == Mode(compiled=True) and eager.mode(Feed(24, 12)) == EAGER
    close(trained(eager), trained(compiled, Mode(compiled=True)))
    images = a_batch(8).images
    for whole in (True, False):  # evaluation
        for model in (eager.model, compiled.model):
            model.eval()
        with torch.no_grad():
            both = [step.predict_fn(step.model)(whole, images) for step in (eager, compiled)]
        torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def test_nothing_is_compiled_again_after_the_last_batch_of_an_epoch(configure):
    """That batch runs eagerly. It caches a matrix, on which the compiled graph must not depend."""
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    step = a_step(configure, "--model.size=48", "--model.depth=1", "--train.compile=yes")
    step._compiler._objectives[False] = torch.compile(step._ddp, dynamic=False, backend=backend)
    mode = step.mode(Feed(24, 12))
    for count in (12, 7, 12, 5, 12):
        step(a_batch(count), 0, 1e-3, mode if count == 12 else EAGER)
    assert len(graphs) == 1


def test_an_eager_batch_of_a_compiled_run_comes_in_two_parts(configure):
    """An eager step keeps more activations, and the memory may be just enough for a compiled step.

    With a BatchNorm the batch stays whole.
    """
    local, batch_norm = (
        a_step(configure, f"--model.name={name}", "--train.compile=yes", "--model.heads=2")
        for name in ("vitlocal_tiny_patch8_64", "vitlocal_localvit_tiny_patch8_64")
    )
    assert [len(part) for part in local._parts(8, EAGER)] == [4, 4]
    assert len(local._parts(8, Mode(True))) == len(batch_norm._parts(8, EAGER)) == 1


@pytest.mark.parametrize("parts", [1, 2])
def test_an_image_alone_trains_a_batch_norm(configure, parts: int):
    """PyTorch cannot normalize one value. The image runs twice, with half the weight."""
    options = ("--model.name=test_resnet", "--model.convolution=none", "--model.drop_path=0", "--model.depth=none")
    none = ("--model.width=none", "--model.heads=none", "--model.patch_size=none")
    step = a_step(configure, *options, *none, f"--train.grad_accum_steps={parts}")
    for count in (1, 3):
        output = step(a_batch(count), 0, 1e-3, EAGER)
        assert math.isfinite(output.loss)


@pytest.mark.parametrize("count", [12, 11, 2])
@pytest.mark.parametrize("version", ["by groups", "in_graph"])
def test_parts_of_a_batch_give_the_gradients_of_the_whole(configure, count: int, version: str, request):
    if version == "in_graph":
        request.getfixturevalue("in_graph")
    # The weights are not compared: AdamW makes a full step of a rounded gradient near zero.
    steps = a_step(configure), a_step(configure, "--train.grad_accum_steps=3")
    for step in steps:
        step._gradients(a_batch(count), 0, EAGER)
    for (name, one), other in zip(steps[0].model.named_parameters(), steps[1].model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-6, rtol=1e-4, msg=name)


def test_micro_batches_hold_every_sample_once_in_mirrored_pairs():
    for count in (1, 2, 3, 12, 13):
        for parts in (1, 2, 3, 8):
            found = micro_batches(count, parts)
            assert all(len(part) for part in found) and len(found) <= parts
            assert sorted(np.concatenate(found)) == list(range(count))
            assert all(np.array_equal(count - 1 - part[::-1], part) for part in found)


@pytest.mark.parametrize(
    "options",
    [
        ["--model.name=vitlocal_tiny_patch8_64"],
        ["--model.name=vitlocal_deit_tiny_patch8_64", "--model.stem=hmlp", "--model.stem_norm=batch"],
    ],
)
def test_gradient_checkpointing_changes_only_memory(configure, options: list[str]):
    kept, again = (a_step(configure, *options, f"--train.grad_checkpointing={wish}") for wish in ("false", "true"))
    assert again.model.grad_checkpointing and not kept.model.grad_checkpointing
    close(trained(kept), trained(again), tolerance=1e-9)

    def held(step: TrainStep) -> int:
        """Bytes that the forward keeps for the backward."""
        found: dict[int, int] = {}

        def note(tensor: torch.Tensor) -> torch.Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = step.model(torch.zeros(8, 3, 24, 24)).sum()
        del loss
        return sum(found.values())

    assert held(again) < 0.7 * held(kept)


@pytest.mark.parametrize("drop_path", [0, 0.3])
def test_dropout_has_keys(configure, drop_path: float):
    """A step after a restart draws what it drew before, and a recomputed block what it drew at first."""
    step = a_step(configure, f"--model.drop_path={drop_path}")
    rates = dict(drop_rate=0.2, proj_drop_rate=0.2, attn_drop_rate=0.2, patch_drop_rate=0.2)
    model = step.model
    dropping = type(model)(
        img_size=24, patch_size=model.patch_embed.patch_size[0], embed_dim=model.embed_dim, depth=len(model.blocks),
        num_heads=model.blocks[0].attn.num_heads, num_classes=CLASSES, drop_path_rate=float(drop_path), **rates,
    )  # fmt: skip
    dropping.load_state_dict(model.state_dict())
    step.model = step.task.model = step.task.objective.model = dropping
    step.task.repeats = not dropping.drops_out

    def gradients(number: int) -> list[torch.Tensor]:
        dropping.zero_grad()
        step._gradients(a_batch(12), number, EAGER)
        return [parameter.grad for parameter in dropping.parameters()]

    first, other = gradients(1), gradients(2)
    torch.rand(3)  # a restarted process has drawn other numbers
    again = gradients(1)
    assert all(map(torch.equal, first, again))
    assert not any(map(torch.equal, first[3:4], other[3:4]))
    dropping.set_grad_checkpointing()
    for one, recomputed in zip(first, gradients(1), strict=True):
        torch.testing.assert_close(one, recomputed, rtol=0, atol=1e-8)


@pytest.mark.parametrize("recipe", ["--augment.randaugment=9", "--augment.three_augment=yes"])
def test_on_whole_batches_a_step_sees_the_same_images(configure, monkeypatch: pytest.MonkeyPatch, recipe: str):
    """The logits of an augmented batch, and the loss with erasing and mixing, at full and at half strength."""
    others = [option for option in AUGMENTED if "randaugment" not in option]
    step = a_step(configure, "--augment.randaugment=0", *others, recipe)
    batch = a_batch(12)
    for dials in (Dials(), Dials(strength=0.5), Dials(strength=0.0)):
        step.set_dials(dials)
        found = []
        for in_graph in (False, True):
            monkeypatch.setattr(Augment, "in_forward", in_graph)
            logits, _ = step.probe(step.model, batch, 3, torch.float32)
            found.append((logits.detach(), float(step._gradients(batch, 3, EAGER).loss)))
            step.model.zero_grad()
        (logits, loss), (again, same) = found
        assert same == pytest.approx(loss, rel=2e-3)
        assert (logits - again).abs().mean() < 0.05 * logits.std()


def test_warm_up_leaves_no_trace(configure):
    step = a_step(configure, "--model.name=vitlocal_localvit_tiny_patch8_64", "--model.heads=2", "--train.compile=yes")
    step._compiler._objectives[False] = step._ddp  # the compiler's part is tested above
    before = copy.deepcopy(step.model.state_dict())
    assert step.warm_up(Feed(24, 8), CLASSES) > 0
    assert all(torch.equal(value, before[name]) for name, value in step.model.state_dict().items())
    assert all(parameter.grad is None for parameter in step.model.parameters())
    assert a_step(configure).warm_up(Feed(24, 8), CLASSES) == 0  # nothing to compile


def test_warm_up_rehearses_the_real_last_batch(configure, monkeypatch):
    step = a_step(configure, "--train.compile=yes")
    seen = []
    gradients = step.gradients

    def record(batch: Batch, mode: Mode = EAGER) -> dict:
        seen.append((len(batch), mode))
        return gradients(batch)

    monkeypatch.setattr(step, "gradients", record)
    full = [(8, Mode(compiled=True)), (8, EAGER)]  # both, to compare them
    step.warm_up(Feed(24, 8), CLASSES, rest=7)
    step.warm_up(Feed(24, 8), CLASSES)  # epochs of full batches only
    assert seen == [*full, (7, EAGER), *full]


def test_a_step_that_is_not_captured_is_compiled_before_it_trains(configure, monkeypatch):
    step = a_step(configure, "--train.compile=yes")
    step._compiler, gradients, seen = capturing(), step.gradients, []

    def skip(batch: Batch, mode: Mode = EAGER) -> dict:
        torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += mode.graphs
        seen.append(mode)
        return gradients(batch)

    monkeypatch.setattr(step, "gradients", skip)
    step.warm_up(Feed(24, 8), CLASSES)
    assert seen[0] == Mode(True, True) and seen[-2:] == [Mode(True), EAGER] and step.mode(Feed(24, 8)) == Mode(True)


@pytest.fixture
def several(tmp_path: Path) -> Iterator[Ranks]:
    """Ranks that wrap modules as for several processes, though there is one."""
    store = torch.distributed.FileStore(f"{tmp_path}/store", 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    ranks = Ranks()
    ranks.world = 2
    try:
        yield ranks
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("factor", "percent"), [(2.0, "100%"), (float("nan"), "nan%")])
@pytest.mark.parametrize("processes", ["one", "several"])
def test_a_step_that_is_compiled_wrongly_does_not_train(
    configure, processes: str, factor: float, percent: str, request
):
    step = a_step(configure, "--train.compile=yes")
    if processes == "several":  # they keep gradients in buffers that every backward pass writes
        step._ddp = request.getfixturevalue("several").wrap(step.task.objective)
        step.gradients(a_batch(8))  # makes the buffers

    def wrong(*operands):
        loss, *others = step._ddp(*operands)
        return factor * loss, *others

    step._compiler._objectives[False] = wrong
    with pytest.raises(
        ConfigError, match=rf"train\.compile: at 24 px, PyTorch .* differ .* by {percent}\. Use train\.compile=no"
    ):
        step.warm_up(Feed(24, 8), CLASSES)


def test_gradients_of_layers_stay_in_several_processes(configure, several: Ranks):
    step = a_step(configure)
    step._ddp = several.wrap(step.task.objective)
    step.gradients(a_batch(8))  # makes the buffers
    first = layer_gradients(step, a_batch(12))
    kept = {name: gradient.clone() for name, gradient in first.items()}
    assert any(not torch.equal(kept[name], value) for name, value in layer_gradients(step, a_batch(8)).items())
    assert all(torch.equal(kept[name], value) for name, value in first.items())


@needs_cxx
@pytest.mark.parametrize("name", ["", "deit_"])
def test_blocks_that_are_compiled_once_have_the_gradients_of_the_eager_step(configure, name: str):
    """Two blocks, with a class token: PyTorch 2.14 computes wrong gradients if it may reuse buffers."""
    step = a_step(configure, f"--model.name=vitlocal_{name}tiny_patch8_64", "--train.compile=yes")
    batch = a_batch(12)
    assert step.model.compiles_blocks_once
    compiled, eager = step.gradients(batch, Mode(compiled=True)), step.gradients(batch)
    for key, value in eager.items():
        torch.testing.assert_close(compiled[key], value, atol=1e-5, rtol=1e-3, msg=key)


def capturing(cuda_graphs: str = "auto") -> StepCompiler:
    """A compiler that captures sizes below 64 px."""
    return StepCompiler(True, cuda_graphs, True, lambda size, shape: int(1e9 if size < 64 else 1e12))


def test_small_steps_are_captured_and_their_memory_is_released():
    compiler, small, large = capturing(), Feed(32, 256), Feed(64, 256)
    assert compiler.mode(small, WHOLE_MODEL) == Mode(True, True) and compiler.mode(large, WHOLE_MODEL) == Mode(True)
    held = weakref.WeakSet()

    class Graph:  # as a compiled graph holds its memory
        def __call__(self, *operands: torch.Tensor) -> list[torch.Tensor]:
            return self.run(*operands)

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Graph:
        made = Graph()
        made.run = graph.forward
        held.add(made)
        return made

    double = lambda images: 2 * images  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        compile_ = torch.compile
        patch.setattr(torch, "compile", lambda call, dynamic, **how: compile_(call, dynamic=dynamic, backend=backend))
        for size in (32, 64):
            run = compiler.objective(double, compiler.mode(Feed(size, 256), WHOLE_MODEL))
            assert float(run(torch.ones(1))) == 2
        assert len(held) == 2
        del run
        compiler.release_graphs()
        compiler.release_graphs()  # there is nothing left to do
        gc.collect()
        assert len(held) == 1  # the large size's
        again = compiler.objective(double, Mode(True, True))
        assert float(again(torch.ones(1))) == 2 and len(held) == 2


def test_a_skipped_cuda_graph_is_reported_as_compiled():
    counters = torch._dynamo.utils.counters["inductor"]
    for choice in ("auto", "yes"):
        compiler = capturing(choice)
        with compiler.watched(Feed(32, 8), WHOLE_MODEL):
            pass
        assert compiler.mode(Feed(32, 8), WHOLE_MODEL).graphs
        refusal = pytest.raises(ConfigError, match=r"cuda_graphs: PyTorch does not capture the step at 32 px, batch 8")
        with refusal if choice == "yes" else nullcontext(), compiler.watched(Feed(32, 8), WHOLE_MODEL):
            counters["cudagraph_skips"] += 1
        assert compiler.mode(Feed(32, 8), WHOLE_MODEL) == Mode(compiled=True)
        counters["cudagraph_skips"] -= 1


@pytest.mark.parametrize("family", ["", "deit_", "localvit_"])
def test_processes_share_gradients_without_a_copy(configure, several: Ranks, family: str):
    """PyTorch warns if a gradient's strides are not its weight's, and copies it at each step."""
    step = a_step(configure, f"--model.name=vitlocal_{family}tiny_patch8_64")
    wrapped = several.wrap(step.model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in range(2):
            wrapped(torch.randn(4, 3, 24, 24).contiguous(memory_format=torch.channels_last)).sum().backward()


class Accelerator:
    """torch.accelerator of a machine with a device of another kind."""

    def __init__(self, kind: str):
        self.kind = kind

    def current_accelerator(self, check_available: bool = False) -> torch.device:
        return torch.device(self.kind)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_other_accelerators_train_eagerly(configure, monkeypatch, kind: str):
    device = torch.device(kind)
    monkeypatch.setattr(torch, "accelerator", Accelerator(kind))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device=None: empty(*sizes))
    assert choose_device("auto") == device == choose_device(kind)
    assert choose_precision("auto", device) is torch.float32
    assert not compiles("auto", device) and not can_fuse(device, (2, 2))
    with pytest.raises(ConfigError, match=rf"train\.compile: yes is for CUDA devices and CPUs, this run is on {kind}"):
        compiles("yes", device)
    with pytest.raises(ConfigError, match=rf"2 processes train together on CUDA devices or on CPUs, not on {kind}"):
        choose_device("auto", Ranks(0, 2, 0, 2))
    with pytest.raises(ConfigError, match=r"train\.precision: fp16 needs a CUDA device"):
        choose_precision("fp16", device)


def test_a_process_without_images_has_zero_gradients(configure):
    step = a_step(configure)
    assert float(step._gradients(Batch.empty(24, CPU, 1), 0, EAGER).loss) == 0
    assert all(not parameter.grad.any() for parameter in step.model.parameters() if parameter.requires_grad)


def test_what_a_device_cannot_do_is_an_error(configure):
    with pytest.raises(ConfigError, match=r"train\.kernel: fused needs a CUDA device"):
        a_step(configure, "--train.kernel=fused")
    with pytest.raises(ConfigError, match=r"train\.precision: fp16"):
        choose_precision("fp16", CPU)
    with pytest.raises(ConfigError, match=r"train\.kernel: plain is for local FFNs, and DeiT has none"):
        a_step(configure, "--train.kernel=plain", "--model.name=vitlocal_deit_tiny_patch8_64")
    with pytest.raises(ConfigError, match="BatchNorm would count each batch twice"):
        a_step(configure, "--train.grad_checkpointing=yes", "--model.norm=batch")
    with pytest.raises(ConfigError, match="yes needs a CUDA device"):
        a_step(configure, "--train.cuda_graphs=yes")
    with fast_attention(CPU):
        assert torch.backends.cuda.math_sdp_enabled()  # a CPU may use what it has


# --- on a GPU -----------------------------------------------------------------------------------------------------


GPU = torch.device("cuda")


def step_results(step: TrainStep, mode: Mode, number: int) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss and the gradients of step ``number`` on images of its own. The weights stay."""
    batch = a_batch(12, device=step.device)
    images = batch.images.permute(0, 2, 3, 1).roll(number, 0).permute(0, 3, 1, 2)
    loss = float(step._gradients(replace(batch, images=images), number, mode).loss)
    gradients = {name: part.grad.clone() for name, part in step.model.named_parameters() if part.grad is not None}
    step.model.zero_grad()
    return loss, gradients


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [[], ["--train.ema_decay=0.9", "--train.clip_norm=1", "--train.grad_accum_steps=2"]]
)
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # of setting it
def test_a_step_waits_for_nothing(configure, options: list[str], compiled: bool):
    step = a_step(
        configure, "--run.device=cuda", f"--train.compile={'yes' if compiled else 'no'}", *options, device=GPU
    )
    batch, mode = a_batch(16, device=GPU), Mode(compiled=compiled)
    for number in range(3):  # first uses load and compile, and a later step waits for the step before the last
        step(batch, number, 1e-3, mode)
    torch.cuda.synchronize()
    step._events.clear()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for number in range(2):
            copied = step(batch, number, 1e-3, mode).loss.to("cpu", non_blocking=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert float(copied) > 0


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [False, True])
def test_compiled_on_a_gpu_as_eager(configure, graphs: bool):
    """Gradients, and not weights: AdamW makes a full step of a rounded gradient near zero."""
    options = ["--run.device=cuda", "--train.precision=fp32"]
    eager = a_step(configure, "--train.compile=no", *options, device=GPU)
    captured = f"--train.cuda_graphs={'yes' if graphs else 'no'}"
    compiled = a_step(configure, "--train.compile=yes", captured, *options, device=GPU)
    for number in range(5):  # a graph is captured in the second run, and replayed from the third one on
        expected, got = step_results(eager, EAGER, number), step_results(compiled, Mode(True, graphs), number)
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_slow_attention_is_refused_on_a_gpu():
    heads = torch.randn(1, 1, 4, 7, device=GPU, dtype=torch.float64)  # no fused kernel takes float64
    with pytest.raises(ConfigError, match="no fused kernel"), fast_attention(GPU):
        torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)


@pytest.mark.parametrize(("classes", "names"), [(5, ["top1"]), (6, ["top1", "top5"])])
def test_the_best_five_of_five_classes_are_no_result(configure, classes: int, names: list[str]):
    task = build_step(configure("--model.size=24"), classes, CPU).task
    assert list(task.scores(np.ones((3, classes), np.int64)).values) == names
