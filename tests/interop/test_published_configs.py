"""config.json of networks that users bring: each is understood, and has its published parameters."""

import pytest

from mobilellm_jax.interop import hf_config
from mobilellm_jax.model.config import RopeScaling, parameter_count
from mobilellm_jax.model.presets import PRUNED, TEACHERS, preset

COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.0",
    "use_cache": True,
}


def widths(layers, width, heads, kv_heads, mlp_width, vocabulary, context):
    return {
        "num_hidden_layers": layers,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": mlp_width,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
    }


def llama3(factor, **other):
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "mlp_bias": False,
        "pretraining_tp": 1,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
        **other,
    }


def qwen2(window, **other):
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "rms_norm_eps": 1e-6,
        "use_mrope": False,
        "use_sliding_window": False,
        "sliding_window": window,
        "max_window_layers": 21,
        **other,
    }


def smollm(**other):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        **other,
    }


CONFIGS = {
    "Llama-3.2-1B": (
        llama3(32.0, head_dim=64, tie_word_embeddings=True)
        | widths(16, 2048, 32, 8, 8192, 128256, 131072),
        1_235_814_400,
    ),
    "Llama-3.1-8B": (
        llama3(8.0, tie_word_embeddings=False) | widths(32, 4096, 32, 8, 14336, 128256, 131072),
        8_030_261_248,
    ),
    "Qwen2.5-0.5B": (
        qwen2(32768, rope_theta=1000000.0, tie_word_embeddings=True)
        | widths(24, 896, 14, 2, 4864, 151936, 32768),
        494_032_768,
    ),
    "Qwen2.5-1.5B": (
        qwen2(131072, rope_theta=1000000.0, tie_word_embeddings=True)
        | widths(28, 1536, 12, 2, 8960, 151936, 131072),
        1_543_714_304,
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        qwen2(4096, rope_theta=10000, tie_word_embeddings=False)
        | widths(28, 1536, 12, 2, 8960, 151936, 131072),
        1_777_088_000,
    ),
    "SmolLM-135M": (smollm() | widths(30, 576, 9, 3, 1536, 49152, 2048), 134_515_008),
    "SmolLM-360M": (smollm() | widths(32, 960, 15, 5, 2560, 49152, 2048), 361_821_120),
    "SmolLM-1.7B": (smollm() | widths(24, 2048, 32, 32, 8192, 49152, 2048), 1_711_376_384),
    "Qwen3-0.6B": (
        {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "attention_bias": False,
            "head_dim": 128,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-6,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
        }
        | widths(28, 1024, 16, 8, 3072, 151936, 40960),
        596_049_920,
    ),
    "MobileLLM-125M": (
        {
            "architectures": ["MobileLLMForCausalLM"],
            "model_type": "mobilellm",
            "auto_map": {"AutoModelForCausalLM": "modeling_mobilellm.MobileLLMForCausalLM"},
            "attention_bias": False,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "head_dim": 64,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 10000.0,
            "share_embedding": True,
            "layer_sharing": False,
            "tie_word_embeddings": False,
        }
        | widths(30, 576, 9, 3, 1536, 32000, 2048),
        124_635_456,
    ),
    "MobileLLM-R1-140M": (
        {
            "architectures": ["Llama4ForCausalLM"],
            "model_type": "llama4_text",
            "attention_bias": False,
            "attention_chunk_size": 32768,
            "attn_scale": 0.1,
            "attn_temperature_tuning": False,
            "floor_scale": 8192,
            "head_dim": 64,
            "interleave_moe_layer_step": 0,
            "intermediate_size_mlp": 2048,
            "no_rope_layers": [1] * 15,
            "num_experts_per_tok": 0,
            "num_local_experts": 0,
            "rms_norm_eps": 1e-5,
            "rope_scaling": None,
            "rope_theta": 8000000.0,
            "tie_word_embeddings": True,
            "use_qk_norm": True,
        }
        | widths(15, 576, 9, 3, 8192, 128256, 32768),
        140_248_512,
    ),
}


def read(name):
    return hf_config.read(COMMON | CONFIGS[name][0], name)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_it_has_its_published_parameters(name):
    assert parameter_count(read(name)) == CONFIGS[name][1]


def test_what_decides_the_computation_is_read():
    assert read("Llama-3.1-8B").rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert not read("Llama-3.1-8B").tied and read("Llama-3.2-1B").tied
    assert read("Qwen2.5-0.5B").qkv_bias and read("Qwen2.5-0.5B").norm_eps == 1e-6
    assert read("Qwen3-0.6B").qk_norm == "scaled" and read("Qwen3-0.6B").head_dim == 128


@pytest.mark.parametrize(
    ("name", "network"),
    [
        ("MobileLLM-125M", "mobilellm-125m"),
        ("MobileLLM-R1-140M", "mobilellm-r1-140m-32k"),
        *((name, name.lower()) for name in CONFIGS if name.lower() in {**PRUNED, **TEACHERS}),
    ],
)
def test_the_papers_networks_are_the_presets(name, network):
    assert read(name) == preset(network)


def test_every_network_that_the_papers_prune_is_read():
    assert set(PRUNED) < {name.lower() for name in CONFIGS}
