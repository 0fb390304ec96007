"""An HTTP proxy on loopback that passes everything to one server, except for the faults asked for.

Written for S3 clients: it answers `Expect: 100-continue` itself and keeps the signed Host header.
`seen` lists every request as "METHOD /path?query".
"""

import re
import socket
import struct
import threading
import time
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>injected</Message></Error>"
OF_ONE_HOP = {"expect", "connection", "keep-alive", "transfer-encoding"}


@dataclass
class Fault:
    """What happens to the next `times` requests that `match` (a regular expression) finds:
    `answer` with `status` and S3 error `code`; `silence`, not even 100 Continue;
    `drop_reply` after the server did it; `flip_up` or `flip_down`, one bit of the body;
    `cut`, half of the reply's body; `reset`, of the connection, in place of a reply;
    `delay` by `seconds`; `unconditional`, without If-None-Match.
    """

    match: str
    act: str
    times: int = 1
    status: int = 503
    code: str = "SlowDown"
    seconds: float = 0.5


class FaultProxy(ThreadingHTTPServer):
    """Use as a context manager; `url` is where clients go."""

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.lock, self.over = threading.Lock(), threading.Event()

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        self.shutdown()
        super().__exit__()

    def matching(self, pattern: str, wait_s: float = 0) -> list[str]:
        """The requests seen so far that `pattern` finds, waiting for the first of them."""
        end = time.monotonic() + wait_s
        while True:
            found = [line for line in list(self.seen) if re.search(pattern, line)]
            if found or time.monotonic() >= end:
                return found
            time.sleep(0.02)

    def fault_for(self, line: str) -> Fault:
        """Note a request, and use up a fault for it."""
        with self.lock:
            self.seen.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return Fault("", "pass")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FaultProxy

    def handle_expect_100(self) -> bool:
        return True  # answered in `serve`, or not at all

    def log_message(self, *_: object) -> None:
        pass

    def serve(self) -> None:
        fault = self.server.fault_for(f"{self.command} {self.path}")
        self.close_connection = fault.act in ("silence", "drop_reply", "cut")
        if fault.act == "silence":
            self.server.over.wait()
            return
        if "expect" in self.headers:
            self.send_response_only(100)
            self.end_headers()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if fault.act == "delay":
            time.sleep(fault.seconds)
        if fault.act == "reset":
            self.reset()
            return
        if fault.act == "unconditional":
            del self.headers["If-None-Match"]
        if fault.act == "answer":
            self.reply(fault.status, {}, ERROR.format(fault.code).encode())
        else:
            status, headers, data = self.ask(flipped(body) if fault.act == "flip_up" else body)
            if fault.act != "drop_reply":
                self.reply(status, headers, flipped(data) if fault.act == "flip_down" else data)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve  # noqa: N815

    def reset(self) -> None:
        """End the connection as a crashed peer's kernel does: RST, and no FIN."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.server.close_request(self.connection)

    def ask(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        headers = {n: v for n, v in self.headers.items() if n.lower() not in OF_ONE_HOP}
        with closing(HTTPConnection(self.server.upstream, timeout=60)) as server:
            server.request(self.command, self.path, body, headers)
            answer = server.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()

    def reply(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        headers.setdefault("Content-Length", str(len(data)))
        for name, value in headers.items():
            if name.lower() not in OF_ONE_HOP:
                self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if self.close_connection else data)


def flipped(data: bytes) -> bytes:
    """`data` with one bit changed in its middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data
