"""The results of searches are kept in the run's folder, and their times can be replayed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vitlocal.errors import ConfigError
from vitlocal.jsonl import read_lines
from vitlocal.methods.method import Probe
from vitlocal.plan import Shape
from vitlocal.progress import Progress
from vitlocal.report.run_folder import read_log
from vitlocal.train.checkpoint import load_checkpoint
from vitlocal.train.command import train
from vitlocal.train.probes import Prober
from vitlocal.train.run_folder import CHECKPOINT
from vitlocal.train.search_log import SEARCHES, SearchLog, probe_as_json, result_as_json

pytestmark = pytest.mark.usefixtures("no_report")

COMMON = ["--model.depth=4", "--budget.length=4ep", "--evaluate.every=0"]
SEARCHED = {
    "autoprog": ["--methods=autoprog", "--autoprog.search_length=0.5ep", "--autoprog.probe_batches=1",
                 "--autoprog.size_multiple=16",
                 "--autoprog.loss_at=1"],
    "unfreeze": ["--methods=unfreeze", "--unfreeze.size_multiple=16", "--unfreeze.probe_batch_size=8",
                 "--unfreeze.timed_batches=1"],
}  # fmt: skip


@pytest.mark.parametrize("options", SEARCHED.values(), ids=SEARCHED)
def test_a_search_is_repeated_from_another_runs_times(
    configure, decoder, killed_after, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: list[str]
):
    """Measured times differ from run to run. With the times of the first run, the second run makes the same choices.

    Its weights are equal bit for bit, although it is killed and resumed.
    """
    first = configure(*COMMON, *options, f"--run.folder={tmp_path}/first")
    again = configure(*COMMON, *options, f"--run.folder={tmp_path}/again", f"--run.replay_search={tmp_path}/first")
    assert train(first) == 0
    lines = read_lines(tmp_path / "first" / SEARCHES)
    times = [line["answer"] for line in lines if line["probe"]["kind"] == "seconds"]
    assert len(times) > 2 and len(set(times)) > 1 and min(times) > 0  # measured
    # The last of four stages has nothing to choose. Nor have others, if the measured times chose the whole net early.
    assert 1 <= len([line for line in lines if "chosen" in line]) <= 3

    def measured(prober, probe, plan):
        raise AssertionError("a replayed search must not measure times")

    monkeypatch.setattr(Prober, "_seconds", measured)
    with killed_after(6):
        train(again)
    assert train(again) == 0
    assert read_lines(tmp_path / "again" / SEARCHES) == lines
    states = [load_checkpoint(tmp_path / name / CHECKPOINT)["model"] for name in ("first", "again")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    flops = [read_log(tmp_path / name)[-1]["flops"] for name in ("first", "again")]
    assert flops[0] == flops[1]


def test_times_that_cannot_be_replayed(configure, decoder, tmp_path: Path):
    """A folder has no times, or times of other candidates. The failed start leaves no run folder."""
    folder = tmp_path / "other"
    options = [*COMMON, *SEARCHED["unfreeze"], f"--run.replay_search={folder}"]
    with pytest.raises(ConfigError, match=r"other has no searches.jsonl; name the folder of a run of this recipe"):
        train(configure(*options))
    folder.mkdir()
    (folder / SEARCHES).write_text(json.dumps({"probe": {"kind": "loss"}, "answer": 1.0}) + "\n")
    with pytest.raises(ConfigError, match="no time in its searches.jsonl"):
        train(configure(*options))
    line = {"probe": {"kind": "seconds", "size": 224, "shape": {}}, "answer": 0.1}
    (folder / SEARCHES).write_text(json.dumps(line) + "\n")
    with pytest.raises(ConfigError, match=r'time 1 in .* is for .*"size": 224.*needs the time of .*"size": 16'):
        train(configure(*options))
    assert not (tmp_path / "run").exists()
    searches = SearchLog(tmp_path, str(folder))
    searches.record(Progress(), "unfreeze", Probe("seconds", size=224), 0.1)
    with pytest.raises(ConfigError, match="has 1 times, and this run needs one more"):
        searches.replayed_seconds(Probe("seconds", size=32))


def test_lines_after_the_checkpoint_are_dropped(tmp_path: Path):
    searches = SearchLog(tmp_path)
    searches.begin()  # the folder is still empty
    for size in (16, 32, 48):
        searches.record(Progress(epoch=0.5, step=2), "unfreeze", Probe("seconds", size=size), 1e-3 * size)
        if size == 32:
            state = searches.state_dict()
    searches.record(Progress(), "trilevel", Probe("sum", value=torch.ones(3)), torch.ones(3))  # no search's
    assert searches.state_dict()["lines"] == 3
    again = SearchLog(tmp_path)
    again.load_state_dict(state)
    again.begin()
    again.record(Progress(epoch=0.5, step=2), "unfreeze", Probe("seconds", size=48), 0.5, ["1@48px"])
    lines = read_lines(tmp_path / SEARCHES)
    assert [line["answer"] for line in lines] == [1e-3 * 16, 1e-3 * 32, 0.5]
    assert lines[-1] == {"epoch": 0.5, "step": 2, "method": "unfreeze", "answer": 0.5, "chosen": ["1@48px"],
                         "probe": {"kind": "seconds", "size": 48, "shape": {}}}  # fmt: skip


def test_probes_and_results_as_json():
    probe = Probe("trainability", Shape(trainable_blocks=(0, 2)), 32, 2, 3, samples=8, sets=("trainable_blocks",))
    assert probe_as_json(probe) == {"kind": "trainability", "size": 32, "batches": 2, "kernel_batches": 3, "samples": 8,
                                  "shape": {"trainable_blocks": [0, 2]}}  # fmt: skip
    assert result_as_json((float("inf"), 0.1 + 0.2)) == ["inf", 0.1 + 0.2] and result_as_json(float("nan")) == "nan"
