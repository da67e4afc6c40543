"""diffusers' AutoencoderKL: its latents in files, its digest, and folders that are refused."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_images import FakeImages, make_photo
from latent_files import options, stored

from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.crops import centre_squares
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError

CPU = torch.device("cpu")
needs_diffusers = pytest.mark.skipif(find_spec("diffusers") is None, reason="needs the extra: vitlocal[diffusion]")


def save_network(folder: Path, seed: int = 0, **changes: object) -> Path:
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    AutoencoderKL(
        block_out_channels=(16, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, latent_channels=4, norm_num_groups=8, layers_per_block=1, **changes,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_network(tmp_path_factory.mktemp("vae"))


@needs_diffusers
def test_latents_are_those_of_the_network(vae: Path, tmp_path: Path):
    from diffusers import AutoencoderKL

    write(options(tmp_path, sides="32,64", vae=str(vae)), FakeImages(9), progress=False)
    network = AutoencoderKL.from_pretrained(vae, local_files_only=True).eval()
    for side in (32, 64):
        photos = np.stack([centre_squares(FakeImages(9).load(row), [side])[0] for row in range(9)])
        images = torch.from_numpy(photos).permute(0, 3, 1, 2) / 127.5 - 1
        halves = stored(tmp_path / f"train_{side}_latent.beton")
        for half, inputs in zip(halves, (images, images.flip(3)), strict=True):
            with torch.no_grad():
                posterior = network.encode(inputs).latent_dist
            expected = torch.cat([posterior.mean, posterior.std], 1)
            torch.testing.assert_close(torch.from_numpy(half).float(), expected, rtol=1e-3, atol=1e-3)
        plain, mirrored = (half[:, :4].astype(np.float32) for half in halves)
        assert np.abs(plain[..., ::-1] - mirrored).mean() > 0.2 * plain.std()  # flips and the encoder do not commute


@needs_diffusers
def test_an_autoencoder_and_its_digest(vae: Path, tmp_path: Path):
    found = Autoencoder.load(vae, CPU)
    assert (found.channels, found.stride, found.scaling_factor, len(found.digest)) == (4, 8, 0.18215, 64)
    photos = np.stack([np.asarray(make_photo(32, 32))] * 3)
    latents = found.encode(photos)
    assert latents.shape == (3, 8, 4, 4) and latents.dtype == torch.float32 and (latents[:, 4:] > 0).all()
    assert torch.equal(latents, found.encode(torch.from_numpy(photos).permute(0, 3, 1, 2)))
    means = latents[:, :4]
    images = found.decode(means * 0.18215)
    assert images.shape == (3, 3, 32, 32) and images.dtype == torch.uint8
    with torch.no_grad():
        pixels = found._network.decode(means).sample * 127.5 + 127.5
    assert (images - pixels.clamp(0, 255)).abs().max() <= 0.51
    shifted = Autoencoder.load(save_network(tmp_path / "shifted", shift_factor=0.5), CPU)
    torch.testing.assert_close(shifted.encode(photos)[:, :4], means - 0.5)
    torch.testing.assert_close(shifted.encode(photos)[:, 4:], latents[:, 4:])
    assert (shifted.decode((means - 0.5) * 0.18215).int() - images.int()).abs().max() <= 1
    assert len({found.digest, shifted.digest, Autoencoder.load(save_network(tmp_path / "b", 1), CPU).digest}) == 3
    network = found._network
    with torch.no_grad():
        network.decoder.conv_out.bias += 1
    network.register_to_config(sample_size=512, an_option_of_a_newer_version=True)
    network.save_pretrained(tmp_path / "decoder")  # as sd-vae-ft-ema and sd-vae-ft-mse differ
    assert Autoencoder.load(tmp_path / "decoder", CPU).digest == found.digest


@needs_diffusers
def test_damaged_weights_are_refused(vae: Path, tmp_path: Path):
    from safetensors.torch import load_file, save_file

    damaged = Path(shutil.copytree(vae, tmp_path / "vae"))
    weights = damaged / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, weights)
    with pytest.raises(ConfigError, match="lack 1 tensors .encoder.conv_in.bias"):
        Autoencoder.load(damaged)
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ConfigError, match="cannot be read as its config.json says"):
        Autoencoder.load(damaged)


def test_folders_without_an_autoencoder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inner = tmp_path / "vae"
    inner.mkdir()
    (inner / "config.json").write_text('{"_class_name": "VQModel"}')
    with pytest.raises(ConfigError, match="has no config.json; expected the folder of an AutoencoderKL.*name .*/vae$"):
        Autoencoder.load(tmp_path)
    with pytest.raises(ConfigError, match="holds 'VQModel', expected an AutoencoderKL"):
        Autoencoder.load(inner)
    (inner / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(ConfigError, match="has no weights, expected diffusion_pytorch_model.safetensors"):
        Autoencoder.load(inner)
    (inner / "diffusion_pytorch_model.safetensors").touch()
    monkeypatch.setitem(sys.modules, "diffusers", None)  # as if it were not installed
    with pytest.raises(ConfigError, match=r"pip install .vitlocal\[diffusion\]., or pip install .\.\[diffusion\]"):
        Autoencoder.load(inner)
    (inner / "config.json").write_text("[")
    with pytest.raises(ConfigError, match="config.json is damaged"):
        Autoencoder.load(inner)
