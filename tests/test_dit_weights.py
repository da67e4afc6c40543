"""Weights of a DiT: published files, folders of diffusers, runs, label tables, and exports."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from narrow_dit import CLASSES, narrow_dit, published_positions, some_inputs
from safetensors.torch import load_file, save_file

from vitlocal.errors import ConfigError
from vitlocal.models.dit_weights import LABELS, export_diffusers, load_dit_weights
from vitlocal.models.factory import build_model, export_model, load_weights
from vitlocal.models.shape import add_stage_table, exported_state_dict, set_shape
from vitlocal.plan import Shape, StageEmbedding

NAMES = [f"class {number}" for number in range(CLASSES)]


def published(**options) -> dict[str, torch.Tensor]:
    """The state dict of another model, as facebookresearch/DiT writes it."""
    model = narrow_dit(seed=1, **options)
    return {"pos_embed": published_positions(8)[None], **model.state_dict()}


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if name != "pos_embed"}


def assert_loaded(model: torch.nn.Module, expected: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(model.state_dict(), plain(expected), rtol=0, atol=0)


def test_published_files(tmp_path: Path):
    """The average comes first, then the model; arguments of the training script are no obstacle."""
    state, other = published(), narrow_dit(seed=2).state_dict()
    arguments = argparse.Namespace(model="DiT-XL/2")
    compiled = {f"_orig_mod.module.{name}": tensor for name, tensor in state.items()}
    for content in (
        state, {"model": other, "ema": state, "opt": {"step": 3}, "args": arguments}, {"model": state}, compiled
    ):  # fmt: skip
        torch.save(content, tmp_path / "DiT.pt")
        model = narrow_dit()
        assert load_weights(model, str(tmp_path / "DiT.pt")) == []
        assert_loaded(model, state)
    save_file(state, tmp_path / "DiT.safetensors")
    model = narrow_dit(img_size=256)  # its own position table, whatever the file's
    load_weights(model, str(tmp_path / "DiT.safetensors"))
    assert_loaded(model, state)
    torch.testing.assert_close(model.position_table()[0], published_positions(16))


def test_files_that_hold_no_weights(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere.pt is not there"):
        load_weights(narrow_dit(), str(tmp_path / "nowhere.pt"))
    torch.save({"step": 3}, tmp_path / "other.pt")
    (tmp_path / "text.pt").write_text("no weights")
    (tmp_path / "empty.pt").touch()
    torch.save({"ema": published(), "hook": print}, tmp_path / "function.pt")
    for name in ("other", "text", "empty", "function"):
        with pytest.raises(ConfigError, match=f"{name}.pt cannot be read as weights") as error:
            load_weights(narrow_dit(), str(tmp_path / f"{name}.pt"))
        assert "weights_only" not in str(error.value)  # PyTorch's advice for such a file is to run its code
    assert "could run code" in str(error.value)


def test_label_tables(tmp_path: Path):
    state = published(num_classes=12)
    torch.save(state, tmp_path / "DiT.pt")
    model = narrow_dit()
    assert load_weights(model, str(tmp_path / "DiT.pt"), NAMES) == []
    table = model.state_dict()[LABELS]
    assert torch.equal(table[:CLASSES], state[LABELS][:CLASSES]) and torch.equal(table[-1], state[LABELS][12])
    fresh = narrow_dit()
    before = fresh.state_dict()[LABELS].clone()
    assert load_weights(fresh, str(tmp_path / "DiT.pt"), NAMES, labels="new") == [LABELS]
    assert torch.equal(fresh.state_dict()[LABELS], before)
    assert torch.equal(fresh.state_dict()["x_embedder.proj.weight"], state["x_embedder.proj.weight"])
    larger = narrow_dit(num_classes=13)
    with pytest.raises(ConfigError, match="has 13 rows, the model's 14, .* with diffusion.labels=new"):
        load_weights(larger, str(tmp_path / "DiT.pt"))
    assert load_weights(larger, str(tmp_path / "DiT.pt"), labels="new") == [LABELS]


def test_a_stage_table_of_a_file_is_folded(tmp_path: Path):
    """AutoProg-Zero samples with its last stage, and with no stage where there is no class."""
    model = narrow_dit(seed=1)
    add_stage_table(model, StageEmbedding(rows=5, std=0.5))
    state = dict(model.state_dict())
    state["s_embedder.embedding_table.weight"] = state.pop("stage_table")
    torch.save({"ema": state}, tmp_path / "APZ.pt")
    loaded = narrow_dit()
    load_weights(loaded, str(tmp_path / "APZ.pt"))
    set_shape(model, Shape(stage=3))
    inputs = some_inputs(16)
    torch.testing.assert_close(loaded(*inputs), model(*inputs, inputs[2] == CLASSES), atol=1e-5, rtol=1e-5)


def test_a_new_stage_table_keeps_its_values(tmp_path: Path):
    torch.save(published(), tmp_path / "DiT.pt")
    model = narrow_dit()
    add_stage_table(model, StageEmbedding(rows=3, std=1))
    table = model.stage_table.detach().clone()
    assert load_weights(model, str(tmp_path / "DiT.pt")) == ["stage_table"]
    assert torch.equal(model.stage_table, table)


def test_all_problems_are_named(tmp_path: Path):
    state = published(num_classes=3, learn_sigma=False)
    del state["blocks.1.attn.qkv.weight"]
    state["blocks.7.mlp.fc1.bias"] = torch.zeros(3)
    state["t_embedder.mlp.0.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "DiT.pt")
    with pytest.raises(ConfigError) as error:
        load_weights(narrow_dit(), str(tmp_path / "DiT.pt"))
    for text in (
        "label table has 4 rows",
        "learn_sigma=False",
        "it lacks blocks.1.attn.qkv.weight (of 1)",
        "the model lacks blocks.7.mlp.fc1.bias (of 1)",
        "t_embedder.mlp.0.bias has shape (3,), expected (32,) (of 1)",
    ):
        assert text in str(error.value), (text, str(error.value))
    assert "final_layer" not in str(error.value)
    wider = narrow_dit(embed_dim=64, num_classes=3)
    with pytest.raises(
        ConfigError, match=r"proj.weight has shape \(32, 4, 2, 2\), expected \(64, 4, 2, 2\), .* \(of 39\)"
    ):
        load_weights(wider, str(tmp_path / "DiT.pt"))


# --- runs -------------------------------------------------------------------------------------------------------------


def exported_run(folder: Path, model: Any, name: str = "vitlocal_dit_small_patch2", **arguments: Any) -> None:
    folder.mkdir(exist_ok=True)
    export_model(folder, model, name, arguments, NAMES, size=128, crop_pct=1.0, notes={"scaling_factor": 0.18215})


def test_a_run_is_built_again_from_its_folder(tmp_path: Path):
    model = narrow_dit()
    add_stage_table(model, StageEmbedding(rows=4, std=0.5))
    set_shape(model, Shape(stage=2, block_order=(2, 0)))
    exported_run(tmp_path, model, drop_path_rate=0.0, mlp_ratio=4)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["label_names"] == NAMES and described["scaling_factor"] == 0.18215
    assert not {"mean", "std", "crop_pct", "classifier"} & set(described["pretrained_cfg"])
    assert described["pretrained_cfg"]["input_size"] == [4, 16, 16]
    assert described["model_args"] == dict(img_size=128, patch_size=2, in_chans=4, stride=8, embed_dim=32, depth=2,
                                           num_heads=4, learn_sigma=True, mlp_ratio=4)  # fmt: skip
    again, _ = build_model(described["architecture"], described["model_args"], described["num_classes"])
    assert load_weights(again, str(tmp_path), NAMES) == []
    inputs = some_inputs(16)
    expected = model(*inputs, inputs[2] == CLASSES)
    torch.testing.assert_close(again(*inputs), expected, atol=1e-5, rtol=1e-5)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    torch.testing.assert_close(theirs(*inputs), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ConfigError, match="its depth is 2, the model's 3; .*it lacks blocks.2"):
        load_weights(narrow_dit(), str(tmp_path))
    with pytest.raises(ConfigError, match="its num_heads is 4, the model's 2"):
        load_weights(narrow_dit(depth=2, num_heads=2), str(tmp_path))
    assert "stage_table" not in load_file(tmp_path / "model.safetensors")


def test_classes_that_a_run_names_get_their_rows(tmp_path: Path):
    first = narrow_dit(seed=1)
    exported_run(tmp_path, first)
    table = first.state_dict()[LABELS]
    model = narrow_dit(num_classes=3)
    load_weights(model, str(tmp_path), ["class 7", "class 0", "class 9"])
    assert torch.equal(model.state_dict()[LABELS], table[[7, 0, 9, CLASSES]])
    load_weights(model, str(tmp_path), ["class 7", "another", "class 9"])
    assert torch.equal(model.state_dict()[LABELS], table[[0, 1, 2, CLASSES]])


# --- diffusers --------------------------------------------------------------------------------------------------------


def test_folders_of_diffusers_are_read_as_they_were_written(tmp_path: Path):
    """Needs no diffusers. The label table has 1,001 rows, and row 1,000 is that of no class."""
    model = narrow_dit(seed=1)
    add_stage_table(model, StageEmbedding(rows=3, std=0.5))
    set_shape(model, Shape(stage=1))
    export_diffusers(tmp_path, model, 128, NAMES)
    expected = exported_state_dict(model)
    for folder in (tmp_path, tmp_path / "transformer"):
        loaded = narrow_dit()
        assert load_weights(loaded, str(folder), NAMES) == []
        assert_loaded(loaded, expected)
    fewer = narrow_dit(num_classes=2)
    load_weights(fewer, str(tmp_path), ["class 7", "class 0"])  # the pipeline's folder names the classes
    assert torch.equal(fewer.state_dict()[LABELS], expected[LABELS][[7, 0, -1]])
    index = tmp_path / "model_index.json"
    index.write_text(json.dumps({"id2label": {"first": "class 7", "1": "class 0"}}))  # of no row
    load_weights(fewer, str(tmp_path), ["class 7", "class 0"])
    assert torch.equal(fewer.state_dict()[LABELS], expected[LABELS][[0, 1, -1]])
    whole = narrow_dit(num_classes=1000)
    load_weights(whole, str(tmp_path))
    null = expected[LABELS][-1]
    assert all(torch.equal(row, null) for row in whole.state_dict()[LABELS][CLASSES:])
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    assert state["transformer_blocks.2.norm1.emb.class_embedder.embedding_table.weight"].shape == (1001, 32)
    file.unlink()
    torch.save(state, file.with_suffix(".bin"))
    assert load_dit_weights(narrow_dit(), str(tmp_path)) == []
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    del state["transformer_blocks.0.attn1.to_k.weight"]
    torch.save(state, file.with_suffix(".bin"))
    with pytest.raises(ConfigError) as error:
        load_weights(narrow_dit(num_heads=2, patch_size=4), str(tmp_path))
    for text in (
        "its num_heads is 4, the model's 2",
        "its patch_size is 2, the model's 4",
        "its blocks have different t_embedder.mlp.0",
        "blocks.0.attn.qkv.weight has shape (64, 32)",
    ):
        assert text in str(error.value), (text, str(error.value))


def test_models_that_the_pipeline_cannot_hold(tmp_path: Path):
    for options, text in (
        (dict(num_classes=1001), "has 1001 classes"),
        (dict(stride=1, img_size=16), "makes images"),
        (dict(mlp_ratio=2), "hidden width is 64"),
        (dict(convolution=True), "feed-forward parts have convolutions"),
    ):
        with pytest.raises(ConfigError, match=f"export to diffusers: .*{text}"):
            export_diffusers(tmp_path, narrow_dit(**options), 128, NAMES)
    with pytest.raises(ConfigError, match="holds no autoencoder"):
        export_diffusers(tmp_path, narrow_dit(), 128, NAMES, autoencoder=tmp_path)
    (tmp_path / "config.json").write_text('{"latent_channels": 16}')
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match="has 16 channels, and the model 4"):
        export_diffusers(tmp_path, narrow_dit(), 128, NAMES, autoencoder=tmp_path)


def small_autoencoder(folder: Path) -> None:
    from diffusers import AutoencoderKL

    torch.manual_seed(3)
    sizes = dict(block_out_channels=(16, 32, 32, 32), latent_channels=4, norm_num_groups=8, layers_per_block=1)
    blocks = dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    AutoencoderKL(**sizes, **blocks).save_pretrained(folder)


def test_pipeline_of_diffusers(tmp_path: Path):
    """The exported transformer equals ours if it has our timestep frequencies; diffusers computes others."""
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (the extra diffusion)")
    model, inputs = narrow_dit(), some_inputs(16)
    add_stage_table(model, StageEmbedding(rows=3, std=0.5))
    set_shape(model, Shape(stage=1, block_order=(1, 0)))
    small_autoencoder(tmp_path / "autoencoder")
    export_diffusers(tmp_path / "out", model, 128, NAMES, autoencoder=tmp_path / "autoencoder")
    pipe = diffusers.DiTPipeline.from_pretrained(tmp_path / "out", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    expected = model(*inputs, inputs[2] == CLASSES)
    theirs = torch.where(inputs[2] == CLASSES, 1000, inputs[2])

    def difference() -> torch.Tensor:
        with torch.no_grad():
            return (pipe.transformer(inputs[0], inputs[1], theirs).sample - expected).abs().amax(dim=(1, 2, 3))

    changed = difference()
    assert changed[inputs[1] == 999] > 1e-3 and changed[inputs[1] == 0] < 1e-5
    for block in pipe.transformer.transformer_blocks:
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    assert difference().max() < 1e-5
    assert pipe.labels == {name: row for row, name in enumerate(NAMES)}
    assert not pipe.scheduler.config.clip_sample and pipe.scheduler.config.steps_offset == 0
    images = pipe(class_labels=[3, 9], num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 128, 128, 3) and images.std() > 0


def test_weights_of_a_diffusers_model(tmp_path: Path):
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers (the extra diffusion)")
    torch.manual_seed(5)
    theirs = diffusers.DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=3, sample_size=16,
        num_embeds_ada_norm=CLASSES, norm_eps=1e-6,
    ).eval()  # fmt: skip
    for number, block in enumerate(theirs.transformer_blocks):
        block.norm1.emb.time_proj.downscale_freq_shift = 0
        if number:
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    theirs.save_pretrained(tmp_path / "transformer")
    model, inputs = narrow_dit(), some_inputs(16)
    assert load_weights(model, str(tmp_path)) == []
    torch.testing.assert_close(model(*inputs), theirs(*inputs).sample, atol=1e-5, rtol=1e-5)
