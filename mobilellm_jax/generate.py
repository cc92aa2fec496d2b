r"""Continues prompts with a checkpoint's network, or talks with it.

    python -m mobilellm_jax.generate --checkpoint=runs/smoke --prompt="def main("
    python -m mobilellm_jax.generate --checkpoint=runs/sft --chat
    python -m mobilellm_jax.generate --checkpoint=runs/smoke --prompts=prompts.txt > texts.jsonl

Text streams out as it is made, and its speed is printed at the end. The same checkpoint, prompt, seed
and settings give the same text. With --prompts every line of a file is a prompt; they are continued
together, and a line of JSON is printed for each. With --chat the checkpoint's chat template makes a
prompt of the conversation; Ctrl-C ends a reply, Ctrl-D the conversation.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from absl import flags

from mobilellm_jax import cli
from mobilellm_jax.data.chat import ConversationEncoder, Message
from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.decoding.decoder import Placed, check_room, row_seeds, stream, to_draw
from mobilellm_jax.decoding.sampling import Sampling
from mobilellm_jax.decoding.text import Text, continued, pieces
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import load_model
from mobilellm_jax.parallel.compiled import keep_compiled
from mobilellm_jax.training.checkpoint import LoadedModel

INTERACTIVE = 4  # tokens drawn before any is shown


def shown(
    decoder: Placed,
    prompt: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    text: Text,
) -> None:
    """Streams one continuation to standard output, its speed to standard error.

    `text` has it all, also where Ctrl-C ends this: then as far as it came.
    """
    began = time.perf_counter()
    first: list[float] = []

    def tokens() -> Iterator[int]:
        drawn = stream(decoder, [prompt], max_new_tokens, sampling, row_seeds(seed, 1), INTERACTIVE)
        for row in drawn:
            first[:] = first or [time.perf_counter()]
            yield int(row[0])

    try:
        for piece in pieces(text, tokens()):
            print(piece, end="", flush=True)
    finally:
        print(flush=True)
        if first:
            reading, drawing = first[0] - began, time.perf_counter() - first[0]
            speed = f" at {(text.tokens - 1) / drawing:,.1f} tokens/s" if text.tokens > 1 else ""
            print(
                f"[{len(prompt):,} tokens read in {reading:.2f} s, {text.tokens:,} drawn{speed}, "
                "compilation included]",
                file=sys.stderr,
            )


def chat(
    decoder: Placed,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    system: str = "",
    ask: Callable[[str], str] = input,
    stop: Sequence[str] = (),
) -> None:
    """Talks until the input ends. The oldest turns are dropped where the context is full.

    Raises:
      UserError: the tokenizer has no chat template, one turn alone exceeds the context, or what is said
        cannot be read.
    """
    encoder = ConversationEncoder(tokenizer)
    messages: Sequence[Message] = [{"role": "system", "content": system}] if system else []
    room = decoder.model.max_length - max_new_tokens
    while True:
        try:
            line = ask("> ")
            line.encode()  # where the locale is C, Python reads what is no text as half surrogate pairs
        except (EOFError, KeyboardInterrupt):
            print()
            return
        except UnicodeError as error:
            raise UserError(f"what was said is not UTF-8 ({error}).") from None
        if not line.strip():
            continue
        messages = [*messages, {"role": "user", "content": line}]
        prompt, messages = encoder.fitting(messages, room)
        text, of_turn = Text(tokenizer, prompt, stop, encoder.special), seed + len(messages)
        with contextlib.suppress(KeyboardInterrupt):
            shown(decoder, prompt, max_new_tokens, sampling, of_turn, text)
        messages = [*messages, {"role": "assistant", "content": text.whole()}]


def batch(
    decoder: Placed,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    ids: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stop: Sequence[str],
    rows: int,
) -> None:
    """Prints a line of JSON for each prompt, in their order, and the speed of all to standard error.

    Raises:
      UserError: a prompt does not fit, before any is continued.
    """
    check_room(decoder, ids, [max_new_tokens] * len(ids))
    began, drawn, seeds = time.perf_counter(), 0, row_seeds(seed, len(prompts))
    for at in range(0, len(prompts), rows):
        part = slice(at, at + rows)
        texts = continued(
            decoder, tokenizer, ids[part], max_new_tokens, sampling, seeds[part], stop
        )
        for prompt, text in zip(prompts[part], texts, strict=True):
            drawn += text.tokens
            print(
                json.dumps({"prompt": prompt, "text": text.whole()}, ensure_ascii=False), flush=True
            )
    seconds = time.perf_counter() - began
    print(
        f"[{drawn:,} tokens drawn at {drawn / seconds:,.1f} tokens/s, compilation included]",
        file=sys.stderr,
    )


def read_prompts(path: str) -> list[str]:
    """The lines of a file, but for empty ones at its end.

    Raises:
      UserError: it cannot be read, or has none.
    """
    text = "".join(text_lines(path)).rstrip("\n")
    if not text:
        raise UserError(f"--prompts={path} is empty: every line is a prompt.")
    return text.split("\n")


def ids_of(loaded: LoadedModel, prompt: str) -> list[int]:
    """A prompt's ids, BOS before them where texts begin with one, and at least that."""
    ids = loaded.tokenizer.encode(prompt)
    return [loaded.tokenizer.bos_id, *ids] if loaded.begins_with_bos or not ids else ids


def main() -> None:
    """See the module."""
    keep_compiled()
    args = flags.FLAGS
    sampling = Sampling(args.temperature, args.top_k, args.top_p)
    asked = [name for name in ("prompt", "prompts", "chat") if getattr(args, name)]
    if len(asked) > 1:
        raise UserError(f"--{' and --'.join(asked)} exclude each other: give one of them.")
    if args.system and not args.chat:
        raise UserError("--system is the first message of --chat: give both, or neither.")
    prompts = read_prompts(args.prompts) if args.prompts else []
    loaded = load_model(args.checkpoint)
    tokenizer = loaded.tokenizer
    decoder = to_draw(loaded.params, loaded.model, args.dtype)
    if args.chat:
        chat(
            decoder,
            tokenizer,
            args.max_new_tokens,
            sampling,
            args.seed,
            args.system,
            stop=args.stop,
        )
        return
    if prompts:
        batch(
            decoder,
            tokenizer,
            prompts,
            [ids_of(loaded, prompt) for prompt in prompts],
            args.max_new_tokens,
            sampling,
            args.seed,
            args.stop,
            args.rows,
        )
        return
    prompt = ids_of(loaded, args.prompt)
    text = Text(tokenizer, prompt, args.stop)
    check_room(decoder, [prompt], [args.max_new_tokens])
    print(args.prompt, end="", flush=True)
    shown(decoder, prompt, args.max_new_tokens, sampling, args.seed, text)


if __name__ == "__main__":
    flags.DEFINE_string(
        "checkpoint", None, "A workdir, a checkpoint or a Hugging Face folder.", required=True
    )
    flags.DEFINE_string("prompt", "", "Text to continue; empty: a document from its beginning.")
    flags.DEFINE_string("prompts", "", "A file with a prompt in every line.")
    flags.DEFINE_bool("chat", False, "Talk with the network.")
    flags.DEFINE_string("system", "", "System message of --chat.")
    flags.DEFINE_multi_string("stop", [], "Text that ends a continuation; may be given again.")
    flags.DEFINE_integer("max_new_tokens", 128, "Most tokens to draw.", lower_bound=1)
    flags.DEFINE_float("temperature", 0.8, "0 takes the most likely token every time.")
    flags.DEFINE_integer("top_k", 0, "Keep the k most likely tokens; 0 keeps all.")
    flags.DEFINE_float("top_p", 0.95, "Keep the fewest tokens that hold this share; 1 keeps all.")
    flags.DEFINE_integer("seed", 0, "Seed of the draws.", lower_bound=0)
    flags.DEFINE_integer("rows", 16, "Prompts of --prompts that are continued together.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
    cli.run(main)
