"""export-onnx: write the program as a folder that ONNX Runtime and its clients open."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import fx

from zeroskip.ir.added_parameters import added_parameters, parameters_added
from zeroskip.ir.errors import LoweringError
from zeroskip.ir.facts import Lowered, QuantizedValues, SparseWeights
from zeroskip.ir.folders import check_target, source_folder
from zeroskip.ir.lowering_24 import restore_linears
from zeroskip.ir.packing import packed_names
from zeroskip.ir.program import Program, bind_parameter, copy_graph_module
from zeroskip.ir.selection import find_roles
from zeroskip.ir.streams import parse_bytes
from zeroskip.ir.weights import InMemory
from zeroskip.passes.base import Pass
from zeroskip.passes.lower_masked import LowerMasked
from zeroskip.passes.lower_sparse_linear import lower_alike


@dataclass(frozen=True)
class ExportOnnx(Pass):
    """Writes `model.onnx` and what clients need beside it, and proves that it computes the same.

    A causal language model is captured again with a key-value cache as one graph for prefill and
    decode, with the names that onnxruntime-genai and optimum use; anything else is written as it
    was captured. Weights keep their fully qualified names. Those that `LowerSparseLinear` took are
    packed, for the operator zeroskip::SparseLinear, whose body in standard operators is part of the
    file; all others, those of `LowerSemiStructured` among them, are dense, zeros included: no released ONNX Runtime gains from zeros, and
    `sparse_initializer` makes a 2:4 file larger. The file is opened in ONNX Runtime and compared with the program at several sizes before the folder
    appears; the result is in `zeroskip_parity.json`.

    Refuses a folder that holds something, an observed program, an operator without an ONNX form,
    and a file whose outputs differ.

    Args:
        directory: The folder to write; it must not exist or be empty.
        form: `cache`, `plain`, or `auto`: cache for causal language models.
        opset: Version of the standard operators.
        external_data_threshold: Weights above this size go to a file of their own.
        sparse_initializers: Store pruned weights as `sparse_initializer`.
        tokenizer: A folder with tokenizer files to copy; by default the model's own folder.
        parity_limit: Largest accepted ||onnx - program|| / ||program||; by default 1e-4, and what
            rounding to half precision explains where the program is not float32.

    Before and after are the same program.
    """

    directory: str | Path
    form: Literal["auto", "cache", "plain"] = "auto"
    opset: int = 20
    external_data_threshold: str | int = "1GiB"
    sparse_initializers: bool = False
    tokenizer: str | Path | None = None
    parity_limit: float | None = None

    name = "export-onnx"

    def check(self, program: Program) -> None:
        """Refuses a taken or read-only folder before anything runs."""
        check_target(Path(self.directory))
        parse_bytes(self.external_data_threshold)

    def run(self, program: Program) -> Program:
        if program.level == "annotated":
            raise LoweringError(
                "the program holds observers",
                next_step="use Observe(keep=False)",
            )

        # onnx and onnxruntime are large: who does not export does not load them.
        from zeroskip.runtime.onnx.export import export_onnx
        from zeroskip.runtime.onnx.parity import CACHE_CASES

        def reference(inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            return list(program.run({name: inputs[name] for name in program.inputs}).values())

        def lower(graph_module: fx.GraphModule) -> fx.GraphModule:
            return _lowered_like(program, graph_module)

        # A program without a mask cannot say what a padded batch should give.
        cases = [case for case in CACHE_CASES if program.padding_masks or not case.padding]
        with _with_added_parameters(program):
            export_onnx(
                self.directory,
                weights=program.weights,
                reference=reference,
                model=program.model,
                graph_module=_skeleton(restore_linears(program)),
                example_inputs=program.example_inputs,
                output_names=program.outputs,
                form=self.form,
                edit=lower if Lowered in program.facts else None,
                opset=self.opset,
                external_data_threshold=parse_bytes(self.external_data_threshold),
                sparse_initializers=self.sparse_initializers,
                tokenizer_source=self.tokenizer or _own_tokenizer(program.model),
                cache_cases=cases,
                parity_limit=self.parity_limit or _limit(program),
            )
        return program


def _with_added_parameters(program: Program) -> contextlib.AbstractContextManager[None]:
    """Lets the module have the biases that passes added while it is captured with a cache."""
    added = added_parameters(program)
    if not added or program.model is None:
        return contextlib.nullcontext()
    return parameters_added(program.model, added)


# float32 differs in the order of sums only. Half-precision programs are exported in float32, so
# that their own rounding is the difference: about sqrt(layers) units of the last place.
_LIMITS = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


# A rounding of activations to 8 bits turns differences of the last place into whole steps, for the
# few that lie on a boundary.
_LIMIT_OF_ROUNDED_ACTIVATIONS = 2e-2


def _limit(program: Program) -> float:
    known = program.facts.get(QuantizedValues, QuantizedValues())
    assert isinstance(known, QuantizedValues)
    lowered = program.facts.get(Lowered, Lowered())
    assert isinstance(lowered, Lowered)
    rounds = any(known.formats[n].accuracy_level for n in known.formats if n in lowered.operators)
    packed = packed_names(program)
    dtypes = {program.weights.source(n).dtype for n in program.weights if n not in packed}
    limit = max((_LIMITS[d] for d in dtypes if d in _LIMITS), default=1e-4)
    return max(limit, _LIMIT_OF_ROUNDED_ACTIVATIONS) if rounds else limit


def _skeleton(program: Program) -> fx.GraphModule:
    """Returns the graph with parameters that have a shape and take no memory, for tracing alone."""
    module = copy_graph_module(program.graph_module)
    for name in program.read_weights():
        source = program.weights.source(name)
        hollow = torch.zeros((), dtype=source.dtype).expand(source.shape)
        bind_parameter(module, name, InMemory(hollow))
    return module


def _lowered_like(program: Program, graph_module: fx.GraphModule) -> fx.GraphModule:
    """Lowers another capture of the same model, such as the one with a cache, in the same way."""
    if any("zeroskip::" in str(getattr(n.target, "_schema", "")) for n in graph_module.graph.nodes):
        return graph_module
    other = Program(
        graph_module=copy_graph_module(graph_module),
        weights=program.weights,
        example_inputs={},
        outputs=(),
    )
    other = other.with_fact(find_roles(other), program.fact(SparseWeights))
    lowered = LowerMasked().run(lower_alike(program, other)).graph_module
    # The cache is a nested argument: how it is taken apart belongs to the graph's code.
    lowered.graph.set_codegen(graph_module.graph._codegen)
    lowered.recompile()
    return lowered


def _own_tokenizer(model: torch.nn.Module | None) -> Path | None:
    """The folder that the model was loaded from, if there is a tokenizer in it."""
    from zeroskip.runtime.onnx.folder import TOKENIZER_FILES

    folder = source_folder(model)
    if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None
    return folder
