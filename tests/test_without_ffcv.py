"""vitlocal without the extra ffcv: it writes, trains and predicts, and what needs FFCV says so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKED = "import sys; sys.modules |= dict.fromkeys(('ffcv', 'numba', 'cv2')); "  # None: importing it is an error


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_it_writes_trains_and_predicts(tmp_path: Path) -> None:
    for split in ("train", "val"):
        options = ["--source=sample:3", f"--split={split}", "--sides=32:raw,48:jpg", f"--out={tmp_path}/data"]
        written = run("from vitlocal.write_dataset import run; sys.exit(run())", *options, "--workers=1")
        assert written.returncode == 0, written.stderr
    options = ["--model.name=vitlocal_tiny_patch8_64", "--model.size=32", "--model.depth=1", "--model.width=32",
               "--model.heads=2", "--train.batch_size=20", "--budget.length=1ep", "--run.device=cpu",
               f"--data.root={tmp_path}/data", f"--run.folder={tmp_path}/run"]  # fmt: skip
    trained = run("from vitlocal.train.__main__ import run; run()", *options)
    assert trained.returncode == 0 and "done: top-1" in trained.stdout, trained.stderr
    assert "Warning" not in trained.stderr
    photo = ROOT / "docs" / "example.jpg"
    predicted = run("from vitlocal.predict import run; sys.exit(run())", f"--run={tmp_path}/run", photo)
    assert predicted.returncode == 0 and predicted.stdout.count("%") == 5, predicted.stderr


@pytest.mark.parametrize(
    "code",
    [
        "import vitlocal.data.peers.ffcv",
        "import vitlocal; vitlocal.CropDecoder",
        "from vitlocal.bench.write import ffcv; ffcv(None, '32', 1, '.')",
    ],
)
def test_what_needs_ffcv_names_the_extra(code: str) -> None:
    done = run(f"from vitlocal.errors import run_command\ndef main(argv):\n    {code}\nsys.exit(run_command(main))")
    assert done.returncode == 2 and 'pip install "vitlocal[ffcv]"' in done.stderr, done.stderr
