r"""Which mixture is best, by regression of proxy runs' losses on their weights (RegMix, arXiv 2407.01492).

    python -m data_mixing.regmix --mixtures=mixtures.csv --losses=losses.csv --out=DIR
    python -m data_mixing.regmix --mixtures=a.csv --losses=b.csv --target=math \
        --heldout_mixtures=c.csv --heldout_losses=d.csv
    python -m data_mixing.regmix --mixtures=a.csv --losses=b.csv --plan=mixture.json \
        --max_epochs=4 --tokens=1e9

reads any pair of tables of runs (data_mixing/run_tables.py). It prints for every target how well each
regression (data_mixing/regression.py) ranks runs that it has not seen, and the mixture with the lowest
predicted loss: the mean of the best among many proposals around the sizes of the plan's sources, or around
the mean of the runs' mixtures where there is no plan. Needs scikit-learn: the extra [mixing].

With --out a new folder gets regmix.md, regmix.svg and best.csv.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np
import tqdm
from absl import flags
from etils import epath

from data_mixing import drawing
from data_mixing.regression import (
    CANDIDATES,
    MEAN,
    TOP,
    Best,
    Fit,
    Rank,
    best,
    fit,
    losses_of,
    rank,
)
from data_mixing.run_tables import RunTable, load_pair
from mobilellm_jax import cli
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.tables import aligned, markdown_table

PER_SOURCE = (
    10  # runs; with fewer a regression may rank well and still have its optimum where no run was
)


@dataclasses.dataclass(frozen=True)
class Report:
    """What the program found: a fit per target, ranks on other runs, and the best mixture for one target."""

    fits: Mapping[str, Fit]
    unseen: Mapping[str, Rank]  # by target; empty without other runs
    target: str
    sources: tuple[str, ...]
    prior_S: np.ndarray
    found: Best
    runs: int

    @property
    def cells(self) -> tuple[list[list[str]], list[list[str]]]:
        """Two tables: how well targets are predicted, and the best mixture."""
        tried = list(next(iter(self.fits.values())).ranks)
        header = ["target", *tried, "chosen", "held-out rank correlation", "error"]
        ranks = [header + ["on other runs"] * bool(self.unseen)]
        for target, of in self.fits.items():
            line = [target, *(f"{of.ranks[m]:.3f}" for m in tried), of.model, of.rank.text]
            line += [f"{of.error:.3g}"]
            ranks.append(line + ([self.unseen[target].text] if self.unseen else []))
        mixture = [["source", "prior", "best", "lowest", "highest"]]
        low_S, high_S = self.found.top_KS.min(0), self.found.top_KS.max(0)
        columns = (self.prior_S, self.found.weights_S, low_S, high_S)
        for name, *values in zip(self.sources, *columns, strict=True):
            mixture.append([name, *(f"{v:.2%}" for v in values)])
        return ranks, mixture

    @property
    def said(self) -> str:
        """What the second table is."""
        few = self.runs < PER_SOURCE * len(self.sources)
        return (
            f"Best mixture for {self.target}, the mean of the best {len(self.found.top_KS)} proposals; its "
            f"predicted loss is {self.found.predicted:.4f}. Lowest and highest are among these proposals."
            + (
                f" {self.runs} runs are few for {len(self.sources)} sources: doubt it."
                if few
                else ""
            )
        )


def report(
    mixtures: RunTable,
    losses: RunTable,
    target: str = "",
    *,
    prior: Mapping[str, float] | None = None,
    bounds: Mapping[str, float] | None = None,
    unseen: tuple[RunTable, RunTable] | None = None,
    top: int = TOP,
    candidates: int = CANDIDATES,
    seed: int = 0,
) -> Report:
    """Fits every target, or one, and looks for the best mixture.

    Args:
      mixtures: weights of each run.
      losses: of the same runs in the same order.
      target: a column, for which alone the work is done; by default all and their mean.
      prior: tokens or share of each source, around which proposals lie, the mean of the mixtures by default.
      bounds: highest weight of each source.
      unseen: two tables of other runs, such as larger ones, which are ranked as well.
      top: see `best`.
      candidates: see `best`.
      seed: of all that is drawn.

    Raises:
      UserError: see `fit`, `best`, and if tables have different columns.
    """
    targets = [target] if target else list(losses.names)
    targets = targets if len(targets) == 1 else [MEAN, *targets]
    if prior is None:
        prior = dict(zip(mixtures.names, mixtures.values.mean(0).tolist(), strict=True))
    if odd := sorted(set(prior) ^ set(mixtures.names)):
        raise UserError(f"{mixtures.where} and the plan do not both have {', '.join(odd)}.")
    total = sum(prior.values())
    prior = {name: prior[name] / total for name in mixtures.names}
    if unseen and (unseen[0].names != mixtures.names or unseen[1].names != losses.names):
        raise UserError(
            f"{unseen[0].where} and {unseen[1].where} must have the columns of {mixtures.where} and "
            f"{losses.where}, in their order."
        )
    if few := [name for name, share in prior.items() if not share > 0]:
        raise UserError(
            f"no run has any of {', '.join(few)}: remove the column from {mixtures.where}."
        )
    fits = {t: fit(mixtures, losses, t, seed) for t in tqdm.tqdm(targets, "targets", disable=None)}
    ranks: dict[str, Rank] = {}
    if unseen:
        predicted = {name: of.predict(unseen[0].values) for name, of in fits.items()}
        ranks = {name: rank(p, losses_of(unseen[1], name)) for name, p in predicted.items()}
    found = best(fits[targets[0]], prior, bounds, top=top, candidates=candidates, seed=seed)
    prior_S = np.array(list(prior.values()))
    return Report(fits, ranks, targets[0], mixtures.names, prior_S, found, len(mixtures.runs))


def write(found: Report, out: str) -> None:
    """Writes tables, drawing and mixture to a new folder.

    Raises:
      UserError: the folder exists and is not empty.
    """
    ranks, mixture = found.cells
    right = ">" * len(ranks[0])
    text = f"{markdown_table(ranks, '<' + right[1:])}\n\n{found.said}\n\n{markdown_table(mixture, '<>>>>')}\n"
    picture = drawing.points(
        "Held-out rank correlation of predicted and measured losses",
        {"rank correlation": {t: dataclasses.astuple(f.rank) for t, f in found.fits.items()}},
    )
    with new_folder(out) as folder:
        (folder / "regmix.md").write_text(f"# Regression of losses on weights\n\n{text}")
        (folder / "regmix.svg").write_text(picture)
        RunTable(("best",), found.sources, found.found.weights_S[None]).save(folder / "best.csv")


def sizes(plan: Plan) -> dict[str, float]:
    """Tokens of each source of a plan.

    Raises:
      UserError: those of a source are not known.
    """
    if unknown := [source.name for source in plan.sources if source.tokens is None]:
        raise UserError(
            f"the plan does not know the tokens of {', '.join(unknown)}: fill them in with "
            "`python -m mobilellm_jax.plan --data=DIR`."
        )
    return {source.name: float(source.tokens or 0) for source in plan.sources}


def bounds_of(tokens: Mapping[str, float], max_epochs: float, run: float) -> dict[str, float]:
    """Highest weight of each source under which none is read more than `max_epochs` times."""
    return {name: min(max_epochs * count / run, 1.0) for name, count in tokens.items()}


def main() -> None:
    """The command line."""
    args = flags.FLAGS
    capped = args.max_epochs is not None
    if capped != (args.tokens is not None) or (capped and not args.plan):
        raise UserError("a cap on epochs needs --plan, --max_epochs and --tokens together.")
    if bool(args.heldout_mixtures) != bool(args.heldout_losses):
        raise UserError("--heldout_mixtures and --heldout_losses go together.")
    if args.out and epath.Path(args.out).exists():
        raise UserError(f"{args.out} exists: name a new folder.")
    mixtures, losses = load_pair(args.mixtures, args.losses)
    unseen = None
    if args.heldout_mixtures:
        unseen = load_pair(args.heldout_mixtures, args.heldout_losses)
    tokens = sizes(Plan.load(args.plan)) if args.plan else None
    found = report(
        mixtures,
        losses,
        args.target or "",
        prior=tokens,
        bounds=bounds_of(tokens, args.max_epochs, args.tokens) if tokens and capped else None,
        unseen=unseen,
        top=args.top,
        candidates=args.candidates,
        seed=args.seed,
    )
    ranks, mixture = found.cells
    print(aligned(ranks, "<" + ">" * (len(ranks[0]) - 1)))
    print(f"\n{found.said}\n{aligned(mixture, '<>>>>')}")
    if args.out:
        write(found, args.out)
        print(f"{args.out}: written.")


if __name__ == "__main__":
    flags.DEFINE_string("mixtures", None, "CSV of weights, a row per run.", required=True)
    flags.DEFINE_string("losses", None, "CSV of losses, a row per run.", required=True)
    flags.DEFINE_string("target", None, "Column to lower; default: all, and the mean of all.")
    flags.DEFINE_string("heldout_mixtures", None, "CSV of the weights of other runs to rank.")
    flags.DEFINE_string("heldout_losses", None, "CSV of their losses.")
    flags.DEFINE_string("plan", None, "Plan with the sizes of the sources.")
    flags.DEFINE_float("max_epochs", None, "How often a source may be read.", lower_bound=0)
    flags.DEFINE_float("tokens", None, "Tokens of the run, which the cap counts.", lower_bound=1)
    flags.DEFINE_integer("top", TOP, "Best proposals that are averaged.", lower_bound=1)
    flags.DEFINE_integer("candidates", CANDIDATES, "Proposals that are looked at.", lower_bound=1)
    flags.DEFINE_integer("seed", 0, "Of folds, trees and proposals.")
    flags.DEFINE_string("out", None, "New folder for tables, drawing and mixture.")
    cli.run(main)
