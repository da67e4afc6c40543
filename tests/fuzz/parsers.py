"""Mutates files of every kind that is read, and reads them: python tests/fuzz/parsers.py COUNT [SEED] [KIND ...]

Each is read or refused with a ConfigError, a DataError or an OSError. Any other error, a crash, a file that takes more
than SECONDS, or a process that needs more than 1 GiB beyond its start ends the program with a status that is not 0.
"""

from __future__ import annotations

import faulthandler
import gzip
import hashlib
import io
import json
import os
import random
import resource
import select
import signal
import sys
import tarfile
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import numpy as np
import pyarrow
import torch
from pyarrow import parquet
from safetensors.torch import save

from vitlocal.data import apart
from vitlocal.data.beton import MappedFile
from vitlocal.data.crops import CropPolicy
from vitlocal.data.images import SourceChoice, columns, open_images, solutions
from vitlocal.data.images.listing import LeftOut
from vitlocal.data.images.solutions import find_solution
from vitlocal.data.images.tar_index import read_index
from vitlocal.data.manifest import Manifest, manifest_of_file
from vitlocal.data.native import DecoderThreads, native_policy
from vitlocal.data.writer.indexed import write
from vitlocal.errors import ConfigError, DataError
from vitlocal.jsonl import count_damaged, read_lines
from vitlocal.models.factory import load_weights
from vitlocal.train.checkpoint import FORMAT, HEAD, MAGIC, TRAILER_BYTES, load_checkpoint, save_checkpoint

sys.path.append(str(Path(__file__).parent.parent))  # the folder of the tests
from fake_images import make_devkit

SECONDS, MOST_MEMORY = 20, 1 << 30
EDGES = (0, 1, 0x7F, 0x80, 0xFF)


def mutate(data: bytes, rng: random.Random, head: int) -> bytes:
    """A changed copy: bytes set, bits flipped, numbers of 4 and 8 bytes at an edge, runs moved or cut, the end cut off.

    Most changes fall into the first or the last ``head`` bytes, which are a small part of the file.
    """
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        if len(found) < 16:
            break
        at = rng.choice((rng.randrange(min(head, len(found))), len(found) - 1 - rng.randrange(min(head, len(found)))))
        at, run = rng.choice((at, at, rng.randrange(len(found)))), rng.randrange(1, 65)
        kind = rng.randrange(8)
        if kind == 0:
            found[at] = rng.randrange(256)
        elif kind == 1:
            found[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            found[at : at + 1] = bytes([rng.choice(EDGES)])
        elif kind == 3:
            size = rng.choice((2, 4, 8))
            number = rng.choice((0, 1, (1 << (8 * size - 1)) - 1, 1 << (8 * size - 1), (1 << (8 * size)) - 1, 1 << 33))
            found[at : at + size] = (number % (1 << (8 * size))).to_bytes(size, "little")
        elif kind == 4:
            other = rng.randrange(len(found))
            found[at : at + run] = found[other : other + run]
        elif kind == 5:
            del found[at : at + run]
        elif kind == 6:
            found[at:at] = found[at : at + run]
        elif rng.random() < 0.3:
            del found[at:]
    return bytes(found)


def repair_checksums(data: bytes) -> bytes:
    """A tar whose headers have their checksums, so that other fields are read."""
    found = bytearray(data)
    for start in range(0, len(found) - 511, 512):
        if found[start + 257 : start + 262] == b"ustar":
            total = 256 + sum(found[start : start + 148]) + sum(found[start + 156 : start + 512])
            found[start + 148 : start + 156] = b"%06o\0 " % total
    return bytes(found)


def sealed(content: bytes) -> bytes:
    """A checkpoint of ``content`` with a right checksum, so that PyTorch reads what was changed."""
    content += HEAD.pack(MAGIC, FORMAT, len(content))
    return content + hashlib.sha256(content).digest()


def seeds(folder: Path) -> dict[str, tuple[list[bytes], int]]:
    """For each parser, whole files, and how many bytes at their ends most changes fall into."""
    sample = open_images("sample:1", "train")
    rows = [(sample.read(k), k % 4, float(k), b"text", np.ones((2, 3), np.float32)) for k in range(12)]
    fields = {"number": "float", "text": "bytes", "array": ("float32", (2, 3))}
    write(rows, folder / "data", sides="48:raw,96:jpg", fields=fields, workers=1, progress=False)
    betons = [path.read_bytes() for path in sorted((folder / "data").glob("*.beton"))]
    tars = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
            for number, name in enumerate(("a.jpg", "é" * 40 + ".jpg", "x/" * 60 + "b.jpg")):
                member = tarfile.TarInfo(name)
                member.size = 700 * number
                tar.addfile(member, io.BytesIO(bytes(member.size)))
            link = tarfile.TarInfo("l.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "a.jpg"
            tar.addfile(link)
        tars.append(buffer.getvalue())
    make_devkit(folder)
    devkit = gzip.decompress((folder / "ILSVRC2012_devkit_t12.tar.gz").read_bytes())
    shards = []
    for packing in ("none", "zstd"):
        images = [{"bytes": row[0][:300], "path": f"{k}.jpg"} for k, row in enumerate(rows)]
        buffer = io.BytesIO()
        table = pyarrow.table({"image": images, "label": [row[1] for row in rows]})
        parquet.write_table(table, buffer, row_group_size=5, compression=packing)
        shards.append(buffer.getvalue())
    manifest = (folder / "data" / "train.json").read_bytes()
    weights = linear().state_dict()
    save_checkpoint(folder / "last.pt", {"model": weights, "step": 7, "keys": [1, 2.5, None, "name", {"a": (True,)}]})
    checkpoint = (folder / "last.pt").read_bytes()
    torch.save(weights, folder / "weights.pt")
    files = [(folder / "weights.pt").read_bytes(), save(weights, {"format": "pt"})]
    lines = b'{"kind": "train", "epoch": 1, "loss": 2.5}\n{"kind": "evaluate", "top1": 50.0}\n' * 20
    return {"beton": (betons, 5000), "tar": (tars, 9000), "devkit": ([devkit], 9000), "parquet": (shards, 2000),
            "manifest": ([manifest], 2000), "checkpoint": ([checkpoint], len(checkpoint)), "log": ([lines], 2000),
            "resealed": ([checkpoint[:-TRAILER_BYTES]], 3000), "weights": (files, 1500)}  # fmt: skip


def linear() -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(16, 8)


class Fork:
    """``read_apart`` with a process that is forked once and lives until it crashes."""

    def __init__(self) -> None:
        self.child = 0

    def __call__(self, function: Callable[[str], Any], items: Sequence[str]) -> list[Any]:
        if not self.child:
            (reads, write), (read, writes) = os.pipe(), os.pipe()
            self.child = os.fork()
            if not self.child:
                faulthandler.disable()
                for descriptor in (2, write, read):
                    os.close(descriptor)
                self.serve(reads, writes)
            os.close(reads)
            os.close(writes)
            self.write, self.read = os.fdopen(write, "w"), os.fdopen(read)
        results = []
        for item in items:
            self.write.write(json.dumps([function.__name__, item]) + "\n")
            self.write.flush()
            answers = select.select([self.read], [], [], SECONDS / 2)[0]  # a busy child is ended there too
            if not answers or not (line := self.read.readline()):
                self.close()
                raise apart.Crashed(len(results), "ended by a signal")
            results.append(json.loads(line))
        return results

    def close(self) -> None:
        if self.child:
            self.write.close()
            self.read.close()
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            self.child = 0

    @staticmethod
    def serve(reads: int, writes: int) -> NoReturn:
        apart.limit_resources(10**9)
        for line in os.fdopen(reads):
            name, item = json.loads(line)
            os.write(writes, (json.dumps(getattr(apart, name)(item)) + "\n").encode())
        os._exit(0)


def parsers(folder: Path) -> dict[str, Callable[[bytes], object]]:
    threads, crops = DecoderThreads(1), np.zeros((12, 16, 16, 3), np.uint8)
    (folder / "parquet").mkdir()
    (folder / "devkit").mkdir()

    def read_beton(data: bytes) -> None:
        path = folder / "train_48_raw.beton"
        path.write_bytes(data)
        file = MappedFile(path)
        manifest_of_file(path, "train")
        rows = np.arange(min(len(file.rows), 12))
        for name in file.fields:
            file.values(name, rows)
        if file.latent is None:
            threads.decode(file.bytes, file.rows, rows, native_policy(CropPolicy(True), 0), crops[: len(rows)])

    def read_tar(data: bytes) -> None:
        path = folder / "a.tar"
        path.write_bytes(repair_checksums(data))
        read_index(str(path), 0, None, str(path), LeftOut())

    def read_devkit(data: bytes) -> None:
        (folder / "devkit" / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(repair_checksums(data), 1))
        find_solution(folder / "devkit", folder / "devkit")

    def read_parquet(data: bytes) -> None:
        (folder / "parquet" / "train.parquet").write_bytes(data)
        images = open_images(str(folder / "parquet"), "train", SourceChoice())
        for row in range(min(len(images), 12)):
            images.read(row)

    def read_manifest(data: bytes) -> None:
        (folder / "train.json").write_bytes(data)
        Manifest.load(folder / "train.json")

    def read_checkpoint(data: bytes) -> None:
        (folder / "last.pt").write_bytes(data)
        load_checkpoint(folder / "last.pt")

    def read_weights(data: bytes) -> None:
        path = folder / ("a.pt" if data.startswith(b"PK") else "a.safetensors")
        path.write_bytes(data)
        load_weights(linear(), str(path))

    def read_records(data: bytes) -> None:
        (folder / "log.jsonl").write_bytes(data)
        read_lines(folder / "log.jsonl")
        if count := count_damaged(folder / "log.jsonl"):
            raise DataError(f"{count} damaged lines")

    return {"beton": read_beton, "tar": read_tar, "devkit": read_devkit, "parquet": read_parquet,
            "manifest": read_manifest, "checkpoint": read_checkpoint, "log": read_records,
            "resealed": lambda data: read_checkpoint(sealed(data)), "weights": read_weights}  # fmt: skip


def peak() -> int:
    return max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024


def late(*_: object) -> None:
    raise TimeoutError(f"more than {SECONDS} s")


def main(count: int, seed: int = 0, names: tuple[str, ...] = ()) -> int:
    """Reads ``count`` mutated files of each kind. Returns the number of kinds that failed."""
    failed = 0
    before = signal.signal(signal.SIGALRM, late)
    with (
        tempfile.TemporaryDirectory() as scratch, closing(Fork()) as fork, patch.object(columns, "read_apart", fork),
        patch.object(solutions, "read_apart", fork),
    ):  # fmt: skip
        folder = Path(scratch)
        found, read = seeds(folder), parsers(folder)
        start = peak()
        for name in names or tuple(found):
            for data in found[name][0]:
                read[name](data)  # what was not changed is read
            rng, outcomes = random.Random(f"{name} {seed}"), Counter[str]()
            for number in range(count):
                data = mutate(rng.choice(found[name][0]), rng, found[name][1])
                signal.setitimer(signal.ITIMER_REAL, SECONDS)
                try:
                    read[name](data)
                    outcomes["read"] += 1
                    assert name != "checkpoint" or data in found[name][0], "a changed checkpoint was believed"
                except (ConfigError, DataError) as error:
                    outcomes[type(error).__name__] += 1
                except Exception:
                    outcomes["FAILED"] += 1
                    kept = Path(tempfile.gettempdir()) / f"fuzz-{name}-{seed}-{number}"
                    kept.write_bytes(data)
                    print(f"{kept}:\n{traceback.format_exc()}", file=sys.stderr)
                signal.setitimer(signal.ITIMER_REAL, 0)
            grown = peak() - start
            failed += bool(outcomes["FAILED"]) or grown > MOST_MEMORY or outcomes["read"] == count
            print(
                f"{name}: {count} files: {dict(outcomes)}; {grown / 2**20:.0f} MiB more than at the start", flush=True
            )
    signal.signal(signal.SIGALRM, before)
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0, tuple(sys.argv[3:])))
