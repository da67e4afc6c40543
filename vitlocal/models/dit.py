"""DiT: a diffusion transformer with adaLN-Zero (Peebles & Xie 2022, arXiv 2212.09748).

Equations, sizes and parameter names are those of facebookresearch/DiT. Departures: the position table is computed, so
no state dict holds it. Other grids than the full one resample it (the published model has one grid). There may be a
stage table, and labels are dropped by the caller.

Shapes: B batch, C channels, s side of an input, p patch side, (h, w) token grid, N = h·w tokens, D width, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlocal.errors import ConfigError
from vitlocal.models.block import Attention, BlockModel, BlockShape, check_count, check_option, linear_slice
from vitlocal.models.deit import FeedForward
from vitlocal.models.lffn import LocalFeedForward
from vitlocal.models.positions import Grid, resample_positions, sincos_table
from vitlocal.models.stem import PatchEmbed
from vitlocal.models.timm_model import register_family
from vitlocal.plan import Shape

FREQUENCIES = 128  # of the timestep embedding, each with a cosine and a sine
_ONE_SET = "DiT denoises every patch, so all tokens run"
FIXED_FIELDS = dict.fromkeys(
    ("grid", "crop_before_embedding", "token_keep_rate", "attention_keep_rate", "per_head_masks", "pruned_blocks"),
    _ONE_SET,
)


def timestep_embedding(times: Tensor) -> Tensor:
    """Returns cosines, then sines, of ``times`` (B,) at frequencies 10000^(-k/128): (B, 256) float32.

    ``diffusers`` has 10000^(-k/127) in its DiT. The best other weights of the layer after it halve the difference, no
    more (least squares over all 1,000 times).
    """
    numbers = torch.arange(FREQUENCIES, dtype=torch.float32, device=times.device)
    angles = times[:, None].float() * torch.exp(-math.log(10_000) / FREQUENCIES * numbers)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def modulate(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns tokens (B, N, D), scaled by 1 + ``scale`` and shifted by ``shift``, (B, 1, D) each."""
    return tokens * (1 + scale) + shift


def modulation(dim: int, count: int) -> nn.Sequential:
    """Returns SiLU and the linear layer that makes ``count`` vectors of a condition: (B, D) -> (B, count · D)."""
    return nn.Sequential(nn.SiLU(), nn.Linear(dim, count * dim))


class TanhFeedForward(FeedForward):
    """As :class:`FeedForward`, with GELU's tanh approximation, which the published weights were trained with."""

    def hidden_units(self, tokens: Tensor) -> Tensor:
        return F.gelu(linear_slice(self.fc1, tokens, rows=self.active_hidden), approximate="tanh")


class DiTBlock(nn.Module):
    """Attention and feed-forward part, each shifted, scaled and gated by the condition (adaLN-Zero).

    ``convolution``: the feed-forward part is the local one, without a norm of its own.
    """

    def __init__(self, shape: BlockShape, convolution: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(shape.dim, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(shape)
        self.norm2 = nn.LayerNorm(shape.dim, eps=1e-6, elementwise_affine=False)
        self.is_local = convolution
        self.mlp: Any = LocalFeedForward(shape, "layer", convolution) if convolution else TanhFeedForward(shape)
        if convolution:
            self.mlp.norm = nn.Identity()
        self.adaLN_modulation = modulation(shape.dim, 6)

    def forward(self, tokens: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        """Takes tokens (B, N, D) of the ``grid`` (h, w), and the ``condition`` (B, D)."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=2)
        tokens = tokens + gate1 * self.attn(modulate(self.norm1(tokens), shift1, scale1))
        modulated = modulate(self.norm2(tokens), shift2, scale2)
        return tokens + gate2 * (self.mlp(modulated, grid) if self.is_local else self.mlp(modulated))

    @torch.compiler.nested_compile_region
    def forward_once_compiled(self, tokens: Tensor, condition: Tensor, grid: Grid) -> Tensor:
        """As :meth:`forward`. ``torch.compile`` compiles it once for all blocks that differ only in their weights."""
        return self.forward(tokens, condition, grid)


class FinalLayer(nn.Module):
    """The modulated norm and the linear layer that predicts patches: (B, N, D) -> (B, N, outputs)."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(dim, outputs)
        self.adaLN_modulation = modulation(dim, 2)

    def forward(self, tokens: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(condition)[:, None].chunk(2, dim=2)
        return self.linear(modulate(self.norm_final(tokens), shift, scale))


class DiT(BlockModel):
    """Predicts the noise in images, or in latents of an autoencoder, from the time and a class.

    Options, all accepted by ``timm.create_model``:

    - ``img_size``: the position table has the grid of this size, px of the image. Other sizes resample it.
    - ``stride``: pixels of the image per cell of the input, a side: 8 for latents, 1 for images.
    - ``patch_size``: cells of the input per token, a side.
    - ``num_classes``: K; the label table has K + 1 rows, the last for no class.
    - ``convolution``: each feed-forward part has the 3×3 depth-wise convolution and the h-swish of
      :class:`~vitlocal.models.lffn.LocalFeedForward`. This is not DiT: published weights do not fit.
    - ``learn_sigma``: predicts a variance too, as raw values between the two bounds of Nichol & Dhariwal 2021.
    - ``drop_path_rate``: 0 only; timm's name, for recipes that state it.
    """

    _positions: Tensor  # (1, N, D), of the full grid

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        img_size: int = 256,
        patch_size: int = 2,
        in_chans: int = 4,
        stride: int = 8,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4,
        learn_sigma: bool = True,
        convolution: bool = False,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        check_count("num_classes", num_classes, least=0)
        counts = dict(img_size=img_size, patch_size=patch_size, in_chans=in_chans, stride=stride, embed_dim=embed_dim)
        for name, value in (counts | dict(depth=depth, num_heads=num_heads)).items():
            check_count(name, value)
        check_option("convolution", convolution, isinstance(convolution, bool), "true or false")
        check_option("learn_sigma", learn_sigma, isinstance(learn_sigma, bool), "true or false")
        check_option(
            "drop_path_rate", drop_path_rate, drop_path_rate == 0, "0, because DiT has no drop path (model.drop_path=0)"
        )
        fits = embed_dim % num_heads == 0 and embed_dim % 4 == 0
        check_option("embed_dim", embed_dim, fits, f"a multiple of 4, and of num_heads={num_heads}")
        hidden = int(embed_dim * mlp_ratio)
        check_option("mlp_ratio", mlp_ratio, hidden >= 1, "a positive number")

        self.num_classes, self.in_chans, self.stride, self.embed_dim = num_classes, in_chans, stride, embed_dim
        self.learn_sigma, self._out_chans = learn_sigma, in_chans * (2 if learn_sigma else 1)
        self.patch_side = patch_size * stride  # px of the image
        self._check_side(img_size, img_size)
        side = img_size // stride
        self.x_embedder = PatchEmbed((side, side), patch_size, in_chans, embed_dim)
        layers = nn.Linear(2 * FREQUENCIES, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(*layers)})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + 1, embed_dim)})
        shape = BlockShape(embed_dim, num_heads, hidden, qkv_bias=True, activation="h_swish" if convolution else "gelu")
        self.blocks = nn.ModuleList(DiTBlock(shape, convolution) for _ in range(depth))
        self.final_layer = FinalLayer(embed_dim, patch_size**2 * self._out_chans)
        self.register_parameter("stage_table", None)
        self.stage_embedding = None
        self.active = Shape(block_order=tuple(range(depth)))
        self.fixed_fields = FIXED_FIELDS
        if stride > 1:
            reason = "latents of a resized image are not resized latents"
            self.fixed_fields = FIXED_FIELDS | {"input_size": reason}
        # Not in the state dict, because it is a constant.
        self.register_buffer("_positions", self.position_table(), persistent=False)
        self.init_weights()

    @property
    def patch_embed(self) -> PatchEmbed:
        """timm's name for ``x_embedder``."""
        return self.x_embedder

    def position_table(self) -> Tensor:
        """Returns the sines and cosines of the full grid: (1, N, D)."""
        return sincos_table(self.x_embedder.grid_size, self.embed_dim)[None]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DiT:
        had_values = not self._positions.is_meta
        super()._apply(fn, recurse)
        if not had_values and not self._positions.is_meta:  # to_empty(), and no state dict has these values
            self._positions.copy_(self.position_table())
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws the published initial weights. The output is zero, and each block is the identity."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        projection: Any = self.x_embedder.proj
        final, matrix = self.final_layer, projection.weight.flatten(1)  # a copy, if the weight is channels-last
        projection.weight.copy_(nn.init.xavier_uniform_(matrix).view_as(projection.weight))  # as a linear layer
        nn.init.zeros_(projection.bias)
        mlp: Any = self.t_embedder["mlp"]
        for weight in (self.y_embedder["embedding_table"].weight, mlp[0].weight, mlp[2].weight):
            nn.init.normal_(weight, std=0.02)  # type: ignore[arg-type]
        for layer in (*(block.adaLN_modulation[1] for block in self.blocks), final.adaLN_modulation[1], final.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _check_side(self, height: int, width: int) -> None:
        """Raises :class:`ConfigError` unless images of this size, px, are a whole number of patches."""
        side = self.patch_side
        if height % side or width % side or not height or not width:
            nearest = "x".join(str(max(side, round(length / side) * side)) for length in (height, width))
            parts = f" ({side // self.stride} latents of {self.stride} px)" if self.stride > 1 else ""
            raise ConfigError(
                f"image size {height}x{width}: the patch of {side}x{side} pixels{parts} must divide it; use {nearest}, "
                "or another patch_size"
            )

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that need no weight decay, apart from biases."""
        return {"y_embedder.embedding_table.weight", *(["stage_table"] if self.stage_table is not None else [])}

    def example_inputs(self, batch: int, size: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        """Returns arguments for :meth:`forward`, for images of ``size`` px: empty inputs, times 0, class 0."""
        self._check_side(size, size)
        side = size // self.stride
        numbers = torch.zeros(batch, dtype=torch.int64)
        return torch.empty(batch, self.in_chans, side, side, dtype=dtype), numbers, numbers.clone()

    def _condition(self, times: Tensor, labels: Tensor, no_stage: Tensor | None = None) -> Tensor:
        """Returns the sum of the embeddings of time, class and stage: (B, D). Arguments: see :meth:`forward`.

        Autocast does not touch it: bfloat16 would round neighbouring times to one, and it costs next to nothing.
        """
        mlp: Any = self.t_embedder["mlp"]
        with torch.autocast(times.device.type, enabled=False):
            waves = timestep_embedding(times).to(mlp[0].weight.dtype)
            condition = mlp(waves) + self.y_embedder["embedding_table"](labels)
        table, stage = self.stage_table, self.active.stage
        if table is None:
            return condition
        row = table[-1 if stage is None else stage]  # (D,)
        return condition + (row if no_stage is None else torch.where(no_stage[:, None], table[-1], row))

    def forward(self, inputs: Tensor, times: Tensor, labels: Tensor, no_stage: Tensor | None = None) -> Tensor:
        """Returns the predicted noise and, with ``learn_sigma``, raw variances: (B, C, s, s) -> (B, C or 2C, s, s).

        ``inputs``: noisy images or latents of any size that the patch divides. ``times`` (B,): whole or real numbers.
        ``labels`` (B,) int64: 0 to K, K for no class. ``no_stage`` (B,) bool: samples that get the stage table's last
        row; None: all get that of the active stage. Draws no random numbers.

        Under bfloat16 autocast the residual stream is bfloat16. It stays float32 under float16 autocast.
        """
        if inputs.ndim != 4 or inputs.shape[1] != self.in_chans:
            raise ValueError(f"inputs of shape {tuple(inputs.shape)}: expected (batch, {self.in_chans}, side, side)")
        height, width = inputs.shape[2:]
        self._check_side(height * self.stride, width * self.stride)
        grid = self.x_embedder.grid_of(height, width)
        positions = resample_positions(self._positions, self.x_embedder.grid_size, grid)  # (1, N, D)
        tokens = self.x_embedder(inputs)
        stream = positions.dtype if tokens.dtype == torch.float16 else tokens.dtype
        tokens = tokens + positions.to(stream)
        condition = self._condition(times, labels, no_stage)
        nests = self.compiles_blocks_once and torch.compiler.is_dynamo_compiling()
        for index in self.active.block_order:
            block: Any = self.blocks[index]
            if self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, grid, use_reentrant=False, preserve_rng_state=False)
            elif nests:
                tokens = block.forward_once_compiled(tokens, condition, grid)
            else:
                tokens = block(tokens, condition, grid)
        patches = self.final_layer(tokens, condition)  # (B, N, p·p·outputs)
        side = self.x_embedder.patch_size[0]
        image = patches.view(-1, *grid, side, side, self._out_chans).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, self._out_chans, height, width)


def fold_stage(state: dict[str, Tensor], row: Tensor, null: Tensor) -> None:
    """Replaces a stage's ``row`` (D,), and ``null``, that of no stage, in a state dict by equal biases and labels.

    The sum of the embeddings stays the same for each class with the stage, and for no class with no stage. These are
    the two branches of classifier-free guidance.
    """
    bias, table = "t_embedder.mlp.2.bias", "y_embedder.embedding_table.weight"
    state[bias] = state[bias] + row
    state[table] = torch.cat([state[table][:-1], state[table][-1:] + (null - row)])


def drop_positions(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Returns ``state`` without the position table, which published files have."""
    return {name: tensor for name, tensor in state.items() if name != "pos_embed"}


SIZES: dict[str, dict[str, Any]] = {
    "small": dict(embed_dim=384, depth=12, num_heads=6),
    "base": dict(embed_dim=768, depth=12, num_heads=12),
    "large": dict(embed_dim=1024, depth=24, num_heads=16),
    "xlarge": dict(embed_dim=1152, depth=28, num_heads=16),
}
LATENT_SIZES = {
    f"{name}_patch{patch}": size | dict(patch_size=patch, img_size=256, in_chans=4, stride=8)
    for name, size in SIZES.items()
    for patch in (2, 4, 8)
}
PIXELS = dict(patch_size=4, in_chans=3, stride=1)
PIXEL_SIZES = {
    "tiny_patch4_32": PIXELS | dict(embed_dim=96, depth=8, num_heads=3, img_size=32),
    "small_patch4_64": PIXELS | SIZES["small"] | dict(img_size=64),
}
PREFIX = "vitlocal_dit_"
register_family(DiT, PREFIX, LATENT_SIZES | PIXEL_SIZES, is_classifier=False, filter_fn=drop_positions)


def reads_latents(name: str) -> bool:
    """Returns whether the model of this name is a DiT that learns latents of an autoencoder, not pixels."""
    return name.removeprefix(PREFIX) in LATENT_SIZES and name.startswith(PREFIX)
