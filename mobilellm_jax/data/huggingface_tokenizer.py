"""Tokenizers of Hugging Face: tokenizer.json, run by the `tokenizers` library.

Byte-level BPE (GPT-2, Llama 3, Qwen) and BPE over characters with byte fallback (Llama 2) are what
language models use. Any other that has BOS or EOS works too, but may lose text that it does not
know.
"""

import base64
import dataclasses
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import tokenizers
from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer, read_chat_template, read_object
from mobilellm_jax.errors import UserError

CONFIG = "tokenizer_config.json"
_SAY_ENDS = (CONFIG, "special_tokens_map.json")  # which tokens are BOS and EOS; the first is right
_SPACE = "\u2581"  # a space inside a piece, if the decoder makes one of it


@dataclasses.dataclass(frozen=True)
class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, and the files that belong to it and say what BOS and EOS are."""

    FILE: ClassVar[str] = "tokenizer.json"

    files: Mapping[str, bytes] = dataclasses.field(repr=False, hash=False)

    @classmethod
    def read(cls, path: epath.Path) -> "HuggingFaceTokenizer":
        """Reads a tokenizer.json and what lies beside it.

        BOS and EOS are those of tokenizer_config.json, special_tokens_map.json or config.json, the
        first of them that knows. A tokenizer that has only one of the two uses it as both.

        Raises:
          UserError: a file is damaged, neither BOS nor EOS is known, or one is no token.
        """
        content = path.read_bytes()
        tokenizer = parsed(content, str(path))
        beside = {str(file): read_object(file) for file in map(path.parent.joinpath, _SAY_ENDS)}
        own = _ends(tokenizer, beside)
        config = path.parent / "config.json"
        ends = _ends(tokenizer, beside | {str(config): read_object(config)})
        if ends is None:
            raise UserError(
                f"nothing says which tokens of {path} begin and end a document: put the "
                f'{CONFIG} of the tokenizer beside it, or one with "bos_token" and "eos_token".'
            )
        found = [file for file in map(path.parent.joinpath, _SAY_ENDS) if file.exists()]
        files = {cls.FILE: content, **{file.name: file.read_bytes() for file in found}}
        if CONFIG not in files or own != ends:  # it was config.json that knew, which is not ours
            bos, eos = (tokenizer.id_to_token(i) for i in ends)
            plain = {"tokenizer_class": "PreTrainedTokenizerFast"}
            said = {**plain, **json.loads(files.get(CONFIG, b"{}"))}
            said |= {"bos_token": bos, "eos_token": eos}
            files[CONFIG] = (json.dumps(said, indent=2, ensure_ascii=False) + "\n").encode()
        return cls(files, chat_template=read_chat_template(path.parent))

    def to_dict(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        files = {name: base64.b64encode(content).decode() for name, content in self.files.items()}
        return {"huggingface": files, "chat_template": self.chat_template}

    @classmethod
    def unpacked(cls, raw: Mapping[str, Any]) -> "HuggingFaceTokenizer":
        """The inverse of `to_dict`."""
        files = {name: base64.b64decode(content) for name, content in raw["huggingface"].items()}
        return cls(files, chat_template=raw["chat_template"])

    def _files(self) -> Mapping[str, bytes]:
        return self.files

    @functools.cached_property
    def _tokenizer(self) -> tokenizers.Tokenizer:
        return parsed(self.files[self.FILE], self.FILE)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of tokenizer.json and the ids of BOS and EOS."""
        ends = f" {self.bos_id} {self.eos_id}"
        return hashlib.sha256(self.files[self.FILE] + ends.encode()).hexdigest()

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the highest id: there may be ids that no token has."""
        return vocab_size(self._tokenizer)

    @property
    def bos_id(self) -> int:
        """See `Tokenizer`."""
        return self._ends[0]

    @property
    def eos_id(self) -> int:
        """See `Tokenizer`."""
        return self._ends[1]

    @functools.cached_property
    def _ends(self) -> tuple[int, int]:
        said = {name: json.loads(self.files[name]) for name in _SAY_ENDS if name in self.files}
        ends = _ends(self._tokenizer, said)
        assert ends is not None, "`read` has seen to it"
        return ends

    @functools.cached_property
    def lossless(self) -> bool:
        """See `Tokenizer`; False where it is not certain."""
        return _keeps_text(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        # "fast" leaves out where in the text a token was, and takes half the time.
        texts = list(texts)
        found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        ids = [np.array(each.ids, np.int32) for each in found]
        if not self._special_V.any():
            return ids
        return [
            self._cut(text) if self._special_V[some].any() else some
            for text, some in zip(texts, ids, strict=True)
        ]

    @functools.cached_property
    def _special_V(self) -> np.ndarray:
        """Which tokens are special and pieces of the model as well, so that a text could spell them.

        What stands for letters that the model does not know is not among them.
        """
        model = json.loads(self.files[self.FILE])["model"]
        pieces = self._tokenizer.get_vocab(with_added_tokens=False)
        special_V = np.zeros(self.vocab_size, bool)
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            unknown = token.content == model.get("unk_token") or i == model.get("unk_id")
            special_V[i] = token.special and token.content in pieces and not unknown
        return special_V

    def _cut(self, text: str) -> np.ndarray:
        """Ids of a text that spells special tokens, each of which is cut in two."""
        normalizer = self._tokenizer.normalizer
        text = normalizer.normalize_str(text) if normalizer else text
        names = [self.pieces[i] for i in np.flatnonzero(self._special_V)]
        spelled = "|".join(f"{re.escape(name[0])}(?={re.escape(name[1:])})" for name in names)
        cuts = [0, *(match.end() for match in re.finditer(spelled, text)), len(text)]
        parts = [text[begin:end] for begin, end in itertools.pairwise(cuts)]
        found = self._tokenizer.encode_batch_fast(parts, add_special_tokens=False)
        ids = np.array([i for each in found for i in each.ids], np.int32)
        return ids[~self._special_V[ids]]  # one letter cannot be cut

    def encode_special(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Tokenizer`."""
        found = self._tokenizer_of_specials.encode(text, add_special_tokens=False)
        offsets = np.array(found.offsets, np.int64).reshape(-1, 2)
        return np.array(found.ids, np.int64), offsets[:, 0], offsets[:, 1]

    @functools.cached_property
    def _tokenizer_of_specials(self) -> tokenizers.Tokenizer:
        tokenizer = _parsed.__wrapped__(self.files[self.FILE])  # one to be changed
        tokenizer.encode_special_tokens = False
        return tokenizer

    @functools.cached_property
    def puts_bos(self) -> bool:
        """See `Tokenizer`."""
        content = json.loads(self.files[self.FILE])
        return _puts_in_front(content.get("post_processor"), self.bos_id)

    @property
    def named_tokens(self) -> dict[str, str]:
        """See `Tokenizer`; BOS only where the files name one, as in Hugging Face."""
        found: dict[str, str] = {}
        for name in reversed(_SAY_ENDS):  # the first is right
            for key, token in json.loads(self.files.get(name, b"{}")).items():
                token = token.get("content") if isinstance(token, dict) else token
                if key.endswith("_token") and isinstance(token, str):
                    found[key] = token
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    @property
    def pieces(self) -> list[str]:
        """See `Tokenizer`."""
        return [self._tokenizer.id_to_token(i) or "" for i in range(self.vocab_size)]

    def piece_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        decoders = _parts(self._tokenizer.decoder)
        one_per_letter = any(part["type"] == "ByteLevel" for part in decoders)
        spaces = any(_SPACE in json.dumps(part, ensure_ascii=False) for part in decoders)

        def size(piece: str) -> int:
            if one_per_letter:
                return len(piece)
            if re.fullmatch("<0x[0-9A-F]{2}>", piece):
                return 1
            return len((piece.replace(_SPACE, " ") if spaces else piece).encode())

        sizes = np.zeros(self.vocab_size, np.int32)
        for piece, i in self._tokenizer.get_vocab(with_added_tokens=False).items():
            sizes[i] = size(piece)
        for i, token in self._tokenizer.get_added_tokens_decoder().items():
            sizes[i] = 0 if token.special else len(token.content.encode())
        return sizes


def parsed(content: bytes, where: str) -> tokenizers.Tokenizer:
    """The tokenizer of a tokenizer.json, set to give all of a text the ids of its letters.

    It is shared by all who ask for the same file, so not to be changed.

    Raises:
      UserError: it is none.
    """
    try:
        return _parsed(content)
    except Exception as error:  # the library has no narrower one
        raise UserError(f"{where} is damaged, or no tokenizer.json ({error}).") from None


@functools.lru_cache(2)  # parsing takes up to half a second, and a program asks several times
def _parsed(content: bytes) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_buffer(content)
    tokenizer.encode_special_tokens = True  # like any other letters
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if isinstance(tokenizer.model, tokenizers.models.BPE):
        tokenizer.model.dropout = None
    return tokenizer


def _puts_in_front(post_processor: Mapping[str, Any] | None, bos_id: int) -> bool:
    """Whether a text gets BOS in front."""
    match post_processor:
        case {"type": "Sequence", "processors": processors}:
            return any(_puts_in_front(processor, bos_id) for processor in processors)
        case {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": name}}, *_],
            "special_tokens": special,
        }:
            return special.get(name, {}).get("ids") == [bos_id]
    return False


def vocab_size(tokenizer: tokenizers.Tokenizer) -> int:
    """One more than the highest id, added tokens included."""
    return 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)


def _ends(
    tokenizer: tokenizers.Tokenizer, said: Mapping[str, Mapping[str, Any]]
) -> tuple[int, int] | None:
    """BOS and EOS by the first of these files that knows, one for both where they know only one."""
    bos, eos = (_end(tokenizer, name, said) for name in ("bos_token", "eos_token"))
    if bos is None or eos is None:
        both = eos if bos is None else bos
        return None if both is None else (both, both)
    return bos, eos


def _end(
    tokenizer: tokenizers.Tokenizer, name: str, said: Mapping[str, Mapping[str, Any]]
) -> int | None:
    """The id of one of them. Files name a token, perhaps in an object, or an id, perhaps of several."""
    for file, content in said.items():
        token, number = content.get(name), content.get(f"{name}_id")
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(number, list):
            number = number[0] if number else None
        if token is not None:
            found = tokenizer.token_to_id(str(token))
        elif number is not None:
            whole = isinstance(number, int) and 0 <= number < vocab_size(tokenizer)
            found = number if whole and tokenizer.id_to_token(number) else None
        else:
            continue
        if found is None:
            raise UserError(
                f"the {name} of {file} is {number if token is None else token!r}, which "
                "tokenizer.json does not know: take both from the same tokenizer."
            )
        return found
    return None


def _keeps_text(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether every text certainly comes back: nothing rewrites it, and every byte has a token."""
    model, splits = tokenizer.model, _parts(tokenizer.pre_tokenizer)
    if not isinstance(model, tokenizers.models.BPE) or _parts(tokenizer.normalizer):
        return False
    if model.continuing_subword_prefix or model.end_of_word_suffix:
        return False
    for i, token in tokenizer.get_added_tokens_decoder().items():
        swallows = token.lstrip or token.rstrip
        if not token.special and (swallows or tokenizer.decode([i]) != token.content):
            return False
    match [part["type"] for part in _parts(tokenizer.decoder)]:
        case ["ByteLevel"] if splits and splits[-1].get("add_prefix_space") is False:
            bytes_alone = tokenizers.pre_tokenizers.ByteLevel.alphabet()
            splits = splits[:-1]
        case ["ByteFallback", "Fuse"] if model.byte_fallback and not model.ignore_merges:
            bytes_alone = [f"<0x{byte:02X}>" for byte in range(256)]
        case _:
            return False
    # Before that a text may be cut, if nothing falls off.
    cuts = {"Split", "Digits", "Punctuation"}
    whole = all(p["type"] in cuts and p.get("behavior") != "Removed" for p in splits)
    return whole and tokenizer.get_vocab().keys() >= set(bytes_alone)


def _parts(component: Any) -> list[dict[str, Any]]:
    """A normalizer, pre-tokenizer or decoder as it stands in the file, sequences laid out flat."""

    def flat(part: dict[str, Any]) -> list[dict[str, Any]]:
        if part["type"] != "Sequence":
            return [part]
        inside = next(value for value in part.values() if isinstance(value, list))
        return [found for each in inside for found in flat(each)]

    return [] if component is None else flat(json.loads(component.__getstate__()))
