"""Two processes through the real launcher: one world, a stop from outside, a resume.

The numbers of every strategy: test_strategies.py.
"""

import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file

from ditty.config.spec import ModelSpec
from ditty.config.specfile import parse_spec
from ditty.errors import Crashed
from ditty.processes import launch
from ditty.runs.rundir import RunDir, Status, read_result
from ditty.store.artifacts import Store
from flows import watch
from flows.watch import StallWatch
from tests.tables_for_tests import write_rows
from tests.tiny import make_model_folder, random_rows

KEY = "k" * 64


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    root = tmp_path_factory.mktemp("inputs")
    make_model_folder(root / "model")
    write_rows(root / "data" / "train.arrow", random_rows(30))
    write_rows(root / "data" / "eval.arrow", random_rows(5, seed=1))
    return root


def run_training(
    inputs, home, processes: int, *, stop_at=None, device="cpu", check=None, **changes
):
    """One attempt through accelerate; returns (result, run directory, attempt).

    `stop_at`: ask for a stop once this step is in the log; the real one comes a little later.
    `check`: called once a second with the run directory and the attempt; may raise.
    `changes`: keys of the spec's sections `model` and `train`, and `grace_seconds`.
    """
    values = {
        "name": "run",
        "data": {"source": "unused"},
        "model": {"base_model": str(inputs / "model")},
        "train": {
            "max_steps": 60,
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 8 // processes,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "save_steps": 1000,
        },
        "launch": {
            "num_processes": processes,
            "device": device,
            "threads": 1,
        },
    }
    values["launch"]["grace_seconds"] = changes.pop("grace_seconds", 2)
    for name, value in changes.items():
        values["model" if name in ModelSpec.model_fields else "train"][name] = value
    spec = parse_spec(values)
    run = RunDir.named("run", home)
    attempt = run.new_attempt("train")
    job = {
        "home": str(home),
        "spec": spec.model_dump(mode="json"),
        "key": KEY,
        "inputs": {"test": "distributed"},
        "model_dir": str(inputs / "model"),
        "data_dir": str(inputs / "data"),
        "device": device,
    }
    lines: list[str] = []

    def on_line(line: str) -> None:
        lines.append(line)
        if stop_at and f"step {stop_at}/" in line:
            run.stop_file.touch()

    result = launch.run_stage(
        "train",
        job,
        attempt,
        spec.launch,
        distributed=True,
        on_line=on_line,
        check=lambda: check(run, attempt) if check else None,
    )
    assert result.status is not Status.FAILED, "\n".join(lines)
    run.stop_file.unlink(missing_ok=True)
    return result, run, attempt


def losses(run: RunDir) -> list[float]:
    return [r["loss"] for r in run.metrics() if r["kind"] == "train"]


def adapter(home):
    return load_file(Store(home).path("train", KEY) / "adapter_model.safetensors")


def test_two_processes_stop_when_asked_and_go_on(inputs, tmp_path):
    """FSDP2 through accelerate; that the bits are those of an undisturbed run: test_strategies."""
    options = {"sharding": "fsdp2", "lora_dropout": 0.2}
    result, run, attempt = run_training(inputs, tmp_path, 2, stop_at=5, **options)
    assert result.status is Status.PREEMPTED and 5 <= result.step < 60
    assert run.committed_steps() == [result.step]
    beats = [json.loads(p.read_text()) for p in sorted((attempt / "heartbeat").glob("*.json"))]
    assert len(beats) == 2 and beats[0]["pid"] != beats[1]["pid"], "there were no two processes"
    result, _, _ = run_training(inputs, tmp_path, 2, **options)
    assert (result.status, result.step) == (Status.OK, 60)
    assert json.loads((run.checkpoint(60) / "state.json").read_text())["world_size"] == 2
    assert len(losses(run)) == 60 and adapter(tmp_path)


class Told(Exception):
    """What a flow raises when it gets SIGTERM."""


@pytest.mark.fault("sigterm")
@pytest.mark.slow
@pytest.mark.parametrize("grace", [0, 2, 30])
def test_sigterm_with_so_much_grace(inputs, tmp_path, grace, figure):
    """A save every 5 steps: with no time for one, those since the last are lost, and no more."""

    def tell(run: RunDir, attempt: Path) -> None:
        if len(losses(run)) >= 12:
            raise Told

    options: dict[str, Any] = {"max_steps": 5000, "save_steps": 5, "grace_seconds": grace}
    with pytest.raises(Told):
        run_training(inputs, tmp_path, 2, check=tell, **options)
    run = RunDir.named("run", tmp_path)
    (attempt,) = run.attempts("train")
    beats = [json.loads(p.read_text()) for p in (attempt / "heartbeat").glob("*.json")]
    assert len(beats) == 2 and not any(psutil.pid_exists(beat["pid"]) for beat in beats)
    lost = len(losses(run)) - run.committed_steps()[-1]
    figure(f"grace {grace} s, a save every 5 steps: steps lost {lost}")
    result = read_result(attempt)
    if grace:
        assert lost == 0 and result and result.status is Status.PREEMPTED
    else:
        assert result is None and lost <= 5


@pytest.mark.fault("hung rank")
@pytest.mark.slow
def test_a_hung_rank_is_found_named_and_ended(inputs, tmp_path, monkeypatch, figure):
    """One process is stopped in the middle of training; the other one waits for it."""
    monkeypatch.setitem(watch.PHASE_SECONDS, "data", 4.0)
    monkeypatch.setitem(watch.PHASE_SECONDS, "step", 4.0)
    pids: dict[str, int] = {}
    watches: list[StallWatch] = []
    stopped: list[float] = []

    def check(run: RunDir, attempt: Path) -> None:
        if not pids and len(losses(run)) >= 3:
            beats = sorted((attempt / "heartbeat").glob("*.json"))
            pids.update({p.stem: json.loads(p.read_text())["pid"] for p in beats})
            os.kill(pids["rank_00001"], signal.SIGSTOP)
            stopped.append(time.monotonic())
            watches.append(StallWatch(attempt / "heartbeat"))
        for stall in watches:
            stall.check()

    options: dict[str, Any] = {"max_steps": 5000, "save_steps": 5000}
    with pytest.raises(Crashed, match="it hangs, and was ended") as caught:
        run_training(inputs, tmp_path, 2, check=check, **options)
    figure(f"a limit of 4 s set: gone {time.monotonic() - stopped[0]:.0f} s after SIGSTOP")
    zero, one = re.findall(r"\nrank_0000[01]: .*(?:\n  .*)*", str(caught.value))
    assert "in all_reduce" in zero and "in fit" in zero, "what it waits in, and how it got there"
    assert "stopped: it shows no stack" in one
    assert len(pids) == 2 and not any(psutil.pid_exists(pid) for pid in pids.values())
