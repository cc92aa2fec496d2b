"""What the documentation shows is there: programs, flags, configuration keys, and what Python imports."""

import ast
import importlib
import re
from pathlib import Path

import pytest
import runs
import tiny
from ml_collections import ConfigDict

from mobilellm_jax.training.config import base_config

ROOT = Path(__file__).parents[1]
PAGES = (
    *("README.md", "Makefile", "docs/*.md", "launch/*", "configs/**/*.py"),
    *("mobilellm_jax/*.py", "data_mixing/*.py", "benchmarks/*.py"),
)


def commands():
    """(page, program, what stands behind it on its line) of every command."""
    for page in sorted(page for pattern in PAGES for page in ROOT.glob(pattern)):
        text = re.sub(r"\\\n\s*", " ", page.read_text())
        for program, rest in re.findall(r"python -m ((?:\w+\.)+\w+)([^`\n]*)", text):
            yield page.relative_to(ROOT), program, rest


def imports():
    """(page, module, name) of all that lines of Python import from our packages."""
    for page in sorted(page for pattern in PAGES for page in ROOT.glob(pattern)):
        for lines in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
            for node in ast.walk(ast.parse(lines)):
                module = getattr(node, "module", None) or ""
                if module.split(".")[0] in ("mobilellm_jax", "data_mixing"):
                    yield from ((page.relative_to(ROOT), module, n.name) for n in node.names)


SHOWN = list(commands())
PROGRAMS = {program for _, program, _ in SHOWN if (ROOT / program.split(".")[0]).is_dir()}


@pytest.mark.parametrize("program", sorted(PROGRAMS))
def test_the_flags_of_commands_are_there(program):
    assert (ROOT / f"{program.replace('.', '/')}.py").exists()
    try:
        said = runs.program(program, "--helpshort")
    except ImportError as error:
        pytest.skip(f"needs {error.name}")
    known = {"config", "help", *re.findall(r"(?m)^ +--(?:\[no\])?(\w+): ", said.out)}
    missing = {
        f"{page}: --{flag}"
        for page, shown, rest in SHOWN
        for flag in re.findall(r"(?<![\w-])--(\w+)(?=[=\s]|$)", rest.split(" -m ")[0])
        if shown == program and not {flag, flag.removeprefix("no")} & known
    }
    assert not missing


def test_the_configuration_keys_of_commands_are_there():
    def keys(tree, before=""):
        for key, value in tree.items():
            yield before + key
            if isinstance(value, ConfigDict):
                yield from keys(value, f"{before}{key}.")

    known = set(keys(base_config(tiny.MODEL)))
    shown = {
        (page, key) for page, _, rest in SHOWN for key in re.findall(r"--config\.([\w.]+)=", rest)
    }
    assert shown and not {(page, key) for page, key in shown if key not in known}


def test_what_lines_of_python_import_is_there():
    shown = list(imports())
    assert shown
    for page, module, name in shown:
        found = importlib.import_module(module)
        assert hasattr(found, name) or (Path(found.__file__).parent / f"{name}.py").exists(), (
            f"{page}: {module} has no {name}"
        )
