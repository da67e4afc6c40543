"""Trains a Vision Transformer within a budget: python train_imagenet.py --config-file rcfg/ours.yaml

Any option may be overridden, for example --data.loader=torchvision; --help lists them. The same command continues a
run that was stopped.
"""

import gc
import os
import time
from collections.abc import Sequence

BEGAN = time.monotonic()  # imports count in a budget that counts all time

# PyTorch's and the loader's threads share the cores, so waiting threads must not spin. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vitlocal.errors import ConfigError, run_command
from vitlocal.machine import leave


def main(argv: Sequence[str]) -> int:
    # Imported here, so that Ctrl-C is handled and wrong options are reported before PyTorch is loaded. Collecting
    # garbage among the imported objects would take a quarter of that time.
    gc.disable()
    from vitlocal.config import read_config

    if not argv and not any("." in name for name in os.environ):  # which may have options too
        raise ConfigError("no recipe is named; for example: train_imagenet.py --config-file rcfg/ours.yaml; see --help")
    config = read_config(argv)

    from vitlocal.train.command import train

    gc.freeze()
    gc.enable()
    return train(config, BEGAN)


if __name__ == "__main__":
    leave(run_command(main))
