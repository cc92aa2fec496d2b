"""What is measured while a network is trained: bits per byte of held-out rows, and RankMe."""

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.parallel.sharding import put_rows
from mobilellm_jax.training.metrics import per_source
from mobilellm_jax.training.objectives import Batch, Network, next_token
from mobilellm_jax.training.step import sums


def evaluate(
    params: Any,
    between: Callable[[], None] = lambda: None,
    *,
    network: Network,
    heldout: Mapping[int, Contexts],
    names: tuple[str, ...],
    rows: int,
    batch_rows: int,
    piece_bytes_V: jax.Array,
    mesh: jax.sharding.Mesh,
) -> dict[str, float]:
    """Loss and bits per byte on the first `rows` held-out rows of each source, overall and per source.

    And RankMe of the output embedding. `between` is called before each batch.
    """
    totals: dict[str, Any] = {}
    for source, split in heldout.items():
        for tokens in batches(split, range(min(rows, len(split))), batch_rows, network.bos_id):
            between()
            numbers = np.full(len(tokens), source, np.int32)
            batch = put_rows({"tokens": tokens, "source": numbers}, mesh)
            arrays = params, batch, piece_bytes_V
            part = _sums(*arrays, network=network, sources=len(names), mesh=mesh)
            for name, value in jax.device_get(part).items():
                totals[name] = totals.get(name, 0.0) + value
    found = per_source(totals, names) if totals else {}
    return found | {"rank_me": rank_me(params, network.model)}


def batches(split: Contexts, part: range, batch_rows: int, bos_id: int) -> Iterator[np.ndarray]:
    """This process's part of each batch of consecutive rows of a split, int32 [rows, row_length + 1].

    The last batch is filled up with rows of BOS alone, which hold no target.

    Args:
      split: rows.
      part: of them that is read.
      batch_rows: of a batch, over all processes.
      bos_id: token that begins a document.
    """
    mine, process = batch_rows // jax.process_count(), jax.process_index()
    for first in part[::batch_rows]:
        tokens = np.full((mine, split.row_length + 1), bos_id, np.int32)
        begin = first + process * mine
        if begin < part.stop:
            read = split.read(np.arange(begin, min(begin + mine, part.stop)))
            tokens[: len(read)] = read
        yield tokens


def rank_me(params: Any, model: ModelConfig) -> float:
    """The effective rank of the output embedding (RankMe; MobileLLM-R1, appendix B).

    `exp(-sum_k p_k log p_k)` with `p_k = s_k / sum(s) + 1e-7` of the singular values s: from 1, for a
    matrix of one direction, to its width.

    Args:
      params: of the network, wherever they live.
      model: the network.
    """
    gram_DD = np.asarray(jax.device_get(_gram(params, model=model)), np.float64)
    singular_D = np.sqrt(np.maximum(np.linalg.eigvalsh(gram_DD), 0.0))
    share_D = singular_D / max(singular_D.sum(), np.finfo(np.float64).tiny) + 1e-7
    return float(np.exp(-(share_D * np.log(share_D)).sum()))


@functools.partial(jax.jit, static_argnames="model")
def _gram(params: Any, *, model: ModelConfig) -> jax.Array:
    matrix_DV = transformer.unembedding(params, model)
    gram_DD = jnp.einsum("DV,EV->DE", matrix_DV, matrix_DV, precision=jax.lax.Precision.HIGHEST)
    mesh = jax.sharding.get_abstract_mesh()
    return gram_DD if mesh.empty else jax.lax.with_sharding_constraint(gram_DD, P())


@functools.partial(jax.jit, static_argnames=("network", "sources", "mesh"))
def _sums(
    params: Any,
    batch: Batch,
    piece_bytes_V: jax.Array,
    *,
    network: Network,
    sources: int,
    mesh: jax.sharding.Mesh,
) -> dict[str, jax.Array]:
    found = sums(next_token(params, batch, network), batch, piece_bytes_V, sources)
    whole = NamedSharding(mesh, P())  # in every process
    return jax.lax.with_sharding_constraint(found, whole)
