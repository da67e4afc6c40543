"""Diffusion models with the training methods, and the configurations that are refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from latent_files import StandIn
from test_diffusion import LATENTS, PIXELS
from trainers import open_trainer

from vitlocal.data.autoencoder import Autoencoder
from vitlocal.errors import run_command
from vitlocal.models.shape import temporary_shape
from vitlocal.plan import WHOLE_MODEL
from vitlocal.report.run_folder import read_log
from vitlocal.train.__main__ import main
from vitlocal.train.command import train

pytestmark = pytest.mark.usefixtures("no_report")

QUICK = ["--model.size=32", "--train.batch_size=40", "--budget.length=2ep", "--diffusion.grid_classes=1",
         "--diffusion.sample_steps=2", "--train.lr=0.01"]  # fmt: skip
STAGES = [
    "--autoprog.stages=2",
    "--autoprog.size_multiple=8",
    "--autoprog.search_length=0.2ep",
    "--autoprog.probe_batches=1",
]


@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (["--methods=budgeted", "--budgeted.grow=heads,hidden", "--budgeted.stages=2"], "shape.heads"),
        (["--methods=image_size", "--image_size.stages=16px until 1ep,32px"], "feed.size"),
        (["--methods=image_size,batch_size", "--image_size.stages=16px until 1ep,32px", "--batch_size.multiple=8"],
         "feed.batch_size"),
        (["--methods=autoprog", *STAGES], "shape.block_order"),
        (["--methods=autoprog", "--autoprog.space=size", *STAGES], "feed.size"),
        (["--methods=unfreeze", "--unfreeze.stages=2", "--unfreeze.schedule=1@16px,2@32px"], "shape.stage"),
    ],
    ids=["budgeted", "image_size", "batch_size", "autoprog", "autoprog sizes", "unfreeze"],
)  # fmt: skip
def test_methods_train_diffusion_models_of_pixels(configure, decoder, tmp_path: Path, options, changed: str):
    assert train(configure(*PIXELS, *QUICK, *options)) == 0
    records = read_log(tmp_path / "run")
    assert any(changed in record for record in records), [sorted(record) for record in records]
    assert records[-1]["val_loss"] < 1.1 and (tmp_path / "run" / "model.safetensors").exists()


def test_growth_keeps_the_function(configure, decoder):
    """Where each new head and hidden unit copies one, and both have half of its output: all outputs stay the same."""
    options = ["--methods=budgeted", "--budgeted.grow=heads,hidden", "--budgeted.stages=2", "--budgeted.copy_scale=0.5"]
    with open_trainer(configure(*PIXELS, *options, "--train.ema_decay=0.9")) as trainer:
        models = trainer.state.model, trainer.state.ema.model
        for parameter in models[0].parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        models[1].load_state_dict(models[0].state_dict())
        first, last = trainer.plan(), trainer.upcoming_plans()[-1]
        assert (first.shape.heads, first.shape.hidden) == ((1,), (64,)) and last.shape == WHOLE_MODEL
        inputs = torch.randn(3, 3, 16, 16), torch.tensor([0, 500, 999]), torch.tensor([0, 5, 20])

        def outputs(shape) -> list[torch.Tensor]:
            with torch.no_grad():
                found = []
                for model in models:
                    with temporary_shape(model, shape, WHOLE_MODEL):
                        found.append(model(*inputs))
            return found

        before, smaller = outputs(first.shape), outputs(last.shape)
        trainer._grow(last)
        for model, old, other in zip(outputs(last.shape), before, smaller, strict=True):
            torch.testing.assert_close(model, old, rtol=1e-4, atol=1e-4)
            assert not torch.allclose(other, old, rtol=0.01, atol=0.01)


# --- refusals ---

REFUSED = {
    "mixup": (["--augment.mixup=0.8", "--augment.random_erasing=0.2"],
              "augment.mixup, augment.random_erasing: a diffusion model would draw augmented images"),
    "randaugment": (["--augment.randaugment=9"], "augment.randaugment: a diffusion model would draw augmented"),
    "trilevel": (["--methods=trilevel"], "methods: trilevel needs correct of each image, which only classifiers"),
    "trilevel tokens": (["--methods=trilevel", "--trilevel.levels=tokens"],
                        r"methods: trilevel changes .*shape.token_keep_rate, and vitlocal_dit_tiny_patch4_32 cannot: "
                        "DiT denoises every patch, so all tokens run; remove trilevel"),
    "tokens": (["--methods=budgeted"], "methods: budgeted changes shape.grid, and "
               "vitlocal_dit_tiny_patch4_32 cannot: DiT denoises every patch, so all tokens run; set "
               "budgeted.grow=heads,hidden"),
    "strength": (["--methods=strength", "--strength.by=budget"], "strength has nothing to vary.* or remove it"),
    "drop path": (["--model.drop_path=0.1"], r"drop_path_rate=0.1: expected 0, because DiT has no drop path "
                  r"\(model.drop_path=0\)"),
    "class token": (["--methods=unfreeze", "--unfreeze.stage_tokens=class"], "no class token.*use stage_tokens=all"),
    "one sample": (["--diffusion.last_samples=1"], "got 1, but a Fréchet distance needs at least 2 samples"),
    "no features": (["--diffusion.samples=50"], "the Fréchet distance needs diffusion.features"),
    "sizes": (["--model.size=18"], "the patch of 4x4 pixels must divide it; use 16x16"),
}  # fmt: skip
REFUSED_LATENTS = {
    "wrong autoencoder": (["--diffusion.vae=other"], r"diffusion.vae: other \(digest digest of ot\) is not the auto"),
    "no autoencoder": (["--diffusion.features=x"], "diffusion.features: samples of latents .* diffusion.vae"),
    "loader": (["--data.loader=torchvision"], "latents are read by the native loader: data.loader=native"),
    "photos": (["--data.root={folder}"], "holds photos, and latents are needed.* --format latent --vae FOLDER"),
    "sizes of autoprog": (["--methods=autoprog", "--autoprog.min_scale=0.5", "--autoprog.size_multiple=16"],
                          "autoprog changes shape.input_size, .*: latents of a resized image .* autoprog.space=depth"),
    "size": (["--evaluate.size=48"], "no latents of 48 px for the split 'val'"),
    "curriculum": (["--methods=image_size", "--image_size.stages=16px until 1ep,48px", "--model.size=48"],
                   "no latents of 48 px for the split 'train'"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name"), [("pixels", name) for name in REFUSED] + [("latents", n) for n in REFUSED_LATENTS]
)
def test_wrong_configurations_leave_nothing_behind(
    folder: Path, latents: Path, decoder, kind: str, name: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.setattr(Autoencoder, "load", StandIn)
    changes, message = (REFUSED if kind == "pixels" else REFUSED_LATENTS)[name]
    known = [*PIXELS, f"--data.root={folder}"] if kind == "pixels" else [*LATENTS, f"--data.root={latents}"]
    run = tmp_path / "run"
    options = [*known, "--budget.length=2ep", "--train.batch_size=20", f"--run.folder={run}",
               *(change.format(folder=folder) for change in changes)]  # fmt: skip
    assert run_command(main, options) == 2
    text = capsys.readouterr().err
    assert re.search(message, text), text
    assert list(tmp_path.iterdir()) == []


def test_classifiers_ignore_the_options_of_diffusion(configure, decoder, tmp_path: Path):
    """And keep their augmentation."""
    options = ("--budget.length=1ep", "--augment.mixup=0.8", "--augment.randaugment=5", "--diffusion.vae=x")
    assert train(configure(*options)) == 0
    record = read_log(tmp_path / "run")[-1]
    assert record["top1"] >= 0 and "val_loss" not in record and not (tmp_path / "run" / "pictures").exists()
