from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch

from vitlocal.bench.outcomes import place_of
from vitlocal.data.batch import open_sources
from vitlocal.data.loader import FFCVSource
from vitlocal.errors import ConfigError, DataError
from vitlocal.methods.batch_size import BatchSize
from vitlocal.methods.method import MethodContext, StepResult
from vitlocal.plan import Feed, Plan
from vitlocal.predict import Predictor
from vitlocal.progress import Length, Progress
from vitlocal.report.run_folder import read_log
from vitlocal.train.checkpoint import load_checkpoint, save_checkpoint
from vitlocal.train.checks import config_warnings
from vitlocal.train.ema import ModelEma
from vitlocal.train.folder import CHECKPOINT, changes, claimed, locked, origin_of
from vitlocal.train.journal import Journal, Loading, read_spent
from vitlocal.train.log import Log
from vitlocal.train.loop import fit, train
from vitlocal.train.optim import build_optimizer
from vitlocal.train.run import Run, open_run
from vitlocal.train.step import Step, choose_precision

ROOT = Path(__file__).parent.parent
FIELDS = {
    "epoch", "step", "images_seen", "image_size", "batch_size", "processes", "loss",
    "top1", "top5", "lr", "train_seconds", "wall_seconds",
    "images_per_second", "data_wait_fraction",
}  # fmt: skip
VARIANTS = {
    "plain": [],
    "everything": [
        "--augment.randaugment=9", "--augment.mixup=0.8", "--augment.cutmix=1", "--augment.erase=0.25",
        "--model.drop_path=0.2", "--train.ema=0.9", "--train.clip_norm=1", "--train.warmup=1ep",
        "--image_size.step_epochs=0.7",
    ],
    "the newer ways": [
        "--methods=image_size,strength,batch_size", "--image_size.stages=16px until 20%,32px until 2ep,48px",
        "--train.batch_size=16", "--batch_size.limit=32", "--batch_size.multiple=8", "--model.drop_path=0.2",
        "--train.optimizer=muon", "--train.ema_length=20%", "--train.warmup=10%", "--augment.three=yes",
        "--model.position=sincos",
    ],
}  # fmt: skip


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder / CHECKPOINT)["model"]


def same_weights(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


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


def test_the_same_command_on_a_finished_run_does_nothing_again(configure, decoder, tmp_path: Path):
    assert train(configure()) == 0
    before = (tmp_path / "run" / "log.jsonl").read_text()
    assert train(configure()) == 0
    assert (tmp_path / "run" / "log.jsonl").read_text() == before


def losses(folder: Path) -> list[float]:
    return [record["loss"] for record in read_log(folder)]


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
def test_a_signal_saves_and_the_run_goes_on(configure, decoder, tmp_path: Path, monkeypatch, step: int):
    train(configure(f"--run.folder={tmp_path}/whole"))
    original, count = Run.train_on, [0]

    def train_on(self, batch, plan):
        original(self, batch, plan)
        count[0] += 1
        if count[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Run, "train_on", train_on)
    assert train(configure()) == 143
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["clock"]["step"] == step
    assert train(configure("--run.resume=must")) == 0
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "run")


@pytest.mark.parametrize("evaluation", [1, 3], ids=["in the middle", "the last"])
@pytest.mark.usefixtures("no_report")
def test_a_signal_while_evaluating(configure, decoder, tmp_path: Path, monkeypatch, evaluation: int):
    train(configure(f"--run.folder={tmp_path}/whole"))
    original, count = Run.evaluate, [0]

    def evaluate(self):
        count[0] += 1
        if count[0] == evaluation:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self)

    monkeypatch.setattr(Run, "evaluate", evaluate)
    assert train(configure()) == 130
    assert len(read_log(tmp_path / "run")) == evaluation - 1
    assert train(configure()) == 0
    assert same_weights(weights(tmp_path / "whole"), weights(tmp_path / "run"))
    whole, resumed = read_log(tmp_path / "whole"), read_log(tmp_path / "run")
    assert [(r["step"], r["loss"], r["top1"]) for r in whole] == [(r["step"], r["loss"], r["top1"]) for r in resumed]


def test_every_image_is_trained_on_once_an_epoch(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    seen: list[int] = []
    original = Run.train_on

    def train_on(self, batch, plan):
        seen.extend(batch.ids.tolist())
        original(self, batch, plan)

    monkeypatch.setattr(Run, "train_on", train_on)
    train(configure("--image_size.step_epochs=0.4", "--budget.length=2ep"))  # sizes change in mid-epoch
    assert sorted(seen) == sorted([*range(120), *range(120)])
    assert sorted(seen[:120]) == list(range(120))


@pytest.mark.parametrize(
    "methods", ["none", "image_size", "image_size,batch_size", "batch_size", "image_size,strength", "strength"]
)
def test_methods_plan_purely_train_and_keep_their_state(configure, decoder, methods: str, tmp_path: Path):
    by = ["--strength.by=budget"] if methods == "strength" else []
    with open_run(configure(f"--methods={methods}", "--budget.length=4steps", "--model.drop_path=0.1", *by)) as run:
        assert run.plan() == run.plan()
        fit(run)
        assert run.clock.step == 4
        for method in run.methods:
            method.observe(StepResult(torch.zeros(()), torch.arange(3), run.plan()))
            state = method.state_dict()
            method.load_state_dict(state)
            assert method.state_dict() == state


@pytest.mark.usefixtures("no_report")
def test_time_budgets_end_on_time(configure, decoder, tmp_path: Path):
    began = time.monotonic()
    assert train(configure("--budget.length=3s", "--evaluate.every=0")) == 0
    last = read_log(tmp_path / "run")[-1]
    assert 2.9 <= last["train_seconds"] < 4  # a step of this model takes some hundredths of a second
    assert last["lr"] == pytest.approx(1e-5, rel=0.1)
    assert last["top1"] is not None
    assert time.monotonic() - began < 60


def test_a_run_of_another_configuration_is_refused(configure, decoder):
    train(configure("--budget.length=1ep"))
    with pytest.raises(ConfigError, match=r"train.lr was 0.001 and is now 0.5"):
        train(configure("--budget.length=1ep", "--train.lr=0.5"))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(configure("--budget.length=1ep", "--run.resume=never"))


def test_other_data_are_refused(configure, decoder, folder: Path, tmp_path: Path):
    train(configure("--budget.length=1ep"))
    shutil.copytree(folder, tmp_path / "data")
    path = tmp_path / "data" / "train.json"
    for split in ("train", "val"):
        path = tmp_path / "data" / f"{split}.json"
        path.write_text(path.read_text().replace('"arrow"', '"aim"', 1))
    with pytest.raises(ConfigError, match="has 120 training images of 20 classes, and the run"):
        train(configure("--budget.length=1ep", f"--data.root={tmp_path}/data"))


def test_what_a_run_has_left_is_not_trained_over(configure, decoder, tmp_path: Path):
    """Without its checkpoint a run cannot go on: what it had spent would leave an untrained model in its place."""
    train(configure())
    run = tmp_path / "run"
    (run / CHECKPOINT).write_bytes(b"damaged")
    with pytest.raises(DataError, match=f"not a readable checkpoint .* Remove {run} and run the same command again"):
        train(configure())
    (run / CHECKPOINT).unlink()
    before = (run / "model.safetensors").read_bytes()
    for part in (set(), {"model.safetensors"}):  # by its log alone, too
        for name in part:
            (run / name).unlink()
        with pytest.raises(ConfigError, match="no checkpoint to go on from .* remove the folder"):
            train(configure())
        assert part or (run / "model.safetensors").read_bytes() == before
    shutil.rmtree(run)
    assert train(configure()) == 0 and (run / "model.safetensors").read_bytes() == before


def test_a_budget_that_bought_nothing_is_told(configure, decoder, tmp_path: Path):
    """Killed before its first checkpoint when all was spent: no random weights are exported."""
    config = configure("--budget.length=2s", "--methods=none")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(config.yaml())
    (tmp_path / "run" / "spent.json").write_text(json.dumps({"train_seconds": 3.0, "wall_seconds": 3.0}))
    with pytest.raises(DataError, match="nothing that it bought was saved; remove"):
        train(config)
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_short_runs_are_saved_ten_times(configure, decoder, monkeypatch: pytest.MonkeyPatch):
    """And not at the ends of epochs alone: here one has 60 steps."""
    steps, original = [], Run.save
    monkeypatch.setattr(Run, "save", lambda run: (steps.append(run.clock.step), original(run)))
    options = ("--budget.length=50steps", "--train.batch_size=2", "--methods=none", "--evaluate.every=0")
    with open_run(configure(*options)) as run:
        fit(run)
    assert sorted(set(steps)) == [5, 10, 15, 20, 25, 30, 35, 40, 45, 50]


def test_resuming_nothing_is_refused_and_leaves_nothing(configure, decoder, tmp_path: Path):
    with pytest.raises(ConfigError, match="there is no run to go on with"):
        train(configure("--run.resume=must"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--model.name=vitlocal_smal_patch16_224"], "timm knows no model"),
        (["--model.name=resnet18", "--model.convolution=no", "--methods=none"], "model options convolution"),
        (["--model.patch_size=7", "--methods=none"], "patch_size"),
        (["--model.heads=3"], "heads"),
        (["--image_size.step_pixels=20"], "image_size 36: expected multiples of 8"),
        (["--evaluate.size=50"], "evaluate.size 50: expected multiples of 8"),
        (["--train.precision=fp16"], "fp16 needs a CUDA device"),
        (["--train.kernel=fused"], "fused needs a CUDA device"),
        (["--methods=batch_size,image_size"], "name it last"),
        (["--train.graphs=yes", "--train.compile=no"], "train.graphs: yes needs train.compile"),
        (["--model.size=1024", "--augment.erase=0.1"], "augment.erase: images of 1024 px"),
        (["--methods=image_size,batch_size", "--batch_size.limit=8"], "batch_size.limit: 8 is smaller"),
        (["--run.device=cuda:99"], "run.device"),
        (["--run.device=gpu"], "run.device"),
        (["--data.workers=4096"], "data.workers"),
    ],
)
def test_what_cannot_be_built_is_told_and_leaves_nothing(
    configure, tmp_path: Path, options: list[str], part: str, monkeypatch, shared
):
    if "workers" not in options[0]:
        monkeypatch.setattr("vitlocal.data.loader.Decoder", lambda workers=0: shared)
    with pytest.raises(ConfigError, match=part):
        train(configure(*options))
    assert not (tmp_path / "run").exists()


def test_what_shows_before_the_first_step_leaves_nothing(configure, decoder, tmp_path: Path, monkeypatch):
    """No fused attention for this model, say."""

    def warm_up(run: Run) -> None:
        assert (run.folder / "config.yaml").exists()
        raise ConfigError("cannot")

    monkeypatch.setattr(Run, "warm_up", warm_up)
    with pytest.raises(ConfigError, match="cannot"):
        train(configure())
    assert not (tmp_path / "run").exists()


def test_what_is_hardly_meant_is_said(configure, decoder, capsys, tmp_path: Path):
    train(configure("--train.batch_size=500", "--train.warmup=1ep", "--budget.length=1steps", "--evaluate.every=0"))
    said = capsys.readouterr().out
    assert "note: train.batch_size is 500, and there are 120 images" in said and "warm-up" not in said
    options = ["--train.warmup=2ep", "--budget.length=3steps", f"--run.folder={tmp_path}/other"]
    with open_run(configure(*options)) as run:
        (said,) = config_warnings(run)
        assert "the warm-up (2ep) is longer than the budget (3steps)" in said
        run.sources.train.side = 32
        assert "at up to 48 px, and stored with long edges of at most 32 px" in config_warnings(run)[-1]
        assert "--sides 72" in config_warnings(run)[-1]
        run.sources.train.side = None  # original images
        assert len(config_warnings(run)) == 1


def test_what_the_budget_did_not_buy_is_said_at_the_end(configure, decoder, no_report, capsys, tmp_path: Path):
    options = ["--methods=image_size", "--image_size.stages=16px until 1ep, 32px until 2ep, 48px"]
    short = [*options, "--train.warmup=2ep", "--budget.length=2steps"]
    assert train(configure(*short)) == 0
    said = capsys.readouterr().out
    assert "note: the budget ended before images of 32, 48 px" in said
    assert "note: the budget ended in the warm-up (2ep)" in said
    border = [*options, "--budget.length=1ep", f"--run.folder={tmp_path}/border"]  # the next stage would begin
    assert train(configure(*border)) == 0
    assert "note: the budget ended before images of 32, 48 px" in capsys.readouterr().out
    assert train(configure(*short)) == 0 and "this run is finished" in capsys.readouterr().out


def test_an_export_can_be_read_by_all_who_may_read_the_run(configure, decoder, no_report, tmp_path: Path):
    assert train(configure("--budget.length=1steps", "--run.keep_weights=yes")) == 0
    run = tmp_path / "run"
    (kept,) = (run / "checkpoints" / "kept").iterdir()
    assert {path.stat().st_mode for path in (kept, run / "model.safetensors")} == {(run / "config.json").stat().st_mode}


def test_options_of_methods_that_are_not_there_make_no_other_run(configure):
    """A default may have changed since the run began: it has no say unless one of the two recipes has the method."""
    plain, searched = configure("--methods=image_size"), configure("--methods=autoprog")
    older = {"autoprog.averages": [0.998, 0.9986, 0.999, 0.9996]}
    assert changes(plain.flat() | older, plain) == []
    assert [phrase.split()[0] for phrase in changes(searched.flat() | older, searched)] == ["autoprog.averages"]


def test_two_processes_cannot_train_in_one_folder(configure, decoder):
    with open_run(configure()):
        with pytest.raises(ConfigError, match="another process is training"):
            train(configure())


def test_who_comes_second_to_a_new_folder_leaves_it_alone(tmp_path: Path, monkeypatch):
    """Both found none, both made it, and one was the first to lock it."""
    folder = tmp_path / "run"
    folder.mkdir()
    with locked(folder):
        (folder / "config.yaml").touch()
        monkeypatch.setattr(Path, "exists", lambda path: False)
        with pytest.raises(ConfigError, match="another process is training"), claimed(folder):
            pass
        assert (folder / "config.yaml").is_file()


def test_a_run_that_was_trained_while_this_process_started_is_gone_on_with(configure, decoder, monkeypatch):
    """As when a scheduler starts the command again while the process before is still saving."""
    config, opened = configure(), []

    def open_later(*arguments):
        if not opened:
            opened.append(True)
            with open_run(config) as before:
                before.warm_up()
                with before.sources.train.open(before.plan().feed, before.clock.position) as batches:
                    before.train_on(next(batches), before.plan())
                before.save()
        return open_sources(*arguments)

    monkeypatch.setattr("vitlocal.train.run.open_sources", open_later)
    with open_run(config) as run:
        assert run.clock.step == 1


def test_what_loading_takes_is_journalled(configure, decoder, killed_after, tmp_path: Path, monkeypatch):
    """Where everything counts, a run that is killed while it is loaded has spent that time."""
    options = ("--budget.length=30s", "--budget.counts=wall", "--run.save_every=1steps", "--evaluate.every=0")
    with killed_after(2):
        train(configure(*options))
    spent, killed = [], RuntimeError("killed")

    def load(path: Path) -> None:
        for _ in range(2):
            spent.append(read_spent(tmp_path / "run" / "spent.json")[1])
            time.sleep(0.5)
        raise killed

    monkeypatch.setattr("vitlocal.train.run.load_checkpoint", load)
    with pytest.raises(RuntimeError, match="killed"):
        train(configure(*options), time.monotonic() - 5.0)
    assert spent[0] > 5 and 0.3 < spent[1] - spent[0] < 5


def test_what_ending_takes_is_journalled_until_a_process_has_ended(tmp_path: Path):
    path = tmp_path / "spent.json"
    with Journal(path, Loading(1.0, 2.0, time.monotonic()), Length.parse("24h"), 7.0):
        assert read_spent(path)[0] == 1.0 and 9.0 < read_spent(path)[1] < 10.0  # killed now, it has spent this
    assert 2.0 < read_spent(path)[1] < 3.0


def test_a_damaged_checkpoint_is_named(configure, decoder, tmp_path: Path):
    train(configure("--budget.length=1ep"))
    path = tmp_path / "run" / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="last.pt is not a readable checkpoint"):
        train(configure("--budget.length=1ep"))
    torch.save({"model": {}}, path)
    with pytest.raises(DataError, match=r"another version of vitlocal \(format 1, expected 3\)"):
        train(configure("--budget.length=1ep"))


def test_a_full_disk_keeps_the_checkpoint_before(tmp_path: Path):
    path = tmp_path / "checkpoints" / "last.pt"
    save_checkpoint(path, {"a": torch.zeros(10)})
    before = path.read_bytes()
    script = (
        "import resource, torch; from pathlib import Path; from vitlocal.train.checkpoint import save_checkpoint\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        f"save_checkpoint(Path({str(path)!r}), {{'a': torch.zeros(1_000_000)}})"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "last.pt" in done.stderr
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_a_loss_that_is_no_number_stops_the_run(configure, decoder):
    with pytest.raises(DataError, match="training has diverged"):
        train(configure("--train.lr=1e30", "--train.end_lr=1e30"))


def test_checkpoints_hold_no_code(tmp_path: Path):
    torch.save({"a": Plan}, tmp_path / "bad.pt")
    with pytest.raises(DataError, match="bad.pt"):
        load_checkpoint(tmp_path / "bad.pt")


def test_the_export_gives_the_same_logits_through_timm_and_predicts(configure, decoder, tmp_path: Path):
    from vitlocal.data.images import open_images

    config = configure("--model.pool=avg", "--train.ema=0.5", "--model.drop_path=0.3")
    train(config)
    with open_run(config) as run:
        model = run.average.model
        x = torch.randn(2, 3, 48, 48)
        loaded = timm.create_model(f"local-dir:{tmp_path}/run", pretrained=True).eval()
        assert torch.equal(loaded(x), model(x))
        classes = run.sources.train.classes
    guesses = Predictor(tmp_path / "run")(open_images("sample:6", "val").load(0))
    assert len(guesses) == 5 and {guess.name for guess in guesses} <= set(classes)
    assert guesses[0].probability >= guesses[-1].probability
    with pytest.raises(ConfigError, match="expected the folder of a finished run"):
        Predictor(tmp_path)


@pytest.mark.usefixtures("no_report")
def test_timms_own_models_train(configure, decoder, tmp_path: Path):
    for name in ("test_vit", "test_resnet"):
        options = [f"--model.{option}=none" for option in ("depth", "width", "heads")]
        train(configure(f"--model.name={name}", *options, "--budget.length=1ep", f"--run.folder={tmp_path}/{name}",
                        "--image_size.init=32"))  # fmt: skip
        assert (tmp_path / name / "model.safetensors").exists()


def test_no_decay_on_norms_biases_embeddings_and_tokens(configure):
    config = configure()
    model = timm.create_model("vitlocal_tiny_patch8_64", depth=2)
    decayed = {id(p) for group in build_optimizer(model, config.train).param_groups if group["weight_decay"]
               for p in group["params"]}  # fmt: skip
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert (id(parameter) in decayed) is not exempt, name


def test_the_average_follows():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = ModelEma(model, 0.9)
    before = average.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    model[1].running_mean.fill_(3)
    average.update(model, 0.9)
    torch.testing.assert_close(average.model[0].weight, before + 0.1)
    assert (average.model[1].running_mean == 3).all()


def test_precision_on_a_cpu():
    assert choose_precision("auto", torch.device("cpu")) is torch.float32
    assert choose_precision("bf16", torch.device("cpu")) is torch.bfloat16


@pytest.mark.usefixtures("no_report")
def test_the_torchvision_source_trains_the_same_loop(configure, tmp_path: Path):
    config = configure("--data.loader=torchvision", "--data.workers=1", "--budget.length=1ep")
    assert train(config) == 0
    assert read_log(tmp_path / "run")[0]["images_seen"] == 120


def test_compiling_where_a_size_begins_is_not_training_time(configure, decoder, tmp_path: Path, monkeypatch):
    def warm(step: Step, feed: Feed, classes: int) -> float:
        time.sleep(1.0)
        return 1.0

    monkeypatch.setattr(Step, "warm", warm)
    for when, before in (("stage", 1), ("start", 3)):
        train(configure(f"--train.warm={when}", f"--run.folder={tmp_path}/{when}", "--evaluate.every=0"))
        log = read_log(tmp_path / when)
        assert [record["image_size"] for record in log] == [16, 32, 48]
        assert log[-1]["wall_seconds"] - log[-1]["train_seconds"] > 3
        assert log[0]["wall_seconds"] > before  # sizes that are ready before the first


def test_growing_batches_stay_when_a_run_goes_on(configure, decoder, tmp_path: Path):
    options = ["--methods=image_size,batch_size", "--train.batch_size=16", "--batch_size.multiple=8"]
    with open_run(configure(*options, "--budget.length=1steps")) as run:
        fit(run)
        (method,) = (method for method in run.methods if method.name == "batch_size")
        batches = dict(method._batches)
    assert sorted(batches) == [16, 32, 48] and batches[16] > batches[48] == 16
    again = BatchSize(MethodContext(configure(*options), image_bytes=lambda size: 1))
    again.load_state_dict(method.state_dict())
    assert {size: again.batch_size_at(size) for size in batches} == batches


def test_the_position_table_stays_one_trained_parameter(configure, decoder):
    with open_run(configure()) as run:
        table, before = run.model.pos_embed, run.model.pos_embed.detach().clone()
        fit(run)
        assert run.model.pos_embed is table
        assert any(table is p for group in run.optimizer.param_groups for p in group["params"])
        assert (run.optimizer.state[table]["exp_avg"] != 0).any()
        assert not torch.equal(table, before)


def test_a_frozen_position_table_stays(configure, decoder):
    with open_run(configure("--model.train_position=no")) as run:
        table, before = run.model.pos_embed, run.model.pos_embed.detach().clone()
        assert not any(table is p for group in run.optimizer.param_groups for p in group["params"])
        fit(run)
        assert run.model.pos_embed is table and torch.equal(table, before)


def test_kill_9_of_the_command_then_the_same_command(configure, folder: Path, tmp_path: Path):
    """The whole command as a user runs it, killed once it has logged a pass."""
    config = configure("--run.save_every=2steps", "--data.workers=1", "--budget.length=4ep")
    (tmp_path / "recipe.yaml").write_text(config.yaml())
    command = [sys.executable, "train_imagenet.py", "--config-file", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert log.read_text(), "no pass was logged in time"
    assert train(config) == 0
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [record["step"] for record in records] == [4, 8, 12, 16]


def test_killed_runs_have_spent_what_they_had(configure, folder: Path, tmp_path: Path):
    """A budget of time, killed before and after its first checkpoint: it ends when it would have, but for a second."""
    config = configure("--run.save_every=2s", "--data.workers=1", "--budget.length=5s", "--methods=none",
                       "--evaluate.every=0")  # fmt: skip
    (tmp_path / "recipe.yaml").write_text(config.yaml())
    command = [sys.executable, "train_imagenet.py", "--config-file", str(tmp_path / "recipe.yaml")]
    spent, journal = 0.0, tmp_path / "run" / "spent.json"
    for least in (1.0, 3.5):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        deadline = time.monotonic() + 120
        while spent < least:
            assert process.poll() is None and time.monotonic() < deadline, process.communicate()
            time.sleep(0.02)
            spent = read_spent(journal)[0]
        process.kill()
        process.communicate()
        spent = read_spent(journal)[0]
    assert train(config) == 0
    last = read_log(tmp_path / "run")[-1]
    assert 4.9 < last["train_seconds"] < 5.5  # a step takes some hundredths of a second
    assert last["lr"] == pytest.approx(1e-5, rel=0.1) and last["wall_seconds"] > 5
    steps = last["step"]
    assert train(config) == 0 and read_log(tmp_path / "run")[-1]["step"] == steps  # nothing is left


def test_sources_are_the_ones_configured(configure, decoder):
    with open_run(configure()) as run:
        assert isinstance(run.sources.train, FFCVSource)


def test_a_run_tells_all_machines_that_it_was_trained_by(configure, decoder, no_report, tmp_path: Path, monkeypatch):
    run, options = tmp_path / "run", ("--budget.length=2steps", "--run.save_every=1steps")
    monkeypatch.setattr("vitlocal.train.folder.hardware", lambda: {"cpu": "one", "gpu": None})
    with open_run(configure(*options)) as opened:
        opened.warm_up()
        with opened.sources.train.open(opened.plan().feed, opened.clock.position) as batches:
            opened.train_on(next(batches), opened.plan())
        opened.save()
    monkeypatch.setattr("vitlocal.train.folder.hardware", lambda: {"cpu": "two", "gpu": "H"})
    assert train(configure(*options)) == 0
    monkeypatch.setattr("vitlocal.train.folder.hardware", lambda: {"cpu": "three", "gpu": None})
    assert train(configure(*options)) == 0  # trains no more
    assert [origin["machine"]["cpu"] for origin in origin_of(run)] == ["one", "two"]
    assert origin_of(run)[0]["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert (place_of(run)["cpu"], place_of(run)["gpu"]) == ("one, two", "H")
    assert place_of(tmp_path) == {"cpu": None, "gpu": None, "commit": None}
    (run / "trained_on.jsonl").write_text("{")
    assert origin_of(run) == []


@pytest.mark.parametrize("progress", [True, False])
def test_a_long_pass_is_told_of_where_there_is_no_terminal(tmp_path: Path, monkeypatch, capsys, progress: bool):
    """After 10 seconds without a line, then 20, 40, and at last every ten minutes."""
    now = 1000.0
    monkeypatch.setattr("vitlocal.train.log.time.monotonic", lambda: now)
    monkeypatch.setattr("vitlocal.train.log.sys.stderr.isatty", lambda: False)
    log, told = Log(tmp_path, Length.parse("24h"), progress), []
    log.begin(0)
    for _ in range(3000):
        now += 1
        log.show(Progress(epoch=0.25, step=int(now), fraction=0.1), 6.9, 1e-3, 128, 2345.6)
        if lines := capsys.readouterr().out:
            told.append(now - 1000)
            assert lines == "10.0 % of 24h: epoch 0.25  128 px  loss 6.900  2,346 images/s\n"
    log.close()
    assert told == ([10, 30, 70, 150, 310, 630, 1230, 1830, 2430] if progress else [])
