"""One training step, from a batch on the device to updated weights, without waiting for the device.

Shape letters: B batch, S image size.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vitlocal.data.batch import Batch
from vitlocal.data.random_keys import generator
from vitlocal.data.shares import Share
from vitlocal.data.transfer import send
from vitlocal.errors import ConfigError
from vitlocal.models.shape import check_shape, set_shape, set_trainable
from vitlocal.plan import WHOLE_MODEL, Dials, Feed, Shape
from vitlocal.tasks.memory import explained_memory_errors
from vitlocal.tasks.task import Task
from vitlocal.train.devices import (
    COMPILE_OPTIONS,
    EAGER,
    Mode,
    StepCompiler,
    autocast,
    denormals_flushed,
    fast_attention,
    new_event,
    synchronize,
)  # fmt: skip
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.optim import CombinedOptimizer, ModelEma

NO_DIALS = Dials()  # everything at its full strength
LARGEST_ERROR = 0.25  # of the norm of a compiled step's gradients; rounding to bfloat16 makes less than a hundredth
RUN_AHEAD = 2  # steps by which the host may be ahead of the device: with more, the budget's clock would be wrong


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """A context after which the model's buffers are as before: BatchNorm's statistics, drop path's rates."""
    saved = [buffer.clone() for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), saved, strict=True):
                buffer.copy_(value)


@dataclass(frozen=True)
class StepOutput:
    """The results of a step, on the device."""

    loss: Tensor  # 0-D, detached: this process's part of the global batch's mean loss
    correct: Tensor | None = None  # (B,) bool
    attention_variance: Tensor | None = None  # (B,) float32


class TrainStep:
    """Augments, runs the model forward and backward, and updates the weights and their averages.

    With several processes, each calls it with its part of the same global batch, and all get the same new weights.

    - ``ema``: the run's weight average. ``method_emas``: further averages, which warm up faster.
    - ``precision``: the type of matrix products. ``clip_norm``: largest norm of the gradients; None: no limit.
    - ``grad_accum_steps``: parts of the batch that run one after the other, to save memory.
    - ``compile_step``, ``cuda_graphs``, ``macs``: see :class:`~vitlocal.train.devices.StepCompiler`.
    """

    def __init__(
        self,
        task: Task,
        optimizer: torch.optim.Optimizer | CombinedOptimizer,
        device: torch.device,
        *,
        ema: ModelEma | None = None,
        method_emas: Sequence[ModelEma] = (),
        seed: int = 0,
        clip_norm: float | None = None,
        grad_accum_steps: int = 1,
        compile_step: bool = False,
        cuda_graphs: str = "auto",
        macs: Callable[[int, Shape], int] = lambda size, shape: 0,
        ranks: Ranks = ALONE,
    ):
        self.task, self.model = task, task.model
        self.optimizer: Any = optimizer
        self.device = device
        self.ema, self._method_emas = ema, method_emas
        self.scaler = torch.amp.GradScaler(device.type, enabled=task.precision == torch.float16)
        self.shape, self.dials = WHOLE_MODEL, Dials()
        self.ddp_version = 0  # how often the objective was wrapped again, which discards what was compiled
        self.phase_hook: Callable[[str], None] = lambda phase: None  # called after each phase; for benchmarks
        self.ranks, self.seed = ranks, seed
        self._parameters = dict(self.model.named_parameters())
        self._clip_norm, self._grad_accum_steps = clip_norm, grad_accum_steps
        self._mixes_samples = has_batch_norm(self.model)
        self._uses_all = True  # whether every trained parameter takes part in every step
        self._ddp: Any = ranks.wrap(task.objective)
        # Several processes reduce gradients during the backward pass, and micro-batches add theirs up: no CUDA graphs.
        can_capture = device.type == "cuda" and ranks.world == 1 and grad_accum_steps == 1
        self._compiler = StepCompiler(compile_step, cuda_graphs, can_capture, macs)
        self._events: deque[Any] = deque()  # of the steps that the host is ahead

    # --- how it runs ---

    def set_shape(self, shape: Shape) -> None:
        """Runs the model in ``shape`` from now on. Raises ConfigError if the model has no such part."""
        if shape == self.shape:
            return
        check_shape(self.model, shape)
        set_shape(self.model, shape)
        self.shape = shape
        self.task.set_shape(shape.input_size)
        self.task.set_dials(self.dials)  # the rates of drop path depend on the blocks that run
        changed = set_trainable(self.model, shape)
        # Once steps skip blocks, any block may be skipped, until the set of trained blocks changes.
        uses_all = not shape.skipped_blocks and (changed or self._uses_all)
        if changed or uses_all != self._uses_all:
            self._uses_all = uses_all
            if self.ranks.world > 1:
                self._compiler.reset()
                self.ddp_version += 1
                self._ddp = self.ranks.wrap(self.task.objective, uses_all)

    def set_dials(self, dials: Dials) -> None:
        """Sets the strength of augmentation and drop path."""
        if dials != self.dials:
            self.dials = dials
            self.task.set_dials(dials)

    def mode(self, feed: Feed, shape: Shape | None = None) -> Mode:
        """How full batches of ``feed`` run in ``shape`` (default: the current one).

        The last, smaller batch of an epoch runs eagerly.
        """
        return self._compiler.mode(feed, self.shape if shape is None else shape)

    def warm_up(self, feed: Feed, num_classes: int, rest: int = 0) -> float:
        """Compiles the step for full batches of ``feed``, and returns the seconds that it took. Leaves no trace.

        ``rest``: images of an epoch's last batch, if it is not full. It has kernels of its own and perhaps the largest
        need of memory, so it is rehearsed too.
        """
        mode = self.mode(feed)
        if not mode.compiled:
            return 0.0
        began = time.perf_counter()
        if mode.graphs:
            torch.cuda.empty_cache()  # the memory of a CUDA graph is apart from all other
        places = self.ranks.share.places
        batch = self._blank(places(feed.batch_size), feed.batch_size, feed.size, num_classes, random=True)
        with buffers_kept(self.model), self._compiler.watched(feed, self.shape):
            # A graph is captured in the second run, and replayed from the third one on.
            for _ in range(2 if mode.graphs else 0):
                self.gradients(batch, mode)
            # Copies, because several processes keep all gradients in buffers that the eager step writes too.
            compiled = {name: gradient.clone() for name, gradient in self.gradients(batch, mode).items()}
            # Near ties decide which tokens are pruned, so rounding may change them. With BatchNorm the eager step does
            # not run in parts, and may need more memory than there is.
            prunes = min(self.shape.token_keep_rate, self.shape.attention_keep_rate) < 1
            if self.task.repeats and not prunes and not self._mixes_samples:
                check_compiled(compiled, self.gradients(batch), feed)
            if rest:
                self.gradients(self._blank(places(rest), rest, feed.size, num_classes))
        if mode != self.mode(feed):  # PyTorch has not captured it, so another function is compiled
            self.warm_up(feed, num_classes)
        synchronize(self.device)  # device sync, before the clock runs
        return time.perf_counter() - began

    def release_graphs(self) -> None:
        """Frees the memory of all CUDA graphs, if no later step needs them."""
        self._compiler.release_graphs()

    def _blank(self, places: np.ndarray, total: int, size: int, num_classes: int, random: bool = False) -> Batch:
        """The part at ``places`` of a batch of ``total`` images without content, or with random content."""
        labels = torch.arange(len(places), device=self.device) % num_classes
        return Batch(self.task.blank(len(places), size, random), labels, torch.from_numpy(places), places, total)

    # --- without an update: measurements and evaluation ---

    def gradients(self, batch: Batch, mode: Mode = EAGER, number: int = 0) -> dict[str, Tensor]:
        """Runs forward and backward as in step ``number``. Returns the gradients by name, until the next call."""
        with denormals_flushed(self.device), self._memory_errors(batch):
            self._gradients(batch, number, mode)
        found = {name: weight.grad for name, weight in self._parameters.items() if weight.grad is not None}
        self.model.zero_grad()
        return found

    def probe(self, model: nn.Module, batch: Batch, number: int, precision: torch.dtype) -> tuple[Tensor, Tensor]:
        """The outputs (B, ...) and the summed loss of a batch: see :meth:`vitlocal.tasks.task.Task.probe`."""
        with fast_attention(self.device):
            return self.task.probe(model, batch, self.seed, number, self.dials, precision)

    def predict_fn(self, model: nn.Module) -> Callable[..., Tensor]:
        """The task's ``predict`` for ``model``, under autocast; compiled if the first argument, "is whole", is true."""

        def forward(*operands: Tensor) -> Tensor:
            with autocast(self.device, self.task.precision):
                return self.task.predict(model, *operands)

        compiled = torch.compile(forward, dynamic=False, options=COMPILE_OPTIONS) if self._compiler.enabled else forward

        def predict(is_whole: bool, *operands: Tensor) -> Tensor:
            with fast_attention(self.device):
                return (compiled if is_whole else forward)(*operands)

        return predict

    # --- a step ---

    def __call__(
        self, batch: Batch, number: int, lr: float, mode: Mode = EAGER, ema_decay: float = 1.0, dials: Dials = NO_DIALS
    ) -> StepOutput:
        """Trains on this process's part of a batch, as step ``number``. ``ema_decay`` is that of the weight average."""
        self.set_dials(dials)
        with denormals_flushed(self.device), self._memory_errors(batch):
            output = self._gradients(batch, number, mode)
            self._update(lr, ema_decay, number)
        self._limit_run_ahead()
        return output

    def _update(self, lr: float, ema_decay: float, number: int) -> None:
        """Updates the weights by their gradients, then the weight averages."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self._clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self._parameters.values(), self._clip_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        for parameter in self._parameters.values():
            parameter.grad = None
        self.phase_hook("optimizer")
        if self.ema is not None:
            self.ema.update(ema_decay)
            self.phase_hook("average")
        for ema in self._method_emas:  # a young average follows faster, or a short run would keep its random start
            ema.update(min(ema.decay, (1 + number) / (10 + number)))

    def _gradients(self, batch: Batch, number: int, mode: Mode) -> StepOutput:
        """Runs forward and backward; the gradients are those of the global batch's mean loss."""
        if not self.task.repeats:  # a tenth of a millisecond
            torch.manual_seed(step_seed(self.seed, number, self.ranks.rank))
        fraction, has_images = (1 / batch.total if len(batch) else 0.0), len(batch) > 0
        if not has_images:  # an image with no weight: every process takes part in the reduction of gradients
            batch = self._blank(np.zeros(1, np.int64), batch.total, self.task.image_size(batch.images), 1)
        operands = self.task.operands(batch, self.seed, number, self.dials)
        weight = send(torch.tensor(fraction), self.device)
        self.phase_hook("augment")  # what forward does not do: draws, their copies, and on a CPU RandAugment
        objective = self._compiler.objective(self._ddp, mode)
        if mode.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        parts = self._parts(len(batch), mode)
        total = torch.zeros((), device=self.device)
        outputs: list[list[Tensor]] = [[], []]  # correct and attention_variance, part by part
        for index, part in enumerate(parts):
            chosen, share = operands, weight
            alone = self._mixes_samples and len(part) == 1  # a BatchNorm needs two values, so the image runs twice
            if len(parts) > 1 or alone:
                places = np.repeat(part, 2) if alone else part
                chosen = self.task.part(operands, send(torch.from_numpy(places), self.device))
                share = weight / 2 if alone else weight
            waits = self.ranks.world > 1 and index < len(parts) - 1  # processes exchange gradients with the last part
            with self._ddp.no_sync() if waits else nullcontext(), fast_attention(self.device):
                loss, *further = objective(*chosen, share)
                self.phase_hook("forward")
                # DDP averages gradients over the processes; the sum is wanted.
                self.scaler.scale(loss * self.ranks.world).backward()
                self.phase_hook("backward")
            total += loss.detach()  # a copy: a CUDA graph overwrites its outputs at each step
            for values, value in zip(outputs, further, strict=True):
                if value is not None:
                    values.append(value[: len(part)].clone())
        return StepOutput(total, *(_join(values, parts) for values in outputs)) if has_images else StepOutput(total)

    def _memory_errors(self, batch: Batch) -> AbstractContextManager[None]:
        """A context in which an error for lack of memory names the option to change."""
        parts = f"train.grad_accum_steps={2 * self._grad_accum_steps} runs the batch in smaller parts"
        remedy = f"{parts}, and the same command continues with it; or start again with a smaller train.batch_size"
        return explained_memory_errors("a training step", self.task.image_size(batch.images), batch.total, remedy)

    def _parts(self, count: int, mode: Mode) -> list[np.ndarray]:
        """The places of the micro-batches."""
        parts = self._grad_accum_steps
        if self._compiler.enabled and not mode.compiled and not self._mixes_samples:
            parts *= 2  # an eager step keeps more activations, and the memory may be just enough for a compiled step
        return micro_batches(count, parts)

    def _limit_run_ahead(self) -> None:
        """Waits for an earlier step if the host is too many steps ahead of the device."""
        if self.device.type == "cpu":
            return
        event = new_event(self.device)
        event.record()
        self._events.append(event)
        if len(self._events) > RUN_AHEAD:
            self._events.popleft().synchronize()  # device sync, with the step before the last one only


def check_compiled(compiled: dict[str, Tensor], eager: dict[str, Tensor], feed: Feed) -> None:
    """ConfigError if a compiled step's gradients are not those of the eager step, apart from rounding."""
    norm = nn.utils.get_total_norm
    difference = float(norm([compiled[name] - value for name, value in eager.items()]))
    size = float(norm(eager.values()))
    # A compiled gradient that is not a number is wrong too, unless the eager one overflows (fp16).
    if 0 < size < math.inf and not difference <= LARGEST_ERROR * size:
        raise ConfigError(
            f"train.compile: at {feed.size} px, PyTorch {torch.__version__} compiles the step wrongly: its gradients "
            f"differ from those of the eager step by {difference / size:.0%}. Use train.compile=no, or another version "
            "of PyTorch"
        )


def _join(values: list[Tensor], parts: list[np.ndarray]) -> Tensor | None:
    """The outputs of micro-batches in the batch's order."""
    if len(values) < 2:
        return values[0] if values else None
    order = torch.from_numpy(np.argsort(np.concatenate(parts)))
    return torch.cat(values)[send(order, values[0].device)]


def step_seed(seed: int, number: int, rank: int = 0) -> int:
    """The seed of PyTorch's own generators in one step."""
    return int(generator((seed, number, 0x5EED, rank)).integers(2**62))


def has_batch_norm(model: nn.Module) -> bool:
    """Whether a sample's output depends on the other samples of its batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def micro_batches(count: int, parts: int) -> list[np.ndarray]:
    """The places of ``count`` samples in at most ``parts`` parts of mirrored pairs, so that mixup stays within each."""
    parts = max(1, min(parts, (count + 1) // 2))
    return [Share(part, parts).places(count) for part in range(parts)]
