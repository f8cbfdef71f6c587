"""Serving a report: this machine only, and always of the runs as they are."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lorakit.errors import UserError
from lorakit.reports.serve import ReportServer, report_server
from tests.reports.files import log_line, write_run


@contextmanager
def serving(*runs: Path, **options: Any) -> Iterator[ReportServer]:
    with report_server(*runs, **options) as server:
        thread = threading.Thread(target=server.serve)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def ask(
    server: ReportServer, path: str = "/", method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], str]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    connection.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})
    answer = connection.getresponse()
    return answer.status, dict(answer.getheaders()), answer.read().decode()


def test_a_page_that_asks_for_its_next_version(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", record={"exit_reason": None}, lines=[log_line(1)])
    with serving(run) as server:
        assert server.url == f"http://127.0.0.1:{server.server_port}/"
        assert server.socket.getsockname()[0] == "127.0.0.1"
        status, headers, page = ask(server)
        assert status == 200
        assert '<meta name="lorakit-live"' in page
        assert "connect-src &#x27;self&#x27;" in page
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers
        tag = headers["ETag"]
        assert ask(server, If_None_Match=tag)[::2] == (304, "")
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(log_line(7)) + "\n")
        status, headers, page = ask(server, If_None_Match=tag)
        assert status == 200
        assert headers["ETag"] != tag
        assert '"x":[1,7]' in page
    assert not (run / "report.html").exists()


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:PORT", 200), ("localhost:PORT", 200), ("evil.example:PORT", 403),
        ("evil.example", 403), ("127.0.0.1", 403), ("127.0.0.1:1", 403), ("", 403),
        ("127.0.0.1:PORT@evil.example", 403),
    ],
)  # fmt: skip
def test_only_requests_that_name_this_server(tmp_path: Path, host: str, status: int) -> None:
    with serving(write_run(tmp_path / "run")) as server:
        found = ask(server, Host=host.replace("PORT", str(server.server_port)))
        assert found[0] == status
        assert ("<html" in found[2]) == (status == 200)


@pytest.mark.parametrize("path", ["/run.json", "/../run.json", "/%2e%2e/run.json"])
def test_nothing_else_is_served(tmp_path: Path, path: str) -> None:
    with serving(write_run(tmp_path / "run")) as server:
        assert ask(server, path)[0] == 404
        assert ask(server, method="HEAD")[::2] == (200, "")
        assert ask(server, method="POST")[0] == 501


def test_a_new_member_of_a_sweep_appears(tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    write_run(sweep / "members" / "a")
    (sweep / "sweep.json").write_text("{}")
    with serving(sweep) as server:
        tag = ask(server)[1]["ETag"]
        write_run(sweep / "members" / "b")
        status, _, page = ask(server, If_None_Match=tag)
        assert status == 200
        assert '{"name":"b"' in page


def test_a_run_that_is_deleted_and_comes_back(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with serving(run) as server:
        moved = run.rename(tmp_path / "moved")
        status, _, text = ask(server)
        assert status == 503
        assert "no such directory" in text
        moved.rename(run)
        assert ask(server)[0] == 200


def test_an_error_in_building_the_page_does_not_end_the_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "run")
    with serving(run) as server, monkeypatch.context() as patch:
        patch.setattr("lorakit.reports.serve.read_runs", lambda runs: {}[runs[0]])
        (run / "metrics.jsonl").touch()
        status, _, text = ask(server)
        assert (status, text) == (500, f"the page cannot be built: KeyError: {run!r}\n")
        assert capsys.readouterr().err == f"error: {text}"
        patch.undo()
        assert ask(server)[0] == 200


def test_a_taken_port_and_a_missing_run_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UserError, match=f"^--port {port}: .*in use; allowed"),
            serving(run, port=port),
        ):
            raise AssertionError
    with pytest.raises(UserError, match="no such directory"), serving(tmp_path / "absent"):
        raise AssertionError
