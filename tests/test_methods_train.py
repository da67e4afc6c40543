"""Every training method, and the allowed pairs, in runs: trained, killed, resumed, evaluated, exported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from method_plans import COMMON
from narrow_models import NARROW_PVT, NARROW_SWIN
from safetensors.torch import load_file
from trainers import open_trainer

from vitlocal.errors import ConfigError
from vitlocal.jsonl import read_lines
from vitlocal.methods.method import StepResult
from vitlocal.models.shape import temporary_shape
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import WHOLE_MODEL, Shape
from vitlocal.progress import Progress
from vitlocal.report.run_folder import read_log
from vitlocal.train.build import open_run
from vitlocal.train.checkpoint import load_checkpoint
from vitlocal.train.command import export, train
from vitlocal.train.devices import EAGER
from vitlocal.train.distributed import ALONE, Ranks
from vitlocal.train.loop import fit
from vitlocal.train.probes import Prober
from vitlocal.train.run_folder import CHECKPOINT
from vitlocal.train.search_log import SEARCHES
from vitlocal.train.state import trained_plan
from vitlocal.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")

ROOT = Path(__file__).parent.parent
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
    "budgeted compute": ["--methods=budgeted", "--budgeted.compute=1%", "--budgeted.new_moments=copy",
                         "--train.optimizer=muon"],
    "budgeted pvt": ["--methods=budgeted", *NARROW_PVT, "--budgeted.copy_noise=0.1"],
    "budgeted swin": ["--methods=budgeted", *NARROW_SWIN, "--budgeted.crop=before", "--train.optimizer=muon"],
    "unfreeze swin": ["--methods=unfreeze", *NARROW_SWIN, "--unfreeze.size_multiple=16",
                      "--unfreeze.probe_batch_size=4", "--unfreeze.stage_embedding=no", "--unfreeze.non_blocks=head"],
    "trilevel": ["--methods=trilevel", "--trilevel.token_keep_rate=0.7", *UPDATES],
    "trilevel swin": ["--methods=trilevel", *NARROW_SWIN, "--trilevel.levels=examples,tokens",
                      "--trilevel.pruned_blocks=2", *UPDATES],
    "trilevel deit": ["--methods=trilevel", "--model.name=vitlocal_deit_tiny_patch8_64", "--model.pool=avg",
                      "--trilevel.attention_masks=per_head", *UPDATES],
    "trilevel examples": ["--methods=trilevel", "--trilevel.levels=examples", "--trilevel.score=forgetting", *UPDATES],
    "autoprog": ["--methods=autoprog", *SEARCH],
    "autoprog by FLOPs": ["--methods=autoprog", *SEARCH, "--autoprog.cost=flops", "--autoprog.grow=momentum_new",
                          "--autoprog.moments=keep", "--autoprog.loss_of=online", "--autoprog.loss_on=val",
                          "--autoprog.loss_at=0.5,1"],
    "soap": ["--methods=image_size", "--train.optimizer=soap", "--train.soap_every=2"],
    "autoprog given": ["--methods=autoprog", "--autoprog.schedule=2@16px,3@32px,3@48px,4@48px"],
    "unfreeze": ["--methods=unfreeze", "--unfreeze.size_multiple=16", "--unfreeze.probe_batch_size=4"],
    "unfreeze given": ["--methods=unfreeze", "--unfreeze.schedule=1@16px,2@32px,3@48px,4@48px",
                       "--unfreeze.stage_init_std=0.02", "--model.drop_path=0", "--unfreeze.groups=top",
                       "--unfreeze.non_blocks=head", "--unfreeze.moments=reset"],
    "sizes and budgeted": ["--methods=image_size,budgeted", "--budgeted.grow=heads,hidden"],
    "sizes and budgeted swin": ["--methods=image_size,budgeted", *NARROW_SWIN, "--budgeted.grow=heads,hidden",
                                "--image_size.stages=32px until 50%,48px"],
    "sizes and trilevel": ["--methods=image_size,trilevel", *UPDATES],
    "budgeted and trilevel": ["--methods=budgeted,trilevel", "--trilevel.levels=examples", *UPDATES],
    "sizes and autoprog": ["--methods=image_size,autoprog", "--autoprog.space=depth", *SEARCH],
    "trilevel and autoprog": ["--methods=trilevel,autoprog", "--trilevel.levels=examples", *UPDATES, *SEARCH],
    "trilevel and autoprog of sizes": ["--methods=trilevel,autoprog", "--autoprog.space=size", *UPDATES, *SEARCH],
    "autoprog of sizes and unfreeze": ["--methods=autoprog,unfreeze", "--autoprog.space=size", *SEARCH,
                                       "--unfreeze.min_scale=1", "--unfreeze.probe_batch_size=4"],
    "budgeted and connections": ["--methods=budgeted,trilevel", "--trilevel.levels=attention", *UPDATES],
    "budgeted and unfreeze": ["--methods=budgeted,unfreeze", "--budgeted.grow=heads,hidden",
                              "--unfreeze.size_multiple=16",
                              "--unfreeze.probe_batch_size=4"],
    "trilevel and unfreeze": ["--methods=trilevel,unfreeze", *UPDATES, "--unfreeze.size_multiple=16",
                              "--unfreeze.probe_batch_size=4"],
    "strength and trilevel": ["--methods=strength,trilevel", "--strength.by=budget", *UPDATES],
    "sizes and strength": ["--methods=image_size,strength", "--augment.randaugment=9"],
    "sizes, strength and batches": ["--methods=image_size,strength,batch_size", "--augment.randaugment=15",
                                    "--augment.randaugment_ops=big_vision",
                                    "--batch_size.limit=48"],
    "strength and budgeted": ["--methods=strength,budgeted", "--strength.by=budget", "--augment.randaugment=9"],
    "strength and unfreeze": ["--methods=strength,unfreeze", "--strength.by=budget", "--unfreeze.size_multiple=16",
                              "--unfreeze.probe_batch_size=4"],
    "strength and autoprog": ["--methods=strength,autoprog", "--strength.by=budget", "--autoprog.grow_augmentation=no",
                              *SEARCH],
    "budgeted and batches": ["--methods=budgeted,batch_size", "--batch_size.limit=64"],
    "sizes and batches": ["--methods=image_size,batch_size", "--batch_size.limit=64"],
    "trilevel and batches": ["--methods=trilevel,batch_size", "--batch_size.limit=64", *UPDATES],
    "autoprog and batches": ["--methods=autoprog,batch_size", "--batch_size.limit=64", *SEARCH],
    "unfreeze and batches": ["--methods=unfreeze,batch_size", "--batch_size.limit=64", "--unfreeze.size_multiple=16",
                             "--unfreeze.probe_batch_size=4"],
    "sizes and unfreeze": ["--methods=image_size,unfreeze", "--unfreeze.min_scale=1", "--unfreeze.probe_batch_size=4"],
}  # fmt: skip
# Models in levels: the methods that the entries above leave out. PVTv2 takes no images below 29 px.
SMALLER = "--image_size.stages=32px until 50%,48px"
GROWING = ["--methods=image_size,strength,batch_size", SMALLER, "--augment.randaugment=9",
           "--batch_size.limit=64"]  # fmt: skip
SEARCHED = ["--methods=trilevel,autoprog", "--trilevel.levels=examples", "--autoprog.space=size", *UPDATES, *SEARCH,
            "--autoprog.min_scale=0.6"]  # fmt: skip
METHODS |= {
    "sizes, strength and batches pvt": [*GROWING, *NARROW_PVT],
    "trilevel and autoprog of sizes pvt": [*SEARCHED, *NARROW_PVT],
}
SLOW = {
    "sizes, strength and batches swin": [*GROWING, *NARROW_SWIN],
    "trilevel and autoprog of sizes swin": [*SEARCHED, *NARROW_SWIN],
    "sizes and budgeted pvt": ["--methods=image_size,budgeted", *NARROW_PVT, "--budgeted.grow=heads,hidden", SMALLER],
    "unfreeze pvt": ["--methods=unfreeze", *NARROW_PVT, "--unfreeze.min_scale=0.6", "--unfreeze.size_multiple=16",
                     "--unfreeze.probe_batch_size=4", "--unfreeze.stage_embedding=no"],
    "strength swin": ["--methods=strength", *NARROW_SWIN, "--strength.by=budget", "--augment.randaugment=9"],
}  # fmt: skip


@pytest.fixture(autouse=True)
def recorded_times(monkeypatch: pytest.MonkeyPatch):
    """Replaces the measured times of a search by times that follow from the candidate."""
    monkeypatch.setattr(Prober, "_seconds", lambda prober, probe, plan: 1e-9 * prober._macs(probe.size, probe.shape))


@pytest.mark.parametrize(
    "options",
    [
        *(pytest.param(options, id=name) for name, options in METHODS.items()),
        *(pytest.param(options, id=name, marks=pytest.mark.slow) for name, options in SLOW.items()),
    ],
)
def test_methods_plan_purely_train_and_resume(configure, decoder, killed_after, tmp_path: Path, options: list[str]):
    """A run that is killed twice equals an uninterrupted run. Planning twice gives equal plans.

    A budgeted run is killed and continued in each of its stages.
    """
    whole, killed = (configure(*COMMON, *options, f"--run.folder={tmp_path}/{name}") for name in ("whole", "killed"))
    assert train(whole) == 0
    budgeted, growths = "budgeted" in options[0], []
    saves, kills = ((2, 6, 10), (3, 5, 4)) if budgeted else ((3, 7), (5, 4))
    for steps in kills:
        with killed_after(steps) as patch:
            patch.setattr(Trainer, "save_due", lambda trainer, now: now.step in saves)
            train(killed)
        growths.append(load_checkpoint(tmp_path / "killed" / CHECKPOINT)["growth_number"])
    assert growths == [0, 1, 2] or not budgeted
    with open_trainer(killed) as trainer:
        state = str([method.state_dict() for method in trainer.state.methods])
        assert trainer.plan() == trainer.plan() and trainer.upcoming_plans() == trainer.upcoming_plans()
        assert str([method.state_dict() for method in trainer.state.methods]) == state
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
    if any("probe_batch_size" in option or "search" in option for option in options):
        assert 0 < records[-1]["probe_seconds"] < records[-1]["train_seconds"]
    json.dumps(records)
    asked = [read_lines(tmp_path / name / SEARCHES) for name in ("whole", "killed")]
    assert asked[0] == asked[1] and bool(asked[0]) == any("probe_batch_size" in o or "search" in o for o in options)


@pytest.mark.parametrize("name", ["budgeted", "trilevel", "trilevel deit", "autoprog", "unfreeze"])
def test_the_export_is_what_was_evaluated(configure, decoder, tmp_path: Path, name: str):
    config = configure(*COMMON, *METHODS[name], "--train.ema_decay=none")
    with open_run(config) as run:
        trainer = run.trainer
        fit(trainer)
        export(run, tmp_path / "run")
        images = torch.randn(4, 3, 48, 48)
        shape = trainer.evaluator.shape(trained_plan(trainer.state))
        with temporary_shape(trainer.state.model.eval(), shape, WHOLE_MODEL), torch.no_grad():
            expected = trainer.state.model(images)
    exported = timm.create_model(f"local-dir:{tmp_path}/run", pretrained=True).eval()
    assert isinstance(exported, VisionTransformer)
    with torch.no_grad():
        torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)


LOADING = """
import sys
import timm, torch
for run in sys.argv[1:]:
    images, expected = torch.load(f"{run}/expected.pt")
    model = timm.create_model(f"local-dir:{run}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
assert not any(name.split(".")[0] == "vitlocal" for name in sys.modules)
"""


def test_timm_alone_loads_budgeted_pvt_and_swin(configure, decoder, tmp_path: Path):
    """The exports of runs in a process without vitlocal, and all of their weights."""
    swin = ["--model.name=swin_tiny_patch4_window7_224", "--model.width=24", "--model.patch_size=2"]
    folders = []
    for name, options in (("pvt", ["--model.name=pvt_v2_b0", "--model.width=none"]), ("swin", swin)):
        options = [*options, "--model.heads=none", "--model.depth=none", f"--run.folder={tmp_path}/{name}"]
        length = ["--budget.length=4steps", "--evaluate.every=0", "--train.ema_decay=none"]
        with open_run(configure("--methods=budgeted", *options, *length)) as run:
            fit(run.trainer)
            assert run.trainer.state.growth_number == 2
            export(run, tmp_path / name)
            model, images = run.trainer.state.model.eval(), torch.randn(2, 3, 48, 48)
            with torch.no_grad():
                torch.save((images, model(images)), tmp_path / name / "expected.pt")
        plain = timm.create_model(f"local-dir:{tmp_path}/{name}", pretrained=False)
        plain.load_state_dict(load_file(tmp_path / name / "model.safetensors"), strict=True)
        assert all(torch.equal(value, plain.state_dict()[key]) for key, value in model.state_dict().items())
        folders.append(str(tmp_path / name))
    done = subprocess.run(
        [sys.executable, "-c", LOADING, *folders], cwd=tmp_path, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr


def test_tri_level_feeds_its_subset(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    seen: list[set[int]] = []
    original = Trainer.train_step

    def train_step(self, batch, plan):
        if self.state.clock.position.images == 0:
            seen.append(set())
        assert not seen[-1] & set(batch.ids.tolist())
        seen[-1] |= set(batch.ids.tolist())
        return original(self, batch, plan)

    monkeypatch.setattr(Trainer, "train_step", train_step)
    with open_trainer(configure(*COMMON, *METHODS["trilevel examples"])) as trainer:
        first = set(trainer.state.methods[0]._kept.tolist())
        assert len(first) == 96 and trainer.state.clock.images_per_epoch == 96
        fit(trainer)
        assert trainer.state.methods[0]._version == 3
    assert seen[0] == first and all(len(rows) == 96 for rows in seen)
    assert len(seen[0] - seen[1]) <= 12 and seen[-1] == set(trainer.state.methods[0]._kept.tolist())


def test_growth_replaces_the_weights_by_the_slow_average(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    """After growth (MoGrow), the weights are the slow average's, and each average keeps its own, both mapped.

    All moments start at zero. A candidate in the supernet computes the same as the net that is taken out for it.
    """
    config = configure(*COMMON, *METHODS["autoprog"], "--train.ema_decay=none", "--autoprog.ema_decays=0.5,0.9")
    seen: list[bool] = []
    original = Trainer._grow

    def grow(self, plan):
        growing = plan.growth.number != self.state.growth_number and plan.growth.blocks
        before = [
            {name: value.clone() for name, value in average.model.state_dict().items()}
            for average in self.state.method_emas
        ]
        original(self, plan)
        if not growing:
            return
        states = [self.state.model.state_dict(), *(ema.model.state_dict() for ema in self.state.method_emas)]
        for state, old in zip(states, (before[-1], *before), strict=True):
            sources = dict(plan.growth.blocks)
            for name, value in state.items():
                if name.startswith("blocks."):
                    _, slot, rest = name.split(".", 2)
                    name = f"blocks.{sources.get(int(slot), int(slot))}.{rest}"
                assert torch.equal(value, old[name])
        assert not any(value.any() for state in self.state.optimizer.state.values() for value in state.values())
        seen.append(True)

    monkeypatch.setattr(Trainer, "_grow", grow)
    monkeypatch.setattr("vitlocal.methods.autoprog.best", lambda *measured: 0)  # the smallest candidate
    with open_trainer(config) as trainer:
        fit(trainer)
        assert seen and trainer.state.clock.step == 16  # as many steps as without the method
        method = trainer.state.methods[0]
        images = torch.randn(2, 3, 48, 48)
        trainer.state.model.eval()
        order = method._supernet(1)[0]
        for net in method._candidates(1):
            skipped = method._skipped(1, net.depth)
            with temporary_shape(trainer.state.model, Shape(block_order=order, skipped_blocks=skipped), WHOLE_MODEL):
                inside = trainer.state.model(images)
            left = tuple(slot for slot in order if slot not in skipped)
            assert len(left) == net.depth
            with temporary_shape(trainer.state.model, Shape(block_order=left), WHOLE_MODEL):
                assert torch.equal(trainer.state.model(images), inside)


def test_new_blocks_may_be_as_drawn(configure, decoder):
    """autoprog.grow=random: new blocks differ from their sources and from the earlier content of their slots."""
    options = ["--methods=autoprog", "--autoprog.space=depth", "--autoprog.stages=2", "--autoprog.schedule=2,4"]
    with open_trainer(configure(*COMMON, *options, "--autoprog.grow=random")) as trainer:
        trainer.state.methods[0].observe(StepResult(None, None, trainer.plan(), Progress()))
        plan, before = (
            trainer.plan(Progress(fraction=0.5)),
            {n: v.clone() for n, v in trainer.state.model.state_dict().items()},
        )
        trainer._grow(plan)
        for slot, source in plan.growth.blocks:
            new = trainer.state.model.blocks[slot].attn.qkv.weight
            assert not any(torch.equal(new, before[f"blocks.{old}.attn.qkv.weight"]) for old in (slot, source))
        assert len(plan.growth.blocks) == 2 and torch.equal(trainer.state.model.head.weight, before["head.weight"])


def test_blocks_that_are_skipped_have_no_gradient(configure, decoder):
    with open_trainer(configure(*COMMON, *METHODS["autoprog"])) as trainer:
        plan = next(
            plan for plan in (trainer.plan(Progress(step=step)) for step in range(50)) if plan.shape.skipped_blocks
        )
        trainer.step.set_shape(plan.shape)
        with trainer.sources.train.open(plan.feed, trainer.state.clock.position) as batches:
            trainer.step._gradients(next(batches), 0, EAGER)
        for slot, block in enumerate(trainer.state.model.blocks):
            assert all((p.grad is None) == (slot in plan.shape.skipped_blocks) for p in block.parameters())


def test_frozen_blocks_stay(configure, decoder):
    schedule = ["--methods=unfreeze", "--unfreeze.schedule=1@16px,2@32px,3@48px,4@48px"]
    config = configure(*COMMON, *schedule, "--budget.length=1ep", "--train.weight_decay=0.5")
    with open_trainer(config) as trainer:
        before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
        plan = trainer.plan()
        assert plan.shape.trainable_blocks == (0,)
        with trainer.sources.train.open(plan.feed, trainer.state.clock.position) as batches:
            trainer.train_step(next(batches), plan)
        after = trainer.state.model.state_dict()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert not any(name.startswith(("blocks.1", "blocks.2", "blocks.3")) for name in moved)
        assert {"head.weight", "pos_embed"} <= moved and any(name.startswith("blocks.0") for name in moved)
        assert all(p.grad is None for p in trainer.state.model.blocks[1].parameters())


@pytest.mark.parametrize("model", ["--model.norm=layer", "--model.norm=batch",
                                   "--model.name=vitlocal_localvit_tiny_patch8_64"])  # fmt: skip
def test_what_is_frozen_stays_bit_for_bit_over_a_stage(configure, decoder, model: str):
    """Weight decay, moments and BatchNorm's statistics do not change the blocks of later stages.

    These blocks keep their initial values until their stage begins, also after evaluations.
    """
    schedule = ["--methods=unfreeze", "--unfreeze.schedule=1@16px,2@32px,3@48px,4@48px", "--train.weight_decay=0.5"]
    with open_trainer(configure(*COMMON, *schedule, model)) as trainer:
        before = {name: value.clone() for name, value in trainer.state.model.state_dict().items()}
        seen = 0
        while (plan := trainer.plan()).shape.trainable_blocks in ((0,), (0, 1)):
            trainer.evaluator.scores(plan, limit=1)
            with trainer.open_pass(plan) as batches:
                trainer.train_step(next(batches), plan)
            trained = trainer.state.model.blocks[0].state_dict()
            assert not any(torch.equal(trained[n], before[f"blocks.0.{n}"]) for n in trained if "running" in n)
            frozen = [slot for slot in range(4) if slot not in plan.shape.trainable_blocks]
            for slot in frozen:
                for name, value in trainer.state.model.blocks[slot].state_dict().items():
                    assert torch.equal(value, before[f"blocks.{slot}.{name}"]), (slot, name)
            seen += len(frozen)
        assert seen == 4 * 3 + 4 * 2  # two stages of four steps


def test_some_images_of_a_step_get_no_stage(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    """The step draws these images with unfreeze.stage_null_prob, also if it draws nothing for drop path."""
    untold = []
    original = VisionTransformer._add_stage

    def told_stage(self, tokens, noise):
        found = original(self, tokens, noise)
        if self.training:
            row = (found - tokens)[:, 0].detach()
            untold.append(torch.isclose(row, self.stage_table[-1], atol=1e-5).all(dim=1))
        return found

    monkeypatch.setattr(VisionTransformer, "_add_stage", told_stage)
    config = configure("--methods=unfreeze", "--model.depth=4", "--unfreeze.schedule=1@16px,2@16px,3@16px,4@16px",
                       "--model.drop_path=0", "--unfreeze.stage_null_prob=0.3", "--budget.length=6ep",
                       "--unfreeze.stage_init_std=0.5")  # fmt: skip
    with open_trainer(config) as trainer:
        fit(trainer)
    assert float(torch.cat(untold).float().mean()) == pytest.approx(0.3, abs=0.06)  # of 720 images


def test_a_method_that_computes_the_budget(configure, decoder, tmp_path: Path):
    assert train(configure(*COMMON, "--methods=budgeted", "--budgeted.epochs=1,0,2", "--budget.length=24h")) == 0
    records = read_log(tmp_path / "run")
    assert records[-1]["epoch"] == 3 and records[-1]["lr"] == pytest.approx(1e-5)
    assert train(configure(*COMMON, "--methods=budgeted", "--budgeted.epochs=1,0,2", "--budget.length=24h")) == 0


def test_a_model_without_a_needed_part_leaves_no_folder(configure, decoder, tmp_path: Path):
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
from contextlib import contextmanager
from pathlib import Path
import pytest
import torch.distributed as dist
sys.path.append(sys.argv[2])  # the folder of the tests
import narrow_models  # registers them
from counted_once import count_once
from vitlocal.config import read_config
from vitlocal.machine import leave
from vitlocal.report.page import read_run
from vitlocal.train import command
from vitlocal.train.probes import Prober
from vitlocal.train.distributed import Ranks

@contextmanager
def connected(ranks, device):  # torchrun's store brings processes together once
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    ranks.device, ranks._decisions = device, dist.new_group(backend="gloo")
    yield

Ranks.connected = connected
command.write_report = read_run  # the page takes longer than the run
Prober._seconds = lambda prober, probe, plan: 1e-9 * prober._macs(probe.size, probe.shape)
count_once(pytest.MonkeyPatch().setattr)
for options in json.loads(Path(sys.argv[1]).read_text()):
    assert command.train(read_config(options, {})) == 0
leave(0)  # as the command does: gloo's threads may abort a process that takes itself apart
"""


PAIRS = [name for name in METHODS if " and " in name]


@pytest.mark.parametrize(
    "names",
    [
        # Rounding turns the bases of SOAP, so that its runs on one and on two processes part.
        pytest.param([name for name in METHODS if name not in (*PAIRS, "soap")], id="alone"),
        pytest.param(PAIRS, id="pairs", marks=pytest.mark.slow),
    ],
)
def test_two_processes_agree_on_every_plan(configure, decoder, folder: Path, tmp_path: Path, names: list[str]):
    """With gloo: notes of methods are summed over both processes, and both use rank 0's results."""
    runs, plain = [], ["--augment.mixup=0", "--train.ema_decay=none", "--train.batch_size=34"]
    for name in names:
        score = [] if "swin" in name or "pvt" in name else ["--trilevel.score=attention"]
        config = configure(*COMMON, *METHODS[name], *plain, *score, f"--run.folder={tmp_path}/one-{_folder(name)}")
        assert train(config) == 0
        options = [f"--{key}={_text(value)}" for key, value in config.flat().items() if key != "run.folder"]
        runs.append([*options, f"--run.folder={tmp_path}/two-{_folder(name)}", "--run.threads=1", "--data.workers=1"])
    program, listed = tmp_path / "program.py", tmp_path / "runs.json"  # too long for a command line
    program.write_text(PROGRAM)
    listed.write_text(json.dumps(runs))
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*start, str(program), str(listed), str(Path(__file__).parent)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )
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


def test_two_methods_have_probes_at_one_point(configure, decoder, tmp_path: Path):
    """A new subset is known before the next probe."""
    options = ["--methods=trilevel,unfreeze", "--trilevel.levels=examples", *UPDATES, "--unfreeze.probe_batch_size=4",
               "--unfreeze.size_multiple=16"]  # fmt: skip
    assert train(configure(*COMMON, *options)) == 0
    state = load_checkpoint(tmp_path / "run" / CHECKPOINT)["methods"]
    assert state["trilevel"]["version"] == 3 and len(state["unfreeze"]["times"]) == 3


class SavedContent:
    """An output that keeps the content of the last checkpoint."""

    def save_checkpoint(self, content: dict) -> None:
        self.content = content


class Pair(Ranks):
    """Two ranks, one after the other: the values of the first are added to those of the second."""

    def __init__(self, others: list[torch.Tensor]):
        super().__init__()
        self.others = others

    def total(self, values: torch.Tensor) -> torch.Tensor:
        return values.add_(self.others.pop(0))


def test_local_states_are_summed_in_a_checkpoint_and_restored_once(configure, decoder):
    with open_trainer(configure(*COMMON, *METHODS["trilevel examples"], "--trilevel.score=attention")) as trainer:
        method = trainer.state.methods[0]
        rows = torch.from_numpy(method._kept)
        for part, hit in ((rows[:48], True), (rows[48:], False)):  # a half by each process
            method.observe(StepResult(None, part, trainer.plan(), Progress(), torch.full((48,), hit), torch.ones(48)))
            if hit:
                first = {name: value.clone() for name, value in method.local_state().items()}
                method._record = type(method._record)(method._count)
        state = method.state_dict()
        saved = SavedContent()
        trainer._ranks, trainer._output = Pair([first[name] for name in method.local_state()]), saved
        trainer.save()
        trainer._ranks, trainer._output = ALONE, None
        summed = saved.content["local_states"]["trilevel"]
        method.load_state_dict(state)
        assert not method.local_state()["records"].any()  # as on rank 1
        method.load_state_dict(state, summed)  # as on rank 0
        (record,) = method.local_state()["records"]
        assert sorted(record[rows].tolist()) == [1] * 48 + [2] * 48
        assert method.local_state()["attention_variance"].sum() == 96


def test_the_pass_that_ends_a_stage_is_logged_as_it_was_trained(configure, decoder, tmp_path: Path, capsys):
    train(configure(*COMMON, "--methods=budgeted", "--budgeted.epochs=1,1,2", "--evaluate.every=0"))
    records = read_log(tmp_path / "run")
    assert [record.get("shape.heads", "as before") for record in records] == [[1], [3], None, "as before"]
    assert [record.get("grid") for record in records] == [4, 5, None, None]
    said = capsys.readouterr().out
    assert said.count("48 px, tokens 4×4  batch") == 1 and said.count("48 px  batch") == 2
    macs = [record["macs_per_image"] for record in records]
    assert macs[0] < macs[1] < macs[2] == macs[3]


def test_a_run_that_ends_before_its_last_stage_is_exported_as_it_was(configure, decoder, tmp_path: Path):
    """Heads and hidden units that do not run give nothing in the exported model, which crops the grid as it did."""
    with open_run(configure(*COMMON, "--methods=budgeted", "--train.ema_decay=none")) as run:
        trainer = run.trainer
        plan = trainer.plan()
        with trainer.sources.train.open(plan.feed, trainer.state.clock.position) as batches:
            trainer.train_step(next(batches), plan)
        assert trainer.step.shape.heads == (1,) and trainer.step.shape.grid == 4
        export(run, tmp_path / "run")
        images = torch.randn(2, 3, 48, 48)
        expected = trainer.state.model.eval()(images)
    exported = timm.create_model(f"local-dir:{tmp_path}/run", pretrained=True).eval()
    torch.testing.assert_close(exported(images), expected, rtol=1e-4, atol=1e-5)
