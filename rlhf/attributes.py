"""Objectives of several attributes: a measure for each, constraints for each, from one string."""

from collections.abc import Sequence

from rlhf.measures import RiskMeasure, RiskSpecError
from rlhf.objective import RiskObjective
from rlhf.population import DECAY
from rlhf.risk import parse_risk
from rlhf.schedules import RiskSchedule

# The key of the law that a reward model gives for an answer as a whole, beside those of its attributes.
WHOLE = ""


def build_objectives(
    risk: str | RiskMeasure,
    scope: str = "response",
    *,
    constraints: Sequence[str] = (),
    schedule: str | None = None,
    schedule_from: str | RiskMeasure = "mean",
    schedule_span: tuple[float, float] = (0.0, 1.0),
    decay: float = DECAY,
    constraint_step_size: float = 0.1,
    constraint_warmup: tuple[float, float] | None = None,
    constraint_start: float = 1.0,
    constraint_bounds: tuple[float, float] = (1e-3, 1e2),
) -> dict[str, RiskObjective]:
    """The objective of the answer as a whole, under `WHOLE`, or one per attribute, under its name.

    Args:
        risk, scope, constraints, schedule, schedule_from, schedule_span: as for `RiskReward`. An attribute may have a
            constraint and no measure.
        decay, constraint_step_size, constraint_warmup, constraint_start, constraint_bounds: as for `RiskObjective`.

    Raises:
        RiskSpecError: a spec that cannot be read, or a constraint on an attribute beside a measure of the whole.
    """
    measures: dict[str, str | RiskMeasure | None] = {WHOLE: risk}
    if isinstance(risk, str):
        measures = dict(split_attributes(risk))
    bounds: dict[str, list[str]] = {name: [] for name in measures}
    for spec in constraints:
        name, bound = attribute_of_constraint(spec)
        if (name == WHOLE) != (WHOLE in measures):
            known = ", ".join(f"'{known}=...'" for known in measures if known != WHOLE) or "no attribute"
            raise RiskSpecError(f"the constraint {spec!r} does not fit the risk, which speaks of {known}")
        bounds.setdefault(name, []).append(bound)
    if schedule is None and schedule_from != "mean":
        raise RiskSpecError(f"a start at {schedule_from!r} needs a schedule, 'linear' or 'cosine'")
    first = parse_risk(schedule_from) if isinstance(schedule_from, str) else schedule_from
    objectives = {}
    for name in bounds:
        spec = measures.get(name)
        last = parse_risk(spec) if isinstance(spec, str) else spec
        objectives[name] = RiskObjective(
            last,
            scope,
            constraints=bounds[name],
            schedule=None if schedule is None or last is None else RiskSchedule(first, last, schedule, *schedule_span),
            decay=decay,
            constraint_step_size=constraint_step_size,
            constraint_warmup=constraint_warmup,
            constraint_start=constraint_start,
            constraint_bounds=constraint_bounds,
        )
    return objectives


def split_attributes(risk: str) -> dict[str, str]:
    """`helpfulness=mean; harmlessness=cvar:0.05` by attribute; a plain spec under `WHOLE`.

    Raises:
        RiskSpecError: an attribute twice, or without a measure.
    """
    if "=" not in risk:
        return {WHOLE: risk}
    measures: dict[str, str] = {}
    for part in risk.split(";"):
        name, equals, spec = (piece.strip() for piece in part.partition("="))
        if not (name and equals and spec):
            raise RiskSpecError(f"cannot read {part.strip()!r} in {risk!r}; write 'attribute=measure; ...'")
        if name in measures:
            raise RiskSpecError(f"the attribute {name!r} has two measures in {risk!r}; add them up in one")
        measures[name] = spec
    return measures


def attribute_of_constraint(spec: str) -> tuple[str, str]:
    """`harmlessness=cvar:0.05 >= -1` -> attribute and bound; the sign of the bound holds an = too."""
    head, equals, rest = spec.partition("=")
    if equals and not head.rstrip().endswith(("<", ">")):
        return head.strip(), rest.strip()
    return WHOLE, spec
