"""Measures redundancy in a model during training: python -m vitlocal.bench redundancy RUN [--images 512] [--plot FILE]

This is the analysis behind Budgeted Training (Xia et al. 2023, ICLR, section 3). It reads the weights that a run with
run.keep_weights=yes kept at its evaluations, and measures each block on validation images:

    heads      mean linear CKA between the outputs of two heads: 1 if they are equal up to scale and rotation
    hidden     principal components that explain 99 % of the variance of the hidden units, in % of all
    attention  patches that the class token attends to, as the exponential of the entropy, in % of all
               (without a class token: the attention averaged over tokens)

Shapes: B images, T tokens, N patch tokens, M heads, d head width, C hidden width.
"""

from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from vitlocal.bench.measurement import PlottedLine, plot_lines, progress_bar, text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, plot_file
from vitlocal.config import Config
from vitlocal.data.augment import Normalize
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError
from vitlocal.methods import build_methods
from vitlocal.methods.method import MethodContext
from vitlocal.models.block import attention_weights
from vitlocal.models.deit import FeedForward
from vitlocal.models.factory import build_model
from vitlocal.models.shape import SLICED, add_stage_table, model_blocks, model_parts, set_shape
from vitlocal.models.vit import VisionTransformer
from vitlocal.plan import Feed, Shape
from vitlocal.progress import Position
from vitlocal.report.run_folder import read_run
from vitlocal.tasks.metrics import task_name
from vitlocal.train.build import device_of, sources_of
from vitlocal.train.output import KEPT, read_weights

# The measures of a row, with their titles.
MEASURES = {
    "heads_cka": "CKA between heads",
    "hidden_percent": "components of hidden units, %",
    "attended_percent": "patches attended to, %",
}
COLUMNS = {"epoch": ("epoch", ".2f"), "block": ("block", "d")} | {t: (name, ".3f") for name, t in MEASURES.items()}


def linear_cka(outputs: Tensor) -> Tensor:
    """Returns the linear CKA between the M heads of outputs (B·T, M, d): (M, M) float64, 1 on the diagonal.

    With K = XXᵀ and centering, HSIC(K, L) is ‖XᵀY‖² of centered X and Y, up to a factor that cancels.
    """
    _, heads, width = outputs.shape
    x = outputs.double().flatten(1)
    x = x - x.mean(dim=0)
    cross = (x.T @ x).view(heads, width, heads, width)
    hsic = cross.square().sum(dim=(1, 3))  # (M, M)
    norms = hsic.diagonal().clamp_min(1e-30).sqrt()
    return hsic / (norms[:, None] * norms[None, :])


def mean_pair(matrix: Tensor) -> float:
    """Returns the mean over pairs of different heads; NaN for one head."""
    return float((matrix.sum() - matrix.trace()) / (matrix.numel() - len(matrix)))


def component_percent(hidden: Tensor) -> Tensor:
    """Returns the components that explain 99 % of the variance of hidden units (B, N, C), in percent: (B,)."""
    x = hidden.double()
    x = x - x.mean(dim=1, keepdim=True)
    # Eigenvalues of the smaller product: the squared singular values, many times as fast.
    gram = x @ x.mT if x.shape[1] <= x.shape[2] else x.mT @ x
    variances = torch.linalg.eigvalsh(gram).clamp_min(0).flip(1)  # (B, min(N, C)), descending
    explained = variances.cumsum(dim=1) / variances.sum(dim=1, keepdim=True).clamp_min(1e-30)
    return 100 * (1 + (explained < 0.99 - 1e-12).sum(dim=1)) / variances.shape[1]


def attended_percent(attention: Tensor) -> Tensor:
    """Returns the exponential of the entropy of attention over N patches (B, N), in percent of N: (B,) float64."""
    return 100 * Categorical(attention.double()).perplexity() / attention.shape[1]


@torch.inference_mode()
def measure_blocks(model: VisionTransformer, batches: Sequence[Tensor]) -> list[dict[str, float]]:
    """Returns a row of measures for each block, over batches of normalised images (B, 3, S, S)."""
    rows = [dict.fromkeys(MEASURES, 0.0) for _ in model.active.block_order]
    with ExitStack() as hooks:
        for index, row in zip(model.active.block_order, rows, strict=True):
            for hook in _measuring_hooks(model, model.blocks[index], row):
                hooks.enter_context(hook)
        for images in batches:
            model(images)
    count = sum(map(len, batches))
    return [{"block": place, **{name: row[name] / count for name in row}} for place, row in enumerate(rows)]


def _measuring_hooks(model: VisionTransformer, block: Any, row: dict[str, float]) -> list[Any]:
    """Registers hooks on ``block`` that add each image's measures to ``row``."""

    prefix = model.num_prefix_tokens

    def after_norm(module: Any, inputs: Any, tokens: Tensor) -> None:
        query, key, value = block.attn.project_qkv(tokens)  # (B, M, T, d) each
        weights = attention_weights(query, key)
        outputs = (weights @ value).permute(0, 2, 1, 3).flatten(0, 1)  # (B·T, M, d)
        mean = weights.mean(dim=1)  # (B, T, T)
        attention = (mean[:, 0] if model.has_class_token else mean.mean(dim=1))[:, prefix:]  # (B, N)
        row["heads_cka"] += len(tokens) * mean_pair(linear_cka(outputs))
        row["attended_percent"] += float(attended_percent(attention).sum())

    def before_mlp(module: Any, inputs: tuple[Any, ...]) -> None:
        skipped = prefix if isinstance(module, FeedForward) else 0  # DeiT's prefix tokens have hidden units
        row["hidden_percent"] += float(component_percent(module.hidden_units(*inputs)[:, skipped:]).sum())

    return [block.norm1.register_forward_hook(after_norm), block.mlp.register_forward_pre_hook(before_mlp)]


def check_measurable(name: str, measurable: bool) -> None:
    """Raises ConfigError unless the blocks of the model with this ``name`` can be measured."""
    if not measurable:
        raise ConfigError(f"{name}: only vitlocal_deit_… and local-FFN models, which classify, can be measured")


def kept_model(file: Path, config: Config, num_classes: int) -> tuple[float, nn.Module]:
    """Returns the epoch at which ``file`` was kept, and the model in its shape then."""
    state, about = read_weights(file)
    model, _ = build_model(config.model.name, config.model.arguments(), num_classes)
    blocks = len(getattr(model, "blocks", ()))
    for method in build_methods(MethodContext(config.recipe, parts=model_parts(model), blocks=blocks)):
        if method.needs.stage_embedding is not None:
            add_stage_table(model, method.needs.stage_embedding)
    model.load_state_dict(state)
    set_shape(model, Shape.from_state(about["shape"]))
    return about["epoch"], model.eval()


def load_kept(file: Path, config: Config, num_classes: int) -> tuple[float, VisionTransformer]:
    """As :func:`kept_model`, for a model that can be measured, without masks in its heads."""
    epoch, model = kept_model(file, config, num_classes)
    is_ours = isinstance(model, VisionTransformer)
    check_measurable(config.model.name, is_ours and isinstance(model_blocks(model)[0].mlp, SLICED))
    assert isinstance(model, VisionTransformer)
    if config.model.rope is not None:
        raise ConfigError(f"model.rope: {config.model.rope} rotates keys after what is measured; use a run without it")
    set_shape(model, replace(model.active, attention_keep_rate=1.0, per_head_masks=False))
    return epoch, model


def validation_batches(config: Config, images: int, device: torch.device) -> list[Tensor]:
    """Returns ``images`` of the validation split, spread over all of it, normalised, in batches."""
    normalize, found = Normalize().to(device), []
    feed = Feed(config.evaluate.size or config.model.size, config.evaluate.batch_size)
    with closing(sources_of(config, device)) as sources, sources.val.open(feed, Position()) as batches:
        count = sources.val.count
        # unique(): if the split has fewer images, all of them
        wanted = torch.tensor([place * count // images for place in range(images)]).unique()
        for batch in batches:
            chosen = torch.isin(batch.ids, wanted).nonzero().flatten().to(device)
            found.append(normalize(batch.images[chosen]).clone())
    return list(torch.cat(found).split(64))


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plots the three measures against the epoch, with a line for each block."""
    blocks = sorted({row["block"] for row in rows})
    panels: dict[str, list[PlottedLine]] = {title: [] for title in MEASURES.values()}
    for block, (name, title) in product(blocks, MEASURES.items()):
        points = [(row["epoch"], row[name]) for row in rows if row["block"] == block]
        color = matplotlib.colormaps["viridis"](block / max(1, blocks[-1]))
        panels[title].append((f"block {block}", points, {"color": color, "marker": "o", "markersize": 3}))
    plot_lines(panels, "epoch", path, (11, 3.6))


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("redundancy", __doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run that kept weights")
    parser.add_argument("--images", type=at_least(2), default=512, metavar="N", help="validation images (default: 512)")
    parser.add_argument("--data", metavar="DIR", help="data folder (default: the run's)")
    parser.add_argument("--plot", type=plot_file, metavar="FILE", help="plot the measures against the epoch")
    options = parser.parse_args(argv)
    config = read_run(options.run).config
    check_measurable(config.model.name, task_name(config.model.name) == "classification")
    if options.data:
        config = replace(config, data=replace(config.data, root=options.data))
    files = sorted((options.run / KEPT).glob("*.safetensors"))  # their names begin with the step
    if not files:
        raise ConfigError(f"{options.run / KEPT} holds no weights; train with --run.keep_weights=yes, which keeps them")
    num_classes = len(load_manifest(config.data.root, "val").classes)
    device = device_of(config)
    batches = validation_batches(config, options.images, device)
    rows: list[dict[str, Any]] = []
    with progress_bar(len(files)) as bar:
        for file in files:
            epoch, model = load_kept(file, config, num_classes)
            rows += [{"epoch": epoch, **row} for row in measure_blocks(model.to(device), batches)]
            bar.update()
    print(text_table(rows, COLUMNS))
    what = f"redundancy of a model's parts during training, on {sum(map(len, batches))} validation images"
    write_json(options.json, what, rows)
    if options.plot:
        draw(rows, options.plot)
