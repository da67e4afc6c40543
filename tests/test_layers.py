"""The structure of the package: imports, names and sizes, as docs/design.md states them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Rooms from the bottom up: a file imports only from its own room and from rooms in lower lines.
ROOMS = (
    ("paths",),
    ("errors", "machine", "jsonl", "progress", "reading"),
    ("launch",),
    ("plan", "curriculum"),
    ("options", "schedule"),
    ("config_reader",),
    ("methods",),
    ("config", "write_options"),
    ("stored_config",),
    ("data", "models"),
    ("tasks",),
    ("report",),
    ("train",),
    ("predict", "sample", "storage", "write_labels"),
    ("export",),
    ("bench", "write_dataset"),
)
LEVELS = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}
# Files that may name training methods: the methods themselves, and what only reads or prints recipes.
MAY_NAME_METHODS = ("methods/", "bench/")
COMMON_WORDS = {"batch_size", "image_size", "strength"}  # also names of fields, columns and variables
MOST_PACKAGE_LINES = 31_900
MOST_LINES = 450
MOST_FIT_LINES = 45
MOST_MEMBERS = 20


@cache
def modules() -> dict[str, ast.Module]:
    """Every file of the package by its dotted name."""
    found = {}
    for path in sorted((ROOT / "vitlocal").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.Module) -> set[str]:
    """The files of the package that ``tree`` imports anywhere, also in functions and for type checking."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return {name for name in found if name in modules()}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def classes() -> list[tuple[str, ast.ClassDef]]:
    return [
        (name, node) for name, tree in modules().items() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)
    ]


def test_no_import_cycles():
    graph = {name: imports(tree) - {name, "vitlocal"} for name, tree in modules().items()}
    # A package's own file imports its modules to register them; that makes no cycle unless they import it by name.
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")
    assert len(graph) > 60


def test_rooms_import_downwards():
    checked = 0
    for name, tree in modules().items():
        for other in imports(tree) - {"vitlocal"}:
            if name == "vitlocal" or room(other) == room(name):
                continue
            checked += 1
            assert LEVELS[room(other)] < LEVELS[room(name)], f"{name} imports {other}"
    assert checked > 100


def test_only_builders_and_commands_read_a_configuration():
    """All other parts take plain values, so that a script can use them without a Config."""
    readers = {name for name, tree in modules().items() if "vitlocal.config" in imports(tree)}
    stems = ("build", "build_checks", "build_task", "command", "__main__")
    allowed = {f"vitlocal.{name}" for name in ("storage", "stored_config", "write_labels")}
    allowed |= {f"vitlocal.train.{stem}" for stem in stems}
    allowed |= {"vitlocal.report.page", "vitlocal.report.run_folder"}  # of finished runs
    assert {name for name in readers - allowed if room(name) != "bench"} == {"vitlocal.write_options"} & readers
    assert readers >= {"vitlocal.train.build", "vitlocal.train.build_task", "vitlocal.train.command"}


def test_a_class_name_has_one_meaning():
    places = defaultdict(list)
    for module, node in classes():
        places[node.name].append(module)
    assert {name: where for name, where in places.items() if len(where) > 1 and not name.startswith("_")} == {}


def test_the_core_names_no_method():
    from vitlocal.methods import METHODS

    names = re.compile(rf"\b({'|'.join([*METHODS, *(method.__name__ for method in METHODS.values())])})\b")
    found = []
    for path in (ROOT / "vitlocal").rglob("*.py"):
        relative = path.relative_to(ROOT / "vitlocal").as_posix()
        if relative.startswith(MAY_NAME_METHODS):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vitlocal.methods."):
                if node.module not in ("vitlocal.methods.method",):
                    found.append(f"{relative}:{node.lineno}: imports {node.module}")
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                for name in set(names.findall(node.value.replace("gc.unfreeze", ""))) - COMMON_WORDS:
                    found.append(f"{relative}:{node.lineno}: {name}")
            if isinstance(node, ast.Name) and names.fullmatch(node.id) and node.id[0].isupper():
                found.append(f"{relative}:{node.lineno}: {node.id}")
    assert found == []


def test_files_are_short():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in (ROOT / "vitlocal").rglob("*.py")}
    assert {str(path): lines for path, lines in lengths.items() if lines > MOST_LINES} == {}


def test_the_package_is_small():
    lines = sum(len(path.read_text().splitlines()) for kind in ("*.py", "*.c", "*.h")
                for path in (ROOT / "vitlocal").rglob(kind))  # fmt: skip
    assert lines <= MOST_PACKAGE_LINES


def members(node: ast.ClassDef) -> set[str]:
    """Public methods and attributes that a class defines."""
    found = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            if isinstance(part.value, ast.Name) and part.value.id == "self":
                found.add(part.attr)
    for part in node.body:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found.add(part.name)
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            found.add(part.target.id)
        elif isinstance(part, ast.Assign):
            found |= {target.id for target in part.targets if isinstance(target, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_classes_are_small():
    """Configuration aside: sections of options are lists of options."""
    large = {}
    for module, node in classes():
        options = node.name.endswith(("Config", "Options"))
        if not options and len(members(node)) > MOST_MEMBERS:
            large[f"{module}.{node.name}"] = len(members(node))
    assert large == {}


def test_fit_is_one_screen_and_the_design_prints_it():
    source = (ROOT / "vitlocal" / "train" / "loop.py").read_text()
    (fit,) = (node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == "fit")
    lines = source.splitlines()[fit.lineno - 1 : fit.end_lineno]
    assert len(lines) <= MOST_FIT_LINES
    design = (ROOT / "docs" / "design.md").read_text()
    assert "\n".join(f"    {line}".rstrip() for line in lines) in design


def test_commands_stay_short():
    for name in ("write_dataset.py", "train_imagenet.py"):
        assert len((ROOT / name).read_text().splitlines()) <= 40
