"""Folders of results: whose they are, and that nothing else lies in them."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from mobilellm_jax.errors import UserError
from mobilellm_jax.files import replaced
from mobilellm_jax.training.config import differences

# What `mobilellm_jax.files` leaves when it is killed.
_HALF = r"\.(unfinished|partial-[0-9a-f]{8})$"


def claim(folder: epath.PathLike, settings: Mapping[str, Any], name: str = "settings.json") -> None:
    """Makes a folder for what these settings make, or checks that the one that is there is it.

    One that holds nothing but settings is of whoever comes: what it was claimed for was refused, or
    killed, before it made anything.

    Args:
      folder: of results.
      settings: plain values that decide what is in it.
      name: of the file that keeps them.

    Raises:
      UserError: it holds what other settings have made, or something else.
    """
    folder = epath.Path(folder)
    path = folder / name
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: name a directory as --out.")
    folder.mkdir(parents=True, exist_ok=True)
    if all(file.name in (name, f"{name}.unfinished") for file in folder.iterdir()):
        path.unlink(missing_ok=True)
    elif not path.exists():
        raise UserError(f"{folder} holds no {name}, so it holds something else: name a new --out.")
    agree(path, settings)


def agree(path: epath.Path, settings: Mapping[str, Any]) -> None:
    """Writes the settings into a file, or checks that they are the ones there.

    Raises:
      UserError: they are others, or damaged.
    """
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        with replaced(path) as unfinished:
            unfinished.write_text(json.dumps(settings, indent=2) + "\n")
        return
    try:
        there = json.loads(path.read_text())
    except (ValueError, RecursionError):
        raise UserError(f"{path} is damaged: put it back, or name a new --out.") from None
    if found := differences(there, settings):
        listed = "; ".join(f"{k}: {a!r} there, {b!r} here" for k, (a, b) in found.items())
        raise UserError(
            f"{path.parent} was made with other settings or other data ({listed}): name a new --out."
        )


def holding(out: epath.PathLike, own: Sequence[str]) -> epath.Path:
    """A folder for results of one program, which holds nothing but them; it is made if it is not there.

    Raises:
      UserError: it holds something else, or is a file.
    """
    out = epath.Path(out)
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: name a folder.")
    for path in sorted(out.iterdir()) if out.exists() else ():
        name = re.sub(_HALF, "", path.name)
        if name not in own:
            raise UserError(
                f"{out} holds {path.name}, which is not of this program: name a new folder."
            )
        if name != path.name:
            path.rmtree() if path.is_dir() else path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    return out
