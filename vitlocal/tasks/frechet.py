"""How well samples match real images: the Fréchet distance of features, and the classes that a classifier sees.

Heusel et al., 2017, "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium": the distance
of two Gaussians, fitted to the features of two sets of images. It depends on the number of images: an estimate from
fewer is larger. So it is read beside that of held-out real images, its floor, from as many.

B batch size, F features, K classes.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vitlocal.data.augment import Normalize
from vitlocal.data.autoencoder import INSTALL
from vitlocal.errors import ConfigError
from vitlocal.models.exported import ExportedRun
from vitlocal.models.weight_files import unreadable
from vitlocal.tasks.metrics import task_name


class Moments:
    """Mean and covariance of the features of a stream of images, in float64.

    ``sums`` (F + 1, F + 1) holds them: the sum over images of the outer product of (1, features) with itself. The sums
    of several processes add up.
    """

    def __init__(self, sums: np.ndarray):
        self.sums = sums

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Those of ``features`` (B, F)."""
        rows = np.pad(features.detach().cpu().numpy().astype(np.float64), ((0, 0), (1, 0)), constant_values=1)
        return cls(rows.T @ rows)

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.sums + other.sums)

    @property
    def count(self) -> int:
        """The number of images."""
        return round(self.sums[0, 0])

    @property
    def mean(self) -> np.ndarray:
        """(F,)"""
        return self.sums[0, 1:] / self.sums[0, 0]

    @property
    def covariance(self) -> np.ndarray:
        """(F, F), divided by count - 1."""
        return (self.sums[1:, 1:] - self.count * np.outer(self.mean, self.mean)) / (self.count - 1)


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½), for means m and covariances S. 0 for equal moments.

    The last trace is computed from the eigenvalues of S1^½ S2 S1^½, which is symmetric and has those of S1 S2.
    Covariances of fewer images than features, which are singular, need no exception. Raises :class:`ValueError` for
    fewer than two images.
    """
    if min(first.count, second.count) < 2:
        raise ValueError(f"got {first.count} and {second.count} images, expected at least 2 on each side")
    covariances = first.covariance, second.covariance
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # rounding makes zeros negative
    shared = np.sqrt(np.linalg.eigvalsh(root @ covariances[1] @ root).clip(0)).sum()
    gap = np.square(first.mean - second.mean).sum()
    return max(0.0, float(gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * shared))


class FeatureSet:
    """Features of images.

    ``name``: what a Fréchet distance of them is called. ``classes``: those that :meth:`judge` tells apart.
    """

    name: str
    classes: Sequence[str] = ()

    def judge(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """The features (B, F) float32 of ``images`` (B, 3, H, W) uint8, and the most probable classes (B,) if any."""
        raise NotImplementedError


class ClassifierFeatures(FeatureSet):
    """The pooled features of the last layer of a classifier that we trained, at its own size.

    Raises :class:`ConfigError` if ``run`` is not the folder of a finished classifier. The images are resized to the
    size of its evaluation, with antialiasing, but not cropped: samples and their references are crops already.
    """

    def __init__(self, run: str | Path, device: torch.device, option: str = "diffusion.features"):
        exported = ExportedRun(run, option)
        if task_name(exported.architecture) != "classification":
            raise ConfigError(f"{option}: {run} holds a diffusion model, expected a classifier's run")
        self.name = f"Fréchet distance (features of {exported.architecture} {exported.digest[:12]})"
        self.classes = exported.class_names
        self._size, self._device = exported.side, device
        self._model: Any = exported.load().to(device)
        self._normalize = Normalize().to(device)

    @torch.inference_mode()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        pixels, sides = images.to(self._device).float(), (self._size, self._size)
        if pixels.shape[2:] != sides:
            pixels = interpolate(pixels, sides, mode="bilinear", antialias=True).clamp(0, 255)
        tokens = self._model.forward_features(self._normalize(pixels))
        features = self._model.forward_head(tokens, pre_logits=True)
        return features.flatten(1), self._model.forward_head(tokens).argmax(1)


class InceptionFeatures(FeatureSet):
    """The features that the FID is defined by: the 2,048 of the TensorFlow Inception v3 of 2015, in torch-fidelity.

    ``weights`` is torch-fidelity's file (weights-inception-2015-12-05-6726825d.pth), which no package has. Nothing is
    downloaded. Raises :class:`ConfigError` if the file or torch-fidelity (the extra diffusion) is missing.
    """

    name = "FID"

    def __init__(self, weights: str | Path, device: torch.device, option: str = "diffusion.features"):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise ConfigError(f"{option}: torch-fidelity cannot be imported ({error}): {INSTALL}") from None
        expected = "expected torch-fidelity's weights-inception-2015-12-05-6726825d.pth"
        try:
            torch.load(weights, map_location="cpu", weights_only=True)  # torch-fidelity would run a pickle's code
            network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights))
        except OSError as error:
            raise ConfigError(f"{option}: {weights} cannot be read ({error.strerror}); {expected}") from error
        except Exception as error:  # pickle, PyTorch and torch-fidelity have many kinds
            raise ConfigError(f"{option}: {weights} has other content ({unreadable(error)}); {expected}") from error
        self._network, self._device = network.to(device), device

    @torch.inference_mode()
    def judge(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        (features,) = self._network(images.to(self._device))
        return features, None


def open_features(path: str | Path, device: torch.device, option: str = "diffusion.features") -> FeatureSet:
    """The features of a run's folder, or of a file of Inception weights. Raises ConfigError if ``path`` is neither."""
    kind = ClassifierFeatures if Path(path).is_dir() else InceptionFeatures
    return kind(path, device, option)


def measure(
    features: FeatureSet, batches: Iterable[tuple[Tensor, Tensor]], classes: Sequence[str]
) -> tuple[Moments, int | None]:
    """The moments of images, and how many of them show the class that they should. At least one batch is needed.

    ``batches``: images (B, 3, H, W) uint8, and their labels (B,), which count in ``classes``. The second value is None
    if the features belong to no classifier of all these classes.
    """
    found = {name: number for number, name in enumerate(features.classes)}
    known = torch.tensor([found.get(name, -1) for name in classes])
    right = 0
    moments: Moments | None = None
    for images, labels in batches:
        values, guesses = features.judge(images)
        part = Moments.of(values)
        moments = part if moments is None else moments + part
        if guesses is not None:
            right += int((guesses.cpu() == known[labels.cpu()]).sum())
    assert moments is not None, "no images"
    return moments, right if features.classes and (known >= 0).all() else None
