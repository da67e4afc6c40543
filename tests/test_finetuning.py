"""Fine-tuning: runs that start from the weights of other runs and models."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from vitlocal.errors import ConfigError, DataError
from vitlocal.models.factory import load_weights
from vitlocal.train.build import open_run
from vitlocal.train.command import train

pytestmark = pytest.mark.usefixtures("no_report")


def test_fine_tuning_starts_from_weights(configure, decoder, tmp_path: Path):
    """Weights from the folder of a run, for other classes and another grid, and the errors of wrong weights."""
    train(configure("--budget.length=1ep", f"--run.folder={tmp_path}/first"))
    weights = load_file(tmp_path / "first" / "model.safetensors")
    with open_run(configure(f"--model.weights={tmp_path}/first", f"--run.folder={tmp_path}/a")) as run:
        trainer = run.trainer
        mine = trainer.state.model.state_dict()
        assert all(torch.equal(mine[name], weights[name]) for name in weights) and run.new_weights == []
    fewer = {name: tensor for name, tensor in weights.items()}
    fewer["head.weight"], fewer["head.bias"] = torch.zeros(7, 32), torch.zeros(7)
    torch.save(fewer, tmp_path / "seven.pth")
    with open_run(configure(f"--model.weights={tmp_path}/seven.pth", f"--run.folder={tmp_path}/b")) as run:
        trainer = run.trainer
        assert run.new_weights == ["head.weight", "head.bias"]
        assert torch.equal(
            trainer.state.model.state_dict()["blocks.0.attn.qkv.weight"], weights["blocks.0.attn.qkv.weight"]
        )
    options = [f"--model.weights={tmp_path}/first", "--model.size=64", f"--run.folder={tmp_path}/c"]
    with open_run(configure(*options)) as run:
        trainer = run.trainer
        table = trainer.state.model.pos_embed
        assert table.shape[1] == 65 and torch.equal(table[:, :1], weights["pos_embed"][:, :1])
    for folder, problem in (("nowhere", "is not there"), ("first/classes.json", "cannot be read as weights")):
        with pytest.raises((ConfigError, DataError), match=problem):
            train(configure(f"--model.weights={tmp_path}/{folder}", f"--run.folder={tmp_path}/d"))
    with pytest.raises(ConfigError, match="use the options that the weights were trained with"):
        train(configure(f"--model.weights={tmp_path}/first", "--model.width=64", f"--run.folder={tmp_path}/d"))
    with pytest.raises(ConfigError, match=r"another model. That run has --model.name=.* --model.depth="):
        train(configure(f"--model.weights={tmp_path}/first", "--model.depth=5", f"--run.folder={tmp_path}/d"))
    assert not (tmp_path / "d").exists()


def test_timms_own_model_is_fine_tuned_from_its_file(configure, decoder, tmp_path: Path):
    """The model has registers and a class token, another size and other classes. Its blocks are unfrozen in stages."""
    theirs = timm.create_model("test_vit", num_classes=7, img_size=64, reg_tokens=3)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    mine = timm.create_model("test_vit", num_classes=20, img_size=48, reg_tokens=3)
    assert load_weights(mine, str(tmp_path / "theirs.pth")) == ["head.weight", "head.bias"]
    assert mine.pos_embed.shape == (1, 4 + 9, 64) and torch.equal(mine.pos_embed[:, :4], theirs.pos_embed[:, :4])
    plain = timm.create_model("test_vit", num_classes=7, img_size=64).state_dict()
    torch.save(plain, tmp_path / "plain.pth")
    options = ["--model.name=test_vit", "--model.depth=none", "--model.width=none", "--model.heads=none",
               f"--model.weights={tmp_path}/plain.pth", "--methods=unfreeze", "--unfreeze.stage_embedding=no",
               "--unfreeze.stages=3", "--unfreeze.schedule=1@32px,2@48px,3@48px",
               "--train.weight_decay=0.5"]  # fmt: skip
    with open_run(configure("--budget.length=3ep", *options)) as run:
        trainer = run.trainer
        assert run.new_weights == ["head.weight", "head.bias"]
        while (plan := trainer.plan()).shape.trainable_blocks is not None:
            with trainer.open_pass(plan) as batches:
                trainer.train_step(next(batches), plan)
        assert trainer.state.clock.step == 8 and plan.feed.size == 48
        moved = {
            slot for slot in range(6) for name, value in trainer.state.model.blocks[slot].state_dict().items()
            if not torch.equal(value, plain[f"blocks.{slot}.{name}"])
        }  # fmt: skip
        assert moved == {0, 1, 3, 4}  # the blocks of the last group keep the loaded weights
    with pytest.raises(ConfigError, match="cannot have a stage embedding"):
        train(configure(*options, "--unfreeze.stage_embedding=yes", f"--run.folder={tmp_path}/unfrozen"))
