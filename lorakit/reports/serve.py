"""Serving a report to a browser on this machine, always of the runs as they are now."""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import PathLike
from pathlib import Path
from threading import Lock

from lorakit.errors import UserError
from lorakit.notes import to_stderr
from lorakit.reports.page import render
from lorakit.reports.runs import FILES, read_runs

_ADDRESS = "127.0.0.1"
_HEADERS = {
    "Content-Type": "text/html; charset=utf-8",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass
class _Page:
    """The newest page, rendered again only after a file of the runs has changed."""

    runs: Sequence[str | PathLike[str]]
    samples: bool
    _tag: str = ""
    _contents: bytes = b""
    _lock: Lock = field(default_factory=Lock)

    def newest(self) -> tuple[str, bytes]:
        """An ETag and the page. Raises UserError if the runs can no longer be read."""
        with self._lock:
            tag = self._state()
            if tag != self._tag or not self._contents:
                page = render(read_runs(self.runs), live=True, samples=self.samples)
                self._tag, self._contents = tag, page.encode(errors="replace")
            return self._tag, self._contents

    def _state(self) -> str:
        """A hash of the sizes and times of all files that a page is made of."""
        found = hashlib.sha256()
        for run in self.runs:
            for folder in (Path(run), *sorted(Path(run).glob("members/*"))):
                for name in FILES:
                    try:
                        state = (folder / name).stat()
                    except OSError:
                        continue
                    found.update(
                        f"{folder}/{name} {state.st_size} {state.st_mtime_ns}".encode(
                            errors="replace"
                        )
                    )
        return f'"{found.hexdigest()}"'


class ReportServer(ThreadingHTTPServer):
    """``serve`` answers requests until it is interrupted."""

    daemon_threads = True

    def __init__(self, page: _Page, port: int) -> None:
        super().__init__((_ADDRESS, port), _Handler)
        self.page = page

    @property
    def url(self) -> str:
        return f"http://{_ADDRESS}:{self.server_port}/"

    def serve(self) -> None:
        """Answer requests; return at Ctrl-C."""
        try:
            self.serve_forever(poll_interval=0.1)
        except KeyboardInterrupt:
            return

    def is_own_name(self, host: str | None) -> bool:
        """Whether a request names this server: a page of another site, whose name is made to point
        here, names its own."""
        names = [f"{name}:{self.server_port}" for name in (_ADDRESS, "localhost")]
        return host in names or (self.server_port == 80 and host in (_ADDRESS, "localhost"))


class _Handler(BaseHTTPRequestHandler):
    server: ReportServer
    timeout = 30
    server_version, sys_version = "lorakit", ""

    def do_GET(self) -> None:
        if not self.server.is_own_name(self.headers.get("Host")):
            self._refuse(HTTPStatus.FORBIDDEN, "the Host header is not this server's")
            return
        if self.path.partition("?")[0] != "/":
            self._refuse(HTTPStatus.NOT_FOUND, "only / is here")
            return
        try:
            tag, contents = self.server.page.newest()
        except UserError as error:
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            return
        except Exception as error:  # the runs may be readable again at the next request
            reason = traceback.format_exception_only(error)[-1].strip()
            to_stderr(f"error: the page cannot be built: {reason}")
            self._refuse(HTTPStatus.INTERNAL_SERVER_ERROR, f"the page cannot be built: {reason}")
            return
        is_known = self.headers.get("If-None-Match") == tag
        self.send_response(HTTPStatus.NOT_MODIFIED if is_known else HTTPStatus.OK)
        self._send(b"" if is_known else contents, _HEADERS | {"ETag": tag})

    do_HEAD = do_GET

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        self.send_response(status)
        self._send(
            f"{message}\n".encode(errors="replace"),
            _HEADERS | {"Content-Type": "text/plain; charset=utf-8"},
        )

    def _send(self, contents: bytes, headers: dict[str, str]) -> None:
        for name, value in (headers | {"Content-Length": str(len(contents))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(contents)

    def log_message(self, format: str, *values: object) -> None:
        """Requests are not logged."""


@contextmanager
def report_server(
    *runs: str | PathLike[str], port: int = 0, samples: bool = True
) -> Iterator[ReportServer]:
    """Yield a server of the report on runs, as ``report`` writes it, on 127.0.0.1 alone.

    ``port`` 0 chooses a free one. Raises UserError for a run that cannot be read, and for a port
    that is taken.
    """
    page = _Page(runs, samples)
    page.newest()
    try:
        server = ReportServer(page, port)
    except OSError as error:
        raise UserError(f"--port {port}: {error.strerror}; allowed: a free port, or 0") from None
    with server:
        yield server
