"""Types of configuration values, and the rules that say what is wrong with one."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from math import isfinite
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails, PydanticCustomError

from diffinstruct.errors import did_you_mean
from diffinstruct.method.distances import DISTANCES
from diffinstruct.method.objectives import OBJECTIVES
from reward_models import NAMES

HOME = re.compile(r"((?:sqlite:///|datasets:|file://)?)(~.*)")  # also within an address
POCKET = "pocket"  # the built-in world: the reference of this name, and the source of the prompts POCKET_PROMPTS
POCKET_DISTILLED = "pocket-distilled"  # the one-step generator that comes with it, to start from
POCKET_PROMPTS = tuple(f"{POCKET}:{split}" for split in ("train", "eval", "open", "grid"))
"""For training, held-out combinations, face-free ones, and those of the picture grid."""


def broken_rule(what: str, hint: str = "") -> PydanticCustomError:
    """A mistake found by our own rules; the hint ends up after "got ...". Braces would be read as a template."""
    return PydanticCustomError("rule", "{what}", {"what": what, "hint": hint})


def mistake_at(key: str | int | tuple[str | int, ...], value: object, what: str, hint: str = "") -> ValidationError:
    """A broken rule of one key or item of what is under validation."""
    loc = key if isinstance(key, tuple) else (key,)
    details = InitErrorDetails(type=broken_rule(what, hint), loc=loc, input=value)
    return ValidationError.from_exception_data("section", [details])


def no_repeats(names: Iterable[str], taken: Iterable[str]) -> None:
    """Raises where a reward is named twice, or one of those `taken` once more."""
    seen = set(taken)
    for i, name in enumerate(names):
        if name in seen:
            raise mistake_at(i, name, "is named twice: a reward is either trained on or held out, and once")
        seen.add(name)


def name_in(table: Iterable[str], expected: str | None = None) -> AfterValidator:
    """The rule of a short name from `table`, or the import path of one's own."""

    def check(name: str) -> str:
        if name not in table and ":" not in name:
            known = expected or f"{' or '.join(map(repr, table))} or 'module:attribute'"
            raise broken_rule(f"should be {known}", did_you_mean(name, table))
        return name

    return AfterValidator(check)


def _argument(value: Any) -> Any:
    items = value if isinstance(value, list) else [value]
    for item in items:
        if not isinstance(item, bool | int | float | str) or (isinstance(item, float) and not isfinite(item)):
            raise broken_rule("should be a finite number, a text, true, false or a list of those")
    return value


def _no_nul(text: str) -> str:
    if "\0" in text:
        raise broken_rule("should hold no NUL byte: no file system takes it")
    return text


def _expanded(location: str) -> str:
    """A path or address with `~` and `${VARIABLE}` as this machine has them: others may have other ones."""
    scheme, path = found.groups() if (found := HOME.match(location)) else ("", location)
    if found and (home := os.path.expanduser(path)) != path:
        location = scheme + home
    elif found:
        raise broken_rule("the home directory does not exist on this machine")
    location = os.path.expandvars(location) if "${" in location else location
    if missing := re.search(r"\$\{(\w*)\}?", location):
        raise broken_rule(f"the environment has no variable {missing[1]!r}")
    return location


def _known_split(source: str) -> str:
    if source.partition(":")[0] == POCKET and source not in POCKET_PROMPTS:
        raise broken_rule("unknown split", did_you_mean(source, POCKET_PROMPTS))
    return source


# ---------------------------------------------------------------------------------------------------- the fields
Text = Annotated[str, Field(min_length=1), AfterValidator(_no_nul)]
Location = Annotated[Text, AfterValidator(_expanded)]
PromptSource = Annotated[Location, AfterValidator(_known_split)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Samples = Annotated[int, Field(ge=1, le=10**6)]
Rank = Annotated[int, Field(ge=0, le=2**14)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
# What an optimizer makes of these has to be a 32-bit number. Adam's steps have about the rate's size: more is nonsense.
LearningRate = Annotated[float, Field(gt=0, le=1)]
WeightDecay = Annotated[float, Field(ge=0, le=1000)]
Beta = Annotated[float, Field(ge=0, lt=1)]
RewardName = Annotated[str, name_in(NAMES, "a reward's short name or 'module:callable'")]
ObjectiveName = Annotated[str, name_in(OBJECTIVES)]
DistanceName = Annotated[str, name_in(DISTANCES)]
Argument = Annotated[
    Any, PlainValidator(_argument, json_schema_input_type=bool | int | float | str | list[bool | int | float | str])
]


class Section(BaseModel):
    # Strict: `steps: yes` or `steps: 1.5` is a mistake, never a 1. Tuples alone are read from YAML's lists.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


def key(default: Any, description: str, *, resume: bool = False, identity: bool = True, **constraints: Any) -> Any:
    """A key of a section, with all that is known about it.

    resume: whether a run that has begun may go on with another value, where its user allows it. All other keys say what
        the run is: other networks, another objective, other rewards are another run.
    identity: whether the key is part of what a run computes; if not, it says how the run is called, where it is kept,
        or on which machines it is placed.
    """
    traits: dict[str, Any] = {"resume": resume, "identity": identity}
    return Field(default, description=description, json_schema_extra=traits, **constraints)


def keys_of(section: type[Section], prefix: str = "", sections: bool = False) -> Iterator[tuple[str, FieldInfo]]:
    """The keys below a section: dotted name and field; those that are sections themselves only where `sections` asks
    for them. A list's items are no keys."""
    for name, field in section.model_fields.items():
        kind = field.annotation
        inner = kind if isinstance(kind, type) and issubclass(kind, Section) else None
        if sections or not inner:
            yield prefix + name, field
        if inner:
            yield from keys_of(inner, f"{prefix}{name}.", sections)


@cache
def keys_with(section: type[Section], trait: Literal["resume", "identity"], value: bool = True) -> tuple[str, ...]:
    """The dotted names of the keys below a section that are declared with this trait, in their order."""
    traits = {name: field.json_schema_extra for name, field in keys_of(section)}
    return tuple(name for name, extra in traits.items() if isinstance(extra, dict) and extra[trait] is value)
