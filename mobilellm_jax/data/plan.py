"""The plan: which sources a run trains on, in which shares, stage by stage. All that training is told.

A plan is a JSON file, `mixture.json`; its paths are relative to where it lies:

    {"version": 2,
     "seed": 0,                              order of the rows
     "tokenizer": {"path": "tokenizer.model", "fingerprint": "<see Tokenizer>"},
     "sources": [{"name": "code",
                  "path": "code",            directory, or tfds:NAME[/CONFIG][:VERSION]
                  "rows": 14811,             stored rows of the training split
                  "tokens": 3791616,         trained tokens of one epoch: rows times their length
                  "max_epochs": 4}],         cap on its repetition; absent or null: none
     "stages": [{"name": "pretrain",
                 "tokens": 1000000000,       null in the last stage: as long as the run is
                 "weights": {"code": 1.0},   shares of the stage's tokens; sum to 1
                 "weights_end": {...},       present in a ramp: the shares at its end, linearly reached
                 "fixed": false}],           true: caps leave its weights alone
     "skips": [{"at_row": 4096, "rows": 512, "row_length": 2048, "reason": "loss spike"}],
     "provenance": {...}}                    free text for people: who wrote it, from what, how

A plan may be written before there are data (the published ones in `configs/plans`): `rows` and
`tokens` may be null then and the fingerprint empty, and `python -m mobilellm_jax.plan --data=DIR`
fills them in.

Caps count over all stages. A source that would exceed its cap is lowered in proportion in all
stages, and the others take over what it leaves (`apportion.water_fill`).

A skip says that the run, when it had consumed `at_row` rows, left the next `rows` rows of the
stream out.
"""

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from etils import epath

from mobilellm_jax.data.apportion import water_fill
from mobilellm_jax.errors import UserError, in_a_line
from mobilellm_jax.files import replaced

VERSION = 2
# Rows or tokens: 250 times those of MobileLLM-R1; products of them fit into 64 bits.
_MOST = 1 << 50
_KEYS = ("version", "seed", "tokenizer", "sources", "stages", "skips", "provenance")
TOLERANCE = 1e-3  # a sum this near to 1 is a rounding, anything further a mistake


@dataclasses.dataclass(frozen=True)
class PlanSource:
    """One source: where its rows are, how many there are, how often they may be repeated."""

    name: str
    path: str
    rows: int | None = None
    tokens: int | None = None
    max_epochs: float | None = None


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stretch of the run with shares of its own, constant or on a ramp."""

    name: str
    tokens: int | None
    weights: Mapping[str, float]
    weights_end: Mapping[str, float] | None = None
    fixed: bool = False


@dataclasses.dataclass(frozen=True)
class Skip:
    """Rows of the stream that a run left out after it had consumed `at_row` rows."""

    at_row: int
    rows: int
    row_length: int
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked plan; `directory` is where its relative paths start."""

    sources: tuple[PlanSource, ...]
    stages: tuple[Stage, ...]
    tokenizer_path: str
    tokenizer: str
    seed: int = 0
    skips: tuple[Skip, ...] = ()
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

    @property
    def tokens(self) -> int | None:
        """Trained tokens of all stages, None if the last has no end."""
        counts = [stage.tokens for stage in self.stages]
        return None if None in counts else sum(count or 0 for count in counts)

    @functools.cached_property
    def weights(self) -> tuple[np.ndarray, np.ndarray]:
        """Shares at the begin and the end of each stage, float64 [stages, sources], caps applied.

        Raises:
          UserError: the caps leave a stage without enough to read.
        """
        begin, end = (
            np.array([[weights.get(name, 0.0) for name in self.names] for weights in at])
            for at in (
                [stage.weights for stage in self.stages],
                [stage.weights_end or stage.weights for stage in self.stages],
            )
        )
        caps = np.array(
            [math.inf if s.max_epochs is None else s.max_epochs * _known(s) for s in self.sources]
        )
        if not np.isfinite(caps).any():
            return begin, end
        budgets = np.array([float(stage.tokens or 0) for stage in self.stages])
        free = np.array([not stage.fixed for stage in self.stages])
        # What a stage reads of a source is the mean of its ends: two halves with shares of their own.
        ends, halves = np.concatenate([begin, end]), np.concatenate([budgets, budgets]) / 2
        movable = np.concatenate([free, free])
        left = np.maximum(caps - halves[~movable] @ ends[~movable], 0.0)
        ends[movable], missing = water_fill(ends[movable], halves[movable], left)
        if missing.any():
            short = missing.reshape(2, -1).sum(axis=0)
            names = [stage.name for stage in self.stages if not stage.fixed]
            told = [f"{name} by {n:,.0f} tokens" for name, n in zip(names, short, strict=True) if n]
            raise UserError(
                f"the caps on epochs make the plan impossible: {'; '.join(told)} more than its "
                "sources may give. Raise max_epochs, add a source, or shorten the stage."
            )
        return ends[: len(begin)], ends[len(begin) :]

    def resolve(self, path: str) -> epath.Path:
        """A path of the plan, made absolute from where the plan lies; a TFDS name, looked up.

        Raises:
          UserError: TFDS knows no such data set.
        """
        if not path.startswith("tfds:"):
            return epath.Path(self.directory) / path
        import tensorflow_datasets as tfds

        try:
            return epath.Path(tfds.builder(path.removeprefix("tfds:")).data_path)
        except (ValueError, tfds.core.registered.DatasetNotFoundError) as error:
            raise UserError(f"{path} is no data set of TFDS here ({in_a_line(error)}).") from None

    def absolute(self) -> "Plan":
        """The same plan for a file anywhere: with whole paths, where they were counted from its folder."""
        base = epath.Path(self.directory).resolve()

        def whole(path: str) -> str:
            return path if path.startswith("tfds:") else str(base / path)

        sources = tuple(dataclasses.replace(s, path=whole(s.path)) for s in self.sources)
        return dataclasses.replace(self, sources=sources, tokenizer_path=whole(self.tokenizer_path))

    def save(self, path: epath.PathLike) -> None:
        """Writes the plan as JSON; what is there is replaced in one move."""
        text = json.dumps({**self.to_dict(), "provenance": dict(self.provenance)}, indent=2)
        with replaced(path) as unfinished:
            unfinished.write_text(text + "\n")

    def to_dict(self) -> dict[str, Any]:
        """All that decides the stream, as plain values."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "tokenizer": {"path": self.tokenizer_path, "fingerprint": self.tokenizer},
            "sources": [dataclasses.asdict(source) for source in self.sources],
            "stages": [
                {key: value for key, value in _as_dict(stage).items() if value not in (None, False)}
                | {"tokens": stage.tokens}
                for stage in self.stages
            ],
            "skips": [dataclasses.asdict(skip) for skip in self.skips],
        }

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], where: str, directory: str = "") -> "Plan":
        """Reads and checks plain values; `where` names them in errors.

        Raises:
          UserError: see `load`.
        """
        try:
            version = raw["version"]
            if version != VERSION:
                raise UserError(
                    f"{where} has version {version}, this program reads {VERSION}: prepare again, or "
                    "compare it with the schema at the top of mobilellm_jax/data/plan.py."
                )
            _known_keys(raw, "plan", _KEYS)
            plan = cls(
                sources=tuple(_source(source) for source in raw["sources"]),
                stages=tuple(_stage(stage) for stage in raw["stages"]),
                tokenizer_path=str(raw["tokenizer"]["path"]),
                tokenizer=str(raw["tokenizer"]["fingerprint"]),
                seed=_whole(raw["seed"]),
                skips=tuple(_skip(skip) for skip in raw.get("skips", [])),
                provenance=dict(raw.get("provenance", {})),
                directory=directory,
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise UserError(
                f"{where} is not usable ({type(error).__name__}: {error}): "
                "compare it with the schema at the top of mobilellm_jax/data/plan.py."
            ) from None
        _check(plan, where)
        stages = tuple(_normalised(stage, where) for stage in plan.stages)
        plan = dataclasses.replace(plan, stages=stages)
        try:
            assert plan.weights
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        return plan

    @classmethod
    def load(cls, path: epath.PathLike) -> "Plan":
        """Reads and checks a plan.

        Weights that sum to 1 within 0.1 % are renormalised, which is printed.

        Raises:
          UserError: the file is missing, is not JSON, lacks a key, names a source twice, its
            weights are negative or do not sum to 1, or its caps are impossible.
        """
        path = epath.Path(path)
        if not path.is_file():
            raise UserError(
                f"there is no plan at {path}: write one with `python -m mobilellm_jax.prepare`, "
                "or point config.plan at an existing mixture.json."
            )
        try:
            raw = json.loads(path.read_text())
        except (ValueError, RecursionError) as error:
            raise UserError(f"the plan {path} is not JSON ({error}).") from None
        return cls.from_dict(raw, f"the plan {path}", str(path.parent))

    def read(self, tokens: int) -> np.ndarray:
        """float64 [sources]: what the first `tokens` trained tokens take of each source, before rounding."""
        found, begin = np.zeros(len(self.sources)), 0
        for stage, first, last in zip(self.stages, *self.weights, strict=True):
            part = tokens - begin if stage.tokens is None else min(tokens - begin, stage.tokens)
            slope = (last - first) / stage.tokens if stage.tokens else 0.0
            found += part * (first + slope * part / 2)
            begin += part
        return found

    def past(self, tokens: int) -> dict[str, Any]:
        """All that decides a run's first `tokens` trained tokens: equal pasts, equal rows up to there."""
        skips = [skip for skip in self.skips if skip.at_row * skip.row_length < tokens]
        last_read = tokens + sum(skip.rows * skip.row_length for skip in skips)
        stages: list[dict[str, Any]] = []
        names: set[str] = set()
        begin = 0
        for stage, first, last in zip(self.stages, *self.weights, strict=True):
            ends = begin + stage.tokens if stage.tokens is not None else math.inf
            # How long a constant stage goes on after the past does not matter; the length of a ramp
            # decides its slope.
            open_ended = ends >= last_read and stage.weights_end is None
            shares = [_named(self, first), _named(self, last)]
            stages.append({"shares": shares, "tokens": None if open_ended else stage.tokens})
            names.update(shares[0], shares[1])
            if ends >= last_read:
                break
            begin = int(ends)
        return {
            "the seed": self.seed,
            "the tokenizer": self.tokenizer,
            "the sources": [(s.name, s.rows) for s in self.sources if s.name in names],
            "the stages": stages,
            "the skips": [dataclasses.asdict(skip) for skip in skips],
        }

    def changed_at(self, tokens: int, stage: Stage) -> "Plan":
        """The same plan up to `tokens` trained tokens, and from there on another stage to the end.

        What the run has read is fixed: stages that are complete keep the shares they had, and the
        stage that is cut as well.

        Raises:
          UserError: the plan has no such point, or a ramp would be cut.
        """
        kept: list[Stage] = []
        begin = 0
        for old, first, last in zip(self.stages, *self.weights, strict=True):
            if begin >= tokens:
                break
            ends = begin + old.tokens if old.tokens is not None else math.inf
            if old.weights_end is not None and ends > tokens:
                raise UserError(
                    f"the stage {old.name!r} is a ramp, and {tokens:,} tokens lie inside it: let the "
                    f"change begin at its end, {ends:,}."
                )
            kept.append(
                dataclasses.replace(
                    old,
                    tokens=int(min(ends, tokens)) - begin,
                    weights=_named(self, first),
                    weights_end=None if old.weights_end is None else _named(self, last),
                    fixed=True,
                )
            )
            begin = int(min(ends, tokens))
        if begin < tokens or not kept:
            raise UserError(f"the plan has no point at {tokens:,} tokens: it ends at {begin:,}.")
        return dataclasses.replace(self, stages=(*kept, stage))


def _named(plan: Plan, weights: np.ndarray) -> dict[str, float]:
    return {name: float(w) for name, w in zip(plan.names, weights, strict=True) if w}


def _as_dict(stage: Stage) -> dict[str, Any]:
    found = dataclasses.asdict(stage)
    return {k: dict(v) if isinstance(v, Mapping) else v for k, v in found.items()}


def _known(source: PlanSource) -> float:
    """The tokens of one epoch, which a cap needs."""
    if source.tokens is None:
        raise UserError(
            f"max_epochs of {source.name!r} needs to know its tokens: fill them in with "
            "`python -m mobilellm_jax.plan --data=DIR`, or leave the cap out."
        )
    return float(source.tokens)


def _known_keys(raw: Mapping[str, Any], what: str, keys: Collection[str]) -> None:
    """Raises `KeyError` for a key that means nothing here: a misspelt one would be passed over."""
    if unknown := sorted(set(raw) - set(keys)):
        raise KeyError(f"a {what} has no key {unknown[0]!r}, only {', '.join(keys)}")


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _whole(value: Any) -> int:
    """A whole number, however JSON writes it."""
    if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _count(value: Any) -> int:
    found = _whole(value)
    if found > _MOST:
        raise ValueError(f"{value!r} is more than {_MOST:,}")
    return found


def _source(raw: Mapping[str, Any]) -> PlanSource:
    _known_keys(raw, "source", _fields(PlanSource))
    rows, tokens, epochs = (raw.get(key) for key in ("rows", "tokens", "max_epochs"))
    return PlanSource(
        str(raw["name"]),
        str(raw["path"]),
        None if rows is None else _count(rows),
        None if tokens is None else _count(tokens),
        None if epochs is None else float(epochs),
    )


def _stage(raw: Mapping[str, Any]) -> Stage:
    _known_keys(raw, "stage", _fields(Stage))
    tokens, end, fixed = raw.get("tokens"), raw.get("weights_end"), raw.get("fixed", False)
    if not isinstance(fixed, bool):
        raise ValueError(f"fixed is {fixed!r}, neither true nor false")
    return Stage(
        str(raw["name"]),
        None if tokens is None else _count(tokens),
        {str(k): float(v) for k, v in raw["weights"].items()},
        None if end is None else {str(k): float(v) for k, v in end.items()},
        fixed,
    )


def _skip(raw: Mapping[str, Any]) -> Skip:
    _known_keys(raw, "skip", _fields(Skip))
    at_row, rows, row_length = (_count(raw[key]) for key in ("at_row", "rows", "row_length"))
    return Skip(at_row, rows, row_length, str(raw.get("reason", "")))


def _check(plan: Plan, where: str) -> None:
    if not plan.sources or not plan.stages:
        raise UserError(f"{where} needs at least one source and one stage.")
    for what, names in (("source", plan.names), ("stage", [s.name for s in plan.stages])):
        if len(set(names)) < len(names):
            raise UserError(f"{where} names a {what} twice: {', '.join(sorted(names))}.")
    for source in plan.sources:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", source.name):
            raise UserError(
                f"{where}: a source cannot be called {source.name!r}: use a-z, digits and underscores."
            )
        for key in ("rows", "tokens", "max_epochs"):
            value = getattr(source, key)
            if value is not None and not value > 0:
                raise UserError(f"{where}: {key} of {source.name!r} is {value}, not above 0.")
    last = plan.stages[-1]
    for stage in plan.stages:
        endless = stage.tokens is None
        needs_end = [s for s in plan.sources if s.max_epochs is not None] or stage.weights_end
        if endless and (stage is not last or needs_end):
            why = "others follow it" if stage is not last else "caps and ramps need its length"
            raise UserError(f"{where}: the stage {stage.name!r} has no `tokens`, and {why}.")
        if not endless and (stage.tokens or 0) <= 0:
            raise UserError(f"{where}: tokens of the stage {stage.name!r} are not above 0.")
    for skip in plan.skips:
        if skip.at_row < 0 or skip.rows < 1 or skip.row_length < 1:
            raise UserError(f"{where}: the skip at row {skip.at_row} is not usable.")
    at = [skip.at_row for skip in plan.skips]
    if sorted(at) != at:
        raise UserError(f"{where}: the skips are not in the order of the run.")
    for stage in plan.stages:
        for weights in (stage.weights, stage.weights_end or {}):
            if unknown := set(weights) - set(plan.names):
                raise UserError(
                    f"{where}: the stage {stage.name!r} gives {', '.join(sorted(unknown))} a weight, "
                    f"but the sources are {', '.join(plan.names)}."
                )


def _normalised(stage: Stage, where: str) -> Stage:
    said = f"the weights of the stage {stage.name!r} in {where}"
    weights = normalised(stage.weights, said)
    end = None if stage.weights_end is None else normalised(stage.weights_end, said)
    return dataclasses.replace(stage, weights=weights, weights_end=end)


def normalised(weights: Mapping[str, float], said: str) -> dict[str, float]:
    """Weights that sum to 1, zeros left out; `said` names them in messages.

    Raises:
      UserError: one is negative or no number, or they do not sum to 1 within `TOLERANCE`.
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise UserError(f"{said}: {name} has {weight}, but a weight is a number from 0 on.")
    total = math.fsum(weights.values())
    if abs(total - 1) > TOLERANCE:
        raise UserError(f"{said} sum to {total:.6g}, not to 1: mend them so that the sum is 1.")
    if abs(total - 1) > 1e-9:
        print(f"plan: {said} sum to {total:.6g}; they are renormalised to 1.", flush=True)
        weights = {name: weight / total for name, weight in weights.items()}
    return {name: weight for name, weight in weights.items() if weight}
