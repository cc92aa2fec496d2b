"""Import paths: how a user's own block, objective, optimizer, schedule or scorer comes in."""

import importlib
from typing import Any

from mobilellm_jax.errors import UserError


def import_path(path: str, key: str, below: str = "config.") -> Any:
    """The object that `package.module:name` names.

    Args:
      path: import path, the module and the name in it separated by a colon.
      key: the configuration key or the flag it stands under, for the error message.
      below: what is written before that: `--` for a flag.

    Raises:
      UserError: the path has another form, or the module or the name does not exist.
    """
    module, colon, name = path.partition(":")
    if not (module and colon and name) or module.startswith("."):
        raise UserError(f"{below}{key}={path!r} is not an import path: write package.module:name.")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and not f"{module}.".startswith(f"{error.name}."):
            raise  # the module exists, and something that it imports does not
        raise UserError(
            f"{below}{key}={path!r}: there is no module {error.name!r}; is it on PYTHONPATH?"
        ) from None
    if not hasattr(found, name):
        raise UserError(f"{below}{key}={path!r}: the module {module} has no {name!r}.")
    return getattr(found, name)
