"""One run of a name at a target at a time: a lease that runs out, fenced by its epoch.

    <url>/<name>/lease/000007-000012.json          who holds the name since when, until when
    <url>/<name>/checkpoints/000007/step_...       what it has copied

Whoever creates the next epoch's first object has the name; the server lets one win. To renew it is
to create the next object of the same epoch. Clocks decide when a lease may be taken over, and
nothing else: a holder that was asleep meanwhile writes below its own epoch, and a checkpoint counts
only where the newest epoch has made it, or has found it when it began. A result needs no fence: its
name is its content key. Nor does a promotion: its number is one.
"""

import json
import logging
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Annotated

from pydantic import Field, TypeAdapter

from ditty.errors import ArtifactDamaged, DittyError, RunBusy, cut
from ditty.runs.rundir import RunDir
from ditty.store.files import GLANCE_SECONDS, FileLock, make_dir, read_json, write_json
from ditty.store.remote import Remote

log = logging.getLogger(__name__)

_CLAIM = re.compile(r"(\d{6,})-(\d{6,})\.json")

LEASE_SECONDS = 60.0
RENEW_SECONDS = 15.0
LEAVING_SECONDS = 5.0  # to give it back; otherwise it runs out by itself


Seconds = Annotated[float, Field(ge=0, lt=1e11)]  # since 1970, for some thousand years


@dataclass(frozen=True)
class Claim:
    """What an object of a lease says.

    Attributes:
        epoch: from 1; one more each time that the name is taken.
        renewal: how often it was renewed.
        holder: id of the run directory; the processes that share it have a lock of their own.
        where: machine, process and directory, for people.
        since, until: seconds since 1970, by the holder's clock.
        checkpoints: committed names of the run at the target that counted when it began.
    """

    epoch: int
    renewal: int
    holder: str
    where: str
    since: Seconds
    until: Seconds
    checkpoints: tuple[str, ...]

    def counts(self, name: str) -> bool:
        """Whether a committed name below the run's checkpoints is one to resume from."""
        return name in self.checkpoints or epoch_of(name) == self.epoch


def epoch_of(name: str) -> int:
    """The epoch that has made a committed checkpoint; 0: a ditty that had no leases."""
    folder = name.split("/")[-2]
    return int(folder) if folder.isdecimal() else 0


class Lease:
    """A name that is held; `hold` makes one and renews it."""

    def __init__(self, remote: Remote, run_name: str, claim: Claim):
        self.remote, self.run_name, self.claim = remote, run_name, claim
        self.lost: RunBusy | None = None  # once it is, it stays so

    def check(self) -> None:
        """Ask the target whether the name is still ours: before anything is committed there.

        Raises:
            RunBusy: another run has taken it over.
            RemoteError: it cannot be asked.
        """
        there = claims(self.remote, self.run_name)
        if self.lost is None and there and max(there)[0] > self.claim.epoch:
            self.lost = _lost(self.remote, self.run_name)
        if self.lost is not None:
            raise self.lost

    def renew(self, seconds: float | None = None) -> None:
        """Have it for `seconds` more from now, by default LEASE_SECONDS; errors as `check`."""
        self.check()
        before = self.claim
        until = time.time() + (LEASE_SECONDS if seconds is None else seconds)
        self.claim = replace(before, renewal=before.renewal + 1, until=until)
        # One that is there is ours, after a lost reply: nobody else writes below this epoch.
        self.remote.objects.create(_key(self.run_name, self.claim), _bytes(self.claim))
        self.remote.objects.delete(_key(self.run_name, before))

    def checkpoint_name(self, name: str) -> str:
        """Where what this holder copies as the checkpoint `name` stands below the url."""
        return f"{self.run_name}/checkpoints/{self.claim.epoch:06d}/{name}"


@contextmanager
def hold(run: RunDir, remote: Remote) -> Iterator[Lease | None]:
    """Hold the name of `run` at `remote` for the block, and renew it meanwhile.

    Yields:
        None where another process holds it for the same run directory: it copies what there is.
    Raises:
        RunBusy: a run elsewhere holds it.
        RemoteError: the target cannot be asked.
    """
    make_dir(run.root)
    lock = FileLock(run.lease_lock)
    if not lock.acquire(GLANCE_SECONDS):
        yield None
        return
    try:
        lease = take(remote, run.root.name, _holder(run), str(run.root))
        done = threading.Event()
        thread = threading.Thread(target=_keep, args=(lease, done), name="ditty lease", daemon=True)
        thread.start()
        try:
            yield lease
        finally:
            done.set()
            thread.join(LEAVING_SECONDS)
    finally:
        lock.release()


def take(remote: Remote, run_name: str, holder: str, directory: str) -> Lease:
    """Hold a name from now on; the caller has the lock of `holder`, so that one is dead if named.

    Raises:
        RunBusy, RemoteError: see `hold`.
    """
    before, now = newest(remote, run_name), time.time()
    if before is not None and before.holder != holder and now < before.until:
        raise _busy(remote, run_name, before)
    there = counting(remote, run_name, None)
    # Those of the checkpoints too: the claims may have been removed by hand.
    used = [before.epoch if before else 0, *map(epoch_of, there)]
    claim = Claim(
        epoch=max(used) + 1,
        renewal=0,
        holder=holder,
        where=f"{socket.gethostname()} (process {os.getpid()}, {directory})",
        since=now,
        until=now + LEASE_SECONDS,
        checkpoints=tuple(name for name in there if before is None or before.counts(name)),
    )
    key, data = _key(run_name, claim), _bytes(claim)
    # "There is one already" may be ours, after a lost reply: only reading it back tells.
    if not remote.objects.create(key, data) and remote.objects.read(key) != data:
        winner = newest(remote, run_name)
        assert winner is not None, f"{key} is there"
        raise _busy(remote, run_name, winner)
    for (epoch, _), older in claims(remote, run_name).items():
        if epoch < claim.epoch:
            remote.objects.delete(older)
    return Lease(remote, run_name, claim)


def newest(remote: Remote, run_name: str) -> Claim | None:
    """The claim of the newest epoch; None: nobody has ever held the name.

    Raises:
        ArtifactDamaged: it cannot be read.
    """
    while there := claims(remote, run_name):
        key = there[max(there)]
        data = remote.objects.read(key)
        if data is None:  # the next one has taken its place meanwhile
            continue
        try:
            claim = TypeAdapter(Claim).validate_json(data)
            if (claim.epoch, claim.renewal) != max(there):
                raise ValueError(f"it speaks of {claim.epoch}-{claim.renewal}")
            return claim
        except ValueError as error:
            raise ArtifactDamaged(
                f"{remote.url}/{key} is no lease of ditty's: {error}. If no run of this name is "
                "alive, remove it"
            ) from error
    return None


def claims(remote: Remote, run_name: str) -> dict[tuple[int, int], str]:
    """Keys of all objects of a name's leases, by (epoch, renewal)."""
    prefix = f"{run_name}/lease/"
    keys = remote.objects.keys(prefix)
    found = ((_CLAIM.fullmatch(key.removeprefix(prefix)), key) for key in keys)
    return {(int(match[1]), int(match[2])): key for match, key in found if match}


def counting(remote: Remote, run_name: str, claim: Claim | None) -> list[str]:
    """Committed checkpoints of a run at the target that count under its newest claim, sorted.

    None: under no claim, that is all of them.
    """
    names = remote.names(f"{run_name}/checkpoints")
    return [name for name in names if claim is None or claim.counts(name)]


def _keep(lease: Lease, done: threading.Event) -> None:
    while not done.wait(RENEW_SECONDS):
        try:
            lease.renew()
        except RunBusy as error:
            log.error("%s", error)
            return
        except (DittyError, OSError) as error:  # nobody else may have taken it: tried again
            log.warning("the lease of %s was not renewed: %s", lease.run_name, error)
    # The next one need not wait. The object stays, so that no epoch is ever used again.
    try:
        lease.renew(seconds=0.0)
    except (DittyError, OSError) as error:
        log.warning("the lease of %s runs out by itself: %s", lease.run_name, error)


def _holder(run: RunDir) -> str:
    """The id of a run directory; the caller holds its lock."""
    known = read_json(run.lease_file)
    if known is None:
        known = {"holder": uuid.uuid4().hex}
        write_json(run.lease_file, known)
    return str(known["holder"])


def _key(run_name: str, claim: Claim) -> str:
    return f"{run_name}/lease/{claim.epoch:06d}-{claim.renewal:06d}.json"


def _bytes(claim: Claim) -> bytes:
    return json.dumps(asdict(claim), indent=2, sort_keys=True).encode()


def _busy(remote: Remote, run_name: str, claim: Claim) -> RunBusy:
    since, until = _utc(claim.since), _utc(claim.until)
    return RunBusy(
        f"run {run_name} at {remote.url} is held by {cut(claim.where, 300)} since {since}, until "
        f"{until} unless it renews that, which it does while it is alive. Stop it, choose another "
        "name, or run this again after that time to go on from its checkpoints"
    )


def _lost(remote: Remote, run_name: str) -> RunBusy:
    claim = newest(remote, run_name)
    assert claim is not None, "there is a newer epoch"
    where, since = cut(claim.where, 300), _utc(claim.since)
    return RunBusy(
        f"run {run_name} at {remote.url} was taken over by {where} at {since}, since its lease was "
        "not renewed from here in time (was this machine asleep, or cut off?). What is trained "
        "here since then counts nowhere: leave it to that run, or stop that one and run this again"
    )


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
