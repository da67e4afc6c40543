"""Where the recipes are, and how the commands are called: in a checkout, or as an installed package."""

from pathlib import Path

_PACKAGE = Path(__file__).parent
IN_CHECKOUT = (_PACKAGE.parent / "train_imagenet.py").exists()
RECIPES = (_PACKAGE.parent if IN_CHECKOUT else _PACKAGE) / "rcfg"
WRITE, TRAIN = (
    ("python write_dataset.py", "python train_imagenet.py") if IN_CHECKOUT else ("vitlocal-write", "vitlocal-train")
)


def find_recipe(name: str | Path, folder: str | Path = "") -> Path:
    """The file ``name``, relative to ``folder``. If it does not exist: the recipe of vitlocal with that name, if any.

    Both ``ours.yaml`` and ``rcfg/ours.yaml`` name vitlocal's recipe.
    """
    stated = Path(folder) / name
    ours = RECIPES / str(name).removeprefix("rcfg/")
    return ours if ours.exists() and not stated.exists() else stated
