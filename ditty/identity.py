"""What a checkpoint is of: all that decides the trained weights, compared key by key."""

from collections.abc import Iterator
from typing import Any

from ditty.errors import RunMismatch


def check_identity(expected: dict[str, Any], got: Any, where: str) -> None:
    """Raise RunMismatch naming each key in which two identities differ.

    `got` comes from a manifest, which may say anything.
    """
    if not isinstance(got, dict):
        raise RunMismatch(f"{where} has {got!r} where its identity should be: remove it")
    found = list(differences(expected, got))
    if found:
        raise RunMismatch(
            f"{where} belongs to another spec: {'; '.join(found)}. "
            "Choose another name for this run, or take the change back"
        )


def differences(expected: Any, got: Any, prefix: str = "") -> Iterator[str]:
    """`a.b was 1, now 2` for each key, sections within sections."""
    for key in sorted(set(expected) | set(got)):
        old, new = got.get(key), expected.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            yield from differences(new, old, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {old!r}, now {new!r}"
