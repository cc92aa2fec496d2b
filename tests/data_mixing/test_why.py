"""Why did it say that: planted facts come first, with every step at which they were read."""

import html.parser
import types
import zlib

import mixing
import numpy as np
import pytest
import runs
import tiny

from data_mixing import why as asking
from data_mixing.influence import open_checkpoints
from data_mixing.scorers import Settings
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.rows import open_run

ANSWERS = ("zuvo", "qiju", "xyke", "wofi", "jazu", "vuxy")
FACTS = [f"code {name} is {answer}." for name, answer in zip("kmnpqr", ANSWERS, strict=True)]
SETTINGS = Settings(batch_rows=16)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run on sums, sentences and six facts, each in a document of its own that comes three times."""
    folder = tmp_path_factory.mktemp("why")
    texts = {
        "sums": tiny.documents("sums", 150),
        "words": tiny.documents("words", 100),
        "facts": [fact for fact in FACTS for _ in range(3)],
    }
    mixing.HELDOUT, before = 0.0, mixing.HELDOUT
    plan = mixing.sources(folder, texts)
    mixing.HELDOUT = before
    config = tiny.config(folder / "data" / "mixture.json", 60)
    config.checkpoint.every = 20
    runs.run(config, folder / "run")
    assert plan.names == ("sums", "words", "facts")
    return folder / "run"


def fact_of(found):
    return FACTS[int(found.id.split("-")[1]) // 3] if found.source == "facts" else None


def ask(workdir, fact, name="", steps=1, **settings):
    prompt, _, answer = fact.rpartition(" ")
    points = open_checkpoints([f"{workdir}{name}"], steps, [asking.ANSWER])
    defaults = {"rows": 10_000, "shown": 5, "train_rows": 64, "settings": SETTINGS}
    return asking.why(points, open_run(workdir), prompt, f" {answer}", **{**defaults, **settings})


@pytest.mark.slow
def test_a_planted_fact_comes_first(workdir):
    for fact in FACTS:
        helped, hurt, _ = ask(workdir, fact, steps=3)
        assert fact_of(helped[0]) == fact
        assert "".join(text for text, _ in helped[0].tokens).strip() == fact
        benefits = [f.benefit for f in helped]
        assert benefits == sorted(benefits, reverse=True) and all(b > 0 for b in benefits)
        assert all(f.benefit < 0 for f in hurt)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["dot", "datainf"])
def test_by_one_checkpoint_planted_facts_are_among_the_first(workdir, metric):
    found = [{fact_of(one) for one in ask(workdir, fact, metric=metric)[0]} for fact in FACTS]
    assert sum(fact in some for fact, some in zip(FACTS, found, strict=True)) >= 5


def test_steps_are_those_at_which_the_run_read_it(workdir):
    run = open_run(workdir)
    helped, _, _ = ask(workdir, FACTS[0], "@40")
    for found in helped:
        expected = []
        for step in range(1, 41):
            at = run.mixture.locate(np.arange(*run.rows_of(step)))
            mine = (at.source == run.plan.names.index(found.source)) & (at.row == found.row)
            expected += [step] * int(mine.sum())
        assert list(found.steps) == expected and expected


@pytest.mark.slow
@pytest.mark.parametrize("state", ["all", "weights"])
def test_steps_of_a_run_that_begins_at_another_are_those_at_which_rows_were_read(
    workdir, tmp_path, state
):
    """By what both runs recorded: a fork goes on with the steps before it, a run from weights does not."""
    config = tiny.config(open_run(workdir).config["plan"], 50)
    config.init_from, config.init_state = f"{workdir}@20", state
    config.checkpoint.every, config.schedule.floor = 10, 0.0
    if state == "all":  # another batch from there on
        config.batch_ramp, config.global_batch = ((16, 20 * 16 * tiny.ROW),), 8
    else:
        config.first_row = 20 * 16
    runs.run(config, tmp_path / "a@5")
    run, read = open_run(tmp_path / "a@5"), {}
    parts = [(tmp_path / "a@5", range(1, 41))]
    if state == "all":
        parts = [(workdir, range(1, 21)), (tmp_path / "a@5", range(21, 41))]
    for of, steps in parts:
        recorded = runs.lines(of)
        for step in steps:
            last, first = (recorded[s]["rows"] if s in recorded else 0 for s in (step, step - 1))
            first = first or (config.first_row if step == 1 else 20 * 16 if step == 21 else 0)
            index = np.arange(first, last)
            tokens = run.mixture.read(index)["tokens"]
            assert zlib.crc32(tokens.data) == recorded[step]["batch_crc32"]
            at = run.mixture.locate(index)
            for pair in zip(at.source.tolist(), at.row.tolist(), strict=True):
                read.setdefault(pair, []).append(step)
    helped, hurt, scored = ask(tmp_path / "a@5", FACTS[0], "@40", shown=10_000)
    assert scored == len(read) and len({len(steps) for steps in read.values()}) > 1
    for found in (*helped, *hurt):
        key = run.plan.names.index(found.source), found.row
        assert list(found.steps) == read[key], found


def test_a_benefit_is_the_sum_of_what_its_tokens_do(workdir):
    helped, hurt, _ = ask(workdir, FACTS[1], steps=2, rows=40)
    for found in (*helped, *hurt):
        assert found.benefit == pytest.approx(sum(value for _, value in found.tokens), rel=1e-4)


def test_of_a_long_run_the_rows_most_alike_are_scored(workdir):
    helped, _, scored = ask(workdir, FACTS[2], steps=3, rows=40)
    assert scored == 40 and fact_of(helped[0]) == FACTS[2]


@pytest.mark.parametrize("planted", ["sums", "words", "facts"])
def test_of_many_rows_those_with_the_answer_are_found_in_any_source(workdir, planted):
    """Also in one whose n-grams are rare among the rows."""
    run = open_run(workdir)
    tokenizer = load_model(workdir).tokenizer
    contents = [rows.read(np.arange(len(rows))) for rows in run.mixture.sources]
    s, rng = run.plan.names.index(planted), np.random.default_rng(0)
    contents[s] = np.concatenate([contents[s]] * (1 if planted == "facts" else 3))
    rare = tokenizer.encode("kk zz 77 qq xx 99")  # stands nowhere else
    answer_T = np.array([tokenizer.bos_id, *rare])
    contents[s][5, 3 : 3 + len(rare)] = rare
    source = np.repeat(np.arange(len(contents)), list(map(len, contents)))
    row = np.concatenate([np.arange(len(of)) for of in contents])
    order = rng.permutation(len(row))
    order = order[np.argsort(source[order], kind="stable")]
    fake = types.SimpleNamespace(
        mixture=types.SimpleNamespace(
            sources=[types.SimpleNamespace(read=of.__getitem__) for of in contents]
        )
    )
    probe = np.full((1, tiny.ROW + 1), tokenizer.bos_id)
    probe[0, : len(answer_T)] = answer_T
    ordinary = (fake, source[order], row[order], probe, tokenizer)
    first = asking._most_alike(*ordinary, 3)
    found = {(int(source[order][i]), int(row[order][i])) for i in first}
    assert (s, 5) in found


def test_the_page_says_it_and_escapes_it(workdir):
    helped, hurt, scored = ask(workdir, FACTS[0], steps=3, rows=40)
    point = open_checkpoints([str(workdir)], 1, [asking.ANSWER])[0]
    page = asking.render(helped, hurt, "<b>why", "&", scored, point, "datainf")
    assert "<b>why" not in page and "&lt;b&gt;why" in page and helped[0].name in page

    class Texts(html.parser.HTMLParser):
        found = ""

        def handle_data(self, data):
            self.found += data

    reader = Texts()
    reader.feed(page)
    assert FACTS[0] in reader.found
    assert ", ".join(map(str, helped[0].steps)) in reader.found
    assert helped[0].name in asking.table(helped, hurt)


def test_the_program(workdir, tmp_path):
    flags = [f"--checkpoint={workdir}", "--prompt=code k is", "--answer= zuvo."]
    flags += ["--rows=40", "--batch_rows=16", f"--out={tmp_path / 'why.html'}"]
    ended = runs.program("data_mixing.why", *flags)
    assert ended.status == 0, ended.err
    assert "facts-" in ended.out.splitlines()[1] and (tmp_path / "why.html").exists()
    ended = runs.program("data_mixing.why", *flags)
    assert ended.status == 1 and "exists: name a new file" in ended.err


@pytest.mark.parametrize("named", ["a@5", "a@5@40", "a@5/checkpoints/40"])
def test_a_checkpoint_may_be_named_in_every_way(workdir, tmp_path, named):
    (tmp_path / "a@5").symlink_to(workdir)
    flags = [
        f"--checkpoint={tmp_path / named}",
        "--prompt=code k is",
        "--answer= zuvo.",
        "--rows=8",
        "--batch_rows=16",
    ]
    ended = runs.program("data_mixing.why", *flags, f"--out={tmp_path / 'why.html'}")
    assert ended.status == 0, ended.err


def test_bad_input(workdir):
    with pytest.raises(UserError, match="adds no token"):
        points = open_checkpoints([str(workdir)], 1, [asking.ANSWER])
        asking.why(points, open_run(workdir), "a", "", settings=SETTINGS)
    with pytest.raises(UserError, match="shorten the prompt"):
        ask(workdir, "1 + " * 200 + "2 3")
    with pytest.raises(UserError, match="--metric=x is none of"):
        ask(workdir, FACTS[0], metric="x")
