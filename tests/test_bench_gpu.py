"""The program for the first minutes on a GPU: its parts, their limits and records, its data, and the whole on a CPU."""

from __future__ import annotations

import io
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from compilers import needs_cxx
from PIL import Image

from vitlocal.bench import card, compiled, gpu, gpu_data, kernel
from vitlocal.bench.__main__ import main
from vitlocal.bench.parts import Part
from vitlocal.data.images import open_images
from vitlocal.errors import ConfigError, DataError, run_command

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@needs_cxx
def test_the_whole_program_on_a_cpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vitlocal.bench", "gpu", "--cpu", "--minutes=30", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = {part["part"]: part for part in json.loads((tmp_path / "summary.json").read_text())["parts"]}
    names = ["card", "compiled", "kernel", "step_32", "step_16", "profile", "train", "resume", "tests"]
    assert list(parts) == names and all(part["status"] == "passed" for part in parts.values())
    for name, part in parts.items():
        assert json.loads((tmp_path / f"{name}.json").read_text()) == part and part["commands"] and part["findings"]
    assert [row["size"] for row in parts["train"]["rows"]] == [16, 32]
    assert parts["train"]["machine"] == parts["card"]["machine"] and parts["train"]["photos"]["count"] > 0
    assert parts["resume"]["stopped_at_step"] == parts["resume"]["continued_at_step"]
    assert parts["kernel"]["rows"][0]["fused_error"] < 1e-6  # a table for local_mix
    assert "step_32" in done.stdout and "waiting for data" in done.stdout


# --- the machinery ----------------------------------------------------------------------------------------------------


def passes(part: Part) -> None:
    part.wait(part.start("-c", "print('fine')"))
    part.find("answer", 42.0, 41.0)


def fails(part: Part) -> None:
    part.wait(part.start("-c", "print('working'); raise ValueError('no luck')"))


HANGING = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)  # " + sys.argv[1]])
time.sleep(600)
"""


def hangs(part: Part) -> None:
    part.wait(part.start("-c", HANGING, part.out))


def signalled(part: Part) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    part.wait(part.start("-c", HANGING, part.out))


def parts_of(monkeypatch: pytest.MonkeyPatch, *parts, shares: Sequence[float] = (1, 1, 1)) -> None:
    plan = [(part.__name__, share, part) for part, share in zip(parts, shares, strict=True)]
    monkeypatch.setattr(gpu.GpuParts, "plan", lambda self: plan)
    monkeypatch.setattr("vitlocal.bench.parts.GRACE_SECONDS", 1.0)


def is_running(text: str) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if text.encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_a_part_that_fails_or_hangs_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts_of(monkeypatch, hangs, fails, passes, shares=(2, 60, 60))  # seconds
    out = tmp_path / "results"
    assert run_command(main, ["gpu", "--cpu", f"--minutes={122 / 60}", f"--out={out}"]) == 1
    records = json.loads((out / "summary.json").read_text())["parts"]
    assert [record["status"] for record in records] == ["timed out", "failed", "passed"]
    assert "ValueError: no luck" in records[1]["reason"] and "working" in (out / "fails.txt").read_text()
    assert json.loads((out / "passes.json").read_text())["findings"] == [
        {"part": "passes", "what": "answer", "measured": 42.0, "estimate": 41.0}
    ]
    assert not is_running(str(out))  # nor does a child of the part that hung
    shown = capsys.readouterr().out
    assert "42.00" in shown and "its time was up" in shown
    with pytest.raises(ConfigError, match="has results"):
        main(["gpu", "--cpu", f"--out={out}"])


def test_a_signal_ends_it_with_what_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts_of(monkeypatch, passes, signalled, fails)
    assert run_command(main, ["gpu", "--cpu", "--minutes=5", f"--out={tmp_path}"]) == 143
    records = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert [record["status"] for record in records] == ["passed", "interrupted"] and not is_running(str(tmp_path))


def test_time_that_a_part_leaves_is_for_later_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts_of(monkeypatch, passes, passes, passes)
    began = time.monotonic()
    assert main(["gpu", "--cpu", "--minutes=5", f"--out={tmp_path}"]) == 0
    limits = [part["limit_seconds"] for part in json.loads((tmp_path / "summary.json").read_text())["parts"]]
    assert limits[0] == pytest.approx(100, abs=1) and limits[2] > 250 and time.monotonic() - began < 60


@pytest.mark.parametrize(("described", "parts"), [({"gpu": "A"}, 2), ({}, 1), (None, 2)])
def test_without_a_gpu_it_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, described: dict | None, parts: int
) -> None:
    def bench(part: Part, *words: str):
        part.record |= {"machine": {}, "versions": {}}
        yield from [] if described is None else [described]  # None: the card was not described in time

    monkeypatch.setattr(Part, "bench", bench)
    monkeypatch.setattr(Part, "start", lambda *words, **how: None)
    runs = gpu.GpuParts(gpu.GPU)
    monkeypatch.setattr(gpu, "GpuParts", lambda scale: runs)
    runs.plan = lambda: [("card", 1.0, runs.card), ("passes", 1.0, lambda part: None)]
    assert main(["gpu", "--minutes=1", f"--out={tmp_path}"]) == int(described == {})
    records = json.loads((tmp_path / "summary.json").read_text())["parts"]
    assert len(records) == parts and ("no GPU was found" in records[0]["reason"]) == (described == {})


def test_stages_of_a_log() -> None:
    fields = ("epoch", "image_size", "train_seconds", "images_seen", "data_wait_fraction", "step_mode")
    passes = (1, 32, 2.0, 100, 0.1, "graph"), (2, 32, 3.0, 200, 0.4, "graph"), (3, 64, 7.0, 280, 0.0, "eager")
    log = [dict(zip(fields, values, strict=True)) for values in passes]
    small, large = gpu.stages(log)
    assert (small["size"], small["images_per_second"], small["data_wait_percent"]) == (32, 66.7, 20.0)
    assert (large["size"], large["images_per_second"], large["mode"]) == (64, 20.0, "eager")


# --- its benches ------------------------------------------------------------------------------------------------------

GOOD = {
    "size": 32, "mode": "compiled, as a CUDA graph", "cudagraph_skips": 0, "graph_launches": 2.0,
    "eager_loss_error": 1e-4, "compiled_loss_error": 1e-4,
    "eager_gradient_error": 3e-3, "compiled_gradient_error": 4e-3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({}, None),
        ({"compiled_gradient_error": 1e-2}, "gradient is 1.0e-02 off, the eager one's 3.0e-03"),
        ({"compiled_loss_error": math.nan}, "loss is nan off"),
        ({"cudagraph_skips": 3}, "3 graphs were not captured"),
        ({"graph_launches": 0}, "no CUDA graph was launched"),
        ({"graph_launches": 0, "mode": "compiled"}, None),
    ],
)
def test_what_is_wrong_with_a_compiled_step(change: dict, problem: str | None) -> None:
    found = compiled.problems(GOOD | change)
    assert not found if problem is None else problem in found[0]


def test_a_wrong_kernel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"side": 2, "fused_ms": 1.0, "plain_ms": 2.0, "plain_error": 1e-3}
    out = tmp_path / "kernel.json"
    for error, status in ((1e-3, 0), (1e-2, 1), (math.nan, 1)):
        monkeypatch.setattr(kernel, "compare", lambda *rest, error=error: row | {"fused_error": error})
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert run_command(main, ["kernel", "--device=cpu", "--sides=2", "--json", str(out)]) == status
        assert json.loads(out.read_text())["rows"][0]["side"] == 2


def test_the_card_names_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(card, "compile_something", lambda device: 1.0)
    monkeypatch.setitem(card.USEFUL, "not_there_either", "useful-package")
    assert run_command(main, ["card", "--device=cpu"]) == 0
    assert "useful-package   cannot be imported (ModuleNotFoundError" in capsys.readouterr().out
    monkeypatch.setitem(card.NEEDED, "not_there", "some-package")
    assert run_command(main, ["card", "--device=cpu", f"--json={tmp_path}/card.json"]) == 1
    assert "some-package: cannot be imported" in capsys.readouterr().err
    written = json.loads((tmp_path / "card.json").read_text())
    assert written["rows"][0]["torch"][0] == "2" and len(written["problems"]) == 1


def test_a_gpu_without_a_c_compiler_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(card, "can_compile_kernels", lambda: False)
    with pytest.raises(DataError, match="no C compiler with Python's headers: install gcc"):
        card.compile_something("cuda")


# --- its data ---------------------------------------------------------------------------------------------------------


def a_photo(side: int) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((side, side), 90).convert("RGB").save(buffer, "JPEG", quality=95)
    return buffer.getvalue()


def size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def test_photos_that_fit_stay_as_they_are(tmp_path: Path) -> None:
    photo = a_photo(40)
    (tmp_path / "mine" / "cats").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "mine" / "cats" / f"{number}.JPG").write_bytes(photo)
    with tarfile.open(tmp_path / "mine.tar", "w") as archive:
        archive.add(tmp_path / "mine")
    for source in ("mine", "mine.tar"):
        about = gpu_data.save_photos(tmp_path / f"out-{source}", str(tmp_path / source))
        assert about == {"photos": "the user's photos", "count": 3, "quality": None, "bytes": 3 * len(photo)}
        assert {path.read_bytes() for path in (tmp_path / f"out-{source}").glob("*.jpg")} == {photo}


def test_large_photos_shrink(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "large.jpg").write_bytes(a_photo(700))
    monkeypatch.setattr(gpu_data, "MOST_BYTES", 100_000)
    about = gpu_data.save_photos(tmp_path / "out", str(tmp_path / "mine"))
    assert about["quality"] in gpu_data.QUALITIES and about["bytes"] <= 100_000
    assert size_of(tmp_path / "out" / "0000.jpg") == (500, 500)
    monkeypatch.setattr(gpu_data, "MOST_BYTES", 1000)
    with pytest.raises(ConfigError, match="1 photos take more than 0 MiB at quality 30"):
        gpu_data.save_photos(tmp_path / "other", str(tmp_path / "mine"))


def test_no_photos_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("none")
    for source, message in (
        ("", "found none"),
        ("notes.txt", "neither a folder nor a tar"),
        ("no", "neither a folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            gpu_data.save_photos(tmp_path / "out", str(tmp_path / source))
    with pytest.raises(ConfigError, match="expected:"):
        gpu_data.main(["phtos"])


@pytest.mark.parametrize("links", [True, False])
def test_the_data_have_each_photo_many_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:  # another file system

        def refused(*paths: object) -> None:
            raise OSError("cross-device link")

        monkeypatch.setattr(os, "link", refused)
    monkeypatch.setattr(gpu_data, "COUNT", 3)
    gpu_data.main(["files", str(tmp_path), str(tmp_path / "sample"), "60", "20", "16:raw"])
    assert len(list((tmp_path / "sample").glob("*.jpg"))) == 3
    assert max(size_of(tmp_path / "sample" / "0000.jpg")) == gpu_data.LONG_EDGE
    images = open_images(str(tmp_path / "photos"), "train")
    assert len(images) == 60 and len(images.classes) == gpu_data.CLASSES
    assert {path.name for path in (tmp_path / "data").glob("*.beton")} == {"train_16_raw.beton", "val_16_raw.beton"}
