"""Items of evaluation sets are found in documents, whatever case and punctuation."""

import dataclasses
import gzip
import json
import pathlib
import random

import pyarrow
import pyarrow.parquet
import pytest
from cleaned import corpus, left, text_of, write_lines

from mobilellm_jax.clean import clean, table
from mobilellm_jax.data.decontamination import EvalIndex, EvalSets
from mobilellm_jax.data.ngrams import ngram_hashes, words
from mobilellm_jax.errors import UserError

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't  STOP,\nnow!", "dont stop now"),
        ("don’t stop—now…", "dont stop now"),
        ("\\frac{a}{b} = 3.5$", "frac a b 3 5"),
        ("“Ünïcode” x² ﬁne", "ünïcode x2 fine"),
        ("?!... ---", ""),
    ],
)
def test_case_punctuation_and_spacing_do_not_matter(text, expected):
    assert words(text) == expected.split()


def test_equal_ngrams_have_equal_hashes_and_others_do_not(monkeypatch):
    sequence = text_of(random.Random(0), 3000).split()
    for length, hashes in zip((1, 3, 8), ngram_hashes(sequence, (1, 3, 8)), strict=True):
        grams = [tuple(sequence[i : i + length]) for i in range(len(sequence) - length + 1)]
        assert len(hashes) == len(grams)
        assert len(set(zip(grams, hashes.tolist(), strict=True))) == len(set(grams))
        assert len(set(hashes.tolist())) == len(set(grams))
    assert [len(hashes) for hashes in ngram_hashes(["one", "two"], (2, 3, 9))] == [1, 0, 0]


QUESTION = (
    "Which of these planets, seen from the Earth's surface, looks brightest just before dawn?"
)


def index(tmp_path, *items, keys=("question", "answer"), **options):
    path = write_lines(tmp_path / "planets.jsonl", items)
    return EvalIndex(EvalSets((str(path),), keys, **options))


@pytest.mark.parametrize(
    ("text", "held"),
    [
        (QUESTION, True),
        (QUESTION.upper().replace(" ", "\n"), True),
        (f"see:{QUESTION}".replace("'", "’").replace(",", " –"), True),
        (" ".join(QUESTION.split()[1:]), True),
        (" ".join(QUESTION.split()[:12]), False),
        (QUESTION.replace("Earth's", "Moon's"), False),
    ],
)
def test_thirteen_words_in_a_row_are_a_match_whatever_case_and_punctuation(tmp_path, text, held):
    found = index(tmp_path, {"question": QUESTION})
    filler = text_of(random.Random(6), 30)
    assert len(words(QUESTION)) == 14
    for document in (text, f"{filler} {text} {filler}"):
        matches = found.matches(document)
        assert [match.item for match in matches] == [0] * held
        assert all(match.shared in " ".join(words(document)) for match in matches)


def test_a_shorter_item_matches_whole_and_a_very_short_one_never(tmp_path):
    nine = "the brightest planet before dawn is most often Venus"
    found = index(
        tmp_path, {"question": nine}, {"question": "Which planet?", "answer": "It is Venus."}
    )
    assert [m.item for m in found.matches(f"Yes, {nine.title()}, say many.")] == [0]
    assert not found.matches(nine.rpartition(" ")[0])
    assert not found.matches("Which planet? It is Venus.") and found.too_short == [1]
    shorter = index(tmp_path, {"question": "Which planet?", "answer": "It is Venus."}, shortest=5)
    assert shorter.matches("which planet is it: Venus") == []
    assert [m.item for m in shorter.matches("Which planet -- it is Venus")] == [0]


def test_fields_count_alone_and_together_and_lists_text_by_text(tmp_path):
    item = {
        "question": "How is the old wooden door opened?",
        "choices": ["By a brass key", "By force"],
    }
    found = index(tmp_path, item, keys=("question", "choices"), ngram=9)
    assert found.matches("How is the old wooden door opened? By force!")
    assert found.matches("is the old wooden door opened by a brass key")
    assert not found.matches("How is the old wooden door opened?")  # 7 words


def test_fields_inside_of_fields_are_named(tmp_path):
    item = {"question": {"stem": QUESTION, "choices": [{"text": "one"}, {"text": "two"}]}}
    with pytest.raises(
        UserError, match="item 1: 'question' .* holds stem, choices: .*question.stem"
    ):
        index(tmp_path, item, keys=("question",))
    found = index(tmp_path, item, keys=("question.stem", "question.choices.text"))
    (match,) = found.matches(f"before {QUESTION} behind")
    assert match.item == 0


def test_all_items_that_share_an_ngram_are_found(tmp_path):
    found = index(tmp_path, *({"question": f"{QUESTION} {i}"} for i in range(3)))
    assert [match.item for match in found.matches(QUESTION)] == [0, 1, 2]


def test_compressed_sets_hold_the_same_items(tmp_path):
    lines = "".join(json.dumps({"question": f"{QUESTION} {i}"}) + "\n" for i in range(3)).encode()
    (tmp_path / "plain.jsonl").write_bytes(lines)
    (tmp_path / "gzipped.jsonl.gz").write_bytes(gzip.compress(lines))
    with pyarrow.CompressedOutputStream(str(tmp_path / "packed.ndjson.zst"), "zstd") as packed:
        packed.write(lines)
    items = [*EvalSets((f"{tmp_path}/*",), ("question",)).items()]
    assert len(items) == 9
    for place in (1, 2, 3):
        same = [item for item in items if item.place == place]
        assert {item.set for item in same} == {"plain", "gzipped", "packed"}
        assert {item.texts for item in same} == {(f"{QUESTION} {place - 1}",)}


def test_what_is_looked_for_has_a_fingerprint_of_its_own(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"question": QUESTION}])
    sets = EvalSets((str(path),), ("question",))
    others = [
        dataclasses.replace(sets, keys=("question", "answer")),
        dataclasses.replace(sets, ngram=12),
        dataclasses.replace(sets, shortest=7),
    ]
    found = [json.dumps(one.fingerprint) for one in (sets, *others)]
    assert found[0] == json.dumps(dataclasses.replace(sets).fingerprint)
    write_lines(path, [{"question": QUESTION}] * 2)
    assert len({*found, json.dumps(sets.fingerprint)}) == 5


def test_what_was_removed_is_counted_by_set(tmp_path):
    rng = random.Random(7)
    a, b = text_of(rng, 20), text_of(rng, 9)
    write_lines(
        tmp_path / "a.jsonl.gz", [{"question": a}, {"question": "no"}, {"question": text_of(rng)}]
    )
    rows = pyarrow.table({"context": ["c", b], "answer": [1, None]})
    pyarrow.parquet.write_table(rows, tmp_path / "b.parquet")
    texts = [text_of(rng), f"{a} {b}", b, text_of(rng), b]
    sets = EvalSets(
        (f"{tmp_path}/a.jsonl.gz", f"{tmp_path}/*.parquet"), ("question", "context", "answer")
    )
    source = corpus(tmp_path, texts)
    report = clean(source, tmp_path / "out", dedup=["exact"], evals=sets, workers=1)
    assert [record["place"] for record in left(tmp_path / "out")] == [1, 4]
    assert report["evaluation"]["sets"] == {
        "a": {"items": 3, "too_short": 1, "found": 1, "documents": 1},
        "b": {"items": 2, "too_short": 1, "found": 1, "documents": 2},
    }
    first, second = report["evaluation"]["examples"]
    assert first["set"] == "a" and first["item"] == 1 and first["removed"]["id"] == "d1"
    assert second["shared"] == b and second["item"] == 2
    assert report["evaluation"]["often"][0] == {
        "documents": 2,
        "set": "b",
        "item": 2,
        "item_text": b,
    }
    told = table(report)
    assert "evaluation items          2" in told and "exact copies" in told and "near" not in told
