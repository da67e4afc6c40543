"""Loaders of other projects as sources, to use instead of the native loader or to compare with it."""

from contextlib import suppress
from importlib.util import find_spec

from vitlocal.errors import ConfigError

EXTRAS = {"ffcv": "ffcv", "dali": "nvidia.dali"}  # loaders, and what their extras install


def has_extra(name: str) -> bool:
    """Whether the extra ``name`` is installed. Imports nothing of it."""
    with suppress(ModuleNotFoundError):  # of a package around it
        return find_spec(EXTRAS[name]) is not None
    return False


def missing_extra(name: str, error: ImportError) -> ConfigError:
    """The error if the extra ``name`` cannot be imported."""
    what = f'{name} cannot be imported ({error}). It is an extra: pip install "vitlocal[{name}]"'
    return ConfigError(f"{what}. The native loader and writer need no extra")
