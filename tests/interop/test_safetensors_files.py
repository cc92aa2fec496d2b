"""Files in the safetensors format, written and read in parts, are those of its own library."""

import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop.safetensors_files import DTYPES, open_file, write_files

ROWS, COLUMNS = 7, 5


def arrays(seed=0):
    rng = np.random.default_rng(seed)
    made = {
        "wide": rng.normal(size=(ROWS, COLUMNS, 3)).astype(np.float32),
        "narrow": rng.normal(size=(ROWS, COLUMNS)).astype(ml_dtypes.bfloat16),
        "half": rng.normal(size=ROWS).astype(np.float16),
        "whole": rng.integers(-9, 9, (2, 3)).astype(np.int64),
        "none of it": np.zeros((0, 4), np.float32),
    }
    return {name: made[name] for name in rng.permutation(list(made))}


def folder(path):
    path.mkdir(exist_ok=True)
    return path


def test_the_library_reads_what_is_written(tmp_path):
    assert write_files(tmp_path, arrays()) == ["model.safetensors"]
    found = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert set(found) == set(arrays())
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()
    with safetensors.safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}


def test_what_the_library_writes_is_read(tmp_path):
    safetensors.numpy.save_file(arrays(), tmp_path / "file", {"written": "elsewhere"})
    found = open_file(tmp_path / "file")
    assert set(found) == set(arrays())
    for name, array in arrays().items():
        assert found[name].dtype == array.dtype and found[name].shape == array.shape
        assert found[name][:].tobytes() == array.tobytes()


def test_every_dtype_of_the_format_goes_through(tmp_path):
    made = {name: np.arange(6).reshape(2, 3).astype(dtype) for name, dtype in DTYPES.items()}
    write_files(tmp_path, made)
    header = (tmp_path / "model.safetensors").read_bytes()[8:].split(b"}}")[0] + b"}}"
    found = open_file(tmp_path / "model.safetensors")
    for name, array in made.items():
        assert json.loads(header)[name]["dtype"] == name
        assert found[name][:].tobytes() == array.tobytes()


INDICES = [
    0,
    -1,
    slice(None),
    slice(2, 5),
    slice(-3, None),
    slice(5, 100),
    slice(4, 4),
    (3, 2),
    (3, slice(1, 4)),
    (slice(None), 2),
    (slice(None), slice(None), 1),
    (slice(1, 6), slice(2, 4), slice(None)),
    (slice(1, 6), slice(-2, None), -1),
]


@pytest.mark.parametrize("block", [1, 1 << 20])
@pytest.mark.parametrize("index", INDICES, ids=str)
def test_a_part_is_the_arrays_part(index, block, tmp_path, monkeypatch):
    monkeypatch.setattr("mobilellm_jax.interop.safetensors_files._BLOCK", block)
    write_files(tmp_path, arrays())
    tensor, array = open_file(tmp_path / "model.safetensors")["wide"], arrays()["wide"]
    assert tensor[index].shape == array[index].shape
    assert tensor[index].tobytes() == array[index].tobytes()
    with pytest.raises(IndexError):
        tensor[ROWS]


def test_only_the_rows_asked_for_are_read(tmp_path):
    """A file of a terabyte, almost all of it a hole."""
    row = 1 << 20
    shape = [1 << 20, row]
    entry = {"dtype": "U8", "shape": shape, "data_offsets": [0, shape[0] * row]}
    header = json.dumps({"big": entry}).encode()
    with (tmp_path / "sparse").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.seek(12_345 * row, 1)
        file.write(b"\1" * row)
        try:
            file.truncate(8 + len(header) + shape[0] * row)
        except OSError:
            pytest.skip("this file system has no files of a terabyte")
    tensor = open_file(tmp_path / "sparse")["big"]
    assert tensor[12_344:12_347].sum(1).tolist() == [0, row, 0]
    assert tensor[12_344:12_347, 5:7].tolist() == [[0, 0], [1, 1], [0, 0]]


class Counted:
    """A leaf that says when it is read, and how many values are alive."""

    def __init__(self, name, array, log):
        self.name, self.array, self.log = name, array, log
        self.shape, self.dtype = array.shape, array.dtype

    def __getitem__(self, index):
        assert index == slice(None)
        self.log.append(self.name)
        return self.array.copy()


@pytest.mark.parametrize("limit", [1, 150, 421, 10**9])
def test_shards(limit, tmp_path):
    """Each tensor is asked for once and in order, and no shard with two of them is above the limit."""
    log = []
    made = {name: Counted(name, array, log) for name, array in arrays().items()}
    files = write_files(tmp_path, made, limit)
    assert log == list(made)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)
    shards = {
        name: safetensors.numpy.load_file(tmp_path / name) for name in files if "json" not in name
    }
    together = [name for tensors in shards.values() for name in tensors]
    assert sorted(together) == sorted(made)
    for name, tensors in shards.items():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
        for key, tensor in tensors.items():
            assert tensor.tobytes() == made[key].array.tobytes(), name
    if limit < 10**9:
        assert len(shards) > 1
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["weight_map"] == {k: name for name, t in shards.items() for k in t}
        assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays().values())
        assert set(shards) == {
            f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
        }


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    write_files(tmp_path, arrays())
    content = (tmp_path / "model.safetensors").read_bytes()
    assert open_file(tmp_path / "model.safetensors")
    for length in [*range(0, 300, 7), len(content) - 1]:
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(UserError, match=r"/cut .*cut off"):
            open_file(tmp_path / "cut")


def test_a_file_that_is_cut_off_later_is_told(tmp_path):
    write_files(tmp_path, {"a": np.ones((4, 4), np.float32)})
    path = tmp_path / "model.safetensors"
    tensor = open_file(path)["a"]
    path.write_bytes(path.read_bytes()[:-10])
    assert tensor[:3].tolist() == [[1] * 4] * 3
    with pytest.raises(UserError, match="has become shorter"):
        tensor[:]


def with_header(path: pathlib.Path, header: bytes) -> pathlib.Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    return path


def entry(**changes):
    return json.dumps(
        {"t": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24], **changes}}
    ).encode()


@pytest.mark.parametrize(
    "header, said",
    [
        (b"not json", "is not a safetensors file"),
        (b"[1, 2]", "is not a safetensors file"),
        (b'{"t": 5}', "is not a safetensors file"),
        (b'{"t": {"shape": [1]}}', "is not a safetensors file"),
        (entry(shape=[2, 4]), r"is not a safetensors file .*t: 24 bytes for the shape \[2, 4\]"),
        (entry(shape="ab"), "is not a safetensors file"),
        (entry(data_offsets=[0]), "is not a safetensors file"),
        (entry(data_offsets=[-24, 0]), "is not a safetensors file .*t: bytes -24 to 0"),
        (entry(data_offsets=[0.0, 24.0]), "is not a safetensors file"),
        (entry(shape=[-2, -3]), "is not a safetensors file"),
        pytest.param(b"[" * 90_000, "is not a safetensors file", id="deep"),
        (entry(dtype="Q4"), "the tensor t has the unknown dtype Q4"),
        (entry(data_offsets=[100, 124]), "is cut off: its tensor t ends at byte"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused(header, said, tmp_path):
    with pytest.raises(UserError, match=said):
        open_file(with_header(tmp_path / "file", header))
    assert open_file(with_header(tmp_path / "good", entry()))["t"].shape == (2, 3)
