"""Token selection: counts, masks, gradients, and equality with the whole model if nothing is dropped."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch

from vitlocal.models.block import attention_weights
from vitlocal.models.counts import count_macs
from vitlocal.models.local_mix import local_mix, plain_local_mix
from vitlocal.models.shape import set_shape, temporary_shape
from vitlocal.models.token_selection import (
    ALL_TOKENS,
    RemainingTokens,
    attention_mask,
    gather_tokens,
    keep_count,
    patch_scores,
    prune_tokens,
    scatter_tokens,
)
from vitlocal.plan import WHOLE_MODEL, Shape

FAMILIES = ("vitlocal_tiny_patch8_64", "vitlocal_deit_tiny_patch8_64")


def small_model(name: str, **options):
    torch.manual_seed(0)
    sizes = dict(embed_dim=32, depth=4, num_heads=2, num_classes=5)
    return timm.create_model(name, **(sizes | options)).eval()


@pytest.mark.parametrize(
    ("kept", "counts", "gmacs"),
    [(1.0, [196] * 3, 4.60), (0.9, [177, 160, 144], 3.99), (0.8, [157, 126, 101], 3.44), (0.7, [138, 97, 68], 3.00),
     (0.5, [98, 49, 25], 2.28)],
)  # fmt: skip
def test_counts_and_macs_equal_the_published_figures(kept: float, counts: list[int], gmacs: float):
    found, count = [], 196
    for _ in range(3):
        count = keep_count(count, kept)
        found.append(count)
    assert found == counts
    with torch.device("meta"):
        model = timm.create_model("vitlocal_deit_small_patch16_224")
    macs = []
    for attended in (1.0, 0.1):
        with temporary_shape(
            model, Shape(token_keep_rate=kept, attention_keep_rate=attended, pruned_blocks=(3, 6, 9)), WHOLE_MODEL
        ):
            macs.append(count_macs(model, 224))
    assert macs[0] / 1e9 == pytest.approx(gmacs, rel=0.01)
    # Beside the fused attention: the class token's row chooses tokens, and the whole map chooses connections.
    lengths = [1 + patches for patches in (196, *counts[:2])]
    rows = sum(lengths) if kept < 1 else 0
    assert macs[1] - macs[0] == 384 * (sum(length**2 for length in lengths) - rows)


def rates(tokens: float, attention: float, per_head_masks: bool = False) -> Shape:
    return Shape(token_keep_rate=tokens, attention_keep_rate=attention, per_head_masks=per_head_masks)


def attention(batch: int = 2, tokens: int = 10, heads: int = 3) -> torch.Tensor:
    return torch.rand(batch, heads, tokens, tokens, generator=torch.Generator().manual_seed(0)).softmax(dim=-1)


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_mask_keeps_the_strongest_connections(num_prefix_tokens: int):
    seen = attention()
    mask = attention_mask(seen, 0.3, num_prefix_tokens)
    assert mask.shape == (2, 3, 10, 10) and mask.dtype == torch.bool and not mask.requires_grad
    patches, inner = 10 - num_prefix_tokens, mask[..., num_prefix_tokens:, num_prefix_tokens:]
    assert torch.equal(inner.sum(dim=3), torch.full((2, 3, patches), keep_count(patches, 0.3)))
    if num_prefix_tokens:
        assert mask[..., 0, :].all() and mask[..., 0].all()
    kept = seen[..., num_prefix_tokens:, num_prefix_tokens:].masked_fill(~inner, 2).min(dim=3).values
    lost = seen[..., num_prefix_tokens:, num_prefix_tokens:].masked_fill(inner, 0).max(dim=3).values
    assert (kept >= lost).all()


@pytest.mark.parametrize("num_prefix_tokens", [0, 1])
def test_a_second_mask_keeps_no_more_than_its_rate(num_prefix_tokens: int):
    """Attention that was masked before has many equal zeros. Each row still keeps ⌈rate · n⌉."""
    seen = attention(tokens=16)
    before = attention_mask(seen, 0.25, num_prefix_tokens)
    masked = seen.masked_fill(~before, 0)
    _, left = prune_tokens(
        torch.randn(2, 16, 3), masked, RemainingTokens(None, before), rates(0.5, 0.25, True), num_prefix_tokens
    )
    patches = left.mask.shape[-1] - num_prefix_tokens
    assert (left.mask[..., num_prefix_tokens:, num_prefix_tokens:].sum(dim=3) == keep_count(patches, 0.25)).all()
    if num_prefix_tokens:
        assert left.mask[..., 0, :].all() and left.mask[..., 0].all()


def test_one_mask_for_all_heads_or_one_per_head():
    tokens, seen = torch.randn(2, 10, 3), attention()
    _, shared = prune_tokens(tokens, seen, ALL_TOKENS, rates(0.6, 0.5), 1)
    _, own = prune_tokens(tokens, seen, ALL_TOKENS, rates(0.6, 0.5, True), 1)
    assert shared.mask.shape == (2, 1, 7, 7) and own.mask.shape == (2, 3, 7, 7)
    assert torch.equal(shared.indices, own.indices)  # both keep the same tokens
    for image, places in enumerate(own.indices):
        rows = torch.cat([torch.zeros(1, dtype=torch.int64), places + 1])
        among = seen[image][:, rows][:, :, rows]
        assert torch.equal(attention_mask(among[None], 0.5, 1)[0], own.mask[image])
        assert torch.equal(attention_mask(among.mean(dim=0)[None, None], 0.5, 1)[0], shared.mask[image])
    assert not torch.equal(own.mask[:, 0], own.mask[:, 1])
    model, images = small_model(FAMILIES[0]), torch.randn(2, 3, 64, 64)
    set_shape(model, Shape(token_keep_rate=0.5, attention_keep_rate=0.25, pruned_blocks=(1,)))
    by_all = model(images)
    set_shape(model, Shape(token_keep_rate=0.5, attention_keep_rate=0.25, per_head_masks=True, pruned_blocks=(1,)))
    assert model(images).isfinite().all() and not torch.allclose(model(images), by_all)


def test_kept_tokens_have_the_highest_scores():
    tokens, seen = torch.arange(20.0).view(2, 10, 1).expand(2, 10, 3), attention()
    left, selected = prune_tokens(tokens, seen, ALL_TOKENS, rates(0.5, 1.0), 1)
    best = seen.mean(dim=1)[:, 0, 1:].topk(5, dim=1).indices.sort(dim=1).values
    assert torch.equal(selected.indices, best) and selected.mask is None
    assert torch.equal(left[:, 0], tokens[:, 0]) and torch.equal(left[:, 1:], gather_tokens(tokens[:, 1:], best))
    again, twice = prune_tokens(left, attention(2, 6), selected, rates(0.5, 0.5), 1)
    assert again.shape == (2, 4, 3) and twice.mask.shape == (2, 1, 4, 4)
    assert all(set(row.tolist()) < set(before.tolist()) for row, before in zip(twice.indices, best, strict=True))
    assert torch.equal(again[:, 1:], gather_tokens(tokens[:, 1:], twice.indices))  # indices count in the whole grid


def test_scatter_inverts_gather():
    tokens, places = torch.randn(2, 3, 4), torch.tensor([[0, 2, 7], [1, 4, 8]])
    grid = scatter_tokens(tokens, places, 9)
    assert torch.equal(gather_tokens(grid, places), tokens) and grid.count_nonzero() == tokens.count_nonzero()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_keeping_everything_equals_the_whole_model(name: str, pool: str):
    """The slower path, which keeps every token and every connection, gives the same logits."""
    model, images = small_model(name, pool=pool), torch.randn(2, 3, 64, 64)
    expected = model(images)
    model.active = replace(model.active, pruned_blocks=(1, 2))
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_selection_adds_no_gradients(name: str):
    """If everything is kept, the gradients equal those of the whole model."""
    model, images = small_model(name, pool="avg"), torch.randn(2, 3, 64, 64)
    model(images).sum().backward()
    whole = {key: p.grad.clone() for key, p in model.named_parameters()}
    model.zero_grad()
    set_shape(
        model, Shape(attention_keep_rate=0.999, pruned_blocks=(1,))
    )  # this mask keeps everything: ⌈0.999 · 64⌉ is 64
    model(images).sum().backward()
    for key, p in model.named_parameters():
        torch.testing.assert_close(p.grad, whole[key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("heads", [1, 2])
def test_masked_attention(heads: int):
    """Masked weights are zero, the others sum to 1, and the fused attention computes the same."""
    block = small_model(FAMILIES[0]).blocks[0].attn
    tokens, mask = torch.randn(3, 9, 32), torch.rand(3, heads, 9, 9) < 0.4
    mask |= torch.eye(9, dtype=torch.bool)
    query, key, value = block.project_qkv(tokens)
    attention = attention_weights(query, key, mask)
    merged = block.proj((attention @ value).transpose(1, 2).flatten(2))
    assert attention.masked_select(~mask.expand_as(attention)).count_nonzero() == 0
    torch.testing.assert_close(attention.sum(dim=-1), torch.ones(3, 2, 9))
    torch.testing.assert_close(block(tokens, mask), merged, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(block(tokens), merged, atol=1e-3)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_equal_those_of_the_whole_attention(pool: str, masked: bool):
    """The class token's row, or the sum of all rows, has the scores of a written-out attention."""
    model = small_model(FAMILIES[1], pool=pool)
    attn, prefix = model.blocks[0].attn, model.num_prefix_tokens
    tokens = torch.randn(3, 20 + prefix, 32)
    mask = (torch.rand(3, 2, 20 + prefix, 20 + prefix) < 0.5) | torch.eye(20 + prefix, dtype=torch.bool)
    query, key, _ = attn.project_qkv(tokens)
    rows = slice(1 if prefix else None)
    own = attention_weights(query[:, :, rows], key, mask[:, :, rows] if masked else None)
    products = (query.double() @ key.double().mT) / 4  # heads are 16 wide
    whole = (products.masked_fill(~mask, -torch.inf) if masked else products).softmax(dim=-1).mean(dim=1)
    expected = (whole[:, 0] if prefix else whole.sum(dim=1))[:, prefix:]
    scores = patch_scores(own, prefix)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-8)
    left, kept = prune_tokens(tokens, own, ALL_TOKENS, rates(0.5, 1.0), prefix)
    assert torch.equal(kept.indices, expected.topk(10, dim=1).indices.sort(dim=1).values)
    assert torch.equal(left[:, prefix:], gather_tokens(tokens[:, prefix:], kept.indices))


@pytest.mark.parametrize("name", FAMILIES)
def test_pruned_blocks_compile_without_graph_breaks(name: str):
    model, images = small_model(name, depth=2), torch.randn(2, 3, 64, 64)
    set_shape(model, Shape(token_keep_rate=0.5, attention_keep_rate=0.25, pruned_blocks=(0,)))
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(images), model(images))


@pytest.mark.parametrize("activation", ["h_swish", "gelu"])
def test_the_convolution_reads_dropped_tokens_as_zeros(activation: str):
    """As with the whole grid, bit for bit: activations of zero are zero."""
    kept = torch.stack([torch.randperm(12)[:7].sort().values for _ in range(2)])
    found = []
    for on_grid in (False, True):
        torch.manual_seed(0)
        tokens, weight = torch.randn(2, 7, 5, requires_grad=True), torch.randn(5, 1, 3, 3, requires_grad=True)
        if on_grid:
            mixed = gather_tokens(plain_local_mix(scatter_tokens(tokens, kept, 12), weight, (3, 4), activation), kept)
        else:
            mixed = local_mix(tokens, weight, (3, 4), activation, kept=kept)
        mixed.square().sum().backward()
        found.append((mixed, tokens.grad, weight.grad))
    for own, expected in zip(*found, strict=True):
        assert torch.equal(own, expected) and expected.any()


@pytest.mark.parametrize("name", FAMILIES)
def test_dropped_tokens_do_not_affect_the_logits(name: str, monkeypatch: pytest.MonkeyPatch):
    """If attention mixes nothing, a patch that the first block drops cannot change the logits."""
    model = small_model(name, pool="avg")
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn.proj.weight)
        torch.nn.init.zeros_(block.attn.proj.bias)
    seen, original = [], type(model.blocks[0]).forward_pruned

    def forward_pruned(self, *operands):
        tokens, left = original(self, *operands)
        seen.append(left.indices[0].tolist())
        return tokens, left

    monkeypatch.setattr(type(model.blocks[0]), "forward_pruned", forward_pruned)
    images, mark = torch.randn(1, 3, 64, 64), 1e-3 * torch.randn(3, 8, 8)
    with torch.no_grad():
        whole = model(images)
        set_shape(model, Shape(token_keep_rate=0.25, pruned_blocks=(0,)))
        narrow_logits = model(images)
        side = model.patch_embed.grid_size[0]
        patch = 64 // side
        gone = min(set(range(side * side)) - set(seen[0]))
        y, x = patch * (gone // side), patch * (gone % side)
        marked = images.clone()
        marked[0, :, y : y + 8, x : x + 8] += mark
        assert torch.equal(model(marked), narrow_logits) and seen[0] == seen[1]
        set_shape(model, Shape())
        assert not torch.equal(model(marked), whole)


def test_attention_variance():
    for pool in ("token", "avg"):
        model, images = small_model(FAMILIES[1], pool=pool), torch.randn(3, 3, 64, 64)
        logits, variance = model.forward_with_attention_variance(images)
        torch.testing.assert_close(logits, model(images))
        assert variance.shape == (3,) and (variance > 0).all() and not variance.requires_grad


def test_attention_variance_does_not_depend_on_the_number_of_patches(monkeypatch: pytest.MonkeyPatch):
    """The same contrast among four times as many patches, each with a quarter of the weight, gives the same value."""
    model, contrast = small_model(FAMILIES[1]), torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    returned = [contrast / contrast.sum(), contrast.repeat(1, 4) / (4 * contrast.sum()), torch.ones(1, 1)]
    monkeypatch.setattr(type(model.blocks[0].attn), "patch_attention", lambda *operands: returned.pop(0))
    few, many, single = (float(model.forward_with_attention_variance(torch.randn(1, 3, 64, 64))[1]) for _ in range(3))
    assert few == pytest.approx(3.5 / 9) and many == pytest.approx(few) and single == 0
