"""Models whose modules have names without meaning: for tests that nothing depends on names."""

from __future__ import annotations

from torch import nn


def rename_modules(model: nn.Module) -> dict[str, str]:
    """Gives every module of a model a name of letters; returns new parameter names by old ones."""
    before = {id(p): name for name, p in model.named_parameters()}
    for module in list(model.modules()):
        children = list(module._modules.items())
        for count, (name, child) in enumerate(children):
            del module._modules[name]
            # The code that says self.q_proj still finds it, in the plain attributes.
            module.__dict__[name] = child
            module._modules["x" + chr(97 + count)] = child
        if isinstance(module, nn.ModuleList):
            keys = list(module._modules)
            module.__dict__["_get_abs_string_index"] = keys.__getitem__
    return {before[id(p)]: name for name, p in model.named_parameters()}
