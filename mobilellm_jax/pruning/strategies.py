"""Strategies: which groups live on when a network is to have fewer parameters.

A strategy is `f(view, target, **settings) -> Choice`, called once for every cut of a schedule. It runs
on the host on small arrays; what it asks the view for is measured when it asks. One of a user's own
comes in by its import path.

Those of the papers are here and their settings are those of the papers; research calls them

    adapt       Adapt-Pruner (arXiv 2502.03460): each layer loses the more the less it changes its input
    llm_pruner  LLM-Pruner (arXiv 2305.11627): all layers alike, the first and the last excepted
    minitron    Minitron (arXiv 2407.14679): all layers alike, by the size of activations
    magnitude   all layers alike, by the size of weights
    random      all layers alike, by lot

and, in files of their own,

    efficient   EfficientLLM: all layers alike, of the kind of group that is worth least
    flap        FLAP: one threshold for all, and the mean of what goes as a bias
    slicegpt    SliceGPT with one rotation: a narrower residual stream
    slicegpt_full  SliceGPT as published, which leaves no plain network
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.pruning import second_order
from mobilellm_jax.pruning.groups import Groups, StackGroups, blocks, counts, parameters, sizes
from mobilellm_jax.pruning.measures import Measures

MOST = 0.99  # sparsity of a layer at most, as in the code of Adapt-Pruner
ATTENTION = ("kv_heads", "heads", "none")


@dataclasses.dataclass(frozen=True)
class View:
    """What a strategy sees of a network that is to be cut.

    What is measured is measured on the rows of this cut.
    """

    config: ModelConfig
    live: Groups  # bool, numpy
    first: Groups  # how many there were when pruning began: `groups.counts`
    memory: Any  # what the strategy handed on at the cut before; None at the first
    measures: Measures
    goal: int = 0  # parameters that are left after the last cut of the schedule


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a strategy decides."""

    live: Groups
    memory: Any = None  # plain arrays by name, kept in the checkpoint
    measured: dict[str, Any] = dataclasses.field(
        default_factory=dict
    )  # plain values for the record
    # Changes the weights before the dead ones become zero, called when the choice is taken; None: none.
    update: Callable[[Any], Any] | None = None
    config: ModelConfig | None = None  # of the network that they make; None: the same


Strategy = Callable[[View, int], Choice]


def layerwise(
    view: View,
    target: int,
    *,
    score: str,
    importance: str = "",
    amplitude: float | None = None,
    attention: str = "kv_heads",
    protect: Sequence[int] = (0, 0),
    multiple: int = 1,
    update: bool = False,
) -> Choice:
    """Every layer has a sparsity, and loses of each kind the groups that are worth least.

    A cut raises the sparsity of layer l by `base - amplitude * I_l` (Adapt-Pruner, section 3), never
    below what it was. I is the layer's importance, of mean 0 and largest magnitude 1; base is such that
    the network has the largest number of parameters that is not above the target.

    Args:
      view: the network.
      target: parameters.
      score: of groups within a layer, of `measures.SCORES`.
      importance: of layers, of `activations.IMPORTANCE`; "": all layers alike.
      amplitude: by which importance moves a layer's sparsity in one cut; None: the mean sparsity that is
        due in it, the largest at which no layer would grow back (0.02 in 50 cuts of 2 %, as published).
      attention: what attention loses: `kv_heads` with their query heads; `heads`, one query head of
        each KV head at a time; or `none`.
      protect: blocks at the beginning and at the end that lose nothing.
      multiple: by how many channels an MLP shrinks.
      update: whether what is left is moved to make up for what goes (`pruning.second_order`).

    Raises:
      UserError: a setting is not one; the target is below what is protected.
    """
    if attention not in ATTENTION:
        raise UserError(f"attention={attention!r} is not one of {', '.join(ATTENTION)}.")
    check_number("multiple", multiple)
    if amplitude is not None and not isinstance(amplitude, int | float):
        raise UserError(f"amplitude={amplitude!r} is no number.")
    if not isinstance(protect, Sequence) or [type(p) for p in protect] != [int, int]:
        raise UserError(
            f"protect={protect!r} is not two numbers of blocks, at the beginning and at the end: (4,2)."
        )
    layout = _Layout(view, attention, tuple(protect), multiple)
    old_B = np.zeros(layout.blocks) if view.memory is None else np.asarray(view.memory["sparsity"])
    all_gone = parameters(view.config, layout.counts(MOST * layout.free_B))
    if all_gone > (goal := view.goal or target):
        raise below_all(goal, all_gone)
    if (now := parameters(view.config, counts(view.live))) <= target:
        # The cut before had to take a whole head, and with it this one's share.
        return Choice(view.live, {"sparsity": old_B}, {"sparsity": old_B.tolist()})
    important_B = (
        centred(view.measures.importance(importance)) if importance else np.zeros(layout.blocks)
    )

    if amplitude is None:
        may_go = max(parameters(view.config, view.first) - all_gone, 1)
        amplitude = MOST * (now - target) / may_go

    def sparsity(base: float) -> np.ndarray:
        change_B = base - amplitude * important_B
        return np.clip(old_B + np.maximum(change_B, 0.0), 0.0, MOST) * layout.free_B

    def parameters_at(base: float) -> int:
        return parameters(view.config, layout.counts(sparsity(base)))

    low, high = 0.0, 2.0  # of bases: too many parameters, few enough
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if parameters_at(middle) > target else (low, middle)
    sparsity_B = sparsity(high)
    number = layout.filled(layout.counts(sparsity_B), target)
    scores = view.measures.scores(score)
    measured: dict[str, Any] = {"sparsity": sparsity_B.tolist()}
    if (loss := view.measures.loss(score)) is not None:
        measured["loss"] = loss
    if importance:
        measured["importance"] = important_B.tolist()
    live = best(view.live, scores, number)
    return Choice(live, {"sparsity": sparsity_B}, measured, made_up(view, live) if update else None)


def made_up(view: View, live: Groups) -> Callable[[Any], Any] | None:
    """The local second-order update for a cut that leaves these groups alive; None: nothing is cut."""
    names = second_order.needed(view.config, view.live, live)
    if not names:
        return None
    return lambda params: second_order.compensated(
        params, view.config, view.measures.inputs(names), view.live, live
    )


def check_number(name: str, value: Any) -> None:
    """Raises `UserError` unless a setting is a whole number of 1 or more."""
    if type(value) is not int or value < 1:
        raise UserError(f"{name}={value!r} is not a whole number of at least 1.")


def below_all(target: int, least: int) -> UserError:
    """That a strategy cannot get so far down."""
    return UserError(
        f"the target of {target:,} parameters is below the {least:,} that are left when everything is cut "
        "that this strategy may cut: raise the target, or let it cut more (its settings attention, protect)."
    )


def centred(raw_B: np.ndarray) -> np.ndarray:
    """Importance of mean 0 and largest magnitude 1 (Adapt-Pruner, section 3); all 0 if all are equal."""
    moved_B = np.asarray(raw_B, np.float64)
    moved_B = moved_B - moved_B.mean()
    largest = np.abs(moved_B).max()
    return moved_B / largest if largest > 0 else moved_B


def best(live: Groups, scores: Groups, number: Groups) -> Groups:
    """Of the groups that live, in every block that many of the highest score; of equals the first.

    Of query heads every KV head that stays keeps equally many.

    Args:
      live: bool.
      scores: of all groups; a KV head's includes its query heads.
      number: how many stay, as of `groups.counts`.
    """
    stacks = []
    for of, score, stay in zip(live.stacks, scores.stacks, number.stacks, strict=True):
        mlp_LF = highest(of.mlp_LF, score.mlp_LF, stay.mlp_LF)
        kv_heads_LK = highest(of.kv_heads_LK, score.kv_heads_LK, stay.kv_heads_LK)
        each_L1 = (stay.heads_LN // stay.kv_heads_LK)[:, None]
        heads_LKG = highest(of.heads_LKG & kv_heads_LK[..., None], score.heads_LKG, each_L1)
        stacks.append(StackGroups(mlp_LF, heads_LKG.reshape(of.heads_LN.shape), kv_heads_LK))
    residual_D = highest(live.residual_D, scores.residual_D, number.residual_D)
    return Groups(residual_D, tuple(stacks))


def highest(live: np.ndarray, score: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Of the last axis, those of the highest score that live, `number` of them."""
    order = np.argsort(np.where(live, -np.asarray(score, np.float64), np.inf), -1, kind="stable")
    rank = np.argsort(order, -1, kind="stable")
    return live & (rank < np.asarray(number)[..., None])


class _Layout:
    """Blocks as vectors, and sparsity turned into whole groups."""

    def __init__(self, view: View, attention: str, protect: tuple[int, ...], multiple: int) -> None:
        self._view, self._multiple = view, multiple
        self._now, self._kind = counts(view.live), attention
        self.blocks = len(list(blocks(view.live)))
        first, last = protect
        at_B = np.arange(self.blocks)
        self.free_B = (at_B >= first) & (at_B < self.blocks - last)

    def counts(self, sparsity_B: np.ndarray) -> Groups:
        """How many groups are left at a sparsity of each block."""
        first, now = self._view.first, self._now
        mlp_B = self._left(first, now, "mlp_LF", sparsity_B, self._multiple)
        kv_B, heads_B = _by_block(now, "kv_heads_LK"), _by_block(now, "heads_LN")
        if self._kind == "kv_heads":
            each_B = heads_B // kv_B
            kv_B = self._left(first, now, "kv_heads_LK", sparsity_B)
            heads_B = kv_B * each_B
        elif self._kind == "heads":
            each = [f.heads_LN // f.kv_heads_LK for f in first.stacks]
            each_now = [n.heads_LN // n.kv_heads_LK for n in now.stacks]
            left_B = _left(np.concatenate(each), np.concatenate(each_now), sparsity_B)
            heads_B = kv_B * left_B
        return _from_blocks(now, mlp_B, heads_B, kv_B)

    def _left(
        self, first: Groups, now: Groups, field: str, sparsity_B: np.ndarray, unit: int = 1
    ) -> np.ndarray:
        return _left(_by_block(first, field), _by_block(now, field), sparsity_B, unit)

    def filled(self, number: Groups, target: int) -> Groups:
        """Gives MLPs back what still fits below the target, so that it is met to within one channel."""
        config, now = self._view.config, self._now
        spare = target - parameters(config, number)
        size = np.concatenate([np.asarray(s.mlp_LF) for s in sizes(config, number).stacks])
        mlp_B, most_B = _by_block(number, "mlp_LF"), _by_block(now, "mlp_LF")
        first_B = _by_block(self._view.first, "mlp_LF")
        while True:
            fits_B = (mlp_B + self._multiple <= most_B) & (size * self._multiple <= spare)
            if not (fits_B & self.free_B).any():
                break
            at = int(np.argmin(np.where(fits_B & self.free_B, mlp_B / first_B, np.inf)))
            mlp_B[at] += self._multiple
            spare -= int(size[at]) * self._multiple
        heads_B, kv_B = (_by_block(number, field) for field in ("heads_LN", "kv_heads_LK"))
        return _from_blocks(number, mlp_B, heads_B, kv_B)


def _left(
    first_B: np.ndarray, now_B: np.ndarray, sparsity_B: np.ndarray, unit: int = 1
) -> np.ndarray:
    """Whole units left in each block; what is due of all together is cut, to within one unit.

    Rounded by itself a block of three to five KV heads would rarely lose one: so those blocks lose one
    that are closest to it, and a remainder stays due.
    """
    due_B = first_B * sparsity_B / unit
    gone_B, most_B = (first_B - now_B) / unit, (first_B - 1) // unit
    cut_B = np.clip(np.floor(due_B + 1e-9), np.ceil(gone_B), most_B)
    rest = int(np.floor(due_B.sum() + 1e-9) - cut_B.sum())
    if rest > 0:
        missing_B = np.where(cut_B < most_B, due_B - cut_B, -1.0)
        chosen = [i for i in np.argsort(-missing_B, kind="stable")[:rest] if missing_B[i] > 1e-9]
        cut_B[chosen] += 1
    return np.minimum(first_B - cut_B.astype(np.int64) * unit, now_B)


def _by_block(number: Groups, field: str) -> np.ndarray:
    return np.concatenate([np.asarray(getattr(of, field)) for of in number.stacks])


def _from_blocks(
    like: Groups, mlp_B: np.ndarray, heads_B: np.ndarray, kv_heads_B: np.ndarray
) -> Groups:
    stacks, begin = [], 0
    for of in like.stacks:
        end = begin + len(of.mlp_LF)
        stacks.append(StackGroups(mlp_B[begin:end], heads_B[begin:end], kv_heads_B[begin:end]))
        begin = end
    return Groups(like.residual_D, tuple(stacks))


adapt = functools.partial(layerwise, score="taylor", importance="cosine")
llm_pruner = functools.partial(layerwise, score="taylor", protect=(4, 2))
minitron = functools.partial(layerwise, score="activation")
magnitude = functools.partial(layerwise, score="magnitude")
random = functools.partial(layerwise, score="random")
