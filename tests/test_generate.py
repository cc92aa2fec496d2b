"""Generation: what the cache must not change, and what reaches the screen."""

import dataclasses
import functools
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import sentencepiece
import tiny
from tokenizer_files import FOLDERS

from mobilellm_jax import generate as generation
from mobilellm_jax.data.chat import read_template
from mobilellm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.decoding import decoder as program
from mobilellm_jax.decoding import text as texts
from mobilellm_jax.decoding.decoder import bucket, row_seeds, stream, to_draw, to_read
from mobilellm_jax.decoding.sampling import GREEDY, Sampling
from mobilellm_jax.decoding.text import Text, generate, pieces
from mobilellm_jax.errors import UserError
from mobilellm_jax.generate import batch, chat, read_prompts, shown
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.parallel.mesh import make_mesh

PLAIN = ModelConfig(97, 32, (Stack(2, 4, 2, 48),), head_dim=8, max_length=64, init_std=0.3)
SHARED = dataclasses.replace(PLAIN, stacks=(Stack(1, 4, 2, 48, repeats=2),), qk_norm="unit")
FIRST_PASS = dataclasses.replace(
    SHARED, stacks=(Stack(2, 4, 2, 48, repeats=2),), ls_kv="first_pass"
)
AGAIN = dataclasses.replace(PLAIN, stacks=(Stack(2, 4, 2, 48, 2, "reverse"), Stack(1, 2, 1, 16)))
MODELS = {"plain": PLAIN, "shared": SHARED, "first pass": FIRST_PASS, "again": AGAIN}
SMALL = dataclasses.replace(PLAIN, stacks=(Stack(1, 2, 1, 16),))  # where any network will do
HOT = Sampling(temperature=1.5, top_k=50, top_p=0.95)
PROMPTS = ([1, 5, 9], [1, 7, 8, 20, 33, 51, 60], [1], [1, 96, 2, 96, 3])


class Numbers:
    """A tokenizer whose text is the ids themselves; the ends of documents can be chosen."""

    def __init__(self, bos_id=1, eos_id=2):
        self.bos_id, self.eos_id = bos_id, eos_id

    def encode(self, text):
        return [int(number) for number in text.split()]

    def decode(self, ids):
        return "".join(f" {number}" for number in ids)


@functools.cache
def parameters(model):
    return jax.jit(functools.partial(transformer.init, model))(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def last_logits(model, params, tokens_T, length):
    """Of the last of `length` tokens, without a cache; those after it are not seen."""
    hidden_1TD = transformer.apply(params, model, tokens_T[None])
    return transformer.logits(params, model, hidden_1TD)[0, length - 1]


@functools.cache
def decoder(model):
    return to_draw(parameters(model), model)


def drawn(model, prompts, count, sampling, seed=0, chunk=4, seeds=None):
    """int [B, count]."""
    seeds = row_seeds(seed, len(prompts)) if seeds is None else seeds
    return np.stack(list(stream(decoder(model), prompts, count, sampling, seeds, chunk)), axis=1)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_greedy_is_the_argmax_of_the_network_without_a_cache(model):
    (found,) = drawn(model, PROMPTS[:1], 20, GREEDY)
    row = np.zeros(32, np.int32)
    row[:3] = PROMPTS[0]
    for length, token in enumerate(found, start=3):
        assert last_logits(model, parameters(model), row, length).argmax() == token
        row[length] = token
    assert len(set(found.tolist())) > 5  # not one token over and over


def test_a_prompt_does_not_feel_its_neighbours():
    """Sampled, a row's randomness is its seed's: its neighbours may be any, as many as they are."""
    together, seeds = drawn(SHARED, PROMPTS, 12, HOT), row_seeds(0, len(PROMPTS))
    for number, (row, prompt) in enumerate(zip(together, PROMPTS, strict=True)):
        alone = drawn(SHARED, [prompt], 12, HOT, seeds=seeds[number : number + 1])
        assert (row == alone[0]).all()
    others = [PROMPTS[0], [1, 2, 3, 4], [1, 90], [1, 11, 12, 13, 14]]
    assert (together[0] == drawn(SHARED, others, 12, HOT)[0]).all()


def test_the_seed_decides():
    one, again, other = (drawn(SMALL, PROMPTS, 16, HOT, seed) for seed in (3, 3, 4))
    assert (one == again).all()
    assert (one != other).any(axis=1).all()
    same_prompt = drawn(SMALL, [PROMPTS[0]] * 4, 16, HOT, 3)
    assert len({tuple(row) for row in same_prompt.tolist()}) == 4


def test_text_goes_on_the_same_from_any_of_its_tokens():
    """Randomness belongs to a position, however the tokens before it came to be there."""
    (whole,) = drawn(SMALL, PROMPTS[:1], 12, HOT).tolist()
    (rest,) = drawn(SMALL, [PROMPTS[0] + whole[:5]], 7, HOT).tolist()
    assert rest == whole[5:]


def test_text_ends_with_its_document():
    (found,) = drawn(SMALL, [[1, 5, 9]], 12, GREEDY).tolist()
    end = found.index(next(token for token in found if token != found[0]))
    for eos_id, expected in ((-1, found), (found[end], found[:end])):
        (text,) = generate(decoder(SMALL), Numbers(eos_id=eos_id), ["5 9"], 12, GREEDY)
        assert text == "".join(f" {token}" for token in expected)


def test_texts_begin_with_bos_or_as_their_tokenizer_does():
    def of(*ids):
        (found,) = drawn(SMALL, [ids], 4, GREEDY).tolist()
        return "".join(f" {token}" for token in found)

    for prompt, bos, wanted in (
        ("5 9", True, of(1, 5, 9)),
        ("5 9", False, of(5, 9)),
        ("", False, of(1)),
    ):
        numbers = Numbers(eos_id=-1)
        assert generate(decoder(SMALL), numbers, [prompt], 4, GREEDY, bos=bos) == [wanted]
    assert of(1, 5, 9) != of(5, 9)


def test_nothing_is_drawn_after_the_last_document_has_ended(monkeypatch):
    steps = []

    def ended(*_):
        for tokens in ([7, 2], [8, 9], [2, 9], [9, 9]):
            steps.append(tokens)
            yield np.array(tokens)

    monkeypatch.setattr(texts, "stream", ended)
    assert generate(decoder(SMALL), Numbers(), ["", ""], 4, GREEDY) == [" 7 8", ""]
    assert len(steps) == 3


def test_what_does_not_fit_the_context_is_refused():
    drawn(SMALL, [[1] * 60], 4, GREEDY)  # 64, the whole context
    with pytest.raises(UserError, match="61 tokens and 4 new ones exceed .* 64"):
        stream(decoder(SMALL), [[1, 2], [1] * 61], 4, GREEDY, [0, 0])  # before anything is printed


def test_prompts_of_nearly_one_length_share_their_programs():
    def programs():
        return program._read._cache_size(), program._draw._cache_size()

    before = programs()
    for length in (5, 6, 7, 8):
        drawn(SMALL, [[1] * length], 6, Sampling(0.9))
    assert np.subtract(programs(), before).tolist() == [1, 1]
    for length in range(1, 5000):
        assert length <= bucket(length) <= max(1.25 * length + 1, length + 15)
    assert len({bucket(length) for length in range(1, 4097)}) <= 32


def test_no_half_character_is_shown():
    tokenizer = tiny.tokenizer()
    text = "naïve Ωmega \N{GRINNING FACE}\N{FAMILY}\u2581 日本語, the sum"
    ids = tokenizer.encode(text)
    assert len(ids) > len(text)  # most of it is spelt in bytes
    shown = list(pieces(Text(tokenizer, [tokenizer.bos_id]), ids))
    assert "".join(shown) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in shown)
    assert len([part for part in shown if part]) > len(text) / 3  # as it comes, not at the end


def test_a_character_that_never_ends_is_shown_at_the_end():
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode("a Ω")[:-1]
    shown = list(pieces(Text(tokenizer, [tokenizer.bos_id]), ids))
    assert "".join(shown[:-1]) == "a "
    assert shown[-1] == "\N{REPLACEMENT CHARACTER}"


def test_a_character_that_never_ends_is_shown_where_its_document_ends():
    tokenizer = tiny.tokenizer()
    ids = [*tokenizer.encode("a Ω")[:-1], tokenizer.eos_id]
    text = Text(tokenizer, [tokenizer.bos_id])
    assert "".join(pieces(text, ids)) == text.whole() == "a \N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("kind", FOLDERS)
def test_characters_of_many_bytes_follow_each_other(tmp_path, kind):
    """Some decoders read no character in bytes among which one is incomplete: no cut may leave one."""
    tokenizer = Tokenizer.load(FOLDERS[kind](tmp_path))
    for said in ("日本語テキスト" * 3, "a日本語 テキスト", "\N{GRINNING FACE}" * 6, "\ufffd" * 9):
        ids = tokenizer.encode(said)
        for cut in range(len(said)):
            prompt = tokenizer.encode(said[:cut])
            if ids[: len(prompt)] == prompt:
                prompt = [tokenizer.bos_id, *prompt]
                rest = "".join(pieces(Text(tokenizer, prompt), ids[len(prompt) - 1 :]))
                assert tokenizer.decode(prompt) + rest == said


def test_a_space_between_prompt_and_continuation_survives():
    """Most SentencePiece models drop the space of a text's first piece; the continuation is not first."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat"] * 9),
        model_writer=model,
        model_type="bpe",
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = SentencePieceTokenizer(model.getvalue())
    text = "the cat sat"
    ids = tokenizer.encode(text)
    for cut in range(len(ids)):
        prompt = [tokenizer.bos_id, *ids[:cut]]
        rest = "".join(pieces(Text(tokenizer, prompt), ids[cut:]))
        assert tokenizer.decode(prompt) + rest == text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("again", "float32")]
    + [
        pytest.param(name, dtype, marks=pytest.mark.slow)
        for name in MODELS
        for dtype in ("float32", "bfloat16")
    ],
)
def test_chunks_and_growth_of_the_cache_change_nothing(monkeypatch, name, dtype):
    """The cache grows twice on the way."""
    made = to_draw(parameters(MODELS[name]), MODELS[name], dtype)
    hot, seeds = Sampling(temperature=1.2, top_p=0.9), row_seeds(5, 4)

    def rows(chunk):
        return np.stack(list(stream(made, PROMPTS, 40, hot, seeds, chunk)))

    whole = rows(40)
    monkeypatch.setattr(program, "SLOTS", 16)
    assert (rows(1) == whole).all() and (rows(8) == whole).all()


@pytest.mark.parametrize("devices", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_texts_that_have_ended_leave_the_batch(monkeypatch, devices):
    """The others go on as they would have, in fewer rows; the devices keep equally many."""
    mesh = make_mesh({"data": devices, "fsdp": 1}, jax.devices()[:devices])
    made = to_draw(parameters(SHARED), SHARED, mesh=mesh)
    prompts, hot = [*PROMPTS, *PROMPTS[:3]], Sampling(temperature=1.2)
    seeds, over = row_seeds(1, 7), [True, False, True, True, True, False, True]
    monkeypatch.setattr(program, "SLOTS", 16)
    whole = np.stack(list(stream(made, prompts, 40, hot, seeds, 4)))
    draw, rows = program._draw, []

    def counted(params, tokens_B, *given, **options):
        rows.append(len(tokens_B))
        return draw(params, tokens_B, *given, **options)

    monkeypatch.setattr(program, "_draw", counted)
    shorter = np.stack(list(stream(made, prompts, 40, hot, seeds, 4, lambda: over)))
    going = ~np.array(over)
    assert (shorter[:, going] == whole[:, going]).all() and shorter.shape == whole.shape
    assert sorted({*rows}, reverse=True) == ([7, 2] if devices == 1 else [8, 2])


def test_rows_to_go_on_with():
    """By hand: powers of two of each device, so that nothing is lost."""
    rows_B, over = np.arange(8), np.array([1, 0, 1, 1, 1, 1, 1, 0], bool)
    kept, own = program._going(rows_B, over, 2)
    assert kept.tolist() == [1, 7] and own.tolist() == [1, 3]
    kept, own = program._going(rows_B, over & (rows_B != 2), 2)
    assert kept.tolist() == [1, 2, 4, 7] and own.tolist() == [1, 2, 0, 3]
    assert program._going(rows_B, (), 4)[0].tolist() == list(range(8))
    assert program._going(rows_B[:7], (), 1)[0].tolist() == list(range(7))
    assert len(program._going(rows_B, [True] * 8, 1)[0]) == 1


def test_seeds_are_of_sequences():
    (a, b, c, _) = drawn(SMALL, [PROMPTS[0]] * 4, 12, HOT, seeds=[7, 9, 7, 8])
    assert (a == c).all() and (a != b).any()
    assert (row_seeds(1, 9)[:4] == row_seeds(1, 4)).all()


def test_bfloat16_halves_what_is_read():
    """Of all weights but the scales of norms."""
    half, read = (of(parameters(SHARED), SHARED, "bfloat16") for of in (to_draw, to_read))
    for path, leaf in (*flat(half.params).items(), *flat(read.params).items()):
        assert leaf.dtype == jnp.dtype("float32" if path.endswith("scale") else "bfloat16")
    # A block that is applied twice is there once.
    buffers = {id(leaf): leaf.size for leaf in jax.tree.leaves(half.params)}
    assert sum(buffers.values()) == sum(x.size for x in jax.tree.leaves(parameters(SHARED)))


STOPS = [
    ("the cat sat", ["cat"], "the "),
    ("the cat sat", [" sat", "at"], "the c"),
    ("aab", ["ab"], "a"),
    ("the cat", ["cats"], "the cat"),
    ("x", ["x"], ""),
]


@pytest.mark.parametrize(("said", "stop", "left"), STOPS)
def test_a_stop_string_ends_a_text_before_it(said, stop, left):
    """Wherever tokens end; and what may begin a stop string is not shown before it is known."""
    tokenizer = tiny.tokenizer()
    ids = tokenizer.encode(said)
    prompt = [tokenizer.bos_id, *tokenizer.encode("once ")]
    text = Text(tokenizer, prompt, stop)
    assert "".join(pieces(text, [*ids, *tokenizer.encode(" and more")])).startswith(left)
    text = Text(tokenizer, prompt, stop)
    shown = ""
    for piece in pieces(text, ids):
        shown += piece
        assert left.startswith(shown)
    assert shown == text.whole() == left
    assert text.ended == any(s in said for s in stop)


def test_long_texts_are_decoded_a_piece_at_a_time():
    """The work of a token does not grow with the text before it."""
    tokenizer, decoded = tiny.tokenizer(), []

    class Counting:
        bos_id, eos_id = tokenizer.bos_id, tokenizer.eos_id

        def decode(self, ids):
            decoded.append(len(ids))
            return tokenizer.decode(ids)

    said = "naïve 日本語 and so on, " * 40
    ids = tokenizer.encode(said)
    assert "".join(pieces(Text(Counting(), [tokenizer.bos_id]), ids)) == said
    assert max(decoded) < 24


TALKING = dataclasses.replace(SMALL, vocab_size=tiny.VOCAB, max_length=300)


def test_a_conversation(capsys):
    """Two turns: the second prompt holds the first reply; the oldest turns go where there is no room."""
    tokenizer = dataclasses.replace(tiny.tokenizer(), chat_template=read_template("chatml"))
    made, asked = decoder(TALKING), iter(["one", "two", "  ", "three " * 12, "four"])

    def ask(_):
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    chat(made, tokenizer, 16, Sampling(1.0), 0, "be brief", ask)
    said = capsys.readouterr()
    assert said.err.count("tokens read in") == 4
    read = [int(line.split()[0][1:]) for line in said.err.splitlines()]
    assert read[1] > read[0] and max(read) <= 300 - 16


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # of standard input
def test_what_is_said_has_to_be_text(errors):
    tokenizer = dataclasses.replace(tiny.tokenizer(), chat_template=read_template("chatml"))
    with pytest.raises(UserError, match="not UTF-8"):
        chat(decoder(SMALL), tokenizer, 4, GREEDY, 0, ask=lambda _: b"\xe9".decode(errors=errors))


def test_ctrl_c_ends_a_text_and_a_reply_but_no_conversation(capsys, monkeypatch):
    """What is drawn by then is kept; a text alone ends its program."""

    def interrupted(drawn):
        yield from itertools.islice(drawn, 5)
        raise KeyboardInterrupt

    monkeypatch.setattr(generation, "stream", lambda *a: interrupted(stream(*a)))
    prompt, text = [1, 5], Text(Numbers(), [1, 5])
    with pytest.raises(KeyboardInterrupt):
        shown(decoder(SMALL), prompt, 20, GREEDY, 0, text)
    said = capsys.readouterr()
    assert said.out == f"{text.whole()}\n" and text.tokens == 5 and "5 drawn" in said.err

    tokenizer = dataclasses.replace(tiny.tokenizer(), chat_template=read_template("chatml"))
    asked = iter(["one", "two"])

    def ask(_):
        try:
            return next(asked)
        except StopIteration:
            raise EOFError from None

    chat(decoder(TALKING), tokenizer, 16, Sampling(1.0), 0, ask=ask)
    assert capsys.readouterr().err.count("5 drawn") == 2


def test_a_file_of_prompts(capsys):
    prompts = ["5 9", "7", "5 9 11 12"]
    ids = [[1, *map(int, prompt.split())] for prompt in prompts]
    batch(decoder(SMALL), Numbers(), prompts, ids, 6, GREEDY, 0, [], 2)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    for line, prompt in zip(lines, prompts, strict=True):
        assert [line["text"]] == generate(decoder(SMALL), Numbers(), [prompt], 6, GREEDY)


def test_prompts_are_the_lines_of_a_file_without_its_byte_order_mark(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfone\r\n\r\nthree\r\n\r\n")
    assert read_prompts(str(file)) == ["one", "", "three"]
    file.write_bytes(b"\xef\xbb\xbf\n")
    with pytest.raises(UserError, match="is empty: every line is a prompt"):
        read_prompts(str(file))


def test_a_prompt_too_long_is_refused_before_any_is_continued(capsys):
    ids = [[1], [1], [1] * 60]
    with pytest.raises(UserError, match="60 tokens and 6 new ones"):
        batch(decoder(SMALL), Numbers(), ["", "", "long"], ids, 6, GREEDY, 0, [], 1)
    assert not capsys.readouterr().out


def test_a_call_may_draw_more_tokens_than_the_cache_doubles_to():
    model = dataclasses.replace(SMALL, max_length=320)
    few, many = (drawn(model, [[1, 5]], 300, GREEDY, chunk=chunk) for chunk in (60, 300))
    np.testing.assert_array_equal(few, many)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(UserError, match="stop string is empty"):
        Text(Numbers(), [1], ["end", ""])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--system=Be brief."], "--system is the first message of --chat: give both, or neither."),
        (["--chat", "--prompt=a"], "--prompt and --chat exclude each other: give one of them."),
    ],
)
def test_what_would_be_without_effect_is_refused(arguments, sentence):
    ended = runs.program("mobilellm_jax.generate", "--checkpoint=none", *arguments)
    assert (ended.status, ended.err) == (1, f"error: {sentence}\n")
