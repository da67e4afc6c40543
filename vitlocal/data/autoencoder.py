"""The autoencoder of latent diffusion: diffusers' AutoencoderKL from a local folder (the extra diffusion).

Shape letters: B batch, H W sides of an image, C channels of a latent, h w its sides (H / stride, W / stride).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vitlocal.errors import ConfigError

CLASS = "AutoencoderKL"
WEIGHTS = "diffusion_pytorch_model"
INSTALL = 'pip install "vitlocal[diffusion]", or pip install ".[diffusion]" in a checkout'
# What latents depend on beside the encoder's weights. Newer versions of diffusers add options to configurations.
ENCODER_OPTIONS = (
    "act_fn", "block_out_channels", "down_block_types", "layers_per_block", "mid_block_add_attention",
    "norm_num_groups", "scaling_factor", "shift_factor", "use_quant_conv",
)  # fmt: skip
CALL_PIXELS, CALL_IMAGES = 1 << 19, 64  # the most of a call of the network: 1 GB of activations in its first layers


def images_per_call(side: int) -> int:
    """The images of ``side`` px that one call of the network takes: a power of two, the same on every machine."""
    return 1 << max(1, min(CALL_IMAGES, CALL_PIXELS // side**2)).bit_length() - 1


class Autoencoder:
    """Images to latents and back, in float32, by deterministic convolutions without TF32.

    ``channels`` C, ``stride``: px of an image per latent cell. ``scaling_factor``: a model sees latents times this.
    ``shift``: what the network's own latents have more than those here.
    ``digest``: SHA-256 of the encoder's configuration and weights, so of all that latents depend on. Autoencoders that
    differ in their decoders only, such as sd-vae-ft-ema and sd-vae-ft-mse, have the same digest.
    """

    def __init__(self, network: Any, device: torch.device):
        config = network.config
        self.channels, self.stride = int(config.latent_channels), 2 ** (len(config.block_out_channels) - 1)
        self.scaling_factor, self.shift = float(config.scaling_factor), float(config.get("shift_factor") or 0.0)
        self.digest, self.device = _digest(network), device
        self._network = network.to(device).eval().requires_grad_(False)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | None = None) -> Autoencoder:
        """Reads ``config.json`` and the weights in ``folder``. Nothing is downloaded.

        ``device`` None: the accelerator if there is one, else the CPU. Raises ConfigError if diffusers is missing,
        or if the folder holds no whole AutoencoderKL.
        """
        folder = Path(folder)
        _check_folder(folder)
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ConfigError(f"--vae, diffusion.vae: diffusers cannot be imported ({error}): {INSTALL}") from None
        try:
            network, found = AutoencoderKL.from_pretrained(
                str(folder), local_files_only=True, torch_dtype=torch.float32, low_cpu_mem_usage=False,
                output_loading_info=True,
            )  # fmt: skip
        except Exception as error:  # readers of weights raise many kinds of errors on damaged files
            raise ConfigError(
                f"--vae, diffusion.vae: the weights in {folder} cannot be read as its config.json says: {error}. Copy "
                "the folder again"
            ) from error
        if missing := found["missing_keys"]:
            raise ConfigError(
                f"--vae, diffusion.vae: the weights in {folder} lack {len(missing)} tensors ({missing[0]} …). Copy "
                "the folder again"
            )
        found_device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
        return cls(network, device or found_device)

    def encode(self, images: np.ndarray | torch.Tensor) -> torch.Tensor:
        """(B, 2C, h, w) float32 on the device: means, then standard deviations. They are not scaled.

        ``images`` are uint8: an array (B, H, W, 3), or a tensor (B, 3, H, W). A configuration with a shift_factor has
        it subtracted from the means, so that :meth:`decode` and a model need not know it.
        """
        pixels = images if isinstance(images, torch.Tensor) else torch.from_numpy(images).permute(0, 3, 1, 2)
        parts = []
        with torch.no_grad(), _exact():
            for part in pixels.split(images_per_call(max(pixels.shape[2:]))):
                posterior = self._network.encode(part.to(self.device).float() / 127.5 - 1).latent_dist
                parts.append(torch.cat([posterior.mean - self.shift, posterior.std], 1))
        return torch.cat(parts)

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """The images (B, 3, H, W) uint8, on the device, of ``latents`` (B, C, h, w) scaled by ``scaling_factor``."""
        parts = []
        with torch.no_grad(), _exact():
            for part in latents.split(images_per_call(self.stride * max(latents.shape[2:]))):
                unscaled = part.to(self.device, torch.float32) / self.scaling_factor + self.shift
                pixels = self._network.decode(unscaled).sample
                parts.append((pixels * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))
        return torch.cat(parts)


@contextmanager
def _exact() -> Iterator[None]:
    """Convolutions have one result: no TF32, no choice of kernels by time."""
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield


def _check_folder(folder: Path) -> None:
    """Raises ConfigError unless ``folder`` has the files of an AutoencoderKL."""
    if not (folder / "config.json").is_file():
        inner = folder / "vae"
        hint = f"; name {inner}" if (inner / "config.json").is_file() else ""
        raise ConfigError(
            f"--vae, diffusion.vae: {folder} has no config.json; expected the folder of an {CLASS} of diffusers, which "
            f"has config.json and {WEIGHTS}.safetensors{hint}"
        )
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"--vae, diffusion.vae: {folder / 'config.json'} is damaged: {error}") from None
    if kind != CLASS:
        raise ConfigError(f"--vae, diffusion.vae: {folder} holds {kind!r}, expected an {CLASS} of diffusers")
    if not any(folder.glob(f"{WEIGHTS}*")):
        raise ConfigError(
            f"--vae, diffusion.vae: {folder} has no weights, expected {WEIGHTS}.safetensors beside config.json. If it "
            "was cloned with Git, run git lfs pull there"
        )


def _digest(network: Any) -> str:
    """SHA-256 of the encoder's configuration and weights, in hexadecimal digits."""
    config = {name: network.config.get(name) for name in ENCODER_OPTIONS}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in sorted(network.state_dict().items()):
        if not name.startswith(("decoder.", "post_quant_conv.")):
            digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    return digest.hexdigest()
