"""timm's own models: their options, the image sizes that they take, and their authors' files of weights."""

from __future__ import annotations

import pytest
import torch

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model
from vitlocal.train.build import make_model


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
        ("maxvit_pico_rw_256", SIZES, "image_size 32: .*32 px .*; remove image_size from methods, or a model that"),
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
