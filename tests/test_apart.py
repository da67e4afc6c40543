"""Parsers that a damaged file may crash run in a process of their own."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vitlocal.data import apart
from vitlocal.data.apart import Crashed, read_apart, read_footer


def fails(item: str) -> int | str:
    """Harms the process that calls it."""
    if item == "abort":
        os.abort()
    if item == "memory":
        return len(bytes(1 << 31))
    if item == "forever":
        while True:
            pass
    return item.upper()


@pytest.fixture
def child(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds ``fails`` in a module that stands for ``apart``."""
    source = Path(apart.__file__).read_text().replace("MOST_SECONDS = 1 << 30, 60", "MOST_SECONDS = 1 << 30, 1")
    start = source.index('if __name__ == "__main__"')
    (tmp_path / "harmed.py").write_text(source[:start] + "from test_apart import fails\n" + source[start:])
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(apart, "__name__", "harmed")


@pytest.mark.parametrize(
    ("item", "reason"), [("abort", signal.SIGABRT.name), ("memory", "MemoryError"), ("forever", signal.SIGXCPU.name)]
)
def test_the_item_that_ends_the_child_is_known(child: None, item: str, reason: str) -> None:
    assert read_apart(fails, ["a", "é"]) == ["A", "É"]
    with pytest.raises(Crashed, match=reason) as found:
        read_apart(fails, ["a", item, "c"])
    assert found.value.index == 1


@pytest.mark.parametrize(("kind", "limit"), [(resource.RLIMIT_CPU, 30), (resource.RLIMIT_DATA, 1 << 36)])
def test_limits_of_the_machine_stay(kind: int, limit: int) -> None:
    """A hard limit, as on login nodes, cannot be raised."""
    script = (
        f"import resource; resource.setrlimit({kind}, ({limit}, {limit})); from vitlocal.data import apart; "
        f"apart.limit_resources(1); print(*resource.getrlimit({kind}))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    soft, hard = map(int, output.split())
    assert soft <= hard == limit


def test_a_footer_that_needs_too_much_memory_is_not_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs_too_much(path: str) -> None:
        raise MemoryError

    monkeypatch.setattr("pyarrow.parquet.ParquetFile", needs_too_much)
    with pytest.raises(MemoryError):
        read_footer("a.parquet")
