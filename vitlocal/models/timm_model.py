"""What timm expects: the attributes and methods of a classifier, and the registration of the families' models.

Shapes: B batch, T tokens, D width.
"""

import difflib
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from vitlocal.errors import ConfigError
from vitlocal.models.block import check_count

# timm passes these besides the model's options.
_TIMM_OPTIONS = frozenset({"pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "cache_dir"})


class TimmModel(nn.Module):
    """A classifier whose ``forward`` is ``forward_head(forward_features(images))``. Subclasses set ``head``."""

    head: nn.Module

    def __init__(self, num_classes: int, num_features: int, pool: str, init: str) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = num_features
        self.pool = pool
        self.num_prefix_tokens = int(pool == "token")
        self.grad_checkpointing = False
        self._init = init

    def forward_features(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns tokens (B, T, D) after the last norm. ``noise``: see :meth:`forward`."""
        raise NotImplementedError

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Returns logits (B, num_classes) for :meth:`forward_features`' tokens; with ``pre_logits`` their pool."""
        pooled = tokens[:, 0] if self.pool == "token" else tokens.mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Returns logits (B, num_classes).

        ``noise`` (B, L, 2), uniform in [0, 1), decides which branches drop path drops. A caller can key each row to
        the sample's place in a global batch. With a stage table it is (B, L + 1, 2), and that table's draw is last. By
        default the noise comes from torch's generator. Evaluation does not use it.
        """
        return self.forward_head(self.forward_features(images, noise))

    def no_weight_decay(self) -> set[str]:
        """Returns the names of parameters that need no weight decay, apart from norms and biases."""
        has_stages = getattr(self, "stage_table", None) is not None
        return {"pos_embed", "cls_token", *(["stage_table"] if has_stages else [])}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns patterns that group parameters by depth."""
        return dict(stem=r"^cls_token|pos_embed|patch_embed", blocks=[(r"^blocks\.(\d+)", None), (r"^norm", (99999,))])

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Makes blocks keep only their inputs, and recompute the rest in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """Returns the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the head by a new one for ``num_classes`` classes; 0 leaves the pooled features."""
        if global_pool not in (None, self.pool):
            raise ConfigError(f"global_pool={global_pool!r}: this model has pool={self.pool!r}; build a new one")
        check_count("num_classes", num_classes, least=0)
        weight = next(self.parameters())  # for its device and type
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            init_linear(self.head, self._init)


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


def register_family(family: type[TimmModel], prefix: str, sizes: Mapping[str, Mapping[str, Any]]) -> None:
    """Registers the family's models with timm. ``sizes``: default options by the ends of their names."""
    module = sys.modules[family.__module__]
    models = {prefix + size: defaults for size, defaults in sizes.items()}
    configs: dict[str, Any] = {
        name: dict(
            input_size=(3, defaults.get("img_size", 224), defaults.get("img_size", 224)), num_classes=1000,
            crop_pct=0.875, interpolation="bicubic", mean=IMAGENET_DEFAULT_MEAN, std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.proj", classifier="head",
        )
        for name, defaults in models.items()
    }  # fmt: skip
    vars(module)["default_cfgs"] = generate_default_cfgs(configs)  # register_model() looks here
    for name, defaults in models.items():
        vars(module)[name] = register_model(_entry_point(family, name, defaults))


def _entry_point(family: type[TimmModel], name: str, defaults: Mapping[str, Any]) -> Callable[..., TimmModel]:
    base = family.__mro__[1]  # VisionTransformer, which takes most options
    parameters = [p for cls in (base, family) for p in inspect.signature(cls).parameters.values()]
    known = list(dict.fromkeys(p.name for p in parameters if p.kind is p.KEYWORD_ONLY))

    def create(pretrained: bool = False, **options: Any) -> TimmModel:
        unknown = [option for option in options if option not in known and option not in _TIMM_OPTIONS]
        if unknown:
            similar = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.5)
            hint = f" Did you mean {similar[0]}?" if similar else ""
            raise ConfigError(f"{name} has no option {', '.join(unknown)}.{hint} Its options are {', '.join(known)}.")
        return build_model_with_cfg(family, name, pretrained, **{**defaults, **options})

    create.__name__, create.__module__ = name, family.__module__
    return create
