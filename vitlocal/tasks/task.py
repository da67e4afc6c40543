"""The base class of tasks. A task is all that the trainer does not know: operands, loss, evaluation and export.

Shape letters: B batch, S size of the images, px.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitlocal.data.batch import Batch
from vitlocal.plan import Dials
from vitlocal.tasks.metrics import Metric


@dataclass(frozen=True)
class Scores:
    """The result of an evaluation.

    ``values``: the metrics that were measured, by name. ``by_class``: (C, 2) int64, correct images and all images of
    each class. ``pictures``: images to show, by name. ``notes``: what belongs beside the values in the log.
    """

    values: Mapping[str, float]
    by_class: np.ndarray | None = None
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


class Processes(Protocol):
    """The processes of a run: see :class:`vitlocal.train.distributed.Ranks`."""

    rank: int
    world: int

    def total(self, values: Tensor) -> Tensor: ...


def sum_type(device: torch.device) -> torch.dtype:
    """The type for sums over many values: float64 if the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def blank_photos(count: int, size: int, device: torch.device, random: bool) -> Tensor:
    """Black or random images (count, 3, size, size) uint8, channels-last."""
    images = torch.zeros((count, size, size, 3), dtype=torch.uint8, device=device).permute(0, 3, 1, 2)
    return images.random_(0, 256) if random else images


class Task:
    """What a run learns. ``model`` is trained in the number format ``precision``.

    ``objective`` is a module that holds the model. From :meth:`operands` and a weight it computes the loss of a batch,
    in one graph: ``objective(*operands, weight)`` returns (weight x the summed loss, correct, attention variance). The
    last two are None, unless methods asked for them; see :class:`~vitlocal.methods.method.StepResult`.
    """

    metrics: ClassVar[tuple[Metric, ...]]  # of an evaluation; the first one is always measured
    step_outputs: ClassVar[frozenset[str]] = frozenset()  # outputs of steps that methods may ask for
    objective: nn.Module

    def __init__(self, model: nn.Module, precision: torch.dtype):
        self.model: Any = model
        self.precision = precision
        self.repeats = not getattr(model, "drops_out", True)  # whether a step draws nothing from PyTorch's generators

    # --- training ---

    def set_shape(self, input_size: int | None) -> None:
        """Resizes images to ``input_size`` px from now on; None: no resizing."""
        assert input_size is None, "this task cannot resize its images"

    def set_dials(self, dials: Dials) -> None:
        """Sets the strength of what the model itself draws, and adapts it to the model's current shape."""

    def blank(self, count: int, size: int, random: bool = False) -> Tensor:
        """``Batch.images`` of ``count`` images of ``size`` px, zeros or random values, on the model's device."""
        raise NotImplementedError

    def image_size(self, images: Tensor) -> int:
        """The size of ``Batch.images``, px."""
        return images.shape[-1]

    def operands(self, batch: Batch, seed: int, number: int, dials: Dials) -> tuple[Any, ...]:
        """The objective's operands of this process's part of a batch, in step ``number``.

        All random numbers have the key (``seed``, ``number``, place in the global batch).
        """
        raise NotImplementedError

    def part(self, operands: tuple[Any, ...], chosen: Tensor) -> tuple[Any, ...]:
        """The operands of the samples ``chosen`` (n,) int64."""
        raise NotImplementedError

    def probe(
        self, model: nn.Module, batch: Batch, seed: int, number: int, dials: Dials, precision: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The outputs (B, ...) of ``model`` in ``precision``, and the sum of their losses (0-D).

        The batch is augmented as in step ``number``, without what mixes samples. The outputs are those of the tangent
        kernel.
        """
        raise NotImplementedError

    # --- evaluation ---

    def predict(self, model: nn.Module, *operands: Tensor) -> Tensor:
        """The part of an evaluation that is compiled: from operands to a tensor (B, ...). Runs under autocast."""
        raise NotImplementedError

    def new_sums(self, num_classes: int) -> Tensor:
        """The sums of an evaluation that has seen no image, on the model's device."""
        raise NotImplementedError

    def add(self, sums: Tensor, batch: Batch, counted: Tensor, predict: Callable[..., Tensor]) -> None:
        """Adds a batch to ``sums``. ``counted`` (B,) bool: the images that count. ``predict``: as :meth:`predict`."""
        raise NotImplementedError

    def scores(self, sums: np.ndarray) -> Scores:
        """The scores of sums over all batches and processes."""
        raise NotImplementedError

    def judge(
        self, scores: Scores, model: nn.Module, last: bool, ranks: Processes, stop: Callable[[], bool],
        say: Callable[[str], None],
    ) -> Scores | None:  # fmt: skip
        """``scores`` with what is not a sum over the batches of the validation split; None if ``stop()`` was true.

        All processes call it, and must call ``stop`` equally often. ``model`` has the evaluated shape. ``last``:
        whether the run ends. ``say`` prints a line.
        """
        return scores

    def judging_seconds(self, model: nn.Module, ranks: Processes, stop: Callable[[], bool]) -> tuple[float, float]:
        """Estimates of the time of :meth:`judge`, between and at the end of a run. 0 if ``stop()`` was true.

        All processes call it. ``model`` has the evaluated shape.
        """
        return 0.0, 0.0

    def export(
        self, folder: Path, model: nn.Module, name: str, arguments: Mapping[str, Any], classes: Sequence[str], *,
        size: int, crop_pct: float,
    ) -> None:  # fmt: skip
        """Writes ``model`` in its current shape to ``folder``: see :func:`vitlocal.models.factory.export_model`."""
        raise NotImplementedError
