"""What the machine has."""

import os
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest

from vitlocal.machine import can_compile_kernels, decoder_threads


def test_cores_are_shared_with_the_other_processes_unless_each_is_bound(monkeypatch: pytest.MonkeyPatch):
    allowed = {0: 32, os.getppid(): 32}
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(allowed[pid])))
    assert (decoder_threads(True), decoder_threads(True, 4), decoder_threads(False, 64)) == (30, 6, 1)
    allowed[0] = 8
    assert (decoder_threads(True, 4), decoder_threads(False, 4)) == (6, 8)


def test_kernels_need_triton_a_compiler_and_pythons_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / name))
    monkeypatch.setitem(sys.modules, "triton", sys)  # any module with a spec
    assert find_spec("triton") is not None and not can_compile_kernels()
    gcc = tmp_path / "bin" / "gcc"
    gcc.parent.mkdir()
    gcc.write_text("#!/bin/sh\n")
    gcc.chmod(0o755)
    assert not can_compile_kernels()
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    assert can_compile_kernels()
    gcc.rename(gcc.with_name("my-cc"))
    assert not can_compile_kernels()
    monkeypatch.setenv("CC", str(gcc.with_name("my-cc")))
    assert can_compile_kernels()
