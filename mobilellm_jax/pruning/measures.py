"""What is measured of a network on rows of text, when somebody asks: scores, importance, loss."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from mobilellm_jax.errors import UserError
from mobilellm_jax.pruning import activations, scores
from mobilellm_jax.pruning.groups import Groups
from mobilellm_jax.training.objectives import Batch, Network, next_token

SCORES = (*scores.KINDS, "activation", "magnitude", "random")


class Measures:
    """Of one network and some batches; each program runs once, when it is first needed.

    Numbers of several batches are added. A gradient is that of one batch, so scores from gradients are
    sums over batches of what each gives.
    """

    def __init__(self, params: Any, network: Network, batches: Sequence[Batch], seed: int) -> None:
        self._params, self._network, self._batches, self._seed = params, network, batches, seed
        self._gradients: dict[str, tuple[Groups, float]] = {}

    def scores(self, name: str) -> Groups:
        """Of each group, numpy float32.

        Args:
          name: of `SCORES`.

        Raises:
          UserError: there is no such score.
        """
        config = self._network.model
        if name in scores.KINDS:
            return self._of_gradients(name)[0]
        if name == "activation":
            found: Any = activations.activation(self.statistics, config)
        elif name == "magnitude":
            found = _magnitude(self._params, network=self._network)
        elif name == "random":
            found = scores.random(config, jax.random.key(self._seed))
        else:
            raise unknown_score(name)
        return jax.device_get(found)

    def importance(self, measure: str) -> np.ndarray:
        """Of each block, float64; see `activations.importance`."""
        return activations.importance(self.statistics, self._network.model, measure)

    @functools.cached_property
    def statistics(self) -> Mapping[str, Any]:
        """See `activations.statistics`."""
        return self._sum(_statistics)

    @functools.cached_property
    def residual_gram(self) -> np.ndarray:
        """See `activations.residual_gram`."""
        return self._sum(_residual_gram)

    def inputs(self, names: Sequence[str]) -> Mapping[str, jax.Array]:
        """See `activations.inputs`; as large as the widest layers squared, they stay on the devices."""
        parts = (
            _inputs(self._params, batch, network=self._network, names=tuple(names))
            for batch in self._batches
        )
        return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts)

    @property
    def network(self) -> Network:
        """How the weights are run."""
        return self._network

    @property
    def batches(self) -> Sequence[Batch]:
        """The rows on which all is measured."""
        return self._batches

    @property
    def params(self) -> Any:
        """The weights that are measured."""
        return self._params

    def loss(self, name: str) -> float | None:
        """Mean loss in nats of the targets from which a score was taken; None: it is recorded elsewhere."""
        return self._of_gradients(name)[1] if name in scores.KINDS else None

    def _of_gradients(self, kind: str) -> tuple[Groups, float]:
        if kind not in self._gradients:
            found, loss, targets = self._sum(functools.partial(_gradients, kind=kind))
            self._gradients[kind] = found, float(loss / max(targets, 1.0))
        return self._gradients[kind]

    def _sum(self, program: Any) -> Any:
        """What a program gives for all batches together, numpy."""
        parts = [
            jax.device_get(program(self._params, batch, network=self._network))
            for batch in self._batches
        ]
        return jax.tree.map(lambda *leaves: np.sum(leaves, 0), *parts)


def unknown_score(name: str) -> UserError:
    """That there is no such score."""
    return UserError(f"score={name!r} is not one of {', '.join(SCORES)}.")


def _everywhere(found: Any) -> Any:
    """Whole on every device, or a process could not read what another's devices hold."""
    if jax.sharding.get_abstract_mesh().empty:
        return found
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, P()), found)


@functools.partial(jax.jit, static_argnames=("network", "kind"))
def _gradients(params: Any, batch: Batch, *, network: Network, kind: str) -> Any:
    def cost(taps: dict[str, Any]) -> tuple[jax.Array, jax.Array]:
        losses = next_token(scores.attached(params, taps), batch, network)
        return losses.total, losses.weight_BT.sum()

    taps = scores.taps(network.model, kind)
    (loss, targets), gradients = jax.value_and_grad(cost, has_aux=True)(taps)
    return _everywhere((scores.read(gradients, network.model, kind), loss, targets))


@functools.partial(jax.jit, static_argnames="network")
def _statistics(params: Any, batch: Batch, *, network: Network) -> Any:
    return _everywhere(activations.statistics(params, batch, network))


@functools.partial(jax.jit, static_argnames="network")
def _residual_gram(params: Any, batch: Batch, *, network: Network) -> jax.Array:
    return _everywhere(activations.residual_gram(params, batch, network))


@functools.partial(jax.jit, static_argnames=("network", "names"))
def _inputs(
    params: Any, batch: Batch, *, network: Network, names: tuple[str, ...]
) -> dict[str, jax.Array]:
    return activations.inputs(params, batch, network, names)


@functools.partial(jax.jit, static_argnames="network")
def _magnitude(params: Any, *, network: Network) -> Groups:
    return _everywhere(scores.magnitude(params, network.model))


def batch_of(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Rows [B, T + 1] as a batch; of sources nothing is asked here."""
    return {"tokens": tokens, "source": np.zeros(len(tokens), np.int32)}
