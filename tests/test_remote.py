"""ditty.remote against moto and a folder: the protocol, its faults, and what it must never do.

moto accepts every credential and stores what was damaged on the way: test_remote_s3.py asks a
real server about both. boto3 looks at the objects from outside.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import boto3
import pytest
from moto.server import ThreadedMotoServer

from ditty import s3
from ditty.artifacts import MANIFEST, commit_dir, read_manifest
from ditty.errors import ArtifactDamaged, RemoteDenied, RemoteError, SpecError, StoreError
from ditty.files import write_json
from ditty.remote import Remote
from ditty.s3 import Patience
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


class Outside:
    """A remote's objects without ditty: of a folder by pathlib, of a bucket by boto3."""

    def __init__(self, url: str, folder: Path | None, bucket):
        self.url, self.folder, self.bucket = url, folder, bucket

    def keys(self) -> list[str]:
        if self.folder:
            paths = (p for p in self.folder.rglob("*") if p.is_file())
            return sorted(p.relative_to(self.folder).as_posix() for p in paths)
        return sorted(o.key.removeprefix("some/prefix/") for o in self.bucket.objects.all())

    def write(self, key: str, data: bytes | None) -> None:
        """Make the object hold `data`; None: remove it."""
        if self.folder and data is not None:
            (self.folder / key).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / key).write_bytes(data)
        elif self.folder:
            (self.folder / key).unlink()
        elif data is not None:
            self.bucket.put_object(Key=f"some/prefix/{key}", Body=data)
        else:
            self.bucket.Object(f"some/prefix/{key}").delete()


@pytest.fixture(params=["file", "s3"])
def outside(request: pytest.FixtureRequest, tmp_path: Path) -> Outside:
    if request.param == "file":
        folder = tmp_path / "a folder"
        folder.mkdir()
        return Outside(f"file://{folder}", folder, None)
    bucket = request.getfixturevalue("bucket")
    return Outside(f"s3://{bucket.name}/some/prefix", None, bucket)


def committed(path: Path, files: dict[str, bytes] | None = None, **facts: object) -> Path:
    with commit_dir(path, {"step": 200, **facts}) as staging:
        for name, data in (FILES if files is None else files).items():
            (staging / name).parent.mkdir(parents=True, exist_ok=True)
            (staging / name).write_bytes(data)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    paths = [p for p in directory.rglob("*") if p.is_file()]
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in paths}


# --- the protocol, on a folder and on S3 ---


def test_round_trip_is_byte_for_byte(outside: Outside, tmp_path: Path) -> None:
    source = committed(tmp_path / "source")
    remote = Remote(outside.url, QUICK)
    remote.check()
    assert remote.names() == [] and remote.manifest(NAME) is None
    assert outside.keys() == []  # the probe is gone
    digest = remote.put(source, NAME)
    assert outside.keys() == sorted(f"{NAME}/{f}" for f in [*FILES, MANIFEST])
    assert remote.names("run/checkpoints") == remote.names() == [NAME]
    assert remote.names("run/check") == []
    got = remote.get(NAME, tmp_path / "there" / "again")
    assert contents(tmp_path / "there" / "again") == contents(source)
    assert digest == got.digest == read_manifest(source).digest == remote.manifest(NAME).digest
    assert [p.name for p in (tmp_path / "there").iterdir()] == ["again"]
    assert remote.get(NAME, tmp_path / "there" / "again") == got


def test_get_keeps_another_content_that_stands_there(outside: Outside, tmp_path: Path) -> None:
    remote = Remote(outside.url, QUICK)
    remote.put(committed(tmp_path / "source"), NAME)
    other = committed(tmp_path / "other", {"x": b"1"})
    with pytest.raises(StoreError, match="holds another content"):
        remote.get(NAME, other)
    assert (other / "x").read_bytes() == b"1"


def test_delete_takes_all_of_one_name(outside: Outside, tmp_path: Path) -> None:
    remote = Remote(outside.url, QUICK)
    source = committed(tmp_path / "source", {"a": b"1"})
    remote.put(source, NAME)
    remote.put(source, NAME + "1")  # a longer name that starts with the shorter one
    remote.delete(NAME)
    remote.delete(NAME)
    assert outside.keys() == [f"{NAME}1/a", f"{NAME}1/{MANIFEST}"]
    assert remote.manifest(NAME) is None
    with pytest.raises(RemoteError, match="nothing is committed") as caught:
        remote.get(NAME, tmp_path / "final")
    assert not caught.value.retryable


def test_damaged_remote_file_is_refused_and_mended_by_a_put(
    outside: Outside, tmp_path: Path
) -> None:
    remote = Remote(outside.url, QUICK)
    source = committed(tmp_path / "source", {"weights": b"w" * 70_000})
    remote.put(source, NAME)
    for damaged in [b"W" + b"w" * 69_999, b"w" * 69_999, None]:
        outside.write(f"{NAME}/weights", damaged)
        with pytest.raises(ArtifactDamaged, match="weights"):
            remote.get(NAME, tmp_path / "there" / "final")
        assert list((tmp_path / "there").iterdir()) == []
        remote.put(source, NAME)
    remote.get(NAME, tmp_path / "there" / "final")


def test_damaged_local_file_is_never_published(outside: Outside, tmp_path: Path) -> None:
    remote = Remote(outside.url, QUICK)
    source = committed(tmp_path / "source", {"weights": b"w" * 70_000})
    for damaged in [b"W" + b"w" * 69_999, b"w" * 69_999, None]:
        (source / "weights").unlink()
        if damaged is not None:
            (source / "weights").write_bytes(damaged)
        with pytest.raises(ArtifactDamaged, match="weights"):
            remote.put(source, NAME)
    (tmp_path / "elsewhere").write_bytes(b"w" * 70_000)
    (source / "weights").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ArtifactDamaged, match="not a plain file"):
        remote.put(source, NAME)
    assert outside.keys() == []


def test_a_name_never_gets_a_second_content(outside: Outside, tmp_path: Path) -> None:
    remote = Remote(outside.url, QUICK)
    remote.put(committed(tmp_path / "one"), NAME)
    before = outside.keys()
    with pytest.raises(RemoteError, match="another content is committed") as caught:
        remote.put(committed(tmp_path / "two", {"weights.safetensors": b"2", "new": b"2"}), NAME)
    assert not caught.value.retryable and outside.keys() == before
    remote.get(NAME, tmp_path / "final")
    assert contents(tmp_path / "final") == contents(tmp_path / "one")


def test_remote_manifest_that_leaves_its_directory_is_refused(
    outside: Outside, tmp_path: Path
) -> None:
    remote = Remote(outside.url, QUICK)
    for path in ["../../outside", "/etc/outside", "a/../../b", "sub/manifest.json"]:
        entry = {"path": path, "size": 1, "sha256": "0" * 64}
        value = {"version": 1, "facts": {}, "files": [entry]}
        outside.write(f"{NAME}/{MANIFEST}", json.dumps(value).encode())
        with pytest.raises(ArtifactDamaged, match=MANIFEST):
            remote.get(NAME, tmp_path / "there" / "final")
        assert not (tmp_path / "there").exists()


def test_manifest_that_is_none_is_damage_not_absence(outside: Outside) -> None:
    remote = Remote(outside.url, QUICK)
    for data in [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe"]:
        outside.write(f"{NAME}/{MANIFEST}", data)
        with pytest.raises(ArtifactDamaged):
            remote.manifest(NAME)


def test_names_that_are_none_are_refused(outside: Outside, tmp_path: Path) -> None:
    remote = Remote(outside.url, QUICK)
    source = committed(tmp_path / "source", {"a": b"1"})
    calls = [
        remote.manifest,
        remote.delete,
        lambda name: remote.get(name, tmp_path / "final"),
        lambda name: remote.put(source, name),
    ]
    for name in ["", "..", "run/../../x", "/run", "run//x", "run/.tmp-x", "a\nb", "run\n"]:
        for call in calls:
            with pytest.raises(RemoteError, match="no name"):
                call(name)
    assert outside.keys() == []


def test_foreign_objects_are_no_names(outside: Outside) -> None:
    outside.write(f"run/checkpoints/.tmp-step/{MANIFEST}", b"{}")
    outside.write(MANIFEST, b"{}")
    outside.write("run/checkpoints/step_000000100/weights", b"no manifest")
    assert Remote(outside.url, QUICK).names("run/checkpoints") == []
    assert Remote(outside.url, QUICK).names() == []


# --- a folder ---


def test_check_makes_the_folder_but_reading_never_does(tmp_path: Path) -> None:
    remote = Remote(f"file://{tmp_path}/not%20mounted/x", QUICK)
    for call in (remote.names, lambda: remote.manifest(NAME)):
        with pytest.raises(RemoteError, match="mount or create it"):
            call()
    remote.check()
    assert (tmp_path / "not mounted" / "x").is_dir() and remote.names() == []


def test_debris_of_a_killed_copy_goes(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / NAME).mkdir(parents=True)
    (folder / NAME / ".tmp-0123").write_bytes(b"half")
    remote = Remote(f"file://{folder}", QUICK)
    assert remote.names() == []
    remote.put(committed(tmp_path / "source", {"a": b"1"}), NAME)
    assert sorted(p.name for p in (folder / NAME).iterdir()) == ["a", MANIFEST]
    remote.delete(NAME)
    assert not (folder / NAME).exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_folder_without_permission_is_denied(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o500)
    with pytest.raises(RemoteDenied, match="write access"):
        Remote(f"file://{tmp_path}/folder", QUICK).check()


def test_no_room_is_said_before_the_download(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    remote = Remote(f"file://{tmp_path}/folder", QUICK)
    remote.put(committed(tmp_path / "source"), NAME)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(StoreError, match="1 bytes free, 73000 are needed"):
        remote.get(NAME, tmp_path / "there" / "final")
    assert list((tmp_path / "there").iterdir()) == []


# --- S3: order, resume, faults ---


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
    # The exclusive create of the manifest is asked again: it is what decides.
    assert [line for line in proxy.matching("^(PUT|POST) ") if MANIFEST not in line] == []


PUT_PROGRAM = """
import sys
from pathlib import Path
from ditty.remote import Remote
Remote(sys.argv[1]).put(Path(sys.argv[2]), sys.argv[3])
"""


def test_upload_killed_between_two_objects_commits_nothing(
    proxy: FaultProxy, bucket, tmp_path: Path
) -> None:
    source = committed(tmp_path / "source")
    remote = Remote(f"s3://{bucket.name}", QUICK)
    for held in ["state", MANIFEST]:  # the kill comes before this one is written
        proxy.seen.clear()
        proxy.faults = [Fault(f"^PUT .*{held}", "silence")]
        child = subprocess.Popen(
            [sys.executable, "-c", PUT_PROGRAM, f"s3://{bucket.name}", str(source), NAME]
        )
        assert proxy.matching(f"^PUT .*{held}", wait_s=60)
        os.kill(child.pid, signal.SIGKILL)
        assert child.wait() == -signal.SIGKILL
        assert remote.names() == [] and remote.manifest(NAME) is None
    assert len(list(bucket.objects.all())) == len(FILES)
    proxy.seen.clear()
    remote.put(source, NAME)
    assert len(proxy.matching("^PUT ")) == 1  # only the manifest was missing
    remote.get(NAME, tmp_path / "final")
    assert contents(tmp_path / "final") == contents(source)


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


@pytest.mark.parametrize(
    "faults",
    [
        [
            Fault("^PUT .*weights", "answer", 5, 503, "SlowDown"),
            Fault("^PUT .*manifest", "answer", 1, 409, "ConditionalRequestConflict"),
        ],
        [
            Fault("^HEAD ", "answer", 1, 500, "InternalError"),
            Fault("^GET .*list-type", "answer", 3, 429, "TooManyRequests"),
        ],
        [Fault("^PUT .*weights", "drop_reply"), Fault("^PUT .*manifest", "drop_reply")],
        [Fault("^PUT .*weights", "silence"), Fault("^GET .*weights", "cut")],
        [Fault("^PUT .*weights", "flip_up"), Fault("^GET .*other", "flip_down")],
    ],
    ids=lambda faults: "+".join(f"{f.act}{f.status if f.act == 'answer' else ''}" for f in faults),
)
def test_transient_faults_are_survived(
    proxy: FaultProxy, bucket, tmp_path: Path, faults: list[Fault]
) -> None:
    source = committed(tmp_path / "source", {"weights": b"w" * 200_000, "other": b"o"})
    remote = Remote(f"s3://{bucket.name}", QUICK)
    proxy.faults = [replace(fault) for fault in faults]
    remote.put(source, NAME)
    assert remote.names() == [NAME]
    remote.get(NAME, tmp_path / "final")
    assert contents(tmp_path / "final") == contents(source)
    assert [fault.times for fault in proxy.faults] == [0] * len(faults)


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
    proxy: FaultProxy, bucket, status: int, code: str, error: type[RemoteError]
) -> None:
    remote = Remote(f"s3://{bucket.name}", Patience(2, 0.01, 0.01, 5, 2))
    proxy.faults = [Fault("", "answer", 10_000, status, code)]
    for call in (lambda: remote.names("run"), lambda: remote.manifest(NAME)):
        with pytest.raises(RemoteError) as caught:
            call()
        assert type(caught.value) is error
        assert caught.value.retryable == (status == 500)
        assert bucket.name in str(caught.value) and "canary" not in str(caught.value).lower()


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


def test_refused_in_the_middle_of_an_upload(proxy: FaultProxy, bucket, tmp_path: Path) -> None:
    remote = Remote(f"s3://{bucket.name}", QUICK)
    proxy.faults = [Fault("^PUT .*weights", "answer", 10_000, 400, "ExpiredToken")]
    with pytest.raises(RemoteDenied, match="weights.*ExpiredToken|weights.*injected"):
        remote.put(committed(tmp_path / "source"), NAME)
    assert remote.names() == []


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


def test_unreachable_endpoint_is_given_up_and_tells_no_secret(
    s3_env: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    s3_env.setenv("AWS_ENDPOINT_URL_S3", "http://user:canary-password@127.0.0.1:9")
    with pytest.raises(RemoteError, match="AWS_ENDPOINT_URL_S3") as caught:
        Remote("s3://bucket-x", Patience(2, 0.01, 0.01, 3, 1)).check()
    assert caught.value.retryable
    text = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert "127.0.0.1:9" in text and "again in" in text
    assert "canary" not in text.lower()


@pytest.mark.parametrize("url", ["s3://key:canary@bucket/x", "s3://", "s3://b?x", "file:///", "x"])
def test_urls_that_are_no_target_are_refused(url: str) -> None:
    with pytest.raises(SpecError) as caught:
        Remote(url)
    assert "s3://bucket/prefix" in str(caught.value) and "canary" not in str(caught.value)


def test_writers_of_one_content_agree(bucket, tmp_path: Path) -> None:
    source = committed(tmp_path / "source", {"a": b"1", "b": b"2"})
    digests = []
    threads = [
        threading.Thread(
            target=lambda: digests.append(Remote(f"s3://{bucket.name}", QUICK).put(source, NAME))
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert digests == [read_manifest(source).digest] * 3


def test_files_called_manifest_inside_are_refused(outside: Outside, tmp_path: Path) -> None:
    source = committed(tmp_path / "source", {"a": b"1", "sub/x": b"2"})
    (source / "sub" / MANIFEST).write_bytes(b"{}")
    value = json.loads((source / MANIFEST).read_bytes())
    value["files"].append({"path": f"sub/{MANIFEST}", "size": 2, "sha256": "0" * 64})
    write_json(source / MANIFEST, value)
    with pytest.raises(ArtifactDamaged, match="rename that file"):
        Remote(outside.url, QUICK).put(source, NAME)


def test_importing_costs_neither_torch_nor_s3fs() -> None:
    program = (
        "import sys, ditty.remote; print({'torch', 's3fs', 'fsspec', 'botocore'} & {*sys.modules})"
    )
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert out.stdout.strip() == "set()"
