"""The trainer's configuration: its sections of options and checks that need several options.

Frozen dataclasses declare name, kind, default and meaning of each option once.
"""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from vitlocal.config_reader import OptionReader, by_dotted_name, plain_value
from vitlocal.methods import METHODS, method_problems
from vitlocal.methods.method import Recipe
from vitlocal.options import (
    COUNT,
    DECAY,
    FLAG,
    FRACTION,
    PIXELS,
    TEXT,
    THOUSAND,
    TIMM_NAMES,
    Choice,
    Duration,
    Number,
    Section,
    Series,
    messages,
    option,
)
from vitlocal.progress import Length
from vitlocal.schedule import LRSchedule

LARGEST_ERASED = 836  # px; random erasing in data/augment.py has this many pixels of noise in each of three channels
LOSSES = ("cross_entropy", "binary_cross_entropy")
LOADERS = ("native", "ffcv", "torchvision", "dali")
CROP_OPTIONS = ("crop_scale", "crop_ratio", "flip", "repeats")  # of the section augment; the loader crops


@dataclass(frozen=True)
class DataConfig:
    root: str = option("data/imagenet", TEXT, "data folder that write_dataset.py filled")
    loader: str = option(
        "native", Choice(*LOADERS), "native and ffcv read the data folder; torchvision and dali decode original images"
    )
    source: str | None = option(None, TEXT, "original images, for torchvision and dali; none: see the manifest")
    workers: int = option(0, Number(0, 1024, whole=True), "decoding threads; 0: one per core, two fewer on a GPU")
    on_error: str = option("stop", Choice("stop", "skip"), "at a damaged image; skip: use another image (native only)")
    side_ratio: float = option(1.5, Number(0.1, 16), "prefer files with side >= this ratio x the image size")


@dataclass(frozen=True)
class ModelConfig:
    name: str = option("vitlocal_small_patch16_224", TEXT, "any timm model; our models begin with vitlocal_")
    size: int = option(224, PIXELS, "largest image size, px; the position embeddings cover its grid")
    patch_size: int | None = option(None, PIXELS, "patch size, px; none: from the model's name")
    width: int | None = option(None, PIXELS, "embedding width; none: from the model's name")
    depth: int | None = option(None, THOUSAND, "number of blocks; none: from the model's name")
    heads: int | None = option(None, THOUSAND, "attention heads per block; none: from the model's name")
    pool: str | None = option(None, Choice("token", "avg"), "pooling: class token, or mean of the tokens")
    qkv_bias: bool | None = option(None, FLAG, "biases in the query, key and value layers")
    activation: str | None = option(None, Choice("h_swish", "gelu"), "ablation: activation of the local FFN")
    norm: str | None = option(None, Choice("layer", "batch"), "ablation: normalisation of the local FFN")
    convolution: bool | None = option(
        None, FLAG, "depth-wise convolution in the FFN of local-FFN models (none: yes) and DiTs (none: no)"
    )
    train_pos_embed: bool | None = option(None, FLAG, "train the position embeddings; none: yes")
    learn_sigma: bool | None = option(None, FLAG, "diffusion transformers: also predict variances; none: yes")
    init: str | None = option(None, Choice("trunc_normal", "xavier"), "distribution of the initial weights")
    pos_embed_init: str | None = option(None, Choice("random", "sincos"), "initial position embeddings")
    drop_path: float = option(0.1, Number(0, 0.9), "stochastic depth: rate at the last block")
    patch_drop: float | None = option(None, Number(0, 0.95), "fraction of the patches that training drops at random")
    layer_scale: float | None = option(None, Number(1e-8, 10), "initial factors of LayerScale; none: no LayerScale")
    rope: str | None = option(None, Choice("axial", "mixed"), "rotary positions; mixed: with learned frequencies")
    rope_theta: float | None = option(None, Number(1), "rotary positions: theta; none: 100 (axial) or 10 (mixed)")
    rope_coordinates: str | None = option(
        None, Choice("image", "patches"), "rotary positions count in parts of the image (none), or in patches"
    )
    use_abs_pos_emb: bool | None = option(None, FLAG, "add a table of position embeddings; none: yes")
    stem: str | None = option(None, Choice("patch", "hmlp"), "first layers: one per patch (none), or several")
    stem_width: int | None = option(None, PIXELS, "stem=hmlp: channels; none: a quarter of the width")
    stem_norm: str | None = option(None, Choice("layer", "batch"), "stem=hmlp: its norm; none: layer")
    weights: str | None = option(
        None, TEXT, "initial weights: a run folder or a file; a head for other classes starts at random"
    )

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for ``timm.create_model`` that this configuration sets."""
        values = {name: value for name, value in vars(self).items() if name not in ("name", "weights")}
        return {TIMM_NAMES.get(name, name): value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = option(256, COUNT, "images per step, over all processes")
    lr: float = option(1e-3, Number(0), "peak learning rate, for train.lr_batch images per step")
    lr_batch: int = option(512, Number(0, whole=True), "the peak is train.lr x batch_size / lr_batch; 0: train.lr")
    schedule: str = option("cosine", Choice("cosine", "linear", "constant"), "learning rate schedule")
    schedule_length: Length | None = option(None, Duration(), "length of the schedule; none: the budget")
    schedule_by: str = option("step", Choice("step", "epoch"), "update the learning rate after each step or epoch")
    end_lr: float = option(1e-5, Number(0), "learning rate at the end of the schedule (not scaled)")
    warmup: Length = option(Length.parse("0ep"), Duration(), "length of the linear warm-up from a learning rate of 0")
    optimizer: str = option(
        "adamw", Choice("adamw", "muon", "soap"), "muon, soap: that one for matrices in blocks, AdamW for the rest"
    )
    muon_momentum: float = option(0.95, DECAY, "Muon: momentum")
    soap_every: int = option(10, COUNT, "SOAP: steps from one change of the eigenbases to the next")
    weight_decay: float = option(0.05, Number(0), "weight decay; none on norms, biases, embeddings and tokens")
    betas: tuple[float, float] = option((0.9, 0.999), Series(DECAY, 2), "AdamW and SOAP: betas")
    eps: float = option(1e-8, Number(0), "AdamW and SOAP: epsilon")
    clip_norm: float | None = option(None, Number(0), "largest gradient norm; none: no clipping")
    loss: str = option("cross_entropy", Choice(*LOSSES), "classifiers: loss; binary: a yes or no for each class")
    bce_target_thresh: float | None = option(None, FRACTION, "binary_cross_entropy: targets above it become 1")
    soft_labels: bool = option(
        False, FLAG, "learn from the labels of a teacher, which write_dataset.py --labels-from wrote for these crops"
    )
    label_smoothing: float = option(0.1, FRACTION, "label smoothing of the cross-entropy")
    ema_decay: float | None = option(None, DECAY, "moving average of the weights: decay per step; none: off")
    ema_length: Length | None = option(
        None, Duration(), "moving average of the weights: length until it forgets to 1/e (2% fits any budget)"
    )
    precision: str = option("auto", Choice("auto", "bf16", "fp16", "fp32"), "auto: on a GPU bf16 or fp16, else fp32")
    grad_accum_steps: int = option(1, COUNT, "gradient accumulation: parts of each process's batch, to save memory")
    grad_checkpointing: bool = option(False, FLAG, "gradient checkpointing: compute activations twice, to save memory")
    compile: str = option("auto", Choice("auto", "yes", "no"), "use torch.compile for each image size; auto: on a GPU")
    compile_at: str = option("start", Choice("start", "stage"), "compile all sizes at the start, or at their stages")
    cuda_graphs: str = option("auto", Choice("auto", "yes", "no"), "use CUDA graphs; auto: for steps of small kernels")
    kernel: str = option("auto", Choice("auto", "fused", "plain"), "kernel of the local FFN; auto: the faster one")

    @property
    def lr_schedule(self) -> LRSchedule:
        """The learning-rate schedule; its peak is scaled with the batch size."""
        peak = self.lr * (self.batch_size / self.lr_batch if self.lr_batch else 1.0)
        return LRSchedule(self.schedule, peak, self.end_lr, self.warmup, self.schedule_length, self.schedule_by)


@dataclass(frozen=True)
class AugmentConfig:
    crop_scale: tuple[float, float] = option((0.08, 1.0), Series(FRACTION, 2), "area of the random crop: range")
    crop_ratio: tuple[float, float] = option((0.75, 4 / 3), Series(Number(0.01), 2), "width / height of crops: range")
    flip: float = option(0.5, FRACTION, "probability of a horizontal flip")
    repeats: int = option(1, THOUSAND, "repeated augmentation: consecutive copies of each image in an epoch")
    randaugment: float = option(
        0.0, Number(0, 30), "RandAugment: magnitude, with 2 operations, up to 10 (big_vision: 30); 0: off"
    )
    randaugment_ops: str = option(
        "timm", Choice("timm", "big_vision"), "RandAugment: operations; timm: its increasing ones, each applied with "
        "probability 0.5; big_vision: with cutout, always applied"
    )  # fmt: skip
    three_augment: bool = option(False, FLAG, "three-augment: grey, solarised or blurred images, and colour jitter")
    mixup: float = option(0.0, Number(0), "mixup: alpha; 0: off")
    cutmix: float = option(0.0, Number(0), "cutmix: alpha; 0: off")
    mixup_prob: float = option(1.0, FRACTION, "probability that mixup or cutmix changes a batch")
    cutmix_prob: float = option(0.5, FRACTION, "probability of cutmix instead of mixup, if both are on")
    random_erasing: float = option(0.0, FRACTION, "probability of random erasing, with pixel noise")

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for :class:`vitlocal.data.augment.Augment`."""
        return {name: value for name, value in vars(self).items() if name not in CROP_OPTIONS}


@dataclass(frozen=True)
class DiffusionConfig:
    """Options of diffusion transformers (``model.name=vitlocal_dit_...``). Other models ignore them."""

    steps: int = option(1000, Number(21, 100_000, whole=True), "time steps of the noise schedule")
    schedule: str = option("linear", Choice("linear", "cosine"), "noise schedule")
    snr_gamma: float | None = option(None, Number(0.01), "Min-SNR weighting of the loss: gamma; none: off, as in DiT")
    label_dropout: float = option(0.1, FRACTION, "probability that an image is trained without its class")
    labels: str = option(
        "keep", Choice("keep", "new"), "label table of model.weights: class k keeps row k, or a new one"
    )
    stage_drop: str = option(
        "joint", Choice("joint", "apart"), "stage embedding: images without a class, and only they, have no stage; "
        "apart: drawn for itself"
    )  # fmt: skip
    loss_passes: int = option(
        2, Number(1, 10, whole=True), "held-out loss: time steps at which each image is evaluated, of ten"
    )
    sampler: str = option("ddim", Choice("ddim", "ddpm"), "sampler of evaluations")
    sample_steps: int = option(50, COUNT, "sampler of evaluations: steps")
    guidance: float = option(4.0, Number(0), "sampler of evaluations: scale of classifier-free guidance; 1: none")
    guided_channels: str = option("all", Choice("all", "3"), "sampler of evaluations: guided channels; 3: as published")
    grid_classes: int = option(8, Number(0, 50, whole=True), "classes in the grid of samples; 0: no grid")
    samples: int = option(0, Number(0, 10**6, True), "samples for the Fréchet distance of each evaluation; 0: none")
    last_samples: int = option(
        1000,
        Number(0, 10**6, True),
        "samples for the Fréchet distance of the last evaluation, if more than diffusion.samples",
    )
    sample_batch: int = option(64, COUNT, "samples that are drawn at a time")
    features: str | None = option(
        None, TEXT, "features of the Fréchet distance: a classifier's run folder, or a file of Inception weights (FID)"
    )
    vae: str | None = option(None, TEXT, "folder of the autoencoder that decodes samples of latents; none: no samples")


@dataclass(frozen=True)
class EvaluateConfig:
    size: int | None = option(None, PIXELS, "size of evaluation crops, px; none: model.size", none_is="model.size")
    every: float = option(1.0, Number(0), "epochs between evaluations, rounded up; 0: only at the end")
    rows: str = option("all", Choice("all", "even", "odd"), "rows of the validation split that are evaluated")
    batch_size: int = option(256, COUNT, "images per batch of an evaluation")
    crop_pct: float = option(
        0.875, Number(0.01, 1), "centre crop: its size as a fraction of the resized short edge (224 / 256)"
    )


@dataclass(frozen=True)
class BudgetConfig:
    length: Length = option(Length.parse("24h"), Duration(part=False), "length of training")
    counts: str = option(
        "train", Choice("train", "wall", "cpu"), "train: time without evaluation and saving; wall: all time; "
        "cpu: as train, in processor time of all threads, for runs that share cores"
    )  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    folder: str | None = option(None, TEXT, "folder of the run; none: runs/<recipe and overrides>")
    seed: int = option(0, Number(0, 2**31 - 1, whole=True), "seed of weights, order, crops and augmentation")
    resume: str = option(
        "auto", Choice("auto", "must", "never"), "auto: continue a run in the folder; must (--resume): require one"
    )
    on_nan: str = option(
        "stop", Choice("stop", "rewind"), "if training diverges: stop, or rewind to the last checkpoint and continue "
        "with other random numbers"
    )  # fmt: skip
    rewinds: int = option(3, Number(0, whole=True), "run.on_nan=rewind: rewinds at most, in the whole run")
    device: str = option("auto", TEXT, "device: auto, cpu, cuda or cuda:1")
    threads: int = option(0, Number(0, 1024, whole=True), "CPU threads of PyTorch; 0: PyTorch's default")
    save_every: tuple[Length, ...] = option(
        (Length.parse("10m"), Length.parse("10%")), Series(Duration()), "time between checkpoints: the first to pass"
    )
    replay_search: str | None = option(
        None, TEXT, "folder of an earlier run, whose measured times replace those of this run's searches"
    )
    keep_weights: bool = option(False, FLAG, "keep the weights at each evaluation, for bench redundancy")
    progress: bool = option(True, FLAG, "show a progress bar; without a terminal: print lines during long passes")


# Old names of options outside of methods. A method's section has its own in ``renamed``.
RENAMED_OPTIONS = {
    "augment.three": "augment.three_augment", "augment.mix_chance": "augment.mixup_prob",
    "augment.cutmix_chance": "augment.cutmix_prob", "augment.erase": "augment.random_erasing",
    "train.accumulate": "train.grad_accum_steps", "train.checkpointing": "train.grad_checkpointing",
    "train.graphs": "train.cuda_graphs", "train.ema": "train.ema_decay", "train.momentum": "train.muon_momentum",
    "train.warm": "train.compile_at", "model.position": "model.pos_embed_init",
    "model.train_position": "model.train_pos_embed", "evaluate.crop_ratio": "evaluate.crop_pct",
    "evaluate.part": "evaluate.rows", "run.replay": "run.replay_search",
}  # fmt: skip


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    run: RunConfig = field(default_factory=RunConfig)
    methods: tuple[str, ...] = option((), Series(Choice(*METHODS)), "training methods, in order")
    method_options: Mapping[str, Section] = field(  # of every known method, by its name
        default_factory=lambda: {name: method.options() for name, method in METHODS.items()}
    )

    @property
    def recipe(self) -> Recipe:
        """The part of the configuration that methods may read."""
        model, train, augment = self.model, self.train, self.augment
        mixes = augment.three_augment or augment.mixup or augment.cutmix or augment.random_erasing
        recipe = Recipe(
            methods=self.methods,
            options=self.method_options,
            model_name=model.name,
            model_size=model.size,
            model_weights=model.weights,
            drop_path=model.drop_path,
            batch_size=train.batch_size,
            grad_accum_steps=train.grad_accum_steps,
            compiles=train.compile != "no",
            budget=self.budget.length,
            seed=self.run.seed,
            randaugment=augment.randaugment,
            has_augmentation=bool(augment.randaugment or mixes),
            repeats=augment.repeats,
            on_error=self.data.on_error,
        )
        return replace(recipe, claims=tuple(METHODS[name].claims(recipe) for name in self.methods))

    def nested(self) -> dict[str, Any]:
        """Every option as plain yaml values, in sections."""
        values: dict[str, Any] = {}
        for name in SECTIONS:
            section = self.method_options[name] if name in METHODS else getattr(self, name)
            values[name] = {key: plain_value(value) for key, value in vars(section).items()}
        return {**values, "methods": list(self.methods)}

    def source_arguments(self) -> dict[str, Any]:
        """The keyword arguments for :func:`vitlocal.data.sources.open_sources`."""
        crops = {name: getattr(self.augment, name) for name in CROP_OPTIONS}
        return vars(self.data) | crops | {"seed": self.run.seed, "centre_crop": self.evaluate.crop_pct}

    def flat(self) -> dict[str, Any]:
        """Every option by its dotted name, as plain yaml values."""
        return by_dotted_name(self.nested())

    def yaml(self) -> str:
        """A recipe that repeats this run."""
        return yaml.safe_dump(self.nested(), sort_keys=False)


SECTIONS: dict[str, Any] = {
    **{f.name: f.default_factory for f in fields(Config) if f.name not in ("methods", "method_options")},
    **{name: method.options for name, method in METHODS.items()},
}

MOST_NAME = 120  # characters of the default name of a run
# Options that do not change the result: they may differ when a run is resumed.
IMMATERIAL = frozenset(
    "data.root data.workers data.source evaluate.batch_size diffusion.sample_batch diffusion.vae train.compile "
    "train.grad_accum_steps train.grad_checkpointing train.compile_at train.cuda_graphs train.kernel run.folder "
    "run.resume run.on_nan run.rewinds run.device run.threads run.save_every run.progress run.keep_weights".split()
)


def read_config(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Config:
    """The trainer's configuration from its command line, its recipes and the environment.

    Raises :class:`ConfigError` with a list of all problems. ``--help`` prints the options and exits.
    """
    options = {f"{name}.{f.name}": f for name, section in SECTIONS.items() for f in fields(section)}
    options["methods"] = Config.__dataclass_fields__["methods"]
    argv = ["--run.resume=must" if word == "--resume" else word for word in argv]
    renamed = dict(RENAMED_OPTIONS)
    for name, method in METHODS.items():
        renamed |= {f"{name}.{old}": f"{name}.{new}" for old, new in method.options.renamed.items()}
    reader = OptionReader(options, "Trains a Vision Transformer within a budget.", renamed=renamed)
    values = reader.read(argv, os.environ if environment is None else environment)
    if values["run.folder"] is None:
        values["run.folder"] = default_folder(reader.files, reader.overrides)
    for name, spec in options.items():
        if values[name] is None and spec.metadata["none_is"] is not None:
            values[name] = values[spec.metadata["none_is"]]
    sections = {
        name: section(**{f.name: values[f"{name}.{f.name}"] for f in fields(section)})
        for name, section in SECTIONS.items()
    }
    method_options = {name: sections.pop(name) for name in METHODS}
    config = Config(**sections, methods=values["methods"], method_options=method_options)
    reader.problems += _contradictions(config)
    reader.check()
    return config


def default_folder(files: Sequence[str], overrides: Mapping[str, Any]) -> str:
    """``runs/<recipe>`` with the command line's options in its name, so that variants have folders of their own.

    The end of a long name is replaced by a hash, because file systems limit names to 255 bytes (as UTF-8).
    """
    parts = [Path(files[-1]).stem if files else "run"]
    parts += [f"{name}={value}" for name, value in sorted(overrides.items()) if name not in IMMATERIAL]
    text = "-".join(parts)
    name = re.sub(r"[^\w.=,+-]", "_", text, flags=re.ASCII)
    if len(name) > MOST_NAME:
        name = f"{name[: MOST_NAME - 9]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return f"runs/{name}"


def _contradictions(config: Config) -> list[str]:
    """Problems of options that are valid by themselves, but not together."""
    data, train, augment = config.data, config.train, config.augment
    crops = {name: getattr(augment, name) for name in ("crop_scale", "crop_ratio")}
    return method_problems(config.recipe) + messages({
        "augment.three_augment: it replaces augment.randaugment; set one of them to 0":
            augment.three_augment and augment.randaugment,
        f"augment.randaugment: got {augment.randaugment:g}, expected at most 10 with augment.randaugment_ops=timm":
            augment.randaugment > 10 and augment.randaugment_ops == "timm",
        f"data.on_error: skip needs data.loader=native; with data.loader={data.loader}, use a data folder that was "
        "written with --on-error skip": data.loader != "native" and data.on_error != "stop",
        **{
            f"augment.{name}: got {low}, {high}; expected two positive numbers, the smaller one first":
            not 0 < low <= high for name, (low, high) in crops.items()
        },
        f"augment.random_erasing: its noise covers {LARGEST_ERASED} px, and model.size is {config.model.size}; set "
        "augment.random_erasing=0": augment.random_erasing and config.model.size > LARGEST_ERASED,  # no stage is larger
        f"train.soft_labels: got data.loader={data.loader} and train.loss={train.loss}; use native and cross_entropy":
            train.soft_labels and (data.loader, train.loss) != ("native", "cross_entropy"),
        "train.soft_labels: they belong to the only crop of an image in an epoch; use augment.repeats=1":
            train.soft_labels and augment.repeats > 1,
        "train.soft_labels: run.on_nan=rewind would cut other crops, which have no labels; use run.on_nan=stop":
            train.soft_labels and config.run.on_nan == "rewind",
        "train.ema_length: it replaces train.ema_decay; remove one of the two":
            train.ema_decay is not None and train.ema_length is not None,
        f"diffusion.sample_steps: got {config.diffusion.sample_steps}, expected at most diffusion.steps "
        f"({config.diffusion.steps})": config.diffusion.sample_steps > config.diffusion.steps,
        "diffusion.samples: the Fréchet distance needs diffusion.features":
            config.diffusion.samples and config.diffusion.features is None,
        "diffusion.samples, diffusion.last_samples: got 1, but a Fréchet distance needs at least 2 samples (0: none)":
            1 in (config.diffusion.samples, config.diffusion.last_samples),
        "train.bce_target_thresh: it needs train.loss=binary_cross_entropy, and train.label_smoothing=0":
            train.bce_target_thresh is not None and (train.loss == "cross_entropy" or train.label_smoothing > 0),
        f"train.ema_length: got {train.ema_length}, expected a length above 0, such as 2%":
            train.ema_length is not None and not train.ema_length.value,
        "train.cuda_graphs: yes needs train.compile and train.grad_accum_steps=1":
            train.cuda_graphs == "yes" and (train.compile == "no" or train.grad_accum_steps > 1),
        "train.schedule_by: epoch needs a train.schedule_length in epochs, such as 300ep": train.schedule_by == "epoch"
            and (train.schedule_length is None or train.schedule_length.kind != "epochs"),
        f"run.folder: {config.run.folder!a} has characters that cannot be shown; use another name":
            not str(config.run.folder).isprintable(),
        "budget.length: got 0, which trains nothing; expected a length above 0": config.budget.length.value == 0,
        f"budget.counts: cpu measures only this process, and data.loader={data.loader} starts others; use train":
            config.budget.counts == "cpu" and data.loader in ("torchvision", "dali"),
    })  # fmt: skip
