"""EfficientLLM (arXiv 2502.06663): the kind of group that is worth least loses one, in all layers at once.

The network stays one of equal layers, so that its shape after a while is one that could have been
chosen by hand; here the data choose it. The paper's formula is not published: kinds are compared by
their saliency per parameter, the mean over layers of the least group's, because its figure shows the
curves of all kinds lying on each other although their groups differ in size by a factor of a hundred.
"""

from collections.abc import Sequence

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.pruning.groups import Groups, StackGroups, counts, parameters, sizes
from mobilellm_jax.pruning.strategies import Choice, View, below_all, check_number, made_up

TYPES = ("kv_heads", "heads", "mlp", "residual")


def efficient(
    view: View,
    target: int,
    *,
    score: str = "taylor",
    types: Sequence[str] = TYPES,
    unit: int = 1,
    update: bool = False,
) -> Choice:
    """Removes units of the least kind, one after another, until the target is met.

    A unit that would lead below the goal of the whole schedule waits for ever while a smaller one does not,
    so that the goal is met to within the smallest.

    A unit is, in every layer: `kv_heads`, a KV head with its query heads; `heads`, one query head of each
    KV head; `mlp`, `unit` channels of the MLP. Of `residual` it is `unit` channels of the stream.

    Args:
      view: the network; its blocks have equal widths.
      target: parameters.
      score: of groups, of `measures.SCORES`.
      types: kinds that may be cut.
      unit: channels that go at once.
      update: whether what is left is moved to make up for what goes: the paper's variant B
        (`pruning.second_order`).

    Raises:
      UserError: a kind is not one of `TYPES`; the target is below what is left when all may go.
    """
    if unknown := set(types) - set(TYPES):
        raise UserError(f"types={', '.join(unknown)}: choose of {', '.join(TYPES)}.")
    check_number("unit", unit)
    live, number, order = view.live, counts(view.live), []
    if parameters(view.config, number) <= target:
        return Choice(live)
    scores, finite = view.measures.scores(score), dict[str, float]()
    while parameters(view.config, number) > target:
        size = sizes(view.config, number)
        worth = {kind: _worth(kind, live, scores, number, size, unit) for kind in types}
        finite = {kind: value for kind, value in worth.items() if np.isfinite(value)}
        if not finite:
            raise below_all(target, parameters(view.config, number))
        spare = parameters(view.config, number) - view.goal
        freed = {kind: _freed(kind, number, size, unit) for kind in finite}
        least = min(freed.values())
        kind = min((k for k in finite if freed[k] <= max(spare, least)), key=lambda k: finite[k])
        live = without_least(kind, live, scores, unit)
        number = counts(live)
        order.append(kind)
    saliency = {f"saliency/{kind}": value for kind, value in finite.items()}
    change = made_up(view, live) if update else None
    return Choice(live, None, {"types": order, **saliency}, change)


def _worth(
    kind: str, live: Groups, scores: Groups, number: Groups, size: Groups, unit: int
) -> float:
    """Saliency per parameter of a kind's next unit; infinite where there is none to spare."""
    if kind == "residual":
        if int(number.residual_D) <= unit:
            return float("inf")
        least = _least(live.residual_D, scores.residual_D, unit)
        return float(least.mean() / size.residual_D)
    found = []
    for of, score, each, left in zip(
        live.stacks, scores.stacks, size.stacks, number.stacks, strict=True
    ):
        if kind == "mlp":
            if (left.mlp_LF <= unit).any():
                return float("inf")
            found.append(_least(of.mlp_LF, score.mlp_LF, unit).mean(-1) / each.mlp_LF)
        elif kind == "kv_heads":
            if (left.kv_heads_LK <= 1).any():
                return float("inf")
            value_LK = np.where(of.kv_heads_LK, score.kv_heads_LK, np.inf)
            heads = left.heads_LN // left.kv_heads_LK
            found.append(value_LK.min(-1) / (each.kv_heads_LK + heads * each.heads_LN))
        else:
            if (left.heads_LN <= left.kv_heads_LK).any():
                return float("inf")
            least_LK = np.where(of.heads_LKG, score.heads_LKG, np.inf).min(-1)
            mean_L = np.where(of.kv_heads_LK, least_LK, 0).sum(-1) / left.kv_heads_LK
            found.append(mean_L / each.heads_LN)
    return float(np.concatenate(found).mean())


def _freed(kind: str, number: Groups, size: Groups, unit: int) -> int:
    """Parameters of a kind's next unit."""
    if kind == "residual":
        return unit * int(size.residual_D)
    found = 0
    for each, left in zip(size.stacks, number.stacks, strict=True):
        if kind == "mlp":
            found += unit * int(each.mlp_LF.sum())
        elif kind == "kv_heads":
            heads_L = left.heads_LN // left.kv_heads_LK
            found += int((each.kv_heads_LK + heads_L * each.heads_LN).sum())
        else:
            found += int((left.kv_heads_LK * each.heads_LN).sum())
    return found


def without_least(kind: str, live: Groups, scores: Groups, unit: int) -> Groups:
    """What lives without the least unit of a kind; of equals the last goes."""
    if kind == "residual":
        return Groups(_fewer(live.residual_D, scores.residual_D, unit), live.stacks)
    stacks = []
    for of, score in zip(live.stacks, scores.stacks, strict=True):
        mlp_LF, heads_LN, kv_heads_LK = of.mlp_LF, of.heads_LN, of.kv_heads_LK
        if kind == "mlp":
            mlp_LF = _fewer(mlp_LF, score.mlp_LF, unit)
        elif kind == "kv_heads":
            kv_heads_LK = _fewer(kv_heads_LK, score.kv_heads_LK, 1)
            heads_LN = (of.heads_LKG & kv_heads_LK[..., None]).reshape(heads_LN.shape)
        else:
            heads_LN = _fewer(of.heads_LKG, score.heads_LKG, 1).reshape(heads_LN.shape)
        stacks.append(StackGroups(mlp_LF, heads_LN, kv_heads_LK))
    return Groups(live.residual_D, tuple(stacks))


def _least(live: np.ndarray, score: np.ndarray, unit: int) -> np.ndarray:
    """Of the last axis, the `unit` least scores of those that live, rising."""
    value = np.where(live, score, np.inf)
    value.partition(unit - 1, -1)
    return np.sort(value[..., :unit], -1)


def _fewer(live: np.ndarray, score: np.ndarray, unit: int) -> np.ndarray:
    """Of the last axis, what lives without the `unit` least; a cut of one channel sorts nothing."""
    value, edge = np.where(live, score, np.inf), _least(live, score, unit)[..., -1:]
    below, equal = value < edge, value == edge
    behind = np.cumsum(equal[..., ::-1], -1)[..., ::-1]  # equals from here to the end
    last = behind <= unit - below.sum(-1, keepdims=True)
    return live & ~below & ~(equal & last)
