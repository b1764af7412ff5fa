"""What a run is built of: reference, networks with optimizers, settings of the step."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from textwrap import shorten

import torch
from torch import nn

from diffinstruct.config.experiment import Experiment
from diffinstruct.config.prompts import PromptSet, read_prompt_set
from diffinstruct.config.sections import ObjectiveConfig, OptimizerConfig, ReferenceConfig
from diffinstruct.errors import UserError, did_you_mean
from diffinstruct.method.arguments import ArgumentError
from diffinstruct.method.diffusion import Conditions, Schedule, log_normal_t, uniform_t
from diffinstruct.method.distances import DISTANCES, distance
from diffinstruct.method.guidance import guided
from diffinstruct.method.objective_validation import validate_distance, validate_objective
from diffinstruct.method.objectives import OBJECTIVES, Objective, facts, objective
from diffinstruct.method.precision import BF16_ERROR, MAX_BF16_ERROR, frozen_dtype
from diffinstruct.method.step import StepConfig, TrainState
from diffinstruct.models.export_validation import validate_export
from diffinstruct.models.pipeline import WEIGHTS_BESIDE, Reference, load_reference
from diffinstruct.models.prompt_embeddings import NULL
from diffinstruct.models.roles import Roles
from diffinstruct.models.sources import WeightSource


def resolve_device(name: str) -> torch.device:
    """ "auto" is a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' asked for, but torch sees no GPU here")
    return torch.device(name)


def open_reference(experiment: Experiment, device: torch.device, weights: WeightSource = WEIGHTS_BESIDE) -> Reference:
    return load_reference(
        experiment.reference.model,
        device=device,
        activation_checkpointing=experiment.activation_checkpointing,
        decoder_dtype=frozen_dtype(experiment.precision),
        embeddings=Path(experiment.prompts.embeddings) if experiment.prompts.embeddings else None,
        weights=weights,
    )


def check_reference(experiment: Experiment, reference: Reference) -> None:
    """Raises UserError where the generator's timestep or the law of t does not fit the reference, and where the stock
    pipeline that the run would export does not draw what it trains."""
    generator, schedule = experiment.generator, reference.schedule
    validate_export(reference, generator.timestep, generator.input_scale)
    t_max, last = experiment.objective.t_max, len(schedule.alphas) - 1
    if t_max > last and reference.blind_at_last:
        why = "alpha is 0 at the last t (zero terminal SNR), and a network that predicts epsilon says nothing of the picture"
        raise UserError(f"objective.t_max: should be at most {last}, got {t_max}: {why}")


def missing_embeddings(experiment: Experiment) -> tuple[list[str | None], str]:
    """The prompts of a run (and the null prompt) that its folder of embeddings lacks, and a line that says so; none where
    it has no such folder."""
    prompts = experiment.prompts
    if prompts.embeddings is None:
        return [], ""
    stored = open_reference(experiment, torch.device("cpu")).embeddings
    assert stored is not None
    sources = (prompts.train, prompts.grid)
    missing = stored.missing([NULL, *(prompt for uri in sources for prompt in read_prompt_set(uri, prompts.column))])
    line = f"prompt embeddings: {len(missing)} to make in {stored.folder}"
    if earlier := stored.earlier():
        line += f" (of an earlier version, not read, may be deleted: {', '.join(earlier)})"
    return missing, line


def store_embeddings(experiment: Experiment, prompts: Sequence[str | None]) -> None:
    """Make them, with text encoders that go with this call."""
    open_reference(experiment, resolve_device(experiment.device)).store_embeddings(prompts)


def make_train_state(
    experiment: Experiment, roles: Roles, null: Conditions, wrap: Callable[[nn.Module], nn.Module]
) -> TrainState:
    """The roles with their optimizers, the reference with its guidance against the null prompt's conditions."""

    def adam(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
        weights, decay = list(module.parameters()), config.weight_decay
        fused = weights[0].is_cuda or None  # one kernel, and no copies on the way
        return torch.optim.AdamW(weights, config.learning_rate, config.betas, weight_decay=decay, fused=fused)

    generator = wrap(roles.generator), roles.ema, adam(roles.generator, experiment.generator)
    if roles.score_network is None or roles.reference is None:
        return TrainState(*generator)
    score_network, guidance = roles.score_network, experiment.reference
    return TrainState(
        *generator,
        wrap(score_network),
        adam(score_network, experiment.score_network),
        guided(roles.reference, null, guidance.guidance_scale, guidance.guidance),
    )


def make_step_config(experiment: Experiment, schedule: Schedule) -> StepConfig:
    """The configuration as the step wants it. Raises UserError for what does not fit the schedule, cannot be imported,
    or is an objective or a distance of the user's own that validation refuses."""
    e = experiment.objective
    if e.t_max > len(schedule.alphas):
        raise UserError(f"objective.t_max: got {e.t_max}, the reference's schedule has {len(schedule.alphas)} steps")
    _refuse_infinite_weighting(e, schedule)
    if e.t_law == "uniform":
        timestep_distribution = uniform_t(e.t_min, e.t_max)
    else:
        timestep_distribution = log_normal_t(schedule, e.t_log_mean, e.t_log_std, e.t_min, e.t_max)
    return StepConfig(
        objective=make_objective(e, experiment.reference, schedule),
        regularization_weight=e.regularization_weight,
        reward_scale=e.reward_scale,
        score_updates=experiment.score_network.updates_per_step,
        reuse_sample=experiment.score_network.reuse_sample,
        score_weighting=experiment.score_network.loss_weighting,
        timestep_distribution=timestep_distribution,
        generator_max_grad_norm=experiment.generator.max_grad_norm,
        score_max_grad_norm=experiment.score_network.max_grad_norm,
        ema_decay=experiment.generator.ema_decay,
        precision=experiment.precision,
        micro_batch_size=experiment.micro_batch_size,
    )


def _refuse_infinite_weighting(e: ObjectiveConfig, schedule: Schedule) -> None:
    """Raises UserError where differences are measured by what some t that may be drawn has no number for."""
    t = torch.arange(e.t_min, e.t_max)
    infinite = ~schedule.scale(e.weighting, t, schedule.alphas[t]).expand(len(t)).isfinite()
    if facts(e.name).divergence and infinite.any():
        first = int(t[infinite][0])
        alpha, sigma = float(schedule.alphas[first]), float(schedule.sigmas[first])
        where = f"t = {first}, where alpha is {alpha:g} and sigma {sigma:g}"
        mend = "objective.t_min and objective.t_max bound the t that are drawn"
        raise UserError(f"objective.weighting: {e.weighting!r} is infinite at {where}; {mend}")


def prompts_remark(prompts: PromptSet, reference: Reference) -> str:
    """One line on a run's prompts: how many, and of how many no text encoder sees the end."""
    try:
        cut = reference.cut(prompts)
    except UserError:  # `check` counts published models on their configurations alone
        return f"{prompts}; how many of them are too long is not known here, for want of the tokenizer"
    first = f", {len(cut)} of them cut before their end, such as {shorten(cut[0], 60, placeholder=' ...')!r}" if cut else ""
    return f"{prompts}{first}"


def rounding_remark(experiment: Experiment, reference: Reference) -> str | None:
    """One line where bf16 rounds so much at the noisiest timesteps that the objective compares rounding errors.

    An error of eps grows by sigma_t / alpha_t on its way to x0: 13 at t = 979 of Stable Diffusion, 129 of PixArt.
    """
    e = experiment.objective
    if experiment.precision != "bf16" or not facts(e.name).divergence:
        return None
    errors = BF16_ERROR * reference.schedule.error_factors(reference.prediction, e.weighting)[: e.t_max]
    beyond = (errors > MAX_BF16_ERROR).nonzero().flatten().tolist()
    if not beyond or beyond[-1] < e.t_min:
        return None
    largest = f"bf16's rounding of the networks' output is an error of {errors[-1]:.2f} at t = {e.t_max - 1}"
    mend = f"objective.t_max: {beyond[0]} keeps it below {MAX_BF16_ERROR:g}, precision: fp32 has none"
    return f"{largest}, where differences of {e.weighting} are about 1; {mend}"


def make_objective(e: ObjectiveConfig, reference: ReferenceConfig, schedule: Schedule) -> Objective | None:
    """The objective with its distance; the user's own are tried on tiny samples. Raises UserError."""
    with _one_line("distance", e.distance, "no pair (d, d')"):
        chosen = distance(e.distance, e.distance_args)
    if e.distance not in DISTANCES:
        with _one_line("distance", e.distance, "refused"):
            validate_distance(chosen)
    with _one_line("name", e.name, "no objective"):
        loss = objective(e.name, schedule=schedule, weighting=e.weighting, distance=chosen, args=e.args)
    if loss and e.name not in OBJECTIVES:
        with _one_line("name", e.name, "refused"):
            beside = reference.guidance == "out" and reference.guidance_scale != 1
            validate_objective(loss, e.t_min, e.t_max, guidance_beside=beside)
    return loss


@contextmanager
def _one_line(key: str, name: str, verdict: str) -> Iterator[None]:
    """Whatever the user's module raises becomes a UserError of one line, of the key `objective.<key>`."""
    try:
        yield
    except ArgumentError as error:
        args = "args" if key == "name" else "distance_args"
        raise UserError(f"objective.{args}.{error.name}: {error.reason}{did_you_mean(error.name, error.known)}") from None
    except (Exception, SystemExit) as error:
        raise UserError(f"objective.{key}: {name!r} is {verdict}: {' '.join(str(error).split())}") from error
