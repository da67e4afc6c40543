"""The samplers: against diffusers' pipeline, plain float64 code, and models whose samples are known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model
from vitlocal.tasks.noise_schedule import NoiseSchedule
from vitlocal.tasks.sampling import SamplerOptions, sample, sample_batches, sample_keys, to_pixels

CPU = torch.device("cpu")
CLASSES = 3


def bars_of(steps: int) -> np.ndarray:
    return np.cumprod(1 - np.linspace(1e-4, 0.02, steps) * 1000 / steps)


class Smooth(nn.Module):
    """A model whose output is a smooth function of all its inputs. It notes the sizes of its batches."""

    num_classes, in_chans = CLASSES, 4

    def __init__(self, stride: int = 8, learn_sigma: bool = True, staged: bool = False):
        super().__init__()
        self.stride, self.learn_sigma, self.batches, self.null_stages = stride, learn_sigma, [], []
        self.stage_table = nn.Parameter(torch.zeros(3, 2)) if staged else None

    def forward(self, inputs, times, labels, no_stage=None):
        assert not self.training
        self.batches.append(len(inputs))
        self.null_stages.append(no_stage)
        times, labels = times.view(-1, 1, 1, 1), labels.view(-1, 1, 1, 1)
        noise = torch.tanh(0.5 * inputs + 0.001 * times - 0.3 * labels)
        return torch.cat([noise, torch.sin(inputs + labels)], 1) if self.learn_sigma else noise


def smooth_in_numpy(xt: np.ndarray, t: int, label: int) -> tuple[np.ndarray, np.ndarray]:
    return np.tanh(0.5 * xt + 0.001 * t - 0.3 * label), np.sin(xt + label)


class Known(nn.Module):
    """The exact noise prediction for data that are one constant image per class; of all pixels (class - 1) / 4."""

    in_chans, num_classes = 3, CLASSES

    def __init__(self, stride: int = 1):
        super().__init__()
        self.stride = stride
        self.register_buffer("bars", torch.tensor(bars_of(1000)).float())

    def forward(self, inputs, times, labels):
        bar = self.bars[times].view(-1, 1, 1, 1)
        x0 = (labels.view(-1, 1, 1, 1) - 1) / 4
        return (inputs - bar.sqrt() * x0) / (1 - bar).sqrt()


def draw(model, labels, options, keys=None, size=32, steps=1000, **others):
    labels = torch.tensor(labels)
    keys = torch.arange(len(labels)) + 7 if keys is None else torch.tensor(keys)
    return sample(model, NoiseSchedule(steps), labels, keys, size, options, device=CPU, **others)


def slow_sample(key, label, options, learn_sigma, side=4, total=1000):
    """One sample of ``Smooth`` in float64, as the papers' equations state it."""
    bars = bars_of(total)
    if options.sampler == "ddim":
        times = range(0, total - total % options.steps, total // options.steps)
    else:
        times = [round(i * (total - 1) / (options.steps - 1)) for i in range(options.steps)]
    generator = torch.Generator().manual_seed(key)
    normal = lambda: torch.randn(4, side, side, generator=generator).double().numpy()  # noqa: E731
    xt, times = normal(), list(times)
    for place in range(options.steps - 1, -1, -1):
        t = times[place]
        bar, before = bars[t], bars[times[place - 1]] if place else 1.0
        noise, raw = smooth_in_numpy(xt, t, label)
        if options.guidance != 1:
            without, _ = smooth_in_numpy(xt, t, CLASSES)
            guided = without + options.guidance * (noise - without)
            noise = guided if options.guided_channels == "all" else np.concatenate([guided[:3], noise[3:]])
        x0 = (xt - math.sqrt(1 - bar) * noise) / math.sqrt(bar)
        if options.sampler == "ddim":
            xt = math.sqrt(before) * x0 + math.sqrt(1 - before) * noise
            continue
        beta = 1 - bar / before
        xt = (math.sqrt(before) * beta * x0 + math.sqrt(1 - beta) * (1 - before) * xt) / (1 - bar)
        if place:
            low = beta * (1 - before) / (1 - bar)
            share = (raw + 1) / 2
            variance = np.exp(share * math.log(beta) + (1 - share) * math.log(low)) if learn_sigma else beta
            xt = xt + np.sqrt(variance) * normal()
    return xt


@pytest.mark.parametrize(
    ("options", "learn_sigma"),
    [
        (SamplerOptions("ddim", 50, 1), True),
        (SamplerOptions("ddim", 30, 2.5, "3"), False),
        (SamplerOptions("ddpm", 25, 1), True),
        (SamplerOptions("ddpm", 25, 1.5, "3"), True),
        (SamplerOptions("ddpm", 40, 1.5), False),
        (SamplerOptions("ddim", 1, 0), True),
    ],
)
def test_samples_equal_the_slow_twin(options, learn_sigma):
    found = draw(Smooth(learn_sigma=learn_sigma), [0, 2], options)
    assert found.shape == (2, 4, 4, 4) and found.dtype == torch.float32
    for row, label in enumerate((0, 2)):
        expected = slow_sample(row + 7, label, options, learn_sigma)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("stride", [1, 8])
@pytest.mark.parametrize("guidance", [1, 3, 0])
def test_a_known_model_gives_its_classes(sampler, stride, guidance):
    """Guidance moves the constant away from that of no class, which has the last label."""
    found = draw(Known(stride), [0, 1, 2], SamplerOptions(sampler, 20, guidance))
    ours, nobody = torch.tensor([-0.25, 0, 0.25]), (CLASSES - 1) / 4
    expected = nobody + guidance * (ours - nobody)
    if stride == 1:
        expected = expected.clamp(-1, 1)
    side = 32 // stride
    torch.testing.assert_close(found, expected.view(3, 1, 1, 1).expand(3, 3, side, side), rtol=0, atol=1e-3)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_a_sample_depends_on_its_key_alone(sampler):
    options, keys = SamplerOptions(sampler, 10, 2), [11, 12, 13, 11]
    together = draw(Smooth(), [0, 1, 2, 0], options, keys)
    alone = torch.cat([draw(Smooth(), [label], options, [key]) for label, key in ((0, 11), (1, 12), (2, 13))])
    torch.testing.assert_close(together[:3], alone)
    torch.testing.assert_close(together[3], together[0])
    backwards = draw(Smooth(), [2, 1, 0], options, [13, 12, 11])
    torch.testing.assert_close(backwards.flip(0), alone)
    other = draw(Smooth(), [0], options, [14])
    assert (other - alone[:1]).abs().max() > 0.1


def test_keys_are_those_of_seed_class_and_number():
    labels, numbers = torch.arange(4).repeat_interleave(500), torch.arange(500).repeat(4)
    keys = sample_keys(3, labels, numbers)
    assert keys.dtype == torch.int64 and 0 <= keys.min() and keys.max() < 1 << 32
    assert len(keys.unique()) == 2000 and not torch.isin(sample_keys(4, labels, numbers), keys).any()
    chosen = torch.tensor([1999, 3, 700])
    assert torch.equal(sample_keys(3, labels[chosen], numbers[chosen]), keys[chosen])


def test_batches_report_their_progress():
    model, done = Smooth(), []
    labels, keys = torch.tensor([0, 1, 2, 0, 1]), torch.arange(5) + 7
    options = SamplerOptions("ddim", 4, 2)
    parts = list(sample_batches(model, NoiseSchedule(), labels, keys, 32, options, batch_size=2, device=CPU,
                                progress=done.append))  # fmt: skip
    assert [len(part) for part in parts] == [2, 2, 1] and sum(done) == 5 * 4
    torch.testing.assert_close(torch.cat(parts), draw(Smooth(), labels.tolist(), options))


@pytest.mark.parametrize("staged", [False, True])
def test_guidance_1_has_no_unconditional_branch_and_only_it_drops_the_stage(staged):
    model = Smooth(staged=staged)
    draw(model, [0, 1], SamplerOptions("ddim", 2, 1))
    assert model.batches == [2, 2] and model.null_stages == [None, None]
    draw(model, [0, 1], SamplerOptions("ddim", 1, 4))
    assert model.batches[2:] == [4]
    dropped = model.null_stages[-1]
    assert dropped.tolist() == [False, False, True, True] if staged else dropped is None


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_also_after_an_error(training):
    class Stop(Exception):
        pass

    def stop(count):
        raise Stop

    model = Smooth().train(training)
    draw(model, [0], SamplerOptions(steps=1))
    assert model.training is training
    with pytest.raises(Stop):
        draw(model, [0], SamplerOptions(steps=1), progress=stop)
    assert model.training is training and torch.is_grad_enabled()


def test_time_steps_are_the_published_ones():
    assert SamplerOptions("ddim", 50).times(1000) == list(range(0, 1000, 20))
    assert SamplerOptions("ddim", 3).times(1000) == [0, 333, 666]
    assert SamplerOptions("ddpm", 5).times(1000) == [0, 250, 500, 749, 999]  # 249.75, 499.5, 749.25: half to even
    assert SamplerOptions("ddpm", 1000).times(1000) == list(range(1000))


@pytest.mark.parametrize(
    "options", [{"sampler": "euler"}, {"guided_channels": "4"}, {"steps": 0}, {"guidance": -1}, {"guidance": math.nan}]
)
def test_impossible_options_are_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        SamplerOptions(**options)


def test_impossible_sizes_and_steps_are_refused():
    with pytest.raises(ConfigError, match=r"got 36 px, expected a multiple of 8 px"):
        draw(Smooth(), [0], SamplerOptions(), size=36)
    with pytest.raises(ConfigError, match="got 60, but the noise schedule has 50 steps"):
        draw(Smooth(), [0], SamplerOptions(steps=60), steps=50)


def test_pixels_are_rounded_and_limited():
    values = torch.tensor([-2, -1, -1 + 0.9 / 255, 0.0, 1, 3])
    assert to_pixels(values).tolist() == [0, 0, 0, 128, 255, 255]


@pytest.fixture
def autoencoder():
    """A small autoencoder of diffusers with random weights."""
    diffusers = pytest.importorskip("diffusers", reason='needs the extra: pip install "vitlocal[diffusion]"')
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8, layers_per_block=1,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("guidance", [1, 4])
def test_ddim_draws_the_images_of_the_pipeline_of_diffusers(autoencoder, guidance, tmp_path: Path):
    from diffusers import DiTPipeline

    from vitlocal.models.dit_weights import export_diffusers

    model, _ = build_model("vitlocal_dit_small_patch2", dict(img_size=64, embed_dim=32, depth=2, num_heads=2), CLASSES)
    for parameter in model.parameters():  # weights at which classes and times matter
        nn.init.normal_(parameter, std=0.2)
    autoencoder.save_pretrained(tmp_path / "vae")
    export_diffusers(tmp_path / "pipeline", model, 64, ["crab", "fox", "owl"], autoencoder=tmp_path / "vae")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "pipeline", local_files_only=True)
    for block in pipeline.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0  # DiT's own frequencies
    pipeline.set_progress_bar_config(disable=True)
    labels, keys = [2, 0], [5, 6]
    generators = [torch.Generator().manual_seed(key) for key in keys]
    arguments = {"guidance_scale": guidance, "num_inference_steps": 10, "output_type": "np"}
    expected = pipeline(labels, generator=generators, **arguments).images  # (B, H, W, 3), 0 to 1
    latents = draw(model, labels, SamplerOptions("ddim", 10, guidance), keys, size=64)
    with torch.no_grad():
        decoded = autoencoder.decode(latents.clone() / autoencoder.config.scaling_factor).sample
    images = (decoded / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert expected.std() > 0.01
    np.testing.assert_allclose(images, expected, atol=1e-4, rtol=0)
