"""The count of a compiled block's memory traffic, against formulas for its matrix products and its local mix."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="the compiler schedules Triton's kernels"),
    pytest.mark.skipif(not torch.__version__.startswith("2.14."), reason="written for the compiler of PyTorch 2.14"),
]


def test_traffic_of_a_block(tmp_path: Path):
    """In a process of its own, because PyTorch remembers the imagined GPU."""
    batch, side, width = 8, 6, 192
    options = [f"--batch={batch}", f"--size={16 * side}", "--models=vitlocal_tiny_patch16_224"]
    command = [sys.executable, "-m", "vitlocal.bench", "traffic", *options, f"--json={tmp_path}/traffic.json"]
    subprocess.run(command, check=True, capture_output=True)
    rows = json.loads((tmp_path / "traffic.json").read_text())["rows"]
    found = {(row["precision"], row["pass"]): row for row in rows}
    tokens = 2 * batch * side**2 * width / 1e9  # GB of the residual stream in bfloat16
    taps = 4 * 9 * 4 * width / 1e9  # of the convolution, in float32
    weights = 2 * (3 + 1 + 4 + 4) * width**2 / 1e9
    # Four products read and write 1 + 3, 1 + 1, 1 + 4 and 4 + 1 times the tokens; the backward pass has two for each.
    for precision in ("bf16", "fp16"):
        forward, backward = found[precision, "forward"], found[precision, "backward"]
        assert forward["matrix products gb"] == pytest.approx(16 * tokens + weights, rel=0.02)
        assert backward["matrix products gb"] == pytest.approx(2 * (16 * tokens + weights), rel=0.05)
        assert forward["local mix gb"] == pytest.approx(8 * tokens + taps, rel=1e-6)  # hidden units, read and written
        assert backward["local mix gb"] == pytest.approx(12 * tokens + 2 * taps, rel=1e-6)
    # With a float32 stream, both norms and both sums move more bytes, and the stream is kept in float32.
    assert found["fp16", "forward"]["other gb"] > found["bf16", "forward"]["other gb"] + 3 * tokens
    assert found["fp16", "forward"]["kept for backward gb"] > found["bf16", "forward"]["kept for backward gb"] + tokens
