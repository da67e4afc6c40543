"""timm's tools on our models and our runs: fine-tuning, saving, features, the arguments of timm's scripts, exports."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from narrow_models import NARROW, narrow
from timm.models import save_for_hf

from vitlocal.errors import ConfigError
from vitlocal.models.factory import build_model, export_model, load_weights
from vitlocal.models.positions import _cached_matrix
from vitlocal.models.shape import set_shape
from vitlocal.models.token_selection import drop_patches
from vitlocal.plan import Shape

OURS, DEIT, LOCALVIT = (f"vitlocal_{family}tiny_patch16_224" for family in ("", "deit_", "localvit_"))
PRUNED = dict(token_keep_rate=0.5, attention_keep_rate=0.5, pruned_blocks=(0, 1))
MODELS = [
    (OURS, {}), (OURS, dict(pool="avg")), (OURS, PRUNED), (OURS, dict(center_grid=3)),
    (DEIT, PRUNED | dict(pool="avg")), (LOCALVIT, {}), (LOCALVIT, dict(pool="avg")),
]  # fmt: skip


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def make_run(folder: Path, name: str, size: int = 64, **options) -> torch.nn.Module:
    """Exports an untrained model of 5 classes to ``folder``, as the trainer does, and returns it."""
    folder.mkdir(exist_ok=True)
    narrow = (
        {key: value for key, value in NARROW.items() if key != "num_classes"} if name.startswith("vitlocal") else {}
    )
    model, arguments = build_model(name, narrow | dict(img_size=size, **options), 5)
    export_model(folder, model.eval(), name, arguments, list("abcde"), size=size, crop_pct=0.875)
    return model


def load(folder: Path, **options) -> torch.nn.Module:
    return timm.create_model(f"local-dir:{folder}", pretrained=True, **options).eval()


TWINS = [
    {}, dict(pool="avg"), dict(init_values=0.1), dict(patch_size=8), dict(rope="axial", pool="avg", init_values=0.1),
    dict(rope="axial", pool="avg", use_abs_pos_emb=False),
    dict(rope="axial", rope_coordinates="patches", rope_theta=50.0),
    dict(rope="mixed", rope_coordinates="patches", init_values=0.1),
]  # fmt: skip


def test_a_deit_is_exported_as_timms_model(tmp_path):
    models = {str(number): make_run(tmp_path / str(number), DEIT, **options) for number, options in enumerate(TWINS)}
    for number, options in enumerate(TWINS):
        described = json.loads((tmp_path / str(number) / "config.json").read_text())
        assert described["architecture"] == f"vit_small_patch16_{'rope_' * ('rope' in options)}224"
    code = f"""
import timm, torch
images = [torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) for side in (32, 64)]
models = {{run: timm.create_model('local-dir:{tmp_path}/' + run, pretrained=True).eval() for run in {list(models)}}}
torch.save([images, {{run: [model(x) for x in images] for run, model in models.items()}}], '{tmp_path}/logits.pt')"""
    subprocess.run([sys.executable, "-P", "-c", code], check=True, cwd=tmp_path)  # without vitlocal
    images, logits = torch.load(tmp_path / "logits.pt")
    with torch.no_grad():
        for run, model in models.items():
            torch.testing.assert_close(logits[run], [model(x) for x in images], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", TWINS)
def test_our_models_load_weights_exported_as_timms(options, tmp_path):
    model, arguments = make_run(tmp_path, DEIT, **options), dict(NARROW, img_size=64, **options)
    ours, _ = build_model(DEIT, {key: value for key, value in arguments.items() if key != "num_classes"}, 5)
    assert load_weights(ours, str(tmp_path)) == []
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours.eval()(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("trained", "here", "message"),
    [
        ({"init_values": 0.1}, {}, r"has blocks.0.\w+.* \(of \d+ weights\), which the model lacks"),
        ({"rope": "mixed"}, {}, "has blocks.0.attn.freqs.* which the model lacks"),
        ({"rope": "axial"}, {}, "has rope axial instead of None"),
        ({}, {"rope": "axial"}, "has rope None instead of axial"),
        ({"rope": "axial", "use_abs_pos_emb": False}, {"rope": "axial"}, "lacks pos_embed"),
        ({}, {"use_abs_pos_emb": False, "rope": "axial"}, "has pos_embed .* which the model lacks"),
        ({"depth": 3}, {"depth": 2}, "has blocks.2.* which the model lacks"),
        ({"num_heads": 4}, {"num_heads": 2}, "has heads 4 instead of 2"),
    ],
)
@pytest.mark.parametrize("name", [DEIT, "vitlocal_tiny_patch8_64"])
def test_weights_of_a_model_with_other_options_are_refused(trained, here, message, name, tmp_path):
    make_run(tmp_path, name, **trained)
    arguments = {key: value for key, value in (dict(NARROW, img_size=64) | here).items() if key != "num_classes"}
    model, _ = build_model(name, arguments, 5)
    with pytest.raises(ConfigError, match=f"model.weights: .* {message}.*: it belongs to another model"):
        load_weights(model, str(tmp_path))


def test_an_export_does_not_need_timms_model(tmp_path, monkeypatch):
    monkeypatch.setattr("vitlocal.models.timm_twin.TIMM_DEIT", "no_such_model")
    make_run(tmp_path, DEIT)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == DEIT


# The angles of the class token, and learned frequencies per fourteenth of an image, are others in timm.
OTHERS = [
    PRUNED, dict(center_grid=3), dict(activation="h_swish"), dict(rope="axial"),
    dict(rope="axial", size=224), dict(rope="mixed"), dict(rope="mixed", pool="avg"),
]  # fmt: skip


@pytest.mark.parametrize("options", OTHERS)
def test_a_deit_that_timm_lacks_keeps_our_name(options, tmp_path):
    make_run(tmp_path, DEIT, **options)
    assert json.loads((tmp_path / "config.json").read_text())["architecture"] == DEIT


@pytest.mark.parametrize("name, options", MODELS)
def test_runs_are_fine_tuned_and_saved_again(name, options, tmp_path):
    model = make_run(tmp_path, name, **options)
    images = torch.randn(2, 3, 96, 96)
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    for adapted in (dict(num_classes=7), dict(num_classes=7, drop_path_rate=0.1, drop_rate=0.5, img_size=96)):
        tuned = load(tmp_path, **adapted)
        assert tuned(images).shape == (2, 7)
        torch.testing.assert_close(tuned.forward_head(tuned.forward_features(images), True), features)
    torch.testing.assert_close(load(tmp_path, num_classes=0, img_size=96)(images), features)
    gray = load(tmp_path, num_classes=0, in_chans=1)  # timm sums the weights of the colors
    torch.testing.assert_close(gray(images[:, :1]), load(tmp_path, num_classes=0)(images[:, :1].expand(-1, 3, -1, -1)))
    assert load(tmp_path, in_chans=4, img_size=(32, 64))(torch.randn(1, 4, 32, 64)).shape == (1, 5)

    if not hasattr(timm.models, "get_model_args"):
        return  # before 1.0.31, save_for_hf() saves no options of models
    tuned = load(tmp_path, num_classes=7)
    tuned.reset_classifier(3, "avg")
    tuned.set_input_size(img_size=(96, 96))
    save_for_hf(tuned, tmp_path / "saved", safe_serialization=True)
    torch.testing.assert_close(load(tmp_path / "saved")(images), tuned(images))
    assert load(tmp_path / "saved", num_classes=2, in_chans=1, img_size=48)(images[:, :1]).shape == (2, 2)


def test_runs_that_do_not_name_the_head_are_fine_tuned(tmp_path):
    make_run(tmp_path, OURS)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["pretrained_cfg"].pop("classifier") == "head"
    assert config["pretrained_cfg"].pop("first_conv") == "patch_embed.proj"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path, num_classes=7, in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 7)


@pytest.mark.parametrize(
    "name, head, fixed",
    [("test_resnet", "fc", False), ("test_vit", "head", False), ("swin_tiny_patch4_window7_224", "head.fc", True)],
)
def test_runs_of_timms_own_models_are_fine_tuned(name, head, fixed, tmp_path):
    small = {}
    if fixed:
        small = dict(depths=(1, 1), embed_dim=8, num_heads=(2, 2), window_size=4)
        model = timm.create_model(name, num_classes=5, img_size=64, **small)
        export_model(tmp_path, model, name, dict(img_size=64, **small), list("abcde"), size=64, crop_pct=0.875)
    else:
        make_run(tmp_path, name)
    described = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    assert described["classifier"] == head and described["fixed_input_size"] is fixed
    assert load(tmp_path, num_classes=7, in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 7)
    assert load(tmp_path, num_classes=0)(torch.randn(1, 3, 64, 64)).ndim == 2


@pytest.mark.parametrize("size", [32, 64, 96, 224])
def test_timm_evaluates_runs_as_we_do(size, tmp_path):
    make_run(tmp_path, OURS, size)
    found = timm.data.resolve_model_data_config(load(tmp_path), use_test_size=True)
    mean, std = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD
    assert tuple(found["input_size"]) == (3, size, size) and (found["crop_pct"], found["crop_mode"]) == (
        0.875,
        "center",
    )
    assert (found["interpolation"], tuple(found["mean"]), tuple(found["std"])) == ("bilinear", mean, std)


SCRIPTS = {
    "train.py": dict(
        pretrained=False, in_chans=3, num_classes=7, drop_rate=0.0, drop_path_rate=None, drop_block_rate=None,
        global_pool=None, bn_momentum=None, bn_eps=None, scriptable=False, checkpoint_path="",
    ),
    "train.py --drop .3 --drop-path .1 --gp avg": dict(
        in_chans=3, num_classes=None, drop_rate=0.3, drop_path_rate=0.1, global_pool="avg", scriptable=False
    ),
    "validate.py": dict(num_classes=None, in_chans=3, global_pool=None, scriptable=False),
    "benchmark.py": dict(in_chans=3, global_pool=None, scriptable=False, drop_rate=0.0, drop_path_rate=None),
    "onnx_export.py": dict(num_classes=1000, in_chans=3, checkpoint_path="", exportable=True),
    "--model-kwargs": dict(dynamic_img_size=True, img_size=96, device="cpu", dtype=torch.float64),
}  # fmt: skip


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("name", [OURS, DEIT, LOCALVIT])
def test_models_take_the_arguments_of_timms_scripts(name, script):
    model = timm.create_model(name, **dict(NARROW, **SCRIPTS[script]))
    images = torch.randn(2, 3, 96, 96, dtype=next(model.parameters()).dtype)
    assert model(images).shape == (2, model.num_classes)
    differs = not torch.equal(model(images), model(images))  # dropout
    assert differs == bool(SCRIPTS[script].get("drop_rate"))
    assert torch.equal(model.eval()(images), model(images))


def deits(pool: str, **options) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Builds our DeiT and timm's, narrow and with the same random weights."""
    options = dict(embed_dim=32, depth=3, num_heads=2) | options
    theirs = timm.create_model(
        "deit_tiny_patch16_224", class_token=pool == "token", global_pool=pool, fc_norm=False, **options
    )
    ours = timm.create_model(DEIT, pool=pool, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.2)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_intermediate_outputs_are_those_of_timms_deit(pool):
    ours, theirs = deits(pool, img_size=64)
    theirs.eval(), ours.eval()
    images = torch.randn(2, 3, 64, 64)
    for arguments in (
        dict(), dict(indices=2, norm=True), dict(indices=[0, -1], output_fmt="NLC", return_prefix_tokens=True),
        dict(indices=[1], stop_early=True), dict(indices=[1], intermediates_only=True),
        dict(output_dict=True), dict(output_dict=True, return_prefix_tokens=True, intermediates_only=True),
    ):  # fmt: skip
        mine, expected = (model.forward_intermediates(images, **arguments) for model in (ours, theirs))
        torch.testing.assert_close(mine, expected)
    torch.testing.assert_close(
        ours.get_intermediate_layers(images, 2, reshape=True), theirs.get_intermediate_layers(images, 2, reshape=True)
    )
    with pytest.raises(ValueError, match="drops tokens"):
        narrow(OURS, **PRUNED).forward_intermediates(images)


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("sizes", [dict(img_size=(96, 64)), dict(patch_size=8), dict(img_size=60, patch_size=(12, 12))])
def test_sizes_are_set_as_in_timms_deit(pool, sizes):
    ours, theirs = deits(pool, img_size=64)
    for model in (ours, theirs):
        model.set_input_size(**sizes)
    assert ours.patch_embed.grid_size == theirs.patch_embed.grid_size
    assert ours.patch_embed.patch_size == theirs.patch_embed.patch_size
    images = torch.randn(2, 3, *(side * ours.patch_embed.patch_size[0] for side in ours.patch_embed.grid_size))
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    assert {info["reduction"] for info in ours.feature_info} == {ours.patch_embed.patch_size[0]}


def test_sizes_that_do_not_fit_change_nothing():
    model = narrow(img_size=64)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"patch_size=\(8, 16\): expected a square patch"):
        model.set_input_size(patch_size=(8, 16))
    with pytest.raises(ValueError, match=r"64x64: the patch of 12x12 pixels must divide it; use 60x60"):
        model.set_input_size(patch_size=12)
    assert model.patch_embed.grid_size == (4, 4) and model.patch_embed.patch_size == (16, 16)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(
    "options",
    [
        dict(drop_rate=0.5), dict(proj_drop_rate=0.3), dict(attn_drop_rate=0.3), dict(patch_drop_rate=0.4),
        dict(init_values=0.5), dict(drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, patch_drop_rate=0.1),
    ],
)  # fmt: skip
def test_rates_and_layer_scale_are_those_of_timms_deit(options, pool):
    """Training drops the same units as timm's model, because both draw the same numbers in the same order."""
    ours, theirs = deits(pool, **options)
    plain, _ = deits(pool)
    plain.load_state_dict(ours.state_dict(), strict=False)
    images = torch.randn(2, 3, 224, 224)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(1)
        found.append(model.train()(images))
    torch.testing.assert_close(*found)
    assert not torch.allclose(found[0], plain.train()(images), rtol=1e-3)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("name", [OURS, LOCALVIT])
@pytest.mark.parametrize("rate", ["drop_rate", "proj_drop_rate", "attn_drop_rate", "patch_drop_rate"])
def test_rates_of_other_families(name, rate):
    if (name, rate) == (LOCALVIT, "patch_drop_rate"):
        with pytest.raises(ValueError, match=r"patch_drop_rate=0\.5: expected none, because LocalViT's convolutions"):
            narrow(name, **{rate: 0.5})
        return
    model, images = narrow(name, **{rate: 0.5}), torch.randn(2, 3, 64, 64)
    outputs, counts = [], []
    model.blocks[0].mlp.drop.register_forward_hook(lambda _, inputs, output: counts.append(inputs[0].numel()))
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(model(images))
    assert torch.equal(outputs[0], outputs[1]) and not torch.allclose(outputs[0], outputs[2])
    tokens = 2 * (8 if rate == "patch_drop_rate" else 16)
    assert counts == [tokens * 128, tokens * 32] * 3  # hidden units, then the part's outputs
    plain = narrow(name).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(images), plain(images))


@pytest.mark.parametrize("name", [OURS, LOCALVIT])
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_layer_scale_multiplies_both_branches(name, pool):
    """As the weights that write the branches do: a factor in either place gives the same outputs."""
    model, images = narrow(name, pool=pool, init_values=0.5).eval(), torch.randn(2, 3, 64, 64)
    plain = narrow(name, pool=pool).eval()
    plain.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for block, other in zip(model.blocks, plain.blocks, strict=True):
            for scale, layers in (
                (block.ls1.gamma, [other.attn.proj]),
                (block.ls2.gamma, [other.mlp.bn3 if name == LOCALVIT else other.mlp.fc2]),
            ):
                assert torch.equal(scale, torch.full((32,), 0.5))
                scale.normal_()
                for parameter in layers[0].parameters():
                    parameter.mul_(scale.view(-1, *[1] * (parameter.ndim - 1)))
    torch.testing.assert_close(model(images), plain(images))


def test_patch_dropout_keeps_places_in_the_grid():
    tokens = torch.randn(2, 17, 32)
    torch.manual_seed(1)
    kept, remaining = drop_patches(tokens, 0.4, 1)
    torch.manual_seed(1)
    expected, indices = timm.layers.PatchDropoutWithIndices(0.4, 1)(tokens)
    assert torch.equal(kept, expected) and torch.equal(remaining.indices, indices) and kept.shape[1] == 1 + 9
    block = narrow(OURS).blocks[0].eval()  # its convolution reads dropped patches as 0, whatever the order
    order = torch.randperm(9)
    shuffled = torch.cat([kept[:, :1], kept[:, 1:][:, order]], dim=1)
    first, second = (
        block.feed_forward(some, (4, 4), None, places)
        for some, places in ((kept, indices), (shuffled, indices[:, order]))
    )
    torch.testing.assert_close(first[:, 1:][:, order], second[:, 1:])
    model, images = narrow(OURS, patch_drop_rate=0.4), torch.randn(2, 3, 64, 64)
    assert model.forward_features(images).shape == (2, 10, 32)
    with pytest.raises(ValueError, match=r"patch_drop_rate=0\.4 drops tokens in training.* call model\.eval\(\)"):
        model.forward_intermediates(images)
    assert model.forward_intermediates(images, output_fmt="NLC", intermediates_only=True)[0].shape == (2, 9, 32)
    assert model.eval().forward_features(images).shape == (2, 17, 32)


def test_class_token():
    torch.manual_seed(0)
    without = narrow(class_token=False)
    torch.manual_seed(0)
    average = narrow(pool="avg")
    assert without.num_prefix_tokens == 0 and without.global_pool == "avg"
    assert all(map(torch.equal, without.state_dict().values(), average.state_dict().values()))
    assert narrow(class_token=True).num_prefix_tokens == narrow(class_token=True, global_pool="avg").num_prefix_tokens
    for options, expected in ((dict(pool="avg"), False), (dict(pool="token"), True)):
        with pytest.raises(ValueError, match=rf"class_token={not expected}: expected {expected} with pool="):
            narrow(class_token=not expected, **options)
    with pytest.raises(ValueError, match="global_pool='token'.*has no class token"):
        narrow(class_token=False, global_pool="token")


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize(
    "arguments", [dict(indices=[0, -2]), dict(indices=2), dict(indices=[0], prune_norm=True, prune_head=False)]
)
def test_blocks_are_pruned_as_in_timms_deit(arguments, pool, tmp_path):
    ours, theirs = deits(pool, img_size=64, drop_path_rate=0.2)
    kept, expected = (model.eval().prune_intermediate_layers(**arguments) for model in (ours, theirs))
    assert kept == expected and len(ours.blocks) == len(theirs.blocks)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert ours.drop_path_rates.tolist() == pytest.approx([0, 0.1, 0.2][: len(ours.blocks)])
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images))
    torch.testing.assert_close(ours.forward_intermediates(images, kept), theirs.forward_intermediates(images, kept))
    if hasattr(timm.models, "get_model_args") and not arguments.get("prune_norm"):
        ours.reset_classifier(7, "avg")
        save_for_hf(ours, tmp_path, safe_serialization=True)
        torch.testing.assert_close(load(tmp_path)(images), ours(images))


def test_blocks_that_cannot_be_pruned_or_read_are_refused():
    model = narrow(depth=3)
    set_shape(model, Shape(block_order=(0, 2)))
    with pytest.raises(ValueError, match=r"runs the blocks \(0, 2\) of 3; export it"):
        model.prune_intermediate_layers()
    with pytest.raises(AssertionError, match="feature index 9 is out of range"):
        narrow(features_only=True, num_classes=None, out_indices=(0, 9))
    with pytest.raises(ValueError, match="feature_cls='fx': expected getter or hook"):
        narrow(features_only=True, num_classes=None, feature_cls="fx")


@pytest.mark.parametrize("name", [OURS, DEIT, LOCALVIT])
def test_features_only(name):
    images = torch.randn(2, 3, 64, 64)
    for out_indices, kept in ((1, 3), ((0, -2), 2), ([0], 1)):
        layers = timm.create_model(name, features_only=True, out_indices=out_indices, **(NARROW | dict(depth=3)))
        assert len(layers.model.blocks) == kept and layers.model.num_classes == 0
        count = out_indices if isinstance(out_indices, int) else len(out_indices)
        assert layers.feature_info.channels() == [32] * count and layers.feature_info.reduction() == [16] * count
        assert [tuple(layer.shape) for layer in layers(images)] == [(2, 32, 4, 4)] * count
    hooked = timm.create_model(name, features_only=True, feature_cls="hook", out_indices=(0, 1), **NARROW)
    assert [tuple(layer.shape) for layer in hooked(images)] == [(2, 17, 32)] * 2
    assert narrow(name).default_cfg["license"] == "mit"


def test_a_script_knows_our_models(tmp_path, monkeypatch, capsys):
    """As python -m vitlocal.models SCRIPT.py OPTIONS."""
    (tmp_path / "beside_it.py").touch()
    (tmp_path / "script.py").write_text(
        "import sys, timm, beside_it\nprint(timm.is_model(sys.argv[1]), sys.argv[0], __name__)\n"
    )
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "argv", ["-m", f"{tmp_path}/script.py", OURS])
    runpy.run_module("vitlocal.models", run_name="__main__")
    assert capsys.readouterr().out.split() == ["True", f"{tmp_path}/script.py", "__main__"]
    monkeypatch.setattr(sys, "argv", ["-m", "nothing.py"])
    with pytest.raises(SystemExit, match=r"expected a Python script, got nothing\.py"):
        runpy.run_module("vitlocal.models", run_name="__main__")


@pytest.mark.filterwarnings("ignore")  # of torch.jit and torch.export themselves
@pytest.mark.parametrize("name, options", [(OURS, PRUNED), (DEIT, PRUNED | dict(pool="avg", per_head_masks=True))])
def test_exported_programs_take_any_batch_size(name, options):
    """The images need another grid than the table: the matrix that resamples it must not be a tracer's."""
    _cached_matrix.cache_clear()
    model = timm.create_model(name, **(NARROW | options)).eval()
    images = torch.randn(5, 3, 64, 64)
    program = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    traced = torch.jit.trace(model, images[:2])
    for count in (1, 5):
        expected = model(images[:count])
        assert type(expected) is torch.Tensor
        torch.testing.assert_close(program(images[:count]), expected)
        torch.testing.assert_close(traced(images[:count]), expected)


def test_drop_path_survives_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model(OURS, **(NARROW | dict(drop_path_rate=0.4)))
    other = timm.create_model(OURS, **(NARROW | dict(drop_path_rate=0.4)))
    model.to_empty(device="cpu").load_state_dict(other.state_dict())
    assert torch.equal(model.drop_path_rates, torch.tensor([0.0, 0.4]))
    images, noise = torch.randn(4, 3, 64, 64), torch.rand(4, 2, 2)
    torch.testing.assert_close(model(images, noise), other(images, noise))
    model.set_drop_path(0.2)
    assert model.to(torch.float64).drop_path_rates[1] == pytest.approx(0.2)  # moves keep what was set
