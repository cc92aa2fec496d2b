r"""Does it help? Trains on each of several mixtures, with several seeds, and judges what came of it.

    python -m data_mixing.compare --config=configs/smoke.py --plans=weights --probes=probes \
        --answers=eval --seeds=3 --out=compare

trains the same network on every plan (a folder that `data_mixing.weights` wrote, or files joined by
commas), with the same tokens and seeds, and measures bits per byte of the probes' half `heldout`, which
scored nothing, and of the right answers of questions in --answers, from which no probe came. Differences
from the first plan are taken seed by seed; intervals are Student's, over seeds.

--answers is a folder of JSON lines (.jsonl, .jsonl.gz): query, choices and gold; or question (context) and
answer, before which a chain_of_thought may stand. Killed and started again it goes on.
"""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from data_mixing import drawing, experiments, folders, probe_sets
from data_mixing.probe_sets import ProbeSets
from data_mixing.runs import Member
from data_mixing.samples import answer_row
from data_mixing.together import train_together
from mobilellm_jax import cli
from mobilellm_jax.data.inputs import text_lines
from mobilellm_jax.data.packing import counted, token_ids
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone, replaced
from mobilellm_jax.sweeps.statistics import Estimate, estimate, verdict
from mobilellm_jax.tables import aligned, markdown_table
from mobilellm_jax.training.length import length_of
from mobilellm_jax.training.setup import tokenizer_of

FILE, PAGE = "comparison.json", "comparison.html"
BY = "data_mixing.compare"


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Bits per byte by plan and measure, one for each seed; and FLOPs that the weights took, if known."""

    seeds: int
    bits: Mapping[str, Mapping[str, Sequence[float]]]
    flops: Mapping[str, float | None]

    @property
    def measures(self) -> list[str]:
        """What was measured."""
        return list(next(iter(self.bits.values())))

    def mean(self, plan: str) -> list[float]:
        """Of each seed, the mean over measures."""
        return np.mean([self.bits[plan][m] for m in self.measures], axis=0).tolist()

    def difference(self, plan: str, base: str, measure: str) -> Estimate:
        """Bits per byte above those of another plan, seed by seed."""
        own = self.mean(plan) if measure == "mean" else self.bits[plan][measure]
        other = self.mean(base) if measure == "mean" else self.bits[base][measure]
        return estimate([a - b for a, b in zip(own, other, strict=True)])


def compare(
    config: ConfigDict,
    plans: Mapping[str, Plan],
    sets: ProbeSets,
    out: epath.PathLike,
    *,
    seeds: int = 3,
    answers: epath.PathLike | None = None,
    probe_rows: int = 512,
    group: int = 0,
    max_epochs: float = math.inf,
) -> Comparison:
    """Trains on every plan and writes comparison.json, table.md and comparison.html.

    Args:
      config: of every run.
      plans: by the name of the method; the first is what the others are compared with.
      sets: the probes; their half `heldout` is measured.
      out: folder for runs and results.
      seeds: runs of each plan, which differ in initial weights and in the order of rows.
      answers: folder of questions with answers.
      probe_rows: most rows of a measure.
      group: see `together.train_together`.
      max_epochs: how often a run may read a source.

    Raises:
      UserError: bad input, or the folder is of other runs.
    """
    names = ("runs", "plans", FILE, "table.md", PAGE)
    out, base = folders.holding(out, names), next(iter(plans.values()))
    for name, plan in plans.items():
        if plan.tokenizer != base.tokenizer:
            raise UserError(
                f"the plan {name} is of rows of another tokenizer than the first one's."
            )
    rows = measured_rows(config, base, sets, answers, probe_rows)
    members = [
        _member(f"{name}-{seed}", plan, config, seed)
        for seed in range(seeds)
        for name, plan in plans.items()
    ]
    often = experiments.epochs(members, config, max_epochs)
    print(
        "most epochs of a source in a run: " + ", ".join(f"{n} {e:.2f}" for n, e in often.items())
    )
    measured = train_together(
        config, members, rows, out / "runs", measure_every=length_of(config).steps, group=group
    )
    experiments.save_plans(members, out / "plans")
    tokenizer = tokenizer_of(base, base.directory)
    bytes_of = {name: _bytes(found, tokenizer) for name, found in rows.items()}
    bits = {
        name: {
            measure: [
                float(measured[f"{name}-{seed}"].nll_MN[measure][-1].sum(dtype=np.float64))
                / math.log(2)
                / bytes_of[measure]
                for seed in range(seeds)
            ]
            for measure in rows
        }
        for name in plans
    }
    flops = {name: plan.provenance.get("flops") for name, plan in plans.items()}
    found = Comparison(seeds, bits, flops)
    _write(found, out)
    return found


def measured_rows(
    config: ConfigDict,
    plan: Plan,
    sets: ProbeSets,
    answers: epath.PathLike | None,
    most: int,
) -> dict[str, np.ndarray]:
    """What judges networks: held-out probes and right answers, int32 [N, row_length + 1] by measure.

    Args:
      config: of the runs.
      plan: names the tokenizer.
      sets: the probes.
      answers: folder of questions with answers, if any.
      most: rows of a measure.

    Raises:
      UserError: a capability has no held-out probe, or see `answer_rows`.
    """
    length = config.row_length
    probes = experiments.probe_rows(sets, "heldout", plan, length, most)
    rows = {f"probes/{name}": found for name, found in probes.items()}
    if answers:
        tokenizer = tokenizer_of(plan, plan.directory)
        rows |= answer_rows(Path(answers), tokenizer, length, most)
    return rows


def _member(name: str, plan: Plan, config: ConfigDict, seed: int) -> Member:
    """A run of a plan as it is, caps and all, but in an order of its own."""
    return Member(name, dataclasses.replace(plan, seed=plan.seed + seed), config.seed + seed)


def _bytes(rows: np.ndarray, tokenizer: Tokenizer) -> float:
    """Bytes of text of the targets that count."""
    counts = counted(rows, tokenizer.bos_id, tokenizer.eos_id)
    return float(tokenizer.piece_bytes()[token_ids(rows[:, 1:])][counts].sum())


def answer_rows(
    folder: Path, tokenizer: Tokenizer, row_length: int, most: int
) -> dict[str, np.ndarray]:
    """The right answers of each file's questions as rows, int32 [N, row_length + 1], by file.

    Of a file with more questions than `most` the first are taken; those too long for a row are left out,
    which is told.

    Raises:
      UserError: there is no such folder, no file in it, one cannot be read, or a line is not as it
        should be.
    """
    files = sorted(p for p in folder.glob("*.jsonl*") if p.name.endswith((".jsonl", ".jsonl.gz")))
    if not files:
        raise UserError(f"there is no .jsonl or .jsonl.gz in {folder}: name a folder of questions.")
    found = {}
    for file in files:
        name, rows, long = file.name.partition(".")[0], [], 0
        for number, line in enumerate(text_lines(file), start=1):
            prompt, answer = _question(line, file, number)
            try:
                rows.append(answer_row(prompt, answer, tokenizer, row_length))
            except UserError:
                long += 1
            if len(rows) == most:
                break
        if not rows:
            raise UserError(f"{file}: no question fits into a row of {row_length} tokens.")
        if long:
            print(f"{name}: {long} questions are too long for a row and left out.", flush=True)
        found[f"answers/{name}"] = np.stack(rows)
    return found


def _question(line: str, file: Path, number: int) -> tuple[str, str]:
    try:
        record: dict[str, Any] = json.loads(line)
        if "choices" in record:
            query, choices, gold = record["query"], record["choices"], record["gold"]
            if not isinstance(choices, list) or not all(isinstance(c, str) for c in choices):
                raise TypeError("the choices are no list of texts")
            if not isinstance(query, str):
                raise TypeError("the query is no text")
            if type(gold) is not int or not 0 <= gold < len(choices):
                raise TypeError(f"gold is {gold!r}, not the number of a choice, from 0 on")
            prompt, answer = query, f" {choices[gold]}"
        else:
            prompt = (record["question"] if "question" in record else record["context"]) + "\n"
            answer, thought = record["answer"], record.get("chain_of_thought")
            if not isinstance(answer, str | int | float):
                raise TypeError("the answer is neither text nor number")
            answer = f"{thought}\n{answer}" if thought else f"{answer}"
        (prompt + answer).encode()  # half of a surrogate pair is no text
        return prompt, answer
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file}, line {number}, is no question ({type(error).__name__}: {error}): it needs query, "
            "choices and gold, or question (context) and answer."
        ) from None


def table(found: Comparison) -> list[list[str]]:
    """A line for each plan: bits per byte of each measure, their mean, and how it differs from the first."""
    base, *_ = found.bits
    measures = [*found.measures, "mean"]
    lines = [["method", *measures, f"mean - {base}", "verdict", "FLOPs of the metric"]]
    for name in found.bits:
        cells = [name]
        for measure in measures:
            values = found.mean(name) if measure == "mean" else found.bits[name][measure]
            cells.append(_text(estimate(values)))
        difference = found.difference(name, base, "mean")
        flops = found.flops[name]
        cells += ["", ""] if name == base else [_text(difference, "+"), verdict(difference)]
        lines.append([*cells, "" if flops is None else f"{flops:.2g}"])
    return lines


def _text(value: Estimate, sign: str = "") -> str:
    half = f" ± {value.half_width:.4f}" if math.isfinite(value.half_width) else ""
    return f"{value.mean:{sign}.4f}{half}"


def _write(found: Comparison, out: epath.Path) -> None:
    lines = table(found)
    sides = "<" + ">" * (len(lines[0]) - 1)
    note = (
        f"Bits per byte, mean over {found.seeds} seeds with Student's 95 % interval; lower is better. "
        "Differences are taken seed by seed."
    )
    for name, text in (
        (FILE, json.dumps(dataclasses.asdict(found), indent=2) + "\n"),
        ("table.md", f"{markdown_table(lines, sides)}\n\n{note}\n"),
        (PAGE, drawing.page("Mixtures compared", [f"<p>{note}</p>", drawn(found)])),
    ):
        with replaced(out / name) as unfinished:
            unfinished.write_text(text)
    print(aligned(lines, sides), flush=True)


def drawn(found: Comparison) -> str:
    """Differences from the first plan with their intervals, as SVG."""
    base, *others = found.bits
    differences: dict[str, dict[str, drawing.Interval]] = {}
    for name in others:
        differences[name] = {}
        for measure in [*found.measures, "mean"]:
            d = found.difference(name, base, measure)
            half = d.half_width
            differences[name][measure] = (d.mean, d.mean - half, d.mean + half)
    return drawing.points(f"Bits per byte above those of {base}", differences)


def open_plans(named: str) -> dict[str, Plan]:
    """The plans of a folder, by the name of their file, `uniform` first; or those of several files.

    Raises:
      UserError: there are none, or fewer than two; or two files have one name.
    """
    folder = epath.Path(named)
    if folder.is_dir():
        paths = sorted(folder.glob("*.json"), key=lambda p: (p.stem != "uniform", p.name))
    else:
        paths = [epath.Path(part) for part in named.split(",")]
    plans: dict[str, Plan] = {}
    for path in paths:
        if path.stem in plans:
            raise UserError(
                f"--plans={named} names two plans {path.stem!r}, and results are told apart by the names of "
                "the files: rename one."
            )
        plans[path.stem] = Plan.load(path)
    if len(plans) < 2:
        raise UserError(f"--plans={named} names {len(plans)} plans: there is nothing to compare.")
    return plans


def main() -> None:
    """The command line."""
    args = flags.FLAGS
    plans, sets = open_plans(args.plans), probe_sets.load(args.probes)
    with alone(args.out, "is training"):
        compare(
            args.config,
            plans,
            sets,
            args.out,
            seeds=args.seeds,
            answers=args.answers,
            probe_rows=args.probe_rows,
            group=args.group,
            max_epochs=args.max_epochs,
        )


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "Configuration of a run.", lock_config=True)
    flags.mark_flag_as_required("config")
    flags.DEFINE_string("plans", None, "Folder of plans, or files joined by commas.", required=True)
    flags.DEFINE_string("probes", None, "Directory of probe sets.", required=True)
    flags.DEFINE_string("answers", None, "Folder of questions with answers.")
    flags.DEFINE_string("out", None, "Folder for runs and results.", required=True)
    flags.DEFINE_integer("seeds", 3, "Runs of each plan.", 1)
    flags.DEFINE_integer("probe_rows", 512, "Most rows of a measure.", 2)
    flags.DEFINE_integer("group", 0, "Runs that train as one program; 0: one a device.", 0)
    flags.DEFINE_float("max_epochs", math.inf, "How often a run may read a source.", 0)
    cli.run(main)
