"""python -m vitlocal.export: a trained run as a folder that diffusers loads."""

import json
from pathlib import Path

import pytest
import torch
from latent_files import StandIn

from vitlocal import export
from vitlocal.errors import ConfigError, run_command
from vitlocal.models.factory import build_model, export_model

CLASSES = ["disc", "star", "ring"]


def a_run(folder: Path, name: str, **arguments: int) -> Path:
    """The export of a model with random weights, as a run leaves it."""
    folder.mkdir()
    model, used = build_model(name, dict(img_size=64, embed_dim=32, depth=2, num_heads=2) | arguments, len(CLASSES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    notes = {"diffusion": {"steps": 500, "schedule": "linear", "autoencoder": "digest of vae"}}
    export_model(folder, model.eval(), name, used, CLASSES, size=64, crop_pct=1.0, notes=notes)
    return folder


def test_a_run_becomes_a_folder_of_diffusers(tmp_path: Path, capsys):
    run = a_run(tmp_path / "run", "vitlocal_dit_small_patch2")
    export.main(["--run", str(run)])
    out = run / "diffusers"
    text = capsys.readouterr().out
    assert "downscale_freq_shift = 0" in text and 'vae=AutoencoderKL.from_pretrained("VAE")' in text
    scheduler = json.loads((out / "scheduler" / "scheduler_config.json").read_text())
    assert (scheduler["num_train_timesteps"], scheduler["beta_start"], scheduler["beta_end"]) == (500, 2e-4, 0.04)
    assert json.loads((out / "model_index.json").read_text())["id2label"] == {"0": "disc", "1": "star", "2": "ring"}
    diffusers = pytest.importorskip("diffusers", reason="the extra diffusion is not installed")
    transformer = diffusers.DiTTransformer2DModel.from_pretrained(out / "transformer").eval()
    for block in transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    latents, times, labels = torch.randn(3, 4, 8, 8), torch.tensor([0, 250, 499]), torch.tensor([0, 2, 1000])
    ours = export.ExportedRun(run).load()
    with torch.inference_mode():
        theirs = transformer(latents, times, labels).sample
        mine = ours(latents, times, torch.tensor([0, 2, len(CLASSES)]))
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max()


def test_another_autoencoder_is_refused(tmp_path: Path, monkeypatch):
    run = a_run(tmp_path / "run", "vitlocal_dit_small_patch2", in_chans=StandIn.channels)
    monkeypatch.setattr("vitlocal.sample.Autoencoder.load", StandIn)
    with pytest.raises(ConfigError, match="another autoencoder than .*: digest digest of other instead of digest of v"):
        export.main(["--run", str(run), "--vae", "other"])
    monkeypatch.setattr(StandIn, "shift", 0.1)
    with pytest.raises(ConfigError, match="vae has a shift_factor, which DiTPipeline does not add to latents"):
        export.main(["--run", str(run), "--vae", "vae"])
    description = json.loads((run / "config.json").read_text())
    description["diffusion"]["autoencoder"] = ""
    (run / "config.json").write_text(json.dumps(description))
    with pytest.raises(ConfigError, match="files of FFCV, which do not say what scale and autoencoder"):
        export.main(["--run", str(run), "--vae", "vae"])
    assert not (run / "diffusers").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vitlocal_deit_tiny_patch16_224", "holds a classifier"),
        ("vitlocal_dit_small_patch4_64", "makes images, and DiTPipeline decodes latents"),
    ],
)
def test_what_diffusers_has_no_form_for(tmp_path: Path, monkeypatch, capsys, name: str, message: str):
    run = a_run(tmp_path / "run", name)
    monkeypatch.setattr("sys.argv", ["export", "--run", str(run)])
    assert run_command(export.main) == 2
    assert message in capsys.readouterr().err
    assert not (run / "diffusers").exists()
