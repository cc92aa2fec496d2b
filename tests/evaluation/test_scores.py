"""pass@k and standard errors are what enumeration and simulation say."""

import itertools
import math
import random
import statistics

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluation.scores import mean_pass_at_k, mean_score, pass_at_k


@pytest.mark.parametrize("samples", range(1, 9))
def test_it_is_the_share_of_subsets_with_a_correct_sample(samples):
    for correct, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        drawn = list(itertools.combinations([True] * correct + [False] * (samples - correct), k))
        expected = sum(map(any, drawn)) / len(drawn)
        assert pass_at_k(samples, correct, k) == pytest.approx(expected, abs=1e-14)


def test_pass_at_1_is_the_share_that_is_correct_and_pass_at_all_is_whether_any_is():
    assert pass_at_k(64, 13, 1) == pytest.approx(13 / 64, abs=1e-15)
    assert [pass_at_k(64, correct, 64) for correct in (0, 1, 64)] == [0.0, 1.0, 1.0]


def test_large_numbers_agree_with_exact_integers():
    samples, correct, k = 20_000, 37, 10_000
    exact = 1 - math.comb(samples - correct, k) / math.comb(samples, k)
    assert pass_at_k(samples, correct, k) == pytest.approx(exact, rel=1e-12)
    assert pass_at_k(10**6, 10**3, 7) == pytest.approx(
        1 - math.comb(10**6 - 10**3, 7) / math.comb(10**6, 7), rel=1e-10
    )


def test_it_is_unbiased():
    chance, k, draw = 0.2, 3, random.Random(0)
    estimates = [
        pass_at_k(5, sum(draw.random() < chance for _ in range(5)), k) for _ in range(20000)
    ]
    error = statistics.stdev(estimates) / math.sqrt(len(estimates))
    assert statistics.fmean(estimates) == pytest.approx(1 - (1 - chance) ** k, abs=4 * error)


def test_the_standard_error_is_the_spread_of_repeated_evaluations():
    draw = random.Random(1)

    def evaluation():
        chances = [draw.random() ** 2 for _ in range(40)]  # other problems each time
        return mean_pass_at_k([[draw.random() < chance for _ in range(8)] for chance in chances])

    scores = [evaluation() for _ in range(1000)]
    spread = statistics.stdev(score.mean for score in scores)
    assert statistics.fmean(s.standard_error for s in scores) == pytest.approx(spread, rel=0.1)
    assert statistics.fmean(s.mean for s in scores) == pytest.approx(1 / 3, abs=0.01)


def test_more_samples_of_the_same_problems_are_not_more_problems():
    once = mean_pass_at_k([[True], [False], [True], [False]])
    often = mean_pass_at_k([[True] * 100, [False] * 100, [True] * 100, [False] * 100])
    assert often == once and once.problems == 4
    assert once.standard_error == pytest.approx(math.sqrt(1 / 3 / 4))


def test_problems_count_equally_however_many_samples_they_have():
    assert mean_pass_at_k([[True, False], [True] * 10]).mean == 0.75


def test_values_of_one_problem_count_as_dependent():
    draw = random.Random(2)

    def evaluation():
        values, problems = [], []
        for problem in range(30):
            level = draw.gauss(0, 1)
            for _ in range(draw.randint(1, 9)):
                values.append(level + draw.gauss(0, 0.5))
                problems.append(problem)
        return mean_score(values, problems), mean_score(values)

    scores = [evaluation() for _ in range(1000)]
    spread = statistics.stdev(clustered.mean for clustered, _ in scores)
    clustered, naive = (statistics.fmean(s[i].standard_error for s in scores) for i in range(2))
    assert clustered == pytest.approx(spread, rel=0.1) and naive < 0.6 * spread
    assert scores[0][0].problems == 30


def test_one_problem_has_no_standard_error():
    assert mean_score([0.5]).mean == 0.5 and math.isnan(mean_score([0.5]).standard_error)


@pytest.mark.parametrize("numbers", [(3, 1, 4), (3, 1, 0), (0, 0, 1), (3, 4, 1), (3, -1, 1)])
def test_numbers_that_make_no_sense(numbers):
    with pytest.raises(UserError):
        pass_at_k(*numbers)
    with pytest.raises(UserError, match="nothing to average"):
        mean_score([])
