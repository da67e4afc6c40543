"""Every training method, and the pairs that are allowed, in runs: trained, killed, resumed, evaluated, exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from vitlocal.errors import ConfigError, DataError
from vitlocal.methods.method import Probe, StepResult
from vitlocal.models.factory import load_weights
from vitlocal.models.shape import in_shape
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import WHOLE_MODEL, Shape
from vitlocal.progress import Progress
from vitlocal.train import probes
from vitlocal.train.checkpoint import load_checkpoint
from vitlocal.train.folder import CHECKPOINT
from vitlocal.train.log import read_lines, read_log
from vitlocal.train.loop import fit, train
from vitlocal.train.probes import answer, in_place, seconds
from vitlocal.train.run import Run, open_run
from vitlocal.train.searches import SEARCHES
from vitlocal.train.step import EAGER
from vitlocal.train.trainability import kernel_condition, tangent_kernel, zico

pytestmark = pytest.mark.usefixtures("no_report")

ROOT = Path(__file__).parent.parent
# 120 training images in batches of 32: four steps an epoch. The model has 4 blocks and a grid of 6 x 6.
COMMON = [
    "--model.depth=4", "--model.heads=4", "--budget.length=4ep", "--evaluate.every=2", "--model.drop_path=0.1",
    "--augment.mixup=0.8", "--train.ema_decay=0.9",
]  # fmt: skip
SEARCH = [
    "--autoprog.search_length=0.5ep",
    "--autoprog.probe_batches=2",
    "--autoprog.size_multiple=16",
    "--augment.randaugment=9",
]
UPDATES = [
    "--trilevel.update_every=1ep",
    "--trilevel.max_updates=2",
    "--trilevel.swap_fraction=0.1",
    "--trilevel.decay_end=80%",
]
METHODS = {
    "budgeted": ["--methods=budgeted"],
    "budgeted before": ["--methods=budgeted", "--budgeted.crop=before"],
    "budgeted deit": ["--methods=budgeted", "--model.name=vitlocal_deit_tiny_patch8_64", "--budgeted.copy_noise=0.1",
                      "--train.optimizer=muon"],
    "budgeted compute": ["--methods=budgeted", "--budgeted.compute=1%", "--budgeted.new_moments=copy"],
    "trilevel": ["--methods=trilevel", "--trilevel.token_keep_rate=0.7", *UPDATES],
    "trilevel deit": ["--methods=trilevel", "--model.name=vitlocal_deit_tiny_patch8_64", "--model.pool=avg",
                      "--trilevel.attention_masks=per_head", *UPDATES],
    "trilevel examples": ["--methods=trilevel", "--trilevel.levels=examples", "--trilevel.score=forgetting", *UPDATES],
    "autoprog": ["--methods=autoprog", *SEARCH],
    "autoprog by FLOPs": ["--methods=autoprog", *SEARCH, "--autoprog.cost=flops", "--autoprog.grow=momentum_new",
                          "--autoprog.moments=keep", "--autoprog.loss_of=online", "--autoprog.loss_on=val",
                          "--autoprog.loss_at=0.5,1"],
    "autoprog given": ["--methods=autoprog", "--autoprog.schedule=2@16px,3@32px,3@48px,4@48px"],
    "unfreeze": ["--methods=unfreeze", "--unfreeze.size_multiple=16", "--unfreeze.probe_batch_size=8"],
    "unfreeze given": ["--methods=unfreeze", "--unfreeze.schedule=1@16px,2@32px,3@48px,4@48px",
                       "--unfreeze.stage_init_std=0.02", "--model.drop_path=0", "--unfreeze.groups=top",
                       "--unfreeze.non_blocks=head", "--unfreeze.moments=reset"],
    "sizes and budgeted": ["--methods=image_size,budgeted", "--budgeted.grow=heads,hidden"],
    "sizes and trilevel": ["--methods=image_size,trilevel", *UPDATES],
    "budgeted and trilevel": ["--methods=budgeted,trilevel", "--trilevel.levels=examples", *UPDATES],
    "sizes and autoprog": ["--methods=image_size,autoprog", "--autoprog.space=depth", *SEARCH],
    "trilevel and autoprog": ["--methods=trilevel,autoprog", "--trilevel.levels=examples", *UPDATES, *SEARCH],
    "trilevel and autoprog of sizes": ["--methods=trilevel,autoprog", "--autoprog.space=size", *UPDATES, *SEARCH],
    "autoprog of sizes and unfreeze": ["--methods=autoprog,unfreeze", "--autoprog.space=size", *SEARCH,
                                       "--unfreeze.min_scale=1", "--unfreeze.probe_batch_size=8"],
    "budgeted and connections": ["--methods=budgeted,trilevel", "--trilevel.levels=attention", *UPDATES],
    "budgeted and unfreeze": ["--methods=budgeted,unfreeze", "--budgeted.grow=heads,hidden", "--unfreeze.size_multiple=16",
                              "--unfreeze.probe_batch_size=8"],
    "trilevel and unfreeze": ["--methods=trilevel,unfreeze", *UPDATES, "--unfreeze.size_multiple=16",
                              "--unfreeze.probe_batch_size=8"],
    "strength and trilevel": ["--methods=strength,trilevel", "--strength.by=budget", *UPDATES],
    "sizes and strength": ["--methods=image_size,strength", "--augment.randaugment=9"],
    "strength and budgeted": ["--methods=strength,budgeted", "--strength.by=budget", "--augment.randaugment=9"],
    "strength and unfreeze": ["--methods=strength,unfreeze", "--strength.by=budget", "--unfreeze.size_multiple=16",
                              "--unfreeze.probe_batch_size=8"],
    "strength and autoprog": ["--methods=strength,autoprog", "--strength.by=budget", "--autoprog.grow_augmentation=no",
                              *SEARCH],
    "budgeted and batches": ["--methods=budgeted,batch_size", "--batch_size.limit=64"],
    "sizes and batches": ["--methods=image_size,batch_size", "--batch_size.limit=64"],
    "trilevel and batches": ["--methods=trilevel,batch_size", "--batch_size.limit=64", *UPDATES],
    "autoprog and batches": ["--methods=autoprog,batch_size", "--batch_size.limit=64", *SEARCH],
    "unfreeze and batches": ["--methods=unfreeze,batch_size", "--batch_size.limit=64", "--unfreeze.size_multiple=16",
                             "--unfreeze.probe_batch_size=8"],
    "sizes and unfreeze": ["--methods=image_size,unfreeze", "--unfreeze.min_scale=1", "--unfreeze.probe_batch_size=8"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def recorded_times(monkeypatch: pytest.MonkeyPatch):
    """A timed search is replayed from times: here they follow from the candidate."""
    monkeypatch.setitem(probes.KINDS, "seconds", lambda run, probe: 1e-9 * run.macs(probe.size, probe.shape))


@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_methods_plan_purely_train_and_go_on(configure, decoder, killed_after, tmp_path: Path, options: list[str]):
    """Four steps, a kill, and the rest: bit for bit what an uninterrupted run gives; planning twice gives one plan."""
    whole, killed = (configure(*COMMON, *options, f"--run.folder={tmp_path}/{name}") for name in ("whole", "killed"))
    assert train(whole) == 0
    for steps in (5, 4):
        with killed_after(steps) as patch:
            patch.setattr(Run, "save_due", property(lambda run: run.clock.step % 4 == 3))
            train(killed)
    with open_run(killed) as run:
        state = str([method.state_dict() for method in run.methods])
        assert run.plan() == run.plan() and run.plans_ahead() == run.plans_ahead()
        assert str([method.state_dict() for method in run.methods]) == state
    assert train(killed) == 0
    one, other = (load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "killed"))
    assert all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
    assert [record["loss"] for record in read_log(tmp_path / "whole")] == pytest.approx(
        [record["loss"] for record in read_log(tmp_path / "killed")]
    )
    exports = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert exports[0] == exports[1]
    records = read_log(tmp_path / "whole")
    assert all(record["macs_per_image"] > 0 for record in records if record["loss"] is not None)
    if any(
        "probe_batch_size" in option or "search" in option for option in options
    ):  # what a search takes is told apart
        assert 0 < records[-1]["probe_seconds"] < records[-1]["train_seconds"]
    json.dumps(records)
    asked = [read_lines(tmp_path / name / SEARCHES) for name in ("whole", "killed")]
    assert asked[0] == asked[1] and bool(asked[0]) == any("probe_batch_size" in o or "search" in o for o in options)


@pytest.mark.parametrize("name", ["budgeted", "trilevel", "trilevel deit", "autoprog", "unfreeze"])
def test_the_export_is_what_was_evaluated(configure, decoder, tmp_path: Path, name: str):
    config = configure(*COMMON, *METHODS[name], "--train.ema_decay=none")
    with open_run(config) as run:
        fit(run)
        run.export()
        images = torch.randn(4, 3, 48, 48)
        with in_shape(run.model.eval(), run.evaluated_shape(), WHOLE_MODEL), torch.no_grad():
            expected = run.model(images)
    exported = timm.create_model(f"local-dir:{tmp_path}/run", pretrained=True).eval()
    assert isinstance(exported, VisionTransformer)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)


def test_tri_level_feeds_its_subset(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    seen: list[set[int]] = []
    original = Run.train_on

    def train_on(self, batch, plan):
        if self.clock.position.images == 0:
            seen.append(set())
        assert not seen[-1] & set(batch.ids.tolist())
        seen[-1] |= set(batch.ids.tolist())
        original(self, batch, plan)

    monkeypatch.setattr(Run, "train_on", train_on)
    with open_run(configure(*COMMON, *METHODS["trilevel examples"])) as run:
        first = set(run.methods[0]._kept.tolist())
        assert len(first) == 96 and run.clock.images_per_epoch == 96
        fit(run)
        assert run.methods[0]._version == 3
    assert seen[0] == first and all(len(rows) == 96 for rows in seen)
    assert len(seen[0] - seen[1]) <= 12 and seen[-1] == set(run.methods[0]._kept.tolist())


def test_a_net_takes_over_its_slow_average(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    """MoGrow: right after growth the net is its slow average's, mapped; each average is its own, mapped; and all
    moments begin anew. A candidate of the supernet computes what the net does that is taken out for it."""
    config = configure(*COMMON, *METHODS["autoprog"], "--train.ema_decay=none", "--autoprog.ema_decays=0.5,0.9")
    seen: list[bool] = []
    original = Run._grow

    def grow(self, plan):
        growing = plan.growth.number != self.grown and plan.growth.blocks
        before = [
            {name: value.clone() for name, value in average.model.state_dict().items()} for average in self.copies
        ]
        original(self, plan)
        if not growing:
            return
        states = [self.model.state_dict(), *(average.model.state_dict() for average in self.copies)]
        for state, old in zip(states, (before[-1], *before), strict=True):
            sources = dict(plan.growth.blocks)
            for name, value in state.items():
                if name.startswith("blocks."):
                    _, slot, rest = name.split(".", 2)
                    name = f"blocks.{sources.get(int(slot), int(slot))}.{rest}"
                assert torch.equal(value, old[name])
        assert not any(value.any() for state in self.optimizer.state.values() for value in state.values())
        seen.append(True)

    monkeypatch.setattr(Run, "_grow", grow)
    monkeypatch.setattr("vitlocal.methods.autoprog.best", lambda *told: 0)  # the smallest candidate
    with open_run(config) as run:
        fit(run)
        assert seen and run.clock.step == 16  # as many steps as without the method
        method = run.methods[0]
        images = torch.randn(2, 3, 48, 48)
        run.model.eval()
        order = method._supernet(1)[0]
        for net in method._candidates(1):
            skipped = method._skipped(1, net.depth)
            with in_shape(run.model, Shape(block_order=order, skipped_blocks=skipped), WHOLE_MODEL):
                inside = run.model(images)
            left = tuple(slot for slot in order if slot not in skipped)
            assert len(left) == net.depth
            with in_shape(run.model, Shape(block_order=left), WHOLE_MODEL):
                assert torch.equal(run.model(images), inside)


def test_new_blocks_may_be_as_drawn(configure, decoder):
    """autoprog.grow=random: they are no copies, neither of their sources nor of what lay in their slots."""
    options = ["--methods=autoprog", "--autoprog.space=depth", "--autoprog.stages=2", "--autoprog.schedule=2,4"]
    with open_run(configure(*COMMON, *options, "--autoprog.grow=random")) as run:
        run.methods[0].observe(StepResult(None, None, run.plan(), Progress()))
        plan, before = run.plan(Progress(fraction=0.5)), {n: v.clone() for n, v in run.model.state_dict().items()}
        run._grow(plan)
        for slot, source in plan.growth.blocks:
            new = run.model.blocks[slot].attn.qkv.weight
            assert not any(torch.equal(new, before[f"blocks.{old}.attn.qkv.weight"]) for old in (slot, source))
        assert len(plan.growth.blocks) == 2 and torch.equal(run.model.head.weight, before["head.weight"])


def test_blocks_that_are_skipped_have_no_gradient(configure, decoder):
    with open_run(configure(*COMMON, *METHODS["autoprog"])) as run:
        plan = next(plan for plan in (run.plan(Progress(step=step)) for step in range(50)) if plan.shape.skipped_blocks)
        run.step.put(plan.shape)
        with run.sources.train.open(plan.feed, run.clock.position) as batches:
            run.step._gradients(next(batches), 0, EAGER)
        for slot, block in enumerate(run.model.blocks):
            assert all((p.grad is None) == (slot in plan.shape.skipped_blocks) for p in block.parameters())


def test_frozen_blocks_stay(configure, decoder):
    schedule = ["--methods=unfreeze", "--unfreeze.schedule=1@16px,2@32px,3@48px,4@48px"]
    config = configure(*COMMON, *schedule, "--budget.length=1ep", "--train.weight_decay=0.5")
    with open_run(config) as run:
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        plan = run.plan()
        assert plan.shape.trainable_blocks == (0,)
        with run.sources.train.open(plan.feed, run.clock.position) as batches:
            run.train_on(next(batches), plan)
        after = run.model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert not any(name.startswith(("blocks.1", "blocks.2", "blocks.3")) for name in moved)
        assert {"head.weight", "pos_embed"} <= moved and any(name.startswith("blocks.0") for name in moved)
        assert all(p.grad is None for p in run.model.blocks[1].parameters())


@pytest.mark.parametrize("model", ["--model.norm=layer", "--model.norm=batch",
                                   "--model.name=vitlocal_localvit_tiny_patch8_64"])  # fmt: skip
def test_what_is_frozen_stays_bit_for_bit_over_a_stage(configure, decoder, model: str):
    """Decay and moments, too, and BatchNorms' statistics: the blocks of later stages are what they were drawn as until
    theirs begins, also after evaluations."""
    schedule = ["--methods=unfreeze", "--unfreeze.schedule=1@16px,2@32px,3@48px,4@48px", "--train.weight_decay=0.5"]
    with open_run(configure(*COMMON, *schedule, model)) as run:
        before = {name: value.clone() for name, value in run.model.state_dict().items()}
        seen = 0
        while (plan := run.plan()).shape.trainable_blocks in ((0,), (0, 1)):
            run.begin_pass(plan)
            run.accuracy(limit=1)
            with run.sources.train.open(plan.feed, run.clock.position) as batches:
                run.train_on(next(batches), plan)
            trained = run.model.blocks[0].state_dict()
            assert not any(torch.equal(trained[n], before[f"blocks.0.{n}"]) for n in trained if "running" in n)
            frozen = [slot for slot in range(4) if slot not in plan.shape.trainable_blocks]
            for slot in frozen:
                for name, value in run.model.blocks[slot].state_dict().items():
                    assert torch.equal(value, before[f"blocks.{slot}.{name}"]), (slot, name)
            seen += len(frozen)
        assert seen == 4 * 3 + 4 * 2  # two stages of four steps


def test_a_step_does_not_tell_some_images_their_stage(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    """About unfreeze.stage_null_prob of them, drawn by the step, also where nothing else is drawn for a block."""
    untold = []
    original = VisionTransformer._told_stage

    def told_stage(self, tokens, noise):
        found = original(self, tokens, noise)
        if self.training:
            row = (found - tokens)[:, 0].detach()
            untold.append(torch.isclose(row, self.stage_table[-1], atol=1e-5).all(dim=1))
        return found

    monkeypatch.setattr(VisionTransformer, "_told_stage", told_stage)
    config = configure("--methods=unfreeze", "--model.depth=4", "--unfreeze.schedule=1@16px,2@16px,3@16px,4@16px",
                       "--model.drop_path=0", "--unfreeze.stage_null_prob=0.3", "--budget.length=6ep",
                       "--unfreeze.stage_init_std=0.5")  # fmt: skip
    with open_run(config) as run:
        fit(run)
    assert float(torch.cat(untold).float().mean()) == pytest.approx(0.3, abs=0.06)  # of 720 images


def test_probes_leave_no_trace(configure, decoder):
    given = ["--methods=autoprog", "--autoprog.schedule=4@48px", "--autoprog.stages=1"]  # for its averages
    with open_run(configure(*COMMON, "--model.norm=batch", *given)) as run:
        plan = run.plan()
        with run.sources.train.open(plan.feed, run.clock.position) as batches:
            run.train_on(next(batches), plan)
        shape = Shape(block_order=(0, 1, 2), skipped_blocks=(1,), input_size=32)
        assert 0 < seconds(run, in_place(run, Probe("seconds", shape, 48, 2))) < 10
        run.step.put(plan.shape)
        before = load_like(run)
        generator = torch.get_rng_state()
        for probe in (
            Probe("loss", shape, 48, 2),
            Probe("loss", shape, 48, 2, average=0),
            Probe("loss", shape, 48, 2, split="val"),
            Probe("seconds", shape, 48, 2),
            Probe("trainability", Shape(trainable_blocks=(1,)), 32, 2, 2, samples=6),
        ):
            placed = in_place(run, probe)
            first, again = answer(run, placed), answer(run, placed)
            assert first == again and np.isfinite(np.atleast_1d(first)).all()
        assert run.step.shape == plan.shape and torch.equal(generator, torch.get_rng_state())
        after = load_like(run)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert all(p.requires_grad for p in run.model.parameters())


def load_like(run: Run) -> dict[str, torch.Tensor]:
    averages = {
        f"{number}.{name}": value.clone()
        for number, average in enumerate((run.average, *run.copies))
        for name, value in average.model.state_dict().items()
    }
    moments = {
        f"{name}.{key}": value.clone()
        for name, p in run.model.named_parameters()
        for key, value in run.optimizer.state[p].items()
    }
    return {name: value.clone() for name, value in run.model.state_dict().items()} | moments | averages


def test_the_tangent_kernel_of_a_linear_model():
    """Of y = W·x the gradient of Σy by W repeats x for each output: Θ = C · X·Xᵀ."""
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(5, 3, bias=False), torch.randn(4, 5)
    kernel = tangent_kernel(model, model(inputs))
    torch.testing.assert_close(kernel, 3 * (inputs @ inputs.T).double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(kernel, kernel.T) and float(torch.linalg.eigvalsh(kernel)[0]) > -1e-9
    values = torch.linalg.eigvalsh(kernel)
    assert kernel_condition(kernel) == pytest.approx(float(values[-1] / values[0])) and kernel_condition(kernel) >= 1
    assert kernel_condition(torch.ones(3, 3)) == float("inf")
    assert kernel_condition(torch.full((2, 2), float("nan"))) == float("inf")
    with pytest.raises(ValueError, match="give two samples or more"):
        kernel_condition(torch.ones(1, 1))


def test_zico_by_hand():
    first, second = {"a": torch.tensor([1.0, 2.0, 5.0])}, {"a": torch.tensor([3.0, 2.0, -1.0])}
    # Means of magnitudes 2, 2, 3; deviations 1, 0 (left out), 3.
    assert zico([first, second]) == pytest.approx(np.log(2 / 1 + 3 / 3))
    same = {"b": torch.ones(2)}
    assert zico([first | same, second | same]) == zico([first, second])
    with pytest.raises(ValueError, match="two or more"):
        zico([first])


def test_fine_tuning_starts_from_weights(configure, decoder, tmp_path: Path):
    """A run's folder, another number of classes, another grid; and what is wrong with them."""
    train(configure("--budget.length=1ep", f"--run.folder={tmp_path}/first"))
    weights = load_file(tmp_path / "first" / "model.safetensors")
    with open_run(configure(f"--model.weights={tmp_path}/first", f"--run.folder={tmp_path}/a")) as run:
        mine = run.model.state_dict()
        assert all(torch.equal(mine[name], weights[name]) for name in weights) and run.started_anew == []
    fewer = {name: tensor for name, tensor in weights.items()}
    fewer["head.weight"], fewer["head.bias"] = torch.zeros(7, 32), torch.zeros(7)
    torch.save(fewer, tmp_path / "seven.pth")
    with open_run(configure(f"--model.weights={tmp_path}/seven.pth", f"--run.folder={tmp_path}/b")) as run:
        assert run.started_anew == ["head.weight", "head.bias"]
        assert torch.equal(run.model.state_dict()["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"])
    options = [f"--model.weights={tmp_path}/first", "--model.size=64", f"--run.folder={tmp_path}/c"]
    with open_run(configure(*options)) as run:
        table = run.model.pos_embed
        assert table.shape[1] == 65 and torch.equal(table[:, :1], weights["pos_embed"][:, :1])
    for folder, problem in (
        ("nowhere", "is not there"),
        ("first/classes.json", "cannot be read as weights"),
    ):
        with pytest.raises((ConfigError, DataError), match=problem):
            train(configure(f"--model.weights={tmp_path}/{folder}", f"--run.folder={tmp_path}/d"))
    with pytest.raises(ConfigError, match="set the model's options as they were"):
        train(configure(f"--model.weights={tmp_path}/first", "--model.width=64", f"--run.folder={tmp_path}/d"))
    with pytest.raises(ConfigError, match=r"another model's. That run was given --model.name=.* --model.depth="):
        train(configure(f"--model.weights={tmp_path}/first", "--model.depth=5", f"--run.folder={tmp_path}/d"))
    assert not (tmp_path / "d").exists()


def test_timms_own_model_is_fine_tuned_from_its_file(configure, decoder, tmp_path: Path):
    """With registers beside its class token, at another size and for other classes, unfrozen block by block."""
    theirs = timm.create_model("test_vit", num_classes=7, img_size=64, reg_tokens=3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    mine = timm.create_model("test_vit", num_classes=20, img_size=48, reg_tokens=3)
    assert load_weights(mine, str(tmp_path / "theirs.pth")) == ["head.weight", "head.bias"]
    assert mine.pos_embed.shape == (1, 4 + 9, 64) and torch.equal(mine.pos_embed[:, :4], theirs.pos_embed[:, :4])
    plain = timm.create_model("test_vit", num_classes=7, img_size=64).state_dict()
    torch.save(plain, tmp_path / "plain.pth")
    options = ["--model.name=test_vit", "--model.depth=none", "--model.width=none", "--model.heads=none",
               f"--model.weights={tmp_path}/plain.pth", "--methods=unfreeze", "--unfreeze.stage_embedding=no",
               "--unfreeze.stages=3", "--unfreeze.schedule=1@32px,2@48px,3@48px",
               "--train.weight_decay=0.5"]  # fmt: skip
    with open_run(configure("--budget.length=3ep", *options)) as run:
        assert run.started_anew == ["head.weight", "head.bias"]
        while (plan := run.plan()).shape.trainable_blocks is not None:
            run.begin_pass(plan)
            with run.sources.train.open(plan.feed, run.clock.position) as batches:
                run.train_on(next(batches), plan)
        assert run.clock.step == 8 and plan.feed.size == 48
        moved = {
            slot for slot in range(6) for name, value in run.model.blocks[slot].state_dict().items()
            if not torch.equal(value, plain[f"blocks.{slot}.{name}"])
        }  # fmt: skip
        assert moved == {0, 1, 3, 4}  # the last group's are as they came
    with pytest.raises(ConfigError, match="set unfreeze.stage_embedding=no"):
        train(configure(*options, "--unfreeze.stage_embedding=yes", f"--run.folder={tmp_path}/told"))


def test_a_method_that_reckons_the_budget(configure, decoder, tmp_path: Path):
    assert train(configure(*COMMON, "--methods=budgeted", "--budgeted.epochs=1,0,2", "--budget.length=24h")) == 0
    records = read_log(tmp_path / "run")
    assert records[-1]["epoch"] == 3 and records[-1]["lr"] == pytest.approx(1e-5)
    assert train(configure(*COMMON, "--methods=budgeted", "--budgeted.epochs=1,0,2", "--budget.length=24h")) == 0


def test_what_the_model_lacks_is_told_and_leaves_nothing(configure, decoder, tmp_path: Path):
    for options, problem in (
        (["--methods=budgeted", "--model.name=vitlocal_localvit_tiny_patch8_64"], "hidden width"),
        (["--methods=autoprog", "--model.name=vit_tiny_patch16_224", "--model.depth=none", "--model.width=none",
          "--model.heads=none"], "needs a vitlocal_"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=problem):
            train(configure(*options))
        assert not (tmp_path / "run").exists()


PROGRAM = """
import json, sys
from pathlib import Path
import torch.distributed as dist
from vitlocal.config import read_config
from vitlocal.train import probes
from vitlocal.train.loop import train
from vitlocal.train.distributed import Ranks

connect = Ranks.connect

def once(ranks, device):  # torchrun's store brings processes together once
    if dist.is_initialized():
        ranks.device, ranks._decisions = device, dist.new_group(backend="gloo")
    else:
        connect(ranks, device)

Ranks.connect, Ranks.close = once, lambda ranks: None
probes.KINDS["seconds"] = lambda run, probe: 1e-9 * run.macs(probe.size, probe.shape)
for options in json.loads(Path(sys.argv[1]).read_text()):
    assert train(read_config(options, {})) == 0
"""


@pytest.mark.parametrize("names", [list(METHODS)[::2], list(METHODS)[1::2]], ids=["even", "odd"])
def test_two_processes_agree_on_every_plan(configure, decoder, folder: Path, tmp_path: Path, names: list[str]):
    """With gloo, as one: what methods saw on both is put together, and rank 0's answers count for both."""
    runs, plain = (
        [],
        ["--augment.mixup=0", "--train.ema_decay=none", "--train.batch_size=34", "--trilevel.score=attention"],
    )
    for name in names:
        config = configure(*COMMON, *METHODS[name], *plain, f"--run.folder={tmp_path}/one-{_folder(name)}")
        assert train(config) == 0
        options = [f"--{key}={_text(value)}" for key, value in config.flat().items() if key != "run.folder"]
        runs.append([*options, f"--run.folder={tmp_path}/two-{_folder(name)}", "--run.threads=1", "--data.workers=1"])
    program, listed = tmp_path / "program.py", tmp_path / "runs.json"  # too long for a command line
    program.write_text(PROGRAM)
    listed.write_text(json.dumps(runs))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run([*start, str(program), str(listed)], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    for name in names:
        folders = [tmp_path / f"{count}-{_folder(name)}" for count in ("one", "two")]
        one, two = (load_checkpoint(run / CHECKPOINT) for run in folders)
        losses = [[record["loss"] for record in read_log(run)] for run in folders]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4), name
        farthest = max(float((one["model"][key] - two["model"][key]).abs().max()) for key in one["model"])
        assert farthest < 1e-3, name
        if "trilevel" in one["methods"]:
            assert torch.equal(one["methods"]["trilevel"]["kept"], two["methods"]["trilevel"]["kept"])


def _folder(name: str) -> str:
    return name.replace(" ", "-")


def _text(value) -> str:
    return ",".join(map(str, value)) or "none" if isinstance(value, list) else "none" if value is None else str(value)


def test_two_methods_ask_at_one_point(configure, decoder, tmp_path: Path):
    """A new subset is known before the next question is asked."""
    options = ["--methods=trilevel,unfreeze", "--trilevel.levels=examples", *UPDATES, "--unfreeze.probe_batch_size=8",
               "--unfreeze.size_multiple=16"]  # fmt: skip
    assert train(configure(*COMMON, *options)) == 0
    state = load_checkpoint(tmp_path / "run" / CHECKPOINT)["methods"]
    assert state["trilevel"]["version"] == 3 and len(state["unfreeze"]["times"]) == 3


class Pair:
    """Two ranks in turn: what the first gave to a sum is added to what the second gives."""

    def __init__(self, others: list[torch.Tensor]):
        self.others = others

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values.add_(self.others.pop(0))


def test_notes_of_several_processes_are_added_up_and_come_back_once(configure, decoder):
    with open_run(configure(*COMMON, *METHODS["trilevel examples"], "--trilevel.score=attention")) as run:
        method = run.methods[0]
        rows = torch.from_numpy(method._kept)
        for part, hit in ((rows[:48], True), (rows[48:], False)):  # a half by each process
            method.observe(StepResult(None, part, run.plan(), Progress(), torch.full((48,), hit), torch.ones(48)))
            if hit:
                first = {name: value.clone() for name, value in method.local_state().items()}
                method._new_record()
        state = method.state_dict()
        ranks, run.ranks = run.ranks, Pair([first[name] for name in method.local_state()])
        notes = run.state()["notes"]["trilevel"]
        run.ranks = ranks
        method.load_state_dict(state)
        assert not method.local_state()["records"].any()  # as it is on rank 1
        method.load_state_dict(state, notes)  # and on rank 0
        (record,) = method.local_state()["records"]
        assert sorted(record[rows].tolist()) == [1] * 48 + [2] * 48
        assert method.local_state()["attention_variance"].sum() == 96


def test_the_pass_that_ends_a_stage_is_logged_as_it_was_trained(configure, decoder, tmp_path: Path, capsys):
    train(configure(*COMMON, "--methods=budgeted", "--budgeted.epochs=1,1,2", "--evaluate.every=0"))
    records = read_log(tmp_path / "run")
    assert [record.get("shape.heads", "as before") for record in records] == [1, 3, None, "as before"]
    assert [record.get("grid") for record in records] == [4, 5, None, None]
    said = capsys.readouterr().out
    assert said.count("48 px, tokens 4×4  batch") == 1 and said.count("48 px  batch") == 2
    macs = [record["macs_per_image"] for record in records]
    assert macs[0] < macs[1] < macs[2] == macs[3]


def test_a_run_that_ends_before_its_last_stage_is_exported_as_it_was(configure, decoder, tmp_path: Path):
    """Heads and hidden units that do not run give nothing in the exported model, which crops the grid as it did."""
    with open_run(configure(*COMMON, "--methods=budgeted", "--train.ema_decay=none")) as run:
        plan = run.plan()
        with run.sources.train.open(plan.feed, run.clock.position) as batches:
            run.train_on(next(batches), plan)
        assert run.step.shape.heads == 1 and run.step.shape.grid == 4
        run.export()
        images = torch.randn(2, 3, 48, 48)
        expected = run.model.eval()(images)
    exported = timm.create_model(f"local-dir:{tmp_path}/run", pretrained=True).eval()
    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)
