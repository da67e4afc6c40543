"""One training step, from uint8 images on the device to updated weights, without waiting for the device."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vitlocal.config import Config, TrainConfig
from vitlocal.data.augment import DROP_PATH, Augment, AugmentParams, send
from vitlocal.data.batch import Batch
from vitlocal.data.random_keys import generator, uniform
from vitlocal.data.shares import Share
from vitlocal.errors import ConfigError
from vitlocal.models.flops import count_macs
from vitlocal.models.lffn import LocalFeedForward
from vitlocal.models.shape import check_shape, set_shape, set_trainable
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import WHOLE_MODEL, Dials, Feed, Shape
from vitlocal.progress import Progress
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.ema import ModelEma
from vitlocal.train.watch import wait

START = Progress()
DIALS = Dials()
RUN_AHEAD = 2  # steps that the host may be ahead of a GPU: more, and the budget's clock would not be true

# A step of fewer multiply-adds than this runs as a CUDA graph: at half of an H200's peak it takes under 10 ms, and
# launching its several hundred kernels one by one takes about as long. (Reckoned; not measured yet.)
GRAPH_MACS = 2e12

COMPILED_VARIANTS = 256  # what PyTorch may compile of one function before it gives up: a size, a batch and a mode each


def choose_precision(wish: str, device: torch.device) -> torch.dtype:
    """The type that matrix products run in; ConfigError where the device does not have it."""
    if wish == "auto":
        if device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if wish == "fp16" and device.type != "cuda":
        raise ConfigError("train.precision: fp16 needs a CUDA device; use fp32, or bf16 where the CPU has it")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wish]


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Matrix products run in ``precision`` in here."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def fast_attention(device: torch.device) -> Iterator[None]:
    """On a GPU, attention that would write its whole matrix to memory is an error in here, not a slow surprise."""
    if device.type != "cuda":
        yield
        return
    # The first where it has a kernel for the case; float32 and masks are the second's. Not cuDNN's, which PyTorch 2.11
    # prefers on an H100: gradients of not-a-number have been reported of it, with masks and without (pytorch#196678).
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(fused):
        try:
            yield
        except RuntimeError as error:
            if "No available kernel" not in str(error):
                raise
            raise ConfigError(
                f"attention has no fused kernel on {torch.cuda.get_device_name(device)} for this model in this "
                "precision; use train.precision=bf16 or fp16, and heads whose width is a multiple of 8 and at most 128"
            ) from error


@contextmanager
def denormals_flushed(device: torch.device) -> Iterator[None]:
    """On a CPU, numbers too small for float32's full precision (below 1e-38) are zero in here.

    Arithmetic with them is microcode: of a 6-block, 128-wide DeiT trained at a rate of 4e-3, gradients that vanish
    slowed a step on one core from 127 images/s to 93. Not set for good: numpy warns of such a machine.
    """
    if device.type == "cpu":
        torch.set_flush_denormal(True)
    try:
        yield
    finally:
        if device.type == "cpu":
            torch.set_flush_denormal(False)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """The model's buffers are afterwards as before: BatchNorm's statistics, drop path's rates."""
    kept = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.copy_(value)


class Objective(nn.Module):
    """The loss of a batch as it comes from a source: all that a step differentiates, in one graph."""

    def __init__(
        self, model: nn.Module, augment: Augment, smoothing: float, precision: torch.dtype,
        taps: frozenset[str] = frozenset(),
    ):  # fmt: skip
        super().__init__()
        self.model, self.augment, self.smoothing, self.precision = model, augment, smoothing, precision
        self.step_outputs = taps
        self.input_size: int | None = None  # px; larger images are resized to it

    def forward(
        self, images: Tensor, labels: Tensor, drawn: AugmentParams, noise: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The cross-entropies of all images, summed, times ``weight`` (0-D); and what was tapped.

        ``images`` (B, 3, S, S) uint8, ``labels`` (B,), ``noise`` (B, L, 2) drop path's. Taps, None unless asked for:
        "correct" (B,) bool, whether the highest logit is that of the image's own label (not of what was mixed into it);
        "attention_variance" (B,), see :meth:`VisionTransformer.forward_with_attention_variance`.
        """
        pixels = self.resized(self.augment(images, drawn))
        operands = (pixels,) if noise is None else (pixels, noise)
        spread = None
        with autocast(images.device, self.precision):
            if "attention_variance" in self.step_outputs:
                logits, spread = self.model.forward_with_attention_variance(*operands)
            else:
                logits = self.model(*operands)
        logits = logits.float()
        hits = logits.detach().argmax(dim=1) == labels if "correct" in self.step_outputs else None
        loss = self._entropy(logits, labels)
        if drawn.mix is not None:
            share = drawn.mix[1]
            loss = share * loss + (1 - share) * self._entropy(logits, labels.flip(0))
        return weight * loss, hits, spread

    def resized(self, pixels: Tensor) -> Tensor:
        """Images (B, 3, S, S) at the input size, where that is smaller: bilinear, antialiased."""
        size = self.input_size
        if size is None or size >= pixels.shape[-1]:
            return pixels
        return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)

    def _entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.smoothing, reduction="sum")


@dataclass(frozen=True)
class Outcome:
    """What a step gives, on the device: its part of the global batch's mean loss (0-D, detached), and the taps."""

    loss: Tensor
    hits: Tensor | None = None  # (B,) bool
    spread: Tensor | None = None  # (B,) float32


@dataclass(frozen=True)
class Mode:
    """How the step runs at one feed."""

    compiled: bool = False
    graphs: bool = False

    def __str__(self) -> str:
        return "eager" if not self.compiled else "compiled, as a CUDA graph" if self.graphs else "compiled"


EAGER = Mode()


class Step:
    """Augments, runs the model forward and backward, and updates weights and their average.

    With several processes, each calls it with its part of the same global batch, and all get the same new weights.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, average: ModelEma | None, config: Config,
        device: torch.device, ranks: Ranks = ALONE, taps: frozenset[str] = frozenset(),
        copies: Sequence[ModelEma] = (),
    ):  # fmt: skip
        self.model, self.optimizer, self.average, self.config = model, optimizer, average, config
        self.copies = copies  # averages that methods asked for
        self.device, self.ranks = device, ranks
        self.augment = Augment(config.augment).to(device)
        self.precision = choose_precision(config.train.precision, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision == torch.float16)
        told_stages = getattr(model, "stage_table", None) is not None
        self.draws_paths = isinstance(model, VisionTransformer) and (model.drop_path_rate > 0 or told_stages)
        self.mixes_samples = normalises_batches(model)
        configure_model(model, config.train, device)
        self.shape, self._whole = WHOLE_MODEL, True  # whether each trained parameter has a part in each step
        self.wrapped = 0  # times that several processes' objective was made anew, and with it what was compiled
        self.bare = Objective(model, self.augment, config.train.label_smoothing, self.precision, taps)
        self.objective = ranks.wrap(self.bare)
        self.compiles = config.train.compile == "yes" or (config.train.compile == "auto" and device.type == "cuda")
        self._made: dict[bool, nn.Module] = {}  # compiled, by whether as a CUDA graph
        self._modes: dict[tuple[int, int, Shape], Mode] = {}
        self._forwards: dict[int, Callable[[Tensor], Tensor]] = {}  # for evaluation, by the model's identity
        self._ahead: deque[torch.cuda.Event] = deque()
        self.dials = Dials()
        self.mark: Callable[[str], None] = lambda phase: None  # told what has just been issued, for benches
        if config.train.graphs == "yes" and not self._may_capture:
            raise ConfigError(
                "train.graphs: CUDA graphs need a GPU, train.compile, one process and train.accumulate=1; use auto"
            )
        if self.compiles:
            torch._dynamo.config.recompile_limit = COMPILED_VARIANTS
            torch._dynamo.config.accumulated_recompile_limit = COMPILED_VARIANTS

    # --- how it runs ---

    def put(self, shape: Shape) -> None:
        """The model runs in ``shape`` from now on; ConfigError where it has no such part."""
        if shape == self.shape:
            return
        check_shape(self.model, shape)
        set_shape(self.model, shape)
        self.bare.input_size, self.shape = shape.input_size, shape
        self._set_drop_path()
        changed = set_trainable(self.model, shape)
        # Once steps pass over blocks, all are taken for such that may, until what is trained changes.
        whole = not shape.skipped_blocks and (changed or self._whole)
        if changed or whole != self._whole:
            self._whole = whole
            if self.ranks.world > 1:
                self._made.clear()
                self.wrapped += 1
                self.objective = self.ranks.wrap(self.bare, whole)

    def turn(self, dials: Dials) -> None:
        """Augmentation and drop path are as strong as ``dials`` say from now on."""
        if dials != self.dials:
            self.dials = dials
            self._set_drop_path()

    def mode(self, feed: Feed) -> Mode:
        """How full batches of ``feed`` run, in the present shape. The last, smaller batch of an epoch runs eagerly."""
        key = (feed.size, feed.batch_size, self.shape)
        if key not in self._modes:
            self._modes[key] = Mode(self.compiles, self.compiles and self._captures(feed))
        return self._modes[key]

    @property
    def _may_capture(self) -> bool:
        # Several processes reduce gradients during the backward, and micro-batches add theirs up: neither is captured.
        alone = self.ranks.world == 1 and self.config.train.accumulate == 1
        return self.device.type == "cuda" and self.compiles and alone

    def _captures(self, feed: Feed) -> bool:
        if not self._may_capture or self.config.train.graphs != "auto":
            return self.config.train.graphs == "yes"
        return 3 * feed.batch_size * count_macs(self.model, self.shape.input_size or feed.size) < GRAPH_MACS

    def _runner(self, mode: Mode) -> nn.Module:
        if not mode.compiled:
            return self.objective
        if mode.graphs not in self._made:
            # One compilation for each size and batch: nothing is left open for the compiler to guess.
            how = {"mode": "reduce-overhead"} if mode.graphs else {}
            self._made[mode.graphs] = torch.compile(self.objective, dynamic=False, **how)
        return self._made[mode.graphs]

    def warm(self, feed: Feed, classes: int) -> float:
        """Compiles what full batches of ``feed`` need, by steps that leave no trace; returns the seconds it took."""
        mode = self.mode(feed)
        if not mode.compiled:
            return 0.0
        began = time.perf_counter()
        batch = self._blank(feed.size, feed.batch_size, classes)
        with buffers_kept(self.model):
            # A graph is captured in the second run, and replayed from the third on.
            for _ in range(3 if mode.graphs else 1):
                self.rehearse(batch, mode)
            if feed.batch_size > 2 * self.ranks.world:  # an epoch's last batch, which is short: kernels of its own
                self.rehearse(self._blank(feed.size, feed.batch_size // 2, classes), EAGER)
        wait(self.device)  # device sync, before the clock runs
        return time.perf_counter() - began

    def _blank(self, size: int, total: int, classes: int) -> Batch:
        """This process's part of a batch of ``total`` black images."""
        places = self.ranks.share.places(total)
        images = torch.zeros((len(places), size, size, 3), dtype=torch.uint8, device=self.device)
        labels = torch.arange(len(places), device=self.device) % classes
        return Batch(images.permute(0, 3, 1, 2), labels, torch.from_numpy(places), places, total)

    def rehearse(self, batch: Batch, mode: Mode = EAGER) -> None:
        """Forward and backward without an update; the gradients are thrown away."""
        with denormals_flushed(self.device):
            self._gradients(batch, 0, mode)
        self.optimizer.zero_grad(set_to_none=True)

    def gradients_of(self, batch: Batch) -> dict[str, Tensor]:
        """The training loss's gradients by the weights of trained linear layers and convolutions, by their names."""
        self._gradients(batch, 0, EAGER)
        found = {
            name: module.weight.grad.detach().clone()
            for name, module in self.model.named_modules()
            if isinstance(module, (nn.Linear, nn.Conv2d)) and module.weight.grad is not None
        }
        self.optimizer.zero_grad(set_to_none=True)
        return found

    @torch.no_grad()
    def loss_of(self, model: nn.Module, batch: Batch, number: int) -> Tensor:
        """The summed cross-entropy of a batch under ``model``'s weights, augmented as in step ``number``: 0-D."""
        logits = self.logits_of(model, batch, number, self.precision).float()
        return F.cross_entropy(logits, batch.labels, reduction="sum")

    def logits_of(self, model: nn.Module, batch: Batch, number: int, precision: torch.dtype) -> Tensor:
        """A batch's logits (B, C) in ``precision``, augmented as in step ``number``, but for mixing and erasing."""
        seed, places = self.config.run.seed, batch.places[: len(batch)]  # damaged images are left out of some splits
        images = self.augment.prepare(batch.images, seed, number, places, self.dials.randaugment)
        pixels = self.bare.resized(self.augment.normalize(images))
        operands = (pixels, self._noise(seed, number, places)) if self.draws_paths else (pixels,)
        with autocast(self.device, precision):
            return model(*operands)

    def forward_of(self, model: nn.Module) -> Callable[[Tensor, bool], Tensor]:
        """``model`` as a function of uint8 images (B, 3, S, S), for evaluation; compiled for whole batches."""

        def forward(images: Tensor) -> Tensor:
            with autocast(self.device, self.precision):
                return model(self.augment.normalize(images))

        if id(model) not in self._forwards:
            self._forwards[id(model)] = torch.compile(forward, dynamic=False) if self.compiles else forward

        def run(images: Tensor, whole: bool) -> Tensor:
            with fast_attention(self.device):
                return (self._forwards[id(model)] if whole else forward)(images)

        return run

    # --- a step ---

    def __call__(
        self, batch: Batch, step: int, lr: float, mode: Mode = EAGER, decay: float | None = None, dials: Dials = DIALS
    ) -> Outcome:
        """Trains on this process's part of a batch at learning rate ``lr``.

        ``decay`` is the average's, where the recipe does not state it; ``dials`` scale augmentation and drop path.
        """
        self.turn(dials)
        with denormals_flushed(self.device):
            outcome = self._gradients(batch, step, mode)
            self._update(lr, decay, step)
        self._hold_back()
        return outcome

    def _update(self, lr: float, decay: float | None, step: int) -> None:
        """Weights and their average, by the gradients that are there."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.config.train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.mark("optimizer")
        if self.average is not None:
            self.average.update(self.model, self.average.decay_between(START, START) if decay is None else decay)
            self.mark("average")
        for copy in self.copies:  # young ones follow faster, or short runs would keep their random start
            copy.update(self.model, min(copy.decay, (1 + step) / (10 + step)))

    def _gradients(self, batch: Batch, step: int, mode: Mode) -> Outcome:
        """Forward and backward."""
        seed = self.config.run.seed
        if not self.draws_paths:  # other models draw drop path themselves, from PyTorch's generators
            torch.manual_seed(step_seed(seed, step, self.ranks.rank))
        counts, has_images = (1 / batch.total if len(batch) else 0.0), len(batch) > 0
        if not has_images:
            batch = self._stand_in(batch)
        images = self.augment.prepare(batch.images, seed, step, batch.places, self.dials.randaugment)
        drawn = self.augment.draw(seed, step, batch.places, batch.total, images.shape[-1], self.dials.strength)
        noise = self._noise(seed, step, batch.places) if self.draws_paths else None
        # Gradients are averaged over the processes, and are to be those of the global batch's mean.
        weight = send(torch.tensor(counts), self.device)
        self.mark("augment")  # what the compiled graph does not do: draws, their copies, RandAugment
        run = self._runner(mode)
        if mode.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        parts = self._parts(len(batch), mode)
        total = torch.zeros((), device=self.device)
        told: list[list[Tensor]] = [[], []]  # hits and spread, part by part
        for number, part in enumerate(parts):
            operands = images, batch.labels, drawn, noise
            if len(parts) > 1:
                operands = _taken(*operands, part)
            last = number == len(parts) - 1
            with self._reducing(last), fast_attention(self.device):
                loss, *tapped = run(*operands, weight)
                self.mark("forward")
                self.scaler.scale(loss * self.ranks.world).backward()
                self.mark("backward")
            total += loss.detach()  # a copy: a CUDA graph writes its outputs anew at each step
            for seen, value in zip(told, tapped, strict=True):
                if value is not None:
                    seen.append(value.clone())
        return Outcome(total, *(_joined(seen, parts) for seen in told)) if has_images else Outcome(total)

    def _set_drop_path(self) -> None:
        if self.draws_paths:  # where they lie: compiled steps read them there
            self.model.set_drop_path(self.model.drop_path_rate * self.dials.strength)

    def _parts(self, count: int, mode: Mode) -> list[np.ndarray]:
        """The places of micro-batches."""
        parts = self.config.train.accumulate
        if self.compiles and not mode.compiled and not self.mixes_samples:
            parts *= 2  # an eager step keeps more than the compiled one, which a GPU's memory may be cut to
        return micro_batches(count, parts)

    def _reducing(self, last: bool) -> AbstractContextManager[None]:
        if self.ranks.world == 1 or last:
            return nullcontext()
        return self.objective.no_sync()  # gradients add up here, and are reduced with the last part's

    def _noise(self, seed: int, step: int, places: np.ndarray) -> Tensor:
        depth = len(self.model.blocks) + (self.model.stage_table is not None)
        draws = uniform((seed, step, DROP_PATH), places, 2 * depth).reshape(-1, depth, 2)
        below_one = np.minimum(draws, 1 - 2.0**-24)  # as float32 may not round it up
        return send(torch.from_numpy(below_one.astype(np.float32)), self.device)

    def _stand_in(self, batch: Batch) -> Batch:
        """An image in the place of none: this process must take part in the reduction of gradients."""
        images = torch.zeros((1, *batch.images.shape[1:]), dtype=torch.uint8, device=self.device)
        labels = torch.zeros(1, dtype=torch.int64, device=self.device)
        return Batch(images, labels, torch.zeros(1, dtype=torch.int64), np.zeros(1, np.int64), batch.total)

    def _hold_back(self) -> None:
        if self.device.type != "cuda":
            return
        event = torch.cuda.Event(blocking=True)
        event.record()
        self._ahead.append(event)
        if len(self._ahead) > RUN_AHEAD:
            self._ahead.popleft().synchronize()  # device sync, with the step before the last one only


def _joined(values: list[Tensor], parts: list[np.ndarray]) -> Tensor | None:
    """What micro-batches gave, in the batch's order."""
    if len(values) < 2:
        return values[0] if values else None
    order = torch.from_numpy(np.argsort(np.concatenate(parts)))
    return torch.cat(values)[send(order, values[0].device)]


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of PyTorch's own generators in one step."""
    return int(generator((seed, step, 0x5EED, rank)).integers(2**62))


def configure_model(model: nn.Module, config: TrainConfig, device: torch.device) -> None:
    """Sets which local-FFN kernel the model uses, and whether activations are kept or computed again."""
    local = [module for module in model.modules() if isinstance(module, LocalFeedForward)]
    if config.kernel == "fused" and device.type != "cuda":
        raise ConfigError(f"train.kernel: fused needs a CUDA device, this run is on {device}; use auto")
    if config.kernel != "auto" and not local:
        raise ConfigError(
            f"train.kernel: {config.kernel} is for local FFNs, and {type(model).__name__} has none; use auto"
        )
    for module in local:
        module.kernel = config.kernel
    if config.checkpointing:
        if not hasattr(model, "set_grad_checkpointing"):
            raise ConfigError(f"train.checkpointing: {type(model).__name__} does not have it")
        if normalises_batches(model):
            raise ConfigError(
                "train.checkpointing: a BatchNorm would count each batch twice; use train.accumulate to save memory"
            )
        model.set_grad_checkpointing(True)


def normalises_batches(model: nn.Module) -> bool:
    """Whether what a sample gives depends on the others in its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def micro_batches(count: int, parts: int) -> list[np.ndarray]:
    """The places of ``count`` samples, cut into at most ``parts`` of mirrored pairs: mixup stays within each."""
    parts = max(1, min(parts, (count + 1) // 2))
    return [Share(part, parts).places(count) for part in range(parts)]


def _taken(images: Tensor, labels: Tensor, drawn: AugmentParams, noise: Tensor | None, part: np.ndarray) -> tuple:
    """The samples ``part`` of a batch and of what was drawn for it."""
    chosen = send(torch.from_numpy(part), images.device)
    cut = [None if values is None else values[chosen] for values in (images, labels, drawn.boxes, drawn.noise, noise)]
    return (
        cut[0].contiguous(memory_format=torch.channels_last),
        cut[1],
        AugmentParams(cut[2], cut[3], drawn.mix),
        cut[4],
    )
