"""A run as one value: what is trained, on what, against what, and where; frozen, typed, written and read as YAML.

`Experiment()` is the pocket recipe. `load` reads a file with overrides and reports every mistake at once, each with its
file and line. Each field says its unit and where its default comes from: a section of arXiv 2410.20898 or "ours".
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import reduce
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from diffinstruct.config.addresses import quote_uri, redact
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.fields import Section
from diffinstruct.config.sections import ARGUMENTS, drop_arguments
from diffinstruct.errors import ConfigErrors, did_you_mean, nearest_file

# ------------------------------------------------------------------------------------------------------- reading
Loc = tuple[str | int, ...]
"""The keys and indices that lead to a value: ("rewards", "trained", 0, "weight")."""


def load_run(folder: Path) -> Experiment:
    """The experiment of a run's folder; keys of the version before this one are read by their new names."""
    return load(folder / "experiment.yaml", upgrade=True)


def load(path: str | Path, overrides: Iterable[str] = (), upgrade: bool = False) -> Experiment:
    """The experiment of a YAML file with `a.b=value` overrides, whose values are YAML too.

    Raises ConfigErrors with every mistake, one line each: `file:line: key: what, got ..., did you mean ...`. The file
    of an override is `-s`.
    """
    source = _Source()
    source.read_file(Path(path))
    if upgrade:
        _rename_old_keys(source.values)
    for override in sorted(overrides, key=lambda override: override.partition("=")[0] not in ARGUMENTS):
        source.override(override)  # a distance before its arguments
    try:
        experiment = Experiment.model_validate(source.values)
    except ValidationError as error:
        for mistake in error.errors(include_url=False):
            source.mistake(mistake["loc"], _describe(mistake["type"], mistake))
    else:
        if not source.mistakes:
            return experiment
    raise ConfigErrors([line for _, line in sorted(source.mistakes, key=lambda mistake: mistake[0])])


RENAMED = {
    "reference.cfg_scale": "reference.guidance_scale",
    "generator.start": "generator.init_from",
    "generator.start_rank": "generator.init_rank",
    "score_network.space": "score_network.loss_weighting",
    "objective.space": "objective.weighting",
    "objective.huber_c": "objective.distance_args.c",
    "objective.sid_alpha": "objective.args.alpha",
    "rewards.micro_batch": "rewards.micro_batch_size",
    "watch.every": "overoptimization.every",
    "watch.on_hacking": "overoptimization.on_alarm",
    "watch": "overoptimization",
    "cluster.reward_replicas": "cluster.rewards.replicas",
    "cluster.reward_cpus": "cluster.rewards.cpus",
    "cluster.reward_gpus": "cluster.rewards.gpus",
    "cluster.reward_deadline_s": "cluster.rewards.deadline_s",
    "cluster.reward_place": "cluster.rewards.placement",
    "cluster.reward_environments": "cluster.rewards.environments",
    "cluster.reward_resources": "cluster.rewards.resources",
    "runs": "output_dir",
}
"""Keys of version 0.1 and what they are called now; guidance_scale is cfg_scale + 1."""
ONLY_OF = {"objective.huber_c": ("distance", "pseudo_huber"), "objective.sid_alpha": ("name", "sid")}
"""Keys that version 0.1 wrote whatever the objective; they go over where another key has this value."""
MOST_VALUES = 100_000
"""In one configuration."""
LARGEST = 4 << 20
"""Bytes of one configuration."""


def _rename_old_keys(values: dict[str, Any]) -> None:
    for old, new in RENAMED.items():
        *sections, key = old.split(".")
        section = reduce(lambda found, name: found.get(name, {}) if isinstance(found, dict) else {}, sections, values)
        if not sections or not isinstance(section, dict) or key not in section:
            continue
        value = section.pop(key)
        if old in ONLY_OF and section.get(ONLY_OF[old][0], ONLY_OF[old][1]) != ONLY_OF[old][1]:
            continue
        if key == "cfg_scale" and isinstance(value, int | float):
            value += 1
        *sections, key = new.split(".")
        target = reduce(lambda found, name: found.setdefault(name, {}), sections, values)
        target[key] = value
    if values.get("watch") == {}:
        del values["watch"]
    if "runs" in values:
        values["output_dir"] = values.pop("runs")


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)

_OLD_NUMBER = re.compile(r"[-+]?0[\d_]+$|.*:", re.DOTALL)
"""What YAML 1.1 reads in base 8 or 60: 010 as eight, 1:30 as ninety."""


class _Source:
    """Values as they were written, and where: what a mistake in them is reported with."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[Loc, tuple[int, str]] = {}  # (line, "file:line"); overrides come after every line
        self.mistakes: list[tuple[int, str]] = []
        self._values_read = 0

    def read_file(self, path: Path) -> None:
        """Raises ConfigErrors where there is no file or no YAML in it: nothing more can be said then."""
        self.places[()] = (1, f"{path}:1")
        try:
            with path.open("rb") as file:
                content = file.read(LARGEST + 1)
            if len(content) > LARGEST:
                raise ConfigErrors([f"{path}: larger than {LARGEST >> 20} MiB, which no recipe is"])
            text = content.decode("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            what = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            near = nearest_file(path, "*.y*ml") if isinstance(error, FileNotFoundError) else ""
            raise ConfigErrors([f"{path}: {what}{near}"]) from None
        values = self._parse(text, (), lambda line: (line, f"{path}:{line}"))
        if isinstance(values, dict):
            self.values = values
        elif values is not None:
            raise ConfigErrors([f"{path}:1: should hold `key: value` lines, got {_short(values)}"])

    def override(self, override: str) -> None:
        key, equals, text = override.partition("=")
        *parents, last = key.split(".")
        if not (equals and last and all(parents)):
            self.mistakes.append((_LAST, f"-s: {override}: should be key=value"))
            return
        section: Any = self.values
        for depth, parent in enumerate(parents, start=1):
            section = section.setdefault(parent, {})
            self.places.setdefault(tuple(parents[:depth]), (_LAST, "-s"))
            if not isinstance(section, dict):
                self.mistakes.append((_LAST, f"-s: {key}: {_dotted(parents[:depth])!r} is no section"))
                return
        loc = (*parents, last)
        try:
            value = self._parse(text, loc, lambda line: (_LAST, "-s"))
        except ConfigErrors as error:
            self.mistakes += [(_LAST, line) for line in error.errors]
            return
        self.places = {place: where for place, where in self.places.items() if place[: len(loc)] != loc}
        self.places[loc] = (_LAST, "-s")
        drop_arguments(self.values, key, value)
        section[last] = value

    def mistake(self, loc: Loc, what: str) -> None:
        """Note a mistake at the line of its key or, where that was not written, of the section around it."""
        written = next(loc[:n] for n in range(len(loc), -1, -1) if loc[:n] in self.places)
        line, place = self.places[written]
        self.mistakes.append((line, f"{place}: {_dotted(loc)}: {what}"))

    def _parse(self, text: str, loc: Loc, place: Callable[[int], tuple[int, str]]) -> Any:
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            return None if node is None else self._construct(loader, node, loc, place)
        except RecursionError:
            raise ConfigErrors([f"{place(1)[1]}: nested too deeply, or into itself"]) from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = place(mark.line + 1 if mark else 1)[1]
            key = f"{_dotted(loc)}: " if loc else ""
            what = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigErrors([f"{where}: {key}not YAML: {what}"]) from None

    def _construct(self, loader: _Loader, node: yaml.Node, loc: Loc, place: Callable[[int], tuple[int, str]]) -> Any:
        self._values_read += 1
        if self._values_read > MOST_VALUES:  # ten aliases of ten aliases of ... are few lines
            raise yaml.MarkedYAMLError(
                problem=f"more than {MOST_VALUES} values, with aliases", problem_mark=node.start_mark
            )
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.places[*loc, i] = place(item.start_mark.line + 1)
            return [self._construct(loader, item, (*loc, i), place) for i, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            try:
                if _OLD_NUMBER.match(node.value) and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
                    return node.value
                value = loader.construct_object(node)
                repr(value)  # more digits than Python prints are a ValueError here, if they are hexadecimal ones
                return value
            except (
                ValueError,
                LookupError,
                AttributeError,
            ):  # it looks like a date and is none, or says that it is one
                what = f"{_short(node.value)} is no {node.tag.rpartition(':')[2]}"
                raise yaml.MarkedYAMLError(problem=what, problem_mark=node.start_mark) from None
        values = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key should be a word", problem_mark=key_node.start_mark)
            key = str(key_node.value)
            line, where = place(key_node.start_mark.line + 1)
            if key in values:
                self.mistakes.append((line, f"{where}: {_dotted((*loc, key))}: written twice"))
                continue
            self.places[*loc, key] = (line, where)
            values[key] = self._construct(loader, value_node, (*loc, key), place)
        return values


_LAST = sys.maxsize


def _dotted(loc: Iterable[str | int]) -> str:
    """In one line, whatever somebody has written as a key."""
    return ".".join(map(_printable, loc))


def _printable(part: object) -> str:
    text = str(part)
    return text if text.isprintable() else repr(text)


def _short(value: object) -> str:
    text = redact(repr(quote_uri(value) if isinstance(value, str) and "://" in value else value))
    return text if len(text) <= 80 else text[:77] + "..."


def _known(loc: Loc) -> Any:
    """The type at `loc`: a section, a Literal, ..."""
    kind: Any = Experiment
    for key in loc:
        kind = get_args(kind)[0] if isinstance(key, int) else kind.model_fields[key].annotation
    return kind


def _keys(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted names of all fields below a section."""
    for name, field in section.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def _describe(kind: str, mistake: Any) -> str:
    """What is wrong in words, what was got, and the nearest name that would be right."""
    loc, got, context = mistake["loc"], f", got {_short(mistake['input'])}", mistake.get("ctx", {})
    match kind:
        case "extra_forbidden" if new := RENAMED.get(_dotted(loc)):
            plus = ", whose value is cfg_scale + 1" * (loc[-1] == "cfg_scale")
            return f"unknown key, it is now {new!r}{plus}"
        case "extra_forbidden":
            here = did_you_mean(loc[-1], _known(loc[:-1]).model_fields)
            elsewhere = [key for key in _keys(Experiment) if key.rpartition(".")[2] == loc[-1]]
            there = f", did you mean {' or '.join(map(repr, elsewhere))}?" if elsewhere else ""
            return f"unknown key{here or there}"
        case "missing":
            return "is missing"
        case "literal_error":
            return f"should be {context['expected']}{got}{did_you_mean(mistake['input'], get_args(_known(loc)))}"
        case "model_type":
            return f"should be a section with keys of its own{got}"
        case "string_pattern_mismatch":
            return f"should be letters, digits, '.', '_' and '-' only{got}"
        case "rule":
            return f"{context['what']}{got}{context['hint']}"
    what = mistake["msg"][mistake["msg"].find("should") :]  # "Input should be greater than 0"
    return what.replace("valid integer", "whole number").replace("valid ", "").replace("tuple", "list") + got
