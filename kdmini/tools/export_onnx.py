"""A network as an ONNX model.

Legend: N images, S image size.
"""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
import torch

from kdmini.contracts import UserError
from kdmini.memory import exhausted
from kdmini.tools.export_form import Form, Halved, Trial, answers, check, joined, trials
from kdmini.tools.export_nms import Suppressed, in_onnx
from kdmini.typed import short

STRIDE = 32  # pixels; the sides of an image are multiples of it

REMEDY = "leave out --free, --nms or --half, or give --to torchscript"


def to_onnx(
    network: Any,
    form: Any,
    imgsz: int,
    metadata: dict[str, str],
    free: str = "batch",
    half: bool = False,
) -> bytes:
    """An ONNX model, compared with the network, which is folded.

    form: a Form of it. free, half: see kdmini.tools.export.How.

    Raises UserError where a package is missing, the exporter gives up or the two differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"--to onnx needs the package {error.name}: pip install -e '.[export]' in the checkout"
        ) from None

    tried = trials(imgsz, free)
    expected = [answers(form, trial) for trial in tried]
    network.fold()
    # where sides are free any will do, but of one stride alone they would be taken for fixed
    images = torch.rand(2, 3, 64, 96) if free == "all" else tried[0].batches[-1]
    with silenced(), one_line("ONNX", REMEDY):
        program = torch.onnx.export(
            Halved(form) if half else form,
            (images,),
            dynamo=True,
            dynamic_shapes={"images": sides(free)},
            input_names=["images"],
            output_names=form.outputs,
            custom_translation_table=in_onnx() if isinstance(form, Suppressed) else None,
        )
    assert program is not None  # it is where dynamo=True
    program.model.metadata_props.update(metadata | form.facts)
    content = program.model_proto.SerializeToString()
    compare(content, form, tried, expected, half)
    return content


def sides(free: str) -> dict[int, Any] | None:
    """Dimensions of the images that are not fixed -> the numbers that they may be."""
    if free == "none":
        return None
    made: dict[int, Any] = {0: torch.export.Dim("batch")}
    if free == "all":
        made[2] = STRIDE * torch.export.Dim("rows")
        made[3] = STRIDE * torch.export.Dim("columns")
    return made


@contextmanager
def silenced() -> Iterator[None]:
    """Prints, warns and logs nothing: the exporter tells of its own deprecations."""
    level = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable()
        try:
            yield
        finally:
            logging.disable(level)


@contextmanager
def one_line(what: str, remedy: str) -> Iterator[None]:
    """Within it, whatever torch raises, which may be anything, becomes a UserError."""
    try:
        yield
    except Exception as error:
        if exhausted(error):
            raise
        cause = error.__cause__ or error  # the exporter wraps it in advice for its developers
        reason = str(cause).strip().partition("\n")[0] or type(cause).__name__
        raise UserError(
            f"the network cannot be made {what} so ({short(reason)}); nothing was written, {remedy}"
        ) from error


def compare(
    content: bytes,
    form: Form,
    tried: Sequence[Trial],
    expected: Sequence[list[np.ndarray]],
    half: bool = False,
) -> None:
    """Prints how far onnxruntime's outputs are from PyTorch's.

    expected: PyTorch's outputs in each trial. Raises UserError where the two are too far
    apart.
    """
    try:
        import onnxruntime
    except ImportError:
        print(
            "not compared with PyTorch, for want of onnxruntime: "
            "pip install -e '.[export]' in the checkout"
        )
        return

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    with one_line("ONNX", REMEDY):
        session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        found = [
            joined(session.run(form.outputs, {"images": batch.numpy()}) for batch in trial.batches)
            for trial in tried
        ]
    for trial, ours, true in zip(tried, found, expected, strict=True):
        check(form, trial, ours, true, half)
