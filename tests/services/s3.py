"""A real S3 server on this machine: folders as buckets, one account. It goes by what it has on its disk."""

from __future__ import annotations

import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

KEY, SECRET = "retune", "a-secret-of-tests"
START_SECONDS = 30.0
NOT_THE_SERVERS = ("AWS_ENDPOINT_URL", "AWS_PROFILE", "AWS_SESSION_TOKEN")


class S3:
    """The server. While it runs, this process's environment leads S3 clients to it.

    Args:
        folder: its sub-folders are the buckets.
        buckets: made at the start.
    """

    def __init__(self, folder: Path, *buckets: str):
        self.folder = folder
        for bucket in buckets:
            (folder / bucket).mkdir(parents=True, exist_ok=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.environment = {
            "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self.port}",
        }  # fmt: skip

    def start(self) -> None:
        """Start it, and wait until it answers."""
        program = shutil.which("rclone", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert program, "rclone is not installed"
        with (self.folder.parent / f"{self.folder.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [program, "serve", "s3", "--addr", f"127.0.0.1:{self.port}", "--auth-key", f"{KEY},{SECRET}",
                 "--config", "/dev/null", str(self.folder)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), 1).close()
                return
            except OSError:
                assert self.process.poll() is None and time.monotonic() < deadline, "the S3 server does not answer"
                time.sleep(0.02)

    def stop(self) -> None:
        """Stop it, and wait until it is gone; what it holds stays."""
        self.process.kill()
        self.process.wait()

    def objects(self, bucket: str) -> set[str]:
        """The keys in a bucket, as they are on the server's disk."""
        root = self.folder / bucket
        return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}

    def __enter__(self) -> S3:
        self._before = {name: os.environ.get(name) for name in (*self.environment, *NOT_THE_SERVERS)}
        for name in NOT_THE_SERVERS:
            os.environ.pop(name, None)
        os.environ.update(self.environment)
        forget_clients()
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        forget_clients()


def forget_clients() -> None:
    """Clients of this process keep the environment that they were made in."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()


class Proxy:
    """Stands before a server, and strikes a process when a writing request of it has been done and not yet answered.

    Args:
        server: behind it.
        strike: called with the number of each writing request (from 1) and its path, after it was done.
        seen: called with each request.
    """

    def __init__(
        self, server: S3, strike: Callable[[int, str], None], seen: Callable[[str], object] = lambda request: None
    ):
        writes, counting = [0], threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                behind = http.client.HTTPConnection("127.0.0.1", server.port)
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                behind.request(self.command, self.path, body, headers)
                answer = behind.getresponse()
                content = answer.read()
                behind.close()
                seen(f"{self.command} {self.path}")
                if self.command in ("PUT", "POST", "DELETE"):
                    with counting:
                        writes[0] += 1
                        strike(writes[0], self.path)
                self.send_response_only(answer.status, answer.reason)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(content))
                self.send_header("Content-Length", length or "0")
                self.end_headers()
                with suppress(OSError):  # who asked may be dead
                    self.wfile.write(content)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = pass_on

            def log_message(self, format: str, *arguments: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: object, client_address: object) -> None: ...

        self._server = Server(("127.0.0.1", 0), Handler)
        self.environment = {
            **server.environment, "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{self._server.server_address[1]}",
        }  # fmt: skip

    def __enter__(self) -> Proxy:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
