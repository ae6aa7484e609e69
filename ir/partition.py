"""Where a Program is narrow: its stages.

A transformer is a chain of blocks joined by one tensor, the residual stream. Seen as a graph of
activations, with everything that depends on parameters alone taken as a constant, those joints are
articulation points: remove one and the graph falls apart. `find_stages` cuts there and groups the
pieces that repeat, so that decoder layers are found without naming them.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import fx

from zeroskip.ir.dataflow import Dependence, find_dependence
from zeroskip.ir.linears import find_linears
from zeroskip.ir.program import Program


def activation_graph(activations: Iterable[fx.Node]) -> nx.DiGraph[Any]:
    """Returns the networkx graph of activations, edges along the flow of values.

    A node that starts from no other activation gets a neighbour of its own, so that it can be an
    articulation point too.
    """
    members: set[Any] = set(activations)
    graph: nx.DiGraph[Any] = nx.DiGraph()
    for node in members:
        graph.add_node(node)
        sources: list[Any] = [i for i in node.all_input_nodes if i in members]
        for source in sources or [("source", node.name)]:
            graph.add_edge(source, node)
        if any(user.op == "output" for user in node.users):
            graph.add_edge(node, ("sink", node.name))
    return graph


@dataclass(frozen=True)
class Stage:
    """A consecutive part of a program that is joined to the rest by few tensors.

    Args:
        name: `stage 3`, for reports.
        nodes: The activations computed in it, in order.
        inputs: Activations it needs from earlier stages.
        outputs: Activations that later stages, or the program's output, need.
        modules: The indexed containers of the model that its nodes came from, such as
            `model.layers.3`; only a cross-check and a label, never used to cut.
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    modules: tuple[str, ...]


def find_stages(program: Program) -> list[Stage]:
    """Cuts a program into stages at the articulation points of its activation graph.

    Pieces that repeat are grouped by the shortest period (attention and MLP make one layer). A
    program in which nothing repeats is one stage.
    """
    dependence = find_dependence(program)
    order = [node for node in program.graph.nodes if node in dependence.activations]
    if not order:
        return []
    segments = _cut_behind_hubs(_cut(order), dependence)
    runs = _runs(segments, dependence)
    groups: list[list[fx.Node]] = []
    position = 0
    for start, period, repeats in runs:
        groups += _between(segments[position:start])
        for k in range(repeats):
            first = start + k * period
            groups.append([n for s in segments[first : first + period] for n in s])
        position = start + period * repeats
    if not runs:
        groups = [order]
    else:
        groups += _between(segments[position:])
    return _stages(_join_shared(groups, program), dependence)


def _join_shared(groups: list[list[fx.Node]], program: Program) -> list[list[fx.Node]]:
    """Joins groups, and all between them, that multiply by the same weight.

    Such a weight can be pruned once only, on what enters all of its uses.
    """
    place = {node: k for k, group in enumerate(groups) for node in group}
    joined = list(range(len(groups)))
    for uses in {linear.parameter: linear.uses for linear in find_linears(program)}.values():
        places = [place[use.node] for use in uses if use.node in place]
        if places and min(places) < max(places):
            spanned = set(joined[min(places) : max(places) + 1])
            joined = [min(spanned) if k in spanned else k for k in joined]
    result: dict[int, list[fx.Node]] = {}
    for k, group in enumerate(groups):
        result.setdefault(joined[k], []).extend(group)
    return list(result.values())


def _between(segments: Sequence[list[fx.Node]]) -> list[list[fx.Node]]:
    """What lies before, between and after repeated runs is one group."""
    nodes = [node for segment in segments for node in segment]
    return [nodes] if nodes else []


def _cut(order: list[fx.Node]) -> list[list[fx.Node]]:
    """Cuts ordered activations behind the articulation points where the stream is all that goes on.

    An articulation point alone is not enough: it may separate no more than a side branch. Behind a
    good one, nothing computed since the cut before is still needed, and neither is the value at
    that cut, if it leads here.
    """
    graph = activation_graph(order)
    joints = set(nx.articulation_points(graph.to_undirected()))
    position = {node: i for i, node in enumerate(order)}
    last_use = {n: max((position[u] for u in n.users if u in position), default=-1) for n in order}
    segments: list[list[fx.Node]] = []
    cuts: list[fx.Node] = []
    pending: list[fx.Node] = []
    for i, node in enumerate(order):
        pending.append(node)
        if node not in joints or any(last_use[n] > i for n in pending[:-1]):
            continue
        entry = next((c for c in reversed(cuts) if nx.has_path(graph, c, node)), None)
        if entry is not None and last_use[entry] > i:
            continue
        segments.append(pending)
        cuts.append(node)
        pending = []
    return [*segments, pending] if pending else segments


def _cut_behind_hubs(segments: list[list[fx.Node]], dependence: Dependence) -> list[list[fx.Node]]:
    """Cuts segments that a value from outside runs through, where more of the program then repeats.

    An encoder's output is read in every decoder layer and so hides the joints between them. Such a
    segment, looked at without that value, has joints of its own. Cutting a residual branch in this
    way makes nothing repeat, so it is left whole.
    """
    runs = _runs(segments, dependence)
    repeated = {i for start, period, n in runs for i in range(start, start + period * n)}
    covered = _covered(segments, runs)
    for i in reversed(range(len(segments))):
        if i in repeated:
            continue
        best = segments
        for pieces in _cuts_without_a_hub(segments[i], dependence):
            trial = [*segments[:i], *pieces, *segments[i + 1 :]]
            trial_runs = _runs(trial, dependence)
            layers = [[n for s in trial[a : a + p] for n in s] for a, p, _ in trial_runs]
            if _covered(trial, trial_runs) > covered and all(_linear_count(x) > 1 for x in layers):
                best, covered = trial, _covered(trial, trial_runs)
        segments = best
    return segments


def _cuts_without_a_hub(
    segment: list[fx.Node], dependence: Dependence
) -> Iterator[list[list[fx.Node]]]:
    """Yields the cuts of a segment with one of the values that enter it left out."""
    inside = set(segment)
    entries = dict.fromkeys(
        i
        for n in segment
        for i in n.all_input_nodes
        if i in dependence.activations and i not in inside
    )
    for hub in entries:
        others = [i for i in entries if i is not hub]
        pieces = [[n for n in p if n in inside] for p in _cut([*others, *segment])]
        pieces = [piece for piece in pieces if piece]
        if len(pieces) > 1:
            yield pieces


def _runs(segments: Sequence[list[fx.Node]], dependence: Dependence) -> list[tuple[int, int, int]]:
    prints = [_fingerprint(segment, dependence) for segment in segments]
    return _repeated_runs(prints, [_linear_count(segment) for segment in segments])


def _covered(segments: Sequence[list[fx.Node]], runs: list[tuple[int, int, int]]) -> int:
    return sum(_linear_count(n for s in segments[a : a + p * k] for n in s) for a, p, k in runs)


def _linear_count(segment: Iterable[fx.Node]) -> int:
    matrix = ("linear", "addmm", "matmul", "mm", "bmm", "conv")
    return sum(any(m in str(node.target) for m in matrix) for node in segment)


def _fingerprint(segment: list[fx.Node], dependence: Dependence) -> str:
    """Hashes operators, wiring and parameter shapes of a segment."""
    index = {node: i for i, node in enumerate(segment)}
    digest = hashlib.sha256()
    for i, node in enumerate(segment):
        digest.update(str(node.target).encode())
        for source in node.all_input_nodes:
            if source in index:
                digest.update(b"<%d" % (i - index[source]))
            elif source in dependence.constants:
                value = source.meta.get("val")
                shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
                digest.update(str(shape).encode())
            else:
                digest.update(b"s" if source in dependence.sides else b"a")
    return digest.hexdigest()


def _repeated_runs(prints: Sequence[str], weights: Sequence[int]) -> list[tuple[int, int, int]]:
    """Finds (start, period, repeats) runs of equal segments, those with most linears first.

    A run must repeat at least twice and hold a linear. Runs do not overlap.
    """
    runs: list[tuple[int, int, int]] = []

    def search(low: int, high: int) -> None:
        best: tuple[tuple[int, int], tuple[int, int, int]] | None = None
        for period in range(1, (high - low) // 2 + 1):
            start = low
            while start + 2 * period <= high:
                repeats = 1
                while (
                    start + (repeats + 1) * period <= high
                    and prints[start + repeats * period : start + (repeats + 1) * period]
                    == prints[start : start + period]
                ):
                    repeats += 1
                covered = sum(weights[start : start + repeats * period])
                if repeats > 1 and covered:
                    key = (covered, -period)
                    if best is None or key > best[0]:
                        best = (key, (start, period, repeats))
                start += 1
        if best is None:
            return
        start, period, repeats = best[1]
        search(low, start)
        runs.append(best[1])
        search(start + period * repeats, high)

    search(0, len(prints))
    return runs


def _stages(groups: list[list[fx.Node]], dependence: Dependence) -> list[Stage]:
    stages: list[Stage] = []
    for k, nodes in enumerate(groups):
        inside = set(nodes)
        inputs: dict[fx.Node, None] = {}
        for node in nodes:
            for source in node.all_input_nodes:
                if source in dependence.activations and source not in inside:
                    inputs[source] = None
        outputs = [n for n in nodes if any(u not in inside for u in n.users)]
        modules = dict.fromkeys(m for n in nodes if (m := _container(n)) is not None)
        stages.append(
            Stage(f"stage {k}", tuple(nodes), tuple(inputs), tuple(outputs), tuple(modules))
        )
    return stages


def _container(node: fx.Node) -> str | None:
    """Returns the outermost indexed container that a node was traced in, e.g. `model.layers.3`."""
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        found = re.match(r"((?:[A-Za-z_]\w*\.)*?[A-Za-z_]\w*\.\d+)(?:\.|$)", path)
        if found:
            return found[1]
    return None
