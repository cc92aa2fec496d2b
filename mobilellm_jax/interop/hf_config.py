"""config.json of Hugging Face folders, written for a network and read as one.

What changes the computation is read, or must have the one value that is computed here; what changes
nothing is listed in `_INERT`. Any other key is refused by its name, so that no network is ever
taken for another.
"""

import itertools
from collections.abc import Mapping
from typing import Any

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import compressed_tensors
from mobilellm_jax.model.config import LARGEST, ModelConfig, RopeScaling, Stack

METADATA = "mobilellm_jax"  # the key under which config.json describes the network in our own words
FORMAT = 1

ARCHITECTURES = {
    "llama": ("LlamaForCausalLM",),
    "mistral": ("MistralForCausalLM",),
    "qwen2": ("Qwen2ForCausalLM",),
    "qwen3": ("Qwen3ForCausalLM",),
    "llama4_text": ("Llama4ForCausalLM",),
    "mobilellm": ("MobileLLMForCausalLM", "LlamaForCausalLM"),
    "hf_shared": ("MobileLLMJaxForCausalLM",),
}
MODEL_TYPES = {"hf_shared": "mobilellm_jax"}  # otherwise that of the family is its name
AUTO_MAP = {
    "AutoConfig": "configuration_mobilellm_jax.MobileLLMJaxConfig",
    "AutoModelForCausalLM": "modeling_mobilellm_jax.MobileLLMJaxForCausalLM",
}

# Biases of a network (qkv_bias, out_bias) as attention_bias and mlp_bias; where two networks have the same
# keys, the first is read. Of a qwen2 the biases go without saying.
_BIASES = {
    "llama": {
        (False, False): (False, False),
        (True, False): (True, False),
        (True, True): (True, True),
        (False, True): (True, True),
    },
    "qwen2": {(True, False): (False, False)},
}
_NO_BIASES = {(False, False): (False, False)}

# What a missing key means to transformers.
_DEFAULT_EPS = {"llama4_text": 1e-5}  # otherwise 1e-6
_DEFAULT_THETA = {"llama4_text": 500_000.0}  # otherwise 10,000

# Keys that change nothing in what a network computes from tokens.
_INERT = frozenset(
    "transformers_version dtype torch_dtype use_cache tokenizer_class model_max_length "
    "bos_token_id eos_token_id pad_token_id attention_dropout pretraining_tp cache_implementation "
    "return_dict output_attentions output_hidden_states chunk_size_feed_forward id2label label2id "
    "is_encoder_decoder problem_type is_llama_config transformers.js_config unsloth_fixed "
    "unsloth_version temperature top_k top_p do_sample max_length min_length num_beams "
    "repetition_penalty length_penalty".split()
)


def metadata(model: ModelConfig) -> dict[str, Any]:
    """The network as config.json describes it in our own words, under the key `METADATA`."""
    return {"format": FORMAT, "model": model.to_dict()}


def write(model: ModelConfig, family: str) -> dict[str, Any]:
    """The part of config.json that describes a network.

    Args:
      model: a network that the family can express.
      family: see `layout.FAMILIES`.

    Raises:
      UserError: transformers would not accept the numbers.
    """
    stack = model.stacks[0]
    if family == "llama" and model.width % stack.heads:
        raise UserError(
            f"transformers wants the width of a llama to be a multiple of its heads, and "
            f"{model.width} is none of {stack.heads}: mistral and hf-shared have no such rule."
        )
    rope: dict[str, Any] = {"rope_type": "default"}
    if scaling := model.rope_scaling:
        rope = {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_length,
        }
    config = {
        "architectures": [ARCHITECTURES[family][0]],
        "model_type": MODEL_TYPES.get(family, family),
        "vocab_size": model.vocab_size,
        "hidden_size": model.width,
        "num_hidden_layers": model.depth,
        "num_attention_heads": stack.heads,
        "num_key_value_heads": stack.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.max_length,
        "tie_word_embeddings": model.tied,
        "initializer_range": model.init_std,
        "use_cache": True,
        **compressed_tensors.described(model.quantization),
    }
    if family == "hf_shared":  # the metadata say the rest
        return config | {"auto_map": AUTO_MAP}
    config |= {
        "intermediate_size": stack.mlp_width,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "attention_dropout": 0.0,
        # transformers 5 reads the new key, transformers 4 and other runtimes only the old ones.
        "rope_theta": model.rope_theta,
        "rope_parameters": rope | {"rope_theta": model.rope_theta},
    }
    if model.rope_scaling:
        config["rope_scaling"] = rope
    match family:
        case "llama":
            attention, mlp = _BIASES[family][model.qkv_bias, model.out_bias]
            config |= {"attention_bias": attention, "mlp_bias": mlp}
        case "mistral":
            config |= {"sliding_window": None}
        case "qwen2":
            config |= {"use_sliding_window": False}
        case "qwen3":
            config |= {"attention_bias": False, "use_sliding_window": False}
        case "llama4_text":
            config |= _write_llama4(model)
    return config


def _write_llama4(model: ModelConfig) -> dict[str, Any]:
    return {
        "intermediate_size_mlp": model.stacks[0].mlp_width,
        "attention_bias": False,
        "use_qk_norm": model.qk_norm == "unit",
        # Despite the name, 1 is a layer with rotary positions.
        "no_rope_layers": [int(stack.rope) for stack in model.stacks for _ in stack.applications],
        "layer_types": ["full_attention"] * model.depth,
        "attention_chunk_size": model.max_length,  # transformers wants a number, though none reads it
        "attn_temperature_tuning": False,
        "moe_layers": [],
        "interleave_moe_layer_step": 0,
        "num_local_experts": 0,
    }


class _Keys:
    """The keys of a config.json, taken one by one; what is left at the end is not understood."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self._left = dict(raw)
        self.where = where

    def pop(self, key: str, default: Any = None) -> Any:
        """A key's value, the default where it is missing or null."""
        value = self._left.pop(key, None)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive whole number, which must be there if there is no default."""
        value = self.pop(key, default)
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not (whole and 1 <= value <= LARGEST):
            raise UserError(
                f"{self.where}: {key} is {value!r}, and must be a whole number from 1 to {LARGEST:,}."
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number, which must be there if there is no default."""
        value = self.pop(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise UserError(f"{self.where}: {key} is {value!r}, and must be a number.")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; a text is neither, whatever it says."""
        value = self.pop(key, default)
        if value not in (True, False):
            raise UserError(f"{self.where}: {key} is {value!r}, and must be true or false.")
        return bool(value)

    def lacks(self, key: str) -> bool:
        """Whether a key is not there; null is."""
        return key not in self._left

    def must_be(self, key: str, *accepted: Any) -> None:
        """Refuses a value that would change the computation; the first is what missing means."""
        value = self.pop(key, accepted[0])
        if value not in accepted:
            raise self.refused(key, value)

    def refused(self, key: str, value: Any, prefix: str = "") -> UserError:
        """The error for a value that cannot be computed here."""
        return UserError(
            f"{self.where}: {prefix}{key}={value!r} describes a computation that this program does "
            "not have: the network cannot be read."
        )

    def ignore(self, *keys: str) -> None:
        """Drops keys that mean nothing, given what else has been read."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Raises `UserError` for what is left, unless it says nothing."""
        for key, value in self._left.items():
            if value and key not in _INERT and not key.startswith("_"):
                raise UserError(
                    f"{self.where}: the key {key}={value!r} is not known to this program and may "
                    "change what the network computes: remove it if it does not."
                )


def read(raw: Mapping[str, Any], where: str, ls_kv: str = "fresh") -> tuple[ModelConfig, str]:
    """The network that a config.json describes by its usual keys, and its family.

    For the family hf_shared the metadata are the description.

    Args:
      raw: the file's content.
      where: the file, for messages.
      ls_kv: what a shared block of an official MobileLLM reads in its second pass, which its files
        do not say (see `ModelConfig.ls_kv`).

    Raises:
      UserError: the architecture is not known, or a key says something that is not computed here.
    """
    try:
        keys = _Keys(raw, where)
        family = _family(keys, raw)
        if family == "hf_shared":
            return _read_shared(raw, where), family
        keys.ignore(METADATA)
        if family != "mobilellm":
            keys.must_be("auto_map", {})
        model = _read_model(keys, family, ls_kv)
        keys.finish()
        return model, family
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where} has a value of the wrong kind ({error}).") from None


def described(raw: Mapping[str, Any], where: str) -> ModelConfig | None:
    """The network that the metadata of a config.json describe; None where there are none.

    Raises:
      UserError: they are damaged, or of a later format.
    """
    if METADATA not in raw:
        return None
    found = raw[METADATA]
    if not isinstance(found, Mapping) or found.get("format") != FORMAT:
        raise UserError(
            f"{where}: the key {METADATA} has a format that this program cannot read; it reads "
            f"format {FORMAT}."
        )
    return ModelConfig.from_dict(found.get("model", {}))


def _family(keys: _Keys, raw: Mapping[str, Any]) -> str:
    model_type = keys.pop("model_type", "")
    families = {MODEL_TYPES.get(family, family): family for family in ARCHITECTURES}
    if model_type not in families:
        raise UserError(
            f"{keys.where}: model_type={model_type!r} is an architecture that this program does "
            f"not know: it reads {', '.join(sorted(families))}."
        )
    family = families[model_type]
    if family == "llama" and ("share_embedding" in raw or "layer_sharing" in raw):
        family = "mobilellm"
    for name in keys.pop("architectures", []):
        if name not in ARCHITECTURES[family]:
            raise keys.refused("architectures", name)
    return family


def _read_shared(raw: Mapping[str, Any], where: str) -> ModelConfig:
    model = described(raw, where)
    if model is None:
        raise UserError(f"{where} has no key {METADATA}, which describes the network.")
    for key, value in write(model, "hf_shared").items():
        if key not in ("architectures", "auto_map", "use_cache") and raw.get(key, value) != value:
            raise UserError(
                f"{where}: {key}={raw[key]!r}, but {value!r} by the description under {METADATA}: "
                "make them agree."
            )
    return model


def _read_model(keys: _Keys, family: str, ls_kv: str) -> ModelConfig:
    layers, width = keys.count("num_hidden_layers"), keys.count("hidden_size")
    heads = keys.count("num_attention_heads")
    # Where a key is missing, some families derive it and others have a constant of their own.
    kv_heads = keys.count(
        "num_key_value_heads", heads if family in ("llama", "mobilellm") else None
    )
    derived = family in ("llama", "mobilellm", "qwen2") and width % heads == 0
    head_dim = keys.count("head_dim", width // heads if derived else None)
    max_length = keys.count("max_position_embeddings")
    mlp_width = keys.count("intermediate_size")
    tied = keys.flag("tie_word_embeddings")
    repeats, qk_norm, ropes = 1, "none", [True] * layers
    keys.must_be("hidden_act", "silu")
    qkv_bias, out_bias = _read_biases(keys, family)
    match family:
        case "mistral":
            if keys.lacks("sliding_window") and max_length > 4096:  # what a missing one means
                raise keys.refused("sliding_window", 4096)
            keys.must_be("sliding_window", None)
        case "qwen2" | "qwen3":
            keys.must_be("use_sliding_window", False)
            keys.ignore("sliding_window", "max_window_layers")
            qk_norm = "scaled" if family == "qwen3" else "none"
        case "mobilellm":
            tied = keys.flag("share_embedding") or tied
            repeats = 2 if keys.flag("layer_sharing") else 1
            keys.ignore("auto_map")
        case "llama4_text":
            mlp_width = keys.count("intermediate_size_mlp")
            qk_norm = "unit" if keys.flag("use_qk_norm", True) else "none"
            ropes = _read_llama4(keys, layers, max_length)
    if family != "llama4_text":
        for kind in keys.pop("layer_types", []):
            if kind != "full_attention":
                raise keys.refused("layer_types", kind)
    theta, scaling = _read_rope(keys, family, max_length)
    quantized = keys.pop(compressed_tensors.KEY)
    quantization = compressed_tensors.quantization_of(quantized, tied)
    if quantization is None:
        raise keys.refused(compressed_tensors.KEY, quantized)
    return ModelConfig(
        vocab_size=keys.count("vocab_size"),
        width=width,
        stacks=tuple(
            Stack(len(list(run)), heads, kv_heads, mlp_width, repeats, rope=rope)
            for rope, run in itertools.groupby(ropes)
        ),
        head_dim=head_dim,
        tied=tied,
        qk_norm=qk_norm,
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        ls_kv=ls_kv if repeats > 1 else "fresh",
        norm_eps=keys.number("rms_norm_eps", _DEFAULT_EPS.get(family, 1e-6)),
        max_length=max_length,
        init_std=keys.number("initializer_range", 0.02),
        quantization=quantization,
    )


def _read_biases(keys: _Keys, family: str) -> tuple[bool, bool]:
    """Whether queries, keys and values have biases, and what attention and MLP give."""
    found = keys.flag("attention_bias"), keys.flag("mlp_bias")
    for ours, theirs in _BIASES.get(family, _NO_BIASES).items():
        if theirs == found:
            return ours
    raise keys.refused("mlp_bias", found[1], f"attention_bias={found[0]}, ")


def _read_llama4(keys: _Keys, layers: int, max_length: int) -> list[bool]:
    """Which layers of a dense Llama 4 have rotary positions."""
    step = keys.pop("interleave_moe_layer_step", 1)
    moe = keys.pop("moe_layers", list(range(step - 1, layers, step)) if step > 0 else [])
    if found := [layer for layer in moe if layer < layers]:
        raise keys.refused("moe_layers", found)
    interval = keys.count("no_rope_layer_interval", 4)
    ropes = keys.pop("no_rope_layers", []) or [int((i + 1) % interval != 0) for i in range(layers)]
    if len(ropes) < layers or any(rope not in (0, 1) for rope in ropes):
        raise keys.refused("no_rope_layers", ropes)
    ropes = [bool(rope) for rope in ropes[:layers]]
    chunked = ["chunked_attention" if rope else "full_attention" for rope in ropes]
    kinds = keys.pop("layer_types", chunked)
    chunk = keys.pop("attention_chunk_size", 8192)
    for kind in set(kinds[:layers]):
        if kind == "chunked_attention" and chunk < max_length:
            raise keys.refused("attention_chunk_size", chunk)
        if kind not in ("chunked_attention", "full_attention"):
            raise keys.refused("layer_types", kind)
    # Queries of layers without positions grow with the context, from position floor_scale - 1 on.
    tuning, floor = keys.pop("attn_temperature_tuning", True), keys.pop("floor_scale", 8192)
    if tuning and not all(ropes) and keys.pop("attn_scale", 0.1) and max_length >= floor:
        raise keys.refused("attn_temperature_tuning", tuning)
    keys.ignore("attn_scale", "num_experts_per_tok", "num_local_experts", "output_router_logits")
    keys.ignore("router_aux_loss_coef", "router_jitter_noise", "for_llm_compressor")
    return ropes


def _read_rope(keys: _Keys, family: str, max_length: int) -> tuple[float, RopeScaling | None]:
    """Base and scaling; transformers 4 writes two keys, transformers 5 one, we write all three."""
    keys.must_be("partial_rotary_factor", 1)
    default = _DEFAULT_THETA.get(family, 10_000.0)
    thetas = {"rope_theta": keys.number("rope_theta", 0.0)}
    scalings = {}
    for key in ("rope_parameters", "rope_scaling"):
        if raw := keys.pop(key):
            inner = _Keys(raw, f"{keys.where}, {key}")
            thetas[key] = inner.number("rope_theta", 0.0)
            scalings[key] = _read_scaling(inner, max_length)
            inner.finish()
    given = {theta for theta in thetas.values() if theta}
    if len(given) > 1:
        raise UserError(f"{keys.where}: rope_theta has several values: {sorted(given)}.")
    if len(set(scalings.values())) > 1:
        raise UserError(f"{keys.where}: rope_parameters and rope_scaling do not agree.")
    scaling = next(iter(scalings.values()), None)
    return (given.pop() if given else default), scaling


def _read_scaling(keys: _Keys, max_length: int) -> RopeScaling | None:
    old = keys.pop("type", "default")
    kind = keys.pop("rope_type", old)
    keys.must_be("partial_rotary_factor", 1)
    if kind == "default":
        return None
    if kind != "llama3":
        raise keys.refused("rope_type", kind)
    return RopeScaling(
        factor=keys.number("factor"),
        low_freq_factor=keys.number("low_freq_factor"),
        high_freq_factor=keys.number("high_freq_factor"),
        original_max_length=keys.count("original_max_position_embeddings", max_length),
    )
