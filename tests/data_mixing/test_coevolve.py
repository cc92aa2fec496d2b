"""Co-evolution: what is kept and trained on, what is told and refused, and that a kill changes nothing."""

import contextlib
import dataclasses
import html.parser
import io
import json

import chats
import numpy as np
import pyarrow.parquet
import pytest
import runs
import tiny
from coevolving import BASE, CAPABILITIES, STEPS, coevolving

from data_mixing import coevolve, influence, probe_sets, samples, stages
from mobilellm_jax.data.chat_corpus import ChatCorpus
from mobilellm_jax.data.documents import documents_of
from mobilellm_jax.data.plan import Plan, PlanSource, Stage
from mobilellm_jax.data.sentencepiece_tokenizer import train_tokenizer
from mobilellm_jax.data.shards import SourceWriter
from mobilellm_jax.data.subset import key_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.model.transformer import Execution
from mobilellm_jax.prepare import prepare
from mobilellm_jax.training.objectives import Network, next_token
from mobilellm_jax.training.step import row_sums


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return coevolving(tmp_path_factory.mktemp("coevolve"))


def run(given, out, rounds=2, base=None, **changes):
    """Co-evolution that says nothing; the rounds."""
    found, usual = given
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        changed = dataclasses.replace(found, **changes)
        return coevolve.coevolve(changed, str(base or usual), out, rounds)


def choose(given, **changes):
    return dataclasses.replace(given[0].choices, **changes)


@pytest.fixture(scope="module")
def ran(given, tmp_path_factory):
    out = tmp_path_factory.mktemp("ran") / "out"
    return run(given, out), out


def documents(out, number):
    return pyarrow.parquet.read_table(out / f"round-{number}" / "documents.parquet").to_pylist()


@pytest.mark.slow
def test_what_harms_loses_much_more_than_what_helps(ran):
    for one in ran[0]:
        share = {name: of.kept_tokens / of.tokens for name, of in one.sources.items()}
        assert share["noise"] < 0.3 * min(share["sums"], share["words"]), share
        benefit = {name: of.benefit.value for name, of in one.sources.items()}
        assert benefit["noise"] == min(benefit.values())


@pytest.mark.slow
def test_a_stage_has_just_the_documents_that_help_of_the_raw_sources(given, ran):
    _, out = ran
    raw = {s.name: given[0].plan.resolve(s.path) for s in given[0].plan.sources}
    kept = []
    for number in (1, 2):
        plan = Plan.load(out / f"round-{number}" / "data" / "mixture.json")
        told = documents(out, number)
        assert all(line["kept"] == (line["benefit"] > 0) for line in told)
        for source in plan.sources:
            wanted = {
                (line["file"], line["place"], line["id"]): line["source"]
                for line in told
                if line["kept"] and line["source"] == source.name
            }
            pieces = documents_of(plan.resolve(source.path), "train", 0, source.rows)
            assert {key_of(piece) for piece in pieces} == set(wanted)
            # Also those that begin or end outside of the rows that were scored are whole.
            before = documents_of(raw[source.name], "train", 0, 10_000)
            tokens = {key_of(piece): piece.tokens for piece in before}
            assert all(tokens[key_of(piece)] == piece.tokens for piece in pieces)
        kept.append({tuple(line.values())[:4] for line in told if line["kept"]})
    assert kept[1] - kept[0]  # of the raw sources, not of what was kept before


@pytest.mark.slow
def test_benefits_are_of_whole_documents_on_the_scale_of_the_first_round(ran):
    rounds, out = ran
    scale = None
    for one in rounds:
        table = pyarrow.parquet.read_table(
            out / f"round-{one.number}" / "scores" / "scores.parquet"
        )
        names = [f"datainf/{c}" for c in CAPABILITIES]
        scale = scale or [influence.deviation(table, name) for name in names]
        sums = {}
        for line in table.to_pylist():
            key = line["source"], line["file"], line["place"], line["id"]
            value = np.mean([line[name] / s for name, s in zip(names, scale, strict=True)])
            own = sums.setdefault(key, [0.0, 0])
            own[0] += value * line["tokens"]
            own[1] += line["tokens"]
        told = {tuple(line.values())[:4]: line for line in documents(out, one.number)}
        assert told.keys() == sums.keys() and len(sums) < len(table)
        for key, (value, tokens) in sums.items():
            assert told[key]["tokens"] == tokens
            assert told[key]["benefit"] == pytest.approx(value / tokens, rel=1e-9)
        kept = sum(line["tokens"] for line in told.values() if line["kept"])
        assert one.distribution.share == pytest.approx(kept / sum(t for _, t in sums.values()))


@pytest.mark.slow
def test_weights_are_mean_benefits_of_what_is_kept(ran):
    rounds, out = ran
    for one in rounds:
        rho = {}
        for name in one.sources:
            own = [d for d in documents(out, one.number) if d["kept"] and d["source"] == name]
            rho[name] = np.average([d["benefit"] for d in own], weights=[d["tokens"] for d in own])
        plan = Plan.load(out / f"round-{one.number}" / "data" / "mixture.json")
        for name, value in rho.items():
            assert plan.stages[0].weights[name] == pytest.approx(value / sum(rho.values()))
        assert plan.tokens == STEPS * 16 * tiny.ROW
        assert plan.provenance["round"] == one.number


@pytest.mark.slow
def test_each_round_is_scored_by_what_the_one_before_has_trained(given, ran):
    rounds, out = ran
    first, second = rounds
    assert first.checkpoint == str(given[1] / "checkpoints" / str(BASE))
    assert second.checkpoint == first.trained != first.checkpoint
    for one in rounds:
        scores = out / f"round-{one.number}" / "scores" / "scores.parquet"
        described = json.loads(pyarrow.parquet.read_schema(scores).metadata[b"data_mixing"])
        assert described["checkpoints"][0][0] == one.checkpoint
        meta = load_model(one.trained).meta
        assert meta["config"]["init_from"] == one.checkpoint
        plan = Plan.load(out / f"round-{one.number}" / "data" / "mixture.json")
        assert meta["plan_hash"] == plan.hash
    losses = [load_model(path) for path in (first.checkpoint, first.trained, second.trained)]
    assert len({runs.bits(m.params)["['embedding']"] for m in losses}) == 3


@pytest.mark.slow
def test_held_out_losses_are_those_of_the_training_objective(given, ran):
    rounds, _ = ran
    assert rounds[0].after == rounds[1].before
    for path, told in (
        (rounds[0].checkpoint, rounds[0].before),
        (rounds[1].trained, rounds[1].after),
    ):
        loaded = load_model(path)
        ends = loaded.tokenizer.bos_id, loaded.tokenizer.eos_id
        network = Network(loaded.model, Execution("float32", attention="reference"), *ends)
        for capability in CAPABILITIES:
            texts = [p.text for p in given[0].probes.of(capability, "heldout")]
            rows = samples.packed_texts(texts, loaded.tokenizer, tiny.ROW)
            losses = next_token(loaded.params, {"tokens": rows}, network)
            nats = row_sums(losses, rows, loaded.tokenizer.piece_bytes())["nll"].sum()
            count = (rows[:, 1:] != ends[0]).sum()
            assert told[capability] == pytest.approx(float(nats) / count, rel=1e-4)


@pytest.mark.slow
def test_everything_is_told(ran):
    rounds, out = ran
    told = json.loads((out / "rounds.json").read_text())
    assert [one["round"] for one in told["rounds"]] == [1, 2]
    assert told["ended"] == "ended after round 2: no more were asked for (--rounds)."
    for one, of in zip(told["rounds"], rounds, strict=True):
        kept = sum(line["kept"] for line in documents(out, of.number))
        assert one["documents_dropped"] == one["documents"] - kept
        assert one["heldout_before"].keys() == one["heldout_after"].keys() == CAPABILITIES.keys()
        assert sum(source["weight"] for source in one["sources"].values()) == pytest.approx(1)

    class Tags(html.parser.HTMLParser):
        def __init__(self):
            super().__init__()
            self.found, self.text = [], ""

        def handle_starttag(self, tag, attributes):
            self.found.append(tag)
            assert not {"src", "href"} & {name for name, _ in attributes}

        def handle_data(self, data):
            self.text += data

    page = Tags()
    page.feed((out / "report.html").read_text())
    assert page.found.count("svg") == 4
    assert "round 1: " in page.text and "round 2: " in page.text and "60 of " in page.text


class Killed(BaseException):
    """No program expects it."""


@pytest.mark.slow
def test_killed_anywhere_and_started_again_it_is_bit_for_bit_the_same(
    given, ran, tmp_path, monkeypatch
):
    """In the middle of scores, of a source that is written, of training, and before the next round."""
    rounds, _ = ran
    out, armed = tmp_path / "out", []

    def killed_in(name, function):
        def wrapped(*args, **kwargs):
            base = name == "heldout_losses" and args[2].parent == out
            if armed != [name] or base:
                return function(*args, **kwargs)
            armed.clear()
            if name == "train":
                function(*args, **kwargs, stop_at=STEPS // 2)
            raise Killed

        return wrapped

    monkeypatch.setattr(influence, "PART", 32)
    for module, name in (
        (samples, "lines"),
        (SourceWriter, "write_part"),
        (stages, "train"),
        (stages, "heldout_losses"),
    ):
        monkeypatch.setattr(module, name, killed_in(name, getattr(module, name)))
    for name, number in (
        ("lines", 1),
        ("write_part", 1),
        ("train", 1),
        ("heldout_losses", 1),
        ("train", 2),  # one more round is asked for than before
    ):
        armed[:] = [name]
        with pytest.raises(Killed):
            run(given, out, number)
    again = run(given, out, 2)
    last = [runs.bits(load_model(r[-1].trained).params) for r in (again, rounds)]
    assert last[0] == last[1]
    assert [one.before for one in again] == [one.before for one in rounds]
    assert again[-1].after == rounds[-1].after
    before = runs.files(out)
    run(given, out, 2)  # complete
    assert runs.files(out) == before
    with pytest.raises(UserError, match="other settings or other data"):
        run(given, out, 2, choices=choose(given, threshold=0.1))
    with pytest.raises(UserError, match="holds more than 1 rounds"):
        run(given, out, 1)


def test_nothing_is_trained_where_nothing_helps(given, tmp_path):
    rounds = run(given, tmp_path / "out", choices=choose(given, threshold=1e9, rows=16))
    assert len(rounds) == 1 and not rounds[0].trained
    told = json.loads((tmp_path / "out" / "rounds.json").read_text())
    assert "none of the" in told["rounds"][0]["stop"] and told["rounds"][0]["trained"] is None
    assert told["ended"].startswith("stopped before the stage of round 1: none of the")
    assert (tmp_path / "out" / "report.html").exists()
    assert not (tmp_path / "out" / "round-1" / "data").exists()


# What is kept of sources.


def keep(given, ran, kept_M, out, **changes):
    changed = dataclasses.replace(given[0], **changes)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        found = stages.keep(changed, ran[0][0], kept_M, tiny.tokenizer(), out)
    return found, said.getvalue()


@pytest.mark.slow
def test_a_source_without_a_survivor_is_left_out_and_told(given, ran, tmp_path):
    found = ran[0][0].found
    kept_M = (found.benefit_M > 0) & (found.source_M != "noise")
    this, said = keep(given, ran, kept_M, tmp_path / "data")
    assert "noise is left out: none of its documents helps" in said
    assert Plan.load(tmp_path / "data" / "mixture.json").names == ("sums", "words")
    assert this.sources["noise"].weight == 0


@pytest.mark.slow
def test_a_source_with_too_little_for_a_row_is_left_out_and_told(given, ran, tmp_path):
    found, config = ran[0][0].found, tiny.config("", STEPS)
    config.row_length = 2 * tiny.ROW
    placed = {
        key_of(p): p.tokens for p in documents_of(given[0].plan.resolve("sums"), "train", 0, 10_000)
    }
    short = [i for i, key in enumerate(found.key_M) if placed.get(key, 99) < tiny.ROW]
    kept_M = (found.source_M == "words") & (found.benefit_M > 0)
    kept_M[short[0]] = True
    _, said = keep(given, ran, kept_M, tmp_path / "data", config=config)
    assert f"sums is left out: what is kept fills no row of {2 * tiny.ROW} tokens" in said
    with pytest.raises(UserError, match="fills no row of 64 tokens: score more --rows"):
        keep(given, ran, kept_M & (found.source_M == "sums"), tmp_path / "less", config=config)


@pytest.mark.slow
def test_caps_on_epochs_are_obeyed(given, ran, tmp_path):
    kept_M = ran[0][0].found.benefit_M > 0
    free, _ = keep(given, ran, kept_M, tmp_path / "free")
    most = max(of.epochs for of in free.sources.values())
    cap = 0.95 * most
    this, _ = keep(given, ran, kept_M, tmp_path / "capped", choices=choose(given, max_epochs=cap))
    assert max(of.epochs for of in this.sources.values()) == pytest.approx(cap)
    assert any(of.weight > of.capped for of in this.sources.values())
    with pytest.raises(UserError, match="the caps on epochs make the plan impossible"):
        keep(given, ran, kept_M, tmp_path / "none", choices=choose(given, max_epochs=0.01))


# What is refused.


@pytest.mark.slow
def test_bad_input(given, ran, tmp_path):
    found, _ = given
    with pytest.raises(UserError, match="--metric=loss is none of datainf, dot"):
        run(given, tmp_path / "a", choices=choose(given, metric="loss"))
    other = tiny.config("", STEPS)
    other.first_row = 16
    with pytest.raises(UserError, match="the sources give .* at most with these caps"):
        run(given, tmp_path / "a", choices=choose(given, max_epochs=0.01))
    with pytest.raises(UserError, match="config.first_row=0"):
        run(given, tmp_path / "a", config=other)
    for part, key, value, said in (
        ("schedule", "use", "nowhere", "config.schedule.use='nowhere' is not an import path"),
        ("schedule", "warmup_steps", 99, "config.schedule.warmup_steps=99 does not lie within"),
        ("eval", "tasks", "nothing", "no suite or task 'nothing'|needs lm-evaluation-harness"),
    ):
        other = tiny.config("", STEPS)
        other[part][key] = value
        with pytest.raises(UserError, match=said):
            run(given, tmp_path / "a", config=other)
    other = tiny.config("", STEPS)
    other.model.width = 16
    with pytest.raises(UserError, match="does not fit config.model"):
        run(given, tmp_path / "a", config=other)
    foreign = train_tokenizer(tiny.documents("words", 100), tiny.VOCAB)
    foreign.write(tmp_path)
    fields = {"tokenizer_path": str(tmp_path / foreign.FILE), "tokenizer": foreign.fingerprint}
    with pytest.raises(UserError, match="has another tokenizer than the data"):
        run(given, tmp_path / "a", plan=dataclasses.replace(found.plan, **fields))
    with pytest.raises(UserError, match="no probe in the half 'heldout'"):
        scored = {
            name: tuple(p for p in of if p.half == "score")
            for name, of in found.probes.documents.items()
        }
        run(given, tmp_path / "a", probes=dataclasses.replace(found.probes, documents=scored))
    assert not (tmp_path / "a").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="holds something else: name a new --out"):
        run(given, tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]


def test_a_held_out_probe_that_may_be_trained_on_is_refused(given, tmp_path):
    found, _ = given
    line = documents_of(found.plan.resolve("sums"), "train", 0, 10_000)[0]
    inside = dataclasses.replace(
        found.probes.documents["sums"][0], half="heldout", file=line.file, place=line.place
    )
    probes = dataclasses.replace(
        found.probes,
        documents={
            **found.probes.documents,
            "sums": (*found.probes.documents["sums"], dataclasses.replace(inside, text="1 + 1")),
        },
    )
    with pytest.raises(UserError, match="are in the probe sets and in what they are to score"):
        run(given, tmp_path / "out", probes=probes, choices=choose(given, rows=10_000))


def test_conversations_in_rows_of_another_length_are_explained(given, tmp_path):
    found, _ = given
    lines = [json.dumps({"messages": chats.conversation(i)}) for i in range(40)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines) + "\n")
    talk = prepare(
        [ChatCorpus("talk", f"{tmp_path}/talk.jsonl")],
        tmp_path / "talk",
        128,
        tokenizer=found.plan.resolve(found.plan.tokenizer_path),
        chat_template=chats.PLAIN,
        workers=1,
    )
    paths = [(s.name, str(found.plan.resolve(s.path))) for s in found.plan.sources]
    paths.append(("talk", str(talk.resolve("talk"))))
    plan = dataclasses.replace(
        found.plan,
        sources=tuple(PlanSource(*named) for named in paths),
        stages=(Stage("train", None, dict.fromkeys(dict(paths), 0.25)),),
    )
    with pytest.raises(
        UserError, match="are whole in rows of 128 tokens and cannot be had in rows of 32"
    ):
        run(given, tmp_path / "out", plan=plan)


def test_the_program(given, tmp_path):
    found, base = given
    (tmp_path / "probes").mkdir()
    probe_sets.write(found.probes, {}, tmp_path / "probes")
    plan = f"{found.plan.directory}/mixture.json"
    config = runs.config_file(tmp_path, "", steps=STEPS)
    command = (
        *("data_mixing.coevolve", f"--config={config}", f"--plan={plan}"),
        *(f"--probes={tmp_path / 'probes'}", f"--init_from={base}", f"--out={tmp_path / 'out'}"),
        *("--rows=16", "--train_rows=16", "--layers=output", "--batch_rows=16"),
        *("--own_gradients=2", "--threshold=1e9", "--metric=dot"),
    )
    with alone(tmp_path / "out", "is at work"):
        refused = runs.program(*command)
    assert refused.status == 1 and "another program is at work in" in refused.err
    ended = runs.program(*command)
    assert ended.status == 0, ended.err
    assert "stopped before the stage of round 1: none of the" in ended.out
    told = json.loads((tmp_path / "out" / "rounds.json").read_text())
    assert told["settings"]["choices"]["metric"] == "dot"
    assert "16 of 291" in ended.out and "no document outside of them is kept" in ended.out
