"""The exported model in the folder of a finished run."""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import timm

import vitlocal.models  # noqa: F401 (registers our models with timm)
from vitlocal.errors import ConfigError, first_line
from vitlocal.models.factory import adopt


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


class ExportedRun:
    """What :func:`vitlocal.models.factory.export_model` wrote.

    ``option`` is the name of the option that names ``folder``. Raises :class:`ConfigError` without a finished run.
    """

    def __init__(self, folder: str | os.PathLike[str], option: str = "--run"):
        self.folder, self._option = Path(folder), option
        for name in ("model.safetensors", "config.json"):
            if not (self.folder / name).is_file():
                raise ConfigError(
                    f"{option}: {self.folder / name} does not exist; expected the folder of a finished run of "
                    "train_imagenet.py"
                )
        try:
            self.description: dict[str, Any] = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))
            self.architecture = str(self.description["architecture"])
            self.class_names = list(map(str, self.description["label_names"]))
            self.side = int(self.description["pretrained_cfg"]["input_size"][1])  # of inputs in the evaluation
            self.crop_pct = float(self.description["pretrained_cfg"].get("crop_pct", 1.0))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise self._damaged("config.json", error) from None

    @cached_property
    def digest(self) -> str:
        """:func:`file_digest` of the weights."""
        return file_digest(self.folder / "model.safetensors")

    def load(self) -> Any:
        """The model, on the CPU, in evaluation mode. PVTv2 and Swin can take other sizes than the evaluation's."""
        try:
            model = timm.create_model(f"local-dir:{self.folder}", pretrained=True).eval()
            # Older runs have timm's Swin with this option, whose windows may need padding.
            return model if getattr(model, "dynamic_img_size", False) else adopt(model, self.side)
        except Exception as error:  # timm and safetensors raise many types
            raise self._damaged("model.safetensors or config.json", error) from error

    def _damaged(self, name: str, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self._option}: {name} in {self.folder} is not what train_imagenet.py wrote ({first_line(error)}); run "
            "the same training command again, which writes it again"
        )
