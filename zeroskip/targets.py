"""What can be evaluated: Hugging Face models, compiled models, ONNX folders, and paths of these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zeroskip.ir.errors import EvaluationError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zeroskip.runtime.onnx.session import OnnxModel

Logits = Callable[[torch.Tensor], torch.Tensor]


def load_target(
    path: str | Path, tokenizer: PreTrainedTokenizerBase | None = None
) -> tuple[Any, PreTrainedTokenizerBase]:
    """Loads what a path holds; an ONNX folder's tokenizer may lie next to it in checkpoint/."""
    from zeroskip.models import load_model, load_tokenizer

    path = Path(path)
    if not (path / "model.onnx").is_file():
        model, own = load_model(path)
        return model, tokenizer or own
    from zeroskip.runtime.onnx.session import OnnxModel

    if tokenizer is None:
        beside = path.resolve().parent / "checkpoint"
        has_own = (path / "tokenizer_config.json").is_file() or not beside.is_dir()
        tokenizer = load_tokenizer(path if has_own else beside)
    return OnnxModel(path), tokenizer


@contextmanager
def logits_of(target: Any) -> Iterator[Logits]:
    """Views any target as a function from ids [B, S] to logits [B, S, V]."""
    module = target if isinstance(target, torch.nn.Module) else None
    training = module is not None and module.training
    parameter = next(module.parameters(), None) if module is not None else None
    device = parameter.device if parameter is not None else torch.device("cpu")
    extra = {"use_cache": False} if hasattr(getattr(module, "config", None), "use_cache") else {}

    def call(ids: torch.Tensor) -> torch.Tensor:
        ids = ids.to(device)
        if not getattr(target, "has_cache", True):
            return _tensor_of(target.run(_inputs_of(target, ids)), target)
        if hasattr(target, "logits"):
            return _tensor_of(target.logits(ids), target)
        mask = torch.ones_like(ids)
        return _tensor_of(target(input_ids=ids, attention_mask=mask, **extra), target)

    if module is not None:
        module.eval()
    try:
        yield call
    finally:
        if module is not None:
            module.train(training)


def _inputs_of(model: OnnxModel, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a graph without a cache takes for ids [B, S] that are no padding."""
    known = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
    }
    if strange := [name for name in model.inputs if name not in known]:
        raise EvaluationError(
            f"{model.path} also takes {', '.join(strange)}, which a text does not give.",
            next_step="Evaluate the checkpoint that it was exported from.",
        )
    return {name: known[name] for name in model.inputs}


def _tensor_of(output: Any, target: Any) -> torch.Tensor:
    """Finds the logits in a model's answer: bare, under their name, or first of a tuple."""
    found = output.get("logits") if hasattr(output, "keys") else output
    found = found[0] if isinstance(found, tuple) else found
    if not isinstance(found, torch.Tensor):
        raise EvaluationError(f"{type(target).__name__} gave no logits.")
    return found
