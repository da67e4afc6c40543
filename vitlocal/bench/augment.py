"""The host's part of augmentation: python -m vitlocal.bench augment [--only groups,graph-eager]

Counts the operations that the host issues to augment and normalise a batch, and times the host.

    groups          by groups of images, as steps on a CPU do it
    graph-eager     on whole batches, as eager steps on a GPU do it
    graph-compiled  the same with torch.compile, as a part of compiled steps on a GPU

Operations are calls of PyTorch's operators that are not views, for a batch of 1024 images. In compiled code they are
kernels, and operators that are called from it. "draw ms" is the time of the draws for 1024 images. "issue ms" is the
rest, and for groups also their draws. It is for small images in a small batch: on a CPU, most of an operation's time is
then the time to issue it. Compiled kernels are the exception, their time is that of their work. Both are processor time
of one thread, so that other load on the machine counts little.
"""

import re
import statistics
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from vitlocal.bench.measurement import progress_bar, spread, text_table, write_json
from vitlocal.bench.parsing import at_least, bench_parser, names
from vitlocal.data import augment_groups
from vitlocal.data.augment import Augment, AugmentParams
from vitlocal.plan import Feed
from vitlocal.train.timing import noise_batch

CPU = torch.device("cpu")
RECIPES: dict[str, dict[str, Any]] = {
    "randaugment": {"randaugment": 9}, "randaugment, big_vision": {"randaugment": 15, "randaugment_ops": "big_vision"},
    "three-augment": {"three_augment": True},
}  # fmt: skip
VERSIONS = ("groups", "graph-eager", "graph-compiled")
DRAWN = 1024  # images of a batch whose draws are timed, and whose operations are counted
CALLS = 30  # of each turn
CALL = re.compile(r"^\s+(?:\w+ = )?(?:\w+\.run|cpp_fused_\w+|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", re.MULTILINE)
COLUMNS = {
    "recipe": ("recipe", ""), "version": ("version", ""), "px": ("size", "d"), "batch": ("batch_size", "d"),
    "operations": ("operations", "d"), "views": ("views", "d"), "draw ms": ("draw_ms", ".3f"),
    "issue ms": ("issue_ms", ".3f"), "spread": ("spread", ".1%"),
}  # fmt: skip


class OperatorCount(TorchDispatchMode):
    """Counts the operators that are called in its context: views, and others."""

    def __init__(self) -> None:
        super().__init__()
        self.views = self.others = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.views += function.is_view
        self.others += not function.is_view
        return function(*args, **(kwargs or {}))


def compiled_calls(function: Callable[..., object], *operands: Any) -> int:
    """Compiles ``function`` for ``operands``, calls it, and counts the kernels and operators that its code calls."""
    from torch._inductor.utils import run_and_get_code

    _, codes = run_and_get_code(function, *operands)
    return sum(len(CALL.findall(code[code.index("def call(") :])) for code in codes)


def milliseconds(work: Callable[[int], object], rounds: int) -> list[float]:
    """The milliseconds per call of ``work``, which gets the number of the call, in each of ``rounds`` turns."""
    taken = []
    for turn in range(rounds + 1):
        began = time.thread_time()
        for number in range(CALLS):
            work(turn * CALLS + number)
        taken.append(1e3 * (time.thread_time() - began) / CALLS)
    return taken[1:]  # the first one warms up


def measured(recipe: str, version: str, size: int, batch_size: int, rounds: int) -> dict[str, Any]:
    """The row of one recipe and version."""
    augment = Augment(**RECIPES[recipe])
    function: Callable[..., Any] = torch.compile(augment, dynamic=False) if version == "graph-compiled" else augment

    def draw(number: int, images: int = DRAWN) -> Any:
        places = np.arange(images)
        if version != "groups":
            return augment.draw(0, number, places, images, size, operations=1.0)
        if augment.three_augment:
            return augment_groups.draw_three(1.0, 0, number, places, size)
        return augment_groups.draw_turns(augment.randaugment, 0, number, places, 1.0, augment.operation_set)

    def work_on(images: Tensor) -> Callable[[int], object]:
        places, drawn = np.arange(len(images)), draw(0, len(images))
        if version == "groups":
            return lambda number: augment(augment.prepare(images, 0, number, places), AugmentParams())
        return lambda number: function(images, drawn)

    small, full = (noise_batch(Feed(size, images), 1, CPU).images for images in (batch_size, DRAWN))
    if version == "graph-compiled":
        operations, views = compiled_calls(function, small, draw(0, batch_size)), None
    else:
        with OperatorCount() as counted:
            work_on(full)(0)
        operations, views = counted.others, counted.views
    issued = milliseconds(work_on(small), rounds)
    return {
        "recipe": recipe, "version": version, "size": size, "batch_size": batch_size, "operations": operations,
        "views": views, "draw_ms": round(statistics.median(milliseconds(draw, rounds)), 3),
        "issue_ms": round(statistics.median(issued), 3), "spread": spread(issued), "n": rounds,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("augment", __doc__)
    add = parser.add_argument
    add("--only", metavar="LIST", help=f"versions (default: {','.join(VERSIONS)})")
    add("--size", type=at_least(3), default=8, metavar="PX", help="image size (default: 8)")
    add("--batch", type=at_least(2), default=64, metavar="N", help="batch size (default: 64)")
    add("--rounds", type=at_least(1), default=7, help=f"turns of {CALLS} batches (default: 7)")
    options = parser.parse_args(argv)
    versions = names(options.only, VERSIONS) if options.only else VERSIONS
    rows = []
    torch.set_num_threads(1)
    with progress_bar(len(RECIPES) * len(versions)) as bar, torch.no_grad():
        for recipe, version in product(RECIPES, versions):
            bar.set_description_str(f"{recipe}, {version}")
            rows.append(measured(recipe, version, options.size, options.batch, options.rounds))
            bar.update()
    print(text_table(rows, COLUMNS))
    what = "the host's part of RandAugment and three-augment, for one batch"
    write_json(options.json, what, rows, drawn=DRAWN)
