"""Imports go one way: train → models, data → config → methods → options → plan → errors → nothing of ours."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEVELS = {
    "errors": 0,
    "machine": 0,
    "plan": 1,
    "options": 2,
    "methods": 3,
    "config": 4,
    "data": 5,
    "models": 5,
    "train": 6,
    "predict": 6,
    "bench": 7,
}


def room(module: str) -> str:
    return module.split(".")[1]


def test_imports_go_one_way():
    checked = 0
    for path in (ROOT / "vitlocal").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if module == "vitlocal.__init__":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                if not name.startswith("vitlocal.") or room(name) == room(module):
                    continue
                checked += 1
                assert LEVELS[room(name)] < LEVELS[room(module)], f"{module} imports {name}"
    assert checked > 30


def test_commands_stay_short():
    for name in ("write_dataset.py", "train_imagenet.py"):
        assert len((ROOT / name).read_text().splitlines()) <= 40
