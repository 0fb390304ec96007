"""Places for the tests of remotes: moto behind a fault proxy, and committed directories to copy.

Import the fixtures by name into the test module that uses them.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ditty.errors import RunBusy
from ditty.runs import lease as leases
from ditty.runs.lease import Lease, newest, take
from ditty.store.artifacts import MANIFEST, commit_dir
from ditty.store.remote import Remote
from ditty.store.s3 import Patience
from tests.faultproxy import Fault, FaultProxy

NAME = "run/checkpoints/step_000000200"
QUICK = Patience(attempts=4, first_wait_s=0.02, longest_wait_s=0.1, total_s=4, request_s=2)
FILES = {"weights.safetensors": b"w" * 70_000, "state/rank 0.bin": b"r" * 3000, "empty": b""}


@pytest.fixture(scope="module")
def moto_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_env(moto_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", moto_url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIACANARYCANARY")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "canary-secret-canary-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    # botocore's own wait before its second try: up to a second, at random.
    monkeypatch.setattr(
        "botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.01
    )
    return monkeypatch


@pytest.fixture
def bucket(s3_env: pytest.MonkeyPatch, moto_url: str):
    """A new bucket as boto3 sees it."""
    name = f"bucket-{os.urandom(4).hex()}"
    return boto3.resource("s3", endpoint_url=moto_url).create_bucket(Bucket=name)


@pytest.fixture
def proxy(moto_url: str, s3_env: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """Between s3fs and moto; boto3 goes past it."""
    with FaultProxy(moto_url) as proxy:
        s3_env.setenv("AWS_ENDPOINT_URL_S3", proxy.url)
        yield proxy


def committed(path: Path, files: dict[str, bytes] | None = None, **facts: object) -> Path:
    with commit_dir(path, {"step": 200, **facts}) as staging:
        for name, data in (FILES if files is None else files).items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(data)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    paths = [p for p in directory.rglob("*") if p.is_file()]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}


# What passes, by name. `big` goes in parts.
TRANSIENT = {
    "503 x 5 and a 409": [
        Fault("^PUT .*weights", "answer", 5, 503, "SlowDown"),
        Fault("^PUT .*manifest", "answer", 1, 409, "ConditionalRequestConflict"),
    ],
    "500 and 429 x 3 to questions": [
        Fault("^HEAD ", "answer", 1, 500, "InternalError"),
        Fault("^GET .*list-type", "answer", 3, 429, "TooManyRequests"),
    ],
    "replies lost": [Fault("^PUT .*weights", "drop_reply"), Fault("^PUT .*manifest", "drop_reply")],
    "a put hangs, a body is cut": [
        Fault("^PUT .*weights", "silence"),
        Fault("^GET .*weights", "cut"),
    ],
    "bits flipped": [Fault("^PUT .*weights", "flip_up"), Fault("^GET .*other", "flip_down")],
    "connections reset": [Fault("^PUT .*weights", "reset", 6), Fault("^GET .*weights", "reset", 6)],
    "all slow": [Fault("", "delay", 6, seconds=0.3)],
    "500, a reset and a cut within parts": [
        Fault("^PUT .*big.*partNumber=2", "answer", 1, 500, "InternalError"),
        Fault("^PUT .*big.*partNumber=3", "reset"),
        Fault("^GET .*/big", "cut"),
    ],
}


def survive(name: str, proxy: FaultProxy, bucket, patience: Patience, folder: Path) -> str:
    """Copy there and back while the faults of TRANSIENT happen; how long each took, and orphans."""
    files = {"weights": b"w" * 200_000, "other": b"o"}
    if any("big" in fault.match for fault in TRANSIENT[name]):
        files["big"] = os.urandom(11 << 20)
    source = committed(folder / "source", files)
    remote = Remote(f"s3://{bucket.name}", patience)
    proxy.faults = [replace(fault) for fault in TRANSIENT[name]]
    began = time.monotonic()
    remote.put(source, NAME)
    assert remote.names() == [NAME]
    put = time.monotonic()
    remote.get(NAME, folder / "final")
    got = time.monotonic()
    assert contents(folder / "final") == contents(source)
    assert [fault.times for fault in proxy.faults] == [0] * len(proxy.faults)
    assert ("big" in files) == bool(proxy.matching("partNumber=3"))
    orphans = bucket.meta.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", [])
    assert orphans == []
    return f"put {put - began:.1f} s, get {got - put:.1f} s, orphan parts {len(orphans)}"


PUT_PROGRAM = """
import sys
from pathlib import Path
from ditty.store.remote import Remote
Remote(sys.argv[1]).put(Path(sys.argv[2]), sys.argv[3])
"""


def kill_between_objects(proxy: FaultProxy, remote: Remote, source: Path) -> int:
    """SIGKILL a process that copies `source` before each of its objects in turn; how many kills.

    What was there before a kill stays, and is not sent again.
    """
    held = [*sorted(FILES), MANIFEST]
    for name in held:
        proxy.seen.clear()
        quoted = name.replace(" ", "%20")
        proxy.faults = [Fault(f"^PUT .*{quoted}", "silence")]
        child = subprocess.Popen([sys.executable, "-c", PUT_PROGRAM, remote.url, str(source), NAME])
        assert proxy.matching(f"^PUT .*{quoted}", wait_s=60)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert remote.names() == [] and remote.manifest(NAME) is None
        sent = proxy.matching("^PUT ")
        assert len(sent) <= 2, "the one that the kill before held up, and this one"
    proxy.seen.clear()
    remote.put(source, NAME)
    assert len(proxy.matching("^PUT ")) == 1, "only the manifest was missing"
    remote.get(NAME, source.with_name("copied back"))
    assert contents(source.with_name("copied back")) == contents(source)
    return len(held)


RACERS = 20


def race_for_a_name(remote: Remote, monkeypatch: pytest.MonkeyPatch) -> str:
    """All have looked before the first one writes; and again when that lease has run out."""
    assert newest(remote, "demo") is None  # and the client is made once, not by each thread
    counting, all_have_looked = leases.counting, threading.Barrier(RACERS)

    def together(*args: object) -> list[str]:
        all_have_looked.wait(30)
        return counting(*args)  # type: ignore[arg-type]

    def racer(name: str) -> Lease | RunBusy:
        try:
            return take(remote, "demo", name, f"/{name}")
        except RunBusy as error:
            return error

    monkeypatch.setattr(leases, "counting", together)
    for epoch in (1, 2):
        monkeypatch.setattr(leases, "LEASE_SECONDS", 60.0 if epoch == 2 else -1.0)
        with ThreadPoolExecutor(RACERS) as pool:
            results = list(pool.map(racer, [f"machine-{n}" for n in range(RACERS)]))
        winners = [r for r in results if isinstance(r, Lease)]
        assert len(winners) == 1 and winners[0].claim.epoch == epoch
        losers = [str(r) for r in results if isinstance(r, RunBusy)]
        assert len(losers) == RACERS - 1
        assert all(f"/{winners[0].claim.holder})" in text for text in losers)
    assert newest(remote, "demo") == winners[0].claim
    return f"{RACERS} racers for a name, free and run out: winners 1 and 1"
