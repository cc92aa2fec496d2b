"""When co-evolution ends, by distributions that are known."""

import numpy as np
import pyarrow

from data_mixing import benefits
from data_mixing.benefits import Judged, Rules


def synthetic(centre=1.0, width=1.0, sources=("a", "b"), shift=0.0, count=200):
    """Documents of one row each, about a mean; those of the last source are shifted."""
    rng = np.random.default_rng(0)
    benefit = centre + width * rng.standard_normal(count * len(sources))
    source = np.repeat(np.array(sources, object), count)
    benefit[source == sources[-1]] += shift
    numbers = np.arange(len(source))
    tokens = np.full(len(source), 10.0)
    keys = [("f", i + 1, "") for i in numbers.tolist()]
    return Judged(source, keys, tokens, benefit, numbers, numbers, tokens, benefit)


def spread(**shape):
    found = synthetic(**shape)
    return benefits.distribution(found, found.benefit_M > 0, 0)


def test_it_ends_where_too_little_helps():
    first, now = spread(), spread(centre=-2.0)
    assert 0 < now.share < 0.1
    assert "documents that help have" in benefits.stop_reason(first, now, Rules())
    loose = Rules(least_share=0.0, above_zero=False)
    assert benefits.stop_reason(first, now, loose) == ""
    none = spread(centre=-20.0)
    assert "none of the 400 documents helps" in benefits.stop_reason(first, none, loose)


def test_it_ends_where_both_size_and_range_have_collapsed():
    first = spread()
    assert benefits.stop_reason(first, first, Rules()) == ""
    reason = benefits.stop_reason(first, spread(centre=0.05, width=0.05), Rules())
    assert "benefits have collapsed" in reason
    for now in (spread(centre=1.0, width=0.05), spread(centre=0.02, width=0.5)):
        assert "collapsed" not in benefits.stop_reason(first, now, Rules(above_zero=False))
    small = spread(centre=0.05, width=0.05)
    assert benefits.stop_reason(small, small, Rules()) == ""  # the first one has nothing beside it
    assert benefits.stop_reason(first, small, Rules(collapsed=0.0)) == ""


def test_it_ends_where_no_source_has_a_mean_above_zero():
    first = spread()
    now = spread(centre=0.0)
    assert "no source has a mean benefit" in benefits.stop_reason(first, now, Rules())
    assert benefits.stop_reason(first, now, Rules(above_zero=False)) == ""
    # One that harms does not hide one that helps.
    mixed = spread(centre=0.5, shift=-2.0)
    assert mixed.quantiles["50%"] < 0 and benefits.stop_reason(first, mixed, Rules()) == ""


def scores(factor):
    rng = np.random.default_rng(1)
    lines = {
        "source": ["a"] * 300,
        "row": np.arange(300),
        "tokens": np.full(300, 10),
        "file": ["f"] * 300,
        "place": np.arange(300),
        "id": [""] * 300,
        "dot/math": factor * (1.0 + rng.standard_normal(300)),
        "dot/language": 100 * factor * (1.0 + rng.standard_normal(300)),
    }
    return pyarrow.table(lines)


def test_a_collapse_is_seen_on_one_scale_and_hidden_by_a_scale_of_each_round():
    def shown(table, scales):
        found = benefits.judged(table, "dot", scales)
        return benefits.distribution(found, found.benefit_M > 0, 0)

    first, later = scores(1.0), scores(0.01)
    scales = benefits.scales_of(first, "dot", ["math", "language"], True)
    own = benefits.scales_of(later, "dot", ["math", "language"], True)
    before = shown(first, scales)
    assert "collapsed" in benefits.stop_reason(before, shown(later, scales), Rules())
    assert benefits.stop_reason(before, shown(later, own), Rules()) == ""
    raw = benefits.scales_of(first, "dot", ["math", "language"], False)
    assert "collapsed" in benefits.stop_reason(shown(first, raw), shown(later, raw), Rules())
    # On one scale neither capability decides by its size.
    found = benefits.judged(first, "dot", scales).benefit_M
    for capability in ("math", "language"):
        assert np.corrcoef(found, first[f"dot/{capability}"])[0, 1] > 0.6


def test_quantiles_are_those_of_documents_repeated_as_often_as_they_weigh():
    rng = np.random.default_rng(2)
    values, weights = rng.standard_normal(50), rng.integers(1, 9, 50)
    repeated = np.sort(np.repeat(values, weights))
    for name, value in benefits.quantiles(values, weights.astype(float)).items():
        share = float(name.rstrip("%")) / 100
        assert value == repeated[max(int(np.ceil(share * len(repeated) - 1e-9)) - 1, 0)]
