"""Who says how good a document is: a classifier of quality, and a language model that is asked.

Ask-LLM (Sachdeva et al. 2024, arXiv 2402.09668) puts a document into a prompt that ends in a question
with two answers, and takes the probability of one of them as the document's score. MobileLLM-R1
(arXiv 2509.24945, section 5.1.1) lets the model answer 1 or 0. Its prompts are not published: ours are
in `prompts/`, and files of your own take their place.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from data_mixing.text_measures import Measure, is_import_path, of_callable
from mobilellm_jax.data.chat import ConversationEncoder
from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.decoding.decoder import Placed, to_read
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.scoring import Request, score
from mobilellm_jax.interop.stored import load_model, open_model
from mobilellm_jax.parallel.mesh import local_mesh

SHIPPED = Path(__file__).parent / "prompts"
PLACE = "{document}"  # in a prompt
REASONING, COMBINED = "reasoning", "combined"  # prompts that are not a capability's own
LONGEST = 1024  # tokens of a document in a prompt

CLASSIFIED = 512  # tokens that FineWeb-Edu's classifier reads
TOGETHER = 32  # documents that a classifier reads together


# Prompts.


def prompt_of(source: str, capabilities: Mapping[str, Sequence[str]]) -> str:
    """The prompt that a source is asked with: its capability's, or `combined` if it has several."""
    of = [name for name, sources in capabilities.items() if source in sources]
    return of[0] if len(of) == 1 else COMBINED


def read_prompts(names: Sequence[str], given: Sequence[str] = ()) -> dict[str, str]:
    """Prompts by name: from the files given, else those that come with this package.

    Args:
      names: `reasoning`, `combined`, or of capabilities.
      given: files of a user's own, `NAME=FILE` each.

    Raises:
      UserError: there is no such prompt or file, or it has no single place for the document.
    """
    files = {}
    for text in given:
        name, _, path = text.partition("=")
        if not (name and path):
            raise UserError(f"--prompt={text} is not of the form NAME=FILE.")
        files[name] = path
    shipped = sorted(file.stem for file in SHIPPED.glob("*.txt"))
    if unused := [name for name in files if name not in names]:
        raise UserError(
            f"--prompt={unused[0]}={files[unused[0]]} is not asked: the prompts of this run are "
            f"{', '.join(names) or 'none, for there is no --judge'}."
        )
    prompts = {}
    for name in names:
        if name not in files and name not in shipped:
            raise UserError(
                f"there is no prompt for {name!r}, only for {', '.join(shipped)}: give "
                f"--prompt={name}=FILE."
            )
        file = Path(files[name]).expanduser() if name in files else SHIPPED / f"{name}.txt"
        prompt = "".join(text_lines(file)).rstrip("\n")
        if prompt.count(PLACE) != 1:
            raise UserError(
                f"the prompt in {file} has {prompt.count(PLACE) or 'no'} {PLACE}: write it once, where "
                "the document is to stand."
            )
        prompts[name] = prompt
    return prompts


# Ask-LLM.


@dataclasses.dataclass(frozen=True)
class Asking:
    """A prompt as a network's tokenizer sees it.

    Attributes:
      prompt: text with one `{document}`.
      tokenizer: of the network that is asked.
      context: tokens that the network reads.
      longest: tokens of a document, at most; fewer where the prompt does not fit the context.
      chat: the prompt is what a user says, in the tokenizer's chat template.
    """

    prompt: str
    tokenizer: Tokenizer
    context: int
    longest: int = LONGEST
    chat: bool = False

    def __post_init__(self) -> None:
        """Raises `UserError` where not even the prompt fits, or the answers are one to the tokenizer."""
        room = self._room(*self._answered(""))
        if room < 1 or self.longest < 1:
            raise UserError(
                f"a prompt that begins {self.prompt[:40]!r} leaves a document {min(room, self.longest):,} "
                f"tokens of the judge's context of {self.context:,}: give a shorter one with --prompt, "
                "or another --judge."
            )

    def requests(self, document: str) -> tuple[Request, Request]:
        """What to score for the answers 1 and 0.

        The text is encoded whole with each answer behind it. What both have in common is the context,
        the rest their continuations: so it does not matter how many tokens an answer has, or whether
        its digit is one with what stands before it.

        Args:
          document: its end is cut off where it has too many tokens.
        """
        begin = document[: 32 * self.longest]  # far more characters than that many tokens have
        ids = self.tokenizer.encode(begin)
        count = len(ids)
        if begin != document or count > self.longest:
            count = min(count, self.longest)
            begin = self._text(ids[:count])
        while (room := self._room(*(both := self._answered(begin)))) < 0:
            count = max(0, count + room)
            begin = self._text(ids[:count])
        one, zero = both
        same = len(_common(one, zero))
        context = one[:same]
        return Request(context, one[same:]), Request(context, zero[same:])

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids).rstrip("\ufffd")  # half a character

    def _room(self, one: tuple[int, ...], zero: tuple[int, ...]) -> int:
        return self.context + 1 - max(len(one), len(zero))  # the last token is only a target

    def _answered(self, document: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        text = self.prompt.replace(PLACE, document)
        if self.chat:
            text = self._conversations.template.prompt([{"role": "user", "content": text}])
        space = "" if text[-1:].isspace() else " "
        one, zero = (self._encoded(f"{text}{space}{answer}") for answer in "10")
        if len(_common(one, zero)) in (len(one), len(zero)):
            raise UserError(
                "the judge's tokenizer writes the answers 1 and 0 with the same tokens, so it cannot be "
                "asked: name another --judge."
            )
        return one, zero

    def _encoded(self, text: str) -> tuple[int, ...]:
        ids = self.tokenizer.encode_special(text)[0] if self.chat else self.tokenizer.encode(text)
        bos, found = self.tokenizer.bos_id, tuple(map(int, ids))
        return found if self.chat and found[:1] == (bos,) else (bos, *found)

    @functools.cached_property
    def _conversations(self) -> ConversationEncoder:
        return ConversationEncoder(self.tokenizer)


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    both = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return [a for a, _ in both]


def probability_of_one(
    texts: Sequence[str], judge: Placed, asking: Asking, rows: int = 32
) -> np.ndarray:
    """P(1) / (P(1) + P(0)) behind the prompt with each text in it: float64 [N].

    Args:
      texts: of documents.
      judge: the network that is asked, ready to read.
      asking: the prompt.
      rows: answers that a device scores together.
    """
    requests = [request for text in texts for request in asking.requests(text)]
    log_2N = np.zeros(len(requests))
    for number, found in score(judge, requests, rows):
        log_2N[number] = found.log_likelihood
    log_N2 = log_2N.reshape(-1, 2)
    return 1 / (1 + np.exp(log_N2[:, 1] - log_N2[:, 0]))


class Judge:
    """A stored language model that is asked; its weights are read when the first document comes."""

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        longest: int = LONGEST,
        chat: bool = False,
        rows: int = 32,
        dtype: str = "float32",
    ) -> None:
        """Opens it; see `Asking` and `probability_of_one` for the rest.

        Raises:
          UserError: there is no network or no tokenizer, or no chat template for `chat`.
        """
        self._directory, self._opened = directory, open_model(directory)
        self._longest, self._chat, self._rows, self._dtype = longest, chat, rows, dtype
        if chat:
            ConversationEncoder(self._opened.needed_tokenizer)

    @functools.cached_property
    def _network(self) -> Placed:
        loaded = load_model(self._directory)
        return to_read(loaded.params, loaded.model, self._dtype, local_mesh())

    def asked(self, prompt: str) -> Measure:
        """The probability of 1 behind a prompt.

        Raises:
          UserError: the prompt does not fit.
        """
        tokenizer = self._opened.needed_tokenizer
        context = self._opened.model.max_length
        asking = Asking(prompt, tokenizer, context, self._longest, self._chat)
        identity = {
            **self._opened.identity,
            "tokenizer": tokenizer.fingerprint,
            "prompt": hashlib.sha256(prompt.encode()).hexdigest(),
            "document_tokens": self._longest,
            "chat_template": self._chat
            and hashlib.sha256((tokenizer.chat_template or "").encode()).hexdigest(),
            "dtype": self._dtype,
        }

        return Measure(
            identity,
            lambda texts: probability_of_one(texts, self._network, asking, self._rows),
        )


# Quality.


def quality(name: str) -> Measure:
    """The classifier that --quality names: `package.module:name`, or a Hugging Face folder.

    Raises:
      UserError: there is none of either kind, or what it needs is not installed.
    """
    if is_import_path(name):
        return of_callable(name, "quality", 1)
    return classifier(name)


def classifier(folder: str) -> Measure:
    """A sequence classifier of transformers with one output, such as FineWeb-Edu's.

    A document is its first 512 tokens, the score the output as it is. It runs where torch does: on a
    GPU if torch has one.

    Raises:
      UserError: torch is missing, or the folder holds no such classifier; later, weights are missing.
    """
    path = Path(folder).expanduser()
    try:
        raw: Any = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"--quality={folder} is neither an import path, package.module:name, nor a folder with the "
            "config.json of a Hugging Face classifier."
        ) from None
    architectures = raw.get("architectures") or ["none that it names"]
    if not architectures[0].endswith("ForSequenceClassification"):
        raise UserError(
            f"--quality={folder} holds no classifier of sequences but {architectures[0]}."
        )
    if any(importlib.util.find_spec(package) is None for package in ("torch", "transformers")):
        raise UserError(
            f"--quality={folder} needs torch and transformers: pip install 'mobilellm-jax[torch]', or "
            "name a function of your own, package.module:name."
        )
    return Measure({"directory": str(path), **_classifier_labels(path)}, _classifying(path))


def _classifier_labels(path: Path) -> dict[str, Any]:
    import transformers

    config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
    if config.num_labels != 1:
        raise UserError(
            f"--quality={path} has {config.num_labels} outputs, and a score is one: name a function of "
            "your own that makes one of them, package.module:name."
        )
    return {"architecture": config.architectures[0], "tokens": CLASSIFIED}


def _classifying(path: Path) -> Callable[[Sequence[str]], np.ndarray]:
    @functools.cache
    def opened() -> tuple[Any, Any]:
        import torch
        import transformers

        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, local_files_only=True, output_loading_info=True
        )
        if info["missing_keys"]:
            raise UserError(f"--quality={path} lacks weights: {min(info['missing_keys'])}, ...")
        return tokenizer, model.float().eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def of(texts: Sequence[str]) -> np.ndarray:
        import torch

        tokenizer, model = opened()
        scores_N = np.zeros(len(texts))
        order = sorted(range(len(texts)), key=lambda n: -len(texts[n]))
        for at in range(0, len(order), TOGETHER):
            numbers = order[at : at + TOGETHER]
            inputs = tokenizer(
                [texts[n] for n in numbers],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=CLASSIFIED,
            ).to(model.device)
            with torch.inference_mode():
                scores_N[numbers] = model(**inputs).logits[:, 0].double().cpu().numpy()
        if not np.isfinite(scores_N).all():
            raise UserError(f"--quality={path} gives scores that are no numbers.")
        return scores_N

    return of
