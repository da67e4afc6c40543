"""python -m vitlocal.bench NAME …: the measurements, by name."""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Sequence

# As the trainer does: threads that wait must not spin. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vitlocal.bench import arms, clock, forecast, loader, paper, profile, redundancy, report, runs, step, write
from vitlocal.errors import ConfigError, run_command

BENCHES = {
    "arms": arms.main,
    "clock": clock.main,
    "forecast": forecast.main,
    "loader": loader.main,
    "paper": paper.main,
    "profile": profile.main,
    "redundancy": redundancy.main,
    "report": report.main,
    "runs": runs.main,
    "step": step.main,
    "write": write.main,
}


def main(argv: Sequence[str]) -> None:
    if argv and argv[0] in ("-h", "--help"):
        print("python -m vitlocal.bench NAME [--help]")
        for name, bench in BENCHES.items():
            print(f"  {name:10} {inspect.getmodule(bench).__doc__.partition(chr(10))[0]}")
        return
    if not argv or argv[0] not in BENCHES:
        raise ConfigError(f"expected the name of a bench ({', '.join(BENCHES)}), got {argv[0] if argv else 'none'}")
    BENCHES[argv[0]](argv[1:])


if __name__ == "__main__":
    sys.exit(run_command(main))
