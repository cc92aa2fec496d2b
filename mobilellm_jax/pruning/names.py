"""Which strategies there are, by name."""

from mobilellm_jax.pruning import strategies
from mobilellm_jax.pruning.efficient import efficient
from mobilellm_jax.pruning.flap import flap
from mobilellm_jax.pruning.slicegpt import slicegpt
from mobilellm_jax.pruning.slicegpt_full import slicegpt_full
from mobilellm_jax.pruning.strategies import Strategy

STRATEGIES: dict[str, Strategy] = {
    "adapt": strategies.adapt,
    "efficient": efficient,
    "llm_pruner": strategies.llm_pruner,
    "flap": flap,
    "slicegpt": slicegpt,
    "slicegpt_full": slicegpt_full,
    "minitron": strategies.minitron,
    "magnitude": strategies.magnitude,
    "random": strategies.random,
}
