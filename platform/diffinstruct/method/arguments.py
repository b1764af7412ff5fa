"""Parameters by name, as a recipe gives them to an objective or a distance; knows nothing of torch."""

from collections.abc import Callable, Collection, Iterable, Mapping
from importlib import import_module
from inspect import Parameter, signature
from typing import Any

KINDS: dict[str, tuple[str, tuple[type, ...]]] = {
    "float": ("a number", (float, int)),
    "int": ("a whole number", (int,)),
    "bool": ("true or false", (bool,)),
    "str": ("a text", (str,)),
    "list": ("a list", (list,)),
}
"""Types whose values are checked: as a parameter's annotation or default says."""


class ArgumentError(ValueError):
    """A value that a function does not take, or lacks; `known` are the names that it does take."""

    def __init__(self, name: str, reason: str, known: Iterable[str] = ()) -> None:
        super().__init__(name, reason, tuple(known))
        self.name, self.reason, self.known = name, reason, tuple(known)


def import_attribute(path: str) -> Any:
    """What `module:attribute` names. Raises what the import raises."""
    module, _, attribute = path.partition(":")
    return getattr(import_module(module), attribute)


def parameters(function: Callable[..., Any], without: Collection[str] = ()) -> dict[str, Parameter]:
    """The parameters of a function that can be given by name, but for those `without`."""
    by_name = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {
        name: parameter
        for name, parameter in signature(function).parameters.items()
        if parameter.kind in by_name and name not in without
    }


def complete_arguments(owner: str, takes: Mapping[str, Parameter], args: Mapping[str, Any]) -> dict[str, Any]:
    """`args` with the defaults of what they leave out, in the order of `takes`; raises ArgumentError."""
    for name in args:
        if name not in takes:
            names = ", ".join(map(repr, takes)) or "none"
            raise ArgumentError(name, f"is no parameter of {owner}, which takes {names}", takes)
    complete = {}
    for name, parameter in takes.items():
        if name in args:
            complete[name] = _typed(name, parameter, args[name])
        elif parameter.default is Parameter.empty:
            raise ArgumentError(name, f"is missing: {owner} has no default for it")
        else:
            complete[name] = parameter.default
    return complete


def _typed(name: str, parameter: Parameter, value: Any) -> Any:
    """The value, a whole number as a float where one is expected; raises ArgumentError for another type."""
    annotation = getattr(parameter.annotation, "__name__", parameter.annotation)  # a text where annotations are late
    kind = annotation if annotation in KINDS else type(parameter.default).__name__
    if kind not in KINDS:
        return value
    title, types = KINDS[kind]
    fits = isinstance(value, types) and (kind == "bool" or not isinstance(value, bool))
    if not fits:
        raise ArgumentError(name, f"should be {title}")
    return float(value) if kind == "float" else value
