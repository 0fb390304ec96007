"""The process between a launcher and its children: when it has ended, nothing below it is left.

    python -m ditty.processes.guard FD GRACE COMMAND...

torchrun gives every rank a session of its own, so a signal to a process group misses them, and a
launcher that dies leaves them behind as orphans. The guard is a child subreaper: whatever is
orphaned below it becomes its child, and it can find every descendant, however they were started.

It stops the tree on SIGTERM, SIGINT or SIGHUP, or when its parent is gone, however that died: the
parent holds the other end of the pipe FD, and the kernel closes that for it. Stopping is SIGTERM to
every descendant, once; GRACE seconds; then SIGKILL until none is left. The same happens to what a
command leaves behind when it ends by itself.

Exit code: the command's, 128 + signal where a signal ended it, 127 where it cannot be started.
Linux only: prctl(2).
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36

IDLE_SECONDS = 1.0  # signals and the parent's end wake us; this only bounds the look at getppid()
STOPPING_SECONDS = 0.1
NOT_STARTED = 127


def main(argv: Sequence[str]) -> int:
    """Run the command of `argv` (FD, GRACE, COMMAND...); the exit code to leave with."""
    if len(argv) < 3:
        _say("usage: python -m ditty.processes.guard FD GRACE COMMAND...")
        return 2
    parent_pipe, grace, command = int(argv[0]), float(argv[1]), argv[2:]
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        _say(f"cannot adopt orphans: {os.strerror(ctypes.get_errno())}")
        return NOT_STARTED
    events = _Events(parent_pipe)

    def die_with_guard() -> None:
        # The guard may itself be killed (out of memory): then at least the command is told.
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    try:
        child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_guard)
    except OSError as error:
        _say(f"cannot start {command[0]}: {error.strerror}")
        return NOT_STARTED
    child.returncode = _supervise(child.pid, events, grace)  # reaped here, not by Popen
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


class _Events:
    """What can happen to the guard, turned into one wait: signals, and the end of its parent.

    `stop` is the reason to stop the tree, "" while there is none. Handlers only note the reason,
    so that any number of signals does what one does.
    """

    def __init__(self, parent_pipe: int):
        self.stop = ""
        self._parent = os.getppid()
        os.set_inheritable(parent_pipe, False)  # and it is checked to be a file at all
        wake, wake_writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_stop)
        signal.signal(signal.SIGCHLD, lambda *_: None)  # with a handler it wakes us
        self._poll = select.poll()  # not select(): a parent with many files hands us a high FD
        self._poll.register(wake, select.POLLIN)
        self._poll.register(parent_pipe, select.POLLIN)

    def _on_stop(self, number: int, _frame: object) -> None:
        self.stop = self.stop or signal.Signals(number).name

    def wait(self, seconds: float) -> None:
        """Return when something happened, after `seconds` at the latest."""
        for fd, _ in self._poll.poll(seconds * 1000):
            if not os.read(fd, 4096):  # end of file: nobody holds the parent's end any more
                self._poll.unregister(fd)
                self.stop = self.stop or "the launching process is gone"
        # A fork of the parent may hold the pipe open after the parent's death.
        if os.getppid() != self._parent:
            self.stop = self.stop or "the launching process is gone"


def _supervise(child: int, events: _Events, grace: float) -> int:
    """Wait for `child` and the end of all descendants; the child's exit code (-N: signal N)."""
    code: int | None = None
    deadline: float | None = None
    while True:
        events.wait(IDLE_SECONDS if deadline is None else STOPPING_SECONDS)
        for pid, ended in _reap():
            code = ended if pid == child else code
        if deadline is None and code is None and not events.stop:
            continue
        alive = _descendants()
        if not alive:
            assert code is not None, "only _reap() takes the child off the list of children"
            return code
        if deadline is None:
            reason = events.stop or "the command has ended before them"
            _say(f"{reason}: SIGTERM to {len(alive)} processes, SIGKILL in {grace:g} s")
            _signal(alive, signal.SIGTERM)
            deadline = time.monotonic() + grace
        elif time.monotonic() >= deadline:
            _signal(alive, signal.SIGKILL)


def _reap() -> Iterator[tuple[int, int]]:
    """(pid, exit code) of every child that has ended, adopted orphans among them."""
    with suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            yield pid, os.waitstatus_to_exitcode(status)


def _descendants() -> list[int]:
    """Pids of all processes below this one; none is missed when the answer is empty.

    For each living descendant there is a child of ours (an ancestor of it, or itself, adopted),
    and a child of ours stays in /proc, as a zombie if need be, until `_reap` takes it.
    """
    children = defaultdict(list)
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
                # pid (name, in which anything may stand) state ppid ...
                fields = (process / "stat").read_bytes().rpartition(b")")[2].split()
                children[int(fields[1])].append(int(process.name))
    found, queue = [], [os.getpid()]
    while queue:
        below = children.pop(queue.pop(), [])
        found += below
        queue += below
    return found


def _signal(pids: Sequence[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError, PermissionError):  # it ended, or is another user's
            os.kill(pid, number)


def _say(text: str) -> None:
    with suppress(OSError):  # a full disk must not end the guard
        os.write(2, f"ditty guard: {text}\n".encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
