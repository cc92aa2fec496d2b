"""What benchmarks share: measurements in processes of their own, that inherit nothing, and sizes of files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def told(module: str, *arguments: str) -> Any:
    """The last line that `python -m MODULE ARGUMENTS` prints, as JSON; its errors are seen as they come.

    Raises:
      CalledProcessError: it failed.
    """
    command = [sys.executable, "-m", module, *arguments]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ended.stdout.splitlines()[-1])


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
