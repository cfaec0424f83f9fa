"""The wiring of the study: which commands, in which order, what is kept, what is refused, what comes out."""

import json
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
import yaml
from distributed.launching import ROOT, load_recipe
from tiny import tiny_qrm, tiny_tokenizer
from trl import ModelConfig, TrlParser

from eval.records import read_jsonl, write_jsonl
from eval.study_figures import study_figure
from eval.study_report import BEGIN, END, flag_distances, last_values, markdown
from rlhf.config import PPOConfig
from rlhf.durability import flushed_checksums, seal

WORDS = ["the", "a", "red", "green", "blue", "good", "bad", "fine", "film", "very", "risky", "safe"]
LEVELS = [0.1, 0.5, 0.9]


recipe = load_recipe("study_risk")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A reward model, a place for a policy and a judge, and the two YAML files that name them."""
    path = tmp_path_factory.mktemp("study")
    tiny_qrm(seed=2).save_pretrained(path / "qrm")
    tiny_tokenizer().save_pretrained(path / "qrm")
    for name in ("policy", "judge"):
        (path / name).mkdir()
    ppo, evaluation = (
        yaml.safe_load((ROOT / "recipes" / "smollm2" / f"{name}.yaml").read_text())
        for name in ("study", "study_evaluate")
    )
    ppo |= {"model_name_or_path": str(path / "policy"), "reward_model": str(path / "qrm")}
    evaluation |= {"judge": f"qrm:{path / 'judge'}", "resamples": 100}
    (path / "ppo.yaml").write_text(yaml.safe_dump(ppo))
    (path / "evaluate.yaml").write_text(yaml.safe_dump(evaluation))
    return path


class Machine:
    """Stands for the processes: leaves what each recipe leaves, and remembers what it was asked."""

    def __init__(self):
        self.calls, self.stop_at = [], None

    def __call__(self, arguments):
        command = arguments[arguments.index("--config_file") + 2 :]
        script, flags = command[0].split("/")[1], dict(pairwise(command))
        self.calls.append(command)
        if script == "ppo.py":
            return self.train(flags)
        if script == "best_of_n.py":
            rows = [row for row in read_jsonl(flags["--completions"]) if row["sample"] == int(flags["--skip"])]
            write_jsonl(flags["--output"], rows)
            return 0
        if script == "weigh_prompts.py":
            Path(flags["--output_dir"]).mkdir(parents=True)
            return 0
        if script == "rescale_adapter.py":
            Path(flags["--output_dir"], f"kl-{flags['--kl']}").mkdir(parents=True)
            return 0
        return self.evaluate(flags)

    def train(self, flags):
        output = recipe.Path(flags["--output_dir"])
        rollouts = [
            {"step": i, "kl/reference": 0.5 * i, "population/rating_cvar_0.1": -1.0 + 0.1 * i} for i in range(1, 9)
        ]
        state = json.dumps({"log_history": rollouts})
        checkpoint = output / "checkpoint-8"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "trainer_state.json").write_text(state)
        seal(checkpoint, flushed_checksums(checkpoint, ["trainer_state.json"]))
        if output.name == self.stop_at:
            return 1
        (output / "trainer_state.json").write_text(state)
        return 0

    def evaluate(self, flags):
        folder, name = recipe.Path(flags["--output_dir"]), flags["--reference"]
        shift = 0.0 if name == "base" else 0.1 + 0.01 * len(name)
        samples = range(int(flags["--num_samples"]) if "--policies" in flags else 1)
        keys = [(word, i, sample) for i, word in enumerate(WORDS) for sample in samples]
        completions = [
            {
                "prompt_id": word,
                "sample": sample,
                "prompt": word,
                "completion": f" {WORDS[i - 3]} film" + " is" * sample,
                "completion_tokens": 2 + sample,
                "finished": True,
                "kl_k1_sum": 0.0 if name == "base" else 5 + 0.2 * i,
                "kl_k3_mean": 0.1,
                "decoding": {"temperature": 1.0},
                "versions": {},
                "source": name,
            }
            for word, i, sample in keys
        ]
        middles = [0.5 * i - 2.5 + shift + 0.1 * sample for _, i, sample in keys]
        scores = [
            {"prompt_id": word, "sample": sample, "score": z, "quantiles": [z - 1, z, z + 1], "levels": LEVELS}
            for (word, _, sample), z in zip(keys, middles, strict=True)
        ]
        write_jsonl(folder / "scores" / f"{name}.jsonl", scores)
        if "--policies" in flags:
            write_jsonl(folder / "completions" / f"{name}.jsonl", completions)
        (folder / "report.json").write_text(
            json.dumps({"threshold": -2.25, "threshold_source": "quantile 0.05 of base"})
        )
        return 0

    @property
    def made(self):
        """What was asked for, by the names of outputs."""
        return [
            recipe.Path(c[c.index("--output_dir" if "--output_dir" in c else "--output") + 1]).stem for c in self.calls
        ]


@pytest.fixture
def machine(monkeypatch):
    machine = Machine()
    monkeypatch.chdir(ROOT)  # where the recipe goes, and whence it does not return
    monkeypatch.setattr(recipe, "execute", machine)
    return machine


def run(models, tmp_path, *flags):
    places = ["--output_dir", tmp_path / "runs", "--result", tmp_path / "r.json", "--figure", tmp_path / "f.png"]
    places += ["--ppo", models / "ppo.yaml", "--evaluation", models / "evaluate.yaml"]
    recipe.main([str(x) for x in [*places, *flags]])


def result_of(tmp_path):
    return json.loads((tmp_path / "r.json").read_text())


def test_seeds_come_in_turn_and_the_result_is_whole(models, tmp_path, machine, capsys):
    arms = ["best_of_4_cvar", "constraint", "mean"]
    run(models, tmp_path, "--arms", *arms, "--seeds", 1, 2, "--rollouts", 3)
    runs = [f"{arm}-{seed}" for seed in (1, 2) for arm in ("mean", "constraint", "best_of_4_cvar")]
    assert machine.made == ["base", *(name for name in runs for _ in range(2 if name.startswith("best") else 3))]
    trainings = [call for call in machine.calls if call[0] == "recipes/ppo.py"]
    # The last quarter of 8 rollouts of the mean arm reached (-0.3 - 0.2)/2; the bound lies 0.15 above.
    assert ["--constraint" in call for call in trainings] == [False, True, False, True]
    assert trainings[1][trainings[1].index("--constraint") + 1] == "cvar:0.1 >= -0.1"
    assert {call[call.index("--max_steps") + 1] for call in trainings} == {"6"}  # 3 rollouts, 2 passes
    evaluations = [call for call in machine.calls if call[0] == "recipes/evaluate.py"]
    assert "--threshold" not in evaluations[0]
    assert {call[call.index("--threshold") + 1] for call in evaluations[1:]} == {"-2.25"}
    found = result_of(tmp_path)
    assert [(r["arm"], r["seed"]) for r in found["rows"]] == [
        ("base", None), ("mean", 1), ("mean", 2), ("constraint", 1), ("constraint", 2),
        ("best_of_4_cvar", 1), ("best_of_4_cvar", 2),
    ]  # fmt: skip
    # Three seeds of selections of 4 need 12 answers of the base; each has its own.
    assert [r["n"] for r in found["rows"]] == [144, 48, 48, 48, 48, 12, 12]
    selections = [call for call in machine.calls if call[0] == "recipes/best_of_n.py"]
    assert [call[call.index("--skip") + 1] for call in selections] == ["0", "4"]
    assert found["rows"][1]["training"]["kl"] == [0.5 * i for i in range(1, 9)]
    assert all(r["reward_model"]["reading_cvar"] <= r["reward_model"]["mean"] for r in found["rows"])
    assert found["constraint_bound"] == -0.1
    assert {(e["arm"], e["metric"]) for e in found["bar"]} >= {("constraint", "extremely_negative_rate")}
    printed = capsys.readouterr().out
    assert "| constraint | 1, 2 |" in printed
    own = [r["reward_model"] for r in found["rows"] if r["arm"] == "mean"]
    mean, cvar = ((own[0][key] + own[1][key]) / 2 for key in ("mean", "reading_cvar"))
    assert f"| mean | 2 | {mean:.2f} | {cvar:.2f} | " in printed
    assert matplotlib.image.imread(tmp_path / "f.png").std() > 0.01


def test_the_tables_go_between_the_marks_of_a_document(models, tmp_path, machine, capsys):
    document = tmp_path / "results.md"
    document.write_text(f"before\n{BEGIN}\nan older table\n{END}\nafter\n")
    run(models, tmp_path, "--arms", "mean", "--seeds", 1, "--document", document)
    first, *tables, last = document.read_text().split("\n")[:-1]
    assert (first, last) == ("before", "after")
    assert (tables.pop(0), tables.pop()) == (BEGIN, END)
    assert "an older table" not in tables
    assert "\n".join(tables) in capsys.readouterr().out
    assert markdown(result_of(tmp_path)) in "\n".join(tables)
    again = document.read_text()
    run(models, tmp_path, "--arms", "mean", "--seeds", 1, "--document", document)
    assert document.read_text() == again


@pytest.mark.parametrize("text", ["", f"{END}\n{BEGIN}\n", f"{BEGIN}\n{BEGIN}\n{END}\n", f"{BEGIN}\n{END}\n{END}\n"])
def test_a_document_without_its_marks_is_refused_before_any_work(models, tmp_path, machine, text, capsys):
    (tmp_path / "results.md").write_text(text)
    with pytest.raises(SystemExit):
        run(models, tmp_path, "--arms", "mean", "--document", tmp_path / "results.md")
    assert "needs one line" in capsys.readouterr().err
    assert machine.calls == []


def test_finished_pieces_are_kept_and_pieces_add_up(models, tmp_path, machine):
    run(models, tmp_path, "--arms", "mean", "--seeds", 1)
    done = len(machine.calls)
    run(models, tmp_path, "--arms", "mean", "--seeds", 1)
    assert len(machine.calls) == done
    run(models, tmp_path, "--arms", "cvar_population", "--seeds", 2, 1)
    assert machine.made[done:] == ["cvar_population-2"] * 3 + ["cvar_population-1"] * 3
    found = result_of(tmp_path)
    assert [(r["arm"], r["seed"]) for r in found["rows"]][1:] == [
        ("mean", 1), ("cvar_population", 1), ("cvar_population", 2),
    ]  # fmt: skip
    assert {tuple(c["seeds"]) for c in found["comparisons"] if c["arm"] == "cvar_population"} == {(1,)}


def test_the_same_trainings_are_compared_at_another_kl(models, tmp_path, machine):
    run(models, tmp_path, "--arms", "mean", "best_of_4_mean", "--seeds", 1)
    done = len(machine.calls)
    evaluated = [call for call in machine.calls if call[0] == "recipes/evaluate.py"][1]
    assert evaluated[evaluated.index("--policies") + 1] == f"mean-1={tmp_path}/runs/rescaled/mean-1/kl-2"
    assert result_of(tmp_path)["kl"] == 2
    run(models, tmp_path, "--arms", "mean", "best_of_4_mean", "--seeds", 1, "--kl", 0.5)
    again = machine.calls[done:]
    assert [call[0] for call in again] == ["recipes/rescale_adapter.py", "recipes/evaluate.py"]
    assert again[1][again[1].index("--policies") + 1] == f"mean-1={tmp_path}/runs/rescaled/mean-1/kl-0.5"
    found = result_of(tmp_path)
    assert found["kl"] == 0.5
    assert [r["arm"] for r in found["rows"]] == ["base", "mean", "best_of_4_mean"]
    # Nothing of the first is gone.
    run(models, tmp_path, "--arms", "mean", "--seeds", 1)
    assert len(machine.calls) == done + 2


def test_an_interrupted_training_continues_at_its_checkpoint(models, tmp_path, machine):
    machine.stop_at = "mean-1"
    with pytest.raises(SystemExit, match=r"train-mean-1 failed \(exit 1\)"):
        run(models, tmp_path, "--arms", "mean", "--seeds", 1)
    assert "--resume_from_checkpoint" not in machine.calls[-1]
    machine.stop_at = None
    run(models, tmp_path, "--arms", "mean", "--seeds", 1)
    again = machine.calls[2]
    assert again[-2:] == ["--resume_from_checkpoint", str(tmp_path / "runs" / "policies" / "mean-1" / "checkpoint-8")]
    assert machine.made == ["base", *["mean-1"] * 4]


def test_a_training_without_a_checkpoint_starts_over(models, tmp_path, machine):
    machine.stop_at = "mean-1"
    with pytest.raises(SystemExit):
        run(models, tmp_path, "--arms", "mean", "--seeds", 1)
    (tmp_path / "runs" / "policies" / "mean-1" / "checkpoint-8" / "trainer_state.json").unlink()
    machine.stop_at = None
    run(models, tmp_path, "--arms", "mean", "--seeds", 1)
    assert machine.calls[2][-2:] == ["--overwrite_output_dir", "true"]


def test_other_settings_never_replace_finished_work(models, tmp_path, machine):
    run(models, tmp_path, "--arms", "mean", "--seeds", 1)
    done = len(machine.calls)
    with pytest.raises(SystemExit, match=r"train-mean-1.json is about other settings. Take another --output_dir"):
        run(models, tmp_path, "--arms", "mean", "--seeds", 1, "--rollouts", 5)
    assert len(machine.calls) == done


def test_the_constraint_needs_the_mean_arm_or_a_bound(models, tmp_path, machine):
    with pytest.raises(SystemExit, match="read off the mean arm"):
        run(models, tmp_path, "--arms", "constraint", "--seeds", 1)
    run(models, tmp_path, "--arms", "constraint", "--seeds", 1, "--constraint_bound", -0.75)
    training = machine.calls[-3]
    assert training[training.index("--constraint") + 1] == "cvar:0.1 >= -0.75"
    assert result_of(tmp_path)["comparisons"] == []


def test_a_seed_beyond_the_third_trains_and_selects_nothing(models, tmp_path, machine):
    run(models, tmp_path, "--arms", "mean", "best_of_4_mean", "--seeds", 7)
    assert machine.made == ["base", "mean-7", "mean-7", "mean-7"]
    assert result_of(tmp_path)["warnings"] == []


def test_every_command_is_one_that_its_recipe_takes(models, tmp_path, machine):
    run(models, tmp_path, "--arms", *recipe.ARMS, "--seeds", 1)
    names = ("ppo", "evaluate", "best_of_n", "weigh_prompts", "rescale_adapter")
    ppo, evaluate, select, weigh, rescale = (load_recipe(name) for name in names)
    groups = {
        "recipes/ppo.py": (ppo.DataArguments, ppo.RewardArguments, PPOConfig, ModelConfig),
        "recipes/evaluate.py": (
            evaluate.PolicyArguments, evaluate.PromptArguments, evaluate.JudgeArguments, evaluate.OutputArguments,
        ),
        "recipes/best_of_n.py": (select.SelectionArguments,),
        "recipes/weigh_prompts.py": (weigh.WeighArguments,),
        "recipes/rescale_adapter.py": (rescale.RescaleArguments,),
    }  # fmt: skip
    objectives, completions, weighted = [], [], []
    for script, *flags in machine.calls:
        arguments = TrlParser(groups[script]).parse_args_and_config(flags)
        if script == "recipes/ppo.py":
            reward, args = arguments[1:3]
            (objective,) = ppo.build_objectives(reward.risk, reward.risk_scope, **ppo.risk_settings(reward)).values()
            objectives.append(objective.spec)
            completions.append(args.max_steps // 2 * args.rollout_size)
            weighted.append((args.prompt_weight_column, arguments[0].dataset_name.endswith("tail_prompts")))
            assert (args.kl_target, args.seed) == (4.0, 1)
    assert completions == [20 * 96] * 10, "every arm learns from as many completions"
    assert weighted == [(None, False)] * 8 + [("prompt_weight", True)] * 2
    assert objectives == [
        "mean",
        "cvar:0.1",
        "population cvar:0.1",
        "population mean_variance:0.47",
        "mean; cvar:0.1 >= -0.1",
        "population 0.5*mean+0.5*cvar:0.1",
        "population cvar:0.5",
        "population mean -> cvar:0.1 (linear, 0 to 0.7)",
        "mean",
        "population 0.5*mean+0.5*cvar:0.1",
    ]


@pytest.mark.parametrize(
    "flags",
    [
        ["--rollouts", "0"],
        ["--arms", "median"],
        ["--prompts", "1"],
        ["--kl", "0"],
        ["--kl_target", "inf"],
        ["--seeds", "-1"],
    ],
)
def test_bad_options_end_before_any_work(models, tmp_path, machine, flags):
    with pytest.raises(SystemExit):
        run(models, tmp_path, *flags)
    assert machine.calls == []


def test_a_missing_model_is_named(models, tmp_path, machine):
    settings = yaml.safe_load((models / "ppo.yaml").read_text()) | {"reward_model": "/no/qrm"}
    (tmp_path / "ppo.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(SystemExit, match="/no/qrm does not exist; `make quickstart`"):
        run(models, tmp_path, "--ppo", tmp_path / "ppo.yaml")


def row(arm, seed, kl, half=0.2):
    numbers = {"mean": 1.0 + kl / 10, "extremely_negative_rate": 0.05, "cvar": -0.5, "rating_mass": 0.03, "kl": kl}
    intervals = {f"{name}_ci": [value - half, value + half] for name, value in numbers.items()}
    return {"arm": arm, "seed": seed, "n": 24, **numbers, **intervals}


def test_the_figure_shows_every_seed_and_every_arm():
    rows = [
        row("base", None, 0.0),
        *(row(arm, seed, 5 + seed) for arm in ("mean", "cvar_response") for seed in (1, 2, 3)),
    ]
    arms = [row("base", None, 0.0), row("mean", None, 7.0), row("cvar_response", None, 7.0)]
    left, right = study_figure(rows, arms).axes
    assert left.get_xlabel() == "KL to the base, nats per completion"
    assert right.get_xlabel() == "mean rating"
    assert left.get_ylabel() == "extremely negative completions"
    for ax, x in ((left, [6, 7, 8]), (right, [1.6, 1.7, 1.8])):
        of_seeds = [line for line in ax.lines if line.get_label() == "_seeds"]
        assert [line.get_xdata() for line in of_seeds] == [pytest.approx(x)] * 2
        assert [line.get_label() for line in ax.lines if not line.get_label().startswith("_")] == [
            "base", "mean", "cvar response",
        ]  # fmt: skip
        assert sum(line.get_label() in ("_across", "_upright") for line in ax.lines) == 6


def test_unequal_distances_are_flagged():
    rows = [row("base", None, 0.0), row("mean", 1, 6.0), row("mean", 2, 7.0)]
    rows += [row("a", 1, 6.3), row("a", 2, 6.3), row("a", 3, 6.0)]
    notes = flag_distances(rows)
    assert [r["kl_overlaps_reference"] for r in rows] == [False, True, True, True, False, None]
    assert notes == ["a, seed 2: KL 6.30 [6.10, 6.50] nats, mean [6.80, 7.20]: not at equal KL"]


def test_the_table_says_what_has_no_end():
    change = {"arm": "a_b", "relative_change": None, "relative_interval": [-1.0, None], "difference": 0.5}
    names = ("mean", "extremely_negative_rate", "rating_mass", "kl")
    entries = [change | {"metric": name, "interval": [-0.25, 1.0]} for name in names]
    study = {"cvar_alpha": 0.1, "rating_threshold": -2.0, "warnings": ["careful"], "comparisons": entries}
    study |= {"arms": [row("a_b", None, 6.0) | {"seeds": [1, 2]}], "bar": []}
    lines = markdown(study).splitlines()
    assert "CVaR 10 %" in lines[0]
    assert "ratings ≤ -2" in lines[0]
    assert lines[2].startswith("| a b | 1, 2 | 1.60 [1.40, 1.80] | 5.0 % ")
    assert lines[6] == "| a b | – [-100, ∞] | – [-100, ∞] | – [-100, ∞] | +0.50 [-0.25, 1.00] | – |"
    assert lines[-1] == "- careful"


def test_last_values_are_those_of_the_end():
    history = [{"x": float(i)} if i % 2 else {"y": 1.0} for i in range(16)]  # x: 1, 3, ..., 15
    assert last_values(history, "x") == 14.0
    with pytest.raises(ValueError, match="no 'z'"):
        last_values(history, "z")
