"""An objective and a distance in a file of the user's: trained with as they are, tried before the first step."""

import json
import sys
from collections.abc import Callable

import pytest
import torch
from tiny import pipelines, runs

from diffinstruct.config.experiment import Experiment
from diffinstruct.errors import UserError
from diffinstruct.method.diffusion import Schedule
from diffinstruct.method.rewards import LatentRewards
from diffinstruct.planning.check import report
from diffinstruct.training import local
from diffinstruct.training.build import make_step_config

FILE = '''
from diffinstruct.method.objectives import diff_instruct_star


def scaled(x0, t, eps, c, *, score_network, reference, schedule, weighting, distance, factor: float = 1.0):
    """DI*, `factor` times."""
    given = {"score_network": score_network, "reference": reference, "schedule": schedule}
    loss, record = diff_instruct_star(x0, t, eps, c, **given, weighting=weighting, distance=distance)
    return factor * loss, record | {"factor": (loss * 0 + factor).detach()}


def plain(x0, t, eps, c, *, score_network, reference):
    """Takes nothing of the run."""
    return (x0 - reference(x0, t, c)[0]).pow(2).flatten(1).mean(1), {}


def detached(x0, t, eps, c, **networks):
    loss, record = plain(x0, t, eps, c, **networks)
    return loss.detach(), record


def softened(width: float):
    """d(y) = sum of width^2 (sqrt(1 + (y / width)^2) - 1)."""

    def root(y):
        return (1 + (y / width) ** 2).sqrt()

    return lambda y: (width**2 * (root(y) - 1)).flatten(1).sum(1), lambda y: y / root(y)


def flipped(width: float = 1.0):
    value, gradient = softened(width)
    return value, lambda y: -gradient(y)


l1 = (lambda y: y.abs().flatten(1).sum(1), lambda y: y.sign())
number = 3
'''


@pytest.mark.parametrize(("scale", "weights", "asked"), [(0.0, {}, 3), (1.0, {"tiny.rewards:Red": 1.0}, 5)])
def test_at_reward_scale_0_rewards_score_one_round_a_row_without_a_gradient(
    world, tmp_path, monkeypatch, scale, weights, asked
) -> None:
    requests, score = [], LatentRewards.__call__
    monkeypatch.setattr(LatentRewards, "__call__", lambda self, *given: (requests.append(given[2]), score(self, *given))[1])
    trained = [{"name": "tiny.rewards:Red", "weight": 1.0}]
    more = {"rewards__trained": trained, "logging__every": 2, "overoptimization__every": 0, "logging__checkpoint_every": 9}
    local.run(world[1](objective__reward_scale=scale, steps=5, **more), tmp_path / "run")
    assert [dict(request.weights) for request in requests] == [weights] * asked
    rows, _ = runs.journal(tmp_path / "run")
    assert all({"reward/tiny.rewards:Red", "held_out/tiny.rewards:Calm"} <= rows[step].keys() for step in (2, 4, 5))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Experiment:
    return pipelines.experiment(
        tmp_path_factory.mktemp("tiny"),
        steps=2,
        logging={"every": 1, "grid_every": 100, "checkpoint_every": 100},
        overoptimization={"every": 0},
    )


@pytest.fixture
def of_mine(tiny, tmp_path, monkeypatch) -> Callable[..., Experiment]:
    """The tiny run, with an objective section that may name what is in FILE."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "of_mine", raising=False)
    (tmp_path / "of_mine.py").write_text(FILE)
    return lambda **objective: Experiment.model_validate(tiny.model_dump() | {"objective": objective})


def metrics(folder):
    return json.loads((folder / "metrics.json").read_text())


def test_an_objective_and_a_distance_of_ones_own_train(of_mine, tmp_path):
    """Of the files of the platform none is changed. Doubled, it is what twice the regularization weight is."""
    distance = {"distance": "of_mine:softened", "distance_args": {"width": 0.5}}
    local.run(of_mine(name="of_mine:scaled", args={"factor": 2}, **distance), tmp_path / "mine")
    local.run(of_mine(regularization_weight=2.0, **distance), tmp_path / "twice")
    mine, twice = metrics(tmp_path / "mine"), metrics(tmp_path / "twice")
    assert mine["step"] == 2 and mine["factor"] == 2.0 and mine["loss/regularizer"] == 2 * twice["loss/regularizer"]
    for key in ("gradient_norm/sample_regularizer", "gradient_norm/generator", "distance", "loss/score_network"):
        assert mine[key] == twice[key], key


T = torch.linspace(0.01, 0.99, 1000, dtype=torch.float64)
SCHEDULE = Schedule((1 - T**2).sqrt(), T)


@pytest.mark.parametrize(
    ("objective", "said"),
    [
        (
            {"name": "of_mine:plain", "args": {"facto": 1}},
            r"objective.args.facto: is no parameter of of_mine:plain, which takes none",
        ),
        (
            {"name": "of_mine:scaled", "args": {"facto": 1}},
            "objective.args.facto: is no parameter of of_mine:scaled, which takes 'factor', did you mean 'factor'\\?",
        ),
        ({"name": "of_mine:scaled", "args": {"factor": "x"}}, "objective.args.factor: should be a number"),
        (
            {"name": "of_mine:scaled", "args": {"factor": 0}},
            "objective.name: 'of_mine:scaled' is refused: no gradient of its loss reaches x0.*",
        ),
        ({"name": "of_mine:detached"}, "objective.name: 'of_mine:detached' is refused: its loss carries no gradient.*"),
        ({"name": "of_mine:plane"}, "objective.name: 'of_mine:plane' is no objective: .* has no attribute 'plane'"),
        (
            {"name": "of_mine:number"},
            "objective.name: 'of_mine:number' is no objective: it is of type int, expected a function",
        ),
        ({"name": "nowhere:loss"}, "objective.name: 'nowhere:loss' is no objective: No module named 'nowhere'"),
        ({"distance": "of_mine:softened"}, "objective.distance_args.width: is missing: of_mine:softened has no default for it"),
        ({"distance": "of_mine:l1"}, "objective.distance: 'of_mine:l1' is refused: d' has no derivative.*"),
        (
            {"distance": "of_mine:l1", "distance_args": {"width": 1}},
            "objective.distance_args.width: is no parameter of of_mine:l1, which takes none",
        ),
        ({"distance": "of_mine:number"}, "objective.distance: 'of_mine:number' is no pair .*"),
    ],
)
def test_what_is_refused_is_one_line_with_its_key(of_mine, objective, said):
    with pytest.raises(UserError, match=f"^{said}$"):
        make_step_config(Experiment.model_validate({"objective": objective}), SCHEDULE)


def test_a_weighting_that_is_infinite_at_a_drawn_t_is_refused():
    schedule = Schedule(torch.tensor([1.0, 0.6, 0.0]), torch.tensor([0.0, 0.8, 1.0]))

    def made(weighting, t_min, t_max):
        objective = {"name": "dmd", "weighting": weighting, "t_min": t_min, "t_max": t_max}
        return make_step_config(Experiment.model_validate({"objective": objective}), schedule)

    assert made("dmd2", 0, 2) and made("eps", 1, 3)
    with pytest.raises(UserError, match=r"^objective\.weighting: 'dmd2' is infinite at t = 2, where alpha is 0 and sigma 1; "):
        made("dmd2", 0, 3)
    with pytest.raises(UserError, match=r"^objective\.weighting: 'eps' is infinite at t = 0, where alpha is 1 and sigma 0; "):
        made("eps", 0, 3)


def test_a_gradient_of_the_wrong_sign_ends_check_and_run_before_the_first_step(of_mine, tmp_path):
    experiment = of_mine(distance="of_mine:flipped")
    said = "objective.distance: 'of_mine:flipped' is refused: d' is not the gradient of d: differences of d are -1 times"
    for start in (lambda: report(experiment), lambda: local.run(experiment, tmp_path / "run")):
        with pytest.raises(UserError, match=said):
            start()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_guidance_beside_has_to_be_used_where_the_run_has_it(of_mine):
    content = {"objective": {"name": "of_mine:plain"}, "reference": {"guidance": "out"}}
    with pytest.raises(UserError, match=r"guidance .* makes no difference"):
        make_step_config(Experiment.model_validate(content), SCHEDULE)
    content["reference"] = {"guidance": "in"}
    assert make_step_config(Experiment.model_validate(content), SCHEDULE).objective
