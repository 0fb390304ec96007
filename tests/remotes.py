"""Places for the tests of remotes: moto behind a fault proxy, and committed directories to copy.

Import the fixtures by name into the test module that uses them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ditty.artifacts import commit_dir
from ditty.s3 import Patience
from tests.faultproxy import FaultProxy

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
