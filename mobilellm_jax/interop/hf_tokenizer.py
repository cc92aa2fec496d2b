"""Tokenizers as the files that Hugging Face loads, with the same ids for any text.

A tokenizer that came as tokenizer.json goes out as it came. SentencePiece BPE models are rewritten.

SentencePiece has no list of merges. It repeatedly joins the two neighbouring symbols whose
concatenation is the piece of highest score, the leftmost pair first where scores are equal. Every
piece can be reached by one last join only: whatever surrounds it, the joins inside it are those of
the piece standing alone, because a join across its border would have made another piece. So one
merge per piece, ordered by score, says all.

Spaces stand in the vocabulary as spaces, not as SentencePiece's U+2581, and text reaches the merges
unchanged: a U+2581 in the text falls back to its three bytes, as `SentencePieceTokenizer.encode`
has it.

Special tokens are not looked for in text (`split_special_tokens`): a text that contains the letters
`<s>` gets the ids of these letters, as in training, and BOS comes only from the post-processor. Only
where there is a chat template they are: it makes one text of a conversation, special tokens and all.
"""

import json
from typing import Any

from etils import epath

from mobilellm_jax.data.chat import generation_ends
from mobilellm_jax.data.sentencepiece_tokenizer import SPACE, SentencePieceTokenizer
from mobilellm_jax.data.tokenizers import Tokenizer, read_object
from mobilellm_jax.errors import UserError

Proto = Any  # sentencepiece_model_pb2.ModelProto; generated code carries no types

_CONFIG = "tokenizer_config.json"
_NORMAL, _UNKNOWN, _CONTROL, _BYTE = 1, 2, 3, 6  # ModelProto.SentencePiece.Type


def write_tokenizer(tokenizer: Tokenizer, directory: epath.PathLike, max_length: int) -> None:
    """Writes tokenizer.json, tokenizer_config.json, what else there is, and the chat template.

    Args:
      tokenizer: one that came as tokenizer.json, or a SentencePiece BPE model.
      directory: where to write; exists.
      max_length: the network's context in tokens.

    Raises:
      UserError: the tokenizer cannot be expressed exactly (see `tokenizer_json`).
    """
    directory = epath.Path(directory)
    tokenizer.write(directory)
    if isinstance(tokenizer, SentencePieceTokenizer):
        files = _rewritten(tokenizer, max_length)
    else:
        config = read_object(directory / _CONFIG)
        complete = "model_max_length" in config
        files = {} if complete else {_CONFIG: config | {"model_max_length": max_length}}
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content, indent=1) + "\n")


def generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """generation_config.json: what begins a text, and all that ends one, a turn of a conversation too."""
    eos, *more = generation_ends(tokenizer)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": [eos, *more] if more else eos}


def _rewritten(tokenizer: SentencePieceTokenizer, max_length: int) -> dict[str, dict[str, Any]]:
    """The content of the files that make a SentencePiece model one of Hugging Face's."""
    proto = tokenizer.proto
    special = {
        "bos_token": proto.pieces[tokenizer.bos_id].piece,
        "eos_token": proto.pieces[tokenizer.eos_id].piece,
        "unk_token": proto.pieces[_unknown_id(proto)].piece,
    }
    added = _added_tokens(proto)
    config = {
        # LlamaTokenizer would replace the normalizer and decoder of tokenizer.json by its own.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        **special,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in added
        },
        "split_special_tokens": tokenizer.chat_template is None,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    return {
        "tokenizer.json": tokenizer_json(tokenizer),
        _CONFIG: config,
        "special_tokens_map.json": special,
    }


def tokenizer_json(tokenizer: SentencePieceTokenizer) -> dict[str, Any]:
    """The content of tokenizer.json: `tokenizers` (0.20 or later) then gives SentencePiece's ids.

    Raises:
      UserError: the model is not BPE, changes text before it splits it (normalisation, spaces
        removed), has no byte pieces, has user-defined or unused ones, or two of its pieces have the
        same score.
    """
    proto = tokenizer.proto
    _check(proto)
    pieces = [_text(piece) for piece in proto.pieces]
    bos = pieces[tokenizer.bos_id]
    normalizers: list[dict[str, Any]] = []
    decoders: list[dict[str, Any]] = [{"type": "ByteFallback"}, {"type": "Fuse"}]
    if proto.normalizer_spec.add_dummy_prefix:  # not a model of ours: it reads U+2581 as a space
        normalizers.append({"type": "Prepend", "prepend": " "})
        normalizers.append({"type": "Replace", "pattern": {"String": SPACE}, "content": " "})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    begin, begin_pair = ({"SpecialToken": {"id": bos, "type_id": i}} for i in (0, 1))
    text, text_pair = ({"Sequence": {"id": "AB"[i], "type_id": i}} for i in (0, 1))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto),
        "normalizer": {"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [begin, text],
            "pair": [begin, text, begin_pair, text_pair],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[_unknown_id(proto)],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges({_text(p): p.score for p in proto.pieces if p.type == _NORMAL}),
        },
    }


def merges(scores: dict[str, float]) -> list[tuple[str, str]]:
    """The join that makes each piece, best score first.

    Args:
      scores: pieces that text is made of, and their scores; those of pieces longer than a character
        differ from each other.

    Returns:
      pairs (left, right). A piece that SentencePiece never makes, because the joins inside it go
      another way, has none.
    """
    words = (piece for piece in scores if len(piece) > 1)
    joins = {word: join for word in words if (join := _last_join(word, scores))}
    return [joins[word] for word in sorted(joins, key=lambda word: -scores[word])]


def _last_join(piece: str, scores: dict[str, float]) -> tuple[str, str] | None:
    """Joins the characters of `piece` as SentencePiece does, up to the last join."""
    symbols = list(piece)
    while len(symbols) > 2:
        joined = [left + right for left, right in zip(symbols, symbols[1:], strict=False)]
        candidates = [i for i, text in enumerate(joined) if text in scores]
        if not candidates:
            return None
        best = max(candidates, key=lambda i: scores[joined[i]])  # of equals `max` takes the first
        symbols[best : best + 2] = [joined[best]]
    return symbols[0], symbols[1]


def _text(piece: Proto) -> str:
    return piece.piece.replace(SPACE, " ") if piece.type == _NORMAL else piece.piece


def _unknown_id(proto: Proto) -> int:
    return next(i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN)


def _added_tokens(proto: Proto) -> list[dict[str, Any]]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return [
        {"id": i, "content": piece.piece, **flags, "special": True}
        for i, piece in enumerate(proto.pieces)
        if piece.type in (_UNKNOWN, _CONTROL)
    ]


def obstacles(proto: Proto) -> dict[str, bool]:
    """What keeps a SentencePiece model from being another program's BPE, and whether it is so here."""
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    return {
        "it is not a BPE model": trainer.model_type != trainer.BPE,
        "it has no byte pieces": not trainer.byte_fallback,
        f"it normalises text ({normalizer.name})": bool(normalizer.precompiled_charsmap),
        "it removes extra spaces": normalizer.remove_extra_whitespaces,
        "it does not mark spaces in its pieces": not normalizer.escape_whitespaces,
        "it marks spaces behind words": trainer.treat_whitespace_as_suffix,
    }


def _check(proto: Proto) -> None:
    pieces = [piece for piece in proto.pieces if piece.type == _NORMAL]
    words = [piece for piece in pieces if len(piece.piece) > 1]
    unknown = set("".join(p.piece for p in words)) - {p.piece for p in pieces}
    own = {
        "it rewrites text after decoding": bool(proto.denormalizer_spec.precompiled_charsmap),
        "it has user-defined or unused pieces": any(
            piece.type not in (_NORMAL, _UNKNOWN, _CONTROL, _BYTE) for piece in proto.pieces
        ),
        "two of its pieces have the same score": len({p.score for p in words}) < len(words),
        "some of its pieces hold characters that are no pieces themselves": bool(unknown),
    }
    for obstacle, present in (obstacles(proto) | own).items():
        if present:
            raise UserError(
                "this tokenizer cannot be written for Hugging Face with the same ids, because "
                f"{obstacle}: `python -m mobilellm_jax.prepare` trains tokenizers that can."
            )
