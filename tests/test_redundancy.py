"""The measures of redundancy, compared with their formulas."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import timm
import torch

from vitlocal.bench.__main__ import main
from vitlocal.bench.redundancy import attended_percent, component_percent, linear_cka, mean_pair, measure_blocks
from vitlocal.errors import ConfigError
from vitlocal.train.command import train


def plain_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """Computes CKA from the Gram matrices of m examples, as the paper writes it."""
    m = len(x)
    centre = torch.eye(m, dtype=torch.float64) - torch.ones(m, m, dtype=torch.float64) / m
    k, ll = (centre @ (one @ one.T) @ centre for one in (x.double(), y.double()))

    def hsic(a, b):
        return float((a.flatten() @ b.flatten()) / (m - 1) ** 2)

    return hsic(k, ll) / math.sqrt(hsic(k, k) * hsic(ll, ll))


def test_cka_equals_that_of_gram_matrices():
    torch.manual_seed(0)
    outputs = torch.randn(30, 3, 5) + torch.randn(30, 1, 5)  # (B·T, M, d)
    matrix = linear_cka(outputs)
    for i in range(3):
        for j in range(3):
            assert float(matrix[i, j]) == pytest.approx(plain_cka(outputs[:, i], outputs[:, j]), rel=1e-9)
    same = outputs[:, :1].repeat(1, 3, 1) * torch.tensor([1.0, 2.0, -3.0])[:, None]
    assert mean_pair(linear_cka(same)) == pytest.approx(1)
    assert mean_pair(matrix) < 1


def test_component_percent():
    basis = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))[0]
    for rank in (1, 3, 7):
        hidden = torch.randn(1, 50, rank, dtype=torch.float64) @ basis[:rank][None]
        assert float(component_percent(hidden)[0]) == pytest.approx(100 * rank / 20)


def test_attended_percent():
    assert float(attended_percent(torch.ones(1, 8))[0]) == pytest.approx(100)
    assert float(attended_percent(torch.tensor([[1.0, 0, 0, 0]]))[0]) == pytest.approx(25)


@pytest.mark.parametrize("name", ["vitlocal_tiny_patch8_64", "vitlocal_deit_tiny_patch8_64"])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_every_block_is_measured(name: str, pool: str):
    model = timm.create_model(name, depth=2, embed_dim=32, num_heads=2, num_classes=3, pool=pool).eval()
    batches = [torch.randn(3, 3, 64, 64), torch.randn(2, 3, 64, 64)]
    before = model(batches[0])
    rows = measure_blocks(model, batches)
    assert [row["block"] for row in rows] == [0, 1] and all(0 < row["heads_cka"] <= 1 for row in rows)
    assert all(0 < row[part] <= 100 for row in rows for part in ("hidden_percent", "attended_percent"))
    assert torch.equal(model(batches[0]), before)  # no hooks remain


def test_the_command(configure, decoder, tmp_path: Path, capsys):
    options = ["--methods=budgeted", "--budgeted.grow=heads,hidden", "--budget.length=2ep", "--run.keep_weights=yes"]
    train(configure(*options))
    main(["redundancy", str(tmp_path / "run"), "--images=20", f"--json={tmp_path}/r.json", f"--plot={tmp_path}/r.png"])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(row["epoch"], row["block"]) for row in rows] == [(1, 0), (1, 1), (2, 0), (2, 1)]
    assert (tmp_path / "r.png").stat().st_size > 0 and "CKA between heads" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="holds no run"):
        main(["redundancy", str(tmp_path)])
    train(configure("--budget.length=1ep", f"--run.folder={tmp_path}/other"))
    with pytest.raises(ConfigError, match="run.keep_weights=yes"):
        main(["redundancy", str(tmp_path / "other")])


def test_sizes_of_kept_weights_and_of_a_finished_run(configure, decoder, tmp_path: Path, capsys):
    train(configure("--budget.length=2ep", "--run.keep_weights=yes"))
    folder, sizes = tmp_path / "run", "--sizes=48,64"
    main(["sizes", str(folder), sizes, f"--json={tmp_path}/s.json"])
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [(row["epoch"], row["size"]) for row in rows] == [(1, 48), (1, 64), (2, 48), (2, 64)]
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["top1"] for row in rows[::2]] == pytest.approx([record["top1"] for record in records], abs=0.01)
    assert [row["trained_at"] for row in rows] == [16, 16, 32, 32] and "cross-entropy" in capsys.readouterr().out
    shutil.rmtree(folder / "checkpoints" / "kept")
    main(["sizes", str(folder), sizes, f"--json={tmp_path}/s.json"])
    assert json.loads((tmp_path / "s.json").read_text())["rows"] == rows[2:]
    with pytest.raises(ConfigError, match="multiple"):
        main(["sizes", str(folder), "--sizes=49"])
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="not finished"):
        main(["sizes", str(folder), sizes])
