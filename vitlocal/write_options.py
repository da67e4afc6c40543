"""The options of ``write_dataset.py``."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

from vitlocal.config_reader import OptionReader
from vitlocal.errors import ConfigError
from vitlocal.options import BYTES, COUNT, FLAG, TEXT, THOUSAND, Choice, Number, messages, option

PLAN_NAME = "plan.yaml"  # the file of WriteOptions that --plan leaves in a data folder


class JpegForm(NamedTuple):
    """How photos become JPEGs."""

    quality: int  # 1 to 100
    sampling: int  # of chroma: 420 (a quarter of the pixels) or 444 (all)
    keep: int  # 1: JPEGs that need not shrink are stored unchanged, 0: all are encoded again


@dataclass(frozen=True)
class WriteOptions:
    """The options of ``write_dataset.py``. Its flags are these names with dashes."""

    split: str = option("train", Choice("train", "val"), "split of the source to write")
    source: str | None = option(
        None, TEXT, "class folders, the ILSVRC2012 tars, parquet shards, torchvision:NAME, or sample for the "
        "built-in sample; none: $IMAGENET_DIR, else data/source"
    )  # fmt: skip
    out: str = option("data/imagenet", TEXT, "data folder to fill")
    sides: str = option(
        "auto", TEXT, "long edges of the files, px: 64,160,256 or 64:raw,256:jpg; auto: the split's default; photos of "
        "val keep a short edge of 256; of latents: edges of the central squares"
    )  # fmt: skip
    format: str = option(
        "auto", Choice("auto", "raw", "jpg", "latent"), "format of sides without one; auto: raw up to 160 px; latent: "
        "latents of --vae, plain and mirrored, for latent diffusion"
    )  # fmt: skip
    quality: int | None = option(None, Number(1, 100, whole=True), "JPEG quality; none: as planned, or 90")
    sampling: str | None = option(
        None, Choice("420", "444"), "JPEG chroma subsampling; none: as planned, or 420"
    )  # fmt: skip
    keep_jpegs: bool | None = option(
        None, FLAG, "copy JPEGs that need not shrink, without encoding them; none: as planned, or true"
    )
    workers: int = option(0, Number(0, 1024, whole=True), "threads; 0: one per core")
    on_error: str = option("stop", Choice("stop", "skip"), "at an image that does not decode: stop, or skip it")
    verify: bool = option(False, FLAG, "check every image of every written file, and write nothing")
    plan: bool = option(False, FLAG, "measure, choose the files to write, store the choice, and write no images")
    labels_from: str | None = option(
        None, TEXT, "write soft labels and no images: what the classifier in this run's folder says about the crops of "
        "--recipe, for train.soft_labels"
    )  # fmt: skip
    epochs: int | None = option(None, THOUSAND, "for --labels-from: epochs of crops; none: 16")
    seed: int | None = option(None, Number(0, 2**31 - 1, whole=True), "for --labels-from: run.seed; none: the recipe's")
    recipe: str | None = option(None, TEXT, "for --plan and --labels-from: recipe to train; none: rcfg/ours.yaml")
    rates: str | None = option(
        None, TEXT, "for --plan: images/s of the trainer: 224:2500 or 32:20000,224:2500 (other sizes by "
        "FLOPs); none: measured here"
    )  # fmt: skip
    cores: int | None = option(None, COUNT, "for --plan: cores of the training machine; none: this machine's")
    disk_limit: int | None = option(None, BYTES, "for --plan: disk space for the files; none: the free space")
    memory_limit: int | None = option(
        None, BYTES, "for --plan: memory for the page cache; none: this machine's memory minus 8 GB"
    )
    image: str | None = option(None, TEXT, "column of the images in parquet shards; none: by its name or type")
    label: str | None = option(None, TEXT, "column of the labels in parquet shards; none: by its name or type")
    subset: str | None = option(
        None,
        TEXT,
        "configuration (folder) of parquet shards, or variant of a torchvision set; none: the usual or only one",
    )
    classes: str | None = option(
        None, TEXT, "file of class names, one per line: the classes to read, in the order of their labels; none: all"
    )
    vae: str | None = option(
        None, TEXT, "for latents: local folder of diffusers' AutoencoderKL (config.json and weights); with --verify: "
        "compare a sample of the latents with it"
    )  # fmt: skip

    @property
    def jpeg(self) -> JpegForm:
        """The stated values, else the defaults."""
        return JpegForm(self.quality or 90, int(self.sampling or 420), int(self.keep_jpegs is not False))


DEFAULT = WriteOptions()


def read_write_options(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> WriteOptions:
    """The options of ``write_dataset.py``. Each has a dotted name too (``--write.split``), for yaml files."""
    named = {f"write.{f.name}": f for f in fields(WriteOptions)}
    flags = {_flag(f.name): f"write.{f.name}" for f in fields(WriteOptions)}
    reader = OptionReader(named, "Encodes a split of a data set into .beton files, each image decoded once.", flags)
    values = reader.read(argv, os.environ if environment is None else environment)
    options = WriteOptions(**{name.partition(".")[2]: value for name, value in values.items()})
    plan, labels = options.plan, options.labels_from is not None
    modes = [name for name in ("plan", "verify", "labels_from") if getattr(options, name)]
    read = ("labels_from", "epochs", "seed", "recipe", "out", "workers", "plan", "verify")  # by --labels-from
    unread = [name for name, value in vars(options).items() if name not in read and value != getattr(DEFAULT, name)]
    only_plan, only_labels = ("rates", "cores", "disk_limit", "memory_limit"), ("epochs", "seed")
    reader.problems += messages({
        f"{' and '.join(map(_flag, modes))}: they exclude each other; keep one of them": len(modes) > 1,
        f"--labels-from: it reads the data folder --out; remove {', '.join(map(_flag, unread))}": labels and unread,
        "--plan: it chooses sides and formats; remove --sides and --format":
            plan and (options.sides, options.format) != ("auto", "auto"),
        "--plan: it plans files of photos; remove --vae": plan and options.vae is not None,
        "--plan: it plans the files of the split train; val needs only one file": plan and options.split != "train",
        "--plan: it writes no images; remove --workers and --on-error":
            plan and (options.workers, options.on_error) != (0, "stop"),
        **{f"{_flag(name)}: it needs --plan": not plan and getattr(options, name) is not None for name in only_plan},
        **{
            f"{_flag(name)}: it needs --labels-from": not labels and getattr(options, name) is not None
            for name in only_labels
        },
        "--recipe: it needs --plan or --labels-from": not plan and not labels and options.recipe is not None,
    })  # fmt: skip
    reader.check()
    return options


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def read_plan(path: str | os.PathLike[str], options: WriteOptions) -> WriteOptions:
    """``options`` with the files that ``--plan`` chose. Values that ``options`` state themselves win.

    Raises ConfigError if ``path`` is not such a plan.
    """
    planned = read_write_options(["--config-file", str(path)], {})
    if planned.sides == "auto":
        raise ConfigError(f"{path}: the option write.sides is missing; remove the file, or run --plan again")
    keep_jpegs = planned.keep_jpegs if options.keep_jpegs is None else options.keep_jpegs
    return replace(
        options, sides=planned.sides, quality=options.quality or planned.quality, keep_jpegs=keep_jpegs,
        sampling=options.sampling or planned.sampling,
    )  # fmt: skip
