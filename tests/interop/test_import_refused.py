"""What cannot be computed as transformers would is refused, by name: keys of config.json, and weights."""

import json

import numpy as np
import pytest
from weights import (
    DENSE,
    ROPE3,
    SHAPE,
    SMALL,
    V,
    edit,
    random_leaves,
)

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import hf_config, huggingface, safetensors_files
from mobilellm_jax.interop.hf_folder import open_folder

# --- What is refused: keys of config.json


def raw(family, **changes):
    """A config.json without anything unusual."""
    found = {
        **SHAPE,
        "model_type": family,
        "architectures": list(hf_config.ARCHITECTURES[family]),
        "head_dim": 12,
        "rope_theta": 10_000.0,
        "transformers_version": "4.51.0",
        "torch_dtype": "bfloat16",
        "_name_or_path": "somewhere/else",
        "use_cache": True,
    }
    if family == "llama4_text":
        found |= {**DENSE, "no_rope_layers": [1, 1, 1]}
    return {**found, **changes}


def read(family, **changes):
    return hf_config.read(raw(family, **changes), "config.json")[0]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "llama4_text"])
@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_act": "gelu"},
        {"quantization_config": {"quant_method": "gptq"}},
        {"partial_rotary_factor": 0.5},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}},
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.25}},
        {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 2]}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},  # and rope_theta another
        {"rope_scaling": ROPE3, "rope_parameters": ROPE3 | {"factor": 4.0}},
        {"rope_scaling": ROPE3 | {"factor": "a lot"}},
        {"rope_scaling": {k: v for k, v in ROPE3.items() if k != "low_freq_factor"}},
        {"logit_scale": 0.5},
        {"embedding_multiplier": 12.0},
        {"final_logit_softcapping": 30.0},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"auto_map": {"AutoModelForCausalLM": "theirs.Model"}},
        {"layer_types": ["sliding_attention"] * 3},
        {"mlp_bias": True},
        {"hidden_size": None},
        {"hidden_size": "48"},
        {"vocab_size": 0},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 10**12},
        {"head_dim": 10**12},
        {"vocab_size": 10**12},
        {"tie_word_embeddings": "false"},
        {"attention_bias": "no"},
        {"rms_norm_eps": "small"},
        {"num_key_value_heads": 3},
    ],
    ids=str,
)
def test_a_key_that_changes_the_computation_is_refused_by_name(family, changes):
    read(family)
    with pytest.raises(UserError) as error:
        read(family, **changes)
    names = {"num_key_value_heads": "kv_heads"}
    said = str(error.value)
    inner = [key for value in changes.values() if isinstance(value, dict) for key in value]
    inner += ["low_freq_factor"]
    assert any(names.get(key, key) in said for key in [*changes, *inner])
    assert said.count(". ") == 0 and said.endswith(".")


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_scaling": "linear"},
        {"rope_parameters": [1]},
        {"layer_types": 5},
        {"moe_layers": "all"},
        {"no_rope_layers": 1},
        {"no_rope_layers": "all"},
        {"use_qk_norm": "false"},
        {"attention_chunk_size": "long"},
        {"architectures": 5},
    ],
    ids=str,
)
def test_a_value_of_the_wrong_kind_is_refused_as_well(changes):
    with pytest.raises(UserError, match=r"^config.json.*\.$"):
        read("llama4_text", **changes)


def test_a_network_of_millions_of_layers_is_refused_before_its_layers_are_listed():
    with pytest.raises(UserError, match="10,000,000 blocks deep, and may be 10,000"):
        read("llama", num_hidden_layers=10**7)


@pytest.mark.parametrize(
    "family, changes, word",
    [
        ("qwen2", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ("qwen3", {"use_sliding_window": True, "sliding_window": 8}, "use_sliding_window"),
        ("llama", {"sliding_window": 8}, "sliding_window"),
        ("mistral", {"sliding_window": 8}, "sliding_window"),
        ("qwen2", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("llama4_text", {"attention_bias": True}, "attention_bias"),
        ("qwen3", {"head_dim": None}, "head_dim"),  # it means 128 there
        ("llama4_text", {"head_dim": None}, "head_dim"),
        ("llama4_text", {"intermediate_size_mlp": None}, "intermediate_size_mlp"),
        ("llama4_text", {"moe_layers": [1]}, "moe_layers"),
        ("llama4_text", {"moe_layers": None}, "moe_layers"),  # it means all
        ("llama4_text", {"moe_layers": None, "interleave_moe_layer_step": 3}, "moe_layers"),
        ("llama4_text", {"no_rope_layers": [1, 1]}, "no_rope_layers"),
        ("llama4_text", {"attention_chunk_size": 63}, "attention_chunk_size"),
        ("llama4_text", {"layer_types": ["something"] * 3}, "layer_types"),
        (
            "llama4_text",
            {"no_rope_layers": [1, 0, 1], "floor_scale": 64},
            "attn_temperature_tuning",
        ),
    ],
)
def test_so_is_one_of_a_single_family(family, changes, word):
    with pytest.raises(UserError, match=word):
        read(family, **changes)


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {"pretraining_tp": 2, "attention_dropout": 0.1, "id2label": {"0": "x"}}),
        ("llama", {"rope_scaling": {"rope_type": "default"}, "rope_interleaved": False}),
        ("llama", {"num_key_value_heads": 2, "head_dim": None, "rope_theta": None}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1}),
        ("qwen2", {"layer_types": ["full_attention"] * 3, "use_mrope": False}),
        ("llama4_text", {"moe_layers": None, "interleave_moe_layer_step": 0}),
        ("llama4_text", {"moe_layers": None, "interleave_moe_layer_step": 4}),
        ("llama4_text", {"moe_layers": [3, 7], "router_aux_loss_coef": 0.1}),
        ("llama4_text", {"layer_types": ["full_attention"] * 3, "attention_chunk_size": 8}),
        ("llama4_text", {"attn_temperature_tuning": True, "floor_scale": 8}),
    ],
)
def test_keys_that_change_nothing_change_nothing(family, changes):
    keep = {"rope_theta": 500_000.0} if family == "llama4_text" else {}
    assert read(family, **keep, **changes) == read(family, **keep)


@pytest.mark.parametrize(
    "changes, ropes",
    [
        ({"no_rope_layers": [1, 0, 0, 1, 1, 0]}, [1, 0, 0, 1, 1, 0]),
        ({"no_rope_layers": []}, [1, 1, 1, 0, 1, 1]),
        ({"no_rope_layers": None}, [1, 1, 1, 0, 1, 1]),
        ({"no_rope_layers": None, "no_rope_layer_interval": 2}, [1, 0, 1, 0, 1, 0]),
    ],
)
def test_which_layers_of_llama_4_have_positions(changes, ropes):
    """As transformers derives it."""
    transformers = pytest.importorskip("transformers")
    found = raw("llama4_text", num_hidden_layers=6, attn_temperature_tuning=False, **changes)
    model, _ = hf_config.read(found, "config.json")
    assert [int(s.rope) for s in model.stacks for _ in range(s.layers)] == ropes
    assert transformers.Llama4TextConfig(**found).no_rope_layers == ropes


def test_defaults_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    for family, name in [("llama", "Llama"), ("qwen2", "Qwen2"), ("qwen3", "Qwen3")]:
        short = raw(family, rope_theta=None, rms_norm_eps=None, tie_word_embeddings=None)
        short = {key: value for key, value in short.items() if value is not None}
        config = getattr(transformers, f"{name}Config")(**short)
        model, _ = hf_config.read(short, "config.json")
        assert model.rope_theta == config.rope_parameters["rope_theta"]
        assert model.norm_eps == config.rms_norm_eps
        assert model.tied == config.tie_word_embeddings
        assert model.init_std == config.initializer_range
    short = raw("llama4_text", rope_theta=None, rms_norm_eps=None)
    short = {key: value for key, value in short.items() if value is not None}
    config = transformers.Llama4TextConfig(**short)
    model, _ = hf_config.read(short, "config.json")
    assert model.rope_theta == config.rope_parameters["rope_theta"] == 500_000
    assert model.norm_eps == config.rms_norm_eps == 1e-5


@pytest.mark.parametrize("model_type", ["gpt2", "gemma2", "llama4", "hf_shared", None])
def test_an_unknown_architecture_is_refused(model_type):
    found = raw("llama") | {"model_type": model_type}
    with pytest.raises(UserError, match="is an architecture that this program does not know"):
        hf_config.read(found, "config.json")


# --- What is refused: weights


@pytest.fixture
def folder(tmp_path):
    """A folder of four shards and its tensors, which a test can change and write again."""
    leaves = random_leaves(SMALL)
    out = tmp_path / "in"
    out.mkdir()
    (out / "config.json").write_text(json.dumps(hf_config.write(SMALL, "llama")))
    tensors = {name: t[:] for name, t in huggingface.tensors(leaves, SMALL, "llama").items()}
    safetensors_files.write_files(out, tensors, 80_000)
    return out, tensors


def rewritten(folder, **changes):
    out, tensors = folder
    for path in out.glob("*.safetensors*"):
        path.unlink()
    tensors = {name: t for name, t in {**tensors, **changes}.items() if t is not None}
    safetensors_files.write_files(out, tensors)
    return out


UP = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_shard_is_named(folder):
    out, _ = folder
    gone = sorted(out.glob("model-*"))[1]
    gone.unlink()
    with pytest.raises(UserError, match=f"names the file {gone.name}, which is not there"):
        open_folder(out)


def test_a_cut_off_shard_is_named(folder):
    out, _ = folder
    cut = sorted(out.glob("model-*"))[2]
    cut.write_bytes(cut.read_bytes()[:-1])
    with pytest.raises(UserError, match=f"{cut.name} is cut off: its tensor model"):
        open_folder(out)


@pytest.mark.parametrize(
    "content, said",
    [
        ("{}", "is not an index"),
        ("nonsense", "is not an index"),
        ('{"weight_map": 5}', "is not an index"),
        ('{"weight_map": {"a": 1}}', "is not an index"),
        ('{"weight_map": {"a": ".."}}', r"names the file \.\., which is not there"),
        pytest.param("[" * 90_000, "is not an index", id="deep"),
        ('{"weight_map": {"a": "../in/config.json"}}', r"names the file \.\./in/config.json"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(content, said, folder):
    out, _ = folder
    (out / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=said):
        open_folder(out)


def test_an_index_that_names_another_file_is_refused(folder):
    out, _ = folder
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    places = index["weight_map"]
    places[UP] = next(file for file in places.values() if file != places[UP])
    path.write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"says that {UP} is in .*, but it is not"):
        open_folder(out)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({UP: None}, f"the tensor {UP} is missing"),
        ({"model.embed_tokens.weight": None}, "embed_tokens.weight is missing"),
        ({UP: np.ones((80, 47), np.float32)}, rf"{UP} has the shape \[80, 47\], and \[80, 48\] by"),
        ({UP: np.ones((80, 48), np.int8)}, f"{UP} is stored as int8"),
        ({UP: np.ones((80, 48), np.float64)}, f"{UP} is stored as float64"),
        ({"model.layers.3.extra": np.ones(3, np.float32)}, "model.layers.3.extra has no place"),
        ({"model.layers.0.self_attn.q_proj.bias": np.ones(48, np.float32)}, "q_proj.bias has no"),
        ({"lm_head.weight": np.ones((V, 48), np.float32)}, "tied, but its lm_head.weight differs"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(changes, said, folder):
    with pytest.raises(UserError, match=said):
        open_folder(rewritten(folder, **changes))


def test_tensors_that_say_nothing_are_accepted(folder):
    _, tensors = folder
    plain = {path: leaf[:] for path, leaf in open_folder(folder[0]).leaves.items()}
    more = {
        "lm_head.weight": tensors["model.embed_tokens.weight"],
        "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(6, np.float32),
    }
    found = open_folder(rewritten(folder, **more))
    assert found.model == SMALL and set(found.leaves) == set(plain)
    for path, leaf in plain.items():
        np.testing.assert_array_equal(found.leaves[path][:], leaf)


def test_an_untied_network_without_its_head_is_refused(folder):
    with pytest.raises(UserError, match="the tensor lm_head.weight is missing"):
        open_folder(edit(folder[0], tie_word_embeddings=False))


def test_a_folder_without_weights_or_description_is_refused(folder, tmp_path):
    out, _ = folder
    for path in out.glob("*.safetensors*"):
        path.unlink()
    with pytest.raises(UserError, match="has no weights: neither model.safetensors nor"):
        open_folder(out)
    (out / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json is not readable as JSON"):
        open_folder(out)
    with pytest.raises(UserError, match="config.json is not readable as JSON"):
        open_folder(tmp_path)


def test_weights_of_several_dtypes_become_the_widest(folder):
    _, tensors = folder
    narrow = tensors[UP].astype(np.float16)
    found = open_folder(rewritten(folder, **{UP: narrow})).leaves["stack_0/mlp/up"]
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found[1], narrow.T.astype(np.float32))
    np.testing.assert_array_equal(found[:][0], tensors[UP.replace(".1.", ".0.")].T)
