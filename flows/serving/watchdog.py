"""`python -m flows.serving.watchdog DIR COMMAND...`: keep a server for as long as anybody uses it.

A user holds a shared flock(2) on DIR/users.lock, which the kernel takes back however the user ends.
Once the watchdog gets that lock for itself alone, nobody is left: it removes DIR/server.json and
stops the command, still holding the lock, so that a new user waits and then starts a new server.
Linux only: prctl(2).
"""

import ctypes
import fcntl
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

POLL_SECONDS = 0.5
STOP_SECONDS = 10.0
PR_SET_PDEATHSIG = 1


def main(arguments: Sequence[str]) -> int:
    """Run the command until it has no user; its exit code if it ends by itself."""
    place, command = Path(arguments[0]), list(arguments[1:])
    libc = ctypes.CDLL(None)

    def die_with_watchdog() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)

    server = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=die_with_watchdog)
    with open(place / "users.lock", "ab") as users:
        while server.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                server.wait(POLL_SECONDS)
            try:
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            (place / "server.json").unlink(missing_ok=True)
            _stop(server)
            return 0
    return server.returncode


def _stop(server: "subprocess.Popen[bytes]") -> None:
    server.terminate()
    try:
        server.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
