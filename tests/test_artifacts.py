"""Committed directories: whole or absent, and verified."""

import json
import mmap
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from ditty.errors import ArtifactDamaged, StoreError
from ditty.store import digests
from ditty.store.artifacts import (
    MADE_BY,
    MANIFEST,
    Manifest,
    Store,
    commit,
    commit_dir,
    set_aside,
    staging_dir,
    verify,
)
from ditty.store.files import FileLock, canonical_json, make_dir, sha256_file, write_atomic


def make(final: Path, **files: str) -> Manifest:
    with commit_dir(final, {"made": "here"}) as staging:
        (staging / "sub").mkdir()
        for name, text in files.items():
            (staging / "sub" / name).write_text(text)
    return verify(final)


def test_failed_stage_leaves_nothing_behind(tmp_path):
    with pytest.raises(KeyboardInterrupt), commit_dir(tmp_path / "a", {}) as staging:
        (staging / "part").write_text("half a shard")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_all_is_on_the_disk_before_it_appears(tmp_path, monkeypatch):
    """By what the kernel is asked for: a power cut after the rename loses nothing."""
    acts, fsync, rename = [], os.fsync, os.rename

    def synced(fd):
        fsync(fd)
        acts.append(Path(f"/proc/self/fd/{fd}").readlink())

    def renamed(old, new):
        acts.append((Path(old), Path(new)))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "rename", renamed)
    with commit_dir(tmp_path / "a", {}) as staging:
        (staging / "sub").mkdir()
        (staging / "sub/x").write_text("content")
    *before, manifest, directory, appears, parent = acts
    assert {staging / "sub", staging / "sub/x", manifest[0]} == {*before}
    assert manifest[1] == staging / MANIFEST and directory == staging
    assert appears == (staging, tmp_path / "a") and parent == tmp_path


def test_digest_depends_on_content_alone(tmp_path):
    one, two = make(tmp_path / "a", x="1"), make(tmp_path / "b", x="1")
    three = make(tmp_path / "c", x="2")
    assert one.digest == two.digest != three.digest
    assert one.facts["made"] == "here" and set(one.facts) == {"made", MADE_BY}
    assert list(one.files) == ["sub/x"]


def flip(path: Path) -> None:
    path.write_bytes(b"conteNt")


def flip_and_set_back_the_clock(path: Path) -> None:
    before = path.stat()
    flip(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip_in_memory(path: Path) -> None:
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        mapped[5:6] = b"N"
        mapped.flush()


def put_another_in_its_place(path: Path) -> None:
    other = path.parent.parent / "other"
    shutil.copy2(path, other)
    flip_and_set_back_the_clock(other)
    other.replace(path)


def put_a_link_in_its_place(path: Path) -> None:
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


DAMAGES = [
    flip,
    flip_and_set_back_the_clock,
    flip_in_memory,
    put_another_in_its_place,
    put_a_link_in_its_place,
    lambda path: path.write_bytes(b"conten"),
    lambda path: path.unlink(),
]


@pytest.fixture
def reads(monkeypatch):
    """Files that were read for their digest; a few bytes are large enough to remember it."""
    found = []
    monkeypatch.setattr(digests, "SMALLEST", 1)
    monkeypatch.setattr(
        digests, "sha256_file", lambda path: found.append(path) or sha256_file(path)
    )
    return found


def made_in(store: Store) -> Path:
    """A file of an artifact that is remembered."""
    with store.commit("stage", "key", {}) as out:
        (out / "x").write_bytes(b"content")
    path = store.path("stage", "key") / "x"
    digests.remember(path, sha256_file(path), store.home)  # its clock has moved on by now
    return path


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("remembered", [False, True])
def test_damage_is_found_set_aside_and_rebuilt(tmp_path, damage, remembered, request):
    store = Store(tmp_path)
    if remembered:
        read = request.getfixturevalue("reads")
    path = made_in(store)
    assert store.find("stage", "key") and not (remembered and read)
    damage(path)
    with pytest.raises(ArtifactDamaged, match=str(path)):
        verify(path.parent)
    assert store.find("stage", "key") is None
    assert not path.parent.exists() and len(list(path.parent.parent.glob(".bad-key-*"))) == 1
    with store.commit("stage", "key", {}) as out:
        (out / "x").write_bytes(b"content")
    assert store.find("stage", "key")


def test_what_is_remembered_is_read_again_after_a_start_of_the_machine(
    tmp_path, reads, monkeypatch
):
    store = Store(tmp_path)
    path = made_in(store)
    (tmp_path / "boot").write_text("another")
    monkeypatch.setattr(digests, "BOOT", tmp_path / "boot")
    for _ in range(3):
        assert store.find("stage", "key")
    assert reads == [path], "once"
    (note,) = (tmp_path / "digests").iterdir()
    note.write_bytes(note.read_bytes()[:-9])
    assert store.find("stage", "key") and store.find("stage", "key")
    assert reads == [path, path], "a note that is torn is none"


def test_a_file_that_changed_in_this_tick_of_the_clock_is_not_remembered(tmp_path, reads):
    """As on file systems whose clocks are coarse: written again, it would look the same."""
    path = made_in(Store(tmp_path))
    ahead = digests._Note(path, tmp_path)
    with ahead as note:
        note._begun = path.stat().st_ctime_ns
        note.keep(digests._state(path), "0" * 64)
    assert digests.sha256(path, tmp_path) == sha256_file(path)


def test_the_first_of_two_commits_stays(tmp_path):
    first, second = staging_dir(tmp_path / "a"), staging_dir(tmp_path / "a")
    (first / "x").write_text("first")
    (second / "x").write_text("second")
    one = commit(first, tmp_path / "a", {})
    assert commit(second, tmp_path / "a", {}).digest == one.digest
    assert (tmp_path / "a/x").read_text() == "first"
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_link_is_never_committed(tmp_path):
    with pytest.raises(StoreError, match="neither a file"), commit_dir(tmp_path / "a", {}) as out:
        (out / "x").symlink_to("/etc/passwd")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("path", ["../x", "/etc/x", "a/../../x", "", "a//b", "./a"])
def test_manifest_paths_cannot_leave_their_directory(path):
    value = {"version": 1, "facts": {}, "files": [{"path": path, "size": 1, "sha256": "0"}]}
    with pytest.raises(ArtifactDamaged, match="leaves its directory"):
        Manifest.from_json(value, "here")


@pytest.mark.parametrize("value", [None, [], {}, {"version": 2}, {"version": 1, "files": 3}])
def test_what_is_no_manifest_is_damage(value):
    with pytest.raises(ArtifactDamaged):
        Manifest.from_json(value, "here")


def test_uncommitted_directory_is_damage(tmp_path):
    with pytest.raises(ArtifactDamaged, match="never committed"):
        verify(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(ArtifactDamaged, match="not JSON"):
        verify(tmp_path)
    assert set_aside(tmp_path).exists()


def test_files_have_the_users_mode_whoever_wrote_them(tmp_path):
    with commit_dir(tmp_path / "a", {}) as out:
        (out / "x").write_text("x")
        (out / "x").chmod(0o600)
    assert (tmp_path / "a/x").stat().st_mode & 0o777 == tmp_path.joinpath(
        "a", MANIFEST
    ).stat().st_mode & 0o777


def test_staging_of_a_dead_maker_goes_with_the_next_commit(tmp_path):
    store = Store(tmp_path)
    stale = staging_dir(store.path("stage", "key"))
    other = staging_dir(store.path("stage", "other"))
    with store.commit("stage", "key", {}) as out:
        (out / "x").write_text("x")
    assert not stale.exists() and other.exists()


def test_unwritable_home_names_the_variable(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(StoreError, match="Set DITTY_HOME"):
        make_dir(blocked / "home")


def hold(path: Path, ready: Path) -> None:
    FileLock(path).acquire()
    ready.touch()
    time.sleep(60)


def test_lock_excludes_and_frees_itself_when_its_holder_is_killed(tmp_path):
    context = multiprocessing.get_context("spawn")
    holder = context.Process(target=hold, args=(tmp_path / "lock", tmp_path / "ready"))
    holder.start()
    while not (tmp_path / "ready").exists():
        assert holder.is_alive()
        time.sleep(0.02)
    lock = FileLock(tmp_path / "lock")
    assert lock.acquire(timeout=0) is False
    os.kill(holder.pid, signal.SIGKILL)
    assert lock.acquire(timeout=30)
    lock.release()
    holder.join()


def test_atomic_write_keeps_the_old_content_on_failure(tmp_path, monkeypatch):
    path = tmp_path / "x"
    write_atomic(path, b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, b"new")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_canonical_json_is_canonical():
    assert canonical_json({"b": 1, "a": [1.5, None]}) == b'{"a":[1.5,null],"b":1}'
    with pytest.raises(ValueError):
        canonical_json({"x": float("nan")})
    assert json.loads(canonical_json({"ä": "ö"})) == {"ä": "ö"}
