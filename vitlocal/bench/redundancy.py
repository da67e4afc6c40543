"""How much of a model is redundant, as it trains: python -m vitlocal.bench redundancy RUN [--images 512] [--plot FILE]

The analysis behind Budgeted Training (Xia et al. 2023, ICLR, section 3): over the weights that a run with
run.keep_weights=yes kept at its evaluations, on validation images, block by block:

    heads      mean linear CKA between the outputs of two heads: 1 where they say the same
    hidden     principal components that explain 99 % of the variance of the hidden units, in % of all
    attention  patches that the class token attends to, as the exponential of its entropy, in % of all
               (without a class token: that the mean over tokens attends to)

Shapes: B images, T tokens, N patch tokens, M heads, d head width, C hidden width.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from vitlocal.bench.measurement import measurement, write_json
from vitlocal.bench.parsing import plot_file
from vitlocal.config import Config, read_config
from vitlocal.data.augment import Normalize
from vitlocal.data.batch import load_manifest, open_sources
from vitlocal.errors import ConfigError
from vitlocal.models.deit import FeedForward
from vitlocal.models.factory import build_model
from vitlocal.models.shape import add_stage_table, set_shape
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import Feed, Shape
from vitlocal.progress import Position
from vitlocal.report.figures import save
from vitlocal.train.checkpoint import KEPT, read_weights
from vitlocal.train.devices import prepare_device

EXPLAINED = 0.99  # of the variance
BATCH = 64


def linear_cka(outputs: Tensor) -> Tensor:
    """Between the M heads of outputs (B·T, M, d): (M, M) float64, 1 on the diagonal.

    With K = XXᵀ and centring, HSIC(K, L) is ‖XᵀY‖² of centred X and Y, up to a factor that CKA does not have.
    """
    _, heads, width = outputs.shape
    x = outputs.double().flatten(1)
    x = x - x.mean(dim=0)
    cross = (x.T @ x).view(heads, width, heads, width)
    hsic = cross.square().sum(dim=(1, 3))  # (M, M)
    own = hsic.diagonal().clamp_min(1e-30).sqrt()
    return hsic / (own[:, None] * own[None, :])


def mean_pair(matrix: Tensor) -> float:
    """The mean over pairs of different heads."""
    heads = len(matrix)
    if heads < 2:
        return float("nan")
    return float((matrix.sum() - matrix.diagonal().sum()) / (heads * (heads - 1)))


def components(hidden: Tensor, explained: float = EXPLAINED) -> Tensor:
    """Principal components that explain ``explained`` of the variance over tokens, of hidden units (B, N, C).

    In percent of as many as there can be, min(N, C): (B,) float64.
    """
    x = hidden.double()
    x = x - x.mean(dim=1, keepdim=True)
    # The eigenvalues of the smaller one of both products: what singular values squared are, and many times as quick.
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    variances = torch.linalg.eigvalsh(gram).clamp_min(0).flip(1)  # (B, min(N, C)), falling
    part = variances.cumsum(dim=1) / variances.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return 100 * (1 + (part < explained - 1e-12).sum(dim=1)) / variances.shape[1]


def attended(attention: Tensor) -> Tensor:
    """exp of the entropy of attention over N patches (B, N), made to sum to 1, in percent of N: (B,) float64."""
    part = attention.double()
    part = part / part.sum(dim=1, keepdim=True)
    entropy = -(part * part.clamp_min(1e-30).log()).sum(dim=1)
    return 100 * entropy.exp() / part.shape[1]


@dataclass
class Seen:
    """What one block shows of a batch."""

    heads: Tensor  # (B·T, M, d)
    attention: Tensor  # (B, N)
    hidden: Tensor  # (B, N, C)


@contextmanager
def watching(model: VisionTransformer, seen: dict[int, Seen]) -> Iterator[None]:
    """Each forward pass leaves in ``seen``, block by block, what the block showed."""
    removers = []
    num_prefix_tokens = int(model.cls_token is not None)

    def attention_hook(place: int, block: nn.Module) -> Any:
        def hook(module: nn.Module, operands: Any, tokens: Tensor) -> None:
            query, key, value = block.attn.project(tokens)  # (B, M, T, d) each
            weights = attention_of(query, key)
            outputs = (weights @ value).permute(0, 2, 1, 3).flatten(0, 1)  # (B·T, M, d)
            mean = weights.mean(dim=1)  # (B, T, T)
            row = mean[:, 0, 1:] if num_prefix_tokens else mean.mean(dim=1)
            seen[place] = Seen(outputs, row, torch.empty(0))

        return hook

    def hidden_hook(place: int) -> Any:
        def hook(module: nn.Module, operands: tuple[Any, ...]) -> None:
            extra = (
                num_prefix_tokens if isinstance(module, FeedForward) else 0
            )  # DeiT's class token has hidden units, too
            seen[place].hidden = module.hidden_units(*operands)[:, extra:]

        return hook

    for place, slot in enumerate(model.active.block_order):
        block = model.blocks[slot]
        if not hasattr(block.mlp, "widened"):
            raise ConfigError(f"{type(model).__name__}: hidden units are looked at in DeiT and local-FFN models alone")
        removers.append(block.norm1.register_forward_hook(attention_hook(place, block)))
        removers.append(block.mlp.register_forward_pre_hook(hidden_hook(place)))
    try:
        yield
    finally:
        for remover in removers:
            remover.remove()


@torch.inference_mode()
def analysed(model: VisionTransformer, batches: Sequence[Tensor]) -> list[dict[str, float]]:
    """A row a block, over batches of images (B, 3, S, S), normalised."""
    found: dict[int, list[tuple[float, float, float, int]]] = {}
    seen: dict[int, Seen] = {}
    with watching(model, seen):
        for images in batches:
            model(images)
            for place, block in seen.items():
                row = (
                    mean_pair(linear_cka(block.heads)),
                    float(components(block.hidden).mean()),
                    float(attended(block.attention).mean()),
                    len(images),
                )
                found.setdefault(place, []).append(row)
    rows = []
    for place, parts in sorted(found.items()):
        images = sum(part[3] for part in parts)
        heads, hidden, attention = (sum(part[i] * part[3] for part in parts) / images for i in range(3))
        rows.append({"block": place, "heads_cka": heads, "hidden_percent": hidden, "attended_percent": attention})
    return rows


# --- weights over time ----------------------------------------------------------------------------------------------


def model_of(file: Path, config: Config, classes: int) -> tuple[float, VisionTransformer]:
    """The epoch at which ``file`` was kept, and the model with its weights, in the shape that it had.

    But for connections that tri-level training cuts: heads are looked at with all of them.
    """
    state, about = read_weights(file)
    model, _ = build_model(config.model.name, config.model.arguments(), classes)
    if not isinstance(model, VisionTransformer):
        raise ConfigError(f"{config.model.name} is timm's own: this analysis is of vitlocal_… models")
    if (table := state.get("stage_table")) is not None:
        add_stage_table(model, len(table), 0.0, 0.0, config.of("unfreeze").stage_tokens)
    model.load_state_dict(state)
    set_shape(model, replace(Shape.from_state(about["shape"]), attention_keep_rate=1.0, per_head_masks=False))
    return about["epoch"], model.eval()


def kept_files(run: Path) -> list[Path]:
    """The weights that a run kept, the earliest first; ConfigError where there are none."""
    found = sorted((run / KEPT).glob("*.safetensors"))  # their names begin with the step
    if not found:
        raise ConfigError(
            f"{run / KEPT} holds no weights; train with --run.keep_weights=yes, which keeps them at each evaluation"
        )
    return found


def validation_batches(config: Config, images: int, device: torch.device) -> list[Tensor]:
    """``images`` of the validation split, spread over all of it, normalised, in batches."""
    sources = open_sources(config, device)
    normalize = Normalize().to(device)
    count = sources.val.count
    wanted = torch.tensor([place * count // images for place in range(images)]).unique()  # all, where there are fewer
    found: list[Tensor] = []
    try:
        with sources.val.open(Feed(config.evaluate.size, config.evaluate.batch_size), Position()) as batches:
            for batch in batches:
                chosen = torch.isin(batch.ids, wanted).nonzero().flatten().to(device)
                found.append(normalize(batch.images[chosen]).clone())
    finally:
        sources.close()
    return list(torch.cat(found).split(BATCH))


def drawn(rows: Sequence[dict[str, Any]]) -> Figure:
    """The three measures against the epoch, a line a block."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    titles = {"heads_cka": "CKA between heads", "hidden_percent": "components of hidden units, %",
              "attended_percent": "patches attended to, %"}  # fmt: skip
    blocks = sorted({row["block"] for row in rows})
    colours = matplotlib.colormaps["viridis"]
    for axes, (name, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for block in blocks:
            mine = [row for row in rows if row["block"] == block]
            colour = colours(block / max(1, blocks[-1]))
            axes.plot([row["epoch"] for row in mine], [row[name] for row in mine], color=colour, marker="o",
                      markersize=3, linewidth=1.2, label=f"block {block}")  # fmt: skip
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    return figure


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vitlocal.bench redundancy", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("run", metavar="RUN", help="the folder of a run that kept weights")
    parser.add_argument("--images", type=int, default=512, metavar="N", help="of the validation split (default: 512)")
    parser.add_argument("--data", metavar="DIR", help="the data folder (default: what the run had)")
    parser.add_argument("--json", metavar="FILE", help="write the rows")
    parser.add_argument("--plot", type=plot_file, metavar="FILE", help="draw them (png, svg or pdf)")
    options = parser.parse_args(argv)
    if options.images < 2:
        raise ConfigError(f"--images: got {options.images}, expected at least 2")
    folder = Path(options.run)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder} holds no run; expected a folder that train_imagenet.py made")
    data = [f"--data.root={options.data}"] if options.data else []
    config = read_config([f"--config-file={folder / 'config.yaml'}", *data], {})
    files = kept_files(folder)
    classes = len(load_manifest(config.data.root, "val").classes)
    device = prepare_device(config)
    batches = validation_batches(config, options.images, device)
    rows: list[dict[str, Any]] = []
    print(f"{'epoch':>7} {'block':>6} {'heads, CKA':>11} {'hidden, %':>10} {'attended, %':>12}")
    for file in files:
        epoch, model = model_of(file, config, classes)
        for row in analysed(model.to(device), batches):
            rows.append({"epoch": epoch, **row})
            print(
                f"{epoch:7.2f} {row['block']:6d} {row['heads_cka']:11.3f} {row['hidden_percent']:10.1f} "
                f"{row['attended_percent']:12.1f}", flush=True
            )  # fmt: skip
    if options.json:
        what = f"redundancy of a model's parts as it trains, on {sum(map(len, batches))} validation images"
        write_json(options.json, measurement(what, rows))
    if options.plot:
        save(drawn(rows), options.plot)
