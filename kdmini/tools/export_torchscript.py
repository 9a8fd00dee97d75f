"""A network as TorchScript, a program for torch without the Python that it is from."""

import io
import json
from typing import Any

import torch

from kdmini.tools.export_form import Halved, answers, check, trials
from kdmini.tools.export_onnx import one_line, silenced

FACTS = "config.txt"  # in the archive; where programs that read YOLO models look for metadata


def to_torchscript(
    network: Any, form: Any, imgsz: int, metadata: dict[str, str], half: bool = False
) -> bytes:
    """A traced form, compared with the network, which is folded.

    form: a Form of it. half: see kdmini.tools.export.How.

    Raises UserError where the tracer gives up or the two differ.
    """
    tried = trials(imgsz, "batch")
    expected = [answers(form, trial) for trial in tried]
    network.fold()
    program = Halved(form) if half else form
    buffer = io.BytesIO()
    remedy = "leave --half out" if half else "give --to onnx"
    with silenced(), one_line("TorchScript", remedy), torch.no_grad():
        traced = torch.jit.trace(program.eval(), tried[0].batches[-1], check_trace=False)
        for module in traced.modules():
            follow_device(module)
        facts = json.dumps(metadata | form.facts)
        torch.jit.save(traced, buffer, _extra_files={FACTS: facts})
        found = [answers(traced, trial) for trial in tried]
    for trial, ours, true in zip(tried, found, expected, strict=True):
        check(form, trial, ours, true, half)
    return buffer.getvalue()


def follow_device(module: Any) -> None:
    """What a traced module makes anew, such as anchor points, it makes where its input is.

    A trace writes down the device that it was made on. In place.
    """
    try:
        graph = module.graph
    except RuntimeError:  # it is never called by itself
        return
    devices = [
        node.output()
        for node in graph.findAllNodes("prim::Constant")
        if node.output().type().kind() == "DeviceObjType"
    ]
    if not devices:
        return
    _, images, *_ = graph.inputs()
    of_images = graph.create("prim::device", [images])
    of_images.output().setType(devices[0].type())
    graph.prependNode(of_images)
    for device in devices:
        device.replaceAllUsesWith(of_images.output())
