r"""From measurements to mixture weights: a plan that training reads, for each of several methods.

    python -m data_mixing.weights --plan=data/mixture.json --tokens=1e9 --max_epochs=4 --out=DIR \
        --method=uniform --method=size:temperature=2 \
        --method=influence=scores.parquet:column=datainf --method=leave_one_out=loo.json \
        --method=regmix=mixtures.csv+losses.csv

writes DIR/<method>.json, a plan that `train` streams: the sources of --plan without those of weight 0, one
stage of --tokens tokens, caps on repetition (`max_epochs`) and, as provenance, what the weights are from.
Caps work where a plan is read (mobilellm_jax/data/plan.py): weights before and after them stand side by side
in DIR/weights.md, and are drawn in DIR/weights.svg and weights.html. Nothing is overwritten: DIR is new.

| method | input | options |
|---|---|---|
| `uniform` | | |
| `size` | | `temperature` |
| `influence` | scores of pieces, Parquet | `column`, `floor` |
| `leave_one_out` | leave-one-out runs, JSON | `step`, `standardise=true`, `floor` |
| `regmix` | mixtures + losses of proxy runs, CSV | `target`, `top`, `candidates` |

data_mixing/methods.py says what each computes, measurements.py and run_tables.py what their inputs are.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm
from absl import flags
from etils import epath

from data_mixing import drawing, methods
from data_mixing.measurements import read_left_out, read_scores, sha256
from data_mixing.methods import Method, Weights
from data_mixing.regmix import bounds_of, sizes
from data_mixing.run_tables import load_pair
from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.reporting.curves import compact
from mobilellm_jax.tables import aligned, markdown_table

FORM = "METHOD, METHOD=INPUT or METHOD=INPUT+INPUT, with :OPTION=VALUE,OPTION=VALUE behind it"
NOTE = "A full bar is what training reads, after the caps on epochs; a hollow one the weight before them."


@dataclasses.dataclass(frozen=True)
class Kind:
    """A method, how many files it reads, and its options with what their values mean."""

    method: Method
    inputs: int
    options: Mapping[str, Callable[[str], Any]]


KINDS = {
    "uniform": Kind(methods.uniform, 0, {}),
    "size": Kind(methods.size, 0, {"temperature": float}),
    "influence": Kind(methods.influence, 1, {"column": str, "floor": float}),
    "leave_one_out": Kind(
        methods.leave_one_out,
        1,
        {"step": int, "standardise": {"true": True, "false": False}.__getitem__, "floor": float},
    ),
    "regmix": Kind(methods.regmix, 2, {"target": str, "top": int, "candidates": int}),
}


@dataclasses.dataclass(frozen=True)
class Request:
    """One --method: its name, files and options, and how it was written."""

    method: str
    inputs: tuple[str, ...] = ()
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    text: str = ""


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What a method says, and the plan that it becomes."""

    weights: Weights
    plan: Plan
    unique: Mapping[str, float]  # tokens of all sources, also of those that the plan leaves out

    @property
    def capped(self) -> dict[str, float]:
        """Weight by source after the caps, as training reads it."""
        known = dict(zip(self.plan.names, self.plan.weights[0][0].tolist(), strict=True))
        return {name: known.get(name, 0.0) for name in self.weights}

    @property
    def epochs(self) -> dict[str, float]:
        """How often the run reads each source."""
        run = self.plan.tokens or 0
        return {name: run * w / self.unique[name] for name, w in self.capped.items()}


def parse(text: str) -> Request:
    """`influence=scores.parquet:column=datainf,floor=0.1` as a request.

    Raises:
      UserError: it is not of that form, or there is no such method or option.
    """
    options_form = r"\w+=[^:,]*(?:,\w+=[^:,]*)*"
    match = re.fullmatch(rf"(\w+)(?:=(.+?))?(?::({options_form}))?", text)
    if not match:
        raise UserError(f"--method={text} is not of the form {FORM}.")
    method, options = match[1], match[3] or ""
    if method not in KINDS:
        raise UserError(f"--method={text}: there is no method {method!r}, only {', '.join(KINDS)}.")
    kind = KINDS[method]
    inputs = [match[2]] if kind.inputs == 1 and match[2] else (match[2] or "").split("+")
    inputs = [file for file in inputs if file]
    if len(inputs) != kind.inputs:
        raise UserError(f"--method={text}: {method} reads {kind.inputs} files, not {len(inputs)}.")
    read: dict[str, Any] = {}
    for key, value in (part.split("=", 1) for part in options.split(",") if part):
        if key not in kind.options:
            known = ", ".join(kind.options) or "none"
            raise UserError(f"--method={text}: {method} has no option {key!r}; it has {known}.")
        try:
            read[key] = kind.options[key](value)
        except (ValueError, KeyError):
            raise UserError(f"--method={text}: {key}={value} is not usable.") from None
    return Request(method, tuple(inputs), read, text)


def measure(
    request: Request, tokens: Mapping[str, float], bounds: Mapping[str, float] | None, seed: int
) -> Weights:
    """Reads the inputs of a method and asks it for weights.

    Args:
      request: which method.
      tokens: of each source.
      bounds: highest weight of each source, which only `regmix` knows of.
      seed: of all that is drawn.

    Raises:
      UserError: an input is missing or not usable, or see the method.
    """
    method, inputs = KINDS[request.method].method, request.inputs
    options = dict(request.options)
    if request.method == "influence":
        scored = read_scores(inputs[0], tokens, options.pop("column", ""))
        return method(scored, seed=seed, **options)
    if request.method == "leave_one_out":
        return method(read_left_out(inputs[0], tokens, options.pop("step", None)), **options)
    if request.method == "regmix":
        pair = load_pair(inputs[0], inputs[1])
        return method(tokens, *pair, bounds=bounds, seed=seed, **options)
    return method(tokens, **options)


def planned(
    plan: Plan, weights: Weights, tokens: int, provenance: Mapping[str, Any], where: str
) -> Plan:
    """The plan with other weights: one stage of `tokens` tokens, from the same data wherever it lies.

    Args:
      plan: of one stage.
      weights: of its sources; those of weight 0 are left out.
      tokens: of the run.
      provenance: what the weights are from.
      where: names the plan in errors.

    Raises:
      UserError: the caps are impossible.
    """
    kept = {name: weight for name, weight in weights.items() if weight}
    plan = plan.absolute()
    stage = dataclasses.replace(
        plan.stages[0], tokens=tokens, weights=kept, weights_end=None, fixed=False
    )
    new = dataclasses.replace(
        plan,
        sources=tuple(source for source in plan.sources if source.name in kept),
        stages=(stage,),
        skips=(),
        provenance=provenance,
    )
    return Plan.from_dict({**new.to_dict(), "provenance": dict(provenance)}, where)


def mixtures_of(
    plan: Plan,
    requests: Sequence[Request],
    *,
    tokens: int | None = None,
    max_epochs: float | None = None,
    seed: int = 0,
) -> dict[str, Mixture]:
    """Weights and plans of all methods, by a name that tells them apart.

    Args:
      plan: sources and their data; of one stage.
      requests: the methods.
      tokens: of the run, those of the plan's stage by default.
      max_epochs: cap on the repetition of all sources, what the plan has by default.
      seed: of all that is drawn.

    Raises:
      UserError: the plan has several stages or does not know its sizes, the length of the run is not known,
        a method cannot be asked, or the caps are impossible.
    """
    if len(plan.stages) > 1:
        raise UserError(
            f"the plan has {len(plan.stages)} stages, and weights are for one: give a plan with one, and add "
            "the next by `python -m mobilellm_jax.plan --change_at`."
        )
    tokens = plan.stages[0].tokens if tokens is None else tokens
    if tokens is None:
        raise UserError("the plan does not say how long the run is: give --tokens.")
    given = plan.hash  # of the file, which has its own caps
    if max_epochs is not None:
        sources = [dataclasses.replace(s, max_epochs=max_epochs) for s in plan.sources]
        plan = dataclasses.replace(plan, sources=tuple(sources))
    unique = sizes(plan)
    bounds = {
        s.name: 1.0 if s.max_epochs is None else bounds_of(unique, s.max_epochs, tokens)[s.name]
        for s in plan.sources
    }
    found = {}
    names = _names(requests)
    for name, request in tqdm.tqdm(
        list(zip(names, requests, strict=True)), "methods", disable=None
    ):
        weights = measure(request, unique, bounds, seed)
        provenance = {
            "by": "data_mixing.weights",
            "method": request.text or request.method,
            "seed": seed,
            "inputs": {path: sha256(path) for path in request.inputs},
            "plan": given,
            "weights_before_caps": dict(weights),
            "explanation": weights.reasons,
            "data": dict(plan.provenance),
        }
        made = planned(plan, weights, tokens, provenance, f"the plan of {name}")
        found[name] = Mixture(weights, made, unique)
    return found


def _names(requests: Sequence[Request]) -> list[str]:
    """Those of the methods; options are added where a method comes twice.

    Raises:
      UserError: two requests are the same, or differ in their inputs only.
    """
    often = collections.Counter(request.method for request in requests)
    names = []
    for request in requests:
        options = request.text.rpartition(":")[2] if request.options else ""
        several = options and often[request.method] > 1
        name = f"{request.method}_{options}" if several else request.method
        names.append(re.sub(r"[^\w.-]+", "_", name))
    if len(set(names)) < len(names):
        raise UserError(
            f"two of the methods would get one name: {', '.join(names)}; ask separately."
        )
    return names


def table(found: Mapping[str, Mixture]) -> list[list[str]]:
    """Cells: per source its tokens, and per method the weight, that after the caps, and epochs."""
    header, second = ["", "unique"], ["source", "tokens"]
    for name in found:
        header += [name, "", ""]
        second += ["weight", "capped", "epochs"]
    lines = [header, second]
    unique = next(iter(found.values())).unique
    for source, count in unique.items():
        line = [source, compact(count)]
        for mixture in found.values():
            line += [f"{mixture.weights[source]:.2%}", f"{mixture.capped[source]:.2%}"]
            line += [f"{mixture.epochs[source]:.2f}"]
        lines.append(line)
    return lines


def explanations(found: Mapping[str, Mixture]) -> list[list[str]]:
    """Cells: why each method gives each source its weight."""
    lines = [["method", "source", "why"]]
    for name, mixture in found.items():
        lines += [[name, source, said] for source, said in mixture.weights.reasons.items()]
    return lines


def drawings(found: Mapping[str, Mixture]) -> list[str]:
    """All weights side by side; then, for each method that measures, what it measured."""
    pictures = [
        drawing.bars(
            "Mixture weights",
            {name: mixture.capped for name, mixture in found.items()},
            {name: mixture.weights for name, mixture in found.items()},
            note=NOTE,
        )
    ]
    for name, mixture in found.items():
        if measured := mixture.weights.measured:
            intervals = {source: (m.value, m.low, m.high) for source, m in measured.items()}
            pictures.append(drawing.points(f"What {name} measured", {name: intervals}))
    return pictures


def write(found: Mapping[str, Mixture], out: epath.PathLike) -> None:
    """Writes plans, tables and drawings to a new folder.

    Raises:
      UserError: it exists and is not empty.
    """
    cells, reasons = table(found), explanations(found)
    merged = [
        [f"{a} {b}".strip() for a, b in zip(_filled(cells[0]), cells[1], strict=True)],
        *cells[2:],
    ]
    inputs = [f"- {name}: `{mixture.plan.provenance['method']}`" for name, mixture in found.items()]
    run = next(iter(found.values())).plan.tokens
    text = [
        f"# Mixture weights\n\n![Mixture weights](weights.svg)\n\nFor a run of {run:,} tokens.",
        markdown_table(merged, "<" + ">" * (len(merged[0]) - 1)),
        "\n".join(inputs),
        markdown_table(reasons, "<<<"),
    ]
    pictures = drawings(found)
    with new_folder(out) as folder:
        for name, mixture in found.items():
            mixture.plan.save(folder / f"{name}.json")
        (folder / "weights.md").write_text("\n\n".join(text) + "\n")
        (folder / "weights.svg").write_text(pictures[0])
        tables = [aligned(cells, "<" + ">" * (len(cells[0]) - 1)), aligned(reasons, "<<<")]
        parts = [*pictures, *map(drawing.preformatted, tables)]
        (folder / "weights.html").write_text(drawing.page("Mixture weights", parts))


def _filled(header: Sequence[str]) -> list[str]:
    """Each empty cell says what the one before it says, the first two apart."""
    filled = list(header[:2])
    for cell in header[2:]:
        filled.append(cell or filled[-1])
    return filled


def main() -> None:
    """The command line."""
    args = flags.FLAGS
    out = epath.Path(args.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not empty: name a new folder.")
    if args.tokens == math.inf:
        raise UserError("--tokens=inf is no length of a run: give the tokens it will read.")
    requests = [parse(text) for text in args.method]
    found = mixtures_of(
        Plan.load(args.plan),
        requests,
        tokens=None if args.tokens is None else round(args.tokens),
        max_epochs=args.max_epochs,
        seed=args.seed,
    )
    write(found, out)
    cells = table(found)
    print(aligned(cells, "<" + ">" * (len(cells[0]) - 1)))
    for name, mixture in found.items():
        for source, said in mixture.weights.reasons.items():
            if not mixture.weights[source]:
                print(f"{name}: {source} {said}.")
    print(f"{out}: written.", flush=True)


if __name__ == "__main__":
    flags.DEFINE_string("plan", None, "Plan of one stage: sources and data.", required=True)
    flags.DEFINE_multi_string("method", None, f"{FORM}; may be given again.", required=True)
    flags.DEFINE_float("tokens", None, "Tokens of the run; default: those of the plan.", 1)
    flags.DEFINE_float("max_epochs", None, "Cap on repetition; default: those of the plan.", 0)
    flags.DEFINE_integer("seed", 0, "Of bootstrap, folds, trees and proposals.")
    flags.DEFINE_string("out", None, "New folder for plans, tables and drawings.", required=True)
    cli.run(main)
