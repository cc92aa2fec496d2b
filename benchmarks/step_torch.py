"""The same step in PyTorch, as its users write it, for `benchmarks.step`."""

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

from mobilellm_jax.model.config import ModelConfig


def configuration(model: ModelConfig) -> transformers.PretrainedConfig:
    """The network as transformers has it; with QK-norm it is Qwen3, which gives the norms weights."""
    (stack,) = model.stacks
    kind = transformers.LlamaConfig if model.qk_norm == "none" else transformers.Qwen3Config
    return kind(
        vocab_size=model.vocab_size,
        hidden_size=model.width,
        head_dim=model.head_dim,
        num_hidden_layers=stack.layers * stack.repeats,
        num_attention_heads=stack.heads,
        num_key_value_heads=stack.kv_heads,
        intermediate_size=stack.mlp_width,
        tie_word_embeddings=model.tied,
        max_position_embeddings=model.max_length,
        attn_implementation="sdpa",
        use_cache=False,
    )


def prepared(
    job: Any, model: ModelConfig, tokens: np.ndarray
) -> tuple[Callable[[], Any], Callable[[Any], Any], str, Callable[[], int]]:
    """A step to call again and again, how to wait for it, the device, and its peak bytes in use."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.manual_seed(0)
    llama = transformers.AutoModelForCausalLM.from_config(configuration(model)).to(device)
    (stack,) = model.stacks
    layers = llama.model.layers
    for i in range(len(layers)):
        layers[i] = layers[i - i % stack.repeats]
    optimizer = torch.optim.AdamW(
        llama.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    rows = torch.tensor(tokens, dtype=torch.long, device=device)
    inputs, targets = rows[:, :-1].contiguous(), rows[:, 1:].contiguous()
    low = job.dtype == "bfloat16" or (job.dtype == "auto" and cuda)
    lower = torch.autocast(device.type, torch.bfloat16) if low else contextlib.nullcontext()

    def loss_of(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = llama(inputs).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    run = torch.compile(loss_of) if job.way == "compiled" else loss_of

    def advance() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with lower:
            loss = run(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    name = torch.cuda.get_device_name() if cuda else "cpu"
    return (
        advance,
        lambda loss: loss.item(),
        name,
        lambda: int(cuda and torch.cuda.max_memory_allocated()),
    )
