"""A command below a guard: its output, its end, and that nothing of it is left."""

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from ditty.config.choices import Device
from ditty.config.launchspec import LaunchSpec
from ditty.processes.environment import child_environment
from ditty.processes.launch import follow
from ditty.processes.local import guarded
from ditty.runs.tail import LineTail

WAIT_SECONDS = 120.0  # until we call a process stuck
CPU = LaunchSpec(device=Device.CPU, threads=1)

# Two children in sessions of their own, as torchrun's ranks are: one saves on SIGTERM, one is deaf.
TREE = """
    import os, signal, subprocess, sys, time
    def note(name):
        with open(name + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.rename(name + ".part", name)
    def save(*_):
        print("saving")
        time.sleep(0.1)
        note("saved")
        print("saved")
        os._exit(0)
    role = sys.argv[1]
    if role == "parent":
        for child in ("good", "deaf"):
            subprocess.Popen([sys.executable, __file__, child], start_new_session=True)
    signal.signal(signal.SIGTERM, {"good": save, "deaf": signal.SIG_IGN}.get(role, signal.SIG_DFL))
    note(role)
    time.sleep(600)
"""
ROLES = ("parent", "good", "deaf")


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


class Files:
    """Scripts in the current directory, and the processes that left their pid in a file there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.seen: list[psutil.Process] = []

    def script(self, name: str, text: str) -> list[str]:
        path = self.folder / name
        path.write_text(textwrap.dedent(text))
        return [sys.executable, str(path)]

    def there(self, *names: str) -> bool:
        return all((self.folder / name).exists() for name in names)

    def processes(self, *names: str) -> list[psutil.Process]:
        wait_for(lambda: self.there(*names), str(names))
        found = [psutil.Process(int((self.folder / name).read_text())) for name in names]
        self.seen += found
        return found


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Files]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    files = Files(tmp_path)
    yield files
    for process in files.seen:
        if not gone(process):
            process.kill()


def run(
    command: list[str],
    log_path: Path,
    *,
    grace: float = 20.0,
    env: dict[str, str] | None = None,
    on_line: Callable[[str], None] = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> str:
    """As the backend `local` runs a command; how it ended."""
    env = env or child_environment(CPU)
    with (
        open(log_path, "ab") as output,
        LineTail(log_path, at_end=True) as tail,
        guarded(command, output=output, env=env, grace=grace) as processes,
    ):
        return follow(processes, tail, on_line, check).how


class Stop(BaseException):
    """What Prefect raises on SIGTERM is no Exception either."""


def test_lines_arrive_complete_and_in_order(files: Files) -> None:
    command = files.script(
        "talk.py",
        """
        import sys, time
        def put(data):
            sys.stdout.buffer.write(data)
            sys.stdout.buffer.flush()
        for i in range(3000):
            print("line", i)
        euro = "\\u20ac".encode()
        put(b"half "); time.sleep(0.5); put(b"a line " + euro[:1]); time.sleep(0.5); put(euro[1:])
        put(b"\\r\\n")
        print("to stderr", file=sys.stderr)
        for percent in range(0, 101, 25):
            put(b"\\r%d%%" % percent); time.sleep(0.1)
        put(b"\\nbad \\xff\\n\\nthe end")
        """,
    )
    log_path = files.folder / "log.txt"
    log_path.write_text("of an earlier run\n")
    lines: list[str] = []
    assert run(command, log_path, on_line=lines.append) == "exit code 0"
    assert lines == [
        *(f"line {i}" for i in range(3000)),
        *("half a line \u20ac", "to stderr", "100%", "bad \ufffd", "", "the end"),
    ]
    assert log_path.read_bytes().startswith(b"of an earlier run\nline 0\n")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("pass", "0"),
        ("raise SystemExit(7)", "7"),
        ("import os; os.kill(os.getpid(), 9)", "137 (SIGKILL)"),
    ],
)
def test_exit_codes(text: str, code: str, files: Files) -> None:
    assert run(files.script("end.py", text), files.folder / "log.txt") == f"exit code {code}"


def test_a_command_that_cannot_start_says_so_in_the_log(files: Files) -> None:
    lines: list[str] = []
    assert (
        run([str(files.folder / "none")], files.folder / "log.txt", on_line=lines.append)
        == "exit code 127"
    )
    assert "cannot start" in lines[-1]


@pytest.mark.parametrize("where", ["check", "on_line"])
def test_an_exception_stops_the_tree_and_passes(where: str, files: Files) -> None:
    command = [*files.script("tree.py", TREE), "parent"]
    found: list[psutil.Process] = []
    lines: list[str] = []

    def stop_when_ready(*_: str) -> None:
        if not found:
            if not files.there(*ROLES):
                return
            found.extend(files.processes(*ROLES))
            if where == "on_line":
                (files.folder / "log.txt").open("a").write("a line\n")
                return
            raise Stop

    def on_line(line: str) -> None:
        lines.append(line)
        if line == "a line":
            raise Stop

    with pytest.raises(Stop):
        run(command, files.folder / "log.txt", grace=2.0, on_line=on_line, check=stop_when_ready)
    assert len(found) == 3
    assert [p for p in found if p.is_running()] == []
    assert files.there("saved")
    # What was printed while it was stopped has arrived too.
    assert lines[-2:] == ["saving", "saved"]


def test_a_second_exception_leaves_at_once_and_nothing_behind(files: Files) -> None:
    command = [*files.script("tree.py", TREE), "parent"]
    raised: list[int] = []

    def interrupt(*_: object) -> None:
        if files.there(*ROLES) and len(raised) < 2:
            if not raised:
                files.processes(*ROLES)
            raised.append(1)
            raise Stop

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.3)
    try:
        with pytest.raises(Stop):
            run(command, files.folder / "log.txt", grace=2.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert len(raised) == 2, "the second came while the first was dealt with"
    wait_for(lambda: all(gone(p) for p in files.seen), "the tree to end")
    assert files.there("saved")


LAUNCHER = """
    import os, sys, time
    from pathlib import Path
    from ditty.processes.launch import follow
    from ditty.processes.local import guarded
    from ditty.runs.tail import LineTail
    how = sys.argv[1]
    def check():
        if how == "fork" and not os.path.exists("fork") and os.fork() == 0:
            Path("fork.part").write_text(str(os.getpid()))
            os.rename("fork.part", "fork")
            time.sleep(600)
            os._exit(0)
    if how == "closed":
        for fd in (0, 1, 2):
            os.close(fd)
    with (
        open("log.txt", "ab") as output,
        LineTail(Path("log.txt"), at_end=True) as tail,
        guarded(sys.argv[2:], output=output, env=dict(os.environ), grace=1.5) as processes,
    ):
        ended = follow(processes, tail, lambda line: None, check)
    Path("code").write_text(ended.how)
"""


@pytest.mark.fault("flow killed")
@pytest.mark.parametrize("how", ["plain", "fork"])
def test_sigkill_of_the_launching_process_leaves_nothing(
    how: str, files: Files, figure: Callable[[str], None]
) -> None:
    """`fork`: a forked child of it still holds the pipe whose end would tell the guard."""
    command = [*files.script("launcher.py", LAUNCHER), how]
    command += [*files.script("tree.py", TREE), "parent"]
    launcher = subprocess.Popen(command, env=child_environment(CPU))
    processes = files.processes(*ROLES)
    if how == "fork":
        files.processes("fork")
    guards = psutil.Process(launcher.pid).children()
    launcher.kill()
    killed = time.monotonic()
    launcher.wait()
    left = [*processes, *(g for g in guards if g not in files.seen)]
    assert len(left) == 4
    wait_for(lambda: all(gone(p) for p in left), "the tree and its guard to end")
    figure(f"orphans 0 of {len(left)} after {time.monotonic() - killed:.1f} s (grace: 1.5 s)")
    assert files.there("saved"), "the one that saves was given the time"


def test_closed_standard_streams(files: Files) -> None:
    command = [*files.script("launcher.py", LAUNCHER), "closed"]
    command += files.script("end.py", "print('alive')\nraise SystemExit(5)")
    launcher = subprocess.Popen(command, env=child_environment(CPU))
    assert launcher.wait(WAIT_SECONDS) == 0
    assert (files.folder / "code").read_text() == "exit code 5"
    assert (files.folder / "log.txt").read_text() == "alive\n"
