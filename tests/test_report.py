"""The page of a run or several, as text and as a browser draws it; forecasts beside it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vitlocal.bench import forecast, report
from vitlocal.bench.__main__ import main
from vitlocal.bench.report import compare
from vitlocal.config import AugmentConfig, read_config
from vitlocal.data.batch import open_sources
from vitlocal.errors import ConfigError
from vitlocal.plan import Feed
from vitlocal.progress import Length, Position, Stage
from vitlocal.report.figures import COLOURS, Line, by_cost, by_size, savings
from vitlocal.report.page import dials_of, learning_rates, names_of, page_of, read_run, stage_crops
from vitlocal.train.loop import train
from vitlocal.train.simulate import Speed, spend

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
# What a browser made of the page, told to the page around it, whose title that becomes: --dump-dom prints it. A frame
# may be as narrow as a phone, which a window may not.
FRAME = """<title></title><script>onmessage = told => { document.title = told.data; };</script>
<iframe src="page.html" scrolling="no" style="width: WIDTHpx; height: 2000px; border: 0"></iframe>"""
PROBE = """<script>
const colours = COLOURS, errors = []; window.onerror = text => { errors.push(text); };
window.onload = () => {
  const flat = [...document.querySelectorAll("figure svg")].filter(drawing => {
    const box = drawing.getBoundingClientRect();
    const shapes = [...drawing.querySelectorAll("path, use, rect")].filter(s => s.getBoundingClientRect().width > 0);
    const data = shapes.filter(s => colours.some(c => (s.getAttribute("style") || "").includes(c)));
    return box.width < 100 || box.height < 50 || shapes.length < 10 ||
      !data.some(s => !s.closest('[id*="legend"]'));  // axes and a grid alone are no figure
  }).length;
  const small = [...document.querySelectorAll("figure svg")].filter(drawing => {
    const scale = drawing.getBoundingClientRect().width / drawing.viewBox.baseVal.width;
    return [...drawing.querySelectorAll("text")].some(t => parseFloat(getComputedStyle(t).fontSize) * scale < 9);
  }).length;
  const broken = [...document.images].filter(image => !image.naturalWidth).length;
  const wide = document.documentElement.scrollWidth > window.innerWidth + 1;
  const ids = [...document.querySelectorAll("[id]")].map(element => element.id);
  parent.postMessage(JSON.stringify({errors, flat, small, broken, wide, twice: ids.length - new Set(ids).size,
    figures: document.querySelectorAll("figure svg").length, images: document.images.length}), "*");
};
</script>"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, small) -> list[Path]:
    """Two runs that differ in some options, with all that a page shows."""
    made = []
    for name, options in {
        "one": ["--augment.mixup=0.8", "--augment.random_erasing=0.5"],
        "other": ["--methods=image_size,strength,batch_size", "--augment.randaugment=5", "--batch_size.multiple=8",
                  "--train.batch_size=16"],
    }.items():  # fmt: skip
        out = tmp_path_factory.mktemp("runs") / name
        assert train(small(out, *options)) == 0
        made.append(out)
    return made


def test_the_page_tells_all_without_links(runs: list[Path], tmp_path: Path, capsys):
    main(["report", *map(str, runs), "--out", str(tmp_path / "page.html")])
    page = (tmp_path / "page.html").read_text()
    assert not re.search(r"(src|href)=.(?!data:|#)", page) and "http" not in page
    assert page.count("<figure") == 6  # three curves, two schedules, one throughput
    assert page.count("a crop at") == 2 * 3 * 6
    for text in ("Curves", "Schedule", "What the model saw", "ten worst classes", "Where they differ"):
        assert text in page
    assert "<td>train.batch_size</td><td>32</td><td>16</td>" in page and "run.folder</td>" not in page
    assert "one" in capsys.readouterr().out


@pytest.mark.skipif(not BROWSER, reason="no Chromium here")
@pytest.mark.parametrize("width", [360, 1200])
def test_a_browser_draws_every_figure(runs: list[Path], tmp_path: Path, width: int):
    page = page_of([read_run(run) for run in runs], crops=True)
    (tmp_path / "page.html").write_text(
        page.replace("<title>", PROBE.replace("COLOURS", json.dumps(COLOURS)) + "<title>", 1)
    )
    (tmp_path / "frame.html").write_text(FRAME.replace("WIDTH", str(width)))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1300,2100", "--dump-dom",
               "--virtual-time-budget=10000", f"--user-data-dir={tmp_path}/profile",
               f"file://{tmp_path}/frame.html"]  # fmt: skip
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    seen = json.loads(re.search(r"<title>(.*?)</title>", dumped)[1])
    assert seen == {
        "errors": [], "flat": 0, "small": 0, "broken": 0, "wide": False, "twice": 0, "figures": 6, "images": 36,
    }  # fmt: skip


def test_crops_are_what_the_model_saw(runs: list[Path]):
    """Without augmentation, the loader's own first pixels of each stage."""
    told = read_run(runs[0])
    told = replace(told, config=replace(told.config, augment=AugmentConfig()))
    stages = stage_crops(told)
    assert [size for size, _ in stages] == [16, 32, 48] and all(len(crops) == 6 for _, crops in stages)
    sources = open_sources(told.config, torch.device("cpu"))
    with sources.train.open(Feed(32, 32), Position(1)) as batches:
        expected = next(batches).images[:6].permute(0, 2, 3, 1).numpy().copy()
    sources.close()
    assert np.array_equal(np.stack(stages[1][1]), expected)


def test_learning_rates_meet_the_log(runs: list[Path]):
    for folder in runs:
        told = read_run(folder)
        points = dict(reversed(learning_rates(told)))  # where passes meet, the end of the earlier one
        for record in told.records:
            assert points[record["train_seconds"]] == pytest.approx(record["lr"], rel=0.05, abs=2e-6)


def test_passes_add_up_by_size():
    records = [
        {"image_size": size, "train_seconds": at, "images_seen": images, "epoch": images / 10, "data_wait_fraction": w}
        for size, at, images, w in ((32, 10.0, 100, 0.1), (32, 20.0, 300, 0.3), (64, 40.0, 400, 0.0))
    ]
    found = by_size(Line("run", records))
    assert found[32]["images_per_second"] == 15 and found[32]["data_wait_fraction"] == pytest.approx(0.2)
    assert found[64]["epochs"] == pytest.approx(10) and found[64]["images_per_second"] == 5


def test_costs_are_told_apart():
    """Three passes of which two cost alike: what the last one's cost throughout would take, and what was taken."""
    records = [
        {
            "image_size": 64,
            "train_seconds": at,
            "images_seen": images,
            "epoch": images / 100,
            "macs_per_image": macs,
            "images_per_second": rate,
        }
        for at, images, macs, rate in (
            (10.0, 100, 1_000_000, 10.0),
            (25.0, 200, 1_001_000, 10.0),
            (65.0, 300, 4_000_000, 2.5),
        )
    ]
    cheap, full = by_cost(Line("run", records))
    assert (cheap["images"], cheap["seconds"], cheap["macs"]) == (200, 20.0, 1_000_500)
    macs, seconds = savings([cheap, full])
    assert macs == pytest.approx(1 - (200 * 1.0005 + 100 * 4) / (300 * 4)) and seconds == pytest.approx(1 - 60 / 120)
    del records[0]["macs_per_image"]
    assert by_cost(Line("an older run", records)) == []


def test_stages_of_frozen_blocks_are_told_apart():
    """A forward pass costs the same whatever is trained, time does not; what moves within passes makes no stage."""
    fields = [{"shape.trainable_blocks": [0], "shape.head_only": True}, {"shape.token_keep_rate": 0.9}, {"shape.trainable_blocks": [0, 1]}, {},
              {"shape.trainable_blocks": None}]  # fmt: skip
    records = [
        {"image_size": 64, "images_seen": 100 * number, "epoch": number, "macs_per_image": 1_000_000,
         "images_per_second": rate, **changed}
        for number, (rate, changed) in enumerate(zip((40.0, 40.0, 25.0, 25.0, 20.0), fields, strict=True), 1)
    ]  # fmt: skip
    stages = by_cost(Line("run", records))
    assert [(row["images"], row["seconds"], row["trained"]) for row in stages] == [
        (200, 5, 1),
        (200, 8, 2),
        (100, 5, None),
    ]
    assert savings(stages) == pytest.approx((0, 1 - 18 / 25))


def test_the_page_tells_what_unfreezing_costs(configure, decoder, tmp_path: Path):
    schedule = "--unfreeze.schedule=1@48px,2@48px"
    train(configure("--methods=unfreeze", "--unfreeze.stages=2", schedule, "--budget.length=2ep"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What images cost" in page and "<th>blocks trained</th>" in page and "<td>all</td>" in page


def test_the_page_tells_what_stages_cost(configure, decoder, tmp_path: Path):
    """Stages end within epochs: each is a pass of its own, and its cost not mixed with the next one's."""
    options = ["--methods=budgeted", "--budgeted.grow=heads,hidden", "--budget.length=0.0055TF", "--budgeted.alpha=0"]
    train(configure(*options, "--evaluate.every=0"))
    run = read_run(tmp_path / "run")
    assert len({round(record["macs_per_image"], -4) for record in run.records}) == len(by_cost(run.line)) == 3
    assert len([record for record in run.records if record["epoch"] % 1]) >= 2
    assert dials_of(run) == {"shape.heads": 2, "shape.hidden": 128}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What images cost" in page and "fewer multiply-adds" in page
    assert "<!-- heads -->" in page or ">heads<" in page


def test_names_tell_folders_apart():
    assert names_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names_of([Path("/a/b/x"), Path("/a/c/x")]) == ["b/x", "c/x"]


def test_no_run_is_told(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run with an evaluation"):
        main(["report", str(tmp_path)])


# --- forecasts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(small, tmp_path: Path) -> str:
    """The small configuration as a recipe's option."""
    (tmp_path / "small.yaml").write_text(small(tmp_path / "run").yaml())
    return f"--config-file={tmp_path}/small.yaml"


def test_a_forecast_and_the_run_after_it(runs: list[Path], recipe: str, tmp_path: Path, monkeypatch, capsys, decoder):
    monkeypatch.setattr(forecast, "SECONDS", 0.3)
    monkeypatch.setattr(forecast, "ROUND_SECONDS", 0.03)
    file = tmp_path / "forecast.json"
    main(["forecast", recipe, f"--json={file}", "--budgets=1m,1h"])
    said = json.loads(file.read_text())
    assert [row["size"] for row in said["rows"]] == [16, 32, 48]
    assert said["epochs"] == pytest.approx(3) and said["images"] == 120
    assert said["flops"] == pytest.approx(sum(row["gflops"] * 1e9 * row["images"] for row in said["rows"]))
    assert all(row["step"] > 0 and row["loader"] > 0 and row["together"] > 0 for row in said["rows"])
    assert said["evaluation_seconds"] > 0 and said["disk_bytes"] > 0 and said["measured_seconds"] > 0.3
    out, shown = capsys.readouterr()
    assert "16px until" in out and "the first after" in out and "s, but for compiling" in out
    turns = re.findall(r"measuring (\d+) px, . of 3 sizes, round (\d) of 3", shown)
    assert turns == [(str(size), str(number)) for number in (1, 2, 3) for size in (16, 32, 48)]
    # What it proposes fits: the parts are those of its own budget, and options take it.
    stages = tuple(Stage.parse(text) for text in said["curriculum"])
    speeds = {row["size"]: Speed(row["together"], row["batch_size"]) for row in said["rows"]}
    for part, row in zip(spend(stages, Length.parse("1h"), 120, speeds), said["rows"], strict=True):
        whole = sum(other["train_seconds"] for other in said["rows"])
        assert part.seconds / 3600 == pytest.approx(row["train_seconds"] / whole, abs=0.006)
    rows = compare(said, read_run(runs[0]))
    assert [row["what"] for row in rows][-3:] == ["epochs", "images", "first accuracy, s"]
    assert {row["what"]: row["off"] for row in rows}["epochs"] == pytest.approx(0)
    main(["report", str(runs[0]), f"--forecast={file}", "--out", str(tmp_path / "page.html"), "--no-crops",
          "--json", str(tmp_path / "compared.json")])  # fmt: skip
    page = (tmp_path / "page.html").read_text()
    assert "Forecast and run" in page and "of another recipe: augment.mixup, augment.random_erasing differ" in page
    assert json.loads((tmp_path / "compared.json").read_text())["rows"] == rows


def test_a_forecast_without_data(recipe: str, monkeypatch, capsys):
    monkeypatch.setattr(forecast, "SECONDS", 0.1)
    main(["forecast", recipe, "--data.root=/nowhere/imagenet", "--budgets=none", "--budget.length=2ep"])
    out = capsys.readouterr().out
    assert "is not there: the step alone" in out and "epochs of 1,281,167 images" in out


def test_a_forecast_for_another_machine(capsys):
    main(["forecast", "--config-file=rcfg/ours.yaml", "--rates=224:1000", "--budgets=12h"])
    out = capsys.readouterr().out
    assert "24h of training, epochs of 1,281,167 images" in out and "12h" in out
    last = next(line for line in out.splitlines() if line.startswith(" 224"))
    assert "1,000" in last


def test_a_curriculum_that_the_budget_does_not_finish_fits_others_whole(capsys):
    """The largest size has as long as the one before it, and not nothing."""
    main(["forecast", "--config-file=rcfg/ours.yaml", "--rates=224:50", "--budgets=6h", "--budget.length=1h"])
    out = capsys.readouterr().out
    assert "the budget ends before" in out and "192px until" in out
    given = re.search(r'--image_size.stages="(.*)"', out)[1]
    stages = (
        read_config([f"--image_size.stages={given}", "--methods=image_size"], {}).method_options["image_size"].stages
    )
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


@pytest.mark.parametrize("content", ["{}", "no json", None])
def test_what_is_no_forecast(runs: list[Path], tmp_path: Path, content: str | None):
    file = tmp_path / "forecast.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigError, match="is not what bench forecast --json writes"):
        report.main([str(runs[0]), f"--forecast={file}"])
