"""The model families: shapes, counts, the local FFN, position tables, options and timm's machinery."""

from __future__ import annotations

import copy
import json

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitlocal.models
from vitlocal.errors import ConfigError
from vitlocal.models.flops import count_macs
from vitlocal.models.lffn import LocalFeedForward, LocalFFNViT
from vitlocal.models.local_mix import image_as_tokens, local_mix, tokens_as_image
from vitlocal.models.memory import activation_bytes
from vitlocal.models.vit import position_matrix

CPU = torch.device("cpu")
FAMILIES = (
    "vitlocal_tiny_patch16_224",
    "vitlocal_deit_tiny_patch16_224",
    "vitlocal_localvit_tiny_patch16_224",
)
NARROW = dict(embed_dim=32, depth=2, num_heads=2, num_classes=7)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def narrow(name="vitlocal_tiny_patch16_224", **options):
    """A registered model, but 32 wide and 2 deep."""
    return timm.create_model(name, **(NARROW | options))


def h_swish(x):
    return x * F.relu6(x + 3) / 6


# Registration, counts


def test_the_registered_names():
    expected = {
        f"vitlocal_{family}{variant}"
        for family in ("", "deit_", "localvit_")
        for variant in ("tiny_patch16_224", "small_patch16_224", "base_patch16_224", "tiny_patch8_64")
    }
    assert set(timm.list_models("vitlocal_*")) == expected | {"vitlocal_tiny_patch4_32"}
    assert vitlocal.__version__ == "0.1.0"


@pytest.mark.parametrize(
    "name, count",
    [
        ("vitlocal_deit_tiny_patch16_224", 5_717_416),
        ("vitlocal_deit_small_patch16_224", 22_050_664),
        ("vitlocal_deit_base_patch16_224", 86_567_656),
        # The released model has 46,080 more in BatchNorms that it never uses.
        ("vitlocal_small_patch16_224", 22_050_664 + 12 * (9 * 1536 - 3 * 384 - 1536 - 384)),
    ],
)
def test_parameter_counts(name, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in timm.create_model(name).parameters()) == count


@pytest.mark.parametrize(
    "name, options, millions",
    [
        ("vitlocal_localvit_tiny_patch16_224", {}, 5.9),
        ("vitlocal_localvit_tiny_patch16_224", {"se_ratio": 4}, 9.4),
        ("vitlocal_localvit_small_patch16_224", {}, 22.4),
    ],
)
def test_localvit_has_the_published_size(name, options, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in timm.create_model(name, **options).parameters())
    assert round(count / 1e6, 1) == millions


def test_macs_are_the_published_ones():
    with torch.device("meta"):
        small = timm.create_model("vitlocal_small_patch16_224")
        deit = timm.create_model("vitlocal_deit_small_patch16_224")
    billions = [round(count_macs(small, size) / 1e9, 2) for size in range(32, 225, 32)]
    assert billions == pytest.approx([0.09, 0.36, 0.80, 1.44, 2.27, 3.33, 4.62], abs=0.011)
    assert round(count_macs(deit, 224) / 1e9, 1) == 4.6
    assert small.training and deit.training and not small._position_matrices


@pytest.mark.parametrize("name", [*FAMILIES, "vit_tiny_patch16_224", "resnet10t"])
def test_macs_agree_with_torchs_counter(name):
    model = timm.create_model(name, num_classes=7).eval()
    # Attention written out: older counters do not know the CPU's fused one.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert count_macs(model, 224) == counter.get_total_flops() // 2


def test_macs_count_attention_that_is_written_out():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    fused = count_macs(model, 224)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert count_macs(model, 224) == fused


# Forward and backward


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", FAMILIES)
def test_forward_at_every_size(name, pool):
    model = narrow(name, pool=pool)
    for size in range(32, 225, 32):
        assert model(torch.randn(2, 3, size, size)).shape == (2, 7)
    assert model(torch.randn(2, 3, 64, 96)).shape == (2, 7)
    tokens = model.forward_features(torch.randn(2, 3, 64, 96))
    assert tokens.shape == (2, 24 + (pool == "token"), 32)
    assert model.forward_head(tokens, pre_logits=True).shape == (2, 32)


@pytest.mark.parametrize("patch, img_size", [(4, 32), (8, (32, 48)), (16, 64)])
@pytest.mark.parametrize("name", FAMILIES)
def test_other_patches(name, patch, img_size):
    model = narrow(name, patch_size=patch, img_size=img_size)
    for shape in ((32, 48), (64, 64), (16, 32)):
        assert model(torch.randn(2, 3, *shape)).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_memory_format_changes_nothing(name):
    model = narrow(name).eval()
    images = torch.randn(2, 3, 48, 64)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), model(last), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_gradient(name, pool):
    model = narrow(name, drop_path_rate=0.2, pool=pool)
    model(torch.randn(8, 3, 64, 64)).square().sum().backward()
    still = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    # Where the class token passes by the feed-forward part, the last block's does not reach the logits.
    dead = pool == "token" and name != FAMILIES[1]
    assert still == {name for name, _ in model.named_parameters() if dead and name.startswith("blocks.1.mlp.")}


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_autocast_and_a_bfloat16_model(name):
    images = torch.randn(2, 3, 64, 64)
    model = narrow(name, drop_path_rate=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images).float().sum().backward()
        assert model.positions((4, 4)).dtype == torch.float32
    assert model.pos_embed.grad.dtype == torch.float32
    assert model.to(torch.bfloat16).eval()(images.bfloat16()).dtype == torch.bfloat16


def test_deit_agrees_with_timms():
    theirs = timm.create_model("deit_small_patch16_224", pretrained=False).eval()
    ours = timm.create_model("vitlocal_deit_small_patch16_224").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.05)
        ours.load_state_dict(theirs.state_dict())  # same names, same shapes, nothing left over
        images = torch.randn(2, 3, 224, 224)
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


# The local FFN


def test_seq2im_and_im2seq_are_views():
    tokens = torch.randn(2, 12, 8)
    image = tokens_as_image(tokens, (3, 4))
    assert image.shape == (2, 8, 3, 4)
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert image.data_ptr() == tokens.data_ptr()
    back = image_as_tokens(image)
    assert back.data_ptr() == tokens.data_ptr() and torch.equal(back, tokens)
    assert torch.equal(image[1, :, 2, 1], tokens[1, 2 * 4 + 1])


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_the_convolution_reads_and_writes_tokens_as_they_lie(pool, monkeypatch):
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


def test_local_mix_agrees_with_a_plain_loop():
    tokens = torch.randn(2, 12, 5, dtype=torch.float64)
    weight = torch.randn(5, 1, 3, 3, dtype=torch.float64)
    padded = F.pad(h_swish(tokens).view(2, 3, 4, 5), (0, 0, 1, 1, 1, 1))
    expected = torch.zeros(2, 3, 4, 5, dtype=torch.float64)
    for row in range(3):
        for column in range(3):
            expected += padded[:, row : row + 3, column : column + 4] * weight[:, 0, row, column]
    torch.testing.assert_close(local_mix(tokens, weight, (3, 4)), h_swish(expected).view(2, 12, 5))


def test_a_delta_kernel_leaves_the_linear_layers_and_activations():
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
def test_the_class_token_passes_by(name, scale):
    block = narrow(name).blocks[0]
    tokens = torch.randn(2, 13, 32)
    factor = None if scale is None else torch.full((2, 1, 1), scale)
    after = block.feed_forward(tokens, (3, 4), factor)
    assert torch.equal(after[:, 0], tokens[:, 0])
    assert (after[:, 1:] != tokens[:, 1:]).any(-1).all()
    patches = block.feed_forward(tokens[:, 1:].contiguous(), (3, 4), factor)  # as without a class token
    torch.testing.assert_close(after[:, 1:], patches, rtol=0, atol=1e-6)


def test_biases_are_where_the_released_code_has_them():
    block = narrow().blocks[0]
    biased = {name for name, parameter in block.named_parameters() if name.endswith("bias")}
    assert biased == {"norm1.bias", "attn.proj.bias", "mlp.norm.bias"}
    assert narrow(qkv_bias=True).blocks[0].attn.qkv.bias is not None
    assert narrow(FAMILIES[1]).blocks[0].attn.qkv.bias is not None


# Options


def test_each_ablation_changes_what_it_says():
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


def test_average_pooling_has_no_class_token():
    model = narrow(pool="avg").eval()
    assert model.cls_token is None and model.pos_embed.shape == (1, 196, 32)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), model.head(model.forward_features(images).mean(1)))


def test_a_frozen_position_table_has_no_gradient():
    model = narrow(train_position=False)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert not model.pos_embed.requires_grad and model.pos_embed.grad is None
    assert model.cls_token.grad is not None


def test_initial_weights():
    wide = dict(embed_dim=384, depth=1, num_heads=6, num_classes=1000)
    xavier = timm.create_model("vitlocal_small_patch16_224", init="xavier", **wide)
    deit = timm.create_model("vitlocal_small_patch16_224", **wide)
    stds = {
        "pos_embed": (2 / (197 * 384 + 384)) ** 0.5,  # 0.005
        "cls_token": (1 / 384) ** 0.5,  # 0.05
        "blocks.0.attn.qkv.weight": (1 / 384) ** 0.5,  # as three layers
        "blocks.0.attn.proj.weight": (1 / 384) ** 0.5,
        "blocks.0.mlp.fc1.weight": (2 / (5 * 384)) ** 0.5,
        "head.weight": (2 / 1384) ** 0.5,
    }
    for name, std in stds.items():
        assert xavier.get_parameter(name).std().item() == pytest.approx(std, rel=0.1)
        assert deit.get_parameter(name).std().item() == pytest.approx(0.02, rel=0.1)
    assert xavier.head.bias.abs().max() > 0 and not deit.head.bias.any()


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(global_pool="avg"), ("global_pool", "Did you mean pool?")),
        (dict(patch_sise=8), ("patch_sise", "Did you mean patch_size?")),
        (dict(pool="max"), ("pool='max'", "token, avg")),
        (dict(activation="relu"), ("activation='relu'", "h_swish, gelu")),
        (dict(norm="group"), ("norm='group'", "layer, batch")),
        (dict(init="zeros"), ("init='zeros'", "xavier")),
        (dict(convolution="false"), ("convolution='false'", "true or false")),
        (dict(qkv_bias=1), ("qkv_bias=1", "true or false")),
        (dict(depth=0), ("depth=0", "at least 1")),
        (dict(embed_dim=33), ("embed_dim=33", "num_heads=2", "multiple of 2")),
        (dict(drop_path_rate=1.0), ("drop_path_rate=1.0", "< 1")),
        (dict(mlp_ratio=0), ("mlp_ratio=0", "positive")),
        (dict(img_size=100), ("100x100", "16x16", "use 96x96")),
        (dict(img_size=(32, 32, 32)), ("img_size=(32, 32, 32)", "height and width")),
        (dict(num_classes=-1), ("num_classes=-1", "at least 0")),
    ],
)
def test_a_wrong_option_is_named(options, words):
    with pytest.raises(ConfigError) as error:
        narrow(**options)
    assert all(word in str(error.value) for word in words), error.value


def test_an_option_of_another_family_is_refused():
    for name in FAMILIES[1:]:
        with pytest.raises(ValueError, match=r"has no option convolution"):
            narrow(name, convolution=False)
    with pytest.raises(ValueError, match=r"se_ratio=0"):
        narrow(FAMILIES[2], se_ratio=0)


def test_wrong_images_are_refused():
    model = narrow()
    with pytest.raises(ValueError, match=r"72x64: the patch of 16x16 .* use 64x64"):
        model(torch.randn(1, 3, 72, 64))
    with pytest.raises(ValueError, match=r"\(1, 1, 64, 64\): expected \(batch, 3, height, width\)"):
        model(torch.randn(1, 1, 64, 64))


# Drop path


def test_drop_path_rises_over_depth_and_keeps_the_mean():
    model = narrow(depth=3, drop_path_rate=0.4)
    torch.testing.assert_close(model.drop_path_rates, torch.tensor([0.0, 0.2, 0.4]))
    assert "drop_path_rates" not in model.state_dict()
    scales = model.drop_path_scales(20_000, None)
    assert scales.shape == (3, 2, 20_000, 1, 1)
    assert scales[0].eq(1).all()
    torch.testing.assert_close(scales[2].unique(), torch.tensor([0, 1 / 0.6]))
    torch.testing.assert_close(scales.mean((2, 3, 4)), torch.ones(3, 2), rtol=0, atol=0.03)


def test_drop_path_follows_the_noise_that_it_is_given():
    model = narrow(drop_path_rate=0.5)
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 2, 2)
    whole = model(images, noise)
    parts = torch.cat([model(images[:1], noise[:1]), model(images[1:], noise[1:])])  # as on two devices
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)
    assert (model(images, 1 - noise) - whole).abs().max() > 1e-3
    kept = model(images, torch.zeros_like(noise))
    model.drop_path_rates.zero_()  # a change of rates is a write
    assert not torch.allclose(kept, model(images, noise))
    torch.testing.assert_close(model(images, noise), model.eval()(images))


# Position tables


@pytest.mark.parametrize("grid", [(2, 2), (4, 4), (13, 13), (14, 14), (20, 20), (3, 9)])
def test_the_position_matrix_is_pytorchs_resize(grid):
    matrix = position_matrix((14, 14), grid, CPU, torch.float64)
    table = torch.randn(196, 5, dtype=torch.float64)
    image = table.t().view(1, 5, 14, 14)
    expected = F.interpolate(image, size=grid, mode="bicubic", antialias=True, align_corners=False)
    torch.testing.assert_close(matrix @ table, expected.view(5, -1).t(), rtol=0, atol=1e-12)
    single = position_matrix((14, 14), grid, CPU, torch.float32)
    torch.testing.assert_close(single.double(), matrix, rtol=0, atol=1e-7)
    torch.testing.assert_close(single.sum(1), torch.ones(len(matrix)), rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", [2, 4, 6, 8, 10, 12, 14])
def test_only_the_tables_own_grid_comes_back_as_it_was(side: int):
    """Resampled to a smaller grid and back, as the released code does around each evaluation."""
    there = position_matrix((14, 14), (side, side), CPU, torch.float64)
    back = position_matrix((side, side), (14, 14), CPU, torch.float64)
    whole = torch.eye(196, dtype=torch.float64)
    assert torch.allclose(back @ there, whole, atol=1e-9) == (side == 14)


def test_a_table_of_another_shape_is_read_in_order():
    model = narrow(img_size=(48, 80))  # 3 x 5
    with torch.no_grad():
        rows = torch.arange(3.0)[:, None].expand(3, 5)
        model.pos_embed[0, 1:] = rows.reshape(15, 1)
    read = model.positions((6, 10))[0, 1:, 0].view(6, 10)
    assert (read.diff(dim=0) > 0).all() and read.diff(dim=1).abs().max() < 1e-5


def test_the_table_is_one_parameter_at_every_size():
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


def test_cached_matrices_survive_copies_casts_and_inference_mode():
    images = torch.randn(2, 3, 64, 64)
    model = narrow()
    with torch.inference_mode():
        model.eval()(images)
    model.train()(images).sum().backward()  # an inference tensor could not be saved for this
    twin = copy.deepcopy(model).eval()
    assert torch.equal(twin(images), model.eval()(images))
    torch.testing.assert_close(twin.double()(images.double()).float(), model(images), rtol=0, atol=1e-5)
    assert len(model._position_matrices) == 1 and len(twin._position_matrices) == 2


def test_torch_compile_takes_the_whole_model():
    model = narrow(depth=1, drop_path_rate=0.3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    noise = torch.rand(2, 1, 2)
    for size in (32, 48):  # at the second, PyTorch tries sizes as symbols
        images = torch.randn(2, 3, size, size)
        fast, slow = compiled(images, noise), model(images, noise)
        torch.testing.assert_close(fast, slow, rtol=0, atol=1e-6)
        grads = [torch.autograd.grad(out.square().sum(), model.pos_embed)[0] for out in (fast, slow)]
        torch.testing.assert_close(*grads, rtol=0, atol=1e-5)
    torch._dynamo.reset()


# timm's machinery


def test_what_timm_expects():
    for name in FAMILIES:
        model = narrow(name)
        cfg = model.pretrained_cfg
        assert model.default_cfg is cfg and cfg["architecture"] == name
        assert cfg["classifier"] == "head" and cfg["input_size"] == (3, 224, 224)
        assert cfg["mean"] == timm.data.IMAGENET_DEFAULT_MEAN and cfg["std"] == timm.data.IMAGENET_DEFAULT_STD
        assert isinstance(model.get_submodule(cfg["first_conv"]), torch.nn.Conv2d)
        assert model.get_classifier() is model.head
        assert model.no_weight_decay() == {"pos_embed", "cls_token"}
        groups = timm.models.group_parameters(model, model.group_matcher())
        assert sorted(name for group in groups.values() for name in group) == sorted(
            name for name, _ in model.named_parameters()
        )
        model.reset_classifier(3)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 3) and model.num_classes == 3
        model.reset_classifier(0)
        assert model(torch.randn(2, 3, 32, 32)).shape == (2, 32)
        with pytest.raises(ValueError, match="pool='token'"):
            model.reset_classifier(3, "avg")
    assert narrow(num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_saved_folder_loads_by_timm(name, tmp_path):
    options = dict(embed_dim=48, num_heads=3, patch_size=8, depth=6, pool="avg", img_size=[64, 48])
    model = timm.create_model(name, num_classes=5, **options)
    images = torch.randn(4, 3, 64, 48)
    model(images)  # moves the BatchNorms' statistics
    save_file(model.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = dict(
        architecture=name,
        num_classes=5,
        model_args=options,
        label_names=list("abcde"),
        pretrained_cfg=dict(model.pretrained_cfg, num_classes=5, input_size=[3, 64, 48]),
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert type(loaded) is type(model) and loaded.num_classes == 5
    assert list(loaded.pretrained_cfg["label_names"]) == list("abcde")
    with torch.no_grad():
        assert torch.equal(loaded.eval()(images), model.eval()(images))
        assert loaded(torch.randn(1, 3, 32, 32)).shape == (1, 5)
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=9)
    assert tuned.head.weight.shape == (9, 48) and torch.equal(tuned.pos_embed, model.pos_embed)


def test_the_class_is_the_familys():
    assert isinstance(narrow(), LocalFFNViT)


@pytest.mark.parametrize("name", ["vitlocal_tiny", "vitlocal_localvit_tiny", "deit_tiny"])
def test_activations_are_counted_as_they_are_kept(name: str):
    options = {"dynamic_img_size": True} if name == "deit_tiny" else {}  # timm's
    model = timm.create_model(f"{name}_patch16_224", depth=2, **options)
    model.train()

    def kept(count: int) -> int:
        found: dict[int, Tensor] = {}

        def note(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = model(torch.zeros(count, 3, 64, 64)).sum()
        del loss
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    counted = activation_bytes(model, 64)
    assert counted == (kept(4) - kept(2)) // 2
    assert activation_bytes(model, 64, torch.bfloat16) < 0.7 * counted
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)  # and the model is as it was


def test_counting_looks_through_the_fused_kernel():
    model = timm.create_model("vitlocal_tiny_patch16_224", depth=2)
    expected = count_macs(model, 64)
    for part in model.modules():
        if isinstance(part, LocalFeedForward):
            part.kernel = "fused"
    assert count_macs(model, 64) == expected
    assert {part.kernel for part in model.modules() if isinstance(part, LocalFeedForward)} == {"fused"}


def test_the_fused_kernel_keeps_no_more_than_deit():
    ours, deit = (timm.create_model(f"vitlocal_{name}tiny_patch16_224", depth=2) for name in ("", "deit_"))
    fused, plain = (activation_bytes(ours, 224, torch.bfloat16, fused=fused) for fused in (True, False))
    assert fused < 1.01 * activation_bytes(deit, 224, torch.bfloat16) < plain
