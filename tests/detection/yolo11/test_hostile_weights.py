"""Nothing in a hostile file ever runs, and none fills the memory."""

import contextlib
import pickle
import resource
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from kdmini.contracts import UserError
from kdmini.weights import pickled
from tests.detection.yolo11.watched import read, refused
from tests.detection.yolo11.weight_files import (
    ROWS,
    PublicClasses,
    assert_equal,
    own_content,
    own_file,
    public_file,
    public_model,
    rezipped,
    rounded,
    tiny_n,
    zipped,
)
from tests.faults.hostile import BOMBS, PAYLOADS, Reduced, payloads, spliced, text

pytestmark = pytest.mark.usefixtures("canary")

# --- calls


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", [*PAYLOADS, "harmless"])
def test_a_payload_is_refused_wherever_it_stands(
    tmp_path: Path, canary: Path, name: str, protocol: int
) -> None:
    payload = Reduced(print, "x") if name == "harmless" else payloads(canary)[name]
    contents = (
        payload,
        {"model": payload, "license": "x"},
        own_content(extra=[payload]),
        own_content(model={ROWS[0]: payload}),
        own_content(names=["cat", payload]),
    )
    for content in contents:
        torch.save(content, tmp_path / "f.pt", pickle_protocol=protocol)
        refused(tmp_path / "f.pt")


@pytest.mark.parametrize("kind", ["_parameters", "_modules", "_buffers"])
def test_a_payload_in_the_tree_of_a_model_is_refused_by_its_place(
    public: PublicClasses, tmp_path: Path, canary: Path, kind: str
) -> None:
    root = public_model(public, tiny_n())
    for payload in payloads(canary).values():
        getattr(root, kind)["x"] = payload
        path = public_file(tmp_path / "f.pt", root)
        refused(path, "as 'x', which no YOLO11 has.*nothing was run")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_a_payload_outside_the_tree_of_a_model_is_an_inert_note(
    public: PublicClasses, tmp_path: Path, canary: Path, protocol: int
) -> None:
    """As are the names of optimisers, paths and augmentations that a training leaves there."""
    model = tiny_n()
    state = rounded(model.state_dict())
    root = public_model(public, model)
    path = tmp_path / "f.pt"
    for payload in payloads(canary).values():
        root._forward_hooks[0] = payload
        root.anything = [payload]
        public_file(path, root, protocol, train_args={"project": payload}, optimizer=payload)
        assert_equal(read(path).state, state)


MODEL = b"cultralytics.nn.tasks\nDetectionModel\n"  # a name that is allowed
ITEM = b"}X\x01\0\0\0aK\x01s"  # {"a": 1}

# what a plain unpickler would do -> the pickle, and what is said of it
CALLS: dict[str, tuple[bytes, str]] = {
    "INST, protocol 0": (b"(S'touch CANARY'\nios\nsystem\n.", "opcode STRING"),
    "INST": (b"\x80\x02(ios\nsystem\n.", "opcode INST"),
    "OBJ": (b"(cos\nsystem\nX\1\0\0\0ao.", "opcode OBJ"),
    "OBJ of an allowed name": (b"\x80\x02(" + MODEL + b"o.", "opcode OBJ"),
    "STACK_GLOBAL, protocol 4": (
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0ctouch CANARY\x85R.",
        "but 'os.system': nothing was run",
    ),
    "STACK_GLOBAL": (
        b"\x80\x02X\x02\0\0\0osX\x06\0\0\0system\x93)R.",
        "but 'os.system': nothing was run",
    ),
    "STACK_GLOBAL of what is no text": (b"\x80\x04K\1K\2\x93.", "a name that is none"),
    "STACK_GLOBAL of a long text": (
        b"\x80\x04" + text("x" * 301) + text("y") + b"\x93.",
        "a name that is none",
    ),
    "a dotted module": (
        b"\x80\x02ctorch\n_utils.os.system\n)R.",
        "but 'torch._utils.os.system'",
    ),
    "a dotted name": (
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2.__globals__\n)R.",
        "__globals__",
    ),
    "the name of a detector, split elsewhere": (
        b"\x80\x02cultralytics.nn\ntasks.DetectionModel\n)R.",
        "but 'ultralytics.nn.tasks.DetectionModel'",
    ),
    "a name that is not called": (b"\x80\x02cos\nsystem\n.", "no YOLO11 detector"),
    "EXT1": (b"\x80\x02\x82\x01.", "opcode EXT1"),
    "BUILD of a class": (b"\x80\x02" + MODEL + ITEM + b"b.", "no YOLO11 detector"),
    "BUILD of a class, by slots": (
        b"\x80\x02" + MODEL + b"N" + ITEM + b"\x86b.",
        "no YOLO11 detector",
    ),
    "a call of what was called": (
        b"\x80\x02" + MODEL + b")R)R.",
        "no YOLO11 detector",
    ),
    "an object of an object": (
        b"\x80\x02" + MODEL + b")\x81)\x81.",
        "no YOLO11 detector",
    ),
    "a persistent id that is none": (b"\x80\x02]}Q.", "no YOLO11 detector"),
    "PERSID": (b"\x80\x02P0\n.", "opcode PERSID"),
    "NEWOBJ_EX": (b"\x80\x02cos\nsystem\n)}\x92.", "but 'os.system': nothing was run"),
    "DUP": (b"\x80\x02N2.", "opcode DUP"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "opcode NEXT_BUFFER"),
    "a protocol that is not there yet": (b"\x80\x06N.", "opcode PROTO '6'"),
    # whose hash may recurse until the stack is full
    "a tuple for a key": (b"\x80\x02})Ns.", "no YOLO11 detector"),
    "an item for a class": (b"\x80\x02" + MODEL + b"Na.", "no YOLO11 detector"),
}


@pytest.mark.parametrize("call", CALLS)
def test_opcodes_that_call_or_look_up_in_other_ways_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    monkeypatch.chdir(tmp_path)  # where the canary would appear
    code, message = CALLS[call]
    refused(zipped(tmp_path / "f.pt", code), message)


# --- pickles that end too early, or never


def test_a_pickle_cut_off_anywhere_is_refused(tmp_path: Path) -> None:
    content = {"format": "kdmini", "model": {}, "names": ["a"], "card": {"scale": "n"}}
    code = pickle.dumps(content, 2)
    for length in range(len(code)):
        refused(zipped(tmp_path / "f.pt", code[:length]))


@pytest.mark.parametrize(
    "code",
    [
        b".",
        b"\x80\x02.",
        b"\x80\x02e.",
        b"\x80\x02Nb.",
        b"\x80\x02h\x07.",
        b"\x80\x02(t.",
        b"\xff",
    ],
)
def test_a_pickle_that_takes_what_is_not_there_is_refused(tmp_path: Path, code: bytes) -> None:
    refused(zipped(tmp_path / "f.pt", code))


def test_a_pickle_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MAX_OPCODES", 1000)
    refused(zipped(tmp_path / "f.pt", b"\x80\x02" + b"N" * 1001 + b"."), "over 1000 steps")


# --- bombs


def tensor(storage: bytes = text("0"), offset: bytes = b"K\0", size: bytes = b"(K\2t") -> bytes:
    """The fragment of a tensor of one dimension in the first storage of own_file."""
    reference = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + storage + b"NK\x08tQ"
    strides = b"(K\1t"
    requires_grad = b"\x89"
    hooks = b"N"
    arguments = b"(" + reference + offset + size + strides + requires_grad + hooks + b"t"
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def model_of(tensor: bytes) -> bytes:
    return b"}" + text(ROWS[0]) + tensor + b"s"


def card_with(key: str, value: bytes) -> bytes:
    card = b"}" + text("scale") + text("n") + b"s" + text("sppf_act") + b"\x88s"
    return card + text(key) + value + b"s"


class Place(NamedTuple):
    """Where in a best.pt a value is put."""

    key: str
    fragment: Callable[[bytes], bytes] = lambda value: value  # around the value


READ = {
    "names": Place("names"),
    "model": Place("model"),
    "card": Place("card"),
    "format": Place("format"),
    "scale": Place("card", lambda value: card_with("scale", value)),
    "storage": Place("model", lambda value: model_of(tensor(storage=value))),
    "offset": Place("model", lambda value: model_of(tensor(offset=value))),
    "size": Place("model", lambda value: model_of(tensor(size=value))),
}
OF_NO_INTEREST = {
    "ema": Place("ema"),
    "anything": Place("anything"),
    "license": Place("card", lambda value: card_with("license", value)),
    "sppf_act": Place("card", lambda value: card_with("sppf_act", value)),
}


def peak_memory() -> int:
    """KiB, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_in_what_is_read_is_refused_in_small_memory(tmp_path: Path, bomb: str) -> None:
    good = own_file(tmp_path / "good.pt")
    before = peak_memory()
    for place in READ.values():
        fragment = place.fragment(BOMBS[bomb])
        refused(spliced(tmp_path / "f.pt", good, 2, fragment, place.key))
    assert peak_memory() - before < 200_000


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_bomb_of_no_interest_goes_off_nowhere(tmp_path: Path, bomb: str) -> None:
    good = own_file(tmp_path / "good.pt")
    before = peak_memory()
    for place in OF_NO_INTEREST.values():
        path = spliced(tmp_path / "f.pt", good, 2, place.fragment(BOMBS[bomb]), place.key)
        with contextlib.suppress(UserError):
            assert read(path).license in ("", "of the data")
    assert peak_memory() - before < 200_000


def test_control_a_file_with_a_tensor_in_that_place_is_read(tmp_path: Path) -> None:
    good = own_file(tmp_path / "good.pt")
    path = spliced(tmp_path / "f.pt", good, 2, model_of(tensor()), "model")
    assert read(path).state[ROWS[0]].shape == (2,)


# --- trees


def in_itself(model: type[nn.Module]) -> nn.Module:
    root = model()
    root._modules["again"] = root
    return root


def in_itself_without_a_name(model: type[nn.Module]) -> nn.Module:
    root = model()
    root._modules[""] = root
    return root


def in_itself_by_a_long_name(model: type[nn.Module]) -> nn.Module:
    root = model()
    root._modules["x" * 1_000_000] = root
    return root


def doubled(model: type[nn.Module]) -> nn.Module:
    """Each holds the one before it twice: 2 ** 40 names."""
    root = model()
    for _ in range(40):
        inner = root
        root = model()
        root._modules |= {"a": inner, "b": inner}
    return root


def of_many_parameters(model: type[nn.Module]) -> nn.Module:
    root = model()
    root._parameters = dict.fromkeys(map(str, range(30_000)))
    return root


@pytest.mark.parametrize(
    "tree",
    [
        in_itself,
        in_itself_without_a_name,
        in_itself_by_a_long_name,
        doubled,
        of_many_parameters,
    ],
)
def test_a_tree_that_is_cyclic_or_explodes_is_refused(
    public: PublicClasses, tmp_path: Path, tree: Callable[[type[nn.Module]], nn.Module]
) -> None:
    root = tree(public["DetectionModel"])
    root.names = {0: "a"}
    refused(public_file(tmp_path / "f.pt", root), "without end")


# --- tensors


@pytest.mark.parametrize(
    "offset, size, stride",
    [
        (0, (5,), (1,)),
        (5, (1,), (1,)),
        (0, (2, 2), (4, 1)),
        (0, (2,), (4,)),
        (-1, (2,), (1,)),
        (0, (-1,), (1,)),
        (3, (2,), (-1,)),
        (0, (1 << 30,), (0,)),
        (0, (1 << 62, 1 << 62), (0, 0)),
        (0, (2,), (1, 1)),
        (0, (True,), (1,)),
        (0, (2.0,), (1,)),
        (0, "ab", "cd"),
        (0, 2, 1),
        ([], (2,), (1,)),
    ],
)
def test_a_tensor_outside_its_storage_is_refused(
    tmp_path: Path, offset: Any, size: Any, stride: Any
) -> None:
    storage = torch.rand(4)._typed_storage()
    crafted = Reduced(
        torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict()
    )
    state = own_content()["model"] | {"x": crafted}
    refused(own_file(tmp_path / "f.pt", model=state), "ValueError|TypeError")


def test_one_storage_named_many_times_is_refused(tmp_path: Path) -> None:
    shared = torch.rand(1 << 16)
    state = own_content()["model"] | {str(n): shared for n in range(1000)}
    refused(own_file(tmp_path / "f.pt", model=state), "outside its storage")


@pytest.mark.parametrize("change", ["shorter", "longer", "empty"])
def test_a_storage_of_another_length_is_refused(tmp_path: Path, change: str) -> None:
    def resize(entries: dict[str, bytes]) -> None:
        content = entries["f/data/0"]
        lengths = {"shorter": content[:-4], "longer": content + b"1234", "empty": b""}
        entries["f/data/0"] = lengths[change]

    refused(rezipped(own_file(tmp_path / "f.pt"), resize))


def test_a_storage_that_is_not_there_is_refused(tmp_path: Path) -> None:
    path = rezipped(own_file(tmp_path / "f.pt"), lambda entries: entries.pop("f/data/0"))
    refused(path, "KeyError")
