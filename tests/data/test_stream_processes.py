"""A run may stop anywhere and go on with other processes and another batch: the rows stay the same."""

import multiprocessing
import random
import zlib
from pathlib import Path

import numpy as np
import pytest

from mobilellm_jax.data.mixture import batches
from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan

ROW, VOCAB = 32, 320


def checksums(rows):
    """Of each row: what it is trained on, and the source it is of."""
    return [
        zlib.crc32(t.tobytes(), int(s)) for t, s in zip(rows["tokens"], rows["source"], strict=True)
    ]


def train(plan, start, global_batch, process, processes, steps, readers, seen):
    """What a process of a run does with the stream: puts {row number: checksum} of all it gets."""
    mixture = open_mixture(Plan.load(Path(plan)), ROW, VOCAB)
    stream = batches(mixture, start, global_batch, process, processes, readers=readers)
    mine, found = global_batch // processes, {}
    for step in range(steps):
        first = start + step * global_batch + process * mine
        found |= dict(zip(range(first, first + mine), checksums(next(stream)), strict=True))
    seen.put(found)


@pytest.mark.slow
def test_any_processes_restarted_anywhere_read_one_sequence(tmp_path):
    import tiny  # not above: the processes that are started import this file

    plan = str(tiny.corpus(tmp_path))
    spawn, rng = multiprocessing.get_context("spawn"), random.Random(0)
    legs, start = [], 0  # a leg is what a run does from a restart to the next
    for processes, global_batch in ((2, 16), (4, 24), (1, 10)):
        steps = rng.randrange(60, 100)
        legs.append((start, global_batch, processes, steps))
        start += global_batch * steps
    mixture = open_mixture(Plan.load(Path(plan)), ROW, VOCAB)
    expected = dict(enumerate(checksums(mixture.read(np.arange(start)))))
    assert (mixture.given(start) > [2 * len(source) for source in mixture.sources]).all()  # epochs

    seen = {}
    rng.shuffle(legs)  # what a leg reads hangs on no other leg, and on none of its processes
    for start, global_batch, processes, steps in legs:
        queue, running = spawn.Queue(), []
        for process in rng.sample(range(processes), processes):
            readers = rng.choice((0, 3))
            args = (plan, start, global_batch, process, processes, steps, readers, queue)
            running.append(spawn.Process(target=train, args=args))
            running[-1].start()
        for _ in running:
            found = queue.get(timeout=60)
            assert not seen.keys() & found.keys()
            seen |= found
        for one in running:
            one.join(60)
            assert one.exitcode == 0
    assert seen == expected
