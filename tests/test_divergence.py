"""Runs that diverge: they stop with the last good checkpoint, or go back to it with other random numbers."""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
import torch
from trainers import open_trainer

from vitlocal.errors import Diverged, run_command
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.report.run_folder import read_log
from vitlocal.train import trainer
from vitlocal.train.budget import read_rewinds, read_spent
from vitlocal.train.checkpoint import CHECKPOINT, load_checkpoint
from vitlocal.train.command import train
from vitlocal.train.run_folder import JOURNAL
from vitlocal.train.step import TrainStep

pytestmark = pytest.mark.usefixtures("no_report")

SIX = ("--budget.length=6steps", "--methods=none", "--run.save_every=2steps", "--evaluate.every=0",
       "--augment.randaugment=9", "--model.drop_path=0.2")  # fmt: skip
REWIND = (*SIX, "--run.on_nan=rewind")


def spoil(patch: pytest.MonkeyPatch, spoils: Callable[[TrainStep, int], bool], part: str = "weights") -> list[int]:
    """Steps for which ``spoils(step, number)`` is true make NaN of a part. Returns the numbers of all steps."""
    original, numbers = TrainStep._update, []

    def update(self: TrainStep, lr: float, ema_decay: float, number: int) -> None:
        original(self, lr, ema_decay, number)
        numbers.append(number)
        if spoils(self, number):
            weight = next(self.model.parameters())
            moments = self.optimizer.state[weight]
            spoiled = {"weights": weight.data, "moments": moments["exp_avg_sq"]}
            if self.ema is not None:
                spoiled["average"] = next(self.ema.model.parameters()).data
            spoiled[part].view(-1)[0] = math.nan

    patch.setattr(TrainStep, "_update", update)
    return numbers


def files(run: Path) -> dict[str, bytes]:
    kept = ("log.jsonl", "classes.json", "model.safetensors", "checkpoints/last.pt", "checkpoints/previous.pt")
    return {name: (run / name).read_bytes() for name in kept if (run / name).exists()}


def final_weights(run: Path) -> torch.Tensor:
    return torch.cat([value.flatten().float() for value in load_checkpoint(run / CHECKPOINT)["model"].values()])


@pytest.mark.parametrize("part", ["weights", "moments", "average"])
def test_nothing_is_replaced_by_nan(configure, decoder, tmp_path: Path, part: str, capsys):
    """The loss is still finite when the spoiled step is saved."""
    options = (*SIX, "--train.ema_decay=0.9")
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, lambda step, number: number == 3, part)
        assert run_command(lambda argv: train(configure(*options)), []) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "at step 4: training has diverged" in line and "--run.on_nan=rewind" in line
    run = tmp_path / "run"
    assert load_checkpoint(run / CHECKPOINT)["clock"]["step"] == 2
    assert set(files(run)) <= {"log.jsonl", "checkpoints/last.pt"} and not read_log(run)
    assert train(configure(*options)) == 0  # whatever spoiled it is gone


def test_a_run_that_ends_in_nan_exports_nothing(configure, decoder, tmp_path: Path):
    """One step, no average, constant rate: the loss was finite before the update."""
    options = ("--budget.length=1steps", "--train.lr=1e38", "--train.schedule=constant", "--methods=none")
    with pytest.raises(Diverged, match="at step 1"):
        train(configure(*options))
    assert not files(tmp_path / "run").keys() - {"log.jsonl"} and not read_log(tmp_path / "run")


def test_rewinding_returns_to_the_checkpoint_with_other_numbers(configure, decoder, tmp_path: Path, capsys):
    run = tmp_path / "run"
    train(configure(*SIX, f"--run.folder={tmp_path}/whole"))
    with pytest.MonkeyPatch.context() as patch:
        numbers = spoil(patch, lambda step, number: number == 3 and step.seed == 0)
        assert train(configure(*REWIND)) == 0
    assert numbers == [0, 1, 2, 3, 2, 3, 4, 5]
    said = capsys.readouterr().out
    assert "going back to the last checkpoint, with other random numbers (rewind 1 of 3)" in said
    record = read_log(run)[-1]
    assert [line["step"] for line in read_log(run)] == [4, 6] and record["rewinds"] == 1
    assert load_checkpoint(run / CHECKPOINT)["rewinds"] == read_rewinds(run / JOURNAL) == 1
    assert not torch.equal(final_weights(run), final_weights(tmp_path / "whole"))
    assert "rewinds" not in read_log(tmp_path / "whole")[0]


def test_without_a_checkpoint_it_starts_again(configure, decoder, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        numbers = spoil(patch, lambda step, number: number == 1 and step.seed == 0)
        assert train(configure(*REWIND, "--run.resume=never")) == 0
    assert numbers == [0, 1, 0, 1, 2, 3, 4, 5]


def test_it_gives_up_after_as_many_rewinds_as_allowed(configure, decoder, tmp_path: Path):
    with pytest.MonkeyPatch.context() as patch:
        numbers = spoil(patch, lambda step, number: number == 3)
        with pytest.raises(Diverged):
            train(configure(*REWIND, "--run.rewinds=2"))
        assert numbers == [0, 1, 2, 3, 2, 3, 2, 3]
        spent = read_spent(tmp_path / "run" / JOURNAL)
        with pytest.raises(Diverged):  # the count is that of the whole run
            train(configure(*REWIND, "--run.rewinds=2"))
        assert len(numbers) == 10 and read_spent(tmp_path / "run" / JOURNAL) > spent  # lost time stays spent
    assert train(configure(*REWIND, "--run.rewinds=2")) == 0
    assert read_log(tmp_path / "run")[-1]["rewinds"] == 2


def test_a_killed_run_that_was_rewound_repeats_bit_for_bit(configure, decoder, killed_after, tmp_path: Path):
    """It is killed before its first checkpoint after the rewind, and later. The journal is lost once."""
    with pytest.MonkeyPatch.context() as patch:
        spoil(patch, lambda step, number: number == 3 and step.seed == 0)
        assert train(configure(*REWIND, f"--run.folder={tmp_path}/whole")) == 0
        with killed_after(5):  # in the second step after the rewind
            train(configure(*REWIND))
        with killed_after(3):
            train(configure(*REWIND))
        (tmp_path / "run" / JOURNAL).write_text("{")
        assert train(configure(*REWIND)) == 0
    assert torch.equal(final_weights(tmp_path / "run"), final_weights(tmp_path / "whole"))
    assert read_log(tmp_path / "run")[-1]["loss"] == read_log(tmp_path / "whole")[-1]["loss"]


def test_rank_0_tells_the_others(configure, decoder):
    """Only rank 0 shows the loss. The others learn in the next exchange that it is not finite."""
    with open_trainer(configure()) as trainer:
        trainer._shown = (trainer.state.clock.progress, torch.tensor(math.nan), 0.1, 16, 1.0)
        trainer._now = trainer.plan() and trainer.state.clock.progress.__class__(step=5)
        trainer._show(trainer._output, torch.tensor(1.0), 0.1, 16)
        with pytest.raises(Diverged, match="the loss is nan"):
            trainer.sync_ranks()


def test_crops_differ_after_a_rewind_and_the_order_stays(configure, decoder, open_configured):
    found = []
    with closing(open_configured(configure())) as sources:
        for variant in (0, 1, 0):
            sources.train.vary_crops(variant)
            with sources.train.open(Feed(16, 8), Position(1)) as batches:
                batch = next(batches)
                found.append((batch.ids.tolist(), batch.images.clone()))
    assert found[0][0] == found[1][0] == found[2][0]
    assert torch.equal(found[0][1], found[2][1]) and not torch.equal(found[0][1], found[1][1])
    with closing(open_configured(configure("--data.loader=torchvision"))) as sources:
        sources.train.vary_crops(1)
        assert sources.train.loader.dataset.crops.variant == 1  # what its workers get


@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "after the rewind"])
def test_a_signal_that_comes_while_a_run_diverges_stops_it(configure, decoder, tmp_path: Path, at_once: bool, capsys):
    """It comes after the last look for signals, or, with several processes, after the last exchange about them."""
    with pytest.MonkeyPatch.context() as patch:
        numbers = spoil(patch, lambda step, number: number == 3 and step.seed == 0)
        original, looks = trainer.check_finite, []

        def check(*arguments) -> None:
            if len(numbers) == 4:
                signal.raise_signal(signal.SIGTERM)
            original(*arguments)

        def stopped(self: trainer.Trainer) -> bool:
            looks.append(self.step.seed)
            self.stop_signal = self.signals.received if at_once or self.step.seed else None
            return self.stop_signal is not None

        patch.setattr(trainer, "check_finite", check)
        patch.setattr(trainer.Trainer, "stopped", property(stopped))
        assert train(configure(*REWIND)) == 128 + signal.SIGTERM
    assert len(numbers) == 4 and any(looks) != at_once
    assert "stopped by SIGTERM at step" in capsys.readouterr().out
    assert train(configure(*REWIND)) == 0 and read_rewinds(tmp_path / "run" / JOURNAL) == (0 if at_once else 1)
