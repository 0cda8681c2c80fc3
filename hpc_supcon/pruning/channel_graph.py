"""Which channels of an encoder can be removed, and which entries of its tensors go with each of them.

The encoder is traced by torch.export. Every output channel of a convolution starts a unit; units follow the values
through the graph, and an addition makes those of its two sides one unit. A unit that reaches an operation which does
not treat channels independently, or the encoder's output, is kept.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import ConfigError, first_line
from .channel_shapes import Flow, Units, reshaped

SUPPORTED = (
    "convolutions (also grouped and depthwise) joined by BatchNorm, activations, pooling, flattening, additions, "
    "products, concatenations and linear layers"
)
ZERO_TO_ZERO = (
    "relu relu6 silu gelu elu selu celu leaky_relu hardswish mish tanh neg abs dropout feature_dropout clone "
    "contiguous detach to _to_copy alias"
).split()
POOLING = (
    "max_pool2d avg_pool2d adaptive_avg_pool2d adaptive_max_pool2d upsample_nearest2d upsample_bilinear2d "
    "upsample_bicubic2d"
).split()
ZERO_TO_OTHER = ("sigmoid", "hardsigmoid", "softplus", "log_sigmoid", "exp")
RESHAPES = ("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze")
REDUCTIONS = ("mean", "sum", "amax", "amin", "max")
BINARY = ("add", "sub", "mul", "div")
IGNORED = ("_assert_tensor_metadata",)


@dataclass(frozen=True)
class ChannelGraph:
    """The removable channels of a module."""

    axes: Mapping[tuple[str, int], Tensor]
    """(name in the state dict, dimension) -> int64 [size]: the unit of each entry, 1 ... `units`; 0: it is kept."""
    units: int

    outputs: tuple[str, ...]
    """The weights of convolutions, in the order of the graph, of which output channels can be removed."""


def trace_channels(encoder: nn.Module, example: Tensor) -> ChannelGraph:
    """The removable channels of `encoder` for inputs like `example` [N, C, H, W]; the encoder is left as it is.

    Raises ConfigError for one that torch.export cannot trace, or in which nothing can be removed.
    """
    model = copy.deepcopy(encoder).eval().requires_grad_(False)
    name = type(encoder).__name__
    try:
        program = torch.export.export(model, (example,))
    except Exception as error:  # it raises many types
        raise ConfigError(
            f"prune.method=channels: {name} cannot be traced: {first_line(error)}; supported are {SUPPORTED}"
        ) from error
    graph = _Walk(model, program).graph()
    if not graph.units:
        raise ConfigError(
            f"prune.method=channels: no channel of {name} can be removed by itself; supported are {SUPPORTED}"
        )
    return graph


class _Walk:
    """Follows the units through the graph of an exported program."""

    def __init__(self, model: nn.Module, program: torch.export.ExportedProgram) -> None:
        self.model, self.program = model, program
        self.units = Units()
        self.flows: dict[fx.Node, Flow | None] = {}
        self.axes: dict[tuple[str, int], npt.NDArray[np.int64]] = {}
        signature = program.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.foreign: set[str] = set()
        """Tensors that an operation reads which is not their layer's own."""
        self.handlers: dict[str, Callable[[fx.Node, str], Flow | None]] = {
            **dict.fromkeys(ZERO_TO_ZERO, self._keep),
            **dict.fromkeys(ZERO_TO_OTHER, self._keep),
            **dict.fromkeys(POOLING, self._pool),
            **dict.fromkeys(("conv1d", "conv2d", "conv3d"), self._convolution),
            **dict.fromkeys(RESHAPES, self._reshape),
            **dict.fromkeys(REDUCTIONS, self._reduce),
            **dict.fromkeys(BINARY, self._binary),
            **dict.fromkeys(IGNORED, lambda node, op: None),
            **dict.fromkeys(("pad", "constant_pad_nd"), self._pad),
            "batch_norm": self._batch_norm,
            "linear": self._linear,
            "hardtanh": self._keep,
            "permute": self._permute,
            "transpose": self._permute,
            "expand": self._expand,
            "slice": self._slice,
            "select": self._slice,
            "cat": self._cat,
            "stack": self._cat,
        }

    def graph(self) -> ChannelGraph:
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self.flows[node] = self._call(node)
            elif node.op == "output":
                self._freeze(node)
        for (name, _), units in self.axes.items():
            if name in self.foreign:
                self.units.freeze(units)
        numbers = self.units.numbered(self.axes.values())
        tensors = self.model.state_dict(keep_vars=True)
        axes, outputs = {}, []
        for (name, dim), units in self.axes.items():
            found = torch.from_numpy(numbers[units])
            if not found.any():
                continue
            # a module in several places has a name for each
            for alias in (other for other, t in tensors.items() if t is tensors[name]):
                axes[alias, dim] = found
            if dim == 0 and name.endswith("weight") and isinstance(self._owner(name), _ConvNd):
                outputs.append(name)
        return ChannelGraph(axes, int(numbers.max(initial=0)), tuple(outputs))

    def _call(self, node: fx.Node) -> Flow | None:
        if node.target is operator.getitem:
            return self._item(node)
        op = str(node.target).split(".")[1].rstrip("_") if str(node.target).startswith("aten.") else ""
        handler = self.handlers.get(op)
        if handler is None:
            return self._freeze(node)
        return handler(node, op)

    def _freeze(self, node: fx.Node) -> None:
        """Keep all channels that `node` reads, and all tensors."""
        for source in node.all_input_nodes:
            self._read(source)
            if (flow := self.flows.get(source)) is not None:
                self.units.freeze(flow.units)

    def _read(self, source: Any) -> None:
        if isinstance(source, fx.Node) and source.name in self.names:
            self.foreign.add(self.names[source.name])

    def _owner(self, name: str) -> nn.Module:
        return self.model.get_submodule(name.rpartition(".")[0])

    def _layer(self, node: fx.Node, kind: type[nn.Module]) -> tuple[str, Any] | None:
        """(name, module) of the layer whose own weight `node` takes as its second argument, or None."""
        weight = node.args[1]
        name = self.names.get(weight.name) if isinstance(weight, fx.Node) else None
        if name is None or name.rpartition(".")[2] != "weight":
            return None
        owner = self._owner(name)
        return (name, owner) if isinstance(owner, kind) else None

    def _axis(self, tensor: Any, dim: int, units: npt.NDArray[np.int64]) -> None:
        """`units` are those along a dimension of a parameter or buffer, given by name or node."""
        name = tensor if isinstance(tensor, str) else self.names[tensor.name]
        if (known := self.axes.setdefault((name, dim), units)) is not units:
            self.units.tie(known, units)

    def _channels(self, source: fx.Node, dim: int, size: int) -> npt.NDArray[np.int64]:
        """The units of a layer's input channels, kept where a removed channel would not be zero."""
        flow = self.flows.get(source)
        if flow is None:
            return np.zeros(size, np.int64)
        if flow.dim != dim or not flow.zero:
            self.units.freeze(flow.units)
            return np.zeros(size, np.int64)
        return flow.units

    def _convolution(self, node: fx.Node, op: str) -> Flow | None:
        found = self._layer(node, _ConvNd)
        if found is None or found[1].transposed:
            return self._freeze(node)
        name, layer = found
        source = node.args[0]
        assert isinstance(source, fx.Node)
        inputs = self._channels(source, 1, layer.in_channels)
        outputs = self.axes[name, 0] if (name, 0) in self.axes else self.units.new(layer.out_channels)
        self._axis(name, 0, outputs)
        if layer.groups == 1:
            self._axis(name, 1, inputs)
        else:  # groups have equal sizes, so that only a whole group can be removed
            members = np.concatenate([inputs.reshape(layer.groups, -1), outputs.reshape(layer.groups, -1)], axis=1)
            self.units.tie(members[:, 1:], np.broadcast_to(members[:, :1], members[:, 1:].shape))
        if layer.bias is not None:
            self._axis(name.removesuffix("weight") + "bias", 0, outputs)
        return Flow(1, outputs, zero=True)

    def _batch_norm(self, node: fx.Node, op: str) -> Flow | None:
        source, tensors = node.args[0], node.args[1:5]
        assert isinstance(source, fx.Node)
        flow = self.flows.get(source)
        if flow is None or flow.dim != 1 or self._layer(node, _BatchNorm) is None:
            return self._freeze(node)
        for tensor in tensors:
            if isinstance(tensor, fx.Node):
                self._axis(tensor, 0, flow.units)
        return Flow(1, flow.units, zero=True)

    def _linear(self, node: fx.Node, op: str) -> Flow | None:
        found = self._layer(node, nn.Linear)
        if found is None:
            return self._freeze(node)
        source = node.args[0]
        assert isinstance(source, fx.Node)
        self._axis(found[0], 1, self._channels(source, len(_shape(source)) - 1, found[1].in_features))
        return None

    def _keep(self, node: fx.Node, op: str) -> Flow | None:
        flow = self._flow(node)
        if flow is None:
            return self._freeze(node)
        zero = flow.zero and op not in ZERO_TO_OTHER
        if op == "hardtanh" and len(node.args) > 1:
            low, high = (*node.args[1:], 1)[:2]
            zero = flow.zero and low <= 0 <= high  # type: ignore[operator]
        return Flow(flow.dim, flow.units, zero)

    def _pool(self, node: fx.Node, op: str) -> Flow | None:
        flow = self._flow(node)
        return self._freeze(node) if flow is None or flow.dim != len(_shape(node)) - 3 else flow

    def _flow(self, node: fx.Node) -> Flow | None:
        source = node.args[0]
        return self.flows.get(source) if isinstance(source, fx.Node) else None

    def _item(self, node: fx.Node) -> Flow | None:
        """The first result of an operation with several: max.dim."""
        return self._flow(node) if node.args[1] == 0 else self._freeze(node)

    def _pad(self, node: fx.Node, op: str) -> Flow | None:
        flow, pad = self._flow(node), node.args[1]
        value = node.args[-1] if len(node.args) > 2 and not isinstance(node.args[-1], str) else 0
        assert isinstance(pad, Sequence)
        if flow is None or len(_shape(node)) - len(pad) // 2 <= flow.dim:
            return self._freeze(node)
        return Flow(flow.dim, flow.units, flow.zero and not value)

    def _reshape(self, node: fx.Node, op: str) -> Flow | None:
        flow, source = self._flow(node), node.args[0]
        assert isinstance(source, fx.Node)
        after = None if flow is None else reshaped(flow, _shape(source), _shape(node))
        return after or self._freeze(node)

    def _reduce(self, node: fx.Node, op: str) -> Flow | None:
        flow, source = self._flow(node), node.args[0]
        dims = node.args[1] if len(node.args) > 1 else None
        if flow is None or dims is None or isinstance(dims, fx.Node):
            return self._freeze(node)
        assert isinstance(source, fx.Node)
        reduced = {d % len(_shape(source)) for d in ([dims] if isinstance(dims, int) else dims)}  # type: ignore
        if flow.dim in reduced or not reduced:
            return self._freeze(node)
        keep = len(node.args) > 2 and bool(node.args[2])
        return Flow(flow.dim if keep else flow.dim - sum(d < flow.dim for d in reduced), flow.units, flow.zero)

    def _permute(self, node: fx.Node, op: str) -> Flow | None:
        flow = self._flow(node)
        if flow is None:
            return self._freeze(node)
        order = list(range(len(_shape(node))))
        if op == "permute":
            order = [d % len(order) for d in node.args[1]]  # type: ignore[union-attr, operator]
        else:
            a, b = (d % len(order) for d in node.args[1:3])  # type: ignore[operator]
            order[a], order[b] = order[b], order[a]
        return Flow(order.index(flow.dim), flow.units, flow.zero)

    def _expand(self, node: fx.Node, op: str) -> Flow | None:
        flow, source = self._flow(node), node.args[0]
        if flow is None:
            return self._freeze(node)
        assert isinstance(source, fx.Node)
        dim = flow.dim + len(_shape(node)) - len(_shape(source))
        return Flow(dim, flow.units, flow.zero) if _shape(node)[dim] == len(flow.units) else self._freeze(node)

    def _slice(self, node: fx.Node, op: str) -> Flow | None:
        """slice or select, along another dimension than that of the channels."""
        flow, source = self._flow(node), node.args[0]
        assert isinstance(source, fx.Node)
        at = (node.args[1] if len(node.args) > 1 else 0) % len(_shape(source))  # type: ignore[operator]
        if flow is None or (at == flow.dim and (op == "select" or _shape(node)[at] != len(flow.units))):
            return self._freeze(node)
        return Flow(flow.dim - (op == "select" and at < flow.dim), flow.units, flow.zero)

    def _cat(self, node: fx.Node, op: str) -> Flow | None:
        sources: Any = node.args[0]
        flows, ndim = [self.flows.get(source) for source in sources], len(_shape(node))
        at = (node.args[1] if len(node.args) > 1 else 0) % ndim  # type: ignore[operator]
        known = [flow for flow in flows if flow is not None]
        if not known or len({flow.dim for flow in known}) > 1:
            return self._freeze(node)
        zero, dim = all(flow is not None and flow.zero for flow in flows), known[0].dim
        if op == "cat" and at == dim:
            widths = [_shape(source)[at] for source in sources]
            parts = [np.zeros(n, np.int64) if f is None else f.units for f, n in zip(flows, widths, strict=True)]
            for source in sources:
                self._read(source)
            # a value that is not followed keeps its channels: whether it is zero does not matter
            return Flow(dim, np.concatenate(parts), all(flow.zero for flow in known))
        if len(known) < len(flows):
            return self._freeze(node)
        for flow in known[1:]:
            self.units.tie(known[0].units, flow.units)
        return Flow(dim + (op == "stack" and at <= dim), known[0].units, zero)

    def _binary(self, node: fx.Node, op: str) -> Flow | None:
        sides = [a for a in node.args[:2] if isinstance(a, fx.Node)]
        flows = {side: flow for side in sides if (flow := self.flows.get(side)) is not None and len(flow.units) > 1}
        if not flows or (op == "div" and (node.args[1] in flows or node.args[0] not in flows)):
            return self._freeze(node)
        ndim = len(_shape(node))
        dims = {flow.dim + ndim - len(_shape(side)) for side, flow in flows.items()}
        first, dim = next(iter(flows.values())), min(dims)
        for side in sides:
            self._read(side)
            at = dim - (ndim - len(_shape(side)))
            width = _shape(side)[at] if at >= 0 else 1
            if len(dims) > 1 or (side not in flows and width > 1):
                return self._freeze(node)
            if side in flows:
                self.units.tie(first.units, flows[side].units)
            elif (single := self.flows.get(side)) is not None:
                self.units.freeze(single.units)  # one channel, for all of the other side's
        zeros = [flow.zero for flow in flows.values()]
        if op in ("mul", "div"):
            return Flow(dim, first.units, any(zeros))
        return Flow(dim, first.units, len(flows) == 2 and all(zeros))


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (tuple, list)) else value).shape)
