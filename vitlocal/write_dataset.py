"""Encodes a split into .beton files: write_dataset.py, vitlocal-write, or python -m vitlocal.write_dataset"""

import os
from collections.abc import Sequence

# PyTorch's threads share the cores with others, and must not spin while they wait. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vitlocal.errors import ends_at_once
from vitlocal.write_options import read_write_options


def main(argv: Sequence[str]) -> None:
    options = read_write_options(argv)
    if options.plan:
        with ends_at_once():
            from vitlocal.storage import plan_files  # it imports PyTorch, which takes seconds

        plan_files(options)
    elif options.verify:
        with ends_at_once():
            from vitlocal.data.writer.verify import verify

        verify(options.out, options.split, options.workers, vae=options.vae, source=options.source)
    elif options.labels_from is not None:
        with ends_at_once():
            from vitlocal.write_labels import write_labels

        write_labels(options)
    else:
        with ends_at_once():
            from vitlocal.data.writer.write import write_from_options

        write_from_options(options)


if __name__ == "__main__":
    from vitlocal.launch import write

    write()
