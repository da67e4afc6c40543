"""Diffusion: a transformer learns to predict the noise in images, or in latents of an autoencoder.

The objective is DiT's (Peebles and Xie 2023, arXiv 2212.09748), as released: the squared error of the noise and, for
models that predict variances, the variational term. See :func:`~vitlocal.tasks.noise_schedule.denoising_losses`.

Shape letters: B batch, C channels, S image size, s side of the model's input (S / stride), T time steps.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlocal.data.batch import Batch
from vitlocal.data.random_keys import DENOISE, HELD_OUT, generator, normal, uniform
from vitlocal.data.transfer import send
from vitlocal.models.factory import export_model
from vitlocal.plan import Dials
from vitlocal.tasks.gallery import Gallery
from vitlocal.tasks.metrics import METRICS
from vitlocal.tasks.noise_schedule import NoiseSchedule, denoising_losses
from vitlocal.tasks.task import Processes, Scores, Task, blank_photos, sum_type

EVALUATED_TIMES = 10  # time steps of the held-out loss, in the middle of equal parts of the schedule


class NoiseDraws(NamedTuple):
    """The random values of one step for its part of the batch, on the device."""

    times: Tensor  # (B,) int64
    no_label: Tensor  # (B,) bool: trained as "no class"
    no_stage: Tensor | None  # (B,) bool: trained as "no stage"; None: the model has no stage embedding
    noise: Tensor  # (B, C, s, s)
    latent_noise: Tensor | None = None  # (B, C, s, s): chooses latents around their means; None for pixels

    def part(self, chosen: Tensor) -> "NoiseDraws":
        """The values of the samples ``chosen`` (n,) int64."""
        return NoiseDraws(*(None if values is None else values[chosen] for values in self))  # type: ignore[arg-type]


class DiffusionLoss(nn.Module):
    """The loss of a batch: everything that a training step differentiates, in one graph.

    ``scaling_factor``: of latents; None for pixels. ``snr_gamma``: see :meth:`NoiseSchedule.min_snr`; None: all time
    steps have the same weight.
    """

    weights: Tensor | None  # (T,) of the squared errors

    def __init__(
        self, model: nn.Module, schedule: NoiseSchedule, precision: torch.dtype, scaling_factor: float | None,
        snr_gamma: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model: Any = model
        self.schedule, self.precision, self.scaling_factor = schedule, precision, scaling_factor
        self.input_size: int | None = None  # px; training steps resize larger photos to it
        weights = None if snr_gamma is None else schedule.min_snr(snr_gamma)
        self.register_buffer("weights", weights, persistent=False)

    def forward(self, images: Tensor, labels: Tensor, draws: NoiseDraws, weight: Tensor) -> tuple[Tensor, None, None]:
        """The losses of all images, summed and multiplied by ``weight`` (0-D). There are no further outputs.

        ``images``: see :class:`~vitlocal.data.batch.Batch`; ``labels`` (B,).
        """
        _, _, losses = self.losses(self.model, self.precision, images, labels, draws, self.input_size)
        return weight * losses.sum(), None, None

    def losses(
        self, model: nn.Module, precision: torch.dtype, images: Tensor, labels: Tensor, draws: NoiseDraws,
        size: int | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The output of ``model`` (B, C or 2C, s, s) in ``precision``; errors of the noise, and losses, (B,) each.

        Errors are mean squares. Photos are resized to ``size`` px, if they are larger.
        """
        x0 = self.clean(images, draws.latent_noise, size)
        inputs = self.schedule.add_noise(x0, draws.times, draws.noise)
        labels = torch.where(draws.no_label, self.model.num_classes, labels)
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            output = model(inputs, draws.times, labels, draws.no_stage)
        mse, vlb = denoising_losses(self.schedule, output, x0, draws.times, draws.noise)
        return output, mse, (mse if self.weights is None else mse * self.weights[draws.times]) + vlb

    def clean(self, images: Tensor, latent_noise: Tensor | None, size: int | None = None) -> Tensor:
        """The images that noise is added to, (B, C, s, s) float32: pixels from -1 to 1, or scaled latents.

        Photos are resized to ``size`` px, if they are larger (bilinear, antialiased).
        """
        if latent_noise is not None and self.scaling_factor is not None:
            mean, deviation = images.float().chunk(2, dim=1)
            return (mean + deviation * latent_noise) * self.scaling_factor
        pixels = images.float() / 127.5 - 1
        if size is None or size >= pixels.shape[-1]:
            return pixels
        return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)


class Diffusion(Task):
    """Trains a diffusion transformer, which is on its device.

    - ``scaling_factor``: of the latents in the data; None: the model learns pixels.
    - ``snr_gamma``: of Min-SNR weighting; None: DiT's objective.
    - ``label_dropout``: probability that an image is trained without its class, for classifier-free guidance.
    - ``joint_drop``: an image has no stage if it has no class, so that guidance leaves the stage alone. If not, each is
      dropped by itself, as in the released code of arXiv 2410.00350.
    - ``loss_passes``: how many of the ten time steps each held-out image is evaluated at.
    - ``gallery``: draws and judges samples; None: no samples.
    - ``notes``: what the exported model's ``config.json`` says of its training.
    """

    metrics = METRICS["diffusion"]

    def __init__(
        self, model: nn.Module, schedule: NoiseSchedule, precision: torch.dtype = torch.float32, *,
        scaling_factor: float | None = None, snr_gamma: float | None = None, label_dropout: float = 0.1,
        joint_drop: bool = True, loss_passes: int = 2, gallery: Gallery | None = None,
        notes: Mapping[str, Any] | None = None,
    ):  # fmt: skip
        super().__init__(model, precision)
        self._device = next(model.parameters()).device
        self._random = torch.Generator(self._device)
        schedule = schedule.to(self._device)
        self.objective: DiffusionLoss = DiffusionLoss(model, schedule, precision, scaling_factor, snr_gamma)
        self._label_dropout, self._joint_drop, self._loss_passes = label_dropout, joint_drop, loss_passes
        self._gallery, self._notes = gallery, dict(notes or {})
        part = schedule.steps / EVALUATED_TIMES
        self._times = torch.tensor([int((place + 0.5) * part) for place in range(EVALUATED_TIMES)])

    @property
    def _latents(self) -> bool:
        return self.objective.scaling_factor is not None

    # --- training ---

    def set_shape(self, input_size: int | None) -> None:
        assert input_size is None or not self._latents, "latents cannot be resized"
        self.objective.input_size = input_size

    def blank(self, count: int, size: int, random: bool = False) -> Tensor:
        if not self._latents:
            return blank_photos(count, size, self._device, random)
        side = size // self.model.stride
        shape = count, 2 * self.model.in_chans, side, side
        make = torch.rand if random else torch.zeros
        return make(shape, dtype=torch.float16, device=self._device)

    def image_size(self, images: Tensor) -> int:
        return images.shape[-1] * (self.model.stride if self._latents else 1)

    def _input_shape(self, images: Tensor, size: int | None = None) -> tuple[int, int, int]:
        """The shape (C, s, s) of the model's inputs, if photos are resized to ``size`` px."""
        side = min(images.shape[-1], size or images.shape[-1])
        return self.model.in_chans, side, side

    def draw(self, batch: Batch, seed: int, number: int) -> NoiseDraws:
        """The random values of this process's part of a batch in step ``number``.

        Time and drops have the key (seed, step, place). Gaussian noise is drawn on the device for the whole batch, with
        the key (seed, step), and each process takes its places.
        """
        places = batch.places[: len(batch)]  # some splits leave out damaged images
        chances = uniform((seed, number, DENOISE), places, 3)  # (B, 3)
        times = (chances[:, 0] * self.objective.schedule.steps).astype(np.int64)
        no_label, no_stage = chances[:, 1] < self._label_dropout, None
        if (embedding := self.model.stage_embedding) is not None:
            no_stage = no_label if self._joint_drop else chances[:, 2] < embedding.null_prob
        self._random.manual_seed(int(generator((seed, number, DENOISE)).integers(2**62)))
        shape = (batch.total, 1 + self._latents, *self._input_shape(batch.images, self.objective.input_size))
        noise = torch.randn(shape, generator=self._random, device=self._device)  # (total, 1 or 2, C, s, s)
        if len(places) < batch.total:
            noise = noise[send(torch.from_numpy(places), self._device)]
        return NoiseDraws(
            send(times, self._device), send(no_label, self._device),
            None if no_stage is None else send(no_stage, self._device), noise[:, 0],
            noise[:, 1] if self._latents else None,
        )  # fmt: skip

    def operands(self, batch: Batch, seed: int, number: int, dials: Dials) -> tuple[Any, ...]:
        return batch.images, batch.labels, self.draw(batch, seed, number)

    def part(self, operands: tuple[Any, ...], chosen: Tensor) -> tuple[Any, ...]:
        images, labels, draws = operands
        return images[chosen], labels[chosen], draws.part(chosen)

    def probe(
        self, model: nn.Module, batch: Batch, seed: int, number: int, dials: Dials, precision: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The outputs are the predicted noise and the raw variances, as in the released code of arXiv 2410.00350."""
        draws, size = self.draw(batch, seed, number), self.objective.input_size
        output, _, losses = self.objective.losses(model, precision, batch.images, batch.labels, draws, size)
        return output, losses.sum()

    # --- evaluation ---

    def predict(self, model: nn.Module, *operands: Tensor) -> Tensor:
        """The mean squared error of the noise for each image (B,), with its class and the active stage."""
        images, labels, times, noise, *latent_noise = operands
        draws = NoiseDraws(times, torch.zeros_like(labels, dtype=torch.bool), None, noise, *latent_noise)
        return self.objective.losses(model, self.precision, images, labels, draws)[1]

    def new_sums(self, num_classes: int) -> Tensor:
        """The sum of the errors and the number of images at each of the ten time steps: (2, 10)."""
        return torch.zeros(2, EVALUATED_TIMES, dtype=sum_type(self._device), device=self._device)

    def add(self, sums: Tensor, batch: Batch, counted: Tensor, predict: Callable[..., Tensor]) -> None:
        shape, rows = self._input_shape(batch.images), batch.ids.numpy()
        count = int(np.prod(shape)) * (1 + self._latents)
        # An image always has the same noise, so recipes, seeds and moments of a run are compared on the same inputs.
        drawn = torch.from_numpy(normal((HELD_OUT,), rows, count).astype(np.float32))
        noise = send(drawn.view(len(rows), 1 + self._latents, *shape), self._device).unbind(1)
        weights = send(counted, self._device).to(sums.dtype)
        for number in range(self._loss_passes):
            places = (batch.ids // 2 + number) % EVALUATED_TIMES  # even and odd rows are evaluated at the same times
            errors = predict(batch.images, batch.labels, send(self._times[places], self._device), *noise)
            places = send(places, self._device)
            sums[0].index_add_(0, places, errors.to(sums.dtype) * weights)
            sums[1].index_add_(0, places, weights)

    def scores(self, sums: np.ndarray) -> Scores:
        total, count = sums
        by_time = [
            round(float(sum_ / images), 5) if images else None for sum_, images in zip(total, count, strict=True)
        ]
        return Scores({"val_loss": float(total.sum() / max(count.sum(), 1))}, notes={"val_loss_by_time": by_time})

    def judge(
        self, scores: Scores, model: nn.Module, last: bool, ranks: Processes, stop: Callable[[], bool],
        say: Callable[[str], None],
    ) -> Scores | None:  # fmt: skip
        if self._gallery is None:
            return scores
        more = self._gallery.judge(model, self.objective.schedule, self.precision, last, ranks, stop, say)
        if more is None:
            return None
        return replace(more, values={**scores.values, **more.values}, notes={**scores.notes, **more.notes})

    def judging_seconds(self, model: nn.Module, ranks: Processes, stop: Callable[[], bool]) -> tuple[float, float]:
        if self._gallery is None:
            return 0.0, 0.0
        return self._gallery.seconds(model, self.objective.schedule, self.precision, ranks, stop)

    def export(
        self, folder: Path, model: nn.Module, name: str, arguments: Mapping[str, Any], classes: Sequence[str], *,
        size: int, crop_pct: float,
    ) -> None:  # fmt: skip
        export_model(
            folder, model, name, arguments, classes, size=size, crop_pct=crop_pct, notes={"diffusion": self._notes}
        )
