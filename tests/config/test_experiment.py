"""The configuration: one value that survives every form it takes, and mistakes that say where and what."""

import copy
import hashlib
import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pydantic
import pytest
import yaml
from chaos.configurations import chaos

from diffinstruct.config.addresses import one_line, redact, tracking_uri
from diffinstruct.config.experiment import Experiment
from diffinstruct.config.fields import POCKET_PROMPTS, Section, keys_of, keys_with
from diffinstruct.config.prompts import read_prompt_set, read_prompts
from diffinstruct.config.reading import RENAMED, load, load_run
from diffinstruct.errors import ConfigErrors, UserError

RECIPE = Path(__file__).parents[2] / "experiments" / "recipes" / "pocket.yaml"


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return path


def errors(tmp_path: Path, text: str, *overrides: str) -> list[str]:
    """The mistakes, with the file's folder cut off."""
    with pytest.raises(ConfigErrors) as caught:
        load(written(tmp_path, text), overrides)
    assert str(caught.value) == "\n".join(caught.value.errors)
    return [line.replace(f"{tmp_path}/", "") for line in caught.value.errors]


# ----------------------------------------------------------------------------------------------------- the value
CHANGED = [
    "name=my.run-2",
    "reference={model: some/model, guidance_scale: 3}",
    "generator.init_from=reference",
    "generator.betas=[0, 0.999]",
    "objective={name: reward_only, distance_args: {c: 1e-3}}",
    "rewards.trained=[{name: pickscore, weight: 0.5}, {name: 'my.module:Reward', weight: 1e2}]",
    "cluster.workers=4",
    "tracking.uri=http://localhost:5000",
    "output_dir=/tmp/é",
]


@pytest.mark.parametrize("overrides", [[], CHANGED])
def test_every_form_gives_the_same_value(tmp_path, overrides):
    experiment = load(written(tmp_path, ""), overrides)
    assert load(written(tmp_path, experiment.to_yaml())) == experiment
    assert copy.deepcopy(experiment) == experiment
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    assert Experiment.model_validate(experiment.model_dump()) == experiment


def test_overrides_arrive_typed(tmp_path):
    e = load(written(tmp_path, "generator: {betas: [0, 0.5]}\nsteps: 7"), CHANGED)
    assert (e.steps, e.name, e.output_dir) == (7, "my.run-2", "/tmp/é")
    assert e.reference.guidance_scale == 3.0
    assert e.generator.betas == (0.0, 0.999)
    assert isinstance(e.generator.betas[0], float)  # torch's Adam refuses (int, float)
    assert [(r.name, r.weight) for r in e.rewards.trained] == [("pickscore", 0.5), ("my.module:Reward", 100.0)]
    assert e.objective.distance_args == {"c": 1e-3}


def test_the_recipe_is_the_default_and_names_every_key():
    recipe = yaml.safe_load(RECIPE.read_text())
    assert load(RECIPE) == Experiment()

    def keys(value: Any) -> Any:
        return {k: keys(v) for k, v in value.items()} if isinstance(value, dict) else None

    assert keys(recipe) == keys(Experiment().model_dump())


@pytest.mark.parametrize("path", sorted(RECIPE.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads(path):
    """Those of full size say of each value where it comes from."""
    experiment = load(path)
    assert experiment.name == path.stem
    if experiment.reference.model != "pocket":
        values = [line for line in path.read_text().splitlines() if line and not re.fullmatch(r"\w+:", line)]
        assert [line for line in values if "# " not in line] == []


def test_it_is_frozen_and_every_field_is_described():
    experiment = Experiment()
    with pytest.raises(pydantic.ValidationError):
        experiment.steps = 3  # type: ignore[misc]
    sections = [Experiment, *(type(getattr(experiment, name)) for name in Experiment.model_fields)]
    for section in [s for s in sections if isinstance(s, type) and issubclass(s, Section)]:
        for name, field in section.model_fields.items():
            if not (isinstance(field.annotation, type) and issubclass(field.annotation, Section)):
                assert field.description, f"{section.__name__}.{name}"


def test_params_are_flat_and_complete():
    params = Experiment().to_params()
    assert {key.partition(".")[0] for key in params} == set(Experiment.model_fields)
    assert params["objective.t_min"] == 20
    assert params["generator.betas"] == "[0.0, 0.99]"
    assert params["rewards.trained"] == '[{"name": "pocket_preference", "weight": 1.0}]'
    assert params["tracking.uri"] is None
    assert all(isinstance(value, str | int | float | None) for value in params.values())


def test_the_id_follows_the_configuration_and_not_its_whereabouts(tmp_path):
    path = written(tmp_path, "")
    same = load(path, ["output_dir=elsewhere", "tracking.experiment=x", "generator.betas=[0, 0.99]"])
    assert same.config_hash == Experiment().config_hash
    assert len(same.config_hash) == 12
    assert int(same.config_hash, 16)
    assert load(path, ["objective.distance_args.c=0.2"]).config_hash != same.config_hash


OTHER_VALUES: dict[str, Any] = {
    "name": "b", "output_dir": "b", "mirror": "s3://b", "prompts.embeddings": "b",
    "tracking.uri": "http://b", "tracking.experiment": "b",
    "cluster.worker_resources": {"b": 1.0}, "cluster.rewards.resources": {"b": 1.0},
    "steps": 7, "seed": 7, "generator.lora_rank": 7, "rewards.held_out": (),
}  # fmt: skip


@pytest.mark.parametrize("key", OTHER_VALUES)
def test_a_key_is_part_of_the_hash_and_of_the_changes_where_it_is_declared_so(key):
    changed_ = Experiment.model_validate(reduce(lambda value, name: {name: value}, reversed(key.split(".")), OTHER_VALUES[key]))
    identity = key in ("steps", "seed", "generator.lora_rank", "rewards.held_out")
    assert (key in keys_with(Experiment, "identity")) == identity
    assert (changed_.config_hash != Experiment().config_hash) == identity
    assert [*changed_.changes(Experiment())] == [key] * identity


def test_every_key_says_whether_it_may_change_and_whether_it_is_identity():
    """A plain pydantic Field, which would be neither, is none of ours."""
    for name, field in keys_of(Experiment):
        assert isinstance(field.json_schema_extra, dict) and {"resume", "identity"} == {*field.json_schema_extra}, name
    assert set(keys_with(Experiment, "resume")) < set(keys_with(Experiment, "identity"))
    assert {"generator.learning_rate", "score_network.learning_rate", "steps"} < set(keys_with(Experiment, "resume"))
    assert not {"seed", "objective.name", "generator.lora_rank"} & set(keys_with(Experiment, "resume"))


def test_a_run_moves_to_other_machines_and_is_the_same(tmp_path):
    """What it asks of the nodes is written down, and neither its id nor a resume looks at it."""
    path = written(tmp_path, "cluster:\n  rewards: {resources: {reward: 0.5}}\n")
    here = load(path, ["cluster.worker_resources={trainer: 2}"])
    assert here.cluster.per_worker == {"CPU": 1, "trainer": 2}
    assert here.cluster.per_reward_actor == {"CPU": 1, "GPU": 0, "reward": 0.5}
    assert here.to_params()["cluster.rewards.resources"] == '{"reward": 0.5}'
    assert here == load(path, ["cluster.worker_resources.trainer=2"])
    there = load(path, ["cluster.rewards.resources={}", "cluster.use_gpu=true"])
    assert there.cluster.per_worker == {"CPU": 1, "GPU": 1}
    assert here.config_hash == Experiment().config_hash != there.config_hash
    assert here.changes(there) == {"cluster.use_gpu": (True, False)}


def test_how_many_processes_share_a_copy_is_placement(tmp_path):
    sharded = {"workers": 8, "fully_shard": True}
    ours, theirs = (Experiment.model_validate({"cluster": sharded | more}) for more in ({}, {"shard_degree": 4}))
    assert ours.config_hash == theirs.config_hash and not theirs.changes(ours)
    for wrong, said in (
        ({"fully_shard": False}, r"shard_degree: should be none where fully_shard is false, got 4"),
        ({"workers": 2}, r"shard_degree: should divide cluster.workers \(2\), got 4"),
        ({"shard_degree": 1}, r"shard_degree: .*2, got 1"),
    ):
        text = yaml.safe_dump({"cluster": sharded | {"shard_degree": 4} | wrong})
        with pytest.raises(ConfigErrors, match=said):
            load(written(tmp_path, text))


# ---------------------------------------------------------------------------------------------------- its mistakes
def test_all_mistakes_at_once_in_the_order_of_the_lines(tmp_path):
    text = """\
name: pocket
step: 10
steps: yes
steps: 20
learning_rate: 3
generator:
  learning_rate: -1e-4
  betas: [0, 1.5]
objective:
  distance: pseudo_hubr
  t_min: 990
score_network: 3
rewards:
  trained:
    - {weight: .nan}
    - name: pocket_preferense
prompts: {train: "pocket:trian"}
cluster:
  workers: 3
"""
    overrides = ["logging.evry=2", "x", "seed=[1", "generator.ema_decay=1.0", "name.x=1"]
    assert errors(tmp_path, text, *overrides) == [
        "run.yaml:2: step: unknown key, did you mean 'steps'?",
        "run.yaml:3: steps: should be a whole number, got True",
        "run.yaml:4: steps: written twice",
        "run.yaml:5: learning_rate: unknown key, did you mean 'generator.learning_rate' or 'score_network.learning_rate'?",
        "run.yaml:7: generator.learning_rate: should be greater than 0, got -0.0001",
        "run.yaml:8: generator.betas.1: should be less than 1, got 1.5",
        "run.yaml:9: objective.t_max: should be greater than t_min (990), got 980",  # not written: its section's line
        "run.yaml:10: objective.distance: should be 'pseudo_huber' or 'squared' or 'module:attribute', "
        "got 'pseudo_hubr', did you mean 'pseudo_huber'?",
        "run.yaml:12: score_network: should be a section with keys of its own, got 3",
        "run.yaml:15: rewards.trained.0.name: is missing",
        "run.yaml:15: rewards.trained.0.weight: should be a finite number, got nan",
        "run.yaml:16: rewards.trained.1.name: should be a reward's short name or 'module:callable', "
        "got 'pocket_preferense', did you mean 'pocket_preference'?",
        "run.yaml:17: prompts.train: unknown split, got 'pocket:trian', did you mean 'pocket:train'?",
        "run.yaml:19: cluster.workers: should divide global_batch_size (32), got 3",
        "-s: x: should be key=value",
        "-s: seed: not YAML: expected ',' or ']', but got '<stream end>'",
        "-s: name.x: 'name' is no section",
        "-s: generator.ema_decay: should be less than 1, got 1.0",
        "-s: logging.evry: unknown key, did you mean 'every'?",
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("steps: [1\nseed: 2", "run.yaml:2: not YAML: expected ',' or ']', but got ':'"),
        ("steps: 1\nname: 2024-99-99", "run.yaml:2: not YAML: '2024-99-99' is no timestamp"),
        ("steps: !!bool maybe", "run.yaml:1: not YAML: 'maybe' is no bool"),
        ("steps: !!timestamp x", "run.yaml:1: not YAML: 'x' is no timestamp"),
        ("steps: !!int ''", "run.yaml:1: not YAML: '' is no int"),
        (f"seed: 0x{'f' * 5000}", f"run.yaml:1: not YAML: '0x{'f' * 74}... is no int"),
        ("- 1", "run.yaml:1: should hold `key: value` lines, got [1]"),
        ("steps: !x 1", "run.yaml:1: not YAML: could not determine a constructor for the tag '!x'"),
        (
            "rewards:\n  held_out: [pickscore,\n    pocket_preference]",
            "run.yaml:3: rewards.held_out.1: is named twice: a reward is either trained on or held out, and once, "
            "got 'pocket_preference'",
        ),
        (
            "rewards: {trained: []}",
            "run.yaml:1: rewards.trained: should name a reward (only objective.reward_scale 0 goes without), got []",
        ),
        (
            "steps: 3\nreference: {model: some/model}",
            "run.yaml:1: generator.init_from: belongs to the pocket world, but reference.model is 'some/model', "
            "got 'pocket-distilled'",
        ),
        (
            "device: cpu\ncluster:\n  use_gpu: true",
            "run.yaml:3: cluster.use_gpu: should be false where device is 'cpu', got True",
        ),
        (
            "cluster:\n  worker_resources:\n    GPU: 1",
            "run.yaml:3: cluster.worker_resources.GPU: should be a resource that nodes declare "
            "(use_gpu and rewards.gpus ask for GPUs), got 1.0",
        ),
        (
            "cluster:\n  rewards: {resources: {reward: 1.5}}",
            "run.yaml:2: cluster.rewards.resources.reward: should be a whole number where it is above 1, got 1.5",
        ),
        (
            "cluster:\n  rewards: {resources: {reward: 0}}",
            "run.yaml:2: cluster.rewards.resources.reward: should be greater than 0, got 0",
        ),
        ("cluster: {rewards: {resources: 1}}", "run.yaml:1: cluster.rewards.resources: should be a dictionary, got 1"),
        ("steps: 1.5", "run.yaml:1: steps: should be a whole number, got 1.5"),
        ("steps: '5'", "run.yaml:1: steps: should be a whole number, got '5'"),
        ("steps: 1:30:00", "run.yaml:1: steps: should be a whole number, got '1:30:00'"),
        ("steps: 010", "run.yaml:1: steps: should be a whole number, got '010'"),
        ("steps: -0_7", "run.yaml:1: steps: should be a whole number, got '-0_7'"),
        ("name: a/b", "run.yaml:1: name: should be letters, digits, '.', '_' and '-' only, got 'a/b'"),
        ('output_dir: "a\\0b"', "run.yaml:1: output_dir: should hold no NUL byte: no file system takes it, got 'a\\x00b'"),
        (
            "generator:\n  learning_rate: 1e39",
            "run.yaml:2: generator.learning_rate: should be less than or equal to 1, got 1e+39",
        ),
        (
            "score_network: {weight_decay: 1e39}",
            "run.yaml:1: score_network.weight_decay: should be less than or equal to 1000, got 1e+39",
        ),
        (
            "objective: {distance_args: {c: 1e39}, reward_scale: 0}",
            "run.yaml:1: objective.distance_args: c should be greater than 0 and at most 1000000, got {'c': 1e+39}",
        ),
        (
            "objective: {t_log_std: 1e-300, reward_scale: 0}",
            "run.yaml:1: objective.t_log_std: should be greater than or equal to 0.001, got 1e-300",
        ),
        ("tracking: {uri: 'sqlite://'}", "run.yaml:1: tracking.uri: should name a file: sqlite:///PATH, got 'sqlite://'"),
        (
            f"global_batch_size: {10**20}",
            f"run.yaml:1: global_batch_size: should be less than or equal to 1000000, got {10**20}",
        ),
        ("device: gpu", "run.yaml:1: device: should be 'auto', 'cpu' or 'cuda', got 'gpu'"),
    ],
)
def test_one_mistake(tmp_path, text, expected):
    assert errors(tmp_path, text) == [expected]


def test_a_missing_file_names_the_nearest(tmp_path):
    written(tmp_path, "")
    with pytest.raises(ConfigErrors, match=r"rum.yaml: No such file or directory, did you mean '.*run.yaml'\?$"):
        load(tmp_path / "rum.yaml")


def test_errors_can_be_rebuilt():
    """As they are when they cross from a worker to the driver: from what `__reduce__` gives."""
    make, arguments = ConfigErrors(["a", "b"]).__reduce__()[:2]
    error = make(*arguments)
    assert error.errors == ["a", "b"] and str(error) == "a\nb"
    assert copy.copy(error).errors == ["a", "b"]


# -------------------------------------------------------------------------------------------- keys of version 0.1
OLD = Path(__file__).with_name("pocket_0_1.yaml")
"""The recipe of version 0.1, which names every key, as a run's folder has them."""


def value_in(content: Any, key: str) -> Any:
    return reduce(lambda section, name: section[name], key.split("."), content)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_key_is_answered_with_the_new_one(tmp_path, old, new):
    value = json.dumps(value_in(yaml.safe_load(OLD.read_text()), old) if old != "watch" else {})
    *sections, key = old.split(".")
    text = "steps: 3\n" + "".join(f"{'  ' * i}{name}:\n" for i, name in enumerate(sections))
    text += f"{'  ' * len(sections)}{key}: {value}\n"
    plus = ", whose value is cfg_scale + 1" * (old == "reference.cfg_scale")
    answer = f"{old}: unknown key, it is now {new!r}{plus}"
    assert errors(tmp_path, text) == [f"run.yaml:{2 + len(sections)}: {answer}"]
    assert errors(tmp_path, "steps: 3", f"{old}={value}") == [f"-s: {answer}"]
    known = Experiment().to_params() | Experiment.model_validate({"objective": {"name": "sid"}}).to_params()
    assert new in known or new in {key.partition(".")[0] for key in known}
    assert old not in known


def test_what_stands_under_an_old_key_is_checked_as_well(tmp_path):
    """All mistakes at once, and none that only the old name makes: this generator is no pocket world's."""
    text = "reference: {model: m, cfg_scale: x}\ngenerator:\n  start: reference\nwatch:\n  every: -1\n  evry: 1\nruns: ''"
    assert errors(tmp_path, text) == [
        "run.yaml:1: reference.cfg_scale: unknown key, it is now 'reference.guidance_scale', whose value is cfg_scale + 1",
        "run.yaml:1: reference.guidance_scale: should be a number, got 'x'",
        "run.yaml:3: generator.start: unknown key, it is now 'generator.init_from'",
        "run.yaml:4: watch: unknown key, it is now 'overoptimization'",
        "run.yaml:4: overoptimization.evry: unknown key, did you mean 'every'?",
        "run.yaml:5: watch.every: unknown key, it is now 'overoptimization.every'",
        "run.yaml:5: overoptimization.every: should be greater than or equal to 0, got -1",
        "run.yaml:7: runs: unknown key, it is now 'output_dir'",
        "run.yaml:7: output_dir: should have at least 1 character, got ''",
    ]
    assert errors(tmp_path, "steps: 3", "generator={start: reference}") == [
        "-s: generator.start: unknown key, it is now 'generator.init_from'"
    ]
    assert errors(tmp_path, "watch: 3\noveroptimization: {every: 3}\nruns: a\noutput_dir: b") == [
        "run.yaml:1: watch: unknown key, it is now 'overoptimization'",
        "run.yaml:3: runs: unknown key, it is now 'output_dir'",
    ]


def test_a_run_of_the_version_before_is_read(tmp_path):
    """Its experiment.yaml is the recipe of then; each value under an old key arrives under the new one."""
    (tmp_path / "experiment.yaml").write_text(OLD.read_text())
    assert load_run(tmp_path) == Experiment()
    content = yaml.safe_load(OLD.read_text())
    content["reference"]["cfg_scale"] = 0.0
    content["watch"] = {"every": 7, "on_hacking": "stop"}
    content["generator"] |= {"start": "reference", "start_rank": 0}
    content["score_network"]["space"] = "v"
    content["objective"] |= {"space": "eps", "name": "sid", "sid_alpha": 1.2}
    content["rewards"]["micro_batch"], content["runs"] = 5, "elsewhere"
    content["cluster"] |= {"reward_replicas": 2, "reward_cpus": 0.5, "reward_gpus": 0.25, "reward_deadline_s": 9.0}
    content["cluster"] |= {"reward_place": "actor", "reward_resources": {"r": 0.5}}
    content["cluster"]["reward_environments"] = [{"rewards": ["pocket_judge"], "runtime_env": "env.yaml"}]
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(content))
    experiment, params = load_run(tmp_path), load_run(tmp_path).to_params()
    assert (params["reference.guidance_scale"], params["generator.init_from"]) == (1.0, "reference")
    for old, new in RENAMED.items():
        if old not in ("watch", "reference.cfg_scale"):
            value = value_in(content, old)
            assert params[new] == (json.dumps(value) if isinstance(value, dict | list) else value), new
    (tmp_path / "experiment.yaml").write_text(experiment.to_yaml())
    assert load_run(tmp_path) == experiment


# ------------------------------------------------------------------------------------------------------- prompts
def test_prompts_of_a_csv_and_a_txt(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,mouth\n"a, b",None\nc,\n')
    (tmp_path / "a.txt").write_text("a cat\n\na dog, red\n")
    table = read_prompts(tmp_path / "a.csv")
    assert table.to_dict("list") == {"prompt": ["a, b", "c"], "mouth": ["None", ""]}
    table = read_prompts(str(tmp_path / "a.txt"))
    assert table["prompt"].tolist() == ["a cat", "a dog, red"]
    assert table.index.tolist() == [0, 1]


def test_a_prompt_set_is_its_texts_with_their_digest(tmp_path):
    """The digest is kept in checkpoints: its bytes stay what they were."""
    (tmp_path / "a.csv").write_text('caption,mouth\na cat,open\n,\n"a dög, red",\n')
    prompts = read_prompt_set(tmp_path / "a.csv", "caption")
    assert [*prompts] == ["a cat", "a dög, red"] and prompts[:1] == ("a cat",) and len(prompts) == 2
    assert prompts.digest == hashlib.sha256("a cat\0a dög, red\0".encode()).hexdigest()
    assert prompts.source == str(tmp_path / "a.csv") and prompts.table["mouth"].tolist() == ["open", ""]
    assert copy.deepcopy(prompts).digest == prompts.digest
    with pytest.raises(AttributeError):
        prompts.texts = ()  # type: ignore[misc]


def test_prompts_of_tables_and_datasets(tmp_path):
    """One prompt set in every form, its prompts in a column of another name; what is empty is left out."""
    frame = pd.DataFrame({"caption": ["a cat", None, "a dog\u2028, red"], "prompt": ["x", "y", "z"], "n": [1, 2, 3]})
    frame.to_parquet(tmp_path / "a.parquet")
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_json(tmp_path / "a.jsonl", lines=True, orient="records")
    (tmp_path / "hub" / "data").mkdir(parents=True)
    frame.to_parquet(tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    for source in ("a.parquet", "a.csv", "a.jsonl"):
        table = read_prompts(tmp_path / source, column="caption")
        assert table["prompt"].tolist() == ["a cat", "a dog\u2028, red"] and [*table.columns] == ["prompt", "n"]
        with pytest.raises(UserError, match=r"no column 'captoin', columns are caption, prompt, n, did you mean 'caption'\?"):
            read_prompts(tmp_path / source, column="captoin")
    table = read_prompts(f"datasets:{tmp_path}/hub:train", column="caption")
    assert table.to_dict("list") == {"prompt": ["a cat", "a dog\u2028, red"]}
    assert len(read_prompts(f"datasets:{tmp_path}/hub:train")) == 3
    frame.astype({"caption": "category"}).to_parquet(tmp_path / "a.parquet")
    assert read_prompts(tmp_path / "a.parquet", column="caption")["prompt"].tolist() == ["a cat", "a dog\u2028, red"]


def test_prompts_of_other_editors(tmp_path):
    """With a byte order mark, with Windows' ends of lines, with characters that only `splitlines` takes for one."""
    (tmp_path / "a.txt").write_bytes("\ufeffa cat\r\na dog\u2028on\x0ca mat\r\n\r\na bird".encode())
    assert read_prompts(tmp_path / "a.txt")["prompt"].tolist() == ["a cat", "a dog\u2028on\x0ca mat", "a bird"]
    (tmp_path / "a.csv").write_bytes("\ufeffprompt\r\na dog\u2028on a mat\r\n".encode())
    assert read_prompts(tmp_path / "a.csv")["prompt"].tolist() == ["a dog\u2028on a mat"]


TEXTS = ["a red hat, a blue coat", 'a sign that says "open", lit', "42", "None", "a fox"]
PARTI = "Prompt\tCategory\tChallenge\tNote\n" + "".join(f"{text}\tAbstract\tBasic\t\n" for text in TEXTS)
QUOTED = ['"' + text.replace('"', '""') + '"' for text in TEXTS]
PUBLISHED: dict[str, tuple[str, str]] = {  # file -> (column, content), as prompt sets are published and saved
    "PartiPrompts.tsv": ("Prompt", PARTI),
    "parti_renamed.csv": ("Prompt", PARTI),
    "anime.json": ("prompt", json.dumps(TEXTS)),
    "hpdv2.json": ("prompt", json.dumps([{"prompt": text, "image_path": ["a.jpg"], "rank": [0, 1]} for text in TEXTS])),
    "hpsv2.json": ("prompt", json.dumps({"anime": TEXTS[:2], "photo": TEXTS[2:]})),
    "columns.json": ("prompt", json.dumps({"id": [1, 2, 3, 4, 5], "prompt": TEXTS})),
    "geneval.jsonl": ("prompt", "".join(json.dumps({"tag": "two", "n": [{"count": 1}], "prompt": t}) + "\n" for t in TEXTS)),
    "dalle3.jsonl": ("json.prompt", "".join(json.dumps({"id": 1, "json": {"prompt": t}}) + "\n" for t in TEXTS)),
    "dalle3.json": ("a.b.c", json.dumps([{"a": {"b": {"c": text}}} for text in TEXTS])),
    "captions.JSONL": ("prompt", "".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS)),
    "excel.csv": ("prompt", "prompt;category\n" + "".join(f"{text};x\n" for text in QUOTED)),
    "excel.tsv": ("prompt", '"prompt"\t"x"\n' + "".join(f'{text}\t"x"\n' for text in QUOTED)),
    "powershell.txt": ("prompt", "\r\n".join(TEXTS)),
    "unicode.CSV": ("prompt", "prompt\r\n" + "\r\n".join(QUOTED)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_prompt_sets_as_they_are_published_and_saved(tmp_path, name):
    column, content = PUBLISHED[name]
    (tmp_path / name).write_bytes(content.encode("utf-16" if "\r" in content else "utf-8"))
    assert read_prompts(tmp_path / name, column=column)["prompt"].tolist() == TEXTS


def test_a_folder_of_captions(tmp_path):
    """One file a picture, as trainers of adapters write them."""
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i:05d}.txt").write_text(text + "\n")
        (tmp_path / f"{i:05d}.png").write_bytes(b"")
    table = read_prompts(tmp_path)
    assert table["prompt"].tolist() == TEXTS and table["file"][0] == "00000.txt"
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none: no prompts in it"):
        read_prompts(tmp_path / "none")
    with pytest.raises(UserError, match=r"nobe: no such file or folder, did you mean '.*none'"):
        read_prompts(tmp_path / "nobe")


def test_a_prompt_set_says_how_many_there_are(tmp_path):
    (tmp_path / "a.txt").write_text("a cat\n\na dog\na cat\n  \n")
    assert str(read_prompt_set(tmp_path / "a.txt")) == (
        f"3 prompts of {tmp_path}/a.txt, 1 of them repeat an earlier one, 2 empty ones left out"
    )
    (tmp_path / "b.txt").write_text("a cat\na dog\n")
    assert str(read_prompt_set(tmp_path / "b.txt")) == f"2 prompts of {tmp_path}/b.txt"


def test_the_pocket_splits(tmp_path, monkeypatch):
    path = tmp_path / "prompts.csv"
    path.write_text(
        "split,prompt,kind,subject,colour,background,mouth\n"
        "train,a bud,sprout,bud,,,\neval,a pink critter,critter,,pink,,\ntrain,a palm,sprout,palm,,,\n"
    )
    monkeypatch.setattr("diffinstruct.config.prompts.POCKET_CSV", path)
    table = read_prompts("pocket:train")
    assert table["prompt"].tolist() == ["a bud", "a palm"]
    assert table.index.tolist() == [0, 1]
    assert table["colour"].tolist() == ["", ""]
    with pytest.raises(UserError, match="pocket:open: no prompts in it"):
        read_prompts("pocket:open")


def test_a_dataset_of_the_hub_may_name_the_commit(monkeypatch, tmp_path):
    import datasets  # takes seconds

    asked: list[Any] = []
    rows = datasets.Dataset.from_dict({"prompt": ["a cat"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: asked.append((name, options)) or rows)
    (tmp_path / "a@b").mkdir()  # a folder may be called anything
    for name in ("owner/name@0123abc", "owner/name", f"{tmp_path}/a@b"):
        assert read_prompts(f"datasets:{name}:train")["prompt"].tolist() == ["a cat"]
    commits = [("owner/name", "0123abc"), ("owner/name", None), (f"{tmp_path}/a@b", None)]
    assert asked == [(name, {"split": "train", "revision": commit}) for name, commit in commits]


@pytest.mark.parametrize("source", POCKET_PROMPTS)
def test_the_pocket_world_has_every_split(source):
    table = read_prompts(source)
    assert list(table.columns) == ["split", "prompt", "kind", "subject", "colour", "background", "mouth"]
    assert (table["prompt"] != "").all()
    assert (table["split"] == source.removeprefix("pocket:")).all()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("pocket:evl", r"pocket:evl: unknown split, did you mean 'pocket:eval'\?"),
        ("pocket", "pocket: unknown split.*"),
        ("{}/prompst.csv", r".*prompst.csv: no such file, did you mean '.*prompts.csv'\?"),
        ("{}/prompts.xlsx", r".*prompts.xlsx: prompts are 'pocket:<split>', a file \(.csv, .*\), a folder .* or 'datasets:.*"),
        ("{}/broken.jsonl", r".*broken.jsonl: line 2: not JSON: .*"),
        ("{}/list.jsonl", r".*list.jsonl: line 1: should be text or an object, got \[1\]"),
        ("{}/number.jsonl", r".*number.jsonl: row 2: 'prompt' should be text, got 3"),
        ("{}/not.parquet", ".*not.parquet: .*"),
        ("{}/harmed.parquet", r".*harmed.parquet: KeyError: .*"),
        ("{}/lists.parquet", r".*lists.parquet: row 1: 'prompt' should be text, got .*a cat.*"),
        ("datasets:{}/none:train", ".*none:train: .*"),
        ("datasets:x", "datasets:x: should be 'datasets:<hub id, maybe @commit, or folder>:<split>'"),
        ("{}/prompts.csv", ".*prompts.csv: no column 'prompt', columns are text"),
        ("{}/ragged.csv", ".*ragged.csv: .*Expected 1 fields in line 3, saw 2.*"),
        ("{}/twice.csv", ".*twice.csv: column 'prompt' is there twice"),
        ("{}/empty.csv", ".*empty.csv: No columns to parse from file"),
        ("{}/latin.txt", r".*latin.txt: is not UTF-8 text \(byte 0\); if it is in GBK, say, `iconv -f GBK .*"),
        ("{}/nested.jsonl", r".*nested.jsonl: row 1: 'prompt' should be text, got .*; prompts.column may name prompt.long"),
        ("{}/one.json", ".*one.json: should be a list of prompts or of objects, or lists of prompts by style"),
        ("{}/two.json", ".*two.json: item 2: should be text or an object, got 3"),
        ("{}/deep.json", ".*deep.json: not JSON: .*"),
        ("{}/nul.txt", r".*nul.txt: row 2: 'prompt' should be text, got a NUL byte"),
        ("{}/deep.jsonl", ".*deep.jsonl: line 1: not JSON: .*"),
    ],
)
def test_prompts_that_cannot_be_read(tmp_path, source, message):
    (tmp_path / "prompts.csv").write_text("text\nx\n")
    (tmp_path / "ragged.csv").write_text("prompt\nx\ny,z\n")
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "twice.csv").write_bytes(b"\xef\xbb\xbfprompt,a,prompt\nx,y,z\n")
    (tmp_path / "nul.txt").write_text("a\nb\0c\n")
    (tmp_path / "deep.jsonl").write_text("[" * 200_000)
    (tmp_path / "deep.json").write_text("[" * 200_000)
    (tmp_path / "one.json").write_text('{"prompt": "a"}')
    (tmp_path / "two.json").write_text('[{"prompt": "a"}, 3]')
    (tmp_path / "nested.jsonl").write_text('{"prompt": {"long": "a cat", "n": 1}}')
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a"}\n{"prompt": \n')
    (tmp_path / "list.jsonl").write_text("[1]\n")
    (tmp_path / "number.jsonl").write_text('{"prompt": "a"}\n\n{"prompt": 3}\n')
    (tmp_path / "not.parquet").write_text("prompt\na\n")
    harmed = pa.table({"prompt": ["a cat"]}).replace_schema_metadata({"pandas": '{"columns": [{}], "index_columns": []}'})
    pq.write_table(harmed, tmp_path / "harmed.parquet")
    pd.DataFrame({"prompt": [["a cat", "a dog"] * 9]}).to_parquet(tmp_path / "lists.parquet")
    with pytest.raises(UserError, match=f"^{message}$") as caught:
        read_prompts(source.format(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[" * 3000, "run.yaml:1: nested too deeply, or into itself"),
        ("a: 1\n" * 10**6, "run.yaml: larger than 4 MiB, which no recipe is"),
        ("a: &a [*a]", "run.yaml:1: nested too deeply, or into itself"),
        ("? [1, 2]\n: 3", "run.yaml:1: not YAML: a key should be a word"),
        ("generator: {betas: 3}", "run.yaml:1: generator.betas: should be a list, got 3"),
        ("tracking: {uri: 'foo://bar'}",
         "run.yaml:1: tracking.uri: should begin with one of http://, https://, sqlite://, "
         "postgresql://, mysql://, mssql://, databricks://, got 'foo://bar'; a file is sqlite:///PATH"),
    ],
)  # fmt: skip
def test_strange_files_are_one_line(tmp_path, text, said):
    assert errors(tmp_path, text) == [said]


def test_a_section_may_take_over_anothers_keys(tmp_path):
    """YAML's merge key, as people know it from other programs."""
    file = tmp_path / "run.yaml"
    file.write_text("generator: &adam {learning_rate: 1e-5, betas: [0.5, 0.9]}\nscore_network: {betas: [0, 0.9], <<: *adam}\n")
    experiment = load(file)
    assert experiment.score_network.learning_rate == 1e-5 and experiment.score_network.betas == (0, 0.9)
    file.write_text("generator:\n  <<: [{learning_rate: 1}, {learning_rate: 2, ema: 3}]\n")
    with pytest.raises(ConfigErrors, match=r"run\.yaml:2: generator\.ema: unknown key"):
        load(file)
    file.write_text("generator: {<<: 3}\n")
    with pytest.raises(ConfigErrors, match=r"run\.yaml:1: .*<< takes a section, or a list of them"):
        load(file)


def test_aliases_of_aliases_end_soon(tmp_path):
    lines = ["a0: &a0 [1]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 12))]
    (said,) = errors(tmp_path, "\n".join(lines))
    assert said == "run.yaml:1: not YAML: more than 100000 values, with aliases"


def test_a_missing_file_is_taken_for_one_of_nearly_its_name_only(tmp_path):
    (tmp_path / "recipe.yaml").write_text("")
    (tmp_path / "bin.yaml").write_bytes(b"\xff\xfe")
    for name, said in {
        "recipy.yaml": f"No such file or directory, did you mean '{tmp_path}/recipe.yaml'?",
        "missing.yaml": "No such file or directory",
        "bin.yaml": "not UTF-8 text",
    }.items():
        with pytest.raises(ConfigErrors) as caught:
            load(tmp_path / name)
        assert str(caught.value) == f"{tmp_path}/{name}: {said}"


@pytest.mark.parametrize("text", ["prompt\na cat, oil\na dog, ink\n", "prompt,x\na cat, sitting, oil,1\n", "prompt\nx\na, b\n"])
def test_a_comma_without_quotes_is_no_column(tmp_path, text):
    (tmp_path / "p.csv").write_text(text)
    with pytest.raises(UserError, match=r"p\.csv: .*(a prompt with a comma wants quotes|Expected 1 fields in line 3, saw 2)"):
        read_prompts(tmp_path / "p.csv")
    (tmp_path / "p.csv").write_text('prompt\n"a cat, oil"\n')
    assert read_prompts(tmp_path / "p.csv")["prompt"].tolist() == ["a cat, oil"]


def test_made_up_configurations_are_read_or_refused_and_the_schema_agrees(tmp_path):
    """A few hundred; tests/chaos/configurations.py makes up ten thousand."""
    assert chaos(tmp_path, 300).endswith("none wrongly accepted, no traceback")


LOCATIONS = {  # every key that names a place, with what may stand before the path
    "reference.model": "", "generator.init_from": "", "prompts.train": "datasets:", "prompts.grid": "",
    "prompts.embeddings": "", "output_dir": "", "mirror": "file://", "tracking.uri": "sqlite:///",
}  # fmt: skip


@pytest.mark.parametrize("key", LOCATIONS)
def test_home_and_variables_are_expanded_in_every_location(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("SCRATCH", "/scratch/me")
    (tmp_path / "run.yaml").write_text("generator: {init_from: reference}")
    same = {value: value for value in ("/x~/a", "/$SCRATCH")}
    for written, meant in {"~/a": f"{tmp_path}/a", "${SCRATCH}/a": "/scratch/me/a", **same}.items():
        value = LOCATIONS[key] + written
        assert load(tmp_path / "run.yaml", [f"{key}={value}"]).to_params()[key] == LOCATIONS[key] + meant
    monkeypatch.delenv("SCRATCH")
    with pytest.raises(ConfigErrors, match=rf"{key}: the environment has no variable 'SCRATCH', got "):
        load(tmp_path / "run.yaml", [f"{key}={LOCATIONS[key]}${{SCRATCH}}/a"])
    with pytest.raises(ConfigErrors, match=rf"{key}: the home directory does not exist on this machine"):
        load(tmp_path / "run.yaml", [f"{key}={LOCATIONS[key]}~nobody-of-this-name/a"])


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("mlruns", "should begin with one of"), ("sqlite", "should begin with one of"),
        ("sqlite+x:///a", "should begin with one of"),
        ("sqlite://runs.db", "should name a file: sqlite:///PATH"),
        ("databricks://", "should be databricks, or databricks://PROFILE"),
        ("http://", "should name a host"), ("http://:5000", "should name a host"), ("http://host:99999", "should name a host"),
        ("https://host:port", "should name a host"), ("http://[::1", "should name a host"),
    ],
)  # fmt: skip
def test_an_address_at_which_no_tracker_can_be_is_refused_before_the_run(uri, said, tmp_path, monkeypatch):
    """MLflow says it when the run is under way, and is asked again to its end; in the environment it is said as well."""
    (error,) = errors(tmp_path, f"tracking: {{uri: '{uri}'}}")
    assert error.startswith(f"run.yaml:1: tracking.uri: {said}")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=f"^MLFLOW_TRACKING_URI: {said}"):
        tracking_uri(None, "runs")


@pytest.mark.parametrize(
    "uri", ["http://host", "https://[::1]:5000/path/", "databricks", "databricks://me", "mysql+pymysql://host/a"]
)
def test_an_address_may_name_a_driver_and_leave_out_a_port(uri, tmp_path):
    assert load(written(tmp_path, f"tracking: {{uri: '{uri}'}}")).tracking.uri == uri


def test_a_long_error_keeps_its_beginning_and_its_end():
    """Ray says first how much memory there was, clients of HTTP say last why nobody answers."""
    line = one_line(OSError(f"a machine had 95% {'x' * 120} of 16 GiB {'y' * 500} Connection refused"))
    assert "of 16 GiB" in line and line.endswith("Connection refused") and len(line) <= 300


def test_passwords_stay_in_the_environment(tmp_path):
    (said,) = errors(tmp_path, "tracking: {uri: 'https://me:hunter2@host/x'}")
    assert said.startswith("run.yaml:1: tracking.uri: should hold no user and password") and "hunter2" not in said
    experiment = Experiment().tracked_at("https://me:hunter2@host/x")
    assert experiment.without_secrets().tracking.uri is None and experiment.tracked_at(None).without_secrets() == Experiment()
    assert "hunter2" not in experiment.without_secrets().to_yaml() + str(experiment.without_secrets().to_params())
    uris = ("postgresql://me:hunt/er2@host/db", "https://me:hunt@er2@host", "postgresql://host/db?user=me&password=hunter2&x=1")
    queries = ("passwd=hunter2", "sslpassword=hunt@er2", "access_token=hunter2", "api_key=hunt'er2", "hunter2")
    blanks = ("https://me:my hunt er2@host", "postgresql://u:hunt\ter2@host/db", "mysql://u:hunt\u00a0er2@host/db")
    odbc = ("mssql://?odbc_connect=UID%3Dme%3BPWD%3Dhunter2", "mssql+pyodbc://host:1433/?odbc_connect=PWD%3Dhunt@er2")
    quoted = ("mysql://me:hunt'er2@host/db", "mysql://me:hunt?er2@host/db", "mysql://host:3306/db?user=me@x&passwd=hunt@er2")
    for uri in (*uris, *(f"mysql://host/db?{query}" for query in queries), *odbc, *quoted, "https://token@host"):
        for text in (uri, f"{uri} and {uri!r}", f"(https://host/{uri!r})", f"at {uri}: {uri}, {uri}/api"):
            assert not re.search("hunt|er2|token@", redact(text))
        if "+" not in uri:
            (said,) = errors(tmp_path, f"tracking: {{uri: {json.dumps(uri)}}}")
            assert "uri: should hold no user and password, nor a query" in said and "er2" not in said
    for uri in blanks:
        (said,) = errors(tmp_path, f"tracking: {{uri: {json.dumps(uri)}}}")
        assert "uri: should hold no user and password" in said and "er2" not in said
        (said,) = errors(tmp_path, f"mirror: {json.dumps('s3' + uri[uri.index(':') :])}")
        assert "mirror: should hold no keys" in said and "er2" not in said
    assert redact(f"no answer from {quoted[0]}, 'https://host/x?y=z'") == "no answer from mysql://host/db, 'https://host/x'"
    assert "er2" not in redact("HTTPConnectionPool(host='host', port=1): with url: /?auth=hunter2/api/2.0")
    for uri in ("https://host:5000/x", "sqlite:////a/b.db", "postgresql://host/db", "sqlite:////a/me:x@lab/b c.db"):
        assert redact(uri) == uri
    assert Experiment().tracked_at("https://host/x").without_secrets().tracking.uri == "https://host/x"
