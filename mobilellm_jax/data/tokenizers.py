"""The tokenizer as all programs see it, whichever library its file is for.

Two kinds exist: SentencePiece models (`sentencepiece_tokenizer.py`, where ours are trained too) and
the tokenizer.json of Hugging Face (`huggingface_tokenizer.py`). A text is never searched for
special tokens: the letters `<s>` get the ids of these letters, and what begins or ends a document
is put there as an id. Only what a chat template has written is read otherwise (`encode_special`).
"""

import abc
import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from mobilellm_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Tokenizer(abc.ABC):
    """Text to ids and back, with a beginning and an end of document; immutable and picklable."""

    FILE: ClassVar[str]  # the file of this kind that `load` takes

    chat_template: str | None = dataclasses.field(default=None, repr=False, kw_only=True)

    @staticmethod
    def load(path: epath.PathLike) -> "Tokenizer":
        """Reads a tokenizer.

        Args:
          path: a SentencePiece `.model`; a Hugging Face `tokenizer.json`; or a folder with either.
            In a folder with both the model is read, unless tokenizer.json knows more tokens. What
            lies beside the file (tokenizer_config.json, special_tokens_map.json, config.json,
            chat_template.jinja) says which tokens are BOS and EOS, where the file does not, and
            what the chat template is.

        Raises:
          UserError: there is no such file, it is damaged or of another kind, or it has neither BOS
            nor EOS.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(f"there is no tokenizer at {path}.")
        # The libraries load where they are needed: most runs need one of them.
        if path.is_dir():
            folder, path = path, file_of(path)
            if path is None:
                raise UserError(
                    f"there is no tokenizer in {folder}: it has neither a tokenizer.model nor a "
                    "tokenizer.json."
                )
        if path.suffix == ".json":
            from mobilellm_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

            return HuggingFaceTokenizer.read(path)
        from mobilellm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer

        return SentencePieceTokenizer.read(path)

    @staticmethod
    def from_dict(raw: Mapping[str, Any]) -> "Tokenizer":
        """What `to_dict` made a dictionary of."""
        if "sentencepiece" in raw:
            from mobilellm_jax.data.sentencepiece_tokenizer import SentencePieceTokenizer

            return SentencePieceTokenizer.unpacked(raw)
        from mobilellm_jax.data.huggingface_tokenizer import HuggingFaceTokenizer

        return HuggingFaceTokenizer.unpacked(raw)

    @abc.abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """All of it as values that JSON knows."""

    def write(self, directory: epath.PathLike) -> None:
        """Writes its files as they came; `load` of that folder gives the same tokenizer.

        `FILE` comes last, and whole or not at all. The chat template is in chat_template.jinja.
        """
        files = dict(self._files())
        if self.chat_template is not None:
            files["chat_template.jinja"] = self.chat_template.encode()
        for name in sorted(files, key=lambda name: name == self.FILE):
            half = epath.Path(directory) / f"{name}.incomplete"
            half.write_bytes(files[name])
            half.replace(half.parent / name)

    @abc.abstractmethod
    def _files(self) -> Mapping[str, bytes]:
        """The content of its files by name."""

    @property
    @abc.abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of what decides the ids; the chat template does not."""

    @property
    def template_fingerprint(self) -> str:
        """sha256 (hex) of the chat template, by which rows of conversations say what wrote them."""
        return hashlib.sha256((self.chat_template or "").encode()).hexdigest()

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Number of ids, those of special tokens included; a network may have more embeddings."""

    @property
    @abc.abstractmethod
    def bos_id(self) -> int:
        """Beginning of document; in rows also the padding. May be the same token as EOS."""

    @property
    @abc.abstractmethod
    def eos_id(self) -> int:
        """End of document."""

    @property
    @abc.abstractmethod
    def lossless(self) -> bool:
        """Whether `decode(encode(text)) == text` for every text, as for all models of ours."""

    @abc.abstractmethod
    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS and without special tokens the text may spell."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, int32 [N], at what the library is fastest at."""

    @abc.abstractmethod
    def encode_special(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids of a text in which special tokens stand where they are spelled, and where each id is.

        Returns:
          Ids, and the first character of each and the one behind its last, int64 [N] each. Of
          several ids that make up one character, some may begin and end at the same place.
        """

    @property
    def puts_bos(self) -> bool:
        """Whether Hugging Face's tokenizer of these files puts BOS in front of a text."""
        return True

    @property
    @abc.abstractmethod
    def named_tokens(self) -> dict[str, str]:
        """The special tokens that chat templates know by name: `bos_token`, `eos_token`, ..."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; special tokens and ids beyond the vocabulary stand for nothing."""

    @abc.abstractmethod
    def piece_bytes(self) -> np.ndarray:
        """How many bytes of UTF-8 each id stands for: int32 [V], 0 for special tokens.

        Summed over `encode(text)` this is `len(text.encode())`, exactly so for a lossless one.
        """

    @property
    @abc.abstractmethod
    def pieces(self) -> list[str]:
        """The piece of each id as the library writes it, "" for an id that has none: [V]."""

    @property
    def vocabulary(self) -> str:
        """sha256 (hex) of the pieces that are text, by id.

        Tokenizers of one vocabulary, as those of a network and of its chat version, may differ in
        their special tokens, or in what begins and ends a document.
        """
        size_V = self.piece_bytes()
        text = [piece if size else "" for piece, size in zip(self.pieces, size_V, strict=True)]
        return hashlib.sha256(json.dumps(text).encode()).hexdigest()

    def __reduce__(self) -> tuple[Any, ...]:  # what the libraries hold is rebuilt, not carried
        """Pickles the fields alone."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return _rebuilt, (type(self), fields)


def _rebuilt(kind: type[Tokenizer], fields: Mapping[str, Any]) -> Tokenizer:
    return kind(**fields)


def file_of(folder: epath.Path) -> epath.Path | None:
    """The file that a folder's tokenizer is in: its model, unless tokenizer.json knows more tokens."""
    model, other = folder / "tokenizer.model", folder / "tokenizer.json"
    if model.exists() and other.exists():
        from mobilellm_jax.data import huggingface_tokenizer as huggingface

        tokens = huggingface.vocab_size(huggingface.parsed(other.read_bytes(), str(other)))
        return other if tokens > Tokenizer.load(model).vocab_size else model
    return next((file for file in (model, other) if file.exists()), None)


def read_object(path: epath.Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none.

    Raises:
      UserError: the file holds something else.
    """
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object.")
    return content


def read_chat_template(folder: epath.Path) -> str | None:
    """The Jinja template that makes one text of a conversation, None where a folder has none.

    It is chat_template.jinja, or else in tokenizer_config.json, where it may be one of several: then
    it is that of the name "default".

    Raises:
      UserError: the file is damaged.
    """
    file = folder / "chat_template.jinja"
    try:
        if file.exists():
            return file.read_bytes().decode()
    except UnicodeDecodeError:
        raise UserError(f"{file} is damaged: it is not UTF-8.") from None
    config = folder / "tokenizer_config.json"
    found = read_object(config).get("chat_template")
    try:
        if isinstance(found, list):
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
    except (KeyError, TypeError):
        found = False
    if not isinstance(found, str | None):
        raise UserError(
            f"{config} is damaged: its chat_template is neither a text nor a list of named ones."
        )
    return found
