"""The Fréchet distance against closed forms, and the features that it is measured with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch

from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model, export_model
from vitlocal.tasks.frechet import Moments, frechet_distance, measure, open_features

CPU = torch.device("cpu")
CLASSES = ("crab", "fox", "owl")


def moments(mean, covariance, count: int = 100) -> Moments:
    """Moments with exactly these values."""
    mean, covariance = np.asarray(mean, float), np.asarray(covariance, float)
    sums = np.empty((len(mean) + 1, len(mean) + 1))
    sums[0, 0], sums[0, 1:], sums[1:, 0] = count, count * mean, count * mean
    sums[1:, 1:] = (count - 1) * covariance + count * np.outer(mean, mean)
    return Moments(sums)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported model of a run, with random weights."""
    torch.manual_seed(3)
    folder = tmp_path_factory.mktemp("classifier")
    options = dict(img_size=32, patch_size=8, embed_dim=24, depth=1, num_heads=2, pool="avg")
    model, arguments = build_model("vitlocal_deit_tiny_patch8_64", options, len(CLASSES))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    export_model(folder, model, "vitlocal_deit_tiny_patch8_64", arguments, CLASSES, size=32, crop_pct=0.875)
    return folder


def test_moments_of_a_stream_are_those_of_all_rows():
    features = torch.randn(70, 5, generator=torch.Generator().manual_seed(0)) * 3 + 100
    parts = [Moments.of(part) for part in features.split([1, 40, 29])]
    whole, expected = parts[0] + parts[1] + parts[2], features.double().numpy()
    assert whole.count == 70
    np.testing.assert_allclose(whole.mean, expected.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.covariance, np.cov(expected, rowvar=False), rtol=1e-8, atol=1e-9)


def test_closed_forms():
    """Of one dimension (m1 - m2)² + (s1 - s2)²; of covariances that commute, the sum over their common axes."""
    assert frechet_distance(moments([1], [[4]]), moments([3], [[9]])) == pytest.approx(4 + 1)
    generator = np.random.default_rng(1)
    axes = np.linalg.qr(generator.normal(size=(6, 6)))[0]
    first, second = generator.uniform(0.1, 9, (2, 6))
    gap = generator.normal(size=6)
    found = frechet_distance(moments(gap, axes * first @ axes.T), moments(0 * gap, axes * second @ axes.T, 7))
    assert found == pytest.approx((gap**2).sum() + ((first**0.5 - second**0.5) ** 2).sum())


def test_covariances_that_do_not_commute():
    """For 2 x 2 matrices, the trace of a square root is sqrt(tr + 2 sqrt(det))."""
    first, second = np.array([[2, 0.5], [0.5, 1]]), np.array([[1, -0.7], [-0.7, 3]])
    product = first @ second
    root = (np.trace(product) + 2 * np.linalg.det(product) ** 0.5) ** 0.5
    expected = np.trace(first + second) - 2 * root
    assert frechet_distance(moments([0, 0], first), moments([0, 0], second)) == pytest.approx(expected)
    assert frechet_distance(moments([0, 0], second), moments([0, 0], first)) == pytest.approx(expected)


def test_fewer_images_than_features():
    few = Moments.of(torch.randn(4, 30, generator=torch.Generator().manual_seed(0)))
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(few, moments(few.mean, np.zeros((30, 30)))) == pytest.approx(np.trace(few.covariance))
    with pytest.raises(ValueError, match="got 4 and 1 images, expected at least 2"):
        frechet_distance(few, Moments.of(torch.ones(1, 30)))


def test_a_classifiers_features_are_its_heads_input(classifier: Path):
    features = open_features(classifier, CPU)
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    found, guesses = features.judge(images)
    model = timm.create_model(f"local-dir:{classifier}", pretrained=True).eval()
    mean, deviation = (torch.tensor(model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    logits = model((images / 255 - mean) / deviation)
    torch.testing.assert_close(model.head(found.clone()), logits)
    assert found.shape == (4, 24) and guesses.tolist() == logits.argmax(1).tolist()
    assert features.name.startswith("Fréchet distance (features of vit_small_patch16_224 ")  # timm's name of a DeiT
    flat = images[:, :, :1, :1]
    resized, _ = features.judge(flat.expand(-1, -1, 80, 48))
    torch.testing.assert_close(resized, features.judge(flat.expand(-1, -1, 32, 32))[0])


def test_measuring_counts_the_images_that_show_their_class(classifier: Path):
    features = open_features(classifier, CPU)
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(0, 256, (12, 3, 1, 1), dtype=torch.uint8, generator=generator).expand(-1, -1, 32, 32)
    values, guesses = features.judge(images)
    assert 1 < len(guesses.unique())
    order = ["owl", "crab", "fox"]  # of the diffusion model, which may differ
    asked = torch.tensor([order.index(CLASSES[guess]) for guess in guesses.tolist()])
    asked[:5] = (asked[:5] + 1) % 3
    batches = list(zip(images.split(5), asked.split(5), strict=True))
    found, right = measure(features, batches, order)
    assert right == 7
    np.testing.assert_allclose(found.sums, Moments.of(values).sums, rtol=1e-5, atol=1e-4)
    assert measure(features, batches, ["owl", "crab", "wolf"])[1] is None


def test_what_holds_no_features_is_refused(classifier: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match=r"diffusion.features: .*model.safetensors does not exist"):
        open_features(tmp_path, CPU)
    pytest.importorskip("torch_fidelity", reason='needs the extra: pip install "vitlocal[diffusion]"')
    with pytest.raises(ConfigError, match=r"none.pth cannot be read .*weights-inception-2015-12-05"):
        open_features(tmp_path / "none.pth", CPU)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(ConfigError, match="other.pth has other content"):
        open_features(tmp_path / "other.pth", CPU)


def test_inception_features_have_the_name_fid(tmp_path: Path, monkeypatch):
    reason = 'needs the extra: pip install "vitlocal[diffusion]"'
    inception = pytest.importorskip("torch_fidelity.feature_extractor_inceptionv3", reason=reason)
    network = inception.FeatureExtractorInceptionV3
    with monkeypatch.context() as patch:  # random weights
        patch.setattr(network, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *args, **kwargs: None)
        torch.save(network("x", ["2048"], "unused").state_dict(), tmp_path / "inception.pth")
    features = open_features(tmp_path / "inception.pth", CPU)
    images = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(6))
    values, guesses = features.judge(images)
    assert features.name == "FID" and values.shape == (2, 2048) and guesses is None
    assert measure(features, [(images, torch.zeros(2, dtype=torch.int64))], ["crab"])[1] is None
