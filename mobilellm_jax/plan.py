r"""Checks a plan and shows what it means; ties it to prepared data; changes it from a point on.

    python -m mobilellm_jax.plan configs/plans/mobilellm_r1_pretrain.json
    python -m mobilellm_jax.plan configs/plans/mobilellm_r1_pretrain.json --data=DIR --out=DIR/r1.json
    python -m mobilellm_jax.plan DIR --weights=code=0.7,prose=0.3 --out=DIR/mine.json
    python -m mobilellm_jax.plan DIR/mixture.json --change_at=300000000 --weights=code=0.7,prose=0.3 \
        --out=DIR/mixture2.json

A plan says which sources a run reads in which shares (schema: mobilellm_jax/data/plan.py). The
table shows, per source and stage, share, tokens and epochs (how often the source is read), and what
repetition costs: R further epochs of U unique tokens are worth U * 15.39 * (1 - exp(-R / 15.39))
fresh ones (Muennighoff et al. 2023, arXiv 2305.16264, equation 5).

In place of a plan, a directory that `prepare` wrote stands for one of all its sources, whichever
calls made them, with these --weights or each read as often as the others.

Nothing is overwritten: --out is a new file.
"""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
from absl import flags
from etils import epath

import mobilellm_jax
from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan, PlanSource, Stage, normalised
from mobilellm_jax.data.rows import is_complete, read_info
from mobilellm_jax.data.tokenizers import Tokenizer, file_of
from mobilellm_jax.errors import UserError
from mobilellm_jax.prepare import parse_weights
from mobilellm_jax.tables import aligned

HALF_LIFE = (
    15.39  # R*_D of arXiv 2305.16264: epochs after which repetition has lost most of its worth
)
QWEN3 = 36e12  # tokens that Qwen3 was trained on (arXiv 2505.09388), to compare with


def effective_tokens(unique: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Fresh tokens that `seen` tokens of `unique` ones are worth (arXiv 2305.16264, equation 5).

    Args:
      unique: float [n], tokens of one epoch.
      seen: float [n], tokens trained on.
    """
    touched = np.minimum(unique, seen)
    repeats = np.where(touched > 0, seen / np.where(touched > 0, touched, 1) - 1, 0.0)
    return touched + touched * HALF_LIFE * (1 - np.exp(-repeats / HALF_LIFE))


def table(plan: Plan, tokens: int | None = None) -> str:
    """What a plan means, for people.

    Args:
      plan: any plan.
      tokens: length of the run where the last stage has no end; without it that stage shows shares
        only.
    """
    begins = np.cumsum([0, *(stage.tokens or 0 for stage in plan.stages)])
    ends = [int(end) for end in begins[1:]]
    if plan.stages[-1].tokens is None:
        ends[-1] = max(tokens or 0, int(begins[-2]))
    read = [
        plan.read(end) - plan.read(int(begin)) for begin, end in zip(begins, ends, strict=False)
    ]
    seen = plan.read(ends[-1])
    unique = np.array([math.nan if s.tokens is None else s.tokens for s in plan.sources])
    header, second = ["", "unique"], ["source", "tokens"]
    for stage in plan.stages:
        header += [stage.name, "", ""]
        second += ["share", "tokens", "epochs"]
    lines = [header + ["all", "", ""], second + ["tokens", "epochs", "worth"]]
    worth = np.where(np.isnan(unique), seen, effective_tokens(np.nan_to_num(unique), seen))
    for i, source in enumerate(plan.sources):
        line = [source.name, _tokens(unique[i])]
        for stage, first, last, part in zip(plan.stages, *plan.weights, read, strict=True):
            share = f"{first[i]:.2%}" + (f" to {last[i]:.2%}" if stage.weights_end else "")
            line += [share, _tokens(part[i]), _epochs(part[i] / unique[i])]
        lines.append(line + [_tokens(seen[i]), _epochs(seen[i] / unique[i]), _tokens(worth[i])])
    total = ["all", _tokens(unique.sum())]
    for part in read:
        total += ["100.00%", _tokens(part.sum()), ""]
    lines.append([*total, _tokens(seen.sum()), "", _tokens(worth.sum())])
    text = aligned(lines, "<" + ">" * (len(second) + 2))
    if not seen.sum():
        return text
    touched = np.where(np.isnan(unique), seen, np.fmin(unique, seen)).sum()
    beside = seen.sum() / QWEN3
    return (
        f"{text}\n\n{_tokens(touched)} of {_tokens(unique.sum())} unique tokens are read, "
        f"{_tokens(seen.sum())} tokens in all, worth {_tokens(worth.sum())} fresh ones"
        + (
            f"; that is {beside:.1%} of the 36T that Qwen3 was trained on."
            if beside > 1e-3
            else "."
        )
    )


def plan_of(data: epath.PathLike, weights: Mapping[str, float] | None = None) -> Plan:
    """A plan of one stage over prepared sources, whichever calls of `prepare` made them.

    Args:
      data: directory that `prepare` wrote.
      weights: shares of its sources, those without one left out; by default all are read equally
        often.

    Raises:
      UserError: a source or the tokenizer is missing there, or the weights do not sum to 1.
    """
    data = epath.Path(data)
    complete = sorted(path.name for path in data.iterdir() if is_complete(path))
    if not complete:
        raise UserError(
            f"{data} holds no complete source: prepare some (docs/preparing.md), or name the file of a plan."
        )
    given = normalised(weights, "--weights") if weights else dict.fromkeys(complete, 1.0)
    untied = Plan(
        sources=tuple(PlanSource(name, name) for name in given),
        stages=(Stage("train", None, given),),
        tokenizer_path="",
        tokenizer="",
        provenance={
            "written_by": f"mobilellm_jax.plan {mobilellm_jax.__version__}",
            "weights": "given" if weights else "all read equally often",
        },
    )
    plan = fill_in(untied, data)
    shares = given if weights else {source.name: source.tokens or 0 for source in plan.sources}
    whole = math.fsum(shares.values())
    stage = Stage("train", None, {name: share / whole for name, share in shares.items()})
    return dataclasses.replace(plan, stages=(stage,))


def fill_in(plan: Plan, data: epath.PathLike) -> Plan:
    """A plan tied to prepared sources: their paths, rows, tokens and tokenizer.

    Args:
      plan: its sources are looked for under their names.
      data: directory that `prepare` wrote.

    Raises:
      UserError: a source or the tokenizer is missing there.
    """
    data = epath.Path(data)
    if missing := [name for name in plan.names if not is_complete(data / name)]:
        raise UserError(
            f"{data} has no complete source for {', '.join(missing)}: prepare what is missing (see "
            "docs/data.md), or remove it from a copy of the plan."
        )
    tokenizer = Tokenizer.load(data)
    infos = [read_info(data / name) for name in plan.names]
    sources = tuple(
        dataclasses.replace(
            source,
            path=source.name,
            rows=info.splits["train"].rows,
            tokens=info.splits["train"].rows * info.row_length,
        )
        for source, info in zip(plan.sources, infos, strict=True)
    )
    if other := [info.name for info in infos if info.tokenizer != tokenizer.fingerprint]:
        raise UserError(
            f"in {data}, {', '.join(other)} was tokenized by another tokenizer than {file_of(data)}: "
            "prepare it again."
        )
    return dataclasses.replace(
        plan,
        sources=sources,
        tokenizer_path=tokenizer.FILE,
        tokenizer=tokenizer.fingerprint,
        directory=str(data),
    )


def write(plan: Plan, out: epath.PathLike) -> None:
    """Writes a plan to a new file, checked as it will be read.

    Raises:
      UserError: the file exists, or the plan is not usable.
    """
    out = epath.Path(out)
    if out.exists():
        raise UserError(f"{out} exists already: name a new file as --out.")
    Plan.from_dict(plan.to_dict(), f"the new plan {out}")
    if out.parent.resolve() != epath.Path(plan.directory).resolve():
        plan = plan.absolute()
    plan.save(out)
    print(f"{out}: written.", flush=True)


def _tokens(count: float) -> str:
    if math.isnan(count):
        return "?"
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:  # what rounds to 1000 of the unit below is 1 of this one
            return f"{count / unit:.3g}{name}" if unit < 1e12 else f"{count / unit:.3f}{name}"
    return f"{count:.0f}"


def _epochs(count: float) -> str:
    return "?" if math.isnan(count) else f"{count:.2f}"


def main(path: str) -> None:
    """The command line."""
    args = flags.FLAGS
    later = args.change_at is not None
    weights = parse_weights(args.weights) if args.weights else None
    if epath.Path(path).is_dir():
        if args.data:
            raise UserError(
                f"--data ties the file of a plan to its sources; {path} is a directory of them."
            )
        plan = plan_of(path, None if later else weights)
    else:
        plan = Plan.load(path)
        if weights and not later:
            raise UserError(
                "--weights are the shares from --change_at on, or those of a directory of sources."
            )
    if not later and (args.name or args.stage_tokens):
        raise UserError("--name and --stage_tokens are of the stage that begins at --change_at.")
    changed = plan
    if args.data:
        changed = fill_in(changed, args.data)
    if later:
        if not weights:
            raise UserError("--change_at needs --weights, the shares from there on.")
        weights = normalised(weights, "--weights")
        stage = Stage(args.name or f"stage{len(plan.stages) + 1}", args.stage_tokens, weights)
        changed = changed.changed_at(args.change_at, stage)
        Plan.from_dict(changed.to_dict(), "the changed plan")
    print(table(changed, args.tokens))
    if args.out:
        write(changed, args.out)
    elif changed is not plan:
        raise UserError("name a new file as --out to keep the changed plan.")


if __name__ == "__main__":
    flags.DEFINE_string("data", None, "Directory of prepared sources to tie the plan to.")
    flags.DEFINE_string("out", None, "New file for the plan that is made or changed.")
    flags.DEFINE_integer("change_at", None, "Trained tokens after which a new stage begins.", 1)
    flags.DEFINE_string(
        "weights", None, "Shares, a=0.7,b=0.3: of the new stage, or of a directory's sources."
    )
    flags.DEFINE_string("name", None, "Name of the new stage.")
    flags.DEFINE_integer("stage_tokens", None, "Tokens of the new stage; default: no end.", 1)
    flags.DEFINE_integer("tokens", None, "Tokens of the run, for a last stage without an end.", 1)
    cli.run(main, positional="path of a plan, or of a directory of prepared sources")
