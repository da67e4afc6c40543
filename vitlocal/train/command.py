"""The command ``train_imagenet.py``: builds or continues a run, trains, exports and reports."""

import math
from collections.abc import Callable
from pathlib import Path

import torch

from vitlocal.config import Config
from vitlocal.errors import Diverged
from vitlocal.machine import can_compile_kernels
from vitlocal.methods import METHODS
from vitlocal.models.factory import patch_side
from vitlocal.models.shape import temporary_shape
from vitlocal.progress import upcoming_changes
from vitlocal.report.page import scores_text, write_report
from vitlocal.report.run_folder import read_log
from vitlocal.train.build import BuiltRun, open_folder
from vitlocal.train.loop import fit
from vitlocal.train.state import Phase, trained_plan

MIN_TRAINED = 0.5  # of the time with budget.counts=wall: if less was training, the run says so
LONG_EVALUATIONS = 30.0  # seconds: if evaluations took longer, and longer than the training, the run says so
SMALL_SCALE = 0.01  # of LayerScale: bfloat16 has 8 bits, so a branch 256 times smaller than the tokens is rounded away
MAX_START_WEIGHT = 0.05  # of an average: if the weights before training have more of it, the run says so
MAX_SEARCHED = 0.25  # of the training time: if searches took more, the run says so


def train(config: Config, began: float | None = None) -> int:
    """Builds or continues the run, trains, exports and reports; returns the exit status. ``began``: see open_folder.

    If training diverges, goes back to the last checkpoint (``run.on_nan=rewind``), or raises Diverged.
    """
    most = config.run.rewinds if config.run.on_nan == "rewind" else 0
    with open_folder(config, began) as start:
        signals = status = None
        while status is None:
            run = start(signals is not None)
            run.trainer.signals = signals = signals or run.trainer.signals  # one that came just before must stop it
            status = train_run(run, most)
            del run
    return status


def train_run(run: BuiltRun, most: int = 0) -> int | None:
    """Trains, exports and reports. Returns the exit status; None if the run has diverged and is to be rewound.

    Raises Diverged if it was rewound ``most`` times already.
    """
    trainer, state, output = run.trainer, run.trainer.state, run.output
    with trainer.signals.handled():
        say: Callable[[str], None] = output.print if output is not None else lambda text: None
        say(describe(run))
        for warning in start_warnings(run):
            say(f"note: {warning}")
        if state.clock.step and state.update_phase(trainer.plan(), state.clock.progress) is Phase.DONE:
            say("this run is finished; its results are written again")
        elif state.clock.step:
            now = state.clock.progress
            say(f"continuing at epoch {now.epoch:.2f}, step {now.step}: {100 * now.fraction:.1f} % is spent")
        if not (state.clock.progress.is_end and state.clock.step):
            trainer.prepare()
        diverged = False
        try:
            fit(trainer)
        except Diverged as error:
            if state.facts.rewinds >= most:
                raise
            say(f"note: {str(error).partition(':')[0]}: going back to the last checkpoint, with other random numbers "
                f"(rewind {state.facts.rewinds + 1} of {most})")  # fmt: skip
            if not trainer.stopped:
                return None
            diverged = True  # and the same command will rewind
        if trainer.stop_signal is not None and (
            diverged or state.update_phase(trainer.plan(), state.clock.progress) is not Phase.DONE
        ):
            name, step = trainer.stop_signal.name, state.clock.step
            say(f"stopped by {name} at step {step}, everything is saved; the same command continues")
            return 128 + trainer.stop_signal
        if output is None:
            return 0
        export(run, output.folder)
        record = write_report(output.folder)
        for warning in end_warnings(run):
            say(f"note: {warning}")
        say(f"done: {scores_text(record)}; see {output.folder}/report.html")
    return 0


def describe(run: BuiltRun) -> str:
    """The run on one line: model, data, budget and device."""
    model, source, step = run.config.model, run.trainer.sources.train, run.trainer.step
    patch, processes = patch_side(step.model), step.ranks.world
    parameters = sum(p.numel() for p in step.model.parameters()) / 1e6
    return (
        f"{model.name}: {parameters:.2f} M parameters, up to {model.size} px"
        + (f" in patches of {patch}" if patch > 1 else "")
        + f", {source.count:,} images of {len(source.classes)} classes, {run.config.budget.length} on {step.device}, "
        f"{str(step.task.precision).removeprefix('torch.')}, in {run.config.run.folder}"
        + (f", {processes} processes" if processes > 1 else "")
    )


def export(run: BuiltRun, folder: Path) -> None:
    """Writes the weights that were evaluated to ``folder``."""
    trainer, config = run.trainer, run.config
    model, classes = trainer.evaluator.model, trainer.sources.train.classes
    shape = trainer.evaluator.shape(trained_plan(trainer.state))
    size, crop_pct = config.evaluate.size or config.model.size, config.evaluate.crop_pct
    with temporary_shape(model, shape, trainer.step.shape):
        trainer.step.task.export(
            folder, model, config.model.name, run.model_arguments, classes, size=size, crop_pct=crop_pct
        )


def start_warnings(run: BuiltRun) -> list[str]:
    """Settings that are allowed but probably a mistake, one sentence each."""
    config, source = run.config, run.trainer.sources.train
    warmup, length, batch = config.train.warmup, config.budget.length, config.train.batch_size
    epochs = {"epochs": 1.0, "steps": batch / source.count}  # in a unit of these kinds of lengths
    comparable = warmup.kind == length.kind or {warmup.kind, length.kind} <= epochs.keys()
    found = [warning for name in config.methods for warning in METHODS[name].config_warnings(config.recipe)]
    if run.new_weights:
        found.append(f"{', '.join(run.new_weights)} start at random; all other weights are from {config.model.weights}")
    if comparable and warmup.value * epochs.get(warmup.kind, 1) > length.value * epochs.get(length.kind, 1):
        found.append(
            f"the warm-up ({warmup}) is longer than the budget ({length}): the learning rate never reaches its peak"
        )
    if length.kind in epochs and config.train.ema_decay is not None:
        steps = length.value * epochs[length.kind] / epochs["steps"]
        found += young_average(config.train.ema_decay**steps, f"the {steps:.0f} steps of this budget")
    if config.budget.counts == "wall" and length.kind != "seconds":
        found.append(f"budget.counts=wall is for budgets in time, and has no effect on {length}")
    if run.trainer.step.device.type == "cuda" and not can_compile_kernels():
        found.append(
            "Triton finds no C compiler with Python's headers (gcc libc6-dev python3-dev on Debian), so the step is "
            "not compiled and the local FFN has no fused kernel: training is slower"
        )
    factor = config.model.layer_scale
    rounds = run.trainer.step.task.precision == torch.bfloat16
    if rounds and config.model.weights is None and factor is not None and factor < SMALL_SCALE:
        found.append(
            f"model.layer_scale={factor:g} makes branches so small that most of what they add to bfloat16 tokens is "
            "lost; use model.layer_scale=0.1"
        )
    if batch > source.count:
        found.append(f"train.batch_size is {batch}, and there are {source.count} images: each epoch is one step")
    largest = max(plan.feed.size for plan in run.trainer.upcoming_plans())
    if source.side is not None and largest > source.side:
        found.append(
            f"training uses up to {largest} px, but the stored images have long edges of at most {source.side} px "
            f"and are enlarged. If the photos are larger, store them larger: write_dataset.py --sides "
            f"{math.ceil(largest * config.data.side_ratio)}"
        )
    return found


def young_average(start_weight: float, after: str) -> list[str]:
    """A warning if an average still has much of the weights before training: its decay is fixed, as timm's default."""
    if start_weight <= MAX_START_WEIGHT:
        return []
    return [
        f"after {after}, {100 * start_weight:.1f} % of the weight average, which is evaluated and exported, are the "
        "weights before training; use a smaller train.ema_decay, or train.ema_length=2%, which fits any budget"
    ]


def end_warnings(run: BuiltRun) -> list[str]:
    """The parts of the recipe that the budget did not reach, one sentence each."""
    config, trainer, clock = run.config, run.trainer, run.trainer.state.clock
    now, found = clock.progress, []
    later = [progress for method in trainer.state.methods for progress in upcoming_changes(method.changes(), now)]
    planned = {trainer.plan(progress).feed.size for progress in (now, *later)}
    trained = {record["image_size"] for record in read_log(Path(str(config.run.folder)))}
    if sizes := sorted(planned - trained):
        sizes_left = ", ".join(map(str, sizes))
        found.append(f"the budget ended before images of {sizes_left} px; use a longer budget or shorter stages")
    seconds, total = clock.timer.train_seconds, clock.timer.wall_seconds
    evaluations = trainer.state.reserve.evaluations
    evaluating = sum(evaluations) if len(evaluations) > 1 else 0.0  # one, at the end, cannot be spared
    if clock.reserves and seconds < MIN_TRAINED * total:
        found.append(
            f"{seconds:.0f} of {total:.0f} s were training: starting, evaluating and saving took the rest; with "
            "budget.counts=train they do not count"
        )
    elif not clock.reserves and evaluating > max(seconds, LONG_EVALUATIONS):
        found.append(
            f"evaluations took {evaluating:.0f} s, and training {seconds:.0f} s; for fewer of them, set "
            f"evaluate.every to more than {config.evaluate.every:g} epochs"
        )
    if config.train.warmup.value and config.train.warmup.fraction_done(now) < 1:
        found.append(f"the budget ended in the warm-up ({config.train.warmup})")
    if trainer.state.ema is not None:
        found += young_average(trainer.state.ema.start_weight(now), f"{now.step} steps")
    searched = trainer.state.search_log.seconds
    if searched > MAX_SEARCHED * seconds:
        names = [method.name for method in trainer.state.methods if method.choices()]
        found.append(
            f"searches took {searched:.0f} of {seconds:.0f} s of training; use fewer stages or fewer batches per "
            f"measurement (options: --help {names[0] if names else 'SECTION'})"
        )
    return found
