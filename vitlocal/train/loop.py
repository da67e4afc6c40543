"""The training loop: methods plan, the source is opened for the plan's feed, steps are taken until the plan moves."""

from __future__ import annotations

import signal

from vitlocal.config import Config
from vitlocal.errors import DataError
from vitlocal.models.factory import patch_side
from vitlocal.report.page import write_report
from vitlocal.train.checks import config_warnings, end_warnings
from vitlocal.train.run import Run, open_run


def fit(run: Run) -> None:
    """Spends what is left of the budget. Returns early, with everything saved, after Ctrl-C or SIGTERM."""
    if run.unclosed is not None:  # trained, and stopped before it was evaluated
        run.end_pass(run.unclosed)
    elif (
        run.running is not None and run.plan().pass_key != run.running.pass_key
    ):  # the time since the checkpoint counts
        run.end_pass(run.running)
    while not run.over:
        run.inquire()
        if run.over:
            run.save()
            break
        plan = run.plan()
        if run.running is not None and plan.pass_key != run.running.pass_key:  # by what was found out
            run.end_pass(run.running)
            if run.over:
                break
        before = run.running
        run.begin_pass(plan)
        if run.over:  # compiling took what was left of a budget that counts everything, or a signal came
            run.running = before
            if run.interrupted or not run.unevaluated:  # else evaluating saves
                run.save()
            break
        with run.sources.train.open(plan.feed, run.clock.position) as batches:  # one pass: a fixed feed and shape
            for batch in run.waited_for(batches):
                run.train_on(batch, plan)
                ahead = run.plan()
                if run.over or ahead.pass_key != plan.pass_key or run.asks:
                    break
                if run.save_due and not run.ended(plan):
                    run.save()
                    if run.over:  # what was left of a budget that counts everything has gone by
                        break
                plan = ahead
        trained = run.running or plan  # the last step's: what comes next may be another shape
        if run.ended(trained):
            run.end_pass(trained)
        else:
            run.save()  # interrupted, or a method has a question
    if run.clock.spent and not run.clock.step:
        raise DataError(
            f"the budget of {run.config.budget.length} is spent, and nothing that it bought was saved; remove "
            f"{run.folder} to train anew, with checkpoints more often (--run.save_every), or, where starting and "
            "compiling took it all, with more time or --budget.counts=train"
        )
    if run.unevaluated and not run.interrupted:  # what a process that was killed had spent leaves no further step
        run.end_pass(run.running or run.logged_plan or run.plan())
    run.clock.stop()


def described(run: Run) -> str:
    """The run on one line: its model, data, budget and machine."""
    model, train, patch = run.config.model, run.sources.train, patch_side(run.model)
    parameters = sum(p.numel() for p in run.model.parameters()) / 1e6
    return (
        f"{model.name}: {parameters:.2f} M parameters, up to {model.size} px"
        + (f" in patches of {patch}" if patch > 1 else "")
        + f", {train.count:,} images of {len(train.classes)} classes, {run.config.budget.length} on {run.device}, "
        f"{str(run.step.precision).removeprefix('torch.')}, in {run.folder}"
        + (f", {run.ranks.world} processes" if run.ranks.world > 1 else "")
    )


def train(config: Config, began: float | None = None) -> int:
    """Builds or resumes the run, trains, exports and reports; returns the command's exit status.

    ``began``: see :func:`open_run`.
    """
    with open_run(config, began) as run, run.stopping_on_signals():
        say, folder = run.log.say, run.folder
        say(described(run))
        for warning in config_warnings(run):
            say(f"note: {warning}")
        if run.clock.step:
            spent = run.clock.progress
            if run.finished:
                say("this run is finished; what it leaves is written anew")
            else:
                say(f"going on at epoch {spent.epoch:.2f}, step {spent.step}: {100 * spent.fraction:.1f} % is spent")
        if not (run.clock.spent and run.clock.step):
            run.warm_up()
        fit(run)
        if run.interrupted and not run.finished:
            say(f"stopped by {run.interrupted.name} at step {run.clock.step}, all saved; the same command goes on")
            return 130 if run.interrupted is signal.SIGINT else 143
        if not run.ranks.first:
            return 0
        run.export()
        best = write_report(folder)
        for warning in end_warnings(run):
            say(f"note: {warning}")
        say(f"done: top-1 {best['top1']:.2f} %, top-5 {best['top5']:.2f} %; see {folder}/report.html")
    return 0
