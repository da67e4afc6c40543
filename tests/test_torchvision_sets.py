"""The data sets of torchvision as sources."""

import inspect
import pickle
from pathlib import Path

import numpy as np
import pytest
from fake_images import check_set, make_folder

from vitlocal.data.images import open_images
from vitlocal.data.images.image_set import SourceChoice
from vitlocal.data.images.torchvision import OTHER_TASKS, _arguments
from vitlocal.errors import ConfigError


def test_torchvision_cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3072), dtype=np.uint8)
    for name in ("data_batch_1", "test_batch"):
        batch = {"data": pixels, "labels": [3, 1, 4, 1, 5, 9, 2]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    monkeypatch.setattr(datasets.CIFAR10, "train_list", [("data_batch_1", None)])
    monkeypatch.setattr(datasets.CIFAR10, "test_list", [("test_batch", None)])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": None})
    spec = f"torchvision:CIFAR10:{tmp_path}"
    source = open_images(spec, "val")
    check_set(source, spec)
    assert source.classes == tuple("abcdefghij") and source.labels.tolist() == [3, 1, 4, 1, 5, 9, 2]
    assert np.array_equal(source.load(2), pixels[2].reshape(3, 32, 32).transpose(1, 2, 0))
    assert source.read(0).startswith(b"\x89PNG")
    assert len(pickle.dumps(source)) < 3072 * 3  # the pixels do not travel


def test_torchvision_split_by_signature(tmp_path: Path) -> None:
    """Imagenette takes split='train' or 'val', and finds its folder by itself."""
    for split in ("train", "val"):
        make_folder(tmp_path / "imagenette2", split, per_class=2, classes=("n01440764", "n02102040"))
    train = open_images(f"torchvision:Imagenette:{tmp_path}", "train")
    assert train.labels.tolist() == [0, 0, 1, 1]
    assert len(open_images(f"torchvision:Imagenette:{tmp_path}", "validation")) == 4


def test_torchvision_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    with pytest.raises(ConfigError, match=r"torchvision.datasets has no 'Cifar10'"):
        open_images("torchvision:Cifar10", "train")
    monkeypatch.setattr(datasets.CIFAR10, "download", lambda self: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(ConfigError, match=r"could not be opened from.*no network.*torchvision:CIFAR10:FOLDER"):
        open_images(f"torchvision:CIFAR10:{tmp_path}", "train")


def write_idx(path: Path, values: np.ndarray) -> None:
    """A file of MNIST's format: a header with the type (8: uint8), the number of axes and their lengths."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes())


def test_emnist_has_variants(tmp_path: Path) -> None:
    """It takes a split, which is a variant, and train=… besides."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 28, 28), np.uint8)
    for variant, labels in (("balanced", [46, 0, 2]), ("letters", [1, 26, 1])):
        for split in ("train", "test"):
            raw = tmp_path / "EMNIST" / "raw" / f"emnist-{variant}-{split}"
            write_idx(raw.with_name(f"{raw.name}-images-idx3-ubyte"), pixels)
            write_idx(raw.with_name(f"{raw.name}-labels-idx1-ubyte"), np.array(labels, np.uint8))
    spec = f"torchvision:EMNIST:{tmp_path}"
    train = open_images(spec, "train")
    assert train.labels.tolist() == [46, 0, 2] and len(train.classes) == 47
    assert train.reads == ("split: balanced", "train: True")
    assert open_images(spec, "val").reads == ("split: balanced", "train: False")
    letters = open_images(spec, "train", SourceChoice(subset="letters"))
    assert letters.labels.tolist() == [1, 26, 1] and letters.classes[26] == "z"
    with pytest.raises(ConfigError, match=r"no --subset digit; expected one of 'balanced', 'byclass'"):
        open_images(spec, "train", SourceChoice(subset="digit"))
    with pytest.raises(ConfigError, match=r"CIFAR10' has no --subset mini; remove it"):
        open_images("torchvision:CIFAR10", "train", SourceChoice(subset="mini"))


def test_places365(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision import datasets

    def file_list(self: datasets.Places365, download: bool) -> tuple[list, list]:
        return [(f"{self.split}/{k}.jpg", k) for k in (1, 0)], [1, 0]

    monkeypatch.setattr(datasets.Places365, "load_categories", lambda self, download: (["/a/airfield", "/b/bar"], {}))
    monkeypatch.setattr(datasets.Places365, "load_file_list", file_list)
    monkeypatch.setattr(datasets.Places365, "loader", None, raising=False)
    for split, subset, read in (
        ("train", None, "train-standard"),
        ("train", "challenge", "train-challenge"),
        ("train", "train-challenge", "train-challenge"),
        ("val", None, "val"),
    ):
        images = open_images("torchvision:Places365", split, SourceChoice(subset=subset))
        assert images.reads == (f"split: {read}",)
        assert images.classes == ("/a/airfield", "/b/bar") and images.labels.tolist() == [1, 0]


def test_inaturalist(tmp_path: Path) -> None:
    species = [f"{k:05d}_Animalia_Chordata_Aves_Order_Family_Genus_{name}" for k, name in enumerate(("one", "two"))]
    for version, per_class in (("2021_train", 3), ("2021_train_mini", 1), ("2021_valid", 2)):
        make_folder(tmp_path, version, per_class, species)
    spec = f"torchvision:INaturalist:{tmp_path}"
    train = open_images(spec, "train")
    assert train.classes == tuple(species) and train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(open_images(spec, "train", SourceChoice(subset="mini"))) == 2
    assert len(open_images(spec, "val")) == 4


def test_sets_without_splits(tmp_path: Path) -> None:
    make_folder(tmp_path / "caltech101", "101_ObjectCategories", 2, ("ant", "bee"))
    (tmp_path / "caltech101" / "Annotations").mkdir()
    (tmp_path / "caltech101" / "101_ObjectCategories" / "BACKGROUND_Google").mkdir()
    for k in range(2):
        for name in ("ant", "bee"):
            folder = tmp_path / "caltech101" / "101_ObjectCategories" / name
            (folder / f"image_{k + 1:04d}.jpg").write_bytes((folder / f"{name}_{k}.JPEG").read_bytes())
            (folder / f"{name}_{k}.JPEG").unlink()
    spec = f"torchvision:Caltech101:{tmp_path}"
    images = open_images(spec, "train")
    assert images.classes == ("ant", "bee") and images.labels.tolist() == [0, 0, 1, 1]
    images.load(3)
    with pytest.raises(ConfigError, match=r"has no splits, so it has no 'val'.*train/<class>/"):
        open_images(spec, "val")


class FakeSet:
    """A set whose classes have no names. Its labels, or the error of each split."""

    splits: dict[str, list[int] | Exception] = {}

    def __init__(self, root: str, split: str) -> None:
        if split not in self.splits:
            raise ValueError(f"Unknown value '{split}' for argument split.")
        labels = self.splits[split]
        if isinstance(labels, Exception):
            raise labels
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)


@pytest.fixture
def gtsrb(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int] | Exception]:
    """The splits of a fake GTSRB."""
    from torchvision import datasets

    monkeypatch.setattr(datasets, "GTSRB", FakeSet)
    monkeypatch.setattr(FakeSet, "splits", {})
    return FakeSet.splits


def test_numbers_with_gaps(gtsrb: dict) -> None:
    gtsrb.update(train=[1440764, 9468604, 15075141, 1440764], test=[15075141])
    train, val = (open_images("torchvision:GTSRB", split) for split in ("train", "val"))
    assert train.classes == val.classes == ("1440764", "9468604", "15075141")
    assert train.labels.tolist() == [0, 1, 2, 0] and val.labels.tolist() == [2]
    assert "3 numbers from 1440764 to 15075141" in train.notes[0]
    assert any("'val' reads 'test'" in note for note in val.notes)
    gtsrb.update(train=[-1, 0])
    with pytest.raises(ConfigError, match=r"images without a class"):
        open_images("torchvision:GTSRB", "train")


def test_a_split_that_fails_is_not_replaced_by_another(gtsrb: dict) -> None:
    gtsrb.update(val=RuntimeError("corrupted"), test=[0, 1])
    with pytest.raises(ConfigError, match=r"split 'val' could not be opened.*RuntimeError: corrupted"):
        open_images("torchvision:GTSRB", "val")
    gtsrb.update(val=ModuleNotFoundError("No module named 'scipy'"))
    with pytest.raises(ConfigError, match=r"needs another package: No module named 'scipy'; install"):
        open_images("torchvision:GTSRB", "val")


def test_every_set_for_classification_is_known(tmp_path: Path) -> None:
    """Each takes the arguments that we pass: without its files, it fails for want of them."""
    from torchvision import datasets

    without_val = set()
    for name in datasets.__all__:
        kind = getattr(datasets, name)
        if not inspect.isclass(kind) or OTHER_TASKS & {name, kind.__module__.rpartition(".")[2]}:
            continue
        takes = inspect.signature(kind.__init__).parameters
        for split in ("train", "val"):
            try:
                choices = _arguments(name, name, split, takes, None)
            except ConfigError:
                without_val.add(name)
                continue
            errors = []
            for chosen in choices:
                download = {"download": False} if "download" in takes else {}
                with pytest.raises(Exception) as raised:
                    kind(root=str(tmp_path / name), **chosen, **download)
                errors.append(raised.value)
            assert any(isinstance(error, (RuntimeError, OSError, ImportError)) for error in errors), (name, errors)
            assert not any(isinstance(error, TypeError) for error in errors), (name, errors)
    assert without_val == {"Caltech101", "Caltech256", "EuroSAT", "Omniglot", "SEMEION", "SUN397"}


@pytest.mark.parametrize("name", ["CelebA", "CocoDetection", "VOCSegmentation", "LFWPairs", "Kinetics", "FlyingChairs"])
def test_sets_of_other_tasks(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} has no images with one class each"):
        open_images(f"torchvision:{name}", "train")


def test_labels_and_classes_of_lsun(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has a database for each class, and the split is in the names of its classes."""
    from torchvision import datasets

    class Databases:
        def __init__(self, root: str, classes: str) -> None:
            self.dbs, self.indices = ["a database", "another"], [2, 5]
            self.classes = [f"bedroom_{classes}", f"church_outdoor_{classes}"]

        def __len__(self) -> int:
            return 5

    monkeypatch.setattr(datasets, "LSUN", Databases)
    train, val = (open_images("torchvision:LSUN", split) for split in ("train", "val"))
    assert train.classes == val.classes == ("bedroom", "church_outdoor")
    assert train.labels.tolist() == [0, 0, 1, 1, 1]
