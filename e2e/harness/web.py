"""The HTTP process of the self-tests: says who it is, shows its files, tells its end.

    web [--port 8080] [--linger SECONDS]
    GET /            the host name, the environment variable VERSION
    GET /file/PATH   the file's contents        GET /healthz   200, or 500 after POST /break
    GET /slow?s=1    an answer in pieces, spread over that many seconds

Only the standard library, so that it starts within milliseconds.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    healthy = True

    def do_GET(self) -> None:
        if self.path.startswith("/file/"):
            path = Path(self.path.removeprefix("/file"))
            self._answer(200, path.read_text()) if path.is_file() else self._answer(404, f"no file {path}")
        elif self.path == "/healthz":
            self._answer(200, "ok") if Handler.healthy else self._answer(500, "broken")
        elif self.path.startswith("/slow?s="):
            self._answer_slowly(float(self.path.removeprefix("/slow?s=")))
        else:
            self._answer(200, f"{socket.gethostname()} {os.environ.get('VERSION', '')}")

    def do_POST(self) -> None:
        Handler.healthy = self.path != "/break"
        self._answer(200, "ok")

    def _answer(self, status: int, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _answer_slowly(self, seconds: float) -> None:
        pieces = 10
        self.send_response(200)
        self.send_header("Content-Length", str(2 * pieces))
        self.end_headers()
        for number in range(pieces):
            time.sleep(seconds / pieces)
            self.wfile.write(f"{number}\n".encode())
            self.wfile.flush()

    def log_message(self, *_: object) -> None:
        """No access log."""


class Server(ThreadingHTTPServer):
    daemon_threads = False  # Answers in the making are finished before the process ends.
    request_queue_size = 128


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, default=8080)
    parser.add_argument("--linger", type=float, default=0.0, help="seconds to go on serving after SIGTERM")
    options = parser.parse_args()
    server = Server(("0.0.0.0", options.port), Handler)

    def end(*_: object) -> None:
        print("SIGTERM", flush=True)
        threading.Timer(options.linger, server.shutdown).start()

    signal.signal(signal.SIGTERM, end)
    print("serving", flush=True)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}).start()
    while threading.active_count() > 1:
        # A handler of Python runs between two steps of the main thread, so it must not block for good.
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                thread.join(timeout=0.1)
    print("ended", flush=True)
    sys.exit(0)


if __name__ == "__main__":
    main()
