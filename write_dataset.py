"""Encodes a split into .beton files: python write_dataset.py --split train [--source FOLDER] [--out FOLDER]

--help lists the options. Interrupted or killed, the same command goes on from where it was.
"""

import sys
from collections.abc import Sequence

from vitlocal.config import read_write_options
from vitlocal.data.write import WriteConfig, parse_files, write
from vitlocal.errors import run_command


def main(argv: Sequence[str]) -> None:
    options = read_write_options(argv)
    if options.verify:
        from vitlocal.data.verify import verify  # imports ffcv, which takes seconds

        verify(options.out, options.split, options.workers)
        return
    files = parse_files("" if options.sides == "auto" else options.sides, options.format)
    write(
        WriteConfig(
            split=options.split, source=options.source, out=options.out, files=files, quality=options.quality,
            sampling=int(options.sampling), workers=options.workers, on_error=options.on_error,
        )
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
