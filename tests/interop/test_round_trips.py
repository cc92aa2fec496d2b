"""What goes out and comes back is the same to the bit; what was changed on the way is told."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny
from weights import LLAMA4, NETWORKS, SHAPE, SMALL, V, changed, edit, random_leaves, said, stock

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import huggingface
from mobilellm_jax.interop.hf_folder import open_folder
from mobilellm_jax.interop.layout import default_family
from mobilellm_jax.interop.stored import open_model, write_checkpoint
from mobilellm_jax.model.config import Stack

SHARED, UNIT = NETWORKS["there and back, then twice over"], NETWORKS["unit QK-norm"]
BIASES = NETWORKS["biases of what goes out"]
PRUNED = changed(
    mlp="relu",
    ls_kv="first_pass",
    qkv_bias=True,
    out_bias=True,
    qk_norm="scaled",
    tied=False,
    stacks=(Stack(2, 4, 2, 80, 2), Stack(1, 2, 1, 48), Stack(1, 4, 2, 80, rope=False)),
)
CASES = [(model, default_family(model)) for model in NETWORKS.values()]
CASES += [(model, "llama4_text") for model in LLAMA4.values()]
CASES += [(model, "hf_shared") for model in (SMALL, SHARED, UNIT, PRUNED)]
ALL_DTYPES = ["float32", "bfloat16", "float16"]


def out_and_in(model, leaves, out, family=None):
    huggingface.export(leaves, model, tiny.tokenizer(), out, family)
    return said(open_folder, out)


def assert_same(leaves, others):
    assert set(leaves) == set(others)
    for path, leaf in leaves.items():
        assert leaf.dtype == others[path].dtype and leaf.shape == others[path].shape
        assert leaf[:].tobytes() == others[path][:].tobytes(), path


@pytest.mark.parametrize("model, family", CASES)
def test_ours_there_and_back_and_there_again(model, family, tmp_path):
    """The network, its weights and the second folder's files."""
    for dtype in ALL_DTYPES if model is SMALL else ["bfloat16"]:
        leaves = random_leaves(model, dtype)
        first, second = tmp_path / dtype, tmp_path / "again" / dtype
        folder, printed = out_and_in(model, leaves, first, family)
        assert (folder.model, folder.family, printed) == (model, family, "")
        assert_same(leaves, folder.leaves)
        out_and_in(folder.model, folder.leaves, second, family)
        names = [path.name for path in first.iterdir()]
        assert len(names) >= 8 and {path.name for path in second.iterdir()} == set(names)
        for name in names:
            if (first / name).is_file():
                assert (first / name).read_bytes() == (second / name).read_bytes(), name


# Where their file says something else that means the same.
EQUIVALENT = {
    "llama4_text": {
        *("layer_types", "attention_chunk_size", "attn_temperature_tuning", "intermediate_size"),
        *("interleave_moe_layer_step", "num_local_experts"),
    }
}
OURS = {"mobilellm_jax", "_name_or_path", "bos_token_id", "eos_token_id", "head_dim"}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "llama4_text"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_theirs_here_and_back(family, dtype, tmp_path):
    """Through a checkpoint of ours: tensors to the bit, and the values of config.json."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = {**SHAPE, "tie_word_embeddings": family != "qwen3", "rms_norm_eps": 1e-4}
    config |= {"initializer_range": 0.01, "max_position_embeddings": 48}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 123_456.0}
    if family == "llama4_text":
        config |= {"moe_layers": [], "no_rope_layers": [1, 0, 1], "intermediate_size_mlp": 80}
    if family in ("llama4_text", "qwen3"):
        config["head_dim"] = 16
    stock(family, **config).to(getattr(torch, dtype)).save_pretrained(tmp_path / "in")
    tiny.tokenizer().write(tmp_path / "in")
    write_checkpoint(open_model(tmp_path / "in"), tmp_path / "ours")
    back = open_model(tmp_path / "ours")
    assert back.dtype == dtype
    huggingface.export(back.leaves, back.model, back.tokenizer, tmp_path / "out", family)
    there = safetensors.numpy.load_file(tmp_path / "in/model.safetensors")
    here = safetensors.numpy.load_file(tmp_path / "out/model.safetensors")
    assert set(there) == set(here)
    for name, tensor in there.items():
        assert tensor.dtype == here[name].dtype and tensor.tobytes() == here[name].tobytes()
    configs = [
        transformers.AutoConfig.from_pretrained(tmp_path / p).to_dict() for p in ("in", "out")
    ]
    keys = set(configs[0]) | set(configs[1])
    differing = {key for key in keys if configs[0].get(key) != configs[1].get(key)}
    assert differing <= OURS | EQUIVALENT.get(family, set())
    assert len(keys) > 30


@pytest.mark.parametrize(
    "model, plain",
    [
        (SHARED, changed(stacks=(Stack(8, 4, 2, 80),))),
        (UNIT, changed(qk_norm="scaled", norm_eps=1e-2)),
        (BIASES, changed(out_bias=True, qkv_bias=True)),
    ],
)
class TestFolding:
    """What a network does without, through architectures that have it: copies, ones and zeros."""

    def test_without_metadata_it_is_the_plain_network(self, model, plain, tmp_path):
        leaves = random_leaves(model)
        out_and_in(model, leaves, tmp_path / "out")
        edit(tmp_path / "out", mobilellm_jax=None)
        folder, printed = said(open_folder, tmp_path / "out")
        assert (folder.model, printed) == (plain, "")
        up = folder.leaves["stack_0/mlp/up"]
        if model is SHARED:
            for depth, (i, layer) in enumerate(
                [(0, 0), (0, 1), (0, 1), (0, 0), (1, 0), (1, 1), (1, 0), (1, 1)]
            ):
                np.testing.assert_array_equal(up[depth], leaves[f"stack_{i}/mlp/up"][layer])
        elif model is UNIT:
            assert (folder.leaves["stack_0/attention/key_norm/scale"][:] == 1).all()
        else:
            assert (folder.leaves["stack_0/attention/key_bias"][:] == 0).all()

    @pytest.mark.parametrize(
        "changes, word",
        [
            ({"rms_norm_eps": 0.5}, "model.norm_eps is"),
            (
                {"rope_theta": 77.0, "rope_parameters": None},
                "model.rope_theta is 10000.0 there and 77",
            ),
            ({"max_position_embeddings": 99}, "model.max_length is 64 there and 99"),
            ({"mobilellm_jax": {"format": 2}}, "format"),
            ({"mobilellm_jax": "text"}, "format"),
            ({"mobilellm_jax": {"format": 1, "model": {}}}, "model description"),
            ({"mobilellm_jax": {"format": 1, "model": PRUNED.to_dict()}}, "cannot express"),
        ],
    )
    def test_a_changed_key_is_told(self, model, plain, changes, word, tmp_path):
        out_and_in(model, random_leaves(model), tmp_path / "out")
        edit(tmp_path / "out", **changes)
        folder, printed = said(open_folder, tmp_path / "out")
        assert printed.count("\n") == 1 and word in printed and "not by its metadata" in printed
        assert folder.model.stacks == plain.stacks and folder.model.qk_norm == plain.qk_norm

    def test_a_changed_weight_is_told(self, model, plain, tmp_path):
        leaves = random_leaves(model, "bfloat16")
        out_and_in(model, leaves, tmp_path / "out")
        path = tmp_path / "out/model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        doubled = {
            SHARED: "model.layers.6.mlp.up_proj.weight",
            UNIT: "model.layers.2.self_attn.k_norm.weight",
            BIASES: "model.layers.2.self_attn.k_proj.bias",
        }
        name = doubled[model]
        tensors[name].view(np.uint16).reshape(-1)[-1] ^= 1  # the last bit of the last value
        safetensors.numpy.save_file(tensors, path)
        folder, printed = said(open_folder, tmp_path / "out")
        assert folder.model == plain
        assert printed.count("\n") == 1 and f"{name} is no" in printed
        other = said(open_folder, tmp_path / "out")[0].leaves
        assert_same(folder.leaves, other)


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"vocab_size": V + 1}, f"vocab_size={V + 1}, but {V} by the description"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False, but True"),
        ({"num_hidden_layers": 2}, "num_hidden_layers=2, but 8"),
        ({"mobilellm_jax": None}, "has no key mobilellm_jax"),
        ({"mobilellm_jax": {"format": 2}}, "format"),
    ],
)
def test_a_folder_described_in_our_words_must_agree_with_itself(changes, word, tmp_path):
    out_and_in(SHARED, random_leaves(SHARED), tmp_path / "out", "hf_shared")
    edit(tmp_path / "out", **changes)
    with pytest.raises(UserError, match=word):
        open_folder(tmp_path / "out")


def test_its_usual_keys_tell_tools_what_they_look_for(tmp_path):
    out_and_in(SHARED, random_leaves(SHARED), tmp_path / "out", "hf_shared")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "mobilellm_jax"
    assert config["num_hidden_layers"] == SHARED.depth == 8
    for file in config["auto_map"].values():
        assert (tmp_path / "out" / f"{file.split('.')[0]}.py").exists()
