"""Every name that the trainer borrows from TRL and transformers, with the arguments it passes.

An upgrade that moves or renames one of them fails here, by name, before it fails inside a run.
"""

import importlib
import inspect
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FUNCTIONS = [
    ("trl", "apply_chat_template", {"example"}),
    ("trl", "is_conversational", {"example"}),
    ("trl", "extract_prompt", {"example"}),
    ("trl", "get_peft_config", {"model_args"}),
    ("trl.models", "prepare_deepspeed", {"model", "accelerator"}),
    ("trl.models", "prepare_fsdp", {"model", "accelerator"}),
    ("trl.models", "unwrap_model_for_generation", {"model", "accelerator", "gather_deepspeed3_params"}),
]
OVERRIDDEN = {
    "_prepare_inputs": ["self", "inputs"],
    "compute_loss": ["self", "model", "inputs", "return_outputs", "num_items_in_batch"],
    "prediction_step": ["self", "model", "inputs", "prediction_loss_only", "ignore_keys"],
    "evaluation_loop": [
        "self",
        "dataloader",
        "description",
        "prediction_loss_only",
        "ignore_keys",
        "metric_key_prefix",
    ],
    "get_train_dataloader": ["self"],
    "create_optimizer": ["self", "model"],
    "log": ["self", "logs", "start_time"],
    "train": ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"],
    "create_scheduler": ["self", "num_training_steps", "optimizer"],
    "_run_epoch": [
        "self",
        "model",
        "epoch",
        "train_dataloader",
        "steps_in_epoch",
        "num_update_steps_per_epoch",
        "trial",
        "ignore_keys_for_eval",
        "start_time",
        "resume_from_checkpoint",
        "epochs_trained",
        "steps_trained_in_current_epoch",
    ],
    "_maybe_log_save_evaluate": [
        "self",
        "tr_loss",
        "grad_norm",
        "model",
        "trial",
        "epoch",
        "ignore_keys_for_eval",
        "start_time",
        "learning_rate",
    ],
    "_get_output_dir": ["self", "trial"],
    "_save_checkpoint": ["self", "model", "trial"],
    "_push_from_checkpoint": ["self", "checkpoint_folder"],
    "_save_scaler": ["self", "output_dir"],
    "_save_rng_state": ["self", "output_dir"],
    "_load_rng_state": ["self", "checkpoint"],
    "_save": ["self", "output_dir", "state_dict"],
    "_load_from_checkpoint": ["self", "resume_from_checkpoint", "model"],
    "_save_optimizer_and_scheduler": ["self", "output_dir"],
    "_load_optimizer_and_scheduler": ["self", "checkpoint"],
    "_send_telemetry": ["self"],
}


@pytest.mark.parametrize(("module", "name", "arguments"), FUNCTIONS)
def test_borrowed_function_takes_what_it_is_given(module, name, arguments):
    function = getattr(importlib.import_module(module), name)
    assert arguments <= set(inspect.signature(function).parameters)


@pytest.mark.parametrize("method", OVERRIDDEN)
def test_overridden_method_exists_with_these_arguments(method):
    base = importlib.import_module("trl.trainer.base_trainer")._BaseTrainer
    assert list(inspect.signature(getattr(base, method)).parameters) == OVERRIDDEN[method]


def test_the_trainer_overrides_nothing_else():
    from rlhf.resuming import DurableCheckpoints
    from rlhf.trainer import PPOTrainer

    base = set(dir(importlib.import_module("trl.trainer.base_trainer")._BaseTrainer))
    members = vars(PPOTrainer) | vars(DurableCheckpoints)
    own = {name for name, value in members.items() if callable(value) and not name.startswith("__")}
    assert own & base == set(OVERRIDDEN)


def test_losses_are_not_divided_by_accumulation_steps():
    base = importlib.import_module("trl.trainer.base_trainer")._BaseTrainer
    assert "loss_is_scaled_for_ga" in vars(base)
    config = importlib.import_module("trl.trainer.base_config")._BaseConfig
    assert "model_init_kwargs" not in config.__dataclass_fields__
    assert isinstance(config._VALID_DICT_FIELDS, list)


def test_trl_is_imported_in_few_files():
    files = {
        str(path.relative_to(ROOT))
        for folder in ("reward", "rlhf", "eval")
        for path in (ROOT / folder).rglob("*.py")
        if any(line.lstrip().startswith(("from trl", "import trl")) for line in path.read_text().splitlines())
    }
    allowed = {"command_line", "config", "models", "rollout", "trainer"}
    # Preference pairs come in TRL's format.
    reading = {"reward/preferences.py", "reward/reading.py"}
    assert files <= {*reading, *(f"rlhf/{name}.py" for name in allowed), *eval_files()}


def eval_files() -> set[str]:
    """Files of `eval` that render chat prompts as the trainer does, or read preference pairs in TRL's format."""
    return {"eval/generation.py", "eval/judges.py", "eval/preferences.py"}
