"""A run that is judged by tasks while it trains: what is recorded, shown, and met early."""

import jax
import pytest
import tiny
from runs import lines, run

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")

from mobilellm_jax.errors import UserError
from mobilellm_jax.evaluate import evaluate
from mobilellm_jax.evaluation.while_training import judge
from mobilellm_jax.model import transformer
from mobilellm_jax.parallel.mesh import one_device
from mobilellm_jax.report import report
from mobilellm_jax.training.checkpoint import load_model
from mobilellm_jax.training.signals import Stopped


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """A run over four devices that is judged at steps 4, 8 and 9, and its folder."""
    folder = tmp_path_factory.mktemp("judged")
    tiny.tasks(folder)
    config = tiny.config(tiny.corpus(folder / "data"), steps=9)
    config.mesh.data, config.mesh.fsdp = 2, 2
    config.eval.tasks, config.eval.tasks_every = "sums,doubles", 4
    config.eval.data, config.eval.limit = str(folder), 5
    return config, folder


@pytest.fixture(scope="module")
def judged(configured):
    """The same, trained."""
    config, folder = configured
    run(config, folder / "run", devices=jax.devices()[:4])
    return config, folder


@pytest.mark.slow
def test_figures_are_those_of_the_checkpoint(judged):
    """Over four devices, two of which split the weights, as from the file on others."""
    _, folder = judged
    found = lines(folder / "run", "tasks")
    assert sorted(found) == [4, 8, 9]
    told, _ = evaluate(load_model(folder / "run"), ["sums", "doubles"], data=folder, limit=5)
    for line in told:
        name = f"{line.label} {line.metric}"
        assert found[9][name] == pytest.approx(line.value), name
        assert found[9][f"stderr/{name}"] == pytest.approx(line.standard_error), name
    assert {line.metric for line in told} == {"acc", "acc_norm", "pass@1"}


@pytest.mark.slow
def test_the_report_shows_them(judged, capsys):
    _, folder = judged
    page = report(folder / "run").read_text()
    capsys.readouterr()
    assert "<h2>Tasks</h2>" in page and "sums acc_norm" in page and "stderr/" not in page
    assert 'aria-label="Tasks"' in page and 'aria-label="RankMe"' in page


def test_what_is_missing_is_told_before_anything_is_written(configured, tmp_path):
    config, _ = configured
    for tasks, data, said in (
        ("sumz", config.eval.data, "no suite or task 'sumz'; near are .*sums"),
        ("sums", str(tmp_path / "no"), "is not a folder"),
        ("livecodebench", config.eval.data, "run programs"),
    ):
        changed = config.copy_and_resolve_references()
        changed.eval.tasks, changed.eval.data = tasks, data
        with pytest.raises(UserError, match=said):
            run(changed, tmp_path / "run", devices=jax.devices()[:4])
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", ["sums", "doubles"])
def test_what_stops_a_run_breaks_off_its_tasks(configured, task):
    """Behind a batch, of scores as of texts; the harness makes nothing of it."""
    config, _ = configured
    settings = dict(config.eval, tasks=task)
    judged = judge(settings, tiny.MODEL, tiny.tokenizer(), "float32", one_device())

    def between():
        raise Stopped

    with pytest.raises(Stopped):
        judged(transformer.init(tiny.MODEL, jax.random.key(0)), between)


@pytest.mark.slow
def test_a_run_is_the_same_judged_or_not(judged, tmp_path):
    config, folder = judged
    plain = config.copy_and_resolve_references()
    plain.eval.tasks = ""
    run(plain, tmp_path / "run", devices=jax.devices()[:4])
    losses = [
        [line["loss"] for _, line in sorted(lines(workdir).items())]
        for workdir in (folder / "run", tmp_path / "run")
    ]
    assert losses[0] == losses[1]
