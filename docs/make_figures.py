"""Draw the picture of the README, two answers with one mean and two tails, and those of the guides in docs/.

.venv/bin/python docs/make_figures.py

The pictures of measures carry their curves as numbers, by which a test knows a picture that the code has left behind.
"""

import json
from pathlib import Path

import matplotlib
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from eval.risk_figures import draw_influence, draw_weights, rank_weights, tenths
from reward.distribution import RewardDistribution
from reward.mixtures import mixture, normal_law, quantile_average
from rlhf.influence import expected_influence, statistics
from rlhf.risk import parse_risk

LEVELS = torch.linspace(0, 1, 21)[1:-1]
# Ratings on the embedded data's scale, -4 to 4. The divisive answer is liked by most and hated by some.
SAFE = [-0.6, -0.3, -0.1, -0.1, 0.1, 0.25, 0.4, 0.5, 0.6, 0.7, 0.7, 0.8, 0.9, 1.0, 1.1, 1.1, 1.2, 1.35, 1.5]
DIVISIVE = [-3.6, -3.1, -3.1, -2.4, -1.0, -1.0, 0.3, 0.7, 0.7, 1.0, 1.2, 1.2, 1.35, 1.5, 1.5, 1.6, 1.7, 1.7, 1.8]
ANSWERS = {"safe answer": torch.tensor(SAFE), "divisive answer": torch.tensor(DIVISIVE)}
COLOURS = {"safe answer": "#0072B2", "divisive answer": "#D55E00"}


IMAGES = Path(__file__).parent / "images"
PANELS = ["quantile:0.1", "cvar:0.1", "spectral:0.7@1,0.3@0.1", "mean_variance:0.3", "mean_std:1", "semideviation:1"]
PANELS += ["entropic:1", "expectile:0.1", "below:-1", "wang:0.75", "power:2", "cpw:0.71"]
# Under this name a PNG holds the numbers of its curves.
CURVES = "Curves"
# Ten times the usual, so that the ends of the curves are smooth.
DENSE = 4000


def main() -> None:
    """Write every picture."""
    draw_why_risk()
    draw_mixture()
    draw_risk_weights()
    draw_influences()


def draw_why_risk() -> None:
    """Write docs/images/why_risk.png."""
    laws = {name: RewardDistribution(LEVELS, values) for name, values in ANSWERS.items()}
    # The same mean to the last digit, so that nothing but the tail differs.
    shift = laws["safe answer"].mean() - laws["divisive answer"].mean()
    laws["divisive answer"] = RewardDistribution(LEVELS, ANSWERS["divisive answer"] + shift)
    figure, axes = plt.subplots(figsize=(7.2, 3.4), dpi=150)
    for name, law in laws.items():
        mean, tail = law.mean().item(), parse_risk("cvar:0.1")(law).item()
        label = f"{name}: mean {mean:.2f}, cvar:0.1 {tail:.2f}"
        axes.plot(LEVELS, law.values, "o-", color=COLOURS[name], markersize=4, label=label)
        axes.plot([0, 0.1], [tail, tail], color=COLOURS[name], linewidth=5, alpha=0.5, solid_capstyle="butt")
    axes.axhline(laws["safe answer"].mean().item(), color="0.5", linewidth=1, linestyle="--")
    axes.axvspan(0, 0.1, color="0.5", alpha=0.12, linewidth=0)
    axes.text(0.11, -3.75, "the worst tenth of readers", color="0.35", fontsize=9, va="bottom")
    axes.set_xlabel("share of readers, unhappiest first (quantile level)")
    axes.set_ylabel("rating (-4 to 4)")
    axes.set_xlim(0, 1)
    axes.set_ylim(-4, 4)
    axes.legend(frameon=False, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(IMAGES / "why_risk.png")


def draw_mixture() -> None:
    """Write docs/images/mixture.png: two attributes, their same-level sum and their mixture."""
    attributes = [normal_law(torch.tensor(mean), torch.tensor(0.5), DENSE) for mean in (-2.0, 2.0)]
    laws = {
        "quantile_average": (quantile_average(attributes, [0.5, 0.5]), "#0072B2"),
        "mixture": (mixture(attributes, [0.5, 0.5], DENSE), "#D55E00"),
    }
    grid = torch.linspace(-4, 4, 161)
    centres = (grid[1:] + grid[:-1]) / 2
    figure, axes = plt.subplots(figsize=(7.2, 3.0), dpi=150)
    for attribute in attributes:
        axes.plot(centres, attribute.cdf(grid[:, None]).flatten().diff() / grid.diff(), color="0.6", linestyle="--")
    for name, (law, colour) in laws.items():
        density = law.cdf(grid[:, None]).flatten().diff() / grid.diff()
        tail = parse_risk("cvar:0.1")(law).item()
        axes.fill_between(centres, density, color=colour, alpha=0.25, linewidth=0)
        axes.plot(
            centres, density, color=colour, label=f"{name}: mean {abs(law.mean().item()):.0f}, cvar:0.1 {tail:.2f}"
        )
    axes.plot([], [], color="0.6", linestyle="--", label="the two attributes, weight 0.5 each")
    axes.set_xlabel("rating")
    axes.set_ylabel("density")
    axes.set_xlim(-4, 4)
    axes.set_ylim(0, 1.2)
    axes.legend(frameon=False, loc="upper left", ncols=1, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(IMAGES / "mixture.png")


def draw_risk_weights() -> None:
    """Write docs/images/risk_weights.png: the weight that each measure gives to each rank of one divisive law."""
    figure, axes = plt.subplots(4, 3, figsize=(7.2, 7.6), dpi=150, sharex=True, sharey=True)
    for ax, spec in zip(axes.ravel(), PANELS, strict=True):
        draw_weights(ax, parse_risk(spec), two_camps())
        ax.set(ylim=(-1, 6), yticks=(0, 2, 4, 6))
    figure.supxlabel("share of readers, unhappiest first", fontsize=9)
    figure.supylabel("weight of a rank (dashed: the mean's)", fontsize=9)
    figure.tight_layout()
    figure.savefig(IMAGES / "risk_weights.png", metadata={CURVES: json.dumps(weight_curves())})


def draw_influences() -> None:
    """Write docs/images/risk_influence.png: what a sure rating is worth to each measure of that law."""
    figure, axes = plt.subplots(4, 3, figsize=(7.2, 7.6), dpi=150, sharex=True)
    for ax, spec in zip(axes.ravel(), PANELS, strict=True):
        draw_influence(ax, parse_risk(spec), two_camps(), torch.linspace(-4, 4, 1601).tolist())
        if spec.startswith("below"):
            ax.set_ylim(-2, 2)
        else:
            ax.set_ylim(-16, 5)
    figure.supxlabel("rating", fontsize=9)
    figure.supylabel("worth of one more such rating (dashed: the rating itself)", fontsize=9)
    figure.tight_layout()
    figure.savefig(IMAGES / "risk_influence.png", metadata={CURVES: json.dumps(influence_curves())})


def weight_curves() -> dict[str, list[float]]:
    """By measure, the weight of each tenth of readers."""
    law = two_camps()
    return {spec: [round(float(w), 5) for w in tenths(rank_weights(parse_risk(spec), law)[1])] for spec in PANELS}


def influence_curves() -> dict[str, list[float]]:
    """By measure, the worth of a sure rating at -4, -3.5, ..., 4."""
    population, measures = two_camps(), {spec: parse_risk(spec) for spec in PANELS}
    sure = RewardDistribution([0.5], torch.linspace(-4, 4, 17, dtype=torch.float64).unsqueeze(-1))
    worth = {spec: expected_influence(m, sure, statistics(m, population)) for spec, m in measures.items()}
    return {spec: [round(value, 5) for value in values.tolist()] for spec, values in worth.items()}


def two_camps() -> RewardDistribution:
    """Four in five readers around 1, the others around -2."""
    camps = [normal_law(torch.tensor(mean).double(), torch.tensor(0.6).double(), DENSE) for mean in (1.0, -2.0)]
    return mixture(camps, [0.8, 0.2], DENSE)


if __name__ == "__main__":
    main()
