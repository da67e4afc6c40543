"""The searches of a run in ``searches.jsonl``: one line for each probe, with its result and what was chosen by it.

The times in it can be replayed: another run then uses them instead of measuring, and chooses the same.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vitlocal.errors import ConfigError
from vitlocal.jsonl import append_line, read_lines, replacing
from vitlocal.methods.method import Probe
from vitlocal.plan import WHOLE_MODEL
from vitlocal.progress import Progress

SEARCHES = "searches.jsonl"


def probe_as_json(probe: Probe) -> dict[str, Any]:
    """The fields of a complete ``probe``, and those of its shape, that differ from their defaults."""
    found = _stated(replace(probe, shape=WHOLE_MODEL, sets=())) | {"shape": _stated(probe.shape)}
    return json.loads(json.dumps(found))  # tuples become lists


def _stated(values: Any) -> dict[str, Any]:
    pairs = [(field, getattr(values, field.name)) for field in fields(values)]
    return {field.name: value for field, value in pairs if value != field.default}


def is_search(line: dict[str, Any]) -> bool:
    """Whether an object is a line of ``searches.jsonl``."""
    return isinstance(line.get("probe"), dict) and "kind" in line["probe"] and "answer" in line


def result_as_json(value: float | Sequence[float]) -> Any:
    """Numbers with all their digits; infinity and NaN, which JSON lacks, as text."""
    if isinstance(value, Sequence):
        return [result_as_json(part) for part in value]
    return value if math.isfinite(value) else str(value)


class SearchLog:
    """The lines that this run has written, and the times that it replays.

    ``folder``: where the lines are written; None: nowhere (a rank other than 0, or a run without a folder).
    ``replay``: the folder of a run whose times are replayed. Raises ConfigError if it has none.
    """

    def __init__(self, folder: Path | None = None, replay: str | None = None):
        self.seconds = 0.0  # training time that all probes took
        self._path = None if folder is None else folder / SEARCHES
        self._lines = self._timed = 0  # results so far, and how many of them are times
        self._replay = None if replay is None else Path(replay) / SEARCHES
        lines = [] if self._replay is None else read_lines(self._replay, is_search)
        self._times = [line for line in lines if line["probe"]["kind"] == "seconds"]
        if self._replay is not None and not self._times:
            missing = f"no {SEARCHES}" if not self._replay.exists() else f"no time in its {SEARCHES}"
            raise ConfigError(
                f"run.replay_search: {replay} has {missing}; name the folder of a run of this recipe whose search "
                "measured times (searches by FLOPs measure none)"
            )

    def begin(self) -> None:
        """Drops the lines that were written after the checkpoint: these probes will run again."""
        if self._path is not None and self._path.exists():
            lines = self._path.read_bytes().splitlines(keepends=True)[: self._lines]  # damaged ones too
            with replacing(self._path, "wb") as file:
                file.writelines(line for line in lines if line.endswith(b"\n"))

    def replayed_seconds(self, probe: Probe) -> float | None:
        """The time that the other run measured for ``probe``; None without a replay. ConfigError if it has none."""
        if self._replay is None:
            return None
        wanted, number = probe_as_json(probe), self._timed + 1
        if number > len(self._times):
            raise ConfigError(
                f"run.replay_search: {self._replay} has {len(self._times)} times, and this run needs one more, for "
                f"{json.dumps(wanted)}; name the folder of a finished run of this recipe"
            )
        line = self._times[self._timed]
        if line["probe"] != wanted:
            raise ConfigError(
                f"run.replay_search: time {number} in {self._replay} is for {json.dumps(line['probe'])}, and this run "
                f"needs the time of {json.dumps(wanted)}. Name the folder of a run of this recipe. If it is one, "
                "another device rounded the losses or scores differently and chose differently: train without it"
            )
        return line["answer"]

    def record(self, at: Progress, method: str, probe: Probe, value: Any, chosen: Sequence[str] = ()) -> None:
        """Writes the result of ``probe`` and what ``method`` has ``chosen`` by it. Sums are not part of a search."""
        if probe.kind == "sum":
            return
        self._lines += 1
        self._timed += probe.kind == "seconds"
        if self._path is not None:
            line = {"epoch": round(at.epoch, 9), "step": at.step, "method": method, "probe": probe_as_json(probe)}
            line |= {"answer": result_as_json(value)} | ({"chosen": list(chosen)} if chosen else {})
            append_line(self._path, line)

    def state_dict(self) -> dict[str, float]:
        return {"lines": self._lines, "timed": self._timed, "seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._lines, self._timed, self.seconds = state["lines"], state["timed"], state["seconds"]
