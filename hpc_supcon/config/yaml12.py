"""YAML by the rules of the 1.2 core schema, by which text, numbers and booleans are what they look like.

PyYAML follows YAML 1.1: there `no` is False, `1e-3` is text, `010` is 8, `12:30:45` is 45045, a date is
an object, and the second of two equal keys silently wins. None of this happens here.
"""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from ..errors import ConfigError


class _Loader(yaml.SafeLoader):
    """Without tags, which crash PyYAML's constructors in many ways, and without aliases, which can contain themselves
    or expand a short text into a huge value.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        mark, problem = event.start_mark, None
        if isinstance(event, yaml.AliasEvent):
            problem = f"an alias (*{event.anchor}) is not supported: write the value itself"
        elif event.tag is not None:
            problem = f"the tag {event.tag!r} is not supported"
        if problem:
            raise yaml.constructor.ConstructorError(None, None, problem, mark)
        return super().compose_node(parent, index)


class _Dumper(yaml.SafeDumper):
    pass


# (tag, pattern, first characters): https://yaml.org/spec/1.2.2/#103-core-schema
_CORE = [
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
    ("null", r"~|null|Null|NULL|", "~nN\0"),
]

for _class in (_Loader, _Dumper):
    _class.yaml_implicit_resolvers = {}
    for _tag, _pattern, _first in _CORE:
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}",
            re.compile(f"^(?:{_pattern})$"),
            [c if c != "\0" else "" for c in _first],
        )


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    text = str(loader.construct_scalar(node))
    base = 8 if text.startswith("0o") else 16 if text.startswith("0x") else 10
    value = int(text, base)
    if value.bit_length() > 1024:
        raise ValueError("a number too large for a float")  # Python does not print thousands of digits
    return value


def _construct_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    seen: set[Hashable] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str):
            raise ConfigError(f"line {line}: the key {key!r} is not text")
        if key in seen:
            raise ConfigError(f"line {line}: the key {key!r} is given twice")
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)


def loads(text: str, where: str) -> Any:
    """Plain data (dict, list, str, int, float, bool, None) from YAML text.

    Raises ConfigError naming `where` and the line.
    """
    try:
        return yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    except yaml.MarkedYAMLError as error:
        line = f" line {error.problem_mark.line + 1}:" if error.problem_mark else ""
        raise ConfigError(f"{where}:{line} not valid YAML: {error.problem or error.context}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {str(error).splitlines()[0]}") from None


def dumps(data: Any) -> str:
    """Block-style YAML, equal to `data` when `loads` reads it; short lists are on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
