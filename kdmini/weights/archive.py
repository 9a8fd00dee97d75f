"""A `.pt` file opened: the entries of its zip, or what it is where it is none."""

import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kdmini.contracts import UserError

MAX_FILE_BYTES = 8 << 30  # a ViT of a billion parameters has 4.5 GB


class Refused(Exception):
    """Why a file is not read: the rest of a sentence that begins with its name."""


def quoted(text: str, most: int = 80) -> str:
    """Text out of a file, fit for a terminal: in quotes, escaped, cut."""
    return repr(text if len(text) <= most else text[:most] + "...")


@contextmanager
def refusals(path: Path) -> Iterator[None]:
    """Whatever is raised inside becomes a UserError of one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except Refused as reason:
        raise UserError(f"{path} {reason}") from None
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check it, or name another file"
        ) from error
    except Exception as error:
        # whatever a damaged or crafted file trips over, the file is the cause
        cause = f"{type(error).__name__}: {quoted(str(error))}"
        raise UserError(
            f"{path} is damaged or no weight file ({cause}): obtain it again"
        ) from error


def content_of(path: Path) -> bytes:
    """Raises Refused for a file that is larger than any of weights."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise Refused(
            f"is larger than {MAX_FILE_BYTES} bytes, which no file of weights is: name another file"
        )
    return path.read_bytes()


def unzip(data: bytes) -> dict[str, bytearray]:
    """Entry -> content, without the root folder that all entries share.

    Raises Refused unless the entries are as torch.save writes them: stored, each once.
    """
    if data[:2] != b"PK":
        raise Refused(foreign(data))

    entries = {}
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        infos = archive.infolist()
        check_listing(infos, len(data))
        for info in infos:
            if info.CRC == 0:  # not computed, see torch.serialization.set_crc32_options
                info.CRC = None  # type: ignore[assignment]
            name = info.filename.partition("/")[2]
            content = archive.read(info)  # raises where the CRC differs
            entries[name] = bytearray(content)

    if "data.pkl" not in entries:
        raise Refused("is a zip without data.pkl, so no weight file: give a .pt file of weights")
    if entries.get("byteorder", b"little") != b"little":
        raise Refused("is from a big-endian machine: save it again on a little-endian one")
    return entries


EXPORTED = "exported models are not read, give the .pt file it was exported from"

# how a file that is no zip begins -> what it seems to be
FOREIGN = {
    rb"$": "is empty (0 bytes): obtain it again",
    rb"(?i)\s*<(!doctype|html)": (
        "is a web page (HTML), perhaps of a failed download: obtain the file again"
    ),
    rb"(?s).{257}ustar|\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19\.": (
        "is in a format from before PyTorch 1.6: "
        "load it where it is from and save it with a newer one"
    ),
    rb"\x80": "is a bare pickle, which is never opened: give a .pt file that torch.save wrote",
    rb"\x08[\x01-\x20][\x12:]": f"is an ONNX model: {EXPORTED}",
    rb"(?i)\s*<\?xml": f"is XML, perhaps of an OpenVINO model: {EXPORTED}",
    rb"(?s).{4}TFL3": f"is a TensorFlow Lite model: {EXPORTED}",
    rb"(?s).{4}\{": f"is perhaps a TensorRT engine: {EXPORTED}",
}


def foreign(data: bytes) -> str:
    """What a file that is no zip seems to be."""
    for beginning, description in FOREIGN.items():
        if re.match(beginning, data):
            return description
    return f"is no weight file (it begins with {data[:8]!r}): give a .pt file of weights"


def check_listing(infos: list[zipfile.ZipInfo], file_bytes: int) -> None:
    """Raises Refused where torch.save writes no such list of entries."""
    names = [info.filename for info in infos]
    roots = {name.partition("/")[0] for name in names}
    total_bytes = sum(info.file_size for info in infos)

    if any(name.endswith("/constants.pkl") for name in names):
        raise Refused(f"is a TorchScript archive, which is a program: {EXPORTED}")
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise Refused("has compressed entries, which torch.save never writes: obtain it again")
    # by name, or the same bytes: then all entries together are larger than the file
    if len(set(names)) < len(names) or total_bytes > file_bytes:
        raise Refused("has an entry twice: obtain it from a source you trust")
    if len(roots) > 1:
        raise Refused("has more than one root folder: obtain it from a source you trust")
