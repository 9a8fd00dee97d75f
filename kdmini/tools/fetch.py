"""Downloads that resume, and that are checked before they take their name."""

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from functools import partial
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from kdmini.contracts import UserError

CHUNK_BYTES = 1 << 20
TIMEOUT_S = 30
PAGE_STARTS = (b"<!doctype html", b"<html")  # of a web page, in lower case


def digest_of(path: Path, algorithm: str) -> str:
    """Hex digest of a file; algorithm as hashlib names it ("sha256", "md5")."""
    new_hash = partial(hashlib.new, algorithm, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, new_hash).hexdigest()


def fetch(url: str, path: Path, digest: str, size: int | None = None) -> Path:
    """Download `url` to `path`, unless the file with that digest is there already.

    digest: "sha256:<hex>" or "md5:<hex>"; size: bytes. The download grows in
    `<path>.part`, which a dropped connection leaves behind for the next call to resume,
    and takes its name only when size and digest are right. Returns `path`. Raises
    UserError when offline, and when another file comes than expected.
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
        reason = str(error) or type(error).__name__
        raise UserError(
            f"cannot download {url} ({reason}): call again to resume, "
            f"or put the file, obtained by other means, at {path}"
        ) from error
    return path


def _download(url: str, file: BinaryIO, size: int | None, name: str) -> None:
    """Append to `file`, open for appending, what it lacks; start over where need be."""
    file.seek(0, os.SEEK_END)
    if size is not None and file.tell() > size:
        _empty(file)
    if size is not None and file.tell() == size:
        return

    with _open_from(url, file.tell()) as reply:
        content_range = reply.headers.get("Content-Range", "")
        if not content_range.startswith(f"bytes {file.tell()}-"):
            _empty(file)
        start = file.tell()
        length = reply.headers.get("Content-Length")
        total = start + int(length) if length else size
        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name) as bar:
            while chunk := reply.read(CHUNK_BYTES):
                bar.update(file.write(chunk))
                if size is not None and file.tell() > size:
                    return  # the wrong file, whatever follows: spare the disk

    # read(n) ends quietly when the connection drops
    if total is not None and file.tell() < total:
        raise http.client.IncompleteRead(b"", total - file.tell())


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
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def _check(url: str, part: Path, algorithm: str, expected: str, size: int | None) -> None:
    """Delete `part` and raise UserError if it is not the file expected."""
    digest = digest_of(part, algorithm)
    part_size = part.stat().st_size
    if digest == expected and size in (None, part_size):
        return

    with part.open("rb") as file:
        beginning = file.read(512).lstrip().lower()
    part.unlink()
    came = "a web page (HTML)" if beginning.startswith(PAGE_STARTS) else "another file"
    wanted = f"{algorithm} {expected}"
    if size is not None:
        wanted += f", {size} bytes"
    raise UserError(
        f"{url}: {came} came: expected {wanted}, "
        f"got {algorithm} {digest}, {part_size} bytes; "
        "it was deleted, try again or obtain the file by other means"
    )
