"""Executes plans: opens passes, takes steps, runs probes, closes passes with an evaluation, a record and a save."""

import math
import signal
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch

from vitlocal.data.batch import Batch, Sources
from vitlocal.errors import ConfigError, DataError, Diverged, StopSignals
from vitlocal.machine import freeze_objects
from vitlocal.methods.method import Method, Probe, StepResult
from vitlocal.models.shape import grow
from vitlocal.plan import Feed, Plan, Shape, fold
from vitlocal.progress import TRAINING_FLOPS, Length, Position, Progress, upcoming_changes
from vitlocal.schedule import LRSchedule
from vitlocal.tasks.task import Scores
from vitlocal.train.budget import STOP
from vitlocal.train.devices import EAGER, compile_cache, synchronize
from vitlocal.train.evaluator import Evaluator
from vitlocal.train.optim import optimizer_state
from vitlocal.train.output import RunOutput
from vitlocal.train.probes import MacCount, Prober
from vitlocal.train.state import (
    PassMeter,
    PassTotals,
    TrainState,
    check_finite,
    check_loss,
    damaged_rows,
    diverged,
    pass_record,
    trained_plan,
)
from vitlocal.train.step import RUN_AHEAD, TrainStep

START_IMAGES = 64  # of the batch that starts the loader's workers


class Trainer:
    """Trains a state by the plans of its methods. :func:`vitlocal.train.loop.fit` is the loop.

    - ``feed``: what a run without methods feeds. ``schedule``: the learning rate.
    - ``evaluate_every``: epochs between evaluations; 0: only at the end. ``save_every``: lengths between checkpoints.
    - ``compile_early``: compile all sizes before the first step, not each one when it begins.
    - ``output``: writes the run's folder; None: nothing is written (a rank other than 0, or a benchmark).
    """

    def __init__(
        self,
        state: TrainState,
        step: TrainStep,
        sources: Sources,
        feed: Feed,
        schedule: LRSchedule,
        evaluator: Evaluator,
        macs: MacCount,
        *,
        evaluate_every: float = 1.0,
        save_every: Sequence[Length] = (),
        compile_early: bool = True,
        output: RunOutput | None = None,
    ):
        self.state, self.step, self.sources, self.evaluator = state, step, sources, evaluator
        self.signals = StopSignals(prints=step.ranks.first)
        self.stop_signal: signal.Signals | None = None  # the same on all ranks
        self._feed, self._schedule, self._macs = feed, schedule, macs
        self._evaluate_every, self._save_every, self._compile_early = evaluate_every, save_every, compile_early
        self._output, self._ranks = output, step.ranks
        self._compiled: set[tuple[Feed, Shape, int]] = set()
        self._meter = PassMeter(state, step.device, step.ranks)
        self._prober = Prober(state, step, sources, macs, self.compile_for)
        # The progress, loss, learning rate, image size and images/s that are shown next.
        self._shown: tuple[Progress, torch.Tensor, float, int, float] | None = None
        self._set_epoch_rows(self.plan())
        state.initialized_shape = self.plan().shape
        self._now = self.state.clock.progress  # at the end of the last step, or the start of the pass
        self._saved: Progress | None = None  # at the last checkpoint
        self._changed = False  # whether the state has changed since then
        self._diverged: Diverged | None = None  # what rank 0 saw, until all ranks know it

    def load(self, content: Mapping[str, Any]) -> None:
        """Continues from the content of a checkpoint."""
        self.state.load_state_dict(content, self._ranks.first)
        self.sources.train.damaged = set(self.state.facts.damaged_rows)
        self._set_epoch_rows(self.plan())
        self._meter.load()
        self.sync_ranks()
        self._now = self._saved = self.state.clock.progress

    # --- plans ---

    def plan(self, progress: Progress | None = None) -> Plan:
        """The plan for ``progress``; by default, for now."""
        return fold(self.state.methods, Plan(self._feed), progress or self.state.clock.progress)

    def upcoming_plans(self) -> list[Plan]:
        """The known plans from now on, in order, one for each feed and shape."""
        clock = self.state.clock
        now = clock.progress
        later = [
            progress
            for method in self.state.methods
            for progress in upcoming_changes(method.changes(), now)
            if clock.length.fraction_done(progress) < 1
        ]
        plans = [self.plan(progress) for progress in (now, *later)]
        return list({(plan.feed, plan.shape): plan for plan in plans}.values())

    def _set_epoch_rows(self, plan: Plan) -> None:
        """An epoch is a pass over the rows of the plan's subset."""
        subset, rows = plan.feed.subset, self.sources.train.rows
        if subset:
            method = next(method for method in self.state.methods if "feed.subset" in method.writes)
            rows.set(subset, method.rows(subset))
        self.state.clock.images_per_epoch = rows.count(subset)

    @property
    def stopped(self) -> bool:
        """Whether a signal asked the run to stop. Several processes agree on it in :meth:`sync_ranks`."""
        if self._ranks.world == 1:
            self.stop_signal = self.signals.received
        return self.stop_signal is not None

    def sync_ranks(self, plan: Plan | None = None) -> None:
        """Gives all ranks rank 0's time, and a stop signal of any. Raises RuntimeError if a rank has another plan.

        Raises Diverged on all ranks if rank 0 has seen a loss that is not finite.
        """
        clock, ranks = self.state.clock, self._ranks
        if ranks.world == 1:
            if self._diverged is not None:
                raise self._diverged
            return
        received = float(ranks.any_signal(self.signals.received))
        check = float(zlib.crc32(repr((plan, clock.step, clock.position)).encode()))
        mine = [*clock.local_time, received, float(self._diverged is not None), check]
        seconds, pace, stop, is_over, first = ranks.broadcast_floats(mine)
        if is_over:
            raise self._diverged or diverged("the loss is not finite", clock.step)
        if check != first:
            raise RuntimeError(f"rank {ranks.rank} differs from rank 0: {plan} at step {clock.step}")
        clock.synced = seconds, pace
        self.stop_signal = signal.Signals(int(stop)) if stop else None

    # --- before the first step ---

    def prepare(self) -> None:
        """Starts the loader, compiles the step, and estimates what the end of a wall-clock budget takes."""
        clock, feed = self.state.clock, self.plan().feed
        with self.sources.train.open(Feed(feed.size, min(feed.batch_size, START_IMAGES)), Position()) as batches:
            next(iter(batches))
        # CUDA graphs come last: they keep their memory, and the others only need theirs now.
        plans = sorted(self.upcoming_plans(), key=lambda plan: self.step.mode(plan.feed, plan.shape).graphs)
        for plan in plans if self._compile_early else ():
            self.compile_for(plan)
        if clock.reserves:
            last = self.upcoming_plans()[-1]
            if self.state.reserve.evaluations:  # measured by an earlier process
                self.evaluator.scores(last, limit=1)  # compiles
            else:
                self.state.reserve.evaluations.append(self._of_rank_0(self.evaluator.estimate_seconds(last)))
            # Also after a restart, because it does now what would otherwise delay the last evaluation.
            usual, final = map(self._of_rank_0, self.evaluator.judging_seconds(last, self._stops))
            self.state.reserve.usual_judging_seconds, self.state.reserve.judging_seconds = usual, final
            self._update_reserve()
        self.sync_ranks()
        clock.start()  # the schedule begins
        clock.timer.stop()
        seconds, reserve = clock.progress.seconds, clock.reserve_seconds
        if clock.reserves and not clock.step and seconds + reserve >= clock.length.value:
            raise ConfigError(
                f"budget.length: of {clock.length} in all, {seconds:.0f} s pass before the first step, and "
                f"{reserve:.0f} s are reserved for the last evaluation and saving: nothing is left to train. Use more "
                "time, or budget.counts=train"
            )

    def compile_for(self, plan: Plan) -> None:
        """Compiles the step for full batches under ``plan``, once."""
        feed = plan.feed
        self.step.set_shape(plan.shape)
        key = (feed, plan.shape, self.step.ddp_version)
        if key in self._compiled:
            return
        if not self._compiled and self.step.mode(feed).compiled:
            self._print(f"compiling; the compiled code is kept in {compile_cache()}")
        self._compiled.add(key)
        rest = self.sources.train.rows.count(feed.subset) % feed.batch_size
        if seconds := self.step.warm_up(feed, len(self.sources.train.classes), rest):
            freeze_objects()  # compiling makes many
            self._print(f"{feed.size} px, batch {feed.batch_size}: {self.step.mode(feed)} in {seconds:.1f} s")

    def _update_reserve(self) -> None:
        """Reserves the end of a wall-clock budget."""
        if self.state.clock.reserves:
            self.state.clock.reserve_seconds = self.state.reserve.total_seconds

    def _of_rank_0(self, seconds: float) -> float:
        """Rank 0's measurement: all ranks must decide alike what the budget has time for."""
        return self._ranks.broadcast_floats([seconds])[0]

    # --- a pass ---

    @contextmanager
    def open_pass(self, plan: Plan) -> Iterator[Iterator[Batch]]:
        """Opens the loader for a pass under ``plan``, and yields its batches until the budget is spent."""
        clock = self.state.clock
        self._set_epoch_rows(plan)
        with clock.timer.paused():  # compiling is not training time
            coming = [each for method in self.state.methods for each in method.variants(plan, clock.progress)] + [plan]
            for each in coming:
                self.compile_for(each)
            coming += self.upcoming_plans()
            if not any(self.step.mode(each.feed, each.shape).graphs for each in coming):
                self.step.release_graphs()  # their memory is for larger sizes now
                self._compiled = {key for key in self._compiled if not self.step.mode(*key[:2]).graphs}
        self.sync_ranks()
        clock.start()
        self._now = clock.progress
        if self._now.is_end or self.stopped:  # compiling counts if all time counts
            yield iter(())
            return
        self._meter.begin()
        try:
            with self.sources.train.open(plan.feed, clock.position) as batches:
                yield takewhile(lambda _: not clock.ends_within(STOP), self._meter.timed(batches))
        finally:
            synchronize(self.step.device)  # device sync, once per pass
            self._meter.end()

    def train_step(self, batch: Batch, plan: Plan) -> Progress:
        """Takes one step in an open pass, and shows it to clock, meter and methods. Returns the progress after it."""
        state, clock, feed = self.state, self.state.clock, plan.feed
        self._grow(plan)
        self.step.set_shape(plan.shape)
        if (feed, plan.shape, self.step.ddp_version) not in self._compiled:
            with clock.timer.paused():  # compiling is not training time
                self.compile_for(plan)
        state.current_plan, self._changed = plan, True
        macs = batch.total * self._macs(feed.size, plan.shape)
        now, end = self._now, clock.after_step(batch.total, TRAINING_FLOPS * macs)
        lr = self._schedule(end) * plan.dials.lr_scale
        decay = 1.0 if state.ema is None else state.ema.decay_between(now, end)
        mode = self.step.mode(feed) if batch.total == feed.batch_size else EAGER
        output = self.step(batch, now.step, lr, mode, decay, plan.dials)
        self._meter.add(output.loss, batch.total, macs)
        result = StepResult(output.loss, batch.ids, plan, now, output.correct, output.attention_variance)
        for method in state.methods:
            method.observe(result)
        clock.record_step(batch.total, TRAINING_FLOPS * macs)
        if clock.ends_within(RUN_AHEAD + 2):
            synchronize(self.step.device)  # device sync, at the last steps: none may still run when the time is up
        self.sync_ranks(plan)
        self._now = clock.advance()
        if self._output is not None:
            self._show(self._output, output.loss, lr, feed.size)
        return self._now

    def _grow(self, plan: Plan) -> None:
        """Grows the weights if the plan asks for a growth that was not made yet."""
        state, growth = self.state, plan.growth
        if growth.number == state.growth_number:
            return
        before, state.growth_number, state.initialized_shape = state.initialized_shape, growth.number, plan.shape
        copies = [ema.model for ema in (*state.method_emas, state.ema) if ema is not None]
        grow(state.model, before, plan.shape, growth, optimizer_state(state.optimizer), copies, self.step.seed)

    def _show(self, output: RunOutput, loss: torch.Tensor, lr: float, size: int) -> None:
        """Shows the loss about once a second. It is copied without waiting, and read when a GPU has computed it."""
        on_gpu = self.step.device.type == "cuda"
        delay = RUN_AHEAD if on_gpu else 0
        if self._shown is None and output.due():
            # Rank 0's part of the loss stands for all of them.
            copied = (loss * self._ranks.world).to("cpu", non_blocking=on_gpu)
            self._shown = self._now, copied, lr, size, self._meter.images_per_second
        elif self._shown is not None and self._now.step > self._shown[0].step + delay:
            at, copied, lr, size, rate = self._shown
            try:
                output.show(at, check_loss(float(copied), at.step), lr, size, rate)
            except Diverged as error:
                self._diverged = error  # raised by the next sync_ranks, on all ranks
            self._shown = None

    # --- probes ---

    def has_pending_probes(self, now: Progress) -> bool:
        """Whether a method needs a measurement before it can plan further."""
        return any(method.probes(now) for method in self.state.methods)

    def run_probes(self) -> None:
        """Measures what the methods need, on the budget's time. Stops if the budget is spent or a signal came."""
        clock = self.state.clock
        self.save(only_if_changed=True)  # a search may be long
        clock.start()
        for method in self.state.methods:
            while not (clock.progress.is_end or self.stopped) and (probes := method.probes(clock.progress)):
                for probe in takewhile(lambda _: not (clock.progress.is_end or self.stopped), probes):
                    self._run_probe(method, probe)

    def _run_probe(self, method: Method, probe: Probe) -> None:
        clock, log = self.state.clock, self.state.search_log
        now, began, chosen = clock.progress, clock.timer.train_seconds, len(method.choices())
        plan = self.plan()
        complete = self._prober.complete(probe, plan)
        value = self._prober.measure(complete, plan)
        method.observe(replace(probe, answer=value))
        self._changed = True
        log.record(now, method.name, complete, value, method.choices()[chosen:])
        log.seconds += clock.timer.train_seconds - began
        self._set_epoch_rows(self.plan())  # the result may have made a new subset
        self.sync_ranks()
        if self.save_due(clock.progress):
            self.save()

    # --- evaluating, logging, saving ---

    def close_pass(self) -> None:
        """Evaluates if it is due, writes the pass's record and saves. No training time passes.

        If a signal interrupts the evaluation, the pass stays open, and the next process closes it.
        """
        state, clock = self.state, self.state.clock
        if not clock.step:
            raise DataError(
                f"the budget of {clock.length} is spent, but no step was saved. Remove the run's folder and train "
                "again with more frequent checkpoints (--run.save_every). If starting and compiling took all the time, "
                "use a longer budget or --budget.counts=train"
            )
        plan = state.current_plan = trained_plan(state)
        self._changed = True
        self._meter.read(clock.step)
        check_finite(self.state, self._ranks)  # before anything of an evaluation is written
        last = clock.progress.is_end
        for model in dict.fromkeys((state.model, self.evaluator.model)):  # often the same
            self._ranks.share_buffers(model.buffers())
        with clock.timer.paused():
            scores = None
            if last or self._evaluation_due(plan):
                if last:
                    self.save()  # if the process is killed now, only this evaluation is left to do
                scores = self._evaluate(plan, last)
                if scores is None:
                    return
            state.facts.damaged_rows = damaged_rows(self.sources.train, self._ranks, self.step.device)
            if self._output is not None:
                rate, mode = self._meter.images_per_second, self.step.mode(plan.feed)
                metrics = self.step.task.metrics
                self._output.record(pass_record(state, plan, scores, metrics, self._ranks.world, rate, str(mode)))
            step, count = state.facts.logged
            state.facts.logged = clock.step, count + 1 if step == clock.step else 1
            state.logged_plan, state.current_plan, state.totals = plan, None, PassTotals()
            self._meter.load()
            checkpoint = state.reserve.checkpoint_seconds
            if (
                last
                or clock.progress.is_end
                or self._saved is None
                or clock.has_time_for(checkpoint, plan.feed.batch_size)
            ):
                self.save()
        self.sync_ranks()

    def _evaluation_due(self, plan: Plan) -> bool:
        """Whether an evaluation is due. One that would leave no time for a step waits for the end of the run."""
        state, every = self.state, self._evaluate_every
        before = state.last_evaluation.epoch if state.last_evaluation else 0.0
        reserve = state.reserve
        seconds = reserve.evaluation_seconds + reserve.usual_judging_seconds + reserve.checkpoint_seconds
        due = bool(every) and state.clock.progress.epoch - before >= every - 1e-9
        return due and state.clock.has_time_for(seconds, plan.feed.batch_size)

    def _stops(self) -> bool:
        """Whether a signal asked any process to stop."""
        self.sync_ranks()
        return self.stopped

    def _evaluate(self, plan: Plan, last: bool) -> Scores | None:
        """The scores, also in the run's folder; None if a signal interrupted the evaluation."""
        clock = self.state.clock
        at, began = clock.progress, clock.timer.wall_seconds
        scores, seconds = self.evaluator.scores(plan, self._stops), clock.timer.wall_seconds - began
        if scores is not None:
            scores = self.evaluator.judge(scores, plan, last, self._stops, self._print)
        if scores is None:
            return None
        check_finite(self.state, self._ranks)  # BatchNorm's statistics were estimated again
        if not math.isfinite(value := scores.values[(name := self.step.task.metrics[0].name)]):
            raise diverged(f"{name} is {value}", clock.step)
        self.state.reserve.evaluations.append(self._of_rank_0(seconds))
        if not last:
            self._update_reserve()
        self.state.last_evaluation = at
        if self._output is not None:
            weights = self.evaluator.model.state_dict()
            self._output.write_evaluation(scores, self.sources.train.classes, weights, at, self.evaluator.shape(plan))
        return scores

    def save_due(self, now: Progress) -> bool:
        """Whether it is time for a checkpoint, and the budget has time for a step after it."""
        state, clock = self.state, self.state.clock
        if clock.reserves and clock.step and not state.reserve.checkpoints:
            return True  # measures the first checkpoint that has the optimizer's moments
        before = self._saved or Progress()
        due = any(every.elapsed(now) - every.elapsed(before) >= every.value - 1e-9 for every in self._save_every)
        return due and clock.has_time_for(state.reserve.checkpoint_seconds, self.plan().feed.batch_size)

    def save(self, only_if_changed: bool = False) -> None:
        """Writes a checkpoint, from which a run that is killed later continues."""
        state, clock = self.state, self.state.clock
        if only_if_changed and not self._changed:
            return
        state.update_phase(self.plan(), clock.progress)
        if state.totals.images:
            self._meter.read(clock.step)
        state.facts.damaged_rows = damaged_rows(self.sources.train, self._ranks, self.step.device)
        content = state.state_dict(lambda value: self._ranks.total(value.to(self.step.device, copy=True)).cpu())
        with clock.timer.paused():
            began = clock.timer.wall_seconds
            check_finite(self.state, self._ranks)
            if self._output is not None:
                with self._ranks.saving():
                    self._output.save_checkpoint(content)
            state.reserve.checkpoints.append(self._of_rank_0(clock.timer.wall_seconds - began))
            if not clock.progress.is_end:  # a spent budget stays spent, however long this checkpoint took
                self._update_reserve()
        self.sync_ranks()
        self._saved, self._changed = clock.progress, False

    def _print(self, text: str) -> None:
        if self._output is not None:
            self._output.print(text)
