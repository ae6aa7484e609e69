"""The operator zeroskip::SparseLinear: its node, its body in standard operators, and back again.

    Y = X W^T + bias

    X            float32 [..., K]
    bitmask      uint8 [N, 8 * ceil(K / 64)]     what is kept of W, see zeroskip.ir.formats
    row_offsets  int64 [N + 1]
    values       float32, float16, bfloat16 or int8 [kept + 64]
    scales       float32 [N, blocks], optional
    bias         float32 [N], optional
    Y            float32 [..., N]

The body travels in the model, so a runtime without the kernels computes the same, at dense speed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import AttributeProto, FunctionProto, ModelProto, NodeProto, TensorProto, numpy_helper
from onnx import helper as oh

from zeroskip.ir.errors import ArtifactError, LoweringError
from zeroskip.ir.formats import PADDING, BitmaskWeight, count_blocks

DOMAIN = "zeroskip"
OP = "SparseLinear"
VERSION = 1
OLDEST_OPSET = 18
INPUTS = ("X", "bitmask", "row_offsets", "values", "scales", "bias")
ATTRIBUTES = ("K", "N", "block_size", "accuracy_level", "layout")
TENSOR_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.int64: TensorProto.INT64,
}


@dataclass(frozen=True, eq=False)
class SparseLinearNode:
    """A node and the constants that it reads."""

    node: NodeProto
    initializers: list[TensorProto]


def is_sparse_linear(node: NodeProto) -> bool:
    """Tells whether a node is zeroskip::SparseLinear."""
    return node.domain == DOMAIN and node.op_type == OP


def make_sparse_linear(
    weight: BitmaskWeight,
    x: str,
    y: str,
    *,
    name: str,
    bias: torch.Tensor | None = None,
    accuracy_level: int = 0,
    layout: int = 0,
    with_scales: bool = False,
) -> SparseLinearNode:
    """Makes the node of a packed weight; its constants are called `<name>.bitmask` and so on.

    The bias is always there, of zeros when there is none: a body must not read an absent input.

    Args:
        weight: What to multiply by.
        x: The name of the input, float32 [..., columns].
        y: The name of the output, float32 [..., rows].
        name: Of the node, unique in its model.
        bias: float [rows].
        accuracy_level: 4 rounds each row of X to 8 bits; int8 values only.
        layout: 0 runs on the constants as they are stored; 1 repacks them for many tokens.
        with_scales: Adds scales of 1 to floating values: needed in a model that also has int8
            values, since all nodes share one body.

    Raises:
        LoweringError: accuracy_level or layout has a value that it cannot have.
    """
    is_int8 = weight.values.dtype == torch.int8
    if accuracy_level not in (0, 4) or (accuracy_level == 4 and not is_int8):
        raise LoweringError(
            f"accuracy_level is {accuracy_level} for {weight.values.dtype} values",
            where=name,
            next_step="use 0, or 4 with int8 values",
        )
    if layout not in (0, 1):
        raise LoweringError(f"layout is {layout}", where=name, next_step="use 0 or 1")
    scales = weight.scales
    if scales is None and with_scales:
        blocks = count_blocks(weight.columns, weight.block_size)
        scales = torch.ones(weight.rows, blocks)
    constants = {
        "bitmask": weight.bitmask,
        "row_offsets": weight.row_offsets,
        "values": weight.values,
        "scales": scales,
        "bias": torch.zeros(weight.rows) if bias is None else bias.detach().float(),
    }
    present = {part: tensor for part, tensor in constants.items() if tensor is not None}
    node = oh.make_node(
        OP,
        [x, *(f"{name}.{part}" if part in present else "" for part in INPUTS[1:])],
        [y],
        name=name,
        domain=DOMAIN,
        K=weight.columns,
        N=weight.rows,
        block_size=weight.block_size,
        # Nothing is rounded when there are no columns, and no runtime can take their maximum.
        accuracy_level=accuracy_level if weight.columns else 0,
        layout=layout,
    )
    return SparseLinearNode(
        node, [to_proto(tensor, f"{name}.{part}") for part, tensor in present.items()]
    )


def add_functions(model: ModelProto) -> None:
    """Gives a model with SparseLinear nodes its body and the imports of both domains.

    Args:
        model: Changed in place; a body that it already has is replaced.

    Raises:
        LoweringError: The model's opset is too old for the body.
    """
    nodes = [node for node in walk(model.graph) if is_sparse_linear(node)]
    kept = [function for function in model.functions if function.domain != DOMAIN]
    del model.functions[:]
    model.functions.extend(kept)
    if not nodes:
        return
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    sizes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    wide = any(sizes[node.input[3]][0] >= 1 << 31 for node in nodes if node.input[3] in sizes)
    body = function_body(
        opset=opset,
        scales=any(len(node.input) > 4 and node.input[4] for node in nodes),
        accuracy_levels={attribute(node, "accuracy_level") for node in nodes},
        wide=wide,
    )
    model.functions.append(body)
    if all(o.domain != DOMAIN for o in model.opset_import):
        model.opset_import.append(oh.make_opsetid(DOMAIN, VERSION))
    model.ir_version = max(model.ir_version, 8)  # the first with functions


def function_body(
    *,
    opset: int,
    scales: bool,
    accuracy_levels: Collection[int] = (0,),
    wide: bool = False,
) -> FunctionProto:
    """Returns the operator in standard operators, for the nodes of one model.

    A runtime that folds constants is left with Transpose(W) in memory, MatMul and Add.

    Args:
        opset: The model's version of ai.onnx; a body has to have the same.
        scales: Whether nodes pass scales; then all do.
        accuracy_levels: The levels that occur: 0, 4 or both.
        wide: Counts in int64, for weights that keep 2^31 values or more.

    Raises:
        LoweringError: The opset is older than 18.
    """
    if opset < OLDEST_OPSET:
        raise LoweringError(
            f"the model has opset {opset}",
            where=f"{DOMAIN}::{OP}",
            next_step=f"export with opset {OLDEST_OPSET} or later",
        )
    parts = [_UNPACK]
    weight, x = "gathered", "X"
    if scales:
        parts.append(_SCALE)
        weight = "scaled"
    if 4 in accuracy_levels:
        parts.append(_ROUND)
        x = "rounded"
        if 0 in accuracy_levels:
            parts.append(_CHOOSE)
            x = "chosen"
    parts.append(_MULTIPLY)
    lines = "".join(parts).replace("COUNT", "int64" if wide else "int32")
    lines = lines.replace("INT", str(TensorProto.INT64 if wide else TensorProto.INT32))
    text = f'''
        <opset_import: ["" : {opset}], domain: "{DOMAIN}">
        {OP} <{", ".join(ATTRIBUTES)}> ({", ".join(INPUTS)}) => (Y)
        {{ {lines.replace("WEIGHT", weight).replace("INPUT", x)} }}
    '''
    return onnx.parser.parse_function(text)


# In capitals: what `function_body` fills in. Types of Cast: 1 float32, 6 int32, 9 bool, 11 float64.
#
# No BitShift (one runtime gets it wrong for uint8), and neither NonZero nor ScatterND, which
# runtimes do not fold: they would unpack the weight in every run.
_UNPACK = """
    axis0 = Constant <value = int64 {0}> ()
    first = Constant <value = int64[1] {0}> ()
    second = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    bit_values = Constant <value = int32[8] {1, 2, 4, 8, 16, 32, 64, 128}> ()
    two = Constant <value = int32 {2}> ()
    bytes = Cast <to = 6> (bitmask)
    byte_columns = Unsqueeze (bytes, last)
    shifted = Div (byte_columns, bit_values)
    bits = Mod (shifted, two)
    bits_per_element = Constant <value = int64[2] {1, 8}> ()
    bitmask_shape = Shape (bitmask)
    padded_shape = Mul (bitmask_shape, bits_per_element)
    bit_rows = Reshape <allowzero = 1> (bits, padded_shape)
    kept = Cast <to = 9> (bit_rows)

    bit_line = Reshape (bit_rows, last)
    counted = Cast <to = INT> (bit_line)
    counts = CumSum (counted, axis0)
    one = Constant <value = COUNT {1}> ()
    place_line = Sub (counts, one)
    places = Reshape <allowzero = 1> (place_line, padded_shape)
    float_values = Cast <to = 1> (values)
    candidates = Gather <axis = 0> (float_values, places)
    zero = Constant <value = float {0}> ()
    gathered = Where (kept, candidates, zero)
"""

# One scale for each block of columns; block_size 0 is one block, the whole row.
_SCALE = """
    block_attribute = Constant <value_int: int = @block_size> ()
    no_block = Constant <value = int64 {0}> ()
    whole_row = Equal (block_attribute, no_block)
    end = Constant <value = int64[1] {2}> ()
    row_size = Slice (padded_shape, second, end)
    block = Where (whole_row, row_size, block_attribute)
    ones = Constant <value = int64[2] {1, 1}> ()
    block_shape = Concat <axis = 0> (ones, block)
    scale_columns = Unsqueeze (scales, last)
    scale_blocks = Expand (scale_columns, block_shape)
    scales_shape = Shape (scales)
    single = Constant <value = int64[1] {1}> ()
    block_pair = Concat <axis = 0> (single, block)
    spread_shape = Mul (scales_shape, block_pair)
    spread = Reshape <allowzero = 1> (scale_blocks, spread_shape)
    spread_row = Slice (spread, first, row_size, second)
    scaled = Mul (gathered, spread_row)
"""

# Each row of X to 8 bits between its least and its greatest element, zero among them, and back:
# as ONNX DynamicQuantizeLinear, row by row. Rows that are not finite become NaN.
_ROUND = """
    lowest = ReduceMin <keepdims = 1> (X, last)
    highest = ReduceMax <keepdims = 1> (X, last)
    nothing = Constant <value = float {0}> ()
    low = Min (lowest, nothing)
    high = Max (highest, nothing)
    low64 = Cast <to = 11> (low)
    high64 = Cast <to = 11> (high)
    range64 = Sub (high64, low64)
    steps64 = Constant <value = double {255}> ()
    step64 = Div (range64, steps64)
    step = Cast <to = 1> (step64)
    is_positive = Greater (step, nothing)
    unit = Constant <value = float {1}> ()
    row_scale = Where (is_positive, step, unit)
    limit = Constant <value = float {255}> ()
    minus_low = Neg (low)
    zero_exact = Div (minus_low, row_scale)
    zero_rounded = Round (zero_exact)
    zero_point = Clip (zero_rounded, nothing, limit)
    x_exact = Div (X, row_scale)
    x_rounded = Round (x_exact)
    x_moved = Add (x_rounded, zero_point)
    x_level = Clip (x_moved, nothing, limit)
    x_steps = Sub (x_level, zero_point)
    x_nothing = Mul (X, nothing)
    row_nothing = ReduceSum <keepdims = 1> (x_nothing, last)
    finite_scale = Add (row_scale, row_nothing)
    rounded = Mul (x_steps, finite_scale)
"""

_CHOOSE = """
    level = Constant <value_int: int = @accuracy_level> ()
    four = Constant <value = int64 {4}> ()
    is_four = Equal (level, four)
    chosen = Where (is_four, rounded, X)
"""

# The columns that pad the bitmask go.
_MULTIPLY = """
    columns = Constant <value_int: int = @K> ()
    column_count = Unsqueeze (columns, first)
    weight = Slice (WEIGHT, first, column_count, second)
    transposed = Transpose <perm = [1, 0]> (weight)
    product = MatMul (INPUT, transposed)
    Y = Add (product, bias)
"""


def read_sparse_linear(
    model: ModelProto, node: NodeProto, folder: str | Path = ""
) -> tuple[BitmaskWeight, torch.Tensor | None]:
    """Returns the weight of a node and its bias.

    Args:
        model: Its main graph holds the node's constants.
        node: A zeroskip::SparseLinear.
        folder: Where external data lies.

    Raises:
        ArtifactError: A constant is missing, or they contradict each other.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}

    def read(index: int) -> torch.Tensor | None:
        name = node.input[index] if index < len(node.input) else ""
        if not name:
            return None
        if name not in constants:
            raise ArtifactError(
                f"{INPUTS[index]} of {node.name} is not a constant of the graph",
                where=name,
                next_step="only constant weights can be read",
            )
        return to_tensor(constants[name], folder)

    bitmask, offsets, values, scales, bias = (read(index) for index in range(1, 6))
    if bitmask is None or offsets is None or values is None:
        raise ArtifactError("a constant of a SparseLinear is missing", where=node.name)
    if values.dtype != torch.int8:
        scales = None
    weight = BitmaskWeight(
        bitmask, offsets, values, scales, attribute(node, "K"), attribute(node, "block_size")
    )
    check_weight(weight, attribute(node, "N"), node.name)
    return weight, bias


def check_weight(weight: BitmaskWeight, rows: int, where: str) -> None:
    """Refuses a weight whose tensors contradict each other.

    Raises:
        ArtifactError: Names the node and what does not fit.
    """
    words = -(-weight.columns // 64)
    blocks = count_blocks(weight.columns, weight.block_size)
    expected = {
        "bitmask": (weight.bitmask, torch.uint8, (rows, words * 8)),
        "row_offsets": (weight.row_offsets, torch.int64, (rows + 1,)),
        "scales": (weight.scales, torch.float32, (rows, blocks)),
    }
    for part, (tensor, dtype, shape) in expected.items():
        if tensor is not None and (tensor.dtype != dtype or tuple(tensor.shape) != shape):
            raise ArtifactError(
                f"{part} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {shape}",
                where=where,
                next_step="export the model again",
            )
    counts = weight.keep().sum(1)
    # Compared row by row, so that no sum of hostile numbers can wrap to the right total.
    fits = (
        int(weight.row_offsets[0]) == 0
        and torch.equal(weight.row_offsets.diff(), counts)
        and weight.values.dim() == 1
        and weight.values.shape[0] >= int(counts.sum()) + PADDING
    )
    if not fits:
        raise ArtifactError(
            "the bitmask, the row offsets and the values contradict each other",
            where=where,
            next_step="export the model again",
        )


def attribute(node: NodeProto, name: str) -> int:
    """Returns an integer attribute, 0 when it is not there."""
    return next((a.i for a in node.attribute if a.name == name), 0)


def walk(graph: onnx.GraphProto) -> Iterable[NodeProto]:
    """Yields every node of a graph and of the graphs within it."""
    for node in graph.node:
        yield node
        for item in node.attribute:
            for inner in [item.g, *item.graphs] if item.type in _GRAPHS else []:
                yield from walk(inner)


_GRAPHS = (AttributeProto.GRAPH, AttributeProto.GRAPHS)


def to_proto(tensor: torch.Tensor, name: str) -> TensorProto:
    """Returns a tensor as a constant of a graph."""
    proto = TensorProto(name=name, data_type=TENSOR_TYPES[tensor.dtype], dims=tensor.shape)
    proto.raw_data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return proto


def to_tensor(proto: TensorProto, folder: str | Path = "") -> torch.Tensor:
    """Returns a constant of a graph as a tensor.

    Args:
        proto: Of a type that SparseLinear takes.
        folder: Where external data lies.
    """
    array = numpy_helper.to_array(proto, str(folder))
    if proto.data_type == TensorProto.BFLOAT16:  # numpy has no such type of its own
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
