"""Embedded corpora: nothing but the library's source, everything of one file on one side."""

import ast
import sys

import pytest

from mobilellm_jax.data import embedded
from mobilellm_jax.data.embedded import embedded_corpora, modules, squeezed, topics
from mobilellm_jax.errors import UserError


@pytest.fixture(scope="module")
def corpora():
    return {corpus.name: corpus for corpus in embedded_corpora(0)}


@pytest.fixture(scope="module")
def library():
    return list(modules())


def texts(corpus, split):
    return [document.text for document in corpus.documents() if document.split == split]


def test_there_is_enough_of_everything(corpora):
    least = {"code": 5_000_000, "prose": 1_200_000, "math": 3_000_000}
    for name, size in least.items():
        train, heldout = (sum(map(len, texts(corpora[name], s))) for s in ("train", "heldout"))
        assert size < train < 2 * size
        assert 0.02 < heldout / train < 0.1
        (part,) = corpora[name].parts()
        assert sum(d.progress for d in part.documents()) == part.size


@pytest.mark.slow
def test_it_is_the_same_every_time(corpora):
    again = {corpus.name: corpus for corpus in embedded_corpora(0)}
    assert again == corpora
    other = {corpus.name: corpus for corpus in embedded_corpora(1)}
    assert [name for name in other if other[name].texts != corpora[name].texts] == ["math"]
    assert [n for n in other if other[n].fingerprint != corpora[n].fingerprint] == ["math"]


def test_code_and_prose_of_a_module_are_on_one_side(corpora, library):
    code = {document.text: document.split for document in corpora["code"].documents()}
    owner = {}
    for module in library:
        if module.source.strip():
            assert code[module.source] == module.split
        for name, doc in module.docstrings:
            owner.setdefault(f"{name}\n\n{doc}", set()).add(module.split)
    for document in corpora["prose"].documents():
        for part in document.text.rstrip("\n").split("\n\n\n"):
            assert document.split in owner.get(part, {document.split})


def test_no_heldout_docstring_is_in_any_training_text(corpora):
    train = squeezed("\n".join(t for c in corpora.values() for t in texts(c, "train")))
    heldout = "\n\n\n".join(texts(corpora["prose"], "heldout")).split("\n\n\n")
    searched = [part.partition("\n\n")[2] for part in heldout]
    searched = [doc for doc in map(squeezed, searched) if len(doc) >= embedded.SHORTEST]
    assert len(searched) > 100
    assert not [doc for doc in searched if doc in train]


def test_heldout_problems_are_not_trained_on(corpora):
    train, heldout = (
        {text.partition("\n")[0] for text in texts(corpora["math"], split)}
        for split in ("train", "heldout")
    )
    assert heldout and not train & heldout


def test_a_sample_is_bounded_and_for_training(corpora):
    for corpus in corpora.values():
        train = texts(corpus, "train")
        assert list(corpus.sample(1 << 30)) == train
        sample = list(corpus.sample(300_000))
        assert set(sample) <= set(train) and 50_000 < sum(map(len, sample)) < 600_000


def test_tests_packages_and_machine_files_are_left_out(tmp_path):
    kept = ["a.py", "pkg/__init__.py", "pkg/inner.py"]
    dropped = [
        *("test/a.py", "pkg/tests/b.py", "idlelib/idle_test/c.py", "site-packages/d.py"),
        *(
            "dist-packages/e.py",
            "__pycache__/f.py",
            "ensurepip/_bundled/g.py",
            "config-3.11-x/h.py",
        ),
        *("_sysconfigdata__linux.py", "sitecustomize.py", "pydoc_data/topics.py", "i.txt"),
    ]
    for name in (*kept, *dropped):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('"""Text."""\n')
    (tmp_path / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe4'\n")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "link.py").symlink_to(tmp_path / "a.py")
    assert [module.path for module in modules(str(tmp_path))] == kept


def test_the_library_is_in_order_and_parses(library):
    paths = [module.path for module in library]
    assert len(set(paths)) == len(paths) > 300
    assert paths == sorted(paths, key=lambda path: path.split("/"))
    assert not [path for path in paths if "/test/" in f"/{path}" or "site-packages" in path]
    docs = next(module.docstrings for module in library if module.path == "json/__init__.py")
    assert docs[0][0] == "json" and {name for name, _ in docs} >= {"dumps", "loads"}
    assert (
        ast.get_docstring(ast.parse(sys.modules["json"].__loader__.get_source("json")))
        == docs[0][1]
    )


def test_topics_are_texts_by_name():
    assert "if" in topics() and '"if" statement' in topics()["if"].replace("The ", "")


def test_a_python_without_sources_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(embedded.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(UserError, match="0 source files"):
        embedded_corpora()
