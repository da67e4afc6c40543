"""The benches of the step and of the trainer's phases, on small models: they run, and their sums are right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vitlocal.bench import profile, step
from vitlocal.bench.__main__ import main
from vitlocal.errors import ConfigError, DeviceMemoryError, run_command
from vitlocal.models.counts import count_macs
from vitlocal.train.build import make_model

CPU = torch.device("cpu")
FORM = {"what", "command", "machine", "versions", "commit", "rows"}
SHAPE = ["--model.width=32", "--model.depth=2", "--model.heads=2"]
STEP = ["step", *SHAPE, "--sizes", "16,32", "--batch", "4", "--rounds", "2", "--seconds", "0"]


def test_the_step_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "results" / "step.json"
    main([*STEP, "--arms", "local-eager,timm-eager", "--train.ema_decay=0.9", "--json", str(out)])
    measured = json.loads(out.read_text())
    assert measured.keys() >= FORM | {"batch_size", "precision", "peak_tflops", "peak_measured"}
    assert measured["batch_size"] == 4 and measured["peak_tflops"] > 0 and "matrices" in measured["peak_measured"]
    rows = measured["rows"]
    assert [(row["size"], row["arm"]) for row in rows] == [
        (size, arm) for size in (16, 32) for arm in ("local-eager", "timm-eager")
    ]
    for row in rows:
        assert not any(isinstance(value, (dict, list)) for value in row.values())  # flat
        assert row["n"] == 2 and row["mode"] == "eager" and row["images_per_second"] > 0 and row["batch_size"] == 4
        assert row["step_ms"] == pytest.approx(4e3 / row["images_per_second"], rel=0.01)
        flops = row["images_per_second"] * row["gflops_per_image"] / 1e3
        assert row["mfu"] == pytest.approx(flops / measured["peak_tflops"], abs=2e-4)
        assert row["peak_mib"] is None and row["compile_seconds"] is None
        ours = row["model"] == "local"
        present = [row[f"{phase}_ms"] is not None for phase in step.PHASES]
        assert present == [ours, True, True, True, ours]
        assert row["kernel"] == ("plain" if ours else None) and (row["speed_to_timm"] is not None) == ours
        assert row["time_to_deit"] is None  # the arm deit was not measured
    assert rows[2]["gflops_per_image"] > 2 * rows[0]["gflops_per_image"]
    shown = capsys.readouterr().out
    assert "local-eager" in shown and "timm-eager" in shown and "MFU" in shown


def test_flops_match_the_counter_of_torch() -> None:
    config, device = step.configured([*SHAPE, "--model.pool=avg", "--train.batch_size=2"])
    arms = [arm for arm in step.choose_arms(None, device) if not arm.startswith("timm")]
    size = config.model.size  # at another, reading the position table is a product too: one for a whole batch
    rows = step.compare(config, arms, [size], 1, 0.0, device, peak_tflops=1.0)
    assert len(rows) == 3
    for arm, row in zip(arms, rows, strict=True):
        model = make_model(step.arm_config(arm, config), step.CLASSES, CPU)[0].eval()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, size, size))
        assert row["gflops_per_image"] * 1e9 == pytest.approx(3 * counter.get_total_flops(), rel=0.02)


def test_pruned_arms_are_compared_with_whole_ones() -> None:
    pruning = ["--trilevel.levels=tokens", "--trilevel.token_keep_rate=0.5", "--trilevel.pruned_blocks=0"]
    config, device = step.configured([*SHAPE, *pruning, "--train.batch_size=2"])
    rows = step.compare(config, ["deit-eager", "deit-pruned-eager"], [32], 2, 0.0, device, peak_tflops=1.0)
    whole, pruned = rows
    assert "time_to_whole" not in whole and pruned["time_to_whole"] > 0
    ratio = pruned["gflops_per_image"] / whole["gflops_per_image"]
    assert pruned["flops_to_whole"] == pytest.approx(ratio, abs=1e-4) and ratio < 0.9
    assert pruned["time_to_whole_spread"] >= 0 and min(row["cpu_ms"] for row in rows) > 0
    (alone,) = step.compare(config, ["deit-pruned-eager"], [32], 1, 0.0, device, peak_tflops=1.0)
    assert "time_to_whole" not in alone and alone["gflops_per_image"] == pruned["gflops_per_image"]
    config, _ = step.configured([*SHAPE, "--trilevel.levels=examples"])
    with pytest.raises(ConfigError, match=r"this one drops nothing; set trilevel\.levels=tokens"):
        step.compare(config, ["deit-pruned-eager"], [32], 1, 0.0, device, peak_tflops=1.0)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_timm_model_has_the_shape_of_our_deit(pool: str) -> None:
    config, _ = step.configured([*SHAPE, f"--model.pool={pool}", "--model.patch_size=4"])
    ours = make_model(step.arm_config("deit-eager", config), step.CLASSES, CPU)[0]
    peer = step.timm_model(config)
    assert {name: p.shape for name, p in peer.named_parameters()} == {
        name: p.shape for name, p in ours.named_parameters()
    }
    for size in (16, 32, 64):
        assert count_macs(peer, size) == count_macs(ours, size)


def test_ratios_compare_eager_with_eager() -> None:
    milliseconds = {
        ("local", False): 12.0, ("deit", False): 10.0, ("timm", False): 15.0, ("local", True): 6.0, ("deit", True): 4.0,
    }  # fmt: skip
    rows = [
        {"model": model, "compiled": compiled, "size": size, "step_ms": scale * spent}
        for size, scale in ((32, 1), (64, 3))
        for (model, compiled), spent in milliseconds.items()
    ]
    for row in step.with_ratios(rows):
        found = row["time_to_deit"], row["speed_to_timm"]
        assert found == {
            ("local", False): (1.2, 1.25), ("deit", False): (None, 1.5), ("timm", False): (None, None),
            ("local", True): (1.5, None), ("deit", True): (None, None),
        }[row["model"], row["compiled"]]  # fmt: skip


def test_an_arm_without_memory_is_skipped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_memory(arm: str, *others: object) -> None:
        raise DeviceMemoryError("no memory for a training step")

    monkeypatch.setattr(step, "StepEntry", no_memory)
    with pytest.raises(ConfigError, match="nothing fits on cpu"):
        step.compare(step.configured([])[0], ["local-eager"], [32], 1, 0.0, CPU, 1.0)
    assert "local-eager: 16 images of 32 px do not fit; it is skipped" in capsys.readouterr().err


def test_arms_by_device() -> None:
    assert step.choose_arms(None, CPU) == ["local-eager", "deit-eager", "localvit-eager", "timm-eager"]
    on_gpu = step.choose_arms(None, torch.device("cuda"))
    assert len(on_gpu) == 6 and {"local-eager", "local-plain-compiled", "timm-compiled"} <= {*on_gpu}
    config, _ = step.configured(["--model.name=vitlocal_base_patch16_224", "--model.convolution=false"])
    assert step.arm_config("localvit-compiled", config).model.name == "vitlocal_localvit_base_patch16_224"
    assert step.arm_config("deit-compiled", config).model.convolution is None
    plain = step.arm_config("local-plain-compiled", config)
    assert (plain.model.convolution, plain.train.kernel, plain.train.compile) == (False, "plain", "yes")


def test_the_profile(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], decoder) -> None:
    out, trace = tmp_path / "results" / "profile.json", tmp_path / "traces" / "step.json"
    main(["profile", *SHAPE, f"--data.root={folder}", "--sizes", "16,32", "--steps", "3", "--train.batch_size=40",
          "--train.ema_decay=0.9", "--model.size=32", "--image_size.init=16", "--image_size.final=32",
          "--run.device=cpu",
          f"--run.folder={tmp_path / 'run'}", "--json", str(out), "--trace", str(trace)])  # fmt: skip
    measured = json.loads(out.read_text())
    assert measured.keys() >= FORM | {"recipe", "operators"}
    assert [(row["size"], row["batch_size"], row["steps"]) for row in measured["rows"]] == [(16, 40, 3), (32, 40, 3)]
    for row in measured["rows"]:
        assert sum(row[f"{part}_ms"] for part in profile.PARTS) == pytest.approx(row["step_ms"], rel=0.02, abs=0.02)
        assert sum(row[f"{part}_percent"] for part in profile.PARTS) == pytest.approx(100, abs=0.1)
        assert row["copy_ms"] == 0 and min(row[f"{part}_ms"] for part in ("forward", "backward", "average")) > 0
    assert {row["size"] for row in measured["operators"]} == {16, 32}
    assert any(row["operator"] == "aten::mm" and row["ms"] > 0 for row in measured["operators"])
    shown = capsys.readouterr().out
    assert (
        "aten::mm" in shown
        and "backward" in shown
        and len(shown.splitlines()) == 2 + 1 + 4 + 1 + 1 + profile.SHOWN_OPERATORS  # two notes: few data
    )
    assert sorted(path.name for path in trace.parent.iterdir()) == ["step_16px_40.json", "step_32px_40.json"]
    assert "traceEvents" in json.loads((trace.parent / "step_16px_40.json").read_text())
    assert not (tmp_path / "run").exists()


def test_the_smaller_last_batch_of_an_epoch_is_not_counted(folder: Path, configure, decoder) -> None:
    rows, _ = profile.profiled(configure("--train.batch_size=50"), [16], 3, None)  # of 120: 50, 50 and 20
    assert rows[0]["steps"] == 3 and rows[0]["batch_size"] == 50


def test_a_profile_of_few_data(folder: Path, configure, decoder, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"train\.batch_size: 200 at 16 px is more than the 120 images"):
        profile.profiled(configure("--train.batch_size=200"), [16], 1, None)
    profile.profiled(configure("--train.batch_size=50"), [16], 1, None)
    assert "note: at 16 px an epoch has 2 batches" in capsys.readouterr().out


def test_the_augment_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "augment.json"
    main(["augment", "--only", "groups,graph-eager", "--batch", "4", "--rounds", "2", "--json", str(out)])
    measured = json.loads(out.read_text())
    assert measured.keys() >= FORM | {"drawn"}
    rows = {(row["recipe"], row["version"]): row for row in measured["rows"]}
    assert len(rows) == 6 and all(row["draw_ms"] > 0 and row["issue_ms"] > 0 for row in rows.values())
    # Of a batch of 1024, whatever was timed: almost each operation of RandAugment with either sign, in both turns.
    assert rows["randaugment", "groups"]["operations"] > 350 > 300 > rows["randaugment", "graph-eager"]["operations"]
    assert "graph-eager" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--arms", "local-eager,resnet"], "got 'resnet', expected some of local-eager, local-compiled"),
        (["step", "--arms", "local-plain-eager"], "expected some of local-eager"),
        (["step", "--sizes", "32,44"], "got 44, expected multiples of 8"),
        (["step", "--sizes", "32,x"], "whole numbers"),
        (["step", "--rounds", "0"], "expected at least 1"),
        (["step", "--batch", "1"], "--batch: got 1, expected at least 2"),
        (["step", "--model.name=resnet18"], "vitlocal_small_patch16_224"),
        (["step", "--train.compile=yes"], "use --train.compile=auto and --arms"),
        (["step", "--train.bath_size=4"], "did you mean train.batch_size"),
        (["profile", "--steps", "0"], "expected at least 1"),
        (["augment", "--size", "2"], "expected at least 3"),
        (["profile", "--sizes", "20"], "expected multiples of 8"),
        (["profile", "--step=3"], "there is no option 'step'"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str], decoder
) -> None:
    arguments = [*arguments, "--run.device=cpu", *([f"--data.root={folder}"] if arguments[0] == "profile" else [])]
    with pytest.raises(ConfigError):
        main(arguments)
    assert run_command(main, arguments) == 2
    assert message in capsys.readouterr().err
