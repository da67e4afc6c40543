"""Probes: measurements of candidates, which leave no trace in the run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from method_plans import COMMON
from trainers import open_trainer

from vitlocal.methods.method import Probe
from vitlocal.plan import Shape
from vitlocal.train.probes import condition_number, tangent_kernel, zico
from vitlocal.train.trainer import Trainer

pytestmark = pytest.mark.usefixtures("no_report")


def test_probes_leave_no_trace(configure, decoder):
    given = ["--methods=autoprog", "--autoprog.schedule=4@48px", "--autoprog.stages=1"]  # for its averages
    with open_trainer(configure(*COMMON, "--model.norm=batch", *given)) as trainer:
        plan, prober = trainer.plan(), trainer._prober
        with trainer.sources.train.open(plan.feed, trainer.state.clock.position) as batches:
            trainer.train_step(next(batches), plan)
        shape = Shape(block_order=(0, 1, 2), skipped_blocks=(1,), input_size=32)
        assert 0 < prober._seconds(prober.complete(Probe("seconds", shape, 48, 2), plan), plan) < 10
        trainer.step.set_shape(plan.shape)
        before = tensors_of(trainer)
        generator = torch.get_rng_state()
        for probe in (
            Probe("loss", shape, 48, 2),
            Probe("loss", shape, 48, 2, average=0),
            Probe("loss", shape, 48, 2, split="val"),
            Probe("seconds", shape, 48, 2),
            Probe("trainability", Shape(trainable_blocks=(1,)), 32, 2, 2, samples=6),
        ):
            complete = prober.complete(probe, plan)
            first, again = prober.measure(complete, plan), prober.measure(complete, plan)
            assert probe.kind == "seconds" or first == again  # a time is never the same twice
            assert np.isfinite(np.atleast_1d(first)).all()
        assert trainer.step.shape == plan.shape and torch.equal(generator, torch.get_rng_state())
        after = tensors_of(trainer)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
        assert all(p.requires_grad for p in trainer.state.model.parameters())


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    averages = {
        f"{number}.{name}": value.clone()
        for number, average in enumerate((trainer.state.ema, *trainer.state.method_emas))
        for name, value in average.model.state_dict().items()
    }
    moments = {
        f"{name}.{key}": value.clone()
        for name, p in trainer.state.model.named_parameters()
        for key, value in trainer.state.optimizer.state[p].items()
    }
    return {name: value.clone() for name, value in trainer.state.model.state_dict().items()} | moments | averages


def test_the_tangent_kernel_of_a_linear_model():
    """Of y = W·x the gradient of Σy by W repeats x for each output: Θ = C · X·Xᵀ."""
    torch.manual_seed(0)
    model, inputs = torch.nn.Linear(5, 3, bias=False), torch.randn(4, 5)
    kernel = tangent_kernel(model, model(inputs))
    torch.testing.assert_close(kernel, 3 * (inputs @ inputs.T).double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(kernel, kernel.T) and float(torch.linalg.eigvalsh(kernel)[0]) > -1e-9
    values = torch.linalg.eigvalsh(kernel)
    assert condition_number(kernel) == pytest.approx(float(values[-1] / values[0])) and condition_number(kernel) >= 1
    assert condition_number(torch.ones(3, 3)) == float("inf")
    assert condition_number(torch.full((2, 2), float("nan"))) == float("inf")


def test_zico_by_hand():
    first, second = {"a": torch.tensor([1.0, 2.0, 5.0])}, {"a": torch.tensor([3.0, 2.0, -1.0])}
    # Means of magnitudes 2, 2, 3; deviations 1, 0 (left out), 3.
    assert zico([first, second]) == pytest.approx(np.log(2 / 1 + 3 / 3))
    same = {"b": torch.ones(2)}
    assert zico([first | same, second | same]) == zico([first, second])
