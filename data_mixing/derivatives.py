"""How losses change along directions in weight space: what training on a token does to a probe.

One SGD step on a sample with gradient g lowers the loss of a probe with gradient v by about v.g per
unit of learning rate. So v.g is the sample's benefit: positive means helpful. (Equations 2 and 7 of
MobileLLM-R1, arXiv 2509.24945, have opposite signs; this is the one under which "keep what is
positive" keeps what helps.)

v.g is the derivative of the sample's loss along v: forward mode gives it for every token of every
row at once, and no sample's gradient is ever stored (`embedding_slopes` does with one backward pass
where the embeddings alone are asked about). Products of a sample's own gradient are needed
for few samples only, those that stand for the curvature (`datainf`); their gradients exist one
group at a time.

Weights are a flat mapping from path to array. The output embedding is a weight by itself, `output`
[D, V], also where it is the transpose of the input's.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from data_mixing.embedding_slopes import EMBEDDINGS, embedding_slopes
from mobilellm_jax.costs.flops import count
from mobilellm_jax.errors import UserError
from mobilellm_jax.leaves import flat, nested
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.loss import over_chunks
from mobilellm_jax.parallel.sharding import (
    BATCH_AXES,
    ROWS,
    WHOLE,
    batch_sharding,
    on_each_device,
    put_rows,
)
from mobilellm_jax.training.objectives import Network, split_rows

Weights = dict[str, jax.Array]
LAYERS = {"embedding": ("embedding",), "output": ("output",), "all": ()}
DAMPING = 0.1  # of the mean squared entry of the samples' gradients (DataInf, arXiv 2310.00902)


@dataclasses.dataclass(frozen=True)
class Differentiated:
    """A network, and the weights by which it is differentiated, whole on every device of a mesh."""

    chosen: Weights
    rest: Weights
    network: Network
    mesh: Mesh
    batch_rows: int  # of one call of a program, over all devices
    group: int = 1  # rows whose own gradients exist at once on a device


def differentiated(
    params: transformer.Params,
    network: Network,
    layers: str,
    mesh: Mesh,
    batch_rows: int,
    group: int = 1,
) -> Differentiated:
    """Chooses the weights by which losses are differentiated.

    Args:
      params: of the network, float32.
      network: with attention in plain XLA: kernels know no forward mode.
      layers: `embedding`, `output`, `all`, or several joined by `+`.
      mesh: devices that share the rows.
      batch_rows: rows of one call of a program; a multiple of the devices times `group`.
      group: see `Differentiated`.

    Raises:
      UserError: `layers` names something else, or the rows cannot be split.
    """
    weights = {k: v for k, v in flat(params).items() if k != "head"}
    weights["output"] = transformer.unembedding(params, network.model)
    names: set[str] = set()
    for layer in layers.split("+"):
        if layer not in LAYERS:
            raise UserError(f"layers={layers}: {layer!r} is not {', '.join(LAYERS)}.")
        names |= set(LAYERS[layer] or weights)
    if batch_rows % (mesh.size * group):
        raise UserError(
            f"a batch of {batch_rows} rows cannot be split over {mesh.size} devices in groups of {group}: "
            "make it a multiple of their product."
        )
    whole = jax.device_put(weights, jax.sharding.NamedSharding(mesh, WHOLE))
    chosen = {name: leaf for name, leaf in whole.items() if name in names}
    rest = {name: leaf for name, leaf in whole.items() if name not in names}
    return Differentiated(chosen, rest, network, mesh, batch_rows, group)


def params_of(weights: Mapping[str, jax.Array], model: ModelConfig) -> transformer.Params:
    """Weights as the network takes them; of a tied embedding the input's."""
    params = nested({name: leaf for name, leaf in weights.items() if name != "output"})
    return params if model.tied else {**params, "head": weights["output"]}


def token_losses(
    weights: Mapping[str, jax.Array], tokens: jax.Array, network: Network
) -> tuple[jax.Array, jax.Array]:
    """What every target costs, differentiable in both directions, and whether it counts.

    Args:
      weights: all of the network's.
      tokens: int [B, T + 1], rows as they are stored.
      network: what is run.

    Returns:
      float32 [B, T], nats, 0 where a target does not count; float32 [B, T], 1 where it does.
    """
    rows = split_rows(tokens, network.bos_id, network.eos_id)
    params = params_of(weights, network.model)
    hidden_BTD = transformer.apply(
        params, network.model, rows.inputs_BT, rows.segment_ids_BT, network.execution
    )

    @jax.checkpoint
    def of_chunk(hidden_BND: jax.Array, targets_BN: jax.Array) -> jax.Array:
        output_DV = weights["output"].astype(hidden_BND.dtype)
        logits_BNV = jnp.einsum(
            "BND,DV->BNV", hidden_BND, output_DV, preferred_element_type=jnp.float32
        )
        at_target_BN = jnp.take_along_axis(logits_BNV, targets_BN[..., None], axis=-1)[..., 0]
        return jax.nn.logsumexp(logits_BNV, axis=-1) - at_target_BN

    nll_BT = over_chunks(of_chunk, network.loss_chunks, hidden_BTD, rows.targets_BT)
    return nll_BT * rows.weight_BT, rows.weight_BT


@on_each_device(in_specs=(WHOLE, WHOLE, ROWS), out_specs=WHOLE)
def _summed_gradient(
    chosen: Weights, rest: Weights, tokens: jax.Array, *, network: Network
) -> tuple[Weights, jax.Array]:
    def total(chosen: Weights) -> tuple[jax.Array, jax.Array]:
        nll_BT, weight_BT = token_losses({**rest, **chosen}, tokens, network)
        return nll_BT.sum(), weight_BT.sum()

    return jax.lax.psum(jax.grad(total, has_aux=True)(chosen), BATCH_AXES)


def mean_gradient(of: Differentiated, rows: np.ndarray) -> Weights:
    """The gradient of the mean loss of all targets of some rows: of a probe set, v.

    Args:
      of: the network.
      rows: int32 [n, T + 1].

    Raises:
      UserError: the rows hold no target.
    """
    sums, targets = None, 0.0
    for batch in batches(of, rows):
        gradient, found = _summed_gradient(of.chosen, of.rest, batch, **_static(of))
        sums = gradient if sums is None else jax.tree.map(jnp.add, sums, gradient)
        targets += float(found)
    if not targets:
        raise UserError("a probe set holds no token to predict: its documents are empty.")
    return jax.tree.map(lambda g: g / targets, sums)


@on_each_device(in_specs=(WHOLE, WHOLE, WHOLE, ROWS), out_specs=ROWS)
def _slopes(
    chosen: Weights, rest: Weights, directions: Weights, tokens: jax.Array, *, network: Network
) -> jax.Array:
    def losses(chosen: Weights) -> jax.Array:
        return token_losses({**rest, **chosen}, tokens, network)[0]

    def along(direction: Weights) -> jax.Array:
        return jax.jvp(losses, (chosen,), (direction,))[1]

    return jnp.moveaxis(jax.vmap(along)(directions), 0, 1)


def slopes(
    of: Differentiated, directions: Sequence[Weights], rows: np.ndarray, by_target: bool = True
) -> Iterator[np.ndarray]:
    """The derivative of every target's loss along each direction, batch by batch.

    Args:
      of: the network.
      directions: K, each of the shapes of the chosen weights.
      rows: int32 [n, T + 1].
      by_target: False where sums over documents alone are looked at: then they may come in other
        shares from their tokens, and cost less (see `embedding_slopes`).

    Yields:
      float32 [b, K, T], the rows in order.
    """
    program = slopes_program(of, by_target)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *directions)
    done = 0
    for batch in batches(of, rows):
        found = program(of.chosen, of.rest, stacked, batch, **_static(of))
        yield np.asarray(jax.device_get(found))[: len(rows) - done]
        done += of.batch_rows


def slopes_program(of: Differentiated, by_target: bool) -> Callable[..., Any]:
    """The program of `slopes`."""
    return embedding_slopes if not by_target and of.chosen.keys() <= EMBEDDINGS else _slopes


@on_each_device(in_specs=(WHOLE, WHOLE, ROWS), out_specs=(ROWS, ROWS))
def row_losses(
    chosen: Weights, rest: Weights, tokens: jax.Array, *, network: Network
) -> tuple[jax.Array, jax.Array]:
    """The program of `losses`."""
    return token_losses({**rest, **chosen}, tokens, network)


def losses(of: Differentiated, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What every target of some rows costs, and whether it counts: float32 [n, T] each."""
    found = [row_losses(of.chosen, of.rest, batch, **_static(of)) for batch in batches(of, rows)]
    nll, weight = (
        np.concatenate([np.asarray(x) for x in part]) for part in zip(*found, strict=True)
    )
    return nll[: len(rows)], weight[: len(rows)]


# DataInf (Kwon et al. 2023, arXiv 2310.00902, equation 5), a block at a time: a block is a tensor of
# one layer. With samples i of gradients g_i in a block of d weights,
#   damping = 0.1 * mean_i(|g_i|^2) / d
#   H^-1 v  ~ mean_i((v - g_i (v.g_i) / (damping + |g_i|^2)) / damping):
# the inverse of a mean is replaced by a mean of inverses, which are known in closed form.


def _blocks(leaf: jax.Array, name: str) -> jax.Array:
    """A weight as [blocks, entries]: stacks hold a block for each layer."""
    return leaf.reshape(leaf.shape[0] if name.startswith("stack_") else 1, -1)


def _row_gradients(
    chosen: Weights, rest: Weights, tokens: jax.Array, network: Network
) -> dict[str, jax.Array]:
    """Gradient of the mean loss of each row, as blocks: [rows, blocks, entries] by name."""

    def gradient(row: jax.Array) -> Weights:
        def mean(chosen: Weights) -> jax.Array:
            nll_BT, weight_BT = token_losses({**rest, **chosen}, row[None], network)
            return nll_BT.sum() / jnp.maximum(weight_BT.sum(), 1.0)

        return {name: _blocks(leaf, name) for name, leaf in jax.grad(mean)(chosen).items()}

    return jax.vmap(gradient)(tokens)


def _grouped(tokens: jax.Array, group: int) -> jax.Array:
    return tokens.reshape(-1, group, *tokens.shape[1:])


@on_each_device(in_specs=(WHOLE, WHOLE, WHOLE, ROWS), out_specs=ROWS)
def _products(
    chosen: Weights,
    rest: Weights,
    gradients: Weights,
    tokens: jax.Array,
    *,
    network: Network,
    group: int,
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Of each row's gradient: |g|^2 [n, blocks] and v.g [n, K, blocks], by name."""
    v_KLE = {name: jax.vmap(lambda x, n=name: _blocks(x, n))(g) for name, g in gradients.items()}

    def of_group(rows: jax.Array) -> dict[str, tuple[jax.Array, jax.Array]]:
        found = _row_gradients(chosen, rest, rows, network)
        return {
            name: (jnp.square(g_MLE).sum(-1), jnp.einsum("MLE,KLE->MKL", g_MLE, v_KLE[name]))
            for name, g_MLE in found.items()
        }

    found = jax.lax.map(of_group, _grouped(tokens, group))
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)


@on_each_device(in_specs=(WHOLE, WHOLE, ROWS, ROWS), out_specs=WHOLE)
def _weighted_sum(
    chosen: Weights,
    rest: Weights,
    factors: dict[str, jax.Array],
    tokens: jax.Array,
    *,
    network: Network,
    group: int,
) -> Weights:
    """Sum over rows of factor [n, K, blocks] times gradient, [K, ...] by name."""

    def add(sums: Any, part: Any) -> tuple[Any, None]:
        rows, by_name = part
        found = _row_gradients(chosen, rest, rows, network)
        return {
            name: sums[name] + jnp.einsum("MKL,MLE->KLE", by_name[name], g_MLE)
            for name, g_MLE in found.items()
        }, None

    def zeros(name: str) -> jax.Array:
        return jnp.zeros((factors[name].shape[1], *_blocks(chosen[name], name).shape))

    parts = jax.tree.map(lambda x: _grouped(x, group), (tokens, factors))
    sums, _ = jax.lax.scan(add, {name: zeros(name) for name in chosen}, parts)
    shaped = {name: x.reshape(x.shape[0], *chosen[name].shape) for name, x in sums.items()}
    return jax.lax.psum(shaped, BATCH_AXES)


def datainf(
    of: Differentiated,
    gradients: Sequence[Weights],
    rows: np.ndarray,
    damping: float = DAMPING,
    told: Callable[[int], Any] = lambda rows: None,
) -> list[Weights]:
    """Gradients of probes, times the inverse curvature as DataInf has it.

    Args:
      of: the network.
      gradients: of K probes.
      rows: int32 [n, T + 1], a sample each, that stand for the training data; they are read twice.
      damping: times the mean squared entry of the gradients of a block.
      told: is called with the number of rows of each batch that is done.

    Returns:
      K directions of the shapes of the chosen weights.

    Raises:
      UserError: in some block all gradients are zero.
    """
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *gradients)
    settings = {**_static(of), "group": of.group}
    found = []
    for batch in batches(of, rows):
        found.append(jax.device_get(_products(of.chosen, of.rest, stacked, batch, **settings)))
        told(of.batch_rows // 2)
    factors, dampings = {}, {}
    for name, leaf in of.chosen.items():
        squared_NL = np.concatenate([part[name][0] for part in found]).astype(np.float64)
        dots_NKL = np.concatenate([part[name][1] for part in found]).astype(np.float64)
        entries = _blocks(leaf, name).shape[1]
        damping_L = damping * squared_NL[: len(rows)].mean(axis=0) / entries
        if not damping_L.all():
            raise UserError(
                f"DataInf cannot be had for the weights {name}: none of the {len(rows)} rows has a "
                "gradient there, or the damping is 0; leave it out of the layers, or give more rows or "
                "damping."
            )
        factors[name] = (dots_NKL / (damping_L + squared_NL)[:, None]).astype(np.float32)
        dampings[name] = damping_L
    sums: Any = None
    for i, batch in enumerate(batches(of, rows)):
        mine = slice(i * of.batch_rows, (i + 1) * of.batch_rows)
        by_name = put_rows({name: factor[mine] for name, factor in factors.items()}, of.mesh)
        part = _weighted_sum(of.chosen, of.rest, by_name, batch, **settings)
        sums = part if sums is None else jax.tree.map(jnp.add, sums, part)
        told(of.batch_rows - of.batch_rows // 2)

    def direction(name: str, v: jax.Array, k: int) -> jax.Array:
        shape_L = (-1,) + (1,) * (v.ndim - 1) if name.startswith("stack_") else (1,) * v.ndim
        scale = jnp.asarray(1 / dampings[name], jnp.float32).reshape(shape_L)
        return scale * (v - sums[name][k] / len(rows))

    return [{n: direction(n, v, k) for n, v in g.items()} for k, g in enumerate(gradients)]


def batches(of: Differentiated, rows: np.ndarray) -> Iterator[jax.Array]:
    """Rows on the devices, the last batch filled up with rows of BOS, which hold no target."""
    for first in range(0, len(rows), of.batch_rows):
        batch = np.full((of.batch_rows, rows.shape[1]), of.network.bos_id, np.int32)
        part = rows[first : first + of.batch_rows]
        batch[: len(part)] = part
        yield put_rows({"tokens": batch}, of.mesh)["tokens"]


def _static(of: Differentiated) -> dict[str, Any]:
    return {"network": of.network, "mesh": of.mesh}


def network_of(model: ModelConfig, bos_id: int, eos_id: int, dtype: str, chunks: int) -> Network:
    """A network as it is differentiated forwards: with attention in plain XLA."""
    execution = transformer.Execution(dtype, attention="blocks")
    return Network(model, execution, bos_id, eos_id, chunks)


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs a row: of a probe's gradient, of DataInf for all probes, of slopes along all directions."""

    gradient: float
    datainf: float
    slopes: float


def flops(of: Differentiated, program: Any, row_length: int) -> float:
    """What a program of chosen weights, the rest and rows computes for a row, counted from its jaxpr."""
    tokens = _tokens(of, row_length)
    return (
        count(program.trace(of.chosen, of.rest, tokens, **_static(of)).jaxpr).total / of.batch_rows
    )


def _tokens(of: Differentiated, row_length: int) -> jax.ShapeDtypeStruct:
    """What `batches` gives: where it lies as well, so that no program is traced twice."""
    shape = of.batch_rows, row_length + 1
    return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=batch_sharding(of.mesh))


def cost(
    of: Differentiated, directions: int, row_length: int, by_target: bool = True, probes: int = 0
) -> Cost:
    """What the programs above compute for a row, counted from their jaxprs.

    Args:
      of: the network.
      directions: of the slopes.
      row_length: of rows.
      by_target: see `slopes`.
      probes: whose gradients DataInf has; 0: there is no DataInf.
    """
    tokens = _tokens(of, row_length)

    def stacked(number: int) -> Weights:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct((number, *x.shape), x.dtype, sharding=x.sharding),
            of.chosen,
        )

    def trace(program: Any, along: Any, **settings: Any) -> Any:
        return program.trace(of.chosen, of.rest, along, tokens, **settings)

    def of_row(traced: Any) -> float:
        return count(traced.jaxpr).total / of.batch_rows

    datainf = 0.0
    if probes:
        grouped = {**_static(of), "group": of.group}
        products = trace(_products, stacked(probes), **grouped)
        factors = {
            name: jax.ShapeDtypeStruct(dots.shape, dots.dtype, sharding=tokens.sharding)
            for name, (_, dots) in products.out_info.items()
        }
        sums = trace(_weighted_sum, factors, **grouped)
        datainf = of_row(products) + of_row(sums)
    slopes = trace(slopes_program(of, by_target), stacked(directions), **_static(of))
    return Cost(
        gradient=flops(of, _summed_gradient, row_length),
        datainf=datainf,
        slopes=of_row(slopes),
    )
