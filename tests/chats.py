"""Chat templates as models publish them, each beside its text written by hand, and conversations."""

import functools
import json
import random

import numpy as np

from mobilellm_jax.data.chat_corpus import ChatCorpus
from mobilellm_jax.data.corpora import documents
from mobilellm_jax.data.packing import segment_ids
from mobilellm_jax.prepare import prepare

LLAMA3 = """{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {{- message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
CHATML = """{% for message in messages %}
{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' }}
{% endfor %}
{% if add_generation_prompt %}
{{ '<|im_start|>assistant\n' }}
{%- endif %}"""
TAGGED = """{%- for message in messages %}
{%- if message.role == 'assistant' %}
{{- '<|im_start|>assistant\n' }}
{%- generation %}
{{- message.content + '<|im_end|>' }}
{%- endgeneration %}
{{- '\n' }}
{%- else %}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endif %}
{%- endfor %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}
{%- if message['role'] == 'system' %}{% continue %}{% endif %}
{%- if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
{%- else %}{{ raise_exception('only user and assistant roles are supported') }}{% endif %}
{%- endfor %}"""
# BOS before every question, as Llama 2 has it; and EOS where BOS is the same token.
LLAMA2 = """{% for message in messages %}{% if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + message['content'] + ' [/INST]' }}
{%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + ' ' + eos_token }}
{%- endif %}{% endfor %}"""
PLAIN = """{% for message in messages %}
{{- message.role + ': ' + message.content + (eos_token if message.role == 'assistant' else '') + '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"""
# Calls as JSON in the assistant's turn, and what they give in a turn of its own.
CALLS = """{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '<call>' + call.function | tojson }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

Parts = list[tuple[str, bool]]  # pieces of text, and whether they are trained on


def llama3(messages: list[dict[str, str]]) -> Parts:
    parts: Parts = [("<|begin_of_text|>", False)]
    for m in messages:
        parts.append((f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n", False))
        parts.append((m["content"].strip() + "<|eot_id|>", m["role"] == "assistant"))
    return parts


def chatml(messages: list[dict[str, str]]) -> Parts:
    parts: Parts = []
    for m in messages:
        parts.append((f"<|im_start|>{m['role']}\n", False))
        parts.append((m["content"] + "<|im_end|>", m["role"] == "assistant"))
        parts.append(("\n", False))
    return parts


def mistral(messages: list[dict[str, str]], bos: str, eos: str) -> Parts:
    parts: Parts = [(bos, False)]
    for m in messages:
        if m["role"] == "user":
            parts.append((f"[INST] {m['content']} [/INST]", False))
        elif m["role"] == "assistant":
            parts.append((f" {m['content']}{eos}", True))
    return parts


def llama2(messages: list[dict[str, str]], bos: str, eos: str) -> Parts:
    parts: Parts = []
    for m in messages:
        if m["role"] == "user":
            parts.append((f"{bos}[INST] {m['content']} [/INST]", False))
        elif m["role"] == "assistant":
            parts.append((f" {m['content']} {eos}", True))
    return parts


def plain(messages: list[dict[str, str]], eos: str) -> Parts:
    parts: Parts = []
    for m in messages:
        answer = m["role"] == "assistant"
        parts.append((f"{m['role']}: ", False))
        parts += [(m["content"] + eos, True), ("\n", False)] if answer else []
        parts += [] if answer else [(m["content"] + "\n", False)]
    return parts


def conversation(seed: int, turns: int = 3, longest: int = 12) -> list[dict[str, str]]:
    """A system message or none, then questions and answers, some of them empty, some odd."""
    rng = random.Random(seed)
    words = "the model  reads\n\n small 1234 rows, naïve 中文 👍👍 don't I'LL {x} </s ".split(" ")
    words += ["\n", " ", "\n\n\n", "\t", "a"]

    def said() -> str:
        return " ".join(rng.choices(words, k=rng.randrange(longest)))

    messages = [{"role": "system", "content": said()}] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, turns)):
        messages.append({"role": "user", "content": f"{said()}?{seed}"})
        messages.append({"role": "assistant", "content": said()})
    return messages


def write_chats(path, seeds, key="messages", **options):
    lines = [
        json.dumps({key: conversation(seed, **options), "id": f"chat-{seed}"}) for seed in seeds
    ]
    path.write_text("".join(line + "\n" for line in lines))


def run(corpora, out, tokenizer, **options):
    return prepare(
        corpora, out, **{"row_length": 256, "workers": 1, "tokenizer": tokenizer, **options}
    )


def conversations(rows, bos_id):
    """The conversations in stored rows, marked, sorted."""
    found = []
    for row in rows.read(np.arange(len(rows))):
        segments = segment_ids(row, bos_id)
        found += [row[segments == s].tolist() for s in range(1, segments[-1] + 1)]
    return sorted(c for c in found if len(c) > 1)


def corpus_of(tmp_path, *records, **options):
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return ChatCorpus("talk", f"{tmp_path}/talk.jsonl", heldout=0, **options)


def read(corpus):
    return [json.loads(document.text) for document in documents(corpus)]


LLAMA3_ENDS = {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>"}
END = "<|endoftext|>"  # the Qwen tokenizer's BOS and EOS
STYLES = {  # template, what it writes by hand, tokenizer
    "llama3": (LLAMA3, llama3, "llama3"),
    "chatml": (CHATML, chatml, "qwen2"),
    "chatml, tagged": (TAGGED, chatml, "qwen2"),
    "mistral": (MISTRAL, functools.partial(mistral, **LLAMA3_ENDS), "llama3"),
    "llama2, BOS inside": (LLAMA2, functools.partial(llama2, **LLAMA3_ENDS), "llama3"),
    "plain, EOS is BOS": (PLAIN, functools.partial(plain, eos=END), "qwen2"),
}
SEEDS = range(40)
