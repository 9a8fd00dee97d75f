"""Downloads that resume, and that are checked before they take their name."""

import fcntl
import hashlib
import http.client
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from kdmini.contracts import UserError
from kdmini.typed import short

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30  # for an answer to begin, and between two pieces of it
SLOWEST = 10_000  # bytes a second, over PERIOD_S: VOC2012 then takes two days
PERIOD_S = 60
PAGE_STARTS = (b"<!doctype html", b"<html")  # of a web page, in lower case


def digest_of(path: Path, algorithm: str) -> str:
    """Hex digest of a file; algorithm as hashlib names it ("sha256", "md5")."""
    new_hash = partial(hashlib.new, algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def fetch(url: str, path: Path, digest: str, size: int) -> Path:
    """Download `url` to `path`, unless the file with that digest is there already.

    digest: "sha256:<hex>" or "md5:<hex>"; size: bytes. The download grows in
    `<path>.part`, which a dropped connection leaves behind for the next call to resume,
    and takes its name only when size and digest are right. A body that does not end is
    cut off one byte over `size`. Returns `path`. Raises UserError when offline, when the
    server is slower than SLOWEST, and when another file comes than expected.
    """
    algorithm, _, expected = digest.partition(":")
    part = path.with_name(path.name + ".part")

    def is_there() -> bool:
        return path.is_file() and digest_of(path, algorithm) == expected

    try:
        if is_there():
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("ab") as file:
            # the ranks of one machine ask for the same file at once
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_there():
                part.unlink(missing_ok=True)
                return path
            _download(url, file, size, path.name)
            file.flush()
            _check(url, part, algorithm, expected, size)
            os.replace(part, path)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        reason = str(error) or type(error).__name__  # some of it is what the server said
        raise UserError(
            f"cannot download {url} ({short(reason)}): call again to resume, "
            f"or put the file, obtained by other means, at {path}"
        ) from error
    return path


def _download(url: str, file: BinaryIO, size: int, name: str) -> None:
    """Append to `file`, open for appending, what it lacks; start over where need be."""
    file.seek(0, os.SEEK_END)
    if file.tell() > size:
        _empty(file)
    if file.tell() == size:
        return

    with _open_from(url, file.tell()) as reply:
        content_range = reply.headers.get("Content-Range", "")
        if not content_range.startswith(f"bytes {file.tell()}-"):
            _empty(file)
        end = size + 1  # then it is the wrong file, whatever follows
        if reply.length is not None:  # what is announced
            end = min(end, file.tell() + reply.length)
        _copy(reply, file, end, name)

    # read1() ends quietly when the connection drops
    if file.tell() < min(end, size):
        raise http.client.IncompleteRead(b"", end - file.tell())


def _copy(reply: http.client.HTTPResponse, file: BinaryIO, end: int, name: str) -> None:
    """Append the reply until the file has `end` bytes, or no more come."""
    start = file.tell()
    period_began = time.monotonic()
    in_period = 0  # bytes
    with tqdm(total=end, initial=start, unit="B", unit_scale=True, desc=name) as bar:
        while file.tell() < end:
            chunk = reply.read1(min(end - file.tell(), CHUNK_BYTES))
            if not chunk:
                return
            bar.update(file.write(chunk))
            in_period += len(chunk)
            seconds = time.monotonic() - period_began
            if seconds < PERIOD_S:
                continue
            if in_period < SLOWEST * seconds:
                raise TimeoutError(f"slower than {SLOWEST:,} bytes a second")
            period_began = time.monotonic()
            in_period = 0


def _empty(file: BinaryIO) -> None:
    file.seek(0)  # truncate alone leaves tell() where it was
    file.truncate()


def _open_from(url: str, start: int) -> http.client.HTTPResponse:
    """The reply from byte `start` on, or from the first where that is refused."""
    try:
        return _open(url, start)
    except urllib.error.HTTPError as error:
        refused = error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE
        if not refused or start == 0:
            raise
    return _open(url, 0)


def _open(url: str, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "kdmini"}
    if start:
        headers["Range"] = f"bytes={start}-"
    request = urllib.request.Request(url, headers=headers)
    return _soon(partial(urllib.request.urlopen, request, timeout=TIMEOUT_S))


def _soon(call: Callable[[], http.client.HTTPResponse]) -> http.client.HTTPResponse:
    """The outcome of the call, if it is there in time: a socket's own time limit begins again
    with every byte that comes.
    """
    outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put(call())
        except Exception as error:
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        answer = outcome.get(timeout=TIMEOUT_S)
    except queue.Empty:
        raise TimeoutError("timed out before an answer began") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _check(url: str, part: Path, algorithm: str, expected: str, size: int) -> None:
    """Delete `part` and raise UserError if it is not the file expected."""
    digest = digest_of(part, algorithm)
    part_size = part.stat().st_size
    if digest == expected and size == part_size:
        return

    with part.open("rb") as file:
        beginning = file.read(512).lstrip().lower()
    part.unlink()
    came = "a web page (HTML)" if beginning.startswith(PAGE_STARTS) else "another file"
    raise UserError(
        f"{url}: {came} came: expected {algorithm} {expected}, {size} bytes, "
        f"got {algorithm} {digest}, {part_size} bytes; "
        "it was deleted, try again or obtain the file by other means"
    )
