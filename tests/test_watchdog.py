"""The watchdog keeps its command for as long as somebody holds the users' lock, and no longer."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parent.parent


def running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def wait_until_gone(pid: int) -> None:
    while running(pid):
        time.sleep(0.05)


class Kept:
    """A watchdog and its command, which writes its pid."""

    def __init__(self, place: Path):
        self.place = place
        self.user = open(place / "users.lock", "ab")  # noqa: SIM115
        fcntl.flock(self.user, fcntl.LOCK_SH)
        code = f"import os, time; open({str(place / 'pid')!r}, 'w').write(str(os.getpid()))"
        command = [sys.executable, "-c", f"{code}; time.sleep(600)"]
        (place / "server.json").write_text(json.dumps({"url": "http://127.0.0.1:1/api"}))
        self.watchdog = subprocess.Popen(
            [sys.executable, "-m", "flows.serving.watchdog", str(place), *command], cwd=ROOT
        )
        while not (place / "pid").exists() or not (place / "pid").read_text():
            time.sleep(0.05)
        self.pid = int((place / "pid").read_text())


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Kept]:
    kept = Kept(tmp_path)
    yield kept
    for pid in (kept.watchdog.pid, kept.pid):
        if running(pid):
            os.kill(pid, signal.SIGKILL)
    kept.watchdog.wait()


def test_ends_with_its_last_user_however_that_one_ends(kept: Kept) -> None:
    # A second user, who is killed: the kernel gives its lock back.
    code = "import fcntl, sys, time; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_SH); "
    code += "print('held', flush=True); time.sleep(600)"
    users = str(kept.place / "users.lock")
    command = [sys.executable, "-c", code.replace("open(", "f := open("), users]
    second = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert second.stdout and second.stdout.readline() == b"held\n"
    kept.user.close()
    time.sleep(1.2)  # two polls of the watchdog
    assert running(kept.pid), "the second user is still there"
    second.kill()
    second.communicate()
    assert kept.watchdog.wait() == 0
    assert not running(kept.pid)
    assert not (kept.place / "server.json").exists()


def test_a_killed_watchdog_takes_its_command_along(kept: Kept) -> None:
    kept.watchdog.kill()
    wait_until_gone(kept.pid)


def test_exit_code_of_a_command_that_ends_by_itself(tmp_path: Path) -> None:
    with open(tmp_path / "users.lock", "ab") as user:
        fcntl.flock(user, fcntl.LOCK_SH)
        command = [sys.executable, "-c", "raise SystemExit(3)"]
        arguments = [sys.executable, "-m", "flows.serving.watchdog", str(tmp_path), *command]
        assert subprocess.run(arguments, cwd=ROOT).returncode == 3
