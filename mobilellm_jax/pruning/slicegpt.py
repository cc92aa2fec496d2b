"""SliceGPT (arXiv 2401.15024), with one rotation for the whole network: a narrower residual stream.

RMSNorm without a scale commutes with a rotation of the residual stream, so a network may be turned
until its activations lie along as few channels as possible, and the others be cut. The paper turns
every block by itself and needs a product more on each residual connection; one rotation for all leaves
a plain network. Norm scales go into the weights that read, so the two embeddings are no longer tied.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mobilellm_jax.leaves import flat, nested
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.pruning.groups import Groups, counts, named, parameters
from mobilellm_jax.pruning.strategies import Choice, View, below_all, check_number

READERS = {"attention_norm": ("query", "key", "value"), "mlp_norm": ("gate", "up")}
DAMPING = 0.01  # of the mean of the diagonal, as in the authors' code


def slicegpt(view: View, target: int, *, multiple: int = 1) -> Choice:
    """Turns the network and cuts the channels of the residual stream with the least variance.

    Args:
      view: the network.
      target: parameters.
      multiple: of which the width that is left is one (8 in the authors' code).

    Raises:
      UserError: the target is below what a network of one channel, or of `multiple`, has.
    """
    config = dataclasses.replace(view.config, tied=False, dead_channels=True)
    check_number("multiple", multiple)
    width = width_below(config, counts(view.live), target, multiple)
    gram_DD = np.asarray(view.measures.residual_gram, np.float64)
    gram_DD = gram_DD + DAMPING * np.trace(gram_DD) / len(gram_DD) * np.diag(view.live.residual_D)
    _, vectors_DE = np.linalg.eigh(gram_DD)
    rotation_DE = jnp.asarray(vectors_DE[:, ::-1], jnp.float32)
    live_D = np.arange(config.width) < width

    def update(params: Any) -> Any:
        changed = turned(params, view.config, rotation_DE)
        return rescaled(changed, int(view.live.residual_D.sum()), width)

    return Choice(Groups(live_D, view.live.stacks), None, {}, update, config)


def width_below(config: ModelConfig, number: Groups, target: int, multiple: int) -> int:
    """The largest width of the residual stream with which a network has no more parameters than that.

    Raises:
      UserError: even with `multiple` channels it has more.
    """

    def parameters_at(width: int) -> int:
        return parameters(config, dataclasses.replace(number, residual_D=np.asarray(width)))

    width = int(number.residual_D) // multiple * multiple
    while width > multiple and parameters_at(width) > target:
        width -= multiple
    if width < 1 or parameters_at(width) > target:
        raise below_all(target, parameters_at(multiple))
    return width


def rescaled(params: Any, before: int, width: int) -> Any:
    """Norms that will divide by the channels that are left, and gave the mean over all there were.

    What was cut is small, so that the mean square of those that are left is larger than the old one by the
    ratio of the widths, which goes into the scales.
    """
    scale = np.sqrt(before / width)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * scale if _is_stream_norm(path) else leaf, params
    )


def turned(params: Any, config: ModelConfig, rotation_DE: jax.Array) -> Any:
    """The same function in other coordinates of the residual stream, with norm scales of one, untied.

    Args:
      params: the weights.
      config: their network.
      rotation_DE: orthogonal; its columns are the new channels.
    """
    weights = flat(folded(params, config))
    highest = jax.lax.Precision.HIGHEST

    def of(path: str, leaf: jax.Array) -> jax.Array:
        axes, _ = named(path)
        if "D" not in axes or path.endswith("scale"):
            return leaf
        return jnp.einsum(
            f"{axes},DE->{axes.replace('D', 'E')}", leaf, rotation_DE, precision=highest
        )

    return nested({path: of(path, leaf) for path, leaf in weights.items()})


def folded(params: Any, config: ModelConfig) -> Any:
    """The same function with norm scales of one, untied: weights that read have the scales in them."""
    weights = dict(flat(params))
    head_DV = weights["embedding"].T if config.tied else weights["head"]
    weights["head"] = weights["final_norm/scale"][:, None] * head_DV
    weights["final_norm/scale"] = jnp.ones_like(weights["final_norm/scale"])
    for i in range(len(config.stacks)):
        for norm, readers in READERS.items():
            path = f"stack_{i}/{norm}/scale"
            for reader in readers:
                of = f"stack_{i}/{'attention' if norm == 'attention_norm' else 'mlp'}/{reader}"
                if of in weights:
                    scale = weights[path].reshape(
                        *weights[path].shape, *(1,) * (weights[of].ndim - 2)
                    )
                    weights[of] = weights[of] * scale
            weights[path] = jnp.ones_like(weights[path])
    return nested(weights)


def _is_stream_norm(path: tuple[Any, ...]) -> bool:
    names = [getattr(key, "key", "") for key in path]
    return names[-1] == "scale" and names[-2] in (*READERS, "final_norm")
