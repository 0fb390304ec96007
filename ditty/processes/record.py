"""The record of a launch: what was started, of which versions. Without torch."""

import importlib.metadata
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ditty.config.launchspec import LaunchSpec
from ditty.processes.environment import resolve_device
from ditty.store.files import write_json

RECORDED_PACKAGES = ("ditty", "torch", "transformers", "accelerate", "peft", "bitsandbytes")


def write_record(
    attempt: Path, argv: Sequence[str], env: Mapping[str, str], launch: LaunchSpec, rank: int = 0
) -> None:
    """Write `launch.json` into `attempt`: names of environment variables, never their values.

    Args:
        argv, env: of what was started.
        rank: the machine's among those of the launch.
    """
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in RECORDED_PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    threads = env.get("OMP_NUM_THREADS")
    record = {
        "argv": list(argv),
        "device": resolve_device(launch),
        "num_processes": launch.num_processes,
        "num_machines": launch.num_machines,
        "machine_rank": rank,
        "threads": int(threads) if threads else launch.threads,
        "environment": sorted(env),
        "versions": versions,
        "git_commit": _git_commit(),
    }
    write_json(attempt / "launch.json", record)


def _git_commit() -> str | None:
    """The commit checked out in the current directory; None where there is no repository or git."""
    git = shutil.which("git")
    if git is None:
        return None
    try:
        answer = subprocess.run(
            [git, "rev-parse", "HEAD"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()
