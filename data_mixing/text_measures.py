"""What is computed of texts, by whom, and kept on disk so that it is computed once."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mobilellm_jax.errors import UserError
from mobilellm_jax.files import replaced
from mobilellm_jax.imports import import_path

CHUNK = 512  # texts that are computed, and kept, together


@dataclasses.dataclass(frozen=True)
class Measure:
    """A number or a vector for each text, which depends on that text alone, but for rounding.

    Attributes:
      identity: who computes it and how, in plain values.
      of: texts to an array with an entry for each.
    """

    identity: Mapping[str, Any]
    of: Callable[[Sequence[str]], np.ndarray]


def is_import_path(name: str) -> bool:
    """Whether a flag's value is meant as `package.module:name` and not as a folder."""
    return bool(re.fullmatch(r"[A-Za-z_][\w.]*:\w+", name)) and not Path(name).exists()


def of_callable(path: str, flag: str, axes: int) -> Measure:
    """The measure that a function of a user's own computes.

    Args:
      path: `package.module:name`; it takes a list of texts.
      flag: under which it was given, for error messages.
      axes: of what it returns: 1 for a number a text, 2 for a vector.

    Raises:
      UserError: there is no such function; later, it returns something else, or is not finite.
    """
    function = import_path(path, flag, "--")

    def of(texts: Sequence[str]) -> np.ndarray:
        try:
            found = np.asarray(function(list(texts)), np.float64 if axes == 1 else np.float32)
        except (TypeError, ValueError) as error:
            raise UserError(f"--{flag}={path} failed: {type(error).__name__}: {error}.") from error
        if found.ndim != axes or len(found) != len(texts) or not np.isfinite(found).all():
            wanted = "a finite number" if axes == 1 else "a vector of finite numbers"
            raise UserError(
                f"--{flag}={path} must return {wanted} for each of {len(texts)} texts, not an array "
                f"of shape {found.shape}{'' if np.isfinite(found).all() else ' with NaN or infinity'}."
            )
        return found

    return Measure({"callable": path}, of)


def remembered(
    measure: Measure,
    keys: Sequence[bytes],
    texts: Callable[[range], list[str]],
    folder: Path,
    told: Callable[[int], Any] = lambda count: None,
) -> np.ndarray:
    """A measure of many texts, of which each chunk is computed once.

    A file is named by what computed it and by its texts, so another measure, or other texts, never
    find it; chunks are the same in every run, so that one that goes on rounds as one that was not
    stopped.

    Args:
      measure: what to compute.
      keys: of the texts, equal for equal texts alone.
      texts: those of a range of them; asked for only where they are needed.
      folder: where the files are.
      told: is called with the number of texts after each chunk.

    Returns:
      [N] or [N, D]; [0] where there are no texts.
    """
    found = []
    identity = json.dumps(measure.identity, sort_keys=True).encode()
    for at in range(0, len(keys), CHUNK):
        numbers = range(at, min(at + CHUNK, len(keys)))
        name = hashlib.sha256(b"".join([identity, b"\n", *(keys[n] for n in numbers)])).hexdigest()
        file = folder / f"{name[:32]}.npy"
        if not file.exists():
            values = measure.of(texts(numbers))
            with replaced(file) as unfinished, unfinished.open("wb") as opened:
                np.save(opened, values)
        found.append(np.load(file))
        told(len(numbers))
    return np.concatenate(found) if found else np.zeros(0)
