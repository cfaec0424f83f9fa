"""Completions against a token-by-token loop, and everything they must not depend on."""

import math

import datasets
import pytest
import reference_eval as reference
import torch
from peft import LoraConfig, get_peft_model
from tiny import WORDS, tiny_llama, tiny_tokenizer
from transformers import GenerationConfig, GPT2Config, GPT2LMHeadModel

from eval.generation import Decoding, as_prompt_dataset, generate_completions, row_uniforms
from eval.policies import load_policy, same_source
from eval.records import read_jsonl

# peft reads an attribute that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")

PROMPTS = ["the film was", "a", "not very good the red", "blue is", "the bad film is not fine"]
NUMBERS = ("logprob", "base_logprob", "kl_k1_sum", "kl_k3_mean")
FAST = Decoding(max_new_tokens=7)


def sharp_llama(seed=0, factor=12.0, **overrides):
    """Random weights that care what they are asked: the plain initialisation is uniform to three digits."""
    model = tiny_llama(seed=seed, tie_word_embeddings=False, **overrides)
    model.lm_head.weight.data *= factor
    return model.eval()


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer):
    root = tmp_path_factory.mktemp("models")
    models = {"base": sharp_llama(0), "tuned": sharp_llama(1)}
    for name, model in models.items():
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    torch.manual_seed(5)
    lora = get_peft_model(
        sharp_llama(0), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    )
    lora.peft_config["default"].base_model_name_or_path = str(root / "base")
    lora.save_pretrained(root / "adapter")
    return root


def texts(rows):
    return [(row["prompt_id"], row["sample"], row["completion"]) for row in rows]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_completions_and_logprobs_equal_a_token_by_token_loop(folders, tokenizer, temperature):
    policy, base = sharp_llama(1), sharp_llama(0)
    decoding = Decoding(max_new_tokens=6, temperature=temperature, num_samples=2, seed=6)
    rows = generate_completions(folders / "tuned", PROMPTS, base=folders / "base", decoding=decoding, batch_size=4)
    assert [(r["prompt_id"], r["sample"]) for r in rows] == [(str(i), s) for i in range(5) for s in range(2)]
    for row in rows:
        prompt_ids = tokenizer(row["prompt"])["input_ids"]
        uniforms = row_uniforms(6, row["prompt_id"], row["sample"], 6)
        drawn, ours = reference.decode_by_loop(policy, prompt_ids, uniforms, {1}, temperature)
        theirs = reference.logprob_by_loop(base, prompt_ids, drawn, temperature)
        ratios = [a - b for a, b in zip(ours, theirs, strict=True)]
        assert row["completion"] == tokenizer.decode(drawn, skip_special_tokens=True)
        assert row["completion_tokens"] == len(drawn)
        assert row["finished"] == (drawn[-1] == 1)
        assert row["logprob"] == pytest.approx(sum(ours), abs=1e-4)
        assert row["base_logprob"] == pytest.approx(sum(theirs), abs=1e-4)
        assert row["kl_k1_sum"] == pytest.approx(sum(ratios), abs=1e-4)
        k3 = sum(math.exp(-x) - 1 + x for x in ratios) / len(ratios)
        assert row["kl_k3_mean"] == pytest.approx(k3, rel=1e-3, abs=1e-4)
    assert len({row["finished"] for row in rows}) == 2
    assert any(abs(row["kl_k1_sum"]) > 1 for row in rows)


def test_a_row_does_not_depend_on_its_company(folders):
    together = generate_completions(folders / "base", PROMPTS, base=folders / "tuned", decoding=FAST, batch_size=5)
    ids = [str(i) for i in range(5)]
    for order, batch_size in (([3, 1, 4], 2), ([4, 2, 0, 3, 1], 1)):
        some = datasets.Dataset.from_dict(
            {"prompt": [PROMPTS[i] for i in order], "prompt_id": [ids[i] for i in order]}
        )
        rows = generate_completions(
            folders / "base", some, base=folders / "tuned", decoding=FAST, batch_size=batch_size
        )
        for row, i in zip(rows, order, strict=True):
            assert texts([row]) == texts([together[i]])
            for name in NUMBERS:
                assert row[name] == pytest.approx(together[i][name], abs=1e-4)


def test_seed_sample_and_prompt_each_change_the_draw(folders):
    def completions(**changes):
        decoding = Decoding(**{"max_new_tokens": 12, "seed": 0, "num_samples": 3} | changes)
        return [row["completion"] for row in generate_completions(folders / "base", ["a", "a"], decoding=decoding)]

    first = completions()
    assert completions() == first
    assert completions(seed=1) != first
    assert len(set(first)) > 3


def test_padding_does_not_shift_absolute_positions(tokenizer):
    # Rotary positions are relative and would hide the shift; those of GPT-2 are learnt one by one.
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=18, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    model.transformer.wpe.weight.data *= 50
    policy, base = model, sharp_llama(0)
    rows = generate_completions(policy, PROMPTS, base=base, decoding=FAST, tokenizer=tokenizer, batch_size=5)
    for row in rows:
        (alone,) = generate_completions(
            policy, as_prompt_dataset(PROMPTS).select([int(row["prompt_id"])]), base=base, decoding=FAST,
            tokenizer=tokenizer,
        )  # fmt: skip
        assert texts([alone]) == texts([row])
        assert alone["logprob"] == pytest.approx(row["logprob"], abs=1e-4)


def test_the_base_is_at_no_distance_from_itself_and_without_a_base_there_is_none(folders):
    (row, *_) = generate_completions(folders / "base", PROMPTS, base=str(folders / "base"), decoding=FAST)
    assert (row["kl_k1_sum"], row["kl_k3_mean"]) == (0.0, 0.0)
    assert row["base_logprob"] == row["logprob"]
    (row, *_) = generate_completions(folders / "base", PROMPTS, decoding=FAST)
    assert [row[name] for name in NUMBERS[1:]] == [None] * 3


def test_the_head_reads_its_states_in_one_piece(folders, monkeypatch):
    """Gaps between rows make torch copy a frozen head once for each row: 7 times the time of an evaluation."""
    seen = []

    def watched(*args, **options):
        loaded = load_policy(*args, **options)
        head = loaded.model.get_output_embeddings()
        head.register_forward_pre_hook(lambda _, inputs: seen.append((inputs[0].is_contiguous(), inputs[0].shape[1])))
        return loaded

    monkeypatch.setattr("eval.generation.load_policy", watched)
    generate_completions(folders / "adapter", PROMPTS, decoding=FAST)
    assert all(whole for whole, _ in seen)
    assert max(positions for _, positions in seen) > 1


def test_an_adapter_is_measured_against_what_it_sits_on(folders):
    adapter = generate_completions(folders / "adapter", PROMPTS, decoding=FAST)
    named = generate_completions(folders / "adapter", PROMPTS, base=folders / "base", decoding=FAST)
    assert [[row[n] for n in NUMBERS] for row in adapter] == [[row[n] for n in NUMBERS] for row in named]
    together = load_policy(folders / "adapter", folders / "base")
    assert together.base is together.model  # one copy of the weights in memory, not two
    merged = together.model.merge_and_unload()
    whole = generate_completions(
        merged, PROMPTS, base=sharp_llama(0), decoding=FAST, tokenizer=load_policy(folders / "base").tokenizer
    )
    other_base = generate_completions(folders / "adapter", PROMPTS, base=folders / "tuned", decoding=FAST)
    assert texts(adapter) == texts(whole) == texts(other_base)
    for one, two, three in zip(adapter, whole, other_base, strict=True):
        assert [one[n] for n in NUMBERS] == pytest.approx([two[n] for n in NUMBERS], abs=1e-3)
        assert abs(three["base_logprob"] - one["base_logprob"]) > 1e-2
    assert max(abs(row["kl_k1_sum"]) for row in adapter) > 0.01


@pytest.mark.parametrize("special", [{"pad_token": "<eos>"}, {"pad_token": None}])
def test_padding_that_looks_like_eos_changes_nothing(folders, special, tokenizer):
    decoding = Decoding(max_new_tokens=12)
    plain = generate_completions(folders / "base", PROMPTS, base=folders / "tuned", decoding=decoding)
    odd = tiny_tokenizer(**special)
    rows = generate_completions(
        folders / "base", PROMPTS, base=folders / "tuned", decoding=decoding, tokenizer=odd, batch_size=5
    )
    assert texts(rows) == texts(plain)
    assert [r["finished"] for r in rows] == [r["finished"] for r in plain]
    assert [r["logprob"] for r in rows] == pytest.approx([r["logprob"] for r in plain], abs=1e-4)
    assert any(r["finished"] for r in rows)


def test_the_checkpoints_own_sampling_defaults_do_not_leak_in(folders, tokenizer):
    model = sharp_llama(0)
    plain = generate_completions(model, PROMPTS, decoding=FAST, tokenizer=tokenizer)
    habit = GenerationConfig(
        repetition_penalty=5.0, no_repeat_ngram_size=1, do_sample=True, temperature=0.2, eos_token_id=1, pad_token_id=0
    )
    model.generation_config = habit
    assert texts(generate_completions(model, PROMPTS, decoding=FAST, tokenizer=tokenizer)) == texts(plain)
    assert model.generation_config is habit


def test_greedy_takes_the_most_likely_token(folders, tokenizer):
    model = sharp_llama(0)
    (row,) = generate_completions(model, ["the film"], decoding=Decoding(5, temperature=0), tokenizer=tokenizer)
    ids = tokenizer("the film", return_tensors="pt")["input_ids"]
    for _ in range(row["completion_tokens"]):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert row["completion"] == tokenizer.decode(ids[0, 2:], skip_special_tokens=True)


def test_rows_carry_their_provenance_and_are_reused(folders, tmp_path, monkeypatch):
    path = tmp_path / "base.jsonl"
    rows = generate_completions(folders / "base", PROMPTS, name="base", decoding=FAST, path=path)
    assert read_jsonl(path) == rows
    assert (rows[0]["model"], rows[0]["source"], rows[0]["seed"]) == ("base", str(folders / "base"), 0)
    assert rows[0]["decoding"]["max_new_tokens"] == 7
    assert torch.__version__.startswith(rows[0]["versions"]["torch"].split("+")[0])
    assert rows[2]["prompt"] == PROMPTS[2]

    def refuse(*_, **__):
        raise AssertionError("a finished file must not load the policy again")

    with monkeypatch.context() as patch:
        patch.setattr("eval.generation.load_policy", refuse)
        assert generate_completions(folders / "base", PROMPTS, name="base", decoding=FAST, path=path) == rows
    changed = generate_completions(
        folders / "base", PROMPTS, name="base", decoding=Decoding(max_new_tokens=7, seed=4), path=path
    )
    assert read_jsonl(path) == changed != rows


def test_messages_go_through_the_chat_template(folders, tokenizer):
    chat = tiny_tokenizer()
    ending = "{% if add_generation_prompt %}{{ 'is' }}{% endif %}"
    chat.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}" + ending
    messages = [[{"role": "user", "content": "the film"}], [{"role": "user", "content": "a blue"}]]
    rows = generate_completions(sharp_llama(0), messages, decoding=FAST, tokenizer=chat)
    plain = generate_completions(sharp_llama(0), ["the film is", "a blue is"], decoding=FAST, tokenizer=tokenizer)
    assert texts(rows) == texts(plain)
    assert rows[0]["prompt"] == messages[0]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "no prompts were given"),
        (["the film", "  "], "id '1' is empty"),
        (["the " * 60, "a"], "1 of 2 prompts leave no room for 7 new tokens in a context of 64"),
        (datasets.Dataset.from_dict({"text": ["a"]}), "'prompt' column"),
        (datasets.Dataset.from_dict({"prompt": ["a", "the"], "prompt_id": [1, 1]}), "'1' occurs twice"),
    ],
)
def test_bad_prompts_are_refused(folders, prompts, message):
    with pytest.raises(ValueError, match=message):
        generate_completions(folders / "base", prompts, decoding=FAST)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_k": -1}, "top_k must be 0"),
        ({"num_samples": 0}, "num_samples must be"),
        ({"seed": -1}, "seed must be"),
        ({"temperature": 0.0, "num_samples": 2}, "same completion every time"),
    ],
)
def test_impossible_decoding_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Decoding(**settings)


def test_models_that_cannot_be_used_are_refused(folders, tmp_path, tokenizer):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither a model"):
        load_policy(tmp_path / "empty")
    with pytest.raises(ValueError, match="does not exist"):
        load_policy(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="KL between different vocabularies"):
        load_policy(folders / "base", sharp_llama(vocab_size=len(WORDS) + 9))
    (tmp_path / "bare").mkdir()
    sharp_llama(0).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="no tokenizer found"):
        load_policy(tmp_path / "bare")
    assert load_policy(tmp_path / "bare", folders / "base").tokenizer.eos_token == "<eos>"
    config = folders / "adapter" / "adapter_config.json"
    broken = tmp_path / "adapter"
    broken.mkdir()
    (broken / "adapter_config.json").write_text(
        config.read_text().replace(str(folders / "base"), str(tmp_path / "gone"))
    )
    with pytest.raises(ValueError, match=r"sits on .*gone, which cannot be loaded"):
        load_policy(broken)


def test_same_source_compares_folders_by_place(folders):
    assert same_source(folders / "base", folders / "tuned" / ".." / "base")
    assert not same_source(folders / "base", folders / "tuned")
    assert same_source("org/model", "org/model")
    assert not same_source(None, None)
