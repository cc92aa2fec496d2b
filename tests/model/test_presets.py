"""The published networks have the published numbers of parameters."""

import dataclasses

import jax
import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import hf_config
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.model.presets import COMPARED, PRESETS, preset, shared

SMALL = {
    "vocab_size": 64,
    "width": 32,
    "stacks": [{"layers": 1, "heads": 4, "kv_heads": 2, "mlp_width": 48}],
}

# Norm scales included.
EXACT = {
    "mobilellm-125m": 124_635_456,
    "mobilellm-350m": 345_355_200,
    "mobilellm-600m": 603_188_352,
    "mobilellm-1b": 1_005_461_760,
    "mobilellm-1.5b": 1_511_188_800,
    "mobilellm-ls-125m": 124_635_456,
    "mobilellm-ls-350m": 345_355_200,
    "mobilellm-r1-140m": 140_248_512,
    "mobilellm-r1-360m": 359_431_168,
    "mobilellm-r1-950m": 949_685_760,
    "mobilellm-r1-140m-32k": 140_248_512,
    "mobilellm-r1-360m-32k": 359_431_168,
    "mobilellm-r1-950m-32k": 949_685_760,
}

# As printed, in millions: table 13's columns are 32/32, 32/16, ..., 8/1.
_HEADS = [(h, h >> i) for h in (32, 16, 8) for i in range(h.bit_length()) if h >> i]
PRINTED = {
    "mobilellm-125m": 124.6,
    "mobilellm-350m": 345.3,
    "mobilellm-600m": 603.1,
    **{f"depth-{shape}": size for shape, size in (
        *(("4x1280", 163.2), ("6x1024", 142.6), ("8x896", 138.1), ("12x768", 134.1)),
        *(("18x640", 132.4), ("24x576", 132.4), ("30x512", 135.0), ("42x448", 134.6)),
        *(("62x384", 134.3), ("5x2048", 388.0), ("10x1536", 381.4), ("12x1408", 379.9)),
        *(("15x1280", 386.7), ("19x1152", 376.3), ("24x1024", 373.8), ("28x960", 371.1)),
        *(("32x896", 380.3), ("46x768", 374.7), ("66x640", 376.2)),
    )},
    **{f"roadmap-125m-{step}": size for step, size in (
        *(("relu", 134.1), ("swiglu", 134.1), ("deep", 135.0), ("tied", 118.6)),
        *(("gqa", 124.6), ("ls", 124.6)),
    )},
    **{f"roadmap-350m-{step}": size for step, size in (
        *(("relu", 376.8), ("swiglu", 386.7), ("deep", 380.3), ("tied", 351.6)),
        *(("gqa", 345.3), ("ls", 345.3)),
    )},
    **{f"heads-8x896-{h}-{kv}": size for (h, kv), size in zip(_HEADS, (
        *(138.1, 131.7, 128.5, 126.8, 126.0, 125.6),
        *(138.1, 131.7, 128.5, 126.8, 126.0),
        *(138.1, 131.7, 128.5, 126.8),
    ), strict=True)},
    **{f"heads-15x1280-{h}-{kv}": size for (h, kv), size in zip(_HEADS, (
        *(386.7, 362.1, 349.8, 343.7, 340.6, 339.0),
        *(386.7, 362.1, 349.8, 343.7, 340.6),
        *(386.7, 362.1, 349.8, 343.7),
    ), strict=True)},
    **{f"shared-{base}-{order}-{repeats}": size
       for base, size in (("8x896", 138.1), ("15x1280", 386.7))
       for order in ("immediate", "repeat_all", "reverse") for repeats in (1, 2, 3, 4)},
}  # fmt: skip


def sizes(config):
    """Number of elements of every array of the network, by path."""
    shapes = jax.eval_shape(lambda: transformer.init(config, jax.random.key(0)))
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    return {jax.tree_util.keystr(path): leaf.size for path, leaf in leaves}


@pytest.mark.parametrize("name", PRESETS)
def test_released_networks_have_the_published_parameter_counts(name):
    assert sum(sizes(preset(name)).values()) == EXACT[name] == parameter_count(preset(name))


def test_every_network_of_the_papers_tables_has_its_published_parameter_count():
    """The tables leave out the norm scales: two of the width in each block, and the last."""
    assert set(COMPARED) < set(PRINTED)
    for name, printed in PRINTED.items():
        config = preset(name)
        norms = config.width * (2 * sum(stack.layers for stack in config.stacks) + 1)
        assert round((parameter_count(config) - norms) / 1e6, 1) == printed, name


@pytest.mark.parametrize(
    "name", ["roadmap-125m-relu", "heads-8x896-32-4", "shared-8x896-reverse-3"]
)
def test_the_network_that_is_built_has_that_count(name):
    counted = sizes(preset(name))
    scales = sum(size for path, size in counted.items() if "scale" in path)
    assert round((sum(counted.values()) - scales) / 1e6, 1) == PRINTED[name]


def test_tables_are_complete_and_differ_where_they_should():
    kinds = {kind: [n for n in COMPARED if n.startswith(kind)] for kind in ("depth", "roadmap")}
    kinds |= {kind: [n for n in COMPARED if n.startswith(kind)] for kind in ("heads", "shared")}
    assert {kind: len(names) for kind, names in kinds.items()} == {
        "depth": 19, "roadmap": 12, "heads": 30, "shared": 24,
    }  # fmt: skip
    for kind in ("depth", "roadmap", "heads"):
        assert len({preset(name) for name in kinds[kind]}) == len(kinds[kind])
    for name in kinds["heads"]:
        (stack,) = preset(name).stacks
        assert stack.heads * preset(name).head_dim == preset(name).width
    for name in kinds["shared"]:
        (stack,) = preset(name).stacks
        assert (stack.order, str(stack.repeats)) == tuple(name.split("-")[2:])
        one = dataclasses.replace(stack, repeats=1, order="immediate")
        layers = {"8x896": 8, "15x1280": 15}[name.split("-")[1]]
        assert preset(name).depth == layers * stack.repeats
        base = preset(f"heads-{name.split('-')[1]}-16-16")
        assert dataclasses.replace(preset(name), stacks=(one,)) == base


def test_layer_sharing_and_the_long_context_change_nothing_else():
    for size in ("125m", "350m"):
        plain, ls = preset(f"mobilellm-{size}"), preset(f"mobilellm-ls-{size}")
        assert ls.depth == 2 * plain.depth
        assert shared(plain) == ls and shared(ls, 1) == plain
    for size in ("140m", "360m", "950m"):
        base, long = preset(f"mobilellm-r1-{size}"), preset(f"mobilellm-r1-{size}-32k")
        assert (base.rope_theta, base.max_length) == (1e6, 4096)
        assert long == dataclasses.replace(base, rope_theta=8e6, max_length=32_768)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"stacks": "abc"}, "the model description is not usable"),
        ({"quantization": None}, "the model description is not usable"),
        ({"tied": "false"}, "model.tied='false' must be true or false"),
        ({"stacks": [{**SMALL["stacks"][0], "rope": None}]}, r"stacks\[0\].rope=None must be"),
        ({"stacks": [{**SMALL["stacks"][0], "layers": 10**7}]}, "10,000,000 blocks deep"),
        ({"head_dim": 10**12}, "model.head_dim=1000000000000 must be a whole number from 1 to"),
        ({"norm_eps": 10**30}, "model.norm_eps=.* must be a number from 0 to"),
    ],
)
def test_a_description_of_no_network_is_refused_by_the_key(change, said):
    with pytest.raises(UserError, match=said):
        ModelConfig.from_dict({**SMALL, **change})


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(UserError, match=r"no preset 'x'.*mobilellm-125m.*depth-30x512"):
        preset("x")


def test_the_other_teacher_is_llama_2_7b():
    teacher = preset("llama-2-7b")
    assert parameter_count(teacher) == 6_738_415_616
    assert (teacher.rope_theta, teacher.norm_eps) == (1e4, 1e-5)


def test_the_teacher_is_llama_3_1_8b():
    """Its published size; and what is read from the config.json of its release."""
    teacher = preset("llama-3.1-8b")
    assert parameter_count(teacher) == 8_030_261_248
    released = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128_000,
        "eos_token_id": [128_001, 128_008, 128_009],
        "hidden_act": "silu",
        "hidden_size": 4096,
        "initializer_range": 0.02,
        "intermediate_size": 14_336,
        "max_position_embeddings": 131_072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-5,
        "rope_scaling": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500_000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.42.3",
        "use_cache": True,
        "vocab_size": 128_256,
    }
    assert hf_config.read(released, "config.json") == (teacher, "llama")
