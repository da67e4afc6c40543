"""The optimizer's groups, the weight average, precision."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from vitlocal.progress import Length, Progress
from vitlocal.train.devices import choose_precision
from vitlocal.train.optim import ModelEma, build_optimizer


def test_no_decay_on_norms_biases_embeddings_and_tokens():
    model = timm.create_model("vitlocal_tiny_patch8_64", depth=2)
    decayed = {id(p) for group in build_optimizer(model).param_groups if group["weight_decay"]
               for p in group["params"]}  # fmt: skip
    for name, parameter in model.named_parameters():
        exempt = parameter.ndim == 1 or name in ("pos_embed", "cls_token")
        assert (id(parameter) in decayed) is not exempt, name


def test_the_average_forgets_over_a_length():
    average = ModelEma(torch.nn.Linear(1, 1), length=Length.parse("10%"))
    decay = average.decay_between(Progress(fraction=0.30), Progress(fraction=0.35))
    assert decay == pytest.approx(math.exp(-0.5))


def test_the_average_follows():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    average = ModelEma(model, 0.9)
    before = average.model[0].weight.clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    model[1].running_mean.fill_(3)
    average.update(0.9)
    torch.testing.assert_close(average.model[0].weight, before + 0.1)
    assert (average.model[1].running_mean == 3).all()


def test_precision_on_a_cpu():
    assert choose_precision("auto", torch.device("cpu")) is torch.float32
    assert choose_precision("bf16", torch.device("cpu")) is torch.bfloat16
