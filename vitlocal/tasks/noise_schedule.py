"""Gaussian diffusion: how noise is added, what the steps back are, and DiT's training objective.

Ho et al., 2020, "Denoising Diffusion Probabilistic Models" (DDPM). Nichol and Dhariwal, 2021, "Improved Denoising
Diffusion Probabilistic Models" (IDDPM): learned variances, the cosine schedule. Peebles and Xie, 2023, "Scalable
Diffusion Models with Transformers" (DiT): the objective.

B batch size, C channels, T time steps (0 has the least noise), … the sides of the images. abar_t is the cumulative
product of 1 - beta.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from vitlocal.errors import ConfigError

KINDS = ("linear", "cosine")
LINEAR_BETAS = 0.1, 20  # the first and the last, times the number of steps
LEAST_STEPS = 21  # the linear schedule's last beta is 20 / steps, and must be below 1


def _betas(steps: int, kind: str) -> np.ndarray:
    """(T,) float64: the variance that each step adds."""
    if kind == "linear":  # DDPM's 1e-4 to 0.02 at 1,000 steps
        return np.linspace(*LINEAR_BETAS, steps) / steps
    times = np.arange(steps + 1) / steps
    remaining = np.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2  # IDDPM, equation 17
    return np.minimum(1 - remaining[1:] / remaining[:-1], 0.999)


class NoiseSchedule(nn.Module):
    """The noise of each time step, and the Gaussians of the steps back.

    ``kind``: linear or cosine. ``kept``: the time steps that a sampler takes, ascending; None: all. Then ``times`` in
    the methods are places in ``kept``, and ``self.kept`` has the time steps that the model gets. The betas are
    those of the shorter process, as in IDDPM (equation 19).

    Tables are computed in float64 and held as float32 buffers, which no checkpoint contains. Images have shape
    (B, C, …), ``times`` (B,) int64.
    """

    kept: Tensor  # (T,) int64
    signal: Tensor  # sqrt(abar)
    noise: Tensor  # sqrt(1 - abar)
    signal_before: Tensor  # of the step that follows in sampling; the image itself after the last step
    noise_before: Tensor
    mean_of_x0: Tensor  # coefficients of the posterior's mean
    mean_of_xt: Tensor
    mean_of_noise: Tensor  # how an error of the noise changes that mean
    log_low: Tensor  # the posterior's log variance; its value at t = 1 also at t = 0, where the variance is 0
    log_high: Tensor  # log(beta)
    log_fixed: Tensor

    def __init__(self, steps: int = 1000, kind: str = "linear", kept: Sequence[int] | None = None):
        super().__init__()
        if kind not in KINDS or steps < LEAST_STEPS:
            raise ConfigError(f"noise schedule: got {kind} with {steps} steps, expected {' or '.join(KINDS)} with at "
                              f"least {LEAST_STEPS}")  # fmt: skip
        self.steps, self.kind = steps, kind
        times = np.arange(steps) if kept is None else np.asarray(kept)
        if len(times) == 0 or times[0] < 0 or times[-1] >= steps or (np.diff(times) <= 0).any():
            raise ValueError(f"kept: got {times.tolist()}, expected ascending time steps in 0..{steps - 1}")
        after = np.cumprod(1 - _betas(steps, kind))[times]  # abar
        before = np.append(1.0, after[:-1])
        betas = 1 - after / before
        variances = betas * (1 - before) / (1 - after)  # DDPM, equation 7
        first = variances[1:2] if len(times) > 1 else betas  # a process of one step adds no noise at all
        tables = {
            "signal": np.sqrt(after),
            "noise": np.sqrt(1 - after),
            "signal_before": np.sqrt(before),
            "noise_before": np.sqrt(1 - before),
            "mean_of_x0": betas * np.sqrt(before) / (1 - after),
            "mean_of_xt": (1 - before) * np.sqrt(1 - betas) / (1 - after),
            "mean_of_noise": betas / np.sqrt((1 - betas) * (1 - after)),
            "log_low": np.log(np.append(first, variances[1:])),
            "log_high": np.log(betas),
            "log_fixed": np.log(np.append(first, betas[1:])),  # improves the likelihood of the last step
        }
        self.register_buffer("kept", torch.from_numpy(times.astype(np.int64)), persistent=False)
        for name, table in tables.items():
            self.register_buffer(name, torch.from_numpy(table).float(), persistent=False)

    def respaced(self, kept: Sequence[int]) -> "NoiseSchedule":
        """The shorter process through the time steps ``kept`` of this one."""
        return NoiseSchedule(self.steps, self.kind, kept)

    def add_noise(self, x0: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """The noised images x_t, a sample of q(x_t | x_0), for standard normal ``noise``."""
        return _at(self.signal, times, x0) * x0 + _at(self.noise, times, x0) * noise

    def predict_x0(self, xt: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """The images whose noised form is ``xt`` if ``noise`` was added."""
        return (xt - _at(self.noise, times, xt) * noise) / _at(self.signal, times, xt)

    def predict_noise(self, xt: Tensor, times: Tensor, x0: Tensor) -> Tensor:
        """The noise that makes ``xt`` of ``x0``."""
        return (xt - _at(self.signal, times, xt) * x0) / _at(self.noise, times, xt)

    def min_snr(self, gamma: float) -> Tensor:
        """(T,): weights min(SNR, gamma) / SNR of the squared error of the noise, with SNR = abar / (1 - abar).

        Hang et al., 2023, "Efficient Diffusion Training via Min-SNR Weighting Strategy". Steps with little noise, whose
        errors change an image least, get less weight.
        """
        return (gamma * (self.noise / self.signal) ** 2).clamp(max=1)

    def posterior(self, x0: Tensor, xt: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, …) and log variance (B, 1, …) of q(x_(t-1) | x_t, x_0). At t = 0, the variance is t = 1's, not 0.

        So its logarithm is finite, as in the published code.
        """
        mean = _at(self.mean_of_x0, times, xt) * x0 + _at(self.mean_of_xt, times, xt) * xt
        return mean, _at(self.log_low, times, xt)

    def log_variance(self, raw: Tensor | None, times: Tensor) -> Tensor:
        """Log variance of the model's step back; shape of ``raw``, or (B, 1, 1, 1).

        ``raw`` (B, C, …): the model's variance channels, which interpolate between the posterior's log variance (-1)
        and log(beta) (1): IDDPM, equation 15. None: a fixed variance, beta.
        """
        if raw is None:
            return self.log_fixed[times][:, None, None, None]
        share = (raw + 1) / 2
        return share * _at(self.log_high, times, raw) + (1 - share) * _at(self.log_low, times, raw)


def _wide(values: Tensor, images: Tensor) -> Tensor:
    """``values`` (B,) in a shape that broadcasts with ``images`` (B, …)."""
    return values.reshape(-1, *[1] * (images.dim() - 1))


def _at(table: Tensor, times: Tensor, images: Tensor) -> Tensor:
    """Entries of ``table`` (T,) at ``times`` (B,), for ``images`` (B, …)."""
    return _wide(table[times], images)


def denoising_losses(
    schedule: NoiseSchedule, output: Tensor, x0: Tensor, times: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """DiT's objective for each sample: the squared error of the noise (B,), and the variational term (B,) float32.

    The training loss of the published code (``create_diffusion("")``) is their sum, each with weight 1. ``output``
    (B, C or 2C, …): the predicted noise, then perhaps the variance channels. Without them the second term is 0. With
    them it is IDDPM's L_vlb in bits per element. Its gradient reaches the variance channels only.

    The published code compares the means of x_(t-1). Both come from the same x_t, so their difference is a multiple of
    the noise's error. This form has no cancellation in float32, and needs no x_t.
    """
    channels = x0.shape[1]
    error = output[:, :channels].float() - noise
    mse = error.square().flatten(1).mean(1)
    if output.shape[1] == channels:
        return mse, torch.zeros_like(mse)
    log_variance = schedule.log_variance(output[:, channels:].float(), times)
    gap = -error.detach() * _at(schedule.mean_of_noise, times, error)  # the predicted mean - the posterior's
    log_ratio = _at(schedule.log_low, times, gap) - log_variance
    divergence = 0.5 * (log_ratio.exp() - log_ratio - 1 + gap.square() * (-log_variance).exp())
    # At t = 0 the posterior's mean is x_0.
    likelihood = _log_likelihood(x0, gap, (-0.5 * log_variance).exp())
    nats = torch.where(_wide(times == 0, gap), -likelihood, divergence)
    return mse, nats.flatten(1).mean(1) / math.log(2)


def _log_likelihood(x0: Tensor, gap: Tensor, precision: Tensor) -> Tensor:
    """Log of the probability that a Gaussian, rounded to 256 levels in [-1, 1], gives ``x0``: DDPM, equation 13.

    ``gap``: the Gaussian's mean - x0. ``precision``: 1 / its standard deviation. The first and last level hold the
    tails.
    """
    half = 1 / 255  # of a level's width
    # A level is as probable for -gap as for gap. In the lower tail, float32 keeps the digits of small probabilities.
    distance = gap.abs()
    inside = _normal_cdf(precision * (half - distance)) - _normal_cdf(precision * (-half - distance))
    lowest = _normal_cdf(precision * (half - gap))
    highest = _normal_cdf(precision * (half + gap))
    chance = torch.where(x0 < -0.999, lowest, torch.where(x0 > 0.999, highest, inside))
    return chance.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of the published code: 0.5 (1 + tanh(y)) = sigmoid(2y)."""
    return torch.sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3))
