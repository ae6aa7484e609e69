"""Parameters that passes added to a Program, and the module that it was captured from.

A pass may add biases to a graph; until the compilation has succeeded the module has none of them.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from zeroskip.ir.errors import CompileError
from zeroskip.ir.packing import packed_names
from zeroskip.ir.program import Program
from zeroskip.ir.weights import InMemory, Source


def added_parameters(program: Program) -> dict[str, Source]:
    """Returns the weights of a program that its model has no parameter for, packed ones left out."""
    if program.model is None:
        return {}
    known = {name for name, _ in program.model.named_parameters(remove_duplicate=False)}
    known |= packed_names(program)
    return {n: program.weights.source(n) for n in program.weights if n not in known}


@contextlib.contextmanager
def parameters_added(model: nn.Module, added: Mapping[str, Source]) -> Iterator[None]:
    """Gives a model further biases for as long as the block runs."""
    try:
        for name, source in added.items():
            _register(model, name, source)
        yield
    finally:
        for name in added:
            path, _, leaf = name.rpartition(".")
            model.get_submodule(path).register_parameter(leaf, None)


def add_parameters(model: nn.Module, added: Mapping[str, Source]) -> bool:
    """Gives a model the biases that were added to its program, for good.

    The configuration of a transformers model is told, where it has options that say so: then
    `from_pretrained` gives them back.

    Args:
        model: Live, or a skeleton of fake parameters.
        added: What `added_parameters` found.

    Returns:
        Whether a model that is built from the configuration has them too.

    Raises:
        CompileError: A module does not add the bias that it was given; the model is as it was.
    """
    if not added:
        return True
    for name, source in added.items():
        _prove(model, name, source)
    for name, source in added.items():
        _register(model, name, source)
    return _declare(model)


def _register(model: nn.Module, name: str, source: Source) -> None:
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    weight = next(owner.parameters(recurse=False))
    if isinstance(weight, FakeTensor):
        with weight.fake_mode:
            tensor = torch.empty(source.shape, dtype=source.dtype, device="cpu")
    else:
        tensor = source.load().detach().clone().to(weight.device)
    owner.register_parameter(leaf, nn.Parameter(tensor, requires_grad=weight.requires_grad))


def _prove(model: nn.Module, name: str, source: Source) -> None:
    """Gives a module random biases, looks whether its outputs rise by them, and takes them back."""
    owner = model.get_submodule(name.rpartition(".")[0])
    weight = next(owner.parameters(recurse=False))
    if isinstance(weight, FakeTensor):
        return  # Nothing to compute with: its class was tried when the bias was added.
    generator = torch.Generator().manual_seed(0)
    bias = torch.randn(source.shape, generator=generator).to(source.dtype)
    x = torch.randn(2, weight.shape[-1], generator=generator) * weight.shape[-1] ** -0.5
    x = x.to(weight.device, weight.dtype)
    with torch.no_grad():
        without = owner(x)
        with parameters_added(model, {name: InMemory(bias)}):
            rise = owner(x).double() - without.double()
    if not torch.allclose(rise, bias.double().to(rise.device).expand_as(rise), rtol=0, atol=0.1):
        raise CompileError(
            f"its module, a {type(owner).__name__}, does not add a bias that it is given",
            where=name,
            next_step="exclude the linear from the pass that added it",
        )


def _declare(model: nn.Module) -> bool:
    """Sets the options of a transformers configuration that say which linears have a bias."""
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        return False
    wanted = {name for name, _ in model.named_parameters()}
    config = model.config.to_dict()
    options = [key for key, value in config.items() if value is False and "bias" in key]
    for values in itertools.product((False, True), repeat=len(options) if len(options) < 4 else 0):
        chosen = {key: True for key, value in zip(options, values, strict=True) if value}
        if _parameter_names(model, chosen) == wanted:
            for key in chosen:
                setattr(model.config, key, True)
            return True
    return False


def _parameter_names(model: Any, options: Mapping[str, bool]) -> set[str]:
    config = type(model.config).from_dict({**model.config.to_dict(), **options})
    try:
        with torch.device("meta"):
            built = type(model)(config)
    except Exception:  # What an option means in another class is not ours to know.
        return set()
    return {name for name, _ in built.named_parameters()}
