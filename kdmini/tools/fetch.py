"""Downloads that resume, and that are checked before they take their name."""

import fcntl
import hashlib
import http.client
import os
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from kdmini.contracts import UserError

CHUNK = 1 << 20
TIMEOUT_S = 30


def digest_of(path: Path, algorithm: str) -> str:
    """Hex digest of a file; algorithm as hashlib names it ("sha256", "md5")."""
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()


def fetch(url: str, path: Path, digest: str, size: int | None = None) -> Path:
    """Download `url` to `path`, unless a file with that digest is there already.

    digest: "sha256:<hex>" or "md5:<hex>"; size: bytes. The download grows in `<path>.part`, which a
    dropped connection leaves behind for the next call to resume, and takes its name only when size
    and digest are right. Raises UserError when offline, and when another file comes than expected.
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
            fcntl.flock(
                file, fcntl.LOCK_EX
            )  # the ranks of one machine ask for the same file at once
            if is_there():
                part.unlink(missing_ok=True)
                return path
            _download(url, file, size, path.name)
            file.flush()
            _check(url, part, algorithm, expected, size)
            os.replace(part, path)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise UserError(
            f"cannot download {url} ({str(error) or type(error).__name__}): call again to resume, "
            f"or put the file, obtained by other means, at {path}"
        ) from error
    return path


def _download(url: str, file: BinaryIO, size: int | None, name: str) -> None:
    """Append to `file` (open for appending), or start over where the server cannot continue it."""
    file.seek(0, os.SEEK_END)
    if size is not None and file.tell() > size:
        _empty(file)
    if size is not None and file.tell() == size:
        return
    try:
        reply = _open(url, file.tell())
    except urllib.error.HTTPError as error:
        if error.code != http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE or not file.tell():
            raise
        reply = _open(url, 0)
    with reply:
        if not reply.headers.get("Content-Range", "").startswith(f"bytes {file.tell()}-"):
            _empty(file)
        start, length = file.tell(), reply.headers.get("Content-Length")
        total = start + int(length) if length else size
        with tqdm(total=total, initial=start, unit="B", unit_scale=True, desc=name) as bar:
            while chunk := reply.read(CHUNK):
                bar.update(file.write(chunk))
                if size is not None and file.tell() > size:
                    return  # the wrong file, whatever follows: spare the disk
    if total is not None and file.tell() < total:  # read(n) ends quietly when the connection drops
        raise http.client.IncompleteRead(b"", total - file.tell())


def _empty(file: BinaryIO) -> None:
    file.seek(0)  # truncate alone leaves tell() where it was
    file.truncate()


def _open(url: str, start: int) -> http.client.HTTPResponse:
    headers = {"User-Agent": "kdmini"} | ({"Range": f"bytes={start}-"} if start else {})
    return urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=TIMEOUT_S)


def _check(url: str, part: Path, algorithm: str, expected: str, size: int | None) -> None:
    """Delete `part` and raise if it is not the file expected."""
    got, got_size = digest_of(part, algorithm), part.stat().st_size
    if got == expected and size in (None, got_size):
        return
    with part.open("rb") as file:
        is_page = file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))
    part.unlink()
    came = "a web page (HTML)" if is_page else "another file"
    wanted = f"{algorithm} {expected}" + ("" if size is None else f", {size} bytes")
    raise UserError(
        f"{url}: {came} came: expected {wanted}, got {algorithm} {got}, {got_size} bytes; it was deleted, "
        "try again or obtain the file by other means"
    )
