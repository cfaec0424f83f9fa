"""One prompt through the house, with shapes and numbers: makes the tables of docs/walkthrough.md.

.venv/bin/python docs/walkthrough.py      (after `make quickstart`, whose models it reads)
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from reward.modeling import QRMForSequenceClassification
from rlhf.advantages import gae, token_rewards
from rlhf.critic import ActorCritic
from rlhf.decoding import generate
from rlhf.losses import clipped_policy_loss, clipped_value_loss
from rlhf.masking import centre_and_scale, global_token_mean, token_count
from rlhf.reward_function import RiskReward
from rlhf.risk import parse_risk
from rlhf.rollout import completions_of, left_pad, tokenize_prompts

RUN = "runs/quickstart"
PROMPTS = ["The plot makes no sense and the", "I love how this little camera"]
KL_COEF = 0.03


def shape(tensor: torch.Tensor) -> str:
    """(2, 8) for a tensor of that shape."""
    return str(tuple(tensor.shape))


def row(name: str, tensor: torch.Tensor, digits: int = 2) -> None:
    """Print name, shape and the first row."""
    values = tensor[0].tolist()
    values = values if isinstance(values, list) else [values]
    text = " ".join(f"{v:.{digits}f}" if isinstance(v, float) else str(int(v)) for v in values)
    print(f"{name:22} {shape(tensor):10} {text}")


@torch.no_grad()
def main() -> None:
    """Walk."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(f"{RUN}/data/policy", padding_side="left")
    module = ActorCritic(AutoModelForCausalLM.from_pretrained(f"{RUN}/data/policy")).eval()
    stops = [tokenizer.eos_token_id]

    print("-- prompt and rollout")
    prompt_ids, prompt_mask = left_pad(tokenize_prompts(PROMPTS, tokenizer), tokenizer.pad_token_id)
    row("prompt_ids", prompt_ids)
    row("prompt_mask", prompt_mask)
    config = GenerationConfig(
        max_new_tokens=8, do_sample=True, pad_token_id=tokenizer.pad_token_id, eos_token_id=stops, disable_compile=True
    )
    completion_ids, mask, finished = generate(module.policy, prompt_ids, prompt_mask, config, stops)
    completions, _ = completions_of(completion_ids, mask, tokenizer, conversational=False)
    row("completion_ids", completion_ids)
    row("completion_mask", mask)
    print(f"{'text':22} {'':10} {PROMPTS[0]!r} + {completions[0]!r}, finished: {bool(finished[0])}")
    ids, full_mask = torch.cat([prompt_ids, completion_ids], 1), torch.cat([prompt_mask, mask], 1)
    scores = module(ids, full_mask, mask.shape[1])
    row("old_logprobs", scores.logprobs)
    row("values", scores.values)

    print("-- distribution and risk")
    reward = RiskReward(QRMForSequenceClassification.from_pretrained(f"{RUN}/qrm"), risk="cvar:0.1")
    law = reward.distribution(PROMPTS, completions)
    row("quantiles", law.values)
    row("mean", law.mean().unsqueeze(1))
    for risk in ("cvar:0.1", "quantile:0.1", "entropic:1", "mean_variance:0.5"):
        row(risk, parse_risk(risk)(law).unsqueeze(1))
    utility = parse_risk("cvar:0.1")(law)

    print("-- rewards and advantages (cvar:0.1; a reference that found each token 0.1 nats likelier)")
    reference = scores.logprobs + 0.1
    rewards = token_rewards(utility, scores.logprobs - reference, mask, KL_COEF)
    row("rewards", rewards, 3)
    advantages, returns = gae(rewards, scores.values, mask, 1.0, 0.95)
    row("advantages", advantages, 3)
    row("returns", returns, 3)
    whitened = centre_and_scale(advantages, mask)
    row("whitened advantages", whitened, 3)

    print("-- loss (first epoch: every ratio is 1)")
    policy = clipped_policy_loss(scores.logprobs, scores.logprobs, whitened, 0.2, mask=mask)
    value = clipped_value_loss(scores.values, scores.values, returns, None, mask=mask)
    row("ratio", policy.ratio)
    row("policy loss", policy.loss, 3)
    row("value loss", value.loss, 3)
    tokens = token_count(mask)
    total = global_token_mean(policy.loss + 0.1 * value.loss, mask, global_count=tokens, world_size=1)
    print(f"{'loss':22} {'()':10} {total.item():.4f} over {int(tokens)} tokens")


if __name__ == "__main__":
    main()
