"""A model on a server of chat completions as a model of lm-evaluation-harness.

It answers tasks that generate: such a server gives no log-likelihoods.
"""

import json
from collections.abc import Sequence
from typing import NoReturn

from etils import epath
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.answers import server_options
from mobilellm_jax.evaluation.endpoint import Endpoint, Message, completions
from mobilellm_jax.evaluation.harness import generation, request_seeds

_MOST_STOPS = 4  # that OpenAI's own server takes; text is cut after all of them here


class Chat(str):
    """A conversation in JSON, told apart from what a task makes as text."""


class ServedModel(LM):
    """Answers of a model on a server for the harness.

    A conversation whose last message is the assistant's (a task's `gen_prefix`) goes to the server as
    it is: whether the model continues that message is the server's affair.
    """

    def __init__(
        self, endpoint: Endpoint, cache: epath.PathLike | None = None, seed: int = 0
    ) -> None:
        """Nothing is asked yet.

        Args:
          endpoint: the server and the model's name there.
          cache: see `complete_all`.
          seed: from which, and from what is asked, each request has a seed of its own.
        """
        super().__init__()
        self._endpoint, self._cache, self._seed = endpoint, cache, seed

    @property
    def tokenizer_name(self) -> str:
        """By which the harness tells stored requests apart."""
        return "messages"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> Chat:
        """The conversation itself: the server has the template."""
        return Chat(json.dumps(chat_history, ensure_ascii=False))

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers up to a task's stop strings.

        Raises:
          UserError: the server fails; what is answered by then is in the caches.
        """
        settings = [generation(instance.args[1]) for instance in requests]
        options = []
        for (sampling, stop, new_tokens), seed in zip(
            settings, request_seeds(self._seed, requests), strict=True
        ):
            ends = {"stop": stop[:_MOST_STOPS]} if stop else {}
            options.append({**server_options(sampling, new_tokens, seed), **ends})
        conversations = [_messages(instance.args[0]) for instance in requests]
        answers = completions(self._endpoint, conversations, options, cache=self._cache)
        bar = tqdm(
            answers, f"answers of {self._endpoint.model}", len(requests), disable=disable_tqdm
        )
        texts = []
        for instance, (_, stop, _), answer in zip(requests, settings, bar, strict=True):
            texts.append(_cut(answer.text, stop))
            self.cache_hook.add_partial("generate_until", instance.args, texts[-1])
        return texts

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Raises `UserError`: see the module."""
        _refuse(requests)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Raises `UserError`: see the module."""
        _refuse(requests)


def _refuse(requests: Sequence[Instance]) -> NoReturn:
    names = sorted({instance.task_name for instance in requests if instance.task_name})
    raise UserError(
        f"{', '.join(names) or 'the task'}: log-likelihoods are what it is graded by, and a server of "
        "chat completions gives none: take a --checkpoint, or tasks that generate text."
    )


def _messages(context: str | Chat) -> list[Message]:
    """A conversation, or a prompt as what the user says."""
    if isinstance(context, Chat):
        messages: list[Message] = json.loads(context)
        return messages
    return [{"role": "user", "content": context}]


def _cut(text: str, stop: Sequence[str]) -> str:
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
