"""The training step: python -m vitlocal.bench step [--sizes 32,64] [--arms local-eager,timm-eager] [TRAINER'S OPTIONS]

Trains each arm on random pixels that are already on the device. All arms run in one process and take turns, so that
other load on the machine affects all of them. Compiling is not counted. Options of the trainer (--config-file,
--model.depth, ...) apply to every arm whose model has them.

    local        the local-FFN ViT with the trainer's own step; on a GPU with the fused kernel if it supports the grid
    local-plain  the same model with PyTorch's operations instead of the kernel, on a GPU
    deit         our DeiT with the same width, depth and patch size, and the trainer's own step
    localvit     our LocalViT with the same width, depth and patch size, and the trainer's own step
    timm         timm's DeiT of that shape in a plain loop: autocast, cross-entropy and fused AdamW, on normalised
                 pixels and without augmentation
    dit          the recipe's diffusion transformer with the trainer's own step; it has no other arms
    local-pruned, deit-pruned
                 the same in the shape in which trilevel ends, if --arms names them. Beside local and deit, they have
                 the fraction of the time (on a CPU: processor time; the median over rounds) and FLOPs that is left

Each arm exists as NAME-eager and NAME-compiled. The phase "augment" is the random draws and, in eager steps on a CPU,
RandAugment. Other augmentation belongs to the forward pass, and gradient clipping belongs to the optimizer.
"""

import gc
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import timm
import torch
from torch import nn

from vitlocal.bench.measurement import progress_bar, spread, text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, check_multiples, names, numbers
from vitlocal.config import Config, read_config
from vitlocal.errors import ConfigError, DeviceMemoryError
from vitlocal.methods.method import MethodContext
from vitlocal.methods.trilevel import Trilevel
from vitlocal.models.counts import count_macs
from vitlocal.models.factory import patch_side
from vitlocal.models.local_mix import choose_kernel
from vitlocal.models.shape import model_parts
from vitlocal.plan import WHOLE_MODEL, Feed, Shape
from vitlocal.progress import TRAINING_FLOPS
from vitlocal.tasks.metrics import task_name
from vitlocal.train.build import build_step, device_of, make_model
from vitlocal.train.devices import Mode, autocast, choose_device, choose_precision
from vitlocal.train.timing import (
    LR,
    PhaseTimer,
    Timing,
    fill_zeros,
    noise_batch,
    noise_step,
    peak_memory,
    reset_peak,
)  # fmt: skip

CLASSES = 1000
PHASES = ("augment", "forward", "backward", "optimizer", "average")  # of the trainer's step, in order
# After each turn, some steps are timed by phase: the number of uncounted steps and of counted ones. On a GPU, the host
# must first be ahead of the device.
PHASE_STEPS = {"cpu": (0, 1), "cuda": (2, 2)}
FAMILIES = {"local": "", "deit": "deit_", "localvit": "localvit_"}
OUR_MODELS = re.compile(r"vitlocal_(?:deit_|localvit_)?(tiny|small|base)_patch(\d+)_\d+")
SIZES = {"cpu": [32, 64], "cuda": [32, 224]}  # each compiled arm compiles at each size, for about a minute
# Defaults below recipes and the command line; they replace the environment.
DEFAULTS = {
    "cpu": {"model.name": "vitlocal_tiny_patch8_64", "model.size": "64", "train.batch_size": "16"},
    "cuda": {"model.name": "vitlocal_small_patch16_224", "model.size": "224", "train.batch_size": "1024"},
}
PEAK = {"cpu": (1024, 1), "cuda": (8192, 10)}  # the side of the matrices, and the products of a turn
COLUMNS = {
    "px": ("size", "d"), "arm": ("arm", ""), "images/s": ("images_per_second", ",.1f"), "spread": ("spread", ".1%"),
    "step ms": ("step_ms", ",.1f"), "MFU": ("mfu", ".1%"), "GFLOP/image": ("gflops_per_image", ".2f"),
    "peak MiB": ("peak_mib", ",d"), **{f"{phase} ms": (f"{phase}_ms", ".1f") for phase in PHASES},
    "time to deit": ("time_to_deit", ".2f"), "speed to timm": ("speed_to_timm", ".2f"),
    "time to whole": ("time_to_whole", ".3f"), "FLOPs to whole": ("flops_to_whole", ".3f"), "kernel": ("kernel", ""),
    "mode": ("mode", ""),
}  # fmt: skip


def choose_arms(text: str | None, device: torch.device, task: str = "classification") -> list[str]:
    """The arms of ``--arms``. Without it: on a GPU the compiled arms and ``local-eager``, on a CPU the eager ones."""
    on_gpu = device.type == "cuda"
    models = ["local", *(["local-plain"] if on_gpu else []), "deit", "localvit", "timm"]
    if task == "diffusion":
        models = ["dit"]
    models += [f"{model}-pruned" for model in ("local", "deit") if model in models]
    known = [f"{model}-{how}" for model in models for how in ("eager", "compiled")]
    if text is not None:
        return names(text, known, "--arms")
    usual = "-compiled" if on_gpu else "-eager"
    return [arm for arm in known if "pruned" not in arm and (arm.endswith(usual) or arm == "local-eager")]


def parts(arm: str) -> tuple[str, str, bool]:
    """The model (a name of FAMILIES, or "timm"), "plain", "pruned" or "", and whether the arm is compiled."""
    model, *variant, how = arm.split("-")
    return model, "".join(variant), how == "compiled"


def pruned_shape(config: Config, model: nn.Module) -> Shape:
    """The shape in which the recipe's ``trilevel`` ends. ConfigError if it drops nothing."""
    shape = Trilevel(MethodContext(config.recipe, parts=model_parts(model))).evaluation_shape(WHOLE_MODEL)
    if shape == WHOLE_MODEL:
        remedy = "set trilevel.levels=tokens and trilevel.token_keep_rate below 1"
        raise ConfigError(f"--arms: a pruned arm needs a trilevel that drops tokens, this one drops nothing; {remedy}")
    return shape


def model_shape(config: Config) -> tuple[str, int]:
    """The width (tiny, small, base) and the patch size of the recipe's model. ConfigError if it is a timm model."""
    match = OUR_MODELS.fullmatch(config.model.name)
    if match is None:
        example = "such as vitlocal_small_patch16_224"
        raise ConfigError(f"model.name: got '{config.model.name}', expected a vitlocal model for all arms, {example}")
    return match[1], config.model.patch_size or int(match[2])


def patch_of(config: Config) -> int:
    """The side of the patches of the arms' model, px."""
    if task_name(config.model.name) != "diffusion":
        return model_shape(config)[1]
    return patch_side(make_model(config, CLASSES, torch.device("meta"))[0])


def arm_config(arm: str, config: Config) -> Config:
    """The recipe of an arm of ours: the same width, depth and patch size in the arm's model family."""
    family, variant, compiled = parts(arm)
    if family == "dit":
        return replace(config, train=replace(config.train, compile="yes" if compiled else "no"))
    width, patch = model_shape(config)
    model = replace(config.model, name=f"vitlocal_{FAMILIES[family]}{width}_patch16_224", patch_size=patch)
    if family != "local":
        model = replace(model, norm=None, convolution=None)  # these are options of the local FFN only
    train = replace(config.train, compile="yes" if compiled else "no", kernel="plain" if variant == "plain" else "auto")
    return replace(config, model=model, train=train)


def timm_model(config: Config) -> Any:
    """timm's DeiT with the shape of the recipe's model."""
    width, patch = model_shape(config)
    known = ("img_size", "embed_dim", "depth", "num_heads", "qkv_bias", "drop_path_rate")
    arguments = {name: value for name, value in config.model.arguments().items() if name in known}
    if config.model.pool == "avg":
        arguments |= {"global_pool": "avg", "class_token": False, "fc_norm": False}
    name = f"deit_{width}_patch16_224"
    return timm.create_model(name, num_classes=CLASSES, patch_size=patch, dynamic_img_size=True, **arguments)


class TimmStep:
    """timm's model in a plain loop with automatic mixed precision, on one batch of normalised pixels."""

    def __init__(self, config: Config, compiled: bool, feed: Feed, device: torch.device):
        train = config.train
        torch.manual_seed(config.run.seed)
        self.model = timm_model(config).to(device).train()
        if train.grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LR, weight_decay=train.weight_decay, fused=True)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        self.device, self.clip_norm = device, train.clip_norm
        self.precision = choose_precision(train.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        batch = noise_batch(feed, CLASSES, device)
        self.labels, self.images = batch.labels, ((batch.images.float() / 255 - 0.45) / 0.225).contiguous()
        self.phase_hook: Callable[[str], None] = lambda phase: None

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        with autocast(self.device, self.precision):
            loss = self.criterion(self.forward(self.images), self.labels)
        self.phase_hook("forward")
        self.scaler.scale(loss).backward()
        self.phase_hook("backward")
        if self.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.phase_hook("optimizer")


class StepEntry:
    """An arm at one image size: built, compiled and run once; then measured in turns."""

    def __init__(self, arm: str, config: Config, feed: Feed, device: torch.device):
        self.arm, self.feed, self.device = arm, feed, device
        family, variant, self.compiled = parts(arm)
        self.model = arm.rpartition("-")[0] if variant == "pruned" else family
        before = reset_peak(device)
        self.step: Any
        self.run: Callable[[], object]
        if self.model == "timm":
            self.step = self.run = TimmStep(config, self.compiled, feed, device)
            self.mode = Mode(self.compiled)
        else:
            self.step = build_step(arm_config(arm, config), CLASSES, device)
            fill_zeros(self.step.model)
            if variant == "pruned":
                self.step.set_shape(pruned_shape(config, self.step.model))
            self.mode = self.step.mode(feed)
            self.run = noise_step(self.step, noise_batch(feed, CLASSES, device, self.step.task), self.mode)
        self.macs = count_macs(self.step.model, feed.size)
        # The first run compiles timm's model.
        self.compile_seconds = self._measure(1)[0] if self.model == "timm" else self.step.warm_up(feed, CLASSES)
        self._measure(1)  # the optimizer creates its state
        self.turns = [self._measure(1)]  # per step of each turn
        self.peak = peak_memory(device) - before
        self.phases: list[dict[str, float]] = []  # milliseconds of each step that was timed by phase
        grid = feed.size // patch_side(self.step.model)
        kernel = "plain"
        if variant != "plain":
            precision = choose_precision(config.train.precision, device)
            kernel = choose_kernel(device, (grid, grid), precision, self.compiled)
        has_kernel = family == "local" and config.model.convolution is not False
        self.kernel = kernel if has_kernel else None

    def _measure(self, steps: int) -> tuple[float, float]:
        """Trains ``steps`` steps. Returns the seconds and the seconds of processor time, of all threads, of each."""
        began = time.process_time()
        seconds = Timing().measure(self.run, self.device, steps)
        return seconds, (time.process_time() - began) / steps

    def turn(self, seconds: float) -> None:
        """Trains for about ``seconds``, and then times some more steps by phase."""
        # The number of steps is fixed beforehand: reading the clock between steps would need a device sync.
        self.turns.append(self._measure(max(1, math.ceil(seconds / self.turns[-1][0]))))
        warm_up, timed = PHASE_STEPS[self.device.type]
        timer, hook = PhaseTimer(self.device), self.step.phase_hook
        self.step.phase_hook = timer.mark
        for _ in range(warm_up + timed):
            timer.begin()
            self.run()
        self.step.phase_hook = hook
        self.phases += timer.milliseconds()[warm_up:]

    @property
    def counted(self) -> list[tuple[float, float]]:
        """The turns but two: caches are cold then, clocks rise, and their lengths are first guesses."""
        return self.turns[2:]

    def against(self, whole: "StepEntry") -> dict[str, Any]:
        """The fields that compare this pruned arm with the ``whole`` one, turn by turn."""
        clock = int(self.device.type == "cpu")  # elsewhere, processor time is the host's
        ratios = [own[clock] / other[clock] for own, other in zip(self.counted, whole.counted, strict=True)]
        saved = dict(time_to_whole=statistics.median(ratios), flops_to_whole=self.macs / whole.macs)
        return {name: round(ratio, 4) for name, ratio in saved.items()} | {"time_to_whole_spread": spread(ratios)}

    def row(self, peak_tflops: float) -> dict[str, Any]:
        """The row of the measurement."""
        rates = [self.feed.batch_size / seconds for seconds, _ in self.counted]
        rate, flops = statistics.median(rates), TRAINING_FLOPS * self.macs
        phases = {name: statistics.median(step[name] for step in self.phases) for name in self.phases[0]}
        return {
            "arm": self.arm, "model": self.model, "compiled": self.compiled, "kernel": self.kernel,
            "mode": str(self.mode),
            "size": self.feed.size, "batch_size": self.feed.batch_size, "images_per_second": round(rate, 2),
            "spread": spread(rates), "n": len(rates),
            "step_ms": round(1e3 * self.feed.batch_size / rate, 3),
            "cpu_ms": round(1e3 * statistics.median(used for _, used in self.counted), 3),
            "gflops_per_image": flops / 1e9, "mfu": round(rate * flops / (peak_tflops * 1e12), 4),
            "peak_mib": round(self.peak / 2**20) if self.device.type == "cuda" else None,
            **{f"{phase}_ms": round(phases[phase], 3) if phase in phases else None for phase in PHASES},
            "compile_seconds": round(self.compile_seconds, 1) if self.compiled else None,
        }  # fmt: skip


def measured_peak(precision: torch.dtype, device: torch.device) -> tuple[float, str]:
    """The TFLOP/s of a large matrix product on this machine, and a description of the measurement."""
    side, products = PEAK[device.type]
    # Not zeros: a GPU needs less power for them, and is faster than on any real matrix.
    left, right = (torch.randn(side, side, device=device).to(precision) for _ in range(2))
    out = torch.empty_like(left)
    best = min(Timing().measure(lambda: torch.mm(left, right, out=out), device, products) for _ in range(20))
    how = f"best of 20 turns of {products} product{'s' * (products > 1)} of {side} x {side} matrices"
    return 2 * side**3 / best / 1e12, how


def compare(
    config: Config, arms: Sequence[str], sizes: Sequence[int], rounds: int, seconds: float, device: torch.device,
    peak_tflops: float,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of the measurement: one for each arm at each size."""
    rows: list[dict[str, Any]] = []
    with progress_bar(len(sizes) * len(arms) * (rounds + 2)) as bar:
        for size in sizes:
            feed, entries = Feed(size, config.train.batch_size), list[StepEntry]()
            for arm in arms:
                bar.set_description_str(f"{size} px, building {arm}")
                try:
                    entries.append(StepEntry(arm, config, feed, device))
                except (torch.OutOfMemoryError, DeviceMemoryError):
                    print(f"{arm}: {feed.batch_size} images of {size} px do not fit; it is skipped", file=sys.stderr)
                bar.update()
            for _, place in product(range(rounds + 1), range(len(entries))):
                entries[place].turn(seconds)
                bar.set_description_str(f"{size} px, {entries[place].arm}", refresh=False)
                bar.update()
            by_arm = {entry.arm: entry for entry in entries}
            for entry in entries:
                whole = by_arm.get(entry.arm.replace("-pruned", ""), entry)
                rows.append(entry.row(peak_tflops) | (entry.against(whole) if whole is not entry else {}))
            # Free weights, compiled code and the pools of CUDA graphs, to make room for the next size.
            entries.clear()
            torch.compiler.reset()
            gc.collect()  # a model and its compiled step refer to each other
            torch.cuda.empty_cache()
    if not rows:
        raise ConfigError(f"train.batch_size: nothing fits on {device}; use a --batch below {config.train.batch_size}")
    return with_ratios(rows)


def with_ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds the step's time relative to our DeiT and the speed relative to timm, eager to eager, or None."""
    milliseconds = {(row["model"], row["size"], row["compiled"]): row["step_ms"] for row in rows}
    for row in rows:
        deit, timm = (milliseconds.get((name, row["size"], row["compiled"])) for name in ("deit", "timm"))
        own, is_ours = row["step_ms"], row["model"] != "timm"
        row["time_to_deit"] = round(own / deit, 3) if deit and is_ours and row["model"] != "deit" else None
        row["speed_to_timm"] = round(timm / own, 3) if timm and is_ours else None
    return rows


def configured(arguments: Sequence[str]) -> tuple[Config, torch.device]:
    """The trainer's configuration, with a small model as the default on a CPU, and the device."""
    device = choose_device(read_config(arguments).run.device)
    config = read_config(arguments, DEFAULTS[device.type] | os.environ)
    for name in ("compile", "kernel"):
        if (got := getattr(config.train, name)) != "auto":
            raise ConfigError(f"train.{name}: got {got}, but the arms set it; use --train.{name}=auto and --arms")
    return config, device


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("step", __doc__)
    add = parser.add_argument
    add(
        "--sizes",
        type=numbers,
        metavar="LIST",
        help="image sizes, px (default: 32,224 on a GPU, 32,64 on a CPU; dit: model.size)",
    )
    add("--arms", metavar="LIST", help="arms (default: all of them on a GPU, the eager ones on a CPU)")
    add("--batch", type=at_least(2), metavar="N", help="batch size (default: 1024 on a GPU, 16 on a CPU)")
    add("--rounds", type=at_least(1), default=3, help="turns of each arm at each size (default: 3)")
    add("--seconds", type=at_least(0, float), default=1.0, help="approximate length of a turn (default: 1)")
    options, rest = parser.parse_known_args(argv)
    if options.batch is not None:
        rest.append(f"--train.batch_size={options.batch}")
    config, device = configured(rest)
    task = task_name(config.model.name)
    arms = choose_arms(options.arms, device, task)
    sizes = sorted(options.sizes or ([config.model.size] if task == "diffusion" else SIZES[device.type]))
    check_multiples(sizes, patch_of(config), config.model.name)
    device_of(config)
    precision = choose_precision(config.train.precision, device)
    name, batch_size = str(precision).removeprefix("torch."), config.train.batch_size
    peak, how = measured_peak(precision, device)
    rows = compare(config, arms, sizes, options.rounds, options.seconds, device, peak)
    print(text_table(rows, COLUMNS))
    print(f"batches of {batch_size} on {device}, {name}; MFU is relative to {peak:.3g} TFLOP/s ({how}); "
          "phases were timed in separate steps")  # fmt: skip
    what = "the training step on random pixels that are on the device; arms take turns in one process"
    more = {"device": str(device), "batch_size": batch_size, "precision": name}
    write_json(options.json, what, rows, **more, peak_tflops=round(peak, 4), peak_measured=how)
