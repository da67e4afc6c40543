"""Builds a run from a configuration. Only this file and the commands read a Config; other parts take plain values."""

import copy
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitlocal.config import Config
from vitlocal.data.batch import Sources
from vitlocal.data.fields import LatentForm
from vitlocal.data.manifest import load_manifest
from vitlocal.data.random_keys import other_seed
from vitlocal.data.soft_labels import FACTS, SoftLabels, labels_folder
from vitlocal.data.sources import open_sources
from vitlocal.errors import ConfigError, DataError, DeviceMemoryError
from vitlocal.jsonl import replace_text
from vitlocal.machine import can_compile_kernels, keep_freed_memory
from vitlocal.methods import build_methods
from vitlocal.methods.method import Method, MethodContext
from vitlocal.models.block import BlockModel
from vitlocal.models.counts import activation_bytes, count_macs
from vitlocal.models.dit import reads_latents
from vitlocal.models.factory import build_model, load_weights, patch_side
from vitlocal.models.lffn import LocalFeedForward
from vitlocal.models.local_mix import can_fuse, measured_times
from vitlocal.models.shape import add_stage_table, model_parts, set_shape
from vitlocal.plan import Feed, Shape
from vitlocal.stored_config import check_options, check_same_run, recipe_text
from vitlocal.tasks.task import sum_type
from vitlocal.train.budget import Clock, journal, journal_interval, read_rewinds, read_spent
from vitlocal.train.build_checks import (
    check_data,
    check_fields,
    check_image_sizes,
    check_latents,
    check_memory,
    check_plans,
    check_ranks,
)
from vitlocal.train.build_task import check_outputs, make_task
from vitlocal.train.checkpoint import Checkpoints
from vitlocal.train.devices import choose_device, choose_precision
from vitlocal.train.distributed import ALONE, LOST, Ranks, find_ranks
from vitlocal.train.evaluator import Evaluator
from vitlocal.train.optim import CombinedOptimizer, ModelEma, build_optimizer
from vitlocal.train.output import RunOutput
from vitlocal.train.probes import MacCount
from vitlocal.train.run_folder import JOURNAL, data_fingerprint, file_digests, has_run, record_origin, run_folder_lock
from vitlocal.train.search_log import SearchLog
from vitlocal.train.state import RunFacts, TrainState
from vitlocal.train.step import TrainStep, has_batch_norm
from vitlocal.train.trainer import Trainer


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
    sources = open_sources(
        **config.source_arguments(), device=device, share=ranks.share, local_world_size=ranks.local_world_size,
        latents=reads_latents(config.model.name),
    )  # fmt: skip
    if config.train.soft_labels:
        root = config.data.root
        sources.train.use_soft_labels(SoftLabels(root, load_manifest(root, "train"), sources.train.crops))
    return sources


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
    with device if device.type == "meta" else nullcontext():  # only shapes are needed: weights would take seconds
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
    names = ("weight_decay", "betas", "eps", "muon_momentum", "soap_every")
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
    optimizer = make_optimizer(config, model, precision)
    ema = ModelEma(model, train.ema_decay or 0.0, train.ema_length) if has_ema else None
    method_emas = [ModelEma(model, decay) for method in methods for decay in method.needs.ema_decays]
    outputs: frozenset[str] = frozenset().union(*(method.needs.step_outputs for method in methods))
    step = TrainStep(
        make_task(config, model, device, precision, outputs, sources),
        optimizer,
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
    if grad_checkpointing:
        use_grad_checkpointing(model)


def use_grad_checkpointing(model: Any) -> None:
    """The backward pass computes activations again; of our models, those of the blocks. ConfigError if it cannot."""
    if any(has_batch_norm(part) for part in (model.blocks if isinstance(model, BlockModel) else [model])):
        raise ConfigError(
            "train.grad_checkpointing: a BatchNorm would count each batch twice; use train.grad_accum_steps instead"
        )
    try:
        model.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):  # models of timm lack the method, or it says so
        raise ConfigError(f"train.grad_checkpointing: {type(model).__name__} does not support it") from None


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
    rewinds: int = 0,
) -> BuiltRun:
    """Builds the trainer; without a ``folder`` nothing is written. A run that ``starts`` loads ``model.weights``.

    ``rewinds``: how often the run has diverged. After each time it has other random numbers, in the same order of
    images.
    """
    train, classes, stated = config.train, sources.train.classes, config.flat()
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
    context = MethodContext(
        config.recipe, sources.train.count, image_bytes, macs, parts, blocks, ranks.world,
        varies_drop_path=getattr(model, "takes_noise", False),
    )  # fmt: skip
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
    step.seed = other_seed(step.seed, rewinds)
    sources.train.vary_crops(rewinds)
    clock = clock or Clock(config.budget.length, config.budget.counts)
    clock.length, clock.images_per_epoch = config.budget.length, sources.train.count
    state = TrainState(model, step.optimizer, step.scaler, clock, methods, step.ema, method_emas)
    state.search_log = SearchLog(folder if ranks.first else None, config.run.replay_search)
    files = file_digests(Path(config.data.root)) if folder is not None else {}  # for the next process to compare
    if sources.train.soft_labels is not None:  # other epochs would also change the crops
        files |= {str(labels_folder(config.run.seed) / FACTS): sources.train.soft_labels.facts.digest}
    data = data_fingerprint(sources.train.count, classes) | {"files": files}
    state.facts = RunFacts(data, stated, rewinds)
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


# --- opening a run's folder -------------------------------------------------------------------------------------------


def check_folder(folder: Path, config: Config) -> str:
    """Raises ConfigError if ``folder`` holds another run. Says what is wrong with its config.yaml; empty: nothing.

    A run whose config.yaml is missing or damaged continues: its checkpoint has the options too.
    """
    try:
        check_same_run(folder, config)
    except DataError as error:
        return str(error)
    return ""


def spent_before(folder: Path, config: Config) -> tuple[float, float]:
    """Training seconds and total seconds of this run so far, even if it was killed before its first checkpoint."""
    if config.run.resume == "never":
        return 0.0, 0.0
    try:
        damaged = check_folder(folder, config)
    except ConfigError:
        return 0.0, 0.0
    return (0.0, 0.0) if damaged and not Checkpoints(folder).exist() else read_spent(folder / JOURNAL)


@contextmanager
def open_run(config: Config, began: float | None = None) -> Iterator[BuiltRun]:
    """Builds the run, or continues the one in its folder: see :func:`open_folder`."""
    with open_folder(config, began) as start:
        yield start(False)


@contextmanager
def open_folder(config: Config, began: float | None = None) -> Iterator[Callable[[bool], BuiltRun]]:
    """Opens the data and the run's folder. Yields ``start``, which builds the run or continues it (``run.resume``).

    After the run has diverged, ``start(True)`` goes back to the last checkpoint, or to the initial weights, and gives
    the run other random numbers. No part of the earlier run may be in use then.

    All checks run before the folder is made, so that a wrong configuration leaves nothing behind. Only rank 0 reads and
    writes the folder. ``began``: when the command started, a value of ``time.monotonic``; total time counts from there.
    """
    ranks = find_ranks()
    folder = Path(str(config.run.folder))

    def resumes(resume: str) -> bool:
        found = ranks.first and has_run(folder, resume)
        if found:
            check_folder(folder, config)
        return found

    resumes(config.run.resume)  # reports a wrong folder before anything is loaded
    device = device_of(config, ranks)
    if config.budget.counts == "cpu" and (device.type != "cpu" or ranks.world > 1):
        raise ConfigError("budget.counts: cpu is for one process on a CPU; use run.device=cpu, or budget.counts=train")
    with ExitStack() as opened:
        opened.enter_context(ranks.connected(device))
        check_ranks(config, ranks)
        opened.callback(gc.unfreeze)
        data = opened.enter_context(ExitStack())
        first = data.enter_context(closing(sources_of(config, device, ranks)))
        if ranks.first:
            opened.enter_context(run_folder_lock(folder))
        current = opened.enter_context(ExitStack())  # what the run that was started last has opened

        def start(rewind: bool) -> BuiltRun:
            sources, again = first, config
            if rewind:
                current.close()
                data.close()
                gc.unfreeze()
                gc.collect()  # the earlier run's model
                sources = data.enter_context(closing(sources_of(config, device, ranks)))
                again = replace(config, run=replace(config.run, resume="auto"))
            # Again, because another process may have trained here until the folder was locked.
            continues = ranks.broadcast(resumes(again.run.resume))
            clock = Clock(config.budget.length, config.budget.counts, began=None if rewind else began)
            return start_run(again, sources, device, ranks, clock, current, continues, rewind)

        yield start


def start_run(
    config: Config, sources: Sources, device: torch.device, ranks: Ranks, clock: Clock, opened: ExitStack,
    continues: bool, rewind: bool,
) -> BuiltRun:  # fmt: skip
    """Builds the run, and loads its checkpoint if it ``continues``. ``opened`` closes what it opens."""
    folder = Path(str(config.run.folder))
    checkpoints, content = Checkpoints(folder), None
    spent = ranks.broadcast(spent_before(folder, config) if ranks.first else None)
    clock.timer.resume(*spent)
    rewinds = ranks.broadcast(read_rewinds(folder / JOURNAL) if ranks.first and any(spent) else 0) + rewind
    saving = journal(folder / JOURNAL, clock.timer, journal_interval(config.budget.length), lambda: rewinds)
    if ranks.first and any(spent):  # loading counts too; a new run writes nothing until it is built
        opened.enter_context(saving)
    if continues:
        content = ranks.broadcast(checkpoints.load() if ranks.first else None)
        with explained_misfits(folder):
            check_options(content["options"], folder, config)
            rewinds = max(rewinds, content["rewinds"] + rewind)  # the journal may be lost
    run = build_run(
        config, sources, device, ranks=ranks, clock=clock, folder=folder, starts=not continues, rewinds=rewinds
    )
    if content is not None:
        with explained_misfits(folder):
            check_data(run.trainer.state.facts.data, content["data"], config)
            run.trainer.load(content)
    run.trainer.sync_ranks()
    if run.output is not None:
        opened.callback(run.output.close)
        run.output.checkpoints = checkpoints
        damaged = check_folder(folder, config) if continues else ""
        for note in (*checkpoints.notes, *([f"{damaged}: it is written again"] if damaged else [])):
            run.output.print(f"note: {note}")
        labels = run.trainer.sources.train.soft_labels
        teacher = labels.facts.teacher if labels is not None else None
        begin_folder(run.output, run.trainer.state, recipe_text(config) if damaged or not continues else None, teacher)
    if ranks.first and not any(spent):
        opened.enter_context(saving)
    return run


@contextmanager
def explained_misfits(folder: Path) -> Iterator[None]:
    """A context in which a checkpoint that is whole, but does not fit the run, raises one DataError."""
    try:
        yield
    except (ConfigError, DeviceMemoryError, torch.OutOfMemoryError):
        raise
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        if isinstance(error, RuntimeError) and LOST.search(str(error)):  # of another process
            raise
        raise DataError(
            f"the checkpoint in {folder} is whole, but does not fit this run ({' '.join(str(error).split())}). It may "
            "be of another run, or of another version of vitlocal: put the right one in its place, or use another "
            "--run.folder"
        ) from error


def begin_folder(output: RunOutput, state: TrainState, recipe: str | None, teacher: str | None) -> None:
    """Writes the ``recipe`` of a new run and the run's origin, and drops log lines that will be written again."""
    if recipe is not None:
        replace_text(output.folder / "config.yaml", recipe)
    if not state.clock.progress.is_end:
        data = {name: value for name, value in state.facts.data.items() if name != "files"}
        record_origin(output.folder, data, teacher)
    step, count = state.facts.logged
    output.begin(state.clock.step, count if step == state.clock.step else 0)
    state.search_log.begin()
