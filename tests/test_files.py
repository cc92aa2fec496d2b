"""Results are there whole or not at all, and never in the place of something else."""

import subprocess
import sys

import pytest

from mobilellm_jax.errors import UserError
from mobilellm_jax.files import alone, new_file, new_folder, replaced


def write(path, text="whole"):
    path.write_text(text)


def test_a_folder_appears_when_it_is_filled(tmp_path):
    out = tmp_path / "made" / "on the way" / "out"
    with new_folder(out) as folder:
        write(folder / "a")
        assert not out.exists() and folder.parent == out.parent
    assert [p.name for p in out.parent.iterdir()] == ["out"] and (out / "a").read_text() == "whole"


def test_a_file_appears_when_it_is_written(tmp_path):
    out = tmp_path / "made" / "out.bin"
    with new_file(out) as file:
        write(file)
        assert not out.exists() and file.parent == out.parent
    assert [p.name for p in out.parent.iterdir()] == ["out.bin"] and out.read_text() == "whole"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_fails_leaves_nothing(error, tmp_path):
    with pytest.raises(error), new_folder(tmp_path / "out") as folder:
        write(folder / "a")
        raise error
    with pytest.raises(error), new_file(tmp_path / "out") as file:
        write(file)
        raise error
    with pytest.raises(error), new_file(tmp_path / "out"):
        raise error  # before there is a file
    assert not any(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    write(tmp_path / "file", "mine")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder/file", "mine")
    for opener, name in [
        (new_folder, "file"),
        (new_folder, "folder"),
        (new_file, "file"),
        (new_file, "folder"),
    ]:
        with pytest.raises(UserError, match=rf"{name} exists.*name a new"), opener(tmp_path / name):
            pass
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["file", "file", "folder"]
    assert (tmp_path / "file").read_text() == (tmp_path / "folder/file").read_text() == "mine"


def test_an_empty_folder_may_be_used(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out") as folder:
        write(folder / "a")
    assert (tmp_path / "out/a").exists()


def test_a_file_is_replaced_in_one_move_or_not_at_all(tmp_path):
    path = tmp_path / "a.json"
    with replaced(path) as unfinished:
        unfinished.write_text("old")
        assert not path.exists()
    with pytest.raises(RuntimeError), replaced(path) as unfinished:
        unfinished.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old"
    with replaced(path) as unfinished:
        unfinished.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_one_program_at_a_time_is_in_a_folder(tmp_path):
    """Of this process and of another; what was left by one that has ended is no obstacle."""
    code = "import sys; from mobilellm_jax.files import alone; alone(sys.argv[1], 'is here').__enter__()"
    other = [sys.executable, "-c", code, tmp_path / "run"]
    for inside in (True, False):
        if inside:
            with alone(tmp_path / "run", "is training"):
                with (
                    pytest.raises(UserError, match="another program is training in .*run at this"),
                    alone(tmp_path / "run", "is training"),
                ):
                    pass
                ended = subprocess.run(other, capture_output=True, text=True, check=False)
                assert "another program is here in" in ended.stderr
        else:
            subprocess.run(other, check=True)
            with alone(tmp_path / "run", "is training"):
                pass


def test_nobody_is_in_a_file(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run is a file"), alone(tmp_path / "run", "is training"):
        pass
