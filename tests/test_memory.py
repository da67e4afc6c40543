"""The memory that a recipe needs on a GPU: what is counted from shapes, against real tensors on a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from narrow_models import narrow
from torch.profiler import ProfilerActivity, profile
from torch.profiler._memory_profiler import Action
from torch.utils._pytree import tree_leaves
from trainers import open_trainer

from vitlocal.bench.__main__ import main
from vitlocal.bench.memory import count_memory, fitting_parts, moment_bytes, state_bytes
from vitlocal.config import read_config
from vitlocal.models.counts import step_bytes
from vitlocal.train.build import build_step, make_model
from vitlocal.train.loop import fit

FAMILIES = ("vitlocal_tiny_patch16_224", "vitlocal_deit_tiny_patch16_224", "vitlocal_localvit_tiny_patch16_224")


def allocated(model: torch.nn.Module, batch: int, size: int, precision: torch.dtype) -> int:
    """The most bytes that PyTorch's CPU allocator gave to a forward and backward pass and its images."""
    with profile(
        activities=[ProfilerActivity.CPU], profile_memory=True, record_shapes=True, with_stack=True, acc_events=True
    ) as profiled:
        images = torch.zeros(batch, 3, size, size)
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            logits = model(images)
        F.cross_entropy(logits.float(), torch.zeros(batch, dtype=torch.int64)).backward()
    now = most = 0
    for _, action, _, count in profiled._memory_profile().timeline:
        now += {Action.CREATE: count, Action.DESTROY: -count}.get(action, 0)
        most = max(most, now)
    return most


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_step_holds_what_the_allocator_gave(name: str, precision: torch.dtype):
    """A compiled step is counted without the float32 norms of a GPU, so it is what a CPU does."""
    model, batch = narrow(name), 256
    fixed, each = step_bytes(model, 64, precision, fused=False, compiled=True)
    assert fixed + batch * each == pytest.approx(allocated(model, batch, 64, precision), rel=0.05)


def test_an_eager_step_of_a_gpu_keeps_the_inputs_of_norms_in_float32():
    model = narrow(depth=6, embed_dim=64)
    (_, compiled), (_, eager) = (step_bytes(model, 64, torch.bfloat16, True, how) for how in (True, False))
    assert eager - compiled >= 6 * 2 * 16 * 64 * 2  # six blocks, two norms, 16 tokens of width 64, two more bytes
    assert step_bytes(model, 64, torch.float32, True, True) == step_bytes(model, 64, torch.float32, True, False)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)  # the model has not changed


def test_checkpointing_needs_less():
    model = narrow(depth=6, embed_dim=64)
    _, before = step_bytes(model, 64, torch.bfloat16, True, False)
    model.set_grad_checkpointing(True)
    assert step_bytes(model, 64, torch.bfloat16, True, False)[1] < 0.6 * before


@pytest.mark.parametrize("optimizer", ["adamw", "muon", "soap"])
def test_moments_are_those_after_a_step(configure, optimizer: str):
    config = configure(f"--train.optimizer={optimizer}")
    step = build_step(config, 20, torch.device("cpu"))
    for parameter in step.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    step.optimizer.step()
    values = [value for value in tree_leaves(step.optimizer.state_dict()) if isinstance(value, torch.Tensor)]
    assert moment_bytes(step.optimizer) == sum(value.nbytes for value in values if value.ndim)  # not the step's number


def test_the_state_is_that_of_a_run(configure):
    config = configure("--train.ema_decay=0.9", "--augment.random_erasing=0.1", "--budget.length=1steps")
    with open_trainer(config) as trainer:
        fit(trainer)
        state, step = trainer.state, trainer.step
        models = [
            value for model in (state.model, state.ema.model) for value in (*model.parameters(), *model.buffers())
        ]
        moments = [value for value in tree_leaves(state.optimizer.state_dict()) if isinstance(value, torch.Tensor)]
        table = step.task.augment.table
        gradients = sum(value.nbytes for value in state.model.parameters())
        real = sum(value.nbytes for value in (*models, *moments, table) if value.ndim) + gradients
        assert state_bytes(state.model, config, 1) == real


def recipe(*options: str, batch: int = 64):
    words = [
        "--model.name=vitlocal_tiny_patch8_64",
        "--model.size=64",
        "--model.depth=2",
        f"--train.batch_size={batch}",
    ]
    return read_config([*words, "--methods=image_size", "--image_size.stages=32px until 50%,64px", *options], {})


def test_small_sizes_run_as_graphs_whose_memory_is_released_after_them():
    small, large = count_memory(recipe(batch=16384), 5000)
    assert (small.mode, large.mode) == ("CUDA graph", "compiled")
    assert small.graphs == 0 == large.graphs
    stages = "--image_size.stages=32px until 20%,64px until 50%,32px"  # the graph of 32 px is needed again
    first, middle = count_memory(recipe(stages, batch=16384), 5000)
    eager_half = count_memory(recipe("--train.compile=no", batch=8192), 5000)[0].step  # an epoch's last batch
    assert first.graphs == 0 and middle.graphs + eager_half == first.step
    assert {memory.graphs for memory in count_memory(recipe("--train.cuda_graphs=no"), 5000)} == {0}
    assert [memory.mode for memory in count_memory(recipe("--train.compile=no"), 5000)] == ["eager", "eager"]


def test_parts_of_a_batch_fit_into_less_memory():
    config = recipe(batch=1024)
    (whole,), limit = count_memory(replace(config, methods=()), 5000), 2_000_000_000
    assert whole.total > limit and fitting_parts(config, 5000, whole.total + 10**9) == 1
    parts = fitting_parts(config, 5000, limit)
    totals = [
        max(memory.total for memory in count_memory(recipe(f"--train.grad_accum_steps={count}", batch=1024), 5000))
        for count in (parts, parts // 2)
    ]
    assert totals[0] <= limit < totals[1]
    assert fitting_parts(config, 5000, 10**9) is None


@pytest.mark.parametrize(
    ("memory", "said"),
    [("16GB", "it fits: 64 px needs"), ("2GB", "--train.grad_accum_steps="), ("1GB", "in any number of parts")],
)
def test_the_forecast_says_whether_a_recipe_fits(tmp_path: Path, memory: str, said: str, capsys):
    (tmp_path / "recipe.yaml").write_text(recipe(batch=1024).yaml())
    words = [f"--config-file={tmp_path}/recipe.yaml", "--images=5000", "--rates=32:1000,64:300", "--budgets=none"]
    main(["forecast", *words, f"--memory={memory}", f"--json={tmp_path}/forecast.json"])
    out = capsys.readouterr().out
    assert "counted, not measured" in out and said in out
    rows = json.loads((tmp_path / "forecast.json").read_text())["memory"]
    assert [row["size"] for row in rows] == [32, 64]
    for row in rows:
        assert row["total"] == sum(row[name] for name in ("state", "step", "inputs", "graphs", "allowance"))


def test_models_of_timm_are_counted():
    (memory,) = count_memory(read_config(["--model.name=resnet10t", "--model.size=64", "--methods=none"], {}), 5000)
    model, _ = make_model(read_config(["--model.name=resnet10t", "--model.size=64"], {}), 1000, torch.device("cpu"))
    assert memory.state > 4 * 4 * sum(p.numel() for p in model.parameters())
