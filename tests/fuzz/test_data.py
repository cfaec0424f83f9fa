"""Data files as nobody should write them: rows come out whole, or one clear error names the file."""

import csv
import gc
import io
import json
import math

import datasets
import pytest
from distributed.launching import load_recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from eval.completions import candidates, read_completions, read_pairs
from eval.generation import as_prompt_dataset
from eval.preferences import preference_pairs
from eval.records import read_jsonl, read_seconds, write_jsonl
from reward.data import load_ratings, rating_dataset, rating_row
from reward.preferences import load_preferences, preference_row
from reward.tables import read_dataset

PPO = load_recipe("ppo")

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=6),
    st.sampled_from([10**400, 1e39, "1", "\ud800", "a\0b", "", " ", "[1, 2]"]),
)  # fmt: skip
MESSAGE = st.fixed_dictionaries({}, optional={"role": st.just("user") | SCALARS, "content": SCALARS})
MESSAGES = st.lists(MESSAGE, max_size=2)
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
BYTES = {
    "empty": b"",
    "blank": b"\n \n",
    "brace": b"{",
    "list": b"[]",
    "number": b"3",
    "null": b"null",
    "utf-16": b"\xff\xfea\0",
    "nul": b"\0\0\0",
    "torn": b'{"text": "a", "ratings": [1]}\n{"text": "b", "ra',
    "deep": b"[" * 5000,
    "mark": b"\xef\xbb\xbf",
    "long number": b'{"text": "a", "ratings": [' + b"9" * 400 + b"]}",
    "half a pair": b'{"text": "\\ud800", "ratings": [1]}',
}
# pandas leaves the file open that it could not read.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Nothing of what is read here stays, and nothing is drawn on the terminal."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    yield
    gc.collect()
    datasets.enable_progress_bars()


def refused(read, *arguments):
    """Whether it was refused; anything but an error for a user fails the test."""
    return refusal(read, *arguments) is not None


def refusal(read, *arguments) -> str | None:
    """Why it was refused."""
    try:
        read(*arguments)
    except (UnicodeDecodeError, json.JSONDecodeError):
        raise
    except (ValueError, OSError) as error:
        return str(error)
    return None


@given(text=ANY, ratings=ANY, rest=st.dictionaries(st.sampled_from(["source", "split"]), st.text(max_size=3)))
def test_a_row_of_ratings_is_made_or_refused(text, ratings, rest):
    if not refused(rating_row, text, ratings):
        row = rating_row(text, ratings, **rest)
        values = [v for part in row["ratings"] for v in (part if isinstance(part, list) else [part])]
        assert values
        assert all(math.isfinite(value) for value in values)
        refused(rating_dataset, [row, rating_row("another", 0.123)])


@given(
    row=st.fixed_dictionaries({}, optional=dict.fromkeys(("prompt", "chosen", "rejected", "margin"), ANY | MESSAGES))
)
def test_a_pair_is_made_or_refused(row):
    if not refused(preference_row, row):
        made = preference_row(row)
        assert made["chosen"].startswith(made["prompt"])
        assert math.isfinite(made["margin"])


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("name", sorted(BYTES))
def test_a_file_without_whole_rows_is_refused(tmp_path, name, suffix):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(BYTES[name])
    for read in (load_ratings, load_preferences):
        with pytest.raises((ValueError, OSError)) as caught:
            read(path)
        assert not isinstance(caught.value, UnicodeDecodeError | json.JSONDecodeError)
        assert str(path) in str(caught.value) or "column" in str(caught.value)


def test_forms_that_spreadsheets_write_are_read(tmp_path):
    rows = b'{"text": "a", "ratings": [1, 2]}\n{"text": "b", "ratings": [0]}\n'
    for name, content in (
        ("mark.jsonl", b"\xef\xbb\xbf" + rows),
        ("windows.jsonl", rows.replace(b"\n", b"\r\n")),
        ("mark.csv", b"\xef\xbb\xbftext,ratings\r\na,1\r\nb,0\r\n"),
    ):
        (tmp_path / name).write_bytes(content)
        assert load_ratings(tmp_path / name)["text"] == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a", "ratings": [1e39]}', "row 0 of .* ratings must be finite numbers, got 1e"),
        ("b.jsonl", b'{"text": "a", "ratings": [[1]], "attributes": ["h", "v"]}', "must be lists of one length"),
        ("c.jsonl", b'{"text": "a", "ratings": [[1]], "attributes": null}', "must be lists of one length"),
        ("d.csv", b"text,ratings\na,1\nb,2,3\n", "cannot read .*d.csv as a dataset .*Expected 2 fields in line 3"),
        ("e.csv", b"text,ratings\n", "cannot read .*e.csv"),
        ("f.json", b"null", "holds no rows"),
    ],
)
def test_the_error_names_row_or_file(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_ratings(tmp_path / name)


@pytest.mark.parametrize("content", [{"state.json": "{"}, {"state.json": "{}"}, {"dataset_dict.json": "[]"}, {}])
def test_a_folder_of_a_damaged_dataset_is_refused(tmp_path, content):
    for name, text in content.items():
        (tmp_path / name).write_text(text)
        (tmp_path / "dataset_info.json").write_text("{}")
    with pytest.raises((ValueError, OSError), match=str(tmp_path)):
        load_ratings(tmp_path)


@pytest.mark.parametrize("prompt", [3, None, [], ["x"], [{"role": "user"}], {"a": 1}, [[1]], True])
def test_prompts_that_are_neither_text_nor_messages_are_refused(tmp_path, prompt):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": prompt}) + "\n")
    with pytest.raises(ValueError, match=r"a prompt is text or a list of messages|holds no prompts|no column"):
        PPO.load_prompts(str(tmp_path / "p.jsonl"), None)
    with pytest.raises(ValueError, match="a prompt is text or a list of messages"):
        as_prompt_dataset(datasets.Dataset.from_list([{"prompt": prompt}]))


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": 3, "rejected": 4},
        {"chosen": [[1]], "rejected": [[2]]},
        {"prompt": {"a": 1}, "chosen": "a", "rejected": "b"},
    ],
)
def test_pairs_of_other_kinds_are_refused_in_both_readers(tmp_path, row):
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match="row 0"):
        load_preferences(tmp_path / "p.jsonl")
    assert refused(lambda: preference_pairs(read_dataset(tmp_path / "p.jsonl", None)[0])) or "prompt" in row


CELL = SCALARS | st.lists(SCALARS, max_size=3)
COLUMNS = {
    "text": st.just("a") | st.text(max_size=3) | SCALARS,
    "ratings": st.lists(st.floats(-3, 3), min_size=1, max_size=3) | st.floats(-3, 3) | ANY,
    "source": CELL, "split": CELL, "attributes": CELL, "prompt": st.just("p") | ANY | MESSAGES,
    "chosen": st.just("c") | ANY | MESSAGES, "rejected": st.just("r") | ANY | MESSAGES, "margin": CELL,
}  # fmt: skip
TEXTS = st.text("ab \"',\n\\\u2028é", min_size=1, max_size=4).filter(str.strip)
RATINGS = st.lists(st.floats(-3, 3), max_size=2).map(lambda drawn: [*drawn, -4.0, 4.0])  # not all equal
SOUND = st.one_of(
    st.lists(st.builds(lambda text, ratings: {"text": text, "ratings": ratings}, TEXTS, RATINGS), min_size=1),
    st.lists(st.builds(lambda text: {"chosen": text + "c", "rejected": text + "r"}, TEXTS), min_size=1),
)
ROWS = st.lists(st.fixed_dictionaries({}, optional=COLUMNS) | SCALARS, max_size=3)
WHOLE = st.just((0, b""))
TORN = st.tuples(st.integers(0, 12), st.sampled_from([b"", b"{", b"[", b",", b'"', b"\n\n", b"\xff", b"\0"]))


def file_content(rows: list, kind: str) -> bytes:
    """Rows as people's tools write them, sound or not."""
    if kind == "csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["text", "ratings", "chosen", "rejected"], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row for row in rows if isinstance(row, dict))
        return text.getvalue().encode(errors="surrogatepass")
    return (json.dumps(rows) if kind == "json" else "".join(json.dumps(row) + "\n" for row in rows)).encode()


@pytest.mark.slow
@given(
    content=st.tuples(SOUND, WHOLE) | st.tuples(SOUND | ROWS, WHOLE | TORN),
    kind=st.sampled_from(["jsonl", "json", "csv"]),
)
def test_a_file_of_ratings_or_pairs_is_read_or_refused(tmp_path_factory, content, kind):
    """Sound rows, rows of any other form, files that end in the middle and files with something behind their end."""
    rows, (cut, tail) = content
    written = file_content(rows, kind)
    # A folder of its own: datasets keeps what it has read under the name.
    path = tmp_path_factory.mktemp("rows") / f"rows.{kind}"
    path.write_bytes(written[: len(written) - cut] + tail)
    for read in (load_ratings, load_preferences):
        message = refusal(read, path)
        if message is None:
            assert 0 < len(read(path)) <= len(rows)
        else:
            assert str(path) in message or "row" in message or "column" in message, message


@settings(max_examples=settings.default.max_examples // 2)
@given(rows=SOUND, kind=st.sampled_from(["jsonl", "json"]))
def test_a_sound_file_is_read_whole(tmp_path_factory, rows, kind):
    path = tmp_path_factory.mktemp("rows") / f"rows.{kind}"
    path.write_bytes(file_content(rows, kind))
    if "text" in rows[0]:
        assert load_ratings(path)["text"][:] == [row["text"] for row in rows]
    else:
        assert load_preferences(path)["chosen"][:] == [row["chosen"] for row in rows]


FIELDS = {
    "prompt_id": st.just("a") | ANY, "sample": st.integers(0, 3) | ANY, "prompt": st.just("p") | MESSAGES | ANY,
    "completion": st.just("c") | ANY, "completion_tokens": st.integers(-2, 5) | ANY, "finished": st.booleans() | ANY,
}  # fmt: skip
EXTRA = dict.fromkeys(("kl_k1_sum", "kl_k3_mean", "decoding", "versions", "selection", "source"), ANY)


@given(
    rows=st.lists(st.fixed_dictionaries(FIELDS, optional=EXTRA), max_size=3),
    tail=st.sampled_from(["", "{", "[" * 4000]),
)
def test_a_completion_file_is_read_or_refused(tmp_path_factory, rows, tail):
    path = tmp_path_factory.getbasetemp() / "completions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    if not refused(read_completions, path):
        read = read_completions(path)
        assert len(read) == len(rows)
        if not refused(candidates, read):
            prompts, completions = read_pairs([row for group in candidates(read) for row in group])
            assert len(prompts) == len(completions) == len(rows)


@settings(max_examples=settings.default.max_examples // 2)
@given(content=st.binary(max_size=40) | ANY.map(lambda value: json.dumps(value).encode()))
def test_files_of_our_own_that_were_damaged_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "own.json"
    path.write_bytes(content)
    refused(read_jsonl, path)
    if not refused(read_seconds, path):
        assert all(isinstance(value, float) for value in read_seconds(path).values())


@given(text=st.text(st.characters(), max_size=20) | st.text("\ud800\udfff\0\u2028\r\n\\", max_size=8))
def test_whatever_a_model_wrote_survives_the_file(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    write_jsonl(path, [{"completion": text}, {"completion": "next"}])
    # Two halves of a surrogate pair that happen to meet are the character that they stand for, as JSON has it.
    whole = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert [row["completion"] for row in read_jsonl(path)] == [whole, "next"]
