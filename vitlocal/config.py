"""Options: yaml recipes, the environment and the command line, read by fastargs into frozen dataclasses.

The dataclasses are the truth: their fields declare name, kind, default and meaning once. fastargs layers the
sources; what it leaves open (unknown keys, strict kinds, the order of precedence, exit statuses) is closed here.
Every problem of a configuration is reported at once, as one :class:`~vitlocal.errors.ConfigError`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import fastargs
import yaml
from fastargs.exceptions import MissingValueError, ValidationError

from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS
from vitlocal.methods import claims as method_claims
from vitlocal.methods import problems as method_problems
from vitlocal.methods.method import Claims
from vitlocal.options import (
    COUNT,
    SHARE,
    Bytes,
    Choice,
    Duration,
    Flag,
    Maybe,
    Number,
    Series,
    Text,
    option,
    plain_value,
)
from vitlocal.progress import Length

LARGEST_ERASED = 836  # px: three channels have as many pixels as data/augment.py has noise
KERNELS = ("auto", "fused", "plain")  # of the local FFN


# --- the configuration ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataConfig:
    root: str = option("data/imagenet", Text(), "the data folder that write_dataset.py filled")
    loader: str = option("ffcv", Choice("ffcv", "torchvision", "dali"), "who reads the images")
    source: str | None = option(
        None, Maybe(Text()), "original images, for torchvision and dali; none: what the manifest says"
    )
    workers: int = option(
        0, Number(low=0, high=1024, whole=True), "decoding threads (processes for torchvision); 0: one a core"
    )
    on_error: str = option(
        "stop", Choice("stop", "skip"), "at a damaged image of data.loader=ffcv; skip: another is drawn in its place"
    )
    side_ratio: float = option(
        1.5, Number(low=0.1, high=16), "a file is good enough for a size if its side >= ratio x size"
    )


@dataclass(frozen=True)
class ModelConfig:
    name: str = option("vitlocal_small_patch16_224", Text(), "any timm model name; ours begin with vitlocal_")
    size: int = option(224, COUNT, "the largest image side, px: the position table covers this grid")
    patch_size: int | None = option(None, Maybe(COUNT), "patch side, px; none: as the name says (so below)")
    width: int | None = option(None, Maybe(COUNT), "embedding width D")
    depth: int | None = option(None, Maybe(COUNT), "number of blocks")
    heads: int | None = option(None, Maybe(COUNT), "attention heads a block")
    pool: str | None = option(None, Maybe(Choice("token", "avg")), "class token, or mean of the tokens")
    qkv_bias: bool | None = option(None, Maybe(Flag()), "biases in the query, key and value layers")
    activation: str | None = option(None, Maybe(Choice("h_swish", "gelu")), "ablation: the FFN's activation")
    norm: str | None = option(None, Maybe(Choice("layer", "batch")), "ablation: the FFN's normalisation")
    convolution: bool | None = option(None, Maybe(Flag()), "ablation: the FFN's depth-wise convolution")
    train_position: bool | None = option(None, Maybe(Flag()), "false: position embeddings stay as they start")
    init: str | None = option(None, Maybe(Choice("trunc_normal", "xavier")), "how weights start")
    position: str | None = option(None, Maybe(Choice("random", "sincos")), "how the position table starts")
    drop_path: float = option(0.1, Number(low=0, high=0.9), "stochastic depth: rate at the last block")
    weights: str | None = option(
        None, Maybe(Text()), "start from these: a run's folder, or a file; a head of other classes starts anew"
    )

    def arguments(self) -> dict[str, Any]:
        """The keyword arguments for ``timm.create_model`` that this configuration sets."""
        names = {
            "width": "embed_dim",
            "heads": "num_heads",
            "drop_path": "drop_path_rate",
            "size": "img_size",
            "position": "pos_embed_init",
            "train_position": "train_pos_embed",
        }
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("name", "weights")}
        return {names.get(name, name): value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class TrainConfig:
    batch_size: int = option(256, COUNT, "images a step")
    lr: float = option(1e-3, Number(low=0), "peak learning rate, for lr_batch images a step")
    lr_batch: int = option(512, Number(low=0, whole=True), "lr is scaled by batch_size / lr_batch; 0: not scaled")
    schedule: str = option("cosine", Choice("cosine", "linear", "constant"), "how the learning rate falls")
    schedule_length: Length | None = option(None, Maybe(Duration()), "over which length; none: the budget")
    schedule_by: str = option("step", Choice("step", "epoch"), "when the learning rate moves")
    end_lr: float = option(1e-5, Number(low=0), "learning rate at the schedule's end (not scaled)")
    warmup: Length = option(Length.parse("0ep"), Duration(), "linear warm-up from zero")
    optimizer: str = option("adamw", Choice("adamw", "muon"), "muon: for the matrices of the blocks; the rest AdamW")
    momentum: float = option(0.95, SHARE, "Muon's")
    weight_decay: float = option(0.05, Number(low=0), "none on norms, biases, embeddings and tokens")
    betas: tuple[float, float] = option((0.9, 0.999), Series(SHARE, 2), "AdamW")
    eps: float = option(1e-8, Number(low=0), "AdamW")
    clip_norm: float | None = option(None, Maybe(Number(low=0)), "largest gradient norm")
    label_smoothing: float = option(0.1, SHARE, "in the cross-entropy")
    ema: float | None = option(None, Maybe(SHARE), "decay of an exponential moving average of the weights, a step")
    ema_length: Length | None = option(
        None, Maybe(Duration()), "in its place: over what length it forgets, to 1/e; 2% fits any budget"
    )
    precision: str = option("auto", Choice("auto", "bf16", "fp16", "fp32"), "auto: bf16, else fp16; fp32 on a CPU")
    accumulate: int = option(1, COUNT, "parts that a process's batch is trained on in turn, for want of memory")
    checkpointing: bool = option(False, Flag(), "blocks keep no activations and compute them again: less memory")
    compile: str = option("auto", Choice("auto", "yes", "no"), "torch.compile, for each size; auto: on a GPU")
    warm: str = option("start", Choice("start", "stage"), "compile all sizes first, or each where it begins")
    graphs: str = option("auto", Choice("auto", "yes", "no"), "CUDA graphs; auto: for steps that are all launches")
    kernel: str = option("auto", Choice(*KERNELS), "the local FFN; auto: fused on a GPU")


@dataclass(frozen=True)
class AugmentConfig:
    crop_scale: tuple[float, float] = option((0.08, 1.0), Series(SHARE, 2), "area of the random crop")
    crop_ratio: tuple[float, float] = option((0.75, 4 / 3), Series(Number(low=0.01), 2), "width / height of the crop")
    flip: float = option(0.5, SHARE, "chance of a horizontal flip")
    repeats: int = option(1, COUNT, "repeated augmentation: times that an image follows itself in an epoch")
    randaugment: float = option(0.0, Number(low=0, high=10), "RandAugment magnitude, 2 operations; 0: off")
    three: bool = option(False, Flag(), "three-augment: grey, solarised or blurred, and colours jittered")
    mixup: float = option(0.0, Number(low=0), "mixup's alpha; 0: off")
    cutmix: float = option(0.0, Number(low=0), "cutmix's alpha; 0: off")
    mix_chance: float = option(1.0, SHARE, "chance that a batch is mixed")
    cutmix_chance: float = option(0.5, SHARE, "chance of cutmix where both are on")
    erase: float = option(0.0, SHARE, "chance of random erasing (pixel noise)")


@dataclass(frozen=True)
class EvaluateConfig:
    size: int | None = option(None, Maybe(COUNT), "crop side, px; none: model.size, whatever the training size")
    every: float = option(1.0, Number(low=0), "epochs between evaluations; 0: at the end alone")
    part: str = option(
        "all", Choice("all", "even", "odd"), "rows of the split that count: choose on one half, report on the other"
    )
    batch_size: int = option(256, COUNT, "images a batch")
    crop_ratio: float = option(0.875, Number(low=0.01, high=1), "centre crop's part of the short edge (224 / 256)")


@dataclass(frozen=True)
class BudgetConfig:
    length: Length = option(Length.parse("24h"), Duration(part=False), "24h, 30m, 45s, 90ep, 5000steps or 3PF")
    counts: str = option(
        "train", Choice("train", "wall", "cpu"), "of a length in time: train: evaluation and saving are free; wall: "
        "all counts; cpu: as train, in all threads' processor time, for runs that share cores"
    )  # fmt: skip


@dataclass(frozen=True)
class RunConfig:
    folder: str | None = option(None, Maybe(Text()), "where the run is kept; none: runs/<recipe and overrides>")
    seed: int = option(0, Number(low=0, high=2**31 - 1, whole=True), "of weights, order, crops and augmentation")
    resume: str = option(
        "auto", Choice("auto", "must", "never"), "auto: go on where the folder holds a run; --resume is must"
    )
    device: str = option("auto", Text(), "auto, cpu, cuda or cuda:1")
    threads: int = option(0, Number(low=0, whole=True), "PyTorch's CPU threads; 0: as PyTorch decides")
    save_every: tuple[Length, ...] = option(
        (Length.parse("10m"), Length.parse("10%")), Series(Duration()), "between checkpoints, what comes first"
    )
    replay: str | None = option(
        None, Maybe(Text()), "a run's folder: searches are told the times that it measured, and on one CPU choose as "
        "it did"
    )  # fmt: skip
    keep_weights: bool = option(False, Flag(), "keep the weights at each evaluation, for bench redundancy")
    progress: bool = option(True, Flag(), "draw a progress bar, or tell of long passes where there is no terminal")


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    run: RunConfig = field(default_factory=RunConfig)
    methods: tuple[str, ...] = option((), Series(Choice(*METHODS)), "training methods, in order")
    own: Mapping[str, Any] = field(default_factory=dict)  # the methods' own sections, by their names

    def of(self, method: str) -> Any:
        """The options of ``method``, whether the recipe names it or not."""
        return self.own[method] if method in self.own else METHODS[method].options().completed(self.model)

    @property
    def claims(self) -> list[Claims]:
        """What each of its methods sets."""
        return method_claims(self)

    def flat(self) -> dict[str, Any]:
        """Every option by its dotted name, as plain yaml values."""
        values: dict[str, Any] = {}
        for name in SECTIONS:
            section = self.of(name) if name in METHODS else getattr(self, name)
            values |= {f"{name}.{f.name}": plain_value(getattr(section, f.name)) for f in fields(section)}
        values["methods"] = list(self.methods)
        return values

    def yaml(self) -> str:
        """A recipe that repeats this run."""
        nested: dict[str, Any] = {}
        for name, value in self.flat().items():
            section, _, key = name.partition(".")
            if key:
                nested.setdefault(section, {})[key] = value
            else:
                nested[section] = value
        return yaml.safe_dump(nested, sort_keys=False)


@dataclass(frozen=True)
class WriteOptions:
    """What ``write_dataset.py`` is asked for; its flags are these names with dashes."""

    split: str = option("train", Choice("train", "val"), "which split of the source to write")
    source: str | None = option(
        None, Maybe(Text()), "class folders, the ILSVRC2012 tars or parquet shards; torchvision:NAME; "
        "sample, the built-in set; none: $IMAGENET_DIR, else data/source"
    )  # fmt: skip
    out: str = option("data/imagenet", Text(), "the data folder to fill")
    sides: str = option(
        "auto", Text(),
        "long edges, px: 64,160,256 or 64:raw,256:jpg; auto: the split's own; photos of val keep a short edge of 256",
    )  # fmt: skip
    format: str = option("auto", Choice("auto", "raw", "jpg"), "of the sides without one; auto: raw up to 160")
    quality: int | None = option(None, Maybe(Number(low=1, high=100, whole=True)), "of JPEG; none: as planned, or 90")
    sampling: str | None = option(
        None, Maybe(Choice("420", "444")), "of JPEG's chroma: a quarter of the pixels, or all; none: as planned, or 420"
    )  # fmt: skip
    keep_jpegs: bool | None = option(
        None, Maybe(Flag()), "JPEGs that need not shrink stay as they came, else they are encoded anew; none: as "
        "planned, or true"
    )  # fmt: skip
    workers: int = option(0, Number(low=0, whole=True), "threads; 0: one a core")
    on_error: str = option("stop", Choice("stop", "skip"), "at an unreadable image")
    verify: bool = option(False, Flag(), "read what is written, every image of every file, and write nothing")
    plan: bool = option(
        False, Flag(), "measure, propose which files to write, keep that in the data folder, write nothing"
    )
    recipe: str | None = option(None, Maybe(Text()), "for --plan: what will be trained; none: rcfg/ours.yaml")
    rates: str | None = option(
        None, Maybe(Text()), "for --plan: images/s that the trainer takes, as 224:2500 or 32:20000,224:2500 (other "
        "sizes by FLOPs); none: measured here"
    )  # fmt: skip
    cores: int | None = option(None, Maybe(COUNT), "for --plan: of the machine that will train; none: this one's")
    disk_limit: int | None = option(None, Maybe(Bytes()), "for --plan: 150GB; none: what is free")
    memory_limit: int | None = option(
        None, Maybe(Bytes()), "for --plan: for the page cache; none: this machine's less 8 GB"
    )


SECTIONS = {
    "data": DataConfig,
    "model": ModelConfig,
    "train": TrainConfig,
    "augment": AugmentConfig,
    "evaluate": EvaluateConfig,
    "budget": BudgetConfig,
    "run": RunConfig,
    **{name: method.options for name, method in METHODS.items()},
}

PLAN_NAME = "plan.yaml"  # what --plan leaves in a data folder: a recipe of WriteOptions

# What may differ when a run goes on: where and how it runs, not what it computes.
IMMATERIAL = frozenset(
    {"data.root", "data.workers", "data.source", "evaluate.batch_size"}
    | {f"train.{name}" for name in ("accumulate", "checkpointing", "compile", "warm", "graphs", "kernel")}
    | {f"run.{name}" for name in ("folder", "resume", "device", "threads", "save_every", "progress", "keep_weights")}
)


# --- reading ----------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # argparse would print the whole usage before it
        raise ConfigError(f"{message}; see --help")


class Reader:
    """Reads one set of options, given as ``{dotted name: dataclass field}``, from all their sources.

    ``flags``: other names that the command line has for some, ``{"--split": "write.split"}``.
    """

    def __init__(self, options: Mapping[str, Any], flags: Mapping[str, str], about: str, sections: str = ""):
        self.options, self.flags, self.about = options, flags, about
        names = dict.fromkeys(name.rpartition(".")[0] or name for name in options)
        self.sections = sections or ", ".join(names)  # that --help may be asked for
        self.fastargs = fastargs.Config()
        self.problems: list[str] = []
        self.origin: dict[str, str] = {}
        self.overrides: dict[str, str] = {}  # what the command line set
        self.files: list[str] = []
        self.parser = _Parser(
            usage="%(prog)s [--config-file YAML] [--option VALUE ...]",
            description=about,
            allow_abbrev=False,
            add_help=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.parser.add_argument("--config-file", "-C", action="append", default=[], metavar="YAML",
                                 help="a recipe; may be repeated, later ones win")  # fmt: skip
        self.parser.add_argument("-h", "--help", nargs="?", const="", metavar="SECTION",
                                 help=f"shows the options, of one section or of all: {self.sections}")  # fmt: skip
        groups: dict[str, Any] = {}
        for name, spec in options.items():
            section = name.rpartition(".")[0]
            if section not in groups:
                groups[section] = self.parser.add_argument_group(section or "top level")
                fastargs_section = fastargs.Section(section, config_descriptor=self.fastargs)
            # Empty sections cannot be named in fastargs: `methods` stands at the root.
            param = fastargs.Param(spec.metadata["kind"], spec.metadata["meaning"], default=spec.default)
            param.section = fastargs_section
            self.fastargs.add_entry((), name, param)
            default = "none" if spec.default in (None, ()) else plain_value(spec.default)
            kind = spec.metadata["kind"]
            takes: dict[str, Any] = {"metavar": ""}
            meaning = f"{spec.metadata['meaning']}; {kind.help()} (default: {default})"
            if isinstance(kind, Flag):  # `--run.keep_weights` alone says true
                takes = {"nargs": "?", "const": "true", "metavar": "true|false"}
                meaning = f"{spec.metadata['meaning']} (default: {default})"
            named = [flag for flag, target in flags.items() if target == name]
            groups[section].add_argument(f"--{name}", *named, dest=name, help=meaning.replace("%", "%%"),
                                         default=argparse.SUPPRESS, **takes)  # fmt: skip

    def read(self, argv: Sequence[str], environment: Mapping[str, str]) -> dict[str, Any]:
        """The value of every option; later sources win: environment, recipes, command line."""
        known, unknown = self.parser.parse_known_args(list(argv))
        given = vars(known)
        if (section := given.pop("help")) is not None:
            self._help(section)
        self.files = given.pop("config_file")
        for text in unknown:
            self._unknown(text.lstrip("-").split("=")[0], f"command line: {text}")
        self._layer({name: environment[name] for name in self.options if name in environment}, "environment")
        for file in self.files:
            self._layer(self._recipe(file), file)
        self._layer(given, "command line")
        self.overrides = given
        self._validate()
        return {} if self.problems else {name: self.fastargs[name] for name in self.options}

    def _help(self, section: str) -> None:
        """Prints the options, or those of ``section``, and leaves."""
        of = {name: name.rpartition(".")[0] or name for name in self.options}
        shown = {name: spec for name, spec in self.options.items() if section in ("", of[name])}
        if not shown:
            raise ConfigError(f"--help: there is no section '{section}'; the sections are {self.sections}")
        (Reader(shown, self.flags, self.about, self.sections) if section else self).parser.print_help()
        sys.exit(0)

    def _unknown(self, name: str, where: str) -> None:
        section, _, key = name.rpartition(".")
        known = [*(flag.lstrip("-") for flag in self.flags), *self.options]
        initials = f"{section}.{''.join(word[:1] for word in key.split('_'))}"
        near = [initials] if initials in self.options else difflib.get_close_matches(name, known, 1, cutoff=0.5)
        near = near or [option for option in known if option.rpartition(".")[2] == key][:1]
        dashes = "--" if near and f"--{near[0]}" in self.flags else ""
        self.problems.append(
            f"{where}: there is no option '{name}'" + (f"; did you mean {dashes}{near[0]}?" if near else "")
        )

    def _recipe(self, file: str, within: tuple[str, ...] = ()) -> dict[str, Any]:
        """The options that a yaml file states, over those of its ``base``."""
        try:
            content = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except OSError as error:
            there = [path.name for path in Path(file).parent.glob("*.yaml")]
            near = difflib.get_close_matches(Path(file).name, there, n=1)
            self.problems.append(
                f"{file}: cannot be read as a recipe ({error.strerror})"
                + (f", which is the base of {within[-1]}" if within else "")
                + (f"; did you mean {Path(file).with_name(near[0])}?" if near else "; rcfg/ holds vitlocal's recipes")
            )
            return {}
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            self.problems.append(f"{file}: is not yaml: {' '.join(str(error).split())}")
            return {}
        if not isinstance(content or {}, dict):
            self.problems.append(f"{file}: expected sections with options, got {type(content).__name__}")
            return {}
        content = dict(content or {})
        flat: dict[str, Any] = {}
        if (base := content.pop("base", None)) is not None:  # a recipe that this one changes, beside it
            path = str(Path(file).parent / str(base))
            if not isinstance(base, str) or path in (*within, file):
                self.problems.append(f"{file}: base is {base!r}, expected the name of one other recipe, in no circle")
            else:
                flat = self._recipe(path, (*within, file))
        for section, value in content.items():
            inner = value if isinstance(value, dict) else {"": value}
            flat |= {f"{section}.{key}".rstrip("."): part for key, part in inner.items()}
        for name in sorted(flat.keys() - self.options.keys()):
            self._unknown(name, file)
            del flat[name]
        return flat

    def _layer(self, values: Mapping[str, Any], origin: str) -> None:
        # fastargs skips None, so that yaml's null could not undo what an earlier recipe set.
        stated = {name: "none" if value is None else value for name, value in values.items()}
        self.fastargs.collect(stated)
        self.origin |= dict.fromkeys(stated, origin)

    def _validate(self) -> None:
        for name, spec in self.options.items():
            try:
                self.fastargs[name]
            except (MissingValueError, ValidationError):
                got, origin = self.fastargs.content[tuple(name.split("."))], self.origin[name]
                named = [flag for flag, target in self.flags.items() if target == name and origin == "command line"]
                self.problems.append(
                    f"{(*named, name)[0]}: got {got!r} ({origin}), expected {spec.metadata['kind'].help()}"
                )

    def check(self) -> None:
        """Raises ConfigError with every problem found so far."""
        if self.problems:
            raise ConfigError("\n       ".join(self.problems))


def read_config(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Config:
    """The trainer's configuration from its command line, its recipes and the environment.

    Raises :class:`ConfigError` that lists every problem; ``--help`` prints the options and leaves.
    """
    options = {f"{name}.{f.name}": f for name, section in SECTIONS.items() for f in fields(section)}
    options["methods"] = next(f for f in fields(Config) if f.name == "methods")
    argv = ["--run.resume=must" if word == "--resume" else word for word in argv]
    reader = Reader(options, {}, "Trains a Vision Transformer within a budget.")
    values = reader.read(argv, os.environ if environment is None else environment)
    reader.check()
    if values["run.folder"] is None:
        values["run.folder"] = default_folder(reader.files, reader.overrides)
    if values["evaluate.size"] is None:
        values["evaluate.size"] = values["model.size"]
    sections = {
        name: section(**{f.name: values[f"{name}.{f.name}"] for f in fields(section)})
        for name, section in SECTIONS.items()
    }
    own = {name: sections.pop(name).completed(sections["model"]) for name in METHODS}
    config = Config(**sections, methods=values["methods"], own=own)
    reader.problems += _contradictions(config)
    reader.check()
    return config


def read_write_options(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> WriteOptions:
    """``write_dataset.py``'s options; every one has a dotted name too (``--write.split``), for yaml files."""
    options = {f"write.{f.name}": f for f in fields(WriteOptions)}
    flags = {f"--{f.name.replace('_', '-')}": f"write.{f.name}" for f in fields(WriteOptions)}
    reader = Reader(options, flags, "Encodes a split of a data set into .beton files, each image decoded once.")
    values = reader.read(argv, os.environ if environment is None else environment)
    reader.check()
    options = WriteOptions(**{name.partition(".")[2]: value for name, value in values.items()})
    if options.plan and options.verify:
        reader.problems.append("--plan and --verify: one thing at a time")
    if options.plan and (options.sides, options.format) != ("auto", "auto"):
        reader.problems.append("--plan: it is what chooses sides and formats; leave out --sides and --format")
    if options.plan and options.split != "train":
        reader.problems.append("--plan: the files of the split train are planned; val needs but one")
    if options.plan and (options.workers, options.on_error) != (0, "stop"):
        reader.problems.append("--plan: it writes nothing; leave out --workers and --on-error")
    for name in ("recipe", "rates", "cores", "disk_limit", "memory_limit"):
        if not options.plan and getattr(options, name) is not None:
            reader.problems.append(f"--{name.replace('_', '-')}: it is for --plan")
    reader.check()
    return options


def read_plan(path: str | os.PathLike[str], options: WriteOptions) -> WriteOptions:
    """The options with the files that ``--plan`` chose, but for what they state themselves.

    Raises ConfigError where ``path`` is no such plan.
    """
    planned = read_write_options(["--config-file", str(path)], {})
    if planned.sides == "auto":
        raise ConfigError(f"{path}: write.sides is not there; remove the file, or make it anew by --plan")
    return replace(
        options, sides=planned.sides, quality=options.quality or planned.quality,
        sampling=options.sampling or planned.sampling,
        keep_jpegs=planned.keep_jpegs if options.keep_jpegs is None else options.keep_jpegs,
    )  # fmt: skip


def default_folder(files: Sequence[str], overrides: Mapping[str, Any]) -> str:
    """``runs/<recipe>``, with what the command line changed, so that variants of a recipe do not collide."""
    parts = [Path(files[-1]).stem if files else "run"]
    parts += [f"{name}={value}" for name, value in sorted(overrides.items()) if name not in IMMATERIAL]
    return "runs/" + re.sub(r"[^\w.=,+-]", "_", "-".join(parts))


def _contradictions(config: Config) -> list[str]:
    """What each option allows by itself but not together with another."""
    found = []
    augment = config.augment
    found += method_problems(config)
    if augment.three and augment.randaugment:
        found.append("augment.three: it takes the place of augment.randaugment; set one of them to 0")
    if config.data.loader != "ffcv" and config.data.on_error != "stop":
        found.append(
            f"data.on_error: skip is for data.loader=ffcv; with {config.data.loader}, name a data folder that was "
            "written with --on-error skip"
        )
    for name in ("crop_scale", "crop_ratio"):
        low, high = getattr(augment, name)
        if not 0 < low <= high:
            found.append(f"augment.{name}: got {low}, {high}; expected two positive numbers, the smaller one first")
    if augment.erase and config.model.size > LARGEST_ERASED:  # no stage is larger
        found.append(
            f"augment.erase: images of {config.model.size} px have more pixels than its noise; set augment.erase=0"
        )
    train = config.train
    if train.ema is not None and train.ema_length is not None:
        found.append("train.ema_length: it states the decay in another way than train.ema; keep one of the two")
    if train.ema_length is not None and not train.ema_length.value:
        found.append(f"train.ema_length: {train.ema_length} is no length to average over; leave it out, or use 2%")
    if train.graphs == "yes" and (train.compile == "no" or train.accumulate > 1):
        found.append("train.graphs: yes needs train.compile and train.accumulate=1")
    if train.schedule_by == "epoch" and (train.schedule_length is None or train.schedule_length.kind != "epochs"):
        found.append("train.schedule_by: epoch needs a train.schedule_length in epochs, as in 300ep")
    if config.budget.length.value == 0:
        found.append("budget.length: nothing can be trained in a budget of 0")
    if config.budget.counts == "cpu" and config.data.loader != "ffcv":
        found.append(
            f"budget.counts: cpu counts this process alone, and data.loader={config.data.loader} has others; use train"
        )
    return found
