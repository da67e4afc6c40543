"""What searches asked and were told: ``searches.jsonl``, a line an answer; and times told again, as another run
measured them, so that its searches choose the same."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vitlocal.errors import ConfigError
from vitlocal.jsonl import append_line, read_lines, write_lines
from vitlocal.methods.method import Probe
from vitlocal.plan import WHOLE_MODEL
from vitlocal.progress import Progress

SEARCHES = "searches.jsonl"


def plain_probe(probe: Probe) -> dict[str, Any]:
    """What ``probe`` asks for, as JSON has it: what differs from an empty one, and of its shape from the whole model's.

    Of a probe that a run has put in place, so that nothing is left open.
    """
    asked = {
        field.name: getattr(probe, field.name)
        for field in fields(probe)
        if field.name not in ("shape", "sets", "value") and getattr(probe, field.name) != field.default
    }
    shape = {
        field.name: getattr(probe.shape, field.name)
        for field in fields(probe.shape)
        if getattr(probe.shape, field.name) != getattr(WHOLE_MODEL, field.name)
    }
    return json.loads(json.dumps({**asked, "shape": shape}))  # tuples as lists


def plain_answer(value: float | Sequence[float]) -> Any:
    """Numbers as JSON has them, to the last bit; infinity and not-a-number, which it has not, as text."""
    if isinstance(value, Sequence):
        return [plain_answer(part) for part in value]
    return value if math.isfinite(value) else str(value)


class Searches:
    """The answers in a run's folder, as many as the run knows of; and those that it is to be told again.

    ``replay``: the folder of a run whose times are told in the place of measured ones; ConfigError where it has none.
    """

    def __init__(self, folder: Path, replay: str | None = None, writes: bool = True):
        self.path, self.writes = folder / SEARCHES, writes  # of several processes, one does
        self.lines = self.timed = 0  # answers so far, and those among them that are times
        self.replay = None if replay is None else Path(replay) / SEARCHES
        self.times: list[dict[str, Any]] = []
        if self.replay is None:
            return
        self.times = [line for line in read_lines(self.replay) if line["probe"]["kind"] == "seconds"]
        if not self.times:
            missing = f"no {SEARCHES}" if not self.replay.exists() else f"no time in its {SEARCHES}"
            raise ConfigError(
                f"run.replay: {replay} has {missing}; name the folder of a run of this recipe, whose search measured "
                "times (searches by FLOPs, and runs without one, have nothing to tell again)"
            )

    def begin(self) -> None:
        """Drops what was written after the checkpoint that the run goes on from: it will be asked again."""
        if self.writes and self.path.exists():
            write_lines(self.path, read_lines(self.path)[: self.lines])

    def told(self, probe: Probe) -> float:
        """The seconds that the other run measured for ``probe``; ConfigError where it measured something else."""
        assert self.replay is not None
        asked, number = plain_probe(probe), self.timed + 1
        if number > len(self.times):
            raise ConfigError(
                f"run.replay: {self.replay} has {len(self.times)} times, and this run asks for one more, of "
                f"{json.dumps(asked)}; name the folder of a run of this recipe that came to its end"
            )
        line = self.times[self.timed]
        if line["probe"] != asked:
            raise ConfigError(
                f"run.replay: time {number} in {self.replay} is of {json.dumps(line['probe'])}, and this run asks for "
                f"that of {json.dumps(asked)}. Name the folder of a run of this recipe; if it is one, losses or "
                "scores, which are taken anew, were rounded otherwise on another device and chose otherwise: train "
                "anew without it"
            )
        return line["answer"]

    def record(self, at: Progress, method: str, probe: Probe, value: Any, chosen: Sequence[str] = ()) -> None:
        """Writes the answer to ``probe``, and what ``method`` has ``chosen`` by it. (Sums are no searches'.)"""
        if probe.kind == "sum":
            return
        self.lines += 1
        self.timed += probe.kind == "seconds"
        if self.writes:
            line = {"epoch": round(at.epoch, 9), "step": at.step, "method": method, "probe": plain_probe(probe)}
            line |= {"answer": plain_answer(value)} | ({"chosen": list(chosen)} if chosen else {})
            append_line(self.path, line)

    def state_dict(self) -> dict[str, int]:
        return {"lines": self.lines, "timed": self.timed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.lines, self.timed = state["lines"], state["timed"]
