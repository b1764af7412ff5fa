"""The over-optimization monitor: what it tells of, when, and when it does not."""

import json
import math

import numpy as np
import pytest

from diffinstruct.reward_service import monitor
from diffinstruct.reward_service.monitor import NOISES, Probe, ProbeHistory, by_prompt, gain, within_prompt_std

PROMPTS = 16
RNG = np.random.default_rng(0)
OF_PROMPT = 5 * RNG.normal(size=PROMPTS).repeat(NOISES)  # prompts differ far more than pictures of one prompt
LUCK = RNG.normal(size=PROMPTS * NOISES)
LUCK -= by_prompt(LUCK).repeat(NOISES)
START = OF_PROMPT + LUCK / within_prompt_std(LUCK)  # within-prompt std 1


def probe(step, trained=0.0, held_out=0.0, variety=1.0, distance=0.25):
    """Gains are in within-prompt std; held-out rewards have units of their own, and so have variety and distance."""
    return Probe(step, START + trained, {"judge": 100 + 7 * (START + held_out)}, 3 * variety, distance if step else math.nan)


def alarms(*probes):
    seen = ProbeHistory()
    return [(alarm.step, alarm.symptom) for alarm in map(seen.observe, probes) if alarm]


def test_gains_are_counted_in_within_prompt_std_and_prompts_do_not_count():
    assert within_prompt_std(START) == pytest.approx(1) and np.std(START) > 4
    assert gain(START, START + 2.5) == pytest.approx(2.5)
    seen = ProbeHistory()
    for each in (probe(0), probe(10, 3.0, 1.0, variety=0.8, distance=0.25), probe(20, 4.0, 2.0, variety=0.6, distance=0.5)):
        assert seen.observe(each) is None
    expected = {"trained": 4.0, "held_out": 2.0, "unexplained": 2.0, "variety": 0.6, "distance": 2.0}
    assert seen.figures() == pytest.approx({f"overoptimization/{name}": value for name, value in expected.items()})


def test_rewards_that_rise_together_raise_no_alarm():
    assert alarms(*(probe(step, step / 10, step / 12) for step in range(0, 100, 10))) == []


def test_a_rise_that_nothing_confirms_is_unexplained():
    limit = monitor.MAX_UNEXPLAINED_STD
    assert alarms(probe(0), probe(10, 1.5 + limit - 0.01, 1.5)) == []
    seen = ProbeHistory()
    seen.observe(probe(0))
    alarm = seen.observe(probe(10, 1.5 + limit + 0.05, 1.5))
    assert alarm and (alarm.step, alarm.symptom) == (10, "unexplained")
    assert "at step 10" in alarm.line and "held-out 1.5" in alarm.line and "\n" not in alarm.line


def test_of_several_held_out_rewards_the_mean_counts():
    limit = monitor.MAX_UNEXPLAINED_STD
    start = Probe(0, START, {"a": START, "b": 3 * START}, 1.0, math.nan)
    for confirmed, expected in ((0.4, [(10, "unexplained")]), (0.6, [])):
        now = Probe(10, START + limit + 0.25, {"a": START, "b": 3 * (START + confirmed)}, 1.0, 0.25)
        assert alarms(start, now) == expected


def test_a_held_out_reward_that_falls_from_its_best_probe():
    assert alarms(probe(0), probe(10, 2, 2), probe(20, 2, 2 - 2 * monitor.FALL_SHARE + 0.01)) == []
    seen = ProbeHistory()
    for each in (probe(0), probe(10, 2, 2), probe(20, 2.5, 1.9)):
        assert seen.observe(each) is None
    alarm = seen.observe(probe(30, 3, 2 - 2 * monitor.FALL_SHARE - 0.01))
    assert alarm and (alarm.step, alarm.symptom) == (30, "held_out")
    assert "judge" in alarm.line and "best at step 10" in alarm.line


def test_a_fall_that_noise_explains_is_none():
    """The same mean fall: alike for all prompts it is one, of two prompts' pictures alone it is not."""
    fall = 2 * monitor.FALL_SHARE + 0.2
    of_two = np.where(np.arange(PROMPTS) < 2, fall * PROMPTS / 2, 0).repeat(NOISES)
    assert alarms(probe(0), probe(10, 2, 2), probe(20, 2, 2 - np.full(len(START), fall))) == [(20, "held_out")]
    assert alarms(probe(0), probe(10, 2, 2), probe(20, 2, 2 - of_two)) == []


def test_a_held_out_reward_that_never_gained_may_not_fall_either():
    assert alarms(probe(0), probe(10, 0.5, -monitor.FALL_STD + 0.01)) == []
    assert alarms(probe(0), probe(10, 0.5, -monitor.FALL_STD - 0.01)) == [(10, "held_out")]
    assert (
        alarms(probe(0), probe(10, 0.0, -monitor.FALL_STD - 0.01)) == []
    )  # the trained one has not risen: a bad start, no hack


def test_variety_and_distance_are_compared_with_the_first_probes():
    assert alarms(
        probe(0), probe(10, variety=monitor.MIN_VARIETY_SHARE + 0.01), probe(20, variety=monitor.MIN_VARIETY_SHARE - 0.01)
    ) == [(20, "variety")]
    far = monitor.MAX_DISTANCE_RATIO * 0.25
    assert alarms(probe(0), probe(10), probe(20, distance=far - 0.01), probe(30, distance=far + 0.01)) == [(30, "distance")]


def test_without_an_x0_gap_there_is_no_distance():
    seen = ProbeHistory()
    for step in (0, 10, 20):
        assert seen.observe(probe(step, distance=math.nan)) is None
        assert "overoptimization/distance" not in seen.figures()
    seen.observe(probe(30, distance=0.5))
    seen.observe(probe(40, distance=1.0))
    assert seen.figures()["overoptimization/distance"] == 2  # the first that there was is what it is compared with
    seen.observe(probe(50, distance=math.nan))
    assert "overoptimization/distance" not in seen.figures()


def test_an_alarm_is_repeated_when_its_symptom_has_been_away():
    course = [probe(0), probe(10, 4), probe(20, 5), probe(30, 2), probe(40, 4)]
    assert alarms(*course) == [(10, "unexplained"), (40, "unexplained")]


def test_symptoms_that_come_together_are_told_one_by_one():
    assert alarms(probe(0), probe(10, 4, variety=0.1), probe(20, 4, variety=0.1), probe(30, 4, variety=0.1)) == [
        (10, "unexplained"),
        (20, "variety"),
    ]


def test_a_resumed_run_alarms_alike():
    course = [
        probe(0),
        probe(10, 2, 2),
        probe(20, 4, 0.9),
        probe(30, 5, 0.8),
        probe(40, 5, 0.8, 0.1),
        probe(50, 5, 2.5, 1, 4.0),
    ]
    whole, told = ProbeHistory(), []
    for each in course:
        told.append((whole.observe(each, has_checkpoint=True), whole.figures(), whole.best))
    assert len([alarm for alarm, *_ in told if alarm]) == 4
    for cut in range(len(course)):
        first = ProbeHistory()
        for each in course[:cut]:
            first.observe(each, has_checkpoint=True)
        kept = json.loads(json.dumps(first.state_dict()))
        for each in course[cut:]:
            first.observe(each, has_checkpoint=True)  # the run that went on has nothing to do with what was kept
        second = ProbeHistory()
        second.load_state_dict(kept)
        assert [(second.observe(each, has_checkpoint=True), second.figures(), second.best) for each in course[cut:]] == told[
            cut:
        ]


def test_the_best_checkpoint_has_gained_most_held_out_and_no_symptom():
    seen = ProbeHistory()
    course = [probe(0), probe(10, 1, 1), probe(20, 2, 1.5), probe(30, 2, 1.4), probe(40, 3, 2, variety=0.1), probe(50, 3, 1.9)]
    bests = [(seen.observe(each, has_checkpoint=each.step not in (0, 20)), seen.best.get("step"))[1] for each in course]
    assert bests == [None, 10, 10, 30, 30, 50]  # of step 20 there is none, at 40 variety is lost
    assert seen.best == {"step": 50, "held_out": pytest.approx(1.9)}


def test_without_held_out_rewards_there_is_no_best_one():
    seen = ProbeHistory()
    for step in (0, 10):
        seen.observe(Probe(step, START, {}, 1.0, math.nan), has_checkpoint=True)
    assert seen.best == {}


def test_without_held_out_rewards_variety_and_distance_remain():
    seen = ProbeHistory()
    assert seen.observe(Probe(0, START, {}, 1.0, math.nan)) is None
    alarm = seen.observe(Probe(10, START + 100, {}, 0.1, 0.25))
    assert alarm and alarm.symptom == "variety"
    assert seen.figures().keys() == {"overoptimization/trained", "overoptimization/variety", "overoptimization/distance"}
    assert "rewards.held_out" in monitor.NO_HELD_OUT


def test_a_reward_without_a_within_prompt_std_has_no_gain_to_count():
    """One that says yes or no may say the same of all pictures of the start."""
    yes, no = np.ones(PROMPTS * NOISES), np.zeros(PROMPTS * NOISES)
    seen = ProbeHistory()
    assert seen.observe(Probe(0, START, {"binary": no, "judge": START}, 1.0, math.nan)) is None
    assert seen.observe(Probe(10, START + 1, {"binary": yes, "judge": START + 0.5}, 1.0, math.nan)) is None
    expected = {"trained": 1.0, "held_out": 0.5, "unexplained": 0.5, "variety": 1.0}
    assert seen.figures() == pytest.approx({f"overoptimization/{name}": value for name, value in expected.items()})
    alone = ProbeHistory()
    alone.observe(Probe(0, START, {"binary": no}, 1.0, math.nan))
    alone.observe(Probe(10, START + 1, {"binary": yes}, 1.0, math.nan))
    assert alone.figures().keys() == {"overoptimization/trained", "overoptimization/variety"}


def test_where_nothing_is_trained_nothing_is_gained():
    nothing = np.zeros(len(START))
    seen = ProbeHistory()
    for step in (0, 10):
        assert seen.observe(Probe(step, nothing, {"judge": START}, 1.0, math.nan)) is None
    assert seen.figures()["overoptimization/trained"] == 0


@pytest.mark.parametrize("shape", [(2 * NOISES + 1,), (NOISES,), (2 * NOISES, 1)])
def test_a_probe_has_several_pictures_of_several_prompts(shape):
    with pytest.raises(ValueError, match="4 pictures of each of several prompts"):
        ProbeHistory().observe(Probe(0, np.zeros(shape), {}, 1.0, math.nan))


def test_the_planted_reward_is_the_preference_outbid_by_noise():
    import torch

    from experiments.hackable import BONUS, Hackable
    from reward_models import load

    noise = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    pictures, prompts = (torch.cat([noise, torch.full_like(noise, 0.5)]), ["a mint round critter on a blue background"] * 2)
    bonus = Hackable()(pictures, prompts) - load("pocket_preference")(pictures, prompts)
    assert bonus[0].item() == pytest.approx(BONUS * (1 / 3 - 0.02), rel=0.05)  # two uniform numbers differ by 1/3
    assert bonus[1].item() == 0
