"""Weight files that run something when they are unpickled, or that fill the memory.

A fragment is a piece of pickle that pushes one value: it makes a file by itself (`bare`), or
becomes one more entry in the dict of a file that is good otherwise (`spliced`).
"""

import builtins
import functools
import importlib
import io
import operator
import os
import pickle
import runpy
import socket
import struct
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import torch


class Reduced:
    """Pickles as a call of `function` with `args`; may itself be the function of another."""

    def __init__(self, function: Any, *args: Any):
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call

    def __call__(self) -> None:
        """Never called: pickle wants what looks like a function."""


PAYLOADS = (
    *(
        "os.system",
        "eval",
        "exec",
        "open",
        "subprocess",
        "getattr chain",
        "attrgetter",
        "methodcaller",
        "runpy",
    ),
    *("socket", "nested pickle", "nested torch.load", "__import__"),
)


def payloads(canary: Path) -> dict[str, Reduced]:
    """Each creates the file `canary`, or connects, or imports `this`, when a plain unpickler reads
    it.
    """
    code, touch = f"open({str(canary)!r}, 'w')", f"touch '{canary}'"
    program = canary.with_name("payload.py")
    program.write_text(code)
    the_module_os = Reduced(importlib.import_module, "os")
    saved = io.BytesIO()
    torch.save(Reduced(os.system, touch), saved)
    saved.seek(0)
    calls = {
        "os.system": Reduced(os.system, touch),
        "eval": Reduced(eval, code),
        "exec": Reduced(exec, code),
        "open": Reduced(open, str(canary), "w"),
        "subprocess": Reduced(subprocess.check_call, ["touch", str(canary)]),
        "getattr chain": Reduced(Reduced(getattr, the_module_os, "system"), touch),
        "attrgetter": Reduced(Reduced(operator.attrgetter("system"), the_module_os), touch),
        "methodcaller": Reduced(operator.methodcaller("system", touch), the_module_os),
        "runpy": Reduced(runpy.run_path, str(program)),
        "socket": Reduced(socket.create_connection, ("127.0.0.1", 9)),
        "nested pickle": Reduced(pickle.loads, pickle.dumps(Reduced(os.system, touch))),
        "nested torch.load": Reduced(functools.partial(torch.load, weights_only=False), saved),
        "__import__": Reduced(builtins.__import__, "this"),
    }
    assert tuple(calls) == PAYLOADS
    return calls


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def opcodes(canary: Path) -> dict[str, tuple[int, bytes]]:
    """Protocol and fragment: the ways to a call of os.system that pickle.dumps does not write."""
    touch = text(f"touch '{canary}'")
    slots = b"N}" + text("__setstate__") + b"cos\nsystem\ns\x86"
    return {
        "INST": (2, b"(" + touch + b"ios\nsystem\n"),
        "OBJ": (2, b"(cos\nsystem\n" + touch + b"o"),
        "STACK_GLOBAL": (4, text("os") + text("system") + b"\x93" + touch + b"\x85R"),
        "STACK_GLOBAL, protocol 2": (2, text("os") + text("system") + b"\x93" + touch + b"\x85R"),
        "dotted name": (4, b"ctorch.serialization\nos.system\n" + touch + b"\x85R"),
        "dotted STACK_GLOBAL": (
            5,
            text("torch.serialization") + text("os.system") + b"\x93" + touch + b"\x85R",
        ),
        "BUILD on a class": (
            2,
            b"cbuiltins\ntype\n" + text("C") + b")}\x87R" + slots + b"b)\x81" + touch + b"b",
        ),
        "function by way of the memo": (2, b"cos\nsystem\nq\xfa0h\xfa" + touch + b"\x85R"),
        "call in a tuple in a list": (2, b"](cos\nsystem\n" + touch + b"\x85R\x85e"),
    }


def pickled(value: Any, protocol: int) -> bytes:
    """Without memo, whose numbers would be those of another file where this is put into one."""
    written = io.BytesIO()
    pickler = pickle.Pickler(written, protocol)
    pickler.fast = True
    pickler.dump(value)
    return written.getvalue()


def fragments(canary: Path, protocols: tuple[int, ...] = (2, 4, 5)) -> dict[str, tuple[int, bytes]]:
    """All of them; the names of those of newer protocols say so."""
    return {
        name + f", protocol {protocol}" * (protocol > 2): (
            protocol,
            pickled(payload, protocol)[2:-1],
        )
        for name, payload in payloads(canary).items()
        for protocol in protocols
    } | opcodes(canary)


def doubled(times: int) -> bytes:
    """A list that holds the one before it twice, and so on: 2 ** times elements when written out."""
    code = b"]"
    for n in map(chr, range(times)):
        code = b"](" + code + f"q{n}h{n}e".encode()
    return code


BOMBS = {
    "doubled lists": doubled(60),
    "deep tuples": b")" + b"\x85" * 50_000,
    "deep lists": b"]" * 20_000 + b"a" * 19_999,
    "dict in itself": b"}q\0X\1\0\0\0ah\0s",
    "list in itself": b"]q\0h\0a",
    "far place in the memo": b"Nr\xff\xff\xff\xff",
    "4 GiB of text": b"X\xff\xff\xff\xff",
    "2 GiB of integer": b"\x8b\xff\xff\xff\x7f",
}


def bare(path: Path, protocol: int, fragment: bytes) -> Path:
    """A file as torch.save makes it, of this value alone."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data.pkl", bytes([0x80, protocol]) + fragment + b".")
        archive.writestr("f/version", b"3\n")
        archive.writestr("f/byteorder", b"little")
    return path


def spliced(path: Path, good: Path, protocol: int, fragment: bytes, key: str = "extra") -> Path:
    """`good`, with this value under `key` of the dict in it."""
    with zipfile.ZipFile(good) as archive, zipfile.ZipFile(path, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith("/data.pkl"):
                content = bytes([0x80, protocol]) + content[2:-1] + text(key) + fragment + b"s."
            changed.writestr(name, content)
    return path
