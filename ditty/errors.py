"""Every error that ditty raises on purpose.

    DittyError
    ├── SpecError            a key of the spec is wrong, or two keys do not go together
    ├── DataError            a source, column, row or template cannot be used
    │   └── RowError         one row cannot be used; the others may
    ├── ModelError           a base model is unknown, unreadable or does not fit the spec
    ├── StoreError           DITTY_HOME cannot be written, or the disk is full
    │   └── ArtifactDamaged  a committed directory no longer matches its manifest
    ├── RemoteError          an upload target, the hub or a cluster does not answer (retryable)
    │   └── RemoteDenied     it answered, and refused the credentials (not retryable)
    └── RunError             a run cannot start, or ended early
        ├── RunMismatch      the run directory belongs to another spec
        ├── RunBusy          another process holds the run (retryable)
        ├── Preempted        it was asked to stop and saved (retryable)
        ├── Cancelled        somebody cancelled it, or its job: not tried again
        ├── Crashed          a process vanished without a word (retryable)
        ├── GateFailed       the result is not what the spec requires of it
        └── OutOfMemory      it did not fit; an identical attempt would not either

A user's mistake is one of these and is printed without a traceback. Anything else is our bug.
"""

import os
import re
import sys

LESS_MEMORY = (
    "lower train.micro_batch_size or data.seq_len, or set train.activation_checkpointing: all"
)
"""What to do when a GPU's memory is not enough."""

# Variables whose values are not to be told.
CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
    "WANDB_API_KEY",
)


EXTRAS = {
    "dask": "prefect-dask>=0.3.7,<0.4",
    "eval": "lm_eval>=0.4.13,<0.5",
    "mlflow": "mlflow>=3,<4",
    "ray": "prefect-ray>=0.6,<0.7",
    "tensorboard": "tensorboard>=2.20,<3",
    "trackio": "trackio>=0.40,<0.44",
    "wandb": "wandb>=0.25,<1",
}
"""What pyproject.toml's extras of these names install."""


def install(extra: str) -> str:
    """How to install what a key needs: not `ditty[extra]`, as PyPI's ditty is another project."""
    return f"pip install '{EXTRAS[extra]}' into {sys.prefix}"


class DittyError(Exception):
    """Root of all ditty errors. `retryable`: could an identical attempt succeed?"""

    retryable = False


class SpecError(DittyError):
    """A key of the spec is wrong, or two keys do not go together."""


class DataError(DittyError):
    """A source, column, row or template cannot be used."""


class RowError(DataError):
    """One row cannot be used; the others may.

    Attributes:
        row: its number.
        reason: in words that many rows share.
        detail: what is particular to this row.
    """

    def __init__(self, row: int, reason: str, detail: str):
        super().__init__(f"row {row}: {reason}: {detail}")
        self.row, self.reason, self.detail = row, reason, detail

    def __reduce__(self) -> tuple[type["RowError"], tuple[int, str, str]]:
        """As it comes back from another process; by itself an exception gives its message only."""
        return RowError, (self.row, self.reason, self.detail)


class ModelError(DittyError):
    """A base model is unknown, unreadable or does not fit the spec."""


class StoreError(DittyError):
    """DITTY_HOME cannot be written, or the disk is full."""


class ArtifactDamaged(StoreError):
    """A committed directory no longer matches its manifest."""


class RemoteError(DittyError):
    """An upload target, the hub or a cluster cannot be reached."""

    retryable = True


class RemoteDenied(RemoteError):
    """The upload target answered and refused the credentials."""

    retryable = False


class RunError(DittyError):
    """A run cannot start, or ended early."""


class RunMismatch(RunError):
    """The run directory belongs to another spec."""


class RunBusy(RunError):
    """Another process holds the run."""

    retryable = True


class Preempted(RunError):
    """The run was asked to stop and saved a checkpoint first."""

    retryable = True


class Cancelled(RunError):
    """Somebody cancelled the run, or the job that its processes were (`scancel`)."""


class Crashed(RunError):
    """A process, of a training or a worker of the shards, vanished without a result."""

    retryable = True


class GateFailed(RunError):
    """A result does not measure what the spec requires (`evaluate.require`): not uploaded."""


class OutOfMemory(RunError):
    """The run did not fit in memory; an identical attempt would not either."""


def shown(value: object) -> str:
    """A value as a message tells it: its type and its beginning."""
    return f"{type(value).__name__} {cut(repr(value), 40)}"


def cut(text: str, longest: int) -> str:
    """At most so many characters; where some are left out it ends in three dots."""
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def scrub(text: str) -> str:
    """`text` without URL passwords and without the values of credential variables.

    Values of less than 16 characters are told: they may be part of any word.
    """
    text = re.sub(r"//[^/\s]+@", "//***@", text)  # up to the last @: a password may have one
    for name in CREDENTIALS:
        value = os.environ.get(name, "")
        if len(value) >= 16:
            text = text.replace(value, "***")
    return text
