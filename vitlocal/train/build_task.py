"""Builds the task of a configuration: what its model is for."""

from collections.abc import Set
from typing import Any

import torch
from torch import nn

from vitlocal.config import AugmentConfig, Config
from vitlocal.data.augment import Augment
from vitlocal.data.autoencoder import Autoencoder
from vitlocal.data.batch import Sources
from vitlocal.errors import ConfigError
from vitlocal.methods.method import Method
from vitlocal.tasks.classification import Classification
from vitlocal.tasks.diffusion import Diffusion
from vitlocal.tasks.frechet import open_features
from vitlocal.tasks.gallery import Gallery, GalleryOptions
from vitlocal.tasks.metrics import task_name
from vitlocal.tasks.noise_schedule import NoiseSchedule
from vitlocal.tasks.sampling import SamplerOptions
from vitlocal.tasks.task import Task

TASKS: dict[str, type[Task]] = {"classification": Classification, "diffusion": Diffusion}


def check_outputs(model_name: str, method: Method) -> None:
    """Raises ConfigError if steps of the model's task lack an output that the method needs."""
    if missing := method.needs.step_outputs - TASKS[task_name(model_name)].step_outputs:
        raise ConfigError(
            f"methods: {method.name} needs {', '.join(sorted(missing))} of each image, which only classifiers predict; "
            f"remove it, or use another model.name than {model_name}"
        )


def make_task(
    config: Config, model: nn.Module, device: torch.device, precision: torch.dtype, outputs: Set[str],
    sources: Sources | None = None,
) -> Task:  # fmt: skip
    """The task that the model is for. ``outputs``: those of steps that methods need.

    Without ``sources``, nothing is evaluated on samples.
    """
    train = config.train
    if task_name(config.model.name) == "diffusion":
        if train.loss != "cross_entropy":
            raise ConfigError(
                f"train.loss: {train.loss} is for classifiers, and {config.model.name} is none; remove it"
            )
        return make_diffusion(config, model, device, precision, sources)
    augment = Augment(**config.augment.arguments()).to(device)
    labels = sources.train.soft_labels if sources is not None else None
    return Classification(
        model, augment, train.label_smoothing, precision, outputs, binary=train.loss == "binary_cross_entropy",
        threshold=train.bce_target_thresh, soft_top=0 if labels is None else labels.facts.top,
    )  # fmt: skip


def make_diffusion(
    config: Config, model: Any, device: torch.device, precision: torch.dtype, sources: Sources | None
) -> Diffusion:
    """The task of a diffusion transformer."""
    options, default = config.diffusion, AugmentConfig()
    if used := [name for name, value in config.augment.arguments().items() if value != getattr(default, name)]:
        names = ", ".join(f"augment.{name}" for name in used)
        raise ConfigError(f"{names}: a diffusion model would draw augmented images; leave it at its default")
    if config.train.soft_labels:
        raise ConfigError("train.soft_labels: a diffusion model does not learn classes; leave it out")
    latents = None if sources is None else sources.train.latents
    notes = {
        "steps": options.steps, "schedule": options.schedule, "vae": options.vae, "sampler": options.sampler,
        "sample_steps": options.sample_steps, "guidance": options.guidance, "guided_channels": options.guided_channels,
        "autoencoder": None if latents is None else latents.autoencoder,
    }  # fmt: skip
    scaling_factor = latents.scaling_factor if latents is not None else 1.0 if model.stride > 1 else None
    return Diffusion(
        model, NoiseSchedule(options.steps, options.schedule), precision, scaling_factor=scaling_factor,
        snr_gamma=options.snr_gamma, label_dropout=options.label_dropout, joint_drop=options.stage_drop == "joint",
        loss_passes=options.loss_passes, gallery=None if sources is None else make_gallery(config, device, sources),
        notes={name: value for name, value in notes.items() if value is not None},
    )  # fmt: skip


def make_gallery(config: Config, device: torch.device, sources: Sources) -> Gallery | None:
    """What draws and judges samples; None if latents cannot be decoded, because diffusion.vae is not stated."""
    options, latents = config.diffusion, sources.train.latents
    autoencoder = None
    if latents is not None:
        if options.vae is None and options.features is not None:
            raise ConfigError(
                "diffusion.features: samples of latents are images only after decoding; name the autoencoder's folder "
                "with diffusion.vae, or remove diffusion.features"
            )
        if options.vae is None:
            return None
        if not latents.autoencoder:
            raise ConfigError(
                f"diffusion.vae: no manifest in {config.data.root} names the autoencoder of the latents, so it is not "
                "known how to decode samples; leave it out, or write the latents with write_dataset.py"
            )
        autoencoder = Autoencoder.load(options.vae, device)
        if autoencoder.digest != latents.autoencoder:
            raise ConfigError(
                f"diffusion.vae: {options.vae} (digest {autoencoder.digest[:12]}) is not the autoencoder that encoded "
                f"{config.data.root} (digest {latents.autoencoder[:12]}); name the folder of that one"
            )
    sampler = SamplerOptions(options.sampler, options.sample_steps, options.guidance, options.guided_channels)
    sampler.times(options.steps)  # refuses wrong numbers of steps now
    drawn = GalleryOptions(
        sampler, options.grid_classes, options.samples, options.last_samples, options.sample_batch, config.run.seed
    )
    size, features = config.evaluate.size or config.model.size, None
    if options.features is not None:
        sources.train.check_size(size)  # samples are compared with training images of their size
        features = open_features(options.features, device)
    return Gallery(drawn, sources, size, device, autoencoder, features)
