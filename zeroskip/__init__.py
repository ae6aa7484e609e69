"""zeroskip: a compiler for post-training sparsity."""

__version__ = "0.1.0"
