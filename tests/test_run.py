"""Whole runs: results, restarts, signals, exports."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from trainers import open_trainer

from vitlocal.data.loader import Loader
from vitlocal.errors import ConfigError, DataError, DeviceMemoryError, run_command
from vitlocal.methods.batch_size import BatchSize
from vitlocal.methods.method import MethodContext, StepResult
from vitlocal.plan import Feed
from vitlocal.predict import Predictor
from vitlocal.report.run_folder import read_log
from vitlocal.tasks.classification import Classification
from vitlocal.train.checkpoint import load_checkpoint
from vitlocal.train.command import train
from vitlocal.train.devices import Mode
from vitlocal.train.evaluator import Evaluator
from vitlocal.train.loop import fit
from vitlocal.train.run_folder import CHECKPOINT
from vitlocal.train.step import TrainStep
from vitlocal.train.trainer import Trainer

ROOT = Path(__file__).parent.parent
FIELDS = {
    "epoch", "step", "images_seen", "image_size", "batch_size", "processes", "loss",
    "top1", "top5", "lr", "train_seconds", "wall_seconds",
    "images_per_second", "data_wait_fraction",
}  # fmt: skip
VARIANTS = {
    "plain": [],
    "everything": [
        "--augment.randaugment=9", "--augment.mixup=0.8", "--augment.cutmix=1", "--augment.random_erasing=0.25",
        "--model.drop_path=0.2", "--train.ema_decay=0.9", "--train.clip_norm=1", "--train.warmup=1ep",
        "--image_size.step_epochs=0.7",
    ],
    "the newer ways": [
        "--methods=image_size,strength,batch_size", "--image_size.stages=16px until 20%,32px until 2ep,48px",
        "--train.batch_size=16", "--batch_size.limit=32", "--batch_size.multiple=8", "--model.drop_path=0.2",
        "--train.optimizer=muon", "--train.ema_length=20%", "--train.warmup=10%", "--augment.three_augment=yes",
        "--model.pos_embed_init=sincos",
    ],
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / CHECKPOINT)["model"]


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder)]


def test_a_run_leaves_its_folder(configure, decoder, tmp_path: Path, capsys):
    assert train(configure()) == 0
    folder = tmp_path / "run"
    for name in ("config.yaml", "log.jsonl", "checkpoints/last.pt", "model.safetensors", "config.json", "curve.png",
                 "report.html"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    records = read_log(folder)
    assert [record["image_size"] for record in records] == [16, 32, 48]
    assert [record["epoch"] for record in records] == [1, 2, 3]
    assert all(FIELDS <= record.keys() for record in records)
    assert records[1]["feed.size"] == 32 and "feed.batch_size" not in records[1]
    assert records[-1]["lr"] < records[0]["lr"]
    assert records[-1]["images_seen"] == 360 and records[-1]["step"] == 12
    assert "top-1" in capsys.readouterr().out
    page = (folder / "report.html").read_text()
    assert "http" not in page and page.count("<svg") == 5


def test_the_same_command_on_a_finished_run_trains_no_further(configure, decoder, tmp_path: Path):
    assert train(configure()) == 0
    before = (tmp_path / "run" / "log.jsonl").read_text()
    assert train(configure()) == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.usefixtures("no_report")
def test_the_same_seed_gives_the_same_losses(configure, decoder, tmp_path: Path, options: list[str]):
    for name in ("a", "b"):
        train(configure(*options, f"--run.folder={tmp_path}/{name}"))
    train(configure(*options, f"--run.folder={tmp_path}/c", "--run.seed=1"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b") != losses(tmp_path / "c")
    assert same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))


@pytest.mark.parametrize("save_every", ["3steps", "100ep"])
@pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.usefixtures("no_report")
def test_a_killed_run_ends_with_the_weights_of_one_never_killed(
    configure, decoder, killed_after, tmp_path: Path, options: list[str], save_every: str
):
    train(configure(*options, f"--run.folder={tmp_path}/whole"))
    config = configure(*options, f"--run.folder={tmp_path}/killed", f"--run.save_every={save_every}")
    for steps in (5, 4, 2):
        with killed_after(steps):
            train(config)
    assert train(config) == 0
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "killed"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    kept = ("epoch", "step", "image_size", "top1", "lr", "images_seen")
    for one, other in zip(read_log(tmp_path / "whole"), read_log(tmp_path / "killed"), strict=True):
        assert {name: one[name] for name in kept} == {name: other[name] for name in kept}
    exports = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert exports[0] == exports[1]


@pytest.mark.parametrize("step", [4, 6], ids=["at the end of a pass", "in the middle of one"])
@pytest.mark.usefixtures("no_report")
def test_a_signal_saves_and_the_run_continues(configure, decoder, stop_after, tmp_path: Path, step: int):
    train(configure(f"--run.folder={tmp_path}/whole"))
    stop_after(step)
    assert train(configure()) == 143
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["clock"]["step"] == step
    assert train(configure("--run.resume=must")) == 0
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


@pytest.mark.parametrize("evaluation", [1, 3], ids=["in the middle", "the last"])
@pytest.mark.usefixtures("no_report")
def test_a_signal_while_evaluating(configure, decoder, tmp_path: Path, monkeypatch, evaluation: int):
    train(configure(f"--run.folder={tmp_path}/whole"))
    original, count = Evaluator.scores, [0]

    def accuracy(self, *arguments):
        count[0] += 1
        if count[0] == evaluation:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *arguments)

    monkeypatch.setattr(Evaluator, "scores", accuracy)
    assert train(configure()) == 130
    assert len(read_log(tmp_path / "run")) == evaluation - 1
    assert train(configure()) == 0
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    whole, resumed = read_log(tmp_path / "whole"), read_log(tmp_path / "run")
    assert [(r["step"], r["loss"], r["top1"]) for r in whole] == [(r["step"], r["loss"], r["top1"]) for r in resumed]


def test_every_image_is_trained_on_once_an_epoch(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    original = Trainer.train_step

    def train_step(self, batch, plan):
        seen.extend(batch.ids.tolist())
        return original(self, batch, plan)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    train(configure("--image_size.step_epochs=0.4", "--budget.length=2ep"))  # sizes change in mid-epoch
    assert sorted(seen) == sorted([*range(120), *range(120)])
    assert sorted(seen[:120]) == list(range(120))


@pytest.mark.parametrize(
    "methods", ["none", "image_size", "image_size,batch_size", "batch_size", "image_size,strength", "strength"]
)
def test_methods_are_pure_and_restore_their_state(configure, decoder, methods: str, tmp_path: Path):
    by = ["--strength.by=budget"] if methods == "strength" else []
    with open_trainer(
        configure(f"--methods={methods}", "--budget.length=4steps", "--model.drop_path=0.1", *by)
    ) as trainer:
        assert trainer.plan() == trainer.plan()
        fit(trainer)
        assert trainer.state.clock.step == 4
        for method in trainer.state.methods:
            method.observe(StepResult(torch.zeros(()), torch.arange(3), trainer.plan()))
            state = method.state_dict()
            method.load_state_dict(state)
            assert method.state_dict() == state


def test_checkpoints_every_tenth_of_the_budget(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    """Checkpoints are not only at the ends of epochs: an epoch has 60 steps here."""
    steps, original = [], Trainer.save
    monkeypatch.setattr(
        Trainer, "save", lambda self, **how: (steps.append(self.state.clock.step), original(self, **how))
    )
    options = ("--budget.length=50steps", "--train.batch_size=2", "--methods=none", "--evaluate.every=0")
    with open_trainer(configure(*options)) as trainer:
        fit(trainer)
    assert sorted(set(steps)) == [5, 10, 15, 20, 25, 30, 35, 40, 45, 50]


def test_divergence_stops_the_run(configure, decoder):
    with pytest.raises(DataError, match="training has diverged"):
        train(configure("--train.lr=1e30", "--train.end_lr=1e30"))


def test_the_export_gives_the_same_logits_through_timm_and_predicts(configure, decoder, tmp_path: Path):
    from vitlocal.data.images import open_images

    config = configure("--model.pool=avg", "--train.ema_decay=0.5", "--model.drop_path=0.3")
    train(config)
    with open_trainer(config) as trainer:
        model = trainer.state.ema.model
        x = torch.randn(2, 3, 48, 48)
        loaded = timm.create_model(f"local-dir:{tmp_path}/run", pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))
        classes = trainer.sources.train.classes
    guesses = Predictor(tmp_path / "run")(open_images("sample:6", "val").load(0))
    assert len(guesses) == 5 and {name for name, _ in guesses} <= set(classes)
    assert guesses[0][1] >= guesses[-1][1]
    with pytest.raises(ConfigError, match="expected the folder of a finished run"):
        Predictor(tmp_path)


@pytest.mark.usefixtures("no_report")
def test_timms_own_models_train(configure, decoder, tmp_path: Path):
    for name in ("test_vit", "test_resnet"):
        options = [f"--model.{option}=none" for option in ("depth", "width", "heads")]
        train(configure(f"--model.name={name}", *options, "--budget.length=1ep", f"--run.folder={tmp_path}/{name}",
                        "--image_size.init=32"))  # fmt: skip
        assert (tmp_path / name / "model.safetensors").exists()


@pytest.mark.usefixtures("no_report")
def test_the_torchvision_source_trains_the_same_loop(configure, tmp_path: Path):
    config = configure("--data.loader=torchvision", "--data.workers=1", "--budget.length=1ep")
    assert train(config) == 0
    assert read_log(tmp_path / "run")[0]["images_seen"] == 120


def test_compiling_is_not_training_time(configure, decoder, tmp_path: Path, monkeypatch):
    def warm_up(step: TrainStep, feed: Feed, num_classes: int, rest: int) -> float:
        time.sleep(0.5)
        return 0.5

    monkeypatch.setattr(TrainStep, "warm_up", warm_up)
    for when, before in (("stage", 0.5), ("start", 1.5)):
        train(configure(f"--train.compile_at={when}", f"--run.folder={tmp_path}/{when}", "--evaluate.every=0"))
        log = read_log(tmp_path / when)
        assert [record["image_size"] for record in log] == [16, 32, 48]
        assert log[-1]["wall_seconds"] - log[-1]["train_seconds"] > 1.5
        assert log[0]["wall_seconds"] > before  # sizes that are ready before the first


def test_released_graphs_are_compiled_again_before_a_pass_that_needs_them(configure, decoder, monkeypatch):
    found = []
    monkeypatch.setattr(TrainStep, "mode", lambda self, feed, shape=None: Mode(True, graphs=feed.size < 48))
    monkeypatch.setattr(TrainStep, "warm_up", lambda self, feed, classes, rest: found.append(feed.size) or 0.1)
    monkeypatch.setattr(TrainStep, "release_graphs", lambda self: found.append("released"))
    with open_trainer(configure()) as trainer:
        small = trainer.plan()
        large = replace(small, feed=replace(small.feed, size=48))
        monkeypatch.setattr(trainer, "upcoming_plans", lambda: [large])
        for plan in (small, large, small):  # the clock may be ahead of a pass: its own plan counts too
            with trainer.open_pass(plan):
                pass
    assert found == [16, 48, "released", 16]


def test_growing_batches_survive_a_restart(configure, decoder, tmp_path: Path):
    options = ["--methods=image_size,batch_size", "--train.batch_size=16", "--batch_size.multiple=8"]
    with open_trainer(configure(*options, "--budget.length=1steps")) as trainer:
        fit(trainer)
        (method,) = (method for method in trainer.state.methods if method.name == "batch_size")
        batches = dict(method._batch_sizes)
    assert sorted(batches) == [16, 32, 48] and batches[16] > batches[48] == 16
    again = BatchSize(MethodContext(configure(*options).recipe, image_bytes=lambda size: 1))
    again.load_state_dict(method.state_dict())
    assert {size: again.batch_size_at(size) for size in batches} == batches


def test_the_position_table_stays_one_trained_parameter(configure, decoder):
    with open_trainer(configure()) as trainer:
        table, before = trainer.state.model.pos_embed, trainer.state.model.pos_embed.detach().clone()
        fit(trainer)
        assert trainer.state.model.pos_embed is table
        assert any(table is p for group in trainer.state.optimizer.param_groups for p in group["params"])
        assert (trainer.state.optimizer.state[table]["exp_avg"] != 0).any()
        assert not torch.equal(table, before)


def test_a_frozen_position_table_stays(configure, decoder):
    with open_trainer(configure("--model.train_pos_embed=no")) as trainer:
        table, before = trainer.state.model.pos_embed, trainer.state.model.pos_embed.detach().clone()
        assert not any(table is p for group in trainer.state.optimizer.param_groups for p in group["params"])
        fit(trainer)
        assert trainer.state.model.pos_embed is table and torch.equal(table, before)


def test_sources_are_the_ones_configured(configure, decoder):
    with open_trainer(configure()) as trainer:
        assert isinstance(trainer.sources.train, Loader)


def test_an_export_has_the_permissions_of_the_other_files(configure, decoder, no_report, tmp_path: Path):
    assert train(configure("--budget.length=1steps", "--run.keep_weights=yes")) == 0
    run = tmp_path / "run"
    (kept,) = (run / "checkpoints" / "kept").iterdir()
    assert {path.stat().st_mode for path in (kept, run / "model.safetensors")} == {(run / "config.json").stat().st_mode}


# --- too little memory ------------------------------------------------------------------------------------------------

NO_MEMORY = {
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore advice"),
    "without a message": torch.OutOfMemoryError(),
    "MPS": RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB, max allowed: 18.1 GB)"),
    "a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: 12"),
}


def fail_at(number: int, error: Exception):
    """A method of TrainStep that raises ``error`` in the step ``number``."""
    original = TrainStep._gradients

    def gradients(self, batch, at, mode):
        if at == number:
            raise error
        return original(self, batch, at, mode)

    return gradients


@pytest.mark.parametrize("error", NO_MEMORY.values(), ids=NO_MEMORY.keys())
def test_a_step_without_memory_names_the_option_to_change(
    configure, tmp_path: Path, error: Exception, capsys, decoder, no_report
):
    options = ["--run.save_every=2steps"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "_gradients", fail_at(5, error))
        assert run_command(lambda argv: train(configure(*options)), []) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: no memory for a training step of 32 images of 32 px: train.grad_accum_steps=2 ")
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["clock"]["step"] == 4
    assert train(configure(*options, "--train.grad_accum_steps=2")) == 0  # as the message says


def test_a_warm_up_without_memory_names_the_option_to_change(configure, decoder):
    with open_trainer(configure("--train.grad_accum_steps=2")) as trainer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "_gradients", fail_at(0, NO_MEMORY["a GPU"]))
        patch.setattr(TrainStep, "mode", lambda self, feed: Mode(compiled=True))
        with pytest.raises(DeviceMemoryError, match=r"of 32 images of 16 px: train.grad_accum_steps=4 .*20.00 GiB"):
            trainer.compile_for(trainer.plan())


def test_an_evaluation_without_memory_names_the_option_to_change(configure, capsys, decoder, no_report):
    def add(*_: object):
        raise NO_MEMORY["a GPU"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Classification, "add", add)
        assert run_command(lambda argv: train(configure()), []) == 1
    message = "no memory for a batch of an evaluation of 256 images of 48 px: use evaluate.batch_size=128"
    assert message in capsys.readouterr().err
    assert train(configure("--evaluate.batch_size=128")) == 0


def test_other_errors_of_a_step_stay_as_they_are(configure, decoder):
    with open_trainer(configure()) as trainer, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainStep, "_gradients", fail_at(0, RuntimeError("a fault of ours")))
        with pytest.raises(RuntimeError, match="a fault of ours"):
            fit(trainer)
