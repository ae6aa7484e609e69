"""The operator zeroskip::SparseLinear as an ONNX function: its signature, and what it computes.

    Y = X W^T + bias

    X            float32 [..., K]
    bitmask      uint8 [N, 8 * ceil(K / 64)]     what is kept of W, see zeroskip.ir.formats
    row_offsets  int64 [N + 1]
    values       float32, float16, bfloat16 or int8 [kept + 64]
    scales       float32 [N, blocks], optional
    bias         float32 [N], optional
    Y            float32 [..., N]

The function travels in the model, so a runtime without the kernels computes the same, at dense
speed.
"""

from __future__ import annotations

from collections.abc import Collection

import onnx
from onnx import FunctionProto, TensorProto

from zeroskip.ir.errors import LoweringError

DOMAIN = "zeroskip"
OP = "SparseLinear"
VERSION = 1
OLDEST_OPSET = 18
INPUTS = ("X", "bitmask", "row_offsets", "values", "scales", "bias")
ATTRIBUTES = ("K", "N", "block_size", "accuracy_level", "layout")


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
