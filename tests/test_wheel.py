"""A wheel is complete: installed into an empty folder, its commands write, plan, train and predict.

VITLOCAL_WHEEL names a wheel, as `make wheel` does. Without it, one is built here, which needs a package index.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "vitlocal", "rcfg")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if "VITLOCAL_WHEEL" in os.environ:
        return Path(os.environ["VITLOCAL_WHEEL"]).absolute()
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:  # not the checkout, whose folder build/ may have files that were deleted since
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    pip("wheel", "--no-deps", "--wheel-dir", folder / "dist", folder)
    (built,) = (folder / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's files only."""
    folder = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--target", folder, wheel)
    return folder


def pip(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "pip", *map(str, words), "--quiet"], check=True)


def test_it_is_for_every_python_and_hides_its_libjpeg(wheel: Path, site: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    core = ctypes.CDLL(str(site / "vitlocal" / "data" / "native" / "_native.so"))
    assert core.vitlocal_box
    with pytest.raises(AttributeError):
        _ = core.jpeg_std_error


def test_its_commands_work_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    def run(name: str, *options: str, status: int = 0) -> str:
        done = subprocess.run(
            [site / "bin" / f"vitlocal-{name}", *options], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(site)},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == status, done.stderr
        return done.stdout + done.stderr

    sample = ["--source=sample:3", "--workers=1", "--out=data/sample", "--sides=48:raw"]
    limits = ["--rates=224:100", "--disk-limit=1GB", "--memory-limit=1GB", "--cores=1"]
    said = run("write", "--source=sample:3", "--out=data/plan", "--plan", *limits)  # for rcfg/ours.yaml
    assert "vitlocal-write --split train --source sample:3 --out data/plan" in said
    assert "Write it: vitlocal-write --split train" in run("train", "--config-file=demo.yaml", status=2)
    for split in ("train", "val"):
        run("write", *sample, f"--split={split}")
    small = ["--model.size=48", "--model.depth=1", "--model.width=32", "--model.heads=2", "--methods=none"]
    done = run("train", "--config-file=rcfg/demo.yaml", *small, "--budget.length=2steps", "--run.folder=runs/small")
    assert "done: top-1" in done
    assert run("predict", "--run=runs/small", str(ROOT / "docs" / "example.jpg")).count("%") == 5
    assert "forecast" in run("bench", "--help")
    assert "has none of these runs" in run("bench", "paper", "--no-run", status=2)
    arms = ["arms/best_64px.yaml", "--budget=1m", "--no-run"]
    assert "has none of these runs" in run("bench", "arms", *arms, status=2)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "runs"}
