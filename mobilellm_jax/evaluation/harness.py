"""A network of ours as a model of lm-evaluation-harness; tasks, prompts and metrics are the harness's."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from jax.sharding import Mesh
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from mobilellm_jax.data.chat import ConversationEncoder
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.decoding.decoder import Placed, to_draw, to_read
from mobilellm_jax.decoding.sampling import GREEDY, Sampling
from mobilellm_jax.decoding.text import continued
from mobilellm_jax.evaluation.scoring import Likelihood, Request, fitted, score
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.parallel.mesh import one_device

# The strings of a request, None for a window of a text, and the ids of context and continuation.
Encoded = tuple[tuple[str, str] | None, list[int], list[int]]

MAX_NEW_TOKENS = 256  # where a task says nothing, as in the harness


class HarnessModel(TemplateLM):
    """Log-likelihoods and continuations for the harness; `counts` says what was cut to fit."""

    def __init__(
        self,
        params: Params,
        model: ModelConfig,
        tokenizer: Tokenizer,
        dtype: str = "float32",
        rows: int = 32,
        seed: int = 0,
        mesh: Mesh | None = None,
        quiet: bool = False,
        bos: bool = True,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        """Nothing is computed yet.

        Args:
          params: as trained.
          model: their network.
          tokenizer: its tokenizer.
          dtype: of activations and of the matrices in products.
          rows: texts that a device scores or continues together.
          seed: of the draws of tasks that sample.
          mesh: devices that share the texts; the first one alone if None.
          quiet: show no bars.
          bos: texts begin with BOS, as in training here.
          between: is called after each batch.
        """
        super().__init__()
        self.chat = False  # whether texts are conversations that a template has written
        self.ids = tokenizer
        self.max_length = model.max_length
        self.counts: Counter[str] = Counter()
        self._params, self._model, self._dtype = params, model, dtype
        self._rows, self._seed, self._mesh = rows, seed, mesh or one_device()
        self._quiet, self._bos, self._between = quiet, bos, between

    @functools.cached_property
    def _writer(self) -> Placed:
        return to_draw(self._params, self._model, self._dtype, self._mesh)

    @functools.cached_property
    def _reader(self) -> Placed:
        return to_read(self._params, self._model, self._dtype, self._mesh)

    @functools.cached_property
    def _conversations(self) -> ConversationEncoder:
        return ConversationEncoder(self.ids)

    @property
    def eot_token_id(self) -> int:
        """What ends a document."""
        return self.ids.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context is conditioned on."""
        return self.ids.bos_id

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells stored requests apart."""
        return self.ids.fingerprint

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Ids of a text, BOS before them unless told otherwise, or unless the text spells it.

        Of a conversation, what the template spells are special tokens. Before other texts of a network
        from elsewhere there is a BOS only where its tokenizer puts one.
        """
        spelt = self.ids.named_tokens.get("bos_token")
        if add_special_tokens is None and (self.chat or (spelt and string.startswith(spelt))):
            ids = self.ids.encode_special(string)[0].tolist()
            return ids if ids[:1] == [self.ids.bos_id] else [self.ids.bos_id, *ids]
        begins = self._bos if add_special_tokens is None else add_special_tokens
        return [*([self.ids.bos_id] if begins else []), *self.ids.encode(string)]

    @property
    def _ends(self) -> Collection[int]:
        """Tokens with which a chat template ends a turn."""
        return self._conversations.special if self.ids.chat_template else ()

    def chat_template(self, _: Any = False) -> str:
        """The template's source, which the harness keeps with the results."""
        return self.ids.chat_template or ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation: with the assistant's header, or, where a task begins the answer, open.

        Raises:
          UserError: there is no template, or it refuses the conversation.
        """
        template = self._conversations.template
        if add_generation_prompt:
            return template.prompt(chat_history)
        return template.opened(chat_history)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-likelihoods of continuations, and whether each is what the network itself would say."""
        found: list[tuple[float, bool]] = super().loglikelihood(
            requests, disable_tqdm or self._quiet
        )
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[Encoded],
        disable_tqdm: bool = False,
        **_: Any,
    ) -> list[tuple[float, bool]]:
        asked = []
        for _strings, context, continuation in requests:
            request = Request(tuple(context), tuple(continuation))
            short = fitted(request, self.max_length)
            self.counts["contexts cut"] += short != request
            asked.append(short)
        found: list[Likelihood | None] = [None] * len(asked)
        hidden = disable_tqdm or self._quiet
        with tqdm(total=len(asked), desc="log-likelihoods", disable=hidden) as bar:

            def told(count: int) -> None:
                bar.update(count)
                self._between()

            for number, likelihood in score(self._reader, asked, self._rows, told):
                found[number] = likelihood
                if strings := requests[number][0]:
                    answer = likelihood.log_likelihood, likelihood.greedy
                    self.cache_hook.add_partial("loglikelihood", strings, answer)
        return [(x.log_likelihood, x.greedy) for x in found if x is not None]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows that overlap by one token."""
        windows: list[Encoded] = []
        owners = []
        for number, instance in enumerate(requests):
            ids = self.tok_encode(instance.args[0])
            for window in get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1):
                context, continuation = make_disjoint_window(window)
                windows.append((None, context, continuation))
                owners.append(number)
        sums = [0.0] * len(requests)
        scored = self._loglikelihood_tokens(windows, disable_tqdm)
        for number, (log_likelihood, _) in zip(owners, scored, strict=True):
            sums[number] += log_likelihood
        for instance, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", instance.args, total)
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continuations up to a task's stop strings, longest prompts first."""
        texts = [""] * len(requests)
        seeds, hidden = request_seeds(self._seed, requests), disable_tqdm or self._quiet
        with tqdm(total=len(requests), desc="continuations", disable=hidden) as bar:
            for numbers, sampling, stop, new_tokens in self._jobs(requests):
                # As the harness does, where it can: what a task asks for leaves a prompt less room.
                wanted = new_tokens if new_tokens < self.max_length else self.max_length // 2
                room = self.max_length - wanted
                encoded = [self.tok_encode(requests[number].args[0]) for number in numbers]
                prompts = [ids[-room:] for ids in encoded]
                self.counts["prompts cut"] += sum(len(ids) > room for ids in encoded)
                # Of each prompt by itself, or an answer would depend on its neighbours.
                limits = [min(new_tokens, self.max_length - len(ids)) for ids in prompts]
                self.counts["answers limited"] += sum(limit < new_tokens for limit in limits)
                own = [seeds[number] for number in numbers]
                found = continued(
                    self._writer,
                    self.ids,
                    prompts,
                    limits,
                    sampling,
                    own,
                    stop,
                    ends=self._ends,
                )
                for number, text in zip(numbers, found, strict=True):
                    texts[number] = text.whole()
                    self.cache_hook.add_partial(
                        "generate_until", requests[number].args, texts[number]
                    )
                bar.update(len(numbers))
                self._between()
        return texts

    def _jobs(
        self, requests: list[Instance]
    ) -> Iterable[tuple[list[int], Sampling, list[str], int]]:
        """Requests of equal settings and about equal lengths, at most `rows` together."""
        groups: dict[str, list[int]] = {}
        for number, instance in enumerate(requests):
            alike = {key: value for key, value in instance.args[1].items() if key != "sample"}
            groups.setdefault(repr(alike), []).append(number)
        for numbers in groups.values():
            sampling, stop, new_tokens = generation(requests[numbers[0]].args[1])
            numbers.sort(key=lambda n: -len(requests[n].args[0]))
            together = self._rows * self._mesh.size
            for at in range(0, len(numbers), together):
                yield numbers[at : at + together], sampling, stop, new_tokens


def generation(asked: dict[str, Any]) -> tuple[Sampling, list[str], int]:
    """How a task wants its text drawn, the strings that end it, and its most tokens."""
    settings: dict[str, Any] = dict(normalize_gen_kwargs(asked, MAX_NEW_TOKENS))
    stop = [s for s in handle_stop_sequences(settings.get("until"), None) if s]
    sampling = GREEDY
    if settings["do_sample"]:
        sampling = Sampling(
            settings.get("temperature") or 1.0,
            settings.get("top_k") or 0,
            settings.get("top_p") or 1.0,
        )
    return sampling, stop, settings["max_gen_toks"]


def request_seeds(seed: int, requests: Sequence[Instance]) -> list[int]:
    """Of each request's draws, 31 bits: they follow from what is asked, and how often it was before.

    So an evaluation that goes on after it was killed draws what it would have drawn.
    """
    before: Counter[str] = Counter()
    seeds = []
    for instance in requests:
        asked = repr(instance.args)
        digest = hashlib.sha256(f"{seed} {before[asked]} {asked}".encode()).digest()
        seeds.append(int.from_bytes(digest[:4], "big") >> 1)
        before[asked] += 1
    return seeds
