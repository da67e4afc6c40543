"""timm's own models: their options, the image sizes that they take, and their authors' files of weights."""

from __future__ import annotations

import pytest
import torch

from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model


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
