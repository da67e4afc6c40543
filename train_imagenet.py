"""Trains a Vision Transformer within a budget: python train_imagenet.py --config-file rcfg/ours.yaml

Any option may be overridden, as in --data.loader=torchvision; --help lists them. The same command goes on
with a run that was stopped.
"""

import gc
import os
import time
from collections.abc import Sequence

BEGAN = time.monotonic()  # what is imported below counts too, where everything does

# PyTorch's and FFCV's threads share the cores; while they wait, they must not spin. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from vitlocal.errors import run_command
from vitlocal.machine import leave


def main(argv: Sequence[str]) -> int:
    # Importing takes seconds: Ctrl-C may come in, and what is wrong with the options is told before most of it. What is
    # imported stays: going through it for garbage took a quarter of the time, and half a second now and then later on.
    gc.disable()
    from vitlocal.config import read_config

    config = read_config(argv)

    from vitlocal.train.loop import train

    gc.freeze()
    gc.enable()
    return train(config, BEGAN)


if __name__ == "__main__":
    leave(run_command(main))
