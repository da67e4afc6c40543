"""timm's own model that computes the same as a trained DeiT, so that an export loads without vitlocal."""

import re
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

from vitlocal.models.deit import DeiT
from vitlocal.models.rope import IMAGE_UNITS, THETA
from vitlocal.models.shape import exported_state_dict

TIMM_DEIT = "vit_small_patch16_224"  # timm's DeiT; its other sizes differ by options
TIMM_ROPE = "vit_small_patch16_rope_224"  # timm's DeiT with rotary positions, another class
# Options of ours that a model of timm's can have, or that only set initial weights.
TIMM_OPTIONS = frozenset(
    "img_size patch_size in_chans embed_dim depth num_heads mlp_ratio qkv_bias pool class_token global_pool "
    "init_values drop_rate proj_drop_rate attn_drop_rate patch_drop_rate train_pos_embed init "
    "pos_embed_init rope rope_theta rope_coordinates use_abs_pos_emb".split()
)


def timm_twin(
    model: nn.Module, name: str, arguments: Mapping[str, Any]
) -> tuple[str, dict[str, Any], dict[str, Tensor]] | None:
    """Returns the name, the options and the state dict of timm's own model that computes the same as a trained DeiT.

    Returns None without one. ``name`` and ``arguments`` are those of our export. It and timm's model are compared, with
    the weights, on the CPU and on random images of two sizes. If anything fails, there is none: an export must not.
    """
    if not isinstance(model, DeiT) or not set(arguments) <= TIMM_OPTIONS:
        return None
    try:
        ours: Any = timm.create_model(name, num_classes=model.num_classes, **arguments).eval()
        state = exported_state_dict(model)
        ours.load_state_dict(state)
        patch, grid = ours.patch_embed.patch_size[0], ours.patch_embed.grid_size
        options = {key: arguments[key] for key in ("qkv_bias", "init_values") if key in arguments} | {
            "img_size": [count * patch for count in grid], "patch_size": patch, "in_chans": ours.in_chans,
            "embed_dim": ours.embed_dim, "depth": len(ours.blocks), "num_heads": ours.blocks[0].attn.num_heads,
            "mlp_ratio": len(state["blocks.0.mlp.fc1.bias"]) / ours.embed_dim, "class_token": ours.has_class_token,
            "global_pool": ours.global_pool, "dynamic_img_size": True,
        }  # fmt: skip
        twin, rope = TIMM_DEIT, arguments.get("rope")
        if rope is None:
            options["fc_norm"] = False
        else:
            twin, state = TIMM_ROPE, _timms_names(state, len(ours.blocks))
            scaled = arguments.get("rope_coordinates") != "patches"
            options |= {
                "use_fc_norm": False, "use_abs_pos_emb": ours.pos_embed is not None,
                "rope_type": "cat" if rope == "axial" else "mixed",
                "rope_temperature": arguments.get("rope_theta") or THETA[rope],
                "ref_feat_shape": IMAGE_UNITS if scaled else None,
            }  # fmt: skip
        theirs: Any = timm.create_model(twin, num_classes=model.num_classes, **options).eval()
        theirs.load_state_dict(state)
        ours, theirs = ours.double(), theirs.double()  # in float64, rounding is too small to matter
        for sides in (grid, [(count + 1) // 2 for count in grid]):
            generator, size = torch.Generator().manual_seed(0), [count * patch for count in sides]
            images = torch.rand(1, ours.in_chans, *size, generator=generator, dtype=torch.float64)
            with torch.inference_mode():
                expected = ours(images)
                # timm computes angles and resamples position tables in float32.
                torch.testing.assert_close(theirs(images), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    except Exception:  # other values, other weights, or another version of timm
        return None
    return twin, options, state


def _timms_names(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Returns the state dict of a DeiT with rotary positions under timm's names.

    timm's models always have LayerScale, so factors of 1 are added to those without.
    """
    named = {re.sub(r"\.ls(\d)\.gamma$", r".gamma_\1", name): value for name, value in state.items()}
    if "blocks.0.attn.freqs" in named:  # those of all blocks become one tensor (2 axes, block, head, d/2)
        frequencies = [named.pop(f"blocks.{index}.attn.freqs") for index in range(depth)]
        named["rope.freqs"] = torch.stack(frequencies).permute(2, 0, 1, 3)
    ones = torch.ones_like(named["norm.weight"])
    return {f"blocks.{index}.gamma_{part}": ones.clone() for index in range(depth) for part in (1, 2)} | named


def own_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the state dict of a timm model with rotary positions under our names; other state dicts as they are."""
    named = {re.sub(r"\.gamma_(\d)$", r".ls\1.gamma", name): value for name, value in state.items()}
    if "rope.freqs" in named:
        for index, part in enumerate(named.pop("rope.freqs").permute(1, 2, 0, 3)):
            named[f"blocks.{index}.attn.freqs"] = part
    return named
