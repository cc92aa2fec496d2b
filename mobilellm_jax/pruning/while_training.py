"""Pruning inside of training: when a run cuts, down to how many parameters, and the cut itself.

The step adds up scores (`training.step`); between two steps, where the schedule says so, a strategy
chooses by them, and the groups that die become zero in weights and moments. Shapes stay, so that one
compiled step serves all cuts, until the run compacts: then what is dead is taken out of the state, and
another step is compiled for the smaller network.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig, parameter_count
from mobilellm_jax.pruning.compaction import LAYOUTS, Compact, compacted, taken, uncut
from mobilellm_jax.pruning.groups import (
    FIELDS,
    Groups,
    StackGroups,
    counts,
    everything,
    masked,
    of_widths,
    parameters,
)
from mobilellm_jax.pruning.measures import SCORES, Measures, unknown_score
from mobilellm_jax.pruning.one_shot import aims, removed
from mobilellm_jax.pruning.scores import KINDS
from mobilellm_jax.pruning.strategies import Choice, Strategy, View
from mobilellm_jax.training.objectives import Batch, Network
from mobilellm_jax.training.step import Pruning, TrainState

SPACINGS = ("even", "growing")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """After which steps a run cuts, and how many parameters may then be left."""

    steps: tuple[int, ...]  # rising
    targets: tuple[int, ...]
    compactions: tuple[int, ...] = ()  # of the steps, those after whose cut it compacts


def schedule_of(config: ConfigDict, steps: int) -> Schedule:
    """The cuts of a run of that many steps; none if it does not prune.

    Cut k of N leaves `whole - (whole - target) * k / N` parameters. It comes, of the steps from `begin` to
    `end`, after the share (k - 1) / N of them, or, if they grow, after k (k - 1) / (N (N + 1)): so the data
    that follow a cut grow linearly (Adapt-Pruner's Adapt-Accel, its experiments' `linear`). The first cut
    that comes to a size of `compact_at` or below stops there and is followed by a compaction.

    Raises:
      UserError: the numbers make no schedule.
    """
    c = config.pruning
    if not c.target:
        return Schedule((), ())
    whole, end = parameter_count(ModelConfig.from_dict(config.model)), c.end or steps
    if not 0 < c.target < whole:
        raise UserError(
            f"config.pruning.target={c.target:,} must be positive and below the {whole:,} parameters that "
            "the network has."
        )
    if c.spacing not in SPACINGS:
        raise UserError(
            f"config.pruning.spacing={c.spacing!r} is not one of {', '.join(SPACINGS)}."
        )
    if not 1 <= c.begin < end <= steps:
        raise UserError(
            f"config.pruning.begin={c.begin} and end={c.end} must be steps of the run, which has {steps:,}, "
            "in this order; end=0 is its last."
        )
    cuts = np.arange(c.cuts, dtype=np.float64)  # k - 1
    shares = cuts / c.cuts if c.spacing == "even" else cuts * (cuts + 1) / (c.cuts * (c.cuts + 1))
    at = c.begin + np.floor(shares * (end - c.begin)).astype(int)
    if c.cuts < 1 or len(set(at)) < len(at):
        raise UserError(
            f"config.pruning.cuts={c.cuts} do not fit, one after a step, into the steps from {c.begin} to "
            f"{end}: lower it."
        )
    steps_of_cuts, targets = at.tolist(), aims(whole, c.target, c.cuts)
    sizes = tuple(c.compact_at)
    if list(sizes) != sorted({*sizes}, reverse=True) or any(
        not c.target <= s < whole for s in sizes
    ):
        raise UserError(
            f"config.pruning.compact_at={sizes} must be falling numbers of parameters, below the "
            f"{whole:,} of the network and not below config.pruning.target={c.target:,}."
        )
    reached = [next(k for k, target in enumerate(targets) if target <= size) for size in sizes]
    if len(set(reached)) < len(reached):
        raise UserError(
            f"config.pruning.compact_at={sizes}: two of these sizes are passed in one cut; raise "
            f"config.pruning.cuts={c.cuts}."
        )
    for k, size in zip(reached, sizes, strict=True):
        targets[k] = size
    compactions = tuple(steps_of_cuts[k] for k in reached)
    return Schedule(tuple(steps_of_cuts), tuple(targets), compactions)


class _Random(Measures):
    """Stands in for measurements, to see where a schedule leads before anything is computed."""

    def __init__(self, config: ModelConfig, where: str) -> None:
        self._config, self._where, self._rng = config, where, np.random.default_rng(0)

    def scores(self, name: str) -> Groups:
        if name not in SCORES:
            raise unknown_score(name)
        return of_widths(self._config, lambda *shape: self._rng.random(shape))

    def importance(self, measure: str) -> np.ndarray:
        return self._rng.random(sum(stack.layers for stack in self._config.stacks))

    def loss(self, name: str) -> float | None:
        return None

    def __getattribute__(self, name: str) -> Any:
        if name in ("params", "statistics", "residual_gram"):
            raise UserError(
                f"{self._where} chooses by weights or activations that a run does not measure: prune in "
                "one shot, python -m mobilellm_jax.prune."
            )
        return super().__getattribute__(name)


class _Accumulated(Measures):
    """What the steps since the last cut have added up; all else is measured on the last step's rows."""

    def __init__(self, scored: str, found: Groups, *given: Any) -> None:
        super().__init__(*given)
        self._scored, self._found = scored, found

    def scores(self, name: str) -> Groups:
        return self._found if name == self._scored else super().scores(name)

    def loss(self, name: str) -> float | None:
        return None if name == self._scored else super().loss(name)


def rehearsed(
    config: ModelConfig,
    strategy: Strategy,
    schedule: Schedule,
    where: str,
    smaller: Callable[[ModelConfig, Groups], Compact],
) -> Any:
    """Goes through a schedule with random measurements; what the strategy remembers at its end.

    Raises:
      UserError: a target is out of the strategy's reach, or it does what a run cannot.
    """
    live, memory = everything(config), None
    first, measures = counts(live), _Random(config, where)
    for step, target in zip(schedule.steps, schedule.targets, strict=True):
        choice = strategy(View(config, live, first, memory, measures, schedule.targets[-1]), target)
        check(config, live, choice, where)
        live, memory = choice.live, choice.memory
        if step in schedule.compactions:
            compact = smaller(config, live)
            config, live = compact.config, jax.device_get(compact.groups(live))
            first, measures = restacked(first, config), _Random(config, where)
    return memory


def restacked(number: Groups, config: ModelConfig) -> Groups:
    """How many groups each block has, by the stacks of a network of the same blocks."""
    ends = np.cumsum([stack.layers for stack in config.stacks])[:-1]
    parts = {
        field: np.split(
            np.concatenate([np.asarray(getattr(of, field)) for of in number.stacks]), ends
        )
        for field in FIELDS.values()
    }
    stacks = (
        StackGroups(**{field: of[i] for field, of in parts.items()})
        for i in range(len(config.stacks))
    )
    return Groups(number.residual_D, tuple(stacks))


def check(config: ModelConfig, live: Groups, choice: Choice, where: str) -> None:
    """Raises `UserError` where a choice is none that a run can take, given what lives."""
    pairs = zip(jax.tree.leaves(live), jax.tree.leaves(choice.live), strict=True)
    if any((new & ~old).any() for old, new in pairs):
        raise UserError(f"{where} lets groups live that are dead, whose weights are zero.")
    if choice.config not in (None, config):
        raise UserError(
            f"{where} makes a network of another kind, which a run does not: prune in one shot, "
            "python -m mobilellm_jax.prune."
        )
    if not choice.live.residual_D.all() and not config.dead_channels:
        raise UserError(
            f"{where} cuts channels of the residual stream: set config.model.dead_channels=True, so that "
            "norms divide by those that live."
        )


@dataclasses.dataclass(frozen=True)
class Pruner:
    """What a run does between two steps."""

    schedule: Schedule
    strategy: Strategy
    scored: str  # the score that the steps add up
    memory: Any  # of the strategy: arrays as they are kept in the state
    first: Groups  # how many groups there are when the run begins, by the stacks of `network`
    network: Network  # as it is now
    compact: Compact  # which groups of the network at the beginning it still has
    smaller: Callable[[ModelConfig, Groups], Compact]  # how it is compacted
    seed: int
    where: str

    def due(self, step: int) -> bool:
        """Whether there is a cut after this many steps."""
        return step in self.schedule.steps

    def at(self, compact: Compact) -> "Pruner":
        """The same in a network that this one is compacted to, or was at another time of the run."""
        network = dataclasses.replace(self.network, model=compact.config)
        first = restacked(self.first, compact.config)
        return dataclasses.replace(self, network=network, compact=compact, first=first)

    def compaction(self, step: int, live: Groups) -> Compact | None:
        """The smaller network in this one, if the run compacts after this step.

        Args:
          step: steps that are done.
          live: bool, numpy.
        """
        if step not in self.schedule.compactions:
            return None
        return self.smaller(self.network.model, live)

    def begin(self) -> Pruning:
        """Of step 0: all live, nothing is added up."""
        model = self.network.model
        live = jax.tree.map(jnp.asarray, everything(model))
        zeros = of_widths(model, lambda *shape: jnp.zeros(shape, jnp.float32))
        memory = jax.tree.map(lambda x: jnp.zeros(np.shape(x), jnp.float32), self.memory)
        return Pruning(live, zeros, memory)

    def cut(
        self, state: TrainState, batches: Sequence[Batch], apply: Callable[..., TrainState]
    ) -> tuple[TrainState, Mapping[str, Any]]:
        """The state after the cut that is due, and a record of it in plain values.

        Args:
          state: given up to it.
          batches: the rows of the step before, as many at once as may be.
          apply: `cut_state`, compiled.

        Raises:
          UserError: the strategy chooses what cannot be.
        """
        step, model = int(state.step), self.network.model
        assert state.pruning is not None
        target = self.schedule.targets[self.schedule.steps.index(step)]
        given = jax.device_get(state.pruning)
        measures = _Accumulated(
            self.scored, given.scores, state.params, self.network, batches, self.seed + step
        )
        goal = self.schedule.targets[-1]
        view = View(model, given.live, self.first, given.memory, measures, goal)
        choice = self.strategy(view, target)
        check(model, given.live, choice, self.where)
        if choice.update:
            state = dataclasses.replace(state, params=choice.update(state.params))
        state = apply(state, choice.live, choice.memory)
        left = parameters(model, counts(choice.live))
        gone = self.compact.named(removed(given.live, choice.live))
        event = {"target": target, "parameters": left, **choice.measured, "cut": gone}
        return state, event | widths(choice.live, self.first)


def widths(live: Groups, first: Groups) -> dict[str, float]:
    """What lives, as numbers for curves: the share of each kind, and of each block how many.

    Args:
      live: bool, numpy.
      first: how many groups there were at first; shares are of these.
    """
    number = counts(live)
    found = {"live/residual": float(number.residual_D / first.residual_D)}
    for kind in live.stacks[0].kinds:
        now_B, then_B = (
            np.concatenate([s.kinds[kind] for s in of.stacks]) for of in (number, first)
        )
        found[f"live/{kind}"] = float(now_B.sum() / then_B.sum())
        found |= {f"{kind}/{block}": int(n) for block, n in enumerate(now_B)}
    return found


def cut_state(state: TrainState, live: Groups, memory: Any) -> TrainState:
    """A state in which what does not live is zero, in weights and moments, and scores begin anew."""
    assert state.pruning is not None
    zeros = jax.tree.map(jnp.zeros_like, state.pruning.scores)
    memory = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), memory)
    state = masked(state, live)
    return dataclasses.replace(state, pruning=Pruning(live, zeros, memory))


def carried(state: TrainState, compact: Compact, shapes: TrainState) -> TrainState:
    """The state of the smaller network: weights and moments without what is dead.

    Args:
      state: in which scores have just begun anew, as after a cut.
      compact: the smaller network in that of the state.
      shapes: the result, as `ShapeDtypeStruct`s.
    """
    assert state.pruning is not None and shapes.pruning is not None
    rest = dataclasses.replace(state, pruning=None)
    smaller = taken(rest, compact, dataclasses.replace(shapes, pruning=None))
    live = compact.groups(state.pruning.live)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes.pruning.scores)
    return dataclasses.replace(smaller, pruning=Pruning(live, zeros, state.pruning.memory))


def pruner_of(
    config: ConfigDict, network: Network, steps: int, strategy: Strategy
) -> Pruner | None:
    """The pruner of a run; None if it does not prune.

    Args:
      config: of the run.
      network: its network.
      steps: of the run.
      strategy: as `config.pruning.strategy` names it.

    Raises:
      UserError: see `schedule_of` and `rehearsed`; or there is no such score.
    """
    schedule = schedule_of(config, steps)
    if not schedule.steps:
        return None
    if config.pruning.score not in KINDS:
        raise UserError(
            f"config.pruning.score={config.pruning.score!r} is not one of {', '.join(KINDS)}."
        )
    where = f"config.pruning.strategy.use={config.pruning.strategy.use}"
    layout, multiple = config.pruning.layout, config.pruning.multiple
    if layout not in LAYOUTS or multiple < 1:
        raise UserError(
            f"config.pruning.layout={layout!r} must be one of {', '.join(LAYOUTS)}, and "
            f"config.pruning.multiple={multiple} at least 1."
        )

    def smaller(model: ModelConfig, live: Groups) -> Compact:
        compact = compacted(model, live, layout=layout, multiple=multiple)
        # More channels may die later on.
        model = dataclasses.replace(compact.config, dead_channels=model.dead_channels)
        return dataclasses.replace(compact, config=model)

    return Pruner(
        schedule,
        strategy,
        config.pruning.score,
        rehearsed(network.model, strategy, schedule, where, smaller),
        counts(everything(network.model)),
        network,
        uncut(network.model),
        smaller,
        config.seed,
        where,
    )
