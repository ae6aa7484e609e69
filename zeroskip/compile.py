"""compile_sparse: from a model and a list of passes to a compiled model."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from zeroskip.batches import check_batches, default_inputs, example_from, read_batches
from zeroskip.ir.added_parameters import add_parameters, added_parameters
from zeroskip.ir.capture import capture
from zeroskip.ir.checkpoint import open_checkpoint
from zeroskip.ir.checkpoint_writer import save_checkpoint
from zeroskip.ir.errors import CaptureError, CompileError
from zeroskip.ir.folders import source_folder
from zeroskip.ir.packing import packed_names
from zeroskip.ir.program import Batch, Program
from zeroskip.ir.stage_files import StageFiles, digest_of
from zeroskip.passes import Instrument, MaterializeElastic, Pass, PassManager
from zeroskip.passes.base import measure_drift
from zeroskip.progress import ProgressBar
from zeroskip.report import Report, make_report


@dataclass(frozen=True)
class CompiledModel:
    """What `compile_sparse` returns.

    Args:
        model: The user's own module, which now holds the compiled weights; None when it was
            compiled from a checkpoint directory.
        program: The compiled Program; it may hold lowered operators.
        report: What each pass did, and the state of each linear; print it.
    """

    model: torch.nn.Module | None
    program: Program
    report: Report

    def __call__(self, **inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Runs the compiled Program; returns its outputs by name.

        The first call loads its weights, and packs those that are lowered; they stay in memory.
        """
        return self._loaded.run(inputs)

    @cached_property
    def _loaded(self) -> Program:
        return self.program.loaded()

    def at(self, sparsity: float) -> CompiledModel:
        """Returns a sparse model from an elastic one, which stays as it is.

        Args:
            sparsity: Share of weights to prune, up to what `TrainElastic` was told.

        Raises:
            RequirementError: The model is not elastic.
            PatternError: The sparsity was not trained, or is none of the family.
        """
        return materialize(self.program, sparsity)

    def save_pretrained(self, directory: str | Path) -> None:
        """Writes a plain Hugging Face checkpoint, zeros included, that transformers reloads.

        Raises:
            ArtifactError: The directory is not empty, or cannot be written.
            CompileError: The model is not a Hugging Face model.
        """
        module = self.program.model
        if not hasattr(module, "save_pretrained"):
            raise CompileError(
                "the model is not a Hugging Face model",
                where=type(module).__name__,
                next_step="save compiled.model.state_dict() with safetensors instead",
            )
        assert module is not None
        # Packed operands stand for parameters that are there as well.
        packed = packed_names(self.program)
        weights = self.program.weights.subset(n for n in self.program.weights if n not in packed)
        save_checkpoint(source_folder(module), weights, module, Path(directory))


def compile_sparse(
    model: torch.nn.Module | str | Path,
    passes: Sequence[Pass],
    *,
    example_inputs: Batch | None = None,
    calibration: Iterable[Batch | torch.Tensor] | None = None,
    memory: str | int = "4GiB",
    instruments: Sequence[Instrument] = (),
    progress: bool = False,
    dynamic_shapes: Mapping[str, Any] | None = None,
    work: str | Path | StageFiles | None = None,
) -> CompiledModel:
    """Compiles a model by a list of passes.

    The model is captured as a Program, the passes run on it, and when all of them have succeeded
    the new weights are written into the model. If anything fails the model is as it was.

    Args:
        model: A module in evaluation mode, or a Hugging Face checkpoint directory, whose weights
            then stay on disk.
        passes: In the order in which they run.
        example_inputs: Keyword arguments of `forward`, batch and sequence of at least 2. By default
            a few rows of the calibration data, or, for a Hugging Face model, made up.
        calibration: Batches for observers: mappings like `example_inputs`, or tensors of token ids.
        memory: Budget for activations in memory during calibration; what goes beyond is on disk.
        instruments: Watchers, such as `DumpPrograms(folder)`.
        progress: Show a progress bar on standard error.
        dynamic_shapes: As for `torch.export`; by default batch and sequence are dynamic.
        work: A folder in which each stage is kept as soon as it is finished. The same call goes on
            behind them, however the one before ended. The compiled program reads weights from
            there: remove it when that is saved. One process at a time may use it.

    Raises:
        CompileError: One of its children says what went wrong, where, and what to do next.
    """
    batches = read_batches(calibration)
    program = open_program(model, example_inputs, batches, dynamic_shapes)
    live = model if isinstance(model, torch.nn.Module) else None
    files = work if isinstance(work, StageFiles) else None
    if work is not None and files is None:
        from zeroskip.compile_key import model_digest

        read = model_digest(Path(str(model)) if live is None else live)
        files = StageFiles(Path(str(work)), digest_of([read, example_inputs]))
    return compile_program(
        program,
        passes,
        live=live,
        memory=memory,
        instruments=instruments,
        progress=progress,
        files=files,
    )


def compile_program(
    program: Program,
    passes: Sequence[Pass],
    *,
    live: torch.nn.Module | None,
    memory: str | int,
    instruments: Sequence[Instrument],
    progress: bool,
    files: StageFiles | None,
) -> CompiledModel:
    """Compiles what `open_program` returned; arguments as those of `compile_sparse`.

    Args:
        program: With its calibration data.
        passes: In the order in which they run.
        live: The module to write new weights into; None for a checkpoint on disk.
        memory: Budget for activations.
        instruments: Watchers.
        progress: Show a progress bar on standard error.
        files: Where finished stages are kept; its key says what was read.

    Raises:
        CompileError: As `compile_sparse`.
    """
    if files is not None:
        from zeroskip.compile_key import stage_key

        settings = [list(program.calibration), memory]
        files = StageFiles(files.folder, stage_key(files.key, passes, settings))
    watchers = [*instruments, *([ProgressBar()] if progress else [])]
    result = PassManager(tuple(passes), memory, tuple(watchers), files)(program)
    compiled = dataclasses.replace(result.program, calibration=(), dense=None)
    drift = measure_drift(program, compiled)
    report = make_report(compiled, result, drift)
    _add_parameters(compiled)
    if live is not None:
        _write_back(live, program, compiled)
    return CompiledModel(live, compiled, report)


def materialize(program: Program, sparsity: float, then: Sequence[Pass] = ()) -> CompiledModel:
    """Makes a sparse model from an elastic program, which stays as it is.

    Args:
        program: Knows `Elastic`.
        sparsity: Share of weights to prune.
        then: Passes that lower or export the result.

    Raises:
        RequirementError: The program is not elastic.
        PatternError: The sparsity was not trained, or is none of the family.
    """
    result = PassManager((MaterializeElastic(sparsity), *then))(program)
    compiled = dataclasses.replace(result.program, calibration=(), dense=None)
    # Its own drift is the whole one, where nothing follows; at sparsity 0 there is none.
    own = result.records[0].drift or 0.0
    drift = measure_drift(program, compiled) if then else own
    return CompiledModel(None, compiled, make_report(compiled, result, drift))


def open_program(
    model: torch.nn.Module | str | Path,
    example_inputs: Batch | None = None,
    batches: Sequence[Batch] = (),
    dynamic_shapes: Mapping[str, Any] | None = None,
) -> Program:
    """Captures a module, or a checkpoint directory whose weights stay on disk, as a Program.

    Args:
        model: See `compile_sparse`.
        example_inputs: By default a few rows of the batches, or made up.
        batches: Calibration data, if there is any; it comes with the program.
        dynamic_shapes: As for `torch.export`.

    Raises:
        CompileError: It is not a model, or cannot be captured, or the data does not fit it.
    """
    if isinstance(model, (str, Path)):
        program = _capture_checkpoint(Path(model), example_inputs, batches, dynamic_shapes)
    elif isinstance(model, torch.nn.Module):
        examples = example_inputs or example_from(batches) or default_inputs(model)
        program = capture(model, examples, dynamic_shapes=dynamic_shapes)
    else:
        raise CaptureError(
            f"a {type(model).__name__} cannot be compiled",
            next_step="pass a torch.nn.Module or the path of a checkpoint directory",
        )
    check_batches(program, batches)
    return dataclasses.replace(program, calibration=batches)


def _capture_checkpoint(
    directory: Path,
    example_inputs: Batch | None,
    batches: Sequence[Batch],
    dynamic_shapes: Mapping[str, Any] | None,
) -> Program:
    checkpoint = open_checkpoint(directory)
    examples = dict(example_inputs or example_from(batches) or default_inputs(checkpoint.model))
    fake = checkpoint.fake_mode.from_tensor
    fakes = {name: fake(value, static_shapes=True) for name, value in examples.items()}
    return capture(
        checkpoint.model,
        examples,
        dynamic_shapes=dynamic_shapes,
        weights=checkpoint.weights,
        trace_inputs=fakes,
    )


def _add_parameters(program: Program) -> None:
    """Gives the module, or the skeleton of a checkpoint, the biases that passes added."""
    added = added_parameters(program)
    if not added or program.model is None or add_parameters(program.model, added):
        return
    if hasattr(program.model, "save_pretrained"):
        warnings.warn(
            f"{len(added)} biases were added (the first is {next(iter(added))}), and "
            f"{type(program.model).__name__} has no configuration that holds just these: "
            "from_pretrained will ignore them in a saved checkpoint. The model, the program and "
            "an ONNX export have them.",
            stacklevel=3,
        )


def _write_back(model: torch.nn.Module, before: Program, after: Program) -> None:
    """Copies changed weights into the module's own parameters, so that ties and references hold."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in after.weights.changed_since(before.weights):
            if name in parameters:
                parameters[name].copy_(after.weights[name])
