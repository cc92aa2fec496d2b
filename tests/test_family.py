"""One run, a family: every size exported, measured and drawn once."""

import dataclasses
import json
import math
import shutil

import numpy as np
import pruned
import pytest
import runs
import tiny

from mobilellm_jax.errors import UserError
from mobilellm_jax.family import family
from mobilellm_jax.interop.stored import open_model
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.reporting.curves import compact
from mobilellm_jax.reporting.frontier import Member, best, drawing, table

pytestmark = pytest.mark.usefixtures("shared_programs")
HALF_WAY = pruned.WHOLE - (pruned.WHOLE - pruned.TARGET) // 2


def config(plan, **changes):
    """Of a run that prunes, whose blocks are applied once: a family has nothing to do with how often."""
    c = pruned.config(plan, **changes)
    c.model.stacks[0]["repeats"] = 1
    return c


@pytest.fixture(scope="module")
def pruned_run(tmp_path_factory):
    """A run that leaves two sizes: what it compacts to half way, and what lives of that in the end."""
    plan = tiny.corpus(tmp_path_factory.mktemp("data"))
    workdir = tmp_path_factory.mktemp("runs") / "run"
    sizes = {"pruning.compact_at": (HALF_WAY,), "eval.rows": 16}
    runs.run(config(plan, **sizes), workdir)
    return workdir


@pytest.fixture(scope="module")
def one_size(tmp_path_factory):
    """A run that prunes and never compacts."""
    plan = tiny.corpus(tmp_path_factory.mktemp("data"))
    workdir = tmp_path_factory.mktemp("runs") / "run"
    runs.run(config(plan), workdir)
    return workdir


def test_every_size_is_exported_measured_and_drawn(pruned_run, tmp_path):
    out = tmp_path / "family"
    flags = f"--runs={pruned_run}", f"--out={out}", "--to=hf,gguf", "--rows=16"
    ended = runs.program("mobilellm_jax.family", *flags)
    assert ended.status == 0, ended.err
    members = family([pruned_run], out, rows=16)
    assert [m.name.split("-")[-1] for m in members] == ["4", "12"]
    compacted = open_model(pruned_run / "checkpoints" / "4").model
    assert members[0].parameters == parameter_count(compacted)
    assert pruned.TARGET - 3 * tiny.MODEL.width < members[1].parameters <= pruned.TARGET
    widths = [open_model(out / member.name / "hf").model.width for member in members]
    assert widths[0] == compacted.width >= widths[1]
    for member in members:
        assert member.megabytes == pytest.approx(4e-6 * member.parameters)
        assert 0 < member.token_ms and 0 < member.prompt_ms and math.isnan(member.accuracy)
        assert (out / member.name / "model.gguf").stat().st_size > 2 * member.parameters
        assert f"| {member.name} | {member.parameters:,} |" in (out / "table.md").read_text()
        assert f">{member.name}</text>" in (out / "frontier.svg").read_text()
    last = runs.lines(pruned_run, "heldout")[12]
    assert members[-1].bits_per_byte == pytest.approx(last["bits_per_byte"], rel=1e-5)
    before = runs.files(out)
    ended = runs.program("mobilellm_jax.family", *flags)
    assert ended.status == 0 and runs.files(out) == before  # nothing is made or measured again


def test_a_member_gets_what_it_lacks_and_no_other_run_takes_its_name(one_size, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(one_size, tmp_path / name / "run")
    (member,) = family([tmp_path / "a" / "run"], tmp_path / "family", to=["checkpoint"], rows=4)
    again = family([tmp_path / "a" / "run"], tmp_path / "family", to=["checkpoint", "hf"], rows=4)
    assert [m.bits_per_byte for m in again] == [member.bits_per_byte]
    assert (tmp_path / "family" / member.name / "hf").exists()
    with pytest.raises(UserError, match="would be the name of .*b/run.* and is that of .*a/run"):
        family([tmp_path / "b" / "run"], tmp_path / "family", to=["checkpoint"], rows=4)


def test_what_is_dead_in_the_newest_checkpoint_is_taken_out(one_size, tmp_path):
    (member,) = family([one_size], tmp_path / "family", to=["checkpoint"], rows=4)
    assert pruned.TARGET - 3 * tiny.MODEL.width < member.parameters <= pruned.TARGET
    assert member.name == f"{compact(member.parameters)}-run-12"
    stored = open_model(tmp_path / "family" / member.name / "checkpoint")
    assert parameter_count(stored.model) == member.parameters


def test_the_frontier_is_what_nothing_beats():
    rng = np.random.default_rng(0)
    members = [
        Member(str(i), int(n), *row)
        for i, (n, row) in enumerate(
            zip(rng.integers(1, 50, 40), rng.random((40, 4)).round(1), strict=True)
        )
    ]
    for cost in (lambda m: m.parameters, lambda m: m.token_ms):
        found = best(members, cost)
        for member in members:
            beaten = any(
                cost(m) <= cost(member)
                and m.bits_per_byte <= member.bits_per_byte
                and (cost(m), m.bits_per_byte) != (cost(member), member.bits_per_byte)
                for m in members
            )
            points = {(cost(m), m.bits_per_byte) for m in found}
            assert beaten != ((cost(member), member.bits_per_byte) in points)
    assert drawing(members[:1]).count("<circle") == 2
    one = dataclasses.replace(members[0], accuracy=0.5)
    assert "50.0%" in table([one])


@pytest.mark.parametrize("line", ["{", "[]", "{}", "[" * 100_000, '{"name": 1}', None])
def test_a_damaged_member_is_told(tmp_path, line):
    whole = dataclasses.asdict(Member("a", 1, 1.0, 1.0, 1.0, 1.0))
    damaged = json.dumps(whole | {"megabytes": "1"}) if line is None else line
    (tmp_path / "members.jsonl").write_text(f"{json.dumps(whole)}\n{damaged}\n")
    with pytest.raises(UserError, match=r"members.jsonl, line 2, is no member: remove that line"):
        family([], tmp_path)


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"to": ["safetensors"]}, "choose of checkpoint"),
        ({"runs": ["nowhere"]}, "config.json is missing"),
    ],
)
def test_bad_input(pruned_run, tmp_path, changes, word):
    with pytest.raises(UserError, match=word):
        family(**{"runs": [pruned_run], "out": tmp_path / "out"} | changes)
    assert not (tmp_path / "out").exists()
