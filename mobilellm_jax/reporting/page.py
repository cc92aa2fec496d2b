"""The page: everything the report knows, as one HTML file that refers to nothing outside."""

import dataclasses
import datetime
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

import mobilellm_jax
from mobilellm_jax.model.config import ModelConfig
from mobilellm_jax.reporting import curves
from mobilellm_jax.reporting.curves import Line, compact
from mobilellm_jax.reporting.history import History, Series
from mobilellm_jax.reporting.samples import Sample
from mobilellm_jax.reporting.sources import Source
from mobilellm_jax.training.length import length_of
from mobilellm_jax.training.metrics import STDERR

MARK = "mobilellm_jax.report"  # at the head of every page, so that only a report is replaced by one
COLOURS = 7  # of the palette in page.css; colour 0 is the total of all sources


@dataclasses.dataclass(frozen=True)
class Facts:
    """All that one page shows."""

    workdir: str
    history: History
    config: Mapping[str, Any]
    sources: Sequence[Source]
    samples: Sequence[Sample] = ()
    sample_note: str = ""
    baseline_note: str = ""
    notes: Sequence[str] = ()


def render(facts: Facts) -> str:
    """The page as HTML; every text from outside is escaped by the template engine."""
    loader = jinja2.FileSystemLoader(pathlib.Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True).get_template("page.html")
    colours = {source.name: _colour(i) for i, source in enumerate(facts.sources)}
    charts, numbers = _charts(facts, colours)
    history = facts.history
    return template.render(
        mark=MARK,
        title=pathlib.PurePath(facts.workdir).name or facts.workdir,
        workdir=facts.workdir,
        summary=summary(facts),
        facts=_tiles(facts),
        notes=facts.notes,
        heldout_step=f"{history.heldout.steps_N[-1]:,}" if len(history.heldout) else "",
        scores=_scores(facts.sources, colours),
        has_baselines=any(source.baselines for source in facts.sources),
        baseline_note=facts.baseline_note,
        charts=charts,
        marks=numbers["marks"],
        box=(curves.WIDTH, curves.HEIGHT),
        resumed=_times(len(history.resumes)),
        skipped=_times(len(history.skipped)),
        tasks=_tasks(history),
        tasks_step=f"{history.tasks.steps_N[-1]:,}" if len(history.tasks) else "",
        mixture=_mixture(facts.sources, colours),
        samples=[
            {**dataclasses.asdict(s), "colour": colours[s.source]["colour"]} for s in facts.samples
        ],
        sample_note=facts.sample_note,
        configuration={"config": _plain(facts.config), "program starts": _starts(history)},
        numbers=numbers,
        written=_date(datetime.datetime.now(datetime.UTC)),
        version=mobilellm_jax.__version__,
    )


def summary(facts: Facts) -> str:
    """One sentence: what was trained, on what, for how long, and how far it is."""
    train = facts.history.train
    done, planned = int(train.steps_N[-1]), _planned(facts)
    if planned is None:
        progress = f"in {done:,} steps."
    elif done >= planned:
        progress = f"in {done:,} steps; the run is complete."
    else:
        progress = f"in {done:,} of {planned:,} steps; the run is still going or was stopped."
    names = [source.name for source in facts.sources if source.rows]
    text = " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
    many = f"{len(names)} sources" if len(names) > 6 else text
    parameters = next((s["parameters"] for s in facts.history.starts if "parameters" in s), None)
    size = f" of {compact(parameters)} parameters" if parameters else ""
    tokens = compact(facts.history.tokens_so_far()[-1])
    return f"A network{size}, trained on {tokens} tokens of {many} {progress}"


def _planned(facts: Facts) -> int | None:
    """Steps of the whole run; None where its configuration is not there."""
    if facts.config.get("epochs"):  # of a plan, which may be gone; the run has written them down
        return next((s["steps"] for s in facts.history.starts if "steps" in s), None)
    counted = length_of(facts.config).steps if facts.config.get("tokens") else None
    return counted or facts.config.get("steps")


def _tiles(facts: Facts) -> list[tuple[str, str, str]]:
    """(name, value, detail) of the facts at the head."""
    history, train = facts.history, facts.history.train
    start = history.starts[-1] if history.starts else {}
    seconds = float(np.nansum(train.column("step_seconds")))
    speed = np.nanmedian(_finite(train.column("tokens_per_second")))
    began = min((s["time"] for s in history.starts if "time" in s), default=None)
    tiles = []
    if "parameters" in start:
        tiles.append(("Parameters", compact(start["parameters"]), f"{start['parameters']:,}"))
    if "model" in facts.config:
        model = ModelConfig.from_dict(facts.config["model"])
        blocks = " + ".join(
            f"{s.layers} × {s.repeats}" if s.repeats > 1 else str(s.layers) for s in model.stacks
        )
        heads = " + ".join(f"{s.heads}/{s.kv_heads}" for s in model.stacks)
        detail = f"width {model.width}, heads/KV {heads}, {model.vocab_size:,} pieces"
        tiles.append(("Blocks", blocks, detail))
    tokens = float(history.tokens_so_far()[-1])
    rows = sum(source.rows for source in facts.sources)
    tiles.append(("Tokens", compact(tokens), f"{rows:,} rows"))
    planned = _planned(facts)
    steps = f"{train.steps_N[-1]:,}" + (f" of {planned:,}" if planned else "")
    tiles.append(("Steps", steps, f"resumed {_times(len(history.resumes)) or 'never'}"))
    tiles.append(("Training time", duration(seconds), f"began {_date(began)}" if began else ""))
    mfu = history.train.last("mfu")
    share = f", {mfu:.1%} of the peak" if math.isfinite(mfu) else ""
    tiles.append(("Throughput", f"{compact(float(speed))} tokens/s", f"median{share}"))
    if "devices" in start:
        devices, packages = start["devices"], start["packages"]
        value = f"{devices['count']} × {devices['kind']}"
        tiles.append(("Devices", value, f"jax {packages['jax']}, Python {packages['python']}"))
    if start.get("commit"):
        tiles.append(("Commit", str(start["commit"])[:12], ""))
    return tiles


def _scores(sources: Sequence[Source], colours: Mapping[str, Any]) -> list[dict[str, Any]]:
    measured = [s for s in sources if math.isfinite(s.heldout)]
    beside = [s.baselines.scores if s.baselines else {} for s in measured]
    most = max([s.heldout for s in measured] + [v for b in beside for v in b.values()], default=1.0)
    rows = []
    for source, scores in zip(measured, beside, strict=True):
        sentence = ""
        if source.baselines:
            name, value = source.baselines.best
            change = source.heldout / value - 1
            sentence = f"{abs(change):.0%} {'below' if change < 0 else 'above'} {name}"
        rows.append(
            {
                "name": source.name,
                **colours[source.name],
                "heldout": f"{source.heldout:.3f}",
                "verdict": source.verdict,
                "sentence": sentence,
                "bar": 100 * source.heldout / most,
                "ticks": [(kind, 100 * value / most) for kind, value in scores.items()],
                "bigram": _number(scores.get("bigram")),
                "unigram": _number(scores.get("unigram")),
                "zlib": _number(scores.get("zlib")),
            }
        )
    return rows


def _mixture(sources: Sequence[Source], colours: Mapping[str, Any]) -> list[dict[str, Any]]:
    most = max([s.row_share for s in sources] + [s.planned or 0.0 for s in sources]) or 1.0
    return [
        {
            "name": s.name,
            **colours[s.name],
            "bar": 100 * s.row_share / most,
            "mark": None if s.planned is None else 100 * s.planned / most,
            "planned": "–" if s.planned is None else f"{s.planned:.2%}",
            "row_share": f"{s.row_share:.2%}",
            "token_share": f"{s.token_share:.2%}",
            "rows": f"{s.rows:,}",
            "available": f"{s.available:,}" if s.available else "",
            "epochs": "–" if s.epochs is None else f"{s.epochs:.2f}",
        }
        for s in sources
    ]


def _charts(
    facts: Facts, colours: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The charts as the template draws them, and the numbers that the page's script reads."""
    history, train = facts.history, facts.history.train
    series = train, history.heldout, history.tasks, history.cuts
    ends = [int(s.steps_N[i]) for s in series if len(s) for i in (0, -1)]
    domain = (min(ends), max(ends))
    tokens_N = history.tokens_so_far()
    per_source = [
        Line(name, values_N, **colours[name])
        for name, values_N in train.per_source("bits_per_byte").items()
        if name in colours
    ]
    bits = [Line("all", train.column("bits_per_byte")), *per_source]
    along = curves.axis(train.steps_N, tokens_N, domain, len(bits) + 6)
    # The clock of a step stops when its metrics arrive, so a wait may count to the step before.
    wait_N, step_N = train.column("data_wait_seconds"), train.column("step_seconds")
    with np.errstate(divide="ignore", invalid="ignore"):
        waiting_N = 100 * wait_N / np.maximum(step_N, wait_N)
    waiting = [Line("waiting", waiting_N, 1)]

    def sparse(measured: Series, lines: int) -> curves.Axis:
        measured_tokens = np.interp(measured.steps_N, train.steps_N, tokens_N)
        return curves.axis(measured.steps_N, measured_tokens, domain, lines)

    beside = sparse(history.heldout, len(per_source) + 1)
    heldout = [
        Line(name, values_N, **colours[name])
        for name, values_N in history.heldout.per_source("bits_per_byte").items()
        if name in colours
    ]
    rank = [Line("rank", history.heldout.column("rank_me"), 1)]
    figures = [
        Line(name, history.tasks.columns[name], **_colour(i))
        for i, name in enumerate(_task_names(history))
    ]
    judged = sparse(history.tasks, len(figures))
    kinds = {name: history.cuts.per_source(name) for name in ("live", "saliency", "mlp", "heads")}
    pruned = sparse(history.cuts, sum(map(len, kinds.values())))

    def of_cuts(title: str, name: str, unit: str, scale: float = 1) -> dict[str, Any] | None:
        lines = [
            Line(which.replace("_", " "), scale * values_N, **_colour(i))
            for i, (which, values_N) in enumerate(kinds[name].items())
        ]
        return curves.chart(title, lines, pruned, unit, exact=True)

    def one(
        name: str, title: str, unit: str = "", scale: float = 1, **how: bool
    ) -> dict[str, Any] | None:
        line = Line(title.lower(), scale * train.column(name), 1)
        return curves.chart(title, [line], along, unit, **how)

    charts = [
        curves.chart("Training", bits, along, "bits per byte", wide=True),
        curves.chart("Held-out", heldout, beside, "bits per byte", exact=True),
        one("loss", "Training loss", "nats per token"),
        one("gradient_norm", "Gradient norm", geometric=True),
        one("learning_rate", "Learning rate", from_zero=True),
        one("tokens_per_second", "Throughput", "tokens/s", from_zero=True),
        curves.chart("Waiting for data", waiting, along, "% of the step", from_zero=True),
        one("mfu", "Model FLOPs utilisation", "% of the peak", 100, from_zero=True),
        curves.chart("Tasks", figures, judged, exact=True, wide=True),
        curves.chart("RankMe", rank, beside, "of the output embedding", exact=True),
        of_cuts("What lives", "live", "% of each kind", 100),
        of_cuts("Saliency", "saliency", "per parameter, of the least unit of each kind"),
        of_cuts("MLP widths", "mlp", "channels of each block"),
        of_cuts("Query heads", "heads", "of each block"),
    ]
    drawn = [chart for chart in charts if chart]
    axes = {"Held-out": "heldout", "RankMe": "heldout", "Tasks": "tasks"}
    axes |= dict.fromkeys(("What lives", "Saliency", "MLP widths", "Query heads"), "cuts")
    numbers = {
        "domain": domain,
        "axes": {
            "train": along.numbers(),
            "heldout": beside.numbers(),
            "tasks": judged.numbers(),
            "cuts": pruned.numbers(),
        },
        "marks": curves.marks(along, history.resumes, history.skipped),
        "charts": [
            {
                "axis": axes.get(chart["title"], "train"),
                "lines": [line.pop("numbers") for line in chart["lines"]],
            }
            for chart in drawn
        ],
    }
    return drawn, numbers


def _task_names(history: History) -> list[str]:
    """The figures that tasks give, without their standard errors."""
    return [name for name in history.tasks.columns if not name.startswith(STDERR)]


def _tasks(history: History) -> list[dict[str, Any]]:
    """The newest figure of each task."""
    found = []
    for i, name in enumerate(_task_names(history)):
        error = history.tasks.last(STDERR + name)
        shown = "" if math.isnan(error) else f"± {error:.4f}"
        value = f"{history.tasks.last(name):.4f}"
        found.append({"name": name, **_colour(i), "value": value, "error": shown})
    return found


def _starts(history: History) -> dict[str, Any]:
    return {
        f"at step {start['step']:,}": _plain(
            {
                k: _date(v) if k == "time" else v
                for k, v in start.items()
                if k not in ("kind", "step")
            }
        )
        for start in history.starts
    }


def _plain(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested mappings stay, all other values become text; lists of mappings are numbered."""
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, list) and value and all(isinstance(v, Mapping) for v in value):
            plain |= {f"{key}[{i}]": _plain(v) for i, v in enumerate(value)}
        elif isinstance(value, Mapping):
            plain[key] = _plain(value)
        else:
            plain[key] = value if isinstance(value, str) else json.dumps(value)
    return plain


def _colour(index: int) -> dict[str, Any]:
    return {"colour": 1 + index % COLOURS, "dashed": index >= COLOURS}


def _finite(values_N: np.ndarray) -> np.ndarray:
    return values_N[np.isfinite(values_N)] if np.isfinite(values_N).any() else np.array([np.nan])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _times(count: int) -> str:
    return {0: "", 1: "once", 2: "twice"}.get(count, f"{count:,} times")


def duration(seconds: float) -> str:
    """A length of time in its two largest units: 4 min 10 s, 3 d 7 h."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = round(seconds)
    parts: list[str] = []
    for name, size in units:
        if left >= size or (name == "s" and not parts):
            parts.append(f"{left // size} {name}")
            left %= size
    return " ".join(parts[:2])


def _date(time: float | datetime.datetime) -> str:
    if not isinstance(time, datetime.datetime):
        time = datetime.datetime.fromtimestamp(time, datetime.UTC)
    return time.strftime("%-d %b %Y, %H:%M UTC")
