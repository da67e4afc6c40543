"""Evaluations of diffusion models: the held-out loss, pictures, the Fréchet distance, and what interrupts them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_images import FakeImages
from fake_time import FakeTime
from latent_files import StandIn, stored, use_stand_in
from latent_files import options as latent_options
from PIL import Image
from safetensors.torch import load_file
from test_diffusion import LATENTS, PIXELS
from trainers import open_trainer

from vitlocal.config import Config
from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.random_keys import HELD_OUT, normal
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError, DeviceMemoryError
from vitlocal.plan import Feed, Shape
from vitlocal.progress import Position
from vitlocal.report.page import read_run
from vitlocal.report.run_folder import read_log
from vitlocal.sample import SampleOptions, Sampler
from vitlocal.tasks.gallery import Gallery
from vitlocal.tasks.noise_schedule import NoiseSchedule
from vitlocal.tasks.sampling import SamplerOptions
from vitlocal.tasks.task import Scores
from vitlocal.train.build import build_run, sources_of
from vitlocal.train.checkpoint import load_checkpoint
from vitlocal.train.command import train
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.run_folder import CHECKPOINT
from vitlocal.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")

CPU = torch.device("cpu")
QUICK = ["--diffusion.grid_classes=2", "--diffusion.sample_steps=2", "--train.batch_size=40", "--train.lr=0.01"]


@pytest.fixture
def dit(configure, decoder):
    return lambda *options: configure(*PIXELS, *QUICK, *options)


@pytest.fixture(scope="module")
def classifier(small, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a classifier of the same classes."""
    run = tmp_path_factory.mktemp("classifier") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitlocal.train.command.write_report", read_run)  # as no_report does, for a test
        assert train(small(run, "--methods=none", "--budget.length=1ep", "--data.workers=1")) == 0
    return run


class Thread(Ranks):
    """One of several processes, played by a thread."""

    def __init__(self, rank: int, world: int, shared: list[torch.Tensor], barrier: threading.Barrier):
        super().__init__(rank, world, rank, world)
        self._shared, self._barrier = shared, barrier

    def wrap(self, module, uses_all=True):
        return module

    def total(self, values: torch.Tensor) -> torch.Tensor:
        self._shared[self.rank] = values.clone()
        self._barrier.wait(60)
        values.copy_(sum(self._shared))
        self._barrier.wait(60)
        return values


def evaluate(config: Config, world: int = 1, judges: bool = False) -> list[Scores]:
    """The scores of a new run, whose random weights do not depend on its seed, in each of ``world`` processes."""
    shared, barrier, found = [torch.empty(0)] * world, threading.Barrier(world), [Scores({})] * world
    asked = [0] * world

    def stop(rank: int) -> bool:
        asked[rank] += 1
        return False

    def run(rank: int, trainer: Trainer) -> None:
        evaluator, plan = trainer.evaluator, trainer.plan()
        scores = evaluator.scores(plan, lambda: stop(rank))
        if judges:
            scores = evaluator.judge(scores, plan, True, lambda: stop(rank), lambda text: None)
        found[rank] = scores

    threads = []
    for rank in range(world):
        ranks = ALONE if world == 1 else Thread(rank, world, shared, barrier)
        trainer = build_run(config, sources_of(config, CPU, ranks), CPU, ranks=ranks).trainer
        randomize(trainer.evaluator.model)
        threads.append(threading.Thread(target=run, args=(rank, trainer)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(asked)) == 1 and asked[0]  # else processes would wait for each other
    return found


def randomize(model: torch.nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)


def test_too_little_memory_for_samples_names_the_option(dit, monkeypatch: pytest.MonkeyPatch):
    def sample(*values, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("vitlocal.tasks.gallery.sample", sample)
    with open_trainer(dit("--diffusion.sample_batch=6")) as trainer:
        plan, never = trainer.plan(), lambda *texts: False
        with pytest.raises(DeviceMemoryError, match="no memory for drawing samples of 6 .*diffusion.sample_batch=3;"):
            trainer.evaluator.judge(Scores({}), plan, True, never, never)


# --- the held-out loss ---


def test_the_held_out_loss_depends_on_weights_and_images_alone(dit):
    (first,) = evaluate(dit())
    assert first.values["val_loss"] > 1.05 and len(first.notes["val_loss_by_time"]) == 10
    for options, world in (("--evaluate.batch_size=7", 1), ("--run.seed=5", 1), ("--evaluate.batch_size=79", 2),
                           ("--evaluate.batch_size=33", 4)):  # fmt: skip
        for scores in evaluate(dit(options), world):
            assert scores.values == pytest.approx(first.values, rel=1e-6)
            assert scores.notes["val_loss_by_time"] == pytest.approx(first.notes["val_loss_by_time"], abs=2e-5)


def test_a_model_that_predicts_no_noise_has_a_loss_of_one(dit):
    with open_trainer(dit()) as trainer:
        scores = trainer.evaluator.scores(trainer.plan())
    assert scores.values["val_loss"] == pytest.approx(1, abs=0.02)


def test_evaluations_are_at_their_own_size_while_steps_run_at_a_smaller_one(dit):
    with open_trainer(dit()) as trainer:
        randomize(trainer.evaluator.model)
        found = trainer.evaluator.scores(trainer.plan())
        trainer.step.set_shape(Shape(input_size=8))
        assert trainer.evaluator.scores(trainer.plan()).values == found.values


@pytest.mark.parametrize("passes", [1, 3, 10])
def test_each_image_is_evaluated_at_some_of_ten_times(dit, passes: int):
    """Against a loop over images and passes. The errors of one time are the mean over its images."""
    with open_trainer(dit(f"--diffusion.loss_passes={passes}")) as trainer:
        model, schedule = trainer.evaluator.model.eval(), NoiseSchedule()
        randomize(model)
        found = trainer.evaluator.scores(trainer.plan())
        errors: list[list[float]] = [[] for _ in range(10)]
        with trainer.sources.val.open(Feed(16, 80), Position()) as batches, torch.no_grad():
            (batch,) = batches
            x0 = batch.images.float() / 127.5 - 1
            noise = torch.from_numpy(normal((HELD_OUT,), np.arange(80), 3 * 16 * 16)).float().view(80, 3, 16, 16)
            for number in range(passes):
                place = (torch.arange(80) // 2 + number) % 10
                times = 50 + 100 * place
                output = model(schedule.add_noise(x0, times, noise), times, batch.labels)
                for each, error in zip(place, (output[:, :3] - noise).square().mean((1, 2, 3)).tolist(), strict=True):
                    errors[each].append(error)
    assert {len(each) for each in errors} == {8 * passes}
    assert found.values["val_loss"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert found.notes["val_loss_by_time"] == pytest.approx([np.mean(each) for each in errors], abs=2e-5)


def test_even_and_odd_rows_are_halves_of_all_at_the_same_times(dit):
    found = [
        evaluate(dit("--diffusion.loss_passes=1", f"--evaluate.rows={rows}"))[0] for rows in ("all", "even", "odd")
    ]
    every, even, odd = (scores.values["val_loss"] for scores in found)
    assert every == pytest.approx((even + odd) / 2, rel=1e-6) and even != odd
    assert [len(scores.notes["val_loss_by_time"]) for scores in found] == [10, 10, 10]


def test_the_average_is_evaluated_and_exported(dit, tmp_path: Path):
    run = tmp_path / "run"
    assert train(dit("--train.ema_decay=0.8", "--budget.length=1ep")) == 0
    exported, kept = load_file(run / "model.safetensors"), load_checkpoint(run / CHECKPOINT)
    assert set(exported) - {"pos_embed"} == set(kept["ema"])
    assert all(torch.equal(exported[name], tensor) for name, tensor in kept["ema"].items())
    assert not torch.equal(kept["ema"]["final_layer.linear.bias"], kept["model"]["final_layer.linear.bias"])
    with open_trainer(dit(f"--model.weights={run}", f"--run.folder={tmp_path / 'again'}")) as trainer:
        scores = trainer.evaluator.scores(trainer.plan())
    assert read_log(run)[-1]["val_loss"] == pytest.approx(scores.values["val_loss"], abs=1e-6)


# --- samples ---


def test_evaluations_show_and_judge_samples(dit, classifier: Path, tmp_path: Path):
    options = (f"--diffusion.features={classifier}", "--diffusion.samples=24", "--diffusion.last_samples=90")
    assert train(dit("--budget.length=2ep", "--diffusion.sample_batch=20", *options)) == 0
    records = read_log(tmp_path / "run")
    pictures = sorted(path.name for path in (tmp_path / "run" / "pictures").iterdir())
    assert pictures == ["000000003_samples.png", "000000006_samples.png"]
    with Image.open(tmp_path / "run" / "pictures" / pictures[0]) as picture:
        assert picture.width > 8 * 64 and picture.height > 2 * 64
    assert [record["frechet"]["samples"] for record in records] == [24, 90]
    assert [record["frechet"]["floor_images"] for record in records] == [24, 80]
    for record in records:
        note = record["frechet"]
        assert "Fréchet distance (features of vitlocal_tiny_patch8_64" in note["name"] and "FID" not in note["name"]
        assert 0 < note["floor"] < record["frechet_distance"] and note["reference_images"] == 120
        assert (note["sampler"], note["steps"], note["guidance"], note["seed"]) == ("ddim", 2, 4.0, 0)
        assert 0 <= record["sample_accuracy"] <= 100
    assert records[0]["frechet"]["floor"] != records[1]["frechet"]["floor"]


def test_processes_share_samples_and_real_images(dit, classifier: Path):
    """Two find what one does, also if one of them has a batch more. All ask for signals equally often."""
    options = (f"--diffusion.features={classifier}", "--diffusion.last_samples=50", "--diffusion.grid_classes=0")
    (alone,) = evaluate(dit(*options), judges=True)
    assert alone.values["frechet_distance"] > 0
    for scores in evaluate(dit("--diffusion.sample_batch=16", *options), world=3, judges=True):
        assert scores.values == pytest.approx(alone.values, rel=1e-4)
        assert scores.notes["frechet"]["floor"] == pytest.approx(alone.notes["frechet"]["floor"], rel=1e-4)


def test_a_classifier_of_other_classes_gives_no_accuracy(dit, classifier: Path, tmp_path: Path):
    other = tmp_path / "other"
    shutil.copytree(classifier, other)
    description = json.loads((other / "config.json").read_text())
    description["label_names"][3] = "another"
    (other / "config.json").write_text(json.dumps(description))
    options = ("--diffusion.last_samples=20", "--diffusion.grid_classes=0")
    scores = evaluate(dit(f"--diffusion.features={other}", *options), judges=True)
    assert {"val_loss", "frechet_distance"} == set(scores[0].values)


class Decoder(StandIn):
    """Pixels from -1 to 1 in cells of 8, from scaled latents."""

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        cells = torch.cat([latents, latents[:, :1]], 1) / self.scaling_factor
        return (255 * cells.clamp(0, 1)).byte().repeat_interleave(8, 2).repeat_interleave(8, 3)


def test_samples_of_latents_are_compared_with_decoded_latents(configure, decoder, latents, classifier, monkeypatch):
    monkeypatch.setattr(Autoencoder, "load", Decoder)
    options = [*LATENTS, f"--data.root={latents}", "--diffusion.vae=vae", f"--diffusion.features={classifier}",
               "--diffusion.last_samples=20", "--diffusion.sample_steps=2", "--diffusion.sample_batch=16"]  # fmt: skip
    seen, measured = [], Gallery._measured

    def keep(gallery, batches, run):
        seen.append(list(batches))
        return measured(gallery, iter(seen[-1]), run)

    monkeypatch.setattr(Gallery, "_measured", keep)
    (scores,) = evaluate(configure(*options), judges=True)
    real, held_out, drawn = ([torch.cat(part) for part in zip(*batches, strict=True)] for batches in seen)
    assert [images.shape for images, _ in (real, held_out, drawn)] == [
        (60, 3, 32, 32),
        (20, 3, 32, 32),
        (20, 3, 32, 32),
    ]
    assert drawn[1].bincount().tolist() == [7, 7, 6] and held_out[1].bincount().tolist() == [7, 7, 6]
    plain, _ = stored(latents / "val_32_latent.beton")
    assert torch.equal(held_out[0], Decoder("vae").decode(torch.from_numpy(plain[:, :2]).float() * 0.5))
    note = scores.notes["frechet"]
    assert note["reference"] == "decoded latents of training images" and note["reference_images"] == 60
    assert scores.pictures["samples"].height > 3 * 32 and "sample_accuracy" not in scores.values


def test_the_sample_command_draws_as_the_evaluations_did(dit, tmp_path: Path):
    """Also without guidance to a class, whose scale of 0 must not count as missing."""
    assert train(dit("--budget.length=1steps", "--diffusion.guidance=0", "--diffusion.sampler=ddpm")) == 0
    sampler = Sampler(tmp_path / "run", None, CPU, torch.float32)
    assert sampler.options(SampleOptions()) == SamplerOptions("ddpm", 2, 0.0, "all")
    assert sampler.options(SampleOptions(guidance=3.0, steps=5)) == SamplerOptions("ddpm", 5, 3.0, "all")


def test_training_latents_of_the_size_of_samples_are_needed_at_the_start(configure, decoder, tmp_path, monkeypatch):
    use_stand_in(monkeypatch.setattr)
    write(latent_options(tmp_path, sides="32"), FakeImages(20), progress=False)
    write(latent_options(tmp_path, "val", sides="16"), FakeImages(20), progress=False)
    config = configure(*LATENTS, f"--data.root={tmp_path}", "--evaluate.size=16", "--diffusion.vae=vae")
    build_run(config, sources_of(config, CPU), CPU)
    config = replace(config, diffusion=replace(config.diffusion, features="run"))
    with pytest.raises(ConfigError, match="no latents of 16 px for the split 'train'"):
        build_run(config, sources_of(config, CPU), CPU)


@pytest.mark.parametrize("calls", [0, 1], ids=["grid", "samples"])
def test_a_signal_while_samples_are_drawn_leaves_the_pass_to_the_next_process(dit, classifier, tmp_path, calls: int):
    run, options = tmp_path / "run", (f"--diffusion.features={classifier}", "--diffusion.last_samples=20",
                                      "--diffusion.sample_batch=16", "--budget.length=1ep")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        draw, count = Gallery._draw, [0]

        def signalled(*arguments: object) -> object:
            count[0] += 1
            if count[0] == calls + 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return draw(*arguments)

        patch.setattr(Gallery, "_draw", signalled)
        assert train(dit(*options)) == 143
        assert count[0] == calls + 1
    assert read_log(run) == [] and not (run / "pictures").exists() and not (run / "model.safetensors").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", None)
        assert train(dit(*options)) == 0
    (record,) = read_log(run)
    assert record["step"] == 3 and record["frechet_distance"] > 0 and record["loss"] > 0
    assert len(list((run / "pictures").iterdir())) == 1


@pytest.mark.parametrize(("every", "length", "dies"), [(0, 60, True), (1, 64, False)])
def test_wall_clock_budgets_reserve_the_time_of_samples(
    dit, every: int, length: int, dies: bool, tmp_path: Path, killed_after, monkeypatch
):
    """Drawing takes ten seconds at each evaluation. After the third epoch, it would leave no time for a step."""
    clock = FakeTime(monkeypatch, repeat(3.0), step=2.0)
    judge, estimates = Gallery.judge, []

    def slow(*arguments: object) -> object:
        clock.now += 10.0
        return judge(*arguments)

    monkeypatch.setattr(Gallery, "judge", slow)
    monkeypatch.setattr(Gallery, "seconds", lambda *arguments: estimates.append(clock.now) or (10.0, 10.0))
    config = dit(f"--budget.length={length}s", "--budget.counts=wall", f"--evaluate.every={every}")
    if dies:
        with killed_after(4):
            train(config)
    assert train(config) == 0
    assert clock.now == pytest.approx(length, abs=2.1 if dies else 1.1)
    assert len(estimates) == 1 + dies  # real images are measured before training continues
    evaluated = [record for record in read_log(tmp_path / "run") if record["val_loss"] is not None]
    assert len(evaluated) == (3 if every else 1)
