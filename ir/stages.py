"""A stage as a Program of its own, and stages put together again.

A stage's Program takes the activations that enter it and the original inputs; masks, positions and
everything else that does not depend on a parameter's product is computed again inside it. So no
pass can tell whether it sees a whole model or a part.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import fx

from zeroskip.ir.facts import Fact
from zeroskip.ir.linears import find_linears
from zeroskip.ir.packing import packed_parameters
from zeroskip.ir.partition import Stage
from zeroskip.ir.program import Batch, Program, attribute, holder
from zeroskip.ir.weights import Weights


def extract_stage(program: Program, stage: Stage, calibration: Sequence[Batch]) -> Program:
    """Makes a stage a Program.

    Args:
        program: The whole program; weights and facts are taken from it.
        stage: One of `find_stages(program)`.
        calibration: What enters the stage, one mapping for each batch; it must hold at least the
            stage's inputs. Without any the part cannot be run, only stitched.

    Returns:
        A Program whose placeholders are the stage's inputs followed by those of the program's own
        inputs that it needs, and whose outputs are named after the nodes that compute them. Padding
        masks come along in any case: statistics leave padding out.
    """
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    entering = set(stage.inputs)
    needed = _ancestors(stage.nodes, entering)
    inputs = program.graph.find_nodes(op="placeholder")
    needed |= {node for node in inputs if node.target in program.padding_masks}
    for node in stage.inputs:
        copies[node] = _placeholder(graph, node.name, node)
    for node in program.graph.nodes:
        if node in needed and node not in entering:
            copies[node] = (
                _placeholder(graph, str(node.target), node)
                if node.op == "placeholder"
                else graph.node_copy(node, copies.__getitem__)
            )
    graph.output(tuple(copies[node] for node in stage.outputs))
    module = fx.GraphModule(program.graph_module, graph)
    read = {str(n.target) for n in graph.find_nodes(op="get_attr")}
    # A packed linear still stands for its parameter, which no node reads any more.
    read |= {name for node in graph.nodes for name in packed_parameters(node)}
    names = [str(n.target) for n in graph.find_nodes(op="placeholder")]
    part = Program(
        graph_module=module,
        weights=Weights({n: program.weights.source(n) for n in program.weights if n in read}),
        example_inputs={n: calibration[0][n] for n in names} if calibration else {},
        outputs=tuple(node.name for node in stage.outputs),
        level=program.level,
        calibration=Restricted(calibration, names),
        padding_masks=tuple(n for n in program.padding_masks if n in names),
    )
    linears = [linear.name for linear in find_linears(part)]
    facts = [fact.restrict(linears).within(part) for fact in program.facts.values()]
    return part.with_fact(*facts)


def _ancestors(nodes: Iterable[fx.Node], entering: Container[fx.Node]) -> set[fx.Node]:
    """Nodes and everything they are computed from, back to what enters."""
    queue = [node for node in nodes if node not in entering]
    found = set(queue)
    while queue:
        for source in queue.pop().all_input_nodes:
            if source not in found and source not in entering:
                found.add(source)
                queue.append(source)
    return found


def _placeholder(graph: fx.Graph, name: str, source: fx.Node) -> fx.Node:
    node = graph.placeholder(name)
    node.meta = dict(source.meta)
    return node


class Restricted(Sequence[Batch]):
    """Batches of which only some names are seen; nothing is loaded before it is indexed."""

    def __init__(self, batches: Sequence[Batch], names: Sequence[str]) -> None:
        self._batches = batches
        self._names = tuple(names)

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: Any) -> Any:
        return self._restrict(self._batches[index])

    def own(self, index: int) -> Batch:
        """Returns a batch that lies in this process; see `zeroskip.ir.shared_streams`."""
        return self._restrict(getattr(self._batches, "own", self._batches.__getitem__)(index))

    def _restrict(self, batch: Batch) -> Batch:
        return {name: batch[name] for name in self._names}


def merge_facts(program: Program, part: Program) -> Program:
    """Returns the program with what is known about a stage merged into its facts."""
    merged: list[Fact] = []
    for kind, fact in part.facts.items():
        known = program.facts.get(kind)
        merged.append(fact if known is None else known.merge(fact))
    return program.with_fact(*merged)


def stitch_stages(program: Program, parts: Sequence[Program]) -> Program:
    """Puts stages together into one Program again.

    Equal computations of masks and positions, copied into every stage, become one.

    Args:
        program: The whole program that the stages were extracted from: gives the signature.
        parts: All stages, in order, after passes changed their graphs.
    """
    graph = fx.Graph()
    root = torch.nn.Module()
    values: dict[str, fx.Node] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        values[str(node.target)] = _placeholder(graph, str(node.target), node)
    computed: dict[Any, fx.Node] = {}

    def copy(node: fx.Node, copies: dict[fx.Node, fx.Node], owner: fx.GraphModule) -> fx.Node:
        key = _key(node, copies)
        if key is not None and key in computed:
            return computed[key]
        copied = graph.node_copy(node, copies.__getitem__)
        if key is not None:
            computed[key] = copied
        if node.op in ("get_attr", "call_module"):
            _carry(root, owner, str(node.target))
        return copied

    for part in parts:
        copies: dict[fx.Node, fx.Node] = {}
        for node in part.graph.nodes:
            if node.op == "placeholder":
                copies[node] = values[str(node.target)]
            elif node.op == "output":
                for name, value in zip(part.outputs, node.args[0], strict=True):
                    values[name] = copies[value]
            else:
                copies[node] = copy(node, copies, part.graph_module)
    # An output that is no activation, such as a mask, is computed in no stage.
    known = {node: values[node.name] for node in program.graph.nodes if node.name in values}
    left = _ancestors(program.graph.output_node().all_input_nodes, known)
    for node in program.graph.nodes:
        if node in left:
            known[node] = copy(node, known, program.graph_module)
            values[node.name] = known[node]
    whole = program.graph.output_node()
    returned: Any = whole.args[0]
    graph.output(tuple(values[node.name] for node in returned))
    weights: dict[str, Any] = {name: program.weights.source(name) for name in program.weights}
    for part in parts:
        weights.update({name: part.weights.source(name) for name in part.weights})
    return dataclasses.replace(
        program,
        graph_module=fx.GraphModule(root, graph),
        weights=Weights(weights),
        level=max((p.level for p in parts), key=("captured", "annotated", "lowered").index),
    )


def _key(node: fx.Node, copies: dict[fx.Node, fx.Node]) -> Any:
    """What makes two nodes compute the same; None for one that must not be shared."""
    if node.op == "call_module":
        return None
    schema = getattr(node.target, "_schema", None)
    tags = getattr(node.target, "tags", ())
    if schema is not None and (schema.is_mutable or torch.Tag.nondeterministic_seeded in tags):
        return None
    args = fx.node.map_arg((node.args, node.kwargs), lambda n: copies[n])
    return (node.op, str(node.target), repr(args))


def _carry(root: torch.nn.Module, source: fx.GraphModule, target: str) -> None:
    """Copies the reference to a parameter, buffer or submodule."""
    owner, leaf = holder(root, target)
    value = attribute(source, target)
    if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
        owner.register_buffer(leaf, value)
    else:
        setattr(owner, leaf, value)
