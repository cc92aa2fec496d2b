"""What a run has read, by brute force; a step again, bit for bit; steps left out afterwards."""

import json
import shutil

import jax
import numpy as np
import pytest
import runs
import tiny

from mobilellm_jax.data.corpora import FileCorpus
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.prepare import prepare
from mobilellm_jax.rows import document_table, open_run, skip, step_table, usage_table
from mobilellm_jax.training.objectives import next_token
from mobilellm_jax.training.replay import _measure, replay, report
from mobilellm_jax.training.setup import set_up

pytestmark = pytest.mark.usefixtures("shared_programs")
STEPS, BATCH = 12, 16


@pytest.fixture(scope="module", params=["concat", pytest.param("best_fit", marks=pytest.mark.slow)])
def prepared(request, tmp_path_factory):
    """A plan over two files of documents with ids; the documents by id."""
    directory = tmp_path_factory.mktemp(request.param)
    texts, corpora = {}, []
    for kind in ("words", "sums"):
        named = {f"{kind}-{i}": t for i, t in enumerate(tiny.documents(kind, 60))}
        texts |= named
        lines = (json.dumps({"id": name, "text": text}) for name, text in named.items())
        (directory / f"{kind}.jsonl").write_text("".join(line + "\n" for line in lines))
        corpora.append(FileCorpus(kind, str(directory / f"{kind}.jsonl"), heldout=0.1))
    out = directory / "out"
    weights = {"words": 0.6, "sums": 0.4}
    prepare(
        corpora, out, tiny.ROW, vocab_size=tiny.VOCAB, packing=request.param, workers=1,
        weights=weights,
    )  # fmt: skip
    return out / "mixture.json", texts


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run") / "run"
    runs.run(tiny.unshared(prepared[0], STEPS), workdir)
    return workdir


def test_a_row_holds_the_text_of_the_documents_that_are_named(prepared, trained):
    """And of no other: the text between its BOS tokens is a part of these documents, in order."""
    run, texts = open_run(trained), prepared[1]
    tokenizer = tiny_tokenizer(prepared[0])
    looked_at = 0
    for step in (1, 7, STEPS):
        records = list(step_table(run, step))
        assert [r["index"] for r in records] == list(range((step - 1) * BATCH, step * BATCH))
        for record, tokens in zip(records, read(run, step), strict=True):
            borders = [0, *(np.flatnonzero(tokens[1:] == tokenizer.bos_id) + 1), len(tokens)]
            parts = [tokens[a:b] for a, b in zip(borders, borders[1:], strict=False)]
            parts = [
                p for p in parts if p.tolist() != [tokenizer.bos_id]
            ]  # padding, or a mere begin
            named = [d["id"] for d in record["documents"] if d["tokens"] > 1]
            for part, name in zip(parts, named, strict=False):
                text = tokenizer.decode([t for t in part.tolist() if t != tokenizer.bos_id])
                assert text.strip() in texts[name], (text, name)
                looked_at += 1
            assert 0 <= len(named) - len(parts) <= 1  # a document may begin with the last token
    assert looked_at > 60


def tiny_tokenizer(plan):
    from mobilellm_jax.data.tokenizers import Tokenizer

    return Tokenizer.load(plan.parent)


def read(run, step):
    return run.mixture.read(np.arange(*run.rows_of(step)))["tokens"]


def test_where_a_document_comes_is_where_steps_say_it_is(prepared, trained):
    run = open_run(trained)
    by_document = {}
    for step in range(1, STEPS + 1):
        for record in step_table(run, step):
            for d in record["documents"]:
                by_document.setdefault(d["id"], set()).add((step, record["index"], record["epoch"]))
    for name in ("words-3", "sums-17", "sums-40", "words-59"):
        if name in by_document:
            found = document_table(run, name)
            assert {(r["step"], r["index"], r["epoch"]) for r in found} == by_document[name]
            assert all(r["seen"] for r in found)
            place = int(name.partition("-")[2]) + 1
            again = document_table(run, f"{found[0]['file']}:{place}")
            assert again == found
    with pytest.raises(UserError, match="no row of this run holds a document 'nobody'"):
        document_table(run, "nobody")


def test_usage_counts_what_was_read(trained):
    run = open_run(trained)
    counted = np.bincount(run.mixture.locate(np.arange(STEPS * BATCH)).source, minlength=2)
    found = usage_table(run)
    assert [r["read"] for r in found] == counted.tolist()
    half = np.bincount(run.mixture.locate(np.arange(6 * BATCH)).source, minlength=2)
    assert [r["read"] for r in usage_table(run, 6)] == half.tolist()
    for record, source in zip(found, run.mixture.sources, strict=True):
        assert record["epochs"] == pytest.approx(record["read"] / len(source))


def test_a_step_is_replayed_bit_for_bit_and_its_rows_ranked(prepared, trained):
    before = runs.files(trained)
    config = tiny.unshared(prepared[0], STEPS)
    found = replay(config, trained, 11, tiny.one_device())
    assert found.exact and found.begun_at == 8
    assert f"loss {found.loss:.4f}" in report(found) and "bit for bit" in report(found)
    changed = {p for p, content in runs.files(trained).items() if before.get(p) != content}
    assert {p.name for p in changed} == {"11.jsonl"}
    norms = [row.gradient_norm for row in found.rows]
    assert norms == sorted(norms, reverse=True) and len(norms) == BATCH
    # The mean of the rows' losses, by targets, is the step's.
    weights = np.array([row.targets for row in found.rows])
    losses = np.array([row.loss for row in found.rows])
    assert (weights * losses).sum() / weights.sum() == pytest.approx(found.loss, rel=1e-5)
    shutil.rmtree(trained / "replay")


def test_a_step_with_a_teacher_is_replayed(prepared, trained, tmp_path):
    config = tiny.unshared(prepared[0], 5)
    distillation = "mobilellm_jax.training.distillation:distillation"
    with config.unlocked():
        config.objective = {"use": distillation, "temperature": 2.0}
    config.teacher.path = str(trained)
    runs.run(config, tmp_path / "run")
    found = replay(config, tmp_path / "run", 5, tiny.one_device())
    assert found.exact and found.begun_at == 4
    losses = np.array([(row.targets, row.targets * row.loss) for row in found.rows]).sum(0)
    assert losses[1] / losses[0] == pytest.approx(found.loss, rel=1e-5)


@pytest.mark.slow
def test_a_step_behind_a_cut_is_replayed(prepared, tmp_path):
    """The cut comes between the checkpoint and the step."""
    config = tiny.unshared(prepared[0], 8)
    config.pruning.target, config.pruning.cuts = int(parameter_count(tiny.MODEL) * 0.8), 4
    runs.run(config, tmp_path / "run")
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "cut"] == [1, 2, 4, 6]
    found = replay(config, tmp_path / "run", 8, tiny.one_device())
    assert found.exact and found.begun_at == 4


@pytest.mark.slow
def test_a_step_behind_a_compaction_is_replayed(prepared, tmp_path):
    """From its checkpoint, and through it, where that is gone."""
    config = tiny.unshared(prepared[0], 8)
    whole = parameter_count(tiny.MODEL)
    config.pruning.target, config.pruning.cuts = int(whole * 0.8), 4
    config.pruning.compact_at = (whole - (whole - int(whole * 0.8)) * 3 // 4,)
    runs.run(config, tmp_path / "run")
    for begun_at in (4, 0):
        found = replay(config, tmp_path / "run", 6, tiny.one_device())
        assert found.exact and found.begun_at == begun_at
        shutil.rmtree(tmp_path / "run" / "checkpoints" / "4", ignore_errors=True)


@pytest.mark.slow
def test_a_step_of_a_ramp_is_replayed_with_its_own_rows(prepared, tmp_path):
    config = tiny.unshared(prepared[0], STEPS)
    config.batch_ramp = ((4, 20 * tiny.ROW), (8, 60 * tiny.ROW))  # 5 steps, 5 steps, 2 of 16 rows
    runs.run(config, tmp_path / "run")
    for step, rows in ((9, range(44, 52)), (11, range(60, 76))):  # from the checkpoint of step 8
        found = replay(config, tmp_path / "run", step, tiny.one_device())
        assert found.exact and found.begun_at == 8
        assert sorted(row.index for row in found.rows) == list(rows)


@pytest.mark.slow
def test_the_first_step_is_replayed_from_fresh_weights_with_each_rows_own_gradient(
    prepared, trained
):
    config = tiny.unshared(prepared[0], STEPS)
    found = replay(config, trained, 1, tiny.one_device())
    assert found.exact and found.begun_at == 0
    run = set_up(config, tiny.one_device())
    with jax.set_mesh(run.mesh):
        params = transformer.init(run.model, jax.random.key(config.seed))
        row = found.rows[3]
        batch = run.mixture.read(np.array([row.index]))

        def mean(params):
            losses = next_token(params, batch, run.network)
            return losses.total / losses.weight_BT.sum()

        loss, gradient = jax.value_and_grad(mean)(params)
    norm = np.sqrt(sum(float((leaf**2).sum()) for leaf in jax.tree.leaves(gradient)))
    assert row.loss == pytest.approx(float(loss), rel=1e-5)
    assert row.gradient_norm == pytest.approx(norm, rel=1e-4)
    shutil.rmtree(trained / "replay")


@pytest.mark.slow
def test_rows_are_measured_alike_on_eight_devices(prepared):
    """One row on each device, weights in pieces, and a last turn that is not full."""
    config, found = tiny.unshared(prepared[0], STEPS), []
    for devices, fsdp in ((tiny.one_device(), 1), (jax.devices(), 4)):
        config.mesh.fsdp = fsdp
        run = set_up(config, devices)
        with jax.set_mesh(run.mesh):
            batch = run.mixture.read(np.arange(11))
            found.append(_measure(run, run.fresh().params, batch))
    np.testing.assert_allclose(*found, rtol=1e-4)


def test_skipped_steps_are_left_out_and_the_rest_is_as_if_they_had_never_been(prepared, tmp_path):
    """Rewind, skip, go on: equal, to the last bit, to a fresh run of the changed plan."""
    data = tmp_path / "data"
    shutil.copytree(prepared[0].parent, data)
    plan, workdir = data / "mixture.json", tmp_path / "run"
    config = tiny.unshared(plan, STEPS)
    runs.run(config, workdir)
    old = Plan.load(plan)
    seen = open_mixture(old, tiny.ROW, tiny.VOCAB).locate(np.arange(STEPS * BATCH * 2))
    shutil.copytree(workdir, tmp_path / "other")
    said = skip(open_run(workdir), 6, 7, "a spike")
    with pytest.raises(UserError, match="was trained on another plan .* they differ in the skips"):
        open_run(tmp_path / "other")  # whose rows are not those of the plan any more
    assert "steps 6 to 7" in said and f"mixture.{old.hash[:8]}.json" in said
    assert Plan.load(data / f"mixture.{old.hash[:8]}.json").hash == old.hash
    (aside,) = workdir.glob("rewound-*")
    assert {p.name for p in aside.iterdir()} == {"8", "12"}
    (entry,) = Plan.load(plan).skips
    assert (entry.at_row, entry.rows, entry.reason) == (5 * BATCH, 2 * BATCH, "a spike")

    state = runs.run(config, workdir)
    again = runs.run(config, tmp_path / "whole")
    assert runs.bits(state) == runs.bits(again)
    assert runs.rows_seen(workdir) == runs.rows_seen(tmp_path / "whole")
    new = open_mixture(Plan.load(plan), tiny.ROW, tiny.VOCAB).locate(np.arange(STEPS * BATCH))
    kept = np.delete(np.arange(STEPS * BATCH + 2 * BATCH), np.arange(5 * BATCH, 7 * BATCH))
    assert (new.row == seen.row[kept]).all() and (new.source == seen.source[kept]).all()
    # A second one, behind the first; and none before it.
    skip(open_run(workdir), 10, 10, "")
    assert len(Plan.load(plan).skips) == 2
    with pytest.raises(UserError, match="are skipped already, behind step 5"):
        skip(open_run(workdir), 5, 5, "")


def test_a_plan_that_ends_with_its_run_is_lengthened_by_what_is_skipped(prepared, tmp_path):
    data, workdir = tmp_path / "data", tmp_path / "run"
    shutil.copytree(prepared[0].parent, data)
    plan = data / "mixture.json"
    raw = json.loads(plan.read_text())
    raw["stages"][0]["tokens"] = STEPS * BATCH * tiny.ROW
    plan.write_text(json.dumps(raw))
    runs.run(tiny.unshared(plan, STEPS), workdir)
    skip(open_run(workdir), 6, 6, "")
    assert Plan.load(plan).tokens == (STEPS + 1) * BATCH * tiny.ROW
    runs.run(tiny.unshared(plan, STEPS), workdir)
    assert max(runs.lines(workdir)) == STEPS
    raw = json.loads(plan.read_text())
    for source in raw["sources"]:
        source["max_epochs"] = 1e3
    plan.write_text(json.dumps(raw))
    with pytest.raises(UserError, match="ends 512 tokens before the run, and .*'train', is"):
        skip(open_run(workdir), 8, 8, "")


def test_what_cannot_be_skipped_or_replayed(prepared, trained):
    run, config = open_run(trained), tiny.unshared(prepared[0], STEPS)
    for first, last, said in (
        (3, 2, "is no range of steps"),
        (0, 2, "is no range of steps"),
        (12, 13, "has steps 1 to 12, not 13"),
        (2, 3, "no checkpoint in .* is from before step 2"),
    ):
        with pytest.raises(UserError, match=said):
            skip(run, first, last, "")
    with pytest.raises(UserError, match="has steps 1 to 12, not 13"):
        replay(config, trained, 13, tiny.one_device())
    config.seed = 1
    with pytest.raises(UserError, match=r"another run \(config.seed: 0 there, 1 here"):
        replay(config, trained, 11, tiny.one_device())
    with pytest.raises(UserError, match="no source 'poems', only words, sums"):
        list(step_table(run, 1, "poems"))


def test_that_data_do_not_tell_their_documents_is_said_before_a_step_is_replayed(tmp_path, capsys):
    config = tiny.unshared(tiny.corpus(tmp_path / "data"), STEPS)
    runs.run(config, tmp_path / "run", stop_at=4)
    capsys.readouterr()
    with pytest.raises(UserError, match="does not say which documents .*: prepare it again"):
        replay(config, tmp_path / "run", 4, tiny.one_device())
    assert not capsys.readouterr().out and not (tmp_path / "run" / "replay").exists()


@pytest.mark.parametrize(
    "text, wrong",
    [
        (None, "missing or torn"),
        ("{", "missing or torn"),
        ("[" * 100_000, "missing or torn"),
        ('{"model_type": "llama"}', "not of a run of ours"),  # of a Hugging Face folder
        ('{"plan": "p", "model": {}, "eval": {}, "row_length": "x"}', "not of a run of ours"),
        ('{"plan": "p", "model": {}, "row_length": 32}', "not of a run of ours"),
    ],
)
def test_only_the_workdir_of_a_run_has_rows(tmp_path, text, wrong):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UserError, match=f"config.json is {wrong}, so .* is not the workdir of a run"
    ):
        open_run(tmp_path)


def test_the_program_answers(prepared, trained):
    workdir = str(trained)
    step = runs.program("mobilellm_jax.rows", workdir, "--step=3", "--text", "--source=sums")
    assert step.status == 0, step.err
    assert step.out.splitlines()[0].split() == [
        *("index", "source", "epoch", "row", "documents", "text")
    ]
    assert all("sums" in line for line in step.out.splitlines()[1:])
    lines = runs.program("mobilellm_jax.rows", workdir, "--step=3", "--json").out.splitlines()
    record = json.loads(lines[0])
    assert len(lines) == BATCH and record["index"] == 2 * BATCH and record["text"]
    name = record["documents"][0]["id"]
    found = runs.program("mobilellm_jax.rows", workdir, f"--document={name}")
    assert found.status == 0 and " 3 " in found.out
    usage = runs.program("mobilellm_jax.rows", workdir, "--usage")
    assert usage.status == 0 and "epochs" in usage.out and "words" in usage.out
    usage = runs.program("mobilellm_jax.rows", workdir, "--usage", "--step=3", "--source=sums")
    assert usage.status == 0 and [line.split()[0] for line in usage.out.splitlines()] == [
        *("source", "sums")
    ]
    for flags, said in (
        ((), "ask for one thing"),
        (("--usage", "--document=x"), "ask for one thing"),
        (("--step=3", "--document=x"), "ask for one thing"),
        (("--document=",), "names no document"),
        (("--skip=5",), "is not of the form FIRST:LAST"),
        (("--usage", "--text"), "--text goes with --step, not with --usage: leave it out"),
        (("--usage", "--source=poems"), "no source 'poems', only words, sums"),
        (("--document=x", "--source=sums"), "--source goes with --usage and --step, not with"),
        (("--step=3", "--reason=no"), "--reason goes with --skip, not with --step"),
    ):
        ended = runs.program("mobilellm_jax.rows", workdir, *flags)
        assert ended.status == 1 and ended.err.startswith("error: "), flags
        assert said in ended.err, ended.err
