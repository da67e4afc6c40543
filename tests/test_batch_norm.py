"""BatchNorm's statistics: those of an average, or of another shape, are estimated before they are evaluated."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from method_plans import COMMON
from torch.optim.swa_utils import update_bn
from trainers import open_trainer

from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.report.run_folder import read_log
from vitlocal.train.checkpoint import load_checkpoint
from vitlocal.train.command import train
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.evaluator import Evaluator
from vitlocal.train.probes import EPOCH
from vitlocal.train.run_folder import CHECKPOINT

pytestmark = pytest.mark.usefixtures("no_report")

ROOT = Path(__file__).parent.parent
LOCALVIT = ["--model.name=vitlocal_localvit_tiny_patch8_64", "--model.pool=avg"]
AVERAGE = ["--train.ema_decay=0.9", "--model.drop_path=0", "--train.lr=0.01", "--budget.length=2ep"]
MODELS = {
    "localvit": LOCALVIT,
    "norm": ["--model.norm=batch"],
    "resnet": ["--model.name=test_resnet", "--model.size=32", "--methods=none", "--model.depth=none",
               "--model.width=none", "--model.heads=none"],
}  # fmt: skip


def statistics(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


@pytest.mark.parametrize("name", MODELS)
def test_an_average_is_evaluated_with_its_own_statistics(configure, decoder, tmp_path: Path, monkeypatch, name: str):
    """They, its accuracy and its export are those of PyTorch's update_bn on the same batches."""
    monkeypatch.setattr("vitlocal.train.evaluator.RECALIBRATION_BATCH", 48)  # two of 120 images
    config = configure(*MODELS[name], *AVERAGE)
    assert train(config) == 0
    with open_trainer(config) as trainer:
        average, source, size = trainer.state.ema.model, trainer.sources.train, config.model.size
        assert average.training is False and all(m.momentum == 0.1 for m in average.modules() if hasattr(m, "momentum"))
        normalize = trainer.step.task.augment.normalize
        with source.open(Feed(size, 48), Position(EPOCH)) as batches:
            pixels = [normalize(next(batches).images.clone()) for _ in range(2)]
        expected = copy.deepcopy(average)
        expected.load_state_dict(average.state_dict() | statistics(trainer.state.model))
        images = torch.randn(4, 3, size, size)
        with torch.no_grad():
            wrong = expected(images)
            update_bn(pixels, expected)
            logits = expected.eval()(images)
        torch.testing.assert_close(statistics(average), statistics(expected))
        assert float((wrong - logits).abs().max()) > 1e-4
        exported = timm.create_model(f"local-dir:{tmp_path}/run", pretrained=True).eval()
        with torch.no_grad():
            torch.testing.assert_close(exported(images), logits)
        right = [0, 0]
        with trainer.sources.val.open(Feed(size, 16), Position()) as batches, torch.no_grad():
            for batch in batches:
                right[0] += int((expected(normalize(batch.images)).argmax(dim=1) == batch.labels).sum())
                right[1] += len(batch)
    assert read_log(tmp_path / "run")[-1]["top1"] == pytest.approx(100 * right[0] / right[1], abs=1e-3)


EVERY = [*LOCALVIT, *AVERAGE, "--budget.length=3ep", "--evaluate.every=1", "--run.save_every=3steps"]


@pytest.mark.parametrize("options", [EVERY, [*EVERY, "--methods=budgeted", "--budgeted.grow=heads",
                                             "--train.ema_decay=none"]])  # fmt: skip
def test_a_killed_run_and_an_interrupted_estimate_end_as_an_undisturbed_run(
    configure, decoder, tmp_path: Path, killed_after, monkeypatch, options: list[str]
):
    def end(name: str) -> tuple[list[tuple], dict[str, torch.Tensor]]:
        state = load_checkpoint(tmp_path / name / CHECKPOINT)
        kept = ("epoch", "step", "loss", "top1", "top5")
        return [tuple(line[key] for key in kept) for line in read_log(tmp_path / name)], state["ema"] or state["model"]

    assert train(configure(*options, f"--run.folder={tmp_path}/whole")) == 0
    config = configure(*options, f"--run.folder={tmp_path}/killed")
    with killed_after(6):  # in the second epoch, after the first evaluation
        train(config)
    calls, found = [0], Evaluator.recalibrate

    def interrupted(self, plan, stop):
        def stops() -> bool:
            os.kill(os.getpid(), signal.SIGTERM)
            return stop()

        calls[0] += 1
        return found(self, plan, stops if calls[0] == 1 else stop)

    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "recalibrate", interrupted)
        assert train(config) == 143
    assert train(config) == 0
    (lines, weights), (expected, whole) = end("killed"), end("whole")
    assert lines == expected and lines[0][3] is not None
    assert all(torch.equal(weights[name], whole[name]) for name in whole)


TWO = """
import sys, torch
from vitlocal.config import read_config
from vitlocal.train.build import open_run
from vitlocal.train import evaluator
evaluator.RECALIBRATION_BATCH = 40
with open_run(read_config(sys.argv[2:], {})) as run:
    trainer = run.trainer
    assert trainer.evaluator.recalibrate(trainer.plan(), lambda: trainer.sync_ranks() or False)
    torch.save(trainer.state.ema.model.state_dict(), f"{sys.argv[1]}/{trainer.step.ranks.rank}.pt")
"""


class Sums(Ranks):
    """One of two ranks, which measure one after the other: ``total`` adds the sums of the first."""

    before: list[torch.Tensor] = []

    def total(self, values: torch.Tensor) -> torch.Tensor:
        if self.rank:
            self.before.append(values)
            return values
        return values + self.before.pop(0)


def test_processes_take_turns_with_the_batches(configure, decoder, monkeypatch):
    """Three batches of 40 images: one for rank 1, which measures first here, and two for rank 0."""
    monkeypatch.setattr("vitlocal.train.evaluator.RECALIBRATION_BATCH", 40)
    with open_trainer(configure(*LOCALVIT, *AVERAGE)) as trainer:
        average, found = trainer.state.ema.model, []
        for ranks in (ALONE, Sums(1, 2, 1, 2), Sums(0, 2, 0, 2)):
            trainer.step.ranks = ranks
            assert trainer.evaluator.recalibrate(trainer.plan())
            found.append(statistics(average))
        torch.testing.assert_close(found[2], found[0])
        assert average.blocks[1].mlp.bn2.num_batches_tracked == 3
        trainer.step.ranks = ALONE


@pytest.mark.slow
def test_two_processes_estimate_as_one(configure, decoder, folder: Path, tmp_path: Path, monkeypatch):
    """Three batches of 40 images: two for the first process, one for the second."""
    monkeypatch.setattr("vitlocal.train.evaluator.RECALIBRATION_BATCH", 40)
    options = [*LOCALVIT, *AVERAGE, "--run.threads=1", "--data.workers=1"]
    with open_trainer(configure(*options)) as trainer:
        assert trainer.evaluator.recalibrate(trainer.plan())
        alone = trainer.state.ema.model.state_dict()
    config = configure(*options, f"--run.folder={tmp_path}/two")
    (tmp_path / "two.py").write_text(TWO)
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", tmp_path / "two.py"]
    plain = ["--model.size=48", "--model.depth=2", "--model.width=32", "--model.heads=2", "--train.batch_size=32",
             "--train.lr_batch=0", "--methods=none", "--run.device=cpu", "--run.progress=no"]  # fmt: skip
    plain += [f"--data.root={folder}", f"--run.folder={config.run.folder}"]
    done = subprocess.run([*start, tmp_path, *plain, *options], cwd=ROOT, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert done.returncode == 0, done.stderr
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), alone)


def test_the_reserve_includes_the_estimate(configure, decoder, monkeypatch):
    with open_trainer(configure(*LOCALVIT, *AVERAGE, "--budget.length=1h", "--budget.counts=wall")) as trainer:
        now, before = [0.0], statistics(trainer.state.ema.model)

        def recalibrate(plan, limit: int) -> bool:
            now[0] += 7.0 * limit / 120  # images; all 120 take 7 s
            trainer.state.ema.model.blocks[0].mlp.bn1.running_mean.fill_(3)
            return True

        monkeypatch.setattr(trainer.evaluator, "recalibrate", recalibrate)
        monkeypatch.setattr("vitlocal.train.evaluator.RECALIBRATION_BATCH", 30)
        monkeypatch.setattr("vitlocal.train.evaluator.perf_counter", lambda: now[0])
        assert trainer.evaluator.estimate_seconds(trainer.plan()) == pytest.approx(7)
        torch.testing.assert_close(statistics(trainer.state.ema.model), before)


@pytest.mark.parametrize(
    ("options", "recalibrates"),
    [
        (["--train.ema_decay=0.9"], False),  # no BatchNorm
        (["--methods=budgeted"], False),
        (LOCALVIT, False),  # weights that gathered their statistics
        ([*LOCALVIT, "--methods=unfreeze", "--unfreeze.stage_embedding=no"], False),
        ([*LOCALVIT, "--train.ema_length=10%"], True),
        (["--model.norm=batch", "--methods=budgeted"], True),
        (["--model.norm=batch", "--methods=trilevel", "--model.depth=4"], True),
        ([*LOCALVIT, "--methods=autoprog", "--autoprog.size_multiple=16"], True),
    ],
)
def test_only_other_weights_or_shapes_need_an_estimate(configure, decoder, monkeypatch, options, recalibrates: bool):
    with open_trainer(configure(*options, "--budget.length=4ep")) as trainer:
        assert trainer.evaluator.recalibrates == recalibrates
        if not recalibrates:
            monkeypatch.setattr(Evaluator, "recalibrate", None)
            assert trainer.evaluator.scores(trainer.plan()) is not None


def test_frozen_blocks_and_blocks_that_do_not_run_keep_their_statistics(configure, decoder):
    frozen = ["--methods=unfreeze", "--unfreeze.schedule=1@16px,2@32px,3@48px,4@48px"]
    smaller = ["--methods=autoprog", "--autoprog.schedule=1@48px,2@48px,3@48px,4@48px"]
    for method in (frozen, smaller):
        with open_trainer(configure(*COMMON, *LOCALVIT, *method)) as trainer:
            average = trainer.state.ema.model
            before = statistics(average)
            assert trainer.evaluator.scores(trainer.plan()) is not None
            moved = {name for name, value in statistics(average).items() if not torch.equal(value, before[name])}
            assert moved == {name for name in before if name.startswith("blocks.0.")}


def test_an_evaluation_by_single_images_estimates_with_pairs(configure, decoder):
    """At 32 px, the last BatchNorm of a ResNet sees one pixel of each image."""
    with open_trainer(configure(*MODELS["resnet"], *AVERAGE, "--evaluate.batch_size=1")) as trainer:
        assert trainer.evaluator.recalibrate(trainer.plan())
