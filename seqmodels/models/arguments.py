"""A layer's arguments, checked against its constructor before it is built."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

import msgspec

from seqmodels.channel import CHANNELS
from seqmodels.configuration import nearest
from seqmodels.mixers import MIXERS
from seqmodels.mixers.base import Mixer

SUPPLIED = ("d_model", "device", "dtype")  # what the model gives to every layer


def layer_class(name: str) -> type[Mixer]:
    """The mixer or channel module registered as ``name``; ``ValueError`` with the nearest names."""
    for registry in (MIXERS, CHANNELS):
        if name in registry:
            return registry[name]
    known = layer_names()
    raise ValueError(
        f"unknown layer {name!r}.{nearest(name, known)} Known: {', '.join(known)}. "
        "Register your own with seqmodels.register_mixer before the model is built."
    )


def layer_names() -> list[str]:
    """Every registered mixer and channel module."""
    return sorted({*MIXERS.names(), *CHANNELS.names()})


def build_layer(name: str, d_model: int, arguments: Mapping[str, Any], where: str) -> Mixer:
    """Layer ``name`` from configuration values; errors begin with ``where`` and the name."""
    cls = layer_class(name)
    values = convert_arguments(name, arguments, where)
    try:
        return cls(d_model, **values)
    except ValueError as error:
        raise ValueError(f"{where} ({name}): {error}") from error


def convert_arguments(name: str, arguments: Mapping[str, Any], where: str) -> dict[str, Any]:
    """``arguments`` in the types of the constructor of layer ``name``; nothing is guessed.

    Raises:
        ValueError: for an unknown argument (with the nearest known ones), a missing one, or a
            value of another type.
    """
    fields = _argument_types(layer_class(name))
    for key in arguments:
        if key in SUPPLIED:
            raise ValueError(f"{where} ({name}): {key!r} is set by the model, not by a layer's arguments")
        if key not in fields:
            known = ", ".join(fields) or "none: this layer takes no arguments"
            raise ValueError(f"{where} ({name}): unknown argument {key!r}.{nearest(key, fields)} Known: {known}")
    for key, (_, required) in fields.items():
        if required and key not in arguments:
            raise ValueError(f"{where} ({name}): argument {key!r} is missing; give it under layers.{name}")
    values = {}
    for key, value in arguments.items():
        try:
            values[key] = msgspec.convert(value, fields[key][0])
        except msgspec.ValidationError as error:
            raise ValueError(
                f"{where} ({name}): argument {key!r} is {value!r}; expected {_words(fields[key][0])}"
            ) from error
    return values


def default_arguments(cls: type[Mixer]) -> dict[str, Any]:
    """Every configurable argument of a layer with its default (``...`` where it has none)."""
    parameters = inspect.signature(cls).parameters
    return {key: ... if required else parameters[key].default for key, (_, required) in _argument_types(cls).items()}


@functools.cache
def _argument_types(cls: type[Mixer]) -> dict[str, tuple[Any, bool]]:
    """Configurable arguments: name to (type, required)."""
    hints = typing.get_type_hints(cls.__init__)
    result = {}
    for key, parameter in inspect.signature(cls).parameters.items():
        if key in SUPPLIED or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        annotation = _configurable(hints.get(key, Any))
        required = parameter.default is parameter.empty
        if annotation is not None:
            result[key] = (annotation, required)
        elif required:
            raise TypeError(
                f"{cls.__name__}: argument {key!r} has type {hints[key]!r}, which a configuration cannot express, "
                "and no default; accept a name (str) beside it or give it a default"
            )
    return result


def _words(annotation: Any) -> str:
    """A type as a user reads it: ``int or null``, ``'none' or 'fixed'``."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(map(_words, typing.get_args(annotation)))
    if origin is Literal:
        return " or ".join(map(repr, typing.get_args(annotation)))
    if annotation is type(None):
        return "null"
    return getattr(annotation, "__name__", str(annotation)) if origin is None else str(annotation)


def _configurable(annotation: Any) -> Any:
    """The part of a type that YAML can express, or None: ``str | FeatureMap`` becomes ``str``."""
    origin = typing.get_origin(annotation)
    if origin in (Union, types.UnionType):
        members = [member for member in map(_configurable, typing.get_args(annotation)) if member is not None]
        if all(member is type(None) for member in members):
            return None
        return Union[tuple(members)]  # noqa: UP007 (built at run time)
    if origin is Literal or annotation in (Any, bool, int, float, str, type(None)):
        return annotation
    if origin in (list, tuple, dict) or annotation in (list, tuple, dict):
        return annotation
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    if (
        origin is not None
        and getattr(origin, "__module__", "") == "collections.abc"
        and origin.__name__ in ("Sequence", "Mapping")
    ):
        return annotation
    return None
