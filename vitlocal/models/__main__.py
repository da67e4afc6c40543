"""Runs a script that uses timm with our models registered: python -m vitlocal.models SCRIPT.py [ITS OPTIONS]"""

import runpy
import sys
from pathlib import Path

import vitlocal.models  # noqa: F401 (registers our models with timm)

if __name__ == "__main__":
    if not Path(*sys.argv[1:2]).is_file():
        sys.exit(f"{__doc__}\nexpected a Python script, got {''.join(sys.argv[1:2]) or 'none'}")
    del sys.argv[0]  # the script reads its own name and options
    sys.path.insert(0, str(Path(sys.argv[0]).resolve().parent))  # as Python does: it may import files beside it
    runpy.run_path(sys.argv[0], run_name="__main__")
