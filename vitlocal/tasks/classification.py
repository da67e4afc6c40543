"""Image classification: a cross-entropy with augmentation and mixing, and top-1 and top-5 accuracy.

Shape letters: B batch, C classes, L blocks, S image size.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vitlocal.data.augment import Augment, AugmentParams
from vitlocal.data.batch import Batch
from vitlocal.data.random_keys import DROP_PATH, uniform
from vitlocal.data.soft_labels import SoftTargets
from vitlocal.data.transfer import send
from vitlocal.models.block import DropPathModel
from vitlocal.models.factory import export_model
from vitlocal.plan import Dials
from vitlocal.tasks.metrics import METRICS
from vitlocal.tasks.task import Scores, Task, blank_photos


def binary_cross_entropy(
    logits: Tensor, labels: Tensor, share: Tensor | None, label_smoothing: float, threshold: float | None
) -> Tensor:
    """The mean over classes of each image's binary cross-entropies, summed over images; logits (B, C), labels (B,).

    Targets are timm's: ``share`` (0-D) of an image's label, the rest of that of its mirror place in the batch, and
    label smoothing. With a ``threshold``, targets above it become 1 and the others 0 (timm's ``bce_target_thresh``).
    A threshold of 0 is that of DeiT III (Touvron et al. 2022, arXiv 2204.07118).
    """
    targets = torch.zeros_like(logits).scatter(1, labels[:, None], 1.0)
    if share is not None:
        targets = torch.lerp(targets.flip(0), targets, share)
    targets = targets * (1 - label_smoothing) + label_smoothing / logits.shape[1]
    if threshold is not None:
        targets = (targets > threshold).to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(dim=1).sum()


class ClassificationLoss(nn.Module):
    """The loss of a batch of uint8 images: everything that a training step differentiates, in one graph.

    ``binary``: :func:`binary_cross_entropy` with this ``threshold`` replaces the cross-entropy.
    """

    def __init__(
        self, model: nn.Module, augment: Augment, label_smoothing: float, precision: torch.dtype, outputs: Set[str],
        binary: bool = False, threshold: float | None = None,
    ):  # fmt: skip
        super().__init__()
        self.model: Any = model
        self.augment = augment
        self.label_smoothing, self.precision, self.outputs = label_smoothing, precision, outputs
        self.binary, self.threshold = binary, threshold
        self.input_size: int | None = None  # px; larger images are resized to it

    def forward(
        self, images: Tensor, labels: Tensor, params: AugmentParams, noise: Tensor | None, soft: SoftTargets | None,
        weight: Tensor,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """The losses of all images, summed and multiplied by ``weight`` (0-D), and the further outputs.

        ``images`` (B, 3, S, S) uint8, ``labels`` (B,), ``noise`` (B, L, 2) for drop path. If there are ``soft``
        targets, the cross-entropies are those to them, without label smoothing. Further outputs are None unless they
        are in ``outputs``: "correct" (B,) bool, whether the highest logit is that of the image's own label (not of the
        label mixed into it); "attention_variance" (B,), see
        :meth:`VisionTransformer.forward_with_attention_variance`.
        """
        pixels = self.resize(self.augment(images, params))
        operands = (pixels,) if noise is None else (pixels, noise)
        variance = None
        with torch.autocast(images.device.type, self.precision, enabled=self.precision != torch.float32):
            if "attention_variance" in self.outputs:
                logits, variance = self.model.forward_with_attention_variance(*operands)
            else:
                logits = self.model(*operands)
        logits = logits.float()
        correct = logits.detach().argmax(dim=1) == labels if "correct" in self.outputs else None
        share = None if params.mix is None else params.mix[1]
        if self.binary:
            loss = binary_cross_entropy(logits, labels, share, self.label_smoothing, self.threshold)
            return weight * loss, correct, variance
        loss = self._cross_entropy(logits, labels, soft)
        if share is not None:
            mixed_in = None if soft is None else SoftTargets(*(values.flip(0) for values in soft))
            loss = share * loss + (1 - share) * self._cross_entropy(logits, labels.flip(0), mixed_in)
        return weight * loss, correct, variance

    def resize(self, pixels: Tensor) -> Tensor:
        """Resizes images (B, 3, S, S) to the input size, if that is smaller (bilinear, antialiased)."""
        size = self.input_size
        if size is None or size >= pixels.shape[-1]:
            return pixels
        return F.interpolate(pixels, size=(size, size), mode="bilinear", antialias=True, align_corners=False)

    def _cross_entropy(self, logits: Tensor, labels: Tensor, soft: SoftTargets | None) -> Tensor:
        if soft is not None:
            return soft_cross_entropy(logits, soft)
        return F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing, reduction="sum")


def soft_cross_entropy(logits: Tensor, soft: SoftTargets) -> Tensor:
    """The cross-entropies of logits (B, C) to soft targets, summed."""
    log_probabilities = logits.log_softmax(dim=1)
    stated = log_probabilities.gather(1, soft.classes)  # (B, K)
    others = logits.shape[1] - soft.classes.shape[1]
    rest = (1 - soft.probabilities.sum(dim=1)).clamp_min(0) / max(others, 1)  # of each other class, (B,)
    of_others = rest * (log_probabilities.sum(dim=1) - stated.sum(dim=1))
    return -((soft.probabilities * stated).sum() + (of_others.sum() if others else 0))


class Classification(Task):
    """Trains a classifier. ``outputs``, ``binary`` and ``threshold``: see :class:`ClassificationLoss`.

    ``soft_top``: the classes of each image in the batches' soft targets; 0: batches have labels only. The arguments are
    on the model's device. Probes are cross-entropies with any loss, so that they stay comparable.
    """

    metrics = METRICS["classification"]
    step_outputs = frozenset({"correct", "attention_variance"})

    def __init__(
        self, model: nn.Module, augment: Augment, label_smoothing: float = 0.0,
        precision: torch.dtype = torch.float32, outputs: Set[str] = frozenset(), *, binary: bool = False,
        threshold: float | None = None, soft_top: int = 0,
    ):  # fmt: skip
        super().__init__(model, precision)
        self.augment, self.soft_top = augment, soft_top
        self.objective: ClassificationLoss = ClassificationLoss(
            model, augment, label_smoothing, precision, outputs, binary, threshold
        )
        has_stages = getattr(model, "stage_table", None) is not None
        takes_noise = getattr(model, "takes_noise", False)
        self._draws_paths = takes_noise and (self.model.drop_path_rate > 0 or has_stages)

    # --- training ---

    def set_shape(self, input_size: int | None) -> None:
        self.objective.input_size = input_size

    def set_dials(self, dials: Dials) -> None:
        if self._draws_paths:  # in place, because compiled steps read the rates there
            self.model.set_drop_path(self.model.drop_path_rate * dials.strength)

    def blank(self, count: int, size: int, random: bool = False) -> Tensor:
        return blank_photos(count, size, self.augment.normalize.scale.device, random)

    def operands(self, batch: Batch, seed: int, number: int, dials: Dials) -> tuple[Any, ...]:
        images, key, operations = batch.images, (seed, number, batch.places), None
        if self.augment.in_forward:
            operations = dials.randaugment
        else:
            images = self.augment.prepare(images, *key, dials.randaugment)
        params = self.augment.draw(*key, batch.total, images.shape[-1], dials.strength, operations)
        return images, batch.labels, params, self._noise(seed, number, batch.places), self._soft(batch)

    def _soft(self, batch: Batch) -> SoftTargets | None:
        """The soft targets of a batch; of one without content, any."""
        if not self.soft_top or batch.soft is not None:
            return batch.soft
        classes = torch.arange(self.soft_top, device=batch.labels.device).expand(len(batch.labels), -1).contiguous()
        return SoftTargets(classes, torch.full_like(classes, 1 / self.soft_top, dtype=torch.float32))

    def part(self, operands: tuple[Any, ...], chosen: Tensor) -> tuple[Any, ...]:
        images, labels, params, noise, soft = operands
        pixels = images[chosen].contiguous(memory_format=torch.channels_last)
        drops, targets = (None if noise is None else noise[chosen]), (None if soft is None else soft.part(chosen))
        return pixels, labels[chosen], params.part(chosen), drops, targets

    def _noise(self, seed: int, number: int, places: np.ndarray) -> Tensor | None:
        """Drop path's random numbers (B, L, 2), and those of the stage embedding."""
        if not self._draws_paths:
            return None
        depth = len(self.model.blocks) + (self.model.stage_table is not None)
        draws = uniform((seed, number, DROP_PATH), places, 2 * depth).reshape(-1, depth, 2)
        below_one = np.minimum(draws, 1 - 2.0**-24)  # so that float32 does not round up to 1
        return send(torch.from_numpy(below_one.astype(np.float32)), self.augment.normalize.scale.device)

    def probe(
        self, model: nn.Module, batch: Batch, seed: int, number: int, dials: Dials, precision: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        places = batch.places[: len(batch)]  # some splits leave out damaged images
        if model is not self.model and isinstance(model, DropPathModel):
            model.drop_path_rates.copy_(self.model.drop_path_rates)  # an average has those of an earlier step's shape
        images = self.augment.prepare(batch.images, seed, number, places, dials.randaugment)
        pixels, noise = self.objective.resize(self.augment.normalize(images)), self._noise(seed, number, places)
        with torch.autocast(images.device.type, precision, enabled=precision != torch.float32):
            logits = model(pixels) if noise is None else model(pixels, noise)
        return logits, F.cross_entropy(logits.float(), batch.labels, reduction="sum")

    # --- evaluation ---

    def predict(self, model: nn.Module, *operands: Tensor) -> Tensor:
        """From uint8 images (B, 3, S, S) to logits (B, C)."""
        (images,) = operands
        return model(self.augment.normalize(images))

    def new_sums(self, num_classes: int) -> Tensor:
        """The correct images (top-1, top-5) and all counted images of each class: (3, C) int64."""
        return torch.zeros(3, num_classes, dtype=torch.int64, device=self.augment.normalize.scale.device)

    def add(self, sums: Tensor, batch: Batch, counted: Tensor, predict: Callable[..., Tensor]) -> None:
        logits = predict(batch.images).float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices  # (B, 5)
        right, counts = best == batch.labels[:, None], send(counted.long(), logits.device)
        sums.index_add_(1, batch.labels, torch.stack([right[:, 0] * counts, right.any(dim=1) * counts, counts]))

    def scores(self, sums: np.ndarray) -> Scores:
        top1, top5, images = sums.sum(axis=1).tolist()
        values = {"top1": 100 * top1 / max(images, 1)}
        if sums.shape[1] > 5:  # of five classes or fewer, the best five are all
            values["top5"] = 100 * top5 / max(images, 1)
        return Scores(values, by_class=sums[[0, 2]].T)

    def export(
        self, folder: Path, model: nn.Module, name: str, arguments: Mapping[str, Any], classes: Sequence[str], *,
        size: int, crop_pct: float,
    ) -> None:  # fmt: skip
        export_model(folder, model, name, arguments, classes, size=size, crop_pct=crop_pct)
