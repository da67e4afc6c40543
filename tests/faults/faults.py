"""Injects faults into runs of seconds, and reports what was lost: make faults [COUNT=1000] [SEED=0]

The exit status is 1 if anything was lost. Libraries are loaded once; each command is a forked process.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))  # the folder of the tests

import files  # noqa: F401  registers its faults, as hosts does
import hosts  # noqa: F401
import pytest
import torch
from counted_once import count_once
from kinds import FAULTS, Bench, Result

import vitlocal.train.command  # noqa: F401  loads what the commands need
from vitlocal.bench.measurement import text_table, write_json
from vitlocal.train.probes import Prober

COLUMNS = {
    "fault": ("fault", ""), "injected": ("injected", "d"), "survived": ("survived", "d"), "lost": ("lost", "d")
}  # fmt: skip


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="kills of training; the others are in proportion")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"kinds, separated by commas: {', '.join(FAULTS)}")
    parser.add_argument("--json", type=Path, help="write the table to this file")
    options = parser.parse_args(argv)
    count_once(pytest.MonkeyPatch().setattr)
    torch.set_num_threads(1)  # threads do not survive a fork
    # Searches measure times, which no two runs have in common. These follow from the candidate.
    Prober._seconds = lambda prober, probe, plan: 1e-9 * prober._macs(probe.size, probe.shape)
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        bench, began = Bench(Path(folder), options.seed), time.monotonic()
        for name in options.only.split(",") if options.only else FAULTS:
            for result in FAULTS[name](bench, options.count):
                results.append(result)
                lost = f"LOST {len(result.lost)}: {result.lost[0]}" if result.lost else "nothing lost"
                passed = time.monotonic() - began
                print(f"{passed:6.0f} s  {result.kind}: {result.injected} injected, {lost}", flush=True)
    rows = [
        {
            "fault": each.kind,
            "injected": each.injected,
            "survived": each.survived,
            "lost": each.injected - each.survived,
        }
        for each in results
    ]
    print(text_table(rows, COLUMNS))
    print("\n".join(f"LOST: {each.kind}: {text}" for each in results for text in each.lost))
    if options.json:
        write_json(options.json, "faults injected into short runs, and what was lost", rows, seed=options.seed)
    return 1 if any(result.lost for result in results) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
