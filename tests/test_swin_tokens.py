"""Tri-level's tokens on Swin, against the equations of the released code (Tri-Level-ViT, Swin)."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from method_plans import COMMON
from narrow_models import IN_LEVELS, NARROW_PVT, NARROW_SWIN
from torch import Tensor

from vitlocal.errors import ConfigError
from vitlocal.methods.trilevel import default_blocks
from vitlocal.models.factory import build_model
from vitlocal.models.shape import check_shape, set_shape
from vitlocal.models.swin import Swin, SwinBlock, keep_tokens
from vitlocal.plan import WHOLE_MODEL, Shape
from vitlocal.train.build import build_step
from vitlocal.train.command import train

SIDE, WINDOW = 14, 7
PRUNED = Shape(token_keep_rate=0.9, pruned_blocks=(5, 6, 7))


@pytest.fixture(scope="module")
def swin() -> Swin:
    """A Swin-T 24 wide, whose tables of biases are not small."""
    torch.manual_seed(0)
    model, _ = build_model("swin_tiny_patch4_window7_224", dict(img_size=224, embed_dim=24), 5)
    for name, p in model.named_parameters():
        if name.endswith(("bias_table", "qkv.weight")):
            torch.nn.init.normal_(p, std=0.1)
    assert isinstance(model, Swin)
    return model.eval()


def released_block(block, x: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """A block over tokens x (B, N, D), with the mask m (B, N): outputs and scores, window by window, pair by pair."""
    normed, heads = block.norm1(x).view(-1, SIDE, SIDE, x.shape[2]), block.attn.num_heads
    mixed, scores = torch.zeros_like(normed), torch.zeros(len(x), SIDE, SIDE)
    shift = 3 if block.attn.is_shifted else 0
    rolled = torch.arange(SIDE).roll(-shift)
    region = torch.tensor([0] * 7 + [1] * (7 - shift) + [2] * shift)
    offsets = torch.arange(7)
    for top in (0, 7):
        for left in (0, 7):
            rows = rolled[top : top + 7].repeat_interleave(7)
            columns = rolled[left : left + 7].repeat(7)
            tokens, policy = normed[:, rows, columns], m.view(-1, SIDE, SIDE)[:, rows, columns]  # (B, 49, D), (B, 49)
            q, k, v = block.attn.qkv(tokens).view(len(x), 49, 3, heads, -1).permute(2, 0, 3, 1, 4)
            attn = q * q.shape[-1] ** -0.5 @ k.mT
            y, z = offsets.repeat_interleave(7), offsets.repeat(7)
            index = (y[:, None] - y + 6) * 13 + (z[:, None] - z + 6)
            attn = attn + block.attn.relative_position_bias_table[index].permute(2, 0, 1)
            kind = 3 * region[top : top + 7].repeat_interleave(7) + region[left : left + 7].repeat(7)
            attn = attn - 100.0 * (kind[:, None] != kind)
            allowed = policy[:, None, None] + (1 - policy[:, None, None]) * torch.eye(49)
            attn = (attn - attn.max(dim=-1, keepdim=True).values).exp() * allowed
            attn = (attn + 1e-6 / 49) / (attn.sum(dim=-1, keepdim=True) + 1e-6)
            mixed[:, rows, columns] = block.attn.proj((attn @ v).transpose(1, 2).flatten(2))
            scores[:, rows, columns] = attn.mean(dim=1).sum(dim=1)
    x = x + mixed.flatten(1, 2)
    return x + block.mlp.fc2(block.mlp.act(block.mlp.fc1(block.norm2(x)))), scores.flatten(1)


def released_level(blocks, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The third level over tokens x (B, N, D): its outputs, and the masks after blocks 1, 2 and 3."""
    mask, count, masks = torch.ones(x.shape[:2]), x.shape[1], []
    for depth, block in enumerate(blocks):
        before = x
        x, scores = released_block(block, x * mask[..., None], mask)
        x = before * (1 - mask[..., None]) + mask[..., None] * x
        if depth in (1, 2, 3):
            count = int(count * 0.9)
            mask = (scores > (scores * mask).topk(count, dim=1).values[:, -1:]).float()
            masks.append(mask)
    return x, masks


@torch.no_grad()
def test_masked_blocks_equal_the_released_equations(swin: Swin):
    x = torch.randn(2, SIDE * SIDE, 96)
    expected, masks = released_level(swin.levels[2], x)
    assert [mask.sum(dim=1).tolist() for mask in masks] == [[count - 1] * 2 for count in (176, 158, 142)]
    set_shape(swin, Shape(**vars(PRUNED) | {"strict_threshold": True}))
    found = swin.run_blocks(range(4, 10), x, (SIDE, SIDE), [None] * 12)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    set_shape(swin, PRUNED)  # one token more in each of three blocks
    assert not torch.allclose(swin.run_blocks(range(4, 10), x, (SIDE, SIDE), [None] * 12), expected, atol=1e-2)
    set_shape(swin, WHOLE_MODEL)


def test_the_kept_tokens_are_counted(monkeypatch: pytest.MonkeyPatch, swin: Swin):
    """Exactly 176, 158 and 142 of 196 tokens, each a part of those before. Gradients pass."""
    counts, masks = [], [torch.ones(1, SIDE * SIDE, dtype=torch.bool)]

    def keep(received, kept, count, strict):
        assert not received.requires_grad
        counts.append(count)
        masks.append(keep_tokens(received, kept, count, strict))
        return masks[-1]

    monkeypatch.setattr("vitlocal.models.swin.keep_tokens", keep)
    check_shape(swin, PRUNED)
    set_shape(swin, PRUNED)
    swin(torch.randn(1, 3, 224, 224)).sum().backward()
    assert counts == [176, 158, 142] and [int(mask.sum()) for mask in masks[1:]] == counts
    assert all(bool((before | ~after).all()) for before, after in pairwise(masks))
    assert all(p.grad is not None for p in swin.parameters())
    set_shape(swin, WHOLE_MODEL)


def test_gradient_checkpointing_computes_masked_blocks_again(monkeypatch: pytest.MonkeyPatch, swin: Swin):
    calls = []
    masked = SwinBlock.forward_masked
    monkeypatch.setattr(SwinBlock, "forward_masked", lambda *operands: calls.append(1) or masked(*operands))
    set_shape(swin, PRUNED)
    images, grads = torch.randn(1, 3, 224, 224), []
    try:
        for checkpointing in (False, True):
            swin.set_grad_checkpointing(checkpointing)
            swin.zero_grad()
            swin(images).sum().backward()
            grads.append([p.grad for p in swin.parameters()])
    finally:
        swin.set_grad_checkpointing(False)
        set_shape(swin, WHOLE_MODEL)
    assert len(calls) == 3 * 5  # blocks 1 to 5 of the third level
    torch.testing.assert_close(*grads)


def test_a_token_that_was_dropped_may_come_back_in_the_released_code():
    received, kept = torch.tensor([[0.9, 0.5, 0.4, 0.3]]), torch.tensor([[False, True, True, True]])
    assert keep_tokens(received, kept, 2).tolist() == [[False, True, True, False]]
    assert keep_tokens(received, kept, 2, strict=True).tolist() == [[True, True, False, False]]


def test_default_blocks():
    assert default_blocks((12,)) == (3, 6, 9)
    assert default_blocks((2, 2, 6, 2)) == default_blocks((2, 2, 18, 2)) == (5, 6, 7)


@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (
            [*NARROW_SWIN],
            r"changes shape.attention_keep_rate, .* and narrow_swin cannot: its windows already .*levels=examples",
        ),
        ([*NARROW_PVT, "--trilevel.levels=tokens"], "narrow_pvt cannot: it has no class token.*; remove trilevel"),
        (["--trilevel.strict_threshold=yes"], "only the tokens of Swin have this choice"),
        ([*NARROW_PVT, "--trilevel.levels=examples", "--trilevel.strict_threshold=yes"], "only the tokens of Swin"),
    ],
)
def test_refused(configure, decoder, options: list[str], problem: str):
    with pytest.raises(ConfigError, match=problem):
        train(configure(*COMMON, "--methods=trilevel", *options))


@pytest.mark.parametrize("options", [NARROW_PVT, NARROW_SWIN])
def test_a_recipe_switches_checkpointing_on(configure, options: list[str]):
    step = build_step(configure(*options, "--methods=none", "--train.grad_checkpointing=yes"), 5, torch.device("cpu"))
    assert step.model.grad_checkpointing


@pytest.mark.usefixtures("no_report")
def test_strength_varies_the_drop_path_of_models_in_levels_but_not_of_others(configure, decoder):
    options = ["--methods=strength", "--strength.by=budget", "--model.drop_path=0.1", "--budget.length=2steps"]
    with pytest.raises(ConfigError, match="nothing to vary, because the drop path of resnet10t cannot change"):
        train(configure(*options, *IN_LEVELS, "--model.name=resnet10t"))
    assert train(configure(*options, *NARROW_PVT)) == 0
