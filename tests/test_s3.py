"""ditty.store.s3 below ditty.store.remote: order, resume, faults; moto behind a fault proxy.

moto accepts every credential and stores what was damaged on the way: test_remote_s3.py asks a
real server about both.
"""

# ruff: noqa: F811  (imported fixtures)
import os
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ditty.errors import RemoteDenied, RemoteError, SpecError, scrub
from ditty.store import s3
from ditty.store.artifacts import MANIFEST, read_manifest
from ditty.store.remote import Remote
from ditty.store.s3 import Patience
from tests.faultproxy import Fault, FaultProxy
from tests.remotes import (  # noqa: F401
    FILES,
    NAME,
    QUICK,
    TRANSIENT,
    bucket,
    committed,
    contents,
    kill_between_objects,
    moto_url,
    proxy,
    s3_env,
    survive,
)


def test_manifest_goes_last_and_a_second_put_sends_nothing(
    proxy: FaultProxy, bucket, tmp_path: Path
) -> None:
    source = committed(tmp_path / "source")
    remote = Remote(f"s3://{bucket.name}", QUICK)
    remote.put(source, NAME)
    puts = proxy.matching("^(PUT|POST) ")
    assert len(puts) == len(FILES) + 1 and MANIFEST in puts[-1]
    proxy.seen.clear()
    for each in (remote, Remote(f"s3://{bucket.name}", QUICK)):
        each.put(source, NAME)
    assert proxy.matching("^(PUT|POST) ") == []


@pytest.mark.fault("upload killed")
def test_upload_killed_between_two_objects_commits_nothing(
    proxy: FaultProxy, bucket, tmp_path: Path, figure
) -> None:
    source = committed(tmp_path / "source")
    kills = kill_between_objects(proxy, Remote(f"s3://{bucket.name}", QUICK), source)
    assert len(list(bucket.objects.all())) == len(FILES) + 1
    figure(f"moto, {kills} kills: partial ones accepted 0")


def test_unfinished_uploads_of_this_name_only_are_aborted(bucket, tmp_path: Path) -> None:
    client = bucket.meta.client
    source = committed(tmp_path / "source", {"a": b"1"})
    for key in (f"{NAME}/weights.safetensors", f"{NAME}1/weights.safetensors"):
        client.create_multipart_upload(Bucket=bucket.name, Key=key)
    Remote(f"s3://{bucket.name}", QUICK).put(source, NAME)
    left = client.list_multipart_uploads(Bucket=bucket.name)["Uploads"]
    assert [upload["Key"] for upload in left] == [f"{NAME}1/weights.safetensors"]


def test_large_file_goes_in_parts_and_comes_back(
    proxy: FaultProxy, bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    source = committed(tmp_path / "source", {"big": os.urandom(11 << 20)})
    proxy.faults = [
        Fault(r"^PUT .*partNumber=2", "answer", 1, 500, "InternalError"),
        Fault(r"^GET .*/big", "flip_down"),
    ]
    remote = Remote(f"s3://{bucket.name}", QUICK)
    remote.put(source, NAME)
    assert len(proxy.matching("partNumber=")) == 4
    remote.get(NAME, tmp_path / "final")
    assert contents(tmp_path / "final") == contents(source)


@pytest.mark.fault("s3 faults")
@pytest.mark.parametrize("name", TRANSIENT)
def test_transient_faults_are_survived(
    proxy: FaultProxy, bucket, tmp_path: Path, name: str, monkeypatch, figure
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 << 20)
    figure(f"moto, {name}: {survive(name, proxy, bucket, QUICK, tmp_path)}")


@pytest.mark.fault("s3 credentials")
@pytest.mark.parametrize(
    ("status", "code", "error"),
    [
        (403, "AccessDenied", RemoteDenied),
        (400, "ExpiredToken", RemoteDenied),
        (500, "InternalError", RemoteError),
        (404, "NoSuchBucket", RemoteError),
        (301, "PermanentRedirect", RemoteError),
    ],
)
def test_a_refusal_is_never_taken_for_nothing_there(
    proxy: FaultProxy, bucket, status: int, code: str, error: type[RemoteError], figure
) -> None:
    remote = Remote(f"s3://{bucket.name}", Patience(2, 0.01, 0.01, 5, 2))
    proxy.faults = [Fault("", "answer", 10_000, status, code)]
    for call in (lambda: remote.names("run"), lambda: remote.manifest(NAME)):
        with pytest.raises(RemoteError) as caught:
            call()
        assert type(caught.value) is error
        assert caught.value.retryable == (status == 500)
        assert bucket.name in str(caught.value) and "canary" not in str(caught.value).lower()
    figure(f"moto, {code}: false fresh starts 0 of 2")


def test_denied_says_so_whatever_was_asked(proxy: FaultProxy, bucket, tmp_path: Path) -> None:
    source = committed(tmp_path / "source", {"a": b"1"})
    remote = Remote(f"s3://{bucket.name}", QUICK)
    proxy.faults = [Fault("", "answer", 10_000, 403, "SignatureDoesNotMatch")]
    for call in (
        remote.check,
        lambda: remote.put(source, NAME),
        lambda: remote.get(NAME, tmp_path / "final"),
        lambda: remote.delete(NAME),
    ):
        with pytest.raises(RemoteDenied, match="AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"):
            call()
    assert list(bucket.objects.all()) == [] and not (tmp_path / "final").exists()


@pytest.mark.fault("s3 credentials")
def test_refused_in_the_middle_of_an_upload(
    proxy: FaultProxy, bucket, tmp_path: Path, figure
) -> None:
    remote = Remote(f"s3://{bucket.name}", QUICK)
    proxy.faults = [Fault("^PUT .*weights", "answer", 10_000, 400, "ExpiredToken")]
    with pytest.raises(RemoteDenied, match="write .*weights.*ExpiredToken"):
        remote.put(committed(tmp_path / "source"), NAME)
    proxy.faults = [Fault("^HEAD ", "answer", 10_000, 403)]  # a HEAD has no body to say why
    with pytest.raises(RemoteDenied, match="look at .*empty.*403"):
        remote.put(committed(tmp_path / "source2"), NAME)
    assert remote.names() == []
    figure("moto, expired midway: said, nothing committed")


def test_a_listing_is_read_to_its_last_page(
    bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    names = [f"run/final/{index}" for index in range(5)]
    for name in names:
        bucket.put_object(Key=f"{name}/{MANIFEST}", Body=b"{}")
    assert Remote(f"s3://{bucket.name}", QUICK).names() == names


def test_check_names_a_bucket_that_is_not_there(s3_env: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        RemoteError, match="no bucket not-there.*aws s3 mb s3://not-there"
    ) as caught:
        Remote("s3://not-there/x", QUICK).check()
    assert not caught.value.retryable


def test_check_without_credentials(bucket, s3_env: pytest.MonkeyPatch) -> None:
    s3_env.delenv("AWS_ACCESS_KEY_ID")
    s3_env.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(RemoteDenied, match="AWS_SECRET_ACCESS_KEY"):
        Remote(f"s3://{bucket.name}", QUICK).check()


def test_check_finds_a_server_that_overwrites_what_it_should_not(proxy: FaultProxy, bucket) -> None:
    proxy.faults = [Fault("^PUT ", "unconditional", 2)]
    with pytest.raises(RemoteError, match="If-None-Match"):
        Remote(f"s3://{bucket.name}", QUICK).check()
    assert list(bucket.objects.all()) == []


def test_unreachable_endpoint_is_given_up(
    s3_env: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s3_env.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    with pytest.raises(RemoteError, match="AWS_ENDPOINT_URL_S3") as caught:
        Remote("s3://bucket-x", Patience(2, 0.01, 0.01, 3, 1)).check()
    assert caught.value.retryable and not isinstance(caught.value, RemoteDenied)
    assert "127.0.0.1:9" in str(caught.value) and "again in" in caplog.text
    assert "canary" not in "".join(traceback.format_exception(caught.value)).lower()


def test_patience_ends_by_its_tries_and_by_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that stands while nobody waits."""
    now = [0.0]
    monkeypatch.setattr(s3.time, "monotonic", lambda: now[0])

    def tries(patience: Patience) -> int:
        began, count = now[0], 0
        for wait in patience.waits():
            now[0], count = now[0] + wait, count + 1
        assert now[0] - began <= patience.total_s
        return count

    assert tries(Patience(attempts=4, first_wait_s=1, longest_wait_s=1, total_s=1000)) == 3
    assert 10 <= tries(Patience(attempts=1000, first_wait_s=1, longest_wait_s=1, total_s=10)) <= 20


def test_no_secret_is_printed(s3_env: pytest.MonkeyPatch) -> None:
    secret, key = os.environ["AWS_SECRET_ACCESS_KEY"], os.environ["AWS_ACCESS_KEY_ID"]
    said = scrub(f"GET http://user:pass@host/x as {key} with {secret} failed")
    assert said == "GET http://***@host/x as *** with *** failed"
    s3_env.setenv("AWS_ENDPOINT_URL_S3", "http://user:canary-password@127.0.0.1:9")
    with pytest.raises(SpecError, match="AWS_ENDPOINT_URL_S3 holds a user name") as caught:
        Remote("s3://bucket-x", QUICK).check()
    assert "canary" not in "".join(traceback.format_exception(caught.value)).lower()


def test_writers_of_one_content_agree(bucket, tmp_path: Path) -> None:
    source = committed(tmp_path / "source", {"a": b"1", "b": b"2"})
    with ThreadPoolExecutor(3) as pool:
        puts = [pool.submit(Remote(f"s3://{bucket.name}", QUICK).put, source, NAME) for _ in "abc"]
    assert {put.result() for put in puts} == {read_manifest(source).digest}
