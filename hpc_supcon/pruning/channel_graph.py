"""Which channels of an encoder can be removed, and which entries of its tensors go with each of them.

The encoder is traced by torch.export. Every output channel of a convolution starts a unit; units follow the values
through the graph, and an addition makes those of its two sides one unit. A unit that reaches an operation which does
not treat channels independently, or the encoder's output, is kept.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..errors import ConfigError, first_line
from .channel_shapes import OPERATIONS, Flow, Indices, Operation, Units

SUPPORTED = (
    "convolutions (also grouped and depthwise) joined by BatchNorm, activations, pooling, flattening, additions, "
    "products, concatenations and linear layers"
)


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
        self.axes: dict[tuple[str, int], Indices] = {}
        signature = program.graph_signature
        self.names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.foreign: set[str] = set()
        """Tensors that an operation reads which is not their layer's own."""
        self.handlers: dict[str, Callable[[fx.Node, str], Flow | None]] = {
            **dict.fromkeys(("conv1d", "conv2d", "conv3d"), self._convolution),
            **dict.fromkeys(("add", "sub", "mul", "div"), self._binary),
            **dict.fromkeys(("cat", "stack"), self._cat),
            "batch_norm": self._batch_norm,
            "linear": self._linear,
            "_assert_tensor_metadata": lambda node, op: None,
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
        if node.target is operator.getitem:  # the first result of an operation with several: max.dim
            return self.flows.get(_first(node)) if node.args[1] == 0 else self._freeze(node)
        op = str(node.target).split(".")[1].rstrip("_") if str(node.target).startswith("aten.") else ""
        if op in self.handlers:
            return self.handlers[op](node, op)
        flow = self.flows.get(_first(node)) if op in OPERATIONS else None
        if flow is None:
            return self._freeze(node)
        after = OPERATIONS[op](flow, Operation(op, node.args, _shape(_first(node)), _shape(node)))
        return self._freeze(node) if after is None else after

    def _freeze(self, node: fx.Node) -> Flow | None:
        """Keep all channels that `node` reads, and all tensors: its result is not followed."""
        for source in node.all_input_nodes:
            self._read(source)
            if (flow := self.flows.get(source)) is not None:
                self.units.freeze(flow.units)
        return None

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

    def _axis(self, tensor: Any, dim: int, units: Indices) -> None:
        """`units` are those along a dimension of a parameter or buffer, given by name or node."""
        name = tensor if isinstance(tensor, str) else self.names[tensor.name]
        if (known := self.axes.setdefault((name, dim), units)) is not units:
            self.units.tie(known, units)

    def _channels(self, source: fx.Node, dim: int, size: int) -> Indices:
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
        inputs = self._channels(_first(node), 1, layer.in_channels)
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
        flow, tensors = self.flows.get(_first(node)), node.args[1:5]
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
        source = _first(node)
        self._axis(found[0], 1, self._channels(source, len(_shape(source)) - 1, found[1].in_features))
        return None

    def _cat(self, node: fx.Node, op: str) -> Flow | None:
        arguments: list[Any] = [*node.args, 0]
        sources, position = arguments[:2]
        flows, at = [self.flows.get(source) for source in sources], position % len(_shape(node))
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


def _first(node: fx.Node) -> fx.Node:
    """The first argument, a tensor."""
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _shape(node: fx.Node) -> tuple[int, ...]:
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, (tuple, list)) else value).shape)
