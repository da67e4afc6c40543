"""The position table: interpolation, gradients, copies and compilation."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from narrow_models import narrow

import vitlocal.models  # noqa: F401 (registers the models)
from vitlocal.models.positions import position_matrix

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (13, 13), (14, 14), (20, 20), (3, 9)])
def test_position_matrix_equals_pytorchs_resize(grid):
    matrix = position_matrix((14, 14), grid, CPU, torch.float64)
    table = torch.randn(196, 5, dtype=torch.float64)
    image = table.t().view(1, 5, 14, 14)
    expected = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(matrix @ table, expected.view(5, -1).t(), rtol=0, atol=1e-12)
    single = position_matrix((14, 14), grid, CPU, torch.float32)
    torch.testing.assert_close(single.double(), matrix, rtol=0, atol=1e-7)
    torch.testing.assert_close(single.sum(1), torch.ones(len(matrix)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [2, 4, 6, 8, 10, 12, 14])
def test_resampling_back_and_forth_loses_information(side: int):
    """The released code resamples to a smaller grid and back around each evaluation. Only the full grid is lossless."""
    there = position_matrix((14, 14), (side, side), CPU, torch.float64)
    back = position_matrix((side, side), (14, 14), CPU, torch.float64)
    whole = torch.eye(196, dtype=torch.float64)
    assert torch.allclose(back @ there, whole, atol=1e-9) == (side == 14)


def test_tables_that_are_not_square():
    model = narrow(img_size=(48, 80))  # 3 x 5
    with torch.no_grad():
        rows = torch.arange(3.0)[:, None].expand(3, 5)
        model.pos_embed[0, 1:] = rows.reshape(15, 1)
    read = model.positions((6, 10))[0, 1:, 0].view(6, 10)
    assert (read.diff(dim=0) > 0).all() and read.diff(dim=1).abs().max() < 1e-5


def test_one_table_is_trained_at_every_size():
    model = narrow()
    table = model.pos_embed
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    assert model.positions((14, 14)) is table  # exact at the full grid
    for size in (32, 96, 224):
        optimizer.zero_grad()
        before = table.detach().clone()
        model(torch.randn(4, 3, size, size)).square().sum().backward()
        assert model.pos_embed is table
        assert (table.grad != 0).any(-1).all()  # every row
        optimizer.step()
        assert (table != before).any(-1).all()
        torch.testing.assert_close(model.positions((size // 16,) * 2)[:, 0], table[:, 0], rtol=0, atol=0)
    assert "exp_avg" in optimizer.state[table]
    assert not any("matri" in name for name in model.state_dict())


def test_cached_matrices_work_after_copies_casts_and_inference_mode():
    images = torch.randn(2, 3, 64, 64)
    model = narrow()
    with torch.inference_mode():
        model.eval()(images)
    model.train()(images).sum().backward()  # fails if the cache holds an inference tensor
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(images), model.eval()(images))
    torch.testing.assert_close(twin.double()(images.double()).float(), model(images), rtol=0, atol=1e-5)


def test_torch_compile_makes_one_graph():
    model = narrow(depth=1, drop_path_rate=0.3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    noise = torch.rand(2, 1, 2)
    for size in (32, 48):  # at the second size, PyTorch tries symbolic sizes
        images = torch.randn(2, 3, size, size)
        fast, slow = compiled(images, noise), model(images, noise)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)
        grads = [torch.autograd.grad(out.square().sum(), model.pos_embed)[0] for out in (fast, slow)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-5)
    torch._dynamo.reset()


def test_a_frozen_position_table_has_no_gradient():
    model = narrow(train_pos_embed=False)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert not model.pos_embed.requires_grad and model.pos_embed.grad is None
    assert model.cls_token.grad is not None
