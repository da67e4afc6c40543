"""Builds decoder and encoder with sanitizers and sends mutated JPEGs through them: make fuzz [COUNT=100000] [SEED=0]

Any read or write out of bounds, leak or undefined behaviour stops it with a trace and a status that is not 0.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

from vitlocal.data.images import open_images

ROOT = Path(__file__).parent.parent.parent
NATIVE = ROOT / "vitlocal" / "data" / "native"
FORMS = [
    {"quality": 90}, {"quality": 60, "subsampling": 0}, {"quality": 75, "subsampling": 1}, {"progressive": True},
    {"restart_marker_rows": 1}, {"optimize": True, "quality": 30},
]  # fmt: skip


def main(count: int, seed: int) -> int:
    jpeg_flags = runpy.run_path(str(ROOT / "setup.py"))["jpeg_flags"]  # the libjpeg-turbo of a build
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "fuzz"
        sources = [NATIVE / f"{name}.c" for name in ("crops", "resize", "exact", "jpeg")]  # fuzz.c includes the others
        subprocess.run(
            [os.environ.get("CC", "cc"), "-g", "-O1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined",
             "-fno-sanitize-recover=all", f"-I{NATIVE}", Path(__file__).with_name("fuzz.c"), *sources, "-o", program,
             *jpeg_flags(Path(folder)), "-lm", "-pthread"],
            check=True,
        )  # fmt: skip
        paths = []
        images = open_images("sample:1", "train")
        for number in range(len(images)):
            path = Path(folder) / f"{number}.jpg"
            image = images.load(number)
            image.convert("L" if number % 7 == 3 else "RGB").save(path, "JPEG", **FORMS[number % len(FORMS)])
            paths.append(path)
        return subprocess.run([program, str(count), str(seed), *paths]).returncode


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
