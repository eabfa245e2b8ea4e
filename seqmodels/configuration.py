"""Strict configurations: YAML to typed, frozen structs, dotted overrides, and back.

A configuration is a ``msgspec.Struct``. Unknown keys are refused with the nearest known
names; wrong types are refused with the path of the value.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

T = TypeVar("T")


class ConfigError(ValueError):
    """A configuration with an unknown key, a wrong type, a duplicate or a syntax error."""


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string and keeps the last of two equal keys; this one does neither."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    result: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in result:
            raise ConfigError(f"line {key_node.start_mark.line + 1}: key {key!r} appears twice; keep one")
        result[key] = loader.construct_object(value_node, deep=True)
    return result


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def parse_yaml(text: str, source: str = "<string>") -> Any:
    """Plain values of a YAML document."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}") from error
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file (an empty file is an empty mapping)."""
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"cannot read configuration {str(path)!r}: {error.strerror}") from error
    data = parse_yaml(text, str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds {type(data).__name__}; expected a mapping of keys to values")
    return data


def load(path: str | Path, kind: type[T], overrides: Iterable[str] = ()) -> T:
    """A YAML file with ``dotted.key=value`` overrides as a struct of type ``kind``."""
    return convert(apply_overrides(load_yaml(path), overrides), kind)


def dump_yaml(config: Any) -> str:
    """A struct (or plain values) as YAML that :func:`load_yaml` reads back equal."""
    return yaml.safe_dump(msgspec.to_builtins(config), sort_keys=False, default_flow_style=None, width=110)


def convert(data: Any, kind: type[T], path: str = "") -> T:
    """Plain values to a struct of type ``kind``; ``path`` prefixes the names in errors."""
    check_keys(data, kind, path)
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        message = str(error).replace("`$", f"`{path or '$'}").replace("$.", "")
        raise ConfigError(f"configuration: {message}") from error


def check_keys(data: Any, kind: Any, path: str = "") -> None:
    """Refuses keys that the struct type ``kind`` (or a struct inside it) does not have."""
    for struct in _structs(kind):
        if not isinstance(data, dict):
            return
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(struct)}
        tag = struct.__struct_config__.tag_field
        for key, value in data.items():
            if key != tag and key not in fields:
                raise ConfigError(unknown_key(str(key), fields, path))
            if key in fields:
                check_keys(value, fields[key], _join(path, key))


def unknown_key(key: str, known: Iterable[str], path: str = "") -> str:
    """The message for key ``key`` under ``path`` that does not exist, with the nearest that do."""
    known = list(known)
    hint = nearest(key, known, path) or " Known: " + ", ".join(known)
    return f"unknown configuration key {_join(path, key)!r}.{hint}"


def nearest(name: str, known: Iterable[str], path: str = "") -> str:
    """``" Did you mean a or b?"`` for the known names that look like ``name``; empty when none does."""
    near = [_join(path, other) for other in difflib.get_close_matches(name, list(known), n=3, cutoff=0.6)]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def apply_overrides(data: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """A copy of ``data`` with ``dotted.key=value`` strings applied; values are YAML."""
    result = msgspec.to_builtins(data)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r} is not key=value, such as data.sequence_length=512")
        *parents, last = key.split(".")
        target = result
        for name in parents:
            target = target.setdefault(name, {})
            if not isinstance(target, dict):
                raise ConfigError(f"override {override!r}: {name!r} is the value {target!r}, it has no keys inside")
        target[last] = parse_yaml(text, f"override {override!r}")
    return result


def differences(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Lines ``key: ours != theirs`` for every dotted key in which two plain values differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        lines = []
        for key in [*ours, *(key for key in theirs if key not in ours)]:
            lines += differences(ours.get(key, "(absent)"), theirs.get(key, "(absent)"), _join(path, key))
        return lines
    return [] if ours == theirs else [f"{path}: {ours!r} != {theirs!r}"]


def _structs(kind: Any) -> list[Any]:
    """The struct type inside ``kind``, when there is exactly one (optional structs included)."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return [kind]
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        found = [struct for option in typing.get_args(kind) for struct in _structs(option)]
        return found if len(found) == 1 else []
    return []


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)
