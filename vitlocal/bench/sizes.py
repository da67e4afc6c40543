"""Evaluates a run's weights at several image sizes: python -m vitlocal.bench sizes RUN [RUN ...] --sizes 32,48,64,72

Each row is an image size at which all validation images are evaluated, as single centre crops. Runs that kept their
weights (run.keep_weights=yes) have rows for each evaluation: they show what a change of the image size costs before a
step at the new size. Other runs have rows for the finished model only: they show which evaluate.size suits it.
BatchNorm uses the statistics that the weights have.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vitlocal.bench.measurement import progress_bar, text_table, write_json
from vitlocal.bench.parsing import bench_parser, check_multiples, numbers
from vitlocal.bench.redundancy import kept_model
from vitlocal.config import Config
from vitlocal.data.augment import Normalize
from vitlocal.data.batch import Source
from vitlocal.errors import ConfigError
from vitlocal.models.exported import ExportedRun
from vitlocal.models.factory import size_multiple
from vitlocal.plan import Feed
from vitlocal.progress import Position
from vitlocal.report.run_folder import RunRecord, read_run
from vitlocal.tasks.metrics import task_name
from vitlocal.train.build import device_of, sources_of
from vitlocal.train.evaluator import REMAINDERS, counted_rows
from vitlocal.train.output import KEPT

COLUMNS = {
    "run": ("run", ""), "epoch": ("epoch", ".2f"), "trained at, px": ("trained_at", "d"), "px": ("size", "d"),
    "top-1 %": ("top1", ".2f"), "top-5 %": ("top5", ".2f"), "cross-entropy": ("loss", ".3f"),
}  # fmt: skip


def trained_models(run: RunRecord, config: Config, classes: int) -> Iterator[tuple[float, nn.Module]]:
    """Yields the epoch and the model of each kept evaluation or, without these, of the end of the run."""
    files = sorted((run.folder / KEPT).glob("*.safetensors"))  # their names begin with the step
    for file in files:
        yield kept_model(file, config, classes)
    if not files:
        if not (run.folder / "model.safetensors").exists():
            raise ConfigError(f"{run.folder}: the run is not finished and kept no weights; expected model.safetensors")
        yield run.records[-1]["epoch"], ExportedRun(run.folder, "RUN").load()


@torch.inference_mode()
def evaluate(model: nn.Module, source: Source, feed: Feed, rows: str) -> dict[str, float | None]:
    """Returns the accuracies in %, and the cross-entropy, of a model at the size of ``feed``.

    Top-5 is None if there are at most five classes.
    """
    device = next(model.parameters()).device
    normalize = Normalize().to(device)
    right, top5, loss, count = 0, 0, 0.0, 0
    with source.open(feed, Position()) as batches:
        for batch in batches:
            chosen = counted_rows(batch.ids, rows).nonzero().flatten().to(device)
            if not len(chosen):
                continue
            logits, labels = model(normalize(batch.images[chosen])).float(), batch.labels[chosen]
            best = logits.topk(min(5, logits.shape[1])).indices
            right += int((best[:, 0] == labels).sum())
            top5 += int((best == labels[:, None]).sum())
            loss += float(F.cross_entropy(logits, labels, reduction="sum"))
            count += len(labels)
    if not count:
        raise ConfigError(f"evaluate.rows: {rows} selects no validation image; use all")
    best_five = 100 * top5 / count if len(source.classes) > 5 else None
    return {"top1": 100 * right / count, "top5": best_five, "loss": loss / count}


def rows_of(folder: Path, sizes: Sequence[int], data: str | None, rows: str | None) -> Iterator[dict[str, Any]]:
    """Yields the rows of a run."""
    run = read_run(folder)
    config = run.config
    if task_name(config.model.name) != "classification":
        raise ConfigError(f"{folder}: {config.model.name} generates images; expected a run that classifies")
    if data:
        config = replace(config, data=replace(config.data, root=data))
    device = device_of(config)
    with closing(sources_of(config, device)) as sources:
        for epoch, model in trained_models(run, config, len(sources.val.classes)):
            check_multiples(sizes, size_multiple(model), config.model.name)
            trained_at = next(record["image_size"] for record in run.records if record["epoch"] >= epoch - 1e-9)
            model = model.to(device).eval()
            for size in sizes:
                feed = Feed(size, config.evaluate.batch_size)
                scores = evaluate(model, sources.val, feed, rows or config.evaluate.rows)
                yield {"run": folder.name, "epoch": epoch, "trained_at": trained_at, "size": size, **scores}


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("sizes", __doc__)
    add = parser.add_argument
    add("runs", type=Path, nargs="+", metavar="RUN", help="folders of runs")
    add("--sizes", type=numbers, required=True, metavar="LIST", help="image sizes in px, such as 192,224,256")
    add("--data", metavar="DIR", help="data folder (default: the run's)")
    add("--rows", choices=tuple(REMAINDERS), help="validation images to count (default: the run's evaluate.rows)")
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    with progress_bar(len(options.runs)) as bar:
        for folder in options.runs:
            rows += rows_of(folder, options.sizes, options.data, options.rows)
            bar.update()
    print(text_table(rows, COLUMNS))
    write_json(options.json, "accuracy of runs' weights at several image sizes", rows)
