from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

import pytest

from vitlocal.config import RENAMED_OPTIONS, SECTIONS, read_config
from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS, build_methods
from vitlocal.methods.image_size import ImageSizeConfig
from vitlocal.methods.method import MethodContext
from vitlocal.plan import ModelParts
from vitlocal.write_options import read_write_options

ROOT = Path(__file__).parent.parent
RECIPES = sorted((ROOT / "rcfg").glob("*.yaml"))


def recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


def test_later_sources_win(tmp_path: Path):
    first = recipe(tmp_path, "train: {lr: 0.2, batch_size: 8}", "first.yaml")
    second = recipe(tmp_path, "train: {lr: 0.3}", "second.yaml")
    environment = {"train.lr": "0.1", "train.batch_size": "4", "train.eps": "1e-6", "PATH": "/bin"}
    config = read_config(["--config-file", first, "--config-file", second, "--train.clip_norm", "2"], environment)
    assert (config.train.lr, config.train.batch_size) == (0.3, 8)
    assert (config.train.eps, config.train.clip_norm) == (1e-6, 2.0)
    assert read_config(["-C", first, "--train.lr=0.4"], environment).train.lr == 0.4


def test_null_removes_a_value(tmp_path: Path):
    first = recipe(tmp_path, "train: {clip_norm: 1.0}", "first.yaml")
    second = recipe(tmp_path, "train: {clip_norm: null}", "second.yaml")
    assert read_config(["-C", first, "-C", second], {}).train.clip_norm is None


def test_base_recipe_is_changed_by_the_one_that_names_it(tmp_path: Path):
    recipe(tmp_path, "train: {lr: 0.2, batch_size: 8}", "base.yaml")
    config = read_config(["-C", recipe(tmp_path, "base: base.yaml\ntrain: {lr: 0.5}")], {})
    assert (config.train.lr, config.train.batch_size) == (0.5, 8)


PARTS = ModelParts(heads=(6,), hidden=(1536,), grid=14, depths=(12,))  # of DeiT-S


@pytest.mark.parametrize("base", ["recipe.yaml", "[a.yaml, b.yaml]", "nowhere.yaml"])
def test_a_wrong_base_is_an_error(tmp_path: Path, base: str):
    with pytest.raises(ConfigError, match="base is|nowhere.yaml: cannot be read"):
        read_config(["-C", recipe(tmp_path, f"base: {base}")], {})


def test_all_problems_are_reported_at_once(tmp_path: Path):
    text = "train: {batchsize: 4, betas: [0.9], warmup: 5, lr: null}\nmethods: [image_sise]\nmodle: {depth: 2}"
    wrong = ["--run.sead=1", "--train.learning_rate=1", "--train.batch_size=0.5", "--run.progress=maybe"]
    arguments = ["-C", recipe(tmp_path, text), *wrong]
    with pytest.raises(ConfigError) as caught:
        read_config(arguments, {})
    message = str(caught.value)
    for part in (
        "no option 'train.batchsize'; did you mean train.batch_size?",
        "no option 'train.learning_rate'; did you mean train.lr?",
        "no option 'modle.depth'; did you mean model.depth?",
        "no option 'run.sead'; did you mean run.seed?",
        "train.betas: got [0.9]",
        "train.warmup: got 5",
        "train.lr: got 'none'",
        "train.batch_size: got '0.5' (command line), expected a whole number from 1 to 1,000,000",
        "run.progress: got 'maybe' (command line), expected true or false",
        "methods: got ['image_sise']",
    ):
        assert part in message


@pytest.mark.parametrize(("text", "value"), [("0", False), ("no", False), ("true", True), ("1", True)])
def test_flag_values(text: str, value: bool):
    assert read_config([f"--run.progress={text}"], {}).run.progress is value


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (["--data.loader=torchvision", "--data.on_error=skip"], "data.on_error: skip needs data.loader=native"),
        (["--methods=image_size", "--image_size.init=256"], "image_size.init: 256 is larger"),
        (["--methods=image_size", "--image_size.final=256"], "set model.size=256"),
        (["--methods=image_size", "--image_size.growth=exponential", "--image_size.switch_epochs=0,1"], "7 sizes"),
        (["--augment.crop_scale=1,0.5"], "augment.crop_scale"),
        (["--budget.length=0s"], "budget.length"),
        (["--train.schedule_by=epoch"], "train.schedule_by"),
    ],
)  # fmt: skip
def test_contradictions_are_errors(options: list[str], part: str):
    with pytest.raises(ConfigError, match=part):
        read_config(options, {})


@pytest.mark.parametrize(
    "option",
    ["train.betas=0.5,1", "train.lr=inf", "train.ema_decay=1", "train.batch_size=1000000000", "model.width=1000000",
     "model.size=80000", "model.depth=0", "augment.repeats=1000000000", "run.threads=100000", "data.workers=4096",
     "evaluate.size=1000000", "diffusion.steps=1000000000", "diffusion.samples=1e12", "budgeted.stages=1000000",
     "image_size.init=-1", "trilevel.decay_steps=1e9", "augment.mixup=nan"],
)  # fmt: skip
def test_values_out_of_range_are_refused_by_their_names(option: str):
    """They would take all memory, never end, or fail deep inside of a library."""
    with pytest.raises(ConfigError, match=rf"^{option.partition('=')[0]}: got '.*' .*, expected "):
        read_config([f"--{option}"], {})


def test_abbreviations_and_missing_values_are_errors():
    with pytest.raises(ConfigError, match="no option 'train.batch'"):
        read_config(["--train.batch=4"], {})
    with pytest.raises(ConfigError, match="expected one argument"):
        read_config(["--train.lr"], {})


def test_an_unreadable_recipe_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere.yaml"):
        read_config(["-C", str(tmp_path / "nowhere.yaml")], {})
    with pytest.raises(ConfigError, match="is not yaml"):
        read_config(["-C", recipe(tmp_path, "a: [")], {})
    with pytest.raises(ConfigError, match="expected sections"):
        read_config(["-C", recipe(tmp_path, "- a")], {})


def test_the_stored_configuration_repeats_the_run(tmp_path: Path):
    config = read_config(
        ["--methods=image_size", "--train.ema_decay=0.99", "--budget.length=45s", "--model.pool=avg"], {}
    )
    again = read_config(["-C", recipe(tmp_path, config.yaml())], {})
    assert again == config


@pytest.mark.parametrize("nothing", ["none", "[]", ""])
def test_methods_can_be_switched_off(nothing: str):
    ours = str(ROOT / "rcfg" / "ours.yaml")
    assert read_config(["-C", ours, f"--methods={nothing}"], {}).methods == ()


def test_the_default_folder_tells_variants_apart():
    ours = str(ROOT / "rcfg" / "ours.yaml")
    assert read_config(["-C", ours], {}).run.folder == "runs/ours"
    assert read_config(["-C", ours, "--data.loader=torchvision"], {}).run.folder == "runs/ours-data.loader=torchvision"
    assert read_config(["-C", ours, "--data.workers=3", "--run.threads=1"], {}).run.folder == "runs/ours"
    options = [f"--image_size.stages={', '.join(f'{size}px until {size}ep' for size in range(32, 224, 16))}, 224px"]
    first, second = (
        read_config(["-C", ours, *options, f"--model.width={width}"], {}).run.folder for width in (192, 384)
    )
    assert first != second and len(Path(first).name) == len(Path(second).name) == 120
    assert read_config(["-C", ours, "--model.weights=重み"], {}).run.folder == "runs/ours-model.weights=__"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_valid_and_state_their_hardware_and_result(path: Path):
    config = read_config(["-C", str(path)], {})
    build_methods(
        MethodContext(config.recipe, macs=lambda size, shape: 1 + sum(shape.heads or (9,)), parts=PARTS, blocks=12)
    )
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert f"--config-file rcfg/{path.name}" in "\n".join(head) or path.name == "demo.yaml"
    for fact in ("Hardware:", "easured"):
        assert any(fact in line for line in head), f"{path.name} does not say: {fact}"


def test_curricula_of_recipes_are_those_of_the_paper():
    sizes = {}
    for name in ("ours", "curriculum_128_3_16", "curriculum_64_5_32", "curriculum_exponential", "ours_no_curriculum"):
        config = read_config(["-C", str(ROOT / "rcfg" / f"{name}.yaml")], {})
        stages = config.recipe.section(ImageSizeConfig).curriculum
        starts = [0, *(stage.until.value for stage in stages[:-1])]
        sizes[name] = [*zip(starts, (stage.size for stage in stages), strict=True)] if config.methods else []
    assert sizes["ours"] == [(0, 32), (5, 64), (10, 96), (15, 128), (20, 160), (25, 192), (30, 224)]
    assert sizes["curriculum_128_3_16"] == [(3 * i, 128 + 16 * i) for i in range(7)]
    assert sizes["curriculum_64_5_32"] == [(5 * i, 64 + 32 * i) for i in range(6)]
    assert [start for start, _ in sizes["curriculum_exponential"]] == [0, 2, 4, 8, 12, 20, 36]
    assert sizes["ours_no_curriculum"] == []


RENAMED = RENAMED_OPTIONS | {
    f"{name}.{old}": f"{name}.{new}" for name, method in METHODS.items() for old, new in method.options.renamed.items()
}


@pytest.mark.parametrize("old", RENAMED)
def test_an_old_option_name_is_an_error_with_the_new_one(tmp_path: Path, old: str):
    section, _, key = old.partition(".")
    for argv, environment in (
        ([f"--{old}=1"], {}), (["-C", recipe(tmp_path, f"{section}: {{{key}: 1}}")], {}), ([], {old: "1"}),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"no option '{old}' any more; its name is now {RENAMED[old]}$"):
            read_config(argv, environment)


def test_new_names_are_options_and_old_names_are_not():
    known = {f"{name}.{field.name}" for name, section in SECTIONS.items() for field in fields(section)}
    assert set(RENAMED.values()) <= known and not set(RENAMED) & known


@pytest.mark.parametrize("words", [["--help"], ["--trian.lr=1"], ["-C", str(ROOT / "rcfg" / "trilevel.yaml")]])
def test_reading_a_configuration_imports_no_large_package(words: list[str]):
    script = f"""
import sys
from vitlocal.config import read_config
from vitlocal.errors import run_command
try:
    run_command(lambda argv: read_config(argv) and 0, {words!r})
except SystemExit:  # after --help
    pass
large = {{"torch", "torchvision", "timm", "numba", "ffcv", "cv2", "PIL", "matplotlib"}}
print("large:", sorted(large & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "large: []" in done.stdout, done.stderr


def test_writer_options_have_plain_flags():
    options = read_write_options(["--split", "val", "--source=sample", "--on-error", "skip", "--sides=64:raw"], {})
    assert (options.split, options.source, options.on_error, options.sides) == ("val", "sample", "skip", "64:raw")
    with pytest.raises(ConfigError, match="did you mean --quality"):
        read_write_options(["--qualty=3"], {})
    with pytest.raises(ConfigError, match=r"(?s)^write.quality: got '300' \(env.*--on-error: got 'go'"):
        read_write_options(["--on-error=go"], {"write.quality": "300"})


def test_help_shows_all_options_or_one_sections(capsys):
    whole = (["--help"], ["--train.lr ", "--unfreeze."], [])
    for words, shown, hidden in (whole, (["--help", "budget"], ["--budget.length"], ["--train.", "--unfreeze."])):
        with pytest.raises(SystemExit) as left:
            read_config(words, {})
        said = capsys.readouterr().out
        assert left.value.code == 0
        assert all(part in said for part in shown) and not any(part in said for part in hidden)
    with pytest.raises(SystemExit):
        read_config(["--help", "methods"], {})
    said = capsys.readouterr().out
    assert "--methods" in said and "trilevel, autoprog" in " ".join(said.split()) and "--train.lr" not in said
    with pytest.raises(ConfigError, match=r"no section 'bugdet'.* budget,"):
        read_config(["--help=bugdet"], {})


@pytest.mark.parametrize(
    ("command", "part"),
    [
        (["train_imagenet.py", "--data.root=/nowhere"], "python write_dataset.py --split train"),
        (["train_imagenet.py", "--trian.lr=1"], "did you mean train.lr?"),
        (["write_dataset.py", "--split=tset"], "expected one of train, val"),
    ],
)
def test_commands_exit_with_status_2(command: list[str], part: str, tmp_path: Path):
    script = [sys.executable, str(ROOT / command[0]), *command[1:]]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and part in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []  # nothing half-written


def test_empty_sections_and_yamls_booleans(tmp_path: Path):
    (tmp_path / "a.yaml").write_text("augment:\n  # mixup: 0.2\ntrain: {compile: no, cuda_graphs: no}\n")
    train = read_config(["-C", str(tmp_path / "a.yaml"), "--train.compile=False"], {}).train
    assert (train.compile, train.cuda_graphs) == ("no", "no")


def test_an_option_that_is_gone_and_that_a_run_did_not_set_does_not_matter(tmp_path: Path):
    for name, value, message in (("config", "null", ""), ("config", "3", "no option"), ("mine", "null", "no option")):
        path = tmp_path / f"{name}.yaml"  # a run's config.yaml has all options of its version
        path.write_text(f"model: {{depth: 3, qk_norm: {value}}}\n")
        with pytest.raises(ConfigError, match=message) if message else nullcontext():
            assert read_config(["-C", str(path)], {}).model.depth == 3


def test_vitlocals_recipes_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    ours = read_config(["-C", str(ROOT / "rcfg" / "deit_s.yaml")], {})
    for name in ("deit_s.yaml", "rcfg/deit_s.yaml"):
        assert read_config(["-C", name], {}).flat() == ours.flat()
    (tmp_path / "mine.yaml").write_text("base: deit_s.yaml\ntrain: {lr: 0.5}\n")
    mine = read_config(["-C", str(tmp_path / "mine.yaml")], {})
    assert mine.model == ours.model and mine.train.lr == 0.5
    (tmp_path / "deit_s.yaml").write_text("model: {depth: 3}\n")  # a file of the user has precedence
    assert read_config(["-C", "deit_s.yaml"], {}).model.depth == 3
    with pytest.raises(ConfigError, match=r"did you mean rcfg/ours\.yaml"):
        read_config(["-C", "ourz.yaml"], {})
