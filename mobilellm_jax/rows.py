r"""Answers what a run has read: which documents a step saw, where a document comes, what is used up.

    python -m mobilellm_jax.rows runs/mine --step=81234
    python -m mobilellm_jax.rows runs/mine --step=81234 --text --source=web
    python -m mobilellm_jax.rows runs/mine --document=doc-17
    python -m mobilellm_jax.rows runs/mine --document=crawl/part-3.jsonl:4711
    python -m mobilellm_jax.rows runs/mine --usage
    python -m mobilellm_jax.rows runs/mine --skip=8123:8130 --reason="loss spike"

A document is named by its id, or by its file and line (row, record). --skip changes the plan: when
the run is continued it goes back to the newest checkpoint before the first of these steps and
leaves their rows out; what was trained from there on is moved aside, not deleted, and the plan
keeps a record. --json prints lines of JSON instead of tables.
"""

import dataclasses
import json
import re
import time
from collections.abc import Iterator
from typing import Any

from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.data import accounting
from mobilellm_jax.data.mixture import Mixture
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan, Skip
from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.reporting.history import read_history
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.checkpoint import FOLDER, read_meta, saved_steps
from mobilellm_jax.training.length import Length, length_of
from mobilellm_jax.training.workdir import check_past, read_config

SHOWN = 400  # characters of a row's text in a table
# What may be asked, and which flags say more of it; --usage may be that at a --step.
OPTIONS = {"usage": ("source",), "document": (), "skip": ("reason",), "step": ("source", "text")}


@dataclasses.dataclass(frozen=True)
class Run:
    """What is known of a run's way through its data."""

    workdir: epath.Path
    config: dict[str, Any]
    plan: Plan
    mixture: Mixture
    length: Length
    done: int  # steps recorded so far

    def rows_of(self, step: int) -> tuple[int, int]:
        """The rows of the plan that a step sees, [first, last).

        Raises:
          UserError: the run has no such step.
        """
        if not 1 <= step <= self.length.steps:
            raise UserError(f"the run has steps 1 to {self.length.steps:,}, not {step:,}.")
        return self.length.rows(step - 1), self.length.rows(step)

    @property
    def consumed(self) -> int:
        """Rows of the plan that are consumed so far."""
        return self.length.rows(self.done)

    @property
    def whole(self) -> int:
        """Rows of the plan that are consumed when the run ends."""
        return self.length.rows(self.length.steps)


def open_run(workdir: epath.PathLike) -> Run:
    """Reads the record of a run and opens its data.

    Raises:
      UserError: it is not the workdir of a run, its data are not there, or its plan is now another in what
        the run has read.
    """
    workdir = epath.Path(workdir)
    config = read_config(workdir)
    plan = Plan.load(config["plan"])
    if steps := saved_steps(workdir / FOLDER):
        newest = workdir / FOLDER / str(steps[-1])
        check_past(read_meta(newest), plan, config["row_length"], str(newest))
    mixture = open_mixture(plan, config["row_length"], config["model"]["vocab_size"])
    try:
        history = read_history(workdir)
        done = int(history.train.steps_N[-1])
    except UserError:  # nothing is trained yet; what will be read is known all the same
        done = 0
    return Run(workdir, config, plan, mixture, length_of(config), done)


def step_table(run: Run, step: int, source: str = "") -> Iterator[dict[str, Any]]:
    """A record for each row of a step: where it is from, which documents, its text.

    Raises:
      UserError: the run has no such step or source, or the documents cannot be looked up.
    """
    _check_source(run, source)
    tokenizer = Tokenizer.load(run.plan.resolve(run.plan.tokenizer_path))
    for row in accounting.seen_rows(run.mixture, *run.rows_of(step)):
        if source in ("", row.source):
            yield {
                "index": row.index,
                "source": row.source,
                "epoch": row.epoch,
                "row": row.row,
                "documents": [
                    {"id": d.id, "file": d.file, "place": d.place, "tokens": d.tokens}
                    for d in row.documents
                ],
                "text": tokenizer.decode(row.tokens.tolist()),
            }


def document_table(run: Run, document: str) -> list[dict[str, Any]]:
    """A record for each time that a document comes in the whole run.

    Args:
      run: the run.
      document: an id, or `FILE:PLACE`.

    Raises:
      UserError: no source has such a document.
    """
    file, colon, place = document.rpartition(":")
    found = accounting.occurrences(run.mixture, run.whole, id=document)
    if not found and colon and place.isdigit():
        found = accounting.occurrences(run.mixture, run.whole, file=file, place=int(place))
    found = [o for o in found if o.index >= run.length.rows(0)]
    if not found:
        raise UserError(
            f"no row of this run holds a document {document!r}: name its id, or FILE:PLACE as "
            "--step shows them."
        )
    return [
        {
            "step": run.length.step_of(o.index),
            "index": o.index,
            "seen": o.index < run.consumed,
            "epoch": o.epoch,
            "source": o.source,
            "file": o.piece.file,
            "place": o.piece.place,
            "tokens": o.piece.tokens,
        }
        for o in found
    ]


def usage_table(run: Run, step: int | None = None, source: str = "") -> list[dict[str, Any]]:
    """A record for each source, or for one: how much of it is used after a step, by default now.

    Raises:
      UserError: the run has no such step or source.
    """
    _check_source(run, source)
    rows = run.consumed if step is None else run.rows_of(step)[1]
    given, end = run.mixture.given(rows), run.mixture.given(run.whole)
    length = run.config["row_length"]
    return [
        {
            "source": name,
            "rows": len(of),
            "tokens": len(of) * length,
            "read": int(given[s]),
            "share": float(given[s] / max(given.sum(), 1)),
            "epochs": float(given[s] / len(of)),
            "used": min(float(given[s] / len(of)), 1.0),
            "epochs_at_end": float(end[s] / len(of)),
        }
        for s, (name, of) in enumerate(zip(run.plan.names, run.mixture.sources, strict=True))
        if source in ("", name)
    ]


def _check_source(run: Run, source: str) -> None:
    if source and source not in run.plan.names:
        raise UserError(f"the plan has no source {source!r}, only {', '.join(run.plan.names)}.")


def skip(run: Run, first: int, last: int, reason: str) -> str:
    """Leaves the rows of steps `first` to `last` out, in the plan, and rewinds the workdir.

    Checkpoints from step `first` on are moved to `WORKDIR/rewound-<time>/`; the plan as it was is
    kept beside the new one. Continued, the run trains the steps before `first` again if they were
    not saved, then goes on with the rows behind those of `last`.

    Returns:
      What was done, for people.

    Raises:
      UserError: the steps are not in the run, or not trained yet, or no checkpoint is before them.
    """
    if not 1 <= first <= last:
        raise UserError(f"--skip={first}:{last} is no range of steps: FIRST:LAST, both included.")
    begin, end = run.rows_of(first)[0], run.rows_of(last)[1]
    directory = run.workdir / FOLDER
    steps = saved_steps(directory)
    if not [step for step in steps if step < first] and steps:
        raise UserError(
            f"no checkpoint in {directory} is from before step {first:,}: start anew with this plan "
            "changed, or skip later steps."
        )
    later = [s for s in run.plan.skips if s.at_row >= begin]
    if later:
        raise UserError(
            f"rows from {later[0].at_row:,} on are skipped already, behind step {first:,}: undo that "
            "first, by putting the plan kept beside this one back."
        )
    new = Skip(begin, end - begin, run.config["row_length"], reason)
    plan = dataclasses.replace(run.plan, skips=(*run.plan.skips, new))
    short = run.whole + new.rows - len(run.mixture)
    if short > 0:
        plan = _longer(plan, short * new.row_length)
    path = epath.Path(run.config["plan"])
    kept = path.with_name(f"{path.stem}.{run.plan.hash[:8]}.json")
    run.plan.save(kept)
    moved = [step for step in steps if step >= first]
    aside = run.workdir / f"rewound-{int(time.time())}"
    for step in moved:
        aside.mkdir(parents=True, exist_ok=True)
        (directory / str(step)).rename(aside / str(step))
    plan.save(path)
    went = f" Checkpoints {', '.join(map(str, moved))} are now in {aside}." if moved else ""
    return (
        f"{path}: rows {begin:,} to {end - 1:,} (steps {first:,} to {last:,}) are left out; the plan "
        f"as it was is {kept.name}.{went} Start training again with the same command. Other runs of "
        "this plan leave these rows out as well, if they have not read them yet."
    )


def _longer(plan: Plan, tokens: int) -> Plan:
    """The same plan with more tokens in its last stage, so that a run that skips rows still ends."""
    *before, last = plan.stages
    capped = any(source.max_epochs is not None for source in plan.sources)
    if last.weights_end is not None or (capped and not last.fixed):
        raise UserError(
            f"without these rows the plan in {plan.directory} ends {tokens:,} tokens before the run, and "
            f"its last stage, {last.name!r}, is a ramp or capped: add a stage behind it first "
            "(`python -m mobilellm_jax.plan --change_at`)."
        )
    longer = dataclasses.replace(last, tokens=(last.tokens or 0) + tokens)
    return dataclasses.replace(plan, stages=(*before, longer))


def _print(records: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
        return
    lines = [list(records[0])] + [[_cell(value) for value in r.values()] for r in records]
    sides = "".join("<" if isinstance(v, str | list) else ">" for v in records[0].values())
    print(aligned(lines, sides))


def _cell(value: Any) -> str:
    if isinstance(value, list):  # documents
        return ", ".join(d["id"] or f"{d['file']}:{d['place']}" for d in value)
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else value


def main(workdir: str) -> None:
    """The command line."""
    args = flags.FLAGS
    asked = [name for name in OPTIONS if getattr(args, name) not in (None, False)]
    if len(asked) != 1 and asked != ["usage", "step"]:
        raise UserError("ask for one thing: --step=N, --document=ID, --usage or --skip=FIRST:LAST.")
    for name in ("source", "text", "reason"):
        if getattr(args, name) and name not in OPTIONS[asked[0]]:
            goes = " and ".join(f"--{other}" for other in OPTIONS if name in OPTIONS[other])
            raise UserError(f"--{name} goes with {goes}, not with --{asked[0]}: leave it out.")
    if args.document == "":  # the id of all that have none
        raise UserError("--document= names no document: give its id, or FILE:PLACE.")
    run = open_run(workdir)
    if args.usage:
        _print(usage_table(run, args.step, args.source), args.json)
    elif args.document is not None:
        _print(document_table(run, args.document), args.json)
    elif args.skip is not None:
        match = re.fullmatch(r"(\d+):(\d+)", args.skip)
        if not match:
            raise UserError(f"--skip={args.skip} is not of the form FIRST:LAST, two steps.")
        print(skip(run, int(match[1]), int(match[2]), args.reason))
    else:
        records = list(step_table(run, args.step, args.source))
        if not args.json:
            for record in records:
                text = record.pop("text")
                if args.text:
                    record["text"] = json.dumps(text[:SHOWN], ensure_ascii=False)
        if not records:
            raise UserError(f"step {args.step:,} has no row of {args.source!r}.")
        _print(records, args.json)


if __name__ == "__main__":
    flags.DEFINE_integer("step", None, "Show the rows and documents of this step.", 1)
    flags.DEFINE_string("source", "", "Of --step and --usage, this source alone.")
    flags.DEFINE_bool("text", False, "With --step, the begin of each row's text too.")
    flags.DEFINE_string("document", None, "Show where this document comes: its id, or FILE:PLACE.")
    flags.DEFINE_bool("usage", False, "Show how much of each source is used, at --step or now.")
    flags.DEFINE_string("skip", None, "Leave the rows of these steps out: FIRST:LAST, included.")
    flags.DEFINE_string("reason", "", "Why rows are skipped; the plan keeps it.")
    flags.DEFINE_bool("json", False, "Print lines of JSON.")
    cli.run(main, positional="workdir of a run")
