"""Checkpoints reach the upload target while training goes on, and come back to another machine."""

import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ditty.errors import ArtifactDamaged, RemoteError, RunMismatch
from ditty.runs.lease import hold
from ditty.runs.rundir import RunDir
from ditty.store.artifacts import commit_dir, verify
from ditty.store.remote import Remote
from flows import mirror
from flows.mirror import Mirror, fetch_newer, remote_checkpoints

LOG = logging.getLogger("test")
IDENTITY = {"data": "rows", "model": "base"}


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.02)
    monkeypatch.setattr(mirror, "RETRY_SECONDS", 0.05)


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    remote = Remote(f"file://{tmp_path}/target")
    remote.check()
    return remote


@pytest.fixture
def run(home: Path) -> RunDir:
    return RunDir.named("demo", home)


def remote_steps(remote: Remote, name: str) -> list[int]:
    return list(remote_checkpoints(remote, name))


def remote_name(step: int, epoch: int | None = None) -> str:
    """Without an epoch: as a ditty without leases has copied it."""
    folder = "" if epoch is None else f"{epoch:06d}/"
    return f"demo/checkpoints/{folder}step_{step:09d}"


@contextmanager
def mirrored(run: RunDir, remote: Remote) -> Iterator[Mirror]:
    with hold(run, remote) as lease:
        assert lease is not None
        with Mirror(run, lease, 2, LOG) as mirror:
            yield mirror


def save(
    run: RunDir, step: int, identity: dict[str, Any] = IDENTITY, best: int | None = None
) -> None:
    with commit_dir(run.checkpoint(step), {"step": step, "identity": identity}) as out:
        if best is not None:
            (out / "state.json").write_text(json.dumps({"step": step, "best_step": best}))
        (out / "state").write_text(f"state of step {step}")
        (out / "weights").write_text(f"weights of step {step}")


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_new_checkpoints_are_copied_and_old_ones_retired(run: RunDir, remote: Remote) -> None:
    with mirrored(run, remote):
        for step in (1, 2, 3):
            save(run, step)
            wait_for(lambda s=step: s in remote_steps(remote, "demo"))  # type: ignore[misc]
    assert remote_steps(remote, "demo") == [2, 3]


def test_the_last_checkpoint_is_copied_before_the_block_ends(run: RunDir, remote: Remote) -> None:
    with mirrored(run, remote):
        save(run, 7)
    assert remote_steps(remote, "demo") == [7]


def test_a_failing_target_is_tried_again_and_disturbs_nobody(
    run: RunDir, remote: Remote, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    put, failures = remote.put, []

    def flaky(directory: Path, name: str) -> str:
        if len(failures) < 3:
            failures.append(name)
            raise RemoteError("503 slow down")
        return put(directory, name)

    monkeypatch.setattr(remote, "put", flaky)
    with mirrored(run, remote):
        save(run, 1)
        wait_for(lambda: remote_steps(remote, "demo") == [1])
    assert len(failures) == 3
    assert caplog.text.count("checkpoint of step 1 was not copied: 503 slow down") == 3


def test_a_checkpoint_retired_while_it_is_copied_leaves_no_half(
    run: RunDir, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = remote.put

    def retired(directory: Path, name: str) -> str:
        if not name.endswith("1"):
            return put(directory, name)
        save(run, 2)
        (directory / "weights").unlink()
        try:
            return put(directory, name)
        finally:
            shutil.rmtree(directory)

    monkeypatch.setattr(remote, "put", retired)
    save(run, 1)
    with mirrored(run, remote):
        pass
    assert remote_steps(remote, "demo") == [2]
    assert remote.objects.keys(remote_name(1, 1)) == []


def test_another_machine_gets_the_newest(run: RunDir, remote: Remote, tmp_path: Path) -> None:
    for step in (1, 2):
        save(run, step)
        remote.put(run.checkpoint(step), remote_name(step))
    other = RunDir.named("demo", tmp_path / "other")
    assert fetch_newer(other, remote, IDENTITY, LOG) == 2
    assert other.committed_steps() == [2]
    assert verify(other.checkpoint(2)).digest == verify(run.checkpoint(2)).digest
    assert fetch_newer(other, remote, IDENTITY, LOG) is None


def test_a_local_checkpoint_that_is_newer_stays_alone(run: RunDir, remote: Remote) -> None:
    save(run, 1)
    remote.put(run.checkpoint(1), remote_name(1))
    save(run, 2)
    assert fetch_newer(run, remote, IDENTITY, LOG) is None
    assert run.committed_steps() == [1, 2]


def damage(remote: Remote, step: int) -> None:
    folder = Path(remote.url.removeprefix("file://"))
    (folder / remote_name(step) / "weights").write_text(f"weights of step {step + 1}")


def test_a_damaged_one_gives_way_to_the_one_before(
    run: RunDir, remote: Remote, tmp_path: Path
) -> None:
    for step in (1, 2):
        save(run, step)
        remote.put(run.checkpoint(step), remote_name(step))
    other = RunDir.named("demo", tmp_path / "other")
    damage(remote, 2)
    assert fetch_newer(other, remote, IDENTITY, LOG) == 1
    assert other.committed_steps() == [1]
    shutil.rmtree(other.root)
    damage(remote, 1)
    with pytest.raises(ArtifactDamaged):
        fetch_newer(other, remote, IDENTITY, LOG)
    assert other.committed_steps() == []


def test_a_checkpoint_of_another_spec_is_refused(
    run: RunDir, remote: Remote, tmp_path: Path
) -> None:
    save(run, 1, {**IDENTITY, "data": "other rows"})
    remote.put(run.checkpoint(1), remote_name(1))
    other = RunDir.named("demo", tmp_path / "other")
    with pytest.raises(RunMismatch, match="data was 'other rows', now 'rows'"):
        fetch_newer(other, remote, IDENTITY, LOG)


def test_a_target_that_does_not_answer_is_not_an_empty_one(
    run: RunDir, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(prefix: str = "") -> list[str]:
        raise RemoteError("timed out")

    monkeypatch.setattr(remote, "names", fail)
    with pytest.raises(RemoteError, match="timed out"):
        fetch_newer(run, remote, IDENTITY, LOG)


def test_nothing_is_written_beside_a_training_process(
    run: RunDir, remote: Remote, tmp_path: Path
) -> None:
    save(run, 1)
    remote.put(run.checkpoint(1), remote_name(1))
    other = RunDir.named("demo", tmp_path / "other")
    lock = other.training_lock()
    assert lock.acquire(0)
    assert fetch_newer(other, remote, IDENTITY, LOG) is None
    lock.release()
    assert fetch_newer(other, remote, IDENTITY, LOG) == 1


@pytest.mark.parametrize("best", [0, 1])
def test_the_best_one_stays_until_there_is_a_better(run: RunDir, remote: Remote, best: int) -> None:
    with mirrored(run, remote):
        for step in (best, 2, 3, 4, 5):
            save(run, step, best=best)
            wait_for(lambda s=step: s in remote_steps(remote, "demo"))  # type: ignore[misc]
        wait_for(lambda: remote_steps(remote, "demo") == [best, 4, 5])
        for step in (6, 7):
            save(run, step, best=6)
            wait_for(lambda s=step: s in remote_steps(remote, "demo"))  # type: ignore[misc]
    assert remote_steps(remote, "demo") == [6, 7]


def test_the_best_one_stays_although_the_newest_goes_while_it_is_copied(
    run: RunDir, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = remote.put

    def retired(directory: Path, name: str) -> str:
        digest = put(directory, name)
        if directory == run.checkpoint(4):
            shutil.rmtree(directory)
        return digest

    monkeypatch.setattr(remote, "put", retired)
    delete, deleted = remote.delete, []
    monkeypatch.setattr(remote, "delete", lambda name: (deleted.append(name), delete(name)))
    for step in (1, 2, 3):
        save(run, step, best=1)
        remote.put(run.checkpoint(step), remote_name(step))
    for step in (2, 3):
        shutil.rmtree(run.checkpoint(step))
    save(run, 4, best=1)
    with mirrored(run, remote):
        wait_for(lambda: 2 not in remote_steps(remote, "demo"))
    assert deleted == [remote_name(2)]


def test_a_best_one_that_was_passed_over_is_copied_before_the_newest(
    run: RunDir, remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    put, names = remote.put, []
    monkeypatch.setattr(remote, "put", lambda d, n: (names.append(n), put(d, n))[1])
    for step in (1, 2, 3):
        save(run, step, best=1)
    with mirrored(run, remote):
        pass
    assert remote_steps(remote, "demo") == [1, 3]
    save(run, 4, best=1)
    with mirrored(run, remote):
        pass
    assert names == [remote_name(step, epoch) for step, epoch in ((1, 1), (3, 1), (4, 2))]


def test_a_best_step_without_a_checkpoint_changes_nothing(
    run: RunDir, remote: Remote, tmp_path: Path
) -> None:
    save(run, 2, best=0)
    save(run, 3, best=1)
    with mirrored(run, remote):
        pass
    assert remote_steps(remote, "demo") == [3]
    other = RunDir.named("demo", tmp_path / "other")
    assert fetch_newer(other, remote, IDENTITY, LOG) == 3
    assert [p.name for p in other.checkpoints.iterdir()] == ["step_000000003"]


def test_another_machine_gets_the_best_one_before_the_newest(
    run: RunDir, remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2, 3):
        save(run, step, best=1)
        remote.put(run.checkpoint(step), remote_name(step))
    other = RunDir.named("demo", tmp_path / "other")
    get, seen = remote.get, []

    def watched(name: str, final: Path) -> Any:
        seen.append((name, other.committed_steps()))
        return get(name, final)

    monkeypatch.setattr(remote, "get", watched)
    assert fetch_newer(other, remote, IDENTITY, LOG) == 3
    assert [steps for _, steps in seen] == [[], []], "the newest stood before the best was there"
    assert sorted(p.name for p in other.checkpoints.iterdir()) == [
        "step_000000001",
        "step_000000003",
    ]
    for step in (1, 3):
        assert verify(other.checkpoint(step)).digest == verify(run.checkpoint(step)).digest


def test_a_checkpoint_whose_best_one_is_damaged_is_passed_over(
    run: RunDir, remote: Remote, tmp_path: Path
) -> None:
    for step, best in ((1, 1), (2, 2), (3, 2)):
        save(run, step, best=best)
        remote.put(run.checkpoint(step), remote_name(step))
    damage(remote, 2)
    other = RunDir.named("demo", tmp_path / "other")
    assert fetch_newer(other, remote, IDENTITY, LOG) == 1
    assert [p.name for p in other.checkpoints.iterdir()] == ["step_000000001"]


def test_a_best_one_of_another_spec_is_refused(run: RunDir, remote: Remote, tmp_path: Path) -> None:
    save(run, 1, {**IDENTITY, "data": "other rows"}, best=1)
    save(run, 2, best=1)
    for step in (1, 2):
        remote.put(run.checkpoint(step), remote_name(step))
    other = RunDir.named("demo", tmp_path / "other")
    with pytest.raises(RunMismatch, match="data was 'other rows', now 'rows'"):
        fetch_newer(other, remote, IDENTITY, LOG)
    assert other.committed_steps() == []
