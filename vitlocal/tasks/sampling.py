"""Draws images, or latents, from a diffusion model: DDIM and ancestral DDPM, with classifier-free guidance.

Song et al., 2021, "Denoising Diffusion Implicit Models" (DDIM). Ho et al., 2020 (DDPM), with the learned variances and
shorter processes of Nichol and Dhariwal, 2021. Ho and Salimans, 2022, "Classifier-Free Diffusion Guidance".

B batch size, C channels, s side of the model's input, T time steps.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.random_keys import integers
from vitlocal.errors import ConfigError
from vitlocal.tasks.noise_schedule import NoiseSchedule

SAMPLERS = ("ddim", "ddpm")
GUIDED_CHANNELS = ("all", "3")


@dataclass(frozen=True)
class SamplerOptions:
    """How samples are drawn. Whatever is measured on samples needs these values beside it.

    Attributes:
        sampler: ddim (with eta 0: no noise but the first), or ddpm (noise at each step).
        steps: calls of the model for a sample; with guidance, each has twice the batch.
        guidance: scale; 1: none, and no unconditional branch.
        guided_channels: 3 leaves out the fourth channel of latents, as DiT's published code does.
    """

    sampler: str = "ddim"
    steps: int = 50
    guidance: float = 4.0
    guided_channels: str = "all"

    def __post_init__(self) -> None:
        for name, known in (("sampler", SAMPLERS), ("guided_channels", GUIDED_CHANNELS)):
            if getattr(self, name) not in known:
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected {' or '.join(known)}")
        if self.steps < 1 or not 0 <= self.guidance < float("inf"):
            raise ConfigError(f"got steps={self.steps} and guidance={self.guidance}, expected steps >= 1 and "
                              "guidance >= 0 (1: none)")  # fmt: skip

    def times(self, total: int) -> list[int]:
        """The time steps of ``total`` that the sampler takes, ascending. Raises ConfigError for more steps than these.

        DDIM's are multiples of ``total // steps``: "leading" in diffusers; DiT's ``ddimN`` where N divides ``total``.
        DDPM's are evenly spaced from the first to the last, rounded as in DiT's ``space_timesteps``.
        """
        if self.steps > total:
            raise ConfigError(
                f"steps: got {self.steps}, but the noise schedule has {total} steps; expected at most these"
            )
        if self.sampler == "ddim":
            if total // 2 < self.steps < total:
                raise ConfigError(
                    f"steps: got {self.steps} of ddim, which would start amid the noise schedule of {total} steps; "
                    f"expected at most {total // 2}, or {total}"
                )
            return [place * (total // self.steps) for place in range(self.steps)]
        stride = (total - 1) / max(self.steps - 1, 1)
        return np.round(np.cumsum([0.0, *[stride] * (self.steps - 1)])).astype(int).tolist()  # sums, as published


def sample_keys(seed: int, labels: Tensor, numbers: Tensor) -> Tensor:
    """The keys (N,) int64 of image ``numbers`` (N,) of the classes ``labels`` (N,), for :func:`sample`.

    They are below 2^32, because PyTorch's generator on the CPU uses no more bits of its seed.
    """
    places = (labels.cpu().numpy().astype(np.uint64) << np.uint64(32)) + numbers.cpu().numpy().astype(np.uint64)
    return torch.from_numpy(integers((seed,), places, 0, 1 << 32))


def sample_batches(
    model: nn.Module, schedule: NoiseSchedule, labels: Tensor, keys: Tensor, size: int, options: SamplerOptions, *,
    batch_size: int, device: torch.device, precision: torch.dtype = torch.float32,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Tensor]:  # fmt: skip
    """Yields :func:`sample`'s results for at most ``batch_size`` samples at a time."""
    for part, part_keys in zip(labels.split(batch_size), keys.split(batch_size), strict=True):
        yield sample(
            model, schedule, part, part_keys, size, options, device=device, precision=precision, progress=progress
        )


@torch.inference_mode()
def sample(
    model: nn.Module, schedule: NoiseSchedule, labels: Tensor, keys: Tensor, size: int, options: SamplerOptions, *,
    device: torch.device, precision: torch.dtype = torch.float32, progress: Callable[[int], None] | None = None,
) -> Tensor:  # fmt: skip
    """Draws a sample of each of the classes ``labels`` (B,); returns (B, C, s, s) float32 on the device.

    ``model`` is a DiT in its current shape and stage, ``schedule`` the one that it was trained with, with all its
    steps. ``size`` is in px of the image. ``keys`` (B,) int64 >= 0: the seed of each sample's own ``torch.Generator``
    on the CPU. So a sample does not depend on the batch, the order or the device, up to rounding. ``precision`` is that
    of matrix products. ``progress`` is called after each step with B; it may raise an exception to stop.

    Predictions of x_0 are limited to [-1, 1] if the model works on pixels, as in ADM. Latents have no limits. The model
    returns to its mode, training or not. Raises :class:`ConfigError` if the model cannot draw this size.
    """
    stride, channels = int(model.stride), int(model.in_chans)  # type: ignore[arg-type]
    if size % stride:
        raise ConfigError(f"size: got {size} px, expected a multiple of {stride} px, the autoencoder's stride")
    shape = (channels, size // stride, size // stride)
    generators = [torch.Generator().manual_seed(key) for key in keys.tolist()]
    process = schedule.respaced(options.times(schedule.steps)).to(device)
    labels = labels.to(device)
    xt = _normal(shape, generators, device)
    with _evaluating(model), torch.autocast(device.type, precision, enabled=precision != torch.float32):
        for place in reversed(range(options.steps)):
            places = torch.full_like(labels, place)
            noise, raw = _predict(model, xt, process.kept[places], labels, options)
            x0 = process.predict_x0(xt, places, noise)
            if stride == 1:
                x0 = x0.clamp(-1, 1)
                noise = process.predict_noise(xt, places, x0)
            if options.sampler == "ddim":
                xt = process.signal_before[place] * x0 + process.noise_before[place] * noise  # DDIM, equation 12
            else:
                xt = process.posterior(x0, xt, places)[0]
                if place > 0:
                    deviation = (0.5 * process.log_variance(raw, places)).exp()
                    xt = xt + deviation * _normal(shape, generators, device)
            if progress is not None:
                progress(len(labels))
    return xt


def _predict(
    model: nn.Module, xt: Tensor, times: Tensor, labels: Tensor, options: SamplerOptions
) -> tuple[Tensor, Tensor | None]:
    """The guided noise (B, C, s, s), and the variance channels, those of the conditional branch, or None.

    The unconditional branch has no class and no stage, as in the released code of arXiv 2410.00350.
    """
    channels = xt.shape[1]
    guided, stage = options.guidance != 1, {}
    if guided:
        no_class = int(model.num_classes)  # type: ignore[arg-type]
        xt, times = xt.repeat(2, 1, 1, 1), times.repeat(2)
        labels = torch.cat([labels, torch.full_like(labels, no_class)])
        if getattr(model, "stage_table", None) is not None:
            stage["no_stage"] = labels == no_class
    output = model(xt, times, labels, **stage).float()
    noise, raw = output[:, :channels], output[:, channels:] if output.shape[1] > channels else None
    if not guided:
        return noise, raw
    conditional, unconditional = noise.chunk(2)
    count = channels if options.guided_channels == "all" else 3
    moved = unconditional[:, :count] + options.guidance * (conditional - unconditional)[:, :count]
    noise = torch.cat([moved, conditional[:, count:]], 1)
    return noise, None if raw is None else raw.chunk(2)[0]


def _normal(shape: tuple[int, ...], generators: list[torch.Generator], device: torch.device) -> Tensor:
    """(B, *shape) standard normal numbers, a sample from each generator."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def to_pixels(images: Tensor) -> Tensor:
    """``images`` in [-1, 1] as uint8; values beyond are limited."""
    return ((images.float() + 1) * 127.5).round().clamp(0, 255).byte()


def to_images(samples: Tensor, autoencoder: Autoencoder | None) -> Tensor:
    """:func:`sample`'s results as images (B, 3, H, W) uint8 on the CPU; ``autoencoder`` decodes latents."""
    return (to_pixels(samples) if autoencoder is None else autoencoder.decode(samples)).cpu()
