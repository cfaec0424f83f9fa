"""One short PPO run that writes what it did; started by the tests with `accelerate launch` on one or two ranks.

    tiny_run.py OUTPUT_DIR [setting=value ...]

Decoding is greedy, so the completions depend on the prompts alone and are the same however the ranks divide them.
"""

import json
import sys
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import save_file
from tiny import logged, tiny_llama, tiny_qrm, tiny_tokenizer, tiny_trainer

from rlhf.reward_function import RiskReward

GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
LOGGED = ("loss", "grad_norm", "reward/score_mean", "reward/score_q05", "kl/reference", "critic/return_mean")
LOGGED += ("critic/coverage_0.9", "critic/explained_variance_sampled")
LOGGED += ("risk/cvar:0.3/nu", "constraint/below:0/value", "constraint/below:0/low", "constraint/below:0/multiplier")


def main(output: Path, settings: dict) -> None:
    peft = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear") if settings.pop("lora", False) else None
    if settings.pop("population", False):
        settings["reward"] = RiskReward(
            tiny_qrm(), "cvar:0.3", scope="population", constraints=["below:0 <= 0.2"], tokenizer=tiny_tokenizer()
        )
    source = output.parent / "policy"  # ZeRO-3 loads the reference from where the policy came
    model = str(source) if source.is_dir() else tiny_llama(initializer_range=0.3)
    trainer = tiny_trainer(
        output / "run",
        model=model,
        peft_config=peft,
        **{"generation_kwargs": GREEDY, "num_ppo_epochs": 1, "max_steps": 3, "learning_rate": 1e-3, **settings},
    )
    trainer.train()
    trainer.save_model(str(output / "policy"))
    weights = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    if trainer.accelerator.is_main_process:
        weights = {name.removeprefix("module."): tensor.float().contiguous() for name, tensor in weights.items()}
        save_file(weights, output / "weights.safetensors")
        record = {name: logged(trainer, name) for name in LOGGED}
        record |= {
            "world_size": trainer.accelerator.num_processes,
            "distributed_type": str(trainer.accelerator.distributed_type.value),
            "zero_stage": getattr(trainer.accelerator.state.deepspeed_plugin, "zero_stage", None),
        }
        (output / "record.json").write_text(json.dumps(record))
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    given = dict(pair.split("=", 1) for pair in sys.argv[2:])
    main(Path(sys.argv[1]), {name: json.loads(value) for name, value in given.items()})
