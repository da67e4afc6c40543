"""Runs the parts of a program one after the other, each in processes of its own with a time limit, and records them."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from vitlocal.bench.card import smi
from vitlocal.errors import DataError, interrupts
from vitlocal.jsonl import replacing

ROOT = Path(__file__).parent.parent.parent
WATCH_SECONDS = 5.0  # between two looks at the GPU's memory
GRACE_SECONDS = 5.0  # from SIGTERM to SIGKILL, and after it
UNFINISHED_SECONDS = 30.0  # age of compiled libraries that may be incomplete if a process was stopped


class TimedOut(DataError):
    """A part took longer than its limit."""


class Part:
    """One part while it runs. ``record`` is the content of its JSON file. ``ends``: a value of ``time.monotonic``."""

    def __init__(self, name: str, runner: "PartRunner", ends: float):
        self.name, self.ends, self.began = name, ends, time.monotonic()
        self.out, self.work, self._runner = runner.out, runner.work, runner
        self.record: dict[str, Any] = {"part": name, "status": "failed", "reason": "", "commands": [], "findings": []}
        self.log = self.out / f"{name}.txt"

    def start(self, *words: object, beside: str = "", stays: bool = False) -> subprocess.Popen[bytes]:
        """Starts Python in a process group of its own.

        ``beside``: it runs beside the part's work, with lower priority, and prints to the file of that name. If it
        ``stays``, it may run longer than the part.
        """
        command = [sys.executable, *map(str, words)]
        self.record["commands"].append(" ".join(["python", *command[1:]]))
        more = {"TORCHINDUCTOR_COMPILE_THREADS": "4"} if beside else {}  # of each: by default one for each core
        with open(self.out / f"{beside or self.name}.txt", "ab") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
                env=self._runner.environment | more,
            )  # fmt: skip
        if beside:
            os.setpriority(os.PRIO_PROCESS, process.pid, 10)
        (self._runner.background if stays else self._runner.running).append(process)
        return process

    def poll(self) -> None:
        """Waits for a moment. Raises TimedOut at the end of the part's time."""
        if time.monotonic() > self.ends:
            raise TimedOut("its time was up")
        self._runner.watch(self.record)
        time.sleep(0.05)

    def wait(self, process: subprocess.Popen[bytes], status: int = 0) -> None:
        """Waits for a process. Raises DataError, with what it printed last, unless it ends with ``status``."""
        while process.poll() is None:
            self.poll()
        if process.returncode != status:
            lines = self.printed().strip().splitlines() or ["nothing"]
            errors = [line for line in lines if re.match(r"(\w+\.)*\w*[Ee]rror: ", line)]
            raise DataError(f"exit status {process.returncode}: {(errors or lines)[-1]}; see {self.log}")

    def printed(self) -> str:
        """What its processes printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def bench(self, name: str, *words: object) -> Iterator[dict[str, Any]]:
        """Runs a bench; yields the rows of its JSON, which becomes part of the record. At the end, raises its error."""
        file, error = self.work / f"{self.name}.json", None
        try:
            self.wait(self.start("-m", "vitlocal.bench", name, *words, "--json", file))
        except DataError as caught:
            error = caught
        if file.exists():
            self.record |= json.loads(file.read_text(encoding="utf-8"))
        yield from self.record.get("rows", ())
        if error is not None:
            raise error

    def find(self, what: str, measured: float | None, estimate: float | None = None) -> None:
        """Adds a number to the table at the end, beside its estimate."""
        self.record["findings"].append({"part": self.name, "what": what, "measured": measured, "estimate": estimate})


PlannedPart = tuple[str, float, Callable[[Part], None]]  # name, share of the time, and work


class PartRunner:
    """Runs parts in ``minutes`` altogether. ``out`` gets PART.json, PART.txt (output), and summary.json (all parts).

    ``on_gpu``: records the most memory that is in use on the GPU. ``commit``: of a copy of the code without git.
    """

    def __init__(self, out: Path, minutes: float, on_gpu: bool, commit: str | None = None):
        self.out, self.work, self.minutes, self.commit = out, out / "work", minutes, commit
        self.records: list[dict[str, Any]] = []
        self.running: list[subprocess.Popen[bytes]] = []
        self.background: list[subprocess.Popen[bytes]] = []
        self._next_look = 0.0 if on_gpu else float("inf")
        cache, path = (self.work / "cache").absolute(), os.environ.get("PYTHONPATH")
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), *([path] if path else [])]), "PYTHONUNBUFFERED": "1",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"), "TRITON_CACHE_DIR": str(cache / "triton"),
        }  # fmt: skip

    def run(self, parts: Sequence[PlannedPart], goes_on: Callable[[], bool] = lambda: True) -> None:
        """Runs the parts, as long as ``goes_on()``. What a part leaves of its time is for the later ones."""
        self.work.mkdir(parents=True, exist_ok=True)
        ends, scale = time.monotonic(), 60 * self.minutes / sum(share for _, share, _ in parts)
        try:
            with interrupts():
                for name, share, work in parts:
                    ends += scale * share
                    self._run(name, work, ends)
                    if not goes_on():
                        break
        finally:
            self._stop(self.background)

    def _run(self, name: str, work: Callable[[Part], None], ends: float) -> None:
        """Runs one part, and writes its record, however it ends."""
        part = Part(name, self, ends)
        print(f"{name} ...", flush=True)
        try:
            work(part)
            part.record["status"] = "passed"
        except TimedOut as error:
            part.record |= {"status": "timed out", "reason": str(error)}
        except KeyboardInterrupt:
            part.record |= {"status": "interrupted", "reason": "by a signal"}
            raise
        except Exception as error:  # a fault of the part's own code must not stop the next part either
            part.record["reason"] = f"{type(error).__name__}: {error}"
        finally:
            self._stop(self.running)
            now = time.monotonic()
            part.record |= {"seconds": round(now - part.began, 1), "limit_seconds": round(ends - part.began, 1)}
            part.record["commit"] = part.record.get("commit") or self.commit
            self.records.append(part.record)
            for stem, content in ((name, part.record), ("summary", {"minutes": self.minutes, "parts": self.records})):
                with replacing(self.out / f"{stem}.json") as file:
                    file.write(json.dumps(content, indent=1) + "\n")
            print(f"  {part.record['status']}, {part.record['seconds']:.0f} s  {part.record['reason']}", flush=True)

    def watch(self, record: dict[str, Any]) -> None:
        """Records the memory in use on the GPU, now and then."""
        if time.monotonic() > self._next_look:
            self._next_look = time.monotonic() + WATCH_SECONDS
            used = smi("memory.used") or ""
            if used.isdecimal():
                record["gpu_peak_mib"] = max(int(used), record.get("gpu_peak_mib", 0))

    def _stop(self, processes: list[subprocess.Popen[bytes]]) -> None:
        """Ends process groups: with SIGTERM, and those that do not end in time with SIGKILL."""
        any_runs = any(process.poll() is None for process in processes)
        for process in processes:
            _signal(process, signal.SIGTERM)
        until = time.monotonic() + GRACE_SECONDS
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, until - time.monotonic()))
            _signal(process, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process in a hanging driver call cannot even be killed
                process.wait(GRACE_SECONDS)
        processes.clear()
        for path in (self.work / "cache").rglob("*.so") if any_runs else ():  # the linker may have been writing one
            if time.time() - path.stat().st_mtime < UNFINISHED_SECONDS:
                path.unlink()


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    with suppress(ProcessLookupError):  # its whole group has ended
        os.killpg(process.pid, number)
