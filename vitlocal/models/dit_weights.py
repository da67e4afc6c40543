"""Weights of a DiT: loads published files, folders of ``diffusers`` and runs, and writes folders for ``diffusers``.

Shapes: D width, K classes of the model, R rows of a file's label table.
"""

import argparse
import json
import re
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from timm.models import clean_state_dict
from torch import Tensor

from vitlocal.errors import ConfigError
from vitlocal.jsonl import replace_text
from vitlocal.models.dit import DiT, fold_stage
from vitlocal.models.shape import exported_state_dict
from vitlocal.models.weight_files import options_of_run, read_description, read_weights, write_weights

LABELS, TIME_BIAS = "y_embedder.embedding_table.weight", "t_embedder.mlp.2.bias"
STAGES = "s_embedder.embedding_table.weight"  # of AutoProg-Zero
# Names of layers in diffusers, and those of DiT: outside of blocks, in each block, and in each block but shared in DiT.
OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
IN_BLOCKS = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
SHARED = {
    "norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
PIPELINE_CLASSES = 1000  # DiTPipeline takes this row of the label table for "no class"
WEIGHTS = "diffusion_pytorch_model"  # a file's name in diffusers, without its ending
SCHEDULER = dict(
    num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear", trained_betas=None,
    clip_sample=False, set_alpha_to_one=True, steps_offset=0, prediction_type="epsilon", timestep_spacing="leading",
)  # fmt: skip


@dataclass
class DiTFile:
    """Weights in DiT's names, and what the folder says about them: sizes as in :func:`dit_sizes`, names of classes."""

    path: Path
    state: dict[str, Tensor]
    sizes: Mapping[str, Any]
    label_names: Sequence[str] = ()
    problems: list[str] = field(default_factory=list)


def dit_sizes(model: DiT) -> dict[str, Any]:
    """Returns the options of the model, with the depth of its current shape, by their names in timm."""
    return dict(
        img_size=model.x_embedder.grid_size[0] * model.patch_side, patch_size=model.patch_side // model.stride,
        in_chans=model.in_chans, stride=model.stride, embed_dim=model.embed_dim, depth=len(model.active.block_order),
        num_heads=model.blocks[0].attn.num_heads, learn_sigma=model.learn_sigma,
    )  # fmt: skip


def load_dit_weights(model: DiT, path: str, classes: Sequence[str] = (), labels: str = "keep") -> list[str]:
    """Loads the weights in ``path`` into ``model``; returns the names of the parameters that keep their initial values.

    ``path`` is a file of facebookresearch/DiT, or of code that follows it, with or without ``ema`` and ``model``; or
    the folder of a pipeline or transformer of ``diffusers``; or the folder of a run. A file's average is preferred.

    ``labels``: with "keep", class k gets row k of the file's label table, which must have K + 1 rows or more; if the
    folder names all ``classes``, each gets the row of its name. The last row is that of no class. "new" draws the table
    anew. A stage table, ``s_embedder``, is folded at its last stage. The position table is computed, not loaded.

    Raises :class:`ConfigError` that names everything that does not fit.
    """
    found = _read(Path(path))
    state, problems, own = found.state, found.problems, model.state_dict()
    compared = dit_sizes(model) | {"depth": len(model.blocks)}
    del compared["img_size"], compared["learn_sigma"]  # any size will do; the output's weights tell whether it did
    for name, value in found.sizes.items():
        if name in compared and value not in (None, compared[name]):
            problems.append(f"its {name} is {value}, the model's {compared[name]}")
    state.pop("pos_embed", None)
    stages = state.pop(STAGES, None)
    if stages is not None and {LABELS, TIME_BIAS} <= state.keys():
        fold_stage(state, stages[-2], stages[-1])
    kept = [name for name in ("stage_table",) if name in own and name not in state]
    if labels == "new":
        kept.append(LABELS)
    elif LABELS in state:
        rows, names = len(state[LABELS]), list(found.label_names)
        if rows <= model.num_classes:
            problems.append(
                f"its label table has {rows} rows, the model's {model.num_classes + 1}, one of them for no class; with "
                "diffusion.labels=new the table is drawn anew"
            )
        else:
            known = len(set(names)) == len(names) < rows and bool(classes) and set(classes) <= set(names)
            chosen = [names.index(name) for name in classes] if known else list(range(model.num_classes))
            state[LABELS] = state[LABELS][[*chosen, -1]]
    state |= {name: own[name] for name in kept}
    problems += _differences(model, own, state)
    if problems:
        hint = options_of_run(found.path.parent)
        raise ConfigError(f"model.weights: {found.path} is not of this model: {'; '.join(problems)}{hint}")
    model.load_state_dict({name: state[name] for name in own})
    return kept


def _differences(model: DiT, own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Returns what is missing in ``state``, what the model lacks, and what has another shape."""
    problems, ignored, output = [], {LABELS}, "final_layer.linear.bias"  # too few labels have words of their own
    if output in state and len(state[output]) / len(own[output]) in (0.5, 2):
        problems.append(f"it was trained with learn_sigma={not model.learn_sigma}; use this option")
        ignored |= {output, "final_layer.linear.weight"}
    for names, what in ((own.keys() - state.keys(), "it lacks"), (state.keys() - own.keys(), "the model lacks")):
        if names:
            problems.append(f"{what} {', '.join(sorted(names)[:3])} (of {len(names)})")
    wrong = [name for name in own if name in state and own[name].shape != state[name].shape]
    wrong = [name for name in wrong if name not in ignored or own[name].shape[1:] != state[name].shape[1:]]
    if wrong:
        shapes = [f"{name} has shape {tuple(state[name].shape)}, expected {tuple(own[name].shape)}" for name in wrong]
        problems.append(", ".join(shapes[:3]) + f" (of {len(wrong)})")
    return problems


# --- reading ----------------------------------------------------------------------------------------------------------


def _read(path: Path) -> DiTFile:
    """Reads a file, the folder of a run, or a folder of ``diffusers``."""
    if not path.is_dir():
        return _read_run(path)
    for folder in (path / "transformer", path):
        config = read_description(folder)
        if "_class_name" in config:
            files = [folder / f"{WEIGHTS}.safetensors", folder / f"{WEIGHTS}.bin"]
            file = next((file for file in files if file.is_file()), files[0])
            found = _from_diffusers(file, read_weights(file, _read_state), config)
            return replace(found, label_names=_pipeline_labels(path))
    return _read_run(path / "model.safetensors")


def _pipeline_labels(folder: Path) -> list[str]:
    """Returns the names of the classes in a pipeline's ``model_index.json``, in order; empty if it has none."""
    names = read_description(folder, "model_index.json").get("id2label")
    if not isinstance(names, dict) or names.keys() != set(map(str, range(len(names)))):  # else no row is known
        return []
    return [str(names[str(row)]) for row in range(len(names))]


def _read_run(file: Path) -> DiTFile:
    state, description = read_weights(file, _read_state), read_description(file.parent)
    return DiTFile(file, state, description.get("model_args") or {}, description.get("label_names") or ())


def _read_state(path: str) -> dict[str, Tensor]:
    """Returns the state dict in a file: that of the average, else of the model, else the file's content itself."""
    if path.endswith(".safetensors"):
        return load_file(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts add their arguments
        # Mapped files need no memory for the optimizer's state.
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    state = clean_state_dict(found.get("ema") or found.get("model") or found)
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it has no state dict under ema or model, and is none")
    return state


def _from_diffusers(file: Path, theirs: Mapping[str, Tensor], config: Mapping[str, Any]) -> DiTFile:
    """Renames the weights of ``DiTTransformer2DModel``. Its blocks have copies of the embeddings of time and class."""
    state: dict[str, Tensor] = {}
    differing = set()
    parts: dict[str, list[Tensor | None]] = {}
    for name, tensor in theirs.items():
        layer, _, kind = name.rpartition(".")
        match = re.fullmatch(r"transformer_blocks\.(\d+)\.(.+)", layer)
        number, inner = match.groups() if match else ("", "")
        if inner in QKV:
            parts.setdefault(f"blocks.{number}.attn.qkv.{kind}", [None] * 3)[QKV.index(inner)] = tensor
        elif inner in SHARED:
            if not torch.equal(state.setdefault(f"{SHARED[inner]}.{kind}", tensor), tensor):
                differing.add(SHARED[inner])
        elif match:
            state[f"blocks.{number}.{IN_BLOCKS.get(inner, inner)}.{kind}"] = tensor
        elif name != "pos_embed.pos_embed":
            state[f"{OUTSIDE.get(layer, layer)}.{kind}"] = tensor
    for name, tensors in parts.items():
        if present := [tensor for tensor in tensors if tensor is not None]:
            state[name] = torch.cat(present)
    heads, width = config.get("num_attention_heads"), config.get("attention_head_dim")
    sizes = dict(
        patch_size=config.get("patch_size"), depth=config.get("num_layers"), num_heads=heads,
        in_chans=config.get("in_channels"), embed_dim=heads * width if heads and width else None,
    )  # fmt: skip
    problems = [f"its blocks have different {', '.join(sorted(differing))}, and DiT has one"] if differing else []
    if (kind := config.get("norm_type", "ada_norm_zero")) != "ada_norm_zero":
        problems.append(f"its norm_type is {kind}, expected ada_norm_zero")
    return DiTFile(file, state, sizes, problems=problems)


# --- writing ----------------------------------------------------------------------------------------------------------


def export_diffusers(
    folder: Path, model: DiT, size: int, classes: Sequence[str], *,
    scheduler: Mapping[str, Any] | None = None, autoencoder: Path | None = None,
) -> None:  # fmt: skip
    """Writes a folder that ``diffusers.DiTPipeline.from_pretrained`` loads: the model in its current shape and stage.

    ``size``: of the images, px. ``scheduler``: options of ``DDIMScheduler`` beside :data:`SCHEDULER`. ``autoencoder``:
    a folder of ``AutoencoderKL``, or of a pipeline with one, to copy; None: give ``from_pretrained`` one as ``vae``.

    The label table has 1,001 rows, because the pipeline takes row 1,000 for no class: ours first, then copies of the
    row of no class. The pipeline computes other timestep frequencies than DiT (k/127, not k/128), which no option
    changes, see :func:`~vitlocal.models.dit.timestep_embedding`. Set them back after loading::

        for block in pipe.transformer.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0

    Raises :class:`ConfigError` for a model that the pipeline cannot hold.
    """
    count, first = model.num_classes, model.blocks[0].mlp.fc1
    problems = {
        f"the model has {count} classes, and DiTPipeline takes row {PIPELINE_CLASSES} for no class": (
            count > PIPELINE_CLASSES
        ),
        "the model makes images, and DiTPipeline decodes latents": model.stride == 1,
        "the model's feed-forward parts have convolutions, and those of diffusers have none": model.blocks[0].is_local,
        f"the model's hidden width is {first.out_features}, and diffusers has 4 widths, {4 * model.embed_dim}": (
            first.out_features != 4 * model.embed_dim
        ),
    }
    if wrong := [text for text, is_wrong in problems.items() if is_wrong]:
        raise ConfigError(f"export to diffusers: {'; '.join(wrong)}; use model.safetensors of the run")
    if autoencoder is not None:
        _copy_autoencoder(autoencoder, folder / "vae", model.in_chans)
    sizes = dit_sizes(model)
    heads, channels = sizes["num_heads"], model.in_chans
    transformer = dict(
        _class_name="DiTTransformer2DModel", num_attention_heads=heads, attention_head_dim=model.embed_dim // heads,
        in_channels=channels, out_channels=channels * (2 if model.learn_sigma else 1), num_layers=sizes["depth"],
        dropout=0.0, attention_bias=True, sample_size=size // model.stride, patch_size=sizes["patch_size"],
        activation_fn="gelu-approximate", num_embeds_ada_norm=PIPELINE_CLASSES, norm_type="ada_norm_zero",
        norm_elementwise_affine=False, norm_eps=1e-6,
    )  # fmt: skip
    index = {"_class_name": "DiTPipeline", "id2label": {str(row): name for row, name in enumerate(classes)}}
    modules = dict(scheduler="DDIMScheduler", transformer="DiTTransformer2DModel", vae="AutoencoderKL")
    index |= {name: ["diffusers", kind] for name, kind in modules.items()}
    options = dict(_class_name="DDIMScheduler", **SCHEDULER) | dict(scheduler or {})
    _write_json(folder / "transformer" / "config.json", transformer)
    _write_json(folder / "scheduler" / "scheduler_config.json", options)
    write_weights(folder / "transformer" / f"{WEIGHTS}.safetensors", _to_diffusers(exported_state_dict(model)))
    _write_json(folder / "model_index.json", index)  # last: if it is there, the export is complete


def _to_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of :func:`_from_diffusers`, for a label table of 1,001 rows."""
    outside, in_blocks, shared = (
        {ours: name for name, ours in names.items()} for names in (OUTSIDE, IN_BLOCKS, SHARED)
    )
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("blocks."))
    table = state[LABELS]
    null = table[-1:].expand(PIPELINE_CLASSES + 1 - (len(table) - 1), -1)
    found = {}
    for name, tensor in (state | {LABELS: torch.cat([table[:-1], null])}).items():
        layer, _, kind = name.rpartition(".")
        if layer in shared:  # clones, because a file of safetensors holds no tensor twice
            for block in range(depth):
                found[f"transformer_blocks.{block}.{shared[layer]}.{kind}"] = tensor.clone()
        elif layer in outside:
            found[f"{outside[layer]}.{kind}"] = tensor
        elif layer.startswith("blocks."):
            _, number, inner = layer.split(".", 2)
            whole = inner != "attn.qkv"
            names, tensors = ([in_blocks[inner]], [tensor]) if whole else (QKV, tensor.chunk(3))
            for theirs, part in zip(names, tensors, strict=True):
                found[f"transformer_blocks.{number}.{theirs}.{kind}"] = part.clone()
    return found


def _copy_autoencoder(source: Path, folder: Path, channels: int) -> None:
    """Copies an autoencoder's configuration and weights; :class:`ConfigError` if they are not there or do not fit."""
    source = source / "vae" if (source / "vae").is_dir() else source
    found = read_description(source).get("latent_channels")
    files = [source / "config.json", *sorted(source.glob(f"{WEIGHTS}.*"))]
    if found is None or len(files) == 1:
        raise ConfigError(f"{source} holds no autoencoder: expected config.json and {WEIGHTS}.safetensors of diffusers")
    if found != channels:
        raise ConfigError(f"the autoencoder in {source} has {found} channels, and the model {channels}; use the one "
                          "whose latents the model was trained on")  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    for file in files:
        shutil.copyfile(file, folder / file.name)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(content, indent=2) + "\n")
