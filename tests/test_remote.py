"""ditty.store.remote: the protocol on a folder and on moto's S3; boto3 looks from outside."""

# ruff: noqa: F811  (imported fixtures)
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ditty.errors import ArtifactDamaged, RemoteDenied, RemoteError, SpecError, StoreError
from ditty.store.artifacts import MANIFEST, read_manifest
from ditty.store.files import write_json
from ditty.store.remote import Remote
from tests.remotes import (  # noqa: F401
    FILES,
    NAME,
    QUICK,
    bucket,
    committed,
    contents,
    moto_url,
    s3_env,
)


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


def test_what_a_killed_check_left_goes_after_an_hour(outside: Outside) -> None:
    now = int(time.time())
    old, young = (f"ditty-probe-{now - seconds}-{'a' * 32}" for seconds in (4000, 60))
    for key in (old, young, "ditty-probe-mine"):
        outside.write(key, b"")
    if outside.folder:
        for name, seconds in ((".tmp-old", 4000), (".tmp-young", 60)):
            outside.write(name, b"")
            os.utime(outside.folder / name, (now - seconds, now - seconds))
    Remote(outside.url, QUICK).check()
    left = [".tmp-young"] if outside.folder else []
    assert outside.keys() == [*left, young, "ditty-probe-mine"]


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
    for path in ["../../outside", "/etc/outside", "a/../../b", "sub/manifest.json", "b\0", "ok/b"]:
        files = [{"path": p, "size": 1, "sha256": "0" * 64} for p in ("ok", path)]
        value = {"version": 1, "facts": {}, "files": files}
        outside.write(f"{NAME}/{MANIFEST}", json.dumps(value).encode())
        with pytest.raises(ArtifactDamaged, match=MANIFEST):
            remote.get(NAME, tmp_path / "there" / "final")
        assert not (tmp_path / "there").exists()


def test_manifest_that_is_none_is_damage_not_absence(outside: Outside, tmp_path: Path) -> None:
    remote = Remote(outside.url, QUICK)
    for data in [b"", b"{", b"[]", b'{"version": 1}', b"\xff\xfe"]:
        outside.write(f"{NAME}/{MANIFEST}", data)
        with pytest.raises(ArtifactDamaged):
            remote.manifest(NAME)
    source = committed(tmp_path / "source", {"a": b"1"})
    with pytest.raises(RemoteError, match="not JSON"):  # ArtifactDamaged would accuse `source`
        remote.put(source, NAME)


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
    remote = Remote(outside.url, QUICK)
    assert remote.names("run/checkpoints") == remote.names() == []


@pytest.mark.fault("racers")
def test_one_of_many_creates_wins(outside: Outside, figure: Callable[[str], None]) -> None:
    objects = Remote(outside.url, QUICK).objects
    objects.prepare()
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: objects.create("run/lease", b"%d" % n), range(8)))
    assert sum(won) == 1 and objects.read("run/lease") == b"%d" % won.index(True)
    where = "a folder" if outside.folder else "moto"
    figure(f"{where}, winners of an exclusive create: {sum(won)} of {len(won)}")


def test_files_called_manifest_inside_are_refused(outside: Outside, tmp_path: Path) -> None:
    source = committed(tmp_path / "source", {"a": b"1", "sub/x": b"2"})
    (source / "sub" / MANIFEST).write_bytes(b"{}")
    value = json.loads((source / MANIFEST).read_bytes())
    value["files"].append({"path": f"sub/{MANIFEST}", "size": 2, "sha256": "0" * 64})
    write_json(source / MANIFEST, value)
    with pytest.raises(ArtifactDamaged, match="rename that file"):
        Remote(outside.url, QUICK).put(source, NAME)


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


@pytest.mark.parametrize("url", ["s3://key:canary@bucket/x", "s3://", "s3://b?x", "file:///", "x"])
def test_urls_that_are_no_target_are_refused(url: str) -> None:
    with pytest.raises(SpecError) as caught:
        Remote(url)
    assert "s3://bucket/prefix" in str(caught.value) and "canary" not in str(caught.value)


def test_importing_costs_neither_torch_nor_s3fs() -> None:
    heavy = {"torch", "s3fs", "fsspec", "botocore"}
    program = f"import sys, ditty.store.remote; print({heavy} & {{*sys.modules}})"
    out = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, check=True, text=True
    )
    assert out.stdout.strip() == "set()"
