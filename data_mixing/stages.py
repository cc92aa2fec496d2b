"""The parts of a round of co-evolution: what is kept of the sources, a stage on it, and what it taught.

Each leaves what it has done in files and, asked again, finds it there.
"""

import copy
import dataclasses
import json
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from data_mixing import derivatives, methods, samples, scorers
from data_mixing.benefits import Rules
from data_mixing.influence import Checkpoint
from data_mixing.probe_sets import HALVES, ProbeSets
from data_mixing.rounds import Round, Source
from data_mixing.scorers import Settings
from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.plan import Plan, PlanSource, Stage
from mobilellm_jax.data.rows import open_rows
from mobilellm_jax.data.subset import keep_documents
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import replaced
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.train import train
from mobilellm_jax.training.checkpoint import FOLDER, saved_steps
from mobilellm_jax.training.length import length_of

METRICS = ("datainf", "dot")
ALL = np.iinfo(np.int64).max  # rows


@dataclasses.dataclass(frozen=True)
class Choices:
    """How documents are judged, when to stop, and what is made of those that are kept.

    Attributes:
      rows: of each source that are scored, at most.
      train_rows: rows that stand for the training data in DataInf.
      metric: of `METRICS`.
      standardise: whether capabilities are brought to one scale, see `benefits.scales_of`.
      threshold: benefit per token above which a document is kept.
      rules: when to stop.
      max_epochs: cap on the repetition of what is kept of a source; that of the plan if None.
      seed: of the bootstrap.
    """

    rows: int = ALL
    train_rows: int = 256
    metric: str = "datainf"
    standardise: bool = True
    threshold: float = 0.0
    rules: Rules = Rules()
    max_epochs: float | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Given:
    """What is the same in every round.

    Attributes:
      config: of each stage, but for `plan` and `init_from`.
      plan: of the raw sources.
      probes: their half `score` is what documents are to help, the other one judges the networks.
      choices: see `Choices`.
      settings: of scoring, see `scorers.Settings`.
      devices: to train on; all there are if None.
    """

    config: ConfigDict
    plan: Plan
    probes: ProbeSets
    choices: Choices
    settings: Settings
    devices: Sequence[jax.Device] | None = None


def check_probes(given: Given, point: Checkpoint) -> None:
    """No probe may be in what may be trained on, neither of those that score nor of those that judge.

    Raises:
      UserError: one is, or a capability has none in a half.
    """
    halves = [(c, half) for c in given.probes.capabilities for half in HALVES]
    texts = {f"{c} {half}": given.probes.of(c, half) for c, half in halves}
    row_length, rows = given.config.row_length, given.choices.rows
    scored = samples.first_samples(given.plan, row_length, point.model.vocab_size, rows)
    samples.check_disjoint(texts, scored, point.tokenizer)


def heldout_losses(given: Given, point: Checkpoint, file: epath.Path) -> dict[str, float]:
    """Nats per token of the held-out probes by capability.

    Args:
      given: see `Given`.
      point: the network.
      file: where the answer is, or gets written.
    """
    if file.exists():
        return json.loads(file.read_text())
    of, found = scorers.opened(point.path, given.settings, local_mesh()), {}
    for capability in given.probes.capabilities:
        texts = [probe.text for probe in given.probes.of(capability, "heldout")]
        packed = samples.packed_texts(texts, point.tokenizer, given.config.row_length)
        nll_BT, weight_BT = derivatives.losses(of, packed)
        found[capability] = float(nll_BT.sum(dtype=np.float64) / weight_BT.sum(dtype=np.float64))
    with replaced(file) as unfinished:
        unfinished.write_text(json.dumps(found, indent=2) + "\n")
    return found


def keep(
    given: Given, this: Round, kept_M: np.ndarray, tokenizer: Tokenizer, out: epath.Path
) -> Round:
    """Stores what is kept of each source, and the plan of a stage on it.

    Args:
      given: see `Given`.
      this: the round, its documents judged.
      kept_M: which of them are kept.
      tokenizer: of the sources.
      out: directory of the new sources and of mixture.json.

    Returns:
      The round with weights.

    Raises:
      UserError: nothing that is kept fills a row, or the caps on epochs are impossible.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.write(out)
    usable, why = _stored(given, this, kept_M, tokenizer, out)
    if not usable:
        raise UserError(
            f"round {this.number}: what is kept of the sources fills no row of "
            f"{given.config.row_length} tokens: score more --rows, or lower config.row_length."
        )
    scored = {name: this.found.scored(name, kept_M) for name in usable}
    weights = methods.influence(scored, seed=given.choices.seed)
    why |= weights.reasons
    plan = _planned(given, this, usable, weights, why, tokenizer, out)
    plan.save(out / "mixture.json")
    capped = dict(zip(plan.names, plan.weights[0][0].tolist(), strict=True))
    sources: dict[str, Source] = {}
    for name, of in this.sources.items():
        share = capped.get(name, 0.0)
        epochs = (plan.tokens or 0) * share / (usable[name].tokens or 1) if share else 0.0
        sources[name] = dataclasses.replace(
            of, weight=weights.get(name, 0.0), capped=share, epochs=epochs, why=why[name]
        )
        if not share:
            print(f"round {this.number}: {name} is {why[name]}.", flush=True)
    return dataclasses.replace(this, sources=sources)


def _stored(
    given: Given, this: Round, kept_M: np.ndarray, tokenizer: Tokenizer, out: epath.Path
) -> tuple[dict[str, PlanSource], dict[str, str]]:
    """The sources that a plan may have of what is kept, and why the others are none."""
    usable, why, found = {}, {}, this.found
    for source in given.plan.sources:
        chosen_M = kept_M & (found.source_M == source.name)
        if not chosen_M.any():
            why[source.name] = "left out: none of its documents helps"
            continue
        wanted = {found.key_M[i] for i in np.flatnonzero(chosen_M).tolist()}
        raw = given.plan.resolve(source.path)
        info = keep_documents(raw, wanted, tokenizer, out / source.name)
        if not len(Contexts(open_rows(info.path), given.config.row_length)):
            why[source.name] = (
                f"left out: what is kept fills no row of {given.config.row_length} tokens"
            )
            continue
        rows, cap = info.splits["train"].rows, given.choices.max_epochs
        usable[source.name] = PlanSource(
            source.name,
            source.name,
            rows,
            rows * info.row_length,
            source.max_epochs if cap is None else cap,
        )
    return usable, why


def _planned(
    given: Given,
    this: Round,
    usable: Mapping[str, PlanSource],
    weights: Mapping[str, float],
    why: Mapping[str, str],
    tokenizer: Tokenizer,
    out: epath.Path,
) -> Plan:
    """The plan of a stage; sources of weight 0 are left out."""
    shares = {name: weight for name, weight in weights.items() if weight}
    name = f"round-{this.number}"
    provenance = {
        "by": "data_mixing.coevolve",
        "round": this.number,
        "checkpoint": this.checkpoint,
        "metric": given.choices.metric,
        "threshold": given.choices.threshold,
        "plan": given.plan.hash,
        "weights_before_caps": shares,
        "explanation": dict(why),
        "data": dict(given.plan.provenance),
    }
    plan = Plan(
        sources=tuple(usable[name] for name in shares),
        stages=(Stage(name, length_of(given.config).tokens, shares),),
        tokenizer_path=tokenizer.FILE,
        tokenizer=tokenizer.fingerprint,
        seed=given.plan.seed,
    )
    return Plan.from_dict({**plan.to_dict(), "provenance": provenance}, name, str(out))


def trained(given: Given, plan: epath.Path, start: epath.Path, workdir: epath.Path) -> epath.Path:
    """The last checkpoint of a stage, which is trained unless it is there.

    Args:
      given: see `Given`.
      plan: of the stage.
      start: the network that it begins with.
      workdir: of the stage.
    """
    last = length_of(given.config).steps
    if last not in saved_steps(workdir / FOLDER):
        stage = copy.deepcopy(given.config)
        stage.plan, stage.init_from = str(plan), str(start)
        train(stage, workdir, devices=given.devices)
    return workdir / FOLDER / str(last)
