"""The guard as a process: signals and pipes from outside, and pids looked up by psutil."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

WAIT_SECONDS = 60.0  # until we call a process stuck; nothing here takes so long


def wait_for(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < end, f"waited {WAIT_SECONDS:g} s for {what}"
        time.sleep(0.02)


def gone(process: psutil.Process) -> bool:
    """Ended; where nobody reaps orphans (pid 1 of some containers) a zombie may stay."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Guarded:
    """A script below a guard. Scripts get `note(name)`, which leaves their pid in a file."""

    PRELUDE = """
        import os, signal, subprocess, sys, time
        HERE = os.path.dirname(os.path.abspath(__file__))
        def note(name, text=""):
            with open(os.path.join(HERE, name + ".part"), "w") as file:
                file.write(text or str(os.getpid()))
            os.rename(os.path.join(HERE, name + ".part"), os.path.join(HERE, name))
        def daemon(main):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    main()
                os._exit(0)
            os.wait()
        def deaf(name):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            note(name)
            time.sleep(600)
        """

    def __init__(self, folder: Path):
        self.folder = folder
        self.guard: subprocess.Popen[bytes] | None = None
        self.writer: int | None = None
        self.seen: list[psutil.Process] = []

    def start(self, script: str, grace: float) -> "Guarded":
        path = self.folder / "script.py"
        path.write_text(textwrap.dedent(self.PRELUDE) + textwrap.dedent(script))
        return self.start_command([sys.executable, str(path)], grace)

    def start_command(self, command: list[str], grace: float) -> "Guarded":
        reader, self.writer = os.pipe()
        self.guard = subprocess.Popen(
            [sys.executable, "-m", "ditty.processes.guard", str(reader), str(grace), *command],
            pass_fds=(reader,),
            stdin=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(reader)
        return self

    def noted(self, name: str) -> psutil.Process:
        """The process that called note(name), once it has."""
        wait_for((self.folder / name).exists, name)
        self.seen.append(psutil.Process(int((self.folder / name).read_text())))
        return self.seen[-1]

    def code(self) -> int:
        assert self.guard is not None
        return self.guard.wait(WAIT_SECONDS)

    def close(self) -> None:
        assert self.writer is not None
        os.close(self.writer)
        self.writer = None

    def clean_up(self) -> None:
        for process in self.seen:
            if not gone(process):
                process.kill()
        if self.guard is not None:
            self.guard.kill()
            self.guard.wait()
        if self.writer is not None:
            self.close()


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    guarded = Guarded(tmp_path)
    yield guarded
    guarded.clean_up()


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("pass", 0),
        ("sys.exit(7)", 7),
        ("os.kill(os.getpid(), signal.SIGKILL)", 128 + 9),
        ("os.kill(os.getpid(), signal.SIGTERM)", 128 + 15),
    ],
)
def test_exit_code_is_the_commands(guarded: Guarded, script: str, code: int) -> None:
    assert guarded.start(script, grace=1).code() == code


def test_command_that_cannot_start(guarded: Guarded, tmp_path: Path) -> None:
    assert guarded.start_command([str(tmp_path / "nothing")], grace=1).code() == 127


def test_a_child_that_saves_is_told_once_and_given_the_time(guarded: Guarded) -> None:
    guarded.start(
        """
        told = []
        signal.signal(signal.SIGTERM, lambda *_: told.append(1))
        note("ready")
        while not told:
            time.sleep(0.01)
        note("saving")
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            time.sleep(0.01)
        note("saved", str(len(told)))
        """,
        grace=WAIT_SECONDS,
    )
    child = guarded.noted("ready")
    assert guarded.guard is not None
    guarded.guard.send_signal(signal.SIGTERM)
    guarded.noted("saving")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
        guarded.guard.send_signal(number)
        time.sleep(0.05)
    assert guarded.code() == 0
    assert (guarded.folder / "saved").read_text() == "1"
    assert not child.is_running()


def test_a_deaf_child_is_killed_after_the_grace(guarded: Guarded) -> None:
    child = guarded.start("deaf('ready')", grace=1).noted("ready")
    assert guarded.guard is not None
    guarded.guard.terminate()
    assert guarded.code() == 128 + 9
    assert not child.is_running()


@pytest.mark.parametrize("how", ["it ends", "it is killed", "it is stopped", "its parent is gone"])
def test_orphans_end_with_the_command(guarded: Guarded, how: str) -> None:
    guarded.start(
        """
        daemon(lambda: deaf("orphan"))
        note("ready")
        while not os.path.exists(os.path.join(HERE, "go")):
            time.sleep(0.01)
        sys.exit(3)
        """,
        grace=0.5,
    )
    orphan, child = guarded.noted("orphan"), guarded.noted("ready")
    assert guarded.guard is not None
    assert os.getsid(orphan.pid) != os.getsid(child.pid)
    if how == "it ends":
        (guarded.folder / "go").touch()
    elif how == "it is killed":
        child.kill()
    elif how == "it is stopped":
        guarded.guard.terminate()
    else:
        guarded.close()
    codes = {"it ends": 3, "it is killed": 128 + 9}
    assert guarded.code() == codes.get(how, 128 + 15)
    assert not orphan.is_running()
    assert not child.is_running()


def test_adopted_orphans_are_reaped_while_the_command_runs(guarded: Guarded) -> None:
    guarded.start("[daemon(lambda: None) for _ in range(5)]\nnote('ready')\ntime.sleep(600)", 1)
    child = guarded.noted("ready")
    assert guarded.guard is not None
    guard = psutil.Process(guarded.guard.pid)
    wait_for(lambda: [p.pid for p in guard.children()] == [child.pid], "the zombies to go")


def test_the_command_is_told_when_the_guard_is_killed(guarded: Guarded) -> None:
    guarded.start(
        """
        signal.signal(signal.SIGTERM, lambda *_: (note("told"), os._exit(0)))
        note("ready")
        time.sleep(600)
        """,
        grace=1,
    )
    child = guarded.noted("ready")
    assert guarded.guard is not None
    guarded.guard.kill()
    wait_for((guarded.folder / "told").exists, "SIGTERM from the kernel")
    wait_for(lambda: gone(child), "the command to end")
