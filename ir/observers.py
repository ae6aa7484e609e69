"""Observers: identity nodes in the graph that accumulate statistics of what flows through them."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from zeroskip.ir import process_group
from zeroskip.ir.dataflow import is_elementwise, is_movement
from zeroskip.ir.errors import CalibrationError
from zeroskip.ir.linears import Linear, LinearUse
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.shared_streams import own_batches
from zeroskip.ir.statistics import EdgeStatistics, Statistics

aten = torch.ops.aten


class Observer(torch.nn.Module):
    """Hands its input on unchanged and adds it to the statistics.

    Sums are float64, because E[x^2] - E[x]^2 of channels with massive activations cancels. The Gram
    matrix is float32: over 131,072 tokens its entries stayed within 2e-6 of sqrt(G_ii G_jj), also
    with a mean of five deviations and a channel a thousand times the others, far below any damping.

    Args:
        width: Channels, the last dimension of the input.
        experts: Number of groups that the rows belong to; 1 for an ordinary edge.
        gram: Also accumulate x x^T in float32.
    """

    count: torch.Tensor
    total: torch.Tensor
    total_of_squares: torch.Tensor
    abs_max: torch.Tensor
    gram: torch.Tensor | None

    def __init__(self, width: int, experts: int = 1, gram: bool = False) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(experts, dtype=torch.int64))
        self.register_buffer("total", torch.zeros(experts, width, dtype=torch.float64))
        self.register_buffer("total_of_squares", torch.zeros(experts, width, dtype=torch.float64))
        self.register_buffer("abs_max", torch.zeros(experts, width))
        self.register_buffer("gram", torch.zeros(experts, width, width) if gram else None)
        self._parts: list[list[torch.Tensor]] = []

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Observes x.

        Args:
            x: [..., width]; [experts, tokens, width] when there are experts and no offsets.
            mask: Non-zero for a token; one entry for each row of x.
            offsets: End row of each expert in x [rows, width].

        Returns:
            x itself.
        """
        experts = self.count.shape[0]
        rows = x.reshape(-1, x.shape[-1])
        if experts == 1:
            self._add(0, _unpadded(rows, mask))
            return x
        if offsets is None:
            ends = [(e + 1) * (rows.shape[0] // experts) for e in range(experts)]
        else:
            ends = [int(end) for end in offsets.tolist()]
        start = 0
        for expert, end in enumerate(ends):
            part = None if mask is None else mask.reshape(-1)[start:end]
            self._add(expert, _unpadded(rows[start:end], part))
            start = end
        return x

    def _add(self, expert: int, rows: torch.Tensor) -> None:
        if rows.shape[0] == 0:
            return
        low, high = torch.aminmax(rows, dim=0)
        peak = torch.maximum(high, -low).float()
        torch.maximum(self.abs_max[expert], peak, out=self.abs_max[expert])
        self.count[expert] += rows.shape[0]
        exact = rows.to(torch.float64, copy=True)
        self.total[expert] += exact.sum(0)
        self.total_of_squares[expert] += exact.square_().sum(0)
        if self.gram is not None:
            values = rows.float()
            self.gram[expert].addmm_(values.T, values)

    def set_aside(self) -> None:
        """Keeps the sums of the batch that was just observed apart from those that come."""
        sums = (self.count, self.total, self.total_of_squares)
        self._parts.append([value.clone() for value in sums])
        for value in sums:
            value.zero_()

    def combine(self, batches: int) -> None:
        """Adds up what was set aside in all processes, batch by batch as one process would.

        The float64 sums come out equal to the last bit. Gram matrices are float32, and are added
        process by process.

        Args:
            batches: Number of batches of all processes.
        """
        for index, value in enumerate((self.count, self.total, self.total_of_squares)):
            parts = [part[index] for part in self._parts]
            own = torch.stack(parts) if parts else value.new_zeros((0, *value.shape))
            for row in process_group.gathered(own, batches):
                value += row
        self._parts = []
        self.abs_max.copy_(process_group.largest(self.abs_max))
        if self.gram is not None:
            self.gram.copy_(process_group.summed(self.gram))

    def statistics(self, expert: int = 0) -> EdgeStatistics:
        """Returns what was seen, for one expert.

        Raises:
            CalibrationError: A value was not finite.
        """
        squares = self.total_of_squares[expert]
        if not torch.isfinite(squares).all():
            channel = int((~torch.isfinite(squares)).nonzero()[0])
            raise CalibrationError(
                f"the activations hold NaN or inf (first in channel {channel})",
                next_step="check the model on this calibration data; fp16 may overflow",
            )
        return EdgeStatistics(
            count=int(self.count[expert]),
            total=self.total[expert].clone(),
            total_of_squares=squares.clone(),
            abs_max=self.abs_max[expert].clone(),
            gram=None if self.gram is None else self.gram[expert].clone(),
        )


def _unpadded(rows: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Returns the rows that are tokens; without a copy when all of them are."""
    if mask is None:
        return rows
    kept = mask.reshape(-1).bool()
    return rows if kept.all() else rows[kept]


def insert_observers(program: Program, linears: Iterable[Linear], gram: bool = False) -> Program:
    """Puts one observer on every activation edge that feeds one of the linears.

    Returns:
        A Program at level `annotated`; linears that share an input share its observer.
    """
    edited = program.fork()
    nodes = {node.name: node for node in edited.graph.nodes}
    placed: dict[tuple[str, int], fx.Node] = {}
    for linear in linears:
        for use in linear.uses:
            experts = _experts(linear, program)
            key = (use.activation.name, experts)
            if key not in placed:
                placed[key] = _insert(edited, nodes, use, experts, gram, len(placed))
            nodes[use.node.name].replace_input_with(nodes[use.activation.name], placed[key])
    edited.graph_module.recompile()
    return dataclasses.replace(edited, level="annotated")


def _experts(linear: Linear, program: Program) -> int:
    if linear.expert is None:
        return 1
    return int(program.weights.source(linear.parameter).shape[0])


def _insert(
    program: Program,
    nodes: dict[str, fx.Node],
    use: LinearUse,
    experts: int,
    gram: bool,
    number: int,
) -> fx.Node:
    activation = nodes[use.activation.name]
    width = int(activation.meta["val"].shape[-1])
    name = f"observer_{number}"
    program.graph_module.add_submodule(name, Observer(width, experts, gram))
    with program.graph.inserting_before(nodes[use.node.name]):
        mask = row_mask(program, activation)
        offsets = None if use.offsets is None else nodes[use.offsets.name]
        node = program.graph.call_module(name, (activation, mask, offsets))
    node.meta = {"val": activation.meta["val"], "observed": use.node.name}
    return node


def row_mask(program: Program, activation: fx.Node) -> fx.Node | None:
    """Finds, or builds, the node that tells for each row of an activation whether it is a token.

    An input mask whose shape is the activation's without its channels fits as it is, also when the
    activation is flattened. Where rows were gathered (tokens routed to experts), the same gather is
    applied to the mask. None when the program has no mask that fits: every row then counts.
    """
    for name in program.padding_masks:
        mask = next(n for n in program.graph.find_nodes(op="placeholder") if n.target == name)
        found = _mask_of_rows(program.graph, activation, mask)
        if found is not None:
            return found
    return None


def _mask_of_rows(graph: fx.Graph, node: fx.Node, mask: fx.Node) -> fx.Node | None:
    tokens = mask.meta["val"].shape
    while True:
        value = node.meta.get("val")
        if isinstance(value, (list, tuple)) and is_movement(node):
            node = node.all_input_nodes[0]  # The parts of a chunk have the rows of the whole.
            continue
        if not isinstance(value, torch.Tensor) or value.dim() < 2:
            return None
        rows = value.shape[:-1]
        if _same(rows, tokens) or _same(rows, (math.prod(tokens),)):
            return mask
        arguments: Any = node.args
        if node.target is aten.index.Tensor and len(arguments[1]) == 1:
            source, (index,) = arguments
            inner = _mask_of_rows(graph, source, mask)
            if inner is None:
                return None
            flat = graph.call_function(aten.reshape.default, (inner, [-1]))
            gathered = graph.call_function(aten.index.Tensor, (flat, [index]))
            flat.meta = {"val": inner.meta["val"].reshape(-1)}
            gathered.meta = {"val": flat.meta["val"].new_empty((rows[0],))}
            return gathered
        step = _same_rows(node, rows)
        if step is None:
            return None
        node = step


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two shapes are equal for every value of their symbols."""
    return len(a) == len(b) and all(
        statically_known_true(x == y) for x, y in zip(a, b, strict=True)
    )


def _same_rows(node: fx.Node, rows: torch.Size) -> fx.Node | None:
    """Returns an input whose rows are this node's rows, for operators that work row by row."""
    if node.op == "call_module":
        return node.all_input_nodes[0]  # An observer that was inserted before.
    by_row = is_elementwise(node) or is_movement(node) or "linear" in str(node.target)
    if not by_row and "mm" not in str(node.target):
        return None
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if isinstance(value, (list, tuple)):
            return source if source.op == "call_function" else None
        if isinstance(value, torch.Tensor) and _same(value.shape[:-1], rows):
            return source
    return None


def run_observed(observed: Program, calibration: Sequence[Batch]) -> None:
    """Runs calibration batches through a program with observers; processes share the batches."""
    running = observed.loaded()
    observers = []
    if process_group.count() > 1:
        observers = [m for m in observed.graph_module.modules() if isinstance(m, Observer)]
    for _, batch in own_batches(calibration):
        running.run({name: batch[name] for name in observed.inputs})
        for observer in observers:
            observer.set_aside()
    for observer in observers:
        observer.combine(len(calibration))


def read_observers(observed: Program, linears: Iterable[Linear], program: Program) -> Statistics:
    """Collects the statistics of the linears from an observed program that has been run.

    Raises:
        CalibrationError: An activation was not finite; names the linear.
    """
    by_use: dict[str, Observer] = {}
    for node in observed.graph.find_nodes(op="call_module"):
        module = observed.graph_module.get_submodule(str(node.target))
        if isinstance(module, Observer):
            by_use.update({user.name: module for user in node.users})
    edges: dict[str, EdgeStatistics] = {}
    cached: dict[tuple[int, ...], EdgeStatistics] = {}
    for linear in linears:
        # A shared weight has several uses; what enters any of them counts.
        seen = list(dict.fromkeys(by_use[use.node.name] for use in linear.uses))
        expert = linear.expert or 0
        key = (expert, *map(id, seen))
        if key not in cached:
            try:
                cached[key] = functools.reduce(
                    operator.add, (observer.statistics(expert) for observer in seen)
                )
            except CalibrationError as error:
                error.where = linear.name
                raise
        edges[linear.name] = cached[key]
    return Statistics(edges)
