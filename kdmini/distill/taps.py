"""Forward-hook taps: the outputs of named submodules, without touching the model."""

import difflib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kdmini.contracts import Feats, UserError


class Taps:
    """Keeps the output of each named submodule during a forward pass.

    Attach after every deep copy (a copy takes the hooks with it) and before compilation (a
    compiled model ignores hooks that come later, in silence). Raises UserError for a name
    that does not exist.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        modules = dict(model.named_modules())
        if any(is_compiled(module) for module in modules.values()):
            raise RuntimeError(
                "taps must be attached before the model is compiled: hooks set later never fire"
            )
        self.names = list(names)
        self._to_map: Callable = getattr(model, "to_map", lambda name, output: output)
        self._feats: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}  # how often each was written to when it was kept
        for name in self.names:
            if name not in modules or not name:
                near = difflib.get_close_matches(name, modules, n=3)
                hint = f"; did you mean {' or '.join(near)}?" if near else ""
                model_name = type(model).__name__
                raise UserError(f"distill.taps: {model_name} has no submodule {name!r}{hint}")
        self._handles = [
            modules[name].register_forward_hook(self._keeper(name)) for name in self.names
        ]

    def _keeper(self, name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def keep(module: nn.Module, args: object, output: Tensor) -> None:
            self._feats[name] = output
            # a compiled network counts no writes; its taps have run before, not compiled
            if isinstance(output, Tensor) and not torch.compiler.is_compiling():
                self._versions[name] = output._version

        return keep

    def take(self) -> Feats:
        """-> {name: (N, C, H, W)} of the last forward pass, and forgets it.

        Raises UserError where a tap did not fire, gave something else, or was overwritten.
        """
        outputs = self._feats
        versions = self._versions
        self._feats = {}
        self._versions = {}
        silent = [name for name in self.names if name not in outputs]
        if silent:
            raise UserError(
                f"distill.taps: {', '.join(silent)} did not fire in a forward pass; "
                "name submodules that the detector calls, and no part of its head"
            )
        feats = {name: self._to_map(name, output) for name, output in outputs.items()}
        for name, feat in feats.items():
            if not isinstance(feat, Tensor) or feat.ndim != 4:
                raise UserError(
                    f"distill.taps: {name!r} gives no map of features but "
                    f"{shape_of(feat)}; name layers before the head"
                )
            if feat._version > versions.get(name, feat._version):
                raise UserError(
                    f"distill.taps: the map of {name!r} is overwritten by a later layer, as by "
                    "an activation in place; name that layer, or the block around both"
                )
        return feats

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


@torch.no_grad()
def feats_of(model: nn.Module, names: Sequence[str], images: Tensor) -> Feats:
    """The taps of one forward pass in evaluation mode, (N, C, H, W) each; leaves no hook
    behind.
    """
    taps = Taps(model, names)
    model.eval()(images)
    taps.remove()
    return taps.take()


def is_graph(name: str) -> bool:
    """Whether a submodule gives weights between positions, (N, heads, L, P), and no map of
    features: one that is called `graph` does.
    """
    return name.rpartition(".")[2] == "graph"


def shape_of(output: object) -> str:
    if isinstance(output, Tensor):
        return f"a tensor of {output.ndim} dimensions"
    return f"a {type(output).__name__}"


def is_compiled(module: nn.Module) -> bool:
    """By module.compile(), or by torch.compile(module)."""
    in_place = getattr(module, "_compiled_call_impl", None) is not None
    return in_place or hasattr(module, "_orig_mod")
