"""Fixtures for all tests: temporary homes always, one Prefect server a session on demand."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import reliability


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--figures FILE`: see tests/reliability.py."""
    parser.addoption("--figures", type=Path, help="append the figures of the fault matrix to it")


def pytest_configure(config: pytest.Config) -> None:
    """Point Prefect and ditty away from the user's homes before anything imports them."""
    config.ditty_home = Path(tempfile.mkdtemp(prefix="ditty-tests-"))  # type: ignore[attr-defined]
    os.environ["DITTY_HOME"] = str(config.ditty_home / "ditty")  # type: ignore[attr-defined]
    os.environ["PREFECT_HOME"] = str(config.ditty_home / "prefect")  # type: ignore[attr-defined]
    os.environ["DO_NOT_TRACK"] = "1"
    # Tiny models: a second thread costs more in waiting than it computes, here and in all below.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW"] = "ignore"
    os.environ.pop("PREFECT_API_URL", None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove them."""
    shutil.rmtree(config.ditty_home, ignore_errors=True)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: Any
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Leave what a test of the fault matrix has said."""
    report = yield
    if call.when == "call" and item.config.option.figures:
        reliability.note(item, report, item.config.option.figures)
    return report


@pytest.fixture
def figure(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Says the figure of a test that has the mark `fault`: `figure(text)`, or `figure(text, row)`
    where it has several."""
    return lambda text, row="": record_property(f"figure {row}".rstrip(), text)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DITTY_HOME of the test's own."""
    monkeypatch.setenv("DITTY_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="session")
def prefect_api() -> Iterator[str]:
    """A Prefect server with an empty database; its API url, for processes that a test starts.

    It is the one of `ditty run`, so that a killed pytest leaves none behind.
    """
    from flows.serving.server import is_healthy, local_server

    with local_server() as url:
        yield url
    end = time.monotonic() + 20
    while is_healthy(url):
        assert time.monotonic() < end, f"{url} outlives its last user"
        time.sleep(0.1)


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that this process launches run in forks of one that has imported torch."""
    from tests import warm

    warm.instead_of_launching(monkeypatch)
