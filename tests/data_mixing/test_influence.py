"""Benefits of documents: what is written, what is refused, and planted cases that they must rank."""

import contextlib
import dataclasses
import io

import jax
import jax.numpy as jnp
import mixing
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import runs
import tiny
from weights import random_leaves

from data_mixing import derivatives, influence, methods, samples, scorers
from data_mixing.influence import open_checkpoints
from data_mixing.measurements import read_scores
from data_mixing.probe_sets import Probe, ProbeSets
from data_mixing.scorers import Settings
from mobilellm_jax.data.corpora import split_of
from mobilellm_jax.data.plan import Plan, Stage
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.parallel.mesh import local_mesh, one_device
from mobilellm_jax.training.checkpoint import write_model

CAPABILITIES = {"math": ("sums",), "language": ("words",)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(plan, probe sets, workdir of a run on it)."""
    folder = tmp_path_factory.mktemp("mixing")
    texts = {"sums": tiny.documents("sums", 250), "words": tiny.documents("words", 250)}
    plan = mixing.sources(folder, texts)
    return plan, mixing.probes(folder, CAPABILITIES), mixing.trained(plan, folder / "run")


def score(made, out, checkpoints=None, steps=3, **settings):
    plan, probes, workdir = made
    points = open_checkpoints(checkpoints or [str(workdir)], steps, list(probes.capabilities))
    defaults = {
        "rows": 20,
        "train_rows": 12,
        "settings": Settings("all", batch_rows=16, own_gradients=2),
    }
    with contextlib.redirect_stdout(io.StringIO()):
        return influence.influence(plan, probes, points, out, **{**defaults, **settings})


@pytest.fixture(scope="module")
def scored(made, tmp_path_factory):
    out = tmp_path_factory.mktemp("scores") / "out"
    return score(made, out), out


def test_the_benefit_of_a_piece_is_the_product_of_two_gradients(made, scored):
    plan, probes, workdir = made
    table, _ = scored
    loaded = load_model(workdir / "checkpoints" / "60")
    network = derivatives.network_of(
        loaded.model, loaded.tokenizer.bos_id, loaded.tokenizer.eos_id, "float32", 1
    )
    of = derivatives.differentiated(loaded.params, network, "all", local_mesh(), 16)
    texts = [p.text for p in probes.of("math", "score")]
    v = derivatives.mean_gradient(of, samples.packed_texts(texts, loaded.tokenizer, tiny.ROW))

    def of_piece(chosen, row, inside):
        nll, _ = derivatives.token_losses(chosen, row[None], network)
        return jnp.where(inside, nll[0], 0.0).sum()

    gradient = jax.jit(jax.grad(of_piece))
    rows = {s.source: s for s in samples.first_samples(plan, tiny.ROW, tiny.VOCAB, 20)}
    lines = table.to_pylist()
    for line in lines[::9]:
        sample = rows[line["source"]]
        row = sample.tokens[sample.rows_N.tolist().index(line["row"])]
        at = np.arange(tiny.ROW)
        inside = (at >= line["first"]) & (at < line["last"] - 1)
        own = gradient(of.chosen, row, inside)
        wanted = sum(np.vdot(v[n], own[n]) for n in v) / line["tokens"]
        assert line["gradient/math/60"] == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def test_joint_scores_weigh_checkpoints_by_their_steps(made, scored):
    table, _ = scored
    steps = [20, 40, 60]

    def column(name):
        values = table[name].to_numpy()
        return values / influence.deviation(table, name)

    for metric, kind, weights in (
        ("datainf", "datainf", np.array(steps) / sum(steps)),
        ("dot", "gradient", np.array([0, 0, 1])),
    ):
        expected = {}
        for capability in CAPABILITIES:
            parts = [column(f"{kind}/{capability}/{step}") for step in steps]
            expected[capability] = sum(w * p for w, p in zip(weights, parts, strict=True))
            np.testing.assert_allclose(table[f"{metric}/{capability}"], expected[capability])
        np.testing.assert_allclose(table[metric], np.mean(list(expected.values()), 0))


def test_sources_help_their_own_capability_most(scored):
    table, _ = scored
    source = np.array(table["source"].to_pylist())
    tokens = table["tokens"].to_numpy()
    for metric in ("datainf", "tracin", "dot", "embedding", "ngrams"):
        for own, other, capability in (("sums", "words", "math"), ("words", "sums", "language")):
            mean = {
                s: np.average(table[f"{metric}/{capability}"].to_numpy()[source == s],
                              weights=tokens[source == s])
                for s in (own, other)
            }  # fmt: skip
            assert mean[own] > mean[other], (metric, capability)


@pytest.mark.slow
def test_killed_and_started_again_it_writes_the_same(made, scored, tmp_path, monkeypatch):
    _, out = scored
    whole = (out / influence.FILE).read_bytes()
    monkeypatch.setattr(influence, "PART", 8)
    calls, real = [0], samples.lines

    def failing(*args):
        calls[0] += 1
        if calls[0] in (3, 9):
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(samples, "lines", failing)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            score(made, tmp_path / "again")
    again = score(made, tmp_path / "again")
    first = pyarrow.parquet.read_table(io.BytesIO(whole))
    assert again.column_names == first.column_names
    for name in first.column_names:
        if first.schema.field(name).type == "double":
            np.testing.assert_allclose(again[name], first[name], rtol=1e-6, atol=1e-9)
        else:
            assert again[name].to_pylist() == first[name].to_pylist()
    assert calls[0] > 12
    (tmp_path / "again" / "parts").mkdir()  # as if killed at the very end
    kept = score(made, tmp_path / "again")  # complete: nothing is computed
    assert kept.equals(again) and not (tmp_path / "again" / "parts").exists()
    with pytest.raises(UserError, match="other settings or other data"):
        score(made, tmp_path / "again", rows=21)


def test_specialised_networks_speak_for_their_capability(made, tmp_path):
    _, _, workdir = made
    named = [f"math={workdir}@40", f"language={workdir}@60"]
    table = score(made, tmp_path / "out", named, metrics=["dot"])
    kinds = [name for name in table.column_names if name.startswith("gradient/")]
    assert kinds == ["gradient/math/40", "gradient/language/60"]


def test_a_probe_that_is_trained_on_is_refused(made, tmp_path):
    plan, probes, workdir = made

    text = tiny.documents("sums", 250)
    trained = [p.text for of_one in probes.documents.values() for p in of_one]
    inside = min((t for t in text if t not in trained), key=len)  # whole in a row
    probe = dataclasses.replace(
        probes.documents["sums"][0], text=inside, half="score", file="elsewhere"
    )
    documents = {**probes.documents, "sums": (*probes.documents["sums"], probe)}
    with pytest.raises(UserError, match="documents are in the probe sets and in what they are"):
        score(
            (plan, dataclasses.replace(probes, documents=documents), workdir),
            tmp_path / "out",
            rows=10_000,
        )


def test_bad_input(made, tmp_path):
    plan, probes, workdir = made
    with pytest.raises(UserError, match="no capability 'chess', only math, language"):
        open_checkpoints([f"chess={workdir}"], 1, list(CAPABILITIES))
    with pytest.raises(UserError, match="no metric 'x'"):
        score(made, tmp_path / "a", metrics=["x"])
    with pytest.raises(UserError, match="all of them are 0"):
        score(made, tmp_path / "b", [f"{workdir}@60"], metrics=["tracin"])
    assert not (tmp_path / "b").exists()  # before anything is computed
    with pytest.raises(UserError, match="--metrics names none"):
        score(made, tmp_path / "b", metrics=[])
    one = {"checkpoints": [f"math={workdir}@60"], "metrics": ["dot"], "rows": 4}
    with pytest.raises(UserError, match="'head' is not embedding, output"):
        score(made, tmp_path / "l", **one, settings=Settings("head", batch_rows=16))
    assert len(score(made, tmp_path / "l", **one))  # its folder is free for what is right
    (tmp_path / "lr=0.01").symlink_to(workdir)
    (point,) = open_checkpoints([f"{tmp_path}/lr=0.01"], 1, list(CAPABILITIES))
    assert point.step == 60 and point.capabilities == (*CAPABILITIES,)
    other = dataclasses.replace(tiny.MODEL, width=16)
    write_model(random_leaves(other), other, tiny.tokenizer(), {}, tmp_path / "other")
    with pytest.raises(UserError, match="are of different networks"):
        score(made, tmp_path / "c", [f"math={workdir}", f"language={tmp_path / 'other'}"])
    with pytest.raises(UserError, match="both speak for 'math' at step 60"):
        score(made, tmp_path / "e", [f"{workdir}@60", f"math={workdir}@60"])
    strange = Plan.from_dict(
        {**plan.to_dict(), "tokenizer": {"path": "t", "fingerprint": "ab"}}, ""
    )
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        score((strange, probes, workdir), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def rotated(text):
    """A near copy: the first line at the end, or a single one twice."""
    first, *others = text.split("\n")
    return "\n".join([*others, first]) if others else f"{first}\n{first}"


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=pytest.mark.slow) for seed in range(5)])
def test_planted_sources_are_ranked(seed, tmp_path):
    """Shuffled text last, near copies of the probe first, what is irrelevant under what is relevant."""
    relevant, irrelevant = (tiny.documents(kind, 220, seed) for kind in ("sums", "words"))
    heldout = [t for t in relevant if split_of(t.encode(), mixing.HELDOUT) == "heldout"]
    probe = [Probe(text, "relevant", "score", file="few") for text in heldout[:6]]
    probes = ProbeSets({"math": ("relevant",)}, {"relevant": tuple(probe)})
    texts = {
        "relevant": relevant,
        "irrelevant": irrelevant,
        "noise": mixing.shuffled(relevant + irrelevant, seed)[::2],
        "copies": [rotated(p.text) for p in probe * 8],  # no document is the same
    }
    plan = mixing.sources(tmp_path, texts)
    known = dataclasses.replace(
        plan,
        sources=plan.sources[:3],
        stages=(Stage("train", None, dict.fromkeys(plan.names[:3], 1 / 3)),),
    )
    known.save(tmp_path / "data" / "known.json")
    config = tiny.config(tmp_path / "data" / "known.json", 120)
    config.seed, config.checkpoint.every, config.eval.every = seed, 60, 120
    workdir = tmp_path / "run"
    runs.run(config, workdir)
    score((plan, probes, workdir), tmp_path / "out", rows=60, steps=2, metrics=["datainf", "dot"])
    # The network knows more than how often each token comes.
    loaded = load_model(workdir)
    rows = samples.packed_texts(
        [p.text for p in probes.of("math", "score")], loaded.tokenizer, tiny.ROW
    )
    network = derivatives.network_of(
        loaded.model, loaded.tokenizer.bos_id, loaded.tokenizer.eos_id, "float32", 1
    )
    of = derivatives.differentiated(loaded.params, network, "output", one_device(), 8)
    nll, weight = derivatives.losses(of, rows)
    assert nll.sum() / weight.sum() < mixing.unigram_bits(rows, rows, loaded.tokenizer.bos_id)
    for metric in ("datainf", "dot"):
        read = read_scores(tmp_path / "out" / influence.FILE, plan.names, metric)
        found = methods.influence(read)
        # What is irrelevant may harm as noise does: then neither has a weight.
        assert found["noise"] == min(found.values()), (metric, found)
        assert found["copies"] == max(found.values()), (metric, found)
        assert found["relevant"] > found["irrelevant"], (metric, found)


@pytest.mark.parametrize("capabilities", [("math",), ("math", "language"), ("language", "math")])
def test_embeddings_know_a_source_by_any_number_of_capabilities(made, tmp_path, capabilities):
    plan, probes, workdir = made
    few = dataclasses.replace(probes, capabilities={c: CAPABILITIES[c] for c in capabilities})
    table = score((plan, few, workdir), tmp_path / "out", metrics=["embedding"])
    source = np.array(table["source"].to_pylist())
    likeness = table["embedding/math"].to_numpy()
    assert likeness[source == "sums"].mean() > likeness[source == "words"].mean() + 0.1
    assert table["embedding"].to_numpy().std() > 0.01


def test_what_a_probe_lacks_is_never_like_it(made):
    """Tokens drawn at random are less like a few probes than text of their kind is."""
    plan, probes, workdir = made
    tokenizer = load_model(workdir).tokenizer
    texts = [p.text for p in probes.of("math", "score")]
    rows = samples.packed_texts(texts, tokenizer, tiny.ROW)
    everything = np.concatenate(
        [s.tokens for s in samples.first_samples(plan, tiny.ROW, tiny.VOCAB, 200)]
    )
    ends = tokenizer.bos_id, tokenizer.eos_id
    values, *_ = scorers.Ngrams({"math": rows[:2]}, everything, *ends).open(lambda n: None)
    noise = np.random.default_rng(0).integers(10, tiny.VOCAB, (50, tiny.ROW + 1))
    (sums,) = (
        s.tokens
        for s in samples.first_samples(plan, tiny.ROW, tiny.VOCAB, 50)
        if s.source == "sums"
    )
    assert values(noise)[:, 0].mean() < 0 < values(sums)[:, 0].mean()


def test_rivals_are_what_they_say(made):
    plan, probes, workdir = made
    tokenizer = load_model(workdir).tokenizer
    rows = samples.packed_texts([p.text for p in probes.of("math", "score")], tokenizer, tiny.ROW)
    everything = np.concatenate(
        [s.tokens for s in samples.first_samples(plan, tiny.ROW, tiny.VOCAB, 20)]
    )
    ngrams = scorers.Ngrams({"math": rows}, everything, tokenizer.bos_id, tokenizer.eos_id)
    values, *_ = ngrams.open(lambda n: None)
    found = values(rows)[:, 0].sum() / (rows[:, 1:] != tokenizer.bos_id).sum()
    assert found > values(everything)[:, 0].sum() / (everything[:, 1:] != tokenizer.bos_id).sum()
    padding = np.full((1, tiny.ROW + 1), tokenizer.bos_id, np.int32)
    assert not values(padding).any()


GOOD = {"source": ["a", "a"], "row": [0, 1], "tokens": [5, 6], "datainf": [0.1, 0.2]}


@pytest.mark.parametrize(
    "column, values, said",
    [
        ("source", [1, 2], "'source' holds no names"),
        ("row", ["x", "y"], "'row' holds no whole numbers"),
        ("tokens", [1.5, 2.0], "'tokens' holds no whole numbers"),
        ("tokens", [[1], [2]], "'tokens' holds no whole numbers"),
        ("datainf", ["x", "y"], "choose one by column"),
        ("datainf", [None, 0.1], "1 values that are no numbers"),
    ],
)
def test_scores_of_the_wrong_kind_are_refused(tmp_path, column, values, said):
    table = pyarrow.table({**GOOD, column: values})
    pyarrow.parquet.write_table(table, tmp_path / "scores.parquet")
    with pytest.raises(UserError, match=said):
        read_scores(tmp_path / "scores.parquet", ["a"])
