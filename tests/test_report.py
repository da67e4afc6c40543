"""The report page, as text and as a browser draws it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vitlocal.bench.__main__ import main
from vitlocal.config import AugmentConfig
from vitlocal.errors import ConfigError
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.report.figures import COLOURS, Line, by_cost, by_size, savings
from vitlocal.report.page import changed_fields, learning_rates, page_of, stage_crops
from vitlocal.report.run_folder import names_of, read_run
from vitlocal.train.command import train

BROWSER = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), "")
# The page sends a description of its figures to the page around it, which sets it as its title. --dump-dom prints it.
# The page is in a frame, because only a frame can be as narrow as a phone.
FRAME = """<title></title><script>onmessage = message => { document.title = message.data; };</script>
<iframe src="page.html" scrolling="no" style="width: WIDTHpx; height: 2000px; border: 0"></iframe>"""
PROBE = """<script>
const colours = COLOURS, errors = []; window.onerror = text => { errors.push(text); };
window.onload = () => {
  const flat = [...document.querySelectorAll("figure svg")].filter(drawing => {
    const box = drawing.getBoundingClientRect();
    const shapes = [...drawing.querySelectorAll("path, use, rect")].filter(s => s.getBoundingClientRect().width > 0);
    const data = shapes.filter(s => colours.some(c => (s.getAttribute("style") || "").includes(c)));
    return box.width < 100 || box.height < 50 || shapes.length < 10 ||
      !data.some(s => !s.closest('[id*="legend"]'));  // a figure needs more than axes and a grid
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
    """Two runs that differ in some options and that have all parts of the page."""
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


def test_page_has_all_parts_and_no_links(runs: list[Path], tmp_path: Path, capsys):
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
def test_browser_draws_every_figure(runs: list[Path], tmp_path: Path, width: int):
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


def test_crops_without_augmentation_are_the_pixels_of_the_loader(runs: list[Path], open_configured):
    run = read_run(runs[0])
    run = replace(run, config=replace(run.config, augment=AugmentConfig()))
    stages = stage_crops(run)
    assert [size for size, _ in stages] == [16, 32, 48] and all(len(crops) == 6 for _, crops in stages)
    sources = open_configured(run.config)
    with sources.train.open(Feed(32, 32), Position(1)) as batches:
        expected = next(batches).images[:6].permute(0, 2, 3, 1).numpy().copy()
    sources.close()
    assert np.array_equal(np.stack(stages[1][1]), expected)


def test_learning_rates_agree_with_the_log(runs: list[Path]):
    for folder in runs:
        run = read_run(folder)
        points = dict(reversed(learning_rates(run)))  # two passes share a time: keep the end of the earlier one
        for record in run.records:
            assert points[record["train_seconds"]] == pytest.approx(record["lr"], rel=0.05, abs=2e-6)


def test_by_size_adds_up_passes():
    records = [
        {"image_size": size, "train_seconds": at, "images_seen": images, "epoch": images / 10, "data_wait_fraction": w}
        for size, at, images, w in ((32, 10.0, 100, 0.1), (32, 20.0, 300, 0.3), (64, 40.0, 400, 0.0))
    ]
    found = by_size(Line("run", records))
    assert found[32]["images_per_second"] == 15 and found[32]["data_wait_fraction"] == pytest.approx(0.2)
    assert found[64]["epochs"] == pytest.approx(10) and found[64]["images_per_second"] == 5


def test_by_cost_joins_passes_that_cost_the_same():
    """Three passes. The first two cost the same, and the savings are relative to the third."""
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


def test_by_cost_separates_stages_that_train_other_blocks():
    """The forward pass costs the same, and the time does not. Fields that change within a pass start no stage."""
    fields = [
        {"shape.trainable_blocks": [0], "shape.head_only": True},
        {"shape.token_keep_rate": 0.9},
        {"shape.trainable_blocks": [0, 1]},
        {},
        {"shape.trainable_blocks": None},
    ]
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


def test_page_shows_costs_of_frozen_stages(configure, decoder, tmp_path: Path):
    schedule = "--unfreeze.schedule=1@48px,2@48px"
    train(configure("--methods=unfreeze", "--unfreeze.stages=2", schedule, "--budget.length=2ep"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What images cost" in page and "<th>blocks trained</th>" in page and "<td>all</td>" in page


def test_page_shows_costs_of_stages_that_end_within_an_epoch(configure, decoder, tmp_path: Path):
    """Each stage has passes of its own, so that costs of two stages are never mixed."""
    options = ["--methods=budgeted", "--budgeted.grow=heads,hidden", "--budget.length=0.0055TF", "--budgeted.alpha=0"]
    train(configure(*options, "--evaluate.every=0"))
    run = read_run(tmp_path / "run")
    assert len({round(record["macs_per_image"], -4) for record in run.records}) == len(by_cost(run)) == 3
    assert len([record for record in run.records if record["epoch"] % 1]) >= 2
    assert changed_fields(run) == {"shape.heads": 2, "shape.hidden": 128}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What images cost" in page and "fewer multiply-adds" in page
    assert "<!-- heads -->" in page or ">heads<" in page


def test_names_are_unique():
    assert names_of([Path("/a/x"), Path("/a/y")]) == ["x", "y"]
    assert names_of([Path("/a/b/x"), Path("/a/c/x")]) == ["b/x", "c/x"]


def test_folder_without_a_run_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="holds no run with an evaluation"):
        main(["report", str(tmp_path)])
