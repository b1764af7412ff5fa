"""Reward validation shows whether a reward can be trusted before anything is trained on it or judged by it.

A reward that breaks its contract seldom crashes: training goes on, towards something else. So each is tried first, on a
few pictures: one finite score a picture; the same for the same question, whatever was asked before and whatever stands
beside it in the batch; dependent on the picture; and, where it is trained on, with the gradient of that score and of no
other. What breaks the contract is a fault and ends the run; what is merely unusual is a remark.
"""

import random
import reprlib
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffinstruct.method.memory import out_of_memory
from diffinstruct.method.rewards import RewardError, RewardModel, scored

PICTURES, LEAST, FEW = 64, 16, 4  # pictures that are scored, at most and at least; and those of every other check
BATCH = 16  # pictures at once, halved where memory ends
MARGIN = 0.1  # difference quotients stay within [MARGIN, 1 - MARGIN]: beyond black and white a reward may clamp
STEPS = (0.01, 0.04, 0.0025, 0.0006)
"""Of the difference quotients, in a picture's units: small ones for rewards that bend, large ones for noisy rewards."""
MAX_GRADIENT_ERROR = 0.1
"""The share of a change in score by which the gradient may miss it (a wrong sign gives 2, a doubled gradient 1/2)."""
CANDIDATES = 8  # random directions of which each picture gets one
HALF = 1e-4  # relative rounding above this is half precision's
COARSE = 8  # cells a side of the coarse directions: a reward that looks at shapes hardly feels noise of single pixels


@dataclass(frozen=True)
class Report:
    """What was seen of a reward.

    faults: a line each, with the reward's name; none for one that can be trusted.
    remarks: what is unusual and no fault.
    checks: name of a check -> what it saw, in words, in order. After some faults nothing else can be told.
    figures: low, high, mean, std of the scores; pictures_per_second; memory (bytes by which the peak grew);
        gradient_error (the worst share of a change in score that the gradient missed).
    """

    name: str
    faults: Sequence[str] = ()
    remarks: Sequence[str] = ()
    checks: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    digest: str | None = None  # of what was validated, see `reward_digest.py`

    def __str__(self) -> str:
        """One line for a run's log."""
        if self.faults:
            return "; ".join(self.faults)
        names = ("known", "score_range", "gradient_matches_differences", "memory")
        seen = [self.checks[what] for what in names if what in self.checks]
        return f"reward {self.name}: {'; '.join([*seen, *self.remarks])}"


def pictures_for(round_pictures: int) -> int:
    """The pictures on which a run validates its rewards: no more than a round makes, which would cost more than it, and
    no fewer than LEAST. All checks but that of the range take FEW; for the range any two scores that differ will do,
    and of a reward with an opinion of one picture in six LEAST miss it once in twenty."""
    return min(PICTURES, max(LEAST, round_pictures))


def validate_reward(
    name: str, reward: RewardModel, images: Tensor, prompts: Sequence[str], trained: bool, known: bool = False
) -> Report:
    """Validate `reward` on images [B, 3, H, W] in [0, 1] and their prompts. trained: whether it needs a gradient. One
    that is `known`, since it was validated before, is asked about four pictures only.

    The first 64 are scored; the other checks take four of them. Fewer than four are filled up with dimmed copies.
    torch's and Python's random numbers go on as if nothing had been drawn.
    """
    images, texts = images.detach()[:PICTURES], list(prompts)[:PICTURES]
    while len(images) < FEW:
        images, texts = torch.cat([images, images / 2])[:FEW], (texts + texts)[:FEW]
    batch = BATCH
    while True:
        try:
            with _random_numbers_kept(images.device):
                return _Validation(name, reward, images, texts, batch).report(trained, known)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if batch == 2:  # neighbours cannot be told from one picture
                return Report(name, (f"reward {name}: out of memory with two pictures",))
        batch //= 2  # outside the handler: the error's frames, which hold the tensors that were too many, are gone
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def raise_on_faults(reports: Sequence[Report]) -> None:
    """Raises RewardError with every fault of every report, a line each."""
    if faults := [fault for report in reports for fault in report.faults]:
        raise RewardError("\n".join(faults))


class _Validation:
    """The checks of one reward. Each says what it saw, or raises RewardError with what is wrong.

    images: the few, [4, 3, H, W]; `first`: their scores, as first given. Scores here are [B], float64, on the CPU.
    """

    def __init__(self, name: str, reward: RewardModel, images: Tensor, texts: list[str], batch: int) -> None:
        self.name, self.reward, self.batch = name, reward, batch
        self.all_images, self.all_texts = images, texts
        few = min(FEW, batch)
        self.images, self.texts = images[:few], texts[:few]
        self.faults: list[str] = []
        self.remarks: list[str] = []
        self.checks: dict[str, str] = {}
        self.figures: dict[str, float] = {}
        self.first = torch.zeros(few)
        self.scores = torch.zeros(len(images))  # of all pictures
        self.own_gradient = torch.zeros_like(self.images)  # of the pictures drawn `_inside`
        self.differentiable = False
        self.epsilon = 0.0  # relative rounding of the scores
        self.rounding = 0.0  # of a score, as far as it is known
        self.tolerance = 0.0  # between scores that should be the same: batches of different sizes round differently

    def report(self, trained: bool, known: bool = False) -> Report:
        memory = _Memory(self.images.device)
        self.differentiable = trained
        if known:
            self._passes(self.known)
            return Report(self.name, tuple(self.faults), (), self.checks, self.figures)
        if all(map(self._passes, (self.answers, self.score_range, self.repetition))):
            for check in (self.inputs_unchanged, self.neighbours, self.order, self.depends_on_picture):
                self._passes(check)
            self.differentiable = trained and self._passes(self.gradient_per_picture)
            self._passes(self.saturation)
            if self.differentiable:
                self._passes(self.gradient_matches_differences)
        self._note_cut_prompts()
        self.figures["memory"] = memory.growth()
        if not self.faults:
            self.checks["memory"] = f"its peak grew by {self.figures['memory'] / 2**20:.0f} MiB"
        return Report(self.name, tuple(self.faults), tuple(self.remarks), self.checks, self.figures)

    def _note_cut_prompts(self) -> None:
        """A remark on prompts of which the reward does not see the end, where it, or its tower, says how it reads them."""
        reader = getattr(self.reward, "tower", self.reward)
        tokenizer, longest = (getattr(reader, name, None) for name in ("tokenizer", "longest"))
        if callable(tokenizer) and isinstance(longest, int):
            texts = list(dict.fromkeys(self.all_texts))
            if cut := [text for text in texts if len(tokenizer(text).input_ids) > longest]:
                first = reprlib.repr(cut[0])
                self.remarks.append(f"{len(cut)} of {len(texts)} prompts are cut after {longest} tokens, such as {first}")

    def _passes(self, check: Callable[[], str]) -> bool:
        try:
            self.checks[check.__name__] = check()
        except RewardError as error:
            self.checks[check.__name__] = f"refused: {str(error).removeprefix(f'reward {self.name}: ')}"
            if str(error) not in self.faults:
                self.faults.append(str(error))
            return False
        return True

    def _fault(self, problem: str) -> RewardError:
        return RewardError(f"reward {self.name}: {problem}")

    # ------------------------------------------------------------------------------------------------ scores
    def answers(self) -> str:
        """Shape, kind of number, finite; and how exact the numbers are."""
        with torch.no_grad():
            scores = self._scored(self.images.clone(), self.texts)
        self.first = scores.double().cpu()
        kinds = {scores.dtype}
        if isinstance(self.reward, nn.Module):
            kinds |= {p.dtype for p in self.reward.parameters() if p.is_floating_point()}
        self.epsilon = max(torch.finfo(kind).eps for kind in kinds)
        return f"{len(self.first)} pictures got {len(self.first)} scores, {str(scores.dtype).removeprefix('torch.')}"

    def known(self) -> str:
        """What may have changed though the reward has not: the machine, and the pictures."""
        self.answers()
        if self.differentiable:
            self._gradient(self.images)
        return f"as it was validated before; a short check on {len(self.images)} pictures has passed"

    def score_range(self) -> str:
        """One score for all pictures is a fault, of a held-out reward too: it might swallow its own errors."""
        images, texts = self.all_images, self.all_texts
        began = time.perf_counter()
        scores = self.scores = torch.cat([self._ask(images[rows], texts[rows]) for rows in self._batches])
        seconds = time.perf_counter() - began
        low, high, mean, std = (f(scores).item() for f in (torch.min, torch.max, torch.mean, torch.std))
        self.figures |= {"low": low, "high": high, "mean": mean, "std": std, "pictures_per_second": len(images) / seconds}
        if low == high:
            if (images != images[0]).any():
                raise self._fault(f"the same score {low:.4g} for {len(images)} different pictures: it tells nothing apart")
            self.remarks.append("all pictures are the same, so its range is not known")
        values, counts = scores.unique(return_counts=True)
        if low < high and counts.max() > 1 and self.epsilon < HALF:
            most = counts.argmax()
            self.remarks.append(f"{int(counts[most])} of {len(images)} pictures got exactly the same score {values[most]:.4g}")
        self.rounding = 4 * self.epsilon * scores.abs().max().item()
        self.tolerance = max(0.01 * std, self.rounding)
        return (
            f"scores {low:.4g} to {high:.4g} (mean {mean:.4g}, std {std:.3g}) on {len(images)} pictures, "
            f"{len(images) / seconds:.3g} pictures/s"
        )

    def repetition(self) -> str:
        """The same bits for the same question, right away and after another one."""

        def asked(seed: int) -> Tensor:
            torch.manual_seed(seed)  # the random numbers that everybody draws from
            random.seed(seed)
            return self._ask(self.images, self.texts)

        first = asked(seed=0)
        if off := _off(first, asked(seed=0)):
            raise self._fault(
                f"asked twice, it gave scores that differ by {off:.3g}: it remembers, or draws random numbers of its own"
            )
        if off := _off(first, asked(seed=1)):
            raise self._fault(f"its scores are random: asked twice, they differ by {off:.3g} (is it in eval mode?)")
        self._ask(self._others, self.texts)
        if off := _off(first, self._ask(self.images, self.texts)):
            raise self._fault(f"asked about other pictures in between, it gave scores that differ by {off:.3g}: it remembers")
        return "asked again, it gave the same bits"

    def inputs_unchanged(self) -> str:
        """Neither pictures nor prompts are written to; and a tower and a head say what the reward itself says."""
        images, texts = self.images.clone(), list(self.texts)
        with torch.no_grad():  # `scored` would give it a copy
            itself = scored(self.name, lambda *_: self.reward(images, texts), self.images, self.texts, {})
        if not torch.equal(images, self.images):
            raise self._fault("it writes into the pictures that it is given")
        if texts != self.texts:
            raise self._fault("it changes the list of prompts that it is given")
        if (off := _off(itself.double().cpu(), self.first)) > self.tolerance:
            raise self._fault(f"its head on its tower's features gives scores that differ by {off:.3g} from its own")
        return "pictures and prompts are left as they were"

    def neighbours(self) -> str:
        """A picture alone gets the score that it gets in a batch, up to rounding; if not, why not."""
        rows = range(len(self.images))
        alone = torch.cat([self._ask(self.images[i : i + 1], self.texts[i : i + 1]) for i in rows])
        off = _off(alone, self.first)
        if off <= self.tolerance:
            self.rounding = max(self.rounding, off)
            return f"alone or in a batch, scores differ by {off:.2g}"
        if _off(alone.sort().values, self.first.sort().values) <= self.tolerance:
            raise self._fault("its answers are not in the order of the pictures")
        half = len(self.images) // 2
        for what, images, texts in (("pictures", self._others, self.texts), ("prompts", self.images, self._other_texts)):
            for kept, changed in ((slice(half), slice(half, None)), (slice(half, None), slice(half))):
                mixed, words = self.images.clone(), list(self.texts)
                mixed[changed], words[changed] = images[changed], texts[changed]
                if (moved := _off(self._ask(mixed, words)[kept], self.first[kept])) > self.tolerance:
                    raise self._fault(f"a picture's score depends on its neighbours' {what} in the batch, by {moved:.3g}")
        raise self._fault(f"a picture alone gets another score than in a batch, by {off:.3g}")

    def order(self) -> str:
        """Scores follow their pictures and prompts to other rows."""
        order = [*range(1, len(self.images), 2), *range(0, len(self.images), 2)]
        moved = self._ask(self.images[order], [self.texts[i] for i in order])
        if (off := _off(moved, self.first[order])) > self.tolerance:
            raise self._fault(f"in another order, the same pictures and prompts get scores that differ by {off:.3g}")
        return "scores follow their pictures to other rows"

    def depends_on_picture(self) -> str:
        """Other pictures get other scores under the same prompts. Other prompts need not: some rewards rate beauty."""
        if not _off(self._ask(self._others, self.texts), self.first) and not self._sees_some():
            raise self._fault("it does not look at the pictures: others under the same prompts get the same scores")
        if not _off(self._ask(self.images, self._other_texts), self.first):
            self.remarks.append("other prompts made no difference to its scores")
            return "scores depend on the pictures alone"
        return "scores depend on pictures and prompts"

    def _sees_some(self) -> bool:
        """Whether any picture under another's prompt gets another score: a reward may have an opinion of few only."""
        images, texts = self.all_images.roll(1, 0), self.all_texts
        return any(_off(self._ask(images[rows], texts[rows]), self.scores[rows]) for rows in self._batches)

    # ---------------------------------------------------------------------------------------------- gradients
    def gradient_per_picture(self) -> str:
        """There is one, finite, and each picture's is its own score's: weights w_b of the scores multiply its rows."""
        images = self._inside
        with torch.enable_grad():
            graded = self._scored(images.clone().requires_grad_(), self.texts)
        if (off := _off(graded.detach().double().cpu(), self._ask(images, self.texts))) > self.tolerance:
            raise self._fault(f"asked for a gradient, it gives scores that differ by {off:.3g} from those without")
        gradient = self.own_gradient = self._gradient(images)
        sizes = gradient.flatten(1).norm(dim=1)
        if not sizes.any():
            raise self._fault("its gradient is zero for all pictures")
        weights = torch.arange(1.0, len(images) + 1, device=images.device)
        expected = weights.view(-1, 1, 1, 1) * gradient
        off = ((self._gradient(images, weights) - expected).norm() / expected.norm()).item()
        if off > 0.01 + 8 * self.epsilon:
            weights = torch.ones_like(weights)
            weights[0] = 2
            if (self._gradient(images, weights) - gradient)[1:].norm() > 0.01 * sizes.max():
                raise self._fault("the gradient of one picture's score reaches the other pictures of the batch")
            raise self._fault(f"its gradient is not linear in the scores' weights, it is off by {off:.0%}")
        return f"each picture has its own, of norm {sizes.min():.3g} to {sizes.max():.3g}"

    def saturation(self) -> str:
        """On black, white and hard, fully saturated pictures too, all is finite."""
        images = (self.images > 0.5).to(self.images)
        images[0], images[1] = 0, 1
        try:
            self._gradient(images) if self.differentiable else self._ask(images, self.texts)
        except RewardError as error:
            raise RewardError(f"{error} (on black, white or fully saturated pictures)") from error
        what = "score and gradient are" if self.differentiable else "the score is"
        return f"{what} finite on black, white and saturated pictures"

    def gradient_matches_differences(self) -> str:
        """The gradient against central differences: along itself, and along coarse and fine random directions.

        For each row and direction the best of the STEPS counts, since a reward may bend within a large one, of those
        whose change in score stands out of the scores' rounding.
        """
        images, gradient = self._inside, self.own_gradient
        directions = self._directions(gradient)
        predicted = torch.stack([(gradient * v).flatten(1).double().sum(1) for v in directions]).cpu()  # [directions, B]
        nudged = images + self.epsilon * directions[-1]  # hardly another picture: what changes is rounding inside the reward
        rounding = 2 * max(self.rounding, _off(self._ask(images, self.texts), self._ask(nudged, self.texts)))
        error, quotients = torch.full_like(predicted, torch.inf), torch.zeros_like(predicted)
        allowed = MAX_GRADIENT_ERROR if self.epsilon < HALF else 3 * MAX_GRADIENT_ERROR
        for step in STEPS:
            sides = [[self._ask(images + sign * step * v, self.texts) for v in directions] for sign in (1, -1)]
            quotient = (torch.stack(sides[0]) - torch.stack(sides[1])) / (2 * step)
            size = torch.maximum(quotient.abs(), predicted.abs())
            off = ((quotient - predicted).abs() / size).where(rounding / step <= allowed * size, torch.inf)
            quotients, error = quotients.where(error <= off, quotient), error.minimum(off)
            if (error <= allowed).all():
                break
        measurable = error.isfinite()
        if not measurable.any():
            self.remarks.append("its gradient could not be checked: what a step changes drowns in the scores' rounding")
            return "no change stands out of the scores' rounding"
        bad = measurable & (error > allowed)
        if (blind := bad.any(0) & (predicted == 0).all(0)).any():
            raise self._fault(
                f"no gradient reaches {int(blind.sum())} of {len(images)} pictures, though their scores change with them"
            )
        if bad.any():
            factor = ((quotients * predicted)[bad].sum() / (predicted * predicted)[bad].sum()).item()
            raise self._fault(
                f"its gradient is not that of its scores: in {int(bad.sum())} of {int(measurable.sum())} directions the "
                f"score changes by {factor:.2g} times what the gradient predicts"
            )
        self.figures["gradient_error"] = error[measurable].max().item()
        worst, n = self.figures["gradient_error"], int(measurable.sum())
        return f"the gradient misses at most {worst:.1%} of a change, in {n} directions"

    # -------------------------------------------------------------------------------------------------- asking
    def _scored(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        """As a run asks: by tower and head where there are such. The list is the reward's own: it may spoil it."""
        return scored(self.name, self.reward, images, list(texts), {})

    def _ask(self, images: Tensor, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            return self._scored(images, texts).double().cpu()

    def _gradient(self, images: Tensor, weights: Tensor | None = None) -> Tensor:
        """d(sum_b weight_b r_b) / d images, weights 1 by default, finite."""
        leaf = images.clone().requires_grad_()
        with torch.enable_grad():
            scores = self._scored(leaf, self.texts).float()
            total = scores.sum() if weights is None else (weights.to(scores) * scores).sum()
        gradient = None
        if total.requires_grad:
            try:
                (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
            except Exception as error:
                if out_of_memory(error):
                    raise
                raise self._fault(f"its gradient: {type(error).__name__}: {' '.join(str(error).split())}") from error
        if gradient is None:
            raise self._fault("its scores carry no gradient to the pictures, so it can only be held out")
        if bad := int((~gradient.isfinite()).flatten(1).any(1).sum()):
            raise self._fault(f"its gradient is not finite for {bad} of {len(images)} pictures")
        return gradient

    def _directions(self, gradient: Tensor) -> list[Tensor]:
        """Directions [B, 3, H, W], at most 1 in a pixel. Of several random ones a row gets that along which its gradient
        says most: at right angles to it, rounding would be compared with rounding."""
        draws = torch.Generator().manual_seed(0)
        batch, channels, height, width = gradient.shape

        def most_telling(rows: int, columns: int) -> Tensor:
            signs = torch.randint(0, 2, (CANDIDATES, batch, channels, rows, columns), generator=draws).to(gradient) * 2 - 1
            candidates = torch.stack([F.interpolate(sign, (height, width), mode="nearest") for sign in signs])
            best = (candidates * gradient).flatten(2).sum(2).abs().argmax(0)
            return candidates[best, torch.arange(batch, device=best.device)]

        along = gradient / gradient.abs().amax((1, 2, 3), keepdim=True).clamp_min(torch.finfo(gradient.dtype).tiny)
        return [along, most_telling(COARSE, COARSE), most_telling(height, width)]

    @property
    def _batches(self) -> list[slice]:
        return [slice(i, i + self.batch) for i in range(0, len(self.all_images), self.batch)]

    @property
    def _others(self) -> Tensor:
        """Other pictures, in content and in contrast."""
        return self.images.roll(1, 0) / 2

    @property
    def _other_texts(self) -> list[str]:
        return [next((other for other in self.all_texts if other != text), f"not {text}") for text in self.texts]

    @property
    def _inside(self) -> Tensor:
        return MARGIN + (1 - 2 * MARGIN) * self.images


class _Memory:
    """By how much the peak grows: torch's on a GPU, else the process's, which shows nothing below an earlier peak."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self.before = self._peak()

    def _peak(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

    def growth(self) -> float:  # bytes
        return self._peak() - self.before


def _off(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    state = random.getstate()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(state)
