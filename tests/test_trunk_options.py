"""Options of the trunk: LayerScale, no position table, another stem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from narrow_models import narrow

from vitlocal.errors import ConfigError
from vitlocal.models.factory import export_model
from vitlocal.models.shape import add_stage_table, set_shape, set_trainable
from vitlocal.plan import Shape, StageEmbedding
from vitlocal.train.optim import build_optimizer

NAMES = ("vitlocal_tiny_patch8_64", "vitlocal_deit_tiny_patch8_64", "vitlocal_localvit_tiny_patch8_64")
SIZES = dict(embed_dim=32, depth=2, num_heads=2)
ALL = dict(rope="mixed", stem="hmlp", use_abs_pos_emb=False, init_values=0.1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def test_layer_scale_equals_timms():
    options = dict(init_values=0.1, embed_dim=32, depth=3, num_heads=2, num_classes=5)
    ours = timm.create_model("vitlocal_deit_tiny_patch16_224", **options).eval()
    theirs = timm.create_model("deit_tiny_patch16_224", dynamic_img_size=True, **options).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
        ours.load_state_dict(theirs.state_dict())  # the same names and shapes
        for side in (224, 64):
            images = torch.randn(2, 3, side, side)
            torch.testing.assert_close(ours(images), theirs(images), rtol=1e-3, atol=1e-4)
    assert ours.num_prefix_tokens == theirs.num_prefix_tokens == 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_class_token_is_no_patch(name, pool):
    model, images = narrow(name, pool=pool, depth=3).eval(), torch.randn(2, 3, 32, 48)
    first = int(pool == "token")
    tokens = model.forward_features(images)
    assert tokens.shape == (2, first + 24, 32) and model.pos_embed.shape[1] == first + 64
    read = tokens[:, 0] if pool == "token" else tokens.mean(dim=1)
    torch.testing.assert_close(model(images), model.head(read))
    attention = model.forward_with_attention_variance(images)[1]
    assert attention.shape == (2,) and attention.isfinite().all()
    _, (last,) = model.forward_intermediates(images, 1, return_prefix_tokens=True)
    patches, prefix = last if first else (last, None)
    assert patches.shape == (2, 32, 4, 6) and (prefix is None or prefix.shape == (2, 1, 32))
    if name == NAMES[2]:
        return
    expected = model(images)
    model.active = replace(model.active, pruned_blocks=(1,))  # the path that selects tokens, keeping all
    torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-5)
    set_shape(model, Shape(token_keep_rate=0.5, attention_keep_rate=0.5, pruned_blocks=(0, 1)))
    assert model.forward_features(images).shape == (2, first + 6, 32)


@pytest.mark.parametrize("patch, norm", [(8, "layer"), (16, "batch"), (32, "layer")])
def test_the_stem_within_patches(patch, norm):
    model = narrow(NAMES[0], stem="hmlp", patch_size=patch, img_size=64, stem_width=12, stem_norm=norm).eval()
    stem, images = model.patch_embed, torch.randn(2, 3, 64, 32)
    tokens = stem(images)
    assert tokens.shape == (2, 64 // patch * 32 // patch, 32) and tokens.is_contiguous()
    reference = images
    for convolution, layer in zip(stem.convs, stem.norms, strict=True):
        found = convolution(reference).permute(0, 2, 3, 1)
        normed = layer(found.flatten(0, 2)).view_as(found)
        reference = torch.nn.functional.gelu(normed).permute(0, 3, 1, 2)
    torch.testing.assert_close(tokens, stem.proj(reference).flatten(2).mT, rtol=1e-4, atol=1e-5)
    changed = images.clone()
    changed[:, :, :patch, :patch] = 0  # tokens see no other patch
    assert torch.equal(stem(changed)[:, 1:], tokens[:, 1:]) and not torch.equal(stem(changed)[:, 0], tokens[:, 0])
    stem.to(memory_format=torch.channels_last)(images).sum().backward()
    assert all(p.grad.stride() == p.stride() for p in stem.parameters())  # or processes copy gradients, and warn


def test_a_frozen_stem_keeps_its_statistics():
    model = narrow(NAMES[0], stem="hmlp", stem_norm="batch")
    norm, images = model.patch_embed.norms[0], torch.randn(4, 3, 64, 64)
    set_trainable(model, Shape(head_only=True, trainable_blocks=(1,)))
    set_shape(model, Shape(head_only=True, trainable_blocks=(1,)))
    model.train()
    before = norm.running_mean.clone()
    model(images)
    assert torch.equal(norm.running_mean, before)
    set_shape(model, Shape())
    model.train()
    model(images)
    assert not torch.equal(norm.running_mean, before)


@pytest.mark.parametrize("name", NAMES)
def test_all_options_together_train_and_come_back(name, tmp_path):
    model = narrow(name, drop_path_rate=0.2, **ALL)
    assert "pos_embed" not in model.state_dict()
    model.train()(torch.randn(8, 3, 32, 32)).square().sum().backward()
    unused = ("blocks.1.mlp.", "blocks.1.ls2.") if name != NAMES[1] else ()  # see test_models.py
    missing = {n for n, p in model.named_parameters() if not p.grad.any() and not n.startswith(unused)}
    assert not missing
    export_model(tmp_path, model, name, SIZES | ALL, [*"abcdefg"], size=64, crop_pct=0.9)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    images = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model.eval()(images))
    grey = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=1, img_size=96)
    assert grey.patch_embed.convs[0].weight.shape[1] == 1 and grey.patch_embed.grid_size == (12, 12)
    assert {"cls_token", "blocks.1.attn.freqs"} < model.no_weight_decay()
    groups = timm.models.group_parameters(model, model.group_matcher())
    grouped = sorted(name for group in groups.values() for name in group)
    assert grouped == sorted(name for name, _ in model.named_parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_only_matrices_of_blocks_decay_or_go_to_muon(kind):
    model = narrow(NAMES[0], **ALL)
    optimizer = build_optimizer(model, kind, weight_decay=0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(p)] for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    assert not [n for n in decayed if n.endswith(("freqs", "token", "norm.weight", "bias", "gamma"))]
    assert {"patch_embed.convs.0.weight", "patch_embed.proj.weight"} < decayed
    if kind == "muon":
        muon = optimizer.members[1].param_groups[0]["params"]
        assert all(names[id(p)].startswith("blocks.") and p.ndim == 2 for p in muon)


@pytest.mark.parametrize("pool, tokens", [("token", "all"), ("token", "class"), ("avg", "all")])
@pytest.mark.parametrize("table", [True, False])
def test_an_export_contains_the_stage(pool, tokens, table, tmp_path):
    options = dict(pool=pool, use_abs_pos_emb=table)
    model, images = narrow(NAMES[1], **options).eval(), torch.randn(2, 3, 32, 32)
    add_stage_table(model, StageEmbedding(rows=3, std=0.5, tokens=tokens))
    set_shape(model, Shape(stage=1))
    export_model(tmp_path, model, NAMES[1], SIZES | options, [*"abcdefg"], size=64, crop_pct=0.9)
    loaded = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images), rtol=1e-4, atol=1e-5)


def test_sizes_can_change_without_a_table():
    model = narrow(NAMES[0], rope="axial", use_abs_pos_emb=False, stem="hmlp")
    model.set_input_size((96, 64))
    assert model(torch.randn(2, 3, 96, 64)).shape == (2, 7)
    with pytest.raises(ConfigError, match="patch_size=4: expected 8, because"):
        model.set_input_size(64, 4)
    set_trainable(model, Shape(head_only=True))
    assert not any(parameter.requires_grad for parameter in model.patch_embed.parameters())


@pytest.mark.parametrize(
    "options, words",
    [
        (dict(stem="linear"), ("stem='linear'", "patch, hmlp")),
        (dict(stem_width=12), ("stem_width=12", "None without stem=hmlp")),
        (dict(stem="hmlp", stem_width=0), ("stem_width=0", "at least 1")),
        (dict(stem="hmlp", stem_norm="group"), ("stem_norm='group'", "layer, batch")),
        (dict(stem="hmlp", patch_size=4), ("patch_size=4", "8, 16 or 32 with stem=hmlp")),
        (dict(stem="hmlp", patch_size=12, img_size=48), ("patch_size=12", "8, 16 or 32 with stem=hmlp")),
        (dict(use_abs_pos_emb="no"), ("use_abs_pos_emb='no'", "true or false")),
        (dict(use_abs_pos_emb=False, pos_embed_init="sincos"), ("use_abs_pos_emb=False", "options set the table")),
        (dict(use_abs_pos_emb=False, train_pos_embed=False), ("use_abs_pos_emb=False", "options set the table")),
    ],
)
def test_errors_name_the_option(options, words):
    with pytest.raises(ConfigError) as error:
        narrow(NAMES[0], **options)
    assert all(word in str(error.value) for word in words), error.value
