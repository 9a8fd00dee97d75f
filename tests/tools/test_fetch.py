"""fetch against a server of Python's own on the loopback address."""

import hashlib
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, repeat
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
        server = self.server
        wanted = self.headers.get("Range")
        server.asked.append(wanted)
        time.sleep(server.waits_s)
        if wanted and server.refuses_ranges:
            return self.send_error(416)

        start = 0
        if wanted and server.takes_ranges:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        size = len(server.body)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        self.wfile.write(server.body[start : server.drops_after])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        serve = partial(server.serve_forever, poll_interval=0.01)
        threading.Thread(target=serve, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "한글 폴더" / "yolo11n.pt"


def part_of(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def write_part(path: Path, content: bytes) -> None:
    """Leaves what an earlier download has got of the file."""
    path.parent.mkdir()
    part_of(path).write_bytes(content)


@pytest.mark.parametrize("algorithm", ["sha256", "md5"])
def test_downloads_once(server: Server, path: Path, algorithm: str) -> None:
    digest = f"{algorithm}:{hashlib.new(algorithm, DATA).hexdigest()}"
    for _ in range(2):
        assert fetch(server.url, path, digest, len(DATA)) == path
        assert path.read_bytes() == DATA
    assert server.asked == [None]
    assert os.listdir(path.parent) == [path.name]


def test_digest_of_the_published_test_vector(tmp_path: Path) -> None:
    path = tmp_path / "abc"
    path.write_bytes(b"abc")  # RFC 1321, FIPS 180-2
    assert digest_of(path, "md5") == "900150983cd24fb0d6963f7d28e17f72"
    assert digest_of(path, "sha256").startswith("ba7816bf8f01cfea414140de5dae2223")


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
    write_part(path, DATA[:5000])
    assert fetch(server.url, path, DIGEST, len(DATA)).read_bytes() == DATA
    assert server.asked == ["bytes=5000-"]


def test_a_server_that_refuses_the_range_starts_over(server: Server, path: Path) -> None:
    server.refuses_ranges = True
    write_part(path, b"old" * 5000)
    assert fetch(server.url, path, DIGEST, len(DATA)).read_bytes() == DATA
    assert server.asked == ["bytes=15000-", None]


def test_a_part_larger_than_the_file_starts_over(server: Server, path: Path) -> None:
    write_part(path, DATA + b"x")
    assert fetch(server.url, path, DIGEST, len(DATA)).read_bytes() == DATA
    assert server.asked == [None]


def test_a_whole_part_needs_no_server(path: Path) -> None:
    write_part(path, DATA)
    assert fetch("http://127.0.0.1:9/", path, DIGEST, len(DATA)).read_bytes() == DATA


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
    assert server.url in message
    assert DIGEST.removeprefix("sha256:") in message
    assert hashlib.sha256(body).hexdigest() in message
    assert "\n" not in message
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == b"what was there"


def test_a_web_page_is_called_one(server: Server, path: Path) -> None:
    server.body = b"\n<!DOCTYPE html><html>Please log in</html>"
    with pytest.raises(UserError, match=r"web page \(HTML\)"):
        fetch(server.url, path, DIGEST, len(DATA))
    assert os.listdir(path.parent) == []


def test_offline_says_where_to_put_the_file(path: Path) -> None:
    # bound, not listening: nobody else can take the port meanwhile
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/yolo11n.pt"
        with pytest.raises(UserError) as caught:
            fetch(url, path, DIGEST, len(DATA))
    message = str(caught.value)
    assert url in message
    assert str(path) in message
    assert "\n" not in message


def test_a_server_that_falls_silent_times_out(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdmini.tools.fetch.TIMEOUT_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/f"
        with pytest.raises(UserError, match="timed out"):
            fetch(url, path, DIGEST, len(DATA))


def test_two_at_once_download_it_once(server: Server, path: Path) -> None:
    server.waits_s = 0.1
    with ThreadPoolExecutor(2) as ranks:
        calls = [ranks.submit(fetch, server.url, path, DIGEST, len(DATA)) for _ in range(2)]
        assert [call.result() for call in calls] == [path, path]
    assert server.asked == [None]
    assert os.listdir(path.parent) == [path.name]
    assert path.read_bytes() == DATA


# --- servers that mean no good


@contextmanager
def raw_server(pieces: Iterable[bytes], wait_s: float = 0) -> Iterator[str]:
    """-> its URL. Whoever asks gets the pieces, one after the other, until he hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with listening.accept()[0] as connection, suppress(OSError):
                connection.recv(4096)
                for piece in pieces:
                    connection.sendall(piece)
                    time.sleep(wait_s)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}/file"


OK = b"HTTP/1.1 200 OK\r\n"


def test_a_body_without_end_is_cut_off(path: Path) -> None:
    endless = chain([OK + b"\r\n"], repeat(b"x" * 65536))
    with raw_server(endless) as url, pytest.raises(UserError, match=r"another file came.* 1001 b"):
        fetch(url, path, DIGEST, 1000)
    assert os.listdir(path.parent) == []


@pytest.mark.parametrize("length", ["9" * 5000, "-1", "many", "1e3", ""])
def test_a_strange_length_is_no_length(path: Path, length: str) -> None:
    head = OK + f"Content-Length: {length}\r\n\r\n".encode()
    with raw_server([head, DATA]) as url:
        assert fetch(url, path, DIGEST, len(DATA)).read_bytes() == DATA


def test_what_a_server_says_is_quoted_and_cut(path: Path) -> None:
    evil = b"\x1b[2J\x1b]0;title\x07" + b"x" * 5000
    for answer in (b"HTTP/1.1 404 " + evil + b"\r\n\r\n", evil + b"\r\n\r\n"):
        with raw_server([answer]) as url, pytest.raises(UserError) as caught:
            fetch(url, path, DIGEST, 1000)
        message = str(caught.value)
        assert message.isprintable()
        assert len(message) < 300 + len(str(path))
        assert r"\x1b[2J" in message


def test_a_server_that_trickles_is_given_up(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kdmini.tools.fetch.PERIOD_S", 0.2)
    trickle = chain([OK + b"Content-Length: 1000\r\n\r\n"], repeat(b"x"))
    with raw_server(trickle, 0.02) as url, pytest.raises(UserError, match="slower than 10,000 b"):
        fetch(url, path, DIGEST, 1000)
    assert 3 < part_of(path).stat().st_size < 100  # the next call goes on from there


def test_an_answer_that_does_not_begin_is_given_up(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kdmini.tools.fetch.TIMEOUT_S", 0.2)
    headers = chain([OK], repeat(b"X: y\r\n"))
    with raw_server(headers, 0.02) as url, pytest.raises(UserError, match="timed out before"):
        fetch(url, path, DIGEST, 1000)
