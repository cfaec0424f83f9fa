"""Completions that are on disk already: read and checked, grouped by prompt, and the row of one that was selected."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.judges import Judge
from eval.records import Row, fingerprint, read_jsonl, row_key
from eval.selection import Selection
from reward.source_specs import read_source_spec
from reward.tables import is_messages

REQUIRED: dict[str, tuple[type, ...]] = {
    "prompt_id": (str,),
    "sample": (int,),
    "prompt": (str, list),
    "completion": (str,),
    "completion_tokens": (int,),
    "finished": (bool,),
}
# What `generate_completions` also writes; a report says "unknown" where it is missing.
OPTIONAL: Row = {"kl_k1_sum": None, "kl_k3_mean": None, "source": None, "decoding": {}, "versions": {}}


def read_completions(path: str | Path) -> list[Row]:
    """Rows of a completions file, as `generate_completions` and `recipes/best_of_n.py` write them.

    Raises:
        ValueError: no file, no rows, a line that is no row, a field that is missing or of another type, or a prompt id
            and sample number that occur twice; file and line are named.
    """
    if not Path(path).is_file():
        raise ValueError(f"{path} does not exist; evaluate.py writes completions to OUTPUT_DIR/completions/NAME.jsonl")
    rows, seen = [], {}
    for number, row in enumerate(read_jsonl(path), 1):
        where = f"{path}, line {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no completion but {type(row).__name__}")
        for field, types in REQUIRED.items():
            # A bool is an int to Python, and no sample number to anyone.
            if not isinstance(row.get(field), types) or (bool not in types and isinstance(row[field], bool)):
                wanted = " or ".join(t.__name__ for t in types)
                raise ValueError(f"{where}: {field!r} must be {wanted}, got {row.get(field)!r}")
        problem = _problem(row, rows[0] if rows else row)
        if problem is not None:
            raise ValueError(f"{where}: {problem}")
        if row_key(row) in seen:
            raise ValueError(
                f"{where}: prompt {row['prompt_id']!r}, sample {row['sample']} is on line {seen[row_key(row)]} already"
            )
        seen[row_key(row)] = number
        rows.append(OPTIONAL | row)
    if not rows:
        raise ValueError(f"{path} holds no completions")
    return rows


def _problem(row: Row, first: Row) -> str | None:
    """What is wrong with a row whose required fields have their types, in words."""
    if row["completion_tokens"] < 0:
        return f"'completion_tokens' must not be negative, got {row['completion_tokens']}"
    if isinstance(row["prompt"], list) and not is_messages(row["prompt"]):
        return "'prompt' must be text or a list of messages with role and content"
    if isinstance(row["prompt"], str) != isinstance(first["prompt"], str):
        return "'prompt' must be text in every row or messages in every row"
    for field in ("kl_k1_sum", "kl_k3_mean"):
        value = row.get(field)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            return f"{field!r} must be a number or null, got {value!r}"
    for field in ("decoding", "versions", "selection"):
        if not isinstance(row.get(field, {}), dict):
            return f"{field!r} must be an object, got {row[field]!r}"
    return None


def candidates(rows: Sequence[Row], n: int | None = None, skip: int = 0) -> list[list[Row]]:
    """The n completions of each prompt with the lowest sample numbers, prompts in order of appearance.

    Args:
        rows: Of one policy.
        n: Completions per prompt; None for all, where every prompt has as many.
        skip: Completions per prompt to pass over first, so that several selections share none.

    Raises:
        ValueError: n below 1, a prompt with fewer than skip + n, other counts and no n, a negative skip, or two
            prompts under one id.
    """
    if n is not None and n < 1:
        raise ValueError(f"best of n needs n >= 1, got {n}")
    if skip < 0:
        raise ValueError(f"completions to skip are 0 or more, got {skip}")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        group = groups.setdefault(row["prompt_id"], [])
        if group and group[0]["prompt"] != row["prompt"]:
            raise ValueError(f"prompt_id {row['prompt_id']!r} stands for two different prompts")
        group.append(row)
    fewest, most = (pick(groups, key=lambda prompt: len(groups[prompt])) for pick in (min, max))
    if n is None and len(groups[fewest]) < len(groups[most]):
        raise ValueError(
            f"prompt {most!r} has {len(groups[most])} completions and {fewest!r} {len(groups[fewest])}; say how many "
            f"to select from, --n {len(groups[fewest])} at most"
        )
    n = n or max(1, len(groups[fewest]) - skip)
    if len(groups[fewest]) < skip + n:
        behind = f" behind the first {skip}" if skip else ""
        raise ValueError(
            f"best of {n} needs {n} completions of each prompt{behind}, and {fewest!r} has {len(groups[fewest])}; "
            f"generate more with evaluate.py --num_samples {skip + n}"
        )
    return [sorted(group, key=lambda row: row["sample"])[skip : skip + n] for group in groups.values()]


def read_pairs(rows: Sequence[Row]) -> tuple[list, list]:
    """Prompts and completions as a reward model reads them: text, or messages where the prompts are."""
    prompts = [row["prompt"] for row in rows]
    texts = [row["completion"] for row in rows]
    if isinstance(prompts[0], str):
        return prompts, texts
    return prompts, [[{"role": "assistant", "content": text}] for text in texts]


def selected_rows(groups: Sequence[Sequence[Row]], selection: Selection, name: str, settings: Row) -> list[Row]:
    """The selected completion of each prompt as a row of a policy of its own.

    The row is that of the completion, sample number included, but for

        model          the new name
        selection      the settings, n, its utility, and the tokens of all n candidates
        kl_k1_sum      plus the bound of the selection: with π the policy that drew and σ the one that selects,
                       KL(σ‖base) = KL(σ‖π) + E log π/base under σ
                                  ≤ bound + mean of the selected kl_k1_sum
                       where the bound is log n − (n − 1)/n for best of n
        kl_k3_mean     that bound per token, because k3 estimates a KL under draws of π alone

    Args:
        groups: n rows for each of P prompts.
        selection: Among them.
        name: Of the policy "draw n, take one".
        settings: What it was selected by; it must hold `models`, see `models_of`.
    """
    rows = []
    bound = selection.kl_bound()
    identity = fingerprint(
        [settings, name, [[row.get("fingerprint"), row_key(row)] for group in groups for row in group]]
    )
    for group, chosen, utilities in zip(groups, selection.chosen.tolist(), selection.utilities, strict=True):
        row = dict(group[chosen])
        if row["kl_k1_sum"] is not None:
            row["kl_k1_sum"] += bound
            row["kl_k3_mean"] = row["kl_k1_sum"] / max(row["completion_tokens"], 1)
        row |= {
            "model": name,
            "selection": settings
            | {
                "n": len(group),
                "utility": float(utilities[chosen]),
                "tokens_drawn": sum(candidate["completion_tokens"] for candidate in group),
            },
            "fingerprint": identity,
        }
        rows.append(row)
    return rows


def models_of(spec: str) -> list[str]:
    """The models behind a source of laws: whole paths, and hub ids as they are."""
    return [str(Path(path).resolve()) if Path(path).exists() else path for path in read_source_spec(spec).all_paths()]


def check_judge(rows: Sequence[Row], judge: Judge, name: str) -> None:
    """Refuses a judge that made the selection it is to judge.

    Whoever picks the best of n by a model picks that model's mistakes as well, and the model cannot see them.

    Raises:
        ValueError: the judge asks a model that selected these rows.
    """
    selectors = {model for row in rows for model in row.get("selection", {}).get("models", [])}
    asked = {model for spec in _sources_of(judge) for model in models_of(spec)}
    if selectors & asked:
        raise ValueError(
            f"{name} was selected by {', '.join(sorted(selectors & asked))}, which cannot judge its own selection; "
            "give another --judge, or select with another --reward_model"
        )


def _sources_of(judge: Judge) -> list[str]:
    """Specs of the models that a judge asks; none for a lexicon or a function."""
    source: Any = getattr(judge, "source", None)
    path: Any = getattr(judge, "path", None)
    return ([source.text] if source is not None else []) + ([path] if path is not None else [])
