"""Random combinations of options: each takes two steps, or is refused by an error that names an option."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from vitlocal.config import SECTIONS, Config
from vitlocal.errors import ConfigError, DataError, DeviceMemoryError
from vitlocal.methods import METHODS
from vitlocal.options import FLAG, STAGE, Choice, Duration, Maybe, Number, Parsed, Series
from vitlocal.train.command import train

pytestmark = pytest.mark.usefixtures("no_report")

EXAMPLES = int(os.environ.get("VITLOCAL_COMBINATIONS", "24"))
# Paths, and what would leave the test's folder, take minutes, or need a library.
FIXED = re.compile(
    r"data\.(root|source|loader|workers)|run\.(folder|device|resume|replay_search|progress|threads)|budget\..*"
    r"|model\.(name|weights|size)|diffusion\.(features|vae)|train\.compile.*|.*\.schedule|.*_batches"
)
EXTREMES = [0, 1, 2, 3, 5, 16, 31, 1000, 10**6, 10**9]


def values_of(kind: Parsed) -> st.SearchStrategy[str]:
    """Values that the option's kind accepts, usual and extreme ones, as text of the command line."""
    if isinstance(kind, Maybe):
        return st.one_of(st.just("none"), values_of(kind.kind))
    if isinstance(kind, Choice):
        return st.sampled_from(kind.names)
    if isinstance(kind, Number):
        numbers = EXTREMES if kind.whole else [*EXTREMES, 1e-8, 0.05, 0.3, 0.5, 1.5, 1e38]
        inside = sorted(
            {number for number in numbers if kind.low <= number <= kind.high} | {kind.low} - {float("-inf")}
        )
        return st.sampled_from([f"{number:g}" for number in inside] + ([f"{kind.high:g}"] if kind.high < 1e9 else []))
    if isinstance(kind, Series):
        count = kind.count
        parts = st.lists(values_of(kind.kind), min_size=count or 0, max_size=count or 3)
        return parts.map(lambda values: ",".join(values) or "none")
    if isinstance(kind, Duration):
        return st.sampled_from(["0ep", "1steps", "2steps", "1ep", "0.01s", "2h", "1PF"] + ["10%", "100%"] * kind.part)
    if kind is FLAG:
        return st.sampled_from(["yes", "no"])
    if kind is STAGE:
        return st.sampled_from(["16px until 50%", "24px until 1ep", "48px", "20px", "96px"])
    return st.nothing()  # text, bytes, schedules


def options_of() -> dict[str, st.SearchStrategy[str]]:
    """The values of every option, by its dotted name."""
    found = {
        f"{section}.{each.name}": values_of(each.metadata["kind"])
        for section, options in SECTIONS.items()
        for each in fields(options)
        if not FIXED.fullmatch(f"{section}.{each.name}")
    }
    return {name: values for name, values in found.items() if not values.is_empty}


OPTIONS = options_of()
CHOICES = st.lists(st.sampled_from(sorted(OPTIONS)), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: OPTIONS[name] for name in names})
)
MODELS = [
    [],
    ["--model.name=vitlocal_deit_tiny_patch8_64"],
    ["--model.name=vitlocal_localvit_tiny_patch16_224", "--model.patch_size=8"],
    ["--model.name=vitlocal_dit_tiny_patch4_32", "--model.size=32", "--diffusion.grid_classes=1",
     "--diffusion.sample_steps=2", "--model.drop_path=0"],
    ["--model.name=resnet10t", "--methods=none"],
]  # fmt: skip
NAMED = re.compile(rf"\b({'|'.join([*SECTIONS, 'methods'])})\b[.:]?|--split|model options")


def trained(configure: Callable[..., Config], options: list[str]) -> str | None:
    """Takes two steps. Returns the message of a refusal."""
    try:
        assert train(configure("--budget.length=2steps", "--data.workers=1", *options)) == 0
    except (ConfigError, DeviceMemoryError) as error:
        return str(error)
    except DataError as error:  # extreme rates
        assert "diverged" in str(error) or "finite" in str(error), error
    return None


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)  # fmt: skip
@given(
    model=st.sampled_from(MODELS),
    methods=st.lists(st.sampled_from(sorted(METHODS)), max_size=2, unique=True),
    options=CHOICES,
)
def test_combinations_train_or_are_refused_by_name(
    configure, decoder, tmp_path: Path, model: list[str], methods: list[str], options: dict[str, Any]
):
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    given_options = [f"--methods={','.join(methods) or 'none'}", *model, *(f"--{k}={v}" for k, v in options.items())]
    note(" ".join(given_options))
    message = trained(configure, given_options)
    if message is not None:
        assert NAMED.search(message), message
        assert "Traceback" not in message
