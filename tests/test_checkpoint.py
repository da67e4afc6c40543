"""Checkpoints: damaged, foreign and cut files, the previous one, full disks, and contents of another run."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from trainers import open_trainer

from vitlocal import jsonl
from vitlocal.errors import DataError, run_command
from vitlocal.plan import Plan
from vitlocal.train import checkpoint
from vitlocal.train.build import explained_misfits
from vitlocal.train.checkpoint import CHECKPOINT, PREVIOUS, Checkpoints, DamagedCheckpoint, load_checkpoint
from vitlocal.train.checkpoint import save_checkpoint as save
from vitlocal.train.command import train
from vitlocal.train.state import is_finite, state_tensors

ONE_STEP = ("--budget.length=3steps", "--methods=none", "--evaluate.every=0", "--run.save_every=1steps")


def content(number: float) -> dict[str, object]:
    return {"weights": torch.full((3000,), number), "step": number, "names": ["a", None], "averages": []}


def first_weight(path: Path) -> float:
    return float(load_checkpoint(path)["weights"][0])


def _three(folder: Path) -> Checkpoints:
    """Three checkpoints were saved."""
    checkpoints = Checkpoints(folder)
    for number in (1.0, 2.0, 3.0):
        checkpoints.save(content(number))
    return checkpoints


@pytest.fixture
def saved(tmp_path: Path) -> Checkpoints:
    return _three(tmp_path)


def test_the_last_two_are_kept(saved: Checkpoints, tmp_path: Path):
    assert (first_weight(saved.last), first_weight(saved.previous)) == (3, 2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["last.pt", "previous.pt"]
    assert saved.load()["step"] == 3 and not saved.notes


def test_without_hard_links_the_last_two_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def link(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", link)
    test_the_last_two_are_kept(_three(tmp_path), tmp_path)


def test_a_kill_at_any_rename_leaves_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Killed(BaseException):
        pass

    for linking in (True, False):
        for killed_at in range(1, 6):
            folder = tmp_path / f"{linking}{killed_at}"
            checkpoints, left = _three(folder), [killed_at]
            with pytest.MonkeyPatch.context() as patch:

                def counted(original: Callable[..., None], left: list[int] = left) -> Callable[..., None]:
                    def call(*arguments: object) -> None:
                        left[0] -= 1
                        if not left[0]:
                            raise Killed
                        original(*arguments)

                    return call

                def no_link(*_: object) -> None:
                    raise OSError(errno.ENOTSUP, "no links")

                patch.setattr(os, "link", counted(os.link) if linking else no_link)
                patch.setattr(os, "replace", counted(os.replace))
                patch.setattr(os, "fsync", counted(os.fsync))
                try:
                    checkpoints.save(content(4.0))
                except Killed:
                    pass
            again = Checkpoints(folder)
            assert again.load()["step"] in (3, 4)
            again.save(content(5.0))
            again.save(content(6.0))
            assert (first_weight(again.last), first_weight(again.previous)) == (6, 5)
            assert sorted(os.listdir(folder / "checkpoints")) == ["last.pt", "previous.pt"]


DAMAGES = {
    "a bit of a weight": lambda data, rng: flipped(data, rng.randrange(2000, 12000)),
    "a bit of the pickle": lambda data, rng: flipped(data, rng.randrange(60, 200)),
    "a bit of the trailer": lambda data, rng: flipped(data, len(data) - rng.randrange(1, checkpoint.TRAILER_BYTES)),
    "4 KiB of zeros": lambda data, rng: data[:4096] + bytes(4096) + data[8192:],
    "zeros at the end": lambda data, rng: data[:-100] + bytes(100),
    "cut in the middle": lambda data, rng: data[: rng.randrange(len(data))],
    "cut by a byte": lambda data, rng: data[:-1],
    "without its trailer": lambda data, rng: data[: -checkpoint.TRAILER_BYTES],
    "longer": lambda data, rng: data + b"more",
    "empty": lambda data, rng: b"",
    "text": lambda data, rng: b"not a checkpoint\n" * 99,
}


def flipped(data: bytes, place: int) -> bytes:
    return data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :]


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_and_the_previous_one_is_used(saved: Checkpoints, damage: Callable, monkeypatch):
    def load(*_: object, **__: object) -> None:
        raise AssertionError("nothing is loaded before the checksum was verified")

    rng, whole = random.Random(0), saved.last.read_bytes()
    for _ in range(5):
        saved.last.write_bytes(damage(whole, rng))
        with pytest.MonkeyPatch.context() as patch, pytest.raises(DamagedCheckpoint, match=r"last\.pt"):
            patch.setattr(torch, "load", load)
            load_checkpoint(saved.last)
    again = Checkpoints(saved.folder)
    assert again.load()["step"] == 2 and "last.pt" in again.notes[0] and "previous.pt" in again.notes[1]
    again.save(content(7.0))  # a damaged file never replaces the good one
    assert (first_weight(again.last), first_weight(again.previous)) == (7, 2)


def test_if_both_are_damaged_nothing_is_changed(saved: Checkpoints):
    for path in (saved.last, saved.previous):
        path.write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"last\.pt .*previous\.pt .*Nothing was changed"):
        saved.load()
    assert saved.last.read_bytes() == saved.previous.read_bytes() == b"damaged"


def test_a_disk_that_cannot_read_the_last_one(saved: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    def verify(path: Path, file: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "_verified_format", verify)
        with pytest.raises(DamagedCheckpoint, match="cannot be read .Input/output error"):
            load_checkpoint(saved.last)


def test_other_formats_and_contents_have_one_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoints" / "last.pt"
    for wrong in ([1, 2], torch.ones(3), "text", {"code": Plan}):
        save(path, wrong)  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"right checksum, but holds no checkpoint"):
            load_checkpoint(path)
    for number in (checkpoint.FORMAT - 1, checkpoint.FORMAT + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(checkpoint, "FORMAT", number)
            save(path, content(1.0))
        with pytest.raises(DataError, match=rf"another version of vitlocal .format {number}, expected"):
            Checkpoints(tmp_path).load()
    torch.save(content(1.0), path)  # an older version, without a checksum
    with pytest.raises(DataError, match="an older version of vitlocal or another program wrote it.*Nothing"):
        Checkpoints(tmp_path).load()


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_full_disk_keeps_both_and_names_the_file(saved: Checkpoints, moment: str, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = [path.read_bytes() for path in (saved.last, saved.previous)]
    with pytest.MonkeyPatch.context() as patch:
        if moment == "write":
            patch.setattr(checkpoint._Hashed, "flush", full)
            patch.setattr(jsonl, "open", lambda *a, **k: FullFile(open(*a, **k)), raising=False)
        else:
            patch.setattr(os, moment, full)
        with pytest.raises(DataError, match=r"last\.pt: the checkpoint could not be written .No space left"):
            saved.save(content(9.0))
    assert saved.load()["step"] == 3 and not saved.notes
    if moment != "replace":  # where links exist, the previous one is now the last one
        assert [path.read_bytes() for path in (saved.last, saved.previous)] == before
    assert {path.name for path in saved.last.parent.iterdir()} == {"last.pt", "previous.pt"}


class FullFile:
    """A file on a disk with room for 5000 bytes."""

    def __init__(self, file: object):
        self.file, self.left = file, 5000

    def __enter__(self) -> FullFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def __getattr__(self, name: str) -> object:
        return getattr(self.file, name)

    def write(self, data: bytes) -> int:
        self.left -= len(data)
        if self.left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)


# --- in runs ----------------------------------------------------------------------------------------------------------


def test_a_run_continues_from_the_previous_checkpoint(
    configure, decoder, no_report, tmp_path: Path, capsys, killed_after
):
    train(configure(*ONE_STEP, f"--run.folder={tmp_path}/whole"))
    with killed_after(2):
        train(configure(*ONE_STEP))
    run = tmp_path / "run"
    path = run / CHECKPOINT
    path.write_bytes(flipped(path.read_bytes(), 5000))
    assert train(configure(*ONE_STEP)) == 0
    said = capsys.readouterr().out
    assert (
        f"note: {path} is damaged: its checksum is wrong" in said and f"note: continuing from {run / PREVIOUS}" in said
    )
    assert ", step 1:" in said
    one, other = (load_checkpoint(tmp_path / name / CHECKPOINT)["model"] for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def change(state: dict, *names: str, to: object) -> None:
    for name in names[:-1]:
        state = state[name]
    if to is None:
        del state[names[-1]]
    else:
        state[names[-1]] = to


MISFITS = {
    "a part is missing": lambda state: change(state, "totals", to=None),
    "an unknown part": lambda state: change(state, "more", to=1),
    "a weight is missing": lambda state: change(state, "model", "norm.bias", to=None),
    "another shape": lambda state: change(state, "model", "norm.bias", to=torch.zeros(5)),
    "no tensor": lambda state: change(state, "model", "norm.bias", to=[1.0]),
    "a moment of another shape": lambda state: change(state, "optimizer", "state", 0, "exp_avg", to=torch.zeros(5)),
    "a moment is missing": lambda state: change(state, "optimizer", "state", 0, "exp_avg", to=None),
    "an optimizer of another model": lambda state: change(state, "optimizer", "param_groups", to=[]),
    "a clock of text": lambda state: change(state, "clock", "train_seconds", to="soon"),
    "a list": lambda state: change(state, "clock", to=[1, 2]),
    "an unknown phase": lambda state: change(state, "phase", to="rest"),
    "a plan of numbers": lambda state: change(state, "logged_plan", to=7),
    "options of a list": lambda state: change(state, "options", to=[3]),
    "rewinds of text": lambda state: change(state, "rewinds", to="x"),
    "an average that the run has not": lambda state: change(state, "ema", to={"a": torch.zeros(3)}),
}


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory: pytest.TempPathFactory):
    """A run that was stopped after a step, and its configuration."""
    run = tmp_path_factory.mktemp("trained") / "run"
    config = small(run, *ONE_STEP, "--data.workers=1")
    with open_trainer(config) as trainer:
        trainer.prepare()
        plan = trainer.plan()
        with trainer.sources.train.open(plan.feed, trainer.state.clock.position) as batches:
            trainer.train_step(next(batches), plan)
        trainer.save()
    return config, run / CHECKPOINT, load_checkpoint(run / CHECKPOINT)


@pytest.mark.parametrize("misfit", MISFITS.values(), ids=MISFITS)
def test_a_whole_checkpoint_that_does_not_fit_is_one_message(trained, misfit: Callable, capsys):
    config, path, _ = trained
    state = load_checkpoint(path)
    before = path.read_bytes()
    misfit(state)
    save(path, state)
    changed = path.read_bytes()
    try:
        assert run_command(lambda argv: train(config), []) == 1
        assert path.read_bytes() == changed
    finally:
        path.write_bytes(before)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: the checkpoint in") and "does not fit this run" in line


def test_a_run_continues_on_a_device_of_another_precision(trained):
    """With train.precision=auto, a T4 trains in fp16, with a loss scale, and an A100 in bf16."""
    config, _, state = trained
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with open_trainer(config) as trainer:
        trainer.state.load_state_dict({**state, "scaler": scaler.state_dict()})
        assert trainer.state.scaler.state_dict() == {}
        trainer.state.scaler = torch.amp.GradScaler("cpu")
        trainer.state.load_state_dict(state)
        assert trainer.state.scaler.get_scale() == 65536
        trainer.state.load_state_dict({**state, "scaler": scaler.state_dict()})
        assert trainer.state.scaler.get_scale() == 8


def test_errors_of_others_are_no_misfit():
    """The processes exchange values while the checkpoint is loaded, and the device may be in use."""
    for error in (RuntimeError("Connection closed by peer [127.0.0.1]:1"), torch.OutOfMemoryError("no memory")):
        with pytest.raises(type(error)) as raised, explained_misfits(Path("run")):
            raise error
        assert raised.value is error


def test_every_tensor_of_the_state_is_looked_at(trained):
    """One value at a time becomes NaN or infinite: in weights, averages and moments."""
    config, _, _ = trained
    with open_trainer(config) as trainer:
        state = trainer.state
        assert is_finite(state)
        floating = [value for value in state_tensors(state) if value.is_floating_point()]
        kinds: list[Tensor] = [floating[0], floating[-1], next(state.model.parameters())]
        for value in kinds:
            for wrong in (float("nan"), float("inf"), -float("inf")):
                kept = value.detach().clone()
                value.data.view(-1)[-1] = wrong
                assert not is_finite(state)
                value.data.copy_(kept)
        assert is_finite(state)
