"""The samples of an evaluation: a grid to look at, the Fréchet distance to real images, and a classifier's verdict.

Shape letters: B batch, C channels, H W sides of an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.batch import Source, Sources
from vitlocal.data.shares import WholeBatches
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.tasks.frechet import FeatureSet, Moments, frechet_distance, measure
from vitlocal.tasks.memory import explained_memory_errors
from vitlocal.tasks.noise_schedule import NoiseSchedule
from vitlocal.tasks.sample_grid import draw_grid
from vitlocal.tasks.sampling import SamplerOptions, sample, sample_keys, to_images
from vitlocal.tasks.task import Processes, Scores

COLUMNS = 8  # samples of each class in the grid
REFERENCE_IMAGES = 10_000  # real images of the Fréchet distance, at most


@dataclass(frozen=True)
class GalleryOptions:
    """What an evaluation draws.

    - ``classes``: rows of the grid, classes from all over the list; 0: no grid.
    - ``samples``: for the Fréchet distance of each evaluation; 0: none. ``last_samples``: of the last one, if more.
    - ``batch_size``: samples at a time.
    """

    sampler: SamplerOptions
    classes: int = 8
    samples: int = 0
    last_samples: int = 0
    batch_size: int = 64
    seed: int = 0


class _Stopped(Exception):
    """A stop signal came."""


@dataclass(frozen=True)
class _Evaluation:
    """One evaluation: the model with its noise schedule and number format, and the processes that share the work."""

    model: nn.Module
    schedule: NoiseSchedule
    precision: torch.dtype
    ranks: Processes
    stop: Callable[[], bool] = lambda: False

    def turns(self, batches: int) -> Iterator[int]:
        """The numbers of this process's ``batches``. All processes ask ``stop`` equally often, before each turn."""
        for first in range(0, batches, self.ranks.world):
            if self.stop():
                raise _Stopped
            if (number := first + self.ranks.rank) < batches:
                yield number


class Gallery:
    """Draws and judges samples of ``size`` px of the classes in ``sources``.

    ``autoencoder`` decodes latents; None for pixels. ``features``: those of the Fréchet distance; None: no distance.
    """

    def __init__(
        self, options: GalleryOptions, sources: Sources, size: int, device: torch.device,
        autoencoder: Autoencoder | None = None, features: FeatureSet | None = None,
    ):  # fmt: skip
        self.options, self._sources, self._size, self._device = options, sources, size, device
        self._autoencoder, self._features = autoencoder, features
        self.classes = sources.train.classes
        self._reference: Moments | None = None
        self._floors: dict[int, float] = {}  # by the number of held-out images

    def judge(
        self, model: nn.Module, schedule: NoiseSchedule, precision: torch.dtype, last: bool, ranks: Processes,
        stop: Callable[[], bool], say: Callable[[str], None],
    ) -> Scores | None:  # fmt: skip
        """The picture, and the metrics of samples; None if ``stop()`` was true. Processes share the samples."""
        options, run = self.options, _Evaluation(model, schedule, precision, ranks, stop)
        count = max(options.samples, options.last_samples) if last else options.samples
        count = count if self._features is not None else 0
        try:
            pictures = {"samples": self._grid(run)} if options.classes else {}
            if not count:
                return Scores({}, pictures=pictures)
            assert self._features is not None
            say(f"drawing {count:,} samples for the {self._features.name}")
            real, floor = self._real(run), self._floor(run, count)
            moments, right = self._measured(self._samples(run, count), run)
        except _Stopped:
            return None
        values = {"frechet_distance": frechet_distance(moments, real)}
        if set(self.classes) <= set(self._features.classes):
            values["sample_accuracy"] = 100 * right / count
        note = {
            "name": self._features.name, "samples": count, "reference_images": real.count,
            "reference": "training images" if self._autoencoder is None else "decoded latents of training images",
            "floor": floor, "floor_images": min(count, self._sources.val.count), **asdict(options.sampler),
            "seed": options.seed,
        }  # fmt: skip
        return Scores(values, pictures=pictures, notes={"frechet": note})

    def seconds(
        self, model: nn.Module, schedule: NoiseSchedule, precision: torch.dtype, ranks: Processes,
        stop: Callable[[], bool] = lambda: False,
    ) -> tuple[float, float]:  # fmt: skip
        """Estimates of the time that :meth:`judge` takes between, and at the end of a run.

        Measures the real images now. 0 if ``stop()`` was true.
        """
        options, run = self.options, _Evaluation(model, schedule, precision, ranks, stop)
        usual, most = options.samples, max(options.samples, options.last_samples)
        usual, most = (0, 0) if self._features is None else (usual, most)
        grid = min(options.classes, len(self.classes)) * COLUMNS
        if not grid + most:
            return 0.0, 0.0
        try:
            for count in sorted({usual, most} - {0}):
                self._floor(run, count)
        except _Stopped:
            return 0.0, 0.0
        labels = torch.zeros(min(options.batch_size, max(grid, most)), dtype=torch.int64)
        began = time.perf_counter()
        images = self._draw(run, labels, labels)
        drawn = time.perf_counter()
        if self._features is not None and most:
            self._features.judge(images)
        judged = time.perf_counter()
        if most:
            frechet_distance(self._real(run), self._real(run))  # of 2,048 features it takes seconds
        compared = time.perf_counter()

        def estimate(count: int) -> float:
            mine = min(count, -(-count // (options.batch_size * ranks.world)) * options.batch_size)
            each = grid * (drawn - began) + mine * (judged - began)
            return each / len(labels) + (compared - judged if count else 0.0)

        return estimate(usual), estimate(most)

    def _draw(self, run: _Evaluation, labels: Tensor, numbers: Tensor) -> Tensor:
        """Samples (B, 3, H, W) uint8, on the CPU: ``numbers`` (B,) of the classes ``labels`` (B,)."""
        keys, count = sample_keys(self.options.seed, labels, numbers), len(labels)
        remedy = f"use diffusion.sample_batch={max(1, count // 2)}; the same command continues with it"
        with explained_memory_errors("drawing samples", self._size, count, remedy):
            drawn = sample(
                run.model, run.schedule, labels, keys, self._size, self.options.sampler, device=self._device,
                precision=run.precision,
            )  # fmt: skip
            return to_images(drawn, self._autoencoder)

    def _grid(self, run: _Evaluation) -> Image.Image:
        """Samples of classes from all over the list, a row for each. Every process draws them all."""
        rows = min(self.options.classes, len(self.classes))
        shown, parts = torch.arange(rows) * len(self.classes) // rows, []
        labels, numbers = shown.repeat_interleave(COLUMNS), torch.arange(COLUMNS).repeat(rows)
        for part in torch.arange(len(labels)).split(self.options.batch_size):
            if run.stop():
                raise _Stopped
            parts.append(self._draw(run, labels[part], numbers[part]))
        return draw_grid(
            torch.cat(parts).unflatten(0, (rows, COLUMNS)), [self.classes[each] for each in shown.tolist()]
        )

    def _samples(self, run: _Evaluation, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches of ``count`` samples, equally many of each class, and their labels."""
        parts = torch.arange(count).split(self.options.batch_size)
        for number in run.turns(len(parts)):
            labels, numbers = parts[number] % len(self.classes), parts[number] // len(self.classes)
            yield self._draw(run, labels, numbers), labels

    def _measured(self, batches: Iterator[tuple[Tensor, Tensor]], run: _Evaluation) -> tuple[Moments, int]:
        """The moments of all processes' images, and how many images show the class that they should."""
        assert self._features is not None
        first, right = next(batches, None), None
        if first is None:  # a process without images adds nothing
            blank = torch.zeros((1, 3, self._size, self._size), dtype=torch.uint8)
            sums = np.zeros_like(Moments.of(self._features.judge(blank)[0]).sums)
        else:
            moments, right = measure(self._features, chain([first], batches), self.classes)
            sums = moments.sums
        mine = torch.from_numpy(np.append(sums, right or 0))
        total = run.ranks.total(mine.to(self._device) if run.ranks.world > 1 else mine).cpu().numpy()  # device sync
        return Moments(total[:-1].reshape(sums.shape)), round(total[-1])

    # --- real images ---

    def _real(self, run: _Evaluation) -> Moments:
        """The moments of training images, as the model learns them."""
        if self._reference is None:
            train = self._sources.train
            self._reference = self._measured(self._images_of(train, min(REFERENCE_IMAGES, train.count), run), run)[0]
        return self._reference

    def _floor(self, run: _Evaluation, count: int) -> float | None:
        """The distance of ``count`` held-out images, or of all of them; None if there are fewer than two."""
        val = self._sources.val
        held_out = min(count, val.count)
        if held_out not in self._floors and held_out > 1:
            moments = self._measured(self._images_of(val, held_out, run), run)[0]
            self._floors[held_out] = frechet_distance(moments, self._real(run))
        return self._floors.get(held_out)

    def _images_of(self, source: Source, count: int, run: _Evaluation) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's batches of ``count`` images of epoch 0, (B, 3, H, W) uint8, and their labels."""
        size, subset = self.options.batch_size, 0
        if source is self._sources.val and count < source.count:  # sorted by class, perhaps: rows from all over it
            source.rows.set(subset := count, np.linspace(0, source.count - 1, count).astype(np.int64))  # as probes do
        batches = -(-count // size)
        share = WholeBatches(run.ranks.rank, run.ranks.world, batches)
        with source.open(Feed(self._size, size, subset), Position(), share) as opened:
            for number in run.turns(batches):
                batch = next(opened)
                images, labels = batch.images[: count - number * size], batch.labels[: count - number * size]
                if self._autoencoder is not None:  # their means: what the model can reach at best
                    mean = images.float().chunk(2, dim=1)[0]
                    images = self._autoencoder.decode(mean * self._autoencoder.scaling_factor)
                yield images, labels
