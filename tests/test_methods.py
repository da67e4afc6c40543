"""The base class and the registry of training methods, and the example in CONTRIBUTING.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vitlocal.config import read_config
from vitlocal.methods import CLASSES, METHODS, build_methods
from vitlocal.methods.method import Method, MethodContext
from vitlocal.report.run_folder import read_log

ROOT = Path(__file__).parent.parent


def test_methods_have_the_name_of_their_line_and_file():
    for name, method in METHODS.items():
        assert (method.name, method.__name__) == (name, CLASSES[name])
        assert method.__module__ == f"vitlocal.methods.{name}"


def test_methods_add_no_public_members():
    """The trainer knows methods by the base class alone."""
    public = {name for name in dir(Method) if not name.startswith("_")} | {"name", "options"}
    assert len(public) <= 20
    for method in METHODS.values():
        assert {name for name in dir(method) if not name.startswith("_")} <= public


@pytest.mark.parametrize(
    ("writing", "names"), [("dials.", ["strength", "batch_size"]), ("feed.batch_size", ["batch_size"])]
)
def test_methods_can_be_built_for_some_fields_without_a_model(writing: str, names: list[str]):
    """A method that needs a model, such as budgeted, is not built."""
    options = ["--methods=image_size,strength,budgeted,batch_size", "--budgeted.grow=heads", "--augment.mixup=1"]
    context = MethodContext(read_config(options, {}).recipe)
    assert [method.name for method in build_methods(context, writing)] == names


def test_the_example_in_contributing_is_a_method(folder: Path, tmp_path: Path):
    """The file, the line and the recipe of CONTRIBUTING.md, in a copy of the code, with the trainer's command."""
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
    start = lines.index("CLASSES = {\n")
    end = lines.index("}\n", start)
    registry.write_text("".join([*lines[:end], line, *lines[end:]]))
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
