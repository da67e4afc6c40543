"""The resizer for aarch64 makes the bytes of this machine's, with plain C and with NEON, under qemu's emulation."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NATIVE = ROOT / "vitlocal" / "data" / "native"
COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
CASES = 1000


def digests(compiler: str, program: Path, *emulator: str) -> tuple[list[str], int]:
    """The lines of tests/fuzz/compare.c, one for each case, and the number of the best instruction set."""
    sources = [ROOT / "tests" / "fuzz" / "compare.c", *(NATIVE / f"{name}.c" for name in ("resize", "exact", "crops"))]
    headers = f"/usr/include/{sysconfig.get_config_var('MULTIARCH')}"  # libjpeg's, which do not differ in what we use
    flags = ["-O3", "-ffp-contract=off", "-static", f"-I{NATIVE}", "-idirafter", headers]  # the first two: setup.py's
    subprocess.run([compiler, *flags, *sources, "-o", program, "-lm"], check=True)
    done = subprocess.run([*emulator, program, str(CASES), "0"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-200:] + done.stderr
    return done.stdout.splitlines(), int(done.stderr)


@pytest.mark.slow
@pytest.mark.skipif(not EMULATOR or not COMPILER, reason="needs the packages qemu-user and gcc-aarch64-linux-gnu")
def test_aarch64_makes_the_same_bytes(tmp_path: Path):
    assert EMULATOR and COMPILER
    here, _ = digests("cc", tmp_path / "here")
    there, best = digests(COMPILER, tmp_path / "there", EMULATOR)
    assert best == 1  # NEON
    assert len(here) == CASES
    assert here == there
