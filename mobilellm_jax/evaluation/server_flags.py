"""Flags by which a program is told of a server of chat completions, and the endpoint that they name."""

import json
import os
from typing import Any

from absl import flags

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.endpoint import Endpoint


def define_server(who: str, what: str) -> None:
    """Defines --WHO, --WHO_model, --WHO_key_env and --WHO_options; `what` is the help of the first."""
    flags.DEFINE_string(who, "", what)
    flags.DEFINE_string(f"{who}_model", "", f"Name of the model on --{who}.")
    flags.DEFINE_string(
        f"{who}_key_env", "OPENAI_API_KEY", f"Environment variable with --{who}'s key."
    )
    flags.DEFINE_string(f"{who}_options", "", f"What else --{who} is told, in JSON.")


def named_server(who: str) -> Endpoint:
    """The server that the flags of `who` name; --workers says how much it is asked at a time.

    Raises:
      UserError: they name none, no model on it, or a key that is not there.
    """
    args = flags.FLAGS
    url, model = getattr(args, who), getattr(args, f"{who}_model")
    if not url:
        raise UserError(f"--{who}=URL is missing: a server of chat completions, up to its /v1.")
    if not model:
        raise UserError(f"--{who}_model=NAME is missing: the model's name on {url}.")
    variable = getattr(args, f"{who}_key_env")
    key = os.environ.get(variable)
    if key is None and args[f"{who}_key_env"].present:
        raise UserError(f"--{who}_key_env={variable}: the environment has no such variable.")
    return Endpoint(url, model, key, server_settings(who), workers=args.workers)


def server_settings(who: str) -> dict[str, Any]:
    """What --WHO_options tells the server.

    Raises:
      UserError: it is no object in JSON.
    """
    given = getattr(flags.FLAGS, f"{who}_options")
    try:
        options = json.loads(given or "{}")
    except ValueError:
        options = None
    if not isinstance(options, dict):
        raise UserError(f"--{who}_options={given} is no object in JSON, as '{{\"top_p\": 0.9}}'.")
    return options
