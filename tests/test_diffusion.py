"""Diffusion as a task: its random numbers and number formats, and runs that are shared, killed, frozen and searched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import repeat
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_time import FakeTime
from narrow_dit import narrow_dit
from trainers import open_trainer

from vitlocal.config import Config
from vitlocal.data.batch import Batch
from vitlocal.data.shares import Share
from vitlocal.errors import ConfigError
from vitlocal.models.shape import add_stage_table, set_shape
from vitlocal.plan import Dials, Feed, Shape, StageEmbedding
from vitlocal.progress import Position
from vitlocal.report.run_folder import read_log
from vitlocal.tasks.diffusion import Diffusion
from vitlocal.tasks.noise_schedule import NoiseSchedule
from vitlocal.train import command
from vitlocal.train.build import assemble_step, mac_counter, make_model, sources_of
from vitlocal.train.checkpoint import load_checkpoint
from vitlocal.train.command import train
from vitlocal.train.devices import EAGER
from vitlocal.train.distributed import Ranks
from vitlocal.train.evaluator import Evaluator
from vitlocal.train.probes import Prober, tangent_kernel
from vitlocal.train.run_folder import CHECKPOINT
from vitlocal.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")

CPU = torch.device("cpu")
NARROW = ["--model.width=32", "--model.depth=4", "--model.heads=2", "--model.drop_path=0", "--methods=none"]
PIXELS = ["--model.name=vitlocal_dit_tiny_patch4_32", "--model.size=16", *NARROW]
LATENTS = ["--model.name=vitlocal_dit_small_patch2", "--model.size=32", *NARROW]


@pytest.fixture
def dit(configure, decoder, latents: Path):
    """``dit("pixels" or "latents", *options)``: the configuration of a narrow DiT."""
    known = {"pixels": PIXELS, "latents": [*LATENTS, f"--data.root={latents}"]}
    return lambda kind, *options: configure(*known[kind], *options)


# --- random numbers ---


def last_batch(config: Config, ranks: Ranks) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """Of the last, small batch of an epoch: this process's images, and its part of the loss and of the gradients."""
    sources = sources_of(config, CPU, ranks)
    model, _ = make_model(config, len(sources.train.classes), CPU, sources.train.latents)
    for parameter in model.parameters():  # else most gradients are zero
        torch.nn.init.normal_(parameter, std=0.1)
    add_stage_table(model, StageEmbedding(3, 0.1, 0.3))
    step, _ = assemble_step(config, model, CPU, mac_counter(model), (), ranks, sources)
    step.set_shape(Shape(stage=1))
    with sources.train.open(Feed(config.model.size, config.train.batch_size), Position()) as batches:
        for batch in batches:
            if batch.total < config.train.batch_size:
                output = step._gradients(batch, 3, EAGER)
                images = len(batch)
    grads = {name: p.grad / ranks.world for name, p in model.named_parameters() if p.grad is not None}
    return images, output.loss, grads


@pytest.mark.parametrize(("kind", "batch_size", "parts"), [("pixels", 37, [4, 3, 2]), ("latents", 29, [2, 0, 0, 0])])
def test_processes_and_micro_batches_add_up_to_the_whole_batch(dit, kind, batch_size, parts, monkeypatch):
    """The last batch of 120 photos has 9 images, that of 60 latents 2: most of four processes get none."""
    monkeypatch.setattr(Ranks, "wrap", lambda ranks, module, uses_all=True: module)  # no other process is there
    options = (f"--train.batch_size={batch_size}", "--model.depth=2")
    images, loss, grads = last_batch(dit(kind, *options), Ranks())
    assert images == sum(parts) and all(grads[name].abs().max() > 0 for name in grads)
    for world, accum in ((1, 3), (2, 1), (4, 1)):
        config = dit(kind, *options, f"--train.grad_accum_steps={accum}")
        shares = [last_batch(config, Ranks(rank, world, rank, world)) for rank in range(world)]
        assert sum(share[0] for share in shares) == images
        torch.testing.assert_close(sum(share[1] for share in shares), loss)
        for name, whole in grads.items():
            total = sum(share[2][name] for share in shares if name in share[2])
            torch.testing.assert_close(total, whole, rtol=1e-4, atol=1e-6 * float(whole.abs().max()) + 1e-9)


def a_task(scaling_factor: float | None = None, **options) -> Diffusion:
    """The task of a narrow model with a stage table, whose images of no stage are a tenth."""
    if scaling_factor is None:
        model = narrow_dit("vitlocal_dit_tiny_patch4_32", img_size=16, depth=2)
    else:
        model = narrow_dit("vitlocal_dit_small_patch2", img_size=32, depth=2)
    add_stage_table(model, StageEmbedding(4, 0.5, 0.1))
    set_shape(model, Shape(stage=1))
    return Diffusion(model, NoiseSchedule(), scaling_factor=scaling_factor, **options)


def a_batch(task: Diffusion, count: int, size: int = 16) -> Batch:
    return Batch.whole(task.blank(count, size, random=True), torch.arange(count) % 10, torch.arange(count))


def test_min_snr_weighs_the_training_loss_only():
    task = a_task(snr_gamma=5.0)
    batch = a_batch(task, 40)
    images, labels, draws = task.operands(batch, 0, 0, Dials())
    schedule, objective = task.objective.schedule, task.objective
    with torch.no_grad():
        _, errors, losses = objective.losses(task.model, torch.float32, images, labels, draws)
        objective.weights = None
        _, same, plain = objective.losses(task.model, torch.float32, images, labels, draws)
    assert torch.equal(errors, same)
    torch.testing.assert_close(plain - losses, errors * (1 - schedule.min_snr(5)[draws.times]), atol=1e-5, rtol=1e-4)


def test_times_and_drops_of_a_place_do_not_depend_on_the_batch():
    task = a_task()
    large, small = (task.draw(a_batch(task, count), 5, 7) for count in (64, 24))
    for name in ("times", "no_label", "no_stage"):
        assert torch.equal(getattr(large, name)[:24], getattr(small, name)), name
    batch = a_batch(task, 64)
    places = Share(1, 4).places(64)
    mine = Batch(batch.images[places], batch.labels[places], batch.ids[places], places, 64)
    for whole, part in zip(large, task.draw(mine, 5, 7), strict=True):
        assert whole is part is None or torch.equal(whole[places], part)  # the noise too
    for seed, number in ((5, 8), (6, 7)):
        assert not torch.equal(large.times, task.draw(batch, seed, number).times)
        assert not torch.equal(large.noise, task.draw(batch, seed, number).noise)


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "apart"])
def test_a_tenth_of_the_labels_and_stages_is_dropped(joint: bool):
    task = a_task(joint_drop=joint)
    draws = [task.draw(a_batch(task, 2000), 0, step) for step in range(10)]
    no_label, no_stage = (torch.cat([getattr(each, name) for each in draws]) for name in ("no_label", "no_stage"))
    assert float(no_label.float().mean()) == pytest.approx(0.1, abs=0.01)
    assert float(no_stage.float().mean()) == pytest.approx(0.1, abs=0.01)
    if joint:
        assert torch.equal(no_label, no_stage)
    else:
        assert float((no_label & no_stage).float().mean()) == pytest.approx(0.01, abs=0.003)
    times = torch.cat([each.times for each in draws])
    assert (int(times.min()), int(times.max())) == (0, 999)
    assert float(times.float().mean()) == pytest.approx(499.5, abs=3 * 289 / 20_000**0.5)
    noise = draws[0].noise
    assert float(noise.mean()) == pytest.approx(0, abs=0.005) and float(noise.std()) == pytest.approx(1, abs=0.005)


def test_dropped_labels_are_the_row_after_the_last_class():
    """And dropped stages the last one. Labels that are dropped do not matter."""
    task = a_task()
    batch, seen = a_batch(task, 64), []
    images, labels, draws = task.operands(batch, 0, 1, Dials())
    assert 0 < draws.no_label.sum() < 64
    handle = task.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    one = torch.ones(())
    loss = task.objective(images, labels, draws, one)[0]
    handle.remove()
    ((_, times, given, no_stage),) = seen
    assert torch.equal(given == 10, draws.no_label) and torch.equal(given[~draws.no_label], labels[~draws.no_label])
    assert torch.equal(no_stage, draws.no_stage) and torch.equal(times, draws.times)
    other = torch.where(draws.no_label, (labels + 1) % 10, labels)
    assert torch.equal(task.objective(images, other, draws, one)[0], loss)
    assert not torch.equal(task.objective(images, (labels + 1) % 10, draws, one)[0], loss)


# --- the objective ---


def test_latents_are_drawn_around_their_means():
    task = a_task(scaling_factor=0.5)
    mean, deviation = torch.randn(2, 3, 4, 4, 4).half().unbind(0)
    draws = task.draw(
        Batch.whole(torch.cat([mean, deviation], 1), torch.zeros(3, dtype=torch.int64), torch.arange(3)), 0, 0
    )
    x0 = task.objective.clean(torch.cat([mean, deviation], 1), draws.latent_noise)
    torch.testing.assert_close(x0, 0.5 * (mean.float() + deviation.float() * draws.latent_noise))
    assert draws.noise.shape == x0.shape and not torch.equal(draws.noise, draws.latent_noise)


@pytest.mark.parametrize("scaling_factor", [None, 0.18215], ids=["pixels", "latents"])
@pytest.mark.parametrize(("precision", "error"), [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=str)
def test_half_precision_is_close_to_float32(scaling_factor, precision, error):
    exact = a_task(scaling_factor)
    rounded = Diffusion(exact.model, NoiseSchedule(), precision, scaling_factor=scaling_factor)
    operands = exact.operands(a_batch(exact, 16, 16), 0, 0, Dials())
    found = []
    for task in (exact, rounded):
        exact.model.zero_grad()
        loss = task.objective(*operands, torch.tensor(1 / 16))[0]
        assert loss.dtype == torch.float32
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in exact.model.parameters() if p.grad is not None])
        found.append((float(loss.detach()), grads))
    assert np.isfinite(found[1][0]) and found[1][1].isfinite().all()
    assert found[1][0] == pytest.approx(found[0][0], rel=error)
    assert float((found[1][1] - found[0][1]).norm() / found[0][1].norm()) < 3 * error


def test_a_step_is_one_graph():
    """As torch.compile captures it. Its loss and gradients are those of the eager step."""
    task = a_task(scaling_factor=0.5)
    operands = (*task.operands(a_batch(task, 4), 0, 0, Dials()), torch.tensor(0.25))
    graph = torch.compile(task.objective, backend="eager", fullgraph=True, dynamic=False)
    found = []
    for objective in (task.objective, graph):
        task.model.zero_grad()
        loss = objective(*operands)[0]
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in task.model.parameters() if p.grad is not None)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_small_inputs_are_resized_photos():
    task = a_task()
    batch = a_batch(task, 4)
    task.set_shape(8)
    images, _, draws = task.operands(batch, 0, 0, Dials())
    assert draws.noise.shape == (4, 3, 8, 8)
    assert task.objective.clean(images, None, 8).shape == (4, 3, 8, 8)


# --- runs ---

SEARCH = ["--methods=unfreeze", "--unfreeze.stages=2", "--unfreeze.min_scale=0.5", "--unfreeze.size_multiple=16",
          "--unfreeze.probe_batch_size=4", "--unfreeze.timed_batches=1", "--train.batch_size=16",
          "--train.ema_decay=0.9", "--budget.length=12steps", "--evaluate.every=1", "--train.lr=0.01"]  # fmt: skip


class Killed(Exception):
    pass


@contextmanager
def dies(owner: object, name: str, calls: int) -> Iterator[None]:
    """The process dies when ``owner.name`` is called once more than ``calls`` times."""
    original, count = getattr(owner, name), [0]

    def counted(*arguments: object, **named: object) -> object:
        count[0] += 1
        if count[0] > calls:
            raise Killed
        return original(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(owner, name, counted)
        yield


DEATHS = {
    "pixels": [(Trainer, "train_step", 4), (Evaluator, "judge", 0), (Trainer, "train_step", 2)],
    "latents": [(Prober, "measure", 3), (Trainer, "train_step", 1), (Evaluator, "scores", 0), (command, "export", 0)],
}


@pytest.mark.parametrize("kind", DEATHS)
def test_a_run_that_is_killed_anywhere_ends_with_the_same_weights(dit, kind, tmp_path: Path, monkeypatch):
    """It is killed in its search, in steps, in evaluations, and before the export."""
    monkeypatch.setattr(Prober, "_seconds", lambda prober, probe, plan: 1e-9 * prober._macs(probe.size, probe.shape))
    options = (*SEARCH, "--model.size=32", "--model.depth=2", "--run.save_every=3steps", "--diffusion.grid_classes=1",
               "--diffusion.sample_steps=2", "--train.weight_decay=0.1")  # fmt: skip
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(dit(kind, *options, f"--run.folder={whole}")) == 0
    for owner, name, calls in DEATHS[kind]:
        with dies(owner, name, calls):
            train(dit(kind, *options, f"--run.folder={killed}"))
    assert train(dit(kind, *options, f"--run.folder={killed}")) == 0
    first, second = (load_checkpoint(run / CHECKPOINT) for run in (whole, killed))
    for name in ("model", "ema", "optimizer", "methods"):
        assert plain(first[name]) == plain(second[name]), name
    assert len(first["methods"]["unfreeze"]["scores"][0]) == 4  # candidates of the one search
    for name in ("model.safetensors", "config.json"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    lines = [
        [[line[name] for name in ("step", "loss", "val_loss")] for line in read_log(run)] for run in (whole, killed)
    ]
    assert lines[0] == lines[1]


def plain(value):
    """Tensors as bytes, so that everything can be compared."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if isinstance(value, dict):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, (list, tuple)) else value


# --- freezing ---


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    """The weights and, under "average", those of the weight average."""
    both = {"": trainer.state.model, "average.": trainer.state.ema.model}
    return {prefix + name: p.detach().clone() for prefix, model in both.items() for name, p in model.named_parameters()}


@pytest.mark.parametrize("non_blocks", ["all", "head"])
def test_what_a_stage_freezes_stays_bit_for_bit(dit, non_blocks: str):
    """Outside of blocks, everything is trained, or the final layer and the stage table."""
    options = ("--methods=unfreeze", "--unfreeze.stages=2", "--unfreeze.schedule=1@8px,2@16px", "--train.lr=0.01",
               "--train.weight_decay=0.5", "--train.ema_decay=0.9", "--budget.length=6steps",
               "--diffusion.label_dropout=0.4", "--unfreeze.stage_null_prob=0.4",
               f"--unfreeze.non_blocks={non_blocks}")  # fmt: skip
    with open_trainer(dit("pixels", *options)) as trainer:
        for parameter in trainer.state.model.parameters():  # adaLN-Zero gives blocks no gradient in the first step
            torch.nn.init.normal_(parameter, std=0.1)
        trainer.state.ema.model.load_state_dict(trainer.state.model.state_dict())
        before, changed = weights_of(trainer), []
        for _ in range(2):
            plan = trainer.plan()
            for _ in range(3):
                with trainer.open_pass(plan) as batches:
                    trainer.train_step(next(batches), plan)
            after = weights_of(trainer)
            changed.append({name for name in before if not torch.equal(before[name], after[name])})
            before = after
    names = {name for name in before if not name.startswith("average.")}
    inside = {name for name in names if name.startswith("blocks.")}
    outside = names - inside
    if non_blocks == "head":
        outside = {name for name in outside if name.startswith(("final_layer.", "stage_table"))}
    first = {name for name in inside if name.startswith(("blocks.0.", "blocks.2."))}
    for found, expected in zip(changed, (first | outside, inside | outside), strict=True):
        assert found == expected | {f"average.{name}" for name in expected}


# --- the search ---


def state_of(trainer: Trainer) -> list:
    model = trainer.state.model
    return [weights_of(trainer), list(model.buffers()), [trainer.state.optimizer.state[p] for p in model.parameters()]]


def test_scores_of_candidates_leave_no_trace(dit):
    with open_trainer(dit("latents", *SEARCH)) as trainer:
        plan = trainer.plan()
        with trainer.open_pass(plan) as batches:
            trainer.train_step(next(batches), plan)
        before = plain(state_of(trainer))
        generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
        (probe,) = trainer.state.methods[0].probes(trainer.state.clock.progress)
        complete = trainer._prober.complete(probe, plan)
        assert probe.kind == "trainability" and complete.size == 16
        first, again = (trainer._prober.measure(complete, plan) for _ in range(2))
        assert first == again and np.isfinite(first).all()
        drawn, draw = [], Diffusion.draw
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Diffusion, "draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1])
            trainer._prober.measure(complete, plan)
        times = {tuple(each.times.tolist()) for each in drawn}
        assert len(times) == len(drawn) == 4  # two batches for each score, none with the times of another
        seconds = trainer._prober.complete(replace(probe, kind="seconds", size=32), plan)
        assert trainer._prober.measure(seconds, plan) > 0
        assert plain(state_of(trainer)) == before
        assert torch.equal(torch.get_rng_state(), generators[0]) and np.random.get_state()[1].tolist() == generators[1]


def test_the_tangent_kernel_is_that_of_the_models_outputs():
    """Row i: the gradient of the sum of all that the model predicts for sample i, in the stage, with dropped labels."""
    task, number = a_task(), 4
    batch = a_batch(task, 6)
    outputs, loss = task.probe(task.model, batch, 0, number, Dials(), torch.float32)
    draws = task.draw(batch, 0, number)
    x0 = batch.images.float() / 127.5 - 1
    xt = task.objective.schedule.add_noise(x0, draws.times, draws.noise)
    labels = torch.where(draws.no_label, 10, batch.labels)
    expected = task.model(xt, draws.times, labels, draws.no_stage)
    assert outputs.shape == (6, 6, 16, 16) and torch.equal(outputs, expected)  # noise and variances of 3 channels
    torch.testing.assert_close(loss, task.objective(batch.images, batch.labels, draws, torch.ones(()))[0])
    weights = [p for name, p in task.model.named_parameters() if "weight" in name]
    rows = []
    for sample in range(6):
        grads = torch.autograd.grad(expected[sample].sum(), weights, retain_graph=True)
        rows.append(torch.cat([grad.flatten() for grad in grads]).double())
    slow = torch.stack(rows) @ torch.stack(rows).T
    torch.testing.assert_close(tangent_kernel(task.model, outputs), slow, rtol=1e-6, atol=1e-6 * float(slow.max()))


def test_the_vote_decides_if_its_measures_disagree(dit, monkeypatch):
    """Conditioning and ZiCo prefer the last candidate with half a vote each, time the first one with a whole vote."""
    times, scores = [1.0, 2.0, 3.0, 4.0], [(8.0, 1.0), (4.0, 2.0), (2.0, 3.0), (1.0, 4.0)]
    for weights, chosen in (("1,0.5,0.5", "1@16px"), ("1,0.6,0.5", "2@32px"), ("0,1,0", "2@32px"), ("1,0,0", "1@16px")):
        answers = {"seconds": iter(times), "trainability": iter(scores)}
        monkeypatch.setattr(Prober, "measure", lambda prober, probe, plan, a=answers: next(a[probe.kind]))
        with open_trainer(dit("latents", *SEARCH, f"--unfreeze.rank_weights={weights}")) as trainer:
            trainer.run_probes()
            assert trainer.state.methods[0].choices() == [chosen], weights


def test_search_and_training_keep_the_deadline(dit, tmp_path: Path, monkeypatch):
    """A probe takes a second, a step two, an evaluation three, of a minute in all."""
    clock = FakeTime(monkeypatch, repeat(3.0), step=2.0)
    measure = Prober.measure

    def slow(self: Prober, probe: object, plan: object) -> object:
        clock.now += 1.0
        return measure(self, probe, plan)

    monkeypatch.setattr(Prober, "measure", slow)
    for length, counts in ((60, "wall"), (20, "train")):
        began, run = clock.now, tmp_path / counts
        options = (
            "--evaluate.every=0",
            f"--budget.length={length}s",
            f"--budget.counts={counts}",
            f"--run.folder={run}",
        )
        assert train(dit("latents", *SEARCH, *options)) == 0
        last = read_log(run)[-1]
        searched = last["probe_seconds"]
        assert 8 <= searched < 9 and last["images_seen"] > 0
        if counts == "wall":
            assert clock.now - began == pytest.approx(60, abs=1.1)
        else:
            assert last["train_seconds"] == pytest.approx(20, abs=1.1)


def test_sizes_without_latents_are_refused_before_the_run_begins(dit, capsys, tmp_path: Path):
    """With the sizes that a search may come to. The command that writes them is stated."""
    for options in (["--unfreeze.min_scale=0.25"], ["--unfreeze.schedule=1@16px,2@48px", "--model.size=48"]):
        config = dit("latents", *SEARCH, "--model.size=64", "--unfreeze.stages=2", *options)
        with pytest.raises(ConfigError, match=r"no latents of (48|64) px .* only of 16, 32 px") as problem:
            train(config)
        assert "write_dataset.py --split" in str(problem.value) and "--format latent --vae" in str(problem.value)
        assert not (tmp_path / "run").exists()
