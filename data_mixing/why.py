r"""Why did it say that? The training rows that most helped, and most hurt, an answer.

    python -m data_mixing.why --checkpoint=runs/mine --prompt="The capital of France is" \
        --answer=" Paris" --out=why.html

ranks documents that the run has read by what reading them once did to the likelihood of the answer
after the prompt, and shows of each its source, its id, file and place, every step at which the run
saw it, and which of its tokens did it. Positive means that it made the answer likelier.

Of a fork that goes on with the state of another run (`config.init_state=all`) these are also the rows
and steps before it; of a run that began with weights alone they are its own.

A run that has read more rows than --rows is not scored whole: half of the rows are those most alike
to prompt and answer by n-grams, of --scan that are looked through, and half are drawn by --seed.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jinja2
import numpy as np
import tqdm
from absl import flags
from etils import epath

import mobilellm_jax
from data_mixing import influence, scorers
from data_mixing.influence import Checkpoint
from data_mixing.samples import Sample, answer_row, some
from data_mixing.scorers import Gradients, Ngrams, Settings
from mobilellm_jax import cli
from mobilellm_jax.data.contexts import Contexts
from mobilellm_jax.data.packing import UNTRAINED, counted, token_ids
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_file
from mobilellm_jax.parallel.mesh import local_mesh
from mobilellm_jax.rows import Run, open_run
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.checkpoint import FOLDER

METRICS = ("tracin", "dot", "datainf")
ANSWER = "answer"  # the capability that is probed


@dataclasses.dataclass(frozen=True)
class Finding:
    """A piece of a document in a row that the run has read.

    Attributes:
      benefit: of reading it once: what it adds to the log-likelihood of the answer, to first order
        and up to a factor.
      steps: at which the run read it, up to the checkpoint.
      tokens: its tokens as text, with what each contributes; the first, its context, with none.
    """

    source: str
    row: int
    id: str
    file: str
    place: int
    benefit: float
    steps: tuple[int, ...]
    tokens: tuple[tuple[str, float], ...]

    @property
    def name(self) -> str:
        """What to call the document."""
        return self.id or f"{self.file}:{self.place}"


def why(
    checkpoints: Sequence[Checkpoint],
    run: Run,
    prompt: str,
    answer: str,
    *,
    rows: int = 2000,
    scan: int = 200_000,
    shown: int = 10,
    train_rows: int = 256,
    metric: str = "tracin",
    seed: int = 0,
    settings: Settings = Settings(),
) -> tuple[list[Finding], list[Finding], int]:
    """The documents that most helped and most hurt an answer, of those that the run has read.

    Args:
      checkpoints: of the run; the last one is the one that is asked.
      run: that trained it.
      prompt: what stands before the answer.
      answer: what is to be explained.
      rows: that are scored, at most.
      scan: rows that are compared by n-grams to choose half of them, at most.
      shown: documents of each kind.
      train_rows: rows, among those scored, that stand for the training data in DataInf.
      metric: of `METRICS`.
      seed: of what is drawn.
      settings: see `scorers.Settings`.

    Returns:
      Those that helped, best first, and those that hurt, worst first; and how many rows were scored.

    Raises:
      UserError: prompt and answer do not fit into a row, or the answer has no token.
    """
    if metric not in METRICS:
        raise UserError(f"--metric={metric} is none of {', '.join(METRICS)}.")
    tokenizer, until = checkpoints[-1].tokenizer, run.length.rows(checkpoints[-1].step)
    probe = answer_row(prompt, answer, tokenizer, run.config["row_length"])[None]
    samples = _candidates(run, until, probe, tokenizer, rows, scan, seed)
    rng, total = np.random.default_rng(seed), sum(map(len, samples))
    read = np.concatenate([sample.tokens for sample in samples])
    train = read[rng.permutation(total)[:train_rows]] if metric == "datainf" else None

    weights = influence.shares(metric, checkpoints)
    found: Any = 0.0
    passes = [Gradients(c.path, str(c.step), {ANSWER: probe}, train, settings, local_mesh(), by_target=True)
              for c in checkpoints]  # fmt: skip
    length = sum(p.rows_before + total for p in passes)
    with tqdm.tqdm(total=length, unit=" rows", disable=not sys.stderr.isatty()) as bar:
        for weight, scorer in zip(weights, passes, strict=True):
            values, *_ = scorer.open(bar.update)
            parts = []
            for first in range(0, total, influence.PART):
                part = read[first : first + influence.PART]
                parts.append(values(part)[:, -1])  # the last column is the metric's own
                bar.update(len(part))
            found = found + weight * np.concatenate(parts)
    pieces = list(_findings(samples, found, tokenizer))
    order = np.argsort([-piece[0] for piece in pieces], kind="stable")
    helped = [pieces[i] for i in order[:shown] if pieces[i][0] > 0]
    hurt = [pieces[i] for i in order[::-1][:shown] if pieces[i][0] < 0]
    tell = functools.partial(_finding, run=run, until=until, tokenizer=tokenizer)
    return [tell(*piece) for piece in helped], [tell(*piece) for piece in hurt], total


def _candidates(
    run: Run, until: int, probe: np.ndarray, tokenizer: Tokenizer, rows: int, scan: int, seed: int
) -> list[Sample]:
    """Rows that the run has read before row `until` of its plan, each once, by source."""
    begin, rng = run.length.rows(0), np.random.default_rng(seed)
    indices = np.arange(begin, until)
    if len(indices) > scan:
        indices = np.unique(rng.integers(begin, until, scan))
    at = run.mixture.locate(indices)
    source, row = np.unique(np.stack([at.source, at.row]), axis=1)
    if len(row) > rows:
        chosen = np.zeros(len(row), bool)
        chosen[_most_alike(run, source, row, probe, tokenizer, rows // 2)] = True
        others = rng.permutation(np.flatnonzero(~chosen))
        chosen[others[: rows - int(chosen.sum())]] = True
        source, row = source[chosen], row[chosen]
    contexts = cast(Sequence[Contexts], run.mixture.sources)
    return [
        Sample(run.plan.names[s], contexts[s], row[source == s]) for s in np.unique(source).tolist()
    ]


def _most_alike(
    run: Run,
    source: np.ndarray,
    row: np.ndarray,
    probe: np.ndarray,
    tokenizer: Tokenizer,
    count: int,
) -> np.ndarray:
    """Which rows are the most alike to prompt and answer by n-grams of tokens."""

    def read(numbers: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for s in np.unique(source).tolist():
            mine = numbers[source[numbers] == s]
            for first in range(0, len(mine), 4096):
                part = mine[first : first + 4096]
                yield part, run.mixture.sources[s].read(row[part])

    everything = np.arange(len(row))
    ordinary = np.concatenate([tokens for _, tokens in read(some(everything, 4096))])
    asked = np.where(probe == (tokenizer.bos_id | UNTRAINED), tokenizer.bos_id, token_ids(probe))
    ngrams = Ngrams({ANSWER: asked}, ordinary, tokenizer.bos_id, tokenizer.eos_id)
    values, *_ = ngrams.open(lambda rows: None)
    likeness = np.empty(len(row))
    for part, tokens in read(everything):
        likeness[part] = np.maximum(values(tokens)[:, 0], 0.0).sum(-1)
    return np.argsort(-likeness, kind="stable")[:count]


def _findings(
    samples: Sequence[Sample], slopes_NT: np.ndarray, tokenizer: Tokenizer
) -> Iterator[tuple[float, Sample, int, int, np.ndarray]]:
    """(benefit, sample, number of the row in it, number of the piece in that, slopes of the row)."""
    n = 0
    for sample in samples:
        counts_NT = counted(sample.tokens, tokenizer.bos_id, tokenizer.eos_id)
        for i in range(len(sample)):
            for j, placed in enumerate(sample.placed[i]):
                inside = slice(placed.first, placed.last - 1)
                if counts_NT[i, inside].any():
                    benefit = float(slopes_NT[n, inside].sum(dtype=np.float64))
                    yield benefit, sample, i, j, slopes_NT[n]
            n += 1


def _finding(
    benefit: float,
    sample: Sample,
    i: int,
    j: int,
    slopes_T: np.ndarray,
    run: Run,
    until: int,
    tokenizer: Tokenizer,
) -> Finding:
    placed, row = sample.placed[i][j], int(sample.rows_N[i])
    ids = token_ids(sample.tokens[i, placed.first : placed.last]).tolist()
    own = [0.0, *slopes_T[placed.first : placed.last - 1].tolist()]
    source = run.plan.names.index(sample.source)
    steps = [
        run.length.step_of(index)
        for index, _ in run.mixture.occurrences(source, row, until)
        if index >= run.length.rows(0)
    ]
    piece = placed.piece
    return Finding(
        sample.source,
        row,
        piece.id,
        piece.file,
        piece.place,
        benefit,
        tuple(steps),
        tuple(zip(_texts(ids, tokenizer), own, strict=True)),
    )


def _texts(ids: list[int], tokenizer: Tokenizer) -> list[str]:
    """What each token adds to the text before it."""
    texts, before = [], ""
    for i in range(len(ids)):
        text = tokenizer.decode(ids[: i + 1])
        if text.endswith("\N{REPLACEMENT CHARACTER}"):  # a character that is not whole yet
            texts.append("")
            continue
        texts.append(text[len(before) :])
        before = text
    return texts


def table(helped: Sequence[Finding], hurt: Sequence[Finding]) -> str:
    """What was found, for a terminal."""
    text = [["", "benefit", "source", "document", "steps", "text"]]
    for kind, findings in (("helped", helped), ("hurt", hurt)):
        for found in findings:
            steps = ", ".join(f"{step:,}" for step in found.steps[:4])
            steps += f" and {len(found.steps) - 4} more" if len(found.steps) > 4 else ""
            shown = " ".join("".join(t for t, _ in found.tokens).split())[:60]
            text.append([kind, f"{found.benefit:+.3g}", found.source, found.name, steps, shown])
    return aligned(text, "<><<<<")


def render(
    helped: Sequence[Finding],
    hurt: Sequence[Finding],
    prompt: str,
    answer: str,
    scored: int,
    asked: Checkpoint,
    metric: str,
) -> str:
    """The page, which refers to nothing outside; every text from outside is escaped."""
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("why.html")
    return template.render(
        prompt=prompt,
        answer=answer,
        scored=f"{scored:,}",
        checkpoint=str(asked.path),
        step=f"{asked.step:,}",
        metric=metric,
        groups=[("What helped", _shown(helped)), ("What hurt", _shown(hurt))],
        version=mobilellm_jax.__version__,
    )


def _shown(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    most = max((abs(f.benefit) for f in findings), default=1.0)
    strongest = max((abs(v) for f in findings for _, v in f.tokens), default=1.0) or 1.0
    return [
        {
            **dataclasses.asdict(f),
            "name": f.name,
            "value": f"{f.benefit:+.3g}",
            "width": 100 * abs(f.benefit) / most,
            "kind": "good" if f.benefit > 0 else "poor",
            "seen": ", ".join(f"{step:,}" for step in f.steps),
            "marks": [
                {
                    "text": text,
                    "kind": "good" if value > 0 else "poor",
                    "share": round(min(abs(value) / strongest, 1.0) * 70),
                    "value": f"{value:+.2g}",
                }
                for text, value in f.tokens
            ],
        }
        for f in findings
    ]


def main() -> None:
    """The command line around `why`."""
    args = flags.FLAGS
    checkpoints = influence.open_checkpoints([args.checkpoint], args.steps, [ANSWER])
    path = checkpoints[-1].path
    workdir = path.parent.parent if path.parent.name == FOLDER else path
    with new_file(args.out) as path:
        helped, hurt, scored = why(
            checkpoints,
            open_run(workdir),
            args.prompt,
            args.answer,
            rows=args.rows,
            scan=args.scan,
            shown=args.shown,
            train_rows=args.train_rows,
            metric=args.metric,
            seed=args.seed,
            settings=scorers.named_settings(),
        )
        told = args.prompt, args.answer, scored, checkpoints[-1], args.metric
        epath.Path(path).write_text(render(helped, hurt, *told))
    print(table(helped, hurt), args.out, sep="\n")


if __name__ == "__main__":
    flags.DEFINE_string(
        "checkpoint",
        None,
        "Workdir of a run, or DIR@STEP for one of its checkpoints.",
        required=True,
    )
    flags.DEFINE_string("prompt", None, "What stands before the answer.", required=True)
    flags.DEFINE_string("answer", None, "What it said.", required=True)
    flags.DEFINE_string("out", "why.html", "New file for the page.")
    flags.DEFINE_integer("rows", 2000, "Rows to score, at most.", 2)
    flags.DEFINE_integer("scan", 200_000, "Rows to look through for half of them, at most.", 2)
    flags.DEFINE_integer("shown", 10, "Documents that helped, and that hurt, on the page.", 1)
    flags.DEFINE_integer("train_rows", 256, "Rows for the curvature of DataInf.", 1)
    flags.DEFINE_integer("steps", 5, "Checkpoints of the run that are asked, evenly spaced.", 1)
    flags.DEFINE_enum("metric", "tracin", METRICS, "See data_mixing/influence.py.")
    flags.DEFINE_integer("seed", 0, "Of the rows that are drawn.")
    scorers.define_settings()
    cli.run(main)
