"""Muon against its definition, one matrix at a time."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitlocal.config import ModelConfig
from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model
from vitlocal.models.positions import sincos_table
from vitlocal.train.optim import (
    COEFFICIENTS,
    ITERATIONS,
    UPDATE_RMS,
    CombinedOptimizer,
    Muon,
    block_matrices,
    build_optimizer,
    orthogonalized,
)


def plain(matrix: torch.Tensor) -> torch.Tensor:
    first, second, third = COEFFICIENTS
    x = matrix.double() / matrix.double().norm()
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = first * x + (second * gram + third * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_singular_values_come_near_one(shape: tuple[int, int]):
    matrices = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    out = orthogonalized(matrices, torch.float32)
    for matrix, result in zip(matrices, out, strict=True):
        torch.testing.assert_close(result.double(), plain(matrix), atol=1e-4, rtol=1e-3)
        assert 0.5 < torch.linalg.svdvals(result).min() and torch.linalg.svdvals(result).max() < 1.3


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-6, 1e5])  # float16 has 6e-8 to 65504
def test_half_precision_orthogonalizes_gradients_of_any_size(precision: torch.dtype, size: float):
    matrices = size * torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0))
    out = orthogonalized(matrices, precision)
    assert out.dtype == precision
    for matrix, result in zip(matrices, out.double(), strict=True):
        expected = plain(matrix)
        assert (result - expected).norm() < 0.05 * expected.norm()


def test_a_step_is_the_definition():
    generator = torch.Generator().manual_seed(1)
    stacked = nn.Parameter(torch.randn(12, 4, generator=generator))  # three matrices by rows
    alone = nn.Parameter(torch.randn(4, 9, generator=generator))
    muon = Muon([stacked, alone], {id(stacked): 3}, lr=0.1, momentum=0.9, weight_decay=0.01)
    expected = {id(p): p.detach().double().clone() for p in (stacked, alone)}
    momenta = {id(p): torch.zeros_like(p).double() for p in (stacked, alone)}
    for _ in range(3):
        for p, parts in ((stacked, 3), (alone, 1)):
            p.grad = torch.randn(p.shape, generator=generator)
            momenta[id(p)] = 0.9 * momenta[id(p)] + 0.1 * p.grad.double()
            direction = 0.1 * p.grad.double() + 0.9 * momenta[id(p)]
            update = torch.cat([plain(part) * max(part.shape) ** 0.5 for part in direction.chunk(parts)])
            expected[id(p)] = expected[id(p)] * (1 - 0.1 * 0.01) - 0.1 * UPDATE_RMS * update
        muon.step()
        for p in (stacked, alone):
            torch.testing.assert_close(p.detach().double(), expected[id(p)], atol=1e-4, rtol=1e-3)


def test_parameters_without_gradients_do_not_change():
    p = nn.Parameter(torch.ones(4, 4))
    Muon([p], {}, lr=0.1, momentum=0.9, weight_decay=0.1).step()
    assert torch.equal(p.detach(), torch.ones(4, 4))


def test_matrices_of_blocks_go_to_muon_and_all_else_to_adamw():
    small = ModelConfig(name="vitlocal_tiny_patch8_64", size=64, depth=2, width=32, heads=2)
    model, _ = build_model(small.name, small.arguments(), 10)
    optimizer = build_optimizer(model, "muon")
    assert isinstance(optimizer, CombinedOptimizer)
    adamw, muon = optimizer.members
    held = [{id(p) for group in member.param_groups for p in group["params"]} for member in (adamw, muon)]
    assert held[1] == {id(p) for p in block_matrices(model).values()} and not held[0] & held[1]
    assert held[0] | held[1] == {id(p) for p in model.parameters()}
    names = {name.rpartition("blocks.0.")[2] for name in block_matrices(model) if "blocks.0." in name}
    assert names == {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    flat, _ = build_model("resnet18", {}, 10)
    with pytest.raises(ConfigError, match="has no blocks with matrices"):
        build_optimizer(flat, "muon")


def test_the_sincos_table():
    table = sincos_table((3, 5), 8)
    assert table.shape == (15, 8)
    row, column = 2, 3
    expected = [
        f(place * w) for place in (column, row) for f in (torch.sin, torch.cos) for w in torch.tensor([1, 0.01])
    ]
    torch.testing.assert_close(table[row * 5 + column], torch.stack(expected))
    small = ModelConfig(name="vitlocal_tiny_patch8_64", size=64, depth=1, width=32, heads=2, pos_embed_init="sincos")
    model, _ = build_model(small.name, small.arguments(), 10)
    assert torch.equal(model.pos_embed[0, 1:], sincos_table((8, 8), 32)) and not model.pos_embed[0, 0].any()
    with pytest.raises(ConfigError, match="must be a multiple of 4"):
        build_model("vitlocal_tiny_patch8_64", dict(embed_dim=30, num_heads=2, pos_embed_init="sincos"), 10)


def test_drop_path_moves_where_it_lies():
    small = ModelConfig(name="vitlocal_tiny_patch8_64", size=64, depth=3, width=32, heads=2, drop_path=0.2)
    model, _ = build_model(small.name, small.arguments(), 10)
    where = model.drop_path_rates.data_ptr()
    model.set_drop_path(0.1)
    torch.testing.assert_close(model.drop_path_rates, torch.tensor([0.0, 0.05, 0.1]))
    assert model.drop_path_rates.data_ptr() == where


def test_one_by_one_convolutions_are_matrices():
    generator = torch.Generator().manual_seed(3)
    linear, conv = nn.Linear(6, 4, bias=False), nn.Conv2d(6, 4, 1, bias=False)
    conv.weight.data.copy_(linear.weight.data[:, :, None, None])
    for module in (linear, conv):
        optimizer = Muon([module.weight], {}, lr=0.1, momentum=0.9, weight_decay=0.01)
        generator.manual_seed(3)
        for _ in range(3):
            module.weight.grad = torch.randn(4, 6, generator=generator).view_as(module.weight)
            optimizer.step()
    assert torch.equal(conv.weight[:, :, 0, 0], linear.weight)


def test_muon_gets_localvits_feed_forward():
    model, _ = build_model("vitlocal_localvit_tiny_patch8_64", {"depth": 1}, 10)
    names = set(block_matrices(model))
    assert {"blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight", "blocks.0.mlp.se.reduce.weight"} <= names
    assert "blocks.0.mlp.conv.weight" not in names  # depth-wise: no matrix


def test_a_checkpoint_whose_muon_had_other_matrices_is_refused(monkeypatch):
    options = dict(embed_dim=16, depth=1, num_heads=2, img_size=16, patch_size=8)
    model, _ = build_model("vitlocal_localvit_tiny_patch8_64", options, 3)
    with monkeypatch.context() as patch:
        patch.setattr("vitlocal.train.optim._is_matrix", lambda module: isinstance(module, nn.Linear))
        state = build_optimizer(model, "muon").state_dict()
    with pytest.raises(ConfigError, match="another version of vitlocal"):
        build_optimizer(model, "muon").load_state_dict(state)
