"""Configurations: all keys are known, what they name is there, and two can be compared."""

import pytest
import tiny
from ml_collections import ConfigDict

from mobilellm_jax.errors import UserError
from mobilellm_jax.training.config import FREE, base_config, check, configured, differences


def test_a_misspelt_key_is_an_error_where_it_is_written():
    config = base_config(tiny.MODEL)
    with pytest.raises(AttributeError, match='Did you mean "weight_decay"'):
        config.optimizer.weight_decai = 0.1
    with pytest.raises(TypeError):
        config.steps = "many"


def test_the_defaults_are_usable():
    config = base_config(tiny.MODEL)
    config.plan, config.row_length = "mixture.json", 64
    check(config, devices=1)
    for key in ("objective", "optimizer", "schedule"):
        assert callable(configured(config[key], key))
    assert set(FREE) < set(config.keys())


def own(given, needed, optional=3, *, named):
    return given, needed, optional, named


def anything(given, **settings):
    return given, settings


@pytest.mark.parametrize(
    "settings, part",
    [
        ({}, "config.schedule.needed is missing"),
        ({"needed": 1}, "config.schedule.named is missing"),
        ({"needed": 1, "named": 2, "other": 3}, "config.schedule.other is not an argument of"),
    ],
)
def test_arguments_are_checked_before_they_are_used(settings, part):
    with pytest.raises(UserError, match=part):
        configured({"use": f"{__name__}:own", **settings}, "schedule")


def test_settings_are_bound_and_what_the_loop_gives_comes_first(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "own_module", sys.modules[__name__])
    use = {"use": "own_module:own", "needed": 1, "named": 2}
    assert configured(use, "schedule")(7) == (7, 1, 3, 2)
    assert configured({"use": "own_module:anything", "x": 1}, "schedule")(7) == (7, {"x": 1})


def runs_its_teacher(params, batch, network, teacher):
    return teacher


def may_run_a_teacher(params, batch, network, teacher=None):
    return teacher


def test_the_teacher_is_no_setting_and_who_runs_one_gets_one():
    config = base_config(tiny.MODEL)
    config.plan, config.row_length = "mixture.json", 64
    for use in (runs_its_teacher, may_run_a_teacher):
        config.objective = ConfigDict({"use": f"{__name__}:{use.__name__}"})
        config.teacher.path, config.teacher.stored = "runs/teacher", ""
        check(config, devices=1)
        assert configured(config.objective, "objective")(1, 2, 3, teacher=4) == 4
        config.teacher.path, config.teacher.stored = "", "taught"
        if use is may_run_a_teacher:
            check(config, devices=1)
        else:
            with pytest.raises(UserError, match="runs its teacher; name the network"):
                check(config, devices=1)


@pytest.mark.parametrize("use", ["optax", "optax:", ":sgd", "optax.sgd", ""])
def test_an_import_path_of_another_form(use):
    with pytest.raises(UserError, match=r"config.optimizer.use=.*package.module:name"):
        configured({"use": use}, "optimizer")


def test_a_module_that_breaks_while_it_is_imported_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "breaks_inside.py").write_text("import no_such_dependency\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        configured({"use": "breaks_inside:f"}, "objective")


def test_differences_are_found_at_any_depth_and_in_lists():
    a, b = base_config(tiny.MODEL), base_config(tiny.MODEL)
    assert differences(a.to_dict(), b.to_dict()) == {}
    b.optimizer.b1 = 0.8
    b.model.stacks[0]["layers"] = 9
    with b.unlocked():
        b.extra = ConfigDict({"key": 1})
    assert differences(a.to_dict(), b.to_dict()) == {
        "optimizer.b1": (0.9, 0.8),
        "model.stacks.0.layers": (2, 9),
        "extra.key": (None, 1),
    }
