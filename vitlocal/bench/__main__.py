"""python -m vitlocal.bench NAME: runs a bench. Only the module of that bench is imported."""

if __name__ == "__main__":
    from vitlocal.launch import bench

    bench()

import os
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

# Waiting threads must sleep, as in the trainer. PyTorch reads this variable when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vitlocal.errors import ConfigError, ends_at_once

BENCHES = (
    "arms", "augment", "card", "clock", "compiled", "forecast", "gpu", "kernel", "loader", "paper", "profile",
    "redundancy", "report", "runs", "sizes", "step", "traffic", "unfreeze", "write",
)  # fmt: skip


def main(argv: Sequence[str]) -> int | None:
    if argv and argv[0] in ("-h", "--help"):
        print("python -m vitlocal.bench NAME [--help]")
        for name in BENCHES:  # the first line of a bench's docstring, read without importing the bench
            lines = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8").splitlines()
            print(f"  {name:10}", lines[0].strip('"'))
        return None
    if not argv or argv[0] not in BENCHES:
        hint = "".join(f"; did you mean {name}?" for name in get_close_matches(" ".join(argv[:1]), BENCHES, n=1))
        found = argv[0] if argv else "none"
        raise ConfigError(f"expected the name of a bench ({', '.join(BENCHES)}), got {found}{hint}")
    with ends_at_once():
        module = import_module(f"vitlocal.bench.{argv[0]}")
    status: int | None = module.main(argv[1:])
    return status
