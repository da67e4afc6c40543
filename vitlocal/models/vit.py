"""The Vision Transformer that the families share. A family adds the feed-forward part of its blocks.

Shapes: B batch, S input size, (h, w) token grid of the input, (H, W) full grid of the
position table, N = h·w patch tokens, P prefix tokens (the class token, if any), T = P + N tokens in
all, D width, M heads, d head width, L depth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitlocal.errors import ConfigError
from vitlocal.models.block import Attention, Block, BlockShape, DropPathModel, check_choice, check_count, check_option
from vitlocal.models.local_mix import ACTIVATIONS
from vitlocal.models.positions import Grid, center_window, crop_images, crop_tokens, resample_positions, sincos_table
from vitlocal.models.rope import IMAGE_UNITS, THETA, mixed_frequencies, shared_rotations
from vitlocal.models.stem import STEMS
from vitlocal.models.timm_model import TimmModel, init_linear
from vitlocal.models.token_selection import ALL_TOKENS, drop_patches
from vitlocal.plan import Shape


class VisionTransformer(DropPathModel, TimmModel):
    """A Vision Transformer whose blocks come from the family's ``make_block``.

    Takes images (B, in_chans, S, S'), float, normalised, of any size that the patch divides, in either memory
    format (channels-last saves a copy). Returns logits (B, num_classes).

    Options, all accepted by ``timm.create_model``:

    - ``img_size``: the position table has the grid of this size (a number, or height and width). Other sizes
      resample the table inside the forward pass, so that all entries keep their gradient and optimizer state.
    - ``mlp_ratio``: hidden width of the feed-forward part, in widths.
    - ``activation``: "h_swish", x·relu6(x + 3)/6, or "gelu".
    - ``pool``: "token" reads the class token. "avg" has no class token, and reads the mean of the patch tokens. None:
      "token", unless ``class_token`` is False.
    - ``class_token``: timm's name for whether there is a class token. None: as ``pool``.
    - ``global_pool``: timm's name for what the head reads: "token", "avg", "max", "avgmax", or "" for all tokens. None:
      as ``pool``. It leaves the class token as it is.
    - ``drop_rate``: dropout before the head.
    - ``proj_drop_rate``: dropout of the feed-forward part's hidden units, and of the outputs of both parts of a block.
    - ``attn_drop_rate``: dropout of attention weights.
    - ``patch_drop_rate``: fraction of the patch tokens that training drops at random, before the blocks.
    - ``init_values``: initial factors of LayerScale, on both branches of each block. None: no LayerScale.
    - ``drop_path_rate``: drop path of the last block. It rises linearly from 0 at the first.
    - ``train_pos_embed``: False freezes the position table, which is the effect of the released code.
    - ``pos_embed_init``: the table starts "random", see ``init``, or "sincos", see :func:`sincos_table`.
    - ``init``: "trunc_normal" as DeiT; "xavier" as the released code, which leaves biases as PyTorch does.
    - ``pruned_blocks``: these blocks keep the fraction ``token_keep_rate`` of the patch tokens. From there on, each
      token attends to the fraction ``attention_keep_rate`` of them, by one mask for all heads or, with
      ``per_head_masks``, by one for each. See :mod:`vitlocal.models.token_selection`.
    - ``rope``: rotary positions, "axial" or "mixed", see :mod:`vitlocal.models.rope`; None: none. ``rope_theta``:
      frequencies lie between 1 and 1/theta radians per unit; None: the paper's 100 and 10.
    - ``rope_coordinates``: the unit of coordinates. "patches" of the input, as the paper: larger images have larger
      angles. "image", the default: a fourteenth of the image's side, so that a curriculum, and fine-tuning at another
      size, keep the angles.
    - ``use_abs_pos_emb``: timm's name for whether there is a position table.
    - ``stem``: "patch", :class:`PatchEmbed`, or "hmlp", :class:`PatchStem`.
      ``stem_width``: channels of "hmlp"; None: a quarter of ``embed_dim``. ``stem_norm``: its norm, "layer" or "batch".
    - ``center_grid``: side, in patches, of the center crop of the token grid that runs; None: the whole grid.
    """

    cls_token: nn.Parameter | None  # (1, 1, D)

    def __init__(
        self,
        make_block: Callable[[BlockShape], Block],
        *,
        num_classes: int = 1000,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        activation: str = "h_swish",
        pool: str | None = None,
        class_token: bool | None = None,
        global_pool: str | None = None,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        patch_drop_rate: float = 0.0,
        init_values: float | None = None,
        drop_path_rate: float = 0.0,
        train_pos_embed: bool = True,
        init: str = "trunc_normal",
        pos_embed_init: str = "random",
        token_keep_rate: float = 1.0,
        attention_keep_rate: float = 1.0,
        per_head_masks: bool = False,
        center_grid: int | None = None,
        pruned_blocks: Sequence[int] = (),
        rope: str | None = None,
        rope_theta: float | None = None,
        rope_coordinates: str | None = None,
        use_abs_pos_emb: bool = True,
        stem: str = "patch",
        stem_width: int | None = None,
        stem_norm: str | None = None,
    ) -> None:
        check_count("num_classes", num_classes, least=0)
        if stem_width is not None:
            check_count("stem_width", stem_width)
        counts = dict(patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        for name, value in counts.items():
            check_count(name, value)
        flags = dict(qkv_bias=qkv_bias, train_pos_embed=train_pos_embed, use_abs_pos_emb=use_abs_pos_emb)
        for name, flag in flags.items():
            check_option(name, flag, isinstance(flag, bool), "true or false")  # the string "false" would count as true
        check_choice("activation", activation, tuple(ACTIVATIONS))
        rates = dict(
            drop_rate=drop_rate, proj_drop_rate=proj_drop_rate, attn_drop_rate=attn_drop_rate,
            patch_drop_rate=patch_drop_rate, drop_path_rate=drop_path_rate,
        )  # fmt: skip
        for name, rate in rates.items():
            check_option(name, rate, 0 <= rate < 1, "0 <= rate < 1")
        scales = init_values is None or init_values > 0
        check_option("init_values", init_values, scales, "a positive number, or None for no LayerScale")
        drops_out = max(proj_drop_rate, attn_drop_rate, patch_drop_rate) > 0
        super().__init__(num_classes, embed_dim, in_chans, pool, class_token, global_pool, drop_rate, init, drops_out)
        check_choice("init", init, ("trunc_normal", "xavier"))
        check_choice("pos_embed_init", pos_embed_init, ("random", "sincos"))
        check_choice("stem", stem, tuple(STEMS))
        of_stem = {name: value for name, value in dict(width=stem_width, norm=stem_norm).items() if value is not None}
        for name, own in (("stem_width", stem_width), ("stem_norm", stem_norm)):
            check_option(name, own, own is None or stem == "hmlp", "None without stem=hmlp")
        check_choice("stem_norm", stem_norm or "layer", ("layer", "batch"))
        fits = use_abs_pos_emb or (train_pos_embed and pos_embed_init == "random")
        check_option("use_abs_pos_emb", use_abs_pos_emb, fits, "true, because other options set the table")
        hidden = int(embed_dim * mlp_ratio)
        check_option("mlp_ratio", mlp_ratio, hidden >= 1, "a positive number")
        sides: Any = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        check_option("img_size", img_size, len(sides) == 2, "one whole number, or height and width")
        if pos_embed_init == "sincos" and embed_dim % 4:
            raise ConfigError(f"model option pos_embed_init=sincos: embed_dim={embed_dim} must be a multiple of 4")
        of_heads = f"a multiple of {num_heads}, because num_heads={num_heads} heads have the same width"
        check_option("embed_dim", embed_dim, embed_dim % num_heads == 0, of_heads)
        width = embed_dim // num_heads
        self._set_rope(rope, rope_theta, rope_coordinates, width)

        self._pos_embed_init, self._patch_drop_rate = pos_embed_init, patch_drop_rate
        self._drops_in_blocks = proj_drop_rate > 0 or attn_drop_rate > 0
        self.patch_embed = STEMS[stem](sides, patch_size, in_chans, embed_dim, **of_stem)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim)) if self.has_class_token else None
        grid = self.patch_embed.grid_size
        rows = grid[0] * grid[1] + self.num_prefix_tokens
        self.pos_embed = None
        if use_abs_pos_emb:
            self.pos_embed = nn.Parameter(torch.empty(1, rows, embed_dim), requires_grad=train_pos_embed)
        sizes = embed_dim, num_heads, hidden
        drops = proj_drop_rate, attn_drop_rate
        shape = BlockShape(*sizes, qkv_bias, activation, *drops, init_values, rope == "mixed")
        self.blocks = nn.ModuleList(make_block(shape) for _ in range(depth))
        # A region that is compiled once may neither update statistics nor draw random numbers.
        has_statistics = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in self.blocks.modules())
        self._can_nest = not has_statistics and not self._drops_in_blocks
        self.feature_info = [dict(module=f"blocks.{i}", num_chs=embed_dim, reduction=patch_size) for i in range(depth)]
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.register_parameter("stage_table", None)
        self.stage_embedding = None
        self.active = Shape(
            grid=center_grid, token_keep_rate=token_keep_rate, attention_keep_rate=attention_keep_rate,
            per_head_masks=per_head_masks, pruned_blocks=tuple(pruned_blocks), block_order=tuple(range(depth)),
        )  # fmt: skip
        self.init_drop_path(drop_path_rate, depth)
        self.init_weights()

    def _set_rope(self, rope: str | None, theta: float | None, coordinates: str | None, width: int) -> None:
        """Checks and keeps the options of rotary positions. ``width``: of a head."""
        if rope is None:
            for name, value in dict(rope_theta=theta, rope_coordinates=coordinates).items():
                check_option(name, value, value is None, "None without rope, which has no rotary positions")
        else:
            check_choice("rope", rope, tuple(THETA))
            check_option("rope", rope, width % 4 == 0, f"None: heads are {width} wide, not a multiple of 4")
            check_choice("rope_coordinates", coordinates or "image", ("image", "patches"))
            check_option("rope_theta", theta, theta is None or theta > 0, "a positive number")
        self.rope, self._head_width = rope, width
        self._rope_theta = THETA[rope or "axial"] if theta is None else theta
        self._scales_rope = coordinates != "patches"

    def train(self, mode: bool = True) -> VisionTransformer:
        """As in PyTorch, but the BatchNorms of frozen blocks and of a frozen stem use and keep their statistics."""
        super().train(mode)
        trained = self.active.trainable_blocks
        frozen = [self.patch_embed] if self.active.head_only else []
        frozen += [block for index, block in enumerate(self.blocks) if trained is not None and index not in trained]
        for part in frozen:
            for module in part.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return self

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws the initial weights, see ``init``. Norms and convolutions keep their values."""
        xavier = self._init == "xavier"
        for table in (self.pos_embed, self.cls_token):
            if table is not None:
                nn.init.xavier_normal_(table) if xavier else nn.init.trunc_normal_(table, std=0.02)
        if self._pos_embed_init == "sincos" and self.pos_embed is not None:
            waves = sincos_table(self.patch_embed.grid_size, self.embed_dim)
            self.pos_embed.zero_()[0, -len(waves) :] = waves  # the prefix tokens' rows stay zero
        for name, module in self.named_modules():
            if xavier and name.endswith("attn.qkv"):
                for part in module.weight.chunk(3):  # three layers in one: each has its own fan-out
                    nn.init.xavier_normal_(part)
            elif isinstance(module, nn.Linear):
                init_linear(module, self._init)
            elif isinstance(module, Attention) and module.freqs is not None:
                module.freqs.copy_(mixed_frequencies(module.num_heads, self._head_width, self._rope_theta))

    def positions(self, grid: Grid) -> Tensor | None:
        """Returns the position table at ``grid``: (1, T, D). The prefix tokens' rows come first, unchanged."""
        return None if self.pos_embed is None else resample_positions(self.pos_embed, self.patch_embed.grid_size, grid)

    def _shared_rotations(self, images: Tensor, tokens: Tensor) -> Tensor | None:
        """Returns what rotary positions of all blocks share, see :func:`rope_constant`; None without these."""
        if self.rope is None:
            return None
        grid = self.patch_embed.grid_of(images.shape[2], images.shape[3])
        axial = (self._head_width, self._rope_theta) if self.rope == "axial" else None
        unit = IMAGE_UNITS if self._scales_rope else grid
        return shared_rotations(tokens, grid, unit, self.active.grid, self.num_prefix_tokens, axial)

    def embed(self, images: Tensor) -> tuple[Tensor, Grid]:
        """Returns tokens (B, T, D) with their positions added, and their grid (h, w).

        Tokens keep the type of the matrix product over patches, so under bfloat16 autocast the residual stream is
        bfloat16. It stays float32 under float16 autocast: float16 has a smaller range, which its sums might exceed.
        """
        channels, prefix = self.in_chans, self.num_prefix_tokens
        if images.ndim != 4 or images.shape[1] != channels:
            raise ValueError(f"images of shape {tuple(images.shape)}: expected (batch, {channels}, height, width)")
        grid = self.patch_embed.grid_of(images.shape[2], images.shape[3])
        positions = self.positions(grid)  # (1, T, D)
        rows, columns = center_window(grid, self.active.grid)
        if self.active.crop_before_embedding:
            tokens = self.patch_embed(crop_images(images, rows, columns, self.patch_embed.patch_size[0]))  # (B, N, D)
        else:
            tokens = crop_tokens(self.patch_embed(images), grid, rows, columns)
        tokens = tokens.to(self.patch_embed.proj.weight.dtype) if tokens.dtype == torch.float16 else tokens
        if positions is not None:
            tokens = tokens + crop_tokens(positions[:, prefix:].to(tokens.dtype), grid, rows, columns)
        if self.cls_token is not None:
            token = self.cls_token if positions is None else self.cls_token + positions[:, :prefix]
            tokens = torch.cat([token.expand(tokens.shape[0], -1, -1).to(tokens.dtype), tokens], dim=1)
        return tokens, (rows.stop - rows.start, columns.stop - columns.start)

    def forward_features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns tokens (B, T, D) after the last norm. ``noise``: see :meth:`forward`."""
        return self._features(images, noise)[0]

    def _features(
        self, images: Tensor, noise: Tensor | None, with_attention: bool = False,
        outputs: list[Tensor] | None = None, stop: int | None = None,
    ) -> tuple[Tensor, Any]:  # fmt: skip
        """As :meth:`forward_features`; ``with_attention`` adds the last block's attention to patches, (B, N).

        Only the first ``stop`` blocks run (None: all). Their outputs are appended to ``outputs``.
        """
        tokens, grid = self.embed(images)
        rope = self._shared_rotations(images, tokens)
        order = self.active.block_order[:stop]
        scales: Sequence[Tensor | None] = [None] * len(order)
        if self.training and self.drop_path_rate > 0:
            scales = self.drop_path_scales(tokens.shape[0], noise).to(tokens.dtype)[: len(order)].unbind(0)
        tokens = self._add_stage(tokens, noise)
        remaining, attention = ALL_TOKENS, None
        if self.training and self._patch_drop_rate:
            tokens, remaining = drop_patches(tokens, self._patch_drop_rate, self.num_prefix_tokens)
        nests = self.compiles_blocks_once and self._can_nest and torch.compiler.is_dynamo_compiling()
        for place, (index, scale) in enumerate(zip(order, scales, strict=True)):
            block: Any = self.blocks[index]
            if with_attention and place == len(order) - 1:
                with torch.no_grad():
                    attention = block.attn.patch_attention(
                        block.norm1(tokens), remaining.mask, self.num_prefix_tokens,
                        block.attn.rotation(rope, remaining.indices, grid),
                    )  # fmt: skip
            operands = tokens, grid, scale, remaining, rope
            if place in self.active.pruned_blocks:
                tokens, remaining = block.forward_pruned(*operands, self.active)
            elif self.grad_checkpointing and torch.is_grad_enabled():
                tokens = checkpoint(block, *operands, use_reentrant=False, preserve_rng_state=self._drops_in_blocks)
            elif nests:
                tokens = block.forward_once_compiled(*operands)
            else:
                tokens = block(*operands)
            if outputs is not None:
                outputs.append(tokens)
        return self.norm(tokens), attention

    def _add_stage(self, tokens: Tensor, noise: Tensor | None) -> Tensor:
        """Adds the current stage's vector to tokens (B, T, D). In training, some images get the vector of no stage."""
        table, embedding, stage = self.stage_table, self.stage_embedding, self.active.stage
        if table is None or embedding is None:
            return tokens
        row = table[-1 if stage is None else stage].to(tokens.dtype)  # (D,)
        if self.training and embedding.null_prob and noise is not None:
            is_null = noise[:, -1:, :1] < embedding.null_prob  # (B, 1, 1)
            row = torch.where(is_null, table[-1].to(tokens.dtype), row)  # (B, 1, D)
        return tokens + row if embedding.tokens == "all" else torch.cat([tokens[:, :1] + row, tokens[:, 1:]], dim=1)

    def forward_with_attention_variance(self, images: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns :meth:`forward`'s logits and the relative variance of the last block's attention to patches, (B,).

        That is the variance over patches of the class token's attention, divided by the squared mean. (The released
        code does not divide, at one image size.) Without a class token, it is the attention of all tokens, summed.
        """
        tokens, attention = self._features(images, noise, with_attention=True)
        mean = attention.mean(dim=1)
        return self.forward_head(tokens), attention.var(dim=1, unbiased=False) / mean.square().clamp_min(1e-30)
