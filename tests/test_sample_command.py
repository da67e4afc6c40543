"""python -m vitlocal.sample: its files, what they depend on, and what it refuses."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vitlocal import predict, sample
from vitlocal.errors import ConfigError, run_command
from vitlocal.models.factory import build_model, export_model
from vitlocal.sample import chosen_classes, file_name
from vitlocal.tasks.noise_schedule import NoiseSchedule
from vitlocal.tasks.sample_grid import draw_grid
from vitlocal.tasks.sampling import SamplerOptions, to_pixels
from vitlocal.tasks.sampling import sample as draw

CLASSES = ("crab", "tench, Tinca", "red/fox", "owl")
SMALL = dict(embed_dim=32, depth=1, num_heads=2)


def export(folder: Path, name: str, **options) -> Path:
    torch.manual_seed(0)
    model, arguments = build_model(name, SMALL | options, len(CLASSES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir()
    export_model(folder, model, name, arguments, CLASSES, size=options["img_size"], crop_pct=1.0)
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders with exported models: of pixels, of latents, and a classifier."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        "pixels": export(folder / "pixels", "vitlocal_dit_tiny_patch4_32", img_size=16),
        "latents": export(folder / "latents", "vitlocal_dit_small_patch2", img_size=64),
        "classifier": export(folder / "classifier", "vitlocal_deit_tiny_patch8_64", img_size=32),
    }


@pytest.fixture
def run(capsys, monkeypatch):
    """``run(folder, *arguments)``: the command's exit status and output, on a CPU with few steps."""

    def call(folder: Path, *arguments: str) -> tuple[int, str]:
        status = run_command(sample.main, [f"--run={folder}", "--device=cpu", "--steps=3", *arguments])
        return status, "".join(capsys.readouterr())

    return call


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_it_writes_images_a_grid_and_a_record(runs, run, tmp_path: Path):
    out = tmp_path / "new" / "samples"
    status, text = run(runs["pixels"], "--classes=owl,tench, Tinca,0", "--count=2", "--batch-size=4", f"--out={out}")
    assert status == 0 and "6 images of 3 classes" in text
    files = ["0003_owl_0000.png", "0003_owl_0001.png", "0001_tench-Tinca_0000.png", "0001_tench-Tinca_0001.png",
             "0000_crab_0000.png", "0000_crab_0001.png"]  # fmt: skip
    assert {path.name for path in out.iterdir()} == {*files, "grid.png", "samples.json"}
    assert [path.name for path in out.parent.iterdir()] == ["samples"]  # no temporary folder
    record = json.loads((out / "samples.json").read_text())
    assert [entry["file"] for entry in record["samples"]] == files
    assert [entry["label"] for entry in record["samples"]] == [3, 3, 1, 1, 0, 0]
    stated = {"sampler": "ddim", "steps": 3, "guidance": 4.0, "guided_channels": "all", "seed": 0, "size": 16,
              "schedule": "linear", "schedule_steps": 1000, "architecture": "vitlocal_dit_tiny_patch4_32",
              "device": "cpu", "precision": "float32", "autoencoder": {}}  # fmt: skip
    assert stated.items() <= record.items() and len(record["weights"]) == 64
    images = {name: pixels(out / name) for name in files}
    assert {image.shape for image in images.values()} == {(16, 16, 3)}
    assert len({image.tobytes() for image in images.values()}) == 6
    assert len(pixels(out / "grid.png")) == 4 + 3 * (64 + 4)  # three rows, enlarged
    # The record says how to draw an image again.
    model = sample.ExportedRun(runs["pixels"]).load()
    entry = record["samples"][3]
    options = SamplerOptions("ddim", 3, 4.0)
    label, key = torch.tensor([entry["label"]]), torch.tensor([entry["key"]])
    again = draw(model, NoiseSchedule(), label, key, 16, options, device=torch.device("cpu"))
    np.testing.assert_allclose(to_pixels(again)[0].permute(1, 2, 0), images[entry["file"]], atol=1)


def test_an_image_depends_on_seed_class_and_number_alone(runs, run, tmp_path: Path):
    for name, *options in (
        ("first", "--classes=3,0", "--count=2", "--batch-size=3"),
        ("second", "--classes=all", "--count=1"),
        ("third", "--classes=3", "--count=1", "--seed=1"),
    ):
        assert run(runs["pixels"], f"--out={tmp_path / name}", "--sampler=ddpm", *options)[0] == 0
    first, second, third = (pixels(tmp_path / name / "0003_owl_0000.png").astype(int) for name in
                            ("first", "second", "third"))  # fmt: skip
    assert abs(first - second).max() <= 1 and abs(first - third).mean() > 5


def test_a_run_states_its_noise_schedule(runs, run, tmp_path: Path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(runs["pixels"] / "model.safetensors")
    description = json.loads((runs["pixels"] / "config.json").read_text())
    evaluated = {"sampler": "ddpm", "sample_steps": 2, "guidance": 3.0, "guided_channels": "3"}
    description["diffusion"] = {"steps": 100, "schedule": "cosine", **evaluated}
    (folder / "config.json").write_text(json.dumps(description))
    assert run(folder, "--classes=0", "--count=1")[0] == 0
    record = json.loads((folder / "samples" / "samples.json").read_text())  # the folder by default
    assert (record["schedule"], record["schedule_steps"]) == ("cosine", 100)
    assert (record["sampler"], record["guidance"], record["guided_channels"]) == ("ddpm", 3.0, "3")  # as in evaluations
    status, text = run(folder, "--steps=101", "--out=unused")
    assert status == 2 and "the noise schedule has 100 steps" in text


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_it_leaves_nothing_after_an_interrupt(runs, run, tmp_path: Path, monkeypatch, number, status):
    out = tmp_path / "samples"
    out.mkdir()  # empty
    original = sample.to_images
    monkeypatch.setattr(sample, "to_images", lambda *drawn: (signal.raise_signal(number), original(*drawn))[1])
    found, text = run(runs["pixels"], f"--out={out}", "--count=1", "--batch-size=1")
    assert (found, text) == (status, "interrupted\n")
    assert list(tmp_path.iterdir()) == [out] and list(out.iterdir()) == []


def test_it_replaces_nothing(runs, run, tmp_path: Path):
    out = tmp_path / "samples"
    out.mkdir()
    assert run(runs["pixels"], f"--out={out}", "--count=1", "--classes=0")[0] == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    status, text = run(runs["pixels"], f"--out={out}", "--count=1", "--classes=0", "--seed=1")
    assert status == 2 and "is there already" in text
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_latents_need_their_autoencoder(runs, run, tmp_path: Path):
    status, text = run(runs["latents"], "--count=1")
    assert status == 2 and "--vae: it is missing" in text
    status, text = run(runs["pixels"], "--vae=x")
    assert status == 2 and "has a model of pixels; leave it out" in text
    diffusers = pytest.importorskip("diffusers", reason='needs the extra: pip install "vitlocal[diffusion]"')
    torch.manual_seed(0)
    parts = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    for name, blocks in (("vae", 4), ("short", 2)):
        vae = diffusers.AutoencoderKL(
            block_out_channels=(16,) + (32,) * (blocks - 1), latent_channels=4, norm_num_groups=8, layers_per_block=1,
            **{key: kinds * blocks for key, kinds in parts.items()},
        )  # fmt: skip
        vae.save_pretrained(tmp_path / name)
    out = tmp_path / "samples"
    status, text = run(runs["latents"], "--count=1", f"--vae={tmp_path / 'vae'}", f"--out={out}", "--guided-channels=3")
    assert status == 0, text
    record = json.loads((out / "samples.json").read_text())
    assert len(record["autoencoder"]["diffusion_pytorch_model.safetensors"]) == 64
    assert record["guided_channels"] == "3"
    images = np.stack([pixels(out / entry["file"]) for entry in record["samples"]])
    assert images.shape == (4, 64, 64, 3) and images.std() > 1
    status, text = run(runs["latents"], f"--vae={tmp_path / 'short'}", "--out=unused")
    assert status == 2 and "another autoencoder than the model was trained with: stride 2 instead of 8" in text


def test_each_command_names_the_other(runs, run, tmp_path: Path):
    status, text = run(runs["classifier"])
    assert status == 2 and "python -m vitlocal.predict --run" in text
    with pytest.raises(ConfigError, match=r"holds a diffusion model.* python -m vitlocal.sample --run"):
        predict.Predictor(runs["pixels"])
    status, text = run(tmp_path)
    assert status == 2 and "expected the folder of a finished run" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--run: it is missing"),
        (["--run=x", "--sampler=euler", "--count=0"], "--sampler: got 'euler'"),
        (["--run=x", "--guided-chanels=3"], "there is no option 'guided-chanels'; did you mean --guided-channels"),
        (["--run=x", "--guidance=-1"], "--guidance: got '-1'"),
    ],
)
def test_wrong_options_are_refused(arguments, message, capsys):
    assert run_command(sample.main, arguments) == 2
    assert message in capsys.readouterr().err


def test_classes_are_names_or_numbers():
    assert chosen_classes("all", CLASSES) == [0, 1, 2, 3]
    assert chosen_classes("owl, 1,tench, Tinca,0", CLASSES) == [3, 1, 0]
    assert chosen_classes("1", ["1", "0"]) == [0]  # a name before a number
    for wrong, hint in (("4", "expected 0 to 3"), ("red/fix", "did you mean red/fox")):
        with pytest.raises(ConfigError, match=f"no class '{wrong}'.*{hint}"):
            chosen_classes(f"0,{wrong}", CLASSES)


def test_file_names_are_safe():
    assert file_name(2, "../red fox\n\udcff" + 60 * "é", 11) == f"0002_..-red-fox-{29 * 'é'}_0011.png"


def test_the_grid_has_a_row_for_each_class():
    images = torch.zeros(2, 3, 3, 8, 8, dtype=torch.uint8)
    images[1, 2, 0] = 200
    grid = draw_grid(images, ["crab", 60 * "long "])
    found = np.asarray(grid)
    (rows, columns) = np.nonzero((found == (200, 0, 0)).all(-1))
    assert (rows.min(), rows.max() + 1) == (72, 136) and columns.max() + 1 - columns.min() == 64  # 8 times as large
    assert columns.max() + 1 + 4 == grid.width < 240 + 3 * 68 + 10
    names = found[:, : grid.width - 3 * 68].min(-1) < 100
    assert names[:72].any() and names[72:].any()
