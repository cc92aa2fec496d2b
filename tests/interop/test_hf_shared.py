"""The remote code of an `hf-shared` folder computes what the network computes here."""

import functools
import json
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny

from mobilellm_jax.interop import huggingface, layout
from mobilellm_jax.leaves import flat, nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ORDERS, ModelConfig, RopeScaling, Stack, parameter_count

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

V, T = tiny.VOCAB + 8, 40  # more embeddings than the tokenizer has pieces

NETWORKS = {
    "Qwen, ReLU": ModelConfig(
        V,
        32,
        (Stack(2, 4, 2, 48, 2),),
        head_dim=8,
        tied=False,
        qk_norm="scaled",
        qkv_bias=True,
        out_bias=True,
        mlp="relu",
    ),
    "Llama 4": ModelConfig(
        V,
        32,
        (Stack(2, 4, 2, 40), Stack(2, 6, 1, 48, 2, "repeat_all", rope=False)),
        head_dim=8,
        qk_norm="unit",
        rope_theta=500.0,
        norm_eps=1e-3,
    ),
    "reverse": ModelConfig(V, 32, (Stack(3, 4, 2, 48, 3, "reverse"),), head_dim=8),
    "first pass, Llama 3": ModelConfig(
        V,
        32,
        (Stack(2, 4, 2, 48, 3),),
        head_dim=16,  # together wider than the network
        ls_kv="first_pass",
        rope_theta=100.0,
        rope_scaling=RopeScaling(8.0, 0.5, 4.0, 32),
        norm_eps=1e-2,
    ),
}
REPEATED = {
    f"{order} {repeats}": ModelConfig(V, 32, (Stack(3, 4, 2, 48, repeats, order),), head_dim=8)
    for order in ORDERS
    for repeats in (1, 2, 3, 4)
}


@functools.cache
def weights(model: ModelConfig) -> dict[str, np.ndarray]:
    """So large that a misplaced one shows; norm scales apart from 1."""
    rng = np.random.default_rng(0)
    shapes = {path: leaf.shape for path, leaf in flat(transformer.shapes(model)).items()}
    draw = {True: lambda s: rng.uniform(0.5, 1.5, s), False: lambda s: rng.normal(0, 0.2, s)}
    return {p: draw["scale" in p](shape).astype(np.float32) for p, shape in shapes.items()}


def write(model: ModelConfig, out: pathlib.Path) -> pathlib.Path:
    huggingface.export(weights(model), model, tiny.tokenizer(), out, "hf_shared")
    return out


def load(folder: pathlib.Path, **options: Any) -> Any:
    """The network, with every weight found in the file and none left over."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, output_loading_info=True, **options
    )
    assert not any(info.values()), info
    return model


@pytest.fixture
def loaded(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Any:
    return load(write(NETWORKS[request.param], tmp_path / "out"))


def tokens(rows: int = 2, length: int = T) -> np.ndarray:
    return np.random.default_rng(1).integers(3, V, size=(rows, length))


@pytest.mark.parametrize(
    "name", [*NETWORKS, *(pytest.param(name, marks=pytest.mark.slow) for name in REPEATED)]
)
def test_logits_and_gradients(name: str, tmp_path: pathlib.Path) -> None:
    model = (NETWORKS | REPEATED)[name]
    tokens_BT = tokens()

    def loss(params: transformer.Params) -> tuple[jax.Array, jax.Array]:
        hidden_BTD = transformer.apply(params, model, tokens_BT)
        logits_BTV = transformer.logits(params, model, hidden_BTD)
        log_p_BTV = jax.nn.log_softmax(logits_BTV[:, :-1])
        picked_BT = jnp.take_along_axis(log_p_BTV, tokens_BT[:, 1:, None], axis=-1)
        return -picked_BT.mean(), logits_BTV

    (ours, logits_BTV), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
        nested(weights(model))
    )
    theirs = load(write(model, tmp_path / "out"))
    ids = torch.tensor(tokens_BT)
    out = theirs(ids, labels=ids)
    out.loss.backward()
    assert logits_BTV.std() > 0.5
    np.testing.assert_allclose(out.logits.detach(), logits_BTV, rtol=0, atol=1e-4)
    assert out.loss.item() == pytest.approx(float(ours), abs=1e-5)
    parameters = dict(theirs.named_parameters())
    ours_by_path = flat(jax.tree.map(np.asarray, gradients))
    entries = layout.entries(model, "hf_shared")
    assert {entry.name for entry in entries} == set(parameters)
    for entry in entries:
        ours_g, theirs_g = entry.take(ours_by_path), parameters[entry.name].grad.numpy()
        difference = np.linalg.norm(ours_g - theirs_g) / np.linalg.norm(ours_g)
        assert np.isfinite(difference) and difference <= 1e-3, (entry.name, difference)
    assert theirs.num_parameters() == parameter_count(model)


@pytest.mark.parametrize("loaded", ["reverse"], indirect=True)
def test_blocks_are_applied_in_the_same_order(loaded: Any) -> None:
    applications = sys.modules[type(loaded).__module__].applications
    for model in REPEATED.values():
        ours = [(0, layer) for layer in model.stacks[0].applications]
        assert applications(model.to_dict()) == ours


@pytest.mark.parametrize("loaded", ["reverse", "first pass, Llama 3", "Llama 4"], indirect=True)
def test_generation_is_the_same_with_every_cache_and_padding(loaded: Any) -> None:
    prompts = [torch.tensor(row[n:]) for row, n in zip(tokens(3, 12), (0, 5, 11), strict=True)]

    def generate(prompts: list[Any], **options: Any) -> tuple[Any, Any]:
        ids = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_side="left")
        mask = [[0] * (ids.shape[1] - len(row)) + [1] * len(row) for row in prompts]
        out = loaded.generate(
            ids,
            attention_mask=torch.tensor(mask),
            max_new_tokens=8,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, dim=1)

    ids, logits = generate(prompts)
    assert ids.shape == (3, 8) and len(set(map(tuple, ids.tolist()))) == 3
    alone = [generate([row]) for row in prompts]
    others = [
        tuple(map(torch.cat, zip(*alone, strict=True))),
        generate(prompts, use_cache=False),
        generate(prompts, cache_implementation="static"),
    ]
    for other_ids, other_logits in others:
        assert torch.equal(ids, other_ids)
        torch.testing.assert_close(logits, other_logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loaded", ["first pass, Llama 3"], indirect=True)
def test_a_static_cache_is_read_only_where_it_is_written(loaded: Any) -> None:
    ids = torch.tensor(tokens())
    cache = transformers.StaticCache(config=loaded.config, max_cache_len=64)
    with torch.no_grad():
        parts = [loaded(part, past_key_values=cache).logits for part in ids.split((7, 32, 1), 1)]
        whole = loaded(ids).logits
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-4)


@pytest.mark.parametrize("loaded", ["Llama 4"], indirect=True)
def test_logits_and_loss_count_what_is_asked_for(loaded: Any) -> None:
    ids = torch.tensor(tokens())
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[0, 30:] = 0
    labels[0, 30:] = labels[1, :5] = -100
    with torch.no_grad():
        out = loaded(ids, attention_mask=mask, labels=labels, output_hidden_states=True)
        alone = loaded(ids[:1, :30]).logits
        last = loaded(ids, attention_mask=mask, logits_to_keep=3).logits
        total = loaded(ids, attention_mask=mask, labels=labels, num_items_in_batch=10).loss
        embeddings = loaded.get_input_embeddings()(ids)
        embedded = loaded(inputs_embeds=embeddings, attention_mask=mask, return_dict=False)
    torch.testing.assert_close(out.logits[:1, :30], alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(out.logits[:, -3:], last)
    torch.testing.assert_close(out.logits, embedded[0])
    assert not loaded(ids[:, :0]).logits.numel() and out.logits.isfinite().all()
    counted = labels[:, 1:] != -100
    log_p = out.logits[:, :-1].log_softmax(-1)
    losses = -log_p.gather(-1, ids[:, 1:, None])[..., 0][counted]
    torch.testing.assert_close(out.loss, losses.mean())
    torch.testing.assert_close(total, losses.sum() / 10)
    states = out.hidden_states
    assert len(states) == loaded.config.num_hidden_layers + 1
    torch.testing.assert_close(loaded.lm_head(states[-1]), out.logits)


@pytest.mark.parametrize("name", ["Qwen, ReLU", "first pass, Llama 3"])
def test_saving_and_loading_again_changes_nothing(name: str, tmp_path: pathlib.Path) -> None:
    model = NETWORKS[name]
    first = load(write(model, tmp_path / "first"))
    first.save_pretrained(tmp_path / "second")
    second = load(tmp_path / "second")
    assert second.state_dict().keys() == first.state_dict().keys()
    for key, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key
    ids = torch.tensor(tokens())
    assert torch.equal(first(ids).logits, second(ids).logits)
    stored, saved = (
        safetensors.numpy.load_file(tmp_path / folder / "model.safetensors")
        for folder in ("first", "second")
    )
    assert sum(array.size for array in saved.values()) == parameter_count(model)
    assert {k: v.tobytes() for k, v in stored.items()} == {k: v.tobytes() for k, v in saved.items()}
    for path in (tmp_path / "first").glob("*.py"):
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()
    config = json.loads((tmp_path / "second/config.json").read_text())
    assert ModelConfig.from_dict(config["mobilellm_jax"]["model"]) == model
    assert config["num_hidden_layers"] == model.depth and config["vocab_size"] == V


@pytest.mark.parametrize("loaded", ["first pass, Llama 3", "reverse"], indirect=True)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(loaded: Any, reentrant: bool) -> None:
    ids = torch.tensor(tokens())
    loaded.train()
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            loaded.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loaded.zero_grad()
        loaded(ids, labels=ids).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in loaded.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_new_tokens_can_be_added(tmp_path: pathlib.Path) -> None:
    first = load(write(NETWORKS["reverse"], tmp_path / "first"))
    first.resize_token_embeddings(V + 8)
    first.save_pretrained(tmp_path / "second")
    second = load(tmp_path / "second")
    ids = torch.tensor([[1, V + 7, 5]])
    assert second(ids).logits.shape == (1, 3, V + 8)
    assert torch.equal(first(ids).logits, second(ids).logits)
    config = json.loads((tmp_path / "second/config.json").read_text())
    model = ModelConfig.from_dict(config["mobilellm_jax"]["model"])
    assert model.vocab_size == V + 8 and second.num_parameters() == parameter_count(model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_lose_their_own_precision_only(dtype: Any, tmp_path: pathlib.Path) -> None:
    folder = write(NETWORKS["Llama 4"], tmp_path / "out")
    wide, narrow = load(folder), load(folder, dtype=dtype)
    assert {p.dtype for p in narrow.parameters()} == {narrow.dtype} == {dtype}
    ids = torch.tensor(tokens())
    with torch.no_grad():
        exact, rounded = wide(ids).logits, narrow(ids).logits
    assert rounded.dtype == dtype
    error = (rounded.float() - exact).square().mean().sqrt() / exact.std()
    assert error < 16 * torch.finfo(dtype).eps
    norm = narrow.model.norm  # the squares of this would overflow in float16
    torch.testing.assert_close(norm(torch.full_like(norm.weight, 1000)), norm.weight)
