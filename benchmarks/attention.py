"""Every attention that runs on this machine's device, side by side: speed and error.

    python -m benchmarks.attention --rows=16 --length=2048 --heads=9 --kv_heads=3

Forwards and backwards on random rows, as one document each and as documents of about 256 tokens, in a
scan over a few layers, each of which reads the output of the one before as its queries: in a single
call XLA would keep for the backward pass what it computes again in a network.
Printed: the median of the tokens per second and layer of several calls, the largest difference of output and
gradients from the reference in float32, relative to their largest value, and the memory that XLA
reserves beside arguments and results. On a CPU rows are few and short unless flags say otherwise.
`model/attention.py` says which of them "auto" takes.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from mobilellm_jax.model.attention import KERNELS, PLATFORMS
from mobilellm_jax.model.plain import attention, visible
from mobilellm_jax.tables import aligned

ROWS = flags.DEFINE_integer("rows", 0, "Rows at once; 0: 16, and 2 on a CPU.", lower_bound=0)
LENGTH = flags.DEFINE_integer("length", 0, "Tokens in a row; 0: 2048, and 256 on a CPU.", 0)
HEADS = flags.DEFINE_integer("heads", 9, "Query heads.", lower_bound=1)
KV_HEADS = flags.DEFINE_integer("kv_heads", 3, "Heads of keys and values.", lower_bound=1)
HEAD_DIM = flags.DEFINE_integer("head_dim", 64, "Width of a head.", lower_bound=2)
DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float32"], "Of all arrays.")
REPEATS = flags.DEFINE_integer("repeats", 20, "Calls that are timed.", lower_bound=1)

DOCUMENT = 256  # mean tokens of a document
LAYERS = 4  # of the scan

Attend = Callable[..., jax.Array]


def reference(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array | None
) -> jax.Array:
    """The reference as a kernel is called, its mask included."""
    at_BT = jnp.broadcast_to(jnp.arange(q_BTNH.shape[1]), q_BTNH.shape[:2])
    mask_BTS = visible(at_BT, at_BT, segment_ids_BT, segment_ids_BT)
    return attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS)


def step(attend: Attend) -> Callable[..., Any]:
    """Arrays of `inputs` -> output and gradients."""

    def both(q: jax.Array, k: jax.Array, v: jax.Array, out: jax.Array, segments: Any) -> Any:
        def layers(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
            def layer(q: jax.Array, _: None) -> tuple[jax.Array, None]:
                return attend(q, k, v, segments), None

            return jax.lax.scan(layer, q, length=LAYERS)[0]

        y, back = jax.vjp(layers, q, k, v)
        return y, *back(out)

    return jax.jit(both)


def inputs(rows: int, length: int, dtype: str) -> tuple[list[jax.Array], jax.Array]:
    """Queries, keys, values and the output's cotangent; and segment ids."""
    rng = np.random.default_rng(0)
    heads = HEADS.value, KV_HEADS.value, KV_HEADS.value, HEADS.value
    arrays = [rng.standard_normal((rows, length, n, HEAD_DIM.value), np.float32) for n in heads]
    segments = (rng.random((rows, length)) < 1 / DOCUMENT).cumsum(1)
    return [jnp.asarray(x, dtype) for x in arrays], jnp.asarray(segments, jnp.int32)


def measure(attend: Attend, arrays: list[jax.Array], segments: Any, exact: Any) -> list[str]:
    """Tokens per second, error and memory, as a table has them."""
    compiled = step(attend).lower(*arrays, segments).compile()
    found = jax.block_until_ready(compiled(*arrays, segments))
    error = max(
        float(jnp.abs(a.astype(jnp.float32) - b).max() / jnp.abs(b).max())
        for a, b in zip(found, exact, strict=True)
    )
    seconds = []
    for _ in range(REPEATS.value):
        begin = time.perf_counter()
        jax.block_until_ready(compiled(*arrays, segments))
        seconds.append(time.perf_counter() - begin)
    tokens = LAYERS * arrays[0].shape[0] * arrays[0].shape[1]
    memory = compiled.memory_analysis().temp_size_in_bytes
    return [f"{tokens / np.median(seconds):,.0f}", f"{error:.1e}", f"{memory / 2**20:,.0f}"]


def main(_: list[str]) -> None:
    device = jax.devices()[0]
    small = device.platform == "cpu"
    rows, length = ROWS.value or (2 if small else 16), LENGTH.value or (256 if small else 2048)
    here = [name for name in KERNELS if PLATFORMS.get(name, device.platform) == device.platform]
    kernels: dict[str, Attend] = {"reference": reference, **{n: KERNELS[n] for n in here}}
    arrays, segments = inputs(rows, length, DTYPE.value)
    wide = [x.astype(jnp.float32) for x in arrays]
    table = [["attention", "documents", "tokens/s", "error", "MiB"]]
    for name, attend in kernels.items():
        for said, ids in (("no", None), ("yes", segments)):
            with jax.default_matmul_precision("highest"):
                exact = step(reference)(*wide, ids)
            table.append([name, said, *measure(attend, arrays, ids, exact)])
    print(
        f"{device.device_kind}: {rows} rows of {length} tokens, heads {HEADS.value}/{KV_HEADS.value} x "
        f"{HEAD_DIM.value}, {DTYPE.value}, forwards and backwards\n\n{aligned(table, '<<>>>')}"
    )


if __name__ == "__main__":
    app.run(main)
