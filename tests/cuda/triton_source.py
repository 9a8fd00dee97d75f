"""What Inductor writes for the gather of rendering, for a pretended card: nothing is run.

python -m tests.cuda.triton_source PIXELS
"""

import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.utils._triton as triton_here
from torch._dispatch.python import enable_python_dispatcher
from torch._dynamo.device_interface import CudaInterface
from torch._inductor.codegen import triton
from torch._inductor.compile_fx import fake_tensor_prop
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.post_grad import view_to_reshape
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch.fx.experimental.proxy_tensor import make_fx

from kdmini.data.render import Axis, gather
from tests.cuda.card import CARD, pretend

IMAGES = 2
SIZE = 64


def source(count: int) -> str:
    """The kernels that gather from a buffer of so many pixels."""
    mode = pretend()
    answer_compiler()
    with mode:
        arguments = gathered_from(count)
        functional = torch.func.functionalize(run, remove="mutations_and_views")
        table = select_decomp_table()
        with enable_python_dispatcher():
            graph = make_fx(functional, decomposition_table=table)(*arguments)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    with V.set_fake_mode(mode), mode:
        view_to_reshape(graph)
        fake_tensor_prop(graph, arguments)
        lowering = GraphLowering(graph, example_inputs=arguments)
        handlers = (V.set_debug_handler(DebugContext()), V.set_graph_handler(lowering))
        with handlers[0], handlers[1], V.set_extern_kernel_nodes([]):
            lowering.run(*arguments)
            code, _ = lowering.codegen()
    return code.value


def gathered_from(count: int) -> list[torch.Tensor]:
    """The arguments of `run`."""
    axes = []
    for _ in range(2):
        shape = (IMAGES, 2, SIZE)
        axes += [
            torch.empty(IMAGES, SIZE, dtype=torch.bool, device=CARD),
            torch.empty(shape, dtype=torch.int64, device=CARD),
            torch.empty(shape, dtype=torch.int64, device=CARD),
            torch.empty(shape, device=CARD),
            torch.empty(shape, dtype=torch.bool, device=CARD),
        ]
    images = torch.empty(IMAGES, 3, SIZE, SIZE, device=CARD)
    pixels = torch.empty(count, dtype=torch.int32, device=CARD)
    colour = torch.empty(IMAGES, 3, device=CARD)
    return [images, pixels, colour, *axes]


def run(images: torch.Tensor, pixels: torch.Tensor, colour: torch.Tensor, *axes: Any) -> tuple:
    gather(images.unbind(1), pixels, Axis(*axes[:5]), Axis(*axes[5:]), colour)
    return ()


def answer_compiler() -> None:
    """What Inductor asks of a card before it writes for it: the numbers are of an H100."""
    card = SimpleNamespace(
        major=9,
        minor=0,
        name="pretended",
        multi_processor_count=132,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        total_memory=80 * 2**30,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=232448,
        shared_memory_per_multiprocessor=233472,
        L2_cache_size=50 * 2**20,
        clock_rate=1_980_000,
        memory_clock_rate=2_619_000,
        memory_bus_width=5120,
        gcnArchName="",
    )
    cuda: Any = torch.cuda
    cuda.get_device_properties = lambda device=None: card
    cuda.get_arch_list = lambda: ["sm_90"]
    interface: Any = CudaInterface
    worker: Any = CudaInterface.Worker
    worker.get_device_properties = staticmethod(lambda device=None: card)
    worker.current_device = staticmethod(lambda: 0)
    interface.get_device_properties = staticmethod(lambda device=None: card)
    interface.current_device = staticmethod(lambda: 0)
    interface.device_count = staticmethod(lambda: 1)
    interface.is_available = staticmethod(lambda: True)
    interface.get_compute_capability = staticmethod(lambda device=None: 90)
    for module in (triton_here, triton):
        if hasattr(module, "triton_hash_with_backend"):
            setattr(module, "triton_hash_with_backend", lambda: "pretended")  # noqa: B010
    inductor.fx_graph_cache = False


if __name__ == "__main__":
    print(source(int(sys.argv[1])))
