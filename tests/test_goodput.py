"""Where a training's time went, by the files of its run: a timeline by hand, and real faults."""

import json
import os
import random
import time
from pathlib import Path

import psutil
import pytest

from ditty.planning.demo import demo_spec
from ditty.runs.goodput import Attempt, Spent, describe, read_goodput, spent, total
from ditty.runs.rundir import CRASH_FILE, Result, RunDir, Status, append_record, write_result
from ditty.store.artifacts import Store
from tests.processes import kill_tree, start_flow

FAULT_SECONDS, SECONDS, SEED = 60.0, 600.0, 9


def step(number: int, end: float, seconds: float = 2.0) -> dict[str, object]:
    return {"kind": "train", "step": number, "time": end, "seconds": seconds}


def start(after: int, met: float, end: float) -> dict[str, object]:
    return {"kind": "start", "step": after, "load_time": met, "time": end}


# Steps take 2 s. It dies in step 4, after the checkpoint of step 2, and is seen to be dead 3 s
# after its last heartbeat; it waits 5 s, dies of itself while it imports, and then ends.
ATTEMPTS = [
    Attempt(began=100.0, alive=120.5, ended=123.5),
    Attempt(began=128.5, alive=128.5, ended=131.0),
    Attempt(began=132.0, alive=155.0, ended=156.0, failed=False),
]
RECORDS = [
    start(0, 107.0, 109.0),
    {"kind": "eval", "step": 0, "time": 112.0},
    step(1, 114.0), step(2, 116.0),
    {"kind": "save", "step": 2, "time": 117.5},
    step(3, 119.5),
    start(2, 140.0, 142.0),
    step(3, 146.0, 3.0), step(4, 148.0),
    {"kind": "save", "step": 4, "time": 150.0},
]  # fmt: skip


def test_each_second_is_in_one_part() -> None:
    first, second, third = spent(ATTEMPTS, RECORDS)
    assert first == Spent(start=7, load=5, steps=4, again=2, other=2.5, detection=3)
    assert second == Spent(start=5, detection=2.5)
    assert third == Spent(start=9, load=3, steps=5, other=8)
    everything = total([first, second, third])
    assert everything.wall == 156 - 100 and everything.goodput == 9 / 56
    assert describe(everything) == (
        "16% of 56 s: start 21, load 8, steps 9, again 2, other 10, detection 6"
    )


def test_nothing_yet() -> None:
    assert spent([], []) == [] and total([]) == Spent() and Spent().goodput == 0


def test_a_run_of_before_starts_were_recorded() -> None:
    steps = [record for record in RECORDS if record["kind"] != "start"]
    (only,) = spent([Attempt(100.0, 100.0)], steps)
    assert only == Spent(start=12, steps=9, again=2, other=27) and only.wall == 50


def test_where_the_flow_died_too_the_wait_is_the_next_start() -> None:
    unseen = Attempt(100.0, 120.5)
    parts = spent([unseen, *ATTEMPTS[2:]], RECORDS)
    assert parts[0].detection == 0 and parts[1].start == 140 - 120.5
    assert total(parts).wall == 56


def test_an_attempt_that_still_saves_when_the_next_is_launched() -> None:
    """Its guard was killed at 118, and the next attempt was launched at 119."""
    guardless, second = Attempt(100.0, 118.0, ended=118.5), Attempt(119.0, 119.0, ended=131.0)
    first, waiting, _ = parts = spent([guardless, second, ATTEMPTS[2]], RECORDS)
    assert first == Spent(start=7, load=5, steps=4, again=2, other=1.5)
    assert waiting == Spent(detection=131 - 119.5)
    assert total(parts).wall == 56


def test_the_times_are_those_of_the_files(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for number, attempt in enumerate(ATTEMPTS):
        folder = run.new_attempt("train")
        (folder / "heartbeat").mkdir()
        beat = folder / "heartbeat" / "rank_00001.json"
        beat.write_text(json.dumps({"time": attempt.alive, "phase": "step"}))
        (folder / "job.json").write_text("{}")
        os.utime(folder / "job.json", (attempt.began, attempt.began))
        if attempt.failed:
            (folder / CRASH_FILE).write_text("{}")
        else:
            write_result(folder, Result(Status.OK))
        end = folder / (CRASH_FILE if attempt.failed else "result.json")
        os.utime(end, (attempt.ended, attempt.ended))
        other = run.new_attempt("train")  # of the second machine, at the same time
        (other / "job.json").write_text("{}")
        (other / "launch.json").write_text(json.dumps({"machine_rank": 1}))
        assert number == len(list(tmp_path.glob("stages/train/*/heartbeat"))) - 1
    for record in RECORDS:
        append_record(run.metrics_file, record)
    assert read_goodput(run) == spent(ATTEMPTS, RECORDS)


OVERRIDES = [
    "launch.num_processes=2", "launch.device=cpu", "launch.retries=1000",
    "launch.retry_delay_seconds=0", "train.gradient_accumulation_steps=1", "train.save_steps=2",
    "train.num_samples=0", "data.max_rows=400", "data.eval_max_rows=2",
]  # fmt: skip


class Supervised:
    """SmolLM2 on two processes; started again where the flow itself ended or was killed."""

    def __init__(self, home: Path, api: str):
        self.home, self.api, self.random = home, api, random.Random(SEED)
        self.kills: list[str] = []
        self.flow = None

    def start(self, steps: int) -> None:
        overrides = [*OVERRIDES, f"train.max_steps={steps}", f"name=smollm2-{steps}"]
        self.flow = start_flow(demo_spec(Store(self.home), overrides), self.home, self.api)

    def kill(self) -> None:
        """SIGKILL to a process of the training, or, one time in four, to the whole tree."""
        below = psutil.Process(self.flow.pid).children(recursive=True)
        if not below or self.random.random() < 0.25:
            self.kills.append("tree")
            kill_tree(self.flow)
            return
        victim = self.random.choice(below)
        words = " ".join(victim.cmdline())
        kinds = {"ditty.processes.guard": "guard", "accelerate": "launcher", "ditty.worker": "rank"}
        self.kills.append(next((kind for word, kind in kinds.items() if word in words), "other"))
        victim.kill()

    def train_for(self, seconds: float) -> None:
        now = time.monotonic()
        end, fault = now + seconds, now + self.random.expovariate(1 / FAULT_SECONDS)
        while (now := time.monotonic()) < end:
            if self.flow is None or self.flow.poll() is not None:
                self.start(100_000)
            if now >= fault:
                self.kill()
                fault = now + self.random.expovariate(1 / FAULT_SECONDS)
            time.sleep(0.05)
        kill_tree(self.flow)


def last_sign(run: RunDir) -> float:
    """When a file that tells of the trainings was last written, by the file system."""
    names = ("metrics.jsonl", "stages/train/*/*.json", "stages/train/*/heartbeat/*.json")
    return max(path.stat().st_mtime for name in names for path in run.root.glob(name))


@pytest.mark.slow
def test_a_fault_a_minute_for_ten_minutes(tmp_path, prefect_api, capsys):
    """Goodput of SmolLM2-135M (QLoRA) on two processes, with SIGKILLs at random times."""
    supervised = Supervised(tmp_path, prefect_api)
    supervised.start(1)  # makes all that comes before training
    assert supervised.flow.wait() == 0
    supervised.flow = None
    supervised.train_for(SECONDS)
    run = RunDir.named("smollm2-100000", tmp_path)
    parts, kills = read_goodput(run), supervised.kills
    everything = total(parts)
    first_launch = (run.attempts("train")[0] / "job.json").stat().st_mtime
    assert everything.wall == pytest.approx(last_sign(run) - first_launch, abs=2), "all of it"
    records = [r for r in run.metrics() if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, len(records) + 1)), "no step is missing"
    assert everything.steps == pytest.approx(sum(r["seconds"] for r in records))
    assert len(kills) >= 5 and len(parts) > len(kills) / 2
    restarts = [part.start + part.load for part in parts[1:] if part.steps or part.again]
    with capsys.disabled():
        print(f"\n{len(kills)} faults ({', '.join(kills)}), {len(records)} steps that count")
        print(f"goodput {describe(everything)}")
        print("restart to first step, s:", ", ".join(f"{s:.1f}" for s in sorted(restarts)))
        for part in parts:
            print("  ", describe(part))
