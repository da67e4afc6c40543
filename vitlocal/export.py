"""Exports a trained diffusion model: python -m vitlocal.export --run runs/x --export diffusers --vae FOLDER"""

if __name__ == "__main__":  # first, so that signals are handled while PyTorch is imported
    from vitlocal.launch import export

    export()

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from vitlocal.errors import ConfigError
from vitlocal.models.dit import DiT
from vitlocal.models.dit_weights import export_diffusers
from vitlocal.models.exported import ExportedRun
from vitlocal.sample import load_autoencoder, new_folder, trained_schedule
from vitlocal.tasks.noise_schedule import LINEAR_BETAS

# diffusers' names of the noise schedules.
BETA_SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}


def main(argv: Sequence[str]) -> None:
    """Writes a folder that ``diffusers.DiTPipeline.from_pretrained`` loads."""
    parser = argparse.ArgumentParser(prog="python -m vitlocal.export", description=__doc__)
    add = parser.add_argument
    add("--run", required=True, metavar="DIR", help="folder of a finished run of latents")
    add("--export", choices=["diffusers"], default="diffusers", help="form of the export (default: %(default)s)")
    add("--vae", metavar="DIR", help="autoencoder to include (default: diffusion.vae of the run)")
    add("--out", type=Path, metavar="DIR", help="new folder (default: diffusers, in the run's folder)")
    options = parser.parse_args(argv)
    exported = ExportedRun(options.run)
    model = exported.load()
    if not isinstance(model, DiT):
        raise ConfigError(
            f"--run: {options.run} holds a classifier, which has no form in diffusers; its model.safetensors and "
            f'config.json are an export, which timm.create_model("local-dir:{options.run}", pretrained=True) loads'
        )
    trained = exported.description.get("diffusion", {})
    schedule = trained_schedule(trained)
    first, last = (beta / schedule.steps for beta in LINEAR_BETAS)
    scheduler = {"num_train_timesteps": schedule.steps, "beta_schedule": BETA_SCHEDULES[schedule.kind]}
    scheduler |= {"beta_start": first, "beta_end": last}
    vae, out = options.vae or trained.get("vae"), options.out or exported.folder / "diffusers"
    if vae is not None and model.stride > 1 and load_autoencoder(vae, model, trained, torch.device("cpu")).shift:
        raise ConfigError(
            f"--vae: {vae} has a shift_factor, which DiTPipeline does not add to latents: its images would be wrong. "
            "Use python -m vitlocal.sample"
        )
    with new_folder(out) as folder:
        export_diffusers(
            folder, model, exported.side * model.stride, exported.class_names, scheduler=scheduler,
            autoencoder=None if vae is None else Path(vae),
        )  # fmt: skip
    more = "" if vae else ', vae=AutoencoderKL.from_pretrained("VAE")'
    print(
        f'{out}: load it with pipe = DiTPipeline.from_pretrained("{out}"{more}), and then set the timestep frequencies '
        "that DiT was trained with:\n"
        "for block in pipe.transformer.transformer_blocks: block.norm1.emb.time_proj.downscale_freq_shift = 0"
    )
