"""Ways to score rows: each gives values to every target, columns of which `influence` writes.

Gradients at a checkpoint are what MobileLLM-R1 scores with. The others are cheap, and are there to be
beaten: the loss, the likeness to the probes of hidden states, and that of n-grams.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from jax.sharding import Mesh

from data_mixing import derivatives
from data_mixing.embeddings import unit
from mobilellm_jax.data.packing import counted, token_ids
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model import transformer
from mobilellm_jax.parallel.sharding import ROWS, WHOLE, on_each_device
from mobilellm_jax.training.objectives import Network, split_rows

Values = Callable[[np.ndarray], np.ndarray]  # int32 rows [n, T + 1] -> float [n, K, T]
BUCKETS = 1 << 16  # of hashed n-grams


@dataclasses.dataclass(frozen=True)
class Settings:
    """How networks are run and differentiated.

    Attributes:
      layers: weights by which losses are differentiated, see `derivatives.differentiated`.
      dtype: of activations.
      batch_rows: rows of one call of a program, over all devices.
      own_gradients: rows whose own gradients exist at once on a device.
      loss_chunks: parts of a row whose logits exist at once.
      damping: of DataInf.
    """

    layers: str = "embedding+output"
    dtype: str = "float32"
    batch_rows: int = 8
    own_gradients: int = 1
    loss_chunks: int = 1
    damping: float = derivatives.DAMPING


class Scorer(Protocol):
    """A way to score rows; `open` does what has to be done once and may take long."""

    @property
    def name(self) -> str:
        """Of its folder of parts."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the K values."""

    def open(self, told: Callable[[int], Any]) -> tuple[Values, float, float]:
        """The function, FLOPs spent here, and FLOPs of a row; `told` counts rows read meanwhile."""

    @property
    def rows_before(self) -> int:
        """How many rows `open` tells of."""


@dataclasses.dataclass(frozen=True)
class Gradients:
    """Slopes along the probes' gradients at one checkpoint, plain and as DataInf has them.

    Attributes:
      path: of the checkpoint or Hugging Face folder.
      label: of the checkpoint in column names, its step.
      probes: rows of each capability.
      train: rows that stand for the training data in DataInf; None: no DataInf.
      by_target: whether values of single targets are looked at, or sums over documents alone.
    """

    path: epath.Path
    label: str
    probes: Mapping[str, np.ndarray]
    train: np.ndarray | None
    settings: Settings
    mesh: Mesh
    by_target: bool = False

    @property
    def name(self) -> str:
        """See `Scorer`."""
        return f"gradients-{'-'.join(self.probes)}-{self.label}"

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Scorer`."""
        kinds = ("gradient",) if self.train is None else ("gradient", "datainf")
        return tuple(f"{kind}/{c}/{self.label}" for kind in kinds for c in self.probes)

    @property
    def rows_before(self) -> int:
        """See `Scorer`."""
        return sum(map(len, self.probes.values())) + (0 if self.train is None else len(self.train))

    def open(self, told: Callable[[int], Any]) -> tuple[Values, float, float]:
        """See `Scorer`."""
        of = opened(self.path, self.settings, self.mesh)
        gradients = []
        for rows in self.probes.values():
            gradients.append(derivatives.mean_gradient(of, rows))
            told(len(rows))
        directions = list(gradients)
        if self.train is not None:
            directions += derivatives.datainf(
                of, gradients, self.train, self.settings.damping, told
            )
        row_length = _row_length(self.probes)
        inverted = 0 if self.train is None else len(gradients)
        cost = derivatives.cost(of, len(directions), row_length, self.by_target, inverted)
        before = cost.gradient * sum(map(len, self.probes.values()))
        before += cost.datainf * (0 if self.train is None else len(self.train))

        def values(tokens: np.ndarray) -> np.ndarray:
            return np.concatenate(list(derivatives.slopes(of, directions, tokens, self.by_target)))

        return values, before, cost.slopes


@dataclasses.dataclass(frozen=True)
class States:
    """The loss, and the likeness of hidden states to the probes': cosines with their mean state.

    What is common to the probes of all capabilities and to rows of what is scored, as one more kind, is taken
    off before, or all texts would be alike.
    """

    path: epath.Path
    probes: Mapping[str, np.ndarray]
    rows: np.ndarray
    settings: Settings
    mesh: Mesh

    name = "states"
    rows_before = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Scorer`."""
        return ("loss", *(f"embedding/{capability}" for capability in self.probes))

    def open(self, told: Callable[[int], Any]) -> tuple[Values, float, float]:
        """See `Scorer`."""
        of = opened(self.path, self.settings, self.mesh)

        def mean_D(rows: np.ndarray) -> np.ndarray:
            states_BTD, weight_BT = _all_states(of, rows)
            return (states_BTD * weight_BT[..., None]).sum((0, 1)) / weight_BT.sum()

        mean_KD = np.stack(list(map(mean_D, self.probes.values())))
        centre_D = np.stack([*mean_KD, mean_D(self.rows)]).mean(0)
        toward_KD = unit(mean_KD - centre_D)

        def values(tokens: np.ndarray) -> np.ndarray:
            nll_BT, weight_BT = derivatives.losses(of, tokens)
            states_BTD, _ = _all_states(of, tokens)
            likeness_BKT = np.einsum("BTD,KD->BKT", unit(states_BTD - centre_D), toward_KD)
            return np.concatenate([nll_BT[:, None], likeness_BKT * weight_BT[:, None]], axis=1)

        row_length = _row_length(self.probes)
        states, losses = (
            derivatives.flops(of, f, row_length) for f in (_states, derivatives.row_losses)
        )
        before = sum(map(len, (self.rows, *self.probes.values())))
        return values, states * before, states + losses


@dataclasses.dataclass(frozen=True)
class Ngrams:
    """How much likelier n-grams of tokens are among the probes than in what is scored.

    Hashed unigrams and bigrams, log of the ratio of their shares, as DSIR weighs documents (Xie et
    al. 2023, arXiv 2302.03169, section 3). The few rows of a probe lack most n-grams: what they have is
    mixed with as many of the shares in what is scored, so that one that no probe has is never likelier.
    """

    probes: Mapping[str, np.ndarray]
    all_rows: np.ndarray
    bos_id: int
    eos_id: int

    name = "ngrams"
    rows_before = 0

    @property
    def columns(self) -> tuple[str, ...]:
        """See `Scorer`."""
        return tuple(f"ngrams/{capability}" for capability in self.probes)

    def open(self, told: Callable[[int], Any]) -> tuple[Values, float, float]:
        """See `Scorer`."""
        background = self._counts(self.all_rows) + 1.0
        background /= background.sum()
        ratios = []
        for rows in self.probes.values():
            counts = self._counts(rows)
            prior = min(BUCKETS, counts.sum())
            shares = (counts + prior * background) / (counts.sum() + prior)
            ratios.append(np.log(shares / background))

        def values(tokens: np.ndarray) -> np.ndarray:
            grams, weight_NT = self._grams(tokens)
            scores = [sum(ratio[g] for g in grams) * weight_NT for ratio in ratios]
            return np.stack(scores, axis=1)

        return values, 0.0, 0.0

    def _grams(self, tokens: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
        """Buckets of the unigram and the bigram that end at each target, [N, T] each."""
        weight_NT = counted(tokens, self.bos_id, self.eos_id)
        ids = token_ids(tokens).astype(np.uint64)
        unigram, bigram = ids[:, 1:], ids[:, :-1] * np.uint64(0x9E3779B1) + ids[:, 1:]
        mixed = [(x * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(48) for x in (unigram, ~bigram)]
        return [(x % BUCKETS).astype(np.int64) for x in mixed], weight_NT

    def _counts(self, tokens: np.ndarray) -> np.ndarray:
        grams, weight_NT = self._grams(tokens)
        return np.sum([np.bincount(g[weight_NT], minlength=BUCKETS) for g in grams], axis=0)


def opened(path: epath.Path, settings: Settings, mesh: Mesh) -> derivatives.Differentiated:
    """A stored network as `Settings` have it differentiated.

    Raises:
      UserError: there is no such network, or it cannot be differentiated so.
    """
    stored = open_model(path)
    tokenizer = stored.needed_tokenizer
    network = derivatives.network_of(
        stored.model, tokenizer.bos_id, tokenizer.eos_id, settings.dtype, settings.loss_chunks
    )
    params = stored.params(dtype="float32")
    return derivatives.differentiated(
        params, network, settings.layers, mesh, settings.batch_rows, settings.own_gradients
    )


@on_each_device(in_specs=(WHOLE, WHOLE, ROWS), out_specs=(ROWS, ROWS))
def _states(
    chosen: derivatives.Weights,
    rest: derivatives.Weights,
    tokens: jax.Array,
    *,
    network: Network,
) -> tuple[jax.Array, jax.Array]:
    rows = split_rows(tokens, network.bos_id, network.eos_id)
    params = derivatives.params_of({**chosen, **rest}, network.model)
    hidden_BTD = transformer.apply(
        params, network.model, rows.inputs_BT, rows.segment_ids_BT, network.execution
    )
    return hidden_BTD.astype(jnp.float32), rows.weight_BT


def _all_states(of: derivatives.Differentiated, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    found = [
        _states(of.chosen, of.rest, batch, network=of.network, mesh=of.mesh)
        for batch in derivatives.batches(of, rows)
    ]
    parts: Iterator[Sequence[Any]] = zip(*jax.device_get(found), strict=True)
    states_BTD, weight_BT = (np.concatenate(part)[: len(rows)] for part in parts)
    return states_BTD, weight_BT


def _row_length(probes: Mapping[str, np.ndarray]) -> int:
    return next(iter(probes.values())).shape[1] - 1


def define_settings() -> None:
    """Defines the flags of `Settings`."""
    flags.DEFINE_string(
        "layers",
        "embedding+output",
        "Weights by which losses are differentiated: embedding, output, all, or several with +.",
    )
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of activations that score.")
    flags.DEFINE_integer("batch_rows", 8, "Rows of one call that scores, over all devices.", 1)
    flags.DEFINE_integer(
        "own_gradients", 1, "Rows whose own gradients exist at once on a device.", 1
    )
    flags.DEFINE_integer("loss_chunks", 1, "Parts of a row whose logits exist at once.", 1)
    flags.DEFINE_float(
        "damping", derivatives.DAMPING, "Of DataInf, times the mean squared gradient.", 0.0
    )


def named_settings() -> Settings:
    """What these flags say."""
    names = [field.name for field in dataclasses.fields(Settings)]
    return Settings(**{name: getattr(flags.FLAGS, name) for name in names})
