"""timm's and PyTorch's tools on our models: programs of torch.export, and the meta device."""

from __future__ import annotations

import pytest
import timm
import torch
from narrow_models import NARROW

from vitlocal.models.positions import _cached_matrix

OURS, DEIT, LOCALVIT = (f"vitlocal_{family}tiny_patch16_224" for family in ("", "deit_", "localvit_"))
PRUNED = dict(token_keep_rate=0.5, attention_keep_rate=0.5, pruned_blocks=(0, 1))


@pytest.mark.filterwarnings("ignore")  # of torch.jit and torch.export themselves
@pytest.mark.parametrize("name, options", [(OURS, PRUNED), (DEIT, PRUNED | dict(pool="avg", per_head_masks=True))])
def test_exported_programs_take_any_batch_size(name, options):
    """The images need another grid than the table: the matrix that resamples it must not be a tracer's."""
    _cached_matrix.cache_clear()
    model = timm.create_model(name, **(NARROW | options)).eval()
    images = torch.randn(5, 3, 64, 64)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    traced = torch.jit.trace(model, images[:2])
    for count in (1, 5):
        expected = model(images[:count])
        assert type(expected) is torch.Tensor
        torch.testing.assert_close(program(images[:count]), expected)
        torch.testing.assert_close(traced(images[:count]), expected)


def test_drop_path_survives_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model(OURS, **(NARROW | dict(drop_path_rate=0.4)))
    other = timm.create_model(OURS, **(NARROW | dict(drop_path_rate=0.4)))
    model.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert torch.equal(model.drop_path_rates, torch.tensor([0.0, 0.4]))
    images, noise = torch.randn(4, 3, 64, 64), torch.rand(4, 2, 2)
    torch.testing.assert_close(model(images, noise), other(images, noise))
    model.set_drop_path(0.2)
    assert model.to(torch.float64).drop_path_rates[1] == pytest.approx(0.2)  # moves keep what was set
