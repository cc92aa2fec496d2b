"""README.md of an exported folder: what the network is, what it was trained on, how to load it."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from mobilellm_jax.data.plan import Plan
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.tables import markdown_table

_LOAD = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{folder}"{arguments})
tokenizer = AutoTokenizer.from_pretrained("{folder}")
```
"""


def model_card(
    name: str, model: ModelConfig, family: str, dtype: str, meta: Mapping[str, Any]
) -> str:
    """The text of README.md.

    Args:
      name: of the folder.
      model: the network.
      family: the architecture that it was written as.
      dtype: of the weights.
      meta: the checkpoint's description; of `config`, `plan`, `rows`, `heldout` and `origin` what
        there is.
    """
    shared = any(stack.repeats > 1 for stack in model.stacks)
    front = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mobilellm", "mobilellm-jax", "jax", *(["layer-sharing"] if shared else [])],
    }
    sections = [
        "---\n"
        + "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())
        + "---\n",
        f"# {name}\n",
        "A small language model, trained or converted with mobilellm-jax. The license of its weights is "
        "for those who trained them to name.\n",
        "## Network\n",
        _table(("", ""), ("architecture of the files", f"{family}, {dtype}"), *network_rows(model)),
        *_origin(meta),
        *_training(meta),
        *_heldout(meta.get("heldout", {})),
        "## Loading\n",
        _LOAD.format(
            folder=name, arguments=", trust_remote_code=True" if family == "hf_shared" else ""
        ),
        'mobilellm-jax reads the folder as well, with `mobilellm_jax.load("...")`'
        + (": there a shared block is one block again.\n" if shared else ".\n"),
    ]
    return "\n".join(sections)


def network_rows(model: ModelConfig) -> list[tuple[str, str]]:
    """What a network is, as names and values for people."""
    rows = [
        ("parameters", f"{parameter_count(model):,}"),
        ("vocabulary", f"{model.vocab_size:,}"),
        ("width", f"{model.width:,}"),
        ("context", f"{model.max_length:,} tokens"),
        ("embedding and head", "one matrix" if model.tied else "two matrices"),
        ("QK-norm", model.qk_norm),
    ]
    for i, stack in enumerate(model.stacks):
        text = f"{stack.layers} blocks"
        if stack.repeats > 1:
            text += f", each applied {stack.repeats} times ({stack.order})"
        text += f", {stack.heads} heads over {stack.kv_heads} KV heads of {model.head_dim}"
        text += f", MLP ({model.mlp}) of {stack.mlp_width:,}"
        text += "" if stack.rope else ", no positions"
        rows.append((f"stack {i}" if len(model.stacks) > 1 else "blocks", text))
    return rows


def _origin(meta: Mapping[str, Any]) -> list[str]:
    if not (origin := meta.get("origin")):
        return []
    return [f"Converted from {epath.Path(origin['directory']).name} ({origin['family']}).\n"]


def _training(meta: Mapping[str, Any]) -> list[str]:
    plan, config = meta.get("plan"), meta.get("config", {})
    if not plan or "rows" not in meta:
        return []
    tokens = meta["rows"] * config["row_length"]
    plan = Plan.from_dict(plan, "the plan of the checkpoint")
    shares = zip(plan.names, plan.read(tokens) / max(tokens, 1), strict=True)
    begun_at = epath.Path(config.get("init_from") or "").name
    start = f", starting at the weights of {begun_at}" if begun_at else ""
    return [
        "## Training\n",
        f"{tokens:,} tokens in {meta['step']:,} steps{start}, drawn from\n",
        _table(("source", "share"), *((name, f"{w:.1%}") for name, w in shares)),
    ]


def _heldout(results: Mapping[str, float]) -> list[str]:
    key = "bits_per_byte"
    found = {k.removeprefix(key)[1:] or "all": v for k, v in results.items() if k.startswith(key)}
    if not found:
        return []
    rows = ((name, f"{value:.4f}") for name, value in found.items())
    return ["## Held-out text\n", _table(("source", "bits per byte"), *rows)]


def _table(*lines: tuple[str, str]) -> str:
    return markdown_table(lines, "<<") + "\n"
