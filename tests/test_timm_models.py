"""timm's own models: their options, the image sizes that they take, and their authors' files of weights."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model, load_weights
from vitlocal.train.build import configure_model, make_model
from vitlocal.train.build_checks import check_image_sizes


def without_data(name: str, classes: int = 5, **arguments) -> torch.nn.Module:
    with torch.device("meta"):
        return build_model(name, dict(img_size=64, drop_path_rate=0.0) | arguments, classes)[0]


@pytest.mark.parametrize("name", ["efficientvit_b0", "efficientvit_m0", "repvit_m0_9", "vgg11", "hrnet_w18_small"])
def test_models_without_drop_path(name: str):
    assert without_data(name).num_classes == 5


def test_models_with_drop_path_have_it():
    assert without_data("resnet10t", drop_path_rate=0.1).layer4[0].drop_path.drop_prob == pytest.approx(0.1)


def test_options_that_a_model_lacks_are_named_with_the_remedy():
    for name in ("repvit_m0_9", "hrnet_w18_small"):  # two kinds of TypeError
        with pytest.raises(ConfigError, match=f"{name} has no option drop_path_rate: set model.drop_path=0"):
            without_data(name, drop_path_rate=0.1)
    for name in ("repvit_m0_9", "resnet10t"):
        with pytest.raises(ConfigError, match=f"{name} has no option patch_size: set model.patch_size=none"):
            without_data(name, patch_size=8)


SIZES = ["--methods=image_size", "--image_size.init=32", "--image_size.step_pixels=16"]


@pytest.mark.parametrize(
    ("name", "options", "problem"),
    [
        ("cait_xxs24_224", [*SIZES, "--evaluate.size=48"], "evaluate.size 48: .*48 px .*; use evaluate.size=64, or"),
        (
            "maxvit_pico_rw_256",
            SIZES,
            "image_size 32: .*32 px .*; state other sizes in the options of image_size, or remove it",
        ),
        ("levit_128s", SIZES, "image_size 32: levit_128s takes no images of 32 px"),
        (
            "efficientformer_l1",
            ["--methods=none"],
            "model.size 64: .*64 px .*; use another model.size, such as its own 224",
        ),
    ],
)
def test_sizes_that_a_model_cannot_take_are_refused_before_training(name: str, options: list[str], problem: str, capfd):
    config = read_config([f"--model.name={name}", "--model.size=64", *options], {})
    with pytest.raises(ConfigError, match=problem):
        make_model(config, 5, torch.device("meta"))
    assert capfd.readouterr().err == ""  # PyTorch's record of the operator that failed is not the user's


def test_models_that_take_several_sizes_are_not_refused():
    for name in ("resnet10t", "test_vit", "pvt_v2_b0"):
        make_model(read_config([f"--model.name={name}", "--model.size=64", *SIZES], {}), 5, torch.device("meta"))


@torch.no_grad()
def test_trying_sizes_does_not_change_the_model():
    """CoaT's blocks share modules."""
    model, _ = build_model("coat_lite_tiny", dict(img_size=64, drop_path_rate=0.0), 5)
    before, images = copy.deepcopy(model.eval()), torch.rand(2, 3, 64, 64)
    config = read_config(["--model.name=coat_lite_tiny", "--model.size=64", "--methods=none"], {})
    for _ in range(2):
        check_image_sizes(config, model)
    assert torch.equal(model(images), before(images))


def test_sizes_that_the_fused_kernel_cannot_take_are_refused_before_the_run():
    words = [
        "--model.name=vitlocal_tiny_patch8_64",
        "--methods=none",
        "--train.kernel=fused",
        "--evaluate.size=136",
        "--model.size=64",
    ]
    model, _ = build_model("vitlocal_tiny_patch8_64", dict(img_size=64), 5)
    with pytest.raises(ConfigError, match="fused is for grids of up to 16 columns, and evaluate.size 136 makes 17"):
        check_image_sizes(read_config(words, {}), model)


SWIN = "swin_tiny_patch4_window7_224"


def renamed(state: dict[str, Tensor], *patterns: tuple[str, object]) -> dict[str, Tensor]:
    for pattern, name in patterns:
        state = {re.sub(pattern, name, key): value for key, value in state.items()}
    return state


def before(found: re.Match) -> str:
    return f"layers.{int(found[1]) - 1}.downsample"


def after(name: str):
    """Counts the levels from 1, as in PVTv2's names."""
    return lambda found: name.format(int(found[1]) + 1)


PVTS_NAMES = (
    (r"^patch_embed", "patch_embed1"), (r"^stages\.(\d)\.downsample", after("patch_embed{}")),
    (r"^stages\.(\d)\.blocks", after("block{}")), (r"^stages\.(\d)\.norm", after("norm{}")),
    (r"dwconv", "dwconv.dwconv"),
)  # fmt: skip
SWINS_NAMES = ((r"layers\.(\d)\.downsample", before), (r"^head\.fc", "head"))
CONVNEXTS_NAMES = (
    (r"^stem", "downsample_layers.0"), (r"stages\.(\d)\.downsample", r"downsample_layers.\1"), (r"\.blocks", ""),
    ("conv_dw", "dwconv"), (r"mlp\.fc", "pwconv"), (r"^head\.norm", "norm"), (r"^head\.fc", "head"),
)  # fmt: skip


def small_model(name: str, classes: int = 5, size: int = 64) -> torch.nn.Module:
    options = dict(embed_dim=24) if name == SWIN else {}
    return build_model(name, dict(img_size=size, drop_path_rate=0.0) | options, classes)[0]


@pytest.mark.parametrize(
    ("name", "names"), [("pvt_v2_b0", PVTS_NAMES), (SWIN, SWINS_NAMES), ("test_convnext", CONVNEXTS_NAMES)]
)
def test_files_of_the_authors_load(name: str, names, tmp_path: Path):
    """Also if their head has other classes."""
    state = small_model(name).state_dict()
    theirs = renamed(state, *names)
    if name == SWIN:  # has buffers that timm computes
        theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(4, 4, dtype=torch.int64)
        theirs["layers.0.blocks.1.attn_mask"] = torch.zeros(64, 4, 4)
    assert not state.keys() <= theirs.keys()
    torch.save({"model": theirs}, tmp_path / "theirs.pth")
    for classes, kept in ((5, 0), (7, 2)):
        model = small_model(name, classes)
        new = load_weights(model, str(tmp_path / "theirs.pth"))
        assert len(new) == kept and all("head" in key for key in new)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items() if key not in new)


def test_tables_in_files_of_swins_authors_are_fitted_as_in_other_files(tmp_path: Path):
    """The windows at 224 px are larger than those at 64 px."""
    state, models = small_model(SWIN, size=224).state_dict(), []
    for place, content in enumerate((state, renamed(state, *SWINS_NAMES))):
        torch.save(content, tmp_path / f"{place}.pth")
        models.append(small_model(SWIN))
        assert load_weights(models[-1], str(tmp_path / f"{place}.pth")) == []
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_model_that_cannot_checkpoint_says_so():
    model = timm.create_model("pit_ti_224", num_classes=5)
    with pytest.raises(ConfigError, match="train.grad_checkpointing: PoolingVisionTransformer does not support it"):
        configure_model(model, "auto", True, torch.device("cpu"))


def test_files_of_other_models_are_still_refused(tmp_path: Path):
    torch.save(timm.create_model("test_resnet", num_classes=5).state_dict(), tmp_path / "resnet.pth")
    for name in ("test_convnext", "test_vit", SWIN):
        with pytest.raises(ConfigError, match="belongs to another model"):
            load_weights(small_model(name), str(tmp_path / "resnet.pth"))
