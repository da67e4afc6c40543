"""The model families: registration, sizes, forward and backward passes, options, drop path, and timm's tools."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import timm
import torch
from compilers import needs_cxx
from narrow_models import narrow
from safetensors.torch import save_file

import vitlocal.models
from vitlocal.errors import ConfigError
from vitlocal.models.block import LayerScale
from vitlocal.models.lffn import LocalFFNViT
from vitlocal.models.shape import add_stage_table, set_shape
from vitlocal.plan import StageEmbedding

FAMILIES = ("vitlocal_tiny_patch16_224", "vitlocal_deit_tiny_patch16_224", "vitlocal_localvit_tiny_patch16_224")

RATES = ("drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate", "drop_path_rate")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_registered_names():
    expected = {
        f"vitlocal_{family}{variant}"
        for family in ("", "deit_", "localvit_")
        for variant in ("tiny_patch16_224", "small_patch16_224", "base_patch16_224", "tiny_patch8_64")
    }
    classifiers = set(timm.list_models("vitlocal_*")) - set(timm.list_models("vitlocal_dit_*"))
    assert classifiers == expected | {"vitlocal_tiny_patch4_32"}
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
def test_localvit_has_the_published_parameter_count(name, options, millions):
    with torch.device("meta"):
        count = sum(p.numel() for p in timm.create_model(name, **options).parameters())
    assert round(count / 1e6, 1) == millions


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
def test_patch_sizes_and_grids(name, patch, img_size):
    model = narrow(name, patch_size=patch, img_size=img_size)
    for shape in ((32, 48), (64, 64), (16, 32)):
        assert model(torch.randn(2, 3, *shape)).isfinite().all()


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_do_not_depend_on_the_memory_format(name):
    model = narrow(name).eval()
    images = torch.randn(2, 3, 48, 64)
    last = images.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), model(last), rtol=0, atol=1e-6)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_parameter_has_a_gradient(name, pool):
    model = narrow(name, drop_path_rate=0.2, pool=pool)
    model(torch.randn(8, 3, 64, 64)).square().sum().backward()
    without = {name for name, parameter in model.named_parameters() if not parameter.grad.any()}
    # If the feed-forward part skips the class token, that of the last block does not reach the logits.
    unused = pool == "token" and name != FAMILIES[1]
    assert without == {name for name, _ in model.named_parameters() if unused and name.startswith("blocks.1.mlp.")}


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_autocast_and_a_bfloat16_model(name):
    images = torch.randn(2, 3, 64, 64)
    model = narrow(name, drop_path_rate=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(images).float().sum().backward()
        assert model.positions((4, 4)).dtype == torch.float32
    assert model.pos_embed.grad.dtype == torch.float32
    assert model.to(torch.bfloat16).eval()(images.bfloat16()).dtype == torch.bfloat16


def block_outputs(model, images, dtype):
    """The types of the residual stream after the embedding and after each block, and the logits in float32."""
    found = []
    hooks = [block.register_forward_hook(lambda _, inputs, output: found.extend((inputs[0], output)))
             for block in model.blocks]  # fmt: skip
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        logits = model(images, torch.full((len(images), len(model.blocks), 2), 0.5))  # a noise that drops no branch
    for hook in hooks:
        hook.remove()
    return {tokens.dtype for tokens in found}, logits.float()


@pytest.mark.parametrize("options", [{}, {"pool": "avg"}, {"init_values": 0.5}, {"patch_drop_rate": 0.5},
                                     {"pruned_blocks": (0,), "token_keep_rate": 0.5}], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", FAMILIES)
def test_the_residual_stream_has_the_type_of_autocast(name, options):
    if name == FAMILIES[2] and options.keys() & {"patch_drop_rate", "pruned_blocks"}:
        pytest.skip("LocalViT needs the whole grid")
    model = narrow(name, depth=4, drop_path_rate=0.2, **options)
    images, chosen = torch.randn(8, 3, 64, 64), "patch_drop_rate" in options or "pruned_blocks" in options
    add_stage_table(model, StageEmbedding(rows=2, std=0.02))
    set_shape(model, replace(model.active, stage=0))
    outputs = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        types, outputs[dtype] = block_outputs(model, images, dtype)
        assert types == {dtype}
    if not chosen:  # rounded attention may choose other tokens
        largest = outputs[torch.float32].abs().max()
        assert (outputs[torch.bfloat16] - outputs[torch.float32]).abs().max() < 0.05 * largest


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_float32_is_embedded_and_scaled_without_another_rounding(pool):
    model, images = narrow(pool=pool), torch.randn(2, 3, 64, 64)
    positions = model.positions((4, 4))
    parts = [model.patch_embed(images) + positions[:, -16:]]
    if pool == "token":
        parts.insert(0, (model.cls_token + positions[:, :1]).expand(2, -1, -1))
    assert torch.equal(model.embed(images)[0], torch.cat(parts, dim=1))
    theirs, ours, tokens = timm.layers.LayerScale(32, 0.3), LayerScale(32, 0.3), torch.randn(2, 5, 32)
    assert torch.equal(ours(tokens), theirs(tokens))


@needs_cxx
def test_torch_compile_in_other_programs_has_the_gradients_of_the_eager_model():
    """It does not compile the blocks once: with PyTorch's own options, gradients of PyTorch 2.14 would be wrong."""
    model = narrow("vitlocal_tiny_patch8_64", depth=2).train()
    images, found = torch.randn(4, 3, 64, 64), []
    for call in (model, torch.compile(model)):
        model.zero_grad()
        call(images).square().sum().backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)


def test_deit_equals_timms_deit():
    theirs = timm.create_model("deit_small_patch16_224", pretrained=False).eval()
    ours = timm.create_model("vitlocal_deit_small_patch16_224").eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.05)
        ours.load_state_dict(theirs.state_dict())  # same names, same shapes, no others
        images = torch.randn(2, 3, 224, 224)
        torch.testing.assert_close(ours(images), theirs(images), rtol=0, atol=1e-5)


def test_average_pooling_has_no_class_token():
    model = narrow(pool="avg").eval()
    assert model.cls_token is None and model.pos_embed.shape == (1, 196, 32)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model(images), model.head(model.forward_features(images).mean(1)))


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
        (dict(global_pool="map"), ("global_pool='map'", "'token', 'avg'")),
        (dict(pool="avg", global_pool="token"), ("global_pool='token'", "has no class token")),
        *((dict.fromkeys([rate], 1.0), (f"{rate}=1.0", "< 1")) for rate in RATES),
        (dict(init_values=0.0), ("init_values=0.0", "a positive number, or None")),
        (dict(class_token="no"), ("class_token='no'", "true, false or None")),
        (dict(patch_sise=8), ("patch_sise", "Did you mean patch_size?")),
        (dict(pool="max"), ("pool='max'", "token, avg")),
        (dict(activation="relu"), ("activation='relu'", "h_swish, gelu")),
        (dict(norm="group"), ("norm='group'", "layer, batch")),
        (dict(init="zeros"), ("init='zeros'", "xavier")),
        (dict(convolution="false"), ("convolution='false'", "true or false")),
        (dict(qkv_bias=1), ("qkv_bias=1", "true or false")),
        (dict(depth=0), ("depth=0", "at least 1")),
        (dict(embed_dim=33), ("embed_dim=33", "num_heads=2", "multiple of 2")),
        (dict(mlp_ratio=0), ("mlp_ratio=0", "positive")),
        (dict(img_size=100), ("100x100", "16x16", "use 96x96")),
        (dict(img_size=(32, 32, 32)), ("img_size=(32, 32, 32)", "height and width")),
        (dict(num_classes=-1), ("num_classes=-1", "at least 0")),
    ],
)
def test_error_names_the_wrong_option(options, words):
    with pytest.raises(ConfigError) as error:
        narrow(**options)
    assert all(word in str(error.value) for word in words), error.value


def test_options_of_other_families_are_errors():
    for name in FAMILIES[1:]:
        with pytest.raises(ValueError, match=r"has no option convolution"):
            narrow(name, convolution=False)
    with pytest.raises(ValueError, match=r"se_ratio=0"):
        narrow(FAMILIES[2], se_ratio=0)


def test_wrong_image_shapes_are_errors():
    model = narrow()
    with pytest.raises(ValueError, match=r"72x64: the patch of 16x16 .* use 64x64"):
        model(torch.randn(1, 3, 72, 64))
    with pytest.raises(ValueError, match=r"\(1, 1, 64, 64\): expected \(batch, 3, height, width\)"):
        model(torch.randn(1, 1, 64, 64))


def test_drop_path_rises_with_depth_and_keeps_the_mean():
    model = narrow(depth=3, drop_path_rate=0.4)
    torch.testing.assert_close(model.drop_path_rates, torch.tensor([0.0, 0.2, 0.4]))
    assert "drop_path_rates" not in model.state_dict()
    scales = model.drop_path_scales(20_000, None)
    assert scales.shape == (3, 2, 20_000, 1, 1)
    assert scales[0].eq(1).all()
    torch.testing.assert_close(scales[2].unique(), torch.tensor([0, 1 / 0.6]))
    torch.testing.assert_close(scales.mean((2, 3, 4)), torch.ones(3, 2), rtol=0, atol=0.03)


def test_drop_path_depends_only_on_the_given_noise():
    model = narrow(drop_path_rate=0.5)
    images, noise = torch.randn(4, 3, 32, 32), torch.rand(4, 2, 2)
    whole = model(images, noise)
    parts = torch.cat([model(images[:1], noise[:1]), model(images[1:], noise[1:])])  # as on two devices
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-6)
    assert (model(images, 1 - noise) - whole).abs().max() > 1e-3
    kept = model(images, torch.zeros_like(noise))
    model.drop_path_rates.zero_()  # new rates are written in place
    assert not torch.allclose(kept, model(images, noise))
    torch.testing.assert_close(model(images, noise), model.eval()(images))


def test_timm_interface():
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
        model.reset_classifier(3, "avg")
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model.eval()(images), model.head(model.forward_features(images)[:, 1:].mean(1)))
    assert narrow(num_classes=0)(torch.randn(2, 3, 32, 32)).shape == (2, 32)


@pytest.mark.parametrize("name", FAMILIES)
def test_timm_loads_a_saved_folder(name, tmp_path):
    options = dict(embed_dim=48, num_heads=3, patch_size=8, depth=6, pool="avg", img_size=[64, 48])
    model = timm.create_model(name, num_classes=5, **options)
    images = torch.randn(4, 3, 64, 48)
    model(images)  # changes the BatchNorms' statistics
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


def test_class_of_the_default_family():
    assert isinstance(narrow(), LocalFFNViT)
