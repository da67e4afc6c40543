"""python -m vitlocal.bench NAME: runs a bench. Only the module of that bench is imported."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

# Waiting threads must sleep, as in the trainer. PyTorch reads this variable when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vitlocal.errors import ConfigError, run_command

BENCHES = ("arms", "clock", "forecast", "loader", "paper", "profile", "redundancy", "report", "runs", "step", "write")


def summary_line(name: str) -> str:
    """The first line of a bench's docstring, read without importing the bench."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] in ("-h", "--help"):
        print("python -m vitlocal.bench NAME [--help]")
        print("\n".join(f"  {name:10} {summary_line(name)}" for name in BENCHES))
        return
    if not argv or argv[0] not in BENCHES:
        raise ConfigError(f"expected the name of a bench ({', '.join(BENCHES)}), got {argv[0] if argv else 'none'}")
    import_module(f"vitlocal.bench.{argv[0]}").main(argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
