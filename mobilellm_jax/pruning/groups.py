"""Which weights belong together: the groups that pruning removes, and what follows from them.

A group is one index of an axis in all weights that have this axis:

    F  a channel of one block's MLP: of gate, up and down
    N  a query head of one block: of query and out
    K  a KV head of one block: of key and value; it goes with the query heads that read it
    D  a channel of the residual stream: of everything that reads or writes it, through all blocks

So which weights a group has, what it weighs, how it is zeroed and how it is taken out are all one
table, `model.axes`. `Groups` holds something for every group: whether it lives, a score, a size.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat
from mobilellm_jax.model import transformer
from mobilellm_jax.model.axes import axes_of
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.parallel.sharding import path_name


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class StackGroups:
    """Something for each group of the blocks of a stack."""

    mlp_LF: Any
    heads_LN: Any
    kv_heads_LK: Any

    @property
    def heads_LKG(self) -> Any:
        """The query heads by the KV head that they read."""
        return self.heads_LN.reshape(*self.kv_heads_LK.shape, -1)

    @property
    def kinds(self) -> dict[str, Any]:
        """The arrays by name: `mlp`, `heads`, `kv_heads`."""
        return {kind: getattr(self, FIELDS[axis]) for axis, kind in KINDS.items()}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Groups:
    """Something for each group of a network: arrays of one dtype, of numpy or of JAX."""

    residual_D: Any
    stacks: tuple[StackGroups, ...]

    def of(self, axis: str, stack: int | None) -> Any:
        """The array of an axis: [D], or [L, F], [L, N] or [L, K] of that stack."""
        if axis == "D" or stack is None:
            return self.residual_D
        return getattr(self.stacks[stack], FIELDS[axis])


FIELDS = {"F": "mlp_LF", "N": "heads_LN", "K": "kv_heads_LK"}  # of the groups of a block
KINDS = {"F": "mlp", "N": "heads", "K": "kv_heads"}  # and how records call them
GROUPED = "FNKD"
_STACK = re.compile(r"(?:^|/)stack_(\d+)/")


def everything(config: ModelConfig) -> Groups:
    """All groups alive: bool.

    Raises:
      UserError: the network has a block of the user's own, whose groups are not known.
    """
    for path in flat(transformer.shapes(config)):
        if axes_of(path) is None:
            raise UserError(
                f"the parameter {path} of {config.block} has axes that pruning does not know: name them in "
                "mobilellm_jax/model/axes.py, or prune a network of the usual blocks."
            )
    return of_widths(config, lambda *shape: np.ones(shape, bool))


def of_widths(config: ModelConfig, make: Callable[..., Any]) -> Groups:
    """Groups with `make(*shape)` for each array."""
    return Groups(
        make(config.width),
        tuple(
            StackGroups(
                make(s.layers, s.mlp_width), make(s.layers, s.heads), make(s.layers, s.kv_heads)
            )
            for s in config.stacks
        ),
    )


def blocks(groups: Groups) -> Iterator[tuple[int, int]]:
    """The stack of each block and its layer there, in order."""
    for stack, of in enumerate(groups.stacks):
        for layer in range(len(of.mlp_LF)):
            yield stack, layer


def counts(live: Groups) -> Groups:
    """How many groups of each kind live: int, [L] for each kind of a stack, and one number for D."""
    return jax.tree.map(lambda x: np.asarray(x).sum(-1), live)


def parameters(config: ModelConfig, number: Groups) -> int:
    """Exact number of parameters of a network of which that many groups live.

    Args:
      config: the network.
      number: as `counts` gives it.
    """
    return sum(int(_product(config, axes, stack, number).sum()) for axes, stack in _leaves(config))


def sizes(config: ModelConfig, number: Groups) -> Groups:
    """Parameters of one group of each kind while that many live: [L] of each kind, one number for D.

    A KV head's are without those of its query heads.
    """

    def of(axis: str, leaves: list[tuple[str, int | None]]) -> list[np.ndarray]:
        found = []
        for axes, stack in leaves:
            if times := axes.count(axis):
                left = np.asarray(number.of(axis, stack))
                one = left**times - (left - 1) ** times if times > 1 else 1
                found.append(_product(config, axes.replace(axis, ""), stack, number) * one)
        return found

    leaves = _leaves(config)
    stacks = []
    for i in range(len(config.stacks)):
        own = [leaf for leaf in leaves if leaf[1] == i]
        stacks.append(StackGroups(**{FIELDS[axis]: np.sum(of(axis, own), 0) for axis in FIELDS}))
    return Groups(np.sum([x.sum() for x in of("D", leaves)]), tuple(stacks))


def reduced(
    values: Any, config: ModelConfig, of: Callable[[jax.Array], jax.Array] = lambda x: x
) -> Groups:
    """What each group's weights add up to.

    Args:
      values: pytree of arrays like the parameters.
      config: the network.
      of: what is added up of each weight; formed layer by layer, never whole.

    Returns:
      float32; a weight counts for each group that it is of: one of `gate` for its channel of the
      MLP and for its channel of the residual stream. A KV head's sum is without its query heads.
    """
    sums = of_widths(config, lambda *shape: jnp.zeros(shape, jnp.float32))
    for path, value in flat(values).items():
        axes, stack = named(path)

        def by_axis(value: jax.Array, axes: str = axes) -> dict[str, jax.Array]:
            formed, found = of(value.astype(jnp.float32)), dict[str, jax.Array]()
            for at, axis in enumerate(axes):
                if axis in GROUPED:
                    found[axis] = found.get(axis, 0.0) + _sum_to(formed, at)
            return found

        if axes.startswith("L"):
            layers = jax.lax.map(functools.partial(by_axis, axes=axes[1:]), value)
            found = {axis: x.sum(0) if axis == "D" else x for axis, x in layers.items()}
        else:
            found = by_axis(value)
        sums = added(sums, found, stack)
    return sums


def added(sums: Groups, more: Mapping[str, Any], stack: int | None) -> Groups:
    """Groups plus arrays by axis, of one stack or of none."""
    residual, stacks = sums.residual_D, list(sums.stacks)
    if "D" in more:
        residual = residual + more["D"]
    for axis, field in FIELDS.items():
        if stack is not None and axis in more:
            old = stacks[stack]
            stacks[stack] = dataclasses.replace(old, **{field: getattr(old, field) + more[axis]})
    return Groups(residual, tuple(stacks))


def living(params: Any, config: ModelConfig) -> Groups:
    """Which groups have a weight that is not zero: bool, numpy.

    Of the residual stream all, unless the network is one whose channels may be dead.
    """
    sizes_of = reduced(params, config, jnp.abs)
    found = jax.tree.map(lambda x: np.asarray(x) > 0, sizes_of)
    if not config.dead_channels:
        found = dataclasses.replace(found, residual_D=np.ones_like(found.residual_D))
    return found


def masked(tree: Any, live: Groups) -> Any:
    """A pytree whose paths end in those of parameters, zero where a group does not live.

    Parameters, a train state, moments: what is no parameter stays as it is.

    Raises:
      UserError: an array is named like a parameter and has other axes, as a factored moment.
    """

    def of(path: tuple[Any, ...], leaf: Any) -> Any:
        name = path_name(path)
        if axes_of(name) is None:
            return leaf
        axes, stack = named(name)
        if len(axes) != leaf.ndim:
            raise UserError(
                f"{name} has {leaf.ndim} axes where its parameter has {len(axes)}: the optimizer keeps "
                "something that cannot be cut; use one whose moments look like the parameters."
            )
        for at, axis in enumerate(axes):
            if axis in GROUPED:
                leaf = jnp.where(_spread(live.of(axis, stack), axes, at), leaf, 0)
        return leaf

    return jax.tree_util.tree_map_with_path(of, tree)


def named(path: str) -> tuple[str, int | None]:
    """The axes of a parameter, and its stack; None for what stands outside of the stacks."""
    axes, stack = axes_of(path), _STACK.search(path)
    assert axes is not None, path
    return axes, int(stack[1]) if stack else None


@functools.lru_cache
def _leaves(config: ModelConfig) -> list[tuple[str, int | None]]:
    return [named(path) for path in flat(transformer.shapes(config))]


def _product(config: ModelConfig, axes: str, stack: int | None, number: Groups) -> np.ndarray:
    """How many weights these axes span: by layer if L is one of them."""
    fixed = {"V": config.vocab_size, "H": config.head_dim, "D": number.residual_D}
    found = np.asarray(1, np.int64)
    for axis in axes:
        if axis == "L" and stack is not None:
            found = found * np.ones(config.stacks[stack].layers, np.int64)
        else:
            found = found * np.asarray(fixed[axis] if axis in fixed else number.of(axis, stack))
    return found


def _sum_to(value: jax.Array, at: int) -> jax.Array:
    """The sum over all axes but that in this place."""
    return value.sum(tuple(i for i in range(value.ndim) if i != at))


def _spread(vector: jax.Array, axes: str, at: int) -> jax.Array:
    """[D], or [L, X], for the axis in a place, with axes of length 1 where the array has others."""
    kept = axes[at] if axes[at] == "D" else f"L{axes[at]}"
    length = dict(zip(kept, vector.shape, strict=True))
    return jnp.asarray(vector).reshape(
        [length[a] if a in kept and (a == "L" or i == at) else 1 for i, a in enumerate(axes)]
    )
