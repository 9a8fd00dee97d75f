"""A few letters that stand for an image and its ground truth, to see whether they change."""

import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

PLAIN = (bool, int, float, str, bytes, type(None))


def digest(pixels: np.ndarray, size: tuple[int, int], target: Mapping[str, Any]) -> str:
    """-> "size 320x213, pixels 1a2b3c4d, truth 5e6f7a8b": parts that can be compared one by
    one. size: height, width of the file.
    """
    height, width = size
    truth = {key: value for key, value in target.items() if key != "id"}
    return f"size {width}x{height}, pixels {crc(pixels):08x}, truth {crc(truth):08x}"


def crc(value: Any, start: int = 0) -> int:
    """CRC-32 of arrays and plain values, through dicts and lists; what else an object may hold
    is passed over.
    """
    if isinstance(value, np.ndarray) and not value.dtype.hasobject:
        form = zlib.crc32(f"{value.dtype} {value.shape}".encode(), start)
        return zlib.crc32(np.ascontiguousarray(value).data, form)
    if isinstance(value, PLAIN):
        return zlib.crc32(repr(value).encode(), start)
    parts = value if isinstance(value, list | tuple) else []
    if isinstance(value, Mapping):
        parts = [part for key in sorted(value, key=str) for part in (str(key), value[key])]
    for part in parts:
        start = crc(part, start)
    return start
