"""Probe sets: the documents that stand for a capability, in two halves.

One half scores training data, the other is held out to judge what came of it. A directory of them:

    probes.json          capabilities and their sources, settings, counts
    <source>.jsonl       {"id", "text", "source", "half", "file", "place"} a line, what was kept
    decisions/<source>.parquet   every document that was looked at, and why it was kept or dropped
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mobilellm_jax.data.corpora import split_of
from mobilellm_jax.errors import UserError

VERSION = 1
HALVES = ("score", "heldout")
FILE = "probes.json"


@dataclasses.dataclass(frozen=True)
class Probe:
    """A document that was kept, and where it is from (see `corpora.Document`)."""

    text: str
    source: str
    half: str
    id: str = ""
    file: str = ""
    place: int = 1


@dataclasses.dataclass(frozen=True)
class ProbeSets:
    """All probes of a directory, by source, and which sources stand for which capability."""

    capabilities: Mapping[str, tuple[str, ...]]
    documents: Mapping[str, tuple[Probe, ...]]

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) of the capabilities and of all texts with their halves."""
        texts = {s: [[p.half, p.text] for p in probes] for s, probes in self.documents.items()}
        described = json.dumps([{k: list(v) for k, v in self.capabilities.items()}, texts])
        return hashlib.sha256(described.encode()).hexdigest()

    def of(self, capability: str, half: str) -> list[Probe]:
        """The probes of a capability, source by source.

        Raises:
          UserError: there is no such capability, or it has no probe in that half.
        """
        if capability not in self.capabilities:
            raise UserError(
                f"there is no capability {capability!r}, only {', '.join(self.capabilities)}."
            )
        sources = self.capabilities[capability]
        found = [p for source in sources for p in self.documents[source] if p.half == half]
        if not found:
            raise UserError(
                f"the capability {capability!r} has no probe in the half {half!r}: its sources "
                f"{', '.join(sources)} kept no document for it; keep a larger share of them."
            )
        return found


def half_of(text: str) -> str:
    """On which side a text stands, by its hash: the same text is always on the same side."""
    return HALVES[split_of(b"half:" + text.encode(), 0.5) == "heldout"]


def write(sets: ProbeSets, settings: Mapping[str, Any], directory: epath.PathLike) -> None:
    """Writes probes.json and a file per source into a directory that exists."""
    directory = epath.Path(directory)
    for source, probes in sets.documents.items():
        lines = [json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in probes]
        (directory / f"{source}.jsonl").write_text("".join(lines))
    described = {
        "version": VERSION,
        "capabilities": {name: list(sources) for name, sources in sets.capabilities.items()},
        "sources": {
            source: {half: sum(p.half == half for p in probes) for half in HALVES}
            for source, probes in sets.documents.items()
        },
        "fingerprint": sets.fingerprint,
        "settings": dict(settings),
    }
    (directory / FILE).write_text(json.dumps(described, indent=2) + "\n")


def load(directory: epath.PathLike) -> ProbeSets:
    """Reads a directory of probe sets.

    Raises:
      UserError: there is none, or its files are not what probes.json says.
    """
    path = epath.Path(directory) / FILE
    if not path.exists():
        raise UserError(
            f"there are no probe sets in {directory}: make them with `python -m data_mixing.probes`."
        )
    try:
        raw = json.loads(path.read_text())
        if raw["version"] != VERSION:
            raise UserError(f"{path} has version {raw['version']}, this program reads {VERSION}.")
        capabilities = {name: tuple(sources) for name, sources in raw["capabilities"].items()}
        documents = {s: _read(epath.Path(directory) / f"{s}.jsonl") for s in raw["sources"]}
        sets = ProbeSets(capabilities, documents)
        if sets.fingerprint != raw["fingerprint"]:
            raise UserError(f"the files beside {path} are not those it was written with.")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(
            f"the probe sets in {directory} cannot be read ({type(error).__name__}: {error}): make "
            "them again with `python -m data_mixing.probes`."
        ) from None
    return sets


def _read(path: epath.Path) -> tuple[Probe, ...]:
    return tuple(Probe(**json.loads(line)) for line in path.read_text().split("\n") if line)


def scoring(sets: ProbeSets, half: str, only: Sequence[str] = ()) -> dict[str, list[str]]:
    """The texts of one half by capability: of all, or of those named.

    Raises:
      UserError: see `ProbeSets.of`.
    """
    return {name: [p.text for p in sets.of(name, half)] for name in only or sets.capabilities}
