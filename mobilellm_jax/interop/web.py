"""A trained network as a web page that chats without a network: for a phone, and without an app.

A folder for any server of files. `model/` is what `interop.onnx` writes; `runtime/` has transformers.js and
onnxruntime-web, which read it; the rest is the page of `web/`, and `page.json`, what it has to know. A
service worker keeps all of it when it was loaded once.

The two libraries are JavaScript and come through npm, in the versions below and no other: what npm brings
is compared with the hash of the package.
"""

import base64
import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from importlib import resources
from pathlib import Path

from etils import epath

from mobilellm_jax.data.tokenizers import Tokenizer
from mobilellm_jax.errors import UserError
from mobilellm_jax.files import new_folder
from mobilellm_jax.interop import onnx
from mobilellm_jax.interop.huggingface import write_json
from mobilellm_jax.leaves import Leaves
from mobilellm_jax.model.config import ModelConfig, parameter_count

QUANTIZATIONS = ("q8_0", "q4_0", "f32")
_WASM = "package/dist/ort-wasm-simd-threaded.asyncify"
# Package, version, hash of its archive, files that are taken.
LIBRARIES = (
    (
        "@huggingface/transformers",
        "4.3.1",
        "5+voSeUCFK6PCKlY15dPhNOKq3/zOTxDN7oC+Wy9dFb1QZ0TSQomZRRy7URRK8YRuUoE9fGMQTTPC5d/pWBJhA==",
        ("package/dist/transformers.min.js", "package/LICENSE"),
    ),
    (
        "onnxruntime-web",
        "1.31.0-dev.20260914-8d85527a0",  # the one that transformers.js was built with
        "Iy7rtadoBgxS/LLvDr3QW38DB1PNXRnr0GJMcL0TAt7c9qjgVQl83UlGCVyeAnK2InpmW8Uc3PL8XIuqtDeF6g==",
        (f"{_WASM}.mjs", f"{_WASM}.wasm"),
    ),
)


def export(
    leaves: Leaves,
    model: ModelConfig,
    tokenizer: Tokenizer,
    out: epath.PathLike,
    quantization: str = "q8_0",
) -> None:
    """Writes the folder, beside `out` until it is whole, with one leaf in memory at a time.

    Args:
      leaves: the weights, in any floating dtype.
      model: the network.
      tokenizer: the tokenizer it was trained with; without a chat template the page can only
        continue texts.
      out: the folder to make; it may exist if it is empty. Its name is the title of the page.
      quantization: of the matrices, one of `QUANTIZATIONS`.

    Raises:
      UserError: see `onnx.export`; npm is missing, or does not bring the libraries.
    """
    with new_folder(out) as folder:
        for library in LIBRARIES:
            _bring(*library, folder / "runtime")
        onnx.export(leaves, model, tokenizer, folder / "model", quantization)
        for source in (resources.files("mobilellm_jax") / "interop" / "web").iterdir():
            (folder / source.name).write_bytes(source.read_bytes())
        name = epath.Path(out).name
        weights = (folder / "model" / onnx.DATA).stat().length / 1e6
        page = {
            "name": name,
            "about": f"{parameter_count(model):,} parameters · {quantization} · {weights:,.0f} MB",
            "chat": tokenizer.chat_template is not None,
            "version": _version(folder),
        }
        write_json(folder / "page.json", page)
        icon = {"src": "icon.svg", "sizes": "any", "type": "image/svg+xml"}
        looks = {"background_color": "#faf9f7", "theme_color": "#faf9f7"}
        manifest = {"name": name, "display": "standalone", "start_url": "./", "icons": [icon]}
        write_json(folder / "manifest.webmanifest", manifest | looks)


def _bring(
    name: str, version: str, wanted: str, files: tuple[str, ...], folder: epath.Path
) -> None:
    """Files of a package of npm, compared with the hash of its archive.

    Raises:
      UserError: npm is missing, or does not bring the package, or one that is another.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(
            f"a web page needs npm, which brings {name}: install Node.js (https://nodejs.org), or export "
            "with --to=onnx."
        )
    with tempfile.TemporaryDirectory() as place:
        command = [npm, "pack", f"{name}@{version}", "--silent", "--pack-destination", place]
        ended = subprocess.run(command, capture_output=True, text=True)
        archives = list(Path(place).iterdir())
        if ended.returncode or len(archives) != 1:
            said = (ended.stderr or ended.stdout).strip().splitlines() or ["nothing"]
            raise UserError(f"npm does not bring {name}@{version}; it says: {said[-1]}")
        found = base64.b64encode(hashlib.sha512(archives[0].read_bytes()).digest()).decode()
        if found != wanted:
            raise UserError(
                f"npm brings {name}@{version} with the hash {found}, not {wanted}: it is not the package "
                "that this was written for. Look at the registry that npm is set to."
            )
        folder.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archives[0]) as archive:
            for file in files:
                content = archive.extractfile(file)
                assert content is not None
                own = file.rpartition("/")[2]
                target = own if own != "LICENSE" else f"LICENSE.{name.rpartition('/')[2]}"
                with (folder / target).open("wb") as copy:
                    shutil.copyfileobj(content, copy)


def _version(folder: epath.Path) -> str:
    """Of what is in a folder, so that a browser keeps no file of another one."""
    version = hashlib.sha256()
    for file in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        version.update(file.relative_to(folder).as_posix().encode())
        with file.open("rb") as content:
            version.update(hashlib.file_digest(content, "sha256").digest())
    return version.hexdigest()[:16]
