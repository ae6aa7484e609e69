"""zeroskip: a compiler for post-training sparsity."""

from zeroskip.calibration import calibration_from_text
from zeroskip.compile import CompiledModel, compile_sparse
from zeroskip.evaluate import Perplexity, perplexity
from zeroskip.models import load_model
from zeroskip.recipe import Recipe, load_recipe
from zeroskip.report import Report

__version__ = "0.1.0"

__all__ = [
    "CompiledModel",
    "Perplexity",
    "Recipe",
    "Report",
    "calibration_from_text",
    "compile_sparse",
    "load_model",
    "load_recipe",
    "perplexity",
]
