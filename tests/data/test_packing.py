"""Packing: every token once, nothing too long, and the one rule that readers go by."""

import numpy as np
import pytest

from mobilellm_jax.data.packing import (
    PACKERS,
    PLACEMENT,
    TEXT_PACKERS,
    BestFit,
    Concat,
    Packed,
    best_fit_decreasing,
    counted,
)

BOS, EOS = 1, 2


def random_documents(rng, count, longest):
    return [rng.integers(3, 1000, rng.integers(1, longest + 1)) for _ in range(count)]


def packed(packer, documents, rng):
    """All rows and placements, with the documents given in random portions."""
    given, rest = [], list(documents)
    while rest:
        count = rng.integers(0, 5)
        given.append(packer.add(rest[:count]))
        rest = rest[count:]
    given.append(packer.finish())
    return Packed(*map(np.concatenate, zip(*given, strict=True)))


def pack(packer, documents, rng):
    """All rows."""
    return packed(packer, documents, rng).rows


@pytest.mark.parametrize("row_length", [2, 7, 32, 101])
@pytest.mark.parametrize("seed", range(5))
def test_concat_makes_every_token_a_target_once_and_in_order(row_length, seed):
    rng = np.random.default_rng(seed)
    documents = random_documents(rng, 60, 40)
    rows = pack(Concat(row_length, BOS, EOS), documents, rng)
    stream = np.concatenate([[BOS, *document, EOS] for document in documents])
    assert rows.shape[1] == row_length + 1 and rows.dtype == np.int32
    assert (rows[1:, 0] == rows[:-1, -1]).all()  # neighbours overlap by one token
    targets = rows[:, 1:].ravel()
    assert (targets[: len(stream) - 1] == stream[1:]).all()
    assert (targets[len(stream) - 1 :] == BOS).all()
    assert len(targets) - (len(stream) - 1) < row_length  # no row of padding alone


@pytest.mark.parametrize("name", TEXT_PACKERS)
def test_rows_do_not_depend_on_how_documents_are_handed_over(name):
    documents = random_documents(np.random.default_rng(0), 80, 60)
    one = pack(PACKERS[name](16, BOS, EOS), documents, np.random.default_rng(1))
    other = pack(PACKERS[name](16, BOS, EOS), documents, np.random.default_rng(2))
    assert (one == other).all()


@pytest.mark.parametrize("row_length", [2, 7, 32, 101])
@pytest.mark.parametrize("seed", range(5))
def test_best_fit_holds_every_document_once(row_length, seed):
    rng = np.random.default_rng(seed)
    # Each document says in its first token who it is and in the others where they stand.
    documents = [np.append(1000 + i, 3 + np.arange(rng.integers(0, 80))) for i in range(60)]
    rows = pack(BestFit(row_length, BOS, EOS, window=400), documents, rng)
    pieces = [p.tolist() for row in rows for p in np.split(row, np.flatnonzero(row == BOS))]
    pieces = [p[1:] for p in pieces if len(p) > 1]
    expected = []
    for document in documents:
        body = [*document.tolist(), EOS]
        cuts = [body[i : i + row_length] for i in range(0, len(body), row_length)]
        if cuts[-1] == [EOS] and len(cuts) > 1:  # would be an empty document
            cuts[-1] = [body[-2], EOS]
        expected += cuts
    assert sorted(pieces) == sorted(expected)
    assert (rows[:, 0] == BOS).all()


@pytest.mark.parametrize("name", TEXT_PACKERS)
def test_segments_by_the_rule_are_the_documents(name):
    rng = np.random.default_rng(0)
    # All tokens of document i are the number 10 + i, so a segment is right if it holds one number.
    documents = [np.full(rng.integers(1, 60), 10 + i) for i in range(70)]
    rows = pack(PACKERS[name](32, BOS, EOS), documents, rng)
    for row in rows:
        segments = np.cumsum(row == BOS)
        for segment in np.unique(segments):
            inside = set(row[segments == segment]) - {BOS, EOS}
            assert len(inside) <= 1
        # And one document of a row is in one segment.
        for number in set(row[row >= 10]):
            assert len(set(segments[row == number])) == 1


@pytest.mark.parametrize("name", TEXT_PACKERS)
@pytest.mark.parametrize("row_length", [2, 5, 16])
@pytest.mark.parametrize("eos", [EOS, BOS])
def test_all_of_a_document_is_counted_and_nothing_else(name, row_length, eos):
    """Its closing token once, also where this is BOS; neither its opening nor the padding."""
    rng = np.random.default_rng(row_length)
    # Each document says in each token who it is and where it stands.
    lengths = [*range(1, 3 * row_length + 2), *rng.integers(1, 4 * row_length, 60)]
    documents = [1000 * i + 10 + np.arange(n) for i, n in enumerate(rng.permutation(lengths))]
    rows = pack(PACKERS[name](row_length, BOS, eos), documents, rng)
    counts = counted(rows, BOS, eos)
    inputs, targets = rows[:, :-1][counts], rows[:, 1:][counts]
    last = [document[-1] for document in documents]
    assert sorted(inputs[targets == eos]) == sorted(last)
    assert (inputs[targets == eos] != BOS).all()
    inside, times = np.unique(targets[targets != eos], return_counts=True)
    assert set(inside) == set(np.concatenate(documents))
    # Where only EOS was left for another row, best-fit packing repeats the token before it.
    again = [d[-1] for d in documents if name == "best_fit" and len(d) % row_length == 0]
    assert sorted(inside[times > 1]) == sorted(again) and times.max() <= 2
    if eos != BOS:
        assert not (targets == BOS).any()


def test_padding_alone_holds_no_target():
    assert not counted(np.full((3, 9), BOS), BOS, BOS).any()
    assert not counted(np.full((3, 9), BOS), BOS, EOS).any()


@pytest.mark.parametrize("name", TEXT_PACKERS)
@pytest.mark.parametrize("row_length", [2, 7, 32])
@pytest.mark.parametrize("window", [50, 10_000])
def test_placements_say_where_every_piece_of_every_document_is(name, row_length, window):
    rng = np.random.default_rng(row_length)
    documents = [1000 * i + 10 + np.arange(rng.integers(1, 80)) for i in range(60)]
    options = {"window": window} if name == "best_fit" else {}
    rows, placements = packed(PACKERS[name](row_length, BOS, EOS, **options), documents, rng)
    assert placements.dtype == PLACEMENT
    order = list(zip(placements["row"].tolist(), placements["offset"].tolist(), strict=True))
    assert order == sorted(set(order)) and max(placements["offset"]) < row_length
    overlap = PACKERS[name].OVERLAP
    stream = rows[:, : row_length + 1 - overlap].ravel()
    if overlap:
        stream = np.append(stream, rows[-1, -overlap:])
    pieces = {}
    for place in placements:
        start = place["row"] * (row_length + 1 - overlap) + place["offset"]
        tokens = stream[start : start + place["tokens"]]
        assert tokens[0] == BOS and len(tokens) == place["tokens"] and not (tokens[1:] == BOS).any()
        pieces[int(place["document"]), int(place["piece"])] = tokens[1:].tolist()
    assert len(pieces) == len(placements)
    # Nothing but padding is left over.
    assert placements["tokens"].sum() == len(stream) - (stream == BOS).sum() + len(placements)
    for i, document in enumerate(documents):
        numbers = sorted(piece for number, piece in pieces if number == i)
        assert numbers == list(range(len(numbers)))
        inside = [pieces[i, number] for number in numbers]
        assert inside[-1][-1] == EOS
        if inside[-1] == [document[-1], EOS] and len(document) % row_length == 0:
            inside[-1] = [EOS]  # the token before was repeated
        assert sum(inside, []) == [*document.tolist(), EOS]


@pytest.mark.parametrize("name", TEXT_PACKERS)
def test_documents_are_placed_for_good_before_a_later_one_is_named(name):
    rng = np.random.default_rng(3)
    options = {"window": 100} if name == "best_fit" else {}
    packer, last = PACKERS[name](16, BOS, EOS, **options), 0
    for _ in range(50):
        numbers = packer.add(random_documents(rng, 4, 60)).placements["document"]
        assert (numbers >= last).all()
        last = max([last, *numbers])


def brute_force(sizes, capacity):
    """Best fit decreasing, by looking at all bins."""
    spaces, bins = [], []
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = [b for b, space in enumerate(spaces) if space >= sizes[i]]
        if not fitting:
            spaces.append(capacity)
            bins.append([])
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda b: spaces[b])
        spaces[best] -= sizes[i]
        bins[best].append(i)
    return bins


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_decreasing_is_as_good_as_brute_force(seed):
    rng = np.random.default_rng(seed)
    capacity = int(rng.integers(5, 200))
    sizes = rng.integers(1, capacity + 1, 300).tolist()
    bins = best_fit_decreasing(sizes, capacity)
    assert sorted(i for members in bins for i in members) == list(range(300))
    filled = sorted(sum(sizes[i] for i in members) for members in bins)
    assert filled == sorted(sum(sizes[i] for i in b) for b in brute_force(sizes, capacity))
    assert max(filled) <= capacity


def test_a_piece_that_fits_nowhere_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        best_fit_decreasing([3, 9], 8)


def test_best_fit_holds_back_no_more_than_its_window():
    packer = BestFit(16, BOS, EOS, window=200)
    rows = 0
    for _ in range(100):
        rows += len(packer.add([np.arange(3, 12)]).rows)
        assert packer._held < 200
    assert rows + len(packer.finish().rows) == 100  # no two of these documents fit into one row


@pytest.mark.parametrize("name", TEXT_PACKERS)
def test_nothing_gives_no_rows(name):
    packer = PACKERS[name](16, BOS, EOS)
    for rows, placements in (packer.add([]), packer.finish()):
        assert rows.shape == (0, 17) and placements.shape == (0,)
