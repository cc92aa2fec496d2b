"""Measurements in processes of their own, so that none inherits memory, caches or threads of another."""

import json
import subprocess
import sys
from typing import Any


def told(module: str, *arguments: str) -> Any:
    """The last line that `python -m MODULE ARGUMENTS` prints, as JSON; its errors are seen as they come.

    Raises:
      CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])
