"""Our model of lm-evaluation-harness against the harness's own backend, request by request."""

import dataclasses
import functools
import random
import tempfile
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
import tokenizer_files
from runs import run

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM

from mobilellm_jax.data.chat import ConversationEncoder, read_template
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.decoding.decoder import to_read
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation import scoring
from mobilellm_jax.evaluation.harness import HarnessModel
from mobilellm_jax.evaluation.scoring import Likelihood, Request, fitted, score
from mobilellm_jax.interop import huggingface
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import Stack
from mobilellm_jax.parallel.mesh import make_mesh
from mobilellm_jax.training.checkpoint import LoadedModel

LENGTH = 96
MODELS = {
    "plain": dataclasses.replace(tiny.MODEL, init_std=0.2, max_length=LENGTH),
    "shared, untied": dataclasses.replace(
        tiny.MODEL,
        stacks=(Stack(2, 4, 2, 48, repeats=2, order="reverse"),),
        init_std=0.2,
        max_length=LENGTH,
        tied=False,
    ),
}

NAMES = [pytest.param("plain", marks=pytest.mark.slow), "shared, untied"]


@functools.cache
def parameters(model):
    return jax.jit(functools.partial(transformer.init, model))(jax.random.key(0))


@functools.cache
def trained():
    """A network that spells words: the two tokenizers tell invalid bytes differently."""
    with tempfile.TemporaryDirectory() as folder:
        config = tiny.config(tiny.corpus(Path(folder) / "data"), steps=150)
        return run(config, Path(folder) / "run").params


@functools.cache
def ours(name, rows=8):
    if name == "trained":
        return HarnessModel(trained(), tiny.MODEL, tiny.tokenizer(), rows=rows)
    return HarnessModel(parameters(MODELS[name]), MODELS[name], tiny.tokenizer(), rows=rows)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """The harness's own backend, by the name of a network."""
    for needed in ("torch", "transformers", "accelerate"):
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    from lm_eval.models.huggingface import HFLM

    @functools.cache
    def load(name):
        folder = tmp_path_factory.mktemp("hf") / "model"
        params, model = trained(), tiny.MODEL
        if name != "trained":
            params, model = parameters(MODELS[name]), MODELS[name]
        huggingface.export(flat(params), model, tiny.tokenizer(), folder)
        length = model.max_length
        return HFLM(str(folder), device="cpu", dtype="float32", batch_size=4, max_length=length)

    return load


def instances(kind, *arguments):
    return [Instance(kind, {}, given, i) for i, given in enumerate(arguments)]


def texts(count, longest, seed=0):
    rng = random.Random(seed)
    words = "the model reads 1 + 2 = 3 , rows\nof  naïve text Ω".split(" ")
    return [" ".join(rng.choices(words, k=rng.randint(1, longest))) for _ in range(count)]


def pairs():
    """Questions with several answers, with none before them, of all lengths, some twice."""
    contexts, answers = texts(12, 40), texts(24, 9, 1)
    found = [(c, " " + a) for i, c in enumerate(contexts) for a in answers[i : i + 1 + i % 4]]
    found += [("", answers[0]), (contexts[0] + "  ", answers[1]), ("a", "b"), *found[:3]]
    return found


@pytest.mark.parametrize("name", NAMES)
def test_log_likelihoods_equal_those_of_hugging_face(name, theirs):
    requests = instances("loglikelihood", *pairs())
    found, expected = (lm.loglikelihood(requests) for lm in (ours(name), theirs(name)))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-3)
    assert [g for _, g in found] == [g for _, g in expected]
    assert ours(name).counts["contexts cut"] > 0  # some of them do not fit


@pytest.mark.parametrize("name", NAMES)
def test_whole_texts_equal_those_of_hugging_face(name, theirs):
    requests = instances("loglikelihood_rolling", *[(t,) for t in texts(9, 120)])
    found, expected = (lm.loglikelihood_rolling(requests) for lm in (ours(name), theirs(name)))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-3)


def test_greedy_answers_equal_those_of_hugging_face(theirs):
    """But for a leading space, which its tokenizer drops where a text begins."""
    settings = {"until": [" to", "\n"], "max_gen_toks": 40, "do_sample": False}
    prompts = [*tiny.documents("sums", 8, 3), *tiny.documents("words", 8, 3)]
    requests = instances("generate_until", *[(t, settings) for t in prompts])
    found, expected = (lm.generate_until(requests) for lm in (ours("trained"), theirs("trained")))
    assert [text.lstrip() for text in found] == [text.lstrip() for text in expected]
    assert ours("trained").counts["prompts cut"] > 0 and len(set(found)) > 3


def test_greedy_continuations_are_known_as_such():
    """What the network itself says is greedy, and is not with another last token."""
    lm = ours("trained")
    (said,) = lm.generate_until(instances("generate_until", ("the model", {"max_gen_toks": 6})))
    assert said
    pairs = ("the model", said), ("the model", said[:-1] + "Q")
    found = lm.loglikelihood(instances("loglikelihood", *pairs))
    assert [greedy for _, greedy in found] == [True, False]


def scored(requests, **options):
    model = MODELS["plain"]
    found = dict(score(to_read(parameters(model), model), requests, **options))
    return [found[i] for i in range(len(requests))]


@pytest.mark.slow
def test_neighbours_and_batches_change_no_score(monkeypatch):
    rng = np.random.default_rng(0)
    contexts = [tuple(rng.integers(3, 300, n).tolist()) for n in (1, 30, 31, 60)]
    requests = [
        fitted(Request(c, tuple(rng.integers(3, 300, n).tolist())), LENGTH)
        for c in contexts
        for n in (1, 3, 70)
    ]
    together = scored(requests)
    monkeypatch.setattr(scoring, "TOKENS", 100)
    for a, b in zip(scored(requests, rows=5), together, strict=True):
        assert a.log_likelihood == pytest.approx(b.log_likelihood, abs=2e-4)
        assert a.greedy == b.greedy
    params = parameters(MODELS["plain"])
    for request, likelihood in zip(requests[::5], together[::5], strict=True):
        row = np.array([request.context + request.continuation])
        hidden_BTD = transformer.apply(params, MODELS["plain"], row[:, :-1])
        logits_TV = transformer.logits(params, MODELS["plain"], hidden_BTD)[0]
        n = len(request.continuation)
        log_TV = np.asarray(jax.nn.log_softmax(logits_TV))[-n:]
        expected = log_TV[np.arange(n), request.continuation].sum()
        assert likelihood.log_likelihood == pytest.approx(float(expected), abs=2e-4)


def test_a_context_is_read_once(monkeypatch):
    read = []
    run = scoring._score

    def counted(params, prefix_GT, *rest, **options):
        read.append(prefix_GT.shape)
        return run(params, prefix_GT, *rest, **options)

    monkeypatch.setattr(scoring, "_score", counted)
    requests = [Request(tuple(range(5, 60)), (n, n + 1)) for n in range(3, 7)]
    assert len(set(scored(requests))) == 4
    assert [shape[0] for shape in read] == [1]


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_from_the_harness_cache(tmp_path):
    name = str(tmp_path / "cache")
    requests = instances("loglikelihood", *pairs())
    whole = ours("plain").loglikelihood(requests)

    class Killed(Exception):
        pass

    def killed(lm, after):
        add, seen = lm.cache_hook.add_partial, []

        def add_partial(*given):
            add(*given)
            seen.append(given)
            if len(seen) == after:
                raise Killed

        lm.cache_hook.add_partial = add_partial
        return seen

    def fresh():
        return HarnessModel(parameters(MODELS["plain"]), MODELS["plain"], tiny.tokenizer(), rows=4)

    lm = fresh()
    cached = CachingLM(lm, name)
    killed(lm, 8)
    with pytest.raises(Killed):
        cached.loglikelihood(requests)
    cached.dbdict.close()
    lm = fresh()
    cached = CachingLM(lm, name)
    seen = killed(lm, 10**9)
    np.testing.assert_allclose(
        [x for x, _ in cached.loglikelihood(requests)], [x for x, _ in whole], atol=1e-4
    )
    assert len(seen) <= len(requests) - 8


def test_sampling_tasks_draw_by_seed():
    settings = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    requests = instances("generate_until", *[("1 + 1", settings)] * 4)
    one, again = (
        HarnessModel(
            parameters(MODELS["plain"]), MODELS["plain"], tiny.tokenizer(), seed=5
        ).generate_until(requests)
        for _ in range(2)
    )
    assert one == again and len(set(one)) > 1


def test_neighbours_change_no_answer_that_the_context_limits():
    """More is asked for than the context holds: each answer has what its own prompt leaves."""
    settings = {"max_gen_toks": 1000, "do_sample": True, "temperature": 1.0}
    requests = instances("generate_until", *[("the " * n, settings) for n in (1, 9, 18, 27)])
    alone, together = (ours("shared, untied", rows=rows) for rows in (1, 4))
    found = alone.generate_until(requests)
    assert found == together.generate_until(requests)
    assert alone.counts == together.counts and alone.counts["answers limited"] == 4


def test_chat_prompts_come_from_the_template():
    tokenizer = dataclasses.replace(tiny.tokenizer(), chat_template=read_template("chatml"))
    lm = HarnessModel(parameters(MODELS["plain"]), MODELS["plain"], tokenizer)
    turn = [{"role": "user", "content": "hi"}]
    assert lm.apply_chat_template(turn).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("kind", sorted(tokenizer_files.FOLDERS))
def test_answers_that_a_task_begins_stay_open_as_those_of_hugging_face(kind, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_files.FOLDERS[kind](tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    lm = HarnessModel(parameters(MODELS["plain"]), MODELS["plain"], Tokenizer.load(folder))
    for begun in ("The best answer is", "\n```python\n", " hi", "hi"):
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": begun}]
        how = {"tokenize": False, "continue_final_message": True}
        found = lm.apply_chat_template(turns, add_generation_prompt=False)
        assert found == theirs.apply_chat_template(turns, **how)


@pytest.mark.parametrize("kind", sorted(tokenizer_files.FOLDERS))
def test_conversations_are_read_as_they_are_in_training(kind, tmp_path):
    """What the template spells are special tokens, whether or not it begins with BOS."""
    tokenizer = Tokenizer.load(tokenizer_files.FOLDERS[kind](tmp_path))
    lm = HarnessModel(parameters(MODELS["plain"]), MODELS["plain"], tokenizer)
    lm.chat = True
    turns = [{"role": "user", "content": "hi"}]
    ids = lm.tok_encode(lm.apply_chat_template(turns))
    assert ids == ConversationEncoder(tokenizer).prompt(turns)
    assert ConversationEncoder(tokenizer).turn_ends[0] not in lm.tok_encode(" a", False)
    lm.chat = False
    (end,) = ConversationEncoder(tokenizer).turn_ends
    assert end not in lm.tok_encode(f"a {tokenizer.pieces[end]}")


@pytest.mark.parametrize("kind", sorted(tokenizer_files.FOLDERS))
def test_texts_begin_as_the_tokenizer_has_it(kind, tmp_path):
    """Of networks from elsewhere; in training here all texts begin with BOS."""
    transformers = pytest.importorskip("transformers")
    folder = tokenizer_files.FOLDERS[kind](tmp_path)
    tokenizer, theirs = Tokenizer.load(folder), transformers.AutoTokenizer.from_pretrained(folder)
    own = parameters(MODELS["plain"]), MODELS["plain"], tokenizer
    for meta, always in (({}, True), ({"origin": {"family": "llama"}}, False)):
        bos = LoadedModel(*own, 0, meta).begins_with_bos
        found = HarnessModel(*own, bos=bos).tok_encode("some text")
        ids = theirs("some text")["input_ids"]
        assert found == (
            ids if not always or ids[0] == tokenizer.bos_id else [tokenizer.bos_id, *ids]
        )


def test_a_continuation_longer_than_the_context_is_refused():
    with pytest.raises(UserError, match="97 tokens exceeds the network's context of 96"):
        fitted(Request((1,), tuple(range(97))), LENGTH)
    assert fitted(Request(tuple(range(200)), (1, 2)), 96).context == tuple(range(200))[-95:]
    assert Likelihood(-1.0, True) == Likelihood(-1.0, True)


@pytest.mark.slow
def test_devices_share_the_texts():
    """What four devices score and draw is what one does."""
    name = "shared, untied"
    mesh = make_mesh({"data": 2, "fsdp": 2}, jax.devices()[:4])
    spread = HarnessModel(
        parameters(MODELS[name]), MODELS[name], tiny.tokenizer(), rows=2, mesh=mesh
    )
    asked = instances("loglikelihood", *pairs()[:21])
    found, expected = (lm.loglikelihood(asked) for lm in (spread, ours(name)))
    np.testing.assert_allclose([x for x, _ in found], [x for x, _ in expected], atol=1e-4)
    settings = {"max_gen_toks": 20, "do_sample": True, "temperature": 1.0}
    drawn = instances("generate_until", *[(t, settings) for t in texts(6, 9)])
    assert spread.generate_until(drawn) == ours(name).generate_until(drawn)
