"""Strings out of tokens: whole characters as they come, and where a text stops."""

from collections.abc import Collection, Iterable, Iterator, Sequence

import numpy as np

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.decoding.decoder import CHUNK, Placed, row_seeds, stream
from mobilellm_jax.decoding.sampling import Sampling
from mobilellm_jax.errors import UserError


def generate(
    decoder: Placed,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int = 128,
    sampling: Sampling = Sampling(),
    seed: int = 0,
    stop: Sequence[str] = (),
    bos: bool = True,
) -> list[str]:
    """The continuation of each prompt: up to the end of its document, a stop string or `max_new_tokens`.

    Args:
      decoder: the network.
      tokenizer: its tokenizer.
      prompts: texts.
      max_new_tokens: of each.
      sampling: how tokens are drawn.
      seed: of the draws.
      stop: strings that end a text before them.
      bos: whether texts begin with BOS, as all do that are trained on here; networks of elsewhere may
        have a tokenizer that puts none (`tokenizer.puts_bos`).

    Raises:
      UserError: see `stream` and `Text`.
    """
    begin = [tokenizer.bos_id]
    encoded = [tokenizer.encode(prompt) for prompt in prompts]
    ids = [[*begin, *own] if bos else own or begin for own in encoded]
    seeds = row_seeds(seed, len(ids))
    texts = continued(decoder, tokenizer, ids, max_new_tokens, sampling, seeds, stop)
    return [text.whole() for text in texts]


def continued(
    decoder: Placed,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int | Sequence[int],
    sampling: Sampling,
    seeds: Sequence[int] | np.ndarray,
    stop: Sequence[str] = (),
    chunk: int = CHUNK,
    ends: Collection[int] = (),
) -> list["Text"]:
    """`generate` of prompts as ids, BOS included, with a seed for each; see `Text` for `ends`.

    The most new tokens are the same for all prompts, or a number for each.
    """
    texts = [Text(tokenizer, prompt, stop, ends) for prompt in prompts]
    limits = np.broadcast_to(max_new_tokens, len(prompts)).tolist()
    drawn = 0

    def over() -> list[bool]:
        return [text.ended or drawn >= limit for text, limit in zip(texts, limits, strict=True)]

    rows = stream(decoder, prompts, limits, sampling, seeds, chunk, over)
    for drawn, tokens_B in enumerate(rows, 1):
        for text, token, limit in zip(texts, tokens_B.tolist(), limits, strict=True):
            if drawn <= limit:
                text.add(token)
        if all(over()):
            break
    return texts


class Text:
    """The text of tokens as they come, never half a character, up to a stop string.

    It is what they add to the text before them, for what a token stands for may depend on that: a first
    piece drops its leading space, and some tokenizers read no character in bytes that stand between others
    of which one is incomplete. So tokens are decoded together with the piece before them, or with the
    prompt; both begin and end with whole characters.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str] = (),
        ends: Collection[int] = (),
    ) -> None:
        """Nothing is drawn yet.

        Args:
          tokenizer: of the tokens; its BOS and EOS end the text.
          prompt: the ids before the first.
          stop: strings that end the text before them.
          ends: further ids that end it.

        Raises:
          UserError: a stop string is empty.
        """
        if not all(stop):
            raise UserError(
                "a stop string is empty, and would end every text at once: leave it out."
            )
        self._ends = {tokenizer.bos_id, tokenizer.eos_id, *ends}
        self.ended = False
        self.tokens = 0  # that belong to the text
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids = list(prompt)
        self._shown = len(self._ids)  # ids whose text is in `_text`, or the prompt's
        self._text = ""

    def add(self, token: int) -> None:
        """Takes the next token, unless the text has ended."""
        if self.ended:
            return
        if token in self._ends:
            self._take_rest()
            self.ended = True
            return
        self.tokens += 1
        self._ids.append(token)
        piece = self._piece()
        if not piece.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character is still incomplete
            self._take(piece)

    def _piece(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        return self._tokenizer.decode(self._ids)[len(before) :]

    def _take(self, piece: str) -> None:
        longest = max(map(len, self._stop), default=0)
        begin = max(0, len(self._text) - longest)
        self._text += piece
        if piece:  # tokens that stand for nothing are no text to be decoded together with
            self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        found = [at for s in self._stop if (at := self._text.find(s, begin)) >= 0]
        if found:
            self._text, self.ended = self._text[: min(found)], True

    def _take_rest(self) -> None:
        if not self.ended and self._shown < len(self._ids):
            self._take(self._piece())

    def sure(self) -> str:
        """What no later token can take back: the beginning of a stop string is held back."""
        if self.ended:
            return self._text
        held = 0
        for s in self._stop:
            fits = (n for n in range(len(s) - 1, 0, -1) if self._text.endswith(s[:n]))
            held = max(held, next(fits, 0))
        return self._text[: len(self._text) - held]

    def whole(self) -> str:
        """All of it, also a character that never became whole."""
        self._take_rest()
        return self._text


def pieces(text: Text, tokens: Iterable[int]) -> Iterator[str]:
    """What each token adds to what is surely in the text; the rest at the end."""
    shown = 0
    for token in tokens:
        text.add(token)
        sure = text.sure()
        yield sure[shown:]
        shown = len(sure)
        if text.ended:
            return
    yield text.whole()[shown:]
