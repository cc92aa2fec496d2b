"""The really smaller network: dead groups are taken out of every array, and blocks are stacked anew.

A network being pruned keeps its shapes, and what is dead in it is zero. Here the indices that live are
gathered out of every leaf, of weights and moments alike. A width may be rounded up: what fills it is
dead groups, which are zero and stay zero. Blocks of equal widths that follow each other become a
stack.
"""

import dataclasses
import itertools
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat
from mobilellm_jax.model.axes import axes_of
from mobilellm_jax.model.config import ModelConfig, Stack
from mobilellm_jax.parallel.sharding import path_name
from mobilellm_jax.pruning.groups import FIELDS, KINDS, Groups, StackGroups, everything, named

LAYOUTS = ("stacks", "padded")


@dataclasses.dataclass(frozen=True)
class Block:
    """Where a block was, and which of its groups it takes along, by axis, as they were numbered there."""

    stack: int
    layer: int
    kept: dict[str, np.ndarray]  # F, N, K

    @property
    def widths(self) -> tuple[int, int, int]:
        """MLP width, query heads, KV heads."""
        return len(self.kept["F"]), len(self.kept["N"]), len(self.kept["K"])


@dataclasses.dataclass(frozen=True)
class Compact:
    """A smaller network, and where everything in it was."""

    config: ModelConfig
    kept_D: np.ndarray  # channels of the residual stream
    stacks: tuple[tuple[Block, ...], ...]

    def after(self, first: "Compact") -> "Compact":
        """Both, one after the other: where everything was before the first."""

        def of(block: Block) -> Block:
            then = first.stacks[block.stack][block.layer]
            kept = {axis: then.kept[axis][now] for axis, now in block.kept.items()}
            return Block(then.stack, then.layer, kept)

        stacks = tuple(tuple(map(of, run)) for run in self.stacks)
        return Compact(self.config, first.kept_D[self.kept_D], stacks)

    def groups(self, of: Groups) -> Groups:
        """What there was for each group, in the smaller network: arrays of JAX."""

        def stack(run: tuple[Block, ...]) -> StackGroups:
            return StackGroups(
                **{
                    field: jnp.stack([of.of(axis, b.stack)[b.layer][b.kept[axis]] for b in run])
                    for axis, field in FIELDS.items()
                }
            )

        return Groups(of.residual_D[self.kept_D], tuple(map(stack, self.stacks)))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint's description: for each block where it was and what it keeps."""
        return {
            "residual": self.kept_D.tolist(),
            "blocks": [
                {"stack": b.stack, "layer": b.layer}
                | {axis: kept.tolist() for axis, kept in b.kept.items()}
                for b in itertools.chain.from_iterable(self.stacks)
            ],
        }

    def named(self, removed: Mapping[str, Any]) -> dict[str, Any]:
        """Indices of groups of the smaller network (`one_shot.removed`) as they were numbered before."""
        blocks, found = [*itertools.chain.from_iterable(self.stacks)], dict(removed)
        if "residual" in found:
            found["residual"] = self.kept_D[found["residual"]].tolist()
        for axis, kind in KINDS.items():
            if kind in found:
                of = {
                    number: blocks[int(number)].kept[axis][at] for number, at in found[kind].items()
                }
                found[kind] = {number: indices.tolist() for number, indices in of.items()}
        return found

    @classmethod
    def from_dict(cls, config: ModelConfig, raw: Mapping[str, Any]) -> "Compact":
        """The inverse of `to_dict`, given the smaller network."""
        blocks = (
            Block(b["stack"], b["layer"], {axis: np.asarray(b[axis], int) for axis in FIELDS})
            for b in raw["blocks"]
        )
        stacks = tuple(tuple(itertools.islice(blocks, s.layers)) for s in config.stacks)
        return cls(config, np.asarray(raw["residual"], int), stacks)


def uncut(config: ModelConfig) -> Compact:
    """The network itself, in which everything is where it was."""
    return dataclasses.replace(compacted(config, everything(config)), config=config)


def compacted(
    config: ModelConfig, live: Groups, *, layout: str = "stacks", multiple: int = 1
) -> Compact:
    """The smaller network that lives in one whose dead groups are zero.

    A KV head, a channel of an MLP and one of the residual stream that are all zero have no gradient and
    stay zero in training. A query head whose KV head lives attends to all alike and gives their mean, so
    its row of `out` would come back: blocks with more and with fewer query heads to a KV head are therefore
    never padded to one width.

    Args:
      config: the network.
      live: bool, numpy.
      layout: `stacks`: blocks keep widths of their own, and runs of equal ones are a stack each;
        `padded`: the blocks of a stack get the widths of its widest, and stay one stack where they have
        equally many query heads to a KV head.
      multiple: to which the widths of MLPs and of the residual stream are rounded up, as far as there
        were so many before.

    Raises:
      UserError: there is no such layout; or blocks that are applied in turns, and so must stay one
        stack, would not.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r} is not one of {', '.join(LAYOUTS)}.")
    kept_D = _filled(live.residual_D, _rounded(live.residual_D.sum(), multiple))
    runs: list[tuple[Stack, tuple[Block, ...]]] = []
    for i, (stack, of) in enumerate(zip(config.stacks, live.stacks, strict=True)):
        heads_LKG = of.heads_LKG
        mlp_L = _rounded(of.mlp_LF.sum(-1), multiple)
        kv_L, each_L = of.kv_heads_LK.sum(-1), heads_LKG.sum(-1).max(-1)
        if layout == "padded":
            mlp_L, kv_L = (np.full_like(x, x.max()) for x in (mlp_L, kv_L))
        blocks = []
        for layer in range(stack.layers):
            kv_heads = _filled(of.kv_heads_LK[layer], kv_L[layer])
            of_head = [_filled(heads_LKG[layer, k], each_L[layer]) for k in kv_heads]
            each = heads_LKG.shape[-1]
            heads = np.concatenate([k * each + g for k, g in zip(kv_heads, of_head, strict=True)])
            mlp = _filled(of.mlp_LF[layer], mlp_L[layer])
            blocks.append(Block(i, layer, {"F": mlp, "N": heads, "K": kv_heads}))
        equal = [tuple(run) for _, run in itertools.groupby(blocks, lambda block: block.widths)]
        if len(equal) > 1 and stack.repeats > 1 and stack.order != "immediate":
            raise UserError(
                f"the blocks of model.stacks[{i}] are applied in turns ({stack.order}), so they must stay "
                "one stack, and now differ in their widths: choose layout='padded', and a strategy that cuts "
                "KV heads rather than query heads alone."
            )
        runs += [(stack, run) for run in equal]
    stacks = tuple(_stack(stack, run) for stack, run in runs)
    exact = len(kept_D) == int(live.residual_D.sum())
    smaller = dataclasses.replace(
        config,
        width=len(kept_D),
        stacks=stacks,
        dead_channels=config.dead_channels and not exact,
    )
    return Compact(smaller, kept_D, tuple(run for _, run in runs))


def taken(tree: Any, compact: Compact, shapes: Any, *, consumed: bool = False) -> Any:
    """A pytree of the old network as that of the smaller one: weights, moments, a train state.

    Args:
      tree: pytree whose paths end in those of parameters; what is no parameter stays as it is.
      compact: the smaller network.
      shapes: pytree like the result, of arrays or `ShapeDtypeStruct`s.
      consumed: each array of the tree is deleted once it has been read, so that the two networks never
        stand side by side in memory.
    """
    old = flat(tree)

    def of(name: str) -> tuple[Any, list[str]]:
        """An array of the smaller network, and the paths that it was read from."""
        if axes_of(name) is None:
            return old[name], []
        axes, stack = named(name)
        if stack is None:
            return _take(old[name], axes, {"D": compact.kept_D}), [name]
        before, _, behind = name.rpartition(f"stack_{stack}/")
        blocks = compact.stacks[stack]
        paths = [f"{before}stack_{block.stack}/{behind}" for block in blocks]
        layers = [
            _take(old[path][block.layer], axes[1:], {**block.kept, "D": compact.kept_D})
            for block, path in zip(blocks, paths, strict=True)
        ]
        return jnp.stack(layers), paths

    found: dict[str, Any] = {}
    # One kind of weight of all stacks after another, for a stack of the old network may have become many.
    for _, names in itertools.groupby(sorted(flat(shapes), key=_kind), _kind):
        read: set[str] = set()
        for name in names:
            found[name], paths = of(name)
            read.update(paths)
        if consumed:
            jax.block_until_ready(found)
            for path in read:
                old[path].delete()
    return jax.tree_util.tree_map_with_path(lambda path, _: found[path_name(path)], shapes)


def _kind(path: str) -> str:
    """A path without the number of its stack."""
    return re.sub(r"stack_\d+/", "", path)


def _take(array: Any, axes: str, kept: Mapping[str, np.ndarray]) -> Any:
    for i, axis in enumerate(axes):
        if axis in kept:
            array = jnp.take(array, kept[axis], axis=i)
    return array


def _stack(stack: Stack, run: tuple[Block, ...]) -> Stack:
    mlp_width, heads, kv_heads = run[0].widths
    return dataclasses.replace(
        stack, layers=len(run), heads=heads, kv_heads=kv_heads, mlp_width=mlp_width
    )


def _filled(live: np.ndarray, number: int) -> np.ndarray:
    """The indices that live and, to make so many, the first of those that do not."""
    order = np.argsort(~live, kind="stable")
    return order[:number]


def _rounded(number: Any, multiple: int) -> Any:
    return -(-number // multiple) * multiple
