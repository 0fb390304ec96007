"""Fixtures for all tests: temporary homes always, one Prefect server a session on demand."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """Point Prefect and ditty away from the user's homes before anything imports them."""
    config.ditty_home = Path(tempfile.mkdtemp(prefix="ditty-tests-"))  # type: ignore[attr-defined]
    os.environ["DITTY_HOME"] = str(config.ditty_home / "ditty")  # type: ignore[attr-defined]
    os.environ["PREFECT_HOME"] = str(config.ditty_home / "prefect")  # type: ignore[attr-defined]
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    # Nobody looks for block types in the UI of a test: 3 of 8 seconds of the server's start.
    os.environ["PREFECT_API_BLOCKS_REGISTER_ON_START"] = "false"
    os.environ["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] = "120"
    os.environ.pop("PREFECT_API_URL", None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove them."""
    shutil.rmtree(config.ditty_home, ignore_errors=True)  # type: ignore[attr-defined]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DITTY_HOME of the test's own."""
    monkeypatch.setenv("DITTY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """A Prefect server with an empty database; its API url, for processes that a test starts."""
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield PREFECT_API_URL.value()
