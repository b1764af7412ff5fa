"""What `check` has counted it knows again, as long as nothing has changed on which it depends."""

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
from tiny import pipelines
from tiny.rewards import Red

from diffinstruct.config.experiment import Experiment
from diffinstruct.models.pipeline import load_reference
from diffinstruct.planning import remembered as module
from diffinstruct.planning.footprint import Footprint, Passes
from diffinstruct.planning.remembered import remembered

pytestmark = pytest.mark.usefixtures("nothing_remembered")
COUNTED = Footprint(1, 2, 3, {"generator": Passes(2, 1, 1)}, {"generator": 5})


@pytest.fixture
def ask(tmp_path) -> Callable[..., int]:
    """How often a footprint is counted for this experiment."""
    source = str(pipelines.build(tmp_path / "reference"))

    def asked(title: str = "training", rewards: Any = None, checkpointing: bool = False, **sections: Any) -> int:
        content = Experiment().model_dump()
        for key, value in sections.items():
            content[key] = content[key] | value if isinstance(value, dict) else value
        reference = load_reference(source, activation_checkpointing=checkpointing)
        count = Mock(return_value=COUNTED)
        assert remembered(count, title, Experiment.model_validate(content), reference, rewards) == COUNTED
        return count.call_count

    return asked


def test_it_is_counted_once_and_again_where_something_has_changed(ask, monkeypatch):
    assert [ask(), ask(), ask(steps=7, seed=3, name="other", output_dir="x", logging={"every": 5})] == [1, 0, 0]
    for change in (
        {"title": "validation"},
        {"checkpointing": True},
        {"rewards": {"red": Red()}},
        {"micro_batch_size": 1},
        {"generator": {"lora_rank": 4}},
        {"objective": {"name": "sid"}},
    ):
        assert [ask(**change), ask(**change)] == [1, 0], change
    monkeypatch.setattr(module, "_code", lambda: "another version of this package")
    assert ask() == 1


def test_an_objective_of_ones_own_is_counted_each_time(ask, tmp_path, monkeypatch):
    (tmp_path / "my_objective.py").write_text("def mine(x0, t, eps, c, *, score_network, reference): ...\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [ask(objective={"name": "my_objective:mine"}) for _ in range(2)] == [1, 1]


def test_a_damaged_file_or_none_costs_no_more_than_the_time(ask, tmp_path):
    assert ask() == 1
    (file,) = module.FOLDER.iterdir()
    file.write_text('{"held": "much"')
    assert [ask(), ask()] == [1, 0]
    file.unlink()
    module.FOLDER.rmdir()
    module.FOLDER.write_text("in its place")  # nothing can be kept here
    assert [ask(), ask()] == [1, 1]
