"""An HTTP proxy on loopback that passes everything to one server, except for the faults asked for.

Written for S3 clients: it answers `Expect: 100-continue` itself, keeps the signed Host header,
and holds whole bodies in memory. `seen` lists every request as "METHOD /path?query".
"""

import http.client
import re
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

ERROR = "<?xml version='1.0'?><Error><Code>{}</Code><Message>injected</Message></Error>"
NOT_PASSED_ON = {"expect", "connection", "keep-alive", "transfer-encoding"}


@dataclass
class Fault:
    """What happens to the next `times` requests that `match` (a regular expression) finds.

    Acts: `answer` with `status` and S3 error `code`; `silence`, not even 100 Continue;
    `drop_reply` after the server did it; `flip_up` or `flip_down`, one bit of the body;
    `cut`, half of the reply's body; `unconditional`, without If-None-Match.
    """

    match: str
    act: str
    times: int = 1
    status: int = 503
    code: str = "SlowDown"


class FaultProxy:
    """Use as a context manager; `url` is where clients go."""

    def __init__(self, upstream: str):
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[Fault] = []
        self.seen: list[str] = []
        self.closing = threading.Event()
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultProxy":
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def matching(self, pattern: str) -> list[str]:
        """The requests seen so far that `pattern` finds."""
        with self._lock:
            return [line for line in self.seen if re.search(pattern, line)]

    def wait_for(self, pattern: str, seconds: float = 30) -> None:
        """Return once a matching request has come in."""
        end = time.monotonic() + seconds
        while not self.matching(pattern):
            assert time.monotonic() < end, f"no request like {pattern} in {seconds} s: {self.seen}"
            time.sleep(0.02)

    def fault_for(self, line: str) -> Fault | None:
        """Note a request, and use up a fault for it."""
        with self._lock:
            self.seen.append(line)
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, line):
                    fault.times -= 1
                    return fault
        return None

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_expect_100(self) -> bool:
                return True  # answered in `serve`, or not at all

            def log_message(self, *_: object) -> None:
                pass

            def serve(self) -> None:
                fault = proxy.fault_for(f"{self.command} {self.path}")
                act = fault.act if fault else "pass"
                if act == "silence":
                    proxy.closing.wait()
                    self.close_connection = True
                    return
                if "expect" in self.headers:
                    self.send_response_only(100)
                    self.end_headers()
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                if fault and act == "answer":
                    self.reply(fault.status, [], ERROR.format(fault.code).encode(), len)
                    return
                dropped = NOT_PASSED_ON | ({"if-none-match"} if act == "unconditional" else set())
                status, headers, data = self.ask(flipped(body) if act == "flip_up" else body, dropped)
                if act == "drop_reply":
                    self.close_connection = True
                    return
                data = flipped(data) if act == "flip_down" else data
                cut = data[: len(data) // 2] if act == "cut" else data
                self.close_connection = act == "cut"
                self.reply(status, headers, cut, lambda _: len(data))

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = serve  # noqa: N815

            def ask(self, body: bytes, dropped: set[str]) -> tuple[int, list, bytes]:
                server = http.client.HTTPConnection(proxy.upstream, timeout=60)
                server.putrequest(
                    self.command, self.path, skip_host=True, skip_accept_encoding=True
                )
                for name, value in self.headers.items():
                    if name.lower() not in dropped:
                        server.putheader(name, value)
                server.endheaders(body)
                answer = server.getresponse()
                data = answer.read()
                server.close()
                return answer.status, answer.getheaders(), data

            def reply(self, status: int, headers: list, data: bytes, length) -> None:
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in NOT_PASSED_ON | {"content-length"}:
                        self.send_header(name, value)
                original = dict((name.lower(), value) for name, value in headers)
                is_head = self.command == "HEAD"
                self.send_header(
                    "Content-Length", original.get("content-length", "0") if is_head else length(data)
                )
                self.end_headers()
                self.wfile.write(b"" if is_head else data)

        return Handler


def flipped(data: bytes) -> bytes:
    """`data` with one bit changed in its middle."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :] if data else data
