"""A pretrained text-to-image diffusion model as the method needs it: schedule, denoisers, one-step generators, decoder.

`load_reference` reads a diffusers pipeline part by part and loads each part when it is first asked for: a reward actor
that only decodes never holds a network. Which parts there are and how they are called is `families`. Nothing here
unpickles: weights are safetensors, the rest is JSON and text.

Shapes: B samples; latents and noise [B, C, H, W] in the network's units (the decoder's, shifted and scaled); t [B];
images [B, 3, H', W'] in [0, 1]; conditions batch first.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import FrozenDict
from torch import Tensor, nn

from diffinstruct.errors import UserError
from diffinstruct.method.diffusion import Conditions, Schedule
from diffinstruct.method.precision import autocast
from diffinstruct.models import sources
from diffinstruct.models.denoiser import InputScale, NetworkDenoiser, OneStepGenerator
from diffinstruct.models.families import FAMILIES
from diffinstruct.models.parts import read_tokenizer, refuse_no_pipeline
from diffinstruct.models.prompt_conditions import ENCODED_AT_ONCE, PromptConditions
from diffinstruct.models.prompt_embeddings import NULL, Embeddings
from diffinstruct.models.sources import NoWeights, WeightSource
from diffinstruct.models.start import lora_file, network_from_file
from diffinstruct.models.world import named_world

DECODERS = ("AutoencoderKL", "AutoencoderTiny")
WEIGHTS_BESIDE = WeightSource()  # weights from where the configurations are
FLOW = "FlowMatchEulerDiscreteScheduler"
PREDICTIONS = ("epsilon", "v_prediction", "sample")  # of networks that are no flows
DDIM = {"clip_sample": False, "thresholding": False}
"""Latents have no range to be clipped to. DDIM clips unless told not to, and configurations of other schedulers do not
say; where one says that it does, it was saved with DDIM's defaults."""


class Reference:
    """A text-to-image pipeline's parts. Decoder and text encoders are frozen; each network given out is its own copy.

    Not to be sent to another process: there, `load_reference` again and use the part that is needed.

    index: the pipeline's `model_index.json`; the other arguments are those of `load_reference`.
    schedule: alpha_t and sigma_t, from the pipeline's own betas or flow.
    latent_shape: (C, H, W) of one sample, at the resolution that the network was trained for.
    """

    def __init__(
        self,
        source: str,
        index: dict[str, Any],
        dtype: torch.dtype,
        device: torch.device | str,
        activation_checkpointing: bool,
        embeddings: Path | None,
        decoder_dtype: torch.dtype | None = None,
        weights: WeightSource = WEIGHTS_BESIDE,
    ) -> None:
        self.source, self.index, self.dtype, self.device, self.weights = source, index, dtype, device, weights
        self.decoder_dtype, self.activation_checkpointing = decoder_dtype or dtype, activation_checkpointing
        self.family = FAMILIES[index["_class_name"]]
        scheduler = sources.read_source(DDIMScheduler.load_config, source, subfolder="scheduler")
        _check_scheduler(scheduler, source, self.family.flow)
        self.betas: list[float] | None = None
        if self.family.flow:
            self.scheduler, self.prediction = FlowMatchEulerDiscreteScheduler.from_config(scheduler), "flow_prediction"
            sigmas = self.scheduler.sigmas.flip(0)
            self.schedule = Schedule(1 - sigmas, sigmas, sigmas * len(sigmas))
        else:
            self.scheduler = ddim = DDIMScheduler.from_config(scheduler, **DDIM | _even_steps(scheduler))
            self.betas, self.prediction = ddim.betas.tolist(), ddim.config.prediction_type
            self.schedule = Schedule(ddim.alphas_cumprod.sqrt(), (1 - ddim.alphas_cumprod).sqrt())
        # Zero terminal SNR: at the last t there is nothing of the picture in x_t, and epsilon says nothing of it
        self.blind_at_last = self.prediction == "epsilon" and self.schedule.alphas[-1].item() == 0
        self._config = sources.read_source(self._network_class.load_config, source, subfolder=self.family.part)
        if (size := self._config.get("sample_size")) is None:
            mend = "its edge in latents, 64 for 512 px, say, belongs into that file"
            raise UserError(f"reference.model: {self.family.part}/config.json of {source} has no sample_size; {mend}")
        self.latent_shape = (self._config["in_channels"], *((size, size) if isinstance(size, int) else size))
        self.embeddings: Embeddings | None = None
        if embeddings:
            self.embeddings = Embeddings(embeddings, *sources.text_encoders(source, self.family), self.blank_conditions())
        self._conditions = PromptConditions(self._encode, device, self.embeddings)

    @property
    def _network_class(self) -> Any:
        return getattr(diffusers, self.family.network)

    def _class(self, part: str) -> Any:
        """The class of a part, of diffusers or transformers."""
        if part in self.family.texts:
            return getattr(transformers, self.family.texts[part])
        return self._network_class if part == self.family.part else getattr(diffusers, self.index[part][1])

    @cached_property
    def vae(self) -> Any:
        vae = self.part("vae")
        if self.activation_checkpointing:
            vae.enable_gradient_checkpointing()
        return vae

    @cached_property
    def texts(self) -> dict[str, Any]:
        """Tokenizers and text encoders, by their names in the pipeline."""
        encoders = (name for name in self.family.texts if not name.startswith("tokenizer"))
        return self.tokenizers | {name: self.part(name) for name in encoders}

    @cached_property
    def tokenizers(self) -> dict[str, Any]:
        """By their names in the pipeline."""
        return {name: self.part(name) for name in self.family.texts if name.startswith("tokenizer")}

    def cut(self, prompts: Iterable[str]) -> list[str]:
        """Those of the prompts, each once, of which no text encoder sees the end."""
        cut = list(dict.fromkeys(prompts))
        for name, tokenizer in self.tokenizers.items():
            limit = self.family.limits.get(name, tokenizer.model_max_length)
            tokens = tokenizer(cut, verbose=False).input_ids if cut else []
            cut = [prompt for prompt, ids in zip(cut, tokens, strict=True) if len(ids) > limit]
        return cut

    def part(self, name: str) -> Any:
        """The decoder ("vae"), a text encoder or a tokenizer, by its name in the pipeline, read anew; frozen."""
        if name.startswith("tokenizer"):
            longest = None if name in self.family.limits else self._longest(name.replace("tokenizer", "text_encoder"))
            read = partial(read_tokenizer, self._class(name), longest=longest)
            return sources.read_source(read, self.source, subfolder=name)
        dtype = self.decoder_dtype if name == "vae" else self.dtype
        return self.weights.load(self._class(name), self.source, name, dtype, self.device).requires_grad_(False)

    def configured(self, part: str) -> tuple[Any, dict[str, Any]]:
        """The class of the network or the decoder, of diffusers, and its configuration as it lies there."""
        kind = self._class(part)
        return kind, sources.read_source(kind.load_config, self.source, subfolder=part)

    @cached_property
    def pixels_per_latent(self) -> int:
        _, config = self.configured("vae")
        blocks = config.get("block_out_channels") or config["decoder_block_out_channels"]
        return int(2 ** (len(blocks) - 1))

    @cached_property
    def _sampling(self) -> NetworkDenoiser:
        return self.denoiser().requires_grad_(False)

    @cached_property
    def _encoding(self) -> Any:
        """The pipeline as far as prompts need it: of the network its configuration alone, which takes no memory."""
        return self.pipeline(**{self.family.part: self.empty(self.family.part)})

    def empty(self, part: str) -> Any:
        """The network, the decoder ("vae") or a text encoder by its name in the pipeline, without weights."""
        dtype = self.decoder_dtype if part == "vae" else self.dtype
        return NoWeights().load(self._class(part), self.source, part, dtype, "meta")

    def pipeline(self, **parts: Any) -> Any:
        """diffusers' own pipeline with these parts, its text encoders, if they are not among them, and nothing in the place
        of others."""
        with sources.quiet():
            texts = {} if self.family.texts.keys() <= parts.keys() else self.texts
            return self.stock_pipeline(texts | parts)

    def stock_pipeline(self, parts: Mapping[str, Any]) -> Any:
        """diffusers' own pipeline with these parts alone."""
        kind = getattr(diffusers, self.family.pipeline)
        known = inspect.signature(kind).parameters
        options = {key: value for key, value in self.index.items() if key in known and not isinstance(value, list)}
        nothing = {key: None for key, parameter in known.items() if parameter.default is parameter.empty}
        return kind(**nothing | options | dict(parts))

    def network(
        self, start: str = "reference", dtype: torch.dtype | None = None, device: torch.device | str | None = None
    ) -> Any:
        """A fresh network of the reference's shape.

        start: "reference", "pocket-distilled", a folder or hub id that holds a network of the reference's class or a
            pipeline with one, or a .safetensors file of its weights, named as diffusers or as the model's authors do,
            or of a LoRA on the reference's network, or the LoRA's folder.
        dtype, device: the reference's, if not said; on "meta" without weights, but with its buffers.
        Raises UserError for a start that is not there or does not fit the reference.
        """
        dtype, device = dtype or self.dtype, device or self.device
        if str(device) == "meta":
            network = nn.Module.to(sources.network_without_weights(self._network_class, self._config), dtype=dtype).eval()
        elif Path(path := self.check_start(start)).is_file():
            base = partial(self.weights.load, self._network_class, self.source, self.family.part, torch.float32, "cpu")
            network = network_from_file(self._network_class, Path(path), self._config, self.source, self.family, base)
            # nn.Module's own `to`: diffusers' warns of what does not concern these models
            network = nn.Module.to(network, device, dtype).requires_grad_(True).eval()
        else:
            network = self.weights.load(self._network_class, path, self._subfolder(path), dtype, device)
        if str(device).startswith("cuda"):  # the layout in which GPUs convolve
            network = network.to(memory_format=torch.channels_last)
        if self.activation_checkpointing:
            network.enable_gradient_checkpointing()
        return network

    def check_start(self, start: str) -> str:
        """Where a start's weights lie. Raises UserError as `network`, for what can be told without reading them."""
        source = self.source if start == "reference" else start
        if start == "pocket-distilled":
            world = named_world("pocket")
            assert world is not None
            source = str(world.generator)
        sources.refuse_missing("generator.init_from", source)
        if Path(source).is_dir() and (lora := lora_file(Path(source))):
            return str(lora)
        if Path(source).is_file():
            sources.only_safetensors("generator.init_from", Path(source))
            return source
        config = sources.read_source(
            self._network_class.load_config, source, key="generator.init_from", subfolder=self._subfolder(source)
        )
        for key in self.family.shape:
            if config.get(key) != self._config.get(key):
                raise UserError(
                    f"generator.init_from: {start} does not fit the reference {self.source}: "
                    f"{key} is {config.get(key)}, not {self._config.get(key)}"
                )
        return source

    def denoiser(self, network: nn.Module | None = None) -> NetworkDenoiser:
        """A network as a Denoiser; a fresh copy of the reference's own, trainable, if none is given. What it predicts
        is taken for what the reference's predicts (epsilon, v, sample, flow)."""
        network = self.network() if network is None else network
        return NetworkDenoiser(network, self.family, self.schedule, self.prediction, self.pixels_per_latent)

    def generator(self, timestep: int, start: str = "reference", input_scale: InputScale = "unit") -> OneStepGenerator:
        """A fresh one-step generator that begins as `network(start)`. Raises UserError as that and `one_step` do."""
        return self.one_step(self.network(start), timestep, input_scale)

    def one_step(self, network: nn.Module, timestep: int, input_scale: InputScale = "unit") -> OneStepGenerator:
        """A network as a one-step generator at T, an index into the schedule. Raises UserError as `check_timestep`."""
        self.check_timestep(timestep, input_scale)
        return OneStepGenerator(self.denoiser(network), timestep, input_scale)

    def check_timestep(self, timestep: int, input_scale: InputScale) -> None:
        """Raises UserError for a T outside of the schedule, or one that the family or the input scale forbids."""
        last = len(self.schedule.alphas) - 1
        if not 0 <= timestep <= last:
            raise UserError(f"generator.timestep: got {timestep}, the schedule has 0 to {last}")
        if self.family.flow and timestep != last:
            raise UserError(
                f"generator.timestep: should be {last} for a flow, whose stock pipelines begin at pure noise, got {timestep}"
            )
        if timestep == last and self.blind_at_last:
            why = "alpha is 0 there (zero terminal SNR), and a network that predicts epsilon says nothing of the picture"
            raise UserError(f"generator.timestep: should be below {timestep}: {why}")
        if input_scale == "sigma" and timestep == 0:
            raise UserError("generator.timestep: should be at least 1 where input_scale is 'sigma', got 0")

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] -> images [B, 3, H', W'] in [0, 1], in the latents' dtype, differentiable.

        The clamp is a plain one, as in the exported pipeline: the gradient is that of the picture as it is shown, so a
        value that the decoder puts beyond black or white gets none, and one inside the range gets all of it.
        """
        scaled = self.family.unscaled(latents, self.vae.config)
        return (self.vae.decode(scaled.to(self.vae.dtype), return_dict=False)[0].to(latents.dtype) * 0.5 + 0.5).clamp(0, 1)

    def sampler(self, generator: OneStepGenerator, precision: str = "fp32") -> Callable[[list[str], Tensor], Tensor]:
        """(prompts, noise [B, C, H, W]) -> a one-step generator's images [B, 3, H', W'] in [0, 1], without gradient.

        precision: of the generator's forward pass, as in a run; the decoder has its own.
        """

        @torch.no_grad()
        def sample(prompts: list[str], z: Tensor) -> Tensor:
            c = self.encode_prompts(prompts)
            with autocast(precision, torch.device(self.device)):
                latents = generator(z.to(self.device), c)
            return self.decode(latents)

        return sample

    def encode_prompts(self, prompts: list[str]) -> Conditions:
        """The prompts' conditions, constants, as the stock pipeline computes them: {"prompt_embeds": [B, L, D], ...}.

        Text encoders see batches of one shape: neither a prompt's neighbours nor the cache change a bit of it, so a run can
        resume.
        """
        return self._conditions(prompts)

    def null_conditions(self) -> Conditions:
        """What guidance takes for no prompt, batch size 1."""
        return self._conditions([NULL])

    def blank_conditions(self) -> Conditions:
        """Conditions of one prompt as to their shapes and types; no text encoder is read."""
        return self._kept(self.family.blank(FrozenDict(self._config), self._longest("text_encoder")))

    def _longest(self, part: str) -> int:
        """The tokens that a text encoder takes at most; 0 where its configuration does not say."""
        read = getattr(transformers, self.family.texts[part]).config_class.from_pretrained
        return getattr(sources.read_source(read, self.source, subfolder=part), "max_position_embeddings", 0)

    def read_ahead(self, prompts: list[str], executor: Executor) -> None:
        """Let `executor` read what `encode_prompts` will be asked for next, where that lies on disk."""
        self._conditions.read_ahead(prompts, executor)

    def store_embeddings(self, prompts: Sequence[str | None]) -> None:
        """Add those of `prompts` to the folder of embeddings."""
        assert self.embeddings is not None
        self.embeddings.add(self._conditions.encoded(prompts))

    @torch.no_grad()
    def sample(self, prompts: list[str], z: Tensor, steps: int = 50, guidance_scale: float = 1.0) -> Tensor:
        """The reference's own latents, by deterministic DDIM or Euler steps of its flow, from z [B, C, H, W] ~ N(0, I).

        `guidance_scale` is diffusers'; at 1 or below the sampling is plain conditional.
        """
        guided = guidance_scale > 1
        c = self.encode_prompts(prompts)
        if guided:
            c = {key: torch.cat([null.expand_as(c[key]), c[key]]) for key, null in self.null_conditions().items()}
        scheduler = type(self.scheduler).from_config(self.scheduler.config)
        scheduler.set_timesteps(steps, device=z.device)
        xt = z  # in z's own type: the steps add up
        for t in scheduler.timesteps:
            output = self._sampling.output(torch.cat([xt] * (1 + guided)), t.expand(len(xt) * (1 + guided)), c)
            if guided:
                null, conditional = output.chunk(2)
                output = null + guidance_scale * (conditional - null)
            xt = scheduler.step(output, t, xt, return_dict=False)[0]
        return xt

    @torch.no_grad()
    def _encode(self, prompts: Sequence[str | None]) -> list[Conditions]:
        """The conditions of each of at most ENCODED_AT_ONCE prompts, which the text encoders see among as many."""
        given = [self.weights.conditions(self.blank_conditions, self.device) for _ in prompts]
        made = [conditions for conditions in given if conditions is not None]
        if not made:
            texts = [prompt or "" for prompt in prompts] + [""] * (ENCODED_AT_ONCE - len(prompts))
            # Quiet: every worker would report a prompt that is cut off. Not in the autocast precision of the first caller,
            # either: the conditions are cached.
            with sources.quiet(), torch.autocast(torch.device(self.device).type, enabled=False):
                batch = self.family.encode(self._encoding, texts, self.device)
            made = [{key: value[row : row + 1] for key, value in batch.items()} for row in range(len(prompts))]
            made = [self.family.null(c, self._encoding) if p is NULL else c for p, c in zip(prompts, made, strict=True)]
        return [self._kept(conditions) for conditions in made]

    def _kept(self, conditions: Conditions) -> Conditions:
        """A copy in main memory, rounded as the run's arithmetic rounds it."""
        dtypes = {key: self.decoder_dtype if value.is_floating_point() else value.dtype for key, value in conditions.items()}
        return {key: value.to("cpu", dtypes[key], copy=True) for key, value in conditions.items()}

    def _subfolder(self, source: str) -> str:
        """Where in a folder or hub repository the network is: in a pipeline under its part's name, else at the top."""
        try:
            name, revision = sources.pinned(source)
            self._network_class.load_config(name, subfolder=self.family.part, **revision)
        except OSError:
            return ""
        return self.family.part


def _check_scheduler(config: Mapping[str, Any], source: str, flow: bool) -> None:
    """Raises UserError for a scheduler whose schedule is not the one that is read of its configuration."""
    name, says = config["_class_name"], f"reference.model: the scheduler of {source}"
    if flow:
        if name != FLOW or config.get("use_dynamic_shifting"):
            raise UserError(f"{says} is a {name}; should be a {FLOW} without use_dynamic_shifting")
        return
    if "beta_schedule" not in config:
        raise UserError(f"{says} is a {name}, whose sigmas are not made of betas; should be one with a beta_schedule")
    prediction = config.get("prediction_type", "epsilon")
    if prediction not in PREDICTIONS or config.get("use_flow_sigmas"):
        key = "use_flow_sigmas" if config.get("use_flow_sigmas") else f"prediction_type {prediction!r}"
        raise UserError(f"{says} has {key}, which is for flows; here it should predict {', '.join(PREDICTIONS)}")
    own = getattr(getattr(diffusers, name, None), "from_config", DDIMScheduler.from_config)(config)
    read = DDIMScheduler.from_config(config).alphas_cumprod
    if (alphas := getattr(own, "alphas_cumprod", read)).shape != read.shape or (alphas - read).abs().max() > 1e-6:
        raise UserError(f"{says}, a {name}, has another schedule than its betas give; no key is known that says which")


def _even_steps(scheduler: Mapping[str, Any]) -> dict[str, str]:
    """The spacing of DDIM's timesteps, where the configuration's is not one that its steps go by: it takes T / steps
    from each t, which is not the distance of "linspace"."""
    return {"timestep_spacing": "trailing"} if scheduler.get("timestep_spacing") == "linspace" else {}


def load_reference(
    model: str,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    activation_checkpointing: bool = False,
    embeddings: Path | None = None,
    decoder_dtype: torch.dtype | None = None,
    weights: WeightSource = WEIGHTS_BESIDE,
) -> Reference:
    """Open "pocket" (the built-in world), another world's folder, a diffusers pipeline's folder, hub id or hub
    id@commit, or a .safetensors file that holds a whole pipeline in its authors' layout; its parts load when used.

    dtype: of every part, whatever the files hold.
    activation_checkpointing: networks and decoder keep their blocks' inputs alone and compute the rest again in the
        backward pass.
    embeddings: a folder of prompt embeddings (`prompt_embeddings.Embeddings`), from which prompts are then read.
    decoder_dtype: of the decoder and of prompts' conditions, if another.
    weights: what makes the parts; by default they are read from where the configurations are.
    Raises UserError, one line, for what is not there or not supported.
    """
    source = str(world.pipeline) if (world := named_world(model)) else model
    sources.refuse_missing("reference.model", source)
    if Path(source).is_file():
        source = str(sources.unpacked(Path(source)))
    refuse_no_pipeline(source)
    index = sources.read_source(sources.PipelineIndex.load_config, source, key="reference.model")
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or name not in FAMILIES:
        raise UserError(f"reference.model: {model} is a {name}; {sources.SUPPORTED}")
    family = FAMILIES[name]
    wanted = {family.part: (family.network, *family.once), "vae": DECODERS}
    wanted |= {part: (kind, f"{kind}Fast") for part, kind in family.texts.items()}
    for part, classes in wanted.items():
        _, found = entry if isinstance(entry := index.get(part), list | tuple) and len(entry) == 2 else (None, entry)
        if found not in classes:
            raise UserError(
                f"reference.model: the {part} of {model} is a {found}, not a {' or '.join(classes)}; {sources.SUPPORTED}"
            )
    try:
        return Reference(source, index, dtype, device, activation_checkpointing, embeddings, decoder_dtype, weights)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        said = f"{type(error).__name__}: {sources.message_lines(error)[0]}"
        raise UserError(f"reference.model: {model} is not as diffusers writes it: {said}") from error
