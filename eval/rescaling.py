"""An adapter at another strength, so that policies can be compared at exactly one KL, or one of them at several."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.torch import load_file, save_file

from eval.policies import adapter_config
from eval.records import Row, source_identity, write_text
from reward.loading import ADAPTER_WEIGHTS, clear_errors, load_tokenizer

RECORD = "rescaled.json"
# Of W = W₀ + (α/r) B A, the factor that training starts at zero.
OUTER = (".lora_B.", ".lora_embedding_B")
MAX_READINGS = 8


@dataclass(frozen=True)
class Strength:
    """A factor of an adapter and what it does to the KL.

    Attributes:
        factor: c, 1 for the adapter as it was trained.
        kl: KL(policy‖base) at this factor, nats per completion.
        kl_error: Its standard error over prompts.
    """

    factor: float
    kl: float
    kl_error: float


def rescale_adapter(source: str | Path, factor: float, output: str | Path) -> None:
    """Writes the LoRA adapter W₀ + c (α/r) B A, with the tokenizer that lies beside it.

    c between 0 and 1 interpolates between base and trained policy, above 1 goes on in the same direction. An adapter
    that is there already, of the same files and factor, is left alone, so that completions of it stay valid.

    Args:
        source: Folder of an adapter.
        factor: c.
        output: Folder for the new one; nothing but adapter, its config and tokenizer is taken along.

    Raises:
        ValueError: The folder holds no LoRA adapter, or one of whose change B is not the only factor (DoRA, trained
            biases, whole modules): scaled B alone, it would be no point between base and policy.

    Reference: Wortsman et al. 2022, arXiv:2109.01903, for the interpolation; Ramé et al. 2024, arXiv:2406.16768, for
    its use on the frontier of reward against KL.
    """
    source, output = Path(source), Path(output)
    if not math.isfinite(factor):
        raise ValueError(f"the factor of an adapter must be a finite number, got {factor}")
    config = adapter_config(source) if source.is_dir() else None
    if config is None or str(getattr(config.peft_type, "value", config.peft_type)) != "LORA":
        raise ValueError(f"{source} holds no LoRA adapter (adapter_config.json); only an adapter can be rescaled")
    for setting, plain in (("use_dora", False), ("bias", "none"), ("modules_to_save", None)):
        given = getattr(config, setting, plain)
        if given and given != plain:
            raise ValueError(f"the adapter {source} has {setting}={given}: its change is not a multiple of lora_B")
    with clear_errors(f"the adapter {source}"):
        weights = load_file(source / ADAPTER_WEIGHTS)
    outer = [name for name in weights if any(part in name for part in OUTER)]
    others = [name for name in weights if name not in outer and "lora_" not in name]
    if not outer or others:
        raise ValueError(f"the adapter {source} has weights that are no part of LoRA: {others or list(weights)}")
    made = {"source": str(source), "factor": factor, "files": [list(file) for file in source_identity(source)[1]]}
    recorded = _record(output)
    if all(recorded.get(name) == value for name, value in made.items()):
        return
    output.mkdir(parents=True, exist_ok=True)
    save_file({n: w * factor if n in outer else w for n, w in weights.items()}, output / ADAPTER_WEIGHTS)
    config.save_pretrained(str(output))
    load_tokenizer(source).save_pretrained(str(output))
    write_text(output / RECORD, json.dumps(made, indent=2) + "\n")


def completion_kl(rows: Sequence[Row]) -> tuple[float, float]:
    """KL(policy‖base) in nats per completion, and its standard error over prompts.

        KL = E Σ_t (r_t − 1 − log r_t),    r_t = π₀/π of the token that was drawn

    which is unbiased like Σ log(π/π₀), and less noisy as long as single tokens move little.

    Args:
        rows: Of `generate_completions` with a base, two prompts or more.

    Raises:
        ValueError: Rows without a base.

    Reference: Schulman 2020, "Approximating KL divergence", the estimator k3.
    """
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        if row["kl_k3_mean"] is None and row["completion_tokens"]:
            raise ValueError(f"completion {row['sample']} of prompt {row['prompt_id']!r} has no KL: it had no base")
        # A completion without a token is as far from the base as any other: not at all.
        by_prompt.setdefault(row["prompt_id"], []).append((row["kl_k3_mean"] or 0.0) * row["completion_tokens"])
    means = np.array([np.mean(values) for values in by_prompt.values()])
    return float(means.mean()), float(means.std(ddof=1) / math.sqrt(len(means)))


def factor_for(
    target: float, measure: Callable[[float], Strength], *, tolerance: float = 0.03, largest: float = 2.0
) -> Strength:
    """The factor at which an adapter has a KL, found on a few readings.

    Near the base the KL grows with the square of the factor. So the search goes along √KL, which is close to straight:
    from the nearest readings on either side, or from the base itself and the nearest one, to the target.

    Args:
        target: KL to reach, nats per completion, above 0.
        measure: Reads the KL at a factor; the same draws at each call make it smooth.
        tolerance: Relative distance from the target that is near enough.
        largest: Factor beyond which the direction is not followed.

    Raises:
        ValueError: A target that is not positive, an adapter that does not move the policy, or one that does not
            reach the target at the largest factor.
    """
    if not (target > 0 and math.isfinite(target)):
        raise ValueError(f"the KL to reach must be above 0 nats, got {target}")
    low, high, factor = Strength(0.0, 0.0, 0.0), None, 1.0
    for _ in range(MAX_READINGS):
        found = measure(factor)
        if not (found.kl > 0 and math.isfinite(found.kl)):
            raise ValueError(
                f"at factor {factor:g} the KL is {found.kl:g} nats: this adapter does not move the policy"
            )
        if abs(found.kl / target - 1) <= tolerance:
            return found
        if found.kl < target:
            low = found
        else:
            high = found
        if low.factor >= largest:
            raise ValueError(
                f"at {largest:g} times its strength the adapter is {low.kl:.3g} nats from its base, short of "
                f"{target:g}; train it further, or ask for less"
            )
        factor = _towards(target, low, high, largest)
    return min((low, high or low), key=lambda reading: abs(reading.kl / target - 1))


def _towards(target: float, low: Strength, high: Strength | None, largest: float) -> float:
    """The next factor: on the line through two readings of √KL."""
    if high is None:
        # Through the base and the reading below the target.
        return min(low.factor * math.sqrt(target / low.kl), largest)
    share = (math.sqrt(target) - math.sqrt(low.kl)) / (math.sqrt(high.kl) - math.sqrt(low.kl))
    return low.factor + share * (high.factor - low.factor)


def add_to_record(folder: str | Path, **found: object) -> None:
    """Adds to the record beside a rescaled adapter: at which KL it is, say."""
    write_text(Path(folder) / RECORD, json.dumps(_record(folder) | found, indent=2) + "\n")


def _record(folder: str | Path) -> dict:
    path = Path(folder) / RECORD
    return json.loads(path.read_text()) if path.is_file() else {}
