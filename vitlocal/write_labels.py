"""Writes soft labels: a teacher's classes for the crops of a recipe's first epochs. See data/soft_labels.py."""

import json
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from vitlocal.config import read_config
from vitlocal.data.augment import Normalize
from vitlocal.data.loader import Loader
from vitlocal.data.soft_labels import FACTS, LABEL, MOST_CLASSES, LabelFacts, epoch_file, labels_folder, read_facts
from vitlocal.errors import ConfigError
from vitlocal.jsonl import replace_text, replacing
from vitlocal.models.exported import ExportedRun
from vitlocal.models.swin import Swin
from vitlocal.report.run_folder import read_log
from vitlocal.tasks.metrics import task_name
from vitlocal.write_options import WriteOptions

EPOCHS, RECIPE = 16, "rcfg/ours.yaml"


def write_labels(options: WriteOptions) -> None:
    """Writes the labels of ``options``, an epoch at a time. Epochs that are there stay.

    Raises ConfigError if the teacher is no classifier of the same classes, or if there are labels of other crops or of
    another teacher.
    """
    teacher = ExportedRun(options.labels_from or "", "--labels-from")
    if task_name(teacher.architecture) != "classification":
        raise ConfigError(f"--labels-from: {teacher.folder} holds a diffusion model, expected a classifier")
    seed = () if options.seed is None else (f"--run.seed={options.seed}",)
    config = read_config(["--config-file", options.recipe or RECIPE, *seed], {})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = teacher.load()
    # Random crops show objects as large as in training. Those of an evaluation, often at a larger size, are smaller.
    side = max((record["image_size"] for record in read_log(teacher.folder)), default=teacher.side)
    if isinstance(model, Swin):
        side = min(side, teacher.side)  # the export has no biases for larger windows
    with Loader(
        options.out, "train", config.evaluate.batch_size, side, shuffle=False, seed=config.run.seed,
        scale=config.augment.crop_scale, ratio=config.augment.crop_ratio, flip=config.augment.flip, drop_last=False,
        num_workers=options.workers, side_ratio=config.data.side_ratio, device=device, copy=False, return_ids=True,
    ) as loader:  # fmt: skip
        if len(loader.classes) > MOST_CLASSES:
            raise ConfigError(
                f"--labels-from: {options.out} has {len(loader.classes)} classes, expected at most {MOST_CLASSES}"
            )
        if teacher.class_names != list(loader.classes):
            raise ConfigError(
                f"--labels-from: {teacher.folder} has {len(teacher.class_names)} classes, and {options.out} has "
                f"{len(loader.classes)}, not the same ones in the same order; train a teacher on these data"
            )
        facts = LabelFacts.of(
            replace(loader.crops, repeats=config.augment.repeats), loader.manifest, teacher.digest, epochs=0
        )
        folder = Path(options.out) / labels_folder(config.run.seed)
        found = read_facts(folder)
        if found is not None and (different := facts.differences(found)):
            raise ConfigError(
                f"--labels-from: {folder} has labels of another teacher, recipe or data ({different}); remove it, or "
                "use another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        done, wanted = found.epochs if found else 0, options.epochs or EPOCHS
        save_facts(folder, replace(facts, epochs=done))
        epochs = range(max(done, wanted))
        left = [epoch for epoch in epochs if epoch >= done or not epoch_file(folder, epoch).exists()]
        model = model.to(device=device, memory_format=torch.channels_last)
        bar = tqdm(total=len(left) * facts.images, unit=" images", mininterval=0.1 if sys.stderr.isatty() else 30)
        with bar:
            for epoch in left:
                loader.set_epoch(epoch)
                with replacing(epoch_file(folder, epoch), "wb") as file:
                    np.save(file, epoch_labels(model, loader, facts.top, bar))
                save_facts(folder, replace(facts, epochs=max(done, epoch + 1)))
    size = sum(os.path.getsize(epoch_file(folder, epoch)) for epoch in epochs)
    each = size / len(epochs) / facts.images
    print(f"{folder}: {len(epochs)} epochs of {facts.images:,} images, {each:.1f} bytes each")


def save_facts(folder: Path, facts: LabelFacts) -> None:
    replace_text(folder / FACTS, json.dumps(asdict(facts), indent=2) + "\n")


@torch.inference_mode()
def epoch_labels(model: torch.nn.Module, loader: Loader, top: int, bar: Any) -> np.ndarray:
    """The ``top`` most probable classes of an epoch's crops, (n, top) of LABEL."""
    labels, normalize = np.zeros((loader.count, top), LABEL), Normalize().to(loader.device)
    mixed = loader.device.type == "cuda"
    for images, _, ids in loader:
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=mixed):
            logits = model(normalize(images))
        probabilities, classes = logits.float().softmax(dim=1).topk(top, dim=1)
        labels["class"][ids], labels["probability"][ids] = classes.cpu(), probabilities.cpu()
        bar.update(len(ids))
    return labels
