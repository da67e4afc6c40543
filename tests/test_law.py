"""The law of accuracy, and the choice of a model by it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from vitlocal.bench import forecast
from vitlocal.bench.__main__ import main
from vitlocal.bench.choice import law_for, model_names, rank, sized, verdict
from vitlocal.bench.law import LawRun, fit_law, hold_out, named_right, published_runs, read_runs
from vitlocal.bench.published import IMAGENET, MACS
from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.models.counts import count_macs
from vitlocal.models.factory import build_model
from vitlocal.progress import Length
from vitlocal.stored_config import stated_options
from vitlocal.train.build import make_model

BEST = ["--config-file=rcfg/best_64px.yaml"]
WIDTHS = {64: 2.37e7, 96: 4.9e7, 128: 8.52e7, 192: 1.85e8}  # multiply-adds
TRUTH = (0.3, 0.2, 0.6, 0.5, 0.5)  # a, b, alpha, c, beta, for M0 = 1e8 and E0 = 10


def truth(macs: float, epochs: float, level: float = 1.0) -> float:
    a, b, alpha, c, beta = TRUTH
    return 100 * float(np.exp(-level * (a + b * (macs / 1e8) ** -alpha + c * (epochs / 10) ** -beta)))


def runs(noise: float = 0.0, recipe: str = "one", level: float = 1.0) -> list[LawRun]:
    random = np.random.default_rng(0)
    return [
        LawRun(f"{width}x6", recipe, macs, epochs, truth(macs, epochs, level) + noise * random.normal(), 25_000)
        for width, macs in WIDTHS.items()
        for epochs in (1.0, 4.0, 16.0, 64.0)
    ]


def test_the_fit_recovers_a_law():
    law = fit_law(runs())
    assert law.rms < 0.05 and law.left_out_rms < 0.2
    assert law.predict(1.2e8, 30.0) == pytest.approx(truth(1.2e8, 30.0), abs=0.1)
    assert law.coefficients["alpha"] == pytest.approx(0.6, abs=0.1)
    assert law.coefficients["beta"] == pytest.approx(0.5, abs=0.05)
    assert "16 runs of 4 models, 1 to 64 epochs" in law.describe()


def test_an_outlier_does_not_bend_the_law():
    wrong = runs()
    wrong[5] = LawRun("96x6", "one", wrong[5].macs, wrong[5].epochs, wrong[5].top1 - 15, 25_000)
    law = fit_law(wrong)
    assert law.predict(1.2e8, 30.0) == pytest.approx(truth(1.2e8, 30.0), abs=1.0)
    assert law.left_out_rms > 3


def test_recipes_have_levels():
    single = LawRun("64x6", "three", 2e7, 4.0, 10.0, 25_000)
    law = fit_law([*runs(), *runs(recipe="two", level=1.3), single])
    assert law.recipes == ("one", "two") and single not in law.runs
    assert law.predict(1e8, 16.0, "two") == pytest.approx(truth(1e8, 16.0, 1.3), abs=0.2)
    assert law.predict(1e8, 16.0, "two") < law.predict(1e8, 16.0) < law.predict(1e8, 16.0, "one")
    assert law.error(1e8, 16.0) > 3 > law.error(1e8, 16.0, "one")  # a recipe that is not among them has any level


def test_a_larger_model_and_more_epochs_never_hurt():
    law = fit_law(runs(noise=3.0))
    sizes, lengths = np.geomspace(1e7, 1e9, 12), np.geomspace(0.2, 500, 12)
    table = np.array([[law.predict(macs, epochs) for epochs in lengths] for macs in sizes])
    assert (np.diff(table, axis=0) >= 0).all() and (np.diff(table, axis=1) >= 0).all()
    assert (table > 0).all() and (table < 100).all()


def test_the_error_grows_outside_the_runs():
    law = fit_law(runs(noise=1.0))
    assert law.rms < law.left_out_rms
    assert not law.outside(1e8, 10.0) and law.outside(4e6, 10.0) and law.outside(1e8, 0.1)
    assert law.error(1e8, 10.0) == law.left_out_rms < law.error(4e6, 10.0)


@pytest.mark.parametrize(
    ("kept", "part"),
    [
        (lambda run: run.epochs < 5, "needs 8 runs.*got 8 of 4 models and 2 lengths"),
        (lambda run: run.macs > 8e7 and run.epochs < 20, "got 6 of 2 models and 3 lengths"),
        (lambda run: run.model == "64x6", "got 4 of 1 models"),
        (lambda run: False, "got 0 of 0 models"),
    ],
)
def test_too_few_runs(kept: Callable[[LawRun], bool], part: str):
    with pytest.raises(ConfigError, match=part):
        fit_law([run for run in runs() if kept(run)])


def test_published_runs():
    law = law_for(IMAGENET, None)
    assert law.recipes == ("DeiT", "EfficientTrain++", "plain ViT", "DeiT III")
    assert law.left_out_rms < 1.5
    (check,) = (run for run in published_runs() if run.recipe not in law.recipes)
    assert abs(law.predict(check.macs, check.epochs) - check.top1) < law.error(check.macs, check.epochs)
    model, _ = make_model(read_config(["--model.name=vitlocal_deit_tiny_patch16_224"]), 1000, device())
    assert count_macs(model, 224) == pytest.approx(MACS["Ti"], rel=1e-3)
    with pytest.raises(ConfigError, match="an epoch has 120 images, but the published runs are of ImageNet"):
        law_for(120, None)


def device():
    import torch

    return torch.device("cpu")


# --- files of runs ----------------------------------------------------------------------------------------------------


def write_runs(file: Path, config: list[str] = BEST, images: int = 25_000, **changes: object) -> str:
    """A file of ``bench arms`` with the recipe in ``config`` at four widths and five budgets."""
    rows, curves, configs = [], {}, {}
    stated = stated_options(read_config(config, {}))
    for width, macs in WIDTHS.items():
        for minutes in (1, 2, 3, 4, 8):
            run, epochs = f"{width}x6-{minutes}m", 1.0e8 * minutes / macs
            rows.append({
                "arm": f"{width}x6", "seed": 0, "budget": f"{minutes}m", "run": run, "epochs": epochs,
                "top1": truth(macs, epochs), "images_seen": images * epochs, "train_seconds": 60.0 * minutes,
            } | changes)  # fmt: skip
            curves[run] = [{"macs_per_image": macs / 4}, {"macs_per_image": macs}]
            configs[run] = {**stated, "model.width": width, "model.depth": 6, "budget.length": f"{minutes}m"}
    file.write_text(json.dumps({"rows": rows, "curves": curves, "configs": configs}))
    return str(file)


def test_held_out_runs(tmp_path: Path, capsys):
    file = write_runs(tmp_path / "runs.json")
    main(["forecast", "--models=64x6,128x6,192x6", "--runs", file, "--hold-out=3m,8m",
          f"--json={tmp_path}/out.json", f"--plot={tmp_path}/out.png"])  # fmt: skip
    out = capsys.readouterr().out
    assert "fitted to 12 runs of 4 models" in out
    assert out.count("within 2 points in 6 of 6 runs; the better of two models is named in 6 of 6 pairs") == 2
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [(row["budget"], row["model"]) for row in rows[:2]] == [("3m", "64x6"), ("8m", "64x6")]
    for row in rows:
        assert row["off"] == pytest.approx(row["predicted"] - row["measured"])
        assert row["epochs_by_speed"] == pytest.approx(row["epochs"])
    assert (tmp_path / "out.png").stat().st_size > 5000


def test_the_better_model_is_named_by_the_mean_of_seeds():
    rows = [
        {"budget": "8m", "model": model, "predicted": predicted, "measured": measured}
        for model, predicted, measured in (("a", 10, 12), ("a", 12, 8), ("b", 14, 11), ("c", 9, 20))
    ]
    assert named_right(rows) == (1, 3)  # b is better than a; c is better than both
    assert named_right(rows[:2]) == (0, 0)


def test_wrong_files_of_runs(tmp_path: Path):
    file = write_runs(tmp_path / "runs.json")
    found = read_runs([file])
    assert {run.model for run in found} == {"64x6", "96x6", "128x6", "192x6"} and len(
        {run.recipe for run in found}
    ) == 1
    with pytest.raises(ConfigError, match="--hold-out: the runs have no 7m; they have 1m, 2m"):
        hold_out(found, [Length.parse("7m")], ())
    with pytest.raises(ConfigError, match="--models: the runs have no 32x6; they have 128x6, 192x6"):
        hold_out(found, [Length.parse("8m")], ["32x6"])
    with pytest.raises(ConfigError, match="epochs of 120 and 25,000 images"):
        read_runs([file, write_runs(tmp_path / "other.json", images=120)])
    with pytest.raises(ConfigError, match="runs without top-1"):
        read_runs([write_runs(tmp_path / "loss.json", top1=None)])
    with pytest.raises(ConfigError, match="--runs: .*none.json cannot be read"):
        read_runs([str(tmp_path / "none.json")])
    content = json.loads(Path(file).read_text())
    (tmp_path / "old.json").write_text(json.dumps(content | {"curves": {run: [{}] for run in content["curves"]}}))
    with pytest.raises(ConfigError, match="has no macs_per_image"):
        read_runs([str(tmp_path / "old.json")])


# --- the choice -------------------------------------------------------------------------------------------------------


def test_the_best_model_depends_on_the_budget(tmp_path: Path, capsys):
    # Counting the memory of growing batches takes seconds.
    recipe = [*BEST, "--methods=image_size", "--model.width=128", "--model.heads=4"]
    words = ["forecast", *recipe, "--runs", write_runs(tmp_path / "runs.json", recipe), "--models=64x6,192x6",
             "--rates=32:1000,64:170", "--images=25000", f"--json={tmp_path}/out.json"]  # fmt: skip
    named, by_model = {}, {}
    for budget in ("30s", "4h"):
        main([*words, f"--budget.length={budget}"])
        rows = json.loads((tmp_path / "out.json").read_text())["rows"]
        assert rows[0]["top1"] >= rows[1]["top1"]
        named[budget], by_model = rows[0]["model"], {row["model"]: row for row in rows}
        out = capsys.readouterr().out
        assert f"best: {named[budget]}, predicted top-1" in out and "leave-one-out" in out
    assert named == {"30s": "64x6", "4h": "192x6"}
    small, large, config = by_model["64x6"], by_model["192x6"], read_config(recipe, {})
    own = 1e-9 * count_macs(build_model(config.model.name, config.model.arguments(), 50)[0], 64)
    for row in (small, large):  # the rates are those of 128x6
        assert row["rates"]["64"] / 170 == pytest.approx(own / row["gmacs"], rel=0.01)
        assert row["epochs_at_last_size"] < row["epochs"] and row["known_recipe"]
    assert large["rates"]["48"] < 1000 == small["rates"]["48"]  # no more than the rate that is stated for 32 px


def test_a_small_difference_is_no_choice():
    law = fit_law(runs(noise=1.0))
    rows = [{"model": name, "gmacs": 0.1, "epochs": epochs} for name, epochs in (("a", 10.0), ("b", 10.5), ("c", 60.0))]
    config = read_config(BEST, {})
    first, *others = rank(rows, law, config)
    assert first["model"] == "c" and not first["known_recipe"]
    assert "more than the error" in verdict([first, *others], law)
    assert "the law does not tell them apart" in verdict(others, law)
    assert "the only model" in verdict(others[:1], law)


def test_models_are_measured(small, tmp_path: Path, monkeypatch, capsys, decoder):
    """Without --rates, each model takes its turn."""
    monkeypatch.setattr(forecast, "SECONDS", 0.2)
    recipe = tmp_path / "small.yaml"
    recipe.write_text(small(tmp_path / "run").yaml())
    file = write_runs(tmp_path / "runs.json", [f"--config-file={recipe}"], images=120)
    main(["forecast", f"--config-file={recipe}", "--runs", file, "--models=32x2,64x1"])
    out = capsys.readouterr().out
    assert "16 px/s" in out and "at 48 px only" in out
    with pytest.raises(ConfigError, match="the runs have epochs of 25,000 images, and this forecast 120"):
        main(["forecast", f"--config-file={recipe}", "--runs", write_runs(tmp_path / "b.json"), "--models=32x2"])


def test_sizes_of_models():
    assert model_names("64x6, Ti,64x6") == ["64x6", "Ti"]
    config = read_config(BEST, {})
    other = sized(config, "192x8").model
    assert (other.width, other.depth, other.heads, other.name) == (192, 8, 6, config.model.name)
    base = sized(config, "B").model
    assert (base.name, base.width, base.heads) == ("vitlocal_localvit_base_patch16_224", None, None)
    assert sized(config, "B").train == config.train


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--models=M"], "--models: got 'M', expected Ti, S, B or WIDTHxDEPTH"),
        (["--models=64x0"], "got '64x0'"),
        (["--models=100x6", *BEST], "got a width of 100, expected a multiple of 32"),
        (["--models=S", "--model.name=resnet50"], "resnet50 has no sizes Ti, S, B; use WIDTHxDEPTH"),
        (["--models=64x6", "--model.name=resnet50"], "resnet50 has no width and depth"),
        (["--models=S", "--config-file=rcfg/paper_64px.yaml"], "there is no vitlocal_small_patch8_64"),
        (["--models=S", "--config-file=rcfg/dit_32px.yaml"], "is no classifier"),
        (["--runs", "x.json"], "--runs: it is for --models and --hold-out"),
        (["--plot=x.png"], "--plot: it is for --models"),
        (["--hold-out=3m"], "--hold-out: it needs the runs of --runs"),
        (["--models=S", "--memory=16GB"], "--memory: it is for the forecast of one recipe"),
        (["--models=S", "--budgets=1h"], "--budgets: it is for the forecast of one recipe"),
    ],
)
def test_wrong_choices(words: list[str], part: str):
    with pytest.raises(ConfigError, match=part):
        main(["forecast", "--rates=224:5000", "--data.root=/nowhere", *words])
