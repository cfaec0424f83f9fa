"""How often the intervals of `eval.study` hold the difference that made the data: simulated studies of three seeds.

    .venv/bin/python benchmarks/interval_coverage.py

Two arms of three seeds answer the same 96 prompts twice. A score is the sum of normal effects of its prompt (shared by
both arms, sd 0.7), of prompt and arm (0.2), of seed and arm (`--seed_sd`) and of its own (0.8); the second arm has 0.1
more. Counted is how often the 95 % intervals of the difference of the means and of the two tail means hold 0.1.
Prints a line for each spread of the seeds, with Wilson's interval of the coverage.
"""

import argparse

import numpy as np

from eval.intervals import wilson_interval
from eval.report import Measurement
from eval.study import Pool, Run, compared
from eval.tail import absolute_threshold

DIFFERENCE, PROMPTS, SAMPLES, SEEDS = 0.1, 96, 2, 3


def simulated_study(seed_sd: float, rng: np.random.Generator) -> list[Run]:
    """All runs of one study."""
    prompts, runs = np.repeat(np.arange(PROMPTS), SAMPLES), []
    shared = rng.normal(0, 0.7, PROMPTS)
    for arm, centre in (("mean", 0.0), ("other", DIFFERENCE)):
        of_prompts = centre + shared + rng.normal(0, 0.2, PROMPTS)
        for seed in range(SEEDS):
            scores = of_prompts[prompts] + rng.normal(0, seed_sd) + rng.normal(0, 0.8, len(prompts))
            columns = {"scores": scores, "masses": np.full(len(prompts), 0.1), "kl": np.full(len(prompts), 4.0)}
            runs.append(Run(arm, seed, tuple(prompts.tolist()), columns))
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed_sd", type=float, nargs="+", default=[0.0, 0.05, 0.2])
    parser.add_argument("--studies", type=int, default=150, help="Of each spread. Default: 150.")
    options = parser.parse_args()
    measurement = Measurement(absolute_threshold(-1.5), cvar_alpha=0.1, rating_threshold=-2.0, resamples=400)
    for place, seed_sd in enumerate(options.seed_sd):
        held = {"mean": 0, "cvar": 0}
        for number in range(options.studies):
            pool = Pool(simulated_study(seed_sd, np.random.default_rng([place, number])), measurement)
            for metric in held:
                low, high = compared(pool, "other", "mean", metric)["interval"]
                held[metric] += low <= DIFFERENCE <= high
        shares = []
        for metric, count in held.items():
            low, high = wilson_interval(count, options.studies)
            shares.append(f"{metric} {count / options.studies:.3f} [{low:.3f}, {high:.3f}]")
        print(f"sd between seeds {seed_sd:g}: {', '.join(shares)} of {options.studies} studies", flush=True)


if __name__ == "__main__":
    main()
