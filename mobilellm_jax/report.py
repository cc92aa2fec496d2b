r"""Writes what there is to know about a training run into one HTML file.

    python -m mobilellm_jax.report runs/smoke

The file stands alone: it loads nothing, so it can be mailed, archived and read offline. It may be
written at any time, also while the run is going.
"""

from typing import Any

from absl import flags
from etils import epath

from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.reporting import page, samples, sources
from mobilellm_jax.reporting.history import History, read_history
from mobilellm_jax.tables import aligned
from mobilellm_jax.training.workdir import read_config


def report(workdir: epath.PathLike, out: epath.PathLike | None = None) -> epath.Path:
    """Writes the report of a run and prints its figures.

    What is not there (yet, or any more) is left out, and the page says so: held-out measurements,
    the plan, prepared rows, a checkpoint.

    Args:
      workdir: that of training.
      out: HTML file to write, by default `report.html` in the workdir; replaces a report there.

    Returns:
      the path of the page.

    Raises:
      UserError: `workdir` is not that of a run, or `out` exists and is no report.
    """
    facts = gather(epath.Path(workdir))
    path = epath.Path(out) if out else epath.Path(workdir) / "report.html"
    if path.exists() and page.MARK.encode() not in path.read_bytes()[:500]:
        raise UserError(f"{path} exists and is no report: name another file with --out.")
    path.write_bytes(page.render(facts).encode())
    print(table(facts))
    print(path)
    return path


def gather(workdir: epath.Path) -> page.Facts:
    """Reads all that the page shows; computes baselines (once per plan) and samples."""
    history = read_history(workdir)
    config = read_config(workdir)
    notes = []
    if history.torn:
        lines = "line is" if history.torn == 1 else "lines are"
        notes.append(f"{history.torn} torn {lines} left out of the metrics: the run was killed.")
    try:
        plan = _plan_of(history, config)
    except UserError as error:
        notes.append(f"No planned shares, epochs, baselines and samples: {error}")
        return page.Facts(
            workdir=str(workdir),
            history=history,
            config=config,
            sources=sources.realised(history, None, config["row_length"]),
            sample_note="the prepared data are no longer there.",
            notes=notes,
        )
    heldout_rows = config["eval"]["rows"]
    row_length, cache = config["row_length"], workdir / "baselines.json"
    first_row = config.get("first_row", 0)
    counted = sources.realised(history, plan, row_length, first_row)
    found, missing = sources.with_data(counted, plan, row_length, heldout_rows, cache, first_row)
    try:
        continued, step = samples.sample(workdir, plan)
        sample_note = samples.describe(step)
    except UserError as error:
        continued, sample_note = [], str(error)
    return page.Facts(
        workdir=str(workdir),
        history=history,
        config=config,
        sources=found,
        samples=continued,
        sample_note=sample_note,
        baseline_note=sources.describe(found),
        notes=notes + missing,
    )


def table(facts: page.Facts) -> str:
    """The figures of the report for a terminal, one line per source."""
    lines = [["source", "planned", "rows", "epochs", "bits/byte", "bigram", "unigram", "zlib -9"]]
    for s in facts.sources:
        shares = [_text(s.planned, ".1%"), _text(s.row_share, ".1%"), _text(s.epochs, ".2f")]
        beside = s.baselines.scores if s.baselines else {}
        scores = [s.heldout, *(beside.get(name) for name in ("bigram", "unigram", "zlib"))]
        lines.append([s.name, *shares, *(_text(score, ".3f") for score in scores)])
    return f"{page.summary(facts)}\n{aligned(lines, '<>>>>>>>')}"


def _text(value: float | None, form: str) -> str:
    return "-" if value is None or value != value else format(value, form)


def _plan_of(history: History, config: dict[str, Any]) -> Plan:
    plan = Plan.load(config["plan"])
    trained = history.starts[-1].get("plan", plan.hash) if history.starts else plan.hash
    if trained != plan.hash:
        raise UserError(
            f"{config['plan']} now holds another plan ({plan.hash[:12]}) than this run was trained "
            f"on ({trained[:12]}): put that one back."
        )
    return plan


if __name__ == "__main__":
    # Here and not above, so that `report` can be imported beside other programs with an --out.
    _OUT = flags.DEFINE_string("out", None, "HTML file to write; default: WORKDIR/report.html.")
    cli.run(lambda workdir: report(workdir, _OUT.value), positional="workdir")
