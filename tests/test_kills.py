"""Kill the whole of it at any moment: nothing committed is redone, and the result is the same.

The oracle is an undisturbed run of the same spec in another DITTY_HOME.
"""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ditty.config.spec import RunSpec
from ditty.errors import Preempted
from ditty.runs.rundir import CRASH_FILE, RunDir
from ditty.store.files import sha256_file
from flows.events import Event, EventState, listen
from flows.finetune import finetune
from tests import warm
from tests.processes import kill_when, start_flow, wait_while
from tests.remotes import bucket, moto_url, s3_env  # noqa: F401
from tests.tiny import make_model_folder

STEPS = 30


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("kills")
    rows = [
        {
            "messages": [
                {"role": r, "content": f"{r} says {i * 7919}"} for r in ("user", "assistant")
            ]
        }
        for i in range(3000)
    ]
    (root / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_model_folder(root / "model")
    return root


def make_spec(place: Path, url: str) -> RunSpec:
    values: dict[str, Any] = {
        "name": "demo",
        "data": {"source": str(place / "rows.jsonl"), "seq_len": 96, "eval_max_rows": 8},
        "model": {
            "base_model": str(place / "model"), "quantization": "nf4", "lora_dropout": 0.1,
        },
        "train": {
            "max_steps": STEPS, "precision": "fp32", "save_steps": 5, "learning_rate": 1e-3,
            "gradient_accumulation_steps": 2,
        },
        "launch": {"device": "cpu", "threads": 1, "retry_delay_seconds": 0, "grace_seconds": 5},
        "upload": {"url": url},
    }  # fmt: skip
    return RunSpec.model_validate(values)


def run_here(spec: RunSpec) -> dict[str, EventState]:
    """Run the flow in this process; the last state of each stage by its first word."""
    events: list[Event] = []
    with listen(events.append):
        finetune(spec)
    return {event.stage.split()[0]: event.state for event in events}


def adapter_hash(home: Path) -> str:
    (adapter,) = (home / "store/train").glob("*/adapter_model.safetensors")
    return sha256_file(adapter)


def committed(home: Path) -> dict[str, int]:
    """Inode of each committed artifact's manifest: another one means that it was made again."""
    found = home.glob("store/*/*/manifest.json")
    return {str(p): p.stat().st_ino for p in found if not p.parent.name.startswith(".")}


@pytest.fixture(scope="module")
def oracle(place: Path, prefect_api: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The adapter's hash of a run that nothing disturbed."""
    home = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DITTY_HOME", str(home))
        warm.instead_of_launching(patch)
        run_here(make_spec(place, f"file://{home}/target"))
    return adapter_hash(home)


def moments(home: Path, target: Path) -> dict[str, Callable[[], bool]]:
    """What the file system shows while each of five things is going on."""
    run = RunDir.named("demo", home)

    def staging(folder: Path) -> bool:
        return folder.is_dir() and any(
            p.name.startswith((".tmp-", ".part-")) for p in folder.iterdir()
        )

    def trained() -> bool:
        return sum(r["kind"] == "train" for r in run.metrics()) >= 3

    return {
        "tokenize": lambda: staging(home / "store/tokenize"),
        "prequantize": lambda: staging(home / "store/prequantize"),
        "train": trained,
        "checkpoint": lambda: staging(run.checkpoints),
        "upload": lambda: (target / "demo/final").is_dir(),
    }


@pytest.mark.usefixtures("forked_workers")
@pytest.mark.fault("sigkill")
def test_killed_at_five_moments_ends_like_an_undisturbed_run(
    place: Path,
    oracle: str,
    home: Path,
    tmp_path: Path,
    prefect_api: str,
    figure: Callable[[str], None],
) -> None:
    """While it trains only the rank is killed: the same flow goes on, to the next moment."""
    spec = make_spec(place, f"file://{tmp_path}/target")
    kept: dict[str, int] = {}
    run = RunDir.named("demo", home)
    for moment, happens in moments(home, tmp_path / "target").items():
        if moment != "checkpoint":
            flow = start_flow(spec, home, prefect_api)
        if moment == "train":
            figure(f"{seconds_to_detection(flow, run, happens):.1f} s to detection")
            continue
        kill_when(flow, happens)
        now = committed(home)
        assert {path: now.get(path) for path in kept} == kept, f"{moment}: a stage was made again"
        kept = now
    assert not list((tmp_path / "target/demo/final").glob("*/manifest.json")), "upload was over"
    assert len(kept) == 5  # load, tokenize, pack, prequantize, train

    assert run_here(spec)["upload"] is EventState.DONE
    assert {path: inode for path, inode in committed(home).items() if path in kept} == kept
    assert adapter_hash(home) == oracle
    (uploaded,) = (tmp_path / "target/demo/final").glob("*/adapter_model.safetensors")
    assert sha256_file(uploaded) == oracle

    assert set(run_here(spec).values()) == {EventState.CACHED}, "the next run does nothing"
    attempts = len(run.attempts("train"))
    assert attempts == 3 or attempts == 4, "training was started again"


def seconds_to_detection(
    flow: "subprocess.Popen[bytes]", run: RunDir, happens: Callable[[], bool]
) -> float:
    """SIGKILL the rank that trains as soon as `happens`; until the flow has noted that it is gone.

    Returns once the next attempt is there.
    """
    wait_while(flow, lambda: not happens())
    (attempt,) = run.attempts("train")
    beat = json.loads((attempt / "heartbeat/rank_00000.json").read_text())
    os.kill(beat["pid"], signal.SIGKILL)
    killed = time.monotonic()
    wait_while(flow, lambda: not (attempt / CRASH_FILE).exists())
    seconds = time.monotonic() - killed
    wait_while(flow, lambda: len(run.attempts("train")) < 2)
    return seconds


@pytest.mark.usefixtures("forked_workers")
def test_another_machine_resumes_from_s3(
    place: Path,
    oracle: str,
    home: Path,
    prefect_api: str,
    bucket: Any,  # noqa: F811
) -> None:
    """Stopped in the middle, DITTY_HOME lost: the next run goes on from the uploaded checkpoint."""
    spec = make_spec(place, f"s3://{bucket.name}/prefix")
    run = RunDir.named("demo", home)

    def stop() -> None:  # as soon as it trains: it takes a second on a fast machine
        while not any(r["kind"] == "train" for r in run.metrics()):
            time.sleep(0.005)
        run.stop_file.touch()

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Preempted, match="stop file"):
        finetune(spec)
    (saved,) = run.committed_steps()[-1:]
    assert 1 <= saved < STEPS
    shutil.rmtree(home)

    states = run_here(spec)
    assert states["train"] is EventState.DONE
    assert min(r["step"] for r in run.metrics() if r["kind"] == "train") == saved + 1
    assert adapter_hash(home) == oracle
