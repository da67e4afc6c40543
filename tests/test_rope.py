"""Rotary positions: equality with rotations by complex numbers, geometry, and the parts of the model they meet."""

from __future__ import annotations

import cmath
from dataclasses import replace

import pytest
import torch
from narrow_models import narrow
from timm.layers.pos_embed_sincos import init_random_2d_freqs

from vitlocal.errors import ConfigError
from vitlocal.models.block import attention_weights
from vitlocal.models.counts import activation_bytes, count_macs
from vitlocal.models.rope import mixed_frequencies, rope_constant, rotate, rotations
from vitlocal.models.shape import grow, set_shape
from vitlocal.plan import Growth, Shape

NAME = "vitlocal_tiny_patch8_64"
KINDS = ("axial", "mixed")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def slow_rotation(tokens, frequencies, coordinates):
    """Multiplies each pair of channels (M, T, d) by exp(i·angle), one number after the other."""
    found = torch.empty_like(tokens)
    for head, token in torch.cartesian_prod(torch.arange(len(tokens)), torch.arange(tokens.shape[1])).tolist():
        column, row = coordinates[token]
        for pair in range(tokens.shape[2] // 2):
            angle = column * frequencies[head][0][pair] + row * frequencies[head][1][pair]
            turned = complex(*tokens[head, token, 2 * pair : 2 * pair + 2].tolist()) * cmath.exp(1j * angle)
            found[head, token, 2 * pair : 2 * pair + 2] = torch.tensor([turned.real, turned.imag])
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_rotations_equal_complex_numbers(kind):
    heads, width, theta, grid = 2, 16, 50.0, (2, 3)
    own = mixed_frequencies(heads, width, theta) if kind == "mixed" else None
    axial = (width, theta) if kind == "axial" else None
    tokens = torch.randn(1, heads, 7, width)
    table = rotations(rope_constant(grid, grid, None, 1, axial, CPU), own, None, 6)
    zeros = [0.0] * (width // 4)
    waves = [theta ** (-4 * k / width) for k in range(width // 4)]  # the paper's equation 6
    frequencies = [[waves + zeros, zeros + waves]] * heads if own is None else own.tolist()
    coordinates = [(0, 0)] + [(column, row) for row in range(2) for column in range(3)]  # first a class token
    expected = slow_rotation(tokens[0], frequencies, coordinates)[None]
    torch.testing.assert_close(rotate(tokens, table), expected, rtol=1e-5, atol=1e-5)
    real = rotate(tokens.double(), table)  # the form without complex numbers
    torch.testing.assert_close(real.float(), expected, rtol=1e-5, atol=1e-5)
    half = rotate(tokens.bfloat16(), table)
    assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.05


def test_mixed_frequencies_are_the_papers():
    torch.manual_seed(3)
    ours = mixed_frequencies(4, 32, 10.0)
    torch.manual_seed(3)
    theirs = init_random_2d_freqs(32, 1, 4, temperature=10.0)  # (2 axes, depth, heads, d/2)
    torch.testing.assert_close(ours, theirs[:, 0].transpose(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_depend_on_offsets_only(kind):
    grid, width = (5, 6), 16
    own = mixed_frequencies(1, width, 10.0) if kind == "mixed" else None
    shared = rope_constant(grid, grid, None, 0, (width, 10.0) if kind == "axial" else None, CPU)
    query, key = torch.randn(2, 1, 1, 1, width).unbind(0)
    table = rotations(shared, own, None, 30)
    scores = (rotate(query.expand(1, 1, 30, -1), table) @ rotate(key.expand(1, 1, 30, -1), table).mT).view(5, 6, 5, 6)
    torch.testing.assert_close(scores[1:, 2:, 1:, 2:], scores[:-1, :-2, :-1, :-2], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores[0, 0, 1, 0], scores[0, 0, 0, 1])


def test_coordinates_count_from_patch_centers():
    scaled = rope_constant((4, 2), (8, 8), None, 2, None, CPU)[..., 0]
    assert scaled[:2].tolist() == [[0, 0]] * 2  # prefix tokens
    assert scaled[2:].tolist() == [[x, y] for y in (0.5, 2.5, 4.5, 6.5) for x in (1.5, 5.5)]
    assert rope_constant((2, 2), (2, 2), None, 0, None, CPU)[..., 0].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    whole, window = (rope_constant((6, 6), (6, 6), side, 0, None, CPU) for side in (None, 2))
    assert torch.equal(window, whole.unflatten(0, (6, 6))[2:4, 2:4].flatten(0, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_units_are_parts_of_the_image_or_patches(kind):
    images, large = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 112, 112)  # 112 px: 14 × 14 patches
    scaled = narrow(NAME, rope=kind, use_abs_pos_emb=False).eval()
    patches = narrow(NAME, rope=kind, use_abs_pos_emb=False, rope_coordinates="patches").eval()
    other_size = narrow(NAME, rope=kind, use_abs_pos_emb=False, img_size=96).eval()  # as in fine-tuning at 96 px
    for model in (patches, other_size):
        model.load_state_dict(scaled.state_dict())
    with torch.no_grad():
        assert not torch.allclose(scaled(images), patches(images), atol=1e-5)
        torch.testing.assert_close(scaled(large), patches(large))
        torch.testing.assert_close(scaled(images), other_size(images))


def without_rope(model):
    """A model of the same weights that has no rotary positions."""
    twin = narrow(NAME).eval()
    twin.load_state_dict({name: value for name, value in model.state_dict().items() if not name.endswith("freqs")})
    return twin


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [NAME, "vitlocal_deit_tiny_patch8_64", "vitlocal_localvit_tiny_patch8_64"])
def test_every_family_at_every_size(name, kind):
    model = narrow(name, rope=kind)
    for shape in ((16, 16), (64, 64), (24, 40), (96, 64)):
        assert model(torch.randn(2, 3, *shape)).isfinite().all()
    model(torch.randn(4, 3, 32, 32)).square().sum().backward()
    assert all(block.attn.freqs.grad.any() for block in model.blocks if kind == "mixed")
    assert ("blocks.0.attn.freqs" in model.state_dict()) == (kind == "mixed")
    assert count_macs(model, 32) == count_macs(narrow(name), 32)
    assert activation_bytes(model, 32) > 0


def test_frequencies_of_zero_turn_nothing():
    model, images = narrow(NAME, rope="mixed").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(model(images), without_rope(model)(images), atol=1e-5)
        for block in model.blocks:
            block.attn.freqs.zero_()
        torch.testing.assert_close(model(images), without_rope(model)(images))


@pytest.mark.parametrize("kind", KINDS)
def test_dropped_tokens_keep_the_angles_of_the_others(kind):
    """Tokens that were dropped, and tokens that are masked out, are the same to the others."""
    model, images = narrow(NAME, rope=kind, depth=3).eval(), torch.randn(2, 3, 64, 64)
    block = model.blocks[0].attn
    shared = model._shared_rotations(images, torch.empty(2, 65, 32))
    kept = torch.stack([torch.randperm(64)[:20].sort().values for _ in range(2)])
    tokens, places = torch.randn(2, 65, 32), torch.cat([torch.tensor([[0]] * 2), kept + 1], dim=1)
    mask = torch.zeros(2, 1, 65, 65, dtype=torch.bool)
    for image in range(2):
        mask[image, :, :, places[image]] = True
    few = tokens.gather(1, places[..., None].expand(-1, -1, 32))
    dropped, masked = block.rotation(shared, kept, (8, 8)), block.rotation(shared, None, (8, 8))
    whole = block(tokens, mask, masked).gather(1, places[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(block(few, None, dropped), whole, rtol=1e-4, atol=1e-5)
    by_class = block.patch_attention(few, None, 1, dropped)
    weights = attention_weights(*block.project_qkv(few, slice(2), dropped))
    torch.testing.assert_close(by_class, weights.mean(dim=1)[:, 0, 1:])
    model.active = replace(model.active, pruned_blocks=(1,))  # keeps everything
    expected = narrow(NAME, rope=kind, depth=3).eval()
    expected.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images), expected(images), rtol=1e-4, atol=1e-5)
    set_shape(model, Shape(token_keep_rate=0.5, attention_keep_rate=0.5, pruned_blocks=(0, 1)))
    assert model(images).isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_fewer_heads_and_growth(kind):
    model, images = narrow(NAME, rope=kind, num_heads=4).eval(), torch.randn(2, 3, 32, 32)
    one, whole = Shape(heads=(1,)), Shape()
    set_shape(model, one)
    model(images).sum().backward()
    for block in model.blocks if kind == "mixed" else ():
        assert block.attn.freqs.grad[0].any() and not block.attn.freqs.grad[1:].any()
    grow(model, one, whole, Growth(1), lambda parameter: {})
    set_shape(model, whole)
    with torch.no_grad():
        attention = model.blocks[0].attn
        tokens, shared = torch.randn(2, 17, 32), model._shared_rotations(images, torch.empty(2, 17, 32))
        rotation = attention.rotation(shared, None, (4, 4))
        weights = attention_weights(*attention.project_qkv(tokens, slice(2), rotation))
        torch.testing.assert_close(weights[:, 1:], weights[:, :1].expand(-1, 3, -1, -1))  # copies, angles included


@pytest.mark.parametrize("options", [{}, {"center_grid": 3}, {"patch_drop_rate": 0.5}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_grid_train_in_bfloat16_and_with_checkpoints(kind, options):
    model, images = narrow(NAME, rope=kind, **options), torch.randn(4, 3, 48, 48)
    grads = []
    for checkpoints in (False, True):
        model.set_grad_checkpointing(checkpoints)
        torch.manual_seed(5)
        model.zero_grad()
        model(images).square().sum().backward()
        grads.append(model.blocks[0].attn.qkv.weight.grad.clone())
    torch.testing.assert_close(grads[1], grads[0])
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", [pytest.param("axial", marks=pytest.mark.slow), "mixed"])
def test_traced_blocks_have_the_eager_gradients(kind):
    """All blocks share one region of the graph, and the constants of rotary positions are its inputs."""
    options = dict(rope=kind, init_values=0.1, stem="hmlp")
    model, images, found = narrow(NAME, **options), torch.randn(4, 3, 32, 32), []
    model.compiles_blocks_once = True
    for call in (model, torch.compile(model, dynamic=False, backend="aot_eager")):
        model.zero_grad()
        call(images).square().sum().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(rope="2d"), ("rope='2d'", "axial, mixed")),
        (dict(rope_theta=10.0), ("rope_theta=10.0", "None without rope")),
        (dict(rope_coordinates="patches"), ("rope_coordinates='patches'", "None without rope")),
        (dict(rope="axial", rope_coordinates="pixels"), ("rope_coordinates='pixels'", "image, patches")),
        (dict(rope="axial", rope_theta=0.0), ("rope_theta=0.0", "positive")),
        (dict(rope="axial", embed_dim=36), ("rope='axial'", "heads are 18 wide")),
    ],
)
def test_errors_name_the_option(options, words):
    with pytest.raises(ConfigError) as error:
        narrow(NAME, **options)
    assert all(word in str(error.value) for word in words), error.value
