"""The front of the ONNX export: capture or take a graph, translate, write, compare, and only then show.

Where there is a reference, nothing appears at the target unless ONNX Runtime computed the same.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import onnx_ir
import torch
from torch import nn

from zeroskip.ir.errors import LoweringError
from zeroskip.ir.folders import new_folder
from zeroskip.runtime.onnx.axes import cache_axes
from zeroskip.runtime.onnx.cache_geometry import CacheGeometry, is_causal_lm
from zeroskip.runtime.onnx.cache_graph import capture_with_cache
from zeroskip.runtime.onnx.client_config import genai_config
from zeroskip.runtime.onnx.folder import (
    EXTERNAL_DATA_THRESHOLD,
    copy_tokenizer,
    save_model,
)
from zeroskip.runtime.onnx.parity import (
    CACHE_CASES,
    LIMIT,
    PARITY_FILE,
    CacheCase,
    Inputs,
    Parity,
    Reference,
    check_parity,
    plain_cases,
)
from zeroskip.runtime.onnx.session import open_to_compare
from zeroskip.runtime.onnx.translate import OPSET, Translations, translate

Form = Literal["auto", "cache", "plain"]
Edit = Callable[[torch.fx.GraphModule], torch.fx.GraphModule]


@dataclass(frozen=True)
class OnnxArtifact:
    """What an export wrote.

    Args:
        path: The folder.
        form: "cache" for a decoder with its cache, "plain" for anything else.
        inputs: Names of the inputs that the file has.
        outputs: Names of its outputs.
        opset: Version of the standard operators.
        bytes: Size of the model, its weights included.
        parity: The comparison with the reference, or None if there was no reference.
    """

    path: Path
    form: Literal["cache", "plain"]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    opset: int
    bytes: int
    parity: Parity | None


def export_onnx(
    directory: str | Path,
    *,
    weights: Mapping[str, torch.Tensor],
    reference: Reference | None,
    model: nn.Module | None = None,
    graph_module: torch.fx.GraphModule | None = None,
    example_inputs: Inputs | None = None,
    dynamic_shapes: Mapping[str, Any] | None = None,
    output_names: Sequence[str] | None = None,
    form: Form = "auto",
    edit: Edit | None = None,
    opset: int = OPSET,
    translation_table: Translations | None = None,
    external_data_threshold: int = EXTERNAL_DATA_THRESHOLD,
    sparse_initializers: bool = False,
    tokenizer_source: object | None = None,
    cache_cases: Sequence[CacheCase] = CACHE_CASES,
    parity_cases: Sequence[CacheCase] | Sequence[Inputs] | None = None,
    parity_limit: float = LIMIT,
    reference_takes_positions: bool = False,
) -> OnnxArtifact:
    """Writes a folder with an ONNX model, and compares it with the reference before it appears.

    The weights are float32 in the file; a narrower reference needs a wider `parity_limit`.

    Args:
        directory: Where to; must not exist or be empty.
        weights: Parameter name to tensor, read one at a time while the file is written.
        reference: Computes the expected outputs from named inputs; see `check_parity`. None skips
            the comparison, and with it the memory that opening the file takes.
        model: The causal language model to capture with its cache; in the plain form only its
            configuration is used.
        graph_module: The captured graph of the plain form, called with keywords.
        example_inputs: What `graph_module` was captured at, by name.
        dynamic_shapes: Its dynamic axes, as given to `torch.export`; by default the symbolic ones.
        output_names: Names of its flattened outputs; `output_0` and so on by default.
        form: "auto" takes the cache form whenever the model is a causal language model.
        edit: Applied to the graph before translation, for instance a lowering.
        opset: Version of the standard operators.
        translation_table: ONNX forms of further operators.
        external_data_threshold: Bytes of weights from which on they get a file of their own.
        sparse_initializers: See `save_model`.
        tokenizer_source: A tokenizer, or the directory of one, to put beside the model.
        cache_cases: The default sizes of the cache form.
        parity_cases: Instead of the default sizes of either form.
        parity_limit: Largest relative distance that is accepted.
        reference_takes_positions: See `check_parity`.

    Raises:
        LoweringError: The model has no such form, or an operator has no ONNX form.
        ArtifactError: The target is taken or not writable.
        ParityError: The file does not compute what the reference computes; nothing is written.
    """
    chosen = _choose_form(form, model)
    geometry: CacheGeometry | None = None
    with new_folder(Path(directory)) as folder:
        if chosen == "cache":
            assert model is not None
            captured = capture_with_cache(model)
            geometry = captured.geometry
            graph = captured.graph_module
            translated = translate(
                graph if edit is None else edit(graph),
                example_inputs=captured.example_inputs,
                dynamic_shapes=captured.dynamic_shapes,
                weights=weights,
                input_names=captured.input_names,
                output_names=captured.output_names,
                axis_names=cache_axes(captured.input_names, captured.output_names),
                opset=opset,
                translation_table=translation_table,
            )
        else:
            translated = _translate_plain(
                graph_module,
                example_inputs,
                dynamic_shapes,
                weights,
                output_names,
                edit,
                opset,
                translation_table,
            )
        size = save_model(
            translated,
            folder,
            external_data_threshold=external_data_threshold,
            sparse_initializers=sparse_initializers,
        )
        _write_configuration(folder, model, geometry, translated)
        if tokenizer_source is not None:
            copy_tokenizer(tokenizer_source, folder)
        parity = None
        # Without a reference the file stays closed: running a model takes more memory than writing it.
        if reference is not None:
            opened = open_to_compare(folder)
            cases = parity_cases
            if cases is None:
                cases = cache_cases if geometry else plain_cases(opened, example_inputs or {})
            parity = check_parity(
                opened,
                reference,
                cases=cases,
                limit=parity_limit,
                reference_takes_positions=reference_takes_positions,
            )
            (folder / PARITY_FILE).write_text(parity.to_json())
        inputs = tuple(str(value.name) for value in translated.graph.inputs)
        outputs = tuple(str(value.name) for value in translated.graph.outputs)
    return OnnxArtifact(Path(directory), chosen, inputs, outputs, opset, size, parity)


def _choose_form(form: Form, model: nn.Module | None) -> Literal["cache", "plain"]:
    if form == "cache" and model is None:
        raise LoweringError(
            "the cache form needs the model itself, not only a graph",
            where="export_onnx",
            next_step="pass model=",
        )
    if form == "auto":
        return "cache" if model is not None and is_causal_lm(model) else "plain"
    return form


def _translate_plain(
    graph_module: torch.fx.GraphModule | None,
    example_inputs: Inputs | None,
    dynamic_shapes: Mapping[str, Any] | None,
    weights: Mapping[str, torch.Tensor],
    output_names: Sequence[str] | None,
    edit: Edit | None,
    opset: int,
    translation_table: Translations | None,
) -> onnx_ir.Model:
    if graph_module is None or example_inputs is None:
        raise LoweringError(
            "the plain form needs a captured graph and the inputs it was captured at",
            where="export_onnx",
            next_step="pass graph_module= and example_inputs=",
        )
    graph = graph_module if edit is None else edit(graph_module)
    count = len(graph.graph.output_node().all_input_nodes)
    names = [f"output_{n}" for n in range(count)] if output_names is None else list(output_names)
    return translate(
        graph,
        example_inputs=example_inputs,
        dynamic_shapes=dynamic_shapes,
        weights=weights,
        input_names=list(example_inputs),
        output_names=names,
        opset=opset,
        translation_table=translation_table,
    )


def _write_configuration(
    folder: Path,
    model: nn.Module | None,
    geometry: CacheGeometry | None,
    translated: onnx_ir.Model,
) -> None:
    """Writes the Hugging Face configurations of a model that has them, and the client's own."""
    config = getattr(model, "config", None)
    generation_config = getattr(model, "generation_config", None)
    for value in (config, generation_config):
        save = getattr(value, "save_pretrained", None)
        if save is not None:
            save(folder)
    if geometry is None or config is None:
        return
    names = [str(value.name) for value in translated.graph.inputs]
    client = genai_config(geometry, names, config, generation_config)
    if client is not None:
        (folder / "genai_config.json").write_text(json.dumps(client, indent=2) + "\n")
