"""One training at a time: a slot of a concurrency limit of Prefect's server."""

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

import httpx
from prefect.client.orchestration import get_client
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger

from ditty.config.choices import Where
from ditty.config.launchspec import LaunchSpec
from ditty.errors import RunError
from flows.cancel import CancelWatch

LIMIT_VARIABLE = "DITTY_TRAINING_LIMIT"
SLOT_SECONDS = 2.0
LEASE_SECONDS = 60.0  # Prefect's minimum: when its holder was killed, a slot is free after that


@contextmanager
def training_slot(launch: LaunchSpec) -> Iterator[None]:
    """Hold a slot of the server's limit that DITTY_TRAINING_LIMIT names; none where it is not set.

    A deployment sets it (deployments/prefect.yaml), so that one training at a time has the GPUs.
    Those of a cluster are its own queue's to share out.

    Raises:
        RunError: the server has no such limit.
    """
    name = os.environ.get(LIMIT_VARIABLE)
    if not name or launch.backend is not Where.LOCAL:
        yield
        return
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound as error:
            raise RunError(
                f"{LIMIT_VARIABLE}={name}, and this Prefect server has no such concurrency limit: "
                "`ditty deploy` makes it"
            ) from error
    get_run_logger().info("waiting for a slot of %s", name)
    with ExitStack() as stack:
        _take_slot(name, stack)
        yield


def _take_slot(name: str, stack: ExitStack) -> None:
    """Wait for a slot, and hold it until `stack` ends.

    We ask again and again. Prefect would wait by itself, in a thread that a SIGTERM does not end:
    a cancelled run would stay for 30 s, until its runner kills it (measured).
    """
    cancel = CancelWatch()
    while True:
        # A slot whose lease cannot be renewed is no reason to throw away a training.
        slot = concurrency(
            name,
            strict=True,
            max_retries=0,
            lease_duration=LEASE_SECONDS,
            raise_on_lease_renewal_failure=False,
        )
        try:
            stack.enter_context(slot)
            return
        except ConcurrencySlotAcquisitionError as error:
            if not _passes(error.__cause__):
                raise
        with suppress(httpx.TransportError):
            cancel.check()
        time.sleep(SLOT_SECONDS)


def _passes(cause: BaseException | None) -> bool:
    """Whether a slot may be had later: all are taken, or the server is away."""
    if isinstance(cause, httpx.HTTPStatusError):
        return cause.response.status_code == httpx.codes.LOCKED
    return isinstance(cause, httpx.TransportError)
