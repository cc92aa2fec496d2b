"""One shot: a trained network loses groups in rounds, with nothing trained in between."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.pruning.groups import Groups, blocks, counts, living, masked, parameters
from mobilellm_jax.pruning.measures import Measures
from mobilellm_jax.pruning.strategies import Strategy, View
from mobilellm_jax.training.objectives import Batch, Network


@dataclasses.dataclass(frozen=True)
class Pruned:
    """A network with dead groups, all zero, in the shapes it had before."""

    params: Any
    config: ModelConfig
    live: Groups  # bool, numpy
    events: list[dict[str, Any]]  # one for each round, plain values


def prune(
    params: Any,
    network: Network,
    strategy: Strategy,
    target: int,
    rounds: int,
    batches: Callable[[int], Sequence[Batch]],
    seed: int = 0,
    told: Callable[[dict[str, Any]], None] = lambda event: None,
) -> Pruned:
    """Cuts a network to a number of parameters, in rounds that cut equally many.

    Args:
      params: the weights; given up to the cuts.
      network: how they are run.
      strategy: what is cut; see `strategies`.
      target: parameters; what is left has the largest number that the strategy can reach below.
      rounds: between which all is measured anew.
      batches: the rows on which round i is measured.
      seed: of what is drawn.
      told: called with the event of each round as it is over.

    Raises:
      UserError: the target is not below what the network has, or not within the strategy's reach.
    """
    config = network.model
    live = living(params, config)  # it may have been pruned before
    first = counts(live)
    whole = parameters(config, first)
    if not 0 < target < whole:
        raise UserError(
            f"the target of {target:,} parameters is not below the {whole:,} that the network has: there is "
            "nothing to prune."
        )
    memory, events = None, []
    for number, aim in enumerate(aims(whole, target, rounds)):
        measures = Measures(params, network, batches(number), seed + number)
        view = View(network.model, live, first, memory, measures, target)
        choice = strategy(view, aim)
        config = choice.config or network.model
        if not choice.live.residual_D.all():  # norms divide by the channels that live
            config = dataclasses.replace(config, dead_channels=True)
        network = dataclasses.replace(network, model=config)
        gone, live, memory = removed(live, choice.live), choice.live, choice.memory
        params = cut(choice.update(params) if choice.update else params, live)
        left = parameters(network.model, counts(live))
        event = {"round": number, "target": aim, "parameters": left, **choice.measured, "cut": gone}
        events.append(event)
        told(event)
    return Pruned(params, network.model, live, events)


def aims(whole: int, target: int, cuts: int) -> list[int]:
    """The parameters that are left after each of so many cuts, all equally large."""
    return [whole - (whole - target) * (cut + 1) // cuts for cut in range(cuts)]


def removed(before: Groups, after: Groups) -> dict[str, Any]:
    """Which groups died between two states, as plain indices: by kind, and of blocks by their number."""
    found: dict[str, Any] = {}
    residual = np.flatnonzero(before.residual_D & ~after.residual_D)
    if len(residual):
        found["residual"] = residual.tolist()
    for number, (stack, layer) in enumerate(blocks(before)):
        for kind, old in before.stacks[stack].kinds.items():
            new = after.stacks[stack].kinds[kind]
            if len(gone := np.flatnonzero(old[layer] & ~new[layer])):
                found.setdefault(kind, {})[str(number)] = gone.tolist()
    return found


# Which groups live is data, so that one program serves all cuts.
cut = jax.jit(masked, donate_argnums=0)
