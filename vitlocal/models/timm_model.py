"""What timm expects: the attributes and methods of a classifier, and the registration of the families' models.

Shapes: B batch, T tokens, D width.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import global_pool_nlc, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitlocal.errors import ConfigError
from vitlocal.models.block import BlockModel, check_choice, check_count, check_option
from vitlocal.models.positions import center_window, resample_positions

# timm passes these besides the model's options.
_TIMM_OPTIONS = {"pretrained_cfg", "pretrained_model_args", "cache_dir", "features_only", "feature_cls"}
_ADAPTED = dict(first_conv="patch_embed.proj", classifier="head")  # timm fits their weights to in_chans and num_classes


def record_options(model: Any, **options: Any) -> None:
    """Records ``options`` of a model that a method has changed, for timm's ``save_for_hf``."""
    model._model_args = getattr(model, "_model_args", {}) | options


class BlockOutputs(BlockModel):
    """timm's methods that return the outputs of blocks, which ``features_only`` uses."""

    norm: nn.Module  # after the blocks

    def forward_intermediates(
        self: Any, x: Tensor, indices: int | list[int] | None = None, return_prefix_tokens: bool = False,
        norm: bool = False, stop_early: bool = False, output_fmt: str = "NCHW", intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:  # fmt: skip
        """Returns the final tokens and a list of blocks' outputs, (B, D, h, w) or with "NLC" (B, N, D), as timm does.

        ``indices``: of the blocks, or how many of the last; None: all. ``output_dict``: under timm's names instead.
        """
        check_option("output_fmt", output_fmt, output_fmt in ("NCHW", "NLC"), "NCHW or NLC")
        if self.active.pruned_blocks:
            raise ConfigError("forward_intermediates: this model drops tokens; create it with pruned_blocks=()")
        if output_fmt == "NCHW" and self.training and self._patch_drop_rate:
            raise ConfigError(
                f"forward_intermediates: patch_drop_rate={self._patch_drop_rate} drops tokens in training, so no image "
                "remains; call model.eval(), or use output_fmt=NLC"
            )
        taken, last = feature_take_indices(len(self.active.block_order), indices)
        outputs: list[Tensor] = []
        final = self._features(x, None, outputs=outputs, stop=last + 1 if stop_early or intermediates_only else None)[0]
        found = [self.norm(outputs[index]) if norm else outputs[index] for index in taken]
        layers: list[Any] = [tokens[:, self.num_prefix_tokens :] for tokens in found]
        prefix = self.num_prefix_tokens
        prefixes = [tokens[:, :prefix] for tokens in found] if return_prefix_tokens and prefix else []
        if output_fmt == "NCHW":
            window = center_window(self.patch_embed.grid_of(*x.shape[2:]), self.active.grid)
            grid = [side.stop - side.start for side in window]
            layers = [patches.mT.unflatten(2, grid).contiguous() for patches in layers]
        if output_dict:
            named = dict(image_intermediates=layers, image_intermediates_prefix=prefixes, image_features=final)
            wanted = dict(image_intermediates_prefix=prefixes, image_features=not intermediates_only)
            return {name: value for name, value in named.items() if wanted.get(name, True)}
        if prefixes:
            layers = list(zip(layers, prefixes, strict=True))
        return layers if intermediates_only else (final, layers)

    def get_intermediate_layers(self, x: Tensor, n: int | list[int] = 1, reshape: bool = False, **options: Any) -> Any:
        """Returns the outputs of the blocks ``n``, or of the last ``n``: (B, N, D), or (B, D, h, w) to ``reshape``."""
        output_fmt = "NCHW" if reshape else "NLC"
        return self.forward_intermediates(x, n, output_fmt=output_fmt, intermediates_only=True, **options)

    def prune_intermediate_layers(
        self: Any, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the blocks after the last of ``indices``; returns these, counted from 0.

        ``prune_norm`` and ``prune_head`` remove the last norm, and the head with its pool.
        """
        if self.active.block_order != tuple(range(len(self.blocks))):
            raise ConfigError(
                f"prune_intermediate_layers: this model runs the blocks {self.active.block_order} of "
                f"{len(self.blocks)}; export it, and prune the model that timm loads from there"
            )
        taken, last = feature_take_indices(len(self.blocks), indices)
        count = last + 1
        self.blocks, self.drop_path_rates = self.blocks[:count], self.drop_path_rates[:count].clone()
        pruned = tuple(place for place in self.active.pruned_blocks if place < count)
        self.active = replace(self.active, block_order=tuple(range(count)), pruned_blocks=pruned)
        record_options(self, depth=count)
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return taken


class TimmModel(BlockOutputs):
    """A classifier whose ``forward`` is ``forward_head(forward_features(images))``. Subclasses set ``head``."""

    head: nn.Module
    pos_embed: nn.Parameter | None  # (1, prefix tokens + H·W, D)

    def __init__(
        self, num_classes: int, num_features: int, in_chans: int, pool: str | None, class_token: bool | None,
        global_pool: str | None, drop_rate: float, init: str, drops_out: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.drops_out = drops_out or drop_rate > 0
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.num_features = self.head_hidden_size = self.embed_dim = num_features
        check_option("class_token", class_token, class_token in (None, True, False), "true, false or None")
        if pool is None:
            pool = "avg" if class_token is False else "token"
        check_choice("pool", pool, ("token", "avg"))
        agrees = class_token in (None, pool == "token")
        check_option("class_token", class_token, agrees, f"{pool == 'token'} with pool={pool!r}; leave out one of both")
        self.has_class_token = pool == "token"
        self.num_prefix_tokens = int(self.has_class_token)
        self._set_pool(pool if global_pool is None else global_pool)
        self._head_drop = nn.Dropout(drop_rate)
        self._init = init

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits (B, num_classes) for :meth:`forward_features`' tokens; with ``pre_logits`` their pool."""
        pooled = global_pool_nlc(tokens, self.global_pool, num_prefix_tokens=self.num_prefix_tokens)
        pooled = self._head_drop(pooled)
        return pooled if pre_logits else self.head(pooled)

    def forward(self: Any, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns logits (B, num_classes).

        ``noise`` (B, L, 2), uniform in [0, 1), decides which branches drop path drops. A caller can key each row to
        the sample's place in a global batch. With a stage table it is (B, L + 1, 2), and that table's draw is last. By
        default the noise comes from torch's generator. Evaluation does not use it.
        """
        return self.forward_head(self.forward_features(images, noise))

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that need no weight decay, apart from norms and biases."""
        further = ("stage_table", "freqs")  # the last one in each block
        found = {name for name, _ in self.named_parameters() if name.rpartition(".")[2] in further}
        return {"pos_embed", "cls_token"} | found

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that group parameters by depth."""
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one for ``num_classes`` classes; 0 leaves the pooled features."""
        check_count("num_classes", num_classes, least=0)
        self._set_pool(self.global_pool if global_pool is None else global_pool)
        weight = next(self.parameters())  # for its device and type
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            init_linear(self.head, self._init)

    def set_input_size(self: Any, img_size: int | Sequence[int] | None = None, patch_size: Any = None) -> None:
        """Resamples the position table to the grid of ``img_size`` (px), and the first layer to ``patch_size``."""
        embed, table = self.patch_embed, self.pos_embed
        before, side = embed.grid_size, embed.patch_size[0]
        patch = to_2tuple(side if patch_size is None else patch_size)
        check_option("patch_size", patch_size, patch[0] == patch[1], "a square patch, such as 16")
        size = [count * side for count in before] if img_size is None else to_2tuple(img_size)
        embed.set_input_size(*size, patch[0])
        if embed.grid_size != before and table is not None:
            resampled = resample_positions(table, before, embed.grid_size).detach()
            self.pos_embed = nn.Parameter(resampled, table.requires_grad)
        for info in self.feature_info:
            info["reduction"] = patch[0]
        self._traits = getattr(self, "_traits", {}) | {"img_size": tuple(size)}  # save_for_hf() reads this
        record_options(self, img_size=tuple(size), patch_size=patch[0])

    def _set_pool(self, global_pool: str) -> None:
        choices = ("token",) * self.has_class_token + ("avg", "max", "avgmax", "")
        hint = "" if self.has_class_token else "; this model has no class token"
        check_option("global_pool", global_pool, global_pool in choices, f"one of {choices}{hint}")
        self.global_pool = global_pool


def init_linear(layer: nn.Linear, init: str) -> None:
    """Draws a linear layer's weights: "trunc_normal" as DeiT; "xavier", which leaves biases as PyTorch does."""
    if init == "xavier":
        nn.init.xavier_normal_(layer.weight)
        return
    nn.init.trunc_normal_(layer.weight, std=0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def family_sizes(head_width: int, heads: tuple[int, int, int]) -> dict[str, dict[str, Any]]:
    """Returns the default options of tiny, small and base models with these heads, by the ends of their names."""
    tiny, small, base = (dict(embed_dim=head_width * count, depth=12, num_heads=count) for count in heads)
    sizes = {"tiny_patch16_224": tiny, "small_patch16_224": small, "base_patch16_224": base}
    return sizes | {"tiny_patch8_64": tiny | dict(patch_size=8, img_size=64)}


DEIT_SIZES = family_sizes(64, (3, 6, 12))  # the local-FFN models share them


def register_family(
    family: type[BlockModel], prefix: str, sizes: Mapping[str, Mapping[str, Any]], *, is_classifier: bool = True,
    filter_fn: Callable[..., Any] = checkpoint_filter_fn,
) -> None:  # fmt: skip
    """Registers the family's models with timm. ``sizes``: default options by the ends of their names.

    ``filter_fn`` changes a state dict that timm loads. A family that is no classifier has no head for timm to adapt.
    """
    module = sys.modules[family.__module__]
    models = {prefix + size: defaults for size, defaults in sizes.items()}
    of_classifier = dict(crop_pct=0.875, interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD)
    configs: dict[str, Any] = {}
    for name, defaults in models.items():
        side = defaults.get("img_size", 224) // defaults.get("stride", 1)
        configs[name] = dict(input_size=(defaults.get("in_chans", 3), side, side), num_classes=1000, license="mit")
        configs[name] |= of_classifier | _ADAPTED if is_classifier else {}
    vars(module)["default_cfgs"] = generate_default_cfgs(configs)  # register_model() looks here
    adapted = _ADAPTED if is_classifier else {}
    for name, defaults in models.items():
        vars(module)[name] = register_model(_entry_point(family, name, defaults, adapted, filter_fn))


def _entry_point(
    family: type[BlockModel], name: str, defaults: Mapping[str, Any], adapted: dict[str, str],
    filter_fn: Callable[..., Any],
) -> Callable[..., BlockModel]:  # fmt: skip
    base = family.__mro__[1]  # VisionTransformer, which takes most options
    parameters = [p for cls in (base, family) for p in inspect.signature(cls).parameters.values()]
    known = list(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))

    def create(pretrained: bool = False, **options: Any) -> BlockModel:
        placement = {key: options.pop(key) for key in ("device", "dtype") if key in options}
        first = {"first_conv": "patch_embed.convs.0"} if options.get("stem") == "hmlp" else {}
        stated = options.pop("pretrained_cfg_overlay", None) or {}
        overlay = adapted | first | stated  # older runs do not name these parts
        features: Any = dict(out_indices=options.pop("out_indices", 3), feature_cls="getter")
        options.pop("dynamic_img_size", None)  # all our models take images of any size
        if options.get("features_only") and not adapted:
            raise ConfigError(f"{name} predicts noise, and has no features; use it without features_only")
        feature_cls = options.get("feature_cls", "getter")
        chain = "getter or hook, because the blocks of our models are not a chain that other classes can cut or trace"
        check_option("feature_cls", feature_cls, feature_cls in ("getter", "hook"), chain)
        unknown = [option for option in options if option not in known and option not in _TIMM_OPTIONS]
        if unknown:
            similar = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f" Did you mean {similar[0]}?" if similar else ""
            raise ConfigError(
                f"{name} has no option {', '.join(unknown)}.{hint} Its model options are {', '.join(known)}."
            )
        model = build_model_with_cfg(
            family, name, pretrained, pretrained_cfg_overlay=overlay, pretrained_filter_fn=filter_fn,
            feature_cfg=features, **{**defaults, **options},
        )  # fmt: skip
        return model.to(**placement) if placement else model

    create.__name__, create.__module__ = name, family.__module__
    return create
