"""Which trial Tune runs next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch

from diffinstruct.run_folder import signals
from diffinstruct.run_folder.signals import Signal
from diffinstruct.sweeps.criterion import SelectionCriterion
from diffinstruct.sweeps.points import Optuna, Point
from diffinstruct.sweeps.trials import Trials


class ListSearcher(Searcher):
    """Hands out the points of a list."""

    def __init__(self, trials: Trials, todo: Sequence[int]) -> None:
        super().__init__()
        self.trials, self.todo = trials, list(todo)

    def suggest(self, trial_id: str) -> Any:
        if not self.todo or signals.requested(self.trials.folder) == Signal.PAUSE:
            return Searcher.FINISHED
        i = self.todo.pop(0)
        return {**self.trials.point(i), "trial": i}

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict[str, Any], **spec: Any) -> bool:
        return True

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """A list is not changed by results."""

    def save_to_dir(self, checkpoint_dir: str, session_str: str = "default") -> None:
        """Tune's state is never read."""

    def get_state(self) -> dict[str, Any]:
        return {}


class OptunaSearcher(ListSearcher):
    """Hands out the points that Optuna asks for. Optuna is first told the results from before a restart."""

    def __init__(self, trials: Trials, criterion: SelectionCriterion) -> None:
        super().__init__(trials, [i for i in trials.known if not trials.finished(i)])
        assert isinstance(trials.points, Optuna)
        self.search, self.criterion = trials.points, criterion
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.study = optuna.create_study(directions=["maximize", "minimize"])
        self.distributions = OptunaSearch.convert_search_space(dict(self.search.space))
        self.asked: dict[int, optuna.Trial] = {}
        self.numbers: dict[str, int] = {}  # Tune's name of a trial -> ours
        for i in sorted(trials.known):
            self.study.enqueue_trial(dict(trials.point(i)))
            self._ask(i)
            if trials.finished(i):
                self._tell(i, trials.row(i))

    def _ask(self, i: int) -> Point:
        # A sampler of its own for each point: what it draws depends on the trials before, not on when the sweep was
        # started.
        self.study.sampler = optuna.samplers.TPESampler(
            seed=self.search.seed + i, constraints_func=lambda trial: trial.user_attrs.get("excess", [0.0])
        )
        self.asked[i] = self.study.ask(self.distributions)
        return self.asked[i].params

    def _tell(self, i: int, metrics: Mapping[str, Any]) -> None:
        criterion, trial = self.criterion, self.asked.pop(i)
        trial.set_user_attr("excess", [*criterion.violations(metrics).values()])
        self.study.tell(trial, [metrics[criterion.maximize], metrics[criterion.minimize]])

    def suggest(self, trial_id: str) -> Any:
        new = len(self.trials.known)
        if not self.todo and new < self.search.trials and signals.requested(self.trials.folder) != Signal.PAUSE:
            point = self._ask(new)
            self.trials.add(new, point, self.trials.checked(point).config_hash)
            self.todo.append(new)
        suggested = super().suggest(trial_id)
        if suggested != Searcher.FINISHED:
            self.numbers[trial_id] = suggested["trial"]
        return suggested

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        i = self.numbers[trial_id]
        if error or result is None:
            self.study.tell(self.asked.pop(i), state=optuna.trial.TrialState.FAIL)
        else:
            self._tell(i, result)
