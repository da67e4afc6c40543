"""Builds a run from a configuration. Only this file and the commands read a Config; other parts take plain values."""

import copy
import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlocal.config import IMMATERIAL, Config, check_same_run, recipe_text
from vitlocal.data.batch import Sources
from vitlocal.data.fields import LatentForm
from vitlocal.data.sources import open_sources
from vitlocal.errors import ConfigError
from vitlocal.machine import can_compile_kernels, keep_freed_memory, memory
from vitlocal.methods import METHODS, build_methods
from vitlocal.methods.method import Claims, Method, MethodContext
from vitlocal.models.block import BlockModel
from vitlocal.models.counts import activation_bytes, count_macs
from vitlocal.models.dit import reads_latents
from vitlocal.models.factory import build_model, load_weights, patch_side
from vitlocal.models.lffn import LocalFeedForward
from vitlocal.models.local_mix import can_fuse, measured_times
from vitlocal.models.shape import add_stage_table, check_shape, model_parts, set_shape
from vitlocal.plan import Feed, Shape
from vitlocal.tasks.task import sum_type
from vitlocal.train.budget import Clock, journal, journal_interval, read_spent
from vitlocal.train.build_task import check_outputs, make_task
from vitlocal.train.devices import choose_device, choose_precision
from vitlocal.train.distributed import ALONE, Ranks, find_ranks
from vitlocal.train.evaluator import Evaluator
from vitlocal.train.optim import CombinedOptimizer, ModelEma, build_optimizer
from vitlocal.train.output import RunOutput, load_checkpoint
from vitlocal.train.probes import MacCount
from vitlocal.train.run_folder import CHECKPOINT, JOURNAL, data_fingerprint, has_run, record_origin, run_folder_lock
from vitlocal.train.search_log import SearchLog
from vitlocal.train.state import TrainState
from vitlocal.train.step import TrainStep, has_batch_norm
from vitlocal.train.trainer import Trainer

# Models with larger values are checked before they are built.
USUAL_SIZES = {"size": 1024, "patch_size": 64, "width": 2048, "depth": 64}


def device_of(config: Config, ranks: Ranks = ALONE) -> torch.device:
    """Returns the device of ``run.device`` and makes it current. Sets ``run.threads`` CPU threads."""
    device = choose_device(config.run.device, ranks)
    if device.type == "cpu":
        keep_freed_memory()
    elif device.index is not None:
        torch.accelerator.set_device_index(device.index)  # streams and events are made on the current device
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    return device


def sources_of(config: Config, device: torch.device, ranks: Ranks = ALONE) -> Sources:
    """The training and validation data that the configuration names, as latents if the model learns these."""
    return open_sources(
        **config.source_arguments(), device=device, share=ranks.share, local_world_size=ranks.local_world_size,
        latents=reads_latents(config.model.name),
    )  # fmt: skip


# --- model, optimizer, averages and step ------------------------------------------------------------------------------


def make_model(
    config: Config, num_classes: int, device: torch.device, latents: LatentForm | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """The model on the device, with initial weights drawn from ``run.seed``, and the arguments it was made with.

    ``latents``: those in the data.
    """
    torch.manual_seed(config.run.seed)
    arguments = config.model.arguments()
    if latents is not None:
        arguments |= {"in_chans": latents.channels, "stride": latents.stride}
    check_memory(config, arguments, num_classes, device)
    model, arguments = build_model(config.model.name, arguments, num_classes)
    check_image_sizes(config, model)
    model = model.to(device).to(memory_format=torch.channels_last)
    for module in model.modules():
        # A depth-wise weight (C, 1, 3, 3) has the same order in both memory formats, but other strides. The gradients
        # of local_mix are contiguous. With several processes, PyTorch would copy them if the weight were not.
        if isinstance(module, LocalFeedForward) and module.conv is not None:
            module.conv.weight.data = module.conv.weight.data.clone(memory_format=torch.contiguous_format)
    return model.train(), arguments


def compiles(choice: str, device: torch.device) -> bool:
    """Whether the step is compiled, by ``train.compile``."""
    if choice == "yes" and device.type not in ("cpu", "cuda"):
        raise ConfigError(f"train.compile: yes is for CUDA devices and CPUs, this run is on {device.type}; use auto")
    return choice == "yes" or (choice == "auto" and device.type == "cuda" and can_compile_kernels())


def make_optimizer(
    config: Config, model: nn.Module, precision: torch.dtype
) -> torch.optim.Optimizer | CombinedOptimizer:
    """The recipe's optimizer of the model's weights. ``precision``: see :func:`build_optimizer`."""
    names = ("weight_decay", "betas", "eps", "muon_momentum")
    settings = {name: getattr(config.train, name) for name in names}
    return build_optimizer(model, config.train.optimizer, precision=precision, **settings)


def assemble_step(
    config: Config, model: nn.Module, device: torch.device, macs: MacCount, methods: Sequence[Method] = (),
    ranks: Ranks = ALONE, sources: Sources | None = None,
) -> tuple[TrainStep, list[ModelEma]]:  # fmt: skip
    """The step for ``model``, with its optimizer and weight average, and the averages that the methods need."""
    train = config.train
    precision = choose_precision(train.precision, device)
    configure_model(model, train.kernel, train.grad_checkpointing, device)
    compile_step = compiles(train.compile, device)
    if isinstance(model, BlockModel):
        model.compiles_blocks_once = compile_step  # before the averages are copied from it
    has_ema = train.ema_decay is not None or train.ema_length is not None
    ema = ModelEma(model, train.ema_decay or 0.0, train.ema_length) if has_ema else None
    method_emas = [ModelEma(model, decay) for method in methods for decay in method.needs.ema_decays]
    outputs: frozenset[str] = frozenset().union(*(method.needs.step_outputs for method in methods))
    step = TrainStep(
        make_task(config, model, device, precision, outputs, sources),
        make_optimizer(config, model, precision),
        device,
        ema=ema,
        method_emas=method_emas,
        seed=config.run.seed,
        clip_norm=train.clip_norm,
        grad_accum_steps=train.grad_accum_steps,
        compile_step=compile_step,
        cuda_graphs=train.cuda_graphs,
        macs=macs,
        ranks=ranks,
    )
    return step, method_emas


def build_step(config: Config, num_classes: int, device: torch.device) -> TrainStep:
    """The recipe's model, optimizer, weight average and step."""
    model, _ = make_model(config, num_classes, device)
    return assemble_step(config, model, device, mac_counter(model))[0]


def mac_counter(model: nn.Module) -> MacCount:
    """A function that counts the multiply-adds of a forward pass of one image, by image size and shape."""
    twin = copy.deepcopy(model).to("meta")  # without data, so that the model itself keeps its shape

    @cache
    def macs(size: int, shape: Shape) -> int:
        set_shape(twin, shape)
        return count_macs(twin, shape.input_size or size)

    return macs


def configure_model(model: Any, kernel: str, grad_checkpointing: bool, device: torch.device) -> None:
    """Sets the kernel of the local FFN, and whether the backward pass computes activations again."""
    local = [module for module in model.modules() if isinstance(module, LocalFeedForward)]
    if kernel == "fused" and device.type != "cuda":
        raise ConfigError(f"train.kernel: fused needs a CUDA device, this run is on {device}; use auto")
    if kernel != "auto" and not local:
        raise ConfigError(f"train.kernel: {kernel} is for local FFNs, and {type(model).__name__} has none; use auto")
    measured_times()  # a wrong table is an error now, and not while the step is compiled
    for module in local:
        module.kernel = kernel
    if not grad_checkpointing:
        return
    if not hasattr(model, "set_grad_checkpointing"):
        raise ConfigError(f"train.grad_checkpointing: {type(model).__name__} does not support it")
    if has_batch_norm(model):
        raise ConfigError(
            "train.grad_checkpointing: a BatchNorm would count each batch twice; use train.grad_accum_steps to save "
            "memory"
        )
    model.set_grad_checkpointing(True)


# --- the trainer ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BuiltRun:
    """A trainer, and what the command needs to describe and export it."""

    trainer: Trainer
    config: Config  # with the budget that a method computed, if one does
    model_arguments: dict[str, Any]
    new_weights: list[str]  # names of the weights that model.weights did not give
    output: RunOutput | None  # None on ranks other than 0


def build_run(
    config: Config,
    sources: Sources,
    device: torch.device,
    *,
    ranks: Ranks = ALONE,
    clock: Clock | None = None,
    folder: Path | None = None,
    starts: bool = True,
) -> BuiltRun:
    """Builds the trainer; without a ``folder`` nothing is written. A run that ``starts`` loads ``model.weights``."""
    train, classes = config.train, sources.train.classes
    model, arguments = make_model(config, len(classes), device, sources.train.latents)
    check_latents(config, sources)
    new_weights = []
    if config.model.weights and starts:
        new_weights = load_weights(model, config.model.weights, classes, config.diffusion.labels)
    macs = mac_counter(model)
    precision = choose_precision(train.precision, device)

    def image_bytes(size: int) -> int:
        side = size // patch_side(model)
        fused = train.kernel != "plain" and can_fuse(device, (side, side))
        return activation_bytes(model, size, precision, fused)

    parts, blocks = model_parts(model), len(getattr(model, "blocks", ()))
    context = MethodContext(config.recipe, sources.train.count, image_bytes, macs, parts, blocks, ranks.world)
    methods = build_methods(context)
    for method in methods:
        check_outputs(config.model.name, method)
        check_fields(config.model.name, model, method.claims(config.recipe))
        if "attention_variance" in method.needs.step_outputs and sum_type(device) != torch.float64:
            raise ConfigError(f"methods: {method.name} needs float64, and {device.type} has none; use run.device=cpu")
        if method.needs.stage_embedding is not None:
            add_stage_table(model, method.needs.stage_embedding)
        if method.needs.budget_length is not None:
            config = replace(config, budget=replace(config.budget, length=method.needs.budget_length))
    step, method_emas = assemble_step(config, model, device, macs, methods, ranks, sources)
    clock = clock or Clock(config.budget.length, config.budget.counts)
    clock.length, clock.images_per_epoch = config.budget.length, sources.train.count
    state = TrainState(model, step.optimizer, step.scaler, clock, methods, step.ema, method_emas)
    state.search_log = SearchLog(folder if ranks.first else None, config.run.replay_search)
    state.data = data_fingerprint(sources.train.count, classes)
    output = None
    if folder is not None and ranks.first:
        output = RunOutput(
            folder, config.budget.length, step.task.metrics, config.run.progress, config.run.keep_weights
        )
    evaluate = config.evaluate
    shown = Feed(evaluate.size or config.model.size, evaluate.batch_size)
    trainer = Trainer(
        state,
        step,
        sources,
        Feed(config.model.size, train.batch_size),
        train.lr_schedule,
        Evaluator(state, step, sources, shown, evaluate.rows),
        macs,
        evaluate_every=evaluate.every,
        save_every=config.run.save_every,
        compile_early=train.compile_at == "start",
        output=output,
    )
    check_plans(trainer, ranks.world)
    return BuiltRun(trainer, config, arguments, new_weights, output)


# --- checks -----------------------------------------------------------------------------------------------------------


def stated_sizes(config: Config) -> list[tuple[str, int]]:
    """The sizes that the run will come to, perhaps hours later, with the option or method that states each."""
    fed = [(name, stage.size) for name in config.methods for stage in METHODS[name].image_sizes(config.recipe)]
    stated = [("model.size", config.model.size), ("evaluate.size", config.evaluate.size)]
    return [(name, size) for name, size in (*stated, *fed) if size is not None]


def check_image_sizes(config: Config, model: nn.Module) -> None:
    """Raises ConfigError if the model cannot take a size that the run will come to."""
    patch, largest, sizes = patch_side(model), config.model.size, stated_sizes(config)
    if odd := [f"{name} {size}" for name, size in sizes if size % patch]:
        raise ConfigError(f"{', '.join(odd)}: expected multiples of {patch}, the patch size of {config.model.name}")
    if above := [f"{name} {size}" for name, size in sizes if size > largest and name in config.methods]:
        raise ConfigError(f"{', '.join(above)}: expected at most model.size ({largest})")


def check_memory(config: Config, arguments: dict[str, Any], num_classes: int, device: torch.device) -> None:
    """Raises ConfigError if the weights of an unusually large model cannot be trained in the device's memory."""
    stated = {name: getattr(config.model, name) or 0 for name in USUAL_SIZES}
    if all(stated[name] <= most for name, most in USUAL_SIZES.items()):
        return
    with torch.device("meta"):  # allocates nothing
        model, _ = build_model(config.model.name, arguments, num_classes)
    weights = sum(tensor.numel() for tensor in (*model.parameters(), *model.buffers()))
    needed = 16 * weights  # bytes of float32 weights, gradients and two moments
    there = memory() if device.type == "cpu" else torch.cuda.get_device_properties(device).total_memory
    if needed > there:
        options = ", ".join(f"model.{name}={value}" for name, value in stated.items() if value)
        raise ConfigError(
            f"{options}: {weights / 1e6:,.0f} M weights need {needed / 2**30:,.0f} GiB with their gradients and "
            f"moments, and {device} has {there / 2**30:,.0f} GiB; use smaller ones"
        )


def check_latents(config: Config, sources: Sources) -> None:
    """Raises ConfigError if there are no latents of a size that the run will come to."""
    for name, size in stated_sizes(config):
        source = sources.val if name == "evaluate.size" else sources.train
        source.check_size(size)
    sources.val.check_size(config.evaluate.size or config.model.size)


def check_plans(trainer: Trainer, world: int) -> None:
    """Raises ConfigError if a batch is too small for all processes, or the model lacks a part that a method needs."""
    plans = trainer.upcoming_plans()
    smallest = min(plan.feed.batch_size for plan in plans)
    if smallest < 2 * world:
        raise ConfigError(
            f"train.batch_size: {smallest} is too small for {world} processes, which take pairs of images; use at "
            f"least {2 * world}"
        )
    for plan in plans:
        check_shape(trainer.state.model, plan.shape)


def check_fields(model_name: str, model: nn.Module, claims: Claims) -> None:
    """Raises ConfigError if a method sets a field of the shape that the model cannot change."""
    fixed = {f"shape.{name}": reason for name, reason in getattr(model, "fixed_fields", {}).items()}
    if wrong := sorted(claims.writes & fixed.keys()):
        remedies = [f"set {claims.spared_by[name]}" for name in wrong if name in claims.spared_by]
        raise ConfigError(
            f"methods: {claims.name} changes {', '.join(wrong)}, and {model_name} cannot: {fixed[wrong[0]]}; "
            f"{(remedies or [f'remove {claims.name}'])[0]}"
        )


def check_ranks(config: Config, ranks: Ranks) -> None:
    """Raises ConfigError if the processes were started with different options."""
    mine, first = config.flat(), ranks.broadcast(config.flat())
    different = [name for name, value in mine.items() if name not in IMMATERIAL and first[name] != value]
    if different:
        raise ConfigError(f"{', '.join(different)}: rank {ranks.rank} and rank 0 were started with different values")


def check_data(found: dict[str, Any], before: dict[str, Any], config: Config) -> None:
    """Raises ConfigError if the training data are not those of the checkpoint."""
    if found != before:
        raise ConfigError(
            f"data.root: {config.data.root} has {found['images']} training images of {found['classes']} classes, and "
            f"the run in {config.run.folder} was started on {before['images']} of {before['classes']}, perhaps with "
            "other names. Use those data, or another --run.folder"
        )


# --- opening a run's folder -------------------------------------------------------------------------------------------


def spent_before(folder: Path, config: Config) -> tuple[float, float]:
    """Training seconds and total seconds of this run so far, even if it was killed before its first checkpoint."""
    if config.run.resume == "never" or not (folder / "config.yaml").exists():
        return 0.0, 0.0
    try:
        check_same_run(folder, config)
    except ConfigError:
        return 0.0, 0.0
    return read_spent(folder / JOURNAL)


@contextmanager
def open_run(config: Config, began: float | None = None) -> Iterator[BuiltRun]:
    """Builds the run, or continues the one in its folder (``run.resume``).

    All checks run before the folder is made, so that a wrong configuration leaves nothing behind. Only rank 0 reads and
    writes the folder. ``began``: when the command started, a value of ``time.monotonic``; total time counts from there.
    """
    ranks = find_ranks()
    folder = Path(str(config.run.folder))

    def resumes() -> bool:
        found = ranks.first and has_run(folder, config.run.resume)
        if found:
            check_same_run(folder, config)
        return found

    resumes()  # reports a wrong folder before anything is loaded
    device = device_of(config, ranks)
    if config.budget.counts == "cpu" and (device.type != "cpu" or ranks.world > 1):
        raise ConfigError("budget.counts: cpu is for one process on a CPU; use run.device=cpu, or budget.counts=train")
    with ExitStack() as opened:
        opened.enter_context(ranks.connected(device))
        check_ranks(config, ranks)
        opened.callback(gc.unfreeze)
        sources = opened.enter_context(closing(sources_of(config, device, ranks)))
        if ranks.first:
            opened.enter_context(run_folder_lock(folder))
        # Again, because another process may have trained here until the folder was locked.
        continues = ranks.broadcast(resumes())
        clock = Clock(config.budget.length, config.budget.counts, began=began)
        spent = ranks.broadcast(spent_before(folder, config) if ranks.first else None)
        clock.timer.resume(*spent)
        saving = journal(folder / JOURNAL, clock.timer, journal_interval(config.budget.length))
        if ranks.first and any(spent):  # loading counts too; a new run writes nothing until it is built
            opened.enter_context(saving)
        run = build_run(config, sources, device, ranks=ranks, clock=clock, folder=folder, starts=not continues)
        if continues:
            content = ranks.broadcast(load_checkpoint(folder / CHECKPOINT) if ranks.first else None)
            check_data(dict(run.trainer.state.data), content["data"], config)
            run.trainer.load(content)
        run.trainer.sync_ranks()
        if run.output is not None:
            opened.callback(run.output.close)
            begin_folder(run.output, run.trainer.state, None if continues else recipe_text(config))
        if ranks.first and not any(spent):
            opened.enter_context(saving)
        yield run


def begin_folder(output: RunOutput, state: TrainState, recipe: str | None) -> None:
    """Writes the ``recipe`` of a new run and the run's origin, and drops log lines that will be written again."""
    if recipe is not None:
        (output.folder / "config.yaml").write_text(recipe, encoding="utf-8")
    if not state.clock.progress.is_end:
        record_origin(output.folder, state.data)
    reopened = state.current_plan is not None and state.totals.images > 0
    output.begin(state.clock.step - reopened)
    state.search_log.begin()
