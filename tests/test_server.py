"""One server for all runs of a machine, none where the user has one, and a reason if it fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_HOME, temporary_settings

from ditty.errors import RunError
from ditty.store.files import write_json
from flows.serving import server
from flows.serving.server import local_server


def test_another_process_shares_the_server(prefect_api: str) -> None:
    # The fixture checks at the end of the session that the server ends with its last user.
    code = "from flows.serving.server import local_server\nwith local_server() as url: print(url)"
    root = Path(__file__).parent.parent
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True, check=True
    )
    assert answer.stdout.strip() == prefect_api
    assert server.is_healthy(prefect_api), "the first user is still there"


def test_the_users_own_server_is_used(tmp_path: Path) -> None:
    own = "http://127.0.0.1:1/api"
    with temporary_settings({PREFECT_API_URL: own, PREFECT_HOME: tmp_path / "prefect"}):
        with local_server() as url:
            assert url == own
        assert not (tmp_path / "prefect" / "ditty-server").exists()


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such table\nexit 3\n")
    broken.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(broken))
    write_json(tmp_path / "server.json", {"url": "http://127.0.0.1:1/api"})  # of a dead one
    place = tmp_path / "ditty-server"
    place.mkdir()
    os.replace(tmp_path / "server.json", place / "server.json")
    with (
        temporary_settings({PREFECT_HOME: tmp_path}, restore_defaults={PREFECT_API_URL}),
        pytest.raises(RunError, match="ended with 3.*\n  no such table"),
        local_server(),
    ):
        pass
