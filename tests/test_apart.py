"""Parsers that a damaged file may crash run in a process of their own."""

import os
import signal
from pathlib import Path

import pytest

from vitlocal.data import apart
from vitlocal.data.apart import Crashed, read_apart


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
    source = Path(apart.__file__).read_text().replace("MOST_SECONDS = 1 << 30, 60", "MOST_SECONDS = 1 << 30, -2")
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
