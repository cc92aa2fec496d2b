"""SliceGPT as published (arXiv 2401.15024, section 3): a rotation of its own for each norm of each block.

Each input of attention and of an MLP is turned to its own principal directions, so less is lost than
with one rotation for all (`pruning.slicegpt`). What the residual connection carries must then be turned
from one to the next: two products of [D, D] more in every block, which is no plain network any more. It
is here to be measured against: it trains, is evaluated and draws tokens, and cannot be exported.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat, nested
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Block
from mobilellm_jax.pruning.groups import Groups, counts
from mobilellm_jax.pruning.measures import Measures
from mobilellm_jax.pruning.slicegpt import DAMPING, READERS, folded, rescaled, width_below
from mobilellm_jax.pruning.strategies import Choice, View, check_number

BLOCK = "mobilellm_jax.pruning.slicegpt_full:SlicedBlock"
INPUTS = {"attention_norm": "of_attention", "mlp_norm": "of_mlp"}  # what a norm gives, as noted


class SlicedBlock(Block):
    """A block whose residual connections turn what they carry."""

    def carried(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """What goes past attention, or past the MLP, in the coordinates behind it."""
        width = self.config.width
        turn_DE = self.param(f"{name}_shortcut", lambda _key: jnp.eye(width, dtype=jnp.float32))
        return jnp.einsum("BTD,DE->BTE", x_BTD, turn_DE.astype(x_BTD.dtype))


def slicegpt_full(view: View, target: int, *, multiple: int = 1) -> Choice:
    """Turns each norm's input and cuts the channels with the least variance, equally many everywhere.

    Principal directions are those of the whole network's activations, not of one that is cut up to there.

    Args:
      view: the network; blocks that are applied more than once have no input of their own.
      target: parameters, those of the turns included.
      multiple: of which the width that is left is one (8 in the authors' code).

    Raises:
      UserError: blocks are shared, the network has been turned before, or the target is below what one
        of `multiple` channels has.
    """
    if view.config.block == BLOCK:
        raise UserError("slicegpt_full cuts once: prune with --rounds=1.")
    if any(stack.repeats > 1 for stack in view.config.stacks):
        raise UserError(
            "slicegpt_full needs an input of its own for each block, and shared blocks have several: "
            "take slicegpt."
        )
    config = dataclasses.replace(view.config, tied=False, dead_channels=True, block=BLOCK)
    check_number("multiple", multiple)
    width = width_below(config, counts(view.live), target, multiple)

    def update(params: Any) -> Any:
        changed = turned(params, view.config, _bases(params, view))
        return rescaled(changed, int(view.live.residual_D.sum()), width)

    live_D = np.arange(config.width) < width
    return Choice(Groups(live_D, view.live.stacks), None, {}, update, config)


Bases = tuple[
    list[dict[str, np.ndarray]], np.ndarray
]  # by norm of each stack [L, D, E]; of the head


def _bases(params: Any, view: View) -> Bases:
    """Principal directions of what each norm gives, in falling order of variance."""
    network = view.measures.network
    plain = dataclasses.replace(network, model=dataclasses.replace(view.config, tied=False))
    measures = Measures(folded(params, view.config), plain, view.measures.batches, 0)

    def directions(gram: jax.Array) -> np.ndarray:
        gram_DD = np.asarray(gram, np.float64)
        mean = np.trace(gram_DD, axis1=-2, axis2=-1)[..., None, None] / gram_DD.shape[-1]
        return np.linalg.eigh(gram_DD + DAMPING * mean * np.diag(view.live.residual_D))[1][
            ..., ::-1
        ]

    names = [f"stack_{i}/{of}" for i in range(len(view.config.stacks)) for of in INPUTS.values()]
    found = measures.inputs([*names, "of_head"])
    stacks = [
        {norm: directions(found[f"stack_{i}/{of}"]) for norm, of in INPUTS.items()}
        for i in range(len(view.config.stacks))
    ]
    return stacks, directions(found["of_head"])


def turned(params: Any, config: ModelConfig, bases: Bases) -> Any:
    """The same function with every norm's input in coordinates of its own, untied, norm scales of one.

    Args:
      params: the weights.
      config: their network.
      bases: orthogonal; columns are the new channels.
    """
    stacks, head_DE = bases
    weights = dict(flat(folded(params, config)))

    def product(spec: str, *arrays: Any) -> jax.Array:
        given = (jnp.asarray(a, jnp.float32) for a in arrays)
        return jnp.einsum(spec, *given, precision=jax.lax.Precision.HIGHEST)

    weights["embedding"] = product(
        "VD,DE->VE", weights["embedding"], stacks[0]["attention_norm"][0]
    )
    weights["head"] = product("DV,DE->EV", weights["head"], head_DE)
    for i, of in enumerate(stacks):
        here, middle = of["attention_norm"], of["mlp_norm"]
        after = stacks[i + 1]["attention_norm"][0] if i + 1 < len(stacks) else head_DE
        behind = np.concatenate([here[1:], after[None]])  # what the next block reads
        for kind, before, then, writer in (
            ("attention", here, middle, "out"),
            ("mlp", middle, behind, "down"),
        ):
            at = f"stack_{i}/{kind}"
            for reader in READERS[f"{kind}_norm"]:
                if (path := f"{at}/{reader}") in weights:
                    weights[path] = product("LD...,LDE->LE...", weights[path], before)
            weights[f"{at}/{writer}"] = product("L...D,LDE->L...E", weights[f"{at}/{writer}"], then)
            if (bias := f"{at}/{writer}_bias") in weights:
                weights[bias] = product("LD,LDE->LE", weights[bias], then)
            weights[f"{at}_shortcut"] = product("LCD,LCE->LDE", before, then)
    return nested(weights)
