"""DiT: its equations, sizes, stages, shapes and options."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
from narrow_dit import CLASSES, WIDTH, narrow_dit, published_dit, published_positions, some_inputs

from vitlocal.errors import ConfigError
from vitlocal.methods.unfreeze import groups_of
from vitlocal.models.counts import activation_bytes, count_macs, step_bytes
from vitlocal.models.dit import DiT
from vitlocal.models.factory import build_model, patch_side
from vitlocal.models.positions import position_matrix
from vitlocal.models.shape import (
    add_stage_table,
    check_shape,
    exported_state_dict,
    grow,
    model_parts,
    set_shape,
    set_trainable,
)
from vitlocal.plan import WHOLE_MODEL, Growth, ModelParts, Shape, StageEmbedding
from vitlocal.train.optim import block_matrices, build_optimizer


def without_data(name: str, **options) -> DiT:
    with torch.device("meta"):
        return timm.create_model(name, **options)


@pytest.mark.parametrize("side", [8, 16, 24, 32])
def test_output_equals_the_published_equations(side: int):
    model = narrow_dit(img_size=8 * side)
    expected = published_dit(model.state_dict(), *some_inputs(side), published_positions(side // 2))
    torch.testing.assert_close(model(*some_inputs(side)), expected, atol=1e-5, rtol=1e-5)
    assert expected.shape == (5, 8, side, side) and expected.std() > 0.3


def test_other_patches_channels_and_no_variance():
    for options in (dict(patch_size=4, stride=1, in_chans=3, img_size=16), dict(patch_size=8, num_heads=2)):
        model = narrow_dit(learn_sigma=False, **options)
        inputs = some_inputs(16, model.in_chans)
        heads = options.get("num_heads", 4)
        expected = published_dit(model.state_dict(), *inputs, published_positions(16 // options["patch_size"]), heads)
        torch.testing.assert_close(model(*inputs), expected, atol=1e-5, rtol=1e-5)
        assert expected.shape == inputs[0].shape


def test_a_block_with_the_local_feed_forward_part():
    """Fc1, h-swish, the depth-wise convolution on the grid, h-swish, fc2; it has no norm of its own, and no biases."""
    block = narrow_dit(convolution=True).blocks[0]
    tokens, condition, (height, width) = torch.randn(2, 24, WIDTH), torch.randn(2, WIDTH), (4, 6)
    shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
    attended = tokens + gate1 * block.attn(block.norm1(tokens) * (1 + scale1) + shift1)
    hidden = F.hardswish((block.norm2(attended) * (1 + scale2) + shift2) @ block.mlp.fc1.weight.T)
    grid = hidden.mT.unflatten(2, (height, width))
    mixed = F.hardswish(F.conv2d(grid, block.mlp.conv.weight, padding=1, groups=grid.shape[1]))
    expected = attended + gate2 * (mixed.flatten(2).mT @ block.mlp.fc2.weight.T)
    torch.testing.assert_close(block(tokens, condition, (height, width)), expected, atol=1e-5, rtol=1e-5)


def test_other_sizes_read_the_table_through_a_fixed_matrix():
    model = narrow_dit(img_size=256)  # a grid of 16 x 16
    full = published_positions(16)
    for side in (8, 12, 20):
        table = position_matrix((16, 16), (side // 2, side // 2), torch.device("cpu"), torch.float32) @ full
        expected = published_dit(model.state_dict(), *some_inputs(side), table)
        torch.testing.assert_close(model(*some_inputs(side)), expected, atol=1e-5, rtol=1e-5)
    wide = model(torch.randn(2, 4, 8, 16), torch.tensor([1, 2]), torch.tensor([0, 1]))
    assert wide.shape == (2, 8, 8, 16)
    assert not any("pos" in name for name in model.state_dict())


def test_published_sizes_have_the_published_names_and_parameters():
    parts = {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"}
    outside = {"x_embedder.proj", "t_embedder.mlp.0", "t_embedder.mlp.2", "final_layer.linear",
               "final_layer.adaLN_modulation.1"}  # fmt: skip
    layers = outside | {f"blocks.{number}.{part}" for number in range(28) for part in parts}
    names = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    assert set(without_data("vitlocal_dit_xlarge_patch2").state_dict()) == names | {"y_embedder.embedding_table.weight"}
    for name, millions in {"small": 33, "base": 130, "large": 458, "xlarge": 675}.items():  # the paper's table 1
        model = without_data(f"vitlocal_dit_{name}_patch2")
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == pytest.approx(millions, abs=0.5)
        assert all(timm.is_model(f"vitlocal_dit_{name}_patch{patch}") for patch in (4, 8))


@pytest.mark.parametrize(
    "name, size, billions",
    [
        ("xlarge", 64, 7.38), ("xlarge", 128, 29.03), ("xlarge", 192, 65.78), ("xlarge", 256, 118.6),
        ("xlarge", 512, 524.5), ("small", 256, 6.05), ("base", 256, 22.99), ("large", 256, 80.68),
    ],
)  # fmt: skip
def test_multiply_adds(name: str, size: int, billions: float):
    assert count_macs(without_data(f"vitlocal_dit_{name}_patch2"), size) / 1e9 == pytest.approx(billions, rel=0.005)


def test_memory_is_counted():
    model = timm.create_model("vitlocal_dit_tiny_patch4_32", num_classes=CLASSES, depth=2)
    plain = activation_bytes(model, 32)
    assert plain > 2 * 64 * 96 * 4 * 12  # blocks, tokens, width, bytes; at least a dozen vectors of each token
    assert 2 * activation_bytes(model, 32, torch.bfloat16) < 1.3 * plain
    small, large = (step_bytes(model, size, torch.bfloat16, fused=False, compiled=True)[1] for size in (16, 32))
    assert 3.5 < large / small < 5  # four times the tokens, and attention
    model.set_grad_checkpointing()
    assert activation_bytes(model, 32) < plain / 2


def test_initial_weights_are_the_published_ones():
    model = timm.create_model("vitlocal_dit_tiny_patch4_32", num_classes=CLASSES)
    inputs = some_inputs(32, 3)
    assert model(*inputs).abs().max() == 0
    tokens, condition = torch.randn(2, 64, 96), torch.randn(2, 96)
    assert torch.equal(model.blocks[3](tokens, condition, (8, 8)), tokens)
    for weight, bound in (
        (model.blocks[2].attn.qkv.weight, (6 / (96 + 288)) ** 0.5),
        (model.blocks[2].mlp.fc1.weight, (6 / (96 + 384)) ** 0.5),
        (model.x_embedder.proj.weight, (6 / (96 + 48)) ** 0.5),  # as a linear layer, not as a convolution
    ):
        assert 0.99 * bound < weight.abs().max() <= bound and weight.std().item() == pytest.approx(
            bound / 3**0.5, rel=0.05
        )
    for weight in (
        model.y_embedder.embedding_table.weight,
        model.t_embedder.mlp[0].weight,
        model.t_embedder.mlp[2].weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith("bias"))


# --- stages and shapes ------------------------------------------------------------------------------------------------


def staged(**options) -> DiT:
    model = narrow_dit(**options)
    add_stage_table(model, StageEmbedding(rows=5, std=0.5, null_prob=0.1))
    return model


def test_stages_change_the_output():
    model, inputs = staged(), some_inputs(16)
    outputs = []
    for stage in (None, 0, 3):
        set_shape(model, Shape(stage=stage))
        outputs.append(model(*inputs))
    assert (outputs[1] - outputs[0]).abs().max() > 0.01 and (outputs[2] - outputs[1]).abs().max() > 0.01
    no_stage = torch.tensor([True, False, True, False, False])
    mixed = model(*inputs, no_stage)
    torch.testing.assert_close(mixed[no_stage], outputs[0][no_stage], atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[~no_stage], outputs[2][~no_stage], atol=1e-6, rtol=0)
    model.stage_embedding = model.stage_table = None
    before = model(*inputs)
    add_stage_table(model, StageEmbedding(rows=5))  # a standard deviation of 0
    assert torch.equal(model(*inputs), before)


@pytest.mark.parametrize("stage", [3, None])
def test_exported_model_equals_both_branches_of_guidance(stage: int | None):
    """The plain model has no stage table. For no class, it computes what ours computes for no class and no stage."""
    model = staged().double()
    set_shape(model, Shape(stage=stage))
    inputs, times, labels = some_inputs(16)
    inputs = inputs.double()
    exported = exported_state_dict(model)
    assert set(exported) == set(narrow_dit().state_dict()) | {"pos_embed"}
    torch.testing.assert_close(exported["pos_embed"][0], published_positions(8))
    plain = narrow_dit().double()
    plain.load_state_dict({name: tensor for name, tensor in exported.items() if name != "pos_embed"})
    expected = model(inputs, times, labels, labels == CLASSES)
    torch.testing.assert_close(plain(inputs, times, labels), expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(heads=(2,)), Shape(hidden=(48,)), Shape(block_order=(2, 0)), Shape(skipped_blocks=(1,)),
        Shape(heads=(3,), hidden=(100,), block_order=(0, 1, 2), stage=1),
    ],
)  # fmt: skip
def test_exported_model_equals_the_shape(shape: Shape):
    model, inputs = staged(), some_inputs(16)
    whole = model(*inputs)
    check_shape(model, shape)
    set_shape(model, shape)
    expected = model(*inputs, inputs[2] == CLASSES)
    state = exported_state_dict(model)
    found = published_dit(state, *inputs, state.pop("pos_embed")[0])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (expected - whole).abs().max() > 0.01
    set_shape(model, WHOLE_MODEL)
    assert torch.equal(model(*inputs), whole)


@pytest.mark.parametrize(
    "field, shape",
    [
        ("grid", Shape(grid=4)),
        ("crop_before_embedding", Shape(crop_before_embedding=True)),
        ("token_keep_rate", Shape(token_keep_rate=0.5)),
        ("attention_keep_rate", Shape(attention_keep_rate=0.5)),
        ("per_head_masks", Shape(per_head_masks=True)),
        ("pruned_blocks", Shape(pruned_blocks=(1,))),
        ("input_size", Shape(input_size=64)),
    ],
)
def test_refused_shapes(field: str, shape: Shape):
    with pytest.raises(ConfigError, match=f"DiT cannot change {field} to .*: (DiT denoises every patch|latents of)"):
        check_shape(narrow_dit(), shape)
    if field == "input_size":
        check_shape(narrow_dit(stride=1, img_size=16), shape)


def test_shapes_that_the_model_lacks():
    model = narrow_dit()
    assert model_parts(model) == ModelParts(heads=(4,), hidden=(128,), grid=8, depths=(3,))
    for shape, text in (
        (Shape(heads=(5,)), "heads 5"),
        (Shape(hidden=(0,)), "hidden 0"),
        (Shape(block_order=(3,)), "no block 3"),
    ):
        with pytest.raises(ConfigError, match=text):
            check_shape(model, shape)
    with pytest.raises(ConfigError, match="no class token"):
        add_stage_table(model, StageEmbedding(rows=3, tokens="class"))


def test_levels_unfreeze_a_quarter_of_28_blocks_each():
    model = staged(depth=28, embed_dim=16)
    counts = []
    for blocks in groups_of(28, 4, "mod"):
        shape = Shape(trainable_blocks=blocks, head_only=True, stage=0)
        set_shape(model, shape)
        set_trainable(model, shape)
        model.zero_grad()
        model(*some_inputs(16)).square().sum().backward()
        trained = {name for name, p in model.named_parameters() if p.grad is not None}
        counts.append(len({name.split(".")[1] for name in trained if name.startswith("blocks.")}))
        outside = {name.split(".")[0] for name in trained if not name.startswith("blocks.")}
        assert outside == {"final_layer", "stage_table"}
        assert {int(name.split(".")[1]) for name in trained if name.startswith("blocks.")} == set(blocks)
    assert counts == [7, 14, 21, 28]
    fresh = staged(depth=4)
    set_trainable(fresh, Shape(trainable_blocks=(0,)))
    frozen = {name.split(".")[1] for name, p in fresh.named_parameters() if not p.requires_grad}
    assert frozen == {"1", "2", "3"}


def test_growth():
    """New blocks copy others. New heads and hidden units that copy nothing start as a new model's."""
    model = narrow_dit()
    before, after = Shape(heads=(2,), hidden=(64,), block_order=(0, 1)), WHOLE_MODEL
    set_shape(model, before)
    old = model.blocks[1].state_dict()["mlp.fc1.weight"].clone()
    growth = Growth(1, blocks=((2, 1),), weights="random")
    grow(model.to(memory_format=torch.channels_last), before, after, growth, lambda parameter: {})
    assert model.blocks[2].adaLN_modulation[1].weight.abs().max() == 0  # so that the new block changes nothing
    assert torch.equal(model.blocks[1].mlp.fc1.weight[:64], old[:64])
    assert not torch.equal(model.blocks[1].mlp.fc1.weight[64:], old[64:])
    grow(model, before, after, Growth(2, blocks=((2, 1),)), lambda parameter: {})
    assert torch.equal(model.blocks[2].attn.qkv.weight, model.blocks[1].attn.qkv.weight)
    assert torch.equal(model.blocks[1].mlp.fc1.weight[64:], old[:64])


# --- how it runs ------------------------------------------------------------------------------------------------------


def test_bfloat16_autocast():
    model, inputs = narrow_dit(img_size=64), some_inputs(8)
    streams, conditions = [], []
    model.blocks[1].register_forward_pre_hook(lambda block, args: streams.append(args[0].dtype))
    model.blocks[1].register_forward_pre_hook(lambda block, args: conditions.append(args[1]))
    expected = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs)
    assert streams == [torch.float32, torch.bfloat16] and found.dtype == torch.bfloat16
    assert torch.equal(*conditions)  # bfloat16 would round the times 999 and 998 to one
    assert 0 < (found - expected).abs().max() < 0.05 * expected.abs().max()


def test_compiled_and_checkpointed_gradients():
    model, inputs = staged(depth=2).train(), some_inputs(16)
    set_shape(model, Shape(stage=2))
    no_stage = inputs[2] == CLASSES

    def gradients(run) -> dict[str, torch.Tensor]:
        model.zero_grad()
        run(*inputs, no_stage).square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    expected = gradients(model)
    model.compiles_blocks_once = True
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(gradients(compiled), expected, rtol=1e-4, atol=1e-4)
    model.set_grad_checkpointing()
    assert torch.equal(gradients(model)["x_embedder.proj.weight"], expected["x_embedder.proj.weight"])


def test_copies_memory_formats_and_models_without_data():
    model, inputs = narrow_dit(), some_inputs(16)
    expected = model(*inputs)
    assert torch.equal(copy.deepcopy(model)(*inputs), expected)
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    moved = last(inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])
    torch.testing.assert_close(moved, expected, atol=1e-5, rtol=1e-5)
    empty = without_data("vitlocal_dit_small_patch2", img_size=128, embed_dim=WIDTH, depth=3, num_heads=4,
                         num_classes=CLASSES).to_empty(device="cpu")  # fmt: skip
    empty.load_state_dict(model.state_dict())
    assert torch.equal(empty.eval()(*inputs), expected)
    double = copy.deepcopy(model).double()
    torch.testing.assert_close(double(inputs[0].double(), *inputs[1:]).float(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(inputs[0], inputs[1].float(), inputs[2]), expected)


def test_wrong_options_and_inputs():
    for options, texts in (
        (dict(drop_path_rate=0.1), ("drop_path_rate=0.1", "no drop path")),
        (dict(embed_dim=30), ("embed_dim=30", "a multiple of 4")),
        (dict(img_size=100), ("image size 100x100", "16x16 pixels", "2 latents of 8 px", "use 96x96")),
        (dict(learn_sigma="no"), ("learn_sigma='no'", "true or false")),
        (dict(depth=0), ("depth=0", "at least 1")),
        (dict(pool="avg"), ("no option pool", "learn_sigma")),
        (dict(features_only=True), ("vitlocal_dit_small_patch2", "without features_only")),
    ):
        with pytest.raises(ConfigError) as error:
            narrow_dit(**options)
        assert all(text in str(error.value) for text in texts), str(error.value)
    model = narrow_dit()
    with pytest.raises(ConfigError, match="image size 72x72: .* use 64x64"):
        model(*some_inputs(9))
    with pytest.raises(ValueError, match=r"inputs of shape \(5, 3, 16, 16\): expected \(batch, 4, side, side\)"):
        model(*some_inputs(16, 3))
    assert patch_side(model) == 16
    pixels, arguments = build_model("vitlocal_dit_tiny_patch4_32", dict(img_size=48, drop_path_rate=0.0), CLASSES)
    assert patch_side(pixels) == 4 and pixels.num_classes == CLASSES and arguments["img_size"] == 48


def test_optimizer_groups():
    """Only matrices decay, without tables; Muon updates the matrices of the blocks, also those of the modulation."""
    model = staged()
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(model, weight_decay=0.1).param_groups
    free = {names[id(p)] for group in groups for p in group["params"] if group["weight_decay"] == 0}
    assert free == {name for name in names.values() if name.endswith("bias")} | {
        "stage_table", "y_embedder.embedding_table.weight"
    }  # fmt: skip
    parts = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")
    assert set(block_matrices(model)) == {f"blocks.{number}.{part}.weight" for number in range(3) for part in parts}
