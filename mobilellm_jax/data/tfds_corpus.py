"""The records of a TFDS dataset as documents, read without TensorFlow."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from mobilellm_jax.data.corpora import PART, Document, Reading, first_texts
from mobilellm_jax.data.inputs import keys_of, text_of
from mobilellm_jax.errors import UserError, in_a_line

PREFIX = "tfds:"
_BATCH = 256  # records that are read at once


@dataclasses.dataclass(frozen=True)
class TfdsPart:
    """Records [start, stop) of a split."""

    corpus: "TfdsCorpus"
    start: int
    stop: int
    size: int

    def documents(self) -> Iterator[Document]:
        """All that are not empty.

        Raises:
          UserError: the dataset cannot be read, or holds no text.
        """
        corpus = self.corpus
        records, keys = corpus.open(), keys_of(corpus.text_key)
        reading = Reading(corpus.text_key, corpus.id_key, corpus.heldout, corpus.share)
        for first in range(self.start, self.stop, _BATCH):
            numbers = range(first, min(first + _BATCH, self.stop))
            for number, record in zip(numbers, records.__getitems__(list(numbers)), strict=True):
                document = reading.document(
                    [_decoded(record[key]) for key in keys],
                    functools.partial(corpus.where, number),
                    progress=self.size // (self.stop - self.start),
                    file=PREFIX + corpus.dataset,
                    place=number + 1,
                    id=text_of(_decoded(record.get(corpus.id_key))),
                )
                if document:
                    yield document

    def unfinished(self) -> Mapping[str, int]:
        """See `corpora.Part`: records have numbers."""
        return {}


@dataclasses.dataclass(frozen=True)
class TfdsCorpus:
    """A split of a dataset in ArrayRecord, or another format with random access.

    Attributes:
      name: of the source.
      dataset: `NAME[/CONFIG]:SPLIT`, prepared where TFDS looks for it, or `DIRECTORY:SPLIT`.
      text_key: the feature with the text.
      heldout: share of the documents that is kept out of training, 0 for none.
      id_key: the feature of what a document is called; it may be missing.
      share: of the documents that are read at all, see `Reading`.
      part_size: bytes of a part.
    """

    name: str
    dataset: str
    text_key: str = "text"
    heldout: float = 0.01
    id_key: str = "id"
    share: float = 1.0
    part_size: int = PART

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Name, version and counts of the dataset, not where it is."""
        builder, split = self._builder()
        return {
            "dataset": builder.info.full_name,
            "split": split,
            "records": len(self.open()),
            "bytes": self._bytes(),
            "text_key": self.text_key,
            "id_key": self.id_key,
            "heldout": self.heldout,
            "share": self.share,
            "part_size": self.part_size,
        }

    def open(self) -> Any:
        """The records by number, each with all of its features.

        Raises:
          UserError: there is no such dataset or split, or it has no feature `text_key`.
        """
        builder, split = self._builder()
        features = builder.info.features or {}
        if missing := [key for key in keys_of(self.text_key) if key not in features]:
            raise UserError(
                f"{self.dataset} has no feature {missing[0]!r} (it has {', '.join(features)}); see "
                "--text_key."
            )
        try:
            return builder.as_data_source(split)
        except (ValueError, NotImplementedError) as error:
            reason = in_a_line(error, 300)
            raise UserError(
                f"{PREFIX}{self.dataset} cannot be read ({reason}): prepare it with "
                "file_format=array_record, and name one of its splits."
            ) from None

    def where(self, number: int) -> str:
        """A record, for people."""
        return f"{PREFIX}{self.dataset}, record {number + 1}"

    def parts(self) -> list[TfdsPart]:
        """See `corpora.Corpus`: runs of equally many records."""
        records, size = len(self.open()), self._bytes()
        count = max(1, min(-(-size // self.part_size), records))
        bounds = [records * i // count for i in range(count + 1)]
        return [
            TfdsPart(self, start, stop, size * (stop - start) // max(records, 1))
            for start, stop in zip(bounds[:-1], bounds[1:], strict=True)
        ]

    def sample(self, budget: int) -> Iterator[str]:
        """The training texts among the first records of ten stretches of equal length."""
        records, stretches = len(self.open()), 10
        for i in range(stretches):
            start, stop = records * i // stretches, records * (i + 1) // stretches
            stretch = TfdsPart(self, start, stop, 0)
            yield from first_texts(stretch.documents(), budget // stretches + 1)

    def _bytes(self) -> int:
        builder, split = self._builder()
        info = builder.info.splits[split]
        return int(info.num_bytes or 0)

    def _builder(self) -> tuple[tfds.core.DatasetBuilder, str]:
        where, _, split = self.dataset.rpartition(":")
        try:
            if epath.Path(where).is_dir():
                return tfds.builder_from_directory(where), split
            return tfds.builder(where), split
        except (tfds.core.DatasetNotFoundError, FileNotFoundError, ValueError, KeyError) as error:
            reason = in_a_line(error, 300)
            raise UserError(
                f"there is no dataset {where!r} ({reason}): give tfds:NAME[/CONFIG]:SPLIT of one that "
                "is prepared, or tfds:DIRECTORY:SPLIT."
            ) from None


def _decoded(value: Any) -> Any:
    """Bytes as the text that they are; what is none stays as it is, and is told of as such."""
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return value
