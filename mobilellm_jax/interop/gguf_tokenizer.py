"""A tokenizer as llama.cpp's: the `tokenizer.*` keys of a GGUF file.

llama.cpp has tokenizers of its own and is told which to use with which table. Two give the ids of
ours:

* `llama` is SentencePiece's BPE. It writes a space as U+2581, so that a U+2581 in the text is read
  as a space; only `Tokenizer.encode` knows to spell it with its bytes.
* `gpt2` is byte-level BPE. How text is cut into words it knows by name, so the name must be that of
  the regular expression really in tokenizer.json.

Neither changes a text before it cuts it. Special tokens are looked for in a text only if the program
around llama.cpp asks for it (`parse_special`), added tokens that are not special always.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from mobilellm_jax.data.chat import generation_ends
from mobilellm_jax.data.sentencepiece_tokenizer import SPACE, SentencePieceTokenizer
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.hf_tokenizer import merges, obstacles

if TYPE_CHECKING:
    from mobilellm_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

Proto = Any  # sentencepiece_model_pb2.ModelProto; generated code carries no types

# GGUF's types of tokens are those of SentencePiece.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_GPT2 = "the pattern of GPT-2"  # built into the ByteLevel pre-tokenizer
_DIGITS = "single digits and the pattern of GPT-2"

# How text is cut into words, and whether a word that is a token is taken without merging: the name
# under which llama.cpp does so.
_PRE_TOKENIZERS = {
    (_LLAMA3, True): "llama-bpe",
    (_LLAMA3, False): "dbrx",
    (_QWEN2, False): "qwen2",
    (_GPT2, False): "gpt-2",
    (_DIGITS, False): "smollm",
}


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What the `tokenizer.*` keys say, and what the user should know about it."""

    model: str  # llama or gpt2
    pre: str  # how gpt2 cuts text into words
    tokens: list[str]
    types: list[int]
    bos_id: int
    eos_id: int
    add_bos: bool  # in front of a prompt
    chat_template: str | None = None
    turn_end: int | None = None  # id that ends a turn of the chat template, where it is not EOS
    scores: list[float] = dataclasses.field(default_factory=list)  # of llama
    add_space_prefix: bool = False  # of llama
    merges: list[str] = dataclasses.field(default_factory=list)  # of gpt2, "left right"
    notes: tuple[str, ...] = ()


def vocabulary(tokenizer: Tokenizer, size: int) -> Vocabulary:
    """The tokenizer as llama.cpp's.

    Args:
      tokenizer: a SentencePiece BPE model, or byte-level BPE of Hugging Face.
      size: the network's number of embeddings; those without a token become unused ones.

    Raises:
      UserError: llama.cpp has no tokenizer with the same ids, or there are more tokens than
        embeddings.
    """
    if tokenizer.vocab_size > size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens and the model {size} embeddings: export "
            "with the tokenizer that the model was trained with."
        )
    words = _of(tokenizer)
    missing = range(len(words.tokens), size)
    return dataclasses.replace(
        words,
        turn_end=next(iter(generation_ends(tokenizer)[1:]), None),
        tokens=[*words.tokens, *map(_filling, missing)],
        types=[*words.types, *(UNUSED for _ in missing)],
        scores=words.scores and [*words.scores, *(0.0 for _ in missing)],
    )


def _of(tokenizer: Tokenizer) -> Vocabulary:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return _sentencepiece(tokenizer)
    # Here, because it loads the library of Hugging Face.
    from mobilellm_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

    if isinstance(tokenizer, HuggingFaceTokenizer):
        return _byte_level(tokenizer)
    raise _cannot(f"it is a {type(tokenizer).__name__}")


def write_vocabulary(writer: Any, words: Vocabulary) -> None:
    """Adds the keys to a `gguf.GGUFWriter`."""
    writer.add_tokenizer_model(words.model)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_scores(words.scores)  # an empty list is not written
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(words.bos_id)
    writer.add_eos_token_id(words.eos_id)
    if words.turn_end is not None:
        writer.add_eot_token_id(words.turn_end)
    if UNKNOWN in words.types:
        writer.add_unk_token_id(words.types.index(UNKNOWN))
    writer.add_add_bos_token(words.add_bos)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(words.add_space_prefix)
    if words.chat_template:
        writer.add_chat_template(words.chat_template)


def _sentencepiece(tokenizer: SentencePieceTokenizer) -> Vocabulary:
    proto = tokenizer.proto
    dummy_prefix = proto.normalizer_spec.add_dummy_prefix
    types = [piece.type for piece in proto.pieces]
    _refuse_if(
        obstacles(proto)
        | {
            "it has unused pieces": UNUSED in types,
            "it has user-defined pieces and puts a space in front of a text": (
                USER_DEFINED in types and dummy_prefix
            ),
        }
    )
    return Vocabulary(
        model="llama",
        pre="default",
        tokens=[
            # These are looked for before spaces are written as U+2581.
            piece.piece.replace(SPACE, " ") if piece.type == USER_DEFINED else piece.piece
            for piece in proto.pieces
        ],
        types=types,
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        add_bos=True,
        chat_template=tokenizer.chat_template,
        scores=[piece.score for piece in proto.pieces],
        add_space_prefix=dummy_prefix,
        notes=tuple(_spelled_out(proto)),
    )


def _spelled_out(proto: Proto) -> Iterator[str]:
    """llama.cpp joins letters to any token, SentencePiece only to those that text is made of."""
    scores = {piece.piece: piece.score for piece in proto.pieces if piece.type == NORMAL}
    found = []
    for piece in proto.pieces:
        if piece.type in (UNKNOWN, CONTROL, BYTE):
            text = piece.piece
            parts = {text[i:j] for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
            inside = {part: scores[part] for part in parts & scores.keys()}
            if any(left + right == text for left, right in merges({**inside, text: piece.score})):
                found.append(text)
    if found:
        yield (
            f"llama.cpp reads the letters {' '.join(found)} in a text as the token of that name: it "
            "joins whatever makes a token."
        )


def _byte_level(tokenizer: "HuggingFaceTokenizer") -> Vocabulary:
    content = json.loads(tokenizer.files[tokenizer.FILE])
    model, normalizer = content["model"], content.get("normalizer")
    if model.get("byte_fallback"):
        raise UserError(
            "this tokenizer.json is a converted SentencePiece model, and llama.cpp reads only the "
            "original: put tokenizer.model in its place."
        )
    _refuse_if(
        {
            f"its model is {model['type']}": model["type"] != "BPE",
            "it marks where words begin or end": bool(
                model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
            ),
            f"it normalises text by {json.dumps(normalizer)}": (
                normalizer is not None and normalizer["type"] != "NFC"
            ),
        }
    )
    cut, whole = _cut(content.get("pre_tokenizer")), bool(model.get("ignore_merges"))
    if (cut, whole) not in _PRE_TOKENIZERS:
        looked_up = " and looks whole words up" if whole else ""
        raise _cannot(f"it cuts text into words by {cut}{looked_up}, which has no name there")
    tokens = {i: token for token, i in model["vocab"].items()}
    types = dict.fromkeys(tokens, NORMAL)
    for token in content["added_tokens"]:
        tokens[token["id"]] = token["content"]
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    ids = range(max(tokens) + 1)
    return Vocabulary(
        model="gpt2",
        pre=_PRE_TOKENIZERS[cut, whole],
        tokens=[tokens.get(i, _filling(i)) for i in ids],
        types=[types.get(i, UNUSED) for i in ids],
        bos_id=tokenizer.bos_id,
        eos_id=tokenizer.eos_id,
        add_bos=tokenizer.puts_bos,
        chat_template=tokenizer.chat_template,
        merges=[pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]],
        notes=tuple(_differences(content, tokens[tokenizer.bos_id], tokenizer.puts_bos)),
    )


def _cut(pre_tokenizer: Mapping[str, Any] | None) -> str:
    """How text is cut into words before it becomes bytes: a pattern, or one of the names above."""
    steps = [pre_tokenizer]
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        steps = pre_tokenizer["pretokenizers"]
    match steps:
        case [
            {
                "type": "Split",
                "pattern": {"Regex": pattern},
                "behavior": "Isolated",
                "invert": False,
            },
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            return pattern
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return _GPT2
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            return _DIGITS
    return json.dumps(pre_tokenizer)


def _differences(content: Mapping[str, Any], bos: str, add_bos: bool) -> Iterator[str]:
    if content.get("normalizer"):
        yield (
            "this tokenizer composes characters before it cuts a text (NFC) and llama.cpp does not: "
            "decomposed accents get other ids there."
        )
    if not add_bos:
        yield (
            f"this tokenizer puts nothing in front of a text, so llama.cpp will not either: a network "
            f"that was trained here knows documents that begin with {bos}."
        )


def _filling(i: int) -> str:
    return f"[PAD{i}]"


def _refuse_if(obstacles: Mapping[str, bool]) -> None:
    for obstacle, present in obstacles.items():
        if present:
            raise _cannot(obstacle)


def _cannot(obstacle: str) -> UserError:
    return UserError(
        f"this tokenizer cannot be written for llama.cpp with the same ids, because {obstacle}."
    )
