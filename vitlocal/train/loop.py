"""The training loop."""

from vitlocal.train.state import Phase
from vitlocal.train.trainer import Trainer


def fit(trainer: Trainer) -> None:
    """Spends the rest of the budget, pass by pass. Returns early, with everything saved, after a stop signal."""
    state = trainer.state
    while not trainer.stopped:
        now = state.clock.progress
        plan = trainer.plan(now)
        phase = state.update_phase(plan, now)  # the one place that decides what comes next
        if phase is Phase.DONE:
            break
        if phase is Phase.EVALUATE:
            trainer.close_pass()  # evaluate if it is due, log, save
            continue
        if trainer.has_pending_probes(now):
            trainer.run_probes()  # measurements that methods need before they can plan further
            continue
        with trainer.open_pass(plan) as batches:  # one pass of the loader: a constant feed and shape
            for batch in batches:
                now = trainer.train_step(batch, plan)
                plan = trainer.plan(now)
                leaves = trainer.stopped or trainer.has_pending_probes(now)
                if leaves or state.update_phase(plan, now) is not Phase.TRAIN:
                    break
                if trainer.save_due(now):
                    trainer.save()
    trainer.save(only_if_changed=True)
    state.clock.timer.stop()
