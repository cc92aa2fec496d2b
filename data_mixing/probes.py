r"""Corpora to probe sets: the few documents of each source that stand for a capability.

    python -m data_mixing.probes --out=probes \
        --source=stack='code/*.parquet' --source=web='crawl/*.parquet' --source=papers='papers/*.jsonl.zst' \
        --capability=code=stack,papers --capability=knowledge=web,papers \
        --quality=fineweb-edu-classifier/ --judge=Llama-3.2-1B-Instruct/ --chat --embedding=runs/350m
    python -m data_mixing.probes --out=probes --embedded --capability=code=code --capability=math=math

narrows each source down as MobileLLM-R1 does (arXiv 2509.24945, section 5.1.1): above a threshold of
quality; the top tenth by the probability that a judge finds it fit to probe reasoning; the top tenth
by the same for its domain; nothing close in meaning to a better document of any source; 10,000 a
source. Each stage but the last is there if something is named to do it: --quality, --judge,
--embedding; equal texts go in any case. A source of one capability is asked with that one's prompt,
of several with the prompt `combined`.

Sources are those of `mobilellm_jax.prepare`, with the same flags. With --split=heldout only documents
are looked at that `prepare` keeps out of training at the same --heldout, or at a larger one.

OUT gets probes.json, <source>.jsonl (best first) and decisions/<source>.parquet, which tells of each
document why it was kept or dropped (see `probe_sets`). All grows in OUT.incomplete. Killed and started
again with the same flags it goes on, with every score that it has; thresholds, fractions and numbers
may be changed till it is complete.
"""

import dataclasses
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from data_mixing import embeddings, judges, probe_sets, selection
from data_mixing.documents import SPLITS
from data_mixing.pools import Bar, Pool, counted, funnel, kept_sets, read, write_decisions
from data_mixing.probe_sets import FILE, ProbeSets
from data_mixing.selection import ALIKE, DOMAIN, KEPT, QUALITY, REASONING, Candidate, Rules
from data_mixing.text_measures import Measure, is_import_path, of_callable, remembered
from mobilellm_jax import cli
from mobilellm_jax.data.cleaning import work_folder, write_json
from mobilellm_jax.data.corpora import Corpus
from mobilellm_jax.data.source_flags import check_names, define_sources, named_corpora
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import record_of
from mobilellm_jax.parallel.compiled import keep_compiled

SAMPLE = 4096  # documents that vectors are whitened by


@dataclasses.dataclass(frozen=True)
class Measures:
    """What is asked of documents; None or empty leaves a stage out.

    Attributes:
      quality: a number for each text.
      reasoning: the judge, with the prompt for reasoning.
      domain: by source: the judge, with the prompt of what the source stands for.
      embedding: a vector for each text.
    """

    quality: Measure | None = None
    reasoning: Measure | None = None
    domain: Mapping[str, Measure] = dataclasses.field(default_factory=dict)
    embedding: Measure | None = None

    def scoring(self, stage: str, source: str) -> Measure | None:
        """What gives the scores of a stage."""
        return {
            QUALITY: self.quality,
            REASONING: self.reasoning,
            DOMAIN: self.domain.get(source),
        }[stage]

    @property
    def identity(self) -> dict[str, Any]:
        """Who they all are, in plain values."""
        one = {QUALITY: self.quality, REASONING: self.reasoning, "embedding": self.embedding}
        return {
            **{name: measure and dict(measure.identity) for name, measure in one.items()},
            DOMAIN: {source: dict(measure.identity) for source, measure in self.domain.items()},
        }


def make(
    corpora: Sequence[Corpus],
    capabilities: Mapping[str, Sequence[str]],
    out: str | Path,
    rules: Rules = Rules(),
    measures: Measures = Measures(),
    split: str = "heldout",
) -> ProbeSets:
    """Chooses the probes of all sources and writes them with all decisions.

    Args:
      corpora: the sources.
      capabilities: names of the sources that stand for each.
      out: folder on this machine to make; `<out>.incomplete` beside it holds the work until it is done.
      rules: what scores have to be, and how many documents are kept.
      measures: who gives scores and vectors.
      split: the documents to look at: `heldout`, `train`, or `all`.

    Returns:
      The probe sets, as `probe_sets.load(out)` has them.

    Raises:
      UserError: bad input, a source of which nothing is left, or `out` holds something else.
    """
    out = Path(out)
    _check(corpora, capabilities)
    looked = {
        "inputs": {corpus.name: corpus.fingerprint for corpus in corpora},
        "split": split,
        **measures.identity,
    }
    looked = json.loads(json.dumps(looked))
    settings = {"looked": looked, "rules": dataclasses.asdict(rules)}
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        return _complete(out, settings, capabilities)
    growing = _begun(out.parent / f"{out.name}.incomplete", looked)
    work = work_folder(growing)
    pools = [read(corpus, split, work) for corpus in corpora]
    for stage in (QUALITY, REASONING, DOMAIN):
        for pool in pools:
            if measure := measures.scoring(stage, pool.name):
                _score(pool, stage, measure, rules, work)
    _choose(pools, rules, measures, work)
    sets = kept_sets(pools, capabilities)
    counts = {pool.name: counted(pool, sets) for pool in pools}
    (growing / "decisions").mkdir(exist_ok=True)
    for pool in pools:
        write_decisions(pool, growing / "decisions" / f"{pool.name}.parquet")
    probe_sets.write(sets, {**settings, "funnel": counts}, growing)
    print(funnel(counts), flush=True)
    if out.exists():
        out.rmdir()
    growing.rename(out)
    shutil.rmtree(work_folder(out))
    return sets


# What is asked for, and what is there already.


def _check(corpora: Sequence[Corpus], capabilities: Mapping[str, Sequence[str]]) -> None:
    names = [corpus.name for corpus in corpora]
    if not names:
        raise UserError("there is nothing to read: give --embedded or --source=name=PATTERN.")
    check_names(names)
    if not capabilities:
        raise UserError("there is no capability: give --capability=NAME=SOURCE,SOURCE.")
    for capability, sources in capabilities.items():
        if not sources:
            raise UserError(f"the capability {capability!r} has no source.")
        if unknown := [source for source in sources if source not in names]:
            raise UserError(
                f"the capability {capability!r} names the source {unknown[0]!r}, but the sources are "
                f"{', '.join(names)}."
            )
    served = {source for sources in capabilities.values() for source in sources}
    if idle := [name for name in names if name not in served]:
        raise UserError(
            f"the source {idle[0]!r} stands for no capability: name it in a --capability, or leave it out."
        )


def _complete(
    out: Path, settings: Mapping[str, Any], capabilities: Mapping[str, Sequence[str]]
) -> ProbeSets:
    if not (out / FILE).exists():
        raise UserError(f"{out} exists and is not empty: name another folder.")
    sets = probe_sets.load(out)
    made = json.loads((out / FILE).read_text(encoding="utf-8"))["settings"]
    asked = {name: tuple(sources) for name, sources in capabilities.items()}
    if {key: made.get(key) for key in settings} != settings or sets.capabilities != asked:
        raise UserError(
            f"{out} exists and was made from other input or with other options: delete it, or name "
            "another folder."
        )
    shutil.rmtree(work_folder(out), ignore_errors=True)  # if it was killed at the very end
    print(f"{out}: complete, kept as it is.", flush=True)
    return sets


def _begun(growing: Path, looked: Mapping[str, Any]) -> Path:
    path = work_folder(growing) / "settings.json"
    if not path.exists():
        if any(file.is_file() and file.suffix != ".half" for file in growing.rglob("*")):
            raise UserError(f"{growing} exists and is not ours: delete it, or name another folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, looked)
        return growing
    begun = record_of(path)
    if other := [name for name in looked if looked[name] != begun.get(name)]:
        raise UserError(
            f"{growing} was begun with another {', '.join(other)}: delete it, or give the same options."
        )
    return growing


# The stages.


def _score(pool: Pool, stage: str, measure: Measure, rules: Rules, work: Path) -> None:
    """Gives a source's documents a stage's scores, and drops those that it does not leave."""
    numbers, keys = pool.left, pool.documents.keys
    with Bar(f"{pool.name}: {stage}", len(numbers)) as bar:
        found = remembered(
            measure,
            [keys[n] for n in numbers],
            lambda some: [pool.documents.text(numbers[i]) for i in some],
            _folder(work, stage),
            bar.update,
        )
    pool.scores[stage] = np.full(len(pool.documents), np.nan)
    pool.scores[stage][numbers] = found
    scores = dict(zip(numbers, found.tolist(), strict=True))
    if stage == QUALITY:
        pool.drop(stage, selection.not_above(scores, rules.quality_above))
    else:
        pool.drop(stage, selection.not_top(stage, scores, keys, rules))
    if not pool.left:
        top = np.quantile(found, [0.5, 0.9, 1.0])
        raise UserError(
            f"nothing is left of the source {pool.name} after {stage}: of its {len(numbers):,} documents "
            f"none is above --quality_threshold={rules.quality_above:g} (the best has {top[2]:.3g}, the "
            f"top tenth {top[1]:.3g} or more, half of them {top[0]:.3g} or more): lower it, or leave the "
            "source out; the scores are kept for the next try."
        )


def _choose(pools: Sequence[Pool], rules: Rules, measures: Measures, work: Path) -> None:
    """Decides what the stages have left, over all sources."""
    by_name = {pool.name: pool for pool in pools}
    candidates = []
    for pool in pools:
        asked = [stage for stage in (DOMAIN, REASONING, QUALITY) if stage in pool.scores]
        scores = pool.scores[asked[0]].tolist() if asked else [None] * len(pool.documents)
        candidates += [
            Candidate(pool.name, n + 1, pool.documents.keys[n], scores[n]) for n in pool.left
        ]
    ordered = selection.ranked(candidates, rules.seed)

    embedding = measures.embedding

    def raw(some: Sequence[Candidate]) -> np.ndarray:
        assert embedding is not None
        return remembered(
            embedding,
            [c.key for c in some],
            lambda numbers: [
                by_name[some[i].source].documents.text(some[i].number - 1) for i in numbers
            ],
            _folder(work, "vectors"),
        )

    def vectors(some: Sequence[Candidate]) -> np.ndarray:
        return embeddings.unit(whiten(raw(some)) if whiten else raw(some))

    whiten = None
    if embedding and rules.whiten:
        drawn = sorted(candidates, key=lambda c: (selection.draw(c.key, rules.seed), c.name))
        whiten = embeddings.Whitening.fitted(raw(drawn[:SAMPLE]))
    with Bar("choose", len(ordered)) as bar:
        verdicts = selection.chosen(ordered, rules, vectors if embedding else None, bar.update)
    for candidate, verdict in verdicts.items():
        by_name[candidate.source].verdicts[candidate.number - 1] = verdict
    for pool in pools:
        if not pool.count(KEPT):
            example = next(v for v in pool.verdicts.values() if v.stage == ALIKE)
            raise UserError(
                f"nothing is left of the source {pool.name}: all {pool.count(ALIKE):,} documents that came "
                f"as far are like those of other sources (one is {example.reason}): raise --alike="
                f"{rules.alike:g}, or leave the source out; scores and vectors are kept for the next try."
            )


def _folder(work: Path, name: str) -> Path:
    folder = work / name
    folder.mkdir(exist_ok=True)
    return folder


# The command line.


def parse_capabilities(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """`code=stack,web` of each capability as a dictionary.

    Raises:
      UserError: one is not of that form, or named twice.
    """
    capabilities: dict[str, tuple[str, ...]] = {}
    for text in given:
        name, equals, sources = text.partition("=")
        if not (name and equals):
            raise UserError(f"--capability={text} is not of the form NAME=SOURCE,SOURCE.")
        if name in capabilities:
            raise UserError(f"--capability={name}=... is given twice: name all its sources in one.")
        found = [source.strip() for source in sources.split(",") if source.strip()]
        capabilities[name] = tuple(dict.fromkeys(found))
    return capabilities


def _named_measures(names: Sequence[str], capabilities: Mapping[str, Sequence[str]]) -> Measures:
    args = flags.FLAGS
    domains = {name: judges.prompt_of(name, capabilities) for name in names}
    asked = args.ask if args.judge else []
    if unknown := [stage for stage in asked if stage not in (REASONING, DOMAIN)]:
        raise UserError(f"--ask={','.join(asked)}: {unknown[0]!r} is neither reasoning nor domain.")
    wanted = [stage for stage in asked if stage == REASONING]
    wanted += dict.fromkeys(domains.values()) if DOMAIN in asked else []
    prompts = judges.read_prompts(wanted, args.prompt)
    of_prompt: dict[str, Measure] = {}
    if prompts:
        judge = judges.Judge(
            args.judge,
            longest=args.document_tokens,
            chat=args.chat,
            rows=args.rows,
            dtype=args.dtype,
        )
        of_prompt = {name: judge.asked(prompt) for name, prompt in prompts.items()}
    embedding = None
    if args.embedding:
        embedding = (
            of_callable(args.embedding, "embedding", 2)
            if is_import_path(args.embedding)
            else embeddings.network(args.embedding, args.embedding_tokens, args.dtype)
        )
    return Measures(
        judges.quality(args.quality) if args.quality else None,
        of_prompt.get(REASONING),
        {name: of_prompt[domain] for name, domain in domains.items() if domain in of_prompt},
        embedding,
    )


def main() -> None:
    """The command line around `make`."""
    keep_compiled()
    args = flags.FLAGS
    network = bool(args.embedding) and not is_import_path(args.embedding)
    rules = Rules(
        args.quality_threshold,
        args.fraction,
        args.alike,
        network if args.whiten is None else args.whiten,
        args.per_source,
        args.seed,
    )
    capabilities = parse_capabilities(args.capability)
    corpora = named_corpora(args.seed)
    _check(corpora, capabilities)
    measures = _named_measures([corpus.name for corpus in corpora], capabilities)
    make(corpora, capabilities, args.out, rules, measures, args.split)


if __name__ == "__main__":
    flags.DEFINE_string("out", None, "Folder to make, on this machine.", required=True)
    define_sources()
    flags.DEFINE_enum("split", "heldout", list(SPLITS), "Documents that may become probes.")
    flags.DEFINE_multi_string(
        "capability", [], "What sources stand for: NAME=SOURCE,SOURCE. May be repeated."
    )
    flags.DEFINE_string(
        "quality", "", "Classifier: package.module:name, list of texts to numbers, or a folder."
    )
    flags.DEFINE_float("quality_threshold", 4.0, "Quality has to be above this.")
    flags.DEFINE_string("judge", "", "Who is asked: a workdir, checkpoint or Hugging Face folder.")
    flags.DEFINE_list("ask", [REASONING, DOMAIN], "What the judge is asked.")
    flags.DEFINE_multi_string(
        "prompt",
        [],
        "A prompt of your own, NAME=FILE: reasoning, combined or a capability; with {document} in it.",
    )
    flags.DEFINE_bool("chat", False, "Ask through the judge's chat template.")
    flags.DEFINE_float("fraction", 0.1, "What is kept of a source after each prompt, the best.")
    flags.DEFINE_integer("document_tokens", judges.LONGEST, "Of a document in a prompt, at most.")
    flags.DEFINE_string(
        "embedding",
        "",
        "What makes vectors: a network as --judge, or package.module:name, texts to an array.",
    )
    flags.DEFINE_integer("embedding_tokens", embeddings.LENGTH, "Of a text for it, at most.")
    flags.DEFINE_float("alike", 0.9, "Cosine similarity from which on two documents are alike.")
    flags.DEFINE_bool(
        "whiten", None, "Whiten vectors before; default: those of a network, not of a function."
    )
    flags.DEFINE_integer("per_source", 10_000, "Documents of a source, at most.")
    flags.DEFINE_integer("seed", 0, "Of the order of equally good documents, and of --embedded.")
    flags.DEFINE_integer("rows", 32, "Answers that a device scores together.", 1)
    flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Of weights and activations.")
    cli.run(main)
