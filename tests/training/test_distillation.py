"""The divergence from a teacher: against plain formulas, in pieces, on devices, and what is refused."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from mobilellm_jax.data.taught import TAUGHT_IDS, TAUGHT_LOG_PROBS
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import StoredModel
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.parallel.sharding import put_rows, shardings
from mobilellm_jax.train import train
from mobilellm_jax.training.checkpoint import load_model, write_model
from mobilellm_jax.training.distillation import distillation
from mobilellm_jax.training.objectives import Network, next_token, split_rows
from mobilellm_jax.training.teacher import Teacher, described
from mobilellm_jax.training.workdir import read_config

pytestmark = pytest.mark.usefixtures("shared_programs")
VOCAB, BOS, EOS = 64, 1, 2
STUDENT = ModelConfig(VOCAB, 16, (Stack(2, 2, 1, 24),), head_dim=8, max_length=64, init_std=0.3)
LARGER = ModelConfig(
    VOCAB, 32, (Stack(3, 4, 2, 48),), head_dim=8, max_length=64, tied=False, init_std=0.3
)
SHARES = [(1.0, 0.0, 0.0), (2.0, 0.25, 0.4)]
SHARES += [
    pytest.param(*s, marks=pytest.mark.slow)
    for s in ((1.0, 0.3, 0.0), (2.0, 0.0, 0.0), (0.5, 0.0, 1.0))
]
DISTILLATION = "mobilellm_jax.training.distillation:distillation"


def network(model, chunks=1):
    return Network(model, transformer.Execution(), BOS, EOS, chunks)


@pytest.fixture(scope="module")
def case():
    """Weights of a student, a teacher, and rows of several documents with padding."""
    params, teacher = (
        jax.jit(transformer.init, static_argnums=0)(model, jax.random.key(i))
        for i, model in enumerate((STUDENT, LARGER))
    )
    tokens = np.random.default_rng(0).integers(3, VOCAB, (8, 25))
    tokens[:, [0, 7, 15]], tokens[:, 14] = BOS, EOS
    tokens[3, 18:] = BOS
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "source": jnp.zeros(8, jnp.int32)}
    return params, Teacher(network(LARGER), teacher), batch


def plain(params, teacher, batch, temperature, labels, reverse):
    """The same sum from whole logits by the textbook, differentiated by JAX."""
    rows = split_rows(batch["tokens"], BOS, EOS)

    def logits(params, model):
        hidden = transformer.apply(params, model, rows.inputs_BT, rows.segment_ids_BT)
        return transformer.logits(params, model, hidden)

    own, other = logits(params, STUDENT), logits(teacher.params, teacher.network.model)
    q, p = (jax.nn.log_softmax(x / temperature) for x in (own, jax.lax.stop_gradient(other)))
    forward, backward = (jnp.exp(p) * (p - q)).sum(-1), (jnp.exp(q) * (q - p)).sum(-1)
    nll = -jnp.take_along_axis(jax.nn.log_softmax(own), rows.targets_BT[..., None], -1)[..., 0]
    mixed = (1 - reverse) * forward + reverse * backward
    return (rows.weight_BT * ((1 - labels) * temperature**2 * mixed + labels * nll)).sum()


def compiled(objective, *static):
    """What an objective gives: in all, of each target, and whether it counts."""

    def parts(*given, **settings):
        losses = objective(*given, **settings)
        return losses.total, losses.nll_BT, losses.weight_BT

    return jax.jit(parts, static_argnums=2, static_argnames=static)


distilled = compiled(distillation, "labels")


def close(got, wanted, tolerance=1e-5):
    """Equal to `tolerance` of the largest entry."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1e-6 + float(jnp.abs(b).max())))


def value_and_gradient(params, batch, chunks=1, **settings):
    def total(params):
        return distillation(params, batch, network(STUDENT, chunks), **settings).total

    return jax.jit(jax.value_and_grad(total))(params)


@pytest.mark.parametrize("chunks", [4, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("temperature", "labels", "reverse"), SHARES)
def test_value_and_gradient_equal_the_unchunked_formulas(
    case, chunks, temperature, labels, reverse
):
    params, teacher, batch = case
    shares = {"temperature": temperature, "labels": labels, "reverse": reverse}
    got = value_and_gradient(params, batch, chunks, teacher=teacher, **shares)
    wanted = jax.jit(jax.value_and_grad(functools.partial(plain, **shares)))(params, teacher, batch)
    close(got, wanted)


def test_labels_alone_are_the_loss_of_the_next_token(case):
    params, teacher, batch = case
    got = distilled(params, batch, network(STUDENT, 2), teacher, labels=1.0)
    close(got, compiled(next_token)(params, batch, network(STUDENT)))


@pytest.mark.parametrize("reverse", [0.0, 0.5])
def test_who_equals_the_teacher_has_nothing_to_learn(case, reverse):
    params, _, batch = case
    itself = Teacher(network(STUDENT), params)
    total, gradient = value_and_gradient(params, batch, teacher=itself, reverse=reverse)
    assert abs(float(total)) < 1e-3
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradient)) < 1e-4


def test_what_does_not_count_and_what_is_in_another_document_teaches_nothing(case):
    params, teacher, batch = case
    want = value_and_gradient(params, batch, teacher=teacher)
    changed = np.array(batch["tokens"])
    changed[3, 19:] = 5  # behind a target that does not count, in a document of its own
    mask = np.array(batch["tokens"])[3, 1:] != BOS
    rows = split_rows(jnp.asarray(changed), BOS, EOS)
    _, nll_BT, _ = distilled(
        params, {**batch, "tokens": jnp.asarray(changed)}, network(STUDENT), teacher
    )
    _, before_BT, weight_BT = distilled(params, batch, network(STUDENT), teacher)
    np.testing.assert_array_equal(nll_BT[3, :17], before_BT[3, :17])
    assert not mask[17:].any()
    assert float(weight_BT[3, 17:].sum()) == 0 < float(rows.weight_BT[3, 17:].sum())
    without = {name: values[np.array([0, 1, 2, 4, 5, 6, 7, 3])] for name, values in batch.items()}
    close(value_and_gradient(params, without, teacher=teacher), want)


def test_neither_logits_tensor_ever_exists_whole(case):
    params, teacher, batch = case
    jaxpr = str(jax.make_jaxpr(lambda p: value_and_gradient(p, batch, 4, teacher=teacher))(params))
    sizes = {tuple(map(int, s.split(","))) for s in re.findall(r"f32\[([\d,]+)\]", jaxpr)}
    with_vocabulary = {s for s in sizes if VOCAB in s}
    assert max(np.prod(s) // VOCAB for s in with_vocabulary) <= 8 * 24 // 4


@jax.jit
def teachers_logits(params, inputs_BT, segment_ids_BT):
    hidden = transformer.apply(params, LARGER, inputs_BT, segment_ids_BT)
    return transformer.logits(params, LARGER, hidden)


def written(case, k, temperature=1.0):
    """What the teacher would have written down of its k likeliest tokens."""
    _, teacher, batch = case
    rows = split_rows(batch["tokens"], BOS, EOS)
    logits = teachers_logits(teacher.params, rows.inputs_BT, rows.segment_ids_BT)
    log_p, ids = jax.lax.top_k(jax.nn.log_softmax(logits / temperature), k)
    return {**batch, TAUGHT_IDS: ids, TAUGHT_LOG_PROBS: log_p}


@pytest.mark.parametrize(("temperature", "labels", "reverse"), SHARES)
def test_all_tokens_written_down_teach_what_the_teacher_does(case, temperature, labels, reverse):
    params, teacher, batch = case
    shares = {"temperature": temperature, "labels": labels, "reverse": reverse}
    got = value_and_gradient(params, written(case, VOCAB, temperature), 2, **shares)
    close(got, value_and_gradient(params, batch, teacher=teacher, **shares), 3e-5)


@pytest.mark.parametrize(
    "reverse", [0.5, *(pytest.param(r, marks=pytest.mark.slow) for r in (0.0, 1.0))]
)
def test_a_few_tokens_and_the_rest_as_one_event(case, reverse):
    params, teacher, batch = case
    top = written(case, 5)
    rows = split_rows(batch["tokens"], BOS, EOS)

    def coarse(params):
        """Divergences over six events, differentiated by JAX."""
        hidden = transformer.apply(params, STUDENT, rows.inputs_BT, rows.segment_ids_BT)
        q = jax.nn.softmax(transformer.logits(params, STUDENT, hidden))
        q = jnp.take_along_axis(q, top[TAUGHT_IDS], -1)
        p = jnp.exp(top[TAUGHT_LOG_PROBS])
        p, q = (jnp.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (p, q))
        ratio = jnp.log(p) - jnp.log(q)
        forward, backward = (p * ratio).sum(-1), -(q * ratio).sum(-1)
        return (rows.weight_BT * ((1 - reverse) * forward + reverse * backward)).sum()

    total, gradient = value_and_gradient(params, top, 2, reverse=reverse)
    wanted, by_jax = jax.jit(jax.value_and_grad(coarse))(params)
    np.testing.assert_allclose(total, wanted, rtol=1e-4)
    close(gradient, by_jax, 1e-4)
    whole = value_and_gradient(params, batch, teacher=teacher, reverse=reverse)[0]
    assert total < whole


@pytest.mark.parametrize(
    "split",
    [*(pytest.param(s, marks=pytest.mark.slow) for s in ((), ("fsdp",))), ("data", "fsdp")],
)
def test_eight_devices_equal_one_however_the_teacher_is_split(case, split):
    params, teacher, batch = case
    wanted = value_and_gradient(params, batch, teacher=teacher)
    mesh = make_mesh({"data": 2, "fsdp": 4}, jax.devices())
    with jax.set_mesh(mesh):
        places = shardings(teacher.params, mesh, split)
        placed = dataclasses.replace(teacher, params=jax.device_put(teacher.params, places))
        embedding = placed.params["embedding"]
        share = embedding.addressable_shards[0].data.size / embedding.size
        own = jax.device_put(params, shardings(params, mesh))

        def total(params, teacher, batch):
            return distillation(params, batch, network(STUDENT, 2), teacher).total

        rows = put_rows({name: np.asarray(x) for name, x in batch.items()}, mesh)
        got = jax.jit(jax.value_and_grad(total))(own, placed, rows)
    close(got, wanted)
    assert share == {(): 1.0, ("fsdp",): 1 / 4, ("data", "fsdp"): 1 / 8}[split]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def taught_by(plan, tmp_path_factory):
    """The workdir of a trained network of another shape."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    config = tiny.config(plan, steps=40)
    config.model.stacks[0]["mlp_width"] = 64
    runs.run(config, folder)
    return folder


def distilling(plan, teacher, steps=12, **shares):
    config = tiny.config(plan, steps)
    with config.unlocked():
        config.objective = {"use": DISTILLATION, **shares}
    config.teacher.path = str(teacher)
    return config


def test_a_student_comes_nearer_to_its_teacher(plan, taught_by, tmp_path, capsys):
    config = distilling(plan, taught_by, steps=30)
    train(config, tmp_path / "run", devices=tiny.one_device())
    said = capsys.readouterr().out
    assert "teacher's held-out bits per byte" in said and "knows less" not in said
    (known,) = runs.lines(tmp_path / "run", "teacher").values()
    (*_, (_, wanted)) = sorted(runs.lines(taught_by, "heldout").items())
    assert known["bits_per_byte"] == pytest.approx(wanted["bits_per_byte"], abs=1e-5)
    loss = [line["loss"] for _, line in sorted(runs.lines(tmp_path / "run").items())]
    assert loss[-1] < 0.4 * loss[0]
    teacher = read_config(tmp_path / "run")["teacher"]
    assert teacher["path"] == str(taught_by)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"microbatches": 4}, 1),
        pytest.param({"mesh.data": 2, "mesh.fsdp": 4}, 8, marks=pytest.mark.slow),
    ],
)
def test_microbatches_and_devices_change_nothing(plan, taught_by, tmp_path, changes, devices):
    config = distilling(plan, taught_by, steps=5, temperature=1.5, labels=0.2, reverse=0.1)
    runs.run(config, tmp_path / "one")
    config.update_from_flattened_dict(changes)
    runs.run(config, tmp_path / "other", devices=jax.devices()[:devices])
    one, other = (
        [line["loss"] for _, line in sorted(runs.lines(tmp_path / name).items())]
        for name in ("one", "other")
    )
    np.testing.assert_allclose(other, one, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_run_with_nothing_left_to_do_reads_no_teacher(plan, taught_by, tmp_path, monkeypatch):
    config = distilling(plan, taught_by, steps=4)
    runs.run(config, tmp_path / "run")
    monkeypatch.setattr(StoredModel, "params", lambda *_: pytest.fail("the weights are read"))
    assert int(runs.run(config, tmp_path / "run").step) == 4
    with pytest.raises(pytest.fail.Exception, match="the weights are read"):
        runs.run(config, tmp_path / "other")


def test_a_teacher_that_knows_less_is_told(plan, taught_by, tmp_path, capsys):
    fresh, config = tiny.config(plan, steps=1), distilling(plan, tmp_path / "fresh", steps=1)
    fresh.schedule.warmup_steps = config.schedule.warmup_steps = 0
    runs.run(fresh, tmp_path / "fresh")
    config.model = ModelConfig.from_dict(read_config(taught_by)["model"]).to_dict()
    config.init_from = str(taught_by)
    train(config, tmp_path / "run", devices=tiny.one_device())
    assert "knows less than the student" in capsys.readouterr().out


@pytest.fixture
def refused(plan, tmp_path):
    """What training says to a configuration; nothing may have been written."""

    def said(config, workdir="run"):
        with pytest.raises(UserError) as error:
            runs.run(config, tmp_path / workdir)
        assert not (tmp_path / workdir).exists()
        return str(error.value)

    return said


def test_a_teacher_of_another_vocabulary_is_refused(plan, taught_by, refused, tmp_path):
    other = load_model(taught_by)
    leaves = {path: np.asarray(leaf) for path, leaf in flat(other.params).items()}
    tokenizer = tiny.train_tokenizer(tiny.documents("words", 50), 290)
    write_model(leaves, other.model, tokenizer, {}, tmp_path / "teacher")
    assert "has another tokenizer" in refused(distilling(plan, tmp_path / "teacher"))
    config = distilling(plan, taught_by)
    config.model.vocab_size = 400
    assert "320 tokens and the student 400" in refused(config)


def test_what_does_not_belong_together_is_refused(plan, taught_by, refused):
    config = distilling(plan, "")
    assert "learns from a teacher: name its checkpoint" in refused(config)
    config = tiny.config(plan)
    config.teacher.path = str(taught_by)
    assert "learns from no teacher" in refused(config)
    config = distilling(plan, taught_by)
    config.teacher.stored = "taught"
    assert "set one of them" in refused(config)
    config = distilling(plan, taught_by)
    with config.unlocked():
        config.objective.teacher = str(taught_by)
    assert "name the teacher's folder in config.teacher.path" in refused(config)
    config = distilling(plan, taught_by)
    config.teacher.split = ("rows",)
    assert "names no axes of the mesh" in refused(config)
    for shares, said in (
        ({"labels": 1.5}, "are shares"),
        ({"temperature": 0.0}, "must be positive"),
    ):
        config = distilling(plan, taught_by, **shares)
        assert said in refused(config)
    config = distilling(plan, "")
    config.teacher.model = tiny.MODEL.to_dict()
    assert "config.teacher.path is empty" in refused(config)


def test_a_description_stands_in_for_files_that_are_not_there(plan, taught_by, capsys):
    config = distilling(plan, taught_by)
    config.teacher.model = dataclasses.replace(tiny.MODEL, width=48).to_dict()
    there = described(config)
    assert there.width == tiny.MODEL.width and there.stacks[0].mlp_width == 64
    assert "it is the teacher" in capsys.readouterr().out
    config.teacher.path = "no/such/folder"
    assert described(config).width == 48


def test_a_teacher_with_a_shorter_context_is_refused(plan, refused, tmp_path):
    config = distilling(plan, "")
    config.teacher.model = dataclasses.replace(tiny.MODEL, max_length=16).to_dict()
    assert "has a context of 16 tokens" in refused(config)
