"""docs/python.md and docs/examples: the code runs, and it learns or does what it says."""

from __future__ import annotations

import hashlib
import importlib.util
import multiprocessing
import os
import re
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from queue import Queue
from types import ModuleType
from typing import Any

import pytest
import torch
from rank_processes import free_port

import vitlocal
from vitlocal.data.images.sample import SampleImages
from vitlocal.progress import Position

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
CLASSES = {"checker", "dots", "rays", "stripes"}
SMALL = dict(embed_dim=64, depth=2, num_heads=2, pool="avg")
LEARNED = 0.4  # top-1 of four classes; 32 photos and some seconds reach 0.5 to 0.8


def example(name: str) -> ModuleType:
    """The example as a module."""
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "docs" / "examples" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """32 photos of the built-in sample in four classes, as both splits: seconds suffice to learn photos by heart."""
    sample = SampleImages("train", 8)
    names = [sample.classes[label] for label in sample.labels]
    rows = [(sample.read(row), name) for row, name in enumerate(names) if name in CLASSES]
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        vitlocal.write(rows, folder, split, sides="64:raw", progress=False)
    return str(folder)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Killed(Exception):
    pass


def kill_at(step: int) -> Callable[..., None]:
    """Budget.step, which ends the run instead of its step number ``step``, once."""
    original, killed = vitlocal.Budget.step, []

    def counted(self: vitlocal.Budget, *arguments: Any) -> None:
        if self.progress.step + 1 == step and not killed:
            killed.append(step)
            raise Killed
        original(self, *arguments)

    return counted


# --- one process ---


def test_diffusion_learns_and_draws(photos: str):
    """A model that predicts no noise has an error of 1."""
    error, samples = example("diffusion").train(photos, "60steps", 32, embed_dim=64, depth=2, num_heads=2)
    assert error < 0.7
    assert samples.shape == (len(CLASSES), 3, 32, 32) and samples.abs().max() <= 1


def test_plain_pytorch_learns(photos: str, tmp_path: Path):
    assert example("plain_pytorch").train(photos, "80steps", str(tmp_path / "run.pt"), 32, **SMALL) > LEARNED


def test_plain_pytorch_continues_bit_for_bit(photos: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    plain = example("plain_pytorch")
    for name in ("whole", "killed"):
        torch.manual_seed(0)
        arguments = photos, "15steps", str(tmp_path / name), 16
        if name == "killed":
            with monkeypatch.context() as patch, pytest.raises(Killed):
                patch.setattr(vitlocal.Budget, "step", kill_at(6))  # in the middle of the third epoch
                plain.train(*arguments, **SMALL)
            assert torch.load(tmp_path / name)["loader"]["epoch"] == 2
            torch.manual_seed(1)  # other initial weights: those of the checkpoint replace them
        plain.train(*arguments, **SMALL)
    whole, killed = (torch.load(tmp_path / name) for name in ("whole", "killed"))
    assert whole["budget"]["step"] == killed["budget"]["step"] == 15
    assert whole["loader"] == killed["loader"]
    assert all(torch.equal(tensor, killed["model"][name]) for name, tensor in whole["model"].items())


def test_timm_learns(photos: str):
    assert example("timm_train").train(photos, "100steps", 32, **SMALL) > LEARNED


@pytest.mark.ffcv
def test_ffcv_learns(photos: str):
    first, last = example("ffcv_loader").train(photos, "80steps", 16, **SMALL)
    assert last < 0.8 * first


def test_a_hugging_face_dataset_keeps_its_images_and_labels(tmp_path: Path):
    pytest.importorskip("datasets")
    hugging_face = example("hugging_face_dataset")
    with hugging_face.convert(hugging_face.colours(24), str(tmp_path)) as loader:
        assert loader.classes == ("red", "green", "blue")
        images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    assert images.shape == (24, 3, 32, 32) and labels.bincount().tolist() == [8, 8, 8]
    assert torch.equal(images.mean((2, 3)).argmax(1), labels)  # channel 0 is red, and so on


# --- two processes ---


def digests(images: torch.Tensor) -> list[bytes]:
    return [hashlib.sha256(image.numpy().tobytes()).digest() for image in images]


def _train(name: str, arguments: tuple[Any, ...], seen: list[list[bytes]]) -> float:
    """Trains until the process is 'killed', and then to the end. Appends digests of each batch that the model sees."""
    from vitlocal.models.vit import VisionTransformer

    def record(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if isinstance(model, VisionTransformer) and model.training:
            seen.append(digests(inputs[0]))

    handle = torch.nn.modules.module.register_module_forward_pre_hook(record)
    original, module = vitlocal.Budget.step, example(name)
    vitlocal.Budget.step = kill_at(KILLED_STEP)  # type: ignore[method-assign]
    try:
        module.train(*arguments, **SMALL)
        raise AssertionError("it was not killed")
    except Killed:
        vitlocal.Budget.step = original  # type: ignore[method-assign]
    top1 = module.train(*arguments, **SMALL)
    handle.remove()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return top1


def _process(rank: int, port: int, runs: dict[str, tuple[Any, ...]], results: Queue[Any]) -> None:
    """One of two processes, as torchrun starts them: it trains each example with its arguments."""
    os.environ |= dict(
        RANK=str(rank), LOCAL_RANK=str(rank), GROUP_RANK="0", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="test",
        ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="",
    )  # fmt: skip
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    try:
        for name, arguments in runs.items():
            seen: list[list[bytes]] = []
            results.put((name, rank, seen, _train(name, arguments, seen)))
    except BaseException:
        results.put(traceback.format_exc())
        raise


KILLED_STEP, STEPS = 30, 80  # two steps are an epoch


def test_two_processes_read_every_image_once_and_learn(photos: str, tmp_path: Path):
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning_fabric")
    port = free_port()
    budget, checkpoint = f"{STEPS}steps", str(tmp_path / "checkpoint")
    runs = {"fabric": (photos, budget, checkpoint, "2", 8), "accelerate_train": (photos, budget, checkpoint + "s", 8)}
    context = multiprocessing.get_context("spawn")  # both examples in the same processes: imports take most time
    results = context.Queue()
    processes = [context.Process(target=_process, args=(rank, port, runs, results)) for rank in range(2)]
    for process in processes:
        process.start()
    found: list[Any] = []
    try:
        while len(found) < 4 and not isinstance(result := results.get(timeout=300), str):
            found.append(result)
        assert len(found) == 4, result
        for process in processes:
            process.join(60)
    finally:
        for process in processes:
            process.kill()  # if the other process failed, this one waits for it
    epochs = expected_epochs(photos, STEPS // 2)
    found.sort()
    for (_, _, first, top1), (name, _, second, same) in zip(found[::2], found[1::2], strict=True):
        assert top1 == same > LEARNED, name
        batches = [a + b for a, b in zip(first, second, strict=True)]
        saved = (KILLED_STEP - 1) // 2 * 2  # steps before the last checkpoint; those after it are repeated
        assert len(batches) == KILLED_STEP + STEPS - saved
        del batches[saved:KILLED_STEP]
        assert [sorted(batches[step] + batches[step + 1]) for step in range(0, STEPS, 2)] == epochs, name


def expected_epochs(photos: str, count: int) -> list[list[bytes]]:
    """The digests of all crops of each epoch, as one process reads them."""
    pixels = dict(dtype=torch.float32, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with vitlocal.Loader(photos, "train", 32, 32, scale=(0.35, 1), num_workers=1, **pixels) as loader:
        return [sorted(digests(images)) for _ in range(count) for images, _ in loader]


# --- the page ---


def test_the_page_prints_the_example():
    assert (ROOT / "docs" / "examples" / "plain_pytorch.py").read_text(encoding="utf-8") in PAGE


def test_the_page_links_to_every_example():
    names = {path.name for path in (ROOT / "docs" / "examples").glob("*.py")}
    assert names == set(re.findall(r"\(examples/(\w+\.py)\)", PAGE))


def test_the_code_of_the_page_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "sample").symlink_to(folder)
    (tmp_path / "example.jpg").symlink_to(ROOT / "docs" / "example.jpg")
    monkeypatch.chdir(tmp_path)
    page: dict[str, Any] = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, page)
    with vitlocal.Loader("data/grey", "val", 6, 32) as grey:
        assert grey.classes == ("a", "b", "c")
        assert [labels.tolist() for _, labels in grey] == [[0, 1, 2, 0, 1, 2]]
    assert sorted(page["seen"]) == list(range(120))  # each image once, though the size and the batches changed
    assert page["again"].position == Position(1)
    assert page["score"].tolist() == (page["ids"] / 2).tolist()  # as they were written
    assert page["sizes"] == [32] * 4 + [64] * 6
    assert page["rates"][0] < max(page["rates"]) > page["rates"][-1]
    assert page["crops"].shape == (1, 3, 64, 64)
