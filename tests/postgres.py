"""A PostgreSQL of a test's own, from Debian's packages."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.served import free_port


def binaries() -> Path:
    """Where initdb and pg_ctl are; skips the test where there is no PostgreSQL."""
    found = shutil.which("initdb")
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if found:
        return Path(found).parent
    if not places:
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    return places[-1]


@contextmanager
def postgres() -> Iterator[str]:
    """A server with an empty database; its url for Prefect."""
    place, port = binaries(), free_port()
    # It refuses to run as root, and must own its folder.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="ditty-postgres-"))
    if user:
        shutil.chown(folder, user)

    def call(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(place / program), *arguments],
            user=user,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=(log := (Path(tempfile.gettempdir()) / f"{folder.name}.log").open("ab")),
            stderr=subprocess.STDOUT,
        )
        log.close()
        assert done.returncode == 0, Path(log.name).read_text()[-3000:]

    data = str(folder / "data")
    try:
        call("initdb", "-D", data, "-U", "ditty", "--auth=trust", "--no-sync")
        options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        call("pg_ctl", "-D", data, "-w", "-o", options, "start")
        try:
            yield f"postgresql+asyncpg://ditty@127.0.0.1:{port}/postgres"
        finally:
            call("pg_ctl", "-D", data, "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        Path(tempfile.gettempdir(), f"{folder.name}.log").unlink(missing_ok=True)
