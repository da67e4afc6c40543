"""Soft labels of a teacher: written for the crops of a run, read with them, and learned."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from narrow_models import NARROW_SWIN

from vitlocal.bench.__main__ import main as bench
from vitlocal.bench.loader import reader
from vitlocal.config import read_config
from vitlocal.data.augment import Augment, AugmentParams
from vitlocal.data.crops import CropPolicy
from vitlocal.data.loader import Loader
from vitlocal.data.manifest import load_manifest
from vitlocal.data.soft_labels import FACTS, LABEL, SoftLabels, SoftTargets, epoch_file, labels_folder
from vitlocal.errors import ConfigError, DataError
from vitlocal.predict import Predictor
from vitlocal.report.page import summary_part
from vitlocal.report.run_folder import read_origin, read_run
from vitlocal.tasks.classification import ClassificationLoss, soft_cross_entropy
from vitlocal.train.command import train
from vitlocal.write_dataset import main as write_dataset

FOLDER = labels_folder(3)
pytestmark = pytest.mark.usefixtures("no_report")


@pytest.fixture(scope="module")
def teacher(small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vitlocal.train.command.write_report", read_run)
        train(small(run, "--budget.length=1ep", "--evaluate.size=64", "--methods=none"))
    return run


@pytest.fixture(scope="module")
def labelled(folder: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample with the labels of two epochs."""
    out = tmp_path_factory.mktemp("labelled") / "data"
    shutil.copytree(folder, out)
    write_dataset(command(out, teacher))
    return out


def command(out: Path, teacher: Path, epochs: int = 2) -> list[str]:
    words = f"--labels-from {teacher} --out {out} --epochs {epochs} --recipe rcfg/demo.yaml --seed 3 --workers 1"
    return words.split()


def loader(root: Path, shuffle: bool, size: int) -> Loader:
    scale = read_config(["--config-file", "rcfg/demo.yaml"], {}).augment.crop_scale
    return Loader(
        root, "train", 16, size, shuffle=shuffle, seed=3, scale=scale, num_workers=1, return_ids=True, drop_last=False
    )


def student(configure, root: Path, *options: str):
    return configure(
        "--config-file=rcfg/demo.yaml", f"--data.root={root}", "--run.seed=3", "--train.soft_labels=yes",
        "--budget.length=3ep", *options,
    )  # fmt: skip


def test_the_labels_are_what_the_teacher_says_about_the_crops(labelled: Path, teacher: Path):
    """At the size of its training, because random crops show objects as large as they were there."""
    predictor = Predictor(teacher)
    assert predictor.size == 64
    with loader(labelled, shuffle=True, size=48) as batches:
        for epoch in (0, 1):
            labels = np.load(epoch_file(labelled / FOLDER, epoch))
            assert labels.dtype == LABEL and labels.shape == (120, 10) and labels.itemsize * 10 <= 45
            batches.set_epoch(epoch)
            for images, _, ids in batches:
                with torch.no_grad():
                    expected = predictor.model(Augment().normalize(images)).softmax(1).topk(10)
                stored = labels[ids.numpy()]
                torch.testing.assert_close(
                    torch.from_numpy(stored["probability"].astype(np.float32)), expected.values, rtol=2e-3, atol=1e-4
                )
                assert (stored["class"] == expected.indices.numpy()).mean() > 0.95  # ties may change places
    assert not np.array_equal(labels, np.load(epoch_file(labelled / FOLDER, 0)))  # other crops


@pytest.mark.parametrize("trained, evaluated", [(32, 48), (48, 32)])
def test_a_swin_teaches_at_the_largest_size_that_its_export_takes(
    folder: Path, small, tmp_path: Path, trained: int, evaluated: int
):
    run, out = tmp_path / "run", tmp_path / "data"
    options = [f"--image_size.stages={trained}px", "--methods=image_size", f"--evaluate.size={evaluated}"]
    train(small(run, *NARROW_SWIN, "--budget.length=1steps", "--model.size=48", *options))
    shutil.copytree(folder, out)
    write_dataset(command(out, run, epochs=1))
    labels, predictor = np.load(epoch_file(out / FOLDER, 0)), Predictor(run)
    with loader(out, shuffle=False, size=32) as batches, torch.no_grad():
        images, _, ids = next(iter(batches))
        found = predictor.model(Augment().normalize(images)).softmax(1).max(1)
    assert labels["class"][ids, 0].tolist() == found.indices.tolist()


def test_batches_have_the_targets_of_their_crops(labelled: Path, configure, monkeypatch: pytest.MonkeyPatch):
    """Also after the last epoch with labels, from which on crops repeat, and after a restart."""
    forward = ClassificationLoss.forward
    batches = []

    def noted(self, images, labels, params, noise, soft, weight):
        batches.append((images.clone(), soft))
        return forward(self, images, labels, params, noise, soft, weight)

    monkeypatch.setattr(ClassificationLoss, "forward", noted)
    train(student(configure, labelled, "--methods=[]", "--train.batch_size=120"))
    assert len(batches) == 3
    with loader(labelled, shuffle=True, size=batches[0][0].shape[-1]) as expected:
        for epoch, (images, soft) in enumerate(batches):
            ids = torch.from_numpy(expected.crops.draws(120, epoch))
            stored = np.load(epoch_file(labelled / FOLDER, epoch % 2))[ids.numpy()]
            assert np.array_equal(soft.classes.numpy(), stored["class"])
            assert np.array_equal(soft.probabilities.numpy(), stored["probability"].astype(np.float32))
            expected.set_epoch(epoch % 2)
            crops = {int(row): image for pixels, _, rows in expected for row, image in zip(rows, pixels, strict=True)}
            assert all(torch.equal(image, crops[int(row)]) for row, image in zip(ids, images, strict=True))


def test_the_loader_bench_reads_labels(folder: Path, teacher: Path, tmp_path: Path):
    shutil.copytree(folder, root := tmp_path / "data")
    arguments = "labels", str(root), None, "train_48_raw.beton", 1, 50
    with pytest.raises(ConfigError, match="there are no labels"):
        reader(*arguments)
    write_dataset(f"--labels-from {teacher} --out {root} --epochs 1 --recipe rcfg/ours.yaml --workers 1".split())
    epochs = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SoftLabels, "read", lambda self, epoch, ids, device: epochs.append(epoch))
        rate, _ = reader(*arguments)(32, 0.0)
    assert epochs == [0] and rate > 0


def test_the_loss_is_the_cross_entropy_to_all_classes():
    torch.manual_seed(0)
    logits, teacher = torch.randn(6, 30), torch.randn(6, 30).softmax(1)
    values, classes = teacher.topk(10)
    rest = (1 - values.sum(1, keepdim=True)) / 20
    dense = rest.expand(6, 30).scatter(1, classes, values)
    soft = SoftTargets(classes, values)
    torch.testing.assert_close(soft_cross_entropy(logits, soft), F.cross_entropy(logits, dense, reduction="sum"))
    few = SoftTargets(teacher.topk(30).indices, teacher.topk(30).values)  # no class is left
    torch.testing.assert_close(soft_cross_entropy(logits, few), F.cross_entropy(logits, teacher, reduction="sum"))
    # Mixup mixes the targets.
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 30))
    loss = ClassificationLoss(model, Augment(mixup=0.8), 0.1, torch.float32, frozenset())
    images, labels = torch.randint(0, 255, (6, 3, 2, 2), dtype=torch.uint8), torch.arange(6)
    params = AugmentParams(mix=torch.tensor([0.3, 0.3, 0, 0, 0, 0]))
    mixed = 0.3 * dense + 0.7 * dense.flip(0)
    expected = F.cross_entropy(model(loss.augment(images, params)), mixed, reduction="sum")
    torch.testing.assert_close(loss(images, labels, params, None, soft, torch.tensor(1.0))[0], expected)


def test_writing_continues_and_adds_epochs(labelled: Path, teacher: Path, tmp_path: Path):
    out = tmp_path / "data"
    shutil.copytree(labelled, out)
    first, second = (epoch_file(out / FOLDER, epoch) for epoch in (0, 1))
    whole, before = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    write_dataset(command(out, teacher, epochs=3))
    assert second.read_bytes() == whole and first.stat().st_mtime_ns == before
    assert epoch_file(out / FOLDER, 2).exists() and json.loads((out / FOLDER / FACTS).read_text())["epochs"] == 3


def test_a_run_continues_with_the_same_labels_only(labelled: Path, configure, tmp_path: Path):
    out = tmp_path / "data"
    shutil.copytree(labelled, out)
    config = student(configure, out, "--budget.length=1ep")
    train(config)
    train(config)  # finished
    facts = json.loads((out / FOLDER / FACTS).read_text())
    for name, value in (("teacher", "0" * 64), ("epochs", 1)):
        (out / FOLDER / FACTS).write_text(json.dumps(facts | {name: value}))
        with pytest.raises(ConfigError, match=r"data.root: train_labels/seed_3/labels.json in .*: the content is not"):
            train(config)


def test_tables_have_a_teacher_only_if_a_run_has_soft_labels(
    labelled: Path, teacher: Path, configure, tmp_path: Path, capsys
):
    train(student(configure, labelled, "--budget.length=1ep"))
    digest = json.loads((labelled / FOLDER / FACTS).read_text())["teacher"]
    assert [origin["teacher"] for origin in read_origin(tmp_path / "run")] == [digest]
    assert "teacher" not in (teacher / "trained_on.jsonl").read_text()
    folders = [str(tmp_path / "run"), str(teacher)]
    capsys.readouterr()
    bench(["runs", *folders, f"--json={tmp_path}/runs.json"])
    head, with_teacher, without = (line.split() for line in capsys.readouterr().out.splitlines())
    assert (head[-1], with_teacher[-1], len(with_teacher) - len(without)) == ("teacher", digest[:12], 1)
    assert [row.get("teacher") for row in json.loads((tmp_path / "runs.json").read_text())["rows"]] == [
        digest[:12], None
    ]  # fmt: skip
    page = summary_part([read_run(Path(folder)) for folder in folders])
    assert "<th>teacher</th>" in page and f"<td>{digest[:12]}</td>" in page and "<td>none</td>" in page
    bench(["runs", str(teacher)])
    assert "teacher" not in capsys.readouterr().out.split()
    assert "teacher" not in summary_part([read_run(teacher)]).replace("/teacher", "")


def test_labels_of_other_crops_are_refused(labelled: Path, configure):
    with pytest.raises(ConfigError, match=r"train.soft_labels: .* has labels of other crops or data \(crops: "):
        train(student(configure, labelled, "--augment.crop_scale=0.1,1"))


def test_each_seed_has_its_labels(labelled: Path, teacher: Path, configure, tmp_path: Path):
    shutil.copytree(labelled, out := tmp_path / "data")
    with pytest.raises(ConfigError, match=r"no labels in .*/seed_4; write them: .*--seed 4 "):
        train(student(configure, out, "--run.seed=4"))
    write_dataset([*command(out, teacher, 1), "--seed=4"])
    train(student(configure, out, "--run.seed=4", "--budget.length=1steps"))
    train(student(configure, out, "--budget.length=1steps", f"--run.folder={tmp_path}/other"))


@pytest.mark.parametrize(
    "option",
    ["--augment.repeats=2", "--run.on_nan=rewind", "--data.loader=torchvision", "--train.loss=binary_cross_entropy"],
)
def test_options_that_do_not_go_with_the_labels(labelled: Path, configure, option: str):
    with pytest.raises(ConfigError, match=r"train.soft_labels: .*use "):
        student(configure, labelled, option)


def test_epochs_of_labels_do_not_each_take_a_file_descriptor(labelled: Path):
    augment = read_config(["--config-file", "rcfg/demo.yaml"], {}).augment
    crops = CropPolicy(True, 3, augment.crop_scale, augment.crop_ratio, augment.flip)
    manifest = load_manifest(str(labelled), "train")
    before = len(os.listdir("/proc/self/fd"))
    labels = SoftLabels(labelled, manifest, crops)
    for epoch in (0, 1, 0):
        labels.read(epoch, torch.arange(3), torch.device("cpu"))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_missing_and_damaged_labels(labelled: Path, teacher: Path, configure, folder: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"there are no labels in .*; write them: python write_dataset.py --labels"):
        train(student(configure, folder))
    out = tmp_path / "data"
    shutil.copytree(labelled, out)
    path = epoch_file(out / FOLDER, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DataError, match=r"epoch_001.npy cannot be read"):
        train(student(configure, out, "--methods=[]"))
    labels = np.load(epoch_file(out / FOLDER, 0))
    labels["class"][:, 3] = 20
    np.save(path, labels)
    with pytest.raises(DataError, match=r"epoch_001.npy has class 20 of 20"):
        train(student(configure, out, "--methods=[]"))
    path.unlink()
    with pytest.raises(ConfigError, match=r"epoch_001.npy does not exist, of 2 epochs"):
        train(student(configure, out, "--methods=[]"))
    (out / FOLDER / FACTS).write_text("{}")
    with pytest.raises(DataError, match=r"labels.json cannot be read"):
        write_dataset(command(out, teacher))


def test_other_teachers_are_refused(labelled: Path, teacher: Path, tmp_path: Path):
    other = tmp_path / "teacher"
    shutil.copytree(teacher, other)
    about = json.loads((other / "config.json").read_text())
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(
        ConfigError,
        match=r"train_labels/seed_3 has labels of another teacher, recipe or data \(teacher: .*, here .*\); remove it",
    ):
        write_dataset(command(labelled, other))
    about["label_names"] = about["label_names"][::-1]
    (other / "config.json").write_text(json.dumps(about))
    with pytest.raises(ConfigError, match=r"--labels-from: .* not the same ones in the same order"):
        write_dataset(command(labelled, other))


@pytest.mark.parametrize(
    "words",
    [
        "--epochs 3",
        "--labels-from x --plan",
        "--labels-from x --split val",
        "--labels-from x --on-error skip",
        "--seed 1",
    ],
)
def test_options_of_the_writer_that_do_not_go_together(words: str):
    with pytest.raises(ConfigError, match=r"--labels-from"):
        write_dataset(words.split())
