"""fetch against a server of Python's own on the loopback address."""

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from kdmini.contracts import UserError
from kdmini.tools.fetch import digest_of, fetch

DATA = bytes(range(256)) * 2000
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = DATA
        self.takes_ranges = True
        self.drops_after: int | None = None  # bytes; the length announced is the whole
        self.refuses_ranges = False
        self.waits_s = 0.0
        self.asked: list[str | None] = []  # the Range header of each request
        self.url = f"http://127.0.0.1:{self.server_port}/yolo11n.pt"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        time.sleep(server.waits_s)
        if wanted and server.refuses_ranges:
            return self.send_error(416)
        start = (
            int(re.fullmatch(r"bytes=(\d+)-", wanted)[1]) if wanted and server.takes_ranges else 0
        )
        self.send_response(206 if start else 200)
        if start:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}"
            )
        self.send_header("Content-Length", str(len(server.body) - start))
        self.end_headers()
        self.wfile.write(server.body[start : server.drops_after])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        threading.Thread(
            target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()
        yield server
        server.shutdown()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "한글 폴더" / "yolo11n.pt"


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def with_part(path: Path, content: bytes) -> Path:
    path.parent.mkdir()
    part_of(path).write_bytes(content)
    return path


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
@pytest.mark.parametrize("size", [len(DATA), None])
def test_downloads_once(server: Server, path: Path, algorithm: str, size: int | None) -> None:
    digest = f"{algorithm}:{hashlib.new(algorithm, DATA).hexdigest()}"
    for _ in range(2):
        assert fetch(server.url, path, digest, size) == path
        assert path.read_bytes() == DATA
    assert server.asked == [None]
    assert os.listdir(path.parent) == [path.name]


def test_digest_of_the_published_test_vector(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")  # RFC 1321, FIPS 180-2
    assert digest_of(tmp_path / "abc", "md5") == "900150983cd24fb0d6963f7d28e17f72"
    assert digest_of(tmp_path / "abc", "sha256").startswith("ba7816bf8f01cfea414140de5dae2223")


def test_a_dropped_connection_is_resumed(server: Server, path: Path) -> None:
    server.drops_after = 100_000
    with pytest.raises(UserError, match=r"call again to resume.*yolo11n\.pt"):
        fetch(server.url, path, DIGEST, len(DATA))
    assert part_of(path).read_bytes() == DATA[:100_000]
    assert not path.exists()
    server.drops_after = None
    assert fetch(server.url, path, DIGEST, len(DATA)).read_bytes() == DATA
    assert server.asked == [None, "bytes=100000-"]


def test_a_server_without_ranges_starts_over(server: Server, path: Path) -> None:
    server.takes_ranges = False
    assert fetch(server.url, with_part(path, DATA[:5000]), DIGEST).read_bytes() == DATA
    assert server.asked == ["bytes=5000-"]


def test_a_server_that_refuses_the_range_starts_over(server: Server, path: Path) -> None:
    server.refuses_ranges = True
    assert fetch(server.url, with_part(path, b"old" * 5000), DIGEST).read_bytes() == DATA
    assert server.asked == ["bytes=15000-", None]


def test_a_part_larger_than_the_file_starts_over(server: Server, path: Path) -> None:
    assert fetch(server.url, with_part(path, DATA + b"x"), DIGEST, len(DATA)).read_bytes() == DATA
    assert server.asked == [None]


def test_a_whole_part_needs_no_server(path: Path) -> None:
    assert (
        fetch("http://127.0.0.1:9/", with_part(path, DATA), DIGEST, len(DATA)).read_bytes() == DATA
    )


@pytest.mark.parametrize("body", [DATA[:-1] + b"x", DATA + b"x", DATA[:-1]])
def test_another_file_is_refused_and_the_one_there_kept(
    server: Server, path: Path, body: bytes
) -> None:
    server.body = body
    path.parent.mkdir()
    path.write_bytes(b"what was there")
    with pytest.raises(UserError) as caught:
        fetch(server.url, path, DIGEST, len(DATA))
    message = str(caught.value)
    assert (
        server.url in message
        and DIGEST[7:] in message
        and hashlib.sha256(body).hexdigest() in message
    )
    assert "\n" not in message
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == b"what was there"


def test_a_web_page_is_called_one(server: Server, path: Path) -> None:
    server.body = b"\n<!DOCTYPE html><html>Please log in</html>"
    with pytest.raises(UserError, match=r"web page \(HTML\)"):
        fetch(server.url, path, DIGEST, len(DATA))
    assert os.listdir(path.parent) == []


def test_offline_says_where_to_put_the_file(path: Path) -> None:
    with socket.socket() as closed:  # bound, not listening: nobody else can take the port meanwhile
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/yolo11n.pt"
        with pytest.raises(UserError) as caught:
            fetch(url, path, DIGEST)
    assert (
        url in str(caught.value)
        and str(path) in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_server_that_falls_silent_times_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdmini.tools.fetch.TIMEOUT_S", 0.1)
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        pytest.raises(UserError, match="timed out"),
    ):
        fetch(f"http://127.0.0.1:{silent.getsockname()[1]}/f", path, DIGEST)


def test_two_at_once_download_it_once(server: Server, path: Path) -> None:
    server.waits_s = 0.1
    with ThreadPoolExecutor(2) as ranks:
        assert list(ranks.map(lambda _: fetch(server.url, path, DIGEST), range(2))) == [path, path]
    assert server.asked == [None]
    assert os.listdir(path.parent) == [path.name] and path.read_bytes() == DATA
