"""The dialect of YAML that recipes are written in: YAML 1.2 scalars, no duplicate keys.

PyYAML reads YAML 1.1, where an unquoted `2:4` is the base-60 number 124, `1e-3` is a string and
`off` is a flag. In a recipe they are a pattern, a number and a string.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml


class RecipeLoader(yaml.SafeLoader):
    """A safe loader with the scalars of YAML 1.2 that refuses a key written twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key `{key}` is there twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep)


class RecipeDumper(yaml.SafeDumper):
    """A safe dumper that quotes every string which YAML 1.1 or YAML 1.2 would take for a number."""


_CORE_SCALARS = {
    "tag:yaml.org,2002:bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "tag:yaml.org,2002:int": (r"[-+]?[0-9]+", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?|[-+]?\.inf|\.nan",
        "-+.0123456789",
    ),
}
_REPLACED = {*_CORE_SCALARS, "tag:yaml.org,2002:timestamp"}

RecipeLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _CORE_SCALARS.items():
    for _dialect in (RecipeLoader, RecipeDumper):
        _dialect.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), list(_first))
