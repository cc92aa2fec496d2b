"""Text that every Python installation carries: its own source, its documentation, and arithmetic.

Three corpora of different character, without network or files of ours: `code` (the standard
library's source), `prose` (its documentation strings and the `pydoc` topics) and `math` (worked
arithmetic, see `arithmetic.py`). They make `make run` and the tests possible everywhere; they are
no training set for a model anybody uses.

All that comes from one file is on one side of the train/held-out split, by a hash of the module's
path. A documentation string that other modules repeat would leak all the same: the held-out side
drops it.
"""

import ast
import dataclasses
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mobilellm_jax.data import arithmetic
from mobilellm_jax.data.corpora import Document, split_of
from mobilellm_jax.errors import UserError

HELDOUT = 0.06  # of the modules, and of the problems
MATH_BYTES = 3_500_000
SHORTEST = 40  # characters of a documentation string worth keeping

# Tests, caches, other people's packages, this machine's build; and what newer Pythons have dropped
# or distributions leave out, so that every installation gives about the same text.
_NOT_DIRECTORIES = re.compile(
    r"test|tests|idle_test|__pycache__|site-packages|dist-packages|_bundled|config-.*|\..*"
    r"|lib2to3|distutils|idlelib|turtledemo|ensurepip|tkinter|encodings|msilib|pydoc_data|__phello__"
)
_NOT_FILES = re.compile(
    r"_sysconfigdata.*|_sysconfig_vars.*|sitecustomize\.py|usercustomize\.py|.*_test\.py"
)
_TOPICS = "pydoc_data/topics.py"
_LEAST = 300  # modules; fewer means that the sources are not installed


@dataclasses.dataclass(frozen=True)
class EmbeddedCorpus:
    """One of the three; `texts` are its documents as (split, text). It is its own and only part."""

    name: str
    texts: tuple[tuple[str, str], ...] = dataclasses.field(repr=False)
    fingerprint: dict[str, Any]

    @property
    def size(self) -> int:
        """Characters of all documents."""
        return sum(len(text) for _, text in self.texts)

    def parts(self) -> list["EmbeddedCorpus"]:
        """See `corpora.Corpus`."""
        return [self]

    def documents(self) -> Iterator[Document]:
        """All documents, numbered."""
        for number, (split, text) in enumerate(self.texts, 1):
            yield Document(split, text, len(text), f"embedded:{self.name}", number)

    def unfinished(self) -> Mapping[str, int]:
        """See `corpora.Part`."""
        return {}

    def sample(self, budget: int) -> Iterator[str]:
        """Every k-th training document, so many that they are within the budget."""
        train = [text for split, text in self.texts if split == "train"]
        stride = -(-sum(map(len, train)) // budget)
        return iter(train[::stride])


def embedded_corpora(seed: int = 0) -> list[EmbeddedCorpus]:
    """The corpora `code`, `prose` and `math`; the seed is that of the arithmetic.

    Raises:
      UserError: this Python came without the source of its standard library.
    """
    python = {"python": ".".join(map(str, sys.version_info[:3]))}
    code, prose = _standard_library()
    problems = arithmetic.documents(seed, MATH_BYTES)
    math = tuple(
        (split_of(problem, HELDOUT), f"{problem}\n{solution}") for problem, solution in problems
    )
    return [
        EmbeddedCorpus("code", code, python),
        EmbeddedCorpus("prose", prose, python),
        EmbeddedCorpus("math", math, {"seed": seed, "version": arithmetic.VERSION}),
    ]


@dataclasses.dataclass(frozen=True)
class Module:
    """A source file of the standard library.

    Attributes:
      path: relative to the library, with slashes.
      source: its text.
      docstrings: its documentation strings as (qualified name, text), the module's own first.
    """

    path: str
    source: str
    docstrings: tuple[tuple[str, str], ...]

    @property
    def split(self) -> str:
        """The side of all that comes from this file."""
        return split_of(self.path, HELDOUT)


def modules(root: str | None = None) -> Iterator[Module]:
    """The standard library in order of path, without tests and machine-specific files."""
    base = Path(root or sysconfig.get_path("stdlib"))

    def walk(directory: Path) -> Iterator[Path]:
        for path in sorted(directory.iterdir(), key=lambda path: path.name):
            if path.is_symlink():  # loops, and files of the distribution
                continue
            if path.is_dir():
                if not _NOT_DIRECTORIES.fullmatch(path.name):
                    yield from walk(path)
            elif path.suffix == ".py" and not _NOT_FILES.fullmatch(path.name):
                yield path

    for path in walk(base):
        name = path.relative_to(base).as_posix()
        try:
            source = path.read_text(encoding="utf-8")
            yield Module(name, source, tuple(_docstrings(ast.parse(source), _dotted(name))))
        except (UnicodeDecodeError, SyntaxError, ValueError):
            continue  # not in UTF-8, or a template of code


def topics(root: str | None = None) -> dict[str, str]:
    """What `help("if")` and the like print: texts on Python's language, by topic."""
    path = Path(root or sysconfig.get_path("stdlib")) / _TOPICS
    if not path.exists():
        return {}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    table = next(node.value for node in tree.body if isinstance(node, ast.Assign))
    return ast.literal_eval(table)


def squeezed(text: str) -> str:
    """A text with every run of white space as one space: equal whatever its indentation."""
    return " ".join(text.split())


def _standard_library() -> tuple[tuple[tuple[str, str], ...], tuple[tuple[str, str], ...]]:
    """The documents of `code` and of `prose` as (split, text)."""
    library = list(modules())
    if len(library) < _LEAST:
        raise UserError(
            f"this Python ({sys.executable}) came with {len(library)} source files of its standard "
            f"library at {sysconfig.get_path('stdlib')}, too few to learn from: use another Python or "
            "--source."
        )
    code = tuple((module.split, module.source) for module in library if module.source.strip())
    about = list(dict.fromkeys(text for _, text in sorted(topics().items())))
    training = [module for module in library if module.split == "train"]
    trained = squeezed(
        "\n".join(
            [module.source for module in training]
            + [doc for module in training for _, doc in module.docstrings]
            + about
        )
    )
    prose = [("train", text) for text in about]
    seen = set()
    for module in library:
        kept = []
        for name, doc in module.docstrings:
            key = squeezed(doc)
            if key not in seen and (module.split == "train" or key not in trained):
                seen.add(key)
                kept.append(f"{name}\n\n{doc}")
        if kept:
            prose.append((module.split, "\n\n\n".join(kept) + "\n"))
    return code, tuple(prose)


_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def _docstrings(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    def visit(node: _Documented, name: str) -> Iterator[tuple[str, str]]:
        doc = ast.get_docstring(node)
        if doc and len(doc) >= SHORTEST:
            yield name, doc
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child, child.name if node is tree else f"{name}.{child.name}")

    return visit(tree, module)


def _dotted(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
