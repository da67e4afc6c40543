"""The samples of an evaluation: a grid to look at, the Fréchet distance to real images, and a classifier's verdict.

Shape letters: B batch, C channels, H W sides of an image.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.batch import Source, Sources
from vitlocal.data.shares import WHOLE
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.tasks.frechet import FeatureSet, Moments, frechet_distance, measure
from vitlocal.tasks.noise_schedule import NoiseSchedule
from vitlocal.tasks.sample_grid import draw_grid
from vitlocal.tasks.sampling import SamplerOptions, sample, sample_keys, to_pixels
from vitlocal.tasks.task import Processes, Scores

COLUMNS = 8  # samples of each class in the grid
REFERENCE_IMAGES = 10_000  # real images of the Fréchet distance, at most


@dataclass(frozen=True)
class GalleryOptions:
    """What an evaluation draws.

    - ``classes``: rows of the grid, classes from all over the list; 0: no grid.
    - ``samples``: for the Fréchet distance of each evaluation; 0: none. ``last_samples``: of the last one.
    - ``batch_size``: samples at a time.
    """

    sampler: SamplerOptions
    classes: int = 8
    samples: int = 0
    last_samples: int = 0
    batch_size: int = 64
    seed: int = 0


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
        self._floors: dict[int, float] = {}  # by the number of real images

    def judge(
        self, model: nn.Module, schedule: NoiseSchedule, precision: torch.dtype, last: bool, ranks: Processes,
        stop: Callable[[], bool], say: Callable[[str], None],
    ) -> Scores | None:  # fmt: skip
        """The picture, and the metrics of samples; None if ``stop()`` was true. Processes share the samples."""
        options, pictures = self.options, {}
        draw = _Drawing(self, model, schedule, precision, stop)
        if options.classes:
            rows = min(options.classes, len(self.classes))
            shown = torch.arange(rows) * len(self.classes) // rows
            labels, numbers = shown.repeat_interleave(COLUMNS), torch.arange(COLUMNS).repeat(rows)
            parts = list(draw.images(labels, numbers))  # in every process, so that all call stop() equally often
            if draw.stopped:
                return None
            names = [self.classes[place] for place in shown.tolist()]
            pictures = {"samples": draw_grid(torch.cat(parts).unflatten(0, (rows, COLUMNS)), names)}
        features, count = self._features, options.last_samples if last else options.samples
        if not count or features is None:
            return Scores({}, pictures=pictures)
        say(f"drawing {count:,} samples for the {features.name}")
        real, floor = self._real(), self._floor(count)
        mine = torch.arange(ranks.rank, count, ranks.world)
        labels, numbers = mine % len(self.classes), mine // len(self.classes)
        moments, right = Moments(np.zeros_like(real.sums)), 0 if features.classes else None
        drawn = draw.images(labels, numbers, -(-count // (options.batch_size * ranks.world)))
        for images, asked in zip(drawn, labels.split(options.batch_size), strict=False):
            part, found = measure(features, [(images, asked)], self.classes)
            moments, right = moments + part, None if found is None or right is None else right + found
        if draw.stopped:
            return None
        moments = Moments(ranks.total(torch.from_numpy(moments.sums).to(self._device)).cpu().numpy())
        values = {"frechet_distance": frechet_distance(moments, real)}
        if right is not None:
            values["sample_accuracy"] = 100 * float(ranks.total(torch.tensor(right, device=self._device))) / count
        note = {"name": features.name, "samples": count, "reference_images": real.count, "floor": floor,
                **asdict(options.sampler), "seed": options.seed}  # fmt: skip
        return Scores(values, pictures=pictures, notes={"frechet": note})

    def last_seconds(self, model: nn.Module, schedule: NoiseSchedule, precision: torch.dtype) -> float:
        """An estimate of the time that :meth:`judge` takes at the end of a run. Measures the real images now."""
        options = self.options
        count = options.last_samples if self._features is not None else 0
        if count:
            self._floor(count)
        grid = min(options.classes, len(self.classes)) * COLUMNS
        some = torch.zeros(min(options.batch_size, max(grid, count)), dtype=torch.int64)
        if not len(some):
            return 0.0
        began = time.perf_counter()
        (images,) = _Drawing(self, model, schedule, precision, lambda: False).images(some, some)
        if self._features is not None and count:
            measure(self._features, [(images, some)], self.classes)
        return (time.perf_counter() - began) * (grid + count) / len(some)

    def draw(
        self, model: nn.Module, schedule: NoiseSchedule, precision: torch.dtype, labels: Tensor, keys: Tensor
    ) -> Tensor:
        """One batch of samples, (B, 3, H, W) uint8 on the CPU."""
        drawn = sample(
            model, schedule, labels, keys, self._size, self.options.sampler, device=self._device, precision=precision
        )
        return (to_pixels(drawn) if self._autoencoder is None else self._autoencoder.decode(drawn)).cpu()

    # --- real images ---

    def _real(self) -> Moments:
        """The moments of training images, as the model learns them."""
        if self._reference is None:
            self._reference = self._measured(self._sources.train, REFERENCE_IMAGES)
        return self._reference

    def _floor(self, count: int) -> float | None:
        """The distance of ``count`` held-out images, or of all of them; None if there are fewer than two."""
        held_out = min(count, self._sources.val.count)
        if count not in self._floors and held_out > 1:
            self._floors[count] = frechet_distance(self._measured(self._sources.val, held_out), self._real())
        return self._floors.get(count)

    def _measured(self, source: Source, count: int) -> Moments:
        assert self._features is not None
        return measure(self._features, self._images_of(source, count), self.classes)[0]

    def _images_of(self, source: Source, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The first ``count`` images of epoch 0, (B, 3, H, W) uint8, and their labels. Every process reads them all."""
        if source is self._sources.val and count < source.count:  # sorted by class, perhaps: rows from all over it
            rows = (torch.arange(count) * source.count // count).numpy()
            source.rows.set(count, rows)
        subset = count if source is self._sources.val and count < source.count else 0
        seen = 0
        with source.open(Feed(self._size, self.options.batch_size, subset), Position(), WHOLE) as batches:
            for batch in batches:
                if seen >= count:
                    return
                images = batch.images[: count - seen]
                seen += len(images)
                if self._autoencoder is not None:  # their means: what the model can reach at best
                    mean = images.float().chunk(2, dim=1)[0]
                    images = self._autoencoder.decode(mean * self._autoencoder.scaling_factor)
                yield images, batch.labels[: len(images)]


class _Drawing:
    """Samples of one model, batch by batch. ``stopped``: whether ``stop()``, called before each batch, was true."""

    def __init__(
        self, gallery: Gallery, model: nn.Module, schedule: NoiseSchedule, precision: torch.dtype,
        stop: Callable[[], bool],
    ):  # fmt: skip
        self._gallery, self._model = gallery, (model, schedule, precision)
        self._stop, self.stopped = stop, False

    def images(self, labels: Tensor, numbers: Tensor, rounds: int = 0) -> Iterator[Tensor]:
        """Images (B, 3, H, W) uint8: ``numbers`` (N,) of the classes ``labels`` (N,).

        ``stop`` is called ``rounds`` times, at least: other processes may have more batches.
        """
        options = self._gallery.options
        keys = sample_keys(options.seed, labels, numbers).split(options.batch_size)
        parts = list(zip(labels.split(options.batch_size), keys, strict=True))
        for number in range(max(rounds, len(parts))):
            if self._stop():
                self.stopped = True
                return
            if number < len(parts) and len(parts[number][0]):
                yield self._gallery.draw(*self._model, *parts[number])
