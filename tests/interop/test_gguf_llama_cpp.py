"""llama.cpp computes with a GGUF file what we compute."""

import dataclasses
import functools
import pathlib

import jax
import numpy as np
import pytest
import tiny
from gguf_networks import NETWORKS, leaves_of, stored_block, stored_tensors

from mobilellm_jax.interop.gguf import export
from mobilellm_jax.leaves import Leaves, nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.model.presets import preset

pytest.importorskip("gguf")
llama_cpp = pytest.importorskip("llama_cpp")


@functools.partial(jax.jit, static_argnums=0)
def computed(model: ModelConfig, params: transformer.Params, tokens_BT: jax.Array) -> jax.Array:
    return transformer.logits(params, model, transformer.apply(params, model, tokens_BT))


def our_logits(leaves: Leaves, model: ModelConfig, tokens_T: np.ndarray) -> np.ndarray:
    """[T, V]."""
    return np.asarray(computed(model, nested(leaves), tokens_T[None]))[0]


def their_logits(path: pathlib.Path, tokens_T: np.ndarray) -> np.ndarray:
    """llama.cpp's [T, V], its cache of keys and values in float32."""
    settings = {
        "type_k": llama_cpp.GGML_TYPE_F32,
        "type_v": llama_cpp.GGML_TYPE_F32,
        "n_threads": 1,  # several wait for each other in busy loops
        "n_threads_batch": 1,
    }
    loaded = llama_cpp.Llama(
        str(path), n_ctx=len(tokens_T), logits_all=True, verbose=False, **settings
    )
    loaded.eval(tokens_T.tolist())
    return loaded.scores[: len(tokens_T)].copy()


def tokens(model: ModelConfig, length: int = 448) -> np.ndarray:
    return np.random.default_rng(1).integers(model.vocab_size, size=length)


def check_equal(ours_TV: np.ndarray, theirs_TV: np.ndarray, tolerance: float) -> None:
    """Logits within `tolerance` of their spread, and the same choice wherever it is clear."""
    error = np.abs(ours_TV - theirs_TV).max()
    assert error < tolerance * ours_TV.std()
    second, first = np.sort(ours_TV, axis=-1)[:, -2:].T
    clear = first - second > 4 * error
    assert clear.sum() >= 256
    assert (ours_TV.argmax(-1) == theirs_TV.argmax(-1))[clear].all()


@pytest.mark.parametrize("name", NETWORKS)
def test_llama_cpp_computes_the_same(name: str, tmp_path: pathlib.Path) -> None:
    model = NETWORKS[name]
    leaves = leaves_of(model)
    ours_TV = our_logits(leaves, model, tokens(model))
    for quantization, tolerance in (("f32", 1e-3), ("f16", 3e-2)):
        out = tmp_path / f"{quantization}.gguf"
        export(leaves, model, tiny.tokenizer(), out, quantization)
        check_equal(ours_TV, their_logits(out, tokens(model)), tolerance)


@pytest.mark.parametrize(
    ("quantization", "lost"), [("f16", 0.005), ("bf16", 0.03), ("q8_0", 0.1), ("q4_0", 0.6)]
)
def test_llama_cpp_loses_what_the_file_loses(
    quantization: str, lost: float, tmp_path: pathlib.Path
) -> None:
    model = NETWORKS["QK-norm with weights"]
    leaves = leaves_of(model)
    export(leaves, model, tiny.tokenizer(), tmp_path / "out.gguf", quantization)
    theirs_TV = their_logits(tmp_path / "out.gguf", tokens(model))
    ours_TV = our_logits(leaves, model, tokens(model))
    loss = (ours_TV - theirs_TV).std()
    assert 0 < loss < lost * ours_TV.std()
    # With the weights of the file we compute what llama.cpp does, but for its rounded activations.
    stored = stored_tensors(tmp_path / "out.gguf")
    blocks = [stored_block(stored, model, d) for d in range(model.depth)]
    rounded = {f"stack_0/{path}": np.stack([b[path] for b in blocks]) for path in blocks[0]}
    rounded["embedding"] = stored["token_embd.weight"]
    rounded["final_norm/scale"] = stored["output_norm.weight"]
    rounded_TV = our_logits(rounded, model, tokens(model))
    assert (rounded_TV - theirs_TV).std() < 0.8 * loss


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mobilellm-125m", "mobilellm-ls-125m", "mobilellm-r1-140m"])
def test_the_published_sizes(name: str, tmp_path: pathlib.Path) -> None:
    model = preset(name)
    leaves = leaves_of(model, std=model.init_std)
    tokens_T = tokens(model, 1024)
    ours_TV = our_logits(leaves, model, tokens_T)
    (stack,) = model.stacks
    unshared = dataclasses.replace(stack, layers=model.depth, repeats=1)
    count = parameter_count(dataclasses.replace(model, stacks=(unshared,)))
    table = model.vocab_size * model.width
    bits = {"f16": 16 * count, "q8_0": 8.5 * count, "q4_0": 4.5 * count + 4 * table}
    lost = {"f16": 0.005, "q8_0": 0.1, "q4_0": 0.8}
    for quantization in bits:
        out = tmp_path / f"{quantization}.gguf"
        export(leaves, model, tiny.tokenizer(), out, quantization)
        header = out.stat().st_size - bits[quantization] / 8
        assert 0 < header < 5e6  # most of it the names of tokens
        theirs_TV = their_logits(out, tokens_T)
        loss = (ours_TV - theirs_TV).std() / ours_TV.std()
        same = (ours_TV.argmax(-1) == theirs_TV.argmax(-1)).mean()
        print(f"{name} {quantization}: {out.stat().st_size / 1e6:.1f} MB, {loss:.4f}, {same:.3f}")
        assert loss < lost[quantization]
        out.unlink()
        if quantization == "f16":
            check_equal(ours_TV, theirs_TV, 0.1)
