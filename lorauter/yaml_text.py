"""YAML that people write. A key that is there twice is an error: the first one's value would be lost without a word.

Knows nothing of what the text says.
"""

from __future__ import annotations

from typing import Any

import yaml


class _Loader(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    raise yaml.constructor.ConstructorError(
                        problem=f"the key {key.value[:40]!r} is there twice", problem_mark=key.start_mark
                    )
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(text: str | bytes) -> Any:
    """What a text says. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (it is a safe one)
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
