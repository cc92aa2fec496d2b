"""A network exported to Hugging Face computes there what it computes here."""

import dataclasses
import functools
import json
import pathlib
import pydoc_data.topics
import subprocess
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy

from mobilellm_jax.data.tokenizers import Tokenizer, train_tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import huggingface
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, Stack, parameter_count

V = 512

NETWORKS = {
    "plain": ModelConfig(V, 48, (Stack(3, 4, 2, 80),), head_dim=12, max_length=64),
    "untied": ModelConfig(V, 32, (Stack(2, 4, 4, 48),), head_dim=8, tied=False, max_length=64),
    "shared twice": ModelConfig(V, 36, (Stack(3, 9, 3, 64, repeats=2),), head_dim=4, max_length=64),
    "shared three times, two stacks, wide heads, another theta": ModelConfig(
        V,
        24,
        (Stack(1, 6, 2, 40, repeats=3), Stack(2, 6, 2, 40)),
        head_dim=16,
        rope_theta=500_000.0,
        norm_eps=1e-3,
        max_length=64,
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(list(pydoc_data.topics.topics.values())[:10], V)


def random_params(model: ModelConfig) -> transformer.Params:
    """Weights so large that a misplaced one shows, and norm scales apart from 1."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(functools.partial(transformer.init, model), jax.random.key(0))
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            rng.uniform(0.5, 1.5, leaf.shape)
            if "scale" in str(path)
            else rng.normal(0, 0.2, leaf.shape)
        ).astype(np.float32),
        shapes,
    )


@functools.partial(jax.jit, static_argnums=0)
def our_logits(
    model: ModelConfig,
    params: transformer.Params,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None,
) -> jax.Array:
    hidden_BTD = transformer.apply(params, model, tokens_BT, segments_BT)
    return transformer.logits(params, model, hidden_BTD)


def load(directory: pathlib.Path) -> object:
    """The stock model, with every weight found in the file and none left over."""
    transformers = pytest.importorskip("transformers")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True
    )
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not any(info.values()), info
    return model.eval()


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(logits_TV))


def torch_logits(model: object, ids: list[int]) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", NETWORKS)
def test_logits(name: str, tokenizer: Tokenizer, tmp_path: pathlib.Path) -> None:
    model = NETWORKS[name]
    params = random_params(model)
    huggingface.export(params, model, tokenizer, tmp_path / "out")
    loaded = load(tmp_path / "out")
    tokens_BT = np.random.default_rng(1).integers(V, size=(2, model.max_length))
    ours_BTV = np.asarray(our_logits(model, params, tokens_BT, None))
    theirs_BTV = np.stack([torch_logits(loaded, row) for row in tokens_BT.tolist()])
    assert ours_BTV.std() > 0.5
    assert np.abs(ours_BTV - theirs_BTV).max() <= 1e-4
    unshared = tuple(
        dataclasses.replace(s, layers=s.layers * s.repeats, repeats=1) for s in model.stacks
    )
    assert loaded.num_parameters() == parameter_count(dataclasses.replace(model, stacks=unshared))


@pytest.mark.parametrize("name", ["untied", "shared twice"])
def test_packed_documents_have_the_losses_of_each_alone(
    name: str, tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    model = NETWORKS[name]
    params = random_params(model)
    huggingface.export(params, model, tokenizer, tmp_path / "out")
    loaded = load(tmp_path / "out")
    rng = np.random.default_rng(2)
    documents = [[1, *rng.integers(2, V, size=n).tolist(), 2] for n in (5, 1, 20, 13, 9)]
    row_T = np.array([token for document in documents for token in document])
    segments_T = np.cumsum(row_T == 1)
    ours_TV = log_softmax(our_logits(model, params, row_T[None], segments_T[None])[0])
    targets_T = np.flatnonzero(row_T[1:] != 1)
    ours = -ours_TV[targets_T, row_T[targets_T + 1]]
    theirs = []
    for ids in documents:
        alone_TV = log_softmax(torch_logits(loaded, ids))
        theirs += (-alone_TV[np.arange(len(ids) - 1), ids[1:]]).tolist()
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)
    assert np.mean(ours) == pytest.approx(np.mean(theirs), rel=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_weights_are_the_rounded_ones(
    dtype: str, tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    torch = pytest.importorskip("torch")
    model = NETWORKS["untied"]
    params = random_params(model)
    huggingface.export(params, model, tokenizer, tmp_path / "out", dtype)
    loaded = load(tmp_path / "out")
    assert loaded.dtype == getattr(torch, dtype)
    for key, array in huggingface.to_llama_state(params, model).items():
        assert torch.equal(loaded.state_dict()[key], torch.tensor(array).to(loaded.dtype)), key


def test_the_folder_holds_what_runtimes_look_for(
    tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    model = NETWORKS["shared twice"]
    (tmp_path / "out").mkdir()  # empty, so it may be used
    files = huggingface.export(random_params(model), model, tokenizer, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == files
    assert (tmp_path / "out/tokenizer.model").read_bytes() == tokenizer.model_bytes
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["num_hidden_layers"] == 6 and config["head_dim"] == 4
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10_000.0
    assert config["torch_dtype"] == config["dtype"] == "float32"
    assert config["tie_word_embeddings"] is True
    weights = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert "lm_head.weight" not in weights
    for name, array in weights.items():
        if name.startswith("model.layers.0."):
            np.testing.assert_array_equal(array, weights[name.replace("layers.0.", "layers.1.")])


def test_nothing_needs_torch_or_transformers() -> None:
    program = (
        "import sys, mobilellm_jax.convert\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'tensorflow'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("changes", "obstacle"),
    [
        ({"qk_norm": "unit"}, "QK-norm"),
        ({"stacks": (Stack(1, 4, 2, 80), Stack(1, 4, 2, 96))}, "stacks differ"),
        ({"stacks": (Stack(1, 4, 2, 80), Stack(1, 2, 2, 80))}, "stacks differ"),
        ({"block": "mobilellm_jax.model.transformer:Attention"}, "its block is"),
        ({"vocab_size": V + 1}, f"{V} pieces and the model {V + 1}"),
    ],
)
def test_what_llama_cannot_express_is_refused(
    changes: dict[str, object], obstacle: str, tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    model = dataclasses.replace(NETWORKS["plain"], **changes)
    with pytest.raises(UserError, match=obstacle):
        huggingface.export({}, model, tokenizer, tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("value", "dtype"), [(np.nan, "float32"), (1e30, "float16")])
def test_a_weight_that_is_not_finite_is_refused(
    value: float, dtype: str, tokenizer: Tokenizer, tmp_path: pathlib.Path
) -> None:
    model = NETWORKS["plain"]
    params = random_params(model)
    params["stack_0"]["mlp"]["up"][1, 2, 3] = value
    with pytest.raises(UserError, match="model.layers.1.mlp.up_proj.weight"):
        huggingface.export(params, model, tokenizer, tmp_path / "out", dtype)
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(tokenizer: Tokenizer, tmp_path: pathlib.Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    for out in (tmp_path / "folder", tmp_path / "folder/notes.txt"):
        with pytest.raises(UserError, match="not empty"):
            huggingface.export({}, NETWORKS["plain"], tokenizer, out)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "notes.txt"]


def test_an_interrupted_export_leaves_nothing(
    tokenizer: Tokenizer, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> bytes:
        raise KeyboardInterrupt

    model = NETWORKS["plain"]
    monkeypatch.setattr(safetensors.numpy, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        huggingface.export(random_params(model), model, tokenizer, tmp_path / "out")
    assert not any(tmp_path.iterdir())
