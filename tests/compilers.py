"""Compilers that some tests need."""

import os
import shutil

import pytest
import torch

# On a GPU, Triton compiles instead.
needs_cxx = pytest.mark.skipif(
    not torch.cuda.is_available() and shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="PyTorch compiles with a C++ compiler",
)
