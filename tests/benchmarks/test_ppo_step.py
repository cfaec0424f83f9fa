"""What `benchmarks/ppo_step.py` computes from its measurements, and the stopwatch that makes them."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def load(path: str) -> ModuleType:
    """A module of the benchmarks, which are scripts and no package."""
    name = f"benchmark_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


steps, stopwatch = load("step_comparison.py"), load("peers/stopwatch.py")


def a_run(
    *seconds: float, tokens: int = 30, memory: int = 100, warm_up: float = 50.0, operations: float = 0.0
) -> dict:
    """A run whose steps take these seconds after the warm-up, one of them generation and the rest update."""
    return {
        "steps": [{"generation": 1.0, "update": total - 1.0} for total in (50.0, *seconds)],
        "tokens": [tokens] * (len(seconds) + 1),
        "arithmetic": {"update": operations, "generation": 7.0} if operations else {},
        "peak_bytes": memory,
        "setup_bytes": memory // 2,
        "trained_parameters": 11,
        "log": {},
        "versions": {"torch": "0"},
    }


def test_ratios_are_those_of_the_medians_and_leave_the_warm_up_out():
    # Ours: 2, 3, 7 (median 3) and 4, 5, 9 (5); the peer: 6, 10, 11 (10) and 8, 20, 30 (20). Medians of the rounds:
    # (3 + 5) / 2 = 4 against (10 + 20) / 2 = 15; pairs 3/10 and 5/20.
    ours = [a_run(2, 3, 7, memory=30), a_run(4, 5, 9, memory=50)]
    peer = [a_run(6, 10, 11, memory=100), a_run(8, 20, 30, memory=100)]
    row = steps.comparison(ours, peer, 3, [1.0, 1.0])
    assert row["time_ratio"] == pytest.approx(4 / 15)
    assert row["time_ratio_spread"] == pytest.approx([0.25, 0.3])
    assert row["memory_ratio"] == pytest.approx(0.4)
    assert row["memory_ratio_spread"] == pytest.approx([0.3, 0.5])
    # Steps of ours sorted: 2 3 4 5 7 9, median 4.5; of the peer: 6 8 10 11 20 30, median 10.5. 30 tokens each.
    assert row["tokens_per_second"] == pytest.approx(30 / 4.5)
    assert row["peer_tokens_per_second"] == pytest.approx(30 / 10.5)
    assert row["phases"]["update"] == pytest.approx({"ours": 3.5, "peer": 9.5, "ratio": 3.5 / 9.5})
    assert row["phases"]["reference"] == {"ours": 0.0, "peer": 0.0, "ratio": None}
    # Control: with the warm-up in, the medians would be others.
    assert steps.comparison(ours, peer, 2, [1.0, 1.0])["time_ratio"] != pytest.approx(4 / 15)


def test_a_step_after_the_measured_ones_is_not_timed():
    counted = [a_run(2, 3, 7, 1000)]
    assert steps.step_seconds(counted, 3) == [2, 3, 7]
    with pytest.raises(ValueError, match="the run has 4 in all"):
        steps.step_seconds([a_run(2, 3, 7)], 4)


def test_the_share_of_the_matrix_rate_is_that_of_the_update_alone():
    # 12 operations in an update of 3 − 1 = 2 seconds at a rate of 24 a second: a quarter.
    part = steps.side([a_run(3, 3, 3, operations=12.0), a_run(3, 3, 3)], 3, 24.0)
    assert part["update_share_of_matrix_rate"] == pytest.approx(0.25)
    assert "update_share_of_matrix_rate" not in steps.side([a_run(3, 3, 3)], 3, 24.0)


def test_sides_that_generated_different_numbers_of_tokens_are_not_compared():
    same, short = a_run(2, 3, tokens=30), a_run(2, 3, tokens=29)
    steps.check_same_tokens([same], [same], 30)
    with pytest.raises(ValueError, match="peer generated 29 tokens in a step instead of 30"):
        steps.check_same_tokens([same], [same, short], 30)
    with pytest.raises(ValueError, match="ours generated 29"):
        steps.check_same_tokens([short], [same], 30)
    with pytest.raises(ValueError, match="peer generated 30 tokens in a step instead of 29"):
        steps.check_same_tokens([short], [same], 29)
    with pytest.raises(ValueError, match="generated no tokens"):
        steps.check_same_tokens([same], [{**same, "tokens": []}], 30)


def test_one_step_that_differs_is_enough_to_refuse():
    late = a_run(2, 3, 4)
    late["tokens"][-1] = 28
    with pytest.raises(ValueError, match="ours generated 28"):
        steps.check_same_tokens([late], [a_run(2, 3, 4)], 30)


def test_the_share_of_the_risk_measure_is_taken_step_by_step():
    run = {"steps": [{"risk": 9.0}, *({"risk": r, "update": u} for r, u in ((1.0, 9.0), (1.0, 3.0), (2.0, 38.0)))]}
    # Shares 1/10, 1/4, 2/40: median 1/10, while the ratio of the medians would be 1/10 of another kind (1 / 10 s).
    share = steps.risk_share(run, 3)
    assert share["share"] == pytest.approx(0.1)
    assert share["largest_share"] == pytest.approx(0.25)
    assert (share["risk_seconds"], share["step_seconds"]) == (1.0, 10.0)


def test_lengths_are_spread_from_end_to_end_and_not_in_order():
    lengths = steps.spread_lengths(4, 128, 16)
    assert sorted(lengths)[0] == 4
    assert sorted(lengths)[-1] == 128
    assert len(set(lengths)) == 16
    gaps = [b - a for a, b in zip(sorted(lengths), sorted(lengths)[1:], strict=False)]
    assert max(gaps) - min(gaps) <= 1
    assert lengths != sorted(lengths)
    assert lengths == steps.spread_lengths(4, 128, 16)
    with pytest.raises(ValueError, match="cannot be spread"):
        steps.spread_lengths(8, 8, 4)


def test_the_table_states_ratios_and_targets():
    row = steps.comparison([a_run(2, 3, 7, operations=5.0)], [a_run(6, 9, 12, operations=5.0)], 3, [10.0, 10.0])
    text = steps.table({"default": row, "risk_overhead": {"summary": {}}}, {"default": {"time_ratio": 0.65}})
    assert "time_ratio 0.333 [0.333, 0.333], target 0.65" in text
    assert "memory_ratio 1.000 [1.000, 1.000]\n" in text + "\n"
    assert "risk_overhead" not in text


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.now = 100.0
        monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: self.now)

    def pass_(self, seconds: float) -> None:
        self.now += seconds


def test_phases_do_not_overlap_and_add_up_to_the_step(monkeypatch):
    clock = Clock(monkeypatch)
    watch = stopwatch.Stopwatch("cpu")
    clock.pass_(1000)
    watch.start()
    for scale in (1, 2):
        clock.pass_(1 * scale)  # rest
        with watch.phase("scoring"):
            clock.pass_(2 * scale)
            watch.timed("risk", clock.pass_)(4 * scale)
            clock.pass_(8 * scale)
        clock.pass_(16 * scale)  # rest
        watch.background("update")
        clock.pass_(32 * scale)
        with watch.phase("reference"):
            clock.pass_(64 * scale)
        clock.pass_(128 * scale)
        watch.end_step()
    first = {"rest": 17, "scoring": 10, "risk": 4, "update": 160, "reference": 64}
    assert watch.steps == [first, {name: 2 * seconds for name, seconds in first.items()}]


def test_a_phase_that_raises_is_closed(monkeypatch):
    clock = Clock(monkeypatch)
    watch = stopwatch.Stopwatch("cpu")
    watch.start()

    def fail() -> None:
        clock.pass_(3)
        raise RuntimeError("no reward")

    with pytest.raises(RuntimeError, match="no reward"):
        watch.timed("scoring", fail)()
    clock.pass_(5)
    watch.end_step()
    assert watch.steps == [{"scoring": 3, "rest": 5}]


def test_operations_are_counted_in_one_step_and_in_their_phase():
    watch = stopwatch.Stopwatch("cpu", counted_step=1)
    weight = torch.ones(5, 7, requires_grad=True)
    watch.start()
    for rows in (3, 2, 11):
        with watch.phase("generation"), torch.no_grad():
            torch.ones(rows, 5) @ weight
        watch.background("update")
        (torch.ones(rows, 5) @ weight).sum().backward()
        watch.end_step()
    # 2 rows: 2·2·5·7 = 140 for a product. The update adds the gradient of the weight, the input needs none.
    assert watch.arithmetic == {"rest": 0.0, "generation": 140.0, "update": 280.0}
    assert len(watch.steps) == 3


def test_the_peak_is_that_of_this_process():
    assert 10**7 < stopwatch.peak_bytes("cpu") < 10**12
