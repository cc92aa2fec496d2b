"""Probe sets from corpora: each document has one decision, and neither files nor interruptions change any."""

import json
import random

import numpy as np
import pyarrow.parquet
import pytest
import runs
import tiny
from weights import random_leaves

from data_mixing import probe_sets, text_measures
from data_mixing.probes import Measures, make, parse_capabilities
from data_mixing.selection import Rules
from data_mixing.text_measures import Measure
from mobilellm_jax.data.corpora import FileCorpus, split_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.training import checkpoint

CAPABILITIES = {"code": ("stack", "web"), "knowledge": ("web",)}
RULES = Rules(quality_above=0.2, fraction=0.5, alike=0.999, most=25)


def unit_hash(text, salt):
    return random.Random(f"{salt}{text}").random()


class Scorer:
    """Scores by hashes of texts; it counts what it is asked, and stops after some texts if told to."""

    def __init__(self, name, vector=False, stop_after=None):
        self.name, self.vector, self.left, self.asked = name, vector, stop_after, []

    def __call__(self, texts):
        if self.left is not None:
            self.left -= len(texts)
            if self.left < 0:
                raise KeyboardInterrupt
        self.asked += texts
        if self.vector:
            return np.array([[unit_hash(t, i) - 0.5 for i in range(3)] for t in texts], np.float32)
        return np.array([unit_hash(t, self.name) for t in texts])

    @property
    def measure(self):
        return Measure({"name": self.name}, self)


def measures(**changed):
    scorers = {
        "quality": Scorer("quality"),
        "reasoning": Scorer("reasoning"),
        "domain": {source: Scorer(f"domain {source}") for source in ("stack", "web")},
        "embedding": Scorer("embedding", vector=True),
    } | changed
    domain = {source: scorer.measure for source, scorer in scorers.pop("domain").items()}
    return Measures(domain=domain, **{n: s and s.measure for n, s in scorers.items()})


def write(folder, texts, files=1):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(files):
        lines = [json.dumps({"id": f"d{n}", "text": t}) for n, t in enumerate(texts)][i::files]
        (folder / f"{i}.jsonl").write_text("\n".join(lines) + "\n")


TEXTS = {
    "stack": tiny.documents("sums", 150, seed=5),
    "web": tiny.documents("words", 250, seed=6) + tiny.documents("words", 20, seed=6),
}
TEXTS["web"] += TEXTS["stack"][:30]


def corpora(folder, heldout=0.5, **options):
    return [FileCorpus(n, f"{folder}/{n}/*.jsonl", heldout=heldout, **options) for n in TEXTS]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, texts in TEXTS.items():
        write(folder / name, texts)
    return folder


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(text_measures, "CHUNK", 16)


def decisions(out):
    return {
        n: pyarrow.parquet.read_table(out / "decisions" / f"{n}.parquet").to_pylist() for n in TEXTS
    }


def contents(out):
    return {str(p.relative_to(out)): b for p, b in runs.files(out).items()}


def test_every_document_of_the_split_has_one_decision_and_its_reason(data, tmp_path):
    sets = make(corpora(data), CAPABILITIES, tmp_path / "out", RULES, measures())
    assert probe_sets.load(tmp_path / "out") == sets and not (tmp_path / "out" / "work").exists()
    settings = json.loads((tmp_path / "out" / "probes.json").read_text())["settings"]
    kept_names = set()
    for name, rows in decisions(tmp_path / "out").items():
        texts = TEXTS[name]
        of_split = [n for n, t in enumerate(texts) if split_of(t.encode(), 0.5) == "heldout"]
        assert [row["number"] for row in rows] == list(range(1, len(of_split) + 1))
        assert [row["place"] for row in rows] == [n + 1 for n in of_split]
        assert [row["id"] for row in rows] == [f"d{n}" for n in of_split]
        assert [row["bytes"] for row in rows] == [len(texts[n].encode()) for n in of_split]
        rows_of = {
            stage: [r for r in rows if r["stage"] == stage]
            for stage in ("copy", "quality", "reasoning", "domain", "alike", "most", "kept")
        }
        assert sum(map(len, rows_of.values())) == len(rows)
        kept_names |= {f"{name}:{r['number']}" for r in rows if r["kept"]}
        for row in rows:
            text = texts[row["place"] - 1]
            assert row["kept"] == (row["stage"] == "kept")
            if row["quality"] is not None:
                assert row["quality"] == unit_hash(text, "quality")
            begins = {
                "copy": f"a copy of {name}:",
                "quality": f"quality {row['quality'] or 0:.4g}, not above 0.2",
                "reasoning": f"reasoning {row['reasoning'] or 0:.4g}, not in the top 50%",
                "domain": f"domain {row['domain'] or 0:.4g}, not in the top 50%",
                "alike": ("like ", "a copy of "),
                "most": "not among the best 25",
                "kept": "kept as number ",
            }
            assert row["reason"].startswith(begins[row["stage"]])
        # Each stage takes what the one before has left.
        asked = [r for r in rows if r["stage"] not in ("copy", "quality")]
        assert all(r["quality"] > 0.2 for r in asked)
        assert len(asked) - len(rows_of["reasoning"]) == -(-len(asked) // 2)
        after = [r for r in asked if r["stage"] != "reasoning"]
        cut = min(r["reasoning"] for r in after)
        assert all(r["reasoning"] <= cut and r["domain"] is None for r in rows_of["reasoning"])
        # What is kept is in the file, best first.
        assert [p.text for p in sets.documents[name]] == [
            texts[r["place"] - 1] for r in sorted(rows_of["kept"], key=lambda r: -r["domain"])
        ]
        funnel = settings["funnel"][name]
        assert funnel["most"] == len(rows_of["kept"]) == funnel["score"] + funnel["heldout"]
        assert funnel["read"] - funnel["copy"] == len(rows_of["copy"])
    assert len({p.text for probes in sets.documents.values() for p in probes}) == len(kept_names)
    for rows in decisions(
        tmp_path / "out"
    ).values():  # one is never dropped for one that is dropped
        assert {r["nearest"] for r in rows if r["nearest"]} <= kept_names


def test_no_training_document_is_looked_at_unless_asked_for(data, tmp_path):
    for split in ("heldout", "train", "all"):
        sets = make(corpora(data), CAPABILITIES, tmp_path / split, Rules(), split=split)
        texts = {p.text for probes in sets.documents.values() for p in probes}
        everything = {t for some in TEXTS.values() for t in some}
        assert texts == {t for t in everything if split in (split_of(t.encode(), 0.5), "all")}


def test_halves_are_disjoint_and_neither_order_nor_further_files_change_them(data, tmp_path):
    sets = make(corpora(data), CAPABILITIES, tmp_path / "out", RULES, measures())
    rng = random.Random(0)
    for name, texts in TEXTS.items():
        write(tmp_path / "shuffled" / name, rng.sample(texts, len(texts)), files=3)
        write(tmp_path / "more" / name, texts + tiny.documents("words", 80, seed=9), files=2)
    shuffled = make(corpora(tmp_path / "shuffled"), CAPABILITIES, tmp_path / "b", RULES, measures())
    assert {n: [(p.text, p.half) for p in d] for n, d in sets.documents.items()} == {
        n: [(p.text, p.half) for p in d] for n, d in shuffled.documents.items()
    }
    assert shuffled.fingerprint == sets.fingerprint
    more = make(corpora(tmp_path / "more"), CAPABILITIES, tmp_path / "c", RULES, measures())
    side = {p.text: p.half for d in sets.documents.values() for p in d}
    both = [p for d in more.documents.values() for p in d if p.text in side]
    assert len(both) > 10 and all(p.half == side[p.text] for p in both)
    for capability in CAPABILITIES:
        score, heldout = ({p.text for p in sets.of(capability, half)} for half in probe_sets.HALVES)
        assert score and heldout and not score & heldout


@pytest.mark.parametrize("stage", ["quality", "reasoning", "domain", "embedding"])
def test_what_was_killed_goes_on_and_ends_with_the_same_bytes(stage, data, tmp_path, small_chunks):
    def scorers(stop_after=None):
        name = "domain web" if stage == "domain" else stage
        scorer = Scorer(name, stage == "embedding", stop_after)
        rest = {"stack": Scorer("domain stack")}
        return scorer, {stage: {**rest, "web": scorer} if stage == "domain" else scorer}

    (whole, undisturbed), (stopping, changed), (again, then) = (
        scorers(stop_after) for stop_after in (None, 20, None)
    )
    make(corpora(data), CAPABILITIES, tmp_path / "whole", RULES, measures(**undisturbed))
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        make(corpora(data), CAPABILITIES, out, RULES, measures(**changed))
    assert not out.exists() and stopping.asked and again.asked == []
    earlier = Scorer("quality")
    make(corpora(data), CAPABILITIES, out, RULES, measures(**{"quality": earlier, **then}))
    assert contents(out) == contents(tmp_path / "whole")
    assert again.asked and stopping.asked + again.asked == whole.asked
    assert not earlier.asked or stage == "quality"


def test_what_is_complete_is_kept_and_nothing_else_is_touched(data, tmp_path):
    out, given = tmp_path / "out", (corpora(data), CAPABILITIES)
    first = make(*given, out, RULES, measures())
    before = contents(out)
    quiet = Scorer("quality")
    assert make(*given, out, RULES, measures(quality=quiet)) == first and not quiet.asked
    for changed in (
        lambda: make(*given, out, Rules(), measures()),
        lambda: make(*given, out, RULES, measures(quality=None)),
        lambda: make(corpora(data, heldout=0.4), CAPABILITIES, out, RULES, measures()),
        lambda: make(corpora(data), {"code": ("stack", "web")}, out, RULES, measures()),
    ):
        with pytest.raises(UserError, match="other input or with other options"):
            changed()
    assert contents(out) == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("a year's work")
    with pytest.raises(UserError, match="exists and is not empty"):
        make(*given, tmp_path / "mine", RULES, measures())


def test_while_it_grows_thresholds_may_change_and_who_scores_may_not(data, tmp_path):
    out, high = tmp_path / "out", Rules(quality_above=2.0)
    first = Scorer("quality")
    with pytest.raises(UserError) as error:
        make(corpora(data), CAPABILITIES, out, high, measures(quality=first))
    assert "nothing is left of the source stack after quality" in str(error.value)
    assert "--quality_threshold=2 (the best has " in str(error.value)
    with pytest.raises(UserError, match="begun with another quality: delete it"):
        make(corpora(data), CAPABILITIES, out, RULES, measures(quality=Scorer("other")))
    second = Scorer("quality")
    make(corpora(data), CAPABILITIES, out, RULES, measures(quality=second))
    fresh = Scorer("quality")
    make(corpora(data), CAPABILITIES, tmp_path / "fresh", RULES, measures(quality=fresh))
    assert first.asked and first.asked + second.asked == fresh.asked
    assert contents(out) == contents(tmp_path / "fresh")


def test_a_source_that_is_like_the_others_is_told_of(data, tmp_path):
    write(tmp_path / "more", TEXTS["stack"])
    copied = FileCorpus("z", f"{tmp_path}/more/*.jsonl", heldout=0.5)
    capabilities = {"code": ("stack", "z")}
    with pytest.raises(UserError, match=r"nothing is left of the source z: all .* like those of"):
        make([corpora(data)[0], copied], capabilities, tmp_path / "out", Rules())


def test_places_are_lines_of_whole_files_also_where_parts_cut_them(data, tmp_path):
    whole = make(corpora(data), CAPABILITIES, tmp_path / "a", Rules())
    cut = make(corpora(data, part_size=3000), CAPABILITIES, tmp_path / "b", Rules())
    assert len(corpora(data, part_size=3000)[1].parts()) > 3
    assert cut == whole


@pytest.mark.parametrize(
    ("capabilities", "said"),
    [
        ({}, "no capability"),
        ({"code": ()}, "capability 'code' has no source"),
        ({"code": ("stack", "web", "wiki")}, "the source 'wiki', but the sources are stack, web"),
        ({"code": ("stack",)}, "source 'web' stands for no capability"),
    ],
)
def test_capabilities_that_do_not_fit_the_sources_are_refused(capabilities, said, data, tmp_path):
    with pytest.raises(UserError, match=said):
        make(corpora(data), capabilities, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_split_without_documents_is_told_of(data, tmp_path):
    with pytest.raises(UserError, match="stack has no document in its split 'heldout'.*--heldout"):
        make(corpora(data, heldout=0.0), CAPABILITIES, tmp_path / "out")


def test_capabilities_on_the_command_line():
    found = parse_capabilities(["code=stack, web,stack", "math="])
    assert found == {"code": ("stack", "web"), "math": ()}
    for given in (["code"], ["=stack"], ["code=stack", "code=web"]):
        with pytest.raises(UserError, match="--capability=code|--capability==stack"):
            parse_capabilities(given)


@pytest.mark.slow
def test_the_whole_program_with_networks(data, tmp_path, monkeypatch):
    checkpoint.write_model(
        random_leaves(tiny.MODEL), tiny.MODEL, tiny.tokenizer(), {}, tmp_path / "network"
    )
    (tmp_path / "own.py").write_text("def length(texts):\n    return [len(t) for t in texts]\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("reasoning", "code", "combined"):
        (tmp_path / f"{name}.txt").write_text(f"{name}? {{document}}\n1 or 0?")
    arguments = [
        *(f"--source={name}={data}/{name}/*.jsonl" for name in TEXTS),
        "--heldout=0.5",
        "--capability=code=stack,web",
        "--capability=knowledge=web",
        f"--out={tmp_path}/out",
        "--quality=own:length",
        "--quality_threshold=20",
        f"--judge={tmp_path}/network",
        *(f"--prompt={n}={tmp_path}/{n}.txt" for n in ("reasoning", "code", "combined")),
        "--fraction=0.7",
        f"--embedding={tmp_path}/network",
        "--per_source=20",
    ]
    ended = runs.program("data_mixing.probes", *arguments, "--whiten=false", "--alike=1.0")
    assert ended.status == 0, ended.err
    sets = probe_sets.load(tmp_path / "out")
    assert all(0 < len(probes) <= 20 for probes in sets.documents.values())
    header, *lines = ended.out.splitlines()
    assert header.split() == [
        *("source", "read", "different", "quality", "reasoning", "domain", "unlike", "kept"),
        *probe_sets.HALVES,
    ]
    for line in lines:
        numbers = [int(cell.replace(",", "")) for cell in line.split()[1:8]]
        assert numbers == sorted(numbers, reverse=True) and numbers[-1] > 0
    settings = json.loads((tmp_path / "out" / "probes.json").read_text())["settings"]
    assert settings["looked"]["reasoning"]["directory"].endswith("network")
    prompts = [settings["looked"]["domain"][name]["prompt"] for name in TEXTS]
    assert len({*prompts, settings["looked"]["reasoning"]["prompt"]}) == 3
    again = runs.program("data_mixing.probes", *arguments, "--whiten=false", "--alike=1.0")
    assert "complete, kept as it is" in again.out
    other = runs.program("data_mixing.probes", *arguments, "--fraction=7")
    assert other.status == 1 and "--fraction=7.0 is not above 0 and at most 1" in other.err
