"""Weight files that run something when they are unpickled, or that fill the memory.

A fragment is a piece of pickle that pushes one value: it makes a file by itself
(`bare`), or becomes one more entry in the dict of a good file (`spliced`).
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
from typing import Any, NamedTuple

import torch

# --- payloads


class Reduced:
    """Pickles as a call of `function` with `args`; may be the function of another."""

    def __init__(self, function: Any, *args: Any):
        self.function = function
        self.args = args

    def __reduce__(self) -> Any:
        return self.function, self.args

    def __call__(self) -> None:
        """Never called: pickle wants what looks like a function."""


PAYLOADS = (
    "os.system",
    "eval",
    "exec",
    "open",
    "subprocess",
    "getattr chain",
    "attrgetter",
    "methodcaller",
    "runpy",
    "socket",
    "nested pickle",
    "nested torch.load",
    "__import__",
)


def payloads(canary: Path) -> dict[str, Reduced]:
    """Each makes a plain unpickler create `canary`, connect, or import `this`."""
    code = f"open({str(canary)!r}, 'w')"
    touch = f"touch '{canary}'"
    program = canary.with_name("payload.py")
    program.write_text(code)
    the_module_os = Reduced(importlib.import_module, "os")
    file = io.BytesIO()
    torch.save(Reduced(os.system, touch), file)
    file.seek(0)
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
        "nested torch.load": Reduced(functools.partial(torch.load, weights_only=False), file),
        "__import__": Reduced(builtins.__import__, "this"),
    }
    assert tuple(calls) == PAYLOADS
    return calls


# --- fragments


class Fragment(NamedTuple):
    protocol: int
    code: bytes


def fragments(canary: Path) -> dict[str, Fragment]:
    """All payloads and opcodes; the names of those of newer protocols say so."""
    result = {}
    for name, payload in payloads(canary).items():
        for protocol in (2, 4, 5):
            suffix = f", protocol {protocol}" if protocol > 2 else ""
            result[name + suffix] = Fragment(protocol, pickled(payload, protocol))
    return result | opcodes(canary)


def pickled(value: Any, protocol: int) -> bytes:
    """Without PROTO and STOP, and without memo, whose numbers the good file uses."""
    file = io.BytesIO()
    pickler = pickle.Pickler(file, protocol)
    pickler.fast = True
    pickler.dump(value)
    return file.getvalue()[2:-1]


def opcodes(canary: Path) -> dict[str, Fragment]:
    """The ways to a call of os.system that pickle.dumps does not write."""
    touch = text(f"touch '{canary}'")
    call = touch + b"\x85R"
    stack_global = text("os") + text("system") + b"\x93"
    dotted = text("torch.serialization") + text("os.system") + b"\x93"
    class_named_c = b"cbuiltins\ntype\n" + text("C") + b")}\x87R"
    slots = b"N}" + text("__setstate__") + b"cos\nsystem\ns\x86"
    return {
        "INST": Fragment(2, b"(" + touch + b"ios\nsystem\n"),
        "OBJ": Fragment(2, b"(cos\nsystem\n" + touch + b"o"),
        "STACK_GLOBAL": Fragment(4, stack_global + call),
        "STACK_GLOBAL, protocol 2": Fragment(2, stack_global + call),
        "dotted name": Fragment(4, b"ctorch.serialization\nos.system\n" + call),
        "dotted STACK_GLOBAL": Fragment(5, dotted + call),
        "BUILD on a class": Fragment(2, class_named_c + slots + b"b)\x81" + touch + b"b"),
        "function by way of the memo": Fragment(2, b"cos\nsystem\nq\xfa0h\xfa" + call),
        "call in a tuple in a list": Fragment(2, b"](cos\nsystem\n" + call + b"\x85e"),
    }


def text(value: str) -> bytes:
    """The fragment of a string."""
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


# --- bombs, all of protocol 2


def doubled(times: int) -> bytes:
    """A list that holds the one before it twice, and so on: 2 ** times elements."""
    code = b"]"
    for n in range(times):
        position = bytes([n])
        code = b"](" + code + b"q" + position + b"h" + position + b"e"
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


# --- files


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
                body = content[2:-1]  # without PROTO and STOP
                content = bytes([0x80, protocol]) + body + text(key) + fragment + b"s."
            changed.writestr(name, content)
    return path
