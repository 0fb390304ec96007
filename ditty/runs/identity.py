"""What a checkpoint is of: all that decides the trained weights, compared key by key."""

from collections.abc import Iterator
from typing import Any

from ditty.errors import RunMismatch

GUARD_KEYS = ("on_non_finite", "on_spike", "spike_threshold", "spike_window")
"""Keys of `train` that decide the weights only where a step was out of the ordinary: a checkpoint
says itself whether one was (ditty.runs.anomaly), so they may differ here."""


def check_identity(expected: dict[str, Any], got: Any, where: str) -> None:
    """Raise RunMismatch naming each key in which two identities differ.

    `got` comes from a manifest, which may say anything.
    """
    if not isinstance(got, dict):
        raise RunMismatch(f"{where} has {got!r} where its identity should be: remove it")
    found = list(differences(_without_guard(expected), _without_guard(got)))
    if found:
        raise RunMismatch(
            f"{where} belongs to another spec: {'; '.join(found)}. "
            "Choose another name for this run, or take the change back"
        )


def _without_guard(identity: dict[str, Any]) -> dict[str, Any]:
    train = identity.get("train")
    if not isinstance(train, dict):
        return identity
    return identity | {"train": {k: v for k, v in train.items() if k not in GUARD_KEYS}}


def differences(expected: Any, got: Any, prefix: str = "") -> Iterator[str]:
    """`a.b was 1, now 2` for each key, sections within sections."""
    for key in sorted(set(expected) | set(got)):
        old, new = got.get(key), expected.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(new, old, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old!r}, now {new!r}"
