"""What a risk measure makes of one answer: its utility, and the weight that each part of the readers gets.

    python recipes/show_risk.py --reward_model runs/quickstart/qrm --risk cvar:0.1 entropic:1 --text "A fine film."

Prints a table of measures, ratings and weights by tenths of readers, and writes the picture `--output_file`.
"""

import textwrap
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from eval.risk_figures import NUM_RANKS, rank_weights, risk_figure, save, tenths
from reward.distribution import RewardDistribution
from rlhf.command_line import run
from rlhf.reward_function import RiskReward
from rlhf.risk import RiskMeasure, parse_risk


@dataclass
class ShowArguments:
    """Which measures, of which text."""

    reward_model: str = field(
        default=None,
        metadata={"help": "Reward model: a folder, a hub id or another source, as in ppo.py (required)."},
    )
    text: str = field(default=None, metadata={"help": "The text, or the answer to --prompt (required)."})
    prompt: str = field(default="", metadata={"help": "What the text answers, if anything."})
    risk: list[str] = field(
        default_factory=lambda: ["cvar:0.1"], metadata={"help": "Risk measures as in ppo.py, one or several."}
    )
    output_file: str = field(default="risk.png", metadata={"help": "PNG to write."})
    dtype: str = field(default="auto", metadata={"help": "Dtype of the reward model's weights."})
    max_length: int | None = field(default=None, metadata={"help": "Most tokens of the text. Unset: the context."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow models that ship their own Python code."})


def main(show: ShowArguments) -> None:
    """Check, ask the reward model, print and draw."""
    try:
        measures = check_arguments(show)
        law = predicted_law(show)
        print(risk_table(measures, law), flush=True)
        title = textwrap.shorten(show.prompt + show.text, 90)
        save(risk_figure(measures, law, title), Path(show.output_file))
    except (ValueError, OSError) as error:
        # Everything here is about the input, and the message says all.
        raise SystemExit(f"error: {error}") from None
    print(f"\n{show.output_file}")


def check_arguments(show: ShowArguments) -> list[RiskMeasure]:
    """Refuse what could not work before anything is loaded; the measures of --risk."""
    for name in ("reward_model", "text"):
        if not getattr(show, name):
            raise ValueError(f"--{name} is required.")
    if Path(show.output_file).suffix.lower() != ".png":
        raise ValueError(f"output_file is a PNG, got {show.output_file!r}; give it the ending .png")
    measures = [parse_risk(spec) for spec in show.risk]
    if not measures:
        raise ValueError("--risk names at least one measure.")
    return measures


def predicted_law(show: ShowArguments) -> RewardDistribution:
    """The law of ratings of the text, batch shape ()."""
    reading = {"dtype": show.dtype, "max_length": show.max_length, "trust_remote_code": show.trust_remote_code}
    reward = RiskReward(show.reward_model, risk=show.risk[0], **reading)
    with torch.no_grad():
        law = reward.distribution([show.prompt], [show.text])[0]
    if not bool(law.values.isfinite().all()):
        raise ValueError(f"{show.reward_model} predicts no finite law for this text")
    return law


def risk_table(measures: list[RiskMeasure], law: RewardDistribution) -> str:
    """Ratings and weights by tenths of readers, one line per measure."""
    law = law.to(torch.float64)
    ranks = (torch.arange(NUM_RANKS, dtype=torch.float64) + 0.5) / NUM_RANKS
    ratings = law.quantile(ranks).reshape(10, -1).mean(dim=1)
    width = max(len("tenths of readers"), *(len(measure.spec) for measure in measures))
    head = "".join(f"{tenth:>7}" for tenth in ("worst", *range(2, 10), "best"))
    lines = [f"{'tenths of readers':{width}}{'utility':>9}{head}"]
    lines.append(f"{'their ratings':{width}}{'':9}" + "".join(f"{rating:+7.2f}" for rating in ratings.tolist()))
    for measure in [parse_risk("mean"), *measures]:
        weights = 100 * tenths(rank_weights(measure, law)[1])
        # Adding 0 turns a rounded -0 into 0.
        shares = "".join(f"{share:6.0f}%" for share in np.round(weights) + 0.0)
        lines.append(f"{measure.spec:{width}}{measure(law).item():+9.2f}{shares}")
    return "\n".join(lines)


GROUPS = (ShowArguments,)

if __name__ == "__main__":
    run(main, GROUPS, __doc__)
