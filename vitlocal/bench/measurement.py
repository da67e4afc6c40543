"""The form of every measurement: ``what``, ``command``, ``machine``, ``versions``, ``commit`` and ``rows``."""

from __future__ import annotations

import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from vitlocal.machine import cores

LIBRARIES = ("torch", "torchvision", "timm", "ffcv", "numba", "numpy", "opencv-python", "pillow")
EXTRAS = ("nvidia-dali-cuda120",)


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU of this machine."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) for line in _lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": cores(),
        "memory_gib": round(memory / 2**20, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": ", ".join([platform.system(), *([" ".join(libc)] if (libc := platform.libc_ver())[0] else [])]),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def versions() -> dict[str, str]:
    there = {distribution.name for distribution in metadata.distributions()}
    names = (*LIBRARIES, *(name for name in EXTRAS if name in there))
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}


def commit() -> str | None:
    """The commit of this code, ``-dirty`` where files differ from it; None outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def measurement(what: str, rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The object that a bench's ``--json`` writes; ``rows`` are flat."""
    module = Path(sys.argv[0]).parent.name == "bench"
    command = ["python", *(["-m", "vitlocal.bench"] if module else [Path(sys.argv[0]).name]), *sys.argv[1:]]
    return {
        "what": what,
        "command": shlex.join(command),
        **more,
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "rows": list(rows),
    }


def write_json(path: str, measured: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
