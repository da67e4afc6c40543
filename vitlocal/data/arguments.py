"""Checks of the arguments of public functions."""

import operator
from typing import Any

import torch

from vitlocal.errors import ConfigError


def check(**values: tuple[Any, Any, str]) -> None:
    """Raises ConfigError for the first of ``name=(value, whether it is valid, what is expected)`` that is not valid."""
    for name, (value, valid, expected) in values.items():
        if not valid:
            raise ConfigError(f"{name}: got {value!r}, expected {expected}")


def whole(name: str, value: Any) -> int:
    """``value`` as an ``int``. ConfigError unless it is a whole number, of Python or NumPy."""
    try:
        return operator.index(value)
    except TypeError:
        raise ConfigError(f"{name}: got {value!r}, expected a whole number") from None


def pair(name: str, value: Any) -> tuple[float, float]:
    """``value`` as two numbers. ConfigError if it is something else."""
    try:
        low, high = value
        return float(low), float(high)
    except (TypeError, ValueError):
        raise ConfigError(f"{name}: got {value!r}, expected two numbers") from None


def usable_device(name: str | torch.device) -> torch.device:
    """The device. ConfigError unless it is the CPU or an accelerator of this machine."""
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"device: got {name!r}, expected cpu, cuda or cuda:1 ({error})") from None
    found = torch.accelerator.current_accelerator(check_available=True)
    usable = found is not None and device.type == found.type and (device.index or 0) < torch.accelerator.device_count()
    if device.type != "cpu" and not usable:
        here = "cpu" if found is None else f"cpu, or one of the {torch.accelerator.device_count()} {found.type} devices"
        raise ConfigError(f"device: got {name!r}, expected {here}")
    return device
