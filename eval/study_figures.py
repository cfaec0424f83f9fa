"""Pictures of trained arms and of best policies: extremely negative rate against KL and against mean rating."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from eval.figures import MARKERS, PERCENT

# Okabe and Ito's colours, which stay apart for colour-blind readers; the base is where all start, hence grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8B6914")
START = "#888888"
PANELS = (("kl", "KL to the base, nats per completion"), ("mean", "mean rating"))
RATE = "extremely_negative_rate"


def study_figure(rows: Sequence[Mapping[str, Any]], arms: Sequence[Mapping[str, Any]], base: str = "base") -> Figure:
    """Rate against KL and against mean rating: seeds small and pale, all seeds of an arm large, with intervals.

    Args:
        rows: One per arm and seed, see `study_report.study_row`.
        arms: One per arm, see `study.pooled`; their order gives colour and marker.
        base: The arm drawn in grey.
    """
    figure = Figure(figsize=(9.6, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots(1, 2, sharey=True)
    others = [entry["arm"] for entry in arms if entry["arm"] != base]
    for ax, (metric, label) in zip(axes, PANELS, strict=True):
        for entry in arms:
            if entry[metric] is None:
                continue
            i = others.index(entry["arm"]) if entry["arm"] in others else -1
            colour = START if i < 0 else COLOURS[i % len(COLOURS)]
            seeds = [row for row in rows if row["arm"] == entry["arm"] and row["seed"] is not None]
            _points(ax, entry, seeds, metric, colour, MARKERS[i % len(MARKERS)])
        _frame(ax, label)
    axes[0].set_ylabel("extremely negative completions")
    handles, labels = axes[0].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right upper", frameon=False, fontsize=9)
    return figure


def tilt_figure(rows: Sequence[Mapping[str, Any]], laws: str = "reward model") -> Figure:
    """The path of the best policies under each measure, as the KL that they may spend grows.

    Args:
        rows: `tilts` of compare_risk.json; those that were refused are left out.
        laws: By whose laws the measures look: "reward model" or "judge".

    Raises:
        ValueError: No row to draw.
    """
    kept = [row for row in rows if row["laws"] == laws and "outcomes" in row]
    if not kept:
        raise ValueError(f"there is no best policy by the laws of the {laws} to draw")
    figure = Figure(figsize=(9.6, 4.2), layout="constrained", dpi=150)
    axes = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(dict.fromkeys(row["measure"] for row in kept)):
        path = sorted((row for row in kept if row["measure"] == name), key=lambda row: row["kl"])
        style = {
            "color": START if name == "mean" else COLOURS[(i - 1) % len(COLOURS)],
            "marker": MARKERS[i % len(MARKERS)],
        }
        rates = [row["outcomes"]["rate"] for row in path]
        axes[0].plot([row["kl"] for row in path], rates, label=name, markersize=5, **style)
        axes[1].plot([row["outcomes"]["mean"] for row in path], rates, markersize=5, **style)
    for ax, (_, label) in zip(axes, PANELS, strict=True):
        _frame(ax, label)
    axes[0].set_ylabel("extremely negative completions")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False, fontsize=9)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a PNG, and the folder it stands in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _frame(ax: Axes, label: str) -> None:
    """A panel of rates, from 0 upwards."""
    ax.set(xlabel=label, ylim=(0, None))
    ax.yaxis.set_major_formatter(PERCENT)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", linewidth=0.7)
    ax.set_axisbelow(True)


def _points(
    ax: Axes, entry: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]], metric: str, colour: str, marker: str
) -> None:
    if len(seeds) > 1:
        style = {"color": colour, "marker": marker, "markersize": 4, "linestyle": "none", "alpha": 0.45}
        ax.plot([row[metric] for row in seeds], [row[RATE] for row in seeds], label="_seeds", **style)
    x, y = entry[metric], entry[RATE]
    # The bars are drawn from their ends: as lengths they could round to something below zero.
    ax.plot(entry[f"{metric}_ci"], [y, y], color=colour, linewidth=1.2, label="_across")
    ax.plot([x, x], entry[f"{RATE}_ci"], color=colour, linewidth=1.2, label="_upright")
    name = entry["arm"].replace("_", " ")
    ax.plot([x], [y], color=colour, marker=marker, markersize=8, linestyle="none", label=name, clip_on=False)
