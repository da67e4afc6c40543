"""Reads and writes files of weights, and what stands beside them in a run's folder."""

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import save
from torch import Tensor

from vitlocal.errors import ConfigError, first_line
from vitlocal.jsonl import replacing
from vitlocal.options import as_argument


def write_weights(path: Path, state: Mapping[str, Tensor], **metadata: str) -> None:
    """Writes a model's weights and ``metadata`` as a safetensors file; the whole file or none."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with replacing(path, "wb", sync=False) as file:
        # save_file() would make a file that only its owner can read.
        file.write(save(weights, {"format": "pt", **metadata}))


def read_weights(file: Path, read: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Returns ``read(file)``; :class:`ConfigError` if the file is missing, or if it cannot be read as weights."""
    if not file.is_file():
        raise ConfigError(f"model.weights: {file} is not there; name a run's folder, or a file of a model's weights")
    try:
        return read(str(file))
    except Exception as error:  # pickle, zip and safetensors raise many types
        raise ConfigError(
            f"model.weights: {file} cannot be read as weights ({unreadable(error)}); name a run's folder, or "
            "a file that safetensors or PyTorch wrote"
        ) from error


def unreadable(error: Exception) -> str:
    """Why a file of weights cannot be read, without PyTorch's advice to run the code in it."""
    refused = isinstance(error, pickle.UnpicklingError)
    return "it is damaged, or holds objects that could run code" if refused else first_line(error)


def read_description(folder: Path, name: str = "config.json") -> dict[str, Any]:
    """Returns the object in a JSON file of ``folder``; empty if there is none."""
    try:
        found = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def options_of_run(folder: Path) -> str:
    """Returns a sentence with the model options of the run in ``folder``; empty if it holds no run."""
    try:
        options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["model"].items()
    except (OSError, yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError, AttributeError):
        return ""
    skipped = ("weights", "drop_path")
    set_options = [(name, value) for name, value in options if value is not None and name not in skipped]
    return ". That run has " + " ".join(f"--model.{name}={as_argument(value)}" for name, value in set_options)
