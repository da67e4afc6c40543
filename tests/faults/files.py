"""Faults of files: damaged checkpoints and run folders, changed data, full disks."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from kinds import Bench, Result, difference, fault
from processes import kill, run

from vitlocal.errors import DataError
from vitlocal.train.__main__ import main as train
from vitlocal.train.checkpoint import CHECKPOINT, PREVIOUS, Checkpoints

BLOCK = 4096  # bytes


def with_flipped_bit(data: bytes, place: int, bit: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def damaged(data: bytes, chosen: random.Random) -> tuple[str, bytes]:
    """One kind of damage of a disk, a copy or a crash, by name, and the damaged bytes."""
    place = chosen.randrange(len(data))
    flipped = with_flipped_bit(data, place, chosen.randrange(8))
    other = chosen.randrange(0, len(data), BLOCK)
    kinds = {
        "one bit": flipped,
        "4 KiB of zeros": data[:place] + bytes(min(BLOCK, len(data) - place)) + data[place + BLOCK :],
        "a wrong block": data[:place] + data[other : other + len(data[place : place + BLOCK])] + data[place + BLOCK :],
        "cut short": data[:place],
        "zeros at the end": data[:place] + bytes(len(data) - place),
        "bytes at the end": data + chosen.randbytes(chosen.randrange(1, BLOCK)),
        "bytes lost": data[:place] + data[place + chosen.randrange(1, BLOCK) :],
    }
    return chosen.choice(list(kinds.items()))


def stopped_run(bench: Bench) -> Path:
    """A run that was killed after its second checkpoint."""
    folder, (_, seconds) = bench.fresh("stopped"), bench.whole()
    while not (folder / PREVIOUS).exists():
        run(train, bench.training(folder), bench.folder / "console", after=bench.moment(seconds), harm=kill())
    return folder


@fault
def damaged_checkpoints(bench: Bench, count: int) -> Iterator[Result]:
    """Each damaged ``last.pt`` must be refused by name, and the previous one used; without one, nothing is used."""
    folder = stopped_run(bench)
    last, previous = folder / CHECKPOINT, folder / PREVIOUS
    data, other = last.read_bytes(), previous.read_bytes()
    step = torch.load(previous, weights_only=True)["clock"]["step"]
    one, both = Result("damaged checkpoint, the previous one whole"), Result("both checkpoints damaged")
    for _ in range(count):
        kind, bad = damaged(data, bench.random)
        if bad == data:
            continue
        last.write_bytes(bad)
        checkpoints = Checkpoints(folder)
        try:
            content = checkpoints.load()
            right = content["clock"]["step"] == step and str(last) in "".join(checkpoints.notes)
            one.add(None if right else f"{kind}: believed")
        except Exception as error:
            one.add(f"{kind}: {error!r}")
        previous.write_bytes(damaged(other, bench.random)[1][:-1])
        before = last.read_bytes(), previous.read_bytes()
        try:
            checkpoints.load()
            both.add(f"{kind}: believed")
        except DataError:
            both.add(None if before == (last.read_bytes(), previous.read_bytes()) else "the files were changed")
        except Exception as error:
            both.add(f"{kind}: {error!r}")
        previous.write_bytes(other)
    yield one
    yield both


@fault
def damaged_folders(bench: Bench, count: int) -> Iterator[Result]:
    """A file of a stopped run is damaged, empty, nonsense or gone. The run ends as without it, or names the file."""
    stopped, (whole, _) = stopped_run(bench), bench.whole()
    names = sorted(
        str(path.relative_to(stopped)) for path in stopped.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts and path.name != ".lock"
    )  # fmt: skip
    changes: dict[str, Callable[[bytes], bytes | None]] = {
        "gone": lambda data: None, "empty": lambda data: b"", "half": lambda data: data[: len(data) // 2],
        "a number": lambda data: b"5\n", "a list": lambda data: b"[1, 2]\n", "an object": lambda data: b"{}\n",
        "not text": lambda data: b"\xff\xfe\x00" + data, "one bit": lambda data: damaged_bit(data, bench.random),
    }  # fmt: skip
    cases = [(name, change) for name in names for change in changes]
    bench.random.shuffle(cases)
    result = Result("damaged file of a run folder")
    for name, change in cases[: max(8, count // 10)]:
        folder = bench.fresh("run")
        shutil.copytree(stopped, folder)
        content = changes[change]((folder / name).read_bytes())
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content)
        outcome = run(train, bench.training(folder), bench.folder / "console")
        if outcome.failed_badly or outcome.status not in (0, 1, 2):
            problem: str | None = f"status {outcome.status}: {outcome.console[-300:]}"
        elif outcome.status:
            problem = None if Path(name).name in outcome.console else f"not named: {outcome.console[-300:]}"
        else:
            problem = difference(folder, whole, weights_only="log" in name)
        result.add(problem and f"{name} {change}: {problem}")
    yield result


def damaged_bit(data: bytes, chosen: random.Random) -> bytes:
    data = data or b"\0"
    return with_flipped_bit(data, chosen.randrange(len(data)), chosen.randrange(8))


def cut_file(path: Path, size: int, process: int) -> None:
    """A harm, see :data:`processes.Harm`."""
    os.truncate(path, size)


@fault
def other_data(bench: Bench, count: int) -> Iterator[Result]:
    """A .beton file changes while a run is stopped, or under it. The run must refuse it, or end, by its name."""
    stopped, (whole, seconds) = stopped_run(bench), bench.whole()
    before, under = Result("other pixels in a .beton, then resumed"), Result(".beton cut under a run")
    for _ in range(max(1, count // 100)):
        data, folder = bench.fresh("changed"), bench.fresh("run")
        shutil.copytree(bench.data, data)
        shutil.copytree(stopped, folder)
        name = bench.random.choice(["train_48_raw.beton", "train_96_raw.beton"])
        content = (data / name).read_bytes()
        half = len(content) // 2
        (data / name).write_bytes(content[:half] + bytes(255 - byte for byte in content[half:]))
        options: dict[str, Any] = {"data.root": data}
        outcome = run(train, bench.training(folder, **options), bench.folder / "console")
        named = name in outcome.console and outcome.status in (1, 2) and not outcome.failed_badly
        before.add(None if named else f"status {outcome.status}: {outcome.console[-300:]}")

        (data / name).write_bytes(content)
        cut = partial(cut_file, data / name, half)
        outcome = run(
            train, bench.training(bench.fresh("run"), **options), bench.folder / "console",
            after=bench.moment(seconds), harm=cut,
        )  # fmt: skip
        right = outcome.status == 0 or (name in outcome.console and outcome.status in (1, 2))
        problem = None if right and not outcome.failed_badly else f"status {outcome.status}: {outcome.console[-300:]}"
        if problem is None and outcome.status:  # the file is restored, and the run continues
            (data / name).write_bytes(content)
            last = run(train, bench.training(bench.folder / "run", **options), bench.folder / "console")
            problem = f"status {last.status}: {last.console[-300:]}" if last.status else None
            problem = problem or difference(bench.folder / "run", whole)
        under.add(problem)
    yield before
    yield under


@fault
def divergence(bench: Bench, count: int) -> Iterator[Result]:
    """Rates that no training survives. The status is 1, nothing is exported, and the checkpoint is finite."""
    result = Result("divergence")
    for _ in range(max(1, count // 50)):
        rate = 10 ** bench.random.uniform(6, 38)
        options: dict[str, Any] = {
            "train.lr": rate, "train.warmup": "0ep", "budget.length": f"{bench.random.choice([1, 2, 5, 16])}steps",
            "train.schedule": bench.random.choice(["constant", "cosine"]),
            "train.ema_decay": bench.random.choice(["none", 0.9]), "run.save_every": "1steps",
            "run.on_nan": bench.random.choice(["stop", "rewind"]), "train.clip_norm": "none",
        }  # fmt: skip
        folder = bench.fresh("run")
        outcome = run(train, bench.training(folder, **options), bench.folder / "console")
        problem = None
        if outcome.failed_badly or outcome.status not in (0, 1):
            problem = f"status {outcome.status}: {outcome.console[-300:]}"
        elif outcome.status == 0:
            problem = None if finite_export(folder) else "a success with weights that are not finite"
        elif (folder / "model.safetensors").exists():
            problem = "status 1, but weights were exported"
        if problem is None and (folder / CHECKPOINT).exists():
            model = Checkpoints(folder).load()["model"]
            problem = None if all(tensor.isfinite().all() for tensor in model.values()) else "a checkpoint with NaN"
        result.add(problem and f"lr {rate:.2g}: {problem}")
    yield result


def finite_export(folder: Path) -> bool:
    from safetensors.torch import load_file

    return all(bool(tensor.isfinite().all()) for tensor in load_file(folder / "model.safetensors").values())
