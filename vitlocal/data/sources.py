"""Opens the training and the validation source of a data folder, with the loader of your choice."""

import torch

from vitlocal.data.batch import Source, Sources
from vitlocal.data.crops import CropPolicy
from vitlocal.data.latents import LatentSource
from vitlocal.data.manifest import load_manifest
from vitlocal.data.shares import WHOLE, Share
from vitlocal.errors import ConfigError
from vitlocal.machine import decoder_threads

LOADERS = ("native", "ffcv", "torchvision", "dali")


def open_sources(
    loader: str, root: str, *, device: torch.device, source: str | None = None, workers: int = 0,
    on_error: str = "stop", side_ratio: float = 1.5, seed: int = 0, crop_scale: tuple[float, float] = (0.08, 1.0),
    crop_ratio: tuple[float, float] = (0.75, 4 / 3), flip: float = 0.5, repeats: int = 1, centre_crop: float = 0.875,
    share: Share = WHOLE, local_world_size: int = 1, latents: bool = False,
) -> Sources:  # fmt: skip
    """The sources of the splits train and val in the data folder ``root``; ``loader`` is one of :data:`LOADERS`.

    Args:
        source: the original images for torchvision and dali; None: the ones that the manifest names.
        workers: decoder threads (processes for torchvision); 0: see :func:`vitlocal.machine.decoder_threads`.
        on_error: "stop" or "skip" at a damaged image (native loader).
        side_ratio: a file serves random crops of a size if its side is at least ``side_ratio`` x size.
        seed, crop_scale, crop_ratio, flip, repeats: random crops for training, see CropPolicy.
        centre_crop: size of the centre crop for validation, as a fraction of the resized short edge.
        share: the part of each batch that this process reads.
        local_world_size: the number of processes that share the cores.
        latents: read latents instead of photos: the whole square of each photo, mirrored with the probability
            ``flip`` for training. Crops do not apply.

    Raises ConfigError if the data folder or the original images are missing, or if the splits have different classes or
    latents.
    Raises DataError if files are damaged.
    """
    if loader not in LOADERS:
        raise ConfigError(f"data.loader: got {loader!r}, expected one of {', '.join(LOADERS)}")
    if latents and loader != "native":
        raise ConfigError(
            f"data.loader: got {loader}, which reads photos; latents are read by the native loader: data.loader=native"
        )
    workers = workers or decoder_threads(device.type != "cpu", local_world_size)
    if loader == "native":
        from vitlocal.data.loader import Loader
        from vitlocal.data.reader import LoaderResources

        resources = LoaderResources(1 if latents else workers)  # latents are copied, not decoded

    def open_split(split: str, crops: CropPolicy) -> Source:
        if latents:
            return LatentSource(root, split, crops, device, resources, share)
        if loader == "native":
            return Loader(
                root, split, seed=crops.seed, scale=crops.scale, ratio=crops.ratio, flip=crops.flip,
                repeats=crops.repeats, crop_pct=crops.centre, drop_last=False, device=device, share=share,
                side_ratio=side_ratio, on_error="skip" if on_error == "skip" else "raise",
                copy=False, resources=resources,
            )  # fmt: skip
        if loader == "ffcv":
            from vitlocal.data.peers.ffcv import FFCVSource  # importing ffcv takes seconds

            manifest = load_manifest(root, split)
            return FFCVSource(root, manifest, crops, device, workers, side_ratio=side_ratio, share=share)
        if loader == "dali":
            from vitlocal.data.peers.dali import DALISource  # an optional package

            return DALISource(root, source, split, crops, device, workers, share)
        from vitlocal.data.peers.torchvision import TorchvisionSource

        return TorchvisionSource(root, source, split, crops, device, workers, share)

    sources = Sources(
        open_split("train", CropPolicy(True, seed, crop_scale, crop_ratio, flip, repeats)),
        open_split("val", CropPolicy(random=False, centre=centre_crop)),
    )
    if sources.train.classes != sources.val.classes:
        odd = sorted(set(sources.train.classes) ^ set(sources.val.classes))
        raise ConfigError(
            f"data.root: the classes of train ({len(sources.train.classes)}) and val ({len(sources.val.classes)}) "
            f"in {root} differ: {', '.join(odd[:5]) or 'they have another order'}. Write both splits from one source"
        )
    if sources.train.latents != sources.val.latents:
        raise ConfigError(
            f"data.root: train and val in {root} have different latents: {sources.train.latents} and "
            f"{sources.val.latents}. Write both splits with the same --vae"
        )
    return sources
