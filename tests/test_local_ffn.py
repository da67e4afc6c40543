"""The local feed-forward part: views, convolution, biases and ablations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from narrow_models import narrow

import vitlocal.models  # noqa: F401 (registers the models)
from vitlocal.models.local_mix import image_as_tokens, local_mix, tokens_as_image

FAMILIES = ("vitlocal_tiny_patch16_224", "vitlocal_deit_tiny_patch16_224", "vitlocal_localvit_tiny_patch16_224")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def h_swish(x):
    return x * F.relu6(x + 3) / 6


def test_tokens_and_images_are_views_of_each_other():
    tokens = torch.randn(2, 12, 8)
    image = tokens_as_image(tokens, (3, 4))
    assert image.shape == (2, 8, 3, 4)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert image.data_ptr() == tokens.data_ptr()
    back = image_as_tokens(image)
    assert back.data_ptr() == tokens.data_ptr() and torch.equal(back, tokens)
    assert torch.equal(image[1, :, 2, 1], tokens[1, 2 * 4 + 1])


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_convolution_does_not_copy_tokens(pool, monkeypatch):
    model = narrow(pool=pool)
    seen = []
    convolve = F.conv2d

    def spy(image, *args, **kwargs):
        result = convolve(image, *args, **kwargs)
        if kwargs.get("groups", 1) > 1:
            seen.append((image, result))
        return result

    monkeypatch.setattr(F, "conv2d", spy)
    model(torch.randn(2, 3, 48, 64))
    assert len(seen) == 2
    for image in (image for pair in seen for image in pair):
        assert image.is_contiguous(memory_format=torch.channels_last)
        assert image_as_tokens(image).data_ptr() == image.data_ptr()


def test_local_mix_equals_a_plain_loop():
    tokens = torch.randn(2, 12, 5, dtype=torch.float64)
    weight = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    padded = F.pad(h_swish(tokens).view(2, 3, 4, 5), (0, 0, 1, 1, 1, 1))
    expected = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            expected += padded[:, row : row + 3, column : column + 4] * weight[:, 0, row, column]
    torch.testing.assert_close(local_mix(tokens, weight, (3, 4)), h_swish(expected).view(2, 12, 5))


def test_identity_convolution_leaves_linear_layers_and_activations():
    mlp = narrow().blocks[0].mlp
    with torch.no_grad():
        mlp.conv.weight.zero_()
        mlp.conv.weight[:, 0, 1, 1] = 1
    patches = torch.randn(2, 12, 32)
    normed = F.layer_norm(patches, (32,), mlp.norm.weight, mlp.norm.bias, eps=1e-6)
    expected = h_swish(h_swish(normed @ mlp.fc1.weight.t())) @ mlp.fc2.weight.t()
    torch.testing.assert_close(mlp(patches, (3, 4)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("scale", [None, 2.0])
@pytest.mark.parametrize("name", [FAMILIES[0], FAMILIES[2]])
def test_the_feed_forward_part_skips_the_class_token(name, scale):
    block = narrow(name).blocks[0]
    tokens = torch.randn(2, 13, 32)
    factor = None if scale is None else torch.full((2, 1, 1), scale)
    after = block.feed_forward(tokens, (3, 4), factor)
    assert torch.equal(after[:, 0], tokens[:, 0])
    assert (after[:, 1:] != tokens[:, 1:]).any(-1).all()
    patches = block.feed_forward(tokens[:, 1:].contiguous(), (3, 4), factor)  # as without a class token
    torch.testing.assert_close(after[:, 1:], patches, rtol=0, atol=1e-6)


def test_biases_as_in_the_released_code():
    block = narrow().blocks[0]
    biased = {name for name, parameter in block.named_parameters() if name.endswith("bias")}
    assert biased == {"norm1.bias", "attn.proj.bias", "mlp.norm.bias"}
    assert narrow(qkv_bias=True).blocks[0].attn.qkv.bias is not None
    assert narrow(FAMILIES[1]).blocks[0].attn.qkv.bias is not None


def test_each_ablation_changes_only_its_part():
    def kinds(**options):
        return {name: type(module).__name__ for name, module in narrow(**options).named_modules()}

    plain = kinds()
    batch = {name: "BatchNorm1d" for name in plain if name.endswith("mlp.norm")}
    assert len(batch) == 2 and kinds(norm="batch") == plain | batch
    assert kinds(convolution=False) == {k: v for k, v in plain.items() if not k.endswith("mlp.conv")}
    assert narrow(mlp_ratio=2).blocks[0].mlp.fc1.weight.shape == (64, 32)

    mlp = narrow(convolution=False).blocks[0].mlp
    patches = torch.randn(2, 12, 32)
    torch.testing.assert_close(mlp(patches, (3, 4)), mlp.fc2(h_swish(mlp.fc1(mlp.norm(patches)))))

    mlp = narrow(norm="batch").blocks[0].mlp
    normed = (patches - patches.mean((0, 1))) / (patches.var((0, 1), unbiased=False) + 1e-5).sqrt()
    expected = mlp.fc2(local_mix(mlp.fc1(normed), mlp.conv.weight, (3, 4)))
    torch.testing.assert_close(mlp(patches, (3, 4)), expected, rtol=0, atol=1e-5)

    mlp = narrow(activation="gelu").blocks[0].mlp
    hidden = F.gelu(mlp.fc1(mlp.norm(patches)))
    hidden = F.gelu(image_as_tokens(mlp.conv(tokens_as_image(hidden, (3, 4)))))
    torch.testing.assert_close(mlp(patches, (3, 4)), mlp.fc2(hidden))
