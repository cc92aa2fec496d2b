"""SentencePiece models: trained here, or loaded from elsewhere.

Our models are lossless on every text and have an exact twin among Hugging Face BPE models. Both
follow from one property: merges run over the whole raw text, with no normalisation and no splitting
before. What keeps pieces from growing over word borders is the *training* alone: `WORDS` cuts the
text into words, and SentencePiece learns merges from their counts.

SentencePiece's own rules about white space would forbid the pieces that matter in code, a line
break with the indentation that follows it. So space, line break and tab go through its trainer in
the guise of private-use characters and get their own names back in the finished model.
"""

import base64
import collections
import dataclasses
import functools
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import sentencepiece
from etils import epath
from sentencepiece import sentencepiece_model_pb2

from mobilellm_jax.data.tokenizers import Tokenizer, read_chat_template
from mobilellm_jax.errors import UserError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece

# A word of letters with the one mark before it (a space, a dot, a bracket), a digit, a run of marks
# with the line breaks and indentation after it, a line break with its indentation, a run of spaces.
WORDS = re.compile(
    r"(?:[^\w\n]|_)?[^\W\d_]+ | \d | [ ]?(?:[^\w\s]|_)+(?:\n[\n ]*)? | \n[\n ]* | [ ]+ | \s | .",
    re.VERBOSE | re.DOTALL,
)
_GUISE = {" ": "\ue000", "\n": "\ue001", "\t": "\ue002"}
_PUT_ON = str.maketrans(_GUISE)
_TAKE_OFF = str.maketrans({"\ue000": SPACE, "\ue001": "\n", "\ue002": "\t"})
# A word with one of these cannot be learned from: our guises and what SentencePiece reserves.
_UNLEARNABLE = re.compile(f"[\ue000-\ue002{SPACE}\u2585\0]")

_Piece = sentencepiece_model_pb2.ModelProto.SentencePiece


@dataclasses.dataclass(frozen=True)
class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model with BOS and EOS."""

    FILE: ClassVar[str] = "tokenizer.model"

    model_bytes: bytes = dataclasses.field(repr=False)

    @classmethod
    def read(cls, path: epath.Path) -> "SentencePieceTokenizer":
        """Reads a `.model` file and the chat template beside it.

        Raises:
          UserError: it is no SentencePiece model, or knows no BOS or EOS piece.
        """
        tokenizer = cls(path.read_bytes(), chat_template=read_chat_template(path.parent))
        try:
            lacking = [
                n for n, i in (("BOS", tokenizer.bos_id), ("EOS", tokenizer.eos_id)) if i < 0
            ]
            whole = all(isinstance(piece, str) for piece in tokenizer.pieces)  # bytes: no UTF-8
        except (RuntimeError, ValueError):  # of a message that quotes what is no UTF-8
            whole = False
        if not whole:
            raise UserError(f"{path} is not a SentencePiece model, or is damaged.")
        if lacking:
            raise UserError(
                f"the tokenizer {path} has no {' and no '.join(lacking)} piece: rows cannot be "
                "made with it."
            )
        return tokenizer

    def to_dict(self) -> dict[str, Any]:
        """See `Tokenizer`."""
        model = base64.b64encode(self.model_bytes).decode()
        return {"sentencepiece": model, "chat_template": self.chat_template}

    @classmethod
    def unpacked(cls, raw: Mapping[str, Any]) -> "SentencePieceTokenizer":
        """The inverse of `to_dict`."""
        model = base64.b64decode(raw["sentencepiece"])
        return cls(model, chat_template=raw.get("chat_template"))

    def _files(self) -> dict[str, bytes]:
        return {self.FILE: self.model_bytes}

    @functools.cached_property
    def _processor(self) -> sentencepiece.SentencePieceProcessor:
        if not self.model_bytes:
            raise RuntimeError("an empty file")
        return sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)

    @functools.cached_property
    def proto(self) -> sentencepiece_model_pb2.ModelProto:
        """The model file as its protocol buffer: pieces, trainer and normaliser settings."""
        return sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the model file."""
        return hashlib.sha256(self.model_bytes).hexdigest()

    @functools.cached_property
    def vocab_size(self) -> int:
        """Number of pieces, control and byte pieces included."""
        return self._processor.vocab_size()

    @property
    def bos_id(self) -> int:
        """See `Tokenizer`."""
        return self._processor.bos_id()

    @property
    def eos_id(self) -> int:
        """See `Tokenizer`."""
        return self._processor.eos_id()

    @functools.cached_property
    def lossless(self) -> bool:
        """See `Tokenizer`."""
        rules = self.proto.normalizer_spec
        return (
            self.proto.trainer_spec.byte_fallback
            and not rules.precompiled_charsmap
            and not rules.add_dummy_prefix
            and not rules.remove_extra_whitespaces
        )

    @functools.cached_property
    def _space_sign(self) -> list[int]:
        return [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE.encode()]

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without BOS and EOS.

        A literal U+2581 would come back as a space, since SentencePiece writes spaces with it; a
        lossless model spells it with its three byte pieces instead.
        """
        if SPACE not in text or not self.lossless:
            return self._processor.encode(text)
        first, *rest = (self._processor.encode(part) for part in text.split(SPACE))
        return first + [i for part in rest for i in (*self._space_sign, *part)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """See `Tokenizer`."""
        return [
            np.array(self.encode(text), np.int32)
            if SPACE in text
            else self._processor.encode(text, return_type="numpy")
            for text in texts
        ]

    def encode_special(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """See `Tokenizer`; special are the control pieces and that of what is unknown."""
        kinds = _Piece.CONTROL, _Piece.UNKNOWN
        control = {p.piece: i for i, p in enumerate(self.proto.pieces) if p.type in kinds}
        spelled = "|".join(sorted(map(re.escape, control), key=len, reverse=True))
        ids: list[int] = []
        bytes_: list[tuple[int, int]] = []  # begin and end of each id, in UTF-8
        at = 0
        for part in re.split(f"({spelled})", text) if spelled else [text]:
            if part in control:
                ids.append(control[part])
                bytes_.append((at, at + len(part.encode())))
            else:
                for i, begin, end in self._located(part):
                    ids.append(i)
                    bytes_.append((at + begin, at + end))
            at += len(part.encode())
        begins = np.cumsum([0, *(len(character.encode()) for character in text)])
        begin_N, end_N = np.array(bytes_, np.int64).reshape(-1, 2).T
        return (
            np.array(ids, np.int64),
            np.searchsorted(begins, begin_N, side="right") - 1,
            np.searchsorted(begins, end_N, side="left"),
        )

    def _located(self, text: str) -> list[tuple[int, int, int]]:
        """Ids of a text without special tokens, and the bytes of each."""
        if not self.lossless:
            pieces = self._processor.encode(text, return_type="proto").pieces
            return [(piece.id, piece.begin, piece.end) for piece in pieces]
        ids = self.encode(text)
        ends = np.cumsum(self._sizes[ids]).tolist()
        return list(zip(ids, [0, *ends], ends, strict=False))

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        return self.piece_bytes()

    @property
    def named_tokens(self) -> dict[str, str]:
        """See `Tokenizer`."""
        ids = {"bos": self.bos_id, "eos": self.eos_id, "unk": self._processor.unk_id()}
        ids["pad"] = self._processor.pad_id()
        return {f"{k}_token": self.proto.pieces[i].piece for k, i in ids.items() if i >= 0}

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids; control pieces (BOS, EOS, padding) stand for nothing."""
        return self._processor.decode([int(i) for i in ids if i < self.vocab_size])

    @property
    def pieces(self) -> list[str]:
        """See `Tokenizer`."""
        return [piece.piece for piece in self.proto.pieces]

    def piece_bytes(self) -> np.ndarray:
        """See `Tokenizer`."""
        kinds = {_Piece.CONTROL: 0, _Piece.UNKNOWN: 0, _Piece.UNUSED: 0, _Piece.BYTE: 1}
        sizes = [
            kinds.get(piece.type, len(piece.piece.replace(SPACE, " ").encode()))
            for piece in self.proto.pieces
        ]
        return np.asarray(sizes, np.int32)


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, markers: Sequence[str] = ()
) -> SentencePieceTokenizer:
    """Trains a BPE model with byte fallback.

    Ids: unk 0, BOS 1, EOS 2, the markers, the 256 bytes, merges in the order they were learned, characters.

    Args:
      texts: the text to learn from; read once, only the counts of its words are kept in memory.
      vocab_size: number of pieces.
      markers: special tokens of its chat template.

    Raises:
      UserError: the texts are too few or too varied for so many (or so few) pieces.
    """
    counts: collections.Counter[str] = collections.Counter()
    for text in texts:
        counts.update(WORDS.findall(text))
    words = sorted(((n, w) for w, n in counts.items() if not _UNLEARNABLE.search(w)), reverse=True)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(f"{word.translate(_PUT_ON)}\t{n}" for n, word in words),
            model_writer=model,
            input_format="tsv",  # a word and its count
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=0.9999,
            max_sentencepiece_length=24,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            split_by_whitespace=False,  # `WORDS` has done all the splitting
            split_by_unicode_script=False,
            split_by_number=False,
            split_digits=False,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            control_symbols=list(markers),
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise UserError(
            f"a tokenizer of {vocab_size} pieces cannot be trained on {len(words)} different words "
            f"({' '.join(str(error).split())}): choose another vocab_size or give more text."
        ) from None
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in proto.pieces:
        piece.piece = piece.piece.translate(_TAKE_OFF)
    return SentencePieceTokenizer(proto.SerializeToString(deterministic=True))
