"""What the compiler for a GPU makes of flash attention with tiles of several sizes; no GPU needs to be here.

    python -m benchmarks.attention_tiles --gpus=a100,h100,b200 --head_dims=64,128

For each kernel: registers of a thread, bytes that it spills to memory, and how many instructions are
products of the tensor cores' own (`wgmma` on Hopper, `tcgen05` on Blackwell) or of the older kind
(`mma.sync`), which reaches about two thirds of their speed. Needs the extra `[cuda]`, and `ptxas`,
which comes with it.
"""

import atexit
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from absl import app, flags

DUMP = tempfile.mkdtemp()
atexit.register(shutil.rmtree, DUMP, ignore_errors=True)
# Read when JAX starts.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={DUMP}"

import jax  # noqa: E402
from jax.experimental.pallas.ops.gpu import attention  # noqa: E402

from mobilellm_jax.model import flash_gpu  # noqa: E402
from mobilellm_jax.parallel.topologies import topology_devices  # noqa: E402
from mobilellm_jax.tables import aligned  # noqa: E402

# Queries and keys forwards; of the backward pass for keys and values; and for queries.
TILES = ((128, 128, 32, 32, 32, 32), (128, 64, 64, 64, 64, 64), (128, 64, 32, 128, 128, 32))
ARCHITECTURES = {"a100": "sm_80", "h100": "sm_90a", "h200": "sm_90a", "b200": "sm_100a"}
KINDS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync")


def compile_for(gpu: str, tiles: tuple[int, ...], head_dim: int) -> Iterator[Path]:
    """Compiles attention and its gradient; the files of PTX that its kernels are in."""
    shutil.rmtree(DUMP, ignore_errors=True)
    mesh = jax.sharding.Mesh(topology_devices(f"{gpu}:1"), ("data",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    q = jax.ShapeDtypeStruct((8, 2048, 9, head_dim), "bfloat16", sharding=place)
    k = jax.ShapeDtypeStruct((8, 2048, 3, head_dim), "bfloat16", sharding=place)
    ids = jax.ShapeDtypeStruct((8, 2048), "int32", sharding=place)
    flash_gpu.BLOCKS = attention.BlockSizes(*tiles)

    def total(q: jax.Array, k: jax.Array, v: jax.Array, ids: jax.Array) -> jax.Array:
        return flash_gpu.flash(q, k, v, ids).astype("float32").sum()

    with jax.set_mesh(mesh):  # by which the kernel knows its GPU
        jax.jit(jax.grad(total, (0, 1, 2))).lower(q, k, k, ids).compile()
    return (path for path in Path(DUMP).glob("*.ptx") if "mha_" in path.read_text("utf-8"))


def ptxas() -> str:
    """Where the assembler is, in NVIDIA's packages or in the PATH.

    Raises:
      FileNotFoundError: nowhere.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [str(p) for folder in folders or () for p in Path(folder).glob("*/bin/ptxas")]
    if there := next(iter(found), None) or shutil.which("ptxas"):
        return there
    raise FileNotFoundError("ptxas is not here: pip install 'mobilellm-jax[cuda]'.")


def kernels(path: Path, architecture: str) -> Iterator[list[str]]:
    """Name, registers, spilled bytes and products of each kernel of attention in a file of PTX."""
    said = subprocess.run(
        [ptxas(), "-v", f"-arch={architecture}", str(path), "-o", os.devnull],
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    text = path.read_text(encoding="utf-8")
    told = (
        r"function '(mha_(?:forward|backward))'.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    )
    for name, spilled, registers in re.findall(told, said, re.DOTALL):
        body = re.search(rf"\.entry {name}\(.*?\n}}\n", text, re.DOTALL)
        products = [f"{body[0].count(kind) if body else 0}" for kind in KINDS]
        yield [name, registers, spilled, *products]


def main(_: list[str]) -> None:
    lines = [["GPU", "head", "tiles", "kernel", "registers", "spilled", *KINDS]]
    for gpu in flags.FLAGS.gpus:
        for head_dim in map(int, flags.FLAGS.head_dims):
            for tiles in TILES:
                for path in compile_for(gpu, tiles, head_dim):
                    for told in kernels(path, ARCHITECTURES[gpu]):
                        part = tiles[:2] if told[0] == "mha_forward" else tiles[2:]
                        lines.append([gpu, f"{head_dim}", " x ".join(map(str, part)), *told])
    print(aligned(lines, "<><<" + ">" * 5))


if __name__ == "__main__":
    flags.DEFINE_list("gpus", ["h100"], f"Of {', '.join(ARCHITECTURES)}.")
    flags.DEFINE_list("head_dims", ["64"], "Widths of a head.")
    jax.config.update("jax_platforms", "cpu")
    app.run(main)
