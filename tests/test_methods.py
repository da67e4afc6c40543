"""The base class and the registry of training methods, and the example in CONTRIBUTING.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

from vitlocal.train.log import read_log

ROOT = Path(__file__).parent.parent


def test_the_example_in_contributing_is_a_method(folder: Path, tmp_path: Path):
    """File, line and recipe as they stand there, in a copy of the code, by the trainer's command."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    code, line = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (recipe,) = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(code.splitlines()) < 30 and len(line.splitlines()) == 1
    for name in ("vitlocal", "rcfg"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "train_imagenet.py", tmp_path)
    (tmp_path / "vitlocal" / "methods" / "joining.py").write_text(code)
    (tmp_path / "rcfg" / "joining.yaml").write_text(recipe)
    registry = tmp_path / "vitlocal" / "methods" / "__init__.py"
    lines = registry.read_text().splitlines(keepends=True)
    (place,) = (number for number, before in enumerate(lines) if before.startswith("MODULES ="))
    assert line.replace(', "joining"', "") == lines[place]
    registry.write_text("".join([*lines[:place], line, *lines[place + 1 :]]))
    command = re.search(r"#   python (.*)", recipe)[1].split()
    small = ["--model.width=32", "--model.heads=2", "--budget.length=8steps", "--train.batch_size=32",
             "--run.device=cpu", "--train.warmup=0ep", f"--data.root={folder}",
             f"--run.folder={tmp_path}/run"]  # fmt: skip
    done = subprocess.run([sys.executable, *command, *small], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    records = read_log(tmp_path / "run")
    assert [record["shape.block_order"] for record in records if "shape.block_order" in record] == [
        [0, 1],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]
    assert records[0]["macs_per_image"] < records[-1]["macs_per_image"]
