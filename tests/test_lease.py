"""One run of a name at a target: many at once, one that dies, one that sleeps, a folder and S3.

boto3 and pathlib look at objects from outside.
"""

# ruff: noqa: F811  (imported fixtures)
import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ditty.errors import ArtifactDamaged, RemoteError, RunBusy
from ditty.runs import lease as leases
from ditty.runs.lease import Lease, hold, newest, take
from ditty.runs.rundir import RunDir
from ditty.store.artifacts import commit_dir
from ditty.store.objects import Folder
from ditty.store.remote import Remote
from flows import mirror
from flows.mirror import Mirror, fetch_newer, remote_checkpoints
from tests.faultproxy import Fault, FaultProxy
from tests.remotes import QUICK, bucket, moto_url, proxy, race_for_a_name, s3_env  # noqa: F401

LOG = logging.getLogger("test")
IDENTITY = {"test": "same"}


@pytest.fixture(params=["file", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Remote:
    if request.param == "s3":
        return Remote(f"s3://{request.getfixturevalue('bucket').name}/some/prefix", QUICK)
    (tmp_path / "target").mkdir()
    return Remote(f"file://{tmp_path}/target")


def taken(remote: Remote, holder: str) -> Lease:
    return take(remote, "demo", holder, f"/{holder}")


@pytest.mark.fault("racers")
def test_of_20_racers_who_all_find_it_free_one_wins(
    remote: Remote, monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], None]
) -> None:
    where = "moto" if remote.url.startswith("s3:") else "a folder"
    figure(f"{where}, {race_for_a_name(remote, monkeypatch)}")


def test_it_says_who_holds_it_and_until_when(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases.time, "time", lambda: 1_000_000_000.0)
    taken(remote, "one")
    with pytest.raises(RunBusy) as caught:
        taken(remote, "two")
    told = str(caught.value)
    assert (
        f"demo at {remote.url} is held by {socket.gethostname()} (process {os.getpid()}, /one)"
        in told
    )
    assert "since 2001-09-09 01:46:40 UTC, until 2001-09-09 01:47:40 UTC" in told
    assert "choose another name" in told and caught.value.retryable


def test_it_is_renewed_given_back_and_no_epoch_is_used_twice(
    remote: Remote, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.02)
    run = RunDir.named("demo", tmp_path / "home")
    with hold(run, remote) as held:
        assert held is not None
        wait_for(lambda: held.claim.renewal >= 3)
        with pytest.raises(RunBusy):
            taken(remote, "another")
        with hold(run, remote) as beside:
            assert beside is None, "two flows of one run directory: the first one copies"
    assert len(remote.objects.keys("demo/lease/")) == 1
    assert taken(remote, "another").claim.epoch == 2


def test_a_killed_one_gives_way_at_once_at_home_and_elsewhere_when_its_time_is_up(
    remote: Remote, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken(remote, "home")  # and nothing more is heard of it
    assert taken(remote, "home").claim.epoch == 2
    with pytest.raises(RunBusy):
        taken(remote, "elsewhere")
    later = time.time() + leases.LEASE_SECONDS + 1
    monkeypatch.setattr(leases.time, "time", lambda: later)
    assert taken(remote, "elsewhere").claim.epoch == 3


def test_a_lost_reply_is_no_lost_race(proxy: FaultProxy, bucket: object) -> None:
    proxy.faults = [Fault("^PUT .*lease", "drop_reply")]
    held = taken(Remote(f"s3://{bucket.name}", QUICK), "one")  # type: ignore[attr-defined]
    assert held.claim.epoch == 1 and proxy.faults[0].times == 0
    proxy.faults = [Fault("^PUT .*lease", "drop_reply")]
    held.renew()
    assert newest(held.remote, "demo") == held.claim and held.claim.renewal == 1


GOOD = {
    "epoch": 1, "renewal": 0, "holder": "x", "where": "y", "since": 1, "until": 2, "checkpoints": []
}  # fmt: skip
BAD = ({"until": "never"}, {"until": 1e300}, {"epoch": 2}, {"checkpoints": [1]})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "\xff", "[" * 9999, *(json.dumps(GOOD | bad) for bad in BAD)]
)
def test_a_lease_that_is_none_is_not_taken_for_a_free_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "demo/lease").mkdir(parents=True)
    (tmp_path / "demo/lease/000001-000000.json").write_text(text, "latin-1")
    with pytest.raises(ArtifactDamaged, match="is no lease of ditty's"):
        taken(Remote(f"file://{tmp_path}"), "one")
    with pytest.raises(RemoteError, match="mount or create it"):
        taken(Remote(f"file://{tmp_path}/absent"), "one")


# --- what a loser writes ---


def save(run: RunDir, step: int, text: str) -> None:
    with commit_dir(run.checkpoint(step), {"step": step, "identity": IDENTITY}) as out:
        (out / "weights").write_text(text)


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def content(target: Path) -> dict[str, bytes]:
    return {str(p.relative_to(target)): p.read_bytes() for p in target.rglob("*") if p.is_file()}


def sleeper(run: RunDir, url: str) -> int:
    """A process that copies step 5, and sleeps just before it commits that, and just after."""
    child = os.fork()
    if child:
        return child
    create = Folder.create

    def asleep(self: Folder, key: str, data: bytes) -> bool:
        if "step_000000005/manifest" not in key:
            return create(self, key, data)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)  # not one instruction later
        created = create(self, key, data)
        signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
        return created

    Folder.create = asleep  # type: ignore[method-assign]
    try:
        with hold(run, Remote(url)) as lease, Mirror(run, lease, 2, LOG):  # type: ignore[arg-type]
            pass
    finally:
        os._exit(0)


def test_one_that_slept_through_a_takeover_writes_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGSTOP in the middle of a copy; another machine goes on from before; SIGCONT."""
    target = tmp_path / "target"
    target.mkdir()
    url, one = target.as_uri(), RunDir.named("demo", tmp_path / "one")
    monkeypatch.setattr(mirror, "POLL_SECONDS", 0.02)
    save(one, 1, "first")
    with hold(one, Remote(url)) as lease, Mirror(one, lease, 2, LOG):  # type: ignore[arg-type]
        pass
    save(one, 5, "of the one that slept")
    with monkeypatch.context() as soon:
        soon.setattr(leases, "LEASE_SECONDS", 0.0)
        child = sleeper(one, url)
    try:
        assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        other, remote = RunDir.named("demo", tmp_path / "other"), Remote(url)
        with hold(other, remote) as lease:
            assert lease is not None and lease.claim.epoch == 3
            assert fetch_newer(other, remote, IDENTITY, LOG) == 1
            save(other, 2, "of the one that took over")
            with Mirror(other, lease, 2, LOG):
                pass
            counted = remote_checkpoints(remote, "demo")
            assert counted == {
                1: "demo/checkpoints/000001/step_000000001",
                2: "demo/checkpoints/000003/step_000000002",
            }
            before = content(target)
            os.kill(child, signal.SIGCONT)
            assert os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
            late = set(remote.names()) - set(counted.values())
            assert late == {"demo/checkpoints/000002/step_000000005"}, "it did not wake"
            assert remote_checkpoints(remote, "demo") == counted
            third = RunDir.named("demo", tmp_path / "third")
            assert fetch_newer(third, remote, IDENTITY, LOG) == 2
            kept = (third.checkpoint(2) / "weights").read_text()
            assert kept == "of the one that took over"
            os.kill(child, signal.SIGCONT)
            os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
            assert before.items() <= content(target).items()
            save(other, 3, "later")
            with Mirror(other, lease, 2, LOG):
                pass
        assert late.isdisjoint(remote.names()) and 3 in remote_checkpoints(remote, "demo")
    finally:
        os.kill(child, signal.SIGKILL)  # a stopped one too; it is reaped last of all
        os.waitpid(child, 0)


def test_once_it_is_lost_nothing_is_copied_and_training_ends(
    remote: Remote,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = RunDir.named("demo", tmp_path / "home")
    monkeypatch.setattr(leases, "LEASE_SECONDS", -1.0)
    monkeypatch.setattr(leases, "RENEW_SECONDS", 60.0)
    with hold(run, remote) as held:
        assert held is not None
        taken(remote, "another")
        save(run, 1, "late")
        with Mirror(run, held, 2, LOG):
            pass
        assert isinstance(held.lost, RunBusy) and "/another) at " in str(held.lost)
    assert remote.names() == [] and "was not copied: run demo" in caplog.text


def test_one_that_slept_after_it_had_asked_removes_nothing_that_a_newer_one_makes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    remote, run = Remote(target.as_uri()), RunDir.named("demo", tmp_path / "home")
    monkeypatch.setattr(leases, "LEASE_SECONDS", -1.0)
    with hold(run, remote) as held:
        assert held is not None
        monkeypatch.setattr(held, "check", lambda: None)
        taken(remote, "another")
        being_copied = "demo/checkpoints/000002/step_000000001/weights"
        remote.objects.create(being_copied, b"half a checkpoint")
        save(run, 1, "late")
        with Mirror(run, held, 2, LOG):
            pass
    assert being_copied in remote.objects.keys("demo/checkpoints/000002/")


def test_what_a_killed_holder_left_half_written_goes(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    remote, run = Remote(target.as_uri()), RunDir.named("demo", tmp_path / "home")
    with hold(run, remote):
        pass
    half = target / "demo/checkpoints/000001/step_000000001/.tmp-0123"
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half a file")
    save(run, 2, "next")
    with hold(run, remote) as held:
        assert held is not None and held.claim.epoch == 2
        with Mirror(run, held, 2, LOG):
            pass
    assert remote_checkpoints(remote, "demo") == {2: "demo/checkpoints/000002/step_000000002"}
    assert not half.exists()


def test_what_was_copied_before_there_were_leases_counts_until_someone_else_copies(
    tmp_path: Path,
) -> None:
    target = tmp_path / "target"
    target.mkdir()
    remote, run = Remote(target.as_uri()), RunDir.named("demo", tmp_path / "home")
    save(run, 1, "first")
    old = "demo/checkpoints/step_000000001"
    remote.put(run.checkpoint(1), old)
    assert remote_checkpoints(remote, "demo") == {1: old}
    with hold(run, remote):
        assert remote_checkpoints(remote, "demo") == {1: old}
        remote.put(run.checkpoint(1), "demo/checkpoints/step_000000009")
        assert remote_checkpoints(remote, "demo") == {1: old}
    (claim,) = (json.loads(p.read_bytes()) for p in (target / "demo/lease").iterdir())
    assert claim["checkpoints"] == [old]


def test_claims_that_were_removed_by_hand_begin_no_epoch_again(tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    remote, run = Remote(target.as_uri()), RunDir.named("demo", tmp_path / "home")
    save(run, 1, "first")
    remote.put(run.checkpoint(1), "demo/checkpoints/000007/step_000000001")
    lease = taken(remote, "home")
    assert lease.claim.epoch == 8
    assert lease.claim.checkpoints == ("demo/checkpoints/000007/step_000000001",)
