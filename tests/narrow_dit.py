"""A small DiT with random weights for the tests, and DiT's published equations without any of our modules."""

from __future__ import annotations

import math

import timm
import torch
import torch.nn.functional as F
from torch import Tensor

from vitlocal.models.dit import DiT

WIDTH, HEADS, CLASSES = 32, 4, 10


def narrow_dit(name: str = "vitlocal_dit_small_patch2", seed: int = 0, **options) -> DiT:
    """A model of width 32 in evaluation mode. Its initial weights would make every output zero, so all are random."""
    torch.manual_seed(seed)
    defaults = dict(img_size=128, embed_dim=WIDTH, depth=3, num_heads=HEADS, num_classes=CLASSES)
    model = timm.create_model(name, **defaults | options)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return model.eval()


def some_inputs(side: int, channels: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, times and labels of five samples. The last two have no class."""
    inputs = torch.randn(5, channels, side, side, generator=torch.Generator().manual_seed(side))
    return inputs, torch.tensor([0, 1, 500, 999, 37]), torch.tensor([0, 3, 9, CLASSES, CLASSES])


def published_positions(side: int, width: int = WIDTH) -> Tensor:
    """The position table of a square grid, entry by entry: (side², width)."""
    rows = []
    for row in range(side):
        for column in range(side):
            entry: list[float] = []
            for place in (column, row):  # the column comes first
                angles = [place / 10_000 ** (k / (width // 4)) for k in range(width // 4)]
                entry += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
            rows.append(entry)
    return torch.tensor(rows, dtype=torch.float64).float()


def published_dit(
    state: dict[str, Tensor], inputs: Tensor, times: Tensor, labels: Tensor, positions: Tensor, heads: int = HEADS
) -> Tensor:
    """The noise and variance that facebookresearch/DiT predicts with the weights ``state``, for square inputs."""
    outside = {name: tensor for name, tensor in state.items() if not name.startswith("blocks.")}

    def linear(name: str, values: Tensor) -> Tensor:
        return values @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def modulated(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = tokens - tokens.mean(dim=-1, keepdim=True)
        normed = centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()
        return normed * (1 + scale[:, None]) + shift[:, None]

    patch = outside["x_embedder.proj.weight"].shape[-1]
    tokens = F.conv2d(inputs, outside["x_embedder.proj.weight"], outside["x_embedder.proj.bias"], stride=patch)
    tokens = tokens.flatten(2).mT + positions
    # In float32, as published: at time 999, rounded frequencies change angles by 1e-4.
    angles = times.float()[:, None] * torch.exp(-math.log(10_000) * torch.arange(128).float() / 128)
    waves = torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)
    condition = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", waves)))
    condition = condition + outside["y_embedder.embedding_table.weight"][labels]
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    for block in (f"blocks.{number}" for number in range(depth)):
        vectors = linear(f"{block}.adaLN_modulation.1", F.silu(condition)).chunk(6, dim=1)
        qkv = linear(f"{block}.attn.qkv", modulated(tokens, *vectors[0:2]))
        query, key, value = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=2))
        weights = (query @ key.mT / math.sqrt(query.shape[-1])).softmax(dim=-1)
        mixed = linear(f"{block}.attn.proj", (weights @ value).transpose(1, 2).flatten(2))
        tokens = tokens + vectors[2][:, None] * mixed
        hidden = linear(f"{block}.mlp.fc1", modulated(tokens, *vectors[3:5]))
        hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
        tokens = tokens + vectors[5][:, None] * linear(f"{block}.mlp.fc2", hidden)
    tokens = modulated(tokens, *linear("final_layer.adaLN_modulation.1", F.silu(condition)).chunk(2, dim=1))
    patches = linear("final_layer.linear", tokens)  # (B, N, patch · patch · channels)
    side = math.isqrt(patches.shape[1])
    cells = patches.unflatten(2, (patch * patch, -1)).permute(0, 3, 2, 1).flatten(1, 2)  # (B, channels · patch², N)
    return F.pixel_shuffle(cells.unflatten(2, (side, side)), patch)
