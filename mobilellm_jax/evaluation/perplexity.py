"""Measures of text that are no tasks: perplexity in windows, and bits per byte of row stores."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.rows import SourceInfo, open_rows, read_info
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.decoding.decoder import to_read
from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.scores import mean_score
from mobilellm_jax.evaluation.scoring import Request, score
from mobilellm_jax.evaluation.suites import Line
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.model.transformer import Params
from mobilellm_jax.parallel.sharding import ROWS, WHOLE, gathered, on_each_device
from mobilellm_jax.training.evaluation import batches
from mobilellm_jax.training.objectives import Network, next_token
from mobilellm_jax.training.step import row_sums

WINDOW = 2048  # tokens
AT_ONCE = 8192  # tokens of rows that a device reads together, about
WIKITEXT = "Salesforce/wikitext", "wikitext-2-raw-v1"


def wikitext(data: Path | None) -> str:
    """The test text of WikiText-2, lines as they are stored with an empty line after each.

    Raises:
      UserError: it is neither in `data` nor to be had from the hub.
    """
    import datasets

    from mobilellm_jax.evaluation.local_data import local_datasets

    with local_datasets(data):
        found: Any = datasets.load_dataset(*WIKITEXT)
    return "\n\n".join(found["test"]["text"])


def window_perplexity(
    params: Params, model: ModelConfig, tokenizer: Tokenizer, text: str, dtype: str, mesh: Mesh
) -> Line:
    """Perplexity as MobileLLM's own program measures it.

    The text's tokens, with one BOS before them, are cut into windows of 2,048 that do not overlap; a
    remainder is left out. Of each window all but the first token are predicted from those before
    them; the figure is the exponential of the mean over windows. A network of a shorter context gets
    windows of its context, and the line says so.

    Args:
      params: as trained.
      model: their network.
      tokenizer: its tokenizer.
      text: to be read.
      dtype: of activations and products.
      mesh: devices that share the windows.

    Raises:
      UserError: the text is shorter than a window.
    """
    window = min(WINDOW, model.max_length)
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    count = len(ids) // window
    if not count:
        raise UserError(f"a text of {len(ids):,} tokens has no window of {window:,}.")
    windows = [ids[i * window : (i + 1) * window] for i in range(count)]
    requests = [Request((w[0],), tuple(w[1:])) for w in windows]
    scored = score(to_read(params, model, dtype, mesh), requests)
    losses = mean_score([-found.log_likelihood / (window - 1) for _, found in scored])
    value = math.exp(losses.mean)
    metric = f"perplexity, windows of {window:,}"
    return Line("WikiText-2", 0, metric, value, value * losses.standard_error, documents=count)


def heldout_sources(path: epath.PathLike) -> list[SourceInfo]:
    """The sources of a store that have held-out rows.

    Args:
      path: a plan (mixture.json) or the folder of one source.

    Raises:
      UserError: there is no such store, or no held-out row.
    """
    path = epath.Path(path)
    if path.is_dir():
        folders = [path]
    else:
        plan = Plan.load(path)
        folders = [epath.Path(plan.resolve(source.path)) for source in plan.sources]
    found = [info for info in map(read_info, folders) if "heldout" in info.splits]
    if not found:
        raise UserError(f"{path} has no held-out rows: prepare it with a held-out part.")
    return found


def store_lines(
    params: Params,
    model: ModelConfig,
    tokenizer: Tokenizer,
    sources: Sequence[SourceInfo],
    rows: int | None,
    dtype: str,
    mesh: Mesh,
) -> list[Line]:
    """Bits per byte of the held-out rows of each source.

    The standard error is that of a ratio of sums over rows.

    Args:
      params: as trained.
      model: their network.
      tokenizer: its tokenizer, which has to be the store's.
      sources: see `heldout_sources`.
      rows: of each source, at most; None: all.
      dtype: of activations and products.
      mesh: devices that share the rows.

    Raises:
      UserError: the tokenizer of one is another.
    """
    ready, piece_bytes_V = to_read(params, model, dtype, mesh), tokenizer.piece_bytes()
    network = Network(ready.model, ready.execution, tokenizer.bos_id, tokenizer.eos_id)
    lines = []
    for info in sources:
        if info.tokenizer != tokenizer.fingerprint:
            raise UserError(
                f"{info.path} was tokenized by another tokenizer ({info.tokenizer[:12]}) than the "
                f"checkpoint's ({tokenizer.fingerprint[:12]}): prepare its text with that one."
            )
        length = next(
            info.row_length // parts
            for parts in range(1, info.row_length + 1)
            if info.row_length % parts == 0 and info.row_length // parts <= model.max_length
        )
        split = Contexts(open_rows(info.path, "heldout"), length)
        count = len(split) if rows is None else min(rows, len(split))
        batch = mesh.size * min(max(1, AT_ONCE // length), -(-count // mesh.size))
        sums = [
            np.asarray(_row_sums(ready.params, part, piece_bytes_V, network=network, mesh=mesh))
            for part in batches(split, range(count), batch, tokenizer.bos_id)
        ]
        if sums:
            nats_N, bytes_N = np.concatenate(sums, axis=1).astype(np.float64)
            lines.append(_ratio_line(info.name, nats_N / math.log(2), bytes_N, length))
    return lines


@on_each_device(in_specs=(WHOLE, ROWS, WHOLE), out_specs=WHOLE)
def _row_sums(
    params: Params, tokens: jax.Array, piece_bytes_V: jax.Array, *, network: Network
) -> jax.Array:
    """Nats, and bytes of the targets, of each row: float32 [2, B]."""
    losses = next_token(params, {"tokens": tokens}, network)
    sums = row_sums(losses, tokens, piece_bytes_V)
    return gathered(jnp.stack([sums["nll"], sums["bytes"]]), axis=1)


def _ratio_line(name: str, bits_N: np.ndarray, bytes_N: np.ndarray, length: int) -> Line:
    counted = bytes_N > 0
    bits_N, bytes_N = bits_N[counted], bytes_N[counted]
    value, count = bits_N.sum() / bytes_N.sum(), len(bits_N)
    square = ((bits_N - value * bytes_N) ** 2).sum() * count / max(count - 1, 1)
    error = math.sqrt(square) / bytes_N.sum() if count > 1 else math.nan
    metric = f"bits per byte, rows of {length:,}"
    return Line(name, 0, metric, float(value), float(error), documents=count)
