"""Parametrisations and forward process against diffusers' schedulers; the laws of t against their probabilities."""

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from torch.utils._python_dispatch import TorchDispatchMode

from diffinstruct.method.diffusion import Schedule, log_normal_t, uniform_t

DDIM = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)
VARIANCE_PRESERVING = Schedule(DDIM.alphas_cumprod.sqrt(), (1 - DDIM.alphas_cumprod).sqrt())
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)
SIGMAS = FLOW.sigmas[:1000].flip(0)  # diffusers begins with noise, a schedule with the picture
STRAIGHT = Schedule(1 - SIGMAS, SIGMAS)
LEVELS = [0, 20, 399, 625, 979, 999]


def draw(seed):
    return torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("t", LEVELS)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_x0_is_what_ddim_takes_for_it(prediction, t):
    scheduler = DDIMScheduler.from_config(DDIM.config, prediction_type=prediction)
    scheduler.set_timesteps(1000)
    xt, output = draw(0), draw(1)
    wanted = scheduler.step(output, t, xt).pred_original_sample
    got = VARIANCE_PRESERVING.x0_from(prediction, output, xt, torch.full((2,), t))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("weighting", ["x0", "eps", "v", "score"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction"])
def test_an_error_of_the_output_grows_as_the_schedule_says(prediction, weighting):
    schedule = STRAIGHT if prediction == "flow_prediction" else VARIANCE_PRESERVING
    factors, error = schedule.error_factors(prediction, weighting), 1e-3
    for t in (20, 399, 979):
        xt, output, ts = draw(0).double(), draw(1).double(), torch.full((2,), t)
        grown = schedule.x0_from(prediction, output + error, xt, ts) - schedule.x0_from(prediction, output, xt, ts)
        measured = (schedule.scale(weighting, ts, xt) * grown).abs()
        torch.testing.assert_close(measured, torch.full_like(measured, error * factors[t].item()), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("t", LEVELS)
def test_the_forward_process_is_diffusers(t):
    x0, eps, ts = draw(0), draw(1), torch.full((2,), t)
    torch.testing.assert_close(VARIANCE_PRESERVING.diffuse(x0, ts, eps), DDIM.add_noise(x0, eps, ts))
    timestep = FLOW.timesteps.flip(0)[t].expand(2)
    torch.testing.assert_close(STRAIGHT.diffuse(x0, ts, eps), FLOW.scale_noise(x0, timestep, eps))


@pytest.mark.parametrize("t", LEVELS)
def test_a_flows_x0_is_where_its_straight_line_ends(t):
    """One Euler step from sigma_t to 0 is the x0 prediction; a second implementation of diffusers says the same."""
    xt, velocity = draw(0), draw(1)
    got = STRAIGHT.x0_from("flow_prediction", velocity, xt, torch.full((2,), t))
    euler = FlowMatchEulerDiscreteScheduler.from_config(FLOW.config)
    euler.set_timesteps(sigmas=[float(SIGMAS[t])])
    euler.sigmas[0] = SIGMAS[t]  # set_timesteps shifts what it is given once more
    torch.testing.assert_close(euler.step(velocity, euler.timesteps[0], xt).prev_sample, got, rtol=1e-4, atol=1e-5)
    other = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    other.sigmas = SIGMAS[t : t + 1]
    other._step_index = 0
    torch.testing.assert_close(other.convert_model_output(velocity, sample=xt), got, rtol=1e-4, atol=1e-5)


def test_an_unknown_parametrisation_is_an_error():
    with pytest.raises(ValueError, match="prediction: got 'epsilonn', known are"):
        VARIANCE_PRESERVING.x0_from("epsilonn", draw(0), draw(0), torch.zeros(2, dtype=torch.long))


EVENLY = (torch.arange(200_000) + 0.5) / 200_000


def test_uniform_t_is_uniform_and_never_reaches_its_end():
    t = uniform_t(20, 980)(EVENLY)
    counts = torch.bincount(t, minlength=1000)
    assert counts[:20].sum() == 0 and counts[980:].sum() == 0
    assert (counts[20:980] - 200_000 / 960).abs().max() <= 2
    assert uniform_t(20, 980)(torch.tensor([0.0, 1 - 2**-24])).tolist() == [20, 979]


@pytest.mark.parametrize(("t_min", "t_max"), [(20, 980), (0, 1000), (300, 301)])
@pytest.mark.parametrize("schedule", [VARIANCE_PRESERVING, STRAIGHT], ids=["variance-preserving", "flow"])
def test_log_normal_t_has_the_normals_probabilities(schedule, t_min, t_max):
    """Each t has the share of the normal law between the midpoints to its neighbours in ln(sigma / alpha), cut and
    rescaled."""
    mean, std = -0.5, 1.2
    t = log_normal_t(schedule, mean, std, t_min, t_max)(EVENLY)
    got = torch.bincount(t, minlength=1000).double() / len(t)
    ratio = (schedule.sigmas / schedule.alphas).double().log()
    edges = torch.cat([ratio.new_tensor([-torch.inf]), (ratio[1:] + ratio[:-1]) / 2, ratio.new_tensor([torch.inf])])
    share = torch.distributions.Normal(mean, std).cdf(edges).diff()
    share[:t_min] = share[t_max:] = 0
    torch.testing.assert_close(got, share / share.sum(), rtol=0, atol=2e-5)
    least, most = log_normal_t(schedule, mean, std, t_min, t_max)(torch.tensor([0.0, 1 - 2**-24])).tolist()
    assert t_min == least <= most < t_max


def test_the_tables_are_copied_to_a_device_once() -> None:
    class Copies(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, function, types, arguments=(), more=None):
            self.n += "_to_copy" in str(function)
            return function(*arguments, **(more or {}))

    schedule = Schedule(torch.linspace(1, 0.1, 10), torch.linspace(0, 1, 10), torch.arange(10.0))
    t, like = torch.zeros(3, dtype=torch.long, device="meta"), torch.zeros(3, 4, device="meta")
    with Copies() as copies:
        for _ in range(5):
            schedule.at(t, like)
            schedule.fed(t)
    assert copies.n == 3
