"""Whether the other processes of a run are alive, by signs of life that they leave in a store of rank 0.

An exchange that takes long says nothing: rank 0 may rightly save or compile for minutes. So a thread of each process
leaves a sign every second, and looks for those of the others.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence

from torch.distributed import TCPStore

from vitlocal.errors import first_line
from vitlocal.machine import leave

PERIOD = 1.0  # seconds
LOST_SECONDS = 40.0  # without a sign of life; a library may keep Python's lock, and so the thread, for some of them
SILENT_SECONDS = 4.0  # the same after an error of a connection, which has another cause than a busy process
FAREWELL_SECONDS = 12.0  # until a process that has such an error must be named, and all have said what they know
RUNS, LEFT, FAILED = "runs", "left", "failed"
FIRST_SIGN = b"0 runs 0 -1"  # number, one of these states, a stop signal or 0, the rank that is lost or -1


class Heartbeats:
    """The signs of life of this process (``rank``) and of the others, whose ``places`` are a host and a process.

    If another process is lost, it ends this one with exit status 1 and a message, whatever the main thread waits for.
    ``saving``: a lock that the main thread holds while it writes a checkpoint, which gets some seconds more.
    """

    def __init__(self, store: TCPStore, rank: int, places: Sequence[str]):
        self._store, self._rank, self._places = store, rank, places
        self._state, self._signal, self._lost = RUNS, 0, -1
        self._heard_signal = 0
        now = time.monotonic()
        self._signs, self._heard_at = [FIRST_SIGN] * len(places), [now] * len(places)
        self._answered_at = now  # when the store last answered; minus infinity: its process is gone
        self._number, self._closing, self._lock = 0, threading.Event(), threading.Lock()
        self.saving = threading.Lock()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._watch)]
        for thread in self._threads:
            thread.start()

    def any_signal(self, mine: int) -> int:
        """A stop signal that this process (``mine``) or another one received; 0: none. The others hear of ``mine``."""
        self._signal = mine
        return mine or self._heard_signal

    def explain(self, error: BaseException) -> str:
        """What an error of a connection means. Waits until it is known which process is lost, if it is."""
        ends = time.monotonic() + FAREWELL_SECONDS
        while not (found := self._lost_rank(SILENT_SECONDS)) and time.monotonic() < ends:
            time.sleep(PERIOD / 4)
        return self._message(*(found or (-1, f"the connection failed: {first_line(error)}")))

    def fail(self) -> None:
        """Tells the others, within a second and without waiting, that this process is about to end with an error."""
        self._state = FAILED

    def close(self, failed: bool) -> None:
        """Tells the others that this process ends. Rank 0 waits for them, because its store ends with it."""
        self._state = FAILED if failed else LEFT
        self._closing.set()
        last = threading.Thread(target=self._leave_sign, daemon=True)  # the store may not answer
        last.start()
        last.join(SILENT_SECONDS)
        ends = time.monotonic() + FAREWELL_SECONDS
        while self._rank == 0 and not last.is_alive() and time.monotonic() < ends and not self._all_left():
            time.sleep(PERIOD / 20)

    # --- in threads ---

    def _beat(self) -> None:
        """Leaves the signs. It waits for the store; so another thread must watch."""
        while not self._closing.is_set():
            self._leave_sign()
            self._closing.wait(PERIOD)

    def _leave_sign(self) -> None:
        with self._lock:
            self._number += 1
            try:
                mine = f"{self._number} {self._state} {self._signal} {self._lost}"
                self._store.set(str(self._rank), mine)
                found = self._store.multi_get([str(rank) for rank in range(len(self._places))])
            except RuntimeError:  # rank 0 is gone
                self._answered_at = float("-inf")
                return
            self._answered_at = now = time.monotonic()
            for rank, sign in enumerate(found):
                if sign != self._signs[rank]:
                    self._signs[rank], self._heard_at[rank] = sign, now
            self._heard_signal = max(int(self._words(rank)[2]) for rank in range(len(found)))

    def _watch(self) -> None:
        looked_at = time.monotonic()
        while not self._closing.wait(PERIOD):
            now = time.monotonic()
            if now - looked_at > LOST_SECONDS / 4:  # this process itself did not run
                self._heard_at = [now] * len(self._places)
                self._answered_at = now if self._answered_at > 0 else self._answered_at
            looked_at = now
            if found := self._lost_rank(LOST_SECONDS):
                # If the other has said so itself, the main thread is about to say it too, unless it computes or saves.
                says = self._words(found[0])[1] == FAILED
                if not self._closing.wait(FAREWELL_SECONDS if says else 0):
                    self.saving.acquire(timeout=FAREWELL_SECONDS)
                    print(f"error: {self._message(*found)}", file=sys.stderr)
                    self.close(failed=True)
                    leave(1)

    # --- who is lost ---

    def _words(self, rank: int) -> list[str]:
        return self._signs[rank].decode().split()

    def _lost_rank(self, seconds: float) -> tuple[int, str] | None:
        """A rank that gave no sign of life for some ``seconds``, or that has failed, and what is known about it."""
        now, ranks = time.monotonic(), range(len(self._places))
        others = [rank for rank in ranks if rank != self._rank and self._words(rank)[1] != LEFT]
        if self._rank and now - self._answered_at > seconds and self._words(0)[1] == RUNS:
            return 0, "it has ended" if self._answered_at < 0 else silence(now - self._answered_at)
        for rank in others:
            if self._words(rank)[1] == RUNS and now - self._heard_at[rank] > seconds:
                return rank, silence(now - self._heard_at[rank])
        for rank in others:  # it may have lost another one
            if self._words(rank)[1] == FAILED:
                lost = int(self._words(rank)[3])
                return (lost, f"as rank {rank} says") if lost not in (-1, self._rank) else (rank, "it has ended")
        return None

    def _message(self, rank: int, what: str) -> str:
        self._lost = rank
        who = f"rank {rank} ({self._places[rank]})" if rank >= 0 else "the other processes"
        return (
            f"rank {self._rank} has lost {who}: {what}. The output of that process says why, unless it or its machine "
            "was killed or stopped. The same command continues from the last checkpoint"
        )

    def _all_left(self) -> bool:
        self._leave_sign()
        now, others = time.monotonic(), set(range(len(self._places))) - {self._rank, self._lost}
        return all(self._words(rank)[1] != RUNS or now - self._heard_at[rank] > SILENT_SECONDS for rank in others)


def silence(seconds: float) -> str:
    return f"no sign of life for {seconds:.0f} s"


def make_store(world: int) -> TCPStore:
    """The store of rank 0, on a free port. It has a sign of each of ``world`` processes."""
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    for rank in range(world):
        store.set(str(rank), FIRST_SIGN.decode())
    return store


def join_store(port: int) -> TCPStore:
    """The store that rank 0 made on ``port``."""
    return TCPStore(os.environ["MASTER_ADDR"], port, is_master=False, wait_for_workers=False)


def own_place() -> str:
    return f"{socket.gethostname()}, process {os.getpid()}"
