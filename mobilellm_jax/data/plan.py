"""The plan: which sources a run trains on, in which shares. The only thing preparation hands to training.

A plan is a JSON file, `mixture.json`, that lies beside the sources it names (paths are relative to
it):

    {"version": 1,
     "seed": 0,                         order of the rows
     "row_length": 256,                 targets per row
     "tokenizer": {"path": "tokenizer.model", "fingerprint": "<see Tokenizer>"},
     "sources": [{"name": "code", "path": "code", "weight": 0.5}, ...],
     "provenance": {...}}               free text for people: who wrote it, from what, how

The tokenizer is a tokenizer.model or a tokenizer.json. Weights are shares of the trained rows and
sum to 1.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from typing import Any

from etils import epath

from mobilellm_jax.errors import UserError

VERSION = 1
TOLERANCE = 1e-3  # a sum this near to 1 is a rounding, anything further a mistake


@dataclasses.dataclass(frozen=True)
class PlanSource:
    """One source of a plan: where its rows are and which share of the trained rows it gets."""

    name: str
    path: str
    weight: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked plan; `directory` is where its relative paths start."""

    sources: tuple[PlanSource, ...]
    row_length: int
    tokenizer_path: str
    tokenizer: str
    seed: int = 0
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    directory: str = ""

    @property
    def hash(self) -> str:
        """sha256 (hex) of all that decides the stream; where the plan lies does not matter."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the sources, in order; a row's source id is an index into it."""
        return tuple(source.name for source in self.sources)

    def resolve(self, path: str) -> epath.Path:
        """A path of the plan, made absolute from where the plan lies."""
        return epath.Path(self.directory) / path

    def save(self, path: epath.PathLike) -> None:
        """Writes the plan as JSON."""
        text = json.dumps({**self.to_dict(), "provenance": dict(self.provenance)}, indent=2)
        epath.Path(path).write_text(text + "\n")

    def to_dict(self) -> dict[str, Any]:
        """All that decides the stream, as plain values."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "row_length": self.row_length,
            "tokenizer": {"path": self.tokenizer_path, "fingerprint": self.tokenizer},
            "sources": [dataclasses.asdict(source) for source in self.sources],
        }

    @classmethod
    def load(cls, path: epath.PathLike) -> "Plan":
        """Reads and checks a plan.

        Weights that sum to 1 within 0.1 % are renormalised, which is printed.

        Raises:
          UserError: the file is missing, is not JSON, lacks a key, names a source twice, or its
            weights are negative or do not sum to 1.
        """
        path = epath.Path(path)
        if not path.exists():
            raise UserError(
                f"there is no plan at {path}: write one with `python -m mobilellm_jax.prepare`, "
                "or point config.plan at an existing mixture.json."
            )
        try:
            raw = json.loads(path.read_text())
            version = raw["version"]
            sources = tuple(
                PlanSource(str(s["name"]), str(s["path"]), float(s["weight"]))
                for s in raw["sources"]
            )
            plan = cls(
                sources=sources,
                row_length=int(raw["row_length"]),
                tokenizer_path=str(raw["tokenizer"]["path"]),
                tokenizer=str(raw["tokenizer"]["fingerprint"]),
                seed=int(raw["seed"]),
                provenance=raw.get("provenance", {}),
                directory=str(path.parent),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"the plan {path} is not usable ({type(error).__name__}: {error}): "
                "compare it with the schema at the top of mobilellm_jax/data/plan.py."
            ) from None
        if version != VERSION:
            raise UserError(f"the plan {path} has version {version}, this program reads {VERSION}.")
        return dataclasses.replace(plan, sources=_normalised(plan.sources, str(path)))


def _normalised(sources: tuple[PlanSource, ...], where: str) -> tuple[PlanSource, ...]:
    if not sources:
        raise UserError(f"the plan {where} names no source.")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"the plan {where} names a source twice: {', '.join(sorted(names))}.")
    if not all(math.isfinite(source.weight) and source.weight > 0 for source in sources):
        raise UserError(
            f"the plan {where} has a weight that is not positive: leave such a source out."
        )
    total = math.fsum(source.weight for source in sources)
    if abs(total - 1) > TOLERANCE:
        raise UserError(
            f"the weights in {where} sum to {total:.6g}, not to 1: mend them so that the sum is 1."
        )
    if abs(total - 1) > 1e-9:
        print(f"plan: the weights in {where} sum to {total:.6g}; they are renormalised to 1.")
    return tuple(dataclasses.replace(source, weight=source.weight / total) for source in sources)
