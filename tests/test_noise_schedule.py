"""The noise schedule and DiT's objective, against plain float64 code that follows the papers' equations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from vitlocal.errors import ConfigError
from vitlocal.tasks.noise_schedule import NoiseSchedule, denoising_losses

SHAPE = (20, 3, 4, 4)
TIMES = [0, 0, 0, 1, 1, 2, 3, 7, 20, 50, 111, 200, 333, 450, 500, 640, 777, 900, 998, 999]


def betas_of(steps: int, kind: str) -> list[float]:
    if kind == "linear":
        scale = 1000 / steps
        return [scale * (1e-4 + (0.02 - 1e-4) * t / (steps - 1)) for t in range(steps)]
    f = lambda t: math.cos((t / steps + 0.008) / 1.008 * math.pi / 2) ** 2  # noqa: E731
    return [min(1 - (f(t + 1) / f(0)) / (f(t) / f(0)), 0.999) for t in range(steps)]


class SlowProcess:
    """DDPM's quantities at one time step, in float64, from the list of betas."""

    def __init__(self, betas: list[float], t: int):
        alphas_bar = [math.prod(1 - beta for beta in betas[: s + 1]) for s in range(max(t, 1) + 1)]
        before = [1.0, *alphas_bar]
        self.t, self.beta, self.bar, self.bar_before = t, betas[t], alphas_bar[t], before[t]
        self.variance = self.beta * (1 - self.bar_before) / (1 - self.bar)
        of_step_1 = betas[1] * (1 - alphas_bar[0]) / (1 - alphas_bar[1])
        self.log_low = math.log(self.variance if t else of_step_1)
        self.log_fixed = math.log(self.beta if t else of_step_1)

    def noised(self, x0, noise):
        return math.sqrt(self.bar) * x0 + math.sqrt(1 - self.bar) * noise

    def x0_of(self, xt, noise):
        return (xt - math.sqrt(1 - self.bar) * noise) / math.sqrt(self.bar)

    def mean(self, x0, xt):
        first = math.sqrt(self.bar_before) * self.beta / (1 - self.bar) * x0
        return first + math.sqrt(1 - self.beta) * (1 - self.bar_before) / (1 - self.bar) * xt

    def log_variance(self, raw):
        return (raw + 1) / 2 * math.log(self.beta) + (1 - (raw + 1) / 2) * self.log_low

    def bits(self, x0, xt, predicted, raw):
        """The mean over elements of the divergence; at t = 0, of the likelihood of a level of 256."""
        mean, log_variance = self.mean(self.x0_of(xt, predicted), xt), self.log_variance(raw)
        if self.t:
            gap = self.mean(x0, xt) - mean
            ratio = self.log_low - log_variance
            nats = 0.5 * (-1 - ratio + np.exp(ratio) + gap**2 * np.exp(-log_variance))
        else:
            cdf = np.vectorize(lambda x: 0.5 * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))
            above = cdf((x0 + 1 / 255 - mean) / np.exp(log_variance / 2))
            below = cdf((x0 - 1 / 255 - mean) / np.exp(log_variance / 2))
            chance = np.where(x0 < -0.999, above, np.where(x0 > 0.999, 1 - below, above - below))
            nats = -np.log(np.maximum(chance, 1e-12))
        return nats.mean() / math.log(2)


@pytest.fixture
def draws():
    """x0, noise, output: x0 has the levels of uint8, both ends included; errors of the noise from small to large."""
    generator = torch.Generator().manual_seed(5)
    x0 = torch.randint(0, 256, SHAPE, generator=generator) / 127.5 - 1
    x0[:, 0, 0, 0], x0[:, 0, 0, 1] = -1, 1
    noise = torch.randn(SHAPE, generator=generator)
    error = torch.randn(SHAPE, generator=generator) * torch.logspace(-2, 0.3, 20)[:, None, None, None]
    return x0, noise, torch.cat([noise + error, torch.randn(SHAPE, generator=generator)], 1)


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_losses_equal_the_slow_twin(draws, kind):
    schedule, (x0, noise, output) = NoiseSchedule(1000, kind), draws
    mse, bits = denoising_losses(schedule, output, x0, torch.tensor(TIMES), noise)
    betas = betas_of(1000, kind)
    for row, t in enumerate(TIMES):
        slow = SlowProcess(betas, t)
        start, added, predicted, raw = (part[row].double().numpy() for part in (x0, noise, *output.split(3, 1)))
        expected = slow.bits(start, slow.noised(start, added), predicted, raw)
        assert float(bits[row]) == pytest.approx(expected, rel=1e-5, abs=1e-5), t
        assert float(mse[row]) == pytest.approx(((predicted - added) ** 2).mean(), rel=1e-5)


def test_min_snr_weights():
    signal = np.cumprod(1 - np.array(betas_of(1000, "linear")))
    expected = [min(s / (1 - s), 5) / (s / (1 - s)) for s in signal]
    weights = NoiseSchedule().min_snr(5)
    np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-4)
    assert weights[0] < 0.001 and weights[-1] == 1  # little noise, nothing but noise


@pytest.mark.parametrize(("steps", "kind"), [(1000, "linear"), (250, "linear"), (64, "cosine")])
def test_gaussians_equal_the_slow_twin(draws, steps, kind):
    schedule, (x0, noise, output) = NoiseSchedule(steps, kind), draws
    times = torch.tensor(TIMES) * (steps - 1) // 999
    xt, raw = schedule.add_noise(x0, times, noise), output[:, 3:]
    mean, log_low = schedule.posterior(x0, xt, times)
    found = {"x0": schedule.predict_x0(xt, times, noise), "noise": schedule.predict_noise(xt, times, x0),
             "xt": xt, "mean": mean, "learned": schedule.log_variance(raw, times)}  # fmt: skip
    fixed = schedule.log_variance(None, times)
    for row, t in enumerate(times.tolist()):
        slow = SlowProcess(betas_of(steps, kind), t)
        start, added = x0[row].double().numpy(), noise[row].double().numpy()
        noised = slow.noised(start, added)
        expected = {"x0": start, "noise": added, "xt": noised, "mean": slow.mean(start, noised),
                    "learned": slow.log_variance(raw[row].double().numpy())}  # fmt: skip
        assert float(log_low[row]) == pytest.approx(slow.log_low, rel=1e-6)
        assert float(fixed[row]) == pytest.approx(slow.log_fixed, rel=1e-6)
        for name, value in expected.items():
            # Where almost no signal or noise is left, float32 recovers it to the rounding of x_t only.
            scale = {"x0": math.sqrt(slow.bar), "noise": math.sqrt(1 - slow.bar)}.get(name, 1)
            np.testing.assert_allclose(found[name][row].numpy(), value, rtol=1e-5, atol=1e-6 / scale)


def test_a_shorter_process_has_the_same_noise_at_the_kept_steps(draws):
    whole, kept = NoiseSchedule(1000), [0, 3, 250, 999]
    short, (x0, noise, _) = whole.respaced(kept), draws
    places = torch.arange(20) % 4
    torch.testing.assert_close(short.add_noise(x0, places, noise), whole.add_noise(x0, short.kept[places], noise))
    bars = [math.prod(1 - beta for beta in betas_of(1000, "linear")[: t + 1]) for t in kept]
    betas = [1 - bar / before for bar, before in zip(bars, [1.0, *bars], strict=False)]
    for place in range(4):
        slow = SlowProcess(betas, place)
        assert float(short.log_low[place]) == pytest.approx(slow.log_low, rel=1e-5)
        assert float(short.log_high[place]) == pytest.approx(math.log(slow.beta), rel=1e-5)


def test_statistics_of_noised_images():
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(0)
    x0, noise = torch.full((1, 1, 400, 400), 0.5), torch.randn(1, 1, 400, 400, generator=generator)
    for t in (0, 100, 500, 999):
        bar = math.prod(1 - beta for beta in betas_of(1000, "linear")[: t + 1])
        xt = schedule.add_noise(x0, torch.tensor([t]), noise)
        assert float(xt.mean()) == pytest.approx(0.5 * math.sqrt(bar), abs=0.01)
        assert float(xt.var()) == pytest.approx(1 - bar, rel=0.02)


def test_a_zero_output_costs_one_per_element():
    schedule, generator = NoiseSchedule(), torch.Generator().manual_seed(1)
    noise = torch.randn(64, 3, 16, 16, generator=generator)
    times = torch.randint(0, 1000, (64,), generator=generator)
    mse, bits = denoising_losses(schedule, torch.zeros_like(noise), torch.zeros_like(noise), times, noise)
    assert float(mse.mean()) == pytest.approx(1, abs=0.02)
    assert torch.equal(bits, torch.zeros(64))


def test_the_variational_term_trains_the_variances_only(draws):
    x0, noise, output = draws
    output = output.clone().requires_grad_()
    mse, bits = denoising_losses(NoiseSchedule(), output, x0, torch.tensor(TIMES), noise)
    (of_bits,) = torch.autograd.grad(bits.sum(), output, retain_graph=True)
    (of_mse,) = torch.autograd.grad(mse.sum(), output)
    assert torch.equal(of_bits[:, :3], torch.zeros(SHAPE)) and torch.equal(of_mse[:, 3:], torch.zeros(SHAPE))
    assert of_bits[:, 3:].abs().amax((1, 2, 3)).min() > 0 and of_bits.isfinite().all()


def test_losses_compile_to_one_graph(draws):
    schedule, (x0, noise, output) = NoiseSchedule(), draws
    arguments = (schedule, output, x0, torch.tensor(TIMES), noise)
    compiled = torch.compile(denoising_losses, fullgraph=True, backend="eager")(*arguments)
    assert all(torch.equal(ours, plain) for ours, plain in zip(compiled, denoising_losses(*arguments), strict=True))


def test_tables_follow_the_device_and_no_checkpoint_holds_them():
    schedule = NoiseSchedule()
    assert schedule.state_dict() == {}
    assert schedule.to("meta").signal.device.type == "meta"


@pytest.mark.parametrize(("steps", "kind"), [(20, "linear"), (1000, "sigmoid")])
def test_impossible_schedules_are_refused(steps, kind):
    with pytest.raises(ConfigError, match=r"expected linear or cosine with at least 21"):
        NoiseSchedule(steps, kind)
    with pytest.raises(ValueError, match="ascending"):
        NoiseSchedule(kept=[5, 3])
