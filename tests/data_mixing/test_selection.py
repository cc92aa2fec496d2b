"""What the stages keep: that of brute force, of the scores alone, in whatever order documents come."""

import collections
import random

import numpy as np
import pytest

from data_mixing.embeddings import unit
from data_mixing.selection import (
    ALIKE,
    KEPT,
    MOST,
    Candidate,
    Rules,
    chosen,
    copies,
    draw,
    not_above,
    not_top,
    ranked,
)
from mobilellm_jax.errors import UserError


def keys(count):
    return [f"key {n}".encode() for n in range(count)]


def test_of_equal_texts_the_first_stays():
    found = copies("web", [b"a", b"b", b"a", b"c", b"b", b"a"])
    assert found == {2: "a copy of web:1", 4: "a copy of web:2", 5: "a copy of web:1"}


def test_quality_has_to_be_above_the_threshold():
    found = not_above({3: 4.1, 5: 4.0, 9: 2.125}, 4.0)
    assert not_above({1: float("nan")}, 4.0).keys() == {1}
    assert found == {5: "quality 4, not above 4", 9: "quality 2.125, not above 4"}


@pytest.mark.parametrize("count", [1, 2, 10, 11, 100, 997])
@pytest.mark.parametrize("fraction", [0.07, 0.1, 0.25, 1.0])
def test_the_top_fraction_is_that_of_brute_force(count, fraction):
    rng = np.random.default_rng(count)
    scores = dict(zip(range(100, 100 + count), rng.random(count).tolist(), strict=True))
    dropped = not_top("domain", scores, keys(100 + count), Rules(fraction=fraction))
    kept = set(scores) - set(dropped)
    # As many as the fraction asks for, in whole numbers: 7 % of 100 are 7, though 100 * 0.07 > 7.
    assert len(kept) == -(-count * round(100 * fraction) // 100)
    assert min(scores[n] for n in kept) >= max((scores[n] for n in dropped), default=0)
    for number, reason in dropped.items():
        share = {0.07: "7%", 0.1: "10%", 0.25: "25%"}[fraction]
        assert reason == f"domain {scores[number]:.4g}, not in the top {share}"


def test_equal_scores_are_decided_by_a_hash_of_the_text():
    names, rules = keys(40), Rules(fraction=0.25)
    kept = set(range(40)) - set(not_top("domain", dict.fromkeys(range(40), 0.5), names, rules))
    assert kept == set(sorted(range(40), key=lambda n: draw(names[n], 0))[:10])
    order = random.Random(0).sample(range(40), 40)
    moved = [names[n] for n in order]
    dropped = not_top("domain", dict.fromkeys(range(40), 0.5), moved, rules)
    assert {moved[n] for n in set(range(40)) - set(dropped)} == {names[n] for n in kept}


def many(count=300, scored=True, seed=0):
    """Candidates of three sources of different sizes, with unit vectors in clusters."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(40, 8))
    vectors = unit(centres[rng.integers(40, size=count)] + 0.2 * rng.normal(size=(count, 8)))
    names = rng.choice(["code", "math", "web"], size=count, p=[0.1, 0.3, 0.6])
    texts = rng.integers(count - 20, size=count)  # some are equal
    vectors = vectors[texts]
    scores = np.round(rng.random(count), 1) if scored else [None] * count
    candidates = [
        Candidate(str(name), n + 1, f"text {text}".encode(), score and float(score))
        for n, (name, text, score) in enumerate(zip(names, texts, scores, strict=True))
    ]
    return candidates, dict(zip(candidates, vectors, strict=True))


def brute_force(ordered, vectors, rules):
    """The definition, one document after the other, in float64."""
    kept, found = [], {}
    for c in ordered:
        cosines = [float(vectors[c].astype(np.float64) @ vectors[k]) for k in kept]
        if sum(k.source == c.source for k in kept) == rules.most:
            found[c] = MOST
        elif any(k.key == c.key for k in kept):
            found[c] = ALIKE
        elif cosines and max(cosines) >= rules.alike:
            found[c] = ALIKE, kept[int(np.argmax(cosines))].name
        else:
            found[c] = KEPT
            kept.append(c)
    return found


@pytest.mark.parametrize("scored", [True, False])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_the_greedy_choice_is_that_of_brute_force(chunk, scored):
    candidates, vectors = many(scored=scored)
    rules = Rules(alike=0.9, most=8)
    ordered = ranked(candidates, rules.seed)
    asked = collections.Counter()

    def of(some):
        asked.update(some)
        return np.array([vectors[c] for c in some])

    told = collections.Counter()
    found = chosen(ordered, rules, of, lambda count: told.update(documents=count), chunk)
    assert told["documents"] == len(candidates)
    expected = brute_force(ordered, vectors, rules)
    assert set(found) == set(candidates)
    assert {KEPT, MOST, ALIKE} <= {v.stage for v in found.values()}
    for candidate, verdict in found.items():
        like = expected[candidate]
        assert verdict.stage == (like[0] if isinstance(like, tuple) else like)
        if isinstance(like, tuple):
            assert verdict.nearest == like[1]
            assert verdict.reason == f"like {like[1]} ({verdict.similarity:.2f})"
    assert max(asked.values()) == 1
    if chunk == 1:  # no vector is made for a document of which nothing depends on it
        assert all(found[c].stage != MOST for c in asked)


def test_verdicts_do_not_depend_on_the_order_of_documents():
    candidates, vectors = many()
    rules = Rules(most=8)

    def verdicts(some):
        return chosen(ranked(some, 0), rules, lambda c: np.array([vectors[x] for x in c]), chunk=64)

    shuffled = random.Random(0).sample(candidates, len(candidates))
    assert verdicts(candidates) == verdicts(shuffled)


def test_a_better_document_wins_over_one_like_it():
    close = unit(np.array([[1.0, 0.1], [1.0, 0.0], [0.0, 1.0]]))
    worse, better, other = (
        Candidate(source, 1, source.encode(), score)
        for source, score in (("a", 0.1), ("b", 0.9), ("c", 0.2))
    )
    vectors = dict(zip((worse, better, other), close, strict=True))
    found = chosen(
        ranked([worse, better, other], 0), Rules(), lambda c: np.array([vectors[x] for x in c])
    )
    assert found[better].stage == found[other].stage == KEPT
    assert found[worse].reason == "like b:1 (1.00)" and found[worse].nearest == "b:1"


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_what_is_kept_tells_the_nearest_before_it_and_of_equally_near_ones_the_first(chunk):
    directions = unit(np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    some = [Candidate("web", n, bytes([n]), 1.0 - n / 8) for n in (1, 2, 3)]
    vectors = dict(zip(some, directions, strict=True))
    found = chosen(some, Rules(), lambda c: np.array([vectors[x] for x in c]), chunk=chunk)
    assert [found[c].stage for c in some] == [KEPT] * 3
    assert found[some[2]].nearest == "web:1"
    assert found[some[2]].similarity == pytest.approx(0.5**0.5)


def test_as_alike_as_the_rule_says_is_dropped():
    some = [Candidate("web", n, bytes([n])) for n in (1, 2)]
    found = chosen(
        some, Rules(alike=1.0), lambda c: np.eye(1, 2, dtype=np.float32).repeat(len(c), 0)
    )
    assert [found[c].stage for c in some] == [KEPT, ALIKE]


def test_equal_texts_with_equal_scores_have_one_order():
    some = [Candidate(name, n, b"same", 0.5) for name in ("web", "code") for n in (2, 1)]
    assert ranked(some, 0) == ranked(some[::-1], 0)


def test_without_vectors_only_equal_texts_are_alike():
    candidates, _ = many(scored=False)
    found = chosen(ranked(candidates, 0), Rules(most=1000))
    kept = [c for c, v in found.items() if v.stage == KEPT]
    assert len(kept) == len({c.key for c in candidates})
    assert {c.key for c in kept} == {c.key for c in candidates}
    names = {c.key: c.name for c in kept}
    assert all(
        (found[c].similarity, found[c].nearest) == (1, names[c.key])
        for c in candidates
        if found[c].stage != KEPT
    )


def test_another_seed_draws_other_documents_where_there_are_no_scores():
    candidates, _ = many(scored=False)
    first, second = (
        {
            c.key
            for c, v in chosen(ranked(candidates, s), Rules(most=10, seed=s)).items()
            if v.stage == KEPT
        }
        for s in (0, 1)
    )
    assert len(first) == len(second) == 30 and len(first & second) < 15


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({"fraction": 0.0}, "--fraction=0.0 is not above 0 and at most 1"),
        ({"fraction": 10}, "--fraction=10"),
        ({"alike": 1.5}, "--alike=1.5"),
        ({"alike": 0.0}, "--alike=0.0"),
        ({"most": 0}, "--per_source=0"),
        ({"quality_above": float("nan")}, "--quality_threshold=nan"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_refused(rule, said):
    with pytest.raises(UserError, match=said):
        Rules(**rule)


def test_rules_may_go_to_their_ends():
    Rules(fraction=1.0, alike=1.0, most=1)
