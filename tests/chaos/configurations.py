"""Makes up configurations, right and wrong ones, and reads them: the JSON schema says, independently, which are wrong.

    python tests/chaos/configurations.py [--examples 10000] [--seed 0]

Half of them are YAML files of known keys with values as the schema asks for, a few of which are then spoiled: another
type, out of range, not finite, a key misspelt, a section that is a word. The other half are such files with bytes put
in, taken out or cut off. Each wrong one has to be refused with status 2 and one line a mistake that names file, line
and key; none may be accepted that the schema refuses, and nothing may ever end in a traceback. Exit status 1 if so.
"""

from __future__ import annotations

import argparse
import copy
import io
import re
import sys
import tempfile
import time
from collections import Counter
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from diffinstruct.cli.main import main
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.reading import load
from diffinstruct.errors import ConfigErrors

SCHEMA = Experiment.model_json_schema()
ORACLE = Draft202012Validator(SCHEMA)
ODD = (
    *(None, True, False, "", "yes", "é\u2028\x85", "a" * 300, [], [1], {}, {"a": 1}),
    *(-1, 0, 1.5, -0.5, 1e-4, 10**30, float("nan"), float("inf")),
)
PIECES = (
    *(b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"\t", b"\xc2\x85", b": ", b"- ", b"{", b"]", b"'", b"#", b"? ", b"%", b"~"),
    *(b"--- ", b"&a ", b"*a", b"<<: ", b"!!python/name:os.system "),
)


def fields(schema: dict[str, Any], at: tuple[str, ...] = ()) -> dict[tuple[str, ...], dict[str, Any]]:
    """Every key that is no section, with its schema."""
    found: dict[tuple[str, ...], dict[str, Any]] = {}
    for key, of in schema["properties"].items():
        section = SCHEMA["$defs"].get(of.get("$ref", "").rpartition("/")[2])
        found |= fields(section, (*at, key)) if section else {(*at, key): of}
    return found


FIELDS = fields(SCHEMA)


def fitting(schema: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values that a field's schema takes, or nearly so: what it cannot say is left to the oracle."""
    if "anyOf" in schema:
        return st.one_of([fitting(of) for of in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if "$ref" in schema:
        of = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
        return st.fixed_dictionaries({key: fitting(of["properties"][key]) for key in of.get("required", of["properties"])})
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    match schema.get("type"):
        case "integer":
            return st.integers(0 if low is None else low, schema.get("maximum", 2000))
        case "number":
            return st.floats(low, schema.get("maximum", schema.get("exclusiveMaximum", 1e6)), allow_nan=False)
        case "boolean":
            return st.booleans()
        case "array" if "prefixItems" in schema:
            return st.tuples(*map(fitting, schema["prefixItems"])).map(list)
        case "array":
            return st.lists(fitting(schema["items"]), min_size=schema.get("minItems", 0), max_size=3)
        case "object":
            return st.dictionaries(st.text(max_size=8), fitting(schema["additionalProperties"]), max_size=3)
        case "null":
            return st.none()
    return st.sampled_from([schema.get("default", "a"), "pickscore", "my.module:Name", "a/b", "pocket:train", "ä"])


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A configuration of a few keys, with up to three spoiled."""
    content: dict[str, Any] = {}
    chosen = draw(st.lists(st.sampled_from(list(FIELDS)), max_size=8, unique=True))
    for path in chosen:
        put(content, path, draw(fitting(FIELDS[path])))
    for _ in range(draw(st.integers(0, 3))):
        path = draw(st.sampled_from(list(FIELDS)))
        match draw(st.sampled_from(["value", "value", "value", "key", "section"])):
            case "value":
                put(content, path, copy.deepcopy(draw(st.sampled_from(ODD))))
            case "key":
                at = draw(st.integers(0, len(path[-1]) - 1))
                put(content, (*path[:-1], path[-1][:at] + draw(st.sampled_from("xé_ ")) + path[-1][at + 1 :]), 1)
            case "section":
                put(content, path[:1], copy.deepcopy(draw(st.sampled_from(ODD))))
    return content


def put(content: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        below = content.setdefault(key, {})
        if not isinstance(below, dict):
            return
        content = below
    content[path[-1]] = value


@st.composite
def texts(draw: st.DrawFn) -> bytes:
    """A configuration's file, damaged."""
    text = yaml.safe_dump(draw(documents()), allow_unicode=True).encode()
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(text)))
        piece = draw(st.sampled_from(PIECES))
        text = draw(st.sampled_from([text[:at] + piece + text[at:], text[:at], text[:at] + text[at + 3 :]]))
    return text


def wrong(content: Any) -> set[str]:
    """The dotted keys of what the schema says is wrong; "" for what is wrong with the whole."""

    def dotted(path: list[Any]) -> str:
        return ".".join(str(key) if str(key).isprintable() else repr(key) for key in path)

    found = set()
    for error in ORACLE.iter_errors(content):
        path = [*error.absolute_path]
        if error.validator == "additionalProperties":
            unknown = set(error.instance) - set(error.schema.get("properties", {}))
            found |= {dotted([*path, key]) for key in unknown}
        elif error.validator == "required":
            found |= {dotted([*path, key]) for key in error.validator_value if key not in error.instance}
        else:
            found.add(dotted(path))
    return found


def read(file: Path, content: bytes) -> tuple[Experiment | None, list[str]]:
    """What comes of it: an experiment, or the lines of a refusal that has status 2."""
    file.write_bytes(content)
    try:
        return load(file), []
    except ConfigErrors as error:
        lines = error.errors
    with redirect_stderr(said := io.StringIO()):
        status = main(["train", str(file)])
    assert status == 2 and said.getvalue() == "\n".join(lines) + "\n", (status, said.getvalue())
    assert lines and all(line.startswith(f"{file}:") and line.isprintable() for line in lines), lines
    return None, lines


def chaos(folder: Path, examples: int, number: int = 0) -> str:
    """All of it; what there was. Raises AssertionError with the smallest configuration at which something was wrong."""
    seen: Counter[str] = Counter()
    file, began = folder / "recipe.yaml", time.monotonic()
    options = settings(
        max_examples=-(-examples // 2), deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), print_blob=False,
    )  # fmt: skip

    @options
    @seed(number)
    @given(documents())
    def structured(content: dict[str, Any]) -> None:
        experiment, lines = read(file, yaml.safe_dump(content, allow_unicode=True).encode())
        mistakes = wrong(content)
        assert not (mistakes and experiment), f"accepted: {mistakes}"
        told = [re.sub(rf"^{re.escape(str(file))}:\d+: ", "", line).partition(": ")[0] for line in lines]
        for key in mistakes:
            assert any(key == at or at.startswith(f"{key}.") or key.startswith(f"{at}.") for at in told), (key, lines)
        seen["wrong by the schema" if mistakes else "refused by our own rules" if lines else "accepted"] += 1
        seen["mistakes named"] += len(mistakes)

    @options
    @seed(number)
    @given(texts())
    def damaged(content: bytes) -> None:
        experiment, _ = read(file, content)
        seen["damaged files accepted" if experiment else "damaged files refused"] += 1

    structured()
    damaged()
    of = ", ".join(f"{n} {what}" for what, n in sorted(seen.items()))
    return f"{examples} configurations ({of}), {time.monotonic() - began:.0f} s: none wrongly accepted, no traceback"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            print(chaos(Path(temporary), asked.examples, asked.seed))
        except AssertionError as error:
            sys.exit(f"{type(error).__name__}: {error}\n" + "\n".join(getattr(error, "__notes__", [])))
