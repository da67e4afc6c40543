"""SOAP against its definition, one matrix at a time; growth of the states of optimizers of matrices."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from vitlocal.config import ModelConfig
from vitlocal.errors import DataError
from vitlocal.models.factory import build_model
from vitlocal.models.shape import grow
from vitlocal.plan import WHOLE_MODEL, Growth, Shape
from vitlocal.train.optim import MATRIX_OPTIMIZERS, build_optimizer, check_moments, optimizer_state
from vitlocal.train.soap import FIRST_ITERATIONS, Soap


def gradients(weights: list[nn.Parameter], steps: int):
    """Sets random gradients, step by step. They grow with row and column, so that rows and directions differ."""
    generator = torch.Generator().manual_seed(7)
    for step in range(steps):
        for p in weights:
            scales = torch.linspace(1, 2, len(p))[:, None] * torch.linspace(0.2, 3, p.shape[1])
            p.grad = (torch.randn(scales.shape, generator=generator) * scales).view_as(p)
        yield step


def soap_twin(
    p: nn.Parameter, turn: bool, state: dict, count: int, every: int, lr: float, decay: float
) -> torch.Tensor:
    """The next weights, with the basis on the side of the columns: a matrix that has it on the other one is turned."""
    weight, g = (value.detach().double().flatten(1) for value in (p, p.grad))
    weight, g = (weight.T, g.T) if turn else (weight, g)
    b1, b2 = 0.9, 0.95
    state["gram"] = b2 * state.get("gram", 0) + (1 - b2) * g.T @ g
    if (count - 1) % every == 0:
        basis = state.get("basis", torch.eye(g.shape[1], dtype=torch.double))
        order = torch.diagonal(basis.T @ state["gram"] @ basis).argsort(descending=True)
        basis, state["v"] = basis[:, order], state.get("v", torch.zeros_like(g))[:, order]
        for _ in range(FIRST_ITERATIONS if count == 1 else 1):
            basis = torch.linalg.qr(state["gram"] @ basis)[0]
        state["basis"] = basis
    basis = state["basis"]
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    state["v"] = b2 * state["v"] + (1 - b2) * (g @ basis) ** 2
    adam = (state["m"] @ basis / (1 - b1**count)) / ((state["v"] / (1 - b2**count)).sqrt() + 1e-8)
    new = weight * (1 - lr * decay) - lr * adam @ basis.T
    return (new.T if turn else new).reshape(p.shape)


def test_a_step_of_soap_is_the_definition():
    shapes = (12, 4), (4, 12), (12, 4), (5, 5), (5, 5), (9, 6, 1, 1)
    weights, turned = [nn.Parameter(torch.randn(shape)) for shape in shapes], (False, True, False, True, False, False)
    columns = {id(p) for p, turn in zip(weights, turned, strict=True) if not turn}
    soap, twins = Soap(weights, columns, 0.1, (0.9, 0.95), 1e-8, 0.01, every=3), [dict() for _ in weights]
    for step in gradients(weights, 8):
        if step < 2:
            weights[2].grad = None  # a block that is skipped: counts, and so the steps of new bases, differ
        counts = [step + 1 - 2 * (index == 2) for index in range(6)]
        expected = [p.detach().double() if p.grad is None else soap_twin(p, turn, twin, count, 3, 0.1, 0.01)
                    for p, turn, twin, count in zip(weights, turned, twins, counts, strict=True)]  # fmt: skip
        soap.step()
        for p, value in zip(weights, expected, strict=True):
            torch.testing.assert_close(p.detach().double(), value, atol=2e-4, rtol=1e-3)


def test_soaps_basis_finds_the_eigenvectors():
    p = nn.Parameter(torch.zeros(400, 6))
    soap, directions = Soap([p], {id(p)}, 0.0, (0.9, 0.999), 1e-8, 0.0, every=2), torch.linalg.qr(torch.randn(6, 6))[0]
    for _ in range(30):
        p.grad = torch.randn(400, 6) @ (directions * torch.tensor([1.0, 2, 4, 8, 16, 32])).T
        soap.step()
    basis = soap.state[p]["basis"][0]
    torch.testing.assert_close((basis.T @ directions.flip(1)).abs(), torch.eye(6), atol=0.1, rtol=0)


def built(name: str):
    small = ModelConfig(name="vitlocal_tiny_patch8_64", size=64, depth=2, width=32, heads=2)
    torch.manual_seed(0)
    model, _ = build_model(small.name, small.arguments(), 10)
    optimizer = build_optimizer(model, name, soap_every=2)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    return model, optimizer


def train(model: nn.Module, optimizer, steps: int):
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p) if p.requires_grad else None
        optimizer.step()


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_loaded_state_continues_bit_for_bit(name: str):
    model, optimizer = built(name)
    train(model, optimizer, 3)
    (copy, other), state = built(name), deepcopy(optimizer.state_dict())
    copy.load_state_dict(model.state_dict())
    other.load_state_dict(state)
    check_moments(other)
    for each, its_optimizer in ((model, optimizer), (copy, other)):
        torch.manual_seed(1)
        train(each, its_optimizer, 3)
    assert all(torch.equal(mine, its) for mine, its in zip(model.parameters(), copy.parameters(), strict=True))
    member = getattr(other, "members", [other])[-1]
    values = member.state[member.param_groups[0]["params"][0]]
    values[next(reversed(values))] = torch.zeros(2, 3)
    with pytest.raises(DataError, match=r"the optimizer has \w+ \(2, 3\) for a weight"):
        check_moments(other)


@pytest.mark.parametrize("moments", ["zero", "copy", "reset"])
@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_states_of_new_heads_hidden_units_and_blocks(name: str, moments: str):
    model, optimizer = built(name)
    train(model, optimizer, 3)
    state = optimizer_state(optimizer)
    qkv, fc2, late = model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc2.weight, model.blocks[1].attn.qkv.weight
    old = {p: {key: value.clone() for key, value in state(p).items()} for p in (qkv, fc2, late)}
    before, weights = Shape(heads=(1,), hidden=(64,), block_order=(0,)), Growth(1, moments=moments, blocks=((1, 0),))
    grow(model, before, WHOLE_MODEL, weights, state)
    if moments == "reset":
        assert not any(value.any() for p in old for value in state(p).values())
    for key, value in state(qkv).items() if moments != "reset" else ():
        if value.ndim != 2:  # the counts, and SOAP's basis, which belongs to the width of the model
            assert torch.equal(value, old[qkv][key])
            continue
        mine, its = (v.view(3, 2, 16, -1) for v in (value, old[qkv][key]))
        assert torch.equal(mine[:, 0], its[:, 0])
        assert torch.equal(mine[:, 1], its[:, 0]) if moments == "copy" else not mine[:, 1].any()
    for key, value in state(fc2).items() if moments != "reset" else ():
        if value.shape == fc2.shape:  # the new units are columns
            assert torch.equal(value[:, :64], old[fc2][key][:, :64])
            assert torch.equal(value[:, 64:], old[fc2][key][:, :64]) if moments == "copy" else not value[:, 64:].any()
        else:
            assert torch.equal(value, old[fc2][key])
    assert (not state(late)) == (moments == "zero")
    train(model, optimizer, 2)
    check_moments(optimizer)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", MATRIX_OPTIMIZERS)
def test_a_step_whose_scaled_gradients_overflow_is_left_out(name: str):
    model, optimizer = built(name)
    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), deepcopy(model.state_dict())
    for factor in (float("inf"), 1.0):
        for p in model.parameters():
            p.grad = None
        scaler.scale(model(torch.randn(2, 3, 64, 64)).square().mean() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
        assert same == (factor != 1)
    assert all(value.isfinite().all() for value in model.state_dict().values())
