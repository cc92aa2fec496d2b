"""The examples in docs/extending.md, as they stand there, train a network that is really made of them."""

import importlib
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs
import tiny

from mobilellm_jax.data.opening import open_mixture
from mobilellm_jax.data.plan import Plan
from mobilellm_jax.decoding.decoder import to_draw
from mobilellm_jax.decoding.sampling import GREEDY
from mobilellm_jax.decoding.text import generate
from mobilellm_jax.model import transformer
from mobilellm_jax.model.config import parameter_count
from mobilellm_jax.prune import prune, take_out
from mobilellm_jax.train import train
from mobilellm_jax.training.checkpoint import load_model

DOCUMENT = Path(__file__).parents[1] / "docs" / "extending.md"
STEPS = 8


def examples():
    """File name and content of every example."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return {block.splitlines()[0].removeprefix("# "): block for block in blocks}


@pytest.fixture(scope="module")
def user_config(tmp_path_factory):
    """The user's directory on Python's path, and the configuration in it, on the tiny corpus."""
    directory = tmp_path_factory.mktemp("user")
    for name, text in examples().items():
        (directory / name).write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(directory)
        c = importlib.import_module("my_config").get_config()
        c.model = {**tiny.MODEL.to_dict(), "block": c.model.block}
        small = tiny.config(tiny.corpus(directory / "corpus"), STEPS)
        for key in ("plan", "row_length", "steps", "global_batch"):
            c[key] = small[key]
        c.eval.every = c.checkpoint.every = STEPS
        c.schedule.warmup_steps, c.schedule.decay_steps = 2, 3
        c.optimizer.weight_decay = 0.0
        pieces = tiny.tokenizer().encode("1 + 2 = 3")
        (c.objective.separator,) = (i for i in pieces if "=" in tiny.tokenizer().decode([i]))
        yield c
    for name in examples():
        sys.modules.pop(name.removesuffix(".py"), None)


@pytest.fixture(scope="module")
def run(user_config, tmp_path_factory):
    """The workdir, the last state, and the metrics of every step."""
    workdir = tmp_path_factory.mktemp("run")
    state = train(user_config, workdir, devices=tiny.one_device())
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return workdir, state, [line for line in lines if line["kind"] == "train"]


def test_the_document_shows_one_of_each():
    assert set(examples()) == {
        f"my_{name}.py"
        for name in ("config", *"block objective optimizer schedule strategy".split())
    }
    shown = examples()["my_config.py"]
    for name in ("block", "objective", "optimizer", "schedule"):
        assert f'"my_{name}:' in shown


@pytest.mark.slow
def test_the_strategy_prunes(user_config, tmp_path):
    """In one shot and inside of training, down to widths that are as equal as can be."""
    target = int(0.8 * parameter_count(tiny.MODEL))
    config = tiny.config(user_config.plan, STEPS)
    config.pruning.target, config.pruning.cuts = target, 2
    config.pruning.strategy.use = "my_strategy:widest_first"
    runs.run(config, tmp_path / "run")
    taken = take_out(tmp_path / "run", tmp_path / "in training")
    runs.run(tiny.config(user_config.plan, 4), tmp_path / "whole")
    shot = {"target_params": str(target), "rounds": 2, "rows": 8, "row_length": tiny.ROW}
    strategy = "my_strategy:widest_first:score=fisher"
    cut = prune(tmp_path / "whole", user_config.plan, strategy, out=tmp_path / "shot", **shot)
    for model in (taken, cut):
        assert target - 3 * tiny.MODEL.width < parameter_count(model) <= target
        widths = [stack.mlp_width for stack in model.stacks]
        assert max(widths) - min(widths) <= 1


def test_the_schedule_is_followed(run, user_config):
    peak = user_config.schedule.peak
    expected = peak * np.array([0, 1 / 2, 1, 1, 1, 1, 2 / 3, 1 / 3])
    np.testing.assert_allclose([line["learning_rate"] for line in run[2]], expected, rtol=1e-5)


def test_the_optimizer_takes_steps_of_equal_size(run, user_config):
    """Lion moves each weight by the learning rate up or down, without decay a whole number of rates."""
    workdir, state, lines = run
    model = load_model(workdir).model
    before = jax.jit(lambda: transformer.init(model, jax.random.key(user_config.seed)))()
    rates = [line["learning_rate"] for line in lines]
    unit = user_config.schedule.peak / 6  # every rate is a multiple of it
    moves = np.concatenate(
        [
            np.ravel(a - b)
            for a, b in zip(*map(jax.tree.leaves, (state.params, before)), strict=True)
        ]
    )
    assert np.abs(moves).max() <= sum(rates) + 1e-6
    assert np.abs(moves / unit - np.round(moves / unit)).max() < 0.01
    assert np.unique(np.round(moves / unit)).size > 10
    moments = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == moves.size  # one per weight, not two


def test_the_objective_trains_on_answers_alone(run, user_config):
    """The tokens counted in the metrics are those after the first "=" of each document, by a plain loop."""
    mixture = open_mixture(Plan.load(user_config.plan), tiny.ROW, tiny.VOCAB)
    batch, bos = user_config.global_batch, tiny.tokenizer().bos_id
    trained = 0
    for step, line in enumerate(run[2]):
        counts = {"words": 0, "sums": 0}
        rows = mixture.read(np.arange(step * batch, (step + 1) * batch))
        for row, source in zip(rows["tokens"], rows["source"], strict=True):
            answering = False
            for token, target in zip(row[:-1], row[1:], strict=True):
                answering = token == user_config.objective.separator or (answering and token != bos)
                counts[mixture.plan.names[source]] += answering and target != bos
        assert {name: line[f"tokens/{name}"] for name in counts} == counts
        assert counts["words"] == 0
        trained += counts["sums"]
    assert trained


def test_the_block_is_in_the_checkpoint_and_generates(run):
    workdir, state, _ = run
    loaded = load_model(workdir)
    assert set(loaded.params["stack_0"]) == {"norm", "attention", "mlp"}
    pairs = zip(*map(jax.tree.leaves, (loaded.params, state.params)), strict=True)
    assert all((a == b).all() for a, b in pairs)

    decoder = to_draw(loaded.params, loaded.model)
    (text,) = generate(decoder, loaded.tokenizer, ["1 + "], 8, GREEDY)
    ids = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("1 + ")]
    hidden = jax.jit(transformer.apply, static_argnums=1)(
        loaded.params, loaded.model, jnp.array([ids])
    )
    first = int(transformer.logits(loaded.params, loaded.model, hidden)[0, -1].argmax())
    assert text.startswith(loaded.tokenizer.decode([first]))
