"""Which rule each operator follows in the flow of scales.

A rule takes labels for its arguments (`zeroskip.ir.scale_values`), adds the equations under which a
scale passes through the operator, and returns the labels of the result. An operator without a rule
allows no scale; so does a rule that raises `Refused`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from zeroskip.ir.scale_elementwise import (
    add,
    clamp,
    fill,
    homogeneous,
    homogeneous_when_positive,
    multiply,
    square,
    where,
)
from zeroskip.ir.scale_lookups import (
    embed,
    index,
    index_add,
    largest,
    sum_up,
    take,
)
from zeroskip.ir.scale_movements import (
    MOVEMENTS,
    keep,
    move,
)
from zeroskip.ir.scale_products import (
    add_product,
    addmm,
    attend,
    convolve,
    linear,
    matmul,
    multiply_groups,
    multiply_stack,
    normalize,
)
from zeroskip.ir.scale_values import Call, Value
from zeroskip.ir.scale_writes import write

if TYPE_CHECKING:
    from zeroskip.ir.scale_flow import ScaleFlow

aten = torch.ops.aten
Rule = Callable[["ScaleFlow", Call], Value]

# Operators that write into an argument, of which a rule keeps track.
WRITERS = (aten.copy_.default,)


def _fixed(flow: ScaleFlow, call: Call) -> Value:
    """Results that depend on the shapes of the arguments only."""
    return flow.fixed_value(call.node)


def _rules() -> dict[Any, Rule]:
    groups: Sequence[tuple[Rule, Sequence[Any]]] = (
        (move, MOVEMENTS),
        (
            keep,
            (
                "to",
                "_to_copy",
                "type_as",
                "float",
                "contiguous",
                "clone",
                "alias",
                "detach",
                "lift_fresh_copy",
                "lift_fresh",
            ),
        ),
        (homogeneous, ("neg", "dropout", "feature_dropout")),
        (homogeneous_when_positive, ("relu", "leaky_relu", "prelu", "abs")),
        (square, (aten.square.default, aten.pow.Tensor_Scalar)),
        (clamp, (aten.clamp.default, aten.clamp_min.default)),
        (add, ("add", "sub")),
        (multiply, ("mul", "div", "true_divide")),
        (where, ("where",)),
        (fill, (aten.masked_fill.Scalar,)),
        (sum_up, (aten.mean.dim, aten.sum.dim_IntList, aten.sum.default, aten.mean.default)),
        (largest, (aten.amax.default, aten.amin.default)),
        (embed, (aten.embedding.default,)),
        (index, (aten.index.Tensor,)),
        (take, (aten.index_select.default, aten.gather.default)),
        (index_add, (aten.index_add.default,)),
        (linear, (aten.linear.default,)),
        (addmm, (aten.addmm.default,)),
        (matmul, (aten.matmul.default, aten.mm.default)),
        (add_product, (aten.baddbmm.default,)),
        (multiply_stack, (aten.bmm.default,)),
        (attend, (aten.scaled_dot_product_attention.default,)),
        (multiply_groups, ("grouped_mm", "_grouped_mm", "grouped_mm_fallback")),
        (write, WRITERS),
        (convolve, (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)),
        (normalize, (aten.layer_norm.default, aten.rms_norm.default)),
        (
            _fixed,
            (
                "ones_like",
                "zeros_like",
                "empty_like",
                "full_like",
                "new_zeros",
                "new_ones",
                "new_full",
                "new_empty",
                "rand_like",
                "_assert_tensor_metadata",
            ),
        ),
    )
    return {target: rule for rule, targets in groups for target in targets}


RULES: dict[Any, Rule] = _rules()
