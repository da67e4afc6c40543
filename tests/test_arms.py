"""The benches of arms: those of a yaml file, and those of the paper."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain, repeat
from pathlib import Path

import pytest
import torch

from vitlocal.bench.__main__ import main
from vitlocal.bench.arms import RunResult, results_table
from vitlocal.bench.paper import ARMS, GROUPS, PAPER_EPOCHS, chosen, scaled, scaled_size, write_paper
from vitlocal.bench.runner import Arm, Runner, plan_runs, read_arms
from vitlocal.config import read_config
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError, DataError
from vitlocal.machine import memory_stalls
from vitlocal.models.factory import patch_side
from vitlocal.report.run_folder import read_log
from vitlocal.storage import recipe_stages
from vitlocal.stored_config import stated_options
from vitlocal.train.build import make_model
from vitlocal.train.run_folder import data_fingerprint, record_origin, run_folder_lock

ROOT = Path(__file__).parent.parent


@pytest.fixture
def two(small, tmp_path: Path) -> Path:
    """A file of two arms. The second one has fewer blocks."""
    (tmp_path / "small.yaml").write_text(small(tmp_path / "unused").yaml())
    path = tmp_path / "arms.yaml"
    path.write_text(
        "recipes: [small.yaml]\noptions: {model.width: 48}\narms:\n  plain: {}\n  half as deep: {model.depth: 1}\n"
    )
    return path


def test_every_arm_of_the_paper_is_a_configuration():
    assert {name for group in GROUPS.values() for name in group} == set(ARMS)
    for arm in ARMS.values():
        config = read_config([*arm.command_line(), "--budget.length=24h"], {})
        assert config.model.size == 224
        small = read_config(scaled(arm, 64, 8).command_line(), {})
        assert small.model.size == 64 and small.train == read_config(["-C", "rcfg/paper_64px.yaml"], {}).train
        assert ("image_size" in small.methods) == ("image_size" in config.methods)
        if arm.name not in ("ours", "deit", "localvit"):
            continue
        model, _ = make_model(small, 50, torch.device("cpu"))
        assert patch_side(model) == 8 and model.embed_dim == 128 and len(model.blocks) == 6


def test_scaled_sizes_are_those_of_the_paper_in_whole_patches():
    assert [scaled_size(size, 64, 8) for size in range(32, 225, 32)] == [16, 24, 32, 40, 48, 56, 64]
    assert [scaled_size(size, 64, 4) for size in range(32, 225, 16)] == list(range(16, 65, 4))
    stages = recipe_stages(read_config(scaled(ARMS["ours"], 64, 8).command_line(), {}))
    assert [stage.size for stage in stages] == [16, 24, 32, 40, 48, 56, 64]
    # Each size has 5 of the 16 epochs that 24 hours buy at 224 px, by multiply-adds (4.62 G at 224 px).
    macs = [0.09, 0.36, 0.80, 1.44, 2.27, 3.33]
    spent = [sum(macs[: place + 1]) * 5 / 4.62 / PAPER_EPOCHS for place in range(6)]
    assert [stage.until.value for stage in stages[:-1]] == pytest.approx(spent, abs=1e-3)


def test_an_arm_in_two_groups_runs_once():
    assert [arm.name for arm in chosen("table1,ablations,ours")] == [
        "deit", "localvit", "ours", "ours_no_curriculum", "ours_gelu", "ours_batchnorm", "ours_no_convolution",
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="--only: got 'our'"):
        chosen("table1,our")


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--scale=96"], "--scale: there is no"),
        (["--scale=64", "--patch=7"], "--patch: 7 px do not divide 64"),
        (["--scale=64", "--patch=0"], "--patch: 0 px do not divide 64"),
        (["--patch=4"], "give --scale 64"),
        (["--budget.length=6h"], "--budget.length: the bench sets it for each run; use --budget"),
        (["--no-run"], "has none of these runs"),
        (["--budget=24"], "--budget: got '24'"),
        (["--seeds=a"], "--seeds: got 'a', expected whole numbers of at least 0"),
        (["--run.resume=never"], "--run.resume: the bench sets it for each run; leave it out"),
        (["--together=2", "--budget.counts=wall"], "--budget.counts: the bench sets it for each run; --together"),
        (["--data=/nowhere"], "/nowhere/train.json"),
        (["--nonsense=1"], "nonsense"),
        (["--jobs=99", "--data", "FOLDER"], "--jobs: got 99"),
    ],
)
def test_wrong_benches_of_the_paper(words: list[str], part: str, folder: Path, tmp_path: Path):
    words = [str(folder) if word == "FOLDER" else word for word in words]
    with pytest.raises(ConfigError, match=part):
        main(["paper", "--only=deit", f"--folder={tmp_path}/runs", *words])


def test_a_model_that_cannot_be_made_is_an_error_before_training(two: Path, folder: Path, tmp_path: Path):
    two.write_text(two.read_text() + "  wrong: {model.patch_drop: 0.5, model.name: vitlocal_localvit_tiny_patch8_64}\n")
    with pytest.raises(ConfigError, match="the arm 'wrong': model option patch_drop_rate=0.5: expected none"):
        main(["arms", str(two), "--budget=1ep", f"--folder={tmp_path}/runs"])
    assert not (tmp_path / "runs").exists()


def test_arms_run_once_and_are_tabulated(two: Path, tmp_path: Path, capsys):
    two.write_text(two.read_text() + "  broken: {train.lr: 1.0e+30}\n")
    command = ["arms", str(two), "--budget=1ep", "--seeds=3", f"--folder={tmp_path}/runs", "--together=2",
               "--only=half as deep,broken",
               f"--json={tmp_path}/arms.json", f"--plot={tmp_path}/arms.png"]  # fmt: skip
    with pytest.raises(DataError, match=r"1 of the runs failed \(broken-1ep-seed3\)"):
        main(command)
    out = capsys.readouterr().out
    assert "broken-1ep-seed3: failed" in out and "diverged" in out and "| half as deep |" in out
    measured = json.loads((tmp_path / "arms.json").read_text())
    assert [(row["arm"], row["seed"]) for row in measured["rows"]] == [("half as deep", 3)]
    assert len(measured["curves"]) == 1 and (tmp_path / "arms.png").stat().st_size > 0
    run = tmp_path / "runs" / "half_as_deep-1ep-seed3"
    config = read_config(["-C", str(run / "config.yaml")], {})
    assert (config.model.depth, config.model.width, config.run.seed, config.budget.counts) == (1, 48, 3, "cpu")
    before = (run / "log.jsonl").stat().st_mtime_ns
    main([*command, "--only=half as deep"])
    assert "1 of" not in capsys.readouterr().out and (run / "log.jsonl").stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match="holds a run of another configuration: evaluate.rows was 'all'"):
        main([*command, "--only=half as deep", "--evaluate.rows=odd"])


def test_a_run_on_other_images_is_an_error(two: Path, folder: Path, tmp_path: Path):
    (entry,) = plan_runs([read_arms(str(two))[0]], [0], "1ep", tmp_path, ())
    config = entry.config()
    entry.folder.mkdir()
    (entry.folder / "config.yaml").write_text(config.yaml())
    assert entry.config() == config  # an older run, which has no record of its data
    here = load_manifest(str(folder), "train")
    record_origin(entry.folder, data_fingerprint(here.count, here.classes))
    assert entry.config() == config
    for images, classes in ((119, here.classes), (120, (*here.classes[1:], "another"))):
        (entry.folder / "trained_on.jsonl").unlink()
        record_origin(entry.folder, data_fingerprint(images, classes))
        with pytest.raises(ConfigError, match=f"has 120 training images of 20 .* was started on {images} of 20"):
            entry.config()


def test_the_bench_waits_for_runs_that_still_save(two: Path, tmp_path: Path, monkeypatch, capsys):
    """After a bench is killed, its runs save before they stop, and use their folders until then."""
    started = []
    monkeypatch.setattr(Runner, "_start", lambda runner, run, *_: started.append(run))
    monkeypatch.setattr(Runner, "_check_memory", lambda runner: None)
    (entry,) = plan_runs([read_arms(str(two))[0]], [0], "1ep", tmp_path, ())
    entry.folder.mkdir()
    runner, saving = Runner(1, 1), run_folder_lock(entry.folder)
    saving.__enter__()
    naps = iter([None, None, lambda: saving.__exit__(None, None, None)])
    monkeypatch.setattr("vitlocal.bench.runner.time.sleep", lambda seconds: (nap := next(naps)) and nap())
    naps = chain(naps, repeat(None))
    assert runner.run([entry]) == [] and started == [entry]
    assert capsys.readouterr().out == f"waiting for another process that uses {entry.folder} ...\n"


def test_the_paper_bench_writes_a_table_and_plots(tmp_path: Path, capsys):
    """It writes the table with the numbers of the paper, both plots, and the measurement."""
    arms = chosen("table1,curriculum_64_5_32")
    passes = [{"train_seconds": 10.0 * part, "top1": 5.0 * part, "epoch": part} for part in (1, 2)]
    found = [replace(result(arm.name, seed, 40.0 + seed), curve=passes) for arm in arms for seed in (0, 1)]
    write_paper(found, arms, tmp_path / "paper", str(tmp_path / "paper.json"), "15m")
    lines = (tmp_path / "paper" / "table.md").read_text().splitlines()
    assert len(lines) == 2 + 5 and lines[2].startswith("| deit: DeiT-S | 43.05 | 40.50 ± 0.71 |")
    assert all((tmp_path / "paper" / name).stat().st_size > 3000 for name in ("architectures.png", "curricula.png"))
    measured = json.loads((tmp_path / "paper.json").read_text())
    assert len(measured["rows"]) == 10 and measured["curves"]["ours-1ep-seed0"] == passes
    assert capsys.readouterr().out.splitlines() == lines
    # A single arm gets a table and no plot.
    write_paper(found[:2], arms[:1], tmp_path / "one", None, "15m")
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["table.md"]


@pytest.mark.slow
def test_an_interrupted_bench_continues(two: Path, tmp_path: Path):
    command = [sys.executable, "-m", "vitlocal.bench", "arms", str(two), "--budget=300steps", "--only=plain",
               f"--folder={tmp_path}/runs", "--evaluate.every=0", "--run.save_every=100ep"]  # fmt: skip
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    run = tmp_path / "runs" / "plain-300steps-seed0"
    for _ in range(600):
        if len(read_log(run)) >= 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "stopping: the runs save" in out
    assert not (run / "model.safetensors").exists() and (run / "checkpoints" / "last.pt").exists()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert read_log(run)[-1]["step"] == 300 and (run / "report.html").exists()


def test_arms_with_the_same_folder_are_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="give them different names"):
        plan_runs([Arm("a b", ()), Arm("a_b", ())], [0], "1ep", tmp_path, ())


@pytest.mark.parametrize(
    ("text", "part"),
    [("arms: 3", "expected 'recipes'"), ("recipes: [a.yaml]", "expected 'recipes'"), ("[", "expected 'recipes'"),
     ("arms: {'a, b': {}}", "contains a comma"), (None, "cannot be read")],
)  # fmt: skip
def test_files_without_arms(tmp_path: Path, text: str | None, part: str):
    path = tmp_path / "arms.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=part):
        read_arms(str(path))


def result(arm: str, seed: int, top1: float, cpu: str = "fast") -> RunResult:
    row = {"arm": arm, "seed": seed, "budget": "1ep", "top1": top1, "epochs": 3.0, "images_per_second": 100.0}
    return RunResult(row | {"run": f"{arm}-1ep-seed{seed}", "cpu": cpu, "gpu": None}, [], {})


def test_the_table_has_mean_and_deviation_and_compares_by_seed():
    arms = [Arm("ours", (), {}, "about", 53.98), Arm("absent", ()), Arm("other", ()), Arm("apart", ())]
    found = [result("ours", 0, 40.0), result("ours", 1, 42.0), result("other", 1, 43.0), result("other", 0, 42.0),
             result("apart", 2, 30.0), result("apart", 0, 30.0, "slow")]  # fmt: skip
    assert results_table(found, arms).splitlines()[0] == (
        "| arm | paper, top-1 % | top-1 % | against ours | seeds | epochs | images/s |"
    )
    assert results_table(found, arms).splitlines()[2:] == [
        "| ours: about | 53.98 | 41.00 ± 1.41 |  | 40.00, 42.00 | 3.0 | 100 |",
        "| other |  | 42.50 ± 0.71 | +1.50 ± 0.71 | 43.00, 42.00 | 3.0 | 100 |",
        "| apart |  | 30.00 ± 0.00 |  | 30.00, 30.00 | 3.0 | 100 |",
    ]
    assert (
        results_table(found[:2], arms).splitlines()[0]
        == "| arm | paper, top-1 % | top-1 % | seeds | epochs | images/s |"
    )


def test_the_table_has_a_teacher_only_if_a_run_has_soft_labels():
    arms = [Arm("plain", ()), Arm("taught", ())]
    plain, taught = result("plain", 0, 40.0), result("taught", 0, 42.0)
    assert "teacher" not in results_table([plain, taught], arms)
    taught.row["teacher"] = "abcdefabcdef"
    head, _, *rows = results_table([plain, taught], arms).splitlines()
    assert head.endswith("| teacher |") and rows[0].endswith("|  |") and rows[1].endswith("| abcdefabcdef |")


def write_results_of_another_machine(arms: Path, path: Path) -> dict:
    """Writes a file of --json with a run of the first arm on another machine."""
    row = result("plain", 0, 40.0, "another").row | {"budget": "2steps"}
    config = read_config([*read_arms(str(arms))[0].command_line(), "--budget.length=2steps"])
    made = {"rows": [row], "curves": {row["run"]: [{"epoch": 1.0}]}, "configs": {row["run"]: stated_options(config)}}
    path.write_text(json.dumps(made))
    return made


def test_added_runs_are_not_trained_again(two: Path, tmp_path: Path, capsys):
    there = write_results_of_another_machine(two, tmp_path / "there.json")
    assert there["configs"]["plain-1ep-seed0"]["model.width"] == 48
    command = ["arms", str(two), "--budget=2steps", f"--json={tmp_path}/all.json"]
    main([*command, f"--folder={tmp_path}/here", f"--add={tmp_path}/there.json"])
    assert not (tmp_path / "here" / "plain-2steps-seed0").exists()
    found = json.loads((tmp_path / "all.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["plain", "half as deep"] and len(found["curves"]) == 2
    assert found["rows"][0] == there["rows"][0] and found["rows"][1]["cpu"] == found["machine"]["cpu"]
    # A file with added runs can be added too, and keeps their machine.
    capsys.readouterr()
    main([*command, f"--folder={tmp_path}/nothing", f"--add={tmp_path}/all.json", "--no-run"])
    assert "| half as deep |" in capsys.readouterr().out
    assert json.loads((tmp_path / "all.json").read_text())["rows"] == found["rows"]


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--seeds=1"], "has none of these runs; it has 'plain' with seed 0 and 2steps"),
        (["--evaluate.rows=odd"], "has 'plain' with seed 0 of another configuration: evaluate.rows was 'all' and is"),
        (["--add=AGAIN"], "has 'plain' with seed 0, and so has another file"),
    ],
)
def test_runs_of_another_configuration_are_not_added(two: Path, tmp_path: Path, options: list[str], part: str):
    for name in ("made.json", "again.json"):
        write_results_of_another_machine(two, tmp_path / name)
    options = [word.replace("AGAIN", f"{tmp_path}/again.json") for word in options]
    with pytest.raises(ConfigError, match=part):
        main(
            ["arms", str(two), "--budget=2steps", f"--folder={tmp_path}/runs", f"--add={tmp_path}/made.json", *options]
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("text", "part"), [(None, "cannot be read"), ("[1]", "is not a file"), ("{}", "is not a file")]
)
def test_files_without_results(two: Path, tmp_path: Path, text: str | None, part: str):
    path = tmp_path / "made.json"
    if text:
        path.write_text(text)
    with pytest.raises(ConfigError, match=f"--add: {path} {part}"):
        main(["arms", str(two), "--budget=2steps", f"--folder={tmp_path}/runs", f"--add={path}"])


def test_arms_may_not_set_options_of_the_bench(two: Path, tmp_path: Path):
    command = ["arms", str(two), "--budget=2steps", f"--folder={tmp_path}/runs"]
    with pytest.raises(ConfigError, match="--model.depth: the arm 'half as deep' has model.depth=1; leave out one"):
        main([*command, "--model.depth=2"])
    two.write_text(two.read_text() + "  long: {budget.length: 3ep}\n")
    with pytest.raises(ConfigError, match="the arm 'long': the bench sets budget.length for each run; use --budget"):
        main(command)


def test_a_smaller_benchmark_has_a_smaller_budget():
    arms = [scaled(arm, 64, 8) for arm in chosen("table1")]
    assert {str(read_config(arm.command_line(), {}).budget.length) for arm in arms} == {"15m"}


def test_seeds_run_one_after_the_other_if_runs_share_cores(tmp_path: Path, monkeypatch, capsys):
    begun: list[tuple[int, set[int]]] = []

    class Process:
        """Ends after a few polls."""

        def __init__(self, seed: int, output: Path):
            self.seed, self.asked, self.returncode = seed, 0, 0
            output.write_text("done: top-1 1.00 %")

        def poll(self) -> int | None:
            self.asked += 1
            return 0 if self.asked > 3 + self.seed else None

    def start(options: list[str], output: Path, *_: object, **__: object) -> Process:
        process = Process(read_config(options).run.seed, output)
        begun.append((process.seed, {other.seed for other in runner.running}))
        return process

    monkeypatch.setattr("vitlocal.bench.runner.start_trainer", start)
    monkeypatch.setattr("vitlocal.bench.runner.time.sleep", lambda seconds: None)
    runs = plan_runs([Arm("a", ()), Arm("b", ()), Arm("c", ())], [0, 1], "1ep", tmp_path, ())
    monkeypatch.setattr("vitlocal.bench.runner.memory_stalls", lambda: 0.0)
    runner = Runner(1, 4)
    assert runner.run(runs) == []
    assert [seed for seed, _ in begun] == [0, 0, 0, 1, 1, 1] and all(beside <= {seed} for seed, beside in begun)
    assert "memory is short" not in capsys.readouterr().out
    begun.clear()
    monkeypatch.setattr("vitlocal.bench.runner.memory_stalls", lambda: 0.3)
    runner = Runner(1, 1)
    assert runner.run(runs) == [] and [seed for seed, _ in begun] == [0, 0, 0, 1, 1, 1]
    assert capsys.readouterr().out.count("note: memory is short (nothing ran for 30% of the last minute)") == 1


def test_memory_stalls_are_read_from_linux(tmp_path: Path):
    pressure = tmp_path / "memory"
    pressure.write_text(
        "some avg10=0.00 avg60=9.00 avg300=0.10 total=18\nfull avg10=0.00 avg60=3.50 avg300=0.05 total=13\n"
    )
    assert memory_stalls(pressure) == 0.035
    assert memory_stalls(tmp_path / "none") == 0


def test_the_files_of_arms_in_rcfg_are_configurations():
    found = sorted((ROOT / "rcfg" / "arms").glob("*.yaml"))
    for path in found:
        for arm in read_arms(str(path)):
            config = read_config(arm.command_line(), {})
            named = re.search(r"patch(\d+)", config.model.name)  # PVTv2 takes all sizes
            patch = config.model.patch_size or int(named[1] if named else 1)
            assert (config.evaluate.size or config.model.size) % patch == 0, (path.name, arm.name)
