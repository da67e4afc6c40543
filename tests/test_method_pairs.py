"""Methods together: the pairs that can be combined, and errors and warnings about recipes."""

from __future__ import annotations

import re

import pytest
from method_plans import START, context_of

from vitlocal.errors import ConfigError
from vitlocal.methods import METHODS, build_methods
from vitlocal.plan import fold
from vitlocal.progress import Progress

GROWING = ("budgeted", "trilevel", "autoprog", "unfreeze")
PAIRS = [  # all that docs/methods/README.md allows
    *("image_size," + name for name in GROWING), *("strength," + name for name in GROWING),
    *(name + ",batch_size" for name in GROWING), "budgeted,trilevel", "trilevel,autoprog", "budgeted,unfreeze",
    "trilevel,unfreeze", "image_size,strength", "image_size,batch_size",
]  # fmt: skip
ALLOWING = (
    "budgeted.grow=heads,hidden", "autoprog.space=depth", "trilevel.levels=examples", "unfreeze.min_scale=1",
    "strength.by=budget", "augment.mixup=1", "autoprog.grow_augmentation=no",
)  # fmt: skip


@pytest.mark.parametrize("pair", PAIRS)
def test_pairs_that_can_be_combined(pair: str):
    methods = build_methods(context_of(f"methods={pair}", *ALLOWING))
    for fraction in (0.0, 0.2, 0.5, 0.9):
        now = Progress(epoch=30 * fraction, fraction=fraction)
        assert fold(methods, START, now) == fold(methods, START, now)


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        ("budgeted,trilevel", ("trilevel.levels=attention",)),
        ("budgeted,trilevel", ("trilevel.levels=examples,attention",)),
        ("budgeted,trilevel", ("trilevel.token_keep_rate=1",)),
        ("trilevel,autoprog", ("autoprog.space=size",)),
        ("trilevel,autoprog", ("autoprog.schedule=12@128px,12@224px", "autoprog.stages=2")),
        ("unfreeze,autoprog", ("autoprog.space=size", "unfreeze.min_scale=1")),
    ],
)
def test_pairs_that_can_be_combined_with_some_options(pair: str, options: tuple[str, ...]):
    """A method may set the fields that the options of another leave alone."""
    methods = build_methods(context_of(f"methods={pair}", *options))
    for fraction in (0.0, 0.1, 0.3, 0.6, 0.9):
        fold(methods, START, Progress(epoch=30 * fraction, fraction=fraction))


@pytest.mark.parametrize(
    ("pair", "options", "reason"),
    [
        ("image_size,budgeted", (), "both remove tokens"),
        ("budgeted,trilevel", (), "both remove tokens"),
        ("budgeted,trilevel", ("trilevel.levels=tokens",), "both remove tokens"),
        ("trilevel,autoprog", (), "blocks that drop tokens and connections may not exist yet"),
        (
            "trilevel,autoprog",
            ("trilevel.token_keep_rate=1",),
            "blocks that drop tokens and connections may not exist yet",
        ),
        ("image_size,autoprog", (), "both set feed.size"),
        ("budgeted,autoprog", (), "both set growth"),
        ("autoprog,unfreeze", ("autoprog.space=depth", "unfreeze.min_scale=1"), "both choose which blocks"),
        ("autoprog,unfreeze", ("autoprog.space=size",), "both set feed.size"),
    ],
)
def test_pairs_that_cannot_be_combined(pair: str, options: tuple[str, ...], reason: str):
    with pytest.raises(ConfigError, match=reason):
        context_of(f"methods={pair}", *options)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("methods=budgeted", "budgeted.heads=0.5,1"), "2 values for 3 stages"),
        (("methods=budgeted", "budgeted.heads=0.5,0.4,1"), "expected increasing fractions above 0"),
        (
            ("methods=budgeted", "budgeted.compute=50%", "budgeted.epochs=1,2,3"),
            "sets the stages' lengths too; remove one of the two",
        ),
        (("methods=budgeted", "budgeted.compute=half"), "a part of full training"),
        (("methods=budgeted", "budgeted.grow=none"), "nothing grows"),
        (("methods=budgeted", "budgeted.new_weights=random", "budgeted.copy_noise=1"), "random weights are no copies"),
        (("methods=budgeted", "budgeted.cost=time", "budget.length=9ep"), "time needs a budget in time"),
        (("methods=unfreeze", "unfreeze.schedule=[]"), "got 0 entries for 4 stages"),
        (("methods=autoprog", "autoprog.search_length=0%"), "0 leaves no steps"),
        (("methods=autoprog", "autoprog.loss_at=1,0.5"), "expected increasing fractions of the search"),
        (("methods=autoprog", "autoprog.loss_at=0.5"), "and 1 at last"),
        (("methods=autoprog", "autoprog.loss_at=0,1"), "expected increasing fractions of the search above 0"),
        (("methods=autoprog", "autoprog.ema_decays=0.9,0.99,0.999"), "expected two decays"),
        (("methods=autoprog", "autoprog.ema_decays=0.99,0.9"), "the smaller one first"),
        (
            ("methods=budgeted", "budgeted.new_weights=random", "budgeted.copy_from=last"),
            "random weights are no copies",
        ),
        (("methods=unfreeze", "unfreeze.zico_batches=1"), "at least 2"),
        (("methods=trilevel", "trilevel.levels=none"), "all levels are off"),
        (("methods=trilevel", "trilevel.decay_steps=0"), "set train.compile=no"),
        (("methods=trilevel", "augment.repeats=3"), "set augment.repeats=1"),
        (("methods=trilevel", "trilevel.token_keep_rate=0"), "which keeps nothing; expected a rate above 0"),
        (("methods=trilevel", "trilevel.decay_start=50%", "trilevel.decay_end=40%"), "does not come after"),
        (("methods=autoprog", "autoprog.search_length=2ep"), "give a part of it, such as 2%"),
        (("methods=autoprog", "autoprog.search_length=25%"), "use a shorter search"),
        (("methods=autoprog", "autoprog.schedule=6,12"), "got 2 entries for 4 stages"),
        (
            ("methods=autoprog", "autoprog.schedule=8,6,10,12", "autoprog.space=depth"),
            "expected depths that do not decrease",
        ),
        (("methods=unfreeze", "unfreeze.schedule=1@64px,2@64px,5@64px,5@64px"), "of at most 4"),
        (
            ("methods=unfreeze", "unfreeze.schedule=1@224px,2@160px,3@224px,4@224px"),
            "got sizes .224, 160.* not decrease",
        ),
        (
            ("methods=autoprog", "autoprog.schedule=6@224px,8@160px,10@192px,12@224px"),
            "got sizes .224, 160.* not decrease",
        ),
        (("methods=unfreeze,image_size",), "image_size sets the sizes"),
        (("methods=trilevel,trilevel",), "trilevel and trilevel both set"),
        (("methods=autoprog", "model.weights=a.pth"), "give an autoprog.schedule of one depth"),
        (
            ("methods=autoprog", "model.weights=a.pth", "autoprog.space=depth", "autoprog.schedule=6,8,10,12"),
            "copies replace blocks of model.weights",
        ),
        (("methods=trilevel", "data.on_error=skip"), "a held-out example may replace a damaged one"),
    ],
)
def test_problems_of_recipes(options: tuple[str, ...], problem: str):
    with pytest.raises(ConfigError, match=problem):
        context_of(*options)


@pytest.mark.parametrize(
    ("options", "warning"),
    [
        (
            ("methods=image_size,budgeted", "budgeted.compute=50%"),
            r"compute \(50%\) assumes all images at model.size .* with image_size the run costs less",
        ),
        (("methods=budgeted,trilevel", "budgeted.compute=50%"), "with trilevel the run costs less"),
        (
            ("methods=budgeted,trilevel,unfreeze", "budgeted.compute=50%"),
            "with trilevel and unfreeze the run costs less",
        ),
        (("methods=image_size,budgeted", "budgeted.cost=time"), "changes with image_size, and the stages"),
        (("methods=budgeted", "model.weights=a.pth"), "uses only its own heads and hidden units of model.weights"),
        (("methods=budgeted,unfreeze", "model.weights=a.pth"), "growth overwrites the others"),
        (("methods=unfreeze", "unfreeze.schedule=1@64px,2@64px,3@64px,3@224px"), "level 3 of 4: .* never trained"),
        (("methods=unfreeze", "unfreeze.schedule=1@64px,2@64px,3@64px,4@192px"), "4@192px, and model.size is 224"),
        (("methods=autoprog", "autoprog.schedule=6@64px,12@192px", "autoprog.stages=2"), "12@192px, and model.size"),
        (("methods=autoprog", "autoprog.schedule=6,12", "autoprog.stages=2", "autoprog.space=depth"), None),
        (("methods=budgeted", "budgeted.compute=50%"), None),
        (("methods=image_size,budgeted",), None),
        (("methods=budgeted", "budgeted.grow=tokens", "model.weights=a.pth"), None),
        (("methods=autoprog", "autoprog.space=size", "model.weights=a.pth"), None),
        (("methods=autoprog", "autoprog.schedule=12@128px,12@224px", "autoprog.stages=2", "model.weights=a.pth"), None),
    ],
)
def test_warnings_of_recipes(options: tuple[str, ...], warning: str | None):
    grow = [] if any(option.startswith("budgeted.grow") for option in options) else ["budgeted.grow=heads,hidden"]
    recipe = context_of("trilevel.levels=examples", *grow, *options).recipe
    found = [sentence for name in recipe.methods for sentence in METHODS[name].config_warnings(recipe)]
    found = [sentence for sentence in found if "set the run's length" not in sentence]
    assert (not found) if warning is None else re.search(warning, " ".join(found))
