"""Runs with all options of the trunk: each method trains, continues and exports, or refuses an option by its name."""

from __future__ import annotations

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy

from vitlocal.config import read_config
from vitlocal.errors import ConfigError
from vitlocal.models.counts import count_macs
from vitlocal.tasks.classification import binary_cross_entropy
from vitlocal.train.build import build_step
from vitlocal.train.command import train

pytestmark = pytest.mark.usefixtures("no_report")

SHORT = ["--budget.length=4steps", "--evaluate.every=0", "--data.workers=1", "--model.depth=4", "--model.width=32"]
TRUNK = ["--model.heads=2", "--model.rope=mixed", "--model.stem=hmlp",
         "--model.use_abs_pos_emb=no", "--model.layer_scale=0.1", "--train.loss=binary_cross_entropy"]  # fmt: skip
BY_METHOD = {
    "none": [], "image_size": ["--image_size.stages=24px until 50%, 48px"], "budgeted": ["--budgeted.copy_noise=0.1"],
    "budgeted before": ["--methods=budgeted", "--budgeted.crop=before"],
    "trilevel": ["--trilevel.token_keep_rate=0.7", "--trilevel.decay_end=80%"],
    "autoprog": ["--autoprog.schedule=2@24px,3@32px,4@48px,4@48px"],
    "unfreeze": ["--unfreeze.schedule=1@24px,2@32px,4@48px,4@48px"],
}  # fmt: skip


@pytest.mark.parametrize("method", BY_METHOD)
def test_methods_train_and_export_with_all_options(configure, decoder, tmp_path, method):
    rope = ["--model.rope=axial", "--model.rope_coordinates=patches", "--train.optimizer=muon", "--model.pool=avg"]
    options = [*SHORT, *TRUNK, *(rope if method in ("none", "budgeted") else [])]
    if method in ("image_size", "unfreeze"):
        options += ["--model.stem_norm=batch"]
    config = configure(*options, f"--methods={method}", *BY_METHOD[method])
    assert train(config) == 0
    exported = timm.create_model(f"local-dir:{tmp_path / 'run'}", pretrained=True).eval()
    assert exported(torch.randn(2, 3, 48, 48)).isfinite().all()


@pytest.mark.parametrize("method", ["none", "budgeted"])
def test_patches_are_dropped_at_every_size(configure, decoder, method):
    options = ["--model.patch_drop=0.5", "--model.rope=axial", f"--methods={method}"]
    assert train(configure(*SHORT, "--model.heads=2", *options)) == 0
    models = [timm.create_model("vitlocal_tiny_patch8_64", patch_drop_rate=rate) for rate in (0.5, 0.0)]
    assert 0.4 < count_macs(models[0], 64) / count_macs(models[1], 64) < 0.6


@pytest.mark.parametrize(
    "options, words",
    [
        (["--model.name=vitlocal_localvit_tiny_patch8_64", "--model.patch_drop=0.5"], "patch_drop_rate=0.5"),
        (["--model.name=resnet10t", "--model.rope=axial"], "add .*--model.rope=none"),
        (["--model.stem=hmlp", "--model.patch_size=12"], "patch_size=12"),
    ],
)
def test_what_a_model_cannot_do_is_refused(configure, options, words):
    with pytest.raises(ConfigError, match=words):
        build_step(configure(*options), 5, torch.device("cpu"))


def test_a_threshold_needs_binary_targets():
    with pytest.raises(ConfigError, match=r"train\.bce_target_thresh: it needs train\.loss=binary_cross_entropy"):
        read_config(["--train.bce_target_thresh=0"], {})
    with pytest.raises(ConfigError, match=r"train\.label_smoothing=0"):
        read_config(["--train.bce_target_thresh=0", "--train.loss=binary_cross_entropy"], {})


@pytest.mark.parametrize("threshold", [None, 0.0, 0.4])
@pytest.mark.parametrize("share", [None, 0.3])
def test_binary_cross_entropy_equals_timms(threshold, share):
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 5, requires_grad=True), torch.tensor([0, 1, 4, 3, 1, 2])
    smoothing = 0.1 if threshold is None else 0.0
    theirs = BinaryCrossEntropy(smoothing=smoothing, target_threshold=threshold)
    target = labels if share is None else mixup_target(labels, 5, share, smoothing)
    ours = binary_cross_entropy(logits, labels, None if share is None else torch.tensor(share), smoothing, threshold)
    torch.testing.assert_close(ours / 6, theirs(logits, target))
    if threshold == 0 and share is not None:  # DeiT III: both labels count fully
        both = torch.maximum(F.one_hot(labels, 5), F.one_hot(labels.flip(0), 5)).float()
        torch.testing.assert_close(ours / 6, F.binary_cross_entropy_with_logits(logits, both))
