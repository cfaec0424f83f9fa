"""What training climbs: a measure of risk in response or population scope, a schedule, constraints; with its state."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reward.distribution import RewardDistribution
from rlhf.constraints import DualAscent, Reading, parse_constraint
from rlhf.guards import RiskGuards
from rlhf.influence import check_population_scope, expected_influence, population_law, statistics
from rlhf.measures import RiskMeasure, RiskSpecError
from rlhf.population import DECAY, PopulationTracker
from rlhf.risk import parse_risk
from rlhf.schedules import RiskSchedule

SCOPES = ("response", "population")


class Learned(NamedTuple):
    """What `RiskObjective.learn` makes of a rollout.

    Attributes:
        utility: (N,), NaN for a law that is not finite.
        numbers: for the log, by name.
        lines: whether each constraint holds, in words.
        warnings: that are due.
    """

    utility: Tensor
    numbers: dict[str, float]
    lines: list[str]
    warnings: list[str]


class RiskObjective:
    """Utility of each answer of a rollout under a measure of risk.

        response:    u(x, y) = ρ(F_xy)
        population:  u(x, y) = ρ(F̄) + ∫ IF(z; F̄) dF_xy(z)

    F̄ is the law of ratings over prompts, answers and readers, averaged over steps (`PopulationTracker`). Constraints
    always speak of the population; their multipliers enter the utility of every answer in either scope.

    Everything is computed from the laws of all ranks in one order, so the world size does not change it.

    Args:
        risk: measure or its spec.
        scope: "response" or "population".
        constraints: specs such as "cvar:0.05 >= -1.0"; see `rlhf.constraints`.
        schedule: from another measure to `risk` over training; its `last` must be `risk`.
        decay: of the population's law, see `PopulationTracker`.
        constraint_step_size: η of `DualAscent`.

    Raises:
        RiskSpecError: a spec that cannot be read, or a measure without an influence function in population scope.
    """

    def __init__(
        self,
        risk: str | RiskMeasure = "mean",
        scope: str = "response",
        *,
        constraints: Sequence[str] = (),
        schedule: RiskSchedule | None = None,
        decay: float = DECAY,
        constraint_step_size: float = 0.1,
    ):
        self.measure = parse_risk(risk) if isinstance(risk, str) else risk
        if scope not in SCOPES:
            raise RiskSpecError(f"the scope of a risk measure is 'response' or 'population', got {scope!r}")
        self.scope, self.schedule = scope, schedule
        if scope == "population":
            for measure in (self.measure, *([schedule.first] if schedule else [])):
                check_population_scope(measure)
        self.tracker = PopulationTracker(decay)
        self.dual = DualAscent([parse_constraint(spec) for spec in constraints], constraint_step_size)
        self.guards = RiskGuards()

    @property
    def spec(self) -> str:
        """The whole objective in one line."""
        text = self.schedule.spec if self.schedule else self.measure.spec
        if self.scope == "population":
            text = f"population {text}"
        return text + "".join(f"; {constraint.spec}" for constraint in self.dual.constraints)

    def at(self, progress: float | None) -> RiskMeasure:
        """The measure at a share of training.

        Raises:
            ValueError: a schedule, but nobody says how far training is.
        """
        if self.schedule is None:
            return self.measure
        if progress is None:
            raise ValueError("a risk schedule needs to know how far training is; use it with a trainer")
        return self.schedule.at(progress)

    def learn(self, laws: RewardDistribution, groups: Tensor | None = None, progress: float | None = None) -> Learned:
        """Utilities of a rollout of training; updates statistics and multipliers.

        Args:
            laws: (N,) of the answers of all ranks, in the order of the ranks. A law that is not finite has no say.
            groups: (N,) number of each answer's prompt, for the intervals; None: each answer its own.
            progress: share of training done; only a schedule needs it.

        Returns:
            The same on every rank that passes the same laws.
        """
        measure, ramp = self.at(progress), self._ramp(progress)
        finite = laws.values.isfinite().all(-1)
        utility = laws.values.new_full(laws.batch_shape, torch.nan)
        if not bool(finite.any()):
            return Learned(utility, {}, [], [])
        laws, groups = laws[finite], None if groups is None else groups[finite]
        population = _population(laws)
        self.tracker.update(population)
        objective = self._objective(laws, measure)
        utility[finite] = found = self._with_constraints(objective, laws, ramp)
        numbers = self._population_numbers(population, measure)
        readings = self.dual.read(population, laws, groups)
        numbers |= self._constraint_numbers(readings)
        lines = self._constraint_lines(readings, len(laws))
        # A law of one level is a point by choice, and has no tail to miss.
        lowest = float(laws.levels[0]) if len(laws.levels) > 1 else 0.0
        guarded, warnings = self.guards.look(measure, self.scope, found, laws.mean(), lowest)
        self.dual.step(objective, readings)
        return Learned(utility, numbers | guarded, lines, warnings)

    def evaluate(self, laws: RewardDistribution, progress: float | None = None) -> Tensor:
        """(n,) utilities by the statistics so far; nothing is updated.

        Before the first rollout of training the laws themselves are the population.
        """
        finite = laws.values.isfinite().all(-1)
        utility = laws.values.new_full(laws.batch_shape, torch.nan)
        if bool(finite.any()):
            objective = self._objective(laws[finite], self.at(progress))
            utility[finite] = self._with_constraints(objective, laws[finite], self._ramp(progress))
        return utility

    def _ramp(self, progress: float | None) -> float:
        return self.schedule.weight(progress) if self.schedule else 1.0

    def _objective(self, laws: RewardDistribution, measure: RiskMeasure) -> Tensor:
        if self.scope == "response":
            return measure(laws)
        return expected_influence(measure, laws, statistics(measure, self._law(laws))).to(laws.values.dtype)

    def _with_constraints(self, objective: Tensor, laws: RewardDistribution, ramp: float) -> Tensor:
        return self.dual.utility(objective, laws, self._law(laws), ramp) if self.dual.constraints else objective

    def _law(self, laws: RewardDistribution) -> RewardDistribution:
        """The population so far; before the first rollout the laws themselves."""
        return _population(laws) if self.tracker.law is None else self.tracker.law

    def _population_numbers(self, population: RewardDistribution, measure: RiskMeasure) -> dict[str, float]:
        """What can be said of the population whatever the measure is, and the statistics in use."""
        numbers = {
            "population/rating_mean": population.mean().item(),
            "population/rating_q05": population.quantile(0.05).item(),
            "population/rating_cvar_0.1": population.lower_tail_mean(0.1).item(),
        }
        if self.scope == "population":
            for name, value in statistics(measure, self.tracker.law).items():
                if value.numel() == 1:
                    # The name of a scheduled measure changes; that of its statistic does not.
                    numbers[f"risk/{name.split('/')[-1] if self.schedule else name}"] = value.item()
        return numbers

    def _constraint_numbers(self, readings: Sequence[Reading]) -> dict[str, float]:
        numbers = {}
        for constraint, multiplier, reading in zip(
            self.dual.constraints, self.dual.multipliers, readings, strict=True
        ):
            name = f"constraint/{constraint.name}"
            numbers |= {f"{name}/value": reading.value, f"{name}/multiplier": multiplier}
            if not math.isnan(reading.low):
                numbers |= {f"{name}/low": reading.low, f"{name}/high": reading.high}
            numbers[f"{name}/holds"] = {"holds": 1.0, "undecided": 0.5, "violated": 0.0}[reading.state]
        return numbers

    def _constraint_lines(self, readings: Sequence[Reading], answers: int) -> list[str]:
        return [
            f"constraint {constraint.spec}: {reading.state}, now {reading.value:.3g} "
            f"[{reading.low:.3g}, {reading.high:.3g}] over {answers} answers, multiplier {multiplier:.3g}"
            for constraint, multiplier, reading in zip(
                self.dual.constraints, self.dual.multipliers, readings, strict=True
            )
        ]

    def state_dict(self) -> dict[str, object]:
        """Statistics, multipliers and guards as plain numbers, for a checkpoint."""
        return {
            "objective": self.spec,
            "population": self.tracker.state_dict(),
            "dual": self.dual.state_dict(),
            "guards": self.guards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: the state belongs to another objective.
        """
        if state["objective"] != self.spec:
            raise ValueError(f"the checkpoint was trained on '{state['objective']}', this run on '{self.spec}'")
        self.tracker.load_state_dict(state["population"])
        self.dual.load_state_dict(state["dual"])
        self.guards.load_state_dict(state["guards"])


def _population(laws: RewardDistribution) -> RewardDistribution:
    if len(laws) == 1:
        # One law alone would stay on its own few levels, and the tracker could not average it with others.
        laws = laws[torch.tensor([0, 0])]
    return population_law(laws).to(torch.float64)
