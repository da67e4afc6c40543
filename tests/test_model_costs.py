"""Counts of multiply-accumulates and of the activations that a training step keeps."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vitlocal.models  # noqa: F401 (registers the models)
from vitlocal.models.counts import activation_bytes, count_macs
from vitlocal.models.lffn import LocalFeedForward

FAMILIES = ("vitlocal_tiny_patch16_224", "vitlocal_deit_tiny_patch16_224", "vitlocal_localvit_tiny_patch16_224")


def test_macs_equal_the_published_figures():
    with torch.device("meta"):
        small = timm.create_model("vitlocal_small_patch16_224")
        deit = timm.create_model("vitlocal_deit_small_patch16_224")
    billions = [round(count_macs(small, size) / 1e9, 2) for size in range(32, 225, 32)]
    assert billions == pytest.approx([0.09, 0.36, 0.80, 1.44, 2.27, 3.33, 4.62], abs=0.011)
    assert round(count_macs(deit, 224) / 1e9, 1) == 4.6
    assert small.training and deit.training


@pytest.mark.parametrize("name", [*FAMILIES, "vit_tiny_patch16_224", "resnet10t"])
def test_macs_equal_torchs_counter(name):
    model = timm.create_model(name, num_classes=7).eval()
    # Without fused attention: older counters do not know the CPU's.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 224, 224))
    assert count_macs(model, 224) == counter.get_total_flops() // 2


@pytest.mark.parametrize(("name", "billions"), [("cait_xxs24_224", 2.53), ("vit_base_patch16_siglip_224", 17.73)])
def test_macs_of_models_whose_parts_get_parameters_as_inputs(name: str, billions: float):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert count_macs(model, 224) / 1e9 == pytest.approx(billions, abs=0.03)


def test_macs_count_attention_that_is_not_fused():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    fused = count_macs(model, 224)
    for block in model.blocks:
        block.attn.fused_attn = False
    assert count_macs(model, 224) == fused


@pytest.mark.parametrize("name", ["vitlocal_tiny", "vitlocal_localvit_tiny", "deit_tiny"])
def test_activation_bytes_equal_the_saved_tensors(name: str):
    options = {"dynamic_img_size": True} if name == "deit_tiny" else {}  # timm's model
    model = timm.create_model(f"{name}_patch16_224", depth=2, **options)
    model.train()

    def saved_bytes(count: int) -> int:
        found: dict[int, Tensor] = {}

        def save(tensor: Tensor) -> Tensor:
            found[tensor.untyped_storage().data_ptr()] = tensor  # kept alive, so that no other reuses its memory
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = model(torch.zeros(count, 3, 64, 64)).sum()
        del loss
        return sum(tensor.untyped_storage().nbytes() for tensor in found.values())

    counted = activation_bytes(model, 64)
    assert counted == (saved_bytes(4) - saved_bytes(2)) // 2
    assert activation_bytes(model, 64, torch.bfloat16) < 0.7 * counted
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 1000)  # the model has not changed


def test_macs_do_not_depend_on_the_kernel():
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
