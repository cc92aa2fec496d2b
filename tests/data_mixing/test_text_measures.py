"""Measures of texts: computed once, found by nobody else, and what a user's own function may return."""

import numpy as np
import pytest

from data_mixing import text_measures
from data_mixing.text_measures import Measure, is_import_path, of_callable, remembered
from mobilellm_jax.errors import UserError

TEXTS = [f"text {number}" * number for number in range(1, 24)]


def lengths(texts):
    return np.array([len(text) for text in texts], np.float64)


def vectors(texts):
    return np.stack([lengths(texts), 1 / lengths(texts)], axis=1)


def answers(value):
    """A function of texts that answers so, whatever it is asked."""
    return lambda texts: value


WRONG = {
    "one for all": answers(1.0),
    "too few": answers([1.0]),
    "a vector": vectors,
    "not finite": answers([1.0, np.nan]),
    "no numbers": answers(["a", "b"]),
    "nothing": answers(None),
}


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A function: a measure by its identity and what is computed -> its values, and texts it was asked."""
    monkeypatch.setattr(text_measures, "CHUNK", 5)

    def ask(identity, of=lengths, texts=TEXTS):
        seen, told = [], []

        def computed(some):
            seen.extend(some)
            return of(some)

        found = remembered(
            Measure(identity, computed),
            [text.encode() for text in texts],
            lambda numbers: [texts[n] for n in numbers],
            tmp_path,
            told.append,
        )
        assert sum(told) == len(texts)
        return found, seen

    return ask


@pytest.mark.parametrize("of", [lengths, vectors])
def test_each_text_is_computed_once(asked, of):
    found, seen = asked({"by": "a", "how": 1}, of)
    np.testing.assert_array_equal(found, of(TEXTS))
    assert seen == TEXTS
    again, seen = asked({"how": 1, "by": "a"}, of)
    np.testing.assert_array_equal(again, found)
    assert not seen


def test_neither_another_measure_nor_other_texts_find_it(asked):
    asked({"by": "a"})
    negative, seen = asked({"by": "b"}, lambda texts: -lengths(texts))
    np.testing.assert_array_equal(negative, -lengths(TEXTS))
    assert seen == TEXTS
    texts = [*TEXTS[:3], "another", *TEXTS[4:]]
    found, seen = asked({"by": "a"}, texts=texts)
    np.testing.assert_array_equal(found, lengths(texts))
    assert seen == texts[:5]  # those of its chunk


def test_of_no_text_there_is_nothing(asked):
    found, seen = asked({"by": "a"}, texts=[])
    assert len(found) == 0 and not seen


@pytest.mark.parametrize(("function", "axes"), [(lengths, 1), (vectors, 2)])
def test_a_function_of_a_users_own_is_a_measure(function, axes):
    measure = of_callable(f"{__name__}:{function.__name__}", "quality", axes)
    np.testing.assert_allclose(measure.of(TEXTS), function(TEXTS), rtol=1e-6)
    assert measure.of([TEXTS[0]]).dtype == (np.float64 if axes == 1 else np.float32)


def test_two_functions_are_two_measures():
    one, two = (of_callable(f"{__name__}:{name}", "quality", 1) for name in ("lengths", "vectors"))
    assert one.identity != two.identity


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_number_for_each_text_is_refused(name, monkeypatch):
    monkeypatch.setattr(text_measures, "import_path", lambda *given: WRONG[name])
    with pytest.raises(UserError, match="--quality=mine:f (must return|failed)"):
        of_callable("mine:f", "quality", 1).of(TEXTS[:2])


def test_a_function_that_is_not_there_is_told_by_its_flag():
    with pytest.raises(UserError, match="--quality"):
        of_callable("data_mixing.text_measures:nothing", "quality", 1)


def test_a_path_to_import_is_told_from_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_import_path("package.module:name") and is_import_path("module:name")
    assert not any(map(is_import_path, ("runs/base", "runs/base@8", "gs://bucket", "module")))
    (tmp_path / "module:name").mkdir()
    assert not is_import_path("module:name")
