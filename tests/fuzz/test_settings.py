"""Config files as nobody should write them: every recipe reads them, or ends with one line that names the setting."""

import subprocess
import sys

import pytest
import yaml
from distributed.launching import ROOT, load_recipe
from hypothesis import given
from hypothesis import strategies as st

from rlhf.command_line import RecipeParser, convert, one_line_errors

NAMES = "train_qrm train_gate ppo evaluate evaluate_reward best_of_n show_risk prepare_data"
RECIPES = {name: load_recipe(name) for name in NAMES.split()}
PARSERS = {name: RecipeParser(recipe.GROUPS) for name, recipe in RECIPES.items()}
SHIPPED = {
    "qrm": "train_qrm", "judge": "train_qrm", "gate": "train_gate", "ppo": "ppo", "evaluate": "evaluate",
    "evaluate_reward": "evaluate_reward", "data": "prepare_data", "study": "ppo", "study_evaluate": "evaluate",
}  # fmt: skip

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8),
    st.sampled_from([10**400, -(10**18), "1e-6", "nan", "-1", "", "no", "cvar:0.1", "cpu", "a\0b", "9" * 400]),
)  # fmt: skip
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)


def outcome(name: str, path: object, *flags: str) -> tuple | str:
    """The settings, or the one line that a user reads; anything else that is raised fails the test."""
    parser = RecipeParser(RECIPES[name].GROUPS)
    try:
        with one_line_errors():
            return parser.parse_args_and_config(["--config", str(path), *flags])
    except SystemExit as end:
        line = str(end.code)
        assert line.startswith("error: ")
        assert len(line) > 20
        return line


@st.composite
def settings_of_a_recipe(draw):
    """A recipe and a mapping of some of its settings to anything."""
    name = draw(st.sampled_from(sorted(RECIPES)))
    known = sorted(set(PARSERS[name].hints) - {"output_dir", "logging_dir"})
    return name, draw(st.dictionaries(st.sampled_from(known), VALUES, min_size=1, max_size=3))


@given(case=settings_of_a_recipe())
def test_a_setting_of_another_type_is_converted_or_named(tmp_path_factory, case):
    name, settings = case
    folder = tmp_path_factory.getbasetemp()
    path = folder / "case.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out")} | settings), encoding="utf-8")
    result = outcome(name, path)
    assert isinstance(result, tuple | str)


@given(text=st.binary(max_size=60) | st.sampled_from([
    b"", b"[]", b"3", b"null", b"{}: 1", b"1: 2", b"self: 3", b"a: &x [*x]", b"\xff\xfe", b"\x00", b"- a\n- b",
    b"? [a]\n: b", b"!!python/object/apply:os.system ['true']", b"output_dir: {a: 1}", b"env: 3", b"config: x", b"\t",
]))  # fmt: skip
def test_a_file_that_is_no_config_is_named(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "case.yaml"
    path.write_bytes(text)
    assert isinstance(outcome("show_risk", path), tuple | str)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "must contain a YAML mapping"),
        (b"- risk", "must contain a YAML mapping"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"risk: [", "not YAML"),
        (b"riks: mean", "unknown settings riks"),
        (b"max_steps: many", "max_steps in the config file must be a whole number, got 'many'"),
        (b"max_steps: 2.5", "max_steps in the config file must be a whole number, got 2.5"),
        (b"max_steps: [1, 2]", "max_steps in the config file must be a whole number"),
        (b"learning_rate: {a: 1}", "learning_rate in the config file must be a number"),
        (b"learning_rate: null", "learning_rate in the config file must be a number, got None"),
        (b"risk: no", "risk in the config file must be text, got False; put it into quotes"),
        (b"use_peft: perhaps", "use_peft in the config file must be true or false, got 'perhaps'"),
        (b"risk_schedule_span: [0, x]", "risk_schedule_span in the config file must be a list, each a number"),
        (b"save_strategy: no", "put it into quotes"),
    ],
)
def test_the_line_says_which_setting_and_what_it_takes(tmp_path, text, message):
    (tmp_path / "ppo.yaml").write_bytes(text)
    assert message in outcome("ppo", tmp_path / "ppo.yaml")


def test_a_file_that_is_missing_a_folder_or_left_out(tmp_path):
    assert "No such file" in outcome("ppo", tmp_path / "absent.yaml")
    assert "directory" in outcome("ppo", tmp_path)
    with pytest.raises(SystemExit, match="error: --config takes the path"), one_line_errors():
        RecipeParser(RECIPES["ppo"].GROUPS).parse_args_and_config(["--config"])
    with pytest.raises(SystemExit, match=r"error: argument --max_steps.*: invalid int value: 'x'"), one_line_errors():
        RecipeParser(RECIPES["ppo"].GROUPS).parse_args_and_config(["--max_steps", "x"])


def test_what_yaml_reads_as_another_type_becomes_what_the_setting_takes(tmp_path):
    (tmp_path / "ppo.yaml").write_text(
        f"output_dir: {tmp_path}/out\nlearning_rate: 1e-6\ndataset_split: 2024\nmax_steps: 3.0\nuse_cpu: 'true'\n"
        "constraint: cvar:0.1 >= -1\nrisk_schedule_span: [0, 1e-1]\nreport_to: none\nresume_from_checkpoint: true\n"
    )
    data, reward, args, _ = outcome("ppo", tmp_path / "ppo.yaml")
    assert (data.dataset_split, args.learning_rate, args.max_steps) == ("2024", 1e-6, 3)
    assert (reward.constraint, reward.risk_schedule_span) == (["cvar:0.1 >= -1"], [0.0, 0.1])
    assert args.use_cpu is True
    assert args.resume_from_checkpoint is True
    assert convert("0.1", float | None) == 0.1


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("recipes/*/*.yaml")), ids=lambda path: f"{path.parent.name}-{path.stem}"
)
def test_every_shipped_config_is_read(tmp_path, path):
    settings = yaml.safe_load(path.read_text()) | {"output_dir": str(tmp_path / "out")}
    # Where this runs there may be no GPU to promise bfloat16.
    settings = {name: value for name, value in settings.items() if name not in ("bf16", "fp16")}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
    assert isinstance(outcome(SHIPPED[path.stem], tmp_path / "c.yaml"), tuple)


@pytest.mark.slow
def test_the_program_itself_ends_with_one_line(tmp_path):
    (tmp_path / "a.yaml").write_text("risk: [")
    command = [sys.executable, "recipes/show_risk.py", "--config", str(tmp_path / "a.yaml")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: the config file is not YAML")
