"""The form of every measurement: ``what``, ``command``, ``machine``, ``versions``, ``commit`` and ``rows``."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vitlocal.machine import commit, hardware, versions


def measurement(what: str, rows: Sequence[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """The object that a bench's ``--json`` writes; ``rows`` are flat."""
    module = Path(sys.argv[0]).parent.name == "bench"
    command = ["python", *(["-m", "vitlocal.bench"] if module else [Path(sys.argv[0]).name]), *sys.argv[1:]]
    return {
        "what": what,
        "command": shlex.join(command),
        **more,
        "machine": hardware(),
        "versions": versions(),
        "commit": commit(),
        "rows": list(rows),
    }


def write_json(path: str, measured: dict[str, Any]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
