"""The board: the rules that bench report --board checks, each broken once, and the entry that it prints."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from vitlocal.bench.__main__ import main
from vitlocal.bench.board import RULES, TITLES, TOGETHER, table_line
from vitlocal.errors import ConfigError, DataError
from vitlocal.report.run_folder import read_run
from vitlocal.train.command import train

ROOT = Path(__file__).parent.parent
ALL_RULES = [*RULES, *TOGETHER]


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three runs on the sample, with three seeds."""
    out = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitlocal.train.command.write_report", read_run)
        for seed in range(3):
            train(small(out / f"seed{seed}", "--budget.length=1ep", f"--run.seed={seed}"))
    return out


def change_options(run: Path, **options: Any) -> None:
    """Changes options in the run's config.yaml. The names have ``__`` for the dot."""
    content = yaml.safe_load((run / "config.yaml").read_text())
    for name, value in options.items():
        section, _, option = name.partition("__")
        content[section][option] = value
    (run / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def change_lines(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def change_origin(run: Path, **values: Any) -> None:
    """Changes values of trained_on.jsonl: ``gpu``, ``commit``, ``teacher``, and those of its ``data``."""

    def change(line: dict[str, Any]) -> None:
        for name, value in values.items():
            place = line["machine"] if name == "gpu" else line if name in ("commit", "teacher") else line["data"]
            place[name] = value

    change_lines(run / "trained_on.jsonl", change)


def change_log(run: Path, **values: Any) -> None:
    change_lines(run / "log.jsonl", lambda line: line.update(values))


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> list[Path]:
    """The runs, as if they were of 24 hours on ImageNet-1k and one GPU: what a test cannot have is written in."""
    shutil.copytree(trained, tmp_path / "runs")
    found = sorted((tmp_path / "runs").iterdir())
    for run in found:
        change_options(run, run__device="auto", budget__length="24h", evaluate__size=224)
        change_origin(run, gpu="NVIDIA H100", commit="0123456789ab", images=1_281_167, classes=1000)
        change_log(run, train_seconds=86_400.4, wall_seconds=90_000.0)
        classes = json.loads((run / "classes.json").read_text())
        for each in classes:
            each["images"] *= 50_000 // (4 * len(classes))
        (run / "classes.json").write_text(json.dumps(classes))
    return found


def board(runs: list[Path]) -> None:
    main(["report", *map(str, runs), "--board"])


def broken(text: str) -> dict[str, str]:
    """What is printed about each broken rule."""
    found = {}
    for line in text.splitlines():
        if line.startswith("broken  "):
            rule = next(rule for rule in ALL_RULES if line.startswith(f"broken  {rule}: "))
            found[rule] = line.removeprefix(f"broken  {rule}: ")
    return found


def test_runs_that_keep_all_rules_are_an_entry(runs: list[Path], capsys):
    change_log(runs[1], rewinds=2)
    change_log(runs[2], damaged_images=5)
    board(runs)
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if line.startswith("kept")] == [f"kept    {rule}" for rule in ALL_RULES]
    titles, _, line = out.splitlines()[-3:]
    assert titles == table_line(TITLES)
    cells = dict(zip(TITLES, (cell.strip() for cell in line.strip("|").split(" | ")), strict=True))
    scores = [read_run(run).score for run in runs]
    assert cells["seeds"] == ", ".join(f"{score:.2f}" for score in scores)
    assert float(cells["top-1 %"].split(" ± ")[0]) == pytest.approx(sum(scores) / 3, abs=0.006)
    assert (cells["GPU"], cells["budget"], cells["in all"], cells["teacher"], cells["commit"], cells["epochs"]) == (
        "NVIDIA H100", "24h", "25:00:00", "none", "0123456789ab", "1.0"
    )  # fmt: skip
    assert cells["notes"] == "2 rewinds after divergence, 5 damaged training images skipped"
    assert len(re.findall(r"SHA-256 [0-9a-f]{64}$", out, re.MULTILINE)) == 3


def test_the_docs_have_the_columns_of_an_entry():
    assert table_line(TITLES) in (ROOT / "docs" / "board.md").read_text(encoding="utf-8")


def copied_weights(runs: list[Path]) -> None:
    shutil.copy(runs[0] / "model.safetensors", runs[1])


def damaged_log(runs: list[Path]) -> None:
    with open(runs[0] / "log.jsonl", "a") as file:
        file.write("{\n")


def another_machine(runs: list[Path]) -> None:
    lines = (runs[0] / "trained_on.jsonl").read_text()
    change_origin(runs[0], gpu="NVIDIA L4")
    with open(runs[0] / "trained_on.jsonl", "a") as file:
        file.write(lines)


def on_a_cpu(runs: list[Path]) -> None:
    for run in runs:
        change_options(run, run__device="cpu")


def all_changed(**options: Any) -> Callable[[list[Path]], None]:
    def change(runs: list[Path]) -> None:
        for run in runs:
            change_options(run, **options)

    return change


def one_changed(change: Callable[..., None], **values: Any) -> Callable[[list[Path]], None]:
    return lambda runs: change(runs[1], **values)


CASES: dict[str, tuple[str, Callable[[list[Path]], Any], str]] = {
    "unfinished": ("each run is finished", one_changed(change_log, fraction=0.4), "seed1: 40.0% of the budget"),
    "no weights": (
        "each run is finished", lambda runs: (runs[2] / "model.safetensors").unlink(), "seed2: it has no model.safetens"
    ),
    "no origin": ("each folder", lambda runs: (runs[0] / "trained_on.jsonl").unlink(), "seed0: trained_on.jsonl is"),
    "damaged log": ("each folder", damaged_log, "seed0: log.jsonl has 1 damaged"),
    "length": ("the budget is", all_changed(budget__length="23h"), "seed0: budget.length=23h; seed1: budget"),
    "epochs": ("the budget is", all_changed(budget__length="90ep"), "seed0: budget.length=90ep"),
    "cpu time": ("the budget is", all_changed(budget__counts="cpu"), "seed0: budget.counts=cpu"),
    "too long": ("the budget is", one_changed(change_log, train_seconds=86_500.0), "seed1: it took 86500.0 s"),
    "wall": ("the budget is", all_changed(budget__counts="wall"), "seed0: it took 90000.0 s"),
    "images": ("the data are", one_changed(change_origin, images=1_281_166), "seed1: 1281166 images of 1000 classes"),
    "classes": ("the data are", one_changed(change_origin, classes=100), "seed1: 1281167 images of 100 classes"),
    "weights": ("training starts", all_changed(model__weights="runs/other"), "seed0: model.weights=runs/other"),
    "size": ("the score is", all_changed(evaluate__size=256), "seed0: 256 px"),
    "rows": ("the score is", all_changed(evaluate__rows="odd"), "seed0: evaluate.rows=odd"),
    "validation": (
        "the score is", lambda runs: (runs[0] / "classes.json").write_text("[]"), "seed0: 0 validation images"
    ),
    "processes": ("one GPU", one_changed(change_log, processes=8), "seed1: 8 processes"),
    "no GPU": ("one GPU", one_changed(change_origin, gpu=None), "seed1: a part was trained without a GPU"),
    "cpu": ("one GPU", on_a_cpu, "seed0: a part was trained without a GPU"),
    "two GPUs": ("one GPU", another_machine, "seed0: NVIDIA L4, NVIDIA H100"),
    "replay": ("the budget pays", all_changed(run__replay_search="runs/x"), "seed0: run.replay_search=runs/x"),
    "dirty": ("the code is", one_changed(change_origin, commit="0123456789ab-dirty"), "seed1: 0123456789ab-dirty"),
    "no commit": ("the code is", one_changed(change_origin, commit=None), "seed1: unknown"),
    "teacher": ("a teacher", all_changed(train__soft_labels=True), "seed0: the teacher is not recorded"),
    "two seeds": ("at least 3 runs", one_changed(change_options, run__seed=0), "runs with the seeds 0, 0, 2"),
    "chosen seeds": ("at least 3 runs", one_changed(change_options, run__seed=7), "runs with the seeds 0, 2, 7"),
    "copies": ("at least 3 runs", copied_weights, "runs with different seeds have the same weights"),
    "recipe": ("the recipe is", one_changed(change_options, train__lr=0.5), "seed1: train.lr was 0.001 and is now 0.5"),
    "other GPU": ("GPU, code", one_changed(change_origin, gpu="NVIDIA L4"), "GPU: NVIDIA H100, NVIDIA L4"),
    "other code": ("GPU, code", one_changed(change_origin, commit="ba9876543210"), "commit: 0123456789ab, ba98765432"),
    "other classes": ("GPU, code", one_changed(change_origin, digest="0"), "classes: 0, "),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_broken_rule_is_named_with_its_remedy(case: str, runs: list[Path], capsys):
    start, breaks, problem = CASES[case]
    (rule,) = (rule for rule in ALL_RULES if rule.startswith(start))
    breaks(runs)
    with pytest.raises(DataError, match=rf"--board: [1-3] of {len(ALL_RULES)} rules are broken"):
        board(runs)
    found = broken(capsys.readouterr().out)
    assert found[rule].startswith(problem) and found[rule].endswith(f"; {(RULES | TOGETHER)[rule][1]}")


def test_every_rule_is_broken_by_a_case():
    assert {rule for rule in ALL_RULES if not any(rule.startswith(start) for start, *_ in CASES.values())} == set()


def test_a_teacher_has_its_column(runs: list[Path], capsys):
    all_changed(train__soft_labels=True)(runs)
    for run in runs:
        change_origin(run, teacher="abcdef" * 10 + "0123")
    board(runs)
    assert "| abcdefabcdef |" in capsys.readouterr().out
    change_origin(runs[2], teacher="f" * 64)
    with pytest.raises(DataError, match="1 of"):
        board(runs)
    assert "teacher: abcdefabcdef, ffffffffffff" in capsys.readouterr().out


def test_small_runs_are_checked_by_all_rules(trained: Path, capsys):
    with pytest.raises(DataError, match="rules are broken, so this is no entry yet"):
        board([trained / "seed0", trained / "seed1"])
    out = capsys.readouterr().out
    starts = ("the budget is", "the data are", "the score is", "one GPU", "at least 3 runs")
    assert broken(out).keys() >= {rule for rule in ALL_RULES if rule.startswith(starts)}
    assert out.splitlines()[-1].startswith("| seed0 | vitlocal_tiny_patch8_64 | none | 1ep | ")


def test_options_of_a_page_are_refused(trained: Path):
    with pytest.raises(ConfigError, match="--board: it writes no page; leave out --out"):
        main(["report", str(trained / "seed0"), "--board", "--no-crops"])
