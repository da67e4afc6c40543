"""Trains within a budget: the command train_imagenet.py, vitlocal-train, or python -m vitlocal.train"""

import gc
import os
import time
from collections.abc import Sequence

BEGAN = time.monotonic()  # imports count in a budget that counts all time

# PyTorch's and the loader's threads share the cores, so waiting threads must not spin. Read when PyTorch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # no C++ stacks if another process is lost: we say which one

from vitlocal.errors import ConfigError, ends_at_once
from vitlocal.machine import end_with_parent
from vitlocal.paths import TRAIN


def main(argv: Sequence[str]) -> int:
    # Imported here, so that wrong options are reported before PyTorch is loaded. Collecting garbage among the imported
    # objects would take a quarter of that time.
    if "TORCHELASTIC_RUN_ID" in os.environ:  # if torchrun, which started this process, is killed, it saves and stops
        end_with_parent()
    gc.disable()
    with ends_at_once():
        from vitlocal.config import read_config

    if not argv and not any("." in name for name in os.environ):  # which may have options too
        raise ConfigError(f"no recipe is named; for example: {TRAIN} --config-file rcfg/ours.yaml; see --help")
    config = read_config(argv)

    with ends_at_once():
        from vitlocal.train.command import train

    gc.freeze()
    gc.enable()
    return train(config, BEGAN)


if __name__ == "__main__":
    from vitlocal.launch import train

    train()
