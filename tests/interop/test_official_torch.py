"""The folder for the official MobileLLM code holds the network in the form which that code reads."""

import dataclasses
import functools
import json
import pathlib
import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import official_torch, stored
from mobilellm_jax.leaves import flat, nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, RopeScaling, Stack, parameter_count

torch = pytest.importorskip("torch")

V = tiny.VOCAB
PLAIN = ModelConfig(V, 32, (Stack(3, 4, 2, 48),), head_dim=8, max_length=64)
SHARED = dataclasses.replace(PLAIN, stacks=(Stack(2, 4, 2, 48, 2),))
NETWORKS = {
    "plain": PLAIN,
    "untied": dataclasses.replace(PLAIN, tied=False, rope_theta=500.0, norm_eps=1e-3),
    "shared": SHARED,
    "first pass": dataclasses.replace(SHARED, ls_kv="first_pass"),
}


@functools.cache
def weights(model: ModelConfig) -> dict[str, np.ndarray]:
    """So large that a misplaced one shows; norm scales apart from 1."""
    rng = np.random.default_rng(0)
    shapes = {path: leaf.shape for path, leaf in flat(transformer.shapes(model)).items()}
    draw = {True: lambda s: rng.uniform(0.5, 1.5, s), False: lambda s: rng.normal(0, 0.2, s)}
    return {p: draw["scale" in p](shape).astype(np.float32) for p, shape in shapes.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_reading_it_back_gives_the_same_network(name: str, tmp_path: pathlib.Path) -> None:
    model = NETWORKS[name]
    official_torch.export(weights(model), model, tiny.tokenizer(), tmp_path / "out")
    found = stored.open_model(tmp_path / "out", model.ls_kv)
    assert found.model == model and found.family == "mobilellm"
    assert found.tokenizer.fingerprint == tiny.tokenizer().fingerprint
    assert found.leaves.keys() == weights(model).keys()
    for path, leaf in weights(model).items():
        np.testing.assert_array_equal(found.leaves[path][:], leaf, err_msg=path)


@pytest.mark.parametrize("name", ["plain", "untied", "shared"])
def test_a_llama_with_the_shared_blocks_written_out_computes_the_same(
    name: str, tmp_path: pathlib.Path
) -> None:
    transformers = pytest.importorskip("transformers")
    model = NETWORKS[name]
    official_torch.export(weights(model), model, tiny.tokenizer(), tmp_path / "out")
    raw = json.loads((tmp_path / "out/config.json").read_text())
    times = 2 if raw.pop("layer_sharing") else 1
    state = {}
    for key, value in torch.load(tmp_path / "out/pytorch_model.bin").items():
        if key.startswith("model.layers."):
            _, _, layer, rest = key.split(".", 3)
            for depth in range(int(layer) * times, (int(layer) + 1) * times):
                state[f"model.layers.{depth}.{rest}"] = value
        else:
            state[key] = value
    if raw.pop("share_embedding"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    config = transformers.LlamaConfig(
        **raw | {"num_hidden_layers": raw["num_hidden_layers"] * times}
    )
    llama = transformers.LlamaForCausalLM(config)
    llama.load_state_dict(state, strict=True)
    tokens_BT = np.random.default_rng(1).integers(V, size=(2, 40))

    @jax.jit
    def logits(params: transformer.Params) -> jax.Array:
        return transformer.logits(params, model, transformer.apply(params, model, tokens_BT))

    ours_BTV = np.asarray(logits(nested(weights(model))))
    with torch.no_grad():
        theirs_BTV = llama(torch.tensor(tokens_BT)).logits.numpy()
    assert ours_BTV.std() > 0.5
    np.testing.assert_allclose(theirs_BTV, ours_BTV, rtol=0, atol=1e-4)


def test_the_folder_says_what_the_official_code_asks_for(tmp_path: pathlib.Path) -> None:
    files = official_torch.export(
        weights(SHARED), SHARED, tiny.tokenizer(), tmp_path / "out", "bfloat16"
    )
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    config, generation, tokenizer = (
        json.loads((tmp_path / "out" / name).read_text())
        for name in ("config.json", "generation_config.json", "tokenizer_config.json")
    )
    assert config["model_type"] == "llama" and config["architectures"] == ["LlamaForCausalLM"]
    assert config["share_embedding"] is config["layer_sharing"] is True
    assert config["tie_word_embeddings"] is config["use_cache"] is generation["use_cache"] is False
    assert config["num_hidden_layers"] == 2 and config["torch_dtype"] == "bfloat16"
    assert tokenizer["tokenizer_class"] == "LlamaTokenizer" and tokenizer["legacy"] is True
    assert "tokenizer.model" in files and "tokenizer.json" not in files
    state = torch.load(tmp_path / "out/pytorch_model.bin", weights_only=True)
    assert "lm_head.weight" not in state
    assert sum(tensor.numel() for tensor in state.values()) == parameter_count(SHARED)
    rounded = weights(SHARED)["stack_0/mlp/up"][1].astype(ml_dtypes.bfloat16).astype(np.float32)
    up = state["model.layers.1.mlp.up_proj.weight"]
    assert up.dtype == torch.bfloat16
    np.testing.assert_array_equal(up.float().numpy(), rounded.T)
    size = (tmp_path / "out/pytorch_model.bin").stat().st_size
    assert size < 2 * parameter_count(SHARED) + 1000 * len(state)  # each stores its own part alone


def test_the_cache_is_on_only_where_the_network_reads_it(tmp_path: pathlib.Path) -> None:
    for name, model in NETWORKS.items():
        official_torch.export(weights(model), model, tiny.tokenizer(), tmp_path / name)
        for file in ("config.json", "generation_config.json"):
            config = json.loads((tmp_path / name / file).read_text())
            assert config["use_cache"] is (name == "first pass")


def test_another_kind_of_tokenizer_goes_as_it_came(tmp_path: pathlib.Path) -> None:
    pytest.importorskip("tokenizers")
    import tokenizer_files

    tokenizer = Tokenizer.load(tokenizer_files.llama3_folder(tmp_path / "tokenizer"))
    model = dataclasses.replace(PLAIN, vocab_size=tokenizer.vocab_size)
    official_torch.export(weights(model), model, tokenizer, tmp_path / "out")
    assert Tokenizer.load(tmp_path / "out").fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"stacks": (Stack(1, 4, 2, 48), Stack(2, 4, 2, 48))}, "2 stacks"),
        ({"stacks": (Stack(3, 4, 2, 48, 3),)}, "applied 3 times"),
        ({"stacks": (Stack(3, 4, 2, 48, 2, "reverse"),)}, "order reverse"),
        ({"stacks": (Stack(3, 4, 2, 48, 2, "repeat_all"),)}, "order repeat_all"),
        ({"stacks": (Stack(3, 4, 2, 48, rope=False),)}, "NoPE"),
        ({"rope_scaling": RopeScaling(8.0, 1.0, 4.0, 32)}, "positions are scaled"),
        ({"head_dim": 16}, "4 heads of 16 .* width 32"),
        ({"qk_norm": "unit"}, "QK-norm"),
        ({"qk_norm": "scaled"}, "QK-norm"),
        ({"qkv_bias": True}, "biases"),
        ({"mlp": "relu"}, "relu"),
        ({"block": "mobilellm_jax.model.transformer:Attention"}, "its block is"),
        ({"vocab_size": V - 1}, "pieces"),
    ],
)
def test_what_the_official_code_cannot_compute_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: pathlib.Path
) -> None:
    model = dataclasses.replace(PLAIN, **changes)
    with pytest.raises(UserError, match=reason):
        official_torch.export({}, model, tiny.tokenizer(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_without_torch_a_sentence_says_so(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"install the extra \[torch\]"):
        official_torch.export(weights(PLAIN), PLAIN, tiny.tokenizer(), tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_an_export_that_fails_leaves_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {path: leaf.copy() for path, leaf in weights(PLAIN).items()}
    broken["stack_0/mlp/up"][1, 2, 3] = np.inf
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight is not finite"):
        official_torch.export(broken, PLAIN, tiny.tokenizer(), tmp_path / "out")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        official_torch.export(weights(PLAIN), PLAIN, tiny.tokenizer(), tmp_path / "out")
    assert not any(tmp_path.iterdir())
