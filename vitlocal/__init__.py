"""vitlocal: Vision Transformers trained from scratch on a small budget.

The public names are imported at their first use, so that ``import vitlocal`` takes no time. ``import vitlocal.models``
registers the models with timm.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "BetonDataset": "vitlocal.data.dataset",
    "Budget": "vitlocal.train.budget",
    "Clock": "vitlocal.train.budget",
    "CropDecoder": "vitlocal.data.peers.crop_decoder",
    "Curriculum": "vitlocal.curriculum",
    "Length": "vitlocal.progress",
    "Loader": "vitlocal.data.loader",
    "LRSchedule": "vitlocal.schedule",
    "as_dataloader": "vitlocal.data.dataset",
    "create_model": "vitlocal.models",
    "decode_crops": "vitlocal.data.dataset",
    "write": "vitlocal.data.writer.indexed",
}
__all__ = list(_PUBLIC)


def __getattr__(name: str):  # type: ignore[no-untyped-def]  # typing would delay the commands' signal handlers
    if name not in _PUBLIC:
        raise AttributeError(f"module 'vitlocal' has no attribute '{name}'; it has {', '.join(_PUBLIC)}")
    return getattr(import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
