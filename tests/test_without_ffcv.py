"""vitlocal without the extra ffcv: it writes, trains and predicts, and what needs FFCV says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BLOCKED = "import sys; sys.modules |= dict.fromkeys(('ffcv', 'numba', 'cv2')); "  # None: importing it is an error


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", BLOCKED + code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


# The commands in one process, because importing PyTorch takes seconds: its arguments are theirs, as JSON.
ALL = """
import json
from vitlocal.errors import run_command
from vitlocal import predict, write_dataset
from vitlocal.train import __main__ as train

commands = {"write": write_dataset.main, "train": train.main, "predict": predict.main}
for name, words in json.loads(sys.argv[1]):
    if status := run_command(commands[name], words):
        sys.exit(f"{name}: exit status {status}")
"""


def test_it_writes_trains_and_predicts(tmp_path: Path) -> None:
    writes = [
        ["--source=sample:3", f"--split={split}", "--sides=32:raw,48:jpg", f"--out={tmp_path}/data", "--workers=1"]
        for split in ("train", "val")
    ]
    options = ["--model.name=vitlocal_tiny_patch8_64", "--model.size=32", "--model.depth=1", "--model.width=32",
               "--model.heads=2", "--train.batch_size=20", "--budget.length=1ep", "--run.device=cpu",
               f"--data.root={tmp_path}/data", f"--run.folder={tmp_path}/run"]  # fmt: skip
    photo = str(ROOT / "docs" / "example.jpg")
    commands = [
        *(("write", words) for words in writes),
        ("train", options),
        ("predict", [f"--run={tmp_path}/run", photo]),
    ]
    done = run(ALL, json.dumps(commands))
    assert done.returncode == 0, done.stderr
    _, predicted = done.stdout.split("done: top-1")
    assert "Warning" not in done.stderr
    assert predicted.partition("\n")[2].count("%") == 5, predicted


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
