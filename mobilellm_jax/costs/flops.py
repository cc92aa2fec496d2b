"""FLOPs of a program, counted from its jaxpr: every product times the lengths of the scans around it.

XLA's own count (`compiled.cost_analysis()`) has the body of a loop once, however often it runs, and
knows nothing of what a kernel does. Counted here are matrix products alone, two FLOPs for a
multiply-add; what a step recomputes is in its jaxpr and so in the count. A custom kernel is priced
by a formula of its own; one without a formula is named and not counted.

A product with batch dimensions is between activations: attention. One without is with a weight. What
the optimizer multiplies (`jax.named_scope("optimizer")` in `training.step`) is neither.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from mobilellm_jax.model.flash_gpu import BACKWARD, FORWARD

# Primitives that hide what they compute; their kernels are priced by name, or not at all.
OPAQUE = ("pallas_call", "ffi_call", "custom_call", "custom_partitioning", "ragged_dot_general")


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of one call of a program, over all devices."""

    matmul: float = 0.0  # products with weights
    attention: float = 0.0  # products between activations, kernels of attention included
    optimizer: float = 0.0  # what the optimizer multiplies; these do not grow with the rows
    uncounted: Mapping[str, float] = dataclasses.field(default_factory=dict)  # what: calls of it

    @property
    def total(self) -> float:
        """All that is counted."""
        return self.matmul + self.attention + self.optimizer

    def __add__(self, other: "Flops") -> "Flops":
        names = {**self.uncounted, **other.uncounted}
        calls = {n: self.uncounted.get(n, 0) + other.uncounted.get(n, 0) for n in names}
        return Flops(
            self.matmul + other.matmul,
            self.attention + other.attention,
            self.optimizer + other.optimizer,
            calls,
        )

    def times(self, count: float) -> "Flops":
        """The same, `count` times."""
        calls = {name: n * count for name, n in self.uncounted.items()}
        return Flops(self.matmul * count, self.attention * count, self.optimizer * count, calls)


def count(jaxpr: Any) -> Flops:
    """FLOPs of a jaxpr (`jax.make_jaxpr(f)(...)` or `jax.jit(f).trace(...).jaxpr`).

    A `cond` costs as much as its dearest branch. A `while`, whose number of turns nobody knows, is
    counted once and named in `uncounted`. Inside `shard_map` shapes are those of one device: its
    body counts once for each.
    """
    found = Flops()
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        costs = _of_equation(equation)
        if "optimizer" in str(equation.source_info.name_stack).split("/"):
            costs = Flops(optimizer=costs.total, uncounted=costs.uncounted)
        found += costs
    return found


def _of_equation(equation: Any) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _dot(equation)
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name in OPAQUE or "dot_product_attention" in name:
        return _kernel(equation)
    if name == "scan":
        return count(params["jaxpr"]).times(params["length"])
    if name == "cond":
        return max((count(branch) for branch in params["branches"]), key=lambda f: f.total)
    inner = sum((count(part) for part in _parts(params)), Flops())
    if name == "while":
        return inner + (Flops(uncounted={"while loop, counted as one turn": 1}))
    if name == "shard_map":
        axes = params.get("newly_manual_axes") or params["mesh"].axis_names
        return inner.times(math.prod(params["mesh"].shape[axis] for axis in axes))
    return inner


def _parts(params: Mapping[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for part in value if isinstance(value, list | tuple) else (value,):
            if hasattr(getattr(part, "jaxpr", part), "eqns"):
                yield part


def _dot(equation: Any) -> Flops:
    (contracted, _), (batch, _) = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    flops = 2.0 * math.prod(equation.outvars[0].aval.shape)
    flops *= math.prod(left[axis] for axis in contracted)
    return Flops(attention=flops) if batch else Flops(matmul=flops)


def _convolution(equation: Any) -> Flops:
    kernel = equation.invars[1].aval.shape
    features = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return Flops(
        matmul=2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
    )


# --- Kernels --------------------------------------------------------------------------------------


def _kernel(equation: Any) -> Flops:
    name = str(equation.params.get("name") or equation.params.get("call_target_name") or "")
    name = name or equation.primitive.name
    for beginning, price in KERNELS.items():
        if name.startswith(beginning):
            return Flops(attention=price(equation))
    return Flops(uncounted={f"kernel {name}": 1})


def _splash(products: int) -> Callable[[Any], float]:
    """Splash attention over causal rows: `products` products, each over the visited blocks of [T, S].

    Visited are the blocks that hold a key not in the future of some query, whatever the documents:
    of `n` blocks of queries and `m` of keys about half, and the whole of the diagonal. The queries
    are the first operand [..., N, T, H] in floating point, the keys [..., K, S, H] the second.
    """

    def price(equation: Any) -> float:
        arrays = [v.aval for v in equation.invars]
        at = [i for i, a in enumerate(arrays) if jax.numpy.issubdtype(a.dtype, jax.numpy.floating)]
        (*rows, heads, length, width), keys = arrays[at[0]].shape, arrays[at[1]].shape[-2]
        blocks = [_block(equation, i) for i in at[:2]]
        visited = _visited_blocks(length, keys, *blocks) * blocks[0] * blocks[1]
        return 2.0 * products * math.prod(rows) * heads * width * visited

    return price


def _flash(products: int, block: tuple[int, int]) -> Callable[[Any], float]:
    """As `_splash`, of JAX's kernel for GPUs: queries [B, T, N, H] and keys [B, S, N, H] come first."""

    def price(equation: Any) -> float:
        rows, length, heads, width = equation.invars[0].aval.shape
        visited = _visited_blocks(length, equation.invars[1].aval.shape[1], *block)
        return 2.0 * products * rows * heads * width * visited * math.prod(block)

    return price


def _cudnn(products: int) -> Callable[[Any], float]:
    """Attention of cuDNN, which says nothing of its blocks: pairs of [B, T, N, H] not in the future."""

    def price(equation: Any) -> float:
        rows, length, heads, width = equation.invars[0].aval.shape
        return 2.0 * products * rows * heads * width * length * (length + 1) / 2

    return price


def _block(equation: Any, operand: int) -> int:
    """Rows in a block of an operand [..., T, H] of a Pallas kernel."""
    mapping = equation.params["grid_mapping"]
    shape = mapping.block_mappings[operand - mapping.num_index_operands].block_shape
    size = shape[-2]
    return int(getattr(size, "block_size", size))


def _visited_blocks(length: int, keys: int, query_block: int, key_block: int) -> int:
    queries = math.ceil(length / query_block)
    last = (min(length, (i + 1) * query_block) for i in range(queries))
    return sum(min(math.ceil(end / key_block), math.ceil(keys / key_block)) for end in last)


# By the beginning of a kernel's name, the first that fits: its FLOPs. Forward: q k and weights v.
# Backward: the weights again (q k), and the gradients of v, of the weights, of k, of q, where keys
# and queries have kernels of their own (`dkv`, then `dq`) they share the first and third.
KERNELS: Mapping[str, Callable[[Any], float]] = {
    "splash_mha_fwd": _splash(2),
    "splash_mqa_fwd": _splash(2),
    "splash_mha_dkv": lambda equation: _splash(5 if _fused(equation) else 4)(equation),
    "splash_mqa_dkv": lambda equation: _splash(5 if _fused(equation) else 4)(equation),
    "splash_mha_dq": _splash(3),
    "splash_mqa_dq": _splash(3),
    "mha_forward": _flash(2, FORWARD),
    "mha_backward": _flash(7, BACKWARD),  # keys and values, then queries, in one kernel
    "mha_preprocess_backward": lambda equation: 0.0,  # output times its gradient, no product
    "dot_product_attention_fwd": _cudnn(2),
    "dot_product_attention_bwd": _cudnn(5),
}


def _fused(equation: Any) -> bool:
    """Whether this kernel also gives the queries' gradient, one part of it per block of keys."""
    queries = next(v.aval for v in equation.invars if v.aval.dtype.kind not in "iu")
    return any(
        v.aval.shape[-2:] == queries.shape[-2:] and v.aval.ndim == queries.ndim + 1
        for v in equation.outvars
    )
