"""The program: what it writes, prints and refuses; and networks that a run has pruned."""

import json

import jax
import numpy as np
import pytest
import runs
import tiny
import weights

from mobilellm_jax.errors import UserError
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.prune import amount, parse, prune, take_out
from mobilellm_jax.training.checkpoint import load_model

pytestmark = pytest.mark.usefixtures("shared_programs")
WHOLE = parameter_count(tiny.MODEL)


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    return tiny.corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def trained(plan, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    runs.run(tiny.unshared(plan), workdir)
    return workdir


def logits(loaded, tokens):
    return weights.logits(loaded.params, loaded.model, tokens)


def test_the_program(plan, trained, tmp_path):
    out = tmp_path / "small"
    flags = f"--checkpoint={trained}", f"--plan={plan}", "--target_params=70%", "--rounds=3"
    ended = runs.program(
        "mobilellm_jax.prune", *flags, "--rows=8", "--row_length=32", f"--out={out}"
    )
    assert ended.status == 0, ended.err
    loaded = load_model(out)
    target = round(0.7 * WHOLE)
    assert target - 3 * tiny.MODEL.width < parameter_count(loaded.model) <= target
    assert sum(x.size for x in jax.tree.leaves(loaded.params)) == parameter_count(loaded.model)
    record = loaded.meta["pruning"]
    assert [event["round"] for event in record["events"]] == [0, 1, 2]
    assert record["events"][-1]["parameters"] == parameter_count(loaded.model)
    key = "bits_per_byte"
    assert f"{key}: {record['heldout_before'][key]:.4f} before" in ended.out
    assert f"{parameter_count(loaded.model):,}" in ended.out
    up = np.asarray(load_model(trained).params["stack_0"]["mlp"]["up"])
    block = record["kept"]["blocks"][0]
    found = np.asarray(loaded.params["stack_0"]["mlp"]["up"])[0]
    np.testing.assert_array_equal(found, up[block["layer"]][:, block["F"]])
    again = runs.program("mobilellm_jax.prune", *flags, f"--out={out}")
    assert again.status == 1 and "not empty" in again.err
    config = tiny.unshared(plan, 4)  # and it trains on
    config.model, config.init_from = loaded.model.to_dict(), str(out)
    state = runs.run(config, tmp_path / "on")
    assert int(state.step) == 4


def test_what_a_run_has_made_zero_is_taken_out(plan, tmp_path):
    config = tiny.unshared(plan)
    config.model.dead_channels = True
    config.pruning.target, config.pruning.cuts = int(0.7 * WHOLE), 3
    config.pruning.strategy.use = "mobilellm_jax.pruning.efficient:efficient"
    runs.run(config, tmp_path / "run")
    refused = runs.program(
        "mobilellm_jax.convert",
        f"--checkpoint={tmp_path / 'run'}",
        "--to=hf",
        f"--out={tmp_path / 'hf'}",
    )
    assert (
        refused.status == 1
        and "may be dead" in refused.err
        and "mobilellm_jax.prune" in refused.err
    )
    ended = runs.program(
        "mobilellm_jax.prune", f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'small'}"
    )
    assert ended.status == 0, ended.err
    before, after = load_model(tmp_path / "run"), load_model(tmp_path / "small")
    records = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    left = [r["parameters"] for r in records if r["kind"] == "cut"][-1]
    assert parameter_count(after.model) == left <= 0.7 * WHOLE
    tokens = np.arange(20, dtype=np.int32)[None] + 3
    np.testing.assert_allclose(logits(after, tokens), logits(before, tokens), atol=1e-5)
    report = runs.program("mobilellm_jax.report", tmp_path / "run")
    assert report.status == 0, report.err
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What lives" in page and "Saliency" in page and "MLP widths" in page


@pytest.mark.slow
def test_biases_that_flap_leaves_go_to_hugging_face(plan, trained, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    flags = f"--checkpoint={trained}", f"--plan={plan}", "--strategy=flap", "--target_params=85%"
    pruned = runs.program(
        "mobilellm_jax.prune", *flags, "--rows=8", "--row_length=32", f"--out={tmp_path / 'small'}"
    )
    assert pruned.status == 0, pruned.err
    loaded = load_model(tmp_path / "small")
    assert loaded.model.out_bias
    for to in ("hf", "hf-shared"):
        out = tmp_path / to
        ended = runs.program(
            "mobilellm_jax.convert",
            f"--checkpoint={tmp_path / 'small'}",
            f"--to={to}",
            f"--out={out}",
        )
        assert ended.status == 0, ended.err
        theirs = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        tokens = np.arange(20, dtype=np.int64)[None] + 3
        with torch.no_grad():
            found = theirs(torch.tensor(tokens)).logits.numpy()
        np.testing.assert_allclose(found, logits(loaded, tokens), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "found"), [("125M", 125_000_000), ("1.5K", 1500), ("70%", 700), ("1,234", 1234)]
)
def test_amounts(text, found):
    assert amount(text, 1000) == found


def test_settings_behind_a_colon():
    strategy = parse("adapt:amplitude=0.02,attention=heads,protect=(1, 2)")
    assert strategy.keywords["amplitude"] == 0.02 and strategy.keywords["protect"] == (1, 2)
    assert parse("mobilellm_jax.pruning.flap:flap").func.__name__ == "flap"


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"strategy": "adept"}, "is not one of adapt"),
        ({"strategy": "adapt:amplitud=1"}, "has no setting 'amplitud'"),
        ({"strategy": "adapt amplitude"}, "is not of the form"),
        ({"target_params": "many"}, "is not a number of parameters"),
        ({"target_params": "99B"}, "is not below"),
        ({"target_params": "1%"}, "is below the"),
        ({"rounds": 0}, "must be at least 1"),
        ({"rows": 9}, "must divide"),
        ({"row_length": 512}, "must not exceed"),
    ],
)
def test_bad_input(plan, trained, tmp_path, changes, word):
    given = {"strategy": "adapt", "target_params": "70%", "rounds": 1, "rows": 8, "row_length": 32}
    with pytest.raises(UserError, match=word):
        prune(trained, plan, out=tmp_path / "out", **{**given, **changes})
    assert not (tmp_path / "out").exists()


def test_nothing_to_take_out(trained, tmp_path):
    with pytest.raises(UserError, match="nothing in .* is dead"):
        take_out(trained, tmp_path / "out")
