"""Small networks, random weights, what the network computes with them, and what transformers computes."""

import contextlib
import dataclasses
import functools
import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mobilellm_jax.interop.layout import entries
from mobilellm_jax.leaves import flat, nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, RopeScaling, Stack

V = tiny.VOCAB
SMALL = ModelConfig(V, 48, (Stack(3, 4, 2, 80),), head_dim=12, max_length=64)
LLAMA3 = RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_length=32)

ROPE3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
DENSE = {
    "intermediate_size": 33,  # of experts, which there are not
    "intermediate_size_mlp": 80,
    "head_dim": 12,
    "moe_layers": [],
    "attention_chunk_size": 64,
}


def changed(**changes):
    return dataclasses.replace(SMALL, **changes)


NETWORKS = {
    "plain": SMALL,
    "untied": changed(tied=False, stacks=(Stack(2, 4, 4, 48),)),
    "shared twice": changed(width=36, stacks=(Stack(3, 9, 3, 64, 2),), head_dim=4),
    "there and back, then twice over": changed(
        stacks=(Stack(2, 4, 2, 80, 2, "reverse"), Stack(2, 4, 2, 80, 2, "repeat_all"))
    ),
    "wide heads, another theta and epsilon": changed(
        width=24, stacks=(Stack(2, 6, 2, 40),), head_dim=16, rope_theta=500_000.0, norm_eps=1e-3
    ),
    "Llama 3.1's RoPE": changed(rope_theta=500.0, rope_scaling=LLAMA3),
    "biases": changed(qkv_bias=True, tied=False, head_dim=16),
    "biases of what goes out": changed(out_bias=True),
    "all biases": changed(qkv_bias=True, out_bias=True, tied=False, stacks=(Stack(2, 4, 2, 80),)),
    "unit QK-norm": changed(qk_norm="unit", norm_eps=1e-2),
    "scaled QK-norm": changed(qk_norm="scaled", tied=False),
}
LLAMA4 = {
    "all RoPE": changed(qk_norm="unit", norm_eps=1e-2),
    "no QK-norm": changed(tied=False),
    "NoPE between": changed(
        qk_norm="unit",
        stacks=(Stack(1, 4, 2, 80), Stack(1, 4, 2, 80, rope=False), Stack(1, 4, 2, 80)),
    ),
    "NoPE, shared": changed(
        qk_norm="unit",
        stacks=(Stack(2, 4, 2, 80), Stack(1, 4, 2, 80, 2, rope=False)),
    ),
}

SHAPE = {  # of SMALL, in the keys of transformers
    "vocab_size": V,
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 80,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "pad_token_id": None,
}


@functools.cache
def leaf_shapes(model):
    """(path, shape) of every leaf, in the order of paths."""
    return [(path, leaf.shape) for path, leaf in sorted(flat(transformer.shapes(model)).items())]


def random_leaves(model, dtype="float32", std=0.2, seed=0):
    """Weights so large that a misplaced one shows, and norm scales apart from 1."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        scale = path.endswith("scale")
        values = rng.uniform(0.5, 1.5, shape) if scale else rng.normal(0, std, shape)
        return values.astype(np.dtype(dtype))

    return {path: leaf(path, shape) for path, shape in leaf_shapes(model)}


def random_tokens(model, rows=2, length=None, seed=1):
    size = rows, length or model.max_length
    return np.random.default_rng(seed).integers(model.vocab_size, size=size)


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradients(model, params, tokens_BT):
    def loss(params):
        logits_BTV = transformer.logits(params, model, transformer.apply(params, model, tokens_BT))
        log_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        return -jnp.take_along_axis(log_BTV, tokens_BT[:, 1:, None], -1).mean(), logits_BTV

    (_, logits_BTV), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    return logits_BTV, gradients


@functools.partial(jax.jit, static_argnums=1)
def logits(params, model, tokens_BT):
    """Of whole rows, in one program for each network."""
    return transformer.logits(params, model, transformer.apply(params, model, tokens_BT))


def greedy(params, model, row, count):
    """The tokens that are likeliest, one after the other, behind a row of them."""
    row = list(row)
    for _ in range(count):
        found = np.asarray(logits(params, model, np.array([row])))
        row.append(int(found[0, -1].argmax()))
    return row[-count:]


def ours(model, leaves, tokens_BT):
    """Logits, and the loss's gradients by path."""
    params = nested({path: jnp.asarray(leaf[:], jnp.float32) for path, leaf in leaves.items()})
    logits_BTV, gradients = _loss_and_gradients(model, params, tokens_BT)
    return np.asarray(logits_BTV), {path: np.asarray(g) for path, g in flat(gradients).items()}


def theirs(torch_model, model, family, tokens_BT):
    """The same by a model of transformers, its gradients put into our leaves.

    A block that is applied several times has there as many copies: their gradients are added.
    """
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its idle threads would spin beside JAX's
    tokens = torch.tensor(tokens_BT)
    torch_model.zero_grad()
    output = torch_model.eval()(tokens, labels=tokens)
    output.loss.backward()
    found = {name: p.grad.numpy() for name, p in torch_model.named_parameters()}
    shapes = flat(transformer.shapes(model))
    gradients = {path: np.zeros(shape.shape, np.float32) for path, shape in shapes.items()}
    for entry in entries(model, family):
        if entry.path is not None:
            at = ... if entry.layer is None else entry.layer
            gradients[entry.path][at] += entry.read(found[entry.name])
    return output.logits.detach().numpy(), gradients


def logits_of_torch(torch_model, tokens_BT):
    """Of a model of transformers, without gradients."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)  # its idle threads would spin beside JAX's
    with torch.no_grad():
        return torch_model.eval()(torch.tensor(tokens_BT)).logits.numpy()


def assert_equal(ours, theirs):
    """Logits within 1e-4, gradients within 1e-3 of their norm, and both large enough to tell."""
    (logits, gradients), (their_logits, their_gradients) = ours, theirs
    assert their_logits.std() > 0.3
    assert np.abs(logits - their_logits).max() <= 1e-4
    assert set(gradients) == set(their_gradients)
    for path, theirs_ in their_gradients.items():
        norm = np.linalg.norm(theirs_)
        assert norm > 1e-4, path
        assert np.linalg.norm(gradients[path] - theirs_) <= 1e-3 * norm, path


def load_stock(folder, **options):
    """The model that transformers makes of a folder, every weight found and none left over."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


def stock(family, **config):
    """A model of transformers with random weights."""
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    names = {
        "llama": "Llama",
        "mistral": "Mistral",
        "qwen2": "Qwen2",
        "qwen3": "Qwen3",
        "llama4_text": "Llama4",
    }
    text = "Text" if family == "llama4_text" else ""
    made = getattr(transformers, f"{names[family]}{text}Config")(**config)
    model = getattr(transformers, f"{names[family]}ForCausalLM")(made)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "norm" in name:
                p.uniform_(0.5, 1.5, generator=generator)
            else:
                p.normal_(0, 0.2, generator=generator)
    return model


def edit(folder, **changes):
    """Changes keys of a folder's config.json; None removes one."""
    path = folder / "config.json"
    raw = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))
    return folder


def said(function, *arguments, **options):
    """What a function returns, and what it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        result = function(*arguments, **options)
    return result, out.getvalue()
