"""vLLM computes with a Hugging Face folder, of floats or of integers, what we compute."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny
import weights
from weights import V, random_leaves, random_tokens

from mobilellm_jax.interop import huggingface
from mobilellm_jax.leaves import nested
from mobilellm_jax.model.config import ModelConfig, Stack

pytest.importorskip("vllm")

SMALL = ModelConfig(V, 128, (Stack(2, 4, 2, 192, repeats=2),), head_dim=32, max_length=128)
NETWORKS = {
    "shared": SMALL,
    "QK-norm": dataclasses.replace(SMALL, qk_norm="unit", norm_eps=1e-2),
    "biases": dataclasses.replace(SMALL, qkv_bias=True, tied=False),
}
# A process of its own: vLLM starts others, and JAX's threads do not survive that.
PROGRAM = """
import sys
import numpy as np
from vllm import LLM, SamplingParams

if __name__ == "__main__":
    folder, asked, answer = sys.argv[1:]
    tokens_BT, V = np.load(asked), {vocab}
    model = LLM(model=folder, dtype="float32", max_model_len=128, enforce_eager=True, max_logprobs=V)
    wanted = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=V)
    rows = [{{"prompt_token_ids": row}} for row in tokens_BT.tolist()]
    found = [row.prompt_logprobs[1:] for row in model.generate(rows, wanted)]
    np.save(answer, [[[at[v].logprob for v in range(V)] for at in row] for row in found])
"""
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


def their_log_probabilities(folder: pathlib.Path, tokens_BT: np.ndarray) -> np.ndarray:
    """[B, T - 1, V], of what follows each token."""
    program, asked, answer = (folder.parent / n for n in ("program.py", "asked.npy", "answer.npy"))
    np.save(asked, tokens_BT)
    program.write_text(PROGRAM.format(vocab=V))
    command = [sys.executable, program, folder, asked, answer]
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    # Not its exit status: on some machines vLLM aborts when everything is done.
    assert answer.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    return np.load(answer)


def our_log_probabilities(model: ModelConfig, leaves, tokens_BT: np.ndarray) -> np.ndarray:
    logits_BTV = weights.logits(nested(leaves), model, tokens_BT)
    return np.asarray(jax.nn.log_softmax(logits_BTV))[:, :-1]


@pytest.mark.parametrize("name", NETWORKS)
def test_floats(name: str, tmp_path: pathlib.Path) -> None:
    model = NETWORKS[name]
    leaves, tokens_BT = random_leaves(model, std=0.05), random_tokens(model, length=64)
    huggingface.export(leaves, model, tiny.tokenizer(), tmp_path / "out")
    theirs = their_log_probabilities(tmp_path / "out", tokens_BT)
    np.testing.assert_allclose(theirs, our_log_probabilities(model, leaves, tokens_BT), atol=1e-4)


@pytest.mark.parametrize(
    "name, parts", [("shared", "blocks"), ("QK-norm", "blocks"), ("biases", "blocks+head")]
)
def test_integers(name: str, parts: str, tmp_path: pathlib.Path) -> None:
    """Where a factor lies between two integers the two round it to one or the other: that is less than
    half of what rounding does at all, of which two ways to round would differ by 1.4 times."""
    pytest.importorskip("qwix")
    exact = NETWORKS[name]
    model = dataclasses.replace(exact, quantization=f"w8a8:{parts}")
    leaves, tokens_BT = random_leaves(model, std=0.05), random_tokens(model, length=64)
    huggingface.export(leaves, model, tiny.tokenizer(), tmp_path / "out")
    theirs = their_log_probabilities(tmp_path / "out", tokens_BT)
    ours, floats = (our_log_probabilities(m, leaves, tokens_BT) for m in (model, exact))
    assert np.abs(theirs - ours).mean() < 0.4 * np.abs(floats - ours).mean()
