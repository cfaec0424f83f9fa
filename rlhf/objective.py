"""What training climbs: a measure of risk in response or population scope, a schedule, constraints; with its state."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from reward.distribution import RewardDistribution
from reward.mixtures import tail_levels
from rlhf.constraints import DualAscent, Reading, parse_constraint
from rlhf.guards import RiskGuards
from rlhf.influence import check_population_scope, expected_influence, population_law, statistics
from rlhf.measures import RiskMeasure, RiskSpecError
from rlhf.population import DECAY, PopulationTracker
from rlhf.risk import parse_risk
from rlhf.schedules import RiskSchedule, check_span

SCOPES = ("response", "population")


class Learned(NamedTuple):
    """What `RiskObjective.learn` makes of a rollout.

    Attributes:
        utility: (N,), NaN for a law that is not finite. Of several objectives, the part of each in their sum.
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
        risk: measure or its spec; None has no objective of its own, only constraints.
        scope: "response" or "population".
        constraints: specs such as "cvar:0.05 >= -1.0"; see `rlhf.constraints`.
        schedule: from another measure to `risk` over training; its `last` must be `risk`.
        decay: of the population's law, see `PopulationTracker`.
        constraint_step_size: η of `DualAscent`.
        constraint_warmup: shares of training between which the multipliers come in, from 0 to their full size; None:
            they count in full from the start.
        constraint_start, constraint_bounds: first multiplier, and the lowest and highest ones, see `DualAscent`.

    Attributes:
        planned_steps: length of the run that the schedule and the warm-up are shares of, as far as it is known.

    Raises:
        RiskSpecError: a spec that cannot be read, or a measure without an influence function in population scope.
    """

    def __init__(
        self,
        risk: str | RiskMeasure | None = "mean",
        scope: str = "response",
        *,
        constraints: Sequence[str] = (),
        schedule: RiskSchedule | None = None,
        decay: float = DECAY,
        constraint_step_size: float = 0.1,
        constraint_warmup: tuple[float, float] | None = None,
        constraint_start: float = 1.0,
        constraint_bounds: tuple[float, float] = (1e-3, 1e2),
    ):
        self.measure = parse_risk(risk) if isinstance(risk, str) else risk
        if scope not in SCOPES:
            raise RiskSpecError(f"the scope of a risk measure is 'response' or 'population', got {scope!r}")
        self.scope, self.schedule = scope, schedule
        if constraint_warmup is not None:
            check_span("a warm-up of constraints", *constraint_warmup)
        self.warmup = constraint_warmup
        if scope == "population" and self.measure is not None:
            for measure in (self.measure, *([schedule.first] if schedule else [])):
                check_population_scope(measure)
        self.tracker = PopulationTracker(decay)
        self.dual = DualAscent(
            [parse_constraint(spec) for spec in constraints],
            constraint_step_size,
            constraint_start,
            tuple(constraint_bounds),
        )
        self.planned_steps: int | None = None
        self.guards = RiskGuards()

    @property
    def spec(self) -> str:
        """The whole objective in one line."""
        if self.measure is None:
            text = "no measure"
        else:
            text = self.schedule.spec if self.schedule else self.measure.spec
            if self.scope == "population":
                text = f"population {text}"
        text += "".join(f"; {constraint.spec}" for constraint in self.dual.constraints)
        if self.warmup and self.dual.constraints:
            text += f" (warm-up {self.warmup[0]:g} to {self.warmup[1]:g})"
        return text

    def at(self, progress: float | None) -> RiskMeasure | None:
        """The measure at a share of training.

        Raises:
            ValueError: a schedule, but nobody says how far training is.
        """
        if self.schedule is None:
            return self.measure
        if progress is None:
            raise ValueError("a risk schedule needs to know how far training is; use it with a trainer")
        return self.schedule.at(progress)

    def ramp(self, progress: float | None) -> float:
        """Share of the multipliers that counts at a share of training.

        Raises:
            ValueError: a warm-up, but nobody says how far training is.
        """
        if self.warmup is None:
            return 1.0
        if progress is None:
            raise ValueError("a warm-up of constraints needs to know how far training is; use it with a trainer")
        begin, end = self.warmup
        return min(max((progress - begin) / (end - begin), 0.0), 1.0)

    def learn(self, laws: RewardDistribution, groups: Tensor | None = None, progress: float | None = None) -> Learned:
        """Utilities of a rollout of training; updates statistics and multipliers.

        Args:
            laws: (N,) of the answers of all ranks, in the order of the ranks. A law that is not finite has no say.
            groups: (N,) number of each answer's prompt, for the intervals; None: each answer its own.
            progress: share of training done; only a schedule or a warm-up needs it.

        Returns:
            The same on every rank that passes the same laws.
        """
        return learn_together({"": self}, {"": laws}, groups, progress)[""]

    def evaluate(self, laws: RewardDistribution, progress: float | None = None) -> Tensor:
        """(n,) utilities by the statistics so far; nothing is updated.

        Before the first rollout of training the laws themselves are the population.
        """
        return evaluate_together({"": self}, {"": laws}, progress)[""]

    def plan(self, step: int, max_steps: int) -> list[str]:
        """A warning where the run has become longer or shorter, so that a schedule or a warm-up jumps.

        Args:
            step, max_steps: of the trainer.
        """
        before, self.planned_steps = self.planned_steps, max_steps
        moving = self.schedule is not None or (self.warmup is not None and bool(self.dual.constraints))
        if before in (None, max_steps) or not moving:
            return []
        return [
            f"this run was to end after {before} steps and now ends after {max_steps}: '{self.spec}' goes by the "
            f"share of training that is done, which jumps from {min(step / before, 1):.3g} to "
            f"{step / max_steps:.3g}. Resume with max_steps {before}, or start anew."
        ]

    def _objective(self, laws: RewardDistribution, progress: float | None) -> Tensor:
        """u₀ of each answer, (N,); NaN for a law that is not finite."""
        measure, finite = self.at(progress), laws.values.isfinite().all(-1)
        found = laws.values.new_full(laws.batch_shape, torch.nan)
        if bool(finite.any()):
            laws = laws[finite]
            if measure is None:
                found[finite] = 0.0
            elif self.scope == "response":
                found[finite] = measure(laws)
            else:
                known = statistics(measure, self._law(laws))
                found[finite] = expected_influence(measure, laws, known).to(found.dtype)
        return found

    def _pull(self, laws: RewardDistribution, progress: float | None) -> tuple[Tensor, float]:
        """What the constraints add to each answer, (N,), 0 for a law that is not finite; and how large that is."""
        found, finite = laws.values.new_zeros(laws.batch_shape), laws.values.isfinite().all(-1)
        if not (self.dual.constraints and bool(finite.any())):
            return found, 0.0
        laws = laws[finite]
        found[finite], size = self.dual.pull(laws, self._law(laws), self.ramp(progress))
        return found, size

    def _report(
        self,
        laws: RewardDistribution,
        population: RewardDistribution,
        worth: Tensor,
        groups: Tensor | None,
        progress: float | None,
    ) -> tuple[dict[str, float], list[str], list[str], list[Reading]]:
        """Numbers, lines, warnings and readings of a rollout of finite laws, before the multipliers move.

        Args:
            worth: (N,) u₀ with what the constraints add.
        """
        measure, ramp = self.at(progress), self.ramp(progress)
        numbers = self._population_numbers(population, measure)
        readings = self.dual.read(population, laws, groups)
        numbers |= self._constraint_numbers(readings, ramp)
        # A law of one level is a point by choice, and has no tail to miss.
        lowest = float(laws.levels[0]) if len(laws.levels) > 1 else 0.0
        guarded, warnings = self.guards.look(
            measure,
            self.scope,
            worth,
            laws.mean(),
            lowest,
            settled=self.schedule is None or self.schedule.weight(progress) == 1,
            constraints=[constraint.measure for constraint in self.dual.constraints],
        )
        return numbers | guarded, self._constraint_lines(readings, len(laws), ramp), warnings, readings

    def _law(self, laws: RewardDistribution) -> RewardDistribution:
        """The population so far; before the first rollout the laws themselves."""
        return _population(laws) if self.tracker.law is None else self.tracker.law

    def _population_numbers(self, population: RewardDistribution, measure: RiskMeasure | None) -> dict[str, float]:
        """What can be said of the population whatever the measure is, and the statistics in use."""
        numbers = {
            "population/rating_mean": population.mean().item(),
            "population/rating_q05": population.quantile(0.05).item(),
            "population/rating_cvar_0.1": population.lower_tail_mean(0.1).item(),
        }
        if self.scope == "population" and measure is not None:
            for name, value in statistics(measure, self.tracker.law).items():
                # Where a schedule moves the numbers of a measure its name changes; that of its statistic does not.
                short = name.split("/")[-1] if self.schedule and not self.schedule.mixes else name
                if value.numel() == 1:
                    numbers[f"risk/{short}"] = value.item()
                elif name.endswith("/nu"):
                    numbers |= {f"risk/{short}_{place}": nu for place, nu in enumerate(value.tolist(), start=1)}
        return numbers

    def _constraint_numbers(self, readings: Sequence[Reading], ramp: float) -> dict[str, float]:
        numbers = {}
        for constraint, multiplier, reading in zip(
            self.dual.constraints, self.dual.multipliers, readings, strict=True
        ):
            name = f"constraint/{constraint.name}"
            numbers |= {f"{name}/value": reading.value, f"{name}/multiplier": multiplier}
            numbers[f"{name}/effective_multiplier"] = ramp * multiplier
            if not math.isnan(reading.low):
                numbers |= {f"{name}/low": reading.low, f"{name}/high": reading.high}
            numbers[f"{name}/holds"] = {"holds": 1.0, "undecided": 0.5, "violated": 0.0}[reading.state]
        return numbers

    def _constraint_lines(self, readings: Sequence[Reading], answers: int, ramp: float) -> list[str]:
        warming = f", of which {ramp:.2g} counts so far" if ramp < 1 else ""
        return [
            f"constraint {constraint.spec}: {reading.state}, now {reading.value:.3g} "
            f"[{reading.low:.3g}, {reading.high:.3g}] over {answers} answers, multiplier {multiplier:.3g}{warming}"
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
            "planned_steps": self.planned_steps,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue from what `state_dict` gave.

        Raises:
            ValueError: the state belongs to another objective.
        """
        if state["objective"] != self.spec:
            raise ValueError(f"the checkpoint was trained on '{state['objective']}', this run on '{self.spec}'")
        self.tracker.load_state_dict(state["population"])
        # Checkpoints before the finer levels of the tails hold 400: their tail is as blurred as it was, and forgotten.
        self.tracker.bring_to(tail_levels())
        self.dual.load_state_dict(state["dual"])
        self.guards.load_state_dict(state["guards"])
        self.planned_steps = state.get("planned_steps")


def learn_together(
    objectives: Mapping[str, RiskObjective],
    laws: Mapping[str, RewardDistribution],
    groups: Tensor | None = None,
    progress: float | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Learned]:
    """A rollout of several objectives, one per attribute, whose utilities are added up.

        u = (Σₐ wₐ u₀ₐ + Σᵢ λᵢ uᵢ) / (1 + Σᵢ λᵢ sᵢ/s₀),    s₀: standard deviation of Σₐ wₐ u₀ₐ

    One answer's weights say whose wishes it serves. They do not touch the constraints, which speak of all answers.

    Args:
        objectives: by attribute.
        laws: (N,) of each attribute, of the answers of all ranks.
        groups, progress: as for `RiskObjective.learn`.
        weights: (N,) of each attribute, how much its measure counts for an answer; None: 1.

    Returns:
        By attribute; the utilities of all add up to that of the answer.
    """
    populations = {}
    for name, objective in objectives.items():
        finite = laws[name].values.isfinite().all(-1)
        if bool(finite.any()):
            populations[name] = _population(laws[name][finite])
            objective.tracker.update(populations[name])
    own, pulls, shares, together = _shares(objectives, laws, progress, weights)
    learned = {}
    for name, objective in objectives.items():
        if name not in populations:
            learned[name] = Learned(shares[name], {}, [], [])
            continue
        finite = laws[name].values.isfinite().all(-1)
        of_finite = None if groups is None else groups[finite]
        numbers, lines, warnings, readings = objective._report(
            laws[name][finite], populations[name], (own[name] + pulls[name])[finite], of_finite, progress
        )
        objective.dual.step(together, readings, objective.ramp(progress))
        learned[name] = Learned(shares[name], numbers, lines, warnings)
    return learned


def evaluate_together(
    objectives: Mapping[str, RiskObjective],
    laws: Mapping[str, RewardDistribution],
    progress: float | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """(n,) utilities by attribute as `learn_together` gives them, by the statistics so far; nothing is updated."""
    return _shares(objectives, laws, progress, weights)[2]


def _shares(
    objectives: Mapping[str, RiskObjective],
    laws: Mapping[str, RewardDistribution],
    progress: float | None,
    weights: Mapping[str, Tensor] | None,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Objectives, constraint parts and utilities by attribute, and the weighted sum of the objectives; (N,) each."""
    own = {name: objective._objective(laws[name], progress) for name, objective in objectives.items()}
    weighed = {
        name: worth if weights is None else worth * weights[name].to(worth.dtype) for name, worth in own.items()
    }
    together = torch.stack(list(weighed.values())).sum(dim=0)
    pulls, size = {}, 0.0
    for name, objective in objectives.items():
        pulls[name], of_attribute = objective._pull(laws[name], progress)
        size += of_attribute
    # Every objective remembers the spread of the same sum.
    size = next(iter(objectives.values())).dual.size_beside(together, size)
    return own, pulls, {name: (weighed[name] + pulls[name]) / size for name in own}, together


def _population(laws: RewardDistribution) -> RewardDistribution:
    if len(laws) == 1:
        # One law alone would stay on its own few levels, and the tracker could not average it with others.
        laws = laws[torch.tensor([0, 0])]
    return population_law(laws.to(torch.float64))
