"""Runs an exported folder with plain ONNX Runtime: one call, one cached step, or greedy generation."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import torch

from zeroskip.ir.errors import ArtifactError, KernelLibraryError
from zeroskip.runtime.onnx.custom_ops import (
    session_options,
    uses_sparse_linear,
    warn_dense_fallback,
)
from zeroskip.runtime.onnx.folder import MODEL_FILE

DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(bool)": torch.bool,
    "tensor(double)": torch.float64,
}
Past = tuple[torch.Tensor, ...]


class Step(NamedTuple):
    """Logits [batch, sequence, vocabulary] of the new tokens, and the cache that now holds them."""

    logits: torch.Tensor
    past: Past


# Above this many bytes a model that is only compared is not copied into memory.
_LARGE = 2**30


class OnnxModel:
    """An exported model, opened.

    Args:
        directory: What `export_onnx` wrote.
        threads: Threads within an operator; None lets ONNX Runtime decide.
        custom_ops: Shared libraries of operators that the file uses beyond the standard ones and
            zeroskip's own, whose kernels are registered where the file needs them.
        mapped: Leave weights in the file, which is mapped into memory: ONNX Runtime then neither
            transposes nor repacks them when it loads, so that they take no memory of their own, and
            each product reads them as they are, which is slower.

    Raises:
        ArtifactError: The directory or the model is missing, or ONNX Runtime cannot load it.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        threads: int | None = None,
        custom_ops: Sequence[str | Path] = (),
        mapped: bool = False,
    ) -> None:
        self.path = Path(directory) / MODEL_FILE
        if not self.path.is_file():
            raise ArtifactError(
                f"there is no {MODEL_FILE} here",
                where=str(directory),
                next_step="pass the directory that export_onnx wrote",
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if threads is not None:
            options.intra_op_num_threads = threads
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
            # Else room for all weights in one piece is asked for first, never to be used; where
            # they are larger than memory, the system refuses.
            options.enable_mem_pattern = False
        try:
            _use_kernels(options, self.path)
            for library in custom_ops:
                options.register_custom_ops_library(str(library))
            self._session = onnxruntime.InferenceSession(
                str(self.path),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=["ConstantFolding"] if mapped else None,
            )
        # ONNX Runtime raises a family of its own, derived from nothing more specific.
        except Exception as error:
            raise ArtifactError(
                f"ONNX Runtime cannot load the model: {error}",
                where=str(self.path),
                next_step="the file may be truncated or its .data file missing; export it again",
            ) from error
        inputs = self._session.get_inputs()
        if odd := sorted({value.type for value in inputs} - DTYPES.keys()):
            raise ArtifactError(
                f"the model takes inputs of type {odd[0]}",
                where=str(self.path),
                next_step="export it with inputs of float32, float64, int32, int64 or bool",
            )
        self._types = {value.name: DTYPES[value.type] for value in inputs}
        self.input_shapes: dict[str, list[int | str]] = {v.name: v.shape for v in inputs}
        self.inputs = tuple(self.input_shapes)
        self.output_shapes: dict[str, list[int | str]] = {
            v.name: v.shape for v in self._session.get_outputs()
        }
        self.outputs = tuple(self.output_shapes)
        self._past_names = [name for name in self.inputs if name.startswith("past_key_values.")]

    @property
    def has_cache(self) -> bool:
        """Whether the graph takes and returns a key/value cache."""
        return bool(self._past_names)

    def run(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Runs the graph once: input name to tensor in, output name to tensor out.

        Raises:
            ArtifactError: An input is missing, or one has a name that the graph does not know.
        """
        absent = [name for name in self.inputs if name not in inputs]
        unknown = [name for name in inputs if name not in self._types]
        if absent or unknown:
            raise ArtifactError(
                f"missing inputs: {absent}; unknown inputs: {unknown}",
                where=str(self.path),
                next_step=f"pass exactly {', '.join(self.inputs)}",
            )
        feeds = {
            name: tensor.detach().cpu().to(self._types[name]).contiguous().numpy()
            for name, tensor in inputs.items()
        }
        try:
            results = self._session.run(None, feeds)
        except Exception as error:
            shapes = {name: array.shape for name, array in feeds.items()}
            raise ArtifactError(
                f"ONNX Runtime cannot run the model on {shapes}: {error}",
                where=str(self.path),
                next_step="pass inputs of the shapes in input_shapes",
            ) from error
        return {
            name: torch.from_numpy(array) for name, array in zip(self.outputs, results, strict=True)
        }

    def empty_past(self, batch: int) -> Past:
        """Returns the cache before the first token."""
        return tuple(
            torch.zeros(batch, int(shape[1]), 0, int(shape[3]))
            for shape in (self.input_shapes[name] for name in self._past_names)
        )

    def logits(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past: Past | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> Step:
        """Runs one step over new tokens, behind the tokens that the cache already holds.

        Args:
            input_ids: int64 [batch, sequence].
            attention_mask: int64 [batch, past + sequence], 0 at padding; None means no padding.
            past: The cache that the step before returned; None means empty.
            position_ids: int64 [batch, sequence]; None counts the tokens that are not padding.

        Raises:
            ArtifactError: The file was exported without a cache.
        """
        if not self.has_cache:
            raise ArtifactError(
                "this file has no cache",
                where=str(self.path),
                next_step="call run(), or export a causal language model with form='cache'",
            )
        batch, sequence = input_ids.shape
        past = self.empty_past(batch) if past is None else past
        if attention_mask is None:
            attention_mask = torch.ones(batch, past[0].shape[2] + sequence, dtype=torch.int64)
        feeds = {"input_ids": input_ids, "attention_mask": attention_mask}
        if "position_ids" in self._types:
            if position_ids is None:
                position_ids = positions(attention_mask)[:, -sequence:]
            feeds["position_ids"] = position_ids
        outputs = self.run({**feeds, **dict(zip(self._past_names, past, strict=True))})
        return Step(outputs["logits"], tuple(outputs[name] for name in self.outputs[1:]))

    def generate(
        self,
        input_ids: torch.Tensor,
        max_new_tokens: int,
        *,
        attention_mask: torch.Tensor | None = None,
        eos_token_id: int | Collection[int] | None = None,
        pad_token_id: int = 0,
    ) -> torch.Tensor:
        """Returns the prompt and the most likely token after it, over and over.

        Args:
            input_ids: int64 [batch, sequence]; shorter prompts are padded on the left.
            max_new_tokens: At most so many tokens are added.
            attention_mask: int64 [batch, sequence], 0 at padding.
            eos_token_id: A row ends at any of these; None never ends early.
            pad_token_id: Fills rows that ended before the others.
        """
        ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
        ending = torch.tensor(sorted(ends), dtype=torch.int64)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        tokens, new, past = input_ids, input_ids, None
        running = torch.ones(input_ids.shape[0], 1, dtype=torch.bool)
        for _ in range(max_new_tokens):
            step = self.logits(new, mask, past)
            best = step.logits[:, -1:].argmax(-1)
            new, past = torch.where(running, best, pad_token_id), step.past
            tokens = torch.cat([tokens, new], 1)
            mask = torch.cat([mask, torch.ones_like(new)], 1)
            running = running & ~torch.isin(new, ending)
            if not running.any():
                break
        return tokens


def open_to_compare(directory: str | Path) -> OnnxModel:
    """Opens a model to run it a few times; the weights of a large one stay in the file.

    Raises:
        ArtifactError: As `OnnxModel`.
    """
    files = [path for path in Path(directory).glob(f"{MODEL_FILE}*") if path.is_file()]
    return OnnxModel(directory, mapped=sum(path.stat().st_size for path in files) > _LARGE)


def _use_kernels(options: onnxruntime.SessionOptions, path: Path) -> None:
    """Registers the kernels if weights are packed; where there are none, the body runs, and says so."""
    try:
        packed = uses_sparse_linear(path)
    except ArtifactError:
        return  # ONNX Runtime says what is wrong with the file.
    if not packed:
        return
    try:
        session_options(options)
    except KernelLibraryError:
        warn_dense_fallback(path, stacklevel=4)  # Whoever opened the model.


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Returns the position of every token, counted from the first that is not padding."""
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)
