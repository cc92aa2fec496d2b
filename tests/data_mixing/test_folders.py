"""Folders of results: one set of settings each, and nothing else in them."""

import pytest

from data_mixing import folders
from mobilellm_jax.errors import UserError


def test_a_folder_is_claimed_once_and_again_with_the_same_settings(tmp_path):
    settings = {"rows": 4, "of": {"layers": ("a", "b")}}
    for _ in range(2):
        folders.claim(tmp_path / "out", settings)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["settings.json"]
    (tmp_path / "out" / "made").write_text("")
    with pytest.raises(UserError, match=r"other settings or other data \(rows: 4 there, 5 here\)"):
        folders.claim(tmp_path / "out", {**settings, "rows": 5})


def test_one_in_which_nothing_was_made_is_of_whoever_comes(tmp_path):
    """Settings that were refused hold no folder."""
    folders.claim(tmp_path / "out", {"rows": -4})
    folders.claim(tmp_path / "out", {"rows": 5})
    (tmp_path / "out" / "made").write_text("")
    folders.claim(tmp_path / "out", {"rows": 5})
    with pytest.raises(UserError, match=r"\(rows: 5 there, -4 here\)"):
        folders.claim(tmp_path / "out", {"rows": -4})


def test_what_is_not_ours_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        folders.claim(tmp_path / "file", {})
    with pytest.raises(UserError, match="holds no mine.json, so it holds something else"):
        folders.claim(tmp_path, {}, "mine.json")
    with pytest.raises(UserError, match="holds file, which is not of this program"):
        folders.holding(tmp_path, ("runs",))
    assert folders.holding(tmp_path / "new", ("runs",)).is_dir()


@pytest.mark.parametrize("damaged", [b"{", b"\xff", b"[" * 100_000])
def test_damaged_settings_are_told(tmp_path, damaged):
    (tmp_path / "settings.json").write_bytes(damaged)
    (tmp_path / "table.md").write_text("made by them")
    with pytest.raises(UserError, match=r"settings.json is damaged: put it back, or name a new"):
        folders.claim(tmp_path, {"rows": 1})


def test_what_a_killed_program_half_wrote_is_cleared(tmp_path):
    (tmp_path / "table.md").write_text("whole")
    (tmp_path / "table.md.unfinished").write_text("ha")
    (tmp_path / "runs.partial-12ab34cd").mkdir()
    folders.holding(tmp_path, ("runs", "table.md"))
    assert [p.name for p in tmp_path.iterdir()] == ["table.md"]
    (tmp_path / "thesis.unfinished").write_text("dear")
    with pytest.raises(UserError, match="holds thesis.unfinished, which is not of this program"):
        folders.holding(tmp_path, ("runs", "table.md"))


def test_one_that_was_killed_while_it_was_claimed_is_claimed(tmp_path):
    (tmp_path / "settings.json.unfinished").write_text('{"ro')
    folders.claim(tmp_path, {"rows": 1})
    folders.claim(tmp_path, {"rows": 1})
