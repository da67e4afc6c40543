"""Imports are cheap: what each entry point loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HEAVY = ("torch", "timm", "numba", "ffcv", "cv2", "torchvision", "matplotlib")


def loaded_by(code: str, *arguments: str) -> tuple[set[str], subprocess.CompletedProcess[str]]:
    """The heavy libraries that a new process has loaded when ``code`` ends."""
    program = (
        "import atexit, sys\n"
        f"atexit.register(lambda: print('LOADED', *(name for name in {HEAVY} if name in sys.modules)))\n{code}"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("LOADED"))
    return set(line.split()[1:]), done


def test_the_package_loads_nothing_until_a_name_is_used():
    assert loaded_by("import vitlocal")[0] == set()
    assert loaded_by("import vitlocal; vitlocal.Clock('24h'); vitlocal.Length; vitlocal.LRSchedule")[0] == set()
    assert "timm" in loaded_by("import vitlocal; vitlocal.create_model('vitlocal_tiny_patch8_64', depth=1)")[0]


def test_an_unknown_name_is_an_attribute_error():
    import vitlocal

    with pytest.raises(AttributeError, match="'Loadr'; it has BetonDataset, "):
        _ = vitlocal.Loadr


@pytest.mark.parametrize(
    ("arguments", "text"),
    [("['--help']", "--train.batch_size"), ("['--train.batch_sise=3']", "did you mean train.batch_size?")],
)
def test_help_and_wrong_options_need_no_torch(arguments: str, text: str):
    code = f"import sys\nsys.argv = ['train_imagenet.py', *{arguments}]\n"
    code += "from vitlocal.errors import run_command\nfrom vitlocal.train.__main__ import main\n"
    code += "try: sys.exit(run_command(main))\nexcept SystemExit: pass"
    loaded, done = loaded_by(code)
    assert loaded == set() and text in done.stdout + done.stderr


def test_the_native_loader_needs_only_torch():
    assert loaded_by("import vitlocal.data.loader")[0] == {"torch"}


def test_the_models_register_with_timm():
    code = "import timm, vitlocal.models; assert timm.is_model('vitlocal_small_patch16_224')"
    assert loaded_by(code)[1].returncode == 0
