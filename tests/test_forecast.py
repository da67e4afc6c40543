"""The forecast: how a budget is spent at given speeds, the bench that measures them, and the comparison with a run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from vitlocal.bench import forecast, report
from vitlocal.bench.__main__ import main
from vitlocal.bench.report import compare
from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.progress import Length, Stage
from vitlocal.report.run_folder import read_run
from vitlocal.storage import recipe_stages
from vitlocal.train.build import make_model
from vitlocal.train.command import train
from vitlocal.train.simulate import Speed, spend

OURS = ["--config-file=rcfg/ours.yaml", "--model.depth=2"]  # counting the memory of twelve blocks takes 15 s
SPEEDS = {32: Speed(100.0, 10), 64: Speed(25.0, 10)}


def test_spend_walks_through_stages():
    stages = (Stage.parse("32px until 2ep"), Stage.parse("64px"))
    first, last = spend(stages, Length.parse("60s"), 1000, SPEEDS)
    assert (first.images, first.seconds, first.epochs) == (2000, pytest.approx(20), pytest.approx(2))
    assert (last.images, last.seconds, last.epochs) == (1000, pytest.approx(40), pytest.approx(1))
    assert last.end.step == 300 and last.end.fraction == pytest.approx(1)


@pytest.mark.parametrize("budget", ["100s", "4ep", "400steps"])
def test_stages_end_at_fractions_of_the_budget(budget: str):
    stages = (Stage.parse("32px until 25%"), Stage.parse("64px"))
    first, last = spend(stages, Length.parse(budget), 1000, SPEEDS)
    assert Length.parse(budget).fraction_done(first.end) == pytest.approx(0.25)
    assert Length.parse(budget).fraction_done(last.end) == pytest.approx(1)


def test_spend_ends_with_the_budget():
    stages = (Stage.parse("32px until 5ep"), Stage.parse("64px until 9ep"), Stage.parse("32px"))
    spent = spend(stages, Length.parse("20s"), 1000, SPEEDS, used=10.0)
    assert [part.images for part in spent] == [1000, 0, 0]


def test_a_budget_in_flops_is_spent_by_the_cost_of_images():
    stages = tuple(map(Stage.parse, ("16px until 30%", "48px")))
    spent = spend(stages, Length.parse("0.004TF"), 120, {16: Speed(100.0, 32, 2e6), 48: Speed(50.0, 32, 1.4e7)})
    assert [stage.images for stage in spent] == [600, 200]


def test_evaluations_take_time_from_epochs():
    """With 1,000 images and 100 images/s an epoch takes 10 s, and each evaluation 5 s."""

    def spent(seconds: int, every: int = 1) -> float:
        options = [f"--budget.length={seconds}s", "--budget.counts=wall", f"--evaluate.every={every}", "--methods=none"]
        config = read_config(options, {})
        speeds = (forecast.SizeSpeed(224, 10, together=100.0, step=100.0, gflops=0.0),)
        return forecast.Forecast(config, 1000, speeds, evaluation_seconds=5.0, other_seconds=20.0).stages[-1].end.epoch

    with pytest.raises(ConfigError, match="starting, saving and one evaluation take 25 s"):
        spent(25)
    assert spent(26) == pytest.approx(0.1)
    assert spent(125, every=0) == pytest.approx(10)
    assert spent(123) == pytest.approx((123 - 20 - 7 * 5) / 10)  # 6 epochs end, and one evaluation is at the end


def test_a_large_model_is_counted_without_a_gpu():
    wide = read_config([*OURS, "--model.width=2304", "--model.heads=12"], {})
    model, _ = make_model(wide, 10, torch.device("meta"))
    assert model.embed_dim == 2304


# --- the bench ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, small) -> Path:
    """A run that differs from the recipe of the forecast in some options."""
    out = tmp_path_factory.mktemp("runs") / "one"
    assert train(small(out, "--augment.mixup=0.8", "--augment.random_erasing=0.5")) == 0
    return out


@pytest.fixture
def recipe(small, tmp_path: Path) -> str:
    """The option that names a recipe with the small configuration."""
    (tmp_path / "small.yaml").write_text(small(tmp_path / "run").yaml())
    return f"--config-file={tmp_path}/small.yaml"


def test_a_forecast_and_the_run_after_it(finished: Path, recipe: str, tmp_path: Path, monkeypatch, capsys, decoder):
    monkeypatch.setattr(forecast, "SECONDS", 0.3)
    monkeypatch.setattr(forecast, "ROUND_SECONDS", 0.03)
    turns, turn = [], forecast.SizeMeter.turn

    def noted(meter: forecast.SizeMeter, seconds: float) -> None:
        turns.append(meter.plan.feed.size)
        turn(meter, seconds)

    monkeypatch.setattr(forecast.SizeMeter, "turn", noted)
    file = tmp_path / "forecast.json"
    main(["forecast", recipe, f"--json={file}", "--budgets=1m,1h"])
    said = json.loads(file.read_text())
    assert [row["size"] for row in said["rows"]] == [16, 32, 48]
    assert said["epochs"] == pytest.approx(3) and said["images"] == 120
    assert said["flops"] == pytest.approx(sum(row["gflops"] * 1e9 * row["images"] for row in said["rows"]))
    assert all(row["step"] > 0 and row["loader"] > 0 and row["together"] > 0 for row in said["rows"])
    assert said["evaluation_seconds"] > 0 and said["disk_bytes"] > 0 and said["measured_seconds"] > 0.3
    out = capsys.readouterr().out
    assert "16px until" in out and "the first after" in out and "s, without compiling" in out
    assert turns == [16, 32, 48] * 3
    # The proposed curriculum has the fractions of the own budget, and is a valid option.
    stages = tuple(Stage.parse(text) for text in said["curriculum"])
    stated = {row["size"]: Speed(row["together"], row["batch_size"]) for row in said["rows"]}
    for part, row in zip(spend(stages, Length.parse("1h"), 120, stated), said["rows"], strict=True):
        whole = sum(other["train_seconds"] for other in said["rows"])
        assert part.seconds / 3600 == pytest.approx(row["train_seconds"] / whole, abs=0.006)
    rows = compare(said, read_run(finished))
    assert [row["what"] for row in rows][-3:] == ["epochs", "images", "first evaluation, s"]
    assert {row["what"]: row["off"] for row in rows}["epochs"] == pytest.approx(0)
    main(["report", str(finished), f"--forecast={file}", "--out", str(tmp_path / "page.html"), "--no-crops",
          "--json", str(tmp_path / "compared.json")])  # fmt: skip
    page = (tmp_path / "page.html").read_text()
    differs = "for another recipe: augment.mixup, augment.random_erasing differ"
    assert "Forecast and run" in page and differs in page
    assert differs in capsys.readouterr().out.split("epochs", 1)[0]  # before the table
    assert json.loads((tmp_path / "compared.json").read_text())["rows"] == rows


def test_a_forecast_without_data(recipe: str, monkeypatch, capsys):
    monkeypatch.setattr(forecast, "SECONDS", 0.1)
    main(["forecast", recipe, "--data.root=/nowhere/imagenet", "--budgets=none", "--budget.length=2ep"])
    out = capsys.readouterr().out
    assert "has no data: only the step is measured" in out and "epochs of 1,281,167 images" in out
    assert "memory on one GPU" not in out  # this machine is a CPU, and none is asked for
    main(["forecast", recipe, "--data.root=/nowhere/imagenet", "--budgets=none", "--budget.length=2ep", "--memory=1GB"])
    assert "memory on one GPU" in capsys.readouterr().out


def test_a_forecast_of_fewer_images_than_a_batch(recipe: str, monkeypatch, capsys, decoder):
    monkeypatch.setattr(forecast, "SECONDS", 0.1)
    main(["forecast", recipe, "--train.batch_size=200", "--budgets=none"])  # of 120 images
    assert "or need more images" in capsys.readouterr().out


def test_a_forecast_for_another_machine(capsys):
    main(["forecast", *OURS, "--rates=224:1000", "--budgets=12h", "--image_size.stages=96px until 30%, 224px"])
    out = capsys.readouterr().out
    assert "24h of training, epochs of 1,281,167 images" in out and "12h" in out
    last = next(line for line in out.splitlines() if line.startswith("224"))
    assert "1,000" in last


def test_a_curriculum_that_the_budget_does_not_finish_fits_other_budgets(capsys):
    """The last size gets as much time as the size before it, and not none."""
    main(["forecast", *OURS, "--rates=224:50", "--budgets=6h", "--budget.length=1h"])
    out = capsys.readouterr().out
    assert "the budget ends before" in out and "192px until" in out
    given = re.search(r'--image_size.stages="(.*)"', out)[1]
    stages = recipe_stages(read_config([f"--image_size.stages={given}", "--methods=image_size"], {}))
    assert [stage.size for stage in stages] == list(range(32, 225, 32))
    ends = [stage.until.value for stage in stages[:-1]]
    assert 1 - ends[-1] == pytest.approx(ends[-1] - ends[-2], abs=1e-4)


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--budgets=1x"], "--budgets: got '1x'"), (["--images=3"], "--images: got 3"), (["--nonsense=1"], "nonsense")],
)
def test_wrong_forecasts(recipe: str, words: list[str], part: str):
    with pytest.raises(ConfigError, match=part):
        main(["forecast", recipe, *words])


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{}", "is not what bench"), ("no json", "is not what bench"), (None, "forecast.json cannot be read")],
)
def test_files_without_a_forecast(finished: Path, tmp_path: Path, content: str | None, problem: str):
    file = tmp_path / "forecast.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match=problem):
        report.main([str(finished), f"--forecast={file}"])
