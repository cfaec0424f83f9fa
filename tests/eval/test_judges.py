"""Judges against one text at a time, and what happens when they fail."""

import math
import os
import signal
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from transformers import BertConfig, BertForSequenceClassification

from eval.judges import Judgement, JudgeSpecError, judge_completions, judgement_from_rows, parse_judge
from eval.records import WorkError, fingerprint, read_jsonl
from reward.distribution import RewardDistribution
from reward.modeling import QRMForSequenceClassification

PAIRS = [
    ("the film was ", "very bad"),
    ("a ", "good red film is safe the blue"),
    ("blue is ", "not fine"),
    ("the ", ""),
]
ROWS = [
    {"prompt_id": f"p{i}", "sample": 0, "prompt": prompt, "completion": completion}
    for i, (prompt, completion) in enumerate(PAIRS)
]
STARS = {0: "1 star", 1: "2 stars", 2: "3 stars"}


def tiny_bert(folder, id2label, **config):
    torch.manual_seed(len(id2label))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40}
    bert = BertConfig(vocab_size=18, max_position_embeddings=32, id2label=id2label, pad_token_id=0, **sizes, **config)
    model = BertForSequenceClassification(bert).eval()
    model.classifier.weight.data *= 40
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def logits_of(model, text):
    with torch.no_grad():
        return model(**tiny_tokenizer()(text, return_tensors="pt")).logits[0].double()


@pytest.fixture(scope="module")
def qrm(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qrm")
    model = QRMForSequenceClassification.from_backbone(tiny_llama(), quantile_levels=[0.1, 0.4, 0.7]).eval()
    model.quantile_head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder, model


def test_qrm_judge_gives_the_mean_and_the_mass_of_each_law(qrm):
    folder, model = qrm
    judgement = judge_completions(parse_judge(f"qrm:{folder}", batch_size=3), ROWS)
    for i, row in enumerate(ROWS):
        ids = tiny_tokenizer()(row["prompt"] + row["completion"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            law = model.distribution(model(input_ids=ids))
        assert judgement.scores[i] == pytest.approx(law.mean().item(), abs=1e-4)
        assert judgement.distribution.values[i].tolist() == pytest.approx(law.values[0].tolist(), abs=1e-4)
        assert judgement.tail_mass(0.2)[i] == pytest.approx(law.cdf(0.2).item(), abs=1e-3)
    assert judgement.scores.std() > 0.01
    assert judgement.distribution.levels.tolist() == pytest.approx([0.1, 0.4, 0.7])


def test_any_source_of_laws_judges_with_its_tail(qrm, tmp_path):
    folder, model = qrm
    bert = tiny_bert(tmp_path, {0: "LABEL_0"})
    judge = parse_judge(f"source:mixture:0.75*{folder}+0.25*{tmp_path}", batch_size=3)
    judgement = judge_completions(judge, ROWS, path=tmp_path / "scores.jsonl")
    again = judgement_from_rows(read_jsonl(tmp_path / "scores.jsonl"))
    for i, row in enumerate(ROWS):
        text = row["prompt"] + row["completion"]
        with torch.no_grad():
            law = model.distribution(model(input_ids=tiny_tokenizer()(text, return_tensors="pt")["input_ids"]))
        point = logits_of(bert, text).item()
        assert judgement.scores[i] == pytest.approx(0.75 * law.mean().item() + 0.25 * point, abs=1e-4)
        mass = 0.75 * law.cdf(0.2).item() + 0.25 * (point <= 0.2)
        # Masses of a mixture are within 1.5/400.
        assert judgement.tail_mass(0.2)[i] == pytest.approx(mass, abs=1.5 / 400)
    assert again.tail_mass(0.2) == pytest.approx(judgement.tail_mass(0.2), abs=1e-6)
    # A change of any model behind it makes the scores stale.
    before = fingerprint(judge.identity())
    (tmp_path / "config.json").write_text((tmp_path / "config.json").read_text() + "\n")
    assert fingerprint(judge.identity()) != before


def test_classifier_with_ratings_as_labels_gives_the_expected_rating(tmp_path):
    model = tiny_bert(tmp_path, STARS)
    judge = parse_judge(f"classifier:{tmp_path}", batch_size=3)
    judgement = judge_completions(judge, ROWS)
    for i, row in enumerate(ROWS):
        p = logits_of(model, row["prompt"] + row["completion"]).softmax(-1).tolist()
        assert judgement.scores[i] == pytest.approx(p[0] + 2 * p[1] + 3 * p[2], abs=1e-5)
    assert judgement.scores.std() > 0.01
    assert judgement.distribution is None
    assert judgement.tail_mass(0.0) is None
    assert judge.unit == "expected rating"


@pytest.mark.parametrize(("label", "sign"), [("toxic", 1), ("-toxic", -1)])
@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_classifier_with_a_named_label_gives_its_probability(tmp_path, label, sign, problem):
    model = tiny_bert(tmp_path, {0: "insult", 1: "toxic"}, problem_type=problem)
    judgement = judge_completions(parse_judge(f"classifier:{tmp_path}:{label}"), ROWS)
    logits = torch.stack([logits_of(model, row["prompt"] + row["completion"]) for row in ROWS])
    law = logits.softmax(-1) if problem.startswith("single") else logits.sigmoid()
    assert judgement.scores == pytest.approx(sign * law[:, 1].numpy(), abs=1e-5)


def test_classifier_with_one_label_gives_its_logit_and_reads_only_what_it_should(tmp_path):
    model = tiny_bert(tmp_path, {0: "LABEL_0"})
    judge = parse_judge(f"classifier:{tmp_path}")
    both, alone = (judge_completions(judge, ROWS[:3], reads=r).scores for r in ("prompt+completion", "completion"))
    logits = [logits_of(model, r["prompt"] + r["completion"]).item() for r in ROWS[:3]]
    assert both == pytest.approx(logits, abs=1e-4)
    assert alone == pytest.approx([logits_of(model, r["completion"]).item() for r in ROWS[:3]], abs=1e-4)
    assert np.abs(both - alone).min() > 1e-3
    with pytest.raises(ValueError, match="reads is"):
        judge_completions(judge, ROWS, reads="prompt")


def test_a_long_text_loses_its_beginning(tmp_path):
    model = tiny_bert(tmp_path, {0: "LABEL_0"})
    judge = parse_judge(f"classifier:{tmp_path}", max_length=4)
    rows = [{**ROWS[0], "completion": "not very good"}]
    kept = logits_of(model, "was not very good").item()
    assert judge_completions(judge, rows).scores[0] == pytest.approx(kept, abs=1e-4)


@pytest.mark.parametrize("kind", ["qrm", "classifier"])
def test_a_model_has_no_opinion_on_an_empty_text(tmp_path, qrm, kind):
    tiny_bert(tmp_path, {0: "LABEL_0"})
    judge = parse_judge(f"qrm:{qrm[0]}" if kind == "qrm" else f"classifier:{tmp_path}")
    some, blank = judge_completions(judge, ROWS[:3], reads="completion"), {**ROWS[3], "completion": " \n"}
    judgement = judge_completions(judge, [*ROWS[:3], blank], reads="completion")
    assert judgement.scores == pytest.approx([*some.scores, math.nan], abs=1e-4, nan_ok=True)
    assert judge_completions(judge, [blank], reads="completion").failures == 1
    if kind == "qrm":
        assert np.isnan(judgement.tail_mass(0.0)).tolist() == [False, False, False, True]


def test_messages_are_judged_through_the_judges_own_template(qrm):
    folder, model = qrm
    judge = parse_judge(f"qrm:{folder}")
    judge.reward.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"
    row = {"prompt_id": "a", "sample": 0, "prompt": [{"role": "user", "content": "the film"}], "completion": "is bad"}
    judgement = judge_completions(judge, [row])
    ids = tiny_tokenizer()("the film <eos> is bad <eos>", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert judgement.scores[0] == pytest.approx(model(input_ids=ids).score.item(), abs=1e-4)


def test_vader_judges_or_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment", None)
    with pytest.raises(JudgeSpecError, match="pip install vaderSentiment"):
        parse_judge("vader")
    package, module = ModuleType("vaderSentiment"), ModuleType("vaderSentiment.vaderSentiment")
    compound = {"the film was very bad": -0.6}
    module.SentimentIntensityAnalyzer = lambda: SimpleNamespace(
        polarity_scores=lambda text: {"compound": compound.get(text, 0.25)}
    )
    monkeypatch.setitem(sys.modules, "vaderSentiment", package)
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", module)
    assert judge_completions(parse_judge("vader"), ROWS).scores.tolist() == [-0.6, 0.25, 0.25, 0.25]


@pytest.fixture
def functions(monkeypatch):
    module = ModuleType("my_judges")
    module.length = lambda completions: [len(c) for c in completions]
    module.trl_style = lambda prompts, completions, **columns: [
        len(a + b) for a, b in zip(prompts, completions, strict=True)
    ]
    module.broken = lambda texts: [1.0, math.nan, None, -math.inf]
    module.short = lambda texts: [1.0]
    module.number = 3

    async def later(texts):
        return [float(len(t)) for t in texts]

    module.later = later
    monkeypatch.setitem(sys.modules, "my_judges", module)


def test_functions_get_what_they_name(functions):
    for name, expected in (
        ("length", [len(r["completion"]) for r in ROWS]),
        ("trl_style", [len(r["prompt"] + r["completion"]) for r in ROWS]),
        ("later", [len(r["prompt"] + r["completion"]) for r in ROWS]),
    ):
        assert judge_completions(parse_judge(f"python:my_judges:{name}"), ROWS).scores.tolist() == expected


def test_failures_become_nan_and_are_counted_and_survive_the_file(functions, tmp_path):
    path = tmp_path / "scores.jsonl"
    judgement = judge_completions(parse_judge("python:my_judges:broken"), ROWS, path=path)
    again = judgement_from_rows(read_jsonl(path))
    for result in (judgement, again):
        # Rows go to the judge longest completion first; the second, first, third and fourth of its answers.
        assert np.isfinite(result.scores).tolist() == [False, True, False, False]
        assert result.failures == 3
    assert [row["score"] for row in read_jsonl(path)] == [None, 1.0, None, None]


def test_a_failed_law_stays_nan_in_scores_and_masses():
    values = torch.tensor([[0.0, 1.0], [math.nan, 2.0]])
    law = RewardDistribution(levels=torch.tensor([0.25, 0.75]), values=values)
    judgement = Judgement(law.mean().double().numpy(), law)
    assert judgement.failures == 1
    assert np.isnan(judgement.tail_mass(0.5)).tolist() == [False, True]


def test_scores_are_reused_until_judge_or_completions_change(tmp_path, functions):
    path, calls = tmp_path / "scores.jsonl", []
    sys.modules["my_judges"].counted = lambda texts: calls.append(1) or [0.0] * len(texts)
    judge = parse_judge("python:my_judges:counted")
    for _ in range(2):
        judge_completions(judge, ROWS, path=path)
    assert len(calls) == 1
    judge_completions(judge, [*ROWS[:3], {**ROWS[3], "completion": "other"}], path=path)
    judge_completions(judge, [*ROWS[:3], {**ROWS[3], "completion": "other"}], path=path, reads="completion")
    assert len(calls) == 3


def test_a_function_that_loses_completions_is_refused(functions):
    with pytest.raises(WorkError, match="python:my_judges:short returned 1 numbers for 4 completions"):
        judge_completions(parse_judge("python:my_judges:short"), ROWS)


def test_a_judge_that_fails_costs_the_batch_in_hand(functions, tmp_path):
    path, seen = tmp_path / "scores.jsonl", []

    def faltering(texts):
        if len(seen) == 2:
            raise ConnectionError("quota")
        seen.extend(texts)
        return [float(len(text)) for text in texts]

    sys.modules["my_judges"].faltering = faltering
    judge = parse_judge("python:my_judges:faltering")
    message = r"judge policy failed \(ConnectionError: quota\)\. 2 of 4 rows are done and kept beside .*scores.jsonl"
    with pytest.raises(WorkError, match=message) as raised:
        judge_completions(judge, ROWS, path=path, batch_size=2)
    assert isinstance(raised.value.__cause__, ConnectionError)
    assert not path.exists()
    seen.append("mended")
    assert judge_completions(judge, ROWS, path=path, batch_size=2).scores.tolist() == [
        len(row["prompt"] + row["completion"]) for row in ROWS
    ]
    assert len(seen) == 5


def test_a_judge_whose_process_dies_costs_the_batch_in_hand(functions, tmp_path):
    path, seen = tmp_path / "scores.jsonl", tmp_path / "seen"

    def dying(texts):
        if len(texts) == 1 and not (tmp_path / "mended").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        with seen.open("a") as handle:
            handle.write("x" * len(texts))
        return [float(len(text)) for text in texts]

    sys.modules["my_judges"].dying = dying
    judge = parse_judge("python:my_judges:dying")
    child = os.fork()
    if child == 0:
        judge_completions(judge, ROWS, path=path, batch_size=3)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert seen.read_text() == "xxx"
    (tmp_path / "mended").touch()
    assert judge_completions(judge, ROWS, path=path, batch_size=3).failures == 0
    assert seen.read_text() == "xxxx"


def test_text_is_no_score(functions):
    sys.modules["my_judges"].talkative = lambda texts: ["7"] * len(texts)
    with pytest.raises(WorkError, match="talkative returned str '7' for completion 0"):
        judge_completions(parse_judge("python:my_judges:talkative"), ROWS)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("qmr:folder", r"unknown judge 'qmr:folder'\. Valid judge specs.*classifier:path-or-id:label"),
        ("qrm:", "unknown judge"),
        ("source:", "unknown judge"),
        ("source:ensmble:a,b", "source:ensmble:a,b: unknown kind of reward model 'ensmble'"),
        ("source:mixture:0.5*./nowhere+0.5*a", r"\./nowhere does not exist"),
        ("vader:compound", "unknown judge"),
        ("python:module", "unknown judge"),
        ("python:no_such_module:f", "cannot load python:no_such_module:f"),
        ("python:my_judges:missing", "cannot load"),
        ("python:my_judges:number", "is a int, not a function"),
        ("qrm:./nowhere", "does not exist"),
        ("classifier:/no/where:toxic", "does not exist"),
    ],
)
def test_bad_specs_are_refused_with_advice(spec, message, functions):
    with pytest.raises(JudgeSpecError, match=message):
        parse_judge(spec)


def test_models_of_the_wrong_kind_are_refused(tmp_path, qrm):
    tiny_bert(tmp_path / "named", {0: "insult", 1: "toxic"})
    tiny_bert(tmp_path / "unnamed", {0: "LABEL_0", 1: "LABEL_1"})
    tiny_bert(tmp_path / "scalar", {0: "LABEL_0"})
    (tmp_path / "empty").mkdir()
    for spec, message in (
        (f"classifier:{tmp_path}/named", "labels insult, toxic, which are not ratings"),
        (f"classifier:{tmp_path}/unnamed", "labels LABEL_0, LABEL_1"),
        (f"classifier:{tmp_path}/named:rude", "no label 'rude'; the model has insult, toxic"),
        (f"classifier:{qrm[0]}", "write qrm:"),
        (f"qrm:{tmp_path}/scalar", "write classifier:"),
        (f"qrm:{tmp_path}/empty", r"config\.json is missing"),
    ):
        with pytest.raises(JudgeSpecError, match=message):
            parse_judge(spec)
