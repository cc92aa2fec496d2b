"""How parameters and batches are sharded: one table of rules on names.

Every matrix is sharded over `fsdp` along its model width D (fully sharded data parallelism); the
layer axis of scanned weights is never sharded; what no rule names is replicated. Optimizer moments
carry the names of their parameters and so follow them. Rows of a batch are sharded over `data` and
`fsdp` together.

A third axis is one more name in `parallel/mesh.py` and in this table.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

BATCH_AXES = ("data", "fsdp")
ROWS, WHOLE = P(BATCH_AXES), P()  # of arrays that devices share, and that each has

# (pattern searched at the end of a parameter's path, its specification). [L, ...] for weights in a
# stack.
RULES: tuple[tuple[str, P], ...] = (
    (r"embedding", P(None, "fsdp")),  # V D
    (r"head", P("fsdp", None)),  # D V
    (r"attention/(query|key|value)", P(None, "fsdp", None, None)),  # L D N H
    (r"attention/out", P(None, None, None, "fsdp")),  # L N H D
    (r"mlp/(gate|up)", P(None, "fsdp", None)),  # L D F
    (r"mlp/down", P(None, None, "fsdp")),  # L F D
)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of a pytree as `a/b/c`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def spec(
    name: str,
    shape: tuple[int, ...],
    mesh: Mesh | AbstractMesh,
    fsdp: tuple[str, ...] = ("fsdp",),
) -> P:
    """The specification of an array by its name; `fsdp` are the mesh axes that stand for that one.

    An axis that does not divide its dimension is left out, because XLA shards evenly or not at all;
    the parameter table printed at the start of a run shows what each parameter got.
    """
    for pattern, rule in RULES:
        if re.search(rf"(^|/){pattern}$", name) and len(rule) == len(shape):
            axes = [fsdp if a == "fsdp" else () if a is None else (a,) for a in rule]
            fits = (
                size % math.prod(mesh.shape[a] for a in along) == 0
                for along, size in zip(axes, shape, strict=True)
            )
            kept = [along if fit else () for along, fit in zip(axes, fits, strict=True)]
            return P(*(along if len(along) > 1 else (*along, None)[0] for along in kept))
    return P()


def shardings(tree: Any, mesh: Mesh, fsdp: tuple[str, ...] = ("fsdp",)) -> Any:
    """A `NamedSharding` for every array (or `ShapeDtypeStruct`) of a pytree, by its path; see `spec`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, spec(path_name(path), leaf.shape, mesh, fsdp)), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over all devices; for every array whose first axis is B."""
    return NamedSharding(mesh, P(BATCH_AXES))


def put_rows(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Arrays whose first axis is B, this process's part of them, as arrays over all devices."""
    sharding = batch_sharding(mesh)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}


def batch_mesh(rows: int) -> AbstractMesh | None:
    """The mesh over whose devices this many rows are split evenly, of `jax.set_mesh`.

    None where there is nothing to split: no mesh, rows that do not divide, or code that already
    runs per device, inside `jax.shard_map`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or set(mesh.manual_axes) & set(BATCH_AXES):
        return None
    return None if rows % math.prod(mesh.shape[axis] for axis in BATCH_AXES) else mesh


def batch_sharded(x: jax.Array) -> jax.Array:
    """Pins activations to the sharding of their rows, so that XLA gathers weights and never activations.

    Without a mesh (a single device, no `jax.set_mesh`) there is nothing to pin.
    """
    if batch_mesh(x.shape[0]) is None:
        return x
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES))


def on_each_device(
    in_specs: tuple[P, ...], out_specs: Any, donate: tuple[int, ...] = ()
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Makes a function of arrays a compiled program over a mesh, which each device runs by itself.

    The function sees its device's part of the arrays. Its keyword arguments are static, and the
    program has one more: `mesh`.

    Args:
      in_specs: how each array is split over the devices: `ROWS`, or `WHOLE` where all have all of it.
      out_specs: likewise of what comes back.
      donate: numbers of the arrays whose memory the result may take.
    """

    def program_of(function: Callable[..., Any]) -> Callable[..., Any]:
        parameters = inspect.signature(function).parameters.values()
        static = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]

        def program(*arrays: Any, mesh: Mesh, **settings: Any) -> Any:
            local = functools.partial(function, **settings)
            specs = {"in_specs": in_specs, "out_specs": out_specs}
            return jax.shard_map(local, mesh=mesh, check_vma=False, **specs)(*arrays)

        program.__name__, program.__doc__ = function.__name__, function.__doc__
        return jax.jit(program, static_argnames=("mesh", *static), donate_argnums=donate)

    return program_of


def gathered(x: jax.Array, axis: int = 0) -> jax.Array:
    """Inside `on_each_device`: the parts of all devices, in every process."""
    return jax.lax.all_gather(x, BATCH_AXES, axis=axis, tiled=True)


def summed(x: jax.Array, place: P, mesh: AbstractMesh) -> jax.Array:
    """Inside `jax.shard_map`: the sum over the devices that split a batch.

    Each device keeps the piece of it that `place` says, or all of it.
    """
    kept = {axis: i for i, axis in enumerate(place) if axis and mesh.shape[axis] > 1}
    for axis, i in kept.items():
        # Pieces on an axis of their own: along a tiled one XLA for TPU may all-reduce and then cut.
        pieces = x.reshape(*x.shape[:i], mesh.shape[axis], -1, *x.shape[i + 1 :])
        x = jax.lax.psum_scatter(jnp.moveaxis(pieces, i, 0), axis, scatter_dimension=0)
    others = tuple(a for a in BATCH_AXES if a not in kept and mesh.shape[a] > 1)
    return jax.lax.psum(x, others) if others else x
