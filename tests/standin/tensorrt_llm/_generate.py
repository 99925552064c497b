"""Test code. Makes the public classes from the contract: fields, defaults, what is forbidden."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

import pydantic

from tensorrt_llm import _contract, _touches

_EMPTY_LIST = "[]"
_FACTORY = "<factory>"
_CONSTANTS = {"DEFAULT_REQUEST_PRIORITY": 0.5}


class _Names(dict[str, Any]):
    """What the contract's type expressions may name; what is not known here is Any."""

    def __missing__(self, name: str) -> Any:
        return Any


_BUILTINS = (bool, int, float, str, bytes, list, dict, object)
_TYPING = ("Optional", "Union", "Literal", "List", "Dict", "Sequence", "Mapping")
_names = _Names(
    {t.__name__: t for t in _BUILTINS}
    | {name: getattr(typing, name) for name in _TYPING}
    | {
        name: getattr(pydantic, name)
        for name in ("PositiveInt", "NonNegativeInt", "NonNegativeFloat")
    }
    | {"Path": Any, "None": None}
)


def known(*types: type) -> None:
    """Make types known to the contract's type expressions by their names."""
    _names.update({each.__name__: each for each in types})


def default_of(field: _contract.Field) -> Any:
    """The default as a value. Not for required fields and factories."""
    default = field.default
    return _CONSTANTS.get(default, default) if isinstance(default, str) else default


def model(name: str) -> type[pydantic.BaseModel]:
    """A pydantic model that forbids unknown keys; known ones are checked as far as types say."""
    fields: dict[str, Any] = {}
    for key, field in _contract.members(name).items():
        annotation = _annotation(field.type)
        if field.default == _contract.REQUIRED:
            fields[key] = (annotation, ...)
        elif field.default == _FACTORY:
            made = _names.get(field.type)
            fields[key] = (annotation, pydantic.Field(default_factory=made or dict))
        else:
            fields[key] = (annotation, default_of(field))
    made_class = pydantic.create_model(name, __base__=_Strict, **fields)
    made_class.__module__ = "tensorrt_llm.llmapi.llm_args"
    _names[name] = made_class
    return made_class


class _Strict(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(
        extra="forbid", arbitrary_types_allowed=True, protected_namespaces=()
    )

    def __init__(self, **given: Any) -> None:
        _touches.keywords(type(self).__name__, given)
        super().__init__(**given)


def record(
    name: str,
    module: str,
    *,
    bases: tuple[type, ...] = (),
    hidden: dict[str, Any] | None = None,
    kw_only: bool = False,
) -> type:
    """A dataclass with slots; `hidden` are private fields that are not arguments."""
    fields: list[Any] = []
    for key, field in _contract.members(name).items():
        if field.type == "property":
            continue
        if field.default == _contract.REQUIRED:
            fields.append((key, Any))
        elif field.default == _EMPTY_LIST:
            fields.append((key, Any, dataclasses.field(default_factory=list)))
        else:
            fields.append((key, Any, dataclasses.field(default=default_of(field))))
    for key, value in (hidden or {}).items():
        fields.append((key, Any, dataclasses.field(default=value, init=False, repr=False)))
    made = dataclasses.make_dataclass(
        name, fields, bases=(*bases, _touches.Watched), slots=True, kw_only=kw_only
    )
    made.__module__ = module
    if _touches.enabled:
        _record_keywords(made)
    return made


def plain(name: str, module: str) -> type:
    """A class with attributes only, as bindings make them: all settable, no arguments."""

    def __init__(self: Any) -> None:
        for key in _contract.members(name):
            setattr(self, key, None)

    return type(name, (_touches.Watched,), {"__init__": __init__, "__module__": module})


def signature(name: str) -> inspect.Signature:
    """Of a method, without `self`."""
    parameters = [
        inspect.Parameter(
            key,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty
            if field.default == _contract.REQUIRED
            else default_of(field),
        )
        for key, field in _contract.members(name).items()
    ]
    return inspect.Signature(parameters)


def with_self(method: inspect.Signature) -> inspect.Signature:
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return inspect.Signature([own, *method.parameters.values()])


def _annotation(text: str) -> Any:
    try:
        return eval(text, {"__builtins__": {}}, _names)
    except Exception:  # prose, or a form that means nothing here: anything goes
        return Any


def _record_keywords(made: type) -> None:
    original = made.__init__

    def __init__(self: Any, *args: Any, **given: Any) -> None:
        _touches.keywords(made.__name__, given)
        original(self, *args, **given)

    made.__init__ = __init__  # type: ignore[misc]
