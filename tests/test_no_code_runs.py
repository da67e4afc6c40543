"""Nothing that is loaded can run code: a pickle that would leave a file is put under every name that is read."""

from __future__ import annotations

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vitlocal.config import Config
from vitlocal.errors import ConfigError, DataError
from vitlocal.predict import main as predict
from vitlocal.train.checkpoint import CHECKPOINT, PREVIOUS, save_checkpoint
from vitlocal.train.command import train

pytestmark = pytest.mark.usefixtures("no_report")

DIT = ["--model.name=vitlocal_dit_tiny_patch4_32", "--model.size=16", "--model.drop_path=0", "--methods=none"]


class Code:
    """Its pickle creates ``mark`` when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path: Path):
    """The file that code would leave. It must not be there afterwards."""
    path = tmp_path / "code has run"
    yield path
    assert not path.exists()


def test_the_pickle_runs_code_where_pickles_are_trusted(tmp_path: Path):
    torch.save({"a": Code(tmp_path / "mark")}, tmp_path / "file.pt")
    torch.load(tmp_path / "file.pt", weights_only=False)
    assert (tmp_path / "mark").exists()


def test_in_checkpoints(configure, decoder, mark: Path, tmp_path: Path):
    config: Config = configure("--budget.length=1ep")
    assert train(config) == 0
    torch.save(content := {"model": Code(mark)}, tmp_path / "run" / CHECKPOINT)
    save_checkpoint(tmp_path / "run" / PREVIOUS, content)  # even with a right checksum
    with pytest.raises(DataError, match="holds no checkpoint"):
        train(config)


@pytest.mark.parametrize("options", [[], DIT], ids=["ViT", "DiT"])
@pytest.mark.parametrize("name", ["weights.pt", "weights.bin", "weights.pth.tar", "model.safetensors", "folder"])
def test_in_initial_weights(configure, decoder, mark: Path, tmp_path: Path, options: list[str], name: str):
    path = tmp_path / name
    if name == "folder":
        (path / "transformer").mkdir(parents=True)
        for folder in (path, path / "transformer"):
            (folder / "config.json").write_text(json.dumps({"_class_name": "DiTTransformer2DModel"}))
            torch.save({"weights": Code(mark)}, folder / "diffusion_pytorch_model.bin")
            torch.save({"weights": Code(mark)}, folder / "model.safetensors")
    else:
        torch.save({"model": Code(mark), "state_dict": Code(mark)}, path)
    with pytest.raises(ConfigError, match=r"model\.weights: .* cannot be read as weights"):
        train(configure(*options, f"--model.weights={path}"))


@pytest.mark.skipif(find_spec("diffusers") is None, reason="needs the extra: vitlocal[diffusion]")
def test_in_an_autoencoder_and_in_features(mark: Path, tmp_path: Path):
    from vitlocal.data.autoencoder import Autoencoder
    from vitlocal.tasks.frechet import open_features

    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL"}))
    torch.save({"weights": Code(mark)}, tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(ConfigError, match="diffusion.vae"):
        Autoencoder.load(tmp_path / "vae")
    torch.save(Code(mark), tmp_path / "inception.pth")
    with pytest.raises(ConfigError, match="could run code"):
        open_features(tmp_path / "inception.pth", torch.device("cpu"))


def test_in_a_finished_run(configure, decoder, mark: Path, tmp_path: Path):
    assert train(configure("--budget.length=1ep")) == 0
    run, photo = tmp_path / "run", tmp_path / "photo.jpg"
    shutil.copy(Path(__file__).parent.parent / "docs" / "example.jpg", photo)
    torch.save(Code(mark), run / "model.safetensors")
    with pytest.raises((ConfigError, DataError)):
        predict(["--run", str(run), str(photo)])
    described = json.loads((run / "config.json").read_text())
    described["architecture"] = "__import__('pathlib').Path('mark').touch()"
    (run / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError):
        predict(["--run", str(run), str(photo)])
