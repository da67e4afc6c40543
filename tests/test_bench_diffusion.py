"""Benches and reports with diffusion transformers: right numbers, or a refusal that says why."""

from __future__ import annotations

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fake_images import FakeImages
from latent_files import options as latent_options
from latent_files import use_stand_in
from PIL import Image

from vitlocal.bench import forecast, unfreeze
from vitlocal.bench.__main__ import main
from vitlocal.bench.arms import JUDGED_BY, RunResult, publish, results_table
from vitlocal.bench.memory import count_memory, state_bytes
from vitlocal.bench.runner import Arm
from vitlocal.config import Config, read_config
from vitlocal.data.writer.write import write
from vitlocal.errors import ConfigError
from vitlocal.methods.unfreeze import groups_of
from vitlocal.models.counts import count_macs
from vitlocal.plan import Feed
from vitlocal.report.page import crops_part, page_of
from vitlocal.report.pictures import OLDER, shown_pictures
from vitlocal.report.run_folder import RunRecord, read_run, write_picture
from vitlocal.tasks.metrics import METRICS
from vitlocal.train.build import build_step, make_model
from vitlocal.train.timing import fill_zeros, noise_batch

CPU, META = torch.device("cpu"), torch.device("meta")
NARROW = ["--model.width=16", "--model.depth=4", "--model.heads=2", "--model.drop_path=0", "--train.batch_size=4"]
PIXELS = ["--model.name=vitlocal_dit_tiny_patch4_32", "--model.size=16", *NARROW]
LATENTS = ["--model.name=vitlocal_dit_small_patch2", "--model.size=64", *NARROW]
# Multiply-adds of DiT-XL/2, in billions; the trained blocks of its levels.
XLARGE, TRAINED = {64: 7.4, 128: 29.0, 192: 65.8, 256: 118.6}, {"mod": [7, 14, 21, 28], "released": [7, 20, 26, 28]}


def configured(words: list[str]) -> Config:
    return read_config(words, {})


# --- the step ---


def test_random_batches_have_the_form_of_the_task():
    pixels, latents = (build_step(configured(words), 10, CPU).task for words in (PIXELS, LATENTS))
    state = torch.get_rng_state()
    for task, shape, kind in ((pixels, (4, 3, 16, 16), torch.uint8), (latents, (4, 8, 2, 2), torch.float16)):
        first, second = (noise_batch(Feed(16, 4), 10, CPU, task) for _ in range(2))
        assert first.images.shape == shape and first.images.dtype == kind and len(first) == 4
        assert torch.equal(first.images, second.images) and first.images.float().std() > 0
    assert torch.equal(state, torch.get_rng_state())


def test_zero_matrices_are_filled():
    model = build_step(configured(PIXELS), 10, CPU).model
    before = {name: value.clone() for name, value in model.named_parameters()}
    fill_zeros(model)
    for name, value in model.named_parameters():
        was_zero = value.ndim > 1 and not before[name].any()
        assert torch.equal(value, before[name]) != was_zero, name
    assert all(block.adaLN_modulation[1].weight.std() > 0.01 for block in model.blocks)


def test_the_step_bench(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "step.json"
    main(["step", *LATENTS, "--sizes=32,64", "--rounds=1", "--seconds=0", f"--json={out}"])
    rows = json.loads(out.read_text())["rows"]
    assert [(row["size"], row["arm"], row["mode"]) for row in rows] == [(s, "dit-eager", "eager") for s in (32, 64)]
    model = make_model(configured(LATENTS), 1000, CPU)[0]
    for row in rows:
        assert row["gflops_per_image"] == pytest.approx(6e-9 * count_macs(model, row["size"]))
        assert row["images_per_second"] > 0 and row["augment_ms"] > 0 and row["backward_ms"] > 0
    assert "dit-eager" in capsys.readouterr().out
    for words, part in ((["--arms=local-eager"], "expected some of dit-eager, dit-compiled"),
                        (["--sizes=24"], "got 24, expected multiples of 16")):  # fmt: skip
        with pytest.raises(ConfigError, match=part):
            main(["step", *LATENTS, *words])


# --- memory and forecasts ---


def test_the_state_of_the_largest_model_is_weights_gradients_moments_and_average():
    config = configured(["--model.name=vitlocal_dit_xlarge_patch2", "--model.size=256", "--model.drop_path=0"])
    with META:
        model, _ = make_model(config, 1000, META)
    weights = sum(4 * parameter.numel() for parameter in model.parameters())
    assert weights == pytest.approx(4 * 675e6, rel=1e-3)
    assert state_bytes(model, config, averages=1) == pytest.approx(5 * weights, rel=1e-3)


def test_memory_grows_with_the_batch_and_inputs_are_latents():
    small, large = (
        count_memory(configured([*LATENTS, "--model.depth=1", f"--train.batch_size={n}"]), 5000)[0] for n in (64, 256)
    )
    assert large.state == small.state and 3.9 < large.step / small.step < 4.1
    batches, rest = divmod(large.inputs, 256 * 2 * 4 * 8 * 8 * 2)  # float16 means and deviations of four channels
    assert rest == 0 and batches == small.inputs // (64 * 2 * 4 * 8 * 8 * 2) > 2


@pytest.mark.parametrize("words", [PIXELS, LATENTS])
def test_a_forecast(words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(forecast, "SECONDS", 0.1)
    words = [*words, "--methods=none", "--budget.length=10ep", "--budgets=none", "--diffusion.sample_steps=2"]
    with_data = words[0] == PIXELS[0]
    main(["forecast", *words, f"--data.root={folder if with_data else '/nowhere'}", "--memory=80GB"])
    out = capsys.readouterr().out
    assert ("evaluation: the first after" in out) == with_data != ("only the step is measured" in out)
    assert "it fits" in out and "accuracy" not in out


def test_a_forecast_counts_the_samples_of_each_evaluation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecast, "SECONDS", 0.1)
    monkeypatch.setattr("vitlocal.tasks.gallery.Gallery.seconds", lambda *arguments: (1000.0, 3000.0))
    found = forecast.forecast(configured([*PIXELS, f"--data.root={folder}", "--budget.length=1ep"]), None)
    assert 1000 < found.evaluation_seconds < 1100 and 2000 < found.other_seconds < 2100  # the last one takes 3000 s


# --- schedules ---


def test_speed_ups_by_flops_are_the_published_arithmetic():
    sizes, depth = list(XLARGE), 28
    blocks = {groups: [len(level) for level in groups_of(depth, 4, groups)] for groups in TRAINED}
    assert blocks == TRAINED
    cost = {(size, n): [unfreeze.step_cost(macs, n / depth)] * 2
            for size, macs in XLARGE.items() for counts in TRAINED.values() for n in counts}  # fmt: skip
    rows = unfreeze.schedule_rows("eager", sizes, TRAINED, cost, XLARGE)
    by_flops = {row["schedule"]: row["by_flops"] for row in rows if row["groups"] == "mod"}
    expected = {"freezing alone": 1.14, "sizes alone": 2.15, "ladder": 2.27, "time-heavy vote": 2.83, "bound": 3.51}
    assert by_flops == pytest.approx(expected, abs=0.005)
    assert all(row["speed_up"] == row["by_flops"] and row["spread"] == 0 and row["n"] == 2 for row in rows)
    slower = {net: [turns[0] + 100, turns[1]] for net, turns in cost.items()}  # in one turn, all steps take longer
    (ladder,) = (row for row in unfreeze.schedule_rows("eager", sizes, TRAINED, slower, XLARGE)
                 if (row["schedule"], row["groups"]) == ("ladder", "mod"))  # fmt: skip
    assert ladder["speed_up"] < 2.27 and ladder["spread"] > 0
    del cost[64, 28]  # it was not measured
    assert "sizes alone" not in {row["schedule"] for row in unfreeze.schedule_rows("", sizes, TRAINED, cost, XLARGE)}


def test_what_most_schedules_need_is_measured_first():
    order = unfreeze.nets_in_order(list(XLARGE), TRAINED, [1, 2, 3, 4])
    assert len(order) == len(set(order)) == 4 * 6
    assert order[:2] == [(256, 28), (64, 7)]
    intended = {(size, TRAINED["mod"][level - 1])
                for stages in unfreeze.schedules_of(list(XLARGE)).values() for level, size in stages}  # fmt: skip
    assert set(order[: len(intended)]) == intended
    assert {count for _, count in unfreeze.nets_in_order(list(XLARGE), TRAINED, [1, 4])} == {7, 28}


def test_frozen_blocks_do_not_train_and_time_limits_hold():
    step = build_step(configured(PIXELS), unfreeze.CLASSES, CPU)
    fill_zeros(step.model)
    before = {name: value.clone() for name, value in step.model.named_parameters()}
    (timed,) = unfreeze.measure(step, [(Feed(16, 4), (0, 2))], 3, 0.0, time.monotonic() + 60)
    assert len(timed.turns) == 3 and min(timed.turns) > 0
    changed = {name for name, value in step.model.named_parameters() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] for name in changed if name.startswith("blocks.")} == {"0", "2"}
    assert "final_layer.linear.weight" in changed
    assert unfreeze.measure(step, [(Feed(16, 4), (0,))], 3, 0.0, time.monotonic() - 1) == []


def test_the_bench_of_schedules(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "unfreeze.json"
    main(["unfreeze", *PIXELS, "--sizes=8,16", "--repeats=2", "--seconds=0", f"--json={out}"])
    measured = json.loads(out.read_text())
    rows, model = measured["rows"], make_model(configured(PIXELS), 1000, CPU)[0]
    assert {(row["size"], row["trained_blocks"], row["mod_level"]) for row in rows} == {
        (size, count, level) for size in (8, 16) for level, count in ((1, 2), (2, 4))
    }
    for row in rows:
        part = (2 + row["trained_blocks"] / 4) / 3
        assert row["gflops_per_image"] == pytest.approx(6e-9 * part * count_macs(model, row["size"]))
        assert row["step_ms"] == pytest.approx(4e3 / row["images_per_second"], rel=0.01) and row["n"] == 2
    assert {row["schedule"] for row in measured["schedules"]} == set(unfreeze.schedules_of([8, 16])) - {"all"}
    assert measured["recipe"]["model.depth"] == 4 and "by FLOPs" in capsys.readouterr().out
    for words, part in ((["--sizes=16"], "got 1 for 1 sizes"), (["--sizes=8,16", "--levels=3"], "got 3 for 2 sizes"),
                        (["--sizes=8,16", "--minutes=0"], "nothing was measured"),
                        (["--sizes=6,16"], "got 6, expected multiples of 4"),
                        (["--train.compile=yes"], "use --modes")):  # fmt: skip
        with pytest.raises(ConfigError, match=part):
            main(["unfreeze", *PIXELS, *words])


# --- data ---


def test_benches_of_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        use_stand_in(patch.setattr)
        write(latent_options(tmp_path / "latents"), FakeImages(24), progress=False)
    loader = ["loader", f"--data={tmp_path}/latents", "--rounds=1", "--seconds=0"]
    main([*loader, f"--json={tmp_path}/loader.json"])
    rows = json.loads((tmp_path / "loader.json").read_text())["rows"]
    assert [(row["size"], row["source"], row["stored"], row["chosen"]) for row in rows] == [
        (16, "ours", "latents", True), (32, "ours", "latents", True)
    ]  # fmt: skip
    assert all(row["images_per_second"] > 0 for row in rows)
    with pytest.raises(ConfigError, match="--only: got ours,torchvision, but .* holds latents"):
        main([*loader, "--only=ours,torchvision"])


def test_what_only_classifiers_have_is_refused(tmp_path: Path) -> None:
    from vitlocal.write_dataset import main as write_main

    with pytest.raises(ConfigError, match="--models: got vitlocal_dit_small_patch2, expected classifiers"):
        main(["traffic", "--models=vitlocal_small_patch16_224,vitlocal_dit_small_patch2"])
    with pytest.raises(ConfigError, match="vitlocal_dit_tiny_patch4_32: only .* can be measured"):
        main(["redundancy", str(made_run(tmp_path / "run", 1))])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(configured([*LATENTS, "--methods=unfreeze", "--unfreeze.size_multiple=16"]).yaml())
    with pytest.raises(ConfigError, match=r"nothing to plan; use .* --sides 16,32,48,64 --format latent --vae FOLDER"):
        write_main(["--plan", "--source=sample:1", f"--out={tmp_path}/out", f"--recipe={recipe}"])
    assert not (tmp_path / "out").exists()


# --- runs compared ---

JUDGED = {"name": "FID", "samples": 1000, "reference_images": 5000, "floor": 3.2, "sampler": "ddim", "steps": 25,
          "reference": "training images", "floor_images": 900,
          "guidance": 4.0, "guided_channels": "3", "drops_stage": True, "seed": 7}  # fmt: skip


def made_run(folder: Path, passes: int, *options: str) -> Path:
    """A run folder as the trainer leaves it after ``passes`` evaluations, with a picture of each."""
    folder.mkdir()
    words = [*PIXELS, "--methods=none", f"--run.folder={folder}", *options]
    (folder / "config.yaml").write_text(configured(words).yaml())
    lines = []
    for number in range(1, passes + 1):
        last = number == passes
        lines.append({
            "epoch": number / 2, "step": 10 * number, "images_seen": 40 * number, "image_size": 16, "batch_size": 4,
            "loss": 1 / number, "val_loss": 0.5 / number, "frechet_distance": 12.345 if last else None,
            "sample_accuracy": 61.5 if last else None, "fraction": number / passes, "flops": 1e6 * number, "lr": 1e-3,
            "train_seconds": 2.0 * number, "wall_seconds": 3.0 * number, "images_per_second": 20.0,
            "data_wait_fraction": 0.0, "macs_per_image": 1000, **({"frechet": JUDGED} if last else {}),
        })  # fmt: skip
        noise = torch.randint(256, (600, 1500, 3), dtype=torch.uint8).numpy()
        write_picture(folder, f"{10 * number:09d}_samples", Image.fromarray(noise))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def pictures_in(page: str) -> list[str]:
    return re.findall(r'<img alt="(samples[^"]*)" src="data:image/jpeg;base64,[^"]{1000,}"', page)


def test_the_page_shows_samples_and_how_they_were_judged(tmp_path: Path):
    run = read_run(made_run(tmp_path / "run", 9))
    page = page_of([run], crops=False)
    shown = pictures_in(page)
    assert len(shown) == OLDER + 1 and shown[0] == "samples at epoch 4.50"  # the newest one, large
    assert shown[1:] == [f"samples at epoch {epoch:.2f}" for epoch in (0.5, 1.5, 2.0, 3.0, 3.5)]
    assert len(page) < 2_500_000  # of noise, which JPEG cannot compress; the files have 24 MB
    assert "FID, epoch 4.50: 12.35, where 900 held-out images have 3.20. Measured on 1,000" in page
    assert "1,000 samples and 5,000 training images" in page
    assert "DDIM, 25 steps, guidance 4 of 3 channels, seed 7. 61.5 % of the samples" in page
    assert "held-out loss (lower is better)" in page and "validation" not in page
    one = read_run(made_run(tmp_path / "one", 1))
    assert pictures_in(page_of([one], crops=False)) == ["samples at epoch 0.50"]
    assert "<h3>one</h3>" in page_of([run, one], crops=False)


def test_other_files_among_the_pictures_are_left_out(tmp_path: Path):
    run = made_run(tmp_path / "run", 2)
    (run / "pictures" / "my_notes.png").write_bytes(b"")
    assert [step for step, _ in shown_pictures(run)["samples"]] == [10, 20] and len(shown_pictures(run)) == 1


def test_crops_are_those_of_pixels_as_trained_and_latents_have_none(tmp_path: Path, folder: Path):
    options = f"--data.root={folder}", "--augment.crop_scale=1.0,1.0", "--augment.crop_ratio=1.0,1.0"
    run: RunRecord = read_run(made_run(tmp_path / "run", 1, *options))
    assert crops_part([run]).count("a crop at 16 px") == 4
    model = replace(run.config.model, name="vitlocal_dit_small_patch2")
    latent = replace(run, config=replace(run.config, model=model))
    assert "No crops: the model learned latents" in crops_part([latent])


def result(arm: str, seed: int, loss: float, **options: object) -> RunResult:
    row = {"run": f"{arm}-{seed}", "arm": arm, "seed": seed, "val_loss": loss, "frechet_distance": 10 * loss,
           "sample_accuracy": None, "epochs": 1.0, "images_per_second": 100.0, "cpu": "a", "gpu": None}  # fmt: skip
    return RunResult(row, [], {"model.name": "vitlocal_dit_tiny_patch4_32", **options})


def test_arms_are_compared_by_the_held_out_loss(capsys: pytest.CaptureFixture[str]):
    arms = [Arm("all", ()), Arm("ladder", ())]
    results = [result("all", 0, 0.2), result("all", 1, 0.3), result("ladder", 0, 0.19), result("ladder", 1, 0.28)]
    head, _, _, ladder = results_table(results, arms).splitlines()
    titles, cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in (head, ladder))
    assert titles == ["arm", "held-out loss (lower is better)", "against all", "seeds",
                      "Fréchet distance (lower is better)", "epochs", "images/s"]  # fmt: skip
    assert cells[1:5] == ["0.2350 ± 0.0636", "-0.0150 ± 0.0071", "0.1900, 0.2800", "2.35 ± 0.64"]
    publish(results, arms, "1ep", "", None, {})
    assert "note" not in capsys.readouterr().out
    publish([*results, result("ladder", 2, 0.2, **{"diffusion.guidance": 1.0})], arms, "1ep", "", None, {})
    assert "the runs differ in diffusion.guidance, so their metrics may not be comparable" in capsys.readouterr().out
    assert set(JUDGED_BY) <= read_config([], {}).flat().keys()
    assert results[0].line.metric == METRICS["diffusion"][0]


def test_arms_of_two_tasks_are_refused(tmp_path: Path):
    file = tmp_path / "arms.yaml"
    file.write_text("arms:\n  draws: {model.name: vitlocal_dit_tiny_patch4_32, model.drop_path: 0}\n  classifies: {}\n")
    with pytest.raises(ConfigError, match="the arms classify and draw images"):
        main(["arms", str(file), "--budget=1ep", f"--folder={tmp_path}/runs"])
