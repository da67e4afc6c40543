"""The arms of the step bench: our models with the trainer's own step, and timm's model in a plain training loop."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import nn

from vitlocal.bench.measurement import spread
from vitlocal.bench.parsing import names
from vitlocal.config import Config
from vitlocal.errors import ConfigError
from vitlocal.models.flops import count_macs
from vitlocal.models.local_mix import can_fuse
from vitlocal.plan import Feed
from vitlocal.progress import TRAINING_FLOPS
from vitlocal.train.build import build_step
from vitlocal.train.compile import Mode
from vitlocal.train.precision import autocast, choose_precision
from vitlocal.train.timing import LR, PhaseTimer, Timing, device_memory, noise_batch, noise_step

CLASSES = 1000
PHASES = ("augment", "forward", "backward", "optimizer", "average")  # of the trainer's step, in order
FAMILIES = {"local": "", "deit": "deit_", "localvit": "localvit_"}
OUR_MODELS = re.compile(r"vitlocal_(?:deit_|localvit_)?(tiny|small|base)_patch(\d+)_\d+")
# After each turn, some steps are timed by phase: the number of uncounted steps and of counted ones. On a GPU, the host
# must first be ahead of the device.
PHASE_STEPS = {"cpu": (0, 1), "cuda": (2, 2)}


@dataclass(frozen=True)
class StepArm:
    """A model, compiled or eager, with one kernel of the local FFN (``train.kernel``)."""

    model: str  # a name of FAMILIES, or "timm"
    compiled: bool
    kernel: str = "auto"

    def __str__(self) -> str:
        kernel = "" if self.kernel == "auto" else f"-{self.kernel}"
        return f"{self.model}{kernel}-{'compiled' if self.compiled else 'eager'}"


def choose_arms(text: str | None, device: torch.device) -> list[StepArm]:
    """The arms of ``--arms``. Without it: all arms on a GPU, the eager ones on a CPU."""
    on_gpu = device.type == "cuda"
    known = [
        StepArm(model, compiled, kernel)
        for model in (*FAMILIES, "timm")
        for kernel in (("auto", "plain") if model == "local" and on_gpu else ("auto",))
        for compiled in (False, True)
    ]
    if text is None:
        return [arm for arm in known if on_gpu or not arm.compiled]
    by_name = {str(arm): arm for arm in known}
    return [by_name[name] for name in names(text, list(by_name), "--arms")]


def model_shape(config: Config) -> tuple[str, int]:
    """The width (tiny, small, base) and the patch size of the recipe's model. ConfigError if it is a timm model."""
    match = OUR_MODELS.fullmatch(config.model.name)
    if match is None:
        raise ConfigError(
            f"model.name: got '{config.model.name}', expected a vitlocal model, such as vitlocal_small_patch16_224; "
            "all arms have its width and its patch size"
        )
    return match[1], config.model.patch_size or int(match[2])


def arm_config(arm: StepArm, config: Config) -> Config:
    """The recipe of an arm of ours: the same width, depth and patch size in the arm's model family."""
    width, patch = model_shape(config)
    model = replace(config.model, name=f"vitlocal_{FAMILIES[arm.model]}{width}_patch16_224", patch_size=patch)
    if arm.model != "local":
        model = replace(model, norm=None, convolution=None)  # these are options of the local FFN only
    train = replace(config.train, compile="yes" if arm.compiled else "no", kernel=arm.kernel)
    return replace(config, model=model, train=train)


def timm_model(config: Config) -> Any:
    """timm's DeiT with the shape of the recipe's model."""
    width, patch = model_shape(config)
    model = config.model
    stated = {"embed_dim": model.width, "depth": model.depth, "num_heads": model.heads, "qkv_bias": model.qkv_bias}
    arguments: dict[str, Any] = {name: value for name, value in stated.items() if value is not None}
    if model.pool == "avg":
        arguments |= {"global_pool": "avg", "class_token": False, "fc_norm": False}
    return timm.create_model(
        f"deit_{width}_patch16_224", num_classes=CLASSES, patch_size=patch, img_size=model.size, dynamic_img_size=True,
        drop_path_rate=model.drop_path, **arguments,
    )  # fmt: skip


def no_hook(phase: str) -> None:
    """The phase hook outside of measurements."""


class OurStep:
    """One of our models with the trainer's own step."""

    def __init__(self, arm: StepArm, config: Config, feed: Feed, device: torch.device):
        self.feed, self.step = feed, build_step(arm_config(arm, config), CLASSES, device)
        self.model, self.mode = self.step.model, self.step.mode(feed)
        self.run, self.with_phases = noise_step(self.step, feed, CLASSES, device, self.mode), self.step

    def compile(self) -> float:
        """Compiles the step; returns the seconds that it took."""
        return self.step.warm_up(self.feed, CLASSES)


class TimmStep:
    """timm's model in a plain loop with automatic mixed precision."""

    def __init__(self, arm: StepArm, config: Config, feed: Feed, device: torch.device):
        train = config.train
        torch.manual_seed(config.run.seed)
        self.model = timm_model(config).to(device).train()
        if train.grad_checkpointing:
            self.model.set_grad_checkpointing(True)
        self.forward = torch.compile(self.model) if arm.compiled else self.model
        self.optimizer = torch.optim.AdamW(self.model.parameters(), LR, weight_decay=train.weight_decay, fused=True)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=train.label_smoothing)
        self.device, self.clip_norm, self.mode = device, train.clip_norm, Mode(arm.compiled)
        self.precision = choose_precision(train.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        batch = noise_batch(feed, CLASSES, device)
        self.labels, self.images = batch.labels, ((batch.images.float() / 255 - 0.45) / 0.225).contiguous()
        self.phase_hook: Callable[[str], None] = no_hook
        self.with_phases = self

    def compile(self) -> float:
        """Compiles the step by its first run; returns the seconds that it took."""
        return Timing().measure(self.run, self.device) if self.mode.compiled else 0.0

    def run(self) -> None:
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

    def __init__(self, arm: StepArm, config: Config, feed: Feed, device: torch.device):
        self.arm, self.feed, self.device = arm, feed, device
        self.timing = Timing()
        with device_memory(device) as memory:
            self.runner = (TimmStep if arm.model == "timm" else OurStep)(arm, config, feed, device)
            self.macs = count_macs(self.runner.model, feed.size)
            self.compile_seconds = self.runner.compile()
            self._measure(1)  # the optimizer creates its state
            held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        self.held = held - memory.before
        # A CUDA graph takes its memory when it is captured. Its replays do not go through the allocator.
        self.peak = memory.peak - memory.before if self.runner.mode.graphs else 0
        self.step_seconds = self._measure(1)
        self.turns: list[float] = []  # seconds per step of each counted turn
        self.phases: list[dict[str, float]] = []  # milliseconds of each step that was timed by phase
        size = feed.size // model_shape(config)[1]
        local = arm.model == "local" and config.model.convolution is not False
        fused = arm.kernel == "auto" and can_fuse(device, (size, size))
        self.kernel = ("fused" if fused else "plain") if local else None

    def _measure(self, steps: int) -> float:
        return self.timing.measure(self.runner.run, self.device, steps)

    def turn(self, seconds: float, counted: bool) -> None:
        """Trains for about ``seconds``. The number of steps is fixed before: to read the clock is to synchronise."""
        with device_memory(self.device) as memory:
            self.step_seconds = self._measure(max(1, math.ceil(seconds / self.step_seconds)))
        self.peak = max(self.peak, memory.peak - (memory.before - self.held))
        if counted:
            self.turns.append(self.step_seconds)
            self._time_phases()

    def _time_phases(self) -> None:
        """Times some steps by phase. They are separate from those of the turn, which must not be slowed down."""
        uncounted, counted = PHASE_STEPS[self.device.type]
        timer = PhaseTimer(self.device)
        self.runner.with_phases.phase_hook = timer.mark
        for _ in range(uncounted + counted):
            timer.begin()
            self.runner.run()
        self.runner.with_phases.phase_hook = no_hook
        self.phases += timer.milliseconds()[uncounted:]

    def row(self, peak_tflops: float) -> dict[str, Any]:
        """The row of the measurement."""
        rates = [self.feed.batch_size / seconds for seconds in self.turns]
        rate, flops = statistics.median(rates), TRAINING_FLOPS * self.macs
        phases = {name: statistics.median(step[name] for step in self.phases) for name in self.phases[0]}
        return {
            "arm": str(self.arm), "model": self.arm.model, "compiled": self.arm.compiled,
            "kernel": self.kernel, "mode": str(self.runner.mode),
            "size": self.feed.size, "batch_size": self.feed.batch_size, "images_per_second": round(rate, 2),
            "spread": spread(rates) if len(rates) > 1 else None, "n": len(rates),
            "step_ms": round(1e3 * self.feed.batch_size / rate, 3), "gflops_per_image": flops / 1e9,
            "mfu": round(rate * flops / (peak_tflops * 1e12), 4),
            "peak_mib": round(self.peak / 2**20) if self.device.type == "cuda" else None,
            **{f"{phase}_ms": round(phases[phase], 3) if phase in phases else None for phase in PHASES},
            "compile_seconds": round(self.compile_seconds, 1) if self.arm.compiled else None,
        }  # fmt: skip
