"""The attributes and methods that timm's tools expect of a classifier.

Shapes: B batch, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitlocal.errors import ConfigError
from vitlocal.models.block import check_count


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
            raise ConfigError(
                f"global_pool={global_pool!r}: this model was built with pool={self.pool!r}, which decides whether it "
                f"has a class token; build a new model with pool={global_pool!r}"
            )
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
