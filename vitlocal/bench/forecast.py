"""Forecasts a budget: python -m vitlocal.bench forecast --config-file rcfg/ours.yaml [TRAINER'S OPTIONS]

Measures three speeds at each image size of the recipe: the training step alone, the loader alone, and both as in
training. This takes less than two minutes, plus the time for compiling. The bench then simulates the recipe's budget.
For other budgets (--budgets), each size gets the same fraction. Without a data folder, only the step is measured, with
random pixels, and an epoch has --images images (default: as many as ImageNet). With --rates (images/s, such as
32:60000,224:5000; other sizes follow by FLOPs) nothing is measured, and the forecast is for another machine.

The memory that the recipe needs on a GPU is counted from shapes, on a machine without a GPU only with --rates or
--memory. --memory 16GB says whether it fits there.

With --models, the bench makes the forecast for each of these sizes of the recipe's model, predicts its top-1 and names
the best one. The predictions come from a law that is fitted to finished runs: those of --runs (files that --json of
bench arms wrote), or published ones on ImageNet. --hold-out checks a law: it is fitted to the runs of other budgets.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import count, product
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from vitlocal.bench.choice import law_for, model_names, rank, show_choice, show_hold_out, sized
from vitlocal.bench.contestants import resident_mib
from vitlocal.bench.law import Law, draw_law, hold_out, read_runs
from vitlocal.bench.measurement import text_table, write_json
from vitlocal.bench.memory import count_memory, show_memory
from vitlocal.bench.parsing import bench_parser, byte_count, plot_file, times
from vitlocal.bench.published import IMAGENET
from vitlocal.bench.spending import Forecast, SizeSpeed
from vitlocal.config import Config, read_config
from vitlocal.data.batch import Batch, Source, Sources, full_batches
from vitlocal.data.crops import CropPolicy
from vitlocal.data.manifest import load_manifest
from vitlocal.errors import ConfigError
from vitlocal.methods import build_methods
from vitlocal.methods.method import MethodContext
from vitlocal.models.counts import activation_bytes, count_macs
from vitlocal.plan import Feed, Plan, with_size
from vitlocal.progress import TRAINING_FLOPS, Length, Stage, upcoming_changes
from vitlocal.report.figures import save
from vitlocal.report.run_folder import duration
from vitlocal.storage import methods_writing, parse_rates, recipe_stages, speeds_for
from vitlocal.train.build import build_run, device_of, make_model, sources_of
from vitlocal.train.devices import EAGER
from vitlocal.train.probes import batch_size_at
from vitlocal.train.simulate import Speed
from vitlocal.train.timing import LR, Timing, WaitMeter, fill_zeros, noise_batch, peak_memory, reset_peak
from vitlocal.train.trainer import Trainer

SECONDS = 80.0  # for all measurements; the sizes share it
SHARES = {"together": 0.5, "step": 0.3, "loader": 0.2}  # of the seconds of a size
ROUNDS, ROUND_SECONDS = 3, 8.0  # sizes take turns in at most ROUNDS rounds; a turn has at least ROUND_SECONDS
CPU_STEP_SECONDS = 1.5  # on a CPU, a smaller batch is measured if a step would take longer
MEASURED = ("evaluation_seconds", "disk_bytes", "resident_mib", "measured_seconds")  # fields of the JSON file
CPU_EVALUATED = 32  # images in a measured batch of an evaluation on a CPU
OTHER_SECONDS = 15.0  # an estimate of the time for starting, saving and the report, without compiling
COLUMNS = {
    "px": ("size", "d"), "batch": ("batch_size", "d"), "step": ("step", ",.0f"), "loader": ("loader", ",.0f"),
    "together": ("together", ",.0f"), "limit": ("bottleneck", ""), "waits": ("data_wait_fraction", ".1%"),
    "compile s": ("compile_seconds", ".1f"), "epochs": ("epochs", ".2f"), "images": ("images", ",d"),
    "time": ("time", ">"),
}  # fmt: skip


class NoData(Source):
    """Stands for data that are not there. It cannot be read."""


def plans_by_size(trainer: Trainer, stages: Sequence[Stage]) -> list[Plan]:
    """The plan with which each size of the recipe begins, also of sizes that the budget does not reach."""
    now, plans = trainer.state.clock.progress, dict[int, Plan]()
    reached = upcoming_changes([stage.until for stage in stages if stage.until is not None], now)
    for stage, at in zip(stages, (now, *reached), strict=True):
        plan = with_size(trainer.plan(at), stage.size)
        batch_size = batch_size_at(trainer.state.methods, stage.size, plan.feed.batch_size)
        plans.setdefault(stage.size, replace(plan, feed=replace(plan.feed, batch_size=batch_size)))
    return list(plans.values())


class SizeMeter:
    """Compiles the step of one plan, and takes its first turn. Timings have the names of ``SHARES``."""

    def __init__(self, trainer: Trainer, plan: Plan, seconds: float):
        self.trainer, self.plan, self.device = trainer, plan, trainer.step.device
        self.classes = len(trainer.sources.train.classes)
        self.has_data = not isinstance(trainer.sources.train, NoData)
        self.timings = {name: Timing() for name in SHARES}
        self.waits, self.waited = WaitMeter(self.device, time.perf_counter), 0.0  # seconds of "together"
        self.step_numbers = count()
        fill_zeros(trainer.step.model)
        reset_peak(self.device)
        self.compile_seconds = trainer.step.warm_up(plan.feed, self.classes)
        largest = plan.feed.batch_size
        if self.has_data:
            largest = min(largest, trainer.sources.train.rows.count(plan.feed.subset))
        self.feed, self.mode = replace(plan.feed, batch_size=largest), EAGER
        if self.device.type == "cpu" and largest > 8:  # a smaller batch if the step would take too long
            batch = self._noise(replace(plan.feed, batch_size=8))
            self._train(batch)
            rate = 8 / Timing().measure(lambda: self._train(batch), self.device, calls=2)
            self.feed = replace(plan.feed, batch_size=max(8, min(largest, int(CPU_STEP_SECONDS * rate))))
        if self.feed == plan.feed:
            self.mode = trainer.step.mode(plan.feed)  # only full batches are compiled
        self._train(self._noise(self.feed))
        self.turn(seconds)
        self.peak = peak_memory(self.device)  # in later turns, the memory of larger sizes is allocated too

    def _noise(self, feed: Feed) -> Batch:
        return noise_batch(feed, self.classes, self.device, self.trainer.step.task)

    def _train(self, batch: Batch) -> None:
        self.trainer.step(batch, next(self.step_numbers), LR, self.mode, 1.0, self.plan.dials)

    def turn(self, seconds: float) -> None:
        """Measures the step and, if there are data, the loader and both together, for about ``seconds``."""
        batch = self._noise(self.feed)
        self._measure("step", seconds, lambda: self._train(batch))
        if self.has_data:
            self._measure_data(seconds)

    def _measure(self, name: str, seconds: float, work: Callable[[], object]) -> None:
        timing = self.timings[name]
        timing.measure(work, self.device, 1 if timing.calls else 2, SHARES[name] * seconds)

    def _measure_data(self, seconds: float) -> None:
        source = self.trainer.sources.train

        def read_and_train() -> None:
            asked = self.waits.begin()
            batch = next(batches)
            self.waits.end(asked)
            self._train(batch)

        with closing(full_batches(source, self.feed)) as batches:
            self._train(next(batches))  # the loader reads ahead during this step, as it does in training
            self._measure("together", seconds, read_and_train)
            self.waited += self.waits.take()
        with closing(full_batches(source, self.feed)) as batches:
            next(batches)
            self._measure("loader", seconds, lambda: next(batches))

    def result(self) -> SizeSpeed:
        rates = {name: self.feed.batch_size * t.calls / t.seconds for name, t in self.timings.items() if t.calls}
        step, together = rates["step"], rates.get("together", rates["step"])
        size, batch_size = self.plan.feed.size, self.plan.feed.batch_size
        gflops = 1e-9 * TRAINING_FLOPS * count_macs(self.trainer.state.model, size)
        waited = self.waited / self.timings["together" if self.has_data else "step"].seconds
        mib = self.peak / 2**20 if self.device.type == "cuda" else None
        how = self.feed.batch_size, str(self.mode), waited, self.compile_seconds, mib
        return SizeSpeed(size, batch_size, together, step, gflops, rates.get("loader"), *how)


def measured_speeds(trainer: Trainer, plans: Sequence[Plan], seconds: float) -> list[SizeSpeed]:
    """The speed of each plan. If there is time, sizes take turns, so that a slow minute affects all of them."""
    share = seconds / len(plans)
    rounds = max(1, min(ROUNDS, int(share / ROUND_SECONDS)))
    meters: list[SizeMeter] = []
    turns = list(product(range(rounds), enumerate(plans)))
    for number, (place, plan) in tqdm(turns, "measuring", disable=not sys.stderr.isatty(), leave=False):
        if number == 0:
            meters.append(SizeMeter(trainer, plan, share / rounds))
        else:
            meters[place].turn(share / rounds)
    return [meter.result() for meter in meters]


def forecast(config: Config, images: int | None, part: float = 1.0) -> Forecast:
    """Makes the forecast by measuring this machine, in a ``part`` of the usual time.

    ``images``: the length of an epoch, if there are no data.
    """
    device, evaluate = device_of(config), config.evaluate
    if device.type == "cpu":
        config = replace(config, evaluate=replace(evaluate, batch_size=min(evaluate.batch_size, CPU_EVALUATED)))
    if images is None:
        sources = sources_of(config, device)
    else:
        missing = NoData(("",) * 1000, images, None, CropPolicy(random=True), device)
        sources = Sources(missing, missing)
    with closing(sources):
        trainer = build_run(config, sources, device).trainer
        start = time.perf_counter()
        speeds = measured_speeds(trainer, plans_by_size(trainer, recipe_stages(config)), part * SECONDS)
        compiling = sum(speed.compile_seconds for speed in speeds)
        took = time.perf_counter() - start - compiling
        last, length = trainer.upcoming_plans()[-1], trainer.state.clock.length  # a method may have set the length
        config = replace(config, evaluate=evaluate, budget=replace(config.budget, length=length))
        stored = images is None and config.data.loader not in ("torchvision", "dali")  # they read the original images
        other, mib = OTHER_SECONDS + compiling, resident_mib(os.getpid())
        evaluation = None
        if images is None:
            usual, final = trainer.evaluator.judging_seconds(last)
            evaluation, other = trainer.evaluator.estimate_seconds(last) + usual, other + max(0.0, final - usual)
        manifests = [load_manifest(config.data.root, split) for split in ("train", "val")] if stored else []
        files = sum(file.bytes for manifest in manifests for file in manifest.files) or None
        return Forecast(config, sources.train.count, tuple(speeds), evaluation, other, files, mib, took)


def stated_forecast(config: Config, images: int, speeds: Mapping[int, Speed]) -> Forecast:
    """The forecast for another machine, with its speed at each size (see :func:`vitlocal.storage.speeds_for`)."""
    if methods_writing(config, "budget.length"):
        raise ConfigError("--rates: a method of the recipe sets the length of the run; leave --rates or the method out")
    model, _ = make_model(config, 1000, torch.device("meta"))
    fused = config.train.kernel != "plain"
    context = MethodContext(config.recipe, images, lambda size: activation_bytes(model, size, torch.bfloat16, fused))
    methods, sizes = build_methods(context, "feed.batch_size"), []
    for size, speed in speeds.items():
        batch_size, rate = batch_size_at(methods, size, config.train.batch_size), speed.images_per_second
        sizes.append(SizeSpeed(size, batch_size, rate, rate, 1e-9 * speed.flops))
    return Forecast(config, images, tuple(sizes))


def show(found: Forecast, budgets: Sequence[Length]) -> None:
    """Prints the forecast."""
    config, end, first = found.config, found.stages[-1].end, found.first_point
    counts = "in all" if found.counts_all else "of training"
    rows = [row | {"time": duration(row["train_seconds"])} for row in found.rows()]
    print(f"{config.model.name}, {config.budget.length} {counts}, epochs of {found.images:,} images; images/s:\n")
    print(text_table(rows, COLUMNS) + "\n")
    total = f"{end.epoch:.2f} epochs, {end.images_seen:,} images, {end.flops:.3g} FLOPs"
    print(f"in all {total}, {duration(end.seconds)} of training")
    if any((speed.measured_batch or speed.batch_size) < speed.batch_size for speed in found.sizes):
        print("measured with smaller batches than the recipe's, which take too long here or need more images")
    if found.evaluation_seconds is not None:
        when = "only at the end" if first is None else f"the first after {duration(first)} of training"
        print(f"evaluation: {when}; each takes {found.evaluation_seconds:.1f} s")
    if unreached := [str(stage.size) for stage in found.stages if stage.seconds <= 0]:
        print(f"note: the budget ends before {', '.join(unreached)} px")
    if found.resident_mib is not None:
        sizes = {"files": (found.disk_bytes or 0) / 2**30, "host memory": found.resident_mib / 1024}
        sizes["device memory"] = max(speed.device_mib or 0 for speed in found.sizes) / 1024
        print(", ".join(f"{size:.1f} GiB of {name}" for name, size in sizes.items() if size))
        print(f"measured in {found.measured_seconds:.0f} s, without compiling")
    if budgets:
        show_budgets(found, budgets)
    note_shapes(config)
    if config.budget.counts == "cpu":
        print("note: the budget counts processor time; this forecast is for a run that does not share its cores")


def note_shapes(config: Config) -> None:
    """Says which methods of the recipe the forecast does not know."""
    if shaping := methods_writing(config, "shape."):
        print(f"note: {', '.join(shaping)} change the cost of an image; this forecast is for the full model throughout")


def show_budgets(found: Forecast, budgets: Sequence[Length]) -> None:
    """Prints the table of other budgets, and the option that gives each size its fraction of them."""
    sizes = dict.fromkeys(stage.size for stage in found.fractions)
    columns = {"budget": ("budget", ">"), "epochs": ("epochs", ".2f")} | {f"{s} px": (str(s), ".2f") for s in sizes}
    rows = found.within(budgets)
    cells = [row | {str(size): epochs for size, epochs in (row["epochs_by_size"] or {}).items()} for row in rows]
    print("\nepochs of the same curriculum in other budgets, with the same fraction for each size:\n")
    print(text_table(cells, columns))
    if short := [row["budget"] for row in rows if row["epochs"] is None]:
        print(f"note: {', '.join(short)} is spent on starting, evaluating and saving")
    if len(found.fractions) > 1 and "image_size" in found.config.methods:
        print(f'  --image_size.stages="{", ".join(map(str, found.fractions))}"')


def of_models(config: Config, names: Sequence[str], images: int | None, rates: str | None) -> list[dict[str, Any]]:
    """A row for each size of the recipe's model: multiply-adds, images/s by size, and the epochs in the budget.

    ``rates`` are those of the recipe's own model, and give the other models' by FLOPs. As for sizes that are not
    stated, a rate is at most that of a smaller stated size.
    """
    rows, configs = [], {name: sized(config, name) for name in names}
    stated = parse_rates(rates)
    own = speeds_for(config, stated) if stated else {}
    for name, other in configs.items():
        model, _ = make_model(other, 1000, torch.device("meta"))
        if stated and images is not None:
            speeds: dict[int, Speed] = {}
            for size, speed in own.items():
                flops = float(TRAINING_FLOPS * count_macs(model, size))
                limits = [rate for smaller, rate in stated.items() if smaller < size]
                rate = min([speed.images_per_second * speed.flops / flops, *limits])
                speeds[size] = replace(speed, images_per_second=rate, flops=flops)
            found = stated_forecast(other, images, speeds)
        else:
            found = forecast(other, images, 1 / len(names))
        last = recipe_stages(config)[-1].size
        rows.append({
            "model": name, "gmacs": 1e-9 * count_macs(model, config.model.size),
            "rates": {speed.size: speed.together for speed in found.sizes}, "epochs": found.stages[-1].end.epoch,
            "last_size": last, "images": found.images,
            "epochs_at_last_size": found.spending([Stage(last)], config.budget.length)[-1].end.epoch,
        })  # fmt: skip
    return rows


def choose(config: Config, names: Sequence[str], images: int | None, options: argparse.Namespace) -> None:
    """Predicts the top-1 of each model in the budget, and names the best one."""
    count = load_manifest(config.data.root, "train").count if images is None else images
    law = law_for(count, options.runs)  # before measuring, because the runs may be too few
    if options.rates:
        images = count
    ranked = rank(of_models(config, names, images, options.rates), law, config)
    show_choice(ranked, law, config)
    note_shapes(config)
    write_json(
        options.json, "the predicted top-1 of models in a budget, by a law that is fitted to runs", ranked,
        budget=str(config.budget.length), images=count, **law_fields(law), recipe=config.flat(),
    )  # fmt: skip
    if options.plot:
        save(draw_law(law), options.plot)


def law_fields(law: Law) -> dict[str, Any]:
    """The law in a JSON file."""
    return {
        "coefficients": law.coefficients, "centre": law.centre, "runs": len(law.runs), "rms_error": law.rms,
        "leave_one_out_error": law.left_out_rms,
    }  # fmt: skip


def check_law(names: Sequence[str], options: argparse.Namespace) -> None:
    """Fits the law without the budgets of --hold-out, and prints how well it predicts their runs."""
    if not options.runs:
        raise ConfigError("--hold-out: it needs the runs of --runs")
    law, rows = hold_out(read_runs(options.runs), options.hold_out, names)
    show_hold_out(law, rows)
    write_json(options.json, "held-out runs, predicted by a law that is fitted to the others", rows, **law_fields(law))
    if options.plot:
        save(draw_law(law, rows), options.plot)


def main(argv: Sequence[str]) -> None:
    parser = bench_parser("forecast", __doc__)
    add = parser.add_argument
    add("--budgets", type=times, metavar="LIST", help="other budgets, or none (default: 1h,6h,24h)")
    add("--images", type=int, metavar="N", help="forecast without data, for epochs of N images")
    add("--memory", type=byte_count, metavar="SIZE", help="a GPU's memory, such as 16GB: does the recipe fit?")
    add("--rates", metavar="LIST", help="images/s by size, instead of measuring: 224:5000")
    add("--models", type=model_names, metavar="LIST", help="sizes of the model to choose from: Ti,S,B or 64x6,128x6")
    add("--runs", nargs="+", metavar="FILE", help="runs for the law of --models (default: published ones on ImageNet)")
    add("--hold-out", type=times, metavar="LIST", help="check the law on the runs of these budgets: 3m,8m")
    add("--plot", type=plot_file, metavar="FILE", help="plot predicted against measured top-1")
    options, trainer = parser.parse_known_args(argv)
    config, images = read_config(trainer), options.images
    for name, needs in (("--runs", options.runs), ("--plot", options.plot)):
        if needs and not (options.models or options.hold_out):
            raise ConfigError(f"{name}: it is for --models and --hold-out")
    for name, value in (("--memory", options.memory), ("--budgets", options.budgets)):
        if value is not None and (options.models or options.hold_out):
            raise ConfigError(f"{name}: it is for the forecast of one recipe; leave it or --models, --hold-out out")
    budgets = times("1h,6h,24h") if options.budgets is None else options.budgets
    if options.hold_out:
        return check_law(options.models or [], options)
    if images is not None and images < config.train.batch_size:
        raise ConfigError(f"--images: got {images}, expected at least {config.train.batch_size}, one batch")
    if images is None and not any(Path(config.data.root).glob("*.beton")):
        images = IMAGENET
        what = "" if options.rates else "only the step is measured, with random pixels, "
        print(f"{config.data.root} has no data: {what}for epochs of {images:,} images")
    if options.models:
        return choose(config, options.models, images, options)
    if options.rates:
        count = load_manifest(config.data.root, "train").count if images is None else images
        found = stated_forecast(config, count, speeds_for(config, parse_rates(options.rates)))
    else:
        found = forecast(config, images)
    show(found, budgets)
    memory = []
    if options.memory or options.rates or device_of(config).type != "cpu":  # measured on a CPU: no GPU is meant
        memory = count_memory(config, found.images)
        show_memory(config, found.images, memory, options.memory)
    what = "what a budget is forecast to buy: measured images/s by size, and the simulated budget"
    last = found.stages[-1].end
    write_json(
        options.json, what, found.rows(), budget=str(config.budget.length), counts=config.budget.counts,
        images=found.images, epochs=last.epoch, flops=last.flops, first_point_seconds=found.first_point,
        **{name: getattr(found, name) for name in MEASURED},
        memory=[size.row() for size in memory],
        curriculum=[str(stage) for stage in found.fractions], budgets=found.within(budgets),
        recipe=config.flat(),
    )  # fmt: skip
