"""A run: model, sources, methods, optimizer and clock, built from a configuration, in a folder that it can resume."""

from __future__ import annotations

import gc
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import nn

from vitlocal.config import Config
from vitlocal.data.batch import Batch, Sources, open_sources
from vitlocal.errors import ConfigError, DataError, Interrupted
from vitlocal.machine import keep_objects
from vitlocal.methods import MethodContext, build_methods
from vitlocal.methods.method import Method, ProbeResult, StepResult
from vitlocal.models.factory import build_model, export_model, load_weights, patch_side
from vitlocal.models.flops import count_macs
from vitlocal.models.local_mix import fuses
from vitlocal.models.memory import activation_bytes
from vitlocal.models.shape import add_stage_table, grow, in_shape, parts_of
from vitlocal.plan import WHOLE_MODEL, Feed, Plan, Shape, fold
from vitlocal.progress import TRAINING_FLOPS, Position, Progress, upcoming_changes
from vitlocal.report.run_folder import write_classes
from vitlocal.train.checkpoint import keep_weights, load_checkpoint, save_checkpoint
from vitlocal.train.checks import check_clock, check_peers, check_plans, check_sizes
from vitlocal.train.clock import Clock
from vitlocal.train.devices import prepare_device
from vitlocal.train.distributed import ALONE, Ranks, connected, find_ranks
from vitlocal.train.ema import ModelEma, build_ema
from vitlocal.train.evaluate import Accuracy, evaluate
from vitlocal.train.folder import CHECKPOINT, JOURNAL, claimed, data_of, header, note_origin, resumes_from, spent_in
from vitlocal.train.journal import Journal, Loading
from vitlocal.train.log import Log
from vitlocal.train.optim import Schedule, build_optimizer, moments_of
from vitlocal.train.probes import answer, in_place
from vitlocal.train.room import LEAVING_SECONDS, Room, leaving_seconds, rehearse
from vitlocal.train.searches import Searches
from vitlocal.train.step import EAGER, RUN_AHEAD, Step, choose_precision
from vitlocal.train.watch import Watch, wait


@dataclass
class PassMeter:
    """Sums over the pass that is running; saved with the run, so that a pass that was cut in two logs as one."""

    loss: float = 0.0  # summed over images
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0  # for the source
    macs: int = 0  # of forward passes, images and all


class Run:
    """Everything that training needs. Built by :func:`open_run`, driven by :func:`vitlocal.train.loop.fit`."""

    def __init__(
        self, config: Config, folder: Path, sources: Sources, device: torch.device, ranks: Ranks = ALONE,
        began: float | None = None, leaving: float = LEAVING_SECONDS,
    ):  # fmt: skip
        self.folder, self.sources, self.device, self.ranks = folder, sources, device, ranks
        self.config = config
        torch.manual_seed(config.run.seed)  # the weights' start
        model, self.model_arguments = build_model(config.model, len(sources.train.classes))
        check_sizes(config, model)
        self.started_anew: list[str] = []
        if config.model.weights and not (folder / CHECKPOINT).exists():
            self.started_anew = load_weights(model, config.model.weights, sources.train.classes)
        self.model: nn.Module = model.to(device, memory_format=torch.channels_last).train()
        self._macs: dict[tuple[int, Shape], int] = {}
        self.methods = build_methods(
            MethodContext(
                config, sources.train.count, self._image_bytes, self.macs, parts_of(self.model),
                len(getattr(self.model, "blocks", ())), ranks.world,
            )
        )  # fmt: skip
        for method in self.methods:
            if method.stage_embedding is not None:
                add_stage_table(self.model, method.stage_embedding)
        self.config_warnings = [doubt for method in self.methods for doubt in method.config_warnings(config)]
        self.config = config = settled(config, self.methods)
        self.optimizer = build_optimizer(self.model, config.train, choose_precision(config.train.precision, device))
        self.average = build_ema(self.model, config.train)
        self.schedule = Schedule(config.train)
        self.copies = [ModelEma(self.model, decay) for method in self.methods for decay in method.ema_decays]
        self.clock = Clock(config.budget, sources.train.count, began=began)
        taps = frozenset().union(*(method.step_outputs for method in self.methods))
        self.step = Step(self.model, self.optimizer, self.average, config, device, ranks, taps, self.copies)
        self.grown = 0  # the number of the last growth done
        self.born = self.plan().shape  # the shape that has weights: the first, or that of the last growth
        self.probing = 0.0  # seconds spent on what methods wanted to know
        self.follow_rows()
        check_plans(self)
        self.log = Log(folder, config.budget.length, config.run.progress, ranks.first)
        self.searches = Searches(folder, config.run.replay, ranks.first)
        self.watch: Watch[tuple[Progress, float, int, float]] = Watch(device)  # on the loss
        self.meter = PassMeter()
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self.pass_began = 0.0  # training seconds at the pass's start, in this process
        self.logged_plan: Plan | None = None  # the plan of the last logged pass
        self.unclosed: Plan | None = None  # the plan of a pass that is trained and not yet evaluated and logged
        self.evaluated_epoch = 0.0
        self.evaluated_step = -1
        self.saved_at, self.saved = self.clock.progress, False  # when, and whether there is a checkpoint at all
        self.interrupted: signal.Signals | None = None
        self._signal: signal.Signals | None = None  # this process's, which all obey once rank 0 has told them
        self.warmed: set[tuple[Feed, Shape, int]] = set()
        self.room = Room()
        self.leaving = leaving  # seconds that the process will take to end
        self.running: Plan | None = None  # the plan of the pass that is open
        self.agree()

    # --- plans ---

    def plan(self, at: Progress | None = None) -> Plan:
        """What to do at ``at``; without it, now."""
        start = Plan(Feed(self.config.model.size, self.config.train.batch_size))
        return fold(self.methods, start, self.clock.progress if at is None else at)

    @property
    def unevaluated(self) -> bool:
        """Whether the budget is spent and the weights that it bought are not evaluated."""
        return self.clock.spent and self.evaluated_step != self.clock.step

    @property
    def finished(self) -> bool:
        """Whether the budget is spent, and what it bought is evaluated and logged."""
        return self.clock.spent and not self.unevaluated and self.unclosed is None

    @property
    def over(self) -> bool:
        return self.clock.spent or self.interrupted is not None

    def plans_ahead(self) -> list[Plan]:
        """What the run will do from now on, as far as its methods know, in order; each feed and shape once."""
        now, length = self.clock.progress, self.config.budget.length
        later = [
            point
            for method in self.methods
            for point in upcoming_changes(method.changes(), now)
            if length.fraction_done(point) < 1
        ]
        plans = [self.plan(point) for point in (now, *later)]
        return list({(plan.feed, plan.shape): plan for plan in plans}.values())

    def batch_size_at(self, size: int) -> int:
        """Images of a batch at ``size`` px."""
        stated = (method.batch_size_at(size) for method in self.methods)
        return next((batch for batch in stated if batch is not None), self.plan().feed.batch_size)

    def evaluated_shape(self, plan: Plan | None = None) -> Shape:
        """The shape in which weights that were trained under ``plan`` are evaluated; without it, the weights now."""
        shape = (plan or self.running or self.logged_plan or self.plan()).shape
        shape = replace(shape, input_size=None, skipped_blocks=())
        for method in self.methods:
            shape = method.evaluation_shape(shape)
        return shape

    def macs(self, size: int, shape: Shape = WHOLE_MODEL) -> int:
        """Multiply-adds of one image of ``size`` px, forward, in ``shape``."""
        if (size, shape) not in self._macs:
            with in_shape(self.model, shape, self.step.shape if hasattr(self, "step") else WHOLE_MODEL):
                self._macs[size, shape] = count_macs(self.model, shape.input_size or size)
        return self._macs[size, shape]

    def follow_rows(self, plan: Plan | None = None) -> None:
        """An epoch is a pass over the rows that the plan feeds: tells the source and the clock which and how many."""
        subset, rows = (plan or self.plan()).feed.subset, self.sources.train.rows
        if subset:
            method = next(method for method in self.methods if "feed.subset" in method.writes)
            rows.keep(subset, method.rows(subset))
        self.clock.images_per_epoch = rows.count(subset)

    def _image_bytes(self, size: int) -> int:
        side = size // patch_side(self.model)
        fused = self.config.train.kernel != "plain" and fuses(self.device, (side, side))
        return activation_bytes(self.model, size, self.step.precision, fused)

    def agree(self, plan: Plan | None = None) -> None:
        """Rank 0 tells all ranks the budget's time and whether to stop; on the way, plans are found to be the same."""
        if self.ranks.world == 1:
            self.interrupted = self._signal
            return
        mark = zlib.crc32(repr((plan, self.clock.step, self.clock.position)).encode())
        mine = [self.clock.seconds, self.clock.pace, float(self._signal or 0), float(mark)]
        seconds, pace, stop, theirs = self.ranks.decided(mine)
        if mark != theirs:
            raise RuntimeError(f"rank {self.ranks.rank} has gone apart from rank 0: {plan} at step {self.clock.step}")
        self.clock.agreed = seconds, pace
        self.interrupted = signal.Signals(int(stop)) if stop else None

    # --- training ---

    def warm_up(self) -> None:
        """Has the source make ready (start workers), and the step compile, before the clock runs."""
        feed = self.plan().feed
        with self.sources.train.open(Feed(feed.size, min(feed.batch_size, 64)), Position()) as batches:
            next(iter(batches))
        for plan in self.plans_ahead() if self.config.train.warm == "start" else ():
            self.warm(plan)
        if self.clock.counts_all:
            rehearse(self)
        self.agree()  # making ready took time
        self.clock.begin()

    def keep_room(self) -> None:
        """Where everything counts, keeps room for what follows training, as it is known by now."""
        if self.clock.counts_all:
            self.room = self.ranks.broadcast(self.room)  # rank 0's: all must decide alike what there is room for
            self.clock.room = self.room.whole

    def warm(self, plan: Plan) -> None:
        """Compiles the step for full batches under ``plan``, once."""
        feed = plan.feed
        self.step.put(plan.shape)
        key = (feed, plan.shape, self.step.wrapped)
        if key in self.warmed:
            return
        self.warmed.add(key)
        seconds = self.step.warm(feed, len(self.sources.train.classes))
        if seconds:
            keep_objects()  # compiling makes many
            self.log.say(f"{feed.size} px, batch {feed.batch_size}: {self.step.mode(feed)} in {seconds:.1f} s")

    def begin_pass(self, plan: Plan) -> None:
        self.running = plan
        self.follow_rows(plan)
        with self.clock.paused():  # not training time, as evaluation is not
            for method in self.methods:
                for variant in method.variants(plan, self.clock.progress):
                    self.warm(variant)
            self.warm(plan)
        self.agree()  # compiling may have taken time
        self.clock.start()
        self.start_meter()

    def start_meter(self) -> None:
        """The pass's meter goes on from what it holds, at the present time."""
        self.pass_began = self.clock.train_seconds - self.meter.seconds
        self.loss_sum.fill_(self.meter.loss if self.ranks.first else 0.0)  # each process sums up its own from here

    def waited_for(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches, with the time spent waiting for each on the pass's meter."""
        while True:
            before = self.clock.watch()
            batch = next(batches, None)
            self.meter.waited += self.clock.watch() - before
            if batch is None:
                return
            yield batch

    def train_on(self, batch: Batch, plan: Plan) -> None:
        """One step, its effect on clock, meter and methods, and about once a second a look at the loss."""
        self._grow(plan)
        self.step.put(plan.shape)
        if self.step.compiles and (plan.feed, plan.shape, self.step.wrapped) not in self.warmed:
            with self.clock.paused():
                self.warm(plan)
        self.running = plan
        macs = batch.total * self.macs(plan.feed.size, plan.shape)
        now, ahead = self.clock.progress, self.clock.ahead(batch.total, TRAINING_FLOPS * macs)
        lr = self.schedule(ahead) * plan.dials.lr_scale
        decay = None if self.average is None else self.average.decay_between(now, ahead)
        mode = self.step.mode(plan.feed) if batch.total == plan.feed.batch_size else EAGER
        outcome = self.step(batch, now.step, lr, mode, decay, plan.dials)
        loss = outcome.loss
        self.loss_sum += loss.double() * batch.total
        self.meter.images += batch.total
        self.meter.macs += macs
        seen = StepResult(loss, batch.ids, plan, now, outcome.hits, outcome.spread)
        for method in self.methods:
            method.observe(seen)
        self.clock.tick(batch.total, TRAINING_FLOPS * macs)
        if self.clock.nearly_spent(RUN_AHEAD + 2):
            wait(self.device)  # device sync, at the last steps: none may be under way when the time is up
        self.agree(plan)
        if (shown := self.watch.seen()) is not None:
            value, noted = shown
            self.log.show(noted[0], self._finite(value), *noted[1:])
        if self.log.due() and not self.watch.looking:
            self.log.wait()
            rate = self.meter.images / max(self.clock.train_seconds - self.pass_began, 1e-9)
            # Of several processes' losses, the first's stands for all.
            self.watch.look(loss * self.ranks.world, (self.clock.progress, lr, plan.feed.size, rate))

    def _grow(self, plan: Plan) -> None:
        if plan.growth.number == self.grown:
            return
        before, self.grown, self.born = self.born, plan.growth.number, plan.shape
        copies = [average.model for average in (*self.copies, *([self.average] if self.average is not None else []))]
        grow(self.model, before, plan.shape, plan.growth, moments_of(self.optimizer), copies, self.config.run.seed)

    @property
    def asks(self) -> bool:
        """Whether a method must know something before it can plan on."""
        return any(method.probes(self.clock.progress) for method in self.methods)

    def inquire(self) -> None:
        """Finds out what methods must know, on the budget's time; what was found out is kept when interrupted."""
        if not self.asks or self.over:
            return
        self.clock.start()
        for method in self.methods:
            while not self.over and (wanted := method.probes(self.clock.progress)):
                for probe in wanted:
                    at, began, before = self.clock.progress, self.clock.train_seconds, len(method.choices())
                    placed = in_place(self, probe)
                    value = answer(self, placed)
                    method.observe(ProbeResult(probe, value))
                    self.searches.record(at, method.name, placed, value, method.choices()[before:])
                    spent = self.clock.train_seconds - began
                    self.probing += spent
                    self.pass_began += spent  # no part of the pass that is open
                    self.follow_rows()  # where the answer made a new subset
                    self.agree()
                    if self.over:
                        break
                    if self.save_due:
                        self.save()
        self.clock.stop()  # the next step's pace is not told by this
        self.clock.start()

    def _finite(self, value: float) -> float:
        if value - value != 0:  # inf and nan
            raise DataError(
                f"the loss is {value} at step {self.clock.step}: training has diverged. Lower train.lr, lengthen "
                f"train.warmup or set train.clip_norm=1; {self.folder} keeps the last checkpoint before it"
            )
        return value

    def _read_meter(self) -> None:
        """Brings the meter up to date; waits for the device."""
        self.meter.loss = self._finite(float(self.ranks.total(self.loss_sum)))
        self.loss_sum.fill_(self.meter.loss if self.ranks.first else 0.0)
        self.meter.seconds = self.clock.train_seconds - self.pass_began

    @property
    def save_due(self) -> bool:
        """Whether it is time for a checkpoint, and the budget has room for it."""
        now, before = self.clock.progress, self.saved_at
        due = any(
            every.elapsed(now) - every.elapsed(before) >= every.value - 1e-9 for every in self.config.run.save_every
        )
        return due and self.clock.has_room_for(self.room.saving, self.plan().feed.batch_size)

    def ended(self, plan: Plan) -> bool:
        """Whether the pass under ``plan`` is over: by budget, epoch or another feed or shape, and not by a signal."""
        return self.clock.spent or self.clock.position.images == 0 or self.plan().pass_key != plan.pass_key

    def end_pass(self, plan: Plan) -> None:
        """Evaluates if it is time, writes the pass's line, saves. The budget's training clock stands meanwhile.

        Interrupted while it evaluates, it saves the pass as unclosed, for the next process to close.
        """
        self._read_meter()
        self.unclosed = plan
        last = self.clock.spent
        for model in (self.model, *([self.average.model] if self.average is not None else [])):
            self.ranks.share_buffers(model.buffers())
        with self.clock.paused():
            at = self.clock.progress
            every = self.config.evaluate.every
            accuracy = None
            due = every and at.epoch - self.evaluated_epoch >= every - 1e-9
            # One that would leave no step after it is left to the end: the last step has the schedule's last rate.
            if last or (due and self.clock.has_room_for(self.room.between, plan.feed.batch_size)):
                if last:
                    self.save()  # killed from here on, it has but this evaluation left to do
                began = perf_counter()
                accuracy = self.evaluate()
                if accuracy is None:
                    self.save()
                    return
                self.room.evaluated(perf_counter() - began)
                if not last:
                    self.keep_room()
                self.evaluated_epoch, self.evaluated_step = at.epoch, at.step
                if self.ranks.first:
                    if self.config.run.keep_weights:
                        model = self.model if self.average is None else self.average.model
                        keep_weights(self.folder, model.state_dict(), at.step, at.epoch, self.evaluated_shape())
                    write_classes(self.folder, self.sources.train.classes, accuracy.by_class)
            self.log.record(self._record(plan, accuracy))
            self.logged_plan, self.unclosed, self.running, self.meter = plan, None, None, PassMeter()
            if last or not self.saved or self.clock.has_room_for(self.room.saving, plan.feed.batch_size):
                self.save()
        self.agree()

    def evaluate(self) -> Accuracy | None:
        """Accuracy at ``evaluate.size``, of the averaged weights where there are some; None when interrupted."""

        def stop() -> bool:
            self.agree()
            return self.interrupted is not None

        return self.accuracy(stop)

    def accuracy(
        self, stop: Callable[[], bool] = lambda: False, limit: int | None = None, plan: Plan | None = None
    ) -> Accuracy | None:
        """As :meth:`evaluate`, of the first ``limit`` batches alone, or as if ``plan`` had been trained last.

        None where ``stop``, asked before each batch, said so.
        """
        config = self.config.evaluate
        model = self.model if self.average is None else self.average.model
        feed = Feed(config.size, config.batch_size)
        with in_shape(model, self.evaluated_shape(plan), self.step.shape):
            return evaluate(model, self.sources.val, feed, self.step, stop, config.part, limit)

    def _record(self, plan: Plan, accuracy: Accuracy | None) -> dict[str, Any]:
        at, meter = self.clock.progress, self.meter
        return {
            "epoch": round(at.epoch, 9),  # less than an image of a billion
            "step": at.step,
            "images_seen": at.images_seen,
            "image_size": plan.feed.size,
            **({"grid": plan.shape.grid} if plan.shape.grid is not None else {}),
            "batch_size": plan.feed.batch_size,
            "processes": self.ranks.world,
            "loss": meter.loss / meter.images if meter.images else None,  # evaluated without a further step
            "top1": None if accuracy is None else round(accuracy.top1, 4),
            "top5": None if accuracy is None else round(accuracy.top5, 4),
            "fraction": round(at.fraction, 9),
            "flops": at.flops,
            "lr": self.optimizer.param_groups[0]["lr"],
            "train_seconds": round(self.clock.train_seconds, 3),
            "wall_seconds": round(self.clock.wall_seconds, 3),
            "images_per_second": round(meter.images / max(meter.seconds, 1e-9), 2),
            "data_wait_fraction": round(min(1.0, meter.waited / max(meter.seconds, 1e-9)), 5),
            "step_mode": str(self.step.mode(plan.feed)),
            "macs_per_image": round(meter.macs / meter.images) if meter.images else None,
            **({"probe_seconds": round(self.probing, 3)} if self.probing else {}),
            **({"damaged_images": damaged} if (damaged := self._damaged()) else {}),
            **plan.changed(self.logged_plan),
        }

    def _damaged(self) -> int:
        """Images that were left out so far, by all processes."""
        return int(self.ranks.total(torch.tensor(len(self.sources.train.damaged), device=self.device)))

    # --- state ---

    def save(self) -> None:
        """Writes the checkpoint that a run killed from now on goes on from."""
        if self.meter.images:
            self._read_meter()
        state = self.state()
        with self.clock.paused():
            began = perf_counter()
            if self.ranks.first:
                save_checkpoint(self.folder / CHECKPOINT, state)
            self.ranks.wait()
            self.room.saved(perf_counter() - began)
            if not self.clock.spent:  # and stays so, whatever this one took
                self.keep_room()
        self.agree()  # where everything counts, this has taken time
        self.saved_at, self.saved = self.clock.progress, True

    def state(self, shared: bool = True) -> dict[str, Any]:
        """What a checkpoint holds; with ``shared``, what each process has noted is put together, by all of them."""
        notes = {method.name: method.local_state() for method in self.methods}
        if shared:
            notes = {
                name: {key: self.ranks.total(value.to(self.device, copy=True)).cpu() for key, value in each.items()}
                for name, each in notes.items()
            }
        return {
            "data": {"count": self.sources.train.count, "classes": list(self.sources.train.classes)},
            "model": self.model.state_dict(),
            "average": self.average and self.average.model.state_dict(),
            "copies": [average.model.state_dict() for average in self.copies],
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.step.scaler.state_dict(),
            "clock": self.clock.state_dict(),
            "meter": vars(self.meter),
            "methods": {method.name: method.state_dict() for method in self.methods},
            "notes": notes,
            "logged_plan": self.logged_plan and self.logged_plan.state_dict(),
            "unclosed": self.unclosed and self.unclosed.state_dict(),
            "evaluated_epoch": self.evaluated_epoch,
            "evaluated_step": self.evaluated_step,
            "grown": self.grown,
            "born": asdict(self.born),
            "probing": self.probing,
            "running": self.running and self.running.state_dict(),
            "room": asdict(self.room),
            "searches": self.searches.state_dict(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on from what :meth:`save` wrote; ConfigError where the training data are not the same any more."""
        before, now = state["data"], self.sources.train
        if (before["count"], tuple(before["classes"])) != (now.count, now.classes):
            raise ConfigError(
                f"data.root: {self.config.data.root} has {now.count} training images of {len(now.classes)} classes, "
                f"and the run in {self.folder} was started on {before['count']} of {len(before['classes'])}, perhaps "
                "of other names. Point data.root to those, or use another --run.folder"
            )
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.average.model.load_state_dict(state["average"])
        for average, weights in zip(self.copies, state["copies"], strict=True):
            average.model.load_state_dict(weights)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step.scaler.load_state_dict(state["scaler"])
        self.clock.load_state_dict(state["clock"])
        self.meter = PassMeter(**state["meter"])
        for method in self.methods:
            method.load_state_dict(state["methods"][method.name])
            if self.ranks.first and (notes := state["notes"].get(method.name)):
                method.load_local_state(notes)
        self.grown, self.born, self.probing = state["grown"], Shape.from_state(state["born"]), state["probing"]
        self.follow_rows()
        self.logged_plan = state["logged_plan"] and Plan.from_state(state["logged_plan"])
        self.unclosed = state["unclosed"] and Plan.from_state(state["unclosed"])
        self.evaluated_epoch, self.evaluated_step = state["evaluated_epoch"], state["evaluated_step"]
        self.running = state["running"] and Plan.from_state(state["running"])
        self.room = Room(**state["room"])
        self.searches.load_state_dict(state["searches"])
        self.saved = True
        self.agree()
        self.saved_at = self.clock.progress

    def export(self, folder: Path | None = None) -> None:
        """The weights that were evaluated, as files that timm loads, to the run's folder or to ``folder``."""
        model = self.model if self.average is None else self.average.model
        shape = self.evaluated_shape()
        with in_shape(model, shape, self.step.shape):
            export_model(folder or self.folder, model, self.config.model, self.model_arguments,
                         self.sources.train.classes, self.config.evaluate, shape)  # fmt: skip

    @contextmanager
    def stopping_on_signals(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM lets the step end and saves; a second one is obeyed at once."""

        def note(number: int, frame: object) -> None:
            if self._signal is not None:
                raise Interrupted(number)
            self._signal = signal.Signals(number)
            if self.ranks.world == 1:
                self.interrupted = self._signal
            if not self.ranks.first:
                return
            print("\nstopping: the step is finished and all is saved; once more to leave at once", file=sys.stderr)

        before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


# --- opening ----------------------------------------------------------------------------------------------


def settled(config: Config, methods: Sequence[Method]) -> Config:
    """``config`` with the budget that a method reckoned, where one does."""
    for method in methods:
        if method.budget_length is not None:
            config = replace(config, budget=replace(config.budget, length=method.budget_length))
    return config


def loading(
    folder: Path, config: Config, spent: tuple[float, float] | None, began: float | None, leaving: float
) -> AbstractContextManager:
    """The journal of a run that is still being loaded goes on from what it had spent; a new run, and every process but
    the first, has none."""
    if spent is None or not any(spent):
        return nullcontext()
    clock = Loading(*spent, time.monotonic() if began is None else began)
    return Journal(folder / JOURNAL, clock, config.budget.length, leaving)


@contextmanager
def open_run(config: Config, began: float | None = None) -> Iterator[Run]:
    """Builds the run, or goes on with the one that its folder holds (``run.resume``).

    Everything is checked before the folder is made: a wrong configuration leaves nothing behind. Of several processes
    the first alone reads and writes the folder. ``began`` is when the command did, by ``time.monotonic``: from there
    on a budget that counts everything counts.
    """
    leaving = leaving_seconds(began)
    ranks = find_ranks()
    folder = Path(config.run.folder)
    if ranks.first:
        resumes_from(folder, config)  # a wrong folder is told at once
    device = prepare_device(config, ranks)
    check_clock(config, device, ranks)
    with connected(ranks, device):
        check_peers(config, ranks)
        sources = open_sources(config, device, ranks.share, ranks.local_world_size)
        try:
            with claimed(folder) if ranks.first else nullcontext():
                # Asked again: until the folder was this process's own, another one may have trained in it.
                resumes = ranks.first and resumes_from(folder, config)
                spent = spent_in(folder, config) if ranks.first else None
                with loading(folder, config, spent, began, leaving):
                    run = Run(config, folder, sources, device, ranks, began, leaving)
                    state = ranks.broadcast(load_checkpoint(folder / CHECKPOINT) if resumes else None)
                    spent = ranks.broadcast(spent)
                    if state is not None:
                        run.load(state)
                    run.clock.spent_before(*spent)
                    run.start_meter()
                    run.agree()
                if state is None and ranks.first:
                    (folder / "config.yaml").write_text(header() + config.yaml(), encoding="utf-8")
                if ranks.first and not run.clock.spent:
                    note_origin(folder, data_of(sources.train.count, sources.train.classes))
                # The line of a pass that is not closed yet will be written again.
                run.log.begin(run.clock.step - (run.unclosed is not None and run.meter.images > 0))
                run.searches.begin()
                journal = Journal(folder / JOURNAL, run.clock, config.budget.length, leaving)
                with journal if ranks.first else nullcontext():
                    try:
                        yield run
                    finally:
                        run.log.close()
                        if run.interrupted:  # the next process goes on from this one's end
                            run.clock.pass_over(run.leaving)
        finally:
            sources.close()
            gc.unfreeze()
