"""Texts as vectors, and which of them lie close together.

A text's vector is the mean of a causal network's last hidden states over its tokens; any network that
can be loaded here will do. Dropping what lies close together is SemDeDup's idea (arXiv 2303.09540).
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from data_mixing.text_measures import Measure
from mobilellm_jax.decoding.decoder import bucket, to_read
from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.stored import load_model, open_model
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Execution, Params
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.parallel.sharding import ROWS, WHOLE, gathered, on_each_device
from mobilellm_jax.training.checkpoint import LoadedModel

LENGTH = 1024  # tokens of a text that are looked at
AT_ONCE = 8192  # tokens that a device reads together, about
BLOCK = 4096  # kept vectors that new ones are compared with at once


# From texts to vectors.


def embed(
    texts: Sequence[str],
    loaded: LoadedModel,
    *,
    length: int = LENGTH,
    dtype: str = "float32",
    mesh: Mesh | None = None,
) -> np.ndarray:
    """The mean of the last hidden states, after the final norm, over each text's tokens.

    A BOS is read before the text and is not in the mean: its state is the same for all texts.

    Args:
      texts: none without a token.
      loaded: the network and its tokenizer.
      length: tokens of a text that count, at most; the network's context bounds them too.
      dtype: of activations and products; the mean is taken in float32.
      mesh: devices that share the texts; the first one alone if None.

    Returns:
      float32 [N, D], not normalised.

    Raises:
      UserError: a text has no token.
    """
    ready = to_read(loaded.params, loaded.model, dtype, mesh)
    devices = ready.mesh.size
    length = min(length, loaded.model.max_length - 1)
    ids = [list(map(int, some))[:length] for some in loaded.tokenizer.encode_batch(list(texts))]
    if any(not some for some in ids):
        raise UserError("a text has no token that the embedding model knows: leave it out.")
    vectors_ND = np.zeros((len(texts), loaded.model.width), np.float32)
    for numbers in _batches(list(map(len, ids)), devices):
        width = bucket(max(len(ids[number]) for number in numbers) + 1)
        rows = devices << (-(-len(numbers) // devices) - 1).bit_length()
        tokens_BT = np.full((rows, width), loaded.tokenizer.bos_id, np.int32)
        length_B = np.ones(rows, np.int32)
        for row, number in enumerate(numbers):
            length_B[row] = len(ids[number])
            tokens_BT[row, 1 : 1 + len(ids[number])] = ids[number]
        found_BD = _mean_states(
            ready.params,
            tokens_BT,
            length_B,
            model=ready.model,
            execution=ready.execution,
            mesh=ready.mesh,
        )
        vectors_ND[numbers] = np.asarray(found_BD)[: len(numbers)]
    return vectors_ND


def _batches(lengths: Sequence[int], devices: int) -> Iterator[list[int]]:
    """Texts of about equal lengths, longest first."""
    batch: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda n: -lengths[n]):
        batch.append(number)
        if len(batch) * bucket(lengths[batch[0]] + 1) >= AT_ONCE * devices:
            yield batch
            batch = []
    if batch:
        yield batch


@on_each_device(in_specs=(WHOLE, ROWS, ROWS), out_specs=WHOLE)
def _mean_states(
    params: Params,
    tokens_BT: jax.Array,
    length_B: jax.Array,
    *,
    model: ModelConfig,
    execution: Execution,
) -> jax.Array:
    """float32 [B, D] over the `length_B` tokens after the first; what comes later no token reads."""
    hidden_BTD = transformer.apply(params, model, tokens_BT, execution=execution)
    place_T = jnp.arange(tokens_BT.shape[1])
    counts_BT = (place_T >= 1) & (place_T <= length_B[:, None])
    sums_BD = jnp.where(counts_BT[..., None], hidden_BTD.astype(jnp.float32), 0.0).sum(1)
    return gathered(sums_BD / length_B[:, None])


def network(directory: epath.PathLike, length: int = LENGTH, dtype: str = "float32") -> Measure:
    """`embed` by a stored network on all devices; its weights are read when the first text comes.

    Args:
      directory: see `stored.open_model`.
      length: see `embed`.
      dtype: see `embed`.

    Raises:
      UserError: there is no such network, or it has no tokenizer.
    """
    if length < 1:
        raise UserError(f"--embedding_tokens={length}: a text needs one or more.")
    opened = open_model(directory)
    identity = {
        **opened.identity,
        "tokenizer": opened.needed_tokenizer.fingerprint,
        "tokens": length,
        "dtype": dtype,
    }
    loaded = functools.cache(lambda: load_model(directory))
    return Measure(
        identity,
        lambda texts: embed(texts, loaded(), length=length, dtype=dtype, mesh=local_mesh()),
    )


# From vectors to neighbours.


@dataclasses.dataclass(frozen=True)
class Whitening:
    """Vectors moved and turned so that over a sample they have mean 0 and about equal variances.

    States of a causal network point almost the same way whatever the text (cosines of 0.95 and more
    between texts that have nothing in common), so that cosines tell little before this (Su et al.
    2021, arXiv 2103.15316). Directions of little variance are stretched less: a thousandth of the
    largest variance is added to each, which also serves samples of fewer vectors than components.
    """

    mean_D: np.ndarray
    turn_DD: np.ndarray

    LEAST = 64  # vectors of a sample: of fewer, each would be far from all others
    RIDGE = 1e-3

    @classmethod
    def fitted(cls, sample_ND: np.ndarray) -> "Whitening":
        """The whitening of a sample.

        Raises:
          UserError: it is too small.
        """
        if len(sample_ND) < cls.LEAST:
            raise UserError(
                f"{len(sample_ND)} documents are too few to whiten their vectors (at least "
                f"{cls.LEAST}): give more of them, or --nowhiten."
            )
        centred_ND = sample_ND.astype(np.float64) - sample_ND.mean(0, dtype=np.float64)
        variance_D, axes_DD = np.linalg.eigh(centred_ND.T @ centred_ND / len(sample_ND))
        variance_D = variance_D + cls.RIDGE * variance_D.max()
        scale_D = 1 / np.sqrt(np.where(variance_D > 0, variance_D, 1))  # 0: all vectors are equal
        return cls(sample_ND.mean(0, dtype=np.float64), axes_DD * scale_D)

    def __call__(self, vectors_ND: np.ndarray) -> np.ndarray:
        """float64 [N, D]."""
        return (vectors_ND - self.mean_D) @ self.turn_DD


def unit(vectors_ND: np.ndarray) -> np.ndarray:
    """Vectors [..., D] of length 1, in float32; one of length 0 stays, and is like no other."""
    vectors_ND = vectors_ND.astype(np.float64)
    norm_N1 = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)
    return (vectors_ND / np.where(norm_N1 > 0, norm_N1, 1)).astype(np.float32)


class Kept:
    """Unit vectors that were kept, and the nearest of them to new ones.

    They lie in blocks on the host; a comparison has one block on the device at a time.
    """

    def __init__(self) -> None:
        self._blocks: list[np.ndarray] = []
        self._count = 0

    def add(self, vectors_ND: np.ndarray) -> None:
        """Keeps vectors; they are numbered as they come."""
        for vector_D in vectors_ND:
            if self._count == len(self._blocks) * BLOCK:
                self._blocks.append(np.zeros((BLOCK, len(vector_D)), np.float32))
            self._blocks[-1][self._count % BLOCK] = vector_D
            self._count += 1

    def nearest(self, vectors_CD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The largest cosine of each vector to those kept, and whose it is: [C]; -inf and -1 if none are.

        Of equally near ones it is the first.
        """
        count = len(vectors_CD)
        similarity_C, number_C = np.full(count, -np.inf, np.float32), np.full(count, -1)
        padded_CD = np.pad(vectors_CD, ((0, bucket(count) - count), (0, 0)))
        for b, block_ND in enumerate(self._blocks):
            found = _nearest(padded_CD, block_ND, min(BLOCK, self._count - b * BLOCK))
            best_C, at_C = (np.asarray(x)[:count] for x in found)
            closer_C = best_C > similarity_C
            similarity_C = np.where(closer_C, best_C, similarity_C)
            number_C = np.where(closer_C, b * BLOCK + at_C, number_C)
        return similarity_C, number_C


@jax.jit
def _nearest(new_CD: jax.Array, kept_ND: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    cosine_CN = jnp.einsum("CD,ND->CN", new_CD, kept_ND, precision=jax.lax.Precision.HIGHEST)
    cosine_CN = jnp.where(jnp.arange(len(kept_ND)) < count, cosine_CN, -jnp.inf)
    return cosine_CN.max(1), cosine_CN.argmax(1)
