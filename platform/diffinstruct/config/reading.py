"""Configurations from YAML: `load` reads a file with overrides and reports every mistake at once, with file and line."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from diffinstruct.config.addresses import quote_uri, redact
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.fields import keys_of
from diffinstruct.config.sections import ARGUMENTS, ObjectiveConfig, drop_arguments
from diffinstruct.errors import ConfigErrors, did_you_mean, nearest_file

Loc = tuple[str | int, ...]  # the keys and indices that lead to a value: ("rewards", "trained", 0, "weight")

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
"""Keys of version 0.1 and what they are called now; guidance_scale is cfg_scale + 1. A section comes after its keys."""
ONLY_OF = {"objective.huber_c": ("distance", "pseudo_huber"), "objective.sid_alpha": ("name", "sid")}
"""Keys that version 0.1 wrote whatever the objective; they go over where another key has this value."""
MOST_VALUES = 100_000  # in one configuration
LARGEST = 4 << 20  # bytes of one configuration


def load_run(folder: Path) -> Experiment:
    """The experiment of a run's folder; keys of version 0.1 are read by their new names."""
    source = _Source()
    source.read_file(folder / "experiment.yaml")
    source.rename_old_keys()
    return source.experiment()


def load(path: str | Path, overrides: Iterable[str] = ()) -> Experiment:
    """The experiment of a YAML file with `a.b=value` overrides, whose values are YAML too.

    Raises ConfigErrors with every mistake, one line each: `file:line: key: what, got ..., did you mean ...`. The file
    of an override is `-s`.
    """
    source = _Source()
    source.read_file(Path(path))
    for override in sorted(overrides, key=lambda override: override.partition("=")[0] not in ARGUMENTS):
        source.override(override)  # a distance before its arguments
    for old, new in source.rename_old_keys():
        source.mistake(tuple(old.split(".")), f"unknown key, {_now_called(old, new)}")
    return source.experiment()


def nearest_key(key: str, known: Iterable[str]) -> str:
    """Ends a message on an unknown dotted key: what it is called now, or the known one with the nearest name."""
    return f", {_now_called(key, RENAMED[key])}" if key in RENAMED else did_you_mean(key, known)


def _now_called(old: str, new: str) -> str:
    return f"it is now {new!r}" + ", whose value is cfg_scale + 1" * (old == "reference.cfg_scale")


MERGE = "tag:yaml.org,2002:merge"
"""The tag of the key `<<`, which puts another section's keys into its own."""


class _Loader(yaml.SafeLoader):
    """YAML whose `1e-4` is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+$"), list("-+.0123456789")
)

_OLD_NUMBER = re.compile(r"[-+]?0[\d_]+$|.*:", re.DOTALL)
"""What YAML 1.1 reads in base 8 or 60: 010 as eight, 1:30 as ninety."""
_LAST = sys.maxsize  # the line of an override: their mistakes come after those of the file


class _Source:
    """Values as they were written, and where: what a mistake in them is reported with."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.places: dict[Loc, tuple[int, str]] = {}  # (line, "file:line")
        self.mistakes: list[tuple[int, str]] = []
        self.values_read = 0

    def experiment(self) -> Experiment:
        """Raises ConfigErrors with every mistake that was noted before or shows now, in the order of the lines."""
        try:
            experiment = Experiment.model_validate(self.values)
        except ValidationError as error:
            for mistake in error.errors(include_url=False):
                self.mistake(mistake["loc"], _describe(mistake["type"], mistake))
        if not self.mistakes:
            return experiment
        raise ConfigErrors([line for _, line in sorted(self.mistakes, key=lambda mistake: mistake[0])])

    def read_file(self, path: Path) -> None:
        """Raises ConfigErrors where there is no file or no YAML in it: nothing more can be said then."""
        self.places[()] = (1, f"{path}:1")
        values = self._parse(_content(path), (), lambda line: (line, f"{path}:{line}"))
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

    def rename_old_keys(self) -> list[tuple[str, str]]:
        """Put values under today's names; the pairs of names of those that had an old one. What is written under its
        new name, too, is left as it is there."""
        renamed = []
        for old, new in RENAMED.items():
            (*parents, last), target = old.split("."), new.split(".")
            section: Any = self.values
            for name in parents:
                section = section.get(name) if isinstance(section, dict) else None
            if not isinstance(section, dict) or last not in section:
                continue
            value = section.pop(last)
            if last == "cfg_scale" and type(value) in (int, float):
                value += 1
            if parents and not section:
                self.values.pop(parents[0], None)
            renamed.append((old, new))
            key, only = ONLY_OF.get(old, ("", None))
            if only is None or section.get(key, ObjectiveConfig.model_fields[key].default) == only:
                self._put(target, value)
                self.places.setdefault(tuple(target), self.place((*parents, last)))
        return renamed

    def _put(self, keys: list[str], value: Any) -> None:
        section: Any = self.values
        for key in keys[:-1]:
            section = section.setdefault(key, {}) if isinstance(section, dict) else None
        if isinstance(section, dict):
            there = section.setdefault(keys[-1], value)
            if isinstance(there, dict) and isinstance(value, dict):
                section[keys[-1]] = value | there

    def _parse(self, text: str, loc: Loc, place: Callable[[int], tuple[int, str]]) -> Any:
        """The values of what is written at `loc`, `place` says where a line is. Raises ConfigErrors where it is no YAML.

        PyYAML composes nodes, which have positions. Of constructing values from them it does the scalars alone: it
        would take the last of two equal keys, follow aliases without end, and stop at the first mistake.
        """
        try:
            self._loader, self._place = _Loader(text), place
            node = self._loader.get_single_node()
            return None if node is None else self._value(node, loc)
        except RecursionError:
            raise ConfigErrors([f"{place(1)[1]}: nested too deeply, or into itself"]) from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            where = place(mark.line + 1 if mark else 1)[1]
            key = f"{_dotted(loc)}: " if loc else ""
            problem = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigErrors([f"{where}: {key}not YAML: {problem}"]) from None

    def _value(self, node: yaml.Node, loc: Loc) -> Any:
        self.values_read += 1
        if self.values_read > MOST_VALUES:  # ten aliases of ten aliases of ... are few lines
            raise _no_yaml(f"more than {MOST_VALUES} values, with aliases", node)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, loc)
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.places[*loc, i] = self._place(item.start_mark.line + 1)
            return [self._value(item, (*loc, i)) for i, item in enumerate(node.value)]
        return self._scalar(node)

    def _mapping(self, node: yaml.MappingNode, loc: Loc) -> dict[str, Any]:
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in sorted(node.value, key=lambda pair: pair[0].tag != MERGE):  # a key's own place is last
            if key_node.tag == MERGE:
                merged |= self._merged(value_node, loc)
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise _no_yaml("a key should be a word", key_node)
            key = str(key_node.value)
            line, where = self._place(key_node.start_mark.line + 1)
            if key in values:
                self.mistakes.append((line, f"{where}: {_dotted((*loc, key))}: written twice"))
                continue
            self.places[*loc, key] = (line, where)
            values[key] = self._value(value_node, (*loc, key))
        return merged | values

    def _merged(self, node: yaml.Node, loc: Loc) -> dict[str, Any]:
        """The content of `<<`: a section, or several, of which an earlier one counts before a later one."""
        merged: dict[str, Any] = {}
        for each in node.value if isinstance(node, yaml.SequenceNode) else [node]:
            if not isinstance(section := self._value(each, loc), dict):
                raise _no_yaml("<< takes a section, or a list of them", each)
            merged = section | merged
        return merged

    def _scalar(self, node: yaml.Node) -> Any:
        if _OLD_NUMBER.match(node.value) and node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float"):
            return node.value
        try:
            value = self._loader.construct_object(node)
            repr(value)  # more digits than Python prints are a ValueError here, if they are hexadecimal ones
            return value
        except (ValueError, LookupError, AttributeError):  # it looks like a date and is none, or says that it is one
            raise _no_yaml(f"{_short(node.value)} is no {node.tag.rpartition(':')[2]}", node) from None

    def mistake(self, loc: Loc, what: str) -> None:
        line, place = self.place(loc)
        self.mistakes.append((line, f"{place}: {_dotted(loc)}: {what}"))

    def place(self, loc: Loc) -> tuple[int, str]:
        """The line of a key or, where that was not written, of the section around it."""
        return next(self.places[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in self.places)


def _content(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise ConfigErrors([f"{path}: larger than {LARGEST >> 20} MiB, which no recipe is"])
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        near = nearest_file(path, "*.y*ml") if isinstance(error, FileNotFoundError) else ""
        raise ConfigErrors([f"{path}: {reason}{near}"]) from None


def _no_yaml(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _dotted(loc: Iterable[str | int]) -> str:
    """In one line, whatever somebody has written as a key."""
    return ".".join(text if text.isprintable() else repr(text) for text in map(str, loc))


def _short(value: object) -> str:
    text = redact(repr(quote_uri(value) if isinstance(value, str) and "://" in value else value))
    return text if len(text) <= 80 else text[:77] + "..."


def _known(loc: Loc) -> Any:
    """The type at `loc`: a section, a Literal, ..."""
    kind: Any = Experiment
    for key in loc:
        kind = get_args(kind)[0] if isinstance(key, int) else kind.model_fields[key].annotation
    return kind


def _describe(kind: str, mistake: Any) -> str:
    """What is wrong in words, what was got, and the nearest name that would be right."""
    loc, got, context = mistake["loc"], f", got {_short(mistake['input'])}", mistake.get("ctx", {})
    match kind:
        case "extra_forbidden":
            here = did_you_mean(loc[-1], _known(loc[:-1]).model_fields)
            elsewhere = [key for key, _ in keys_of(Experiment, sections=True) if key.rpartition(".")[2] == loc[-1]]
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
