"""Commands that are asked to stop, whose terminal closes, or whose launcher dies."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_processes import WAITING

from vitlocal.errors import STOP_SIGNALS, Interrupted, StopSignals, interrupts, run_command

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def default_handlers():
    """Those of a process that a terminal starts: a shell's background jobs ignore SIGINT."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in STOP_SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def start(*words: str | Path, **more) -> subprocess.Popen[str]:
    """Python with ``words``, in a process that can import the package."""
    path = os.pathsep.join([*more.pop("path", ()), str(ROOT)])
    return subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, text=True,
        **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | more),
    )  # fmt: skip


def launched(body: str, ends: bool = False) -> str:
    """A program that launches a command with this ``main``."""
    lines = "".join(f"\n    {line}" for line in body.splitlines())
    return (
        "import os, sys, types\nfrom vitlocal.launch import launch\n"
        f"def main(argv):{lines}\nsys.modules['vitlocal.x'] = types.SimpleNamespace(main=main)\nlaunch('x', {ends})"
    )


def test_ctrl_c_while_pytorch_is_imported(tmp_path: Path):
    """PyTorch itself turns some interrupts into other errors, as this stand-in does."""
    (tmp_path / "torch.py").write_text(
        "import os, signal\ntry: os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException: raise ImportError('torch')"
    )
    recipe = ["--config-file", "rcfg/demo.yaml"]
    commands = [
        ["train_imagenet.py", *recipe], ["-m", "vitlocal.train", *recipe], ["-m", "vitlocal.predict"],
        ["-m", "vitlocal.sample"], ["-m", "vitlocal.export"], ["-m", "vitlocal.bench", "step"],
        ["write_dataset.py", "--split=train", "--plan", "--source=sample"],
        ["-c", "from vitlocal.launch import predict as f; f()"],
    ]  # fmt: skip
    for process in [start(*words, path=[str(tmp_path)]) for words in commands]:
        with process:
            out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (130, "", "interrupted\n"), process.args


@pytest.mark.parametrize("number", STOP_SIGNALS, ids=lambda number: number.name)
def test_every_stop_signal_is_stored_once_and_interrupts_a_command(number: signal.Signals, capfd, monkeypatch):
    monkeypatch.setattr("vitlocal.errors.DOUBLE_SECONDS", 1000.0)  # for slow tests
    signals = StopSignals()
    with signals.handled():
        signal.raise_signal(number)
        assert signals.received is number and "another Ctrl-C, a second later, stops at once" in capfd.readouterr().err
        for other in STOP_SIGNALS:  # a scheduler's, or the same Ctrl-C that torchrun sends again
            signal.raise_signal(other)
        assert signals.received is number
        signals._at -= 2000
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
    assert run_command(lambda argv: signal.raise_signal(number), []) == 128 + number
    assert "interrupted" in capfd.readouterr().err


def test_an_interrupt_that_became_another_error_is_still_one():
    def main(argv) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        except KeyboardInterrupt as error:
            raise SystemError("in C code") from error

    assert run_command(main, []) == 143


def test_an_ignored_signal_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    signals = StopSignals()
    with signals.handled(), interrupts():
        signal.raise_signal(signal.SIGHUP)
    assert signals.received is None


def test_an_interrupt_in_a_destructor_ends_the_command():
    body = "class A:\n    def __del__(self): os.kill(os.getpid(), 15)\nA()\nprint('more')"
    with start("-c", launched(body)) as process:
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (143, "", "interrupted\n")


PRINTS = """import logging, warnings
from tqdm import tqdm
sys.stdin.readline()
for _ in tqdm(range(3), mininterval=0): print('x' * 100_000, flush=True); warnings.warn('x'); logging.error('x')
tqdm.write('x'); print('not flushed'); os.close(os.open(sys.argv[1], os.O_CREAT))"""


@pytest.mark.parametrize("closed", ["pipe", "descriptors", "full disk"])
def test_a_closed_output_ends_nothing(tmp_path: Path, closed: str):
    prepare = (lambda: [os.close(number) for number in (1, 2)]) if closed == "descriptors" else None
    with open("/dev/full", "w") as full:
        to = {"stdout": full, "stderr": full} if closed == "full disk" else {}
        process = start("-c", launched(PRINTS), tmp_path / "made", stdin=subprocess.PIPE, preexec_fn=prepare, **to)
    with process:
        for pipe in filter(None, (process.stdout, process.stderr)):
            pipe.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert process.wait(60) == 0 and (tmp_path / "made").exists()


def test_a_command_that_only_prints_ends_quietly_with_its_reader():
    with start("-c", launched("while True: print('x' * 1000)", ends=True)) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE and process.stderr.read() == ""


def test_a_command_that_only_prints_reports_a_full_disk():
    with open("/dev/full", "w") as full, start("-c", launched("print('x')", ends=True), stdout=full) as process:
        assert process.wait(60) == 1
        assert process.stderr.read() == "error: standard output: No space left on device\n"


def test_workers_end_with_a_killed_parent():
    """The parent is killed before and after the worker asks for the signal; the worker holds the parent's output."""
    worker = (
        "import signal, sys, time; from vitlocal.machine import end_with_parent\n"
        "if sys.argv[1] == 'late':\n    import os; parent, real = os.getppid(), os.getppid\n"
        "    print('ready', flush=True); os.getppid = lambda: parent\n    while real() == parent: time.sleep(0.01)\n"
        "    answers = iter([parent, real()]); os.getppid = lambda: next(answers)\n"
        "end_with_parent(signal.SIGTERM); print('ready', flush=True); time.sleep(60); print('alive', flush=True)"
    )
    parent = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
    processes = [start("-c", parent, worker, when) for when in ("early", "late")]
    for process in processes:
        with process:
            assert process.stdout.readline() == "ready\n"
            process.kill()
            assert process.communicate(timeout=30) == ("", "")


def test_the_slurm_script_of_the_docs_requeues_and_ends(small, folder: Path, tmp_path: Path):
    """Slurm signals the script, which hands the signal on; then it runs the same script again."""
    (script,) = re.findall(r"```bash\n(#!.*?)```", (ROOT / "docs" / "reliability.md").read_text(), re.DOTALL)
    run, stand_ins = tmp_path / "run", {
        "srun": 'export SLURM_PROCID=0 SLURM_LOCALID=0; exec "$@"',
        "scontrol": f'echo "$@" >> {tmp_path}/calls; echo localhost',
        "python": f'exec {sys.executable} {tmp_path}/waiting.py "${{@:2}}"',
    }  # fmt: skip
    config = small(run, "--budget.length=80steps", "--methods=none", "--evaluate.every=0", "--data.workers=1")
    (tmp_path / "recipe.yaml").write_text(config.yaml())
    script = script.replace("rcfg/ours.yaml", f"{tmp_path}/recipe.yaml").replace("runs/ours", str(run))
    (tmp_path / "job.sh").write_text(script)
    (tmp_path / "waiting.py").write_text(WAITING)
    for name, text in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "localhost",
             "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}  # fmt: skip

    def job() -> subprocess.Popen[str]:
        return subprocess.Popen(["bash", str(tmp_path / "job.sh")], cwd=ROOT, env=os.environ | slurm, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip

    with job() as process:
        deadline = time.monotonic() + 120
        while not (run / "log.jsonl").exists() or not (run / "log.jsonl").read_text():
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGUSR1)  # to the script alone
        text = process.communicate(timeout=120)[0]
    assert process.returncode == 138 and "stopped by SIGUSR1 at step" in text, text
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "requeue 7"
    with job() as process:
        text = process.communicate(timeout=240)[0]
    assert process.returncode == 0 and "continuing at epoch" in text and "done: " in text, text
    assert (tmp_path / "calls").read_text().count("requeue") == 1
