"""Which version of the local FFN's middle runs: the fused kernel, or PyTorch's operations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vitlocal.errors import ConfigError
from vitlocal.models import local_mix
from vitlocal.models.local_mix import choose_kernel, measured_times, plain_columns

GPU = torch.device("cuda")
ROWS = [
    {"gpu": "A", "dtype": "bfloat16", "side": 2, "fused_ms": 3.0, "plain_ms": 2.0},
    {"gpu": "A", "dtype": "bfloat16", "side": 8, "fused_ms": 3.0, "plain_ms": 4.0},
    {"gpu": "A", "dtype": "float16", "side": 8, "fused_ms": 3.0, "plain_ms": 2.0},
    {"gpu": "B", "dtype": "bfloat16", "side": 8, "fused_ms": 3.0, "plain_ms": 2.0},
]


@pytest.mark.parametrize(
    ("gpu", "dtype", "columns"),
    [
        ("A", torch.bfloat16, range(1, 6)),  # 5 is as near to 2 as to 8
        ("A", torch.float16, range(1, 17)),
        ("A", torch.float32, ()),  # not measured
        ("B", torch.bfloat16, range(1, 17)),
        ("C", torch.bfloat16, ()),
    ],
)
def test_the_nearest_measured_grid_counts(gpu: str, dtype: torch.dtype, columns: range) -> None:
    assert plain_columns(ROWS, gpu, dtype) == tuple(columns)
    assert plain_columns([], gpu, dtype) == ()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The file of measured times that the variable names, on a machine with the GPU "A"."""
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"what": "times", "rows": ROWS}))
    monkeypatch.setenv(local_mix.TIMES_VARIABLE, str(path))
    monkeypatch.setattr(local_mix, "CAN_COMPILE", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A")
    measured_times.cache_clear()
    yield path
    measured_times.cache_clear()


def test_a_compiled_step_has_the_faster_kernel(table: Path) -> None:
    sides = (2, 8, 17)
    assert [choose_kernel(GPU, (side, side), torch.bfloat16, True) for side in sides] == ["plain", "fused", "plain"]
    assert choose_kernel(GPU, (2, 2), torch.bfloat16, False) == "fused"  # an eager step does not fuse
    assert choose_kernel(torch.device("cpu"), (8, 8), torch.bfloat16, True) == "plain"


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_can_trace_the_choice(table: Path, dynamic: bool) -> None:
    """A graph break would split every local FFN of a compiled model."""

    def chosen(tokens: torch.Tensor) -> torch.Tensor:
        grid = tokens.shape[1], tokens.shape[2]
        kernel = choose_kernel(GPU, grid, tokens.dtype, torch.compiler.is_compiling())
        return tokens + 1 if kernel == "fused" else tokens - 1

    compiled = torch.compile(chosen, backend="eager", fullgraph=True, dynamic=dynamic)
    for side, expected in ((2, -1), (8, 1), (10, 1), (17, -1)):
        assert compiled(torch.zeros(1, side, side, dtype=torch.bfloat16))[0, 0, 0] == expected


def test_no_table_is_an_empty_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(local_mix.TIMES_VARIABLE, raising=False)
    monkeypatch.setattr(local_mix, "TIMES", tmp_path / "nothing.json")
    assert measured_times.__wrapped__() == []


@pytest.mark.parametrize("content", ["[", "{}", '{"rows": [{"gpu": "A"}]}', '{"rows": 3}', None])
def test_a_wrong_table_is_an_error(table: Path, content: str | None) -> None:
    table.unlink() if content is None else table.write_text(content)
    with pytest.raises(ConfigError, match="VITLOCAL_LOCAL_MIX_TIMES: .*times.json is not a table of kernel times"):
        measured_times()
