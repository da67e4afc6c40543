"""Training on a GPU against training on a CPU or eagerly: precisions, CUDA graphs, the loader's copies, whole runs.

``test_step.py`` and ``test_kernels.py`` have further tests of the marker gpu: `pytest -m gpu`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from narrow_models import NARROW_PVT, NARROW_SWIN
from test_step import CLASSES, a_batch, a_step, step_results

from vitlocal.bench.compiled import compare, problems
from vitlocal.data.loader import Loader
from vitlocal.plan import Dials, Feed
from vitlocal.report.run_folder import read_log
from vitlocal.train.checkpoint import load_checkpoint
from vitlocal.train.command import train
from vitlocal.train.devices import EAGER
from vitlocal.train.run_folder import CHECKPOINT

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
ON_GPU = ["--run.device=cuda", "--model.depth=1"]
CAPTURED = ["--train.compile=yes", "--train.cuda_graphs=yes"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_captured_step_is_as_exact_as_an_eager_one(configure, precision: str):
    options = ["--methods=none", "--model.size=24", "--model.drop_path=0.3", "--augment.randaugment=9",
               "--augment.mixup=0.8", "--augment.random_erasing=0.5"]  # fmt: skip
    row = compare(configure(*ON_GPU, *options, f"--train.precision={precision}"), 24, 4, GPU)
    assert problems(row) == []
    assert row["mode"] == "compiled, as a CUDA graph" and row["cudagraph_skips"] == 0
    assert row["graph_launches"] >= 2  # forward and backward


def test_a_captured_step_follows_the_dials(configure):
    """Their values are not part of the graph: they may change at every step."""
    eager, captured = (a_step(configure, *ON_GPU, "--train.precision=fp32", *how, device=GPU) for how in ([], CAPTURED))
    mode = captured.mode(Feed(24, 12))
    for number, strength in enumerate((1.0, 1.0, 1.0, 0.1, 0.7)):
        found = []
        for step, how in ((eager, EAGER), (captured, mode)):
            step.set_dials(Dials(strength=strength))
            found.append(step_results(step, how, number))
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-5)
    eager.set_dials(Dials(strength=1.0))
    assert step_results(eager, EAGER, 4)[0] != found[0][0]  # the last strength made a difference


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "soap"])
def test_captured_training_is_eager_training(configure, optimizer: str):
    options = [*ON_GPU, "--train.precision=fp32", f"--train.optimizer={optimizer}", "--train.ema_decay=0.9"]
    losses = []
    for how in ([], CAPTURED):
        step = a_step(configure, *options, *how, device=GPU)
        mode, batch = step.mode(Feed(24, 12)), a_batch(12, device=GPU)
        losses.append([float(step(batch, number, 1e-3, mode, 0.9).loss) for number in range(6)])
    assert losses[1] == pytest.approx(losses[0], rel=2e-3) and losses[0][0] != losses[0][-1]


@pytest.mark.parametrize("options", [NARROW_PVT, NARROW_SWIN], ids=["pvt", "swin"])
def test_models_in_levels_have_fused_attention_and_a_cpus_gradients(configure, options: list[str]):
    """Swin's biases are a mask that needs a gradient, of pairs of 36 tokens."""
    size, found = 96, []
    stated = [*options, f"--model.size={size}", "--model.depth=none", "--train.precision=fp32", "--train.compile=no"]
    for device in (torch.device("cpu"), GPU):
        step = a_step(configure, *stated, f"--run.device={device.type}", device=device)
        gradients = step.gradients(a_batch(4, size, device))
        found.append({name: gradient.cpu() for name, gradient in gradients.items()})
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-4)
    half = a_step(configure, *stated, "--train.precision=bf16", "--run.device=cuda", device=GPU)
    assert all(gradient.isfinite().all() for gradient in half.gradients(a_batch(4, size, GPU)).values())


@pytest.mark.parametrize("copy", [True, False])
def test_batches_are_those_of_a_cpu(folder: Path, copy: bool):
    """A stream of its own copies them, while the GPU computes. They are kept until all have come."""
    found = {}
    for device in ("cpu", "cuda"):
        with Loader(folder, "train", 16, 32, device=device, seed=3, return_ids=True, copy=device == "cpu" or copy,
                    num_workers=2, drop_last=False) as loader:  # fmt: skip
            found[device] = []
            for _ in range(3):  # epochs
                for images, labels, ids in loader:
                    if device == "cuda":
                        work = torch.randn(1024, 1024, device=GPU)
                        for _ in range(20):
                            work = work @ work * 1e-3  # keeps the GPU busy: the host is ahead
                    assert images.device.type == labels.device.type == device
                    found[device].append((images.clone(), labels.clone(), ids))
    for expected, got in zip(found["cpu"], found["cuda"], strict=True):
        assert all(torch.equal(one, other.cpu()) for one, other in zip(expected, got, strict=True))


def test_evaluation_is_that_of_a_cpu(configure):
    images = a_batch(8).images
    options = ["--model.depth=1", "--train.precision=fp32"]
    on_cpu = a_step(configure, *options)
    expected = on_cpu.predict_fn(on_cpu.model.eval())(False, images)
    for how in ("yes", "no"):
        step = a_step(configure, *options, "--run.device=cuda", f"--train.compile={how}", device=GPU)
        with torch.no_grad():
            for whole in (True, False):  # compiled, and as the last batch of a split
                logits = step.predict_fn(step.model.eval())(whole, images.to(GPU))
                torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
    assert expected.shape == (8, CLASSES)


@pytest.mark.usefixtures("no_report")
def test_a_run_that_is_stopped_continues(configure, stop_after, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options = [*ON_GPU, "--train.precision=fp32", "--methods=image_size,strength", "--image_size.step_pixels=32",
               "--model.drop_path=0.2", "--augment.randaugment=9", "--augment.mixup=0.8", "--train.ema_decay=0.9",
               "--budget.length=2ep"]  # fmt: skip
    assert train(configure(*options, f"--run.folder={tmp_path}/whole")) == 0
    with monkeypatch.context() as patch:
        stop_after(6, patch)  # in the middle of the second epoch
        assert train(configure(*options)) == 143
    assert load_checkpoint(tmp_path / "run" / CHECKPOINT)["clock"]["step"] == 6
    assert train(configure(*options, "--run.resume=must")) == 0
    whole, resumed = read_log(tmp_path / "whole"), read_log(tmp_path / "run")
    for one, other in zip(whole, resumed, strict=True):
        for name in ("epoch", "step", "images_seen", "image_size", "step_mode", "lr"):
            assert one[name] == other[name]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-2)  # sums of a GPU differ in their last bits
        assert "compiled" in one["step_mode"]
    assert whole[-1]["images_seen"] == 240 and whole[-1]["top1"] is not None
