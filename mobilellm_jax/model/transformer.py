"""The MobileLLM decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU, scanned stacks of blocks.

Axes: B rows, T query positions, S key positions, D model width, N query heads, K KV heads, H head
width, F MLP width, V vocabulary, L layers of a stack, A applications of its blocks.

A walk through a stack is one `nn.scan` over weights stacked as `[L, ...]`. Weight sharing applies
each block several times, inside the walk's body or by walking again, each time with keys and values
of its own. (The released MobileLLM code reuses the first pass's keys when its KV cache is on: that
is `ls_kv="first_pass"`.)
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mobilellm_jax.data.packing import positions
from mobilellm_jax.errors import UserError
from mobilellm_jax.imports import import_path
from mobilellm_jax.model.attention import KERNELS, of_rows, rope, rope_frequencies
from mobilellm_jax.model.by_heads import attention_by_heads
from mobilellm_jax.model.cache import Cache, kept, written, zeros
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.model.embedding import look_up
from mobilellm_jax.model.layers import (
    RMSNorm,
    gated,
    matrix_of,
    projection,
    with_bias,
    with_tap,
)
from mobilellm_jax.model.notes import (
    GRAMS,
    INPUTS,
    STATISTICS,
    gram,
    moments,
    movement,
    note,
    products,
)
from mobilellm_jax.model.plain import attention, visible
from mobilellm_jax.model.quantization import factor_of, table_of, weight_of
from mobilellm_jax.model.taps import TAPS
from mobilellm_jax.parallel.sharding import batch_sharded

Params = dict[str, Any]

REMAT = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a network is run; none of it changes what it computes beyond rounding."""

    dtype: str = (
        "float32"  # of activations and of the weights in products; weights are kept in float32
    )
    remat: str = "none"  # what the backward pass computes again: none, dots, full
    unroll: int = 1  # layers per iteration of the scan
    attention: str = "reference"  # of whole rows: this, or a kernel as `attention.choose` names it

    def __post_init__(self) -> None:
        """Raises `UserError` for a value that does not exist."""
        if self.remat not in REMAT:
            raise UserError(f"execution.remat={self.remat!r} is not one of {', '.join(REMAT)}.")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"execution.dtype={self.dtype!r} is not float32 or bfloat16.")
        if not isinstance(self.unroll, int) or self.unroll < 1:
            raise UserError(
                f"execution.unroll={self.unroll} must be a whole number of layers, 1 or more."
            )
        if self.attention not in ("reference", *KERNELS):
            raise UserError(f"execution.attention={self.attention!r} is not reference or a kernel.")


def layers_at_once(asked: int, remat: str, platform: str, config: ModelConfig) -> int:
    """`Execution.unroll` of a training step: what is asked for, or where that is 0 what suits the devices.

    XLA for GPUs copies what each layer keeps for its backward pass into an array of all layers and out
    of it again, which is a quarter of what a step moves (docs/results.md): all layers at once need no
    loop, and no such array. With remat "full" next to nothing is kept. XLA for TPUs and CPUs writes
    in place.
    """
    if asked or platform != "gpu" or remat == "full":
        return asked or 1
    return max(stack.layers for stack in config.stacks)


@dataclasses.dataclass(frozen=True)
class Context:
    """What all blocks share: where the tokens stand, which keys they may read, and whose keys.

    Positions count from 0 in every document of a row: far into a long row float32 would tell
    neighbouring angles of RoPE apart less well.
    """

    positions_BT: jax.Array  # in the document
    visible_BTS: jax.Array | None  # for the reference; None: a kernel reads the segments
    segment_ids_BT: jax.Array | None = None  # None: a row is one document
    slot: jax.Array | int = 0  # in the cache, of the first of the keys and values that are written
    application: jax.Array | int = 0  # of the stack's, whose keys and values they are
    attention: str = "reference"
    whole_rows: bool = True  # False: there are keys and values in the cache before these
    own_keys: bool = True  # False: read the keys and values in the cache and write none


jax.tree_util.register_dataclass(
    Context,
    ["positions_BT", "visible_BTS", "segment_ids_BT", "slot", "application"],
    ["attention", "whole_rows", "own_keys"],
)


class Attention(nn.Module):
    """Grouped-query self-attention with RoPE and, if the network has it, QK-norm."""

    config: ModelConfig
    stack: Stack

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Attends; with a cache ({"key", "value"}: [AKB, S, H]) first writes new slots into it."""
        c, s = self.config, self.stack
        x_BTD = factor_of(c.quantization, "blocks", x_BTD)

        matrix = functools.partial(matrix_of, self, c, x_BTD.dtype)

        def heads(name: str, count: int) -> jax.Array:
            y_BTNH = projection("BTD,DNH->BTNH", x_BTD, matrix(name, c.width, count, c.head_dim))
            if not c.qkv_bias:
                return y_BTNH
            shape = count, c.head_dim
            bias_NH = self.param(f"{name}_bias", nn.initializers.zeros, shape, jnp.float32)
            return y_BTNH + with_tap(self, f"{name}_bias", bias_NH).astype(x_BTD.dtype)

        q_BTNH = heads("query", s.heads)
        k_BTKH = heads("key", s.kv_heads)
        v_BTKH = heads("value", s.kv_heads)
        if s.rope and c.qk_norm != "none":
            q_BTNH = RMSNorm(c.norm_eps, c.qk_norm == "scaled", name="query_norm")(q_BTNH)
            k_BTKH = RMSNorm(c.norm_eps, c.qk_norm == "scaled", name="key_norm")(k_BTKH)
        if s.rope:
            frequencies = rope_frequencies(c)
            q_BTNH = rope(q_BTNH, context.positions_BT, frequencies)
            k_BTKH = rope(k_BTKH, context.positions_BT, frequencies)
        k_BSKH, v_BSKH = k_BTKH, v_BTKH
        if cache is not None:
            if context.own_keys:
                new = {"key": k_BTKH, "value": v_BTKH}
                at = context.application, context.slot
                cache = {name: written(cache[name], new[name], *at) for name in new}
            rows, length = x_BTD.shape[:2]
            k_RSH, v_RSH = (
                kept(cache[name], s.kv_heads * rows, context.application)
                for name in ("key", "value")
            )
            if context.whole_rows and not context.own_keys:
                k_BSKH, v_BSKH = (
                    jnp.moveaxis(x[:, :length].reshape(-1, rows, length, c.head_dim), 0, 2)
                    for x in (k_RSH, v_RSH)
                )
        if context.visible_BTS is None:
            segments_BT = context.segment_ids_BT
            y_BTNH = of_rows(context.attention, q_BTNH, k_BSKH, v_BSKH, segments_BT)
        elif context.whole_rows:
            y_BTNH = attention(q_BTNH, k_BSKH, v_BSKH, context.visible_BTS)
        else:
            y_BTNH = attention_by_heads(q_BTNH, k_RSH, v_RSH, context.visible_BTS)
        note(self, STATISTICS, **moments(y_BTNH))
        note(self, INPUTS, of_out=products(y_BTNH))
        y_BTNH = factor_of(c.quantization, "blocks", y_BTNH)
        out_NHD = matrix("out", s.heads, c.head_dim, c.width, inputs=2)
        # One axis for heads and their width: einsum would sum over H, N, for which XLA copies weights.
        y_BTE, out_ED = y_BTNH.reshape(*y_BTNH.shape[:2], -1), out_NHD.reshape(-1, c.width)
        y_BTD = projection("BTE,ED->BTD", y_BTE, out_ED)
        return with_bias(self, c, "out_bias", y_BTD), cache


class MLP(nn.Module):
    """SwiGLU, down(silu(gate x) * up x) (arXiv 2002.05202), or ReLU's down(relu(up x))."""

    config: ModelConfig
    stack: Stack

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]."""
        c, width, hidden = self.config, self.config.width, self.stack.mlp_width
        x_BTD = factor_of(c.quantization, "blocks", x_BTD)

        matrix = functools.partial(matrix_of, self, c, x_BTD.dtype)

        if c.mlp == "swiglu":
            gate_BTF = projection("BTD,DF->BTF", x_BTD, matrix("gate", width, hidden))
            up_BTF = projection("BTD,DF->BTF", x_BTD, matrix("up", width, hidden))
            hidden_BTF = gated(gate_BTF, up_BTF)
        else:
            hidden_BTF = nn.relu(projection("BTD,DF->BTF", x_BTD, matrix("up", width, hidden)))
        note(self, STATISTICS, **moments(hidden_BTF))
        note(self, INPUTS, of_down=products(hidden_BTF))
        hidden_BTF = factor_of(c.quantization, "blocks", hidden_BTF)
        y_BTD = projection("BTF,FD->BTD", hidden_BTF, matrix("down", hidden, width))
        return with_bias(self, c, "down_bias", y_BTD)


class Block(nn.Module):
    """One pre-norm decoder block. A block of your own has these fields and this call."""

    config: ModelConfig
    stack: Stack

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T, D] -> [B, T, D], and the cache with this pass's keys and values in it."""
        c, given_BTD = self.config, x_BTD
        norm = functools.partial(RMSNorm, c.norm_eps, dead=c.dead_channels)
        y_BTD = norm(name="attention_norm")(x_BTD)
        self._note("of_attention", x_BTD, y_BTD)
        y_BTD, cache = Attention(c, self.stack, name="attention")(y_BTD, context, cache)
        x_BTD = self.carried("attention", x_BTD) + y_BTD
        y_BTD = norm(name="mlp_norm")(x_BTD)
        self._note("of_mlp", x_BTD, y_BTD)
        x_BTD = self.carried("mlp", x_BTD) + MLP(c, self.stack, name="mlp")(y_BTD)
        note(self, STATISTICS, **movement(given_BTD, x_BTD))
        return x_BTD, cache

    def carried(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """What the residual connection carries past attention or MLP."""
        return x_BTD

    def _note(self, name: str, x_BTD: jax.Array, y_BTD: jax.Array) -> None:
        """Of what a norm reads and gives."""
        note(self, STATISTICS, read=moments(y_BTD)["square"])
        note(self, GRAMS, gram=gram(x_BTD))
        note(self, INPUTS, **{name: products(y_BTD)})


class Transformer(nn.Module):
    """Tokens to hidden states, after the final norm."""

    config: ModelConfig
    execution: Execution

    @nn.compact
    def __call__(
        self, tokens_BT: jax.Array, context: Context, caches: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """Int [B, T] -> [B, T, D] in the execution's dtype, and the caches."""
        c = self.config
        normal = nn.initializers.normal(c.init_std)
        embedding_VD = self.param("embedding", normal, (c.vocab_size, c.width), jnp.float32)
        if not c.tied:  # read by `unembedding`; declared here so that it is created with the rest
            self.param("head", normal, (c.width, c.vocab_size), jnp.float32)
        table_VD = table_of(c.quantization, embedding_VD)
        x_BTD = look_up(table_VD, tokens_BT, self.execution.dtype)
        new_caches = {}
        for i, stack in enumerate(c.stacks):
            name = f"stack_{i}"
            cache = None if caches is None else caches[name]
            x_BTD, new_caches[name] = self._run(name, stack, x_BTD, context, cache)
        hidden_BTD = RMSNorm(c.norm_eps, dead=c.dead_channels, name="final_norm")(x_BTD)
        note(self, INPUTS, of_head=products(hidden_BTD))
        hidden_BTD = factor_of(c.quantization, "head", hidden_BTD)
        return hidden_BTD, None if caches is None else new_caches

    def _run(
        self, name: str, stack: Stack, x_BTD: jax.Array, context: Context, cache: Cache | None
    ) -> tuple[jax.Array, Cache | None]:
        """One stack: walks through its blocks, each a scan that applies a block once or more."""
        policy, at_once = REMAT[self.execution.remat], self.execution.unroll
        written_out = at_once >= stack.layers  # no loop around the layers
        first_pass = self.config.ls_kv == "first_pass"
        walks, times = stack.passes

        def apply(
            block: nn.Module, x: jax.Array, context: Context, cache: Cache | None
        ) -> tuple[jax.Array, Cache | None]:
            return block(batch_sharded(x), context, cache)

        if policy is not None:
            # Where no loop lies between a layer and its backward pass, XLA would find what the one has
            # computed when it comes to the other, and keep it after all.
            apply = nn.remat(apply, policy=policy, prevent_cse=written_out)

        # The cache is carried, not handed out by layer: so it is written in place.
        def layer(block: nn.Module, carry: Any, _: None) -> tuple[Any, None]:
            x, cache, first = carry
            slots, begin = cache, first
            if first_pass and cache is None:  # later passes need the first one's keys all the same
                rows, length = x.shape[:2]
                slots, begin = zeros(1, self.config, stack, rows, length, x.dtype), 0
            own = 1 if first_pass else times  # applications with keys of their own
            for r in range(times):
                at = dataclasses.replace(context, application=begin + r % own, own_keys=r < own)
                x, slots = apply(block, x, at, slots)
            return (x, None if cache is None else slots, first + own), None

        block = import_path(self.config.block, "model.block")(self.config, stack, name=name)
        carry = x_BTD, cache, jnp.int32(0)
        for walk in range(walks):
            scan = nn.scan(
                layer,
                variable_axes={"params": 0, TAPS: 0, STATISTICS: 0, GRAMS: 0, INPUTS: 0},
                split_rngs={"params": True},
                length=stack.layers,
                reverse=stack.backwards(walk),
                unroll=0 if written_out else at_once,
            )
            carry, _ = scan(block, carry, None)
        return carry[:2]


def init(config: ModelConfig, key: jax.Array) -> Params:
    """Fresh float32 parameters: N(0, init_std) matrices and embedding, norm scales of one."""
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    return Transformer(config, Execution()).init(key, tokens_BT, _context(tokens_BT), None)[
        "params"
    ]


def shapes(config: ModelConfig) -> Params:
    """What `init` gives, as `ShapeDtypeStruct`s."""
    return jax.tree.map(lambda leaf: leaf, _shapes(config))  # a tree of the caller's own


@functools.lru_cache
def _shapes(config: ModelConfig) -> Params:
    """Traced once, which takes a quarter of a second: pruning asks again and again."""
    return jax.eval_shape(lambda: init(config, jax.random.key(0)))


def apply(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    execution: Execution = Execution(),
) -> jax.Array:
    """Hidden states of whole rows, [B, T, D] after the final norm, in the execution's dtype.

    Args:
      params: as made by `init`.
      config: the network.
      tokens_BT: int token ids.
      segment_ids_BT: int, equal for the tokens of one document, which follow each other; None if a
        row is one document.
      execution: dtype, remat, unroll, attention.
    """
    context = _context(tokens_BT, segment_ids_BT, execution.attention)
    variables = {"params": {name: leaf for name, leaf in params.items() if name != TAPS}}
    if TAPS in params:
        variables[TAPS] = params[TAPS]
    hidden_BTD, _ = Transformer(config, execution).apply(variables, tokens_BT, context, None)
    return hidden_BTD


def statistics(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    execution: Execution = Execution(),
    collection: str = STATISTICS,
) -> dict[str, Any]:
    """What the blocks did with whole rows, added up over tokens and over a block's applications.

    Args:
      params: as made by `init`.
      config: the network.
      tokens_BT: int token ids.
      segment_ids_BT: see `apply`.
      execution: see `apply`.
      collection: `STATISTICS`, `GRAMS` or `INPUTS`.

    Returns:
      By stack, float32. Of `GRAMS`: `gram` [L, D, D], the sum of x x^T of what both norms of a block
      read, each x scaled to a mean square of 1. Of `INPUTS`: sums of x x^T of what enters products,
      `of_attention` and `of_mlp` [L, D, D], `attention/of_out` [L, NH, NH], `mlp/of_down` [L, F, F], and
      outside of the stacks `of_head` [D, D]. Of `STATISTICS`: `cosine` and `distance` [L] between what
      enters and leaves a block; `read` [L, D], squares of what its norms give; `attention` and `mlp`, each
      `sum` and `square` of what enters `out` [L, N, H] and `down` [L, F].
    """
    context = _context(tokens_BT, segment_ids_BT, execution.attention)
    _, found = Transformer(config, execution).apply(
        {"params": params}, tokens_BT, context, None, mutable=[collection]
    )
    return found[collection]


def apply_cached(
    params: Params,
    config: ModelConfig,
    tokens_BT: jax.Array,
    cache: Cache,
    begin_B: jax.Array,
    slot: jax.Array | None = None,
    execution: Execution = Execution(),
) -> tuple[jax.Array, Cache]:
    """Hidden states of new tokens that read what the cache holds before them.

    All rows write the same slots, so that a step is one update in place: shorter texts are padded on
    the left, and row `b` has its first token in slot `begin_B[b]`. What the padding computes means
    nothing and is read by no token.

    Args:
      params: as made by `init`.
      config: the network.
      tokens_BT: int token ids, padding included.
      cache: as made by `model.cache.empty_cache`; see there for its length.
      begin_B: int, slot of the first token of each row.
      slot: int scalar, slot of the first of the T tokens. None: the cache is empty, the tokens begin
        in slot 0, and attention is that of the execution.
      execution: dtype, unroll, attention.

    Returns:
      [B, T, D] hidden states and the cache with the new keys and values in it.
    """
    first = 0 if slot is None else slot
    slots_BT = jnp.broadcast_to(first + jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    positions_BT = jnp.maximum(slots_BT - begin_B[:, None], 0)
    text_BT = (slots_BT >= begin_B[:, None]).astype(jnp.int32)
    if slot is None:
        context = _context(tokens_BT, text_BT, execution.attention)
    else:
        length = jax.tree.leaves(cache)[0].shape[1]
        slots_BS = jnp.broadcast_to(jnp.arange(length), (tokens_BT.shape[0], length))
        visible_BTS = visible(slots_BT, slots_BS, None, None)
        visible_BTS &= (slots_BS >= begin_B[:, None])[:, None]
        context = Context(positions_BT, visible_BTS, slot=slot, whole_rows=False)
    model = Transformer(config, execution)
    out: Any = model.apply({"params": params}, tokens_BT, context, cache)
    return out


def unstacked(params: Params, config: ModelConfig) -> tuple[Params, ModelConfig]:
    """The same network as stacks of one block, in order of execution, with a buffer for each weight.

    A scan copies the weights of a layer out of its stack whenever it comes to it, which is most of
    the time of a step that reads one token. Shared blocks share their buffers. Where a block's later
    passes read its first one's keys, these passes stay together in one stack.
    """
    together = config.ls_kv == "first_pass"
    flat = {name: leaf for name, leaf in params.items() if not name.startswith("stack_")}
    stacks: list[Stack] = []
    for i, stack in enumerate(config.stacks):
        blocks = [
            jax.tree.map(lambda leaf, at=layer: leaf[at : at + 1], params[f"stack_{i}"])
            for layer in range(stack.layers)
        ]
        repeats = stack.repeats if together else 1
        single = dataclasses.replace(stack, layers=1, repeats=repeats, order="immediate")
        for layer in range(stack.layers) if together else stack.applications:
            flat[f"stack_{len(stacks)}"] = blocks[layer]
            stacks.append(single)
    return flat, dataclasses.replace(config, stacks=tuple(stacks))


def unembedding(params: Params, config: ModelConfig) -> jax.Array:
    """The matrix [D, V] that turns hidden states into logits: the embedding's transpose if tied."""
    head_DV = params["embedding"].T if config.tied else params["head"]
    return weight_of(config.quantization, "head", head_DV)


def logits(params: Params, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """float32 [B, T, V]."""
    unembedding_DV = unembedding(params, config).astype(hidden_BTD.dtype)
    return jnp.einsum("BTD,DV->BTV", hidden_BTD, unembedding_DV, preferred_element_type=jnp.float32)


def _context(
    tokens_BT: jax.Array, segment_ids_BT: jax.Array | None = None, attention: str = "reference"
) -> Context:
    slots_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    positions_BT = slots_BT if segment_ids_BT is None else positions(segment_ids_BT)
    visible_BTS = None
    if attention == "reference":
        visible_BTS = visible(slots_BT, slots_BT, segment_ids_BT, segment_ids_BT)
    return Context(positions_BT, visible_BTS, segment_ids_BT, attention=attention)
