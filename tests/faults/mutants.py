"""Files of torch.save with one thing or a few changed at random: bytes, entries of the zip,
the pickle in it. Most changes come with right checksums, so that they reach what reads them.
"""

import io
import random
import struct
import zipfile
from collections.abc import Callable, Iterator

# opcodes of pickles, weighted towards those that push, call, or reach into the memo
OPCODES = b"(.0N)]}RbsuetahqXKMJcQ\x80\x81\x85\x86\x87\x88\x89\x8a\x8cGoiI2l"
NUMBERS = (0, 1, 2, 255, 256, 2**16, 2**31 - 1, -1, -(2**31))
FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e308)
MOST = 3  # changes of one file

Entries = dict[str, bytes]  # name in the zip -> content


def mutants(whole: bytes, count: int, seed: int) -> Iterator[bytes]:
    """`count` files that once were `whole`; the same ones for the same seed."""
    rng = random.Random(seed)
    entries = unzipped(whole)
    for _ in range(count):
        if rng.random() < 0.2:
            yield with_bytes_changed(whole, rng)
            continue
        changed = dict(entries)
        for _ in range(rng.randint(1, MOST)):
            rng.choice(CHANGES)(changed, rng)
        yield zipped(changed, rng)


def unzipped(whole: bytes) -> Entries:
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(entries: Entries, rng: random.Random) -> bytes:
    file = io.BytesIO()
    method = zipfile.ZIP_DEFLATED if rng.random() < 0.01 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return file.getvalue()


# --- bytes


def with_bytes_changed(content: bytes, rng: random.Random) -> bytes:
    """With some bytes replaced, taken out, put in, or a piece copied elsewhere; or cut."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, MOST)):
        start = rng.randrange(len(changed) + 1)
        end = min(start + rng.choice((0, 1, 1, 1, 2, 4, 8, 64)), len(changed))
        kind = rng.choice(("replaced", "taken out", "put in", "copied", "cut"))
        if kind == "replaced":
            changed[start:end] = rng.randbytes(end - start)
        elif kind == "taken out":
            del changed[start:end]
        elif kind == "put in":
            changed[start:start] = rng.randbytes(end - start)
        elif kind == "copied":
            to = rng.randrange(len(changed) + 1)
            changed[to:to] = changed[start:end]
        elif rng.random() < 0.1:
            del changed[start:]
        if not changed:
            break
    return bytes(changed)


# --- entries; each changes the mapping


def spoil_pickle(entries: Entries, rng: random.Random) -> None:
    name = pickle_of(entries)
    if name:
        entries[name] = with_bytes_changed(entries[name], rng)


def change_opcode(entries: Entries, rng: random.Random) -> None:
    name = pickle_of(entries)
    if name and entries[name]:
        changed = bytearray(entries[name])
        changed[rng.randrange(len(changed))] = rng.choice(OPCODES)
        entries[name] = bytes(changed)


def change_number(entries: Entries, rng: random.Random) -> None:
    """One that the pickle holds in one, two or four bytes, or a float."""
    name = pickle_of(entries)
    places = [i for i, byte in enumerate(entries.get(name, b"")) if byte in b"KMJG"]
    if not places:
        return
    place = rng.choice(places)
    changed = entries[name]
    width = {ord("K"): 1, ord("M"): 2, ord("J"): 4, ord("G"): 8}[changed[place]]
    if width == 8:
        value = b"G" + struct.pack(">d", rng.choice(FLOATS))
    else:
        value = b"J" + rng.choice(NUMBERS).to_bytes(4, "little", signed=True)
    entries[name] = changed[:place] + value + changed[place + 1 + width :]


def spoil_storage(entries: Entries, rng: random.Random) -> None:
    """The numbers of a tensor, or their count."""
    names = [name for name in entries if "/data/" in name and entries[name]]
    if names:
        name = rng.choice(names)
        entries[name] = with_bytes_changed(entries[name], rng)


def drop(entries: Entries, rng: random.Random) -> None:
    entries.pop(rng.choice(list(entries)), None)
    entries.setdefault("archive/extra", b"")


def swap(entries: Entries, rng: random.Random) -> None:
    one = rng.choice(list(entries))
    other = rng.choice(list(entries))
    content = entries[one]
    entries[one] = entries[other]
    entries[other] = content


def rename(entries: Entries, rng: random.Random) -> None:
    name = rng.choice(list(entries))
    new = rng.choice(("archive/data.pkl", "data.pkl", "../data.pkl", "archive/data/0/", "x"))
    entries[new] = entries.pop(name)


def pickle_of(entries: Entries) -> str:
    return next((name for name in entries if name.endswith("data.pkl")), "")


Change = Callable[[Entries, random.Random], None]
CHANGES: tuple[Change, ...] = (
    *(spoil_pickle, spoil_pickle, change_opcode, change_opcode, change_number, change_number),
    *(spoil_storage, drop, swap, rename),
)
