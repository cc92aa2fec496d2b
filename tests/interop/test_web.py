"""A network as a web page: in Chromium it computes what ours does, and chats, also without the server."""

import base64
import dataclasses
import hashlib
import io
import json
import os
import shutil
import tarfile

import browser
import numpy as np
import pytest
import runs
import sentencepiece
import tiny
from weights import changed, greedy, logits, random_leaves, random_tokens

from mobilellm_jax.errors import UserError
from mobilellm_jax.interop import onnx, web
from mobilellm_jax.leaves import nested
from mobilellm_jax.model.config import Stack
from mobilellm_jax.training.checkpoint import write_model

pytest.importorskip("onnx", reason="onnx is not installed")

# Shared blocks; and stacks with different heads, of which config.json knows only the first.
STACKS = Stack(2, 4, 2, 96, repeats=2), Stack(1, 2, 1, 64)
MODEL = changed(max_length=96, width=64, stacks=STACKS, head_dim=16)

PAGE = """<!doctype html><script type="module">
const send = (x) => fetch("/", { method: "POST", body: JSON.stringify(x) });
try {
  CODE
} catch (error) { await send({ error: String(error), stack: error.stack }); }
</script>"""

LOGITS = """
  const { AutoModelForCausalLM, Tensor, env } = await import("./runtime/transformers.min.js");
  Object.assign(env, { allowRemoteModels: false, allowLocalModels: true, useBrowserCache: false });
  env.localModelPath = "./";
  env.backends.onnx.wasm.wasmPaths = new URL("runtime/", location).href;
  const model = await AutoModelForCausalLM.from_pretrained("model", { dtype: "fp32", device: "wasm" });
  const tokens = TOKENS;
  let [past_key_values, found] = [null, []];
  for (const [begin, end] of [[0, 9], [9, 10], [10, tokens.length]]) {
    const wide = (x) => new Tensor("int64", BigInt64Array.from(x, BigInt), [1, x.length]);
    const out = await model({
      input_ids: wide(tokens.slice(begin, end)),
      attention_mask: wide(tokens.slice(0, end).map(() => 1)),
      past_key_values,
    });
    found.push(...out.logits.data);
    const cached = Object.keys(out).filter((name) => name.startsWith("present"));
    past_key_values = Object.fromEntries(
      cached.map((name) => [name.replace("present", "past_key_values"), out[name]]));
  }
  await send({ logits: found });
"""

CHAT = """
  // The page asks to be loaded anew once, through its service worker: so does this one, which waits for it.
  const page = document.createElement("iframe");
  page.src = "index.html";
  document.body.append(page);
  const seen = async (wanted) => {
    for (let i = 0; i < 600; i++) {
      const failed = page.contentDocument?.querySelector(".failed")?.textContent;
      if (failed) throw new Error(failed);
      if (page.contentDocument?.querySelector(wanted)) return page.contentDocument;
      await new Promise((resolve) => setTimeout(resolve, 100));
    }
    throw new Error(wanted + " was not seen: " + page.contentDocument?.body?.textContent);
  };
  const at = await seen("[data-state=ready]");
  at.getElementById("temperature").value = 0;
  at.getElementById("longest").value = 12;
  at.getElementById("mode").value = "MODE";
  const replies = at.getElementsByClassName("theirs");
  for (const prompt of PROMPTS) {
    at.getElementById("prompt").value = prompt;
    at.getElementById("send").click();
    await seen(`article.theirs:nth-of-type(${at.querySelectorAll("article").length}) .speed`);
  }
  await send({
    texts: Array.from(replies, (reply) => reply.firstChild.textContent),
    speeds: Array.from(replies, (reply) => reply.querySelector(".speed").textContent),
    about: at.getElementById("about").textContent,
    name: at.getElementById("name").textContent,
  });
"""


TALK = "a text", "more", "words"
TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message.role[0] }}:{{ message.content }}
{% endfor %}{% if add_generation_prompt %}a:{% endif %}"""


def writes_words(leaves, tokenizer):
    """A network that never writes a byte: programs decode bytes that are no text in different ways."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=tokenizer.model_bytes)
    other = [
        pieces.IsByte(i) or pieces.IsControl(i) or pieces.IsUnknown(i) for i in range(len(pieces))
    ]
    word = other.index(False)
    leaves["embedding"][other] = leaves["embedding"][word] / 2  # never the likeliest, then
    return leaves


def put(folder, name, code):
    (folder / name).write_text(PAGE.replace("CODE", code))


def answer(site):
    found = site.sent.get(timeout=120)
    assert "error" not in found, found
    return found


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.skipif(shutil.which("npm") is None, reason="npm is not installed")
def test_in_a_browser(tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = dataclasses.replace(tiny.tokenizer(), chat_template=TEMPLATE)
    leaves = writes_words(random_leaves(MODEL), tokenizer)
    write_model(leaves, MODEL, tokenizer, {}, tmp_path / "run")
    out = tmp_path / "Mine"
    given = f"--checkpoint={tmp_path}/run", "--to=web", "--quantization=f32", f"--out={out}"
    ended = runs.program("mobilellm_jax.convert", *given)
    assert ended.status == 0, ended
    assert f"python -m http.server --directory {out}" in ended.out

    tokens_T = random_tokens(MODEL, length=20)[0].tolist()
    put(out, "logits.html", LOGITS.replace("TOKENS", str(tokens_T)))

    def talk(name, mode, *prompts):
        put(out, name, CHAT.replace("MODE", mode).replace("PROMPTS", json.dumps(prompts)))

    talk("text.html", "text", "some text", "other words")
    talk("chat.html", "chat", *TALK)
    talk("long.html", "text", "some text " * 64)
    with browser.served(out) as site:
        with browser.opened(site, "logits.html", tmp_path / "profile"):
            found = np.array(answer(site)["logits"]).reshape(20, -1)
        wanted = np.asarray(logits(nested(leaves), MODEL, np.array([tokens_T])))[0]
        np.testing.assert_allclose(found, wanted, atol=1e-4)

        def written(prompt):
            """What the network writes behind some tokens."""
            found = greedy(nested(leaves), MODEL, prompt, 12)
            assert tokenizer.eos_id not in found
            return tokenizer.decode(found)

        with browser.opened(site, "text.html", tmp_path / "profile"):
            first = answer(site)
        prompt = [tokenizer.bos_id, *tokenizer.encode("some text")]
        assert first["texts"][0] == "some text" + written(prompt)
        assert "tokens/s" in first["speeds"][0]
        assert f"{len(prompt)} read, 12 written" in first["speeds"][0]
        # Another text has BOS alone in common with it.
        prompt = [tokenizer.bos_id, *tokenizer.encode("other words")]
        assert first["texts"][1] == "other words" + written(prompt)
        assert f"{len(prompt) - 1} read, 12 written" in first["speeds"][1]
        assert first["name"] == "Mine" and "f32" in first["about"] and "thread" in first["about"]

        with browser.opened(site, "long.html", tmp_path / "profile"):
            assert "reads 96 tokens at most" in site.sent.get(timeout=120)["error"]

        site.only = ["/chat.html"]  # of its own the page has all that it needs
        with browser.opened(site, "chat.html", tmp_path / "profile"):
            found = answer(site)
        theirs = transformers.AutoTokenizer.from_pretrained(out / "model")
        said, before = [], []
        for turn, asked in enumerate(TALK):
            said.append({"role": "user", "content": asked})
            prompt = theirs.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
            wrote = greedy(nested(leaves), MODEL, prompt, 12)
            assert found["texts"][turn] == tokenizer.decode(wrote)
            said.append({"role": "assistant", "content": found["texts"][turn]})
            # What it knows already it does not read again.
            known = os.path.commonprefix([before, prompt])
            assert f"{len(prompt) - len(known)} read, 12 written" in found["speeds"][turn]
            assert len(known) >= 0.9 * len(before)
            before = [*prompt, *wrote[:-1]]


def npm(folder, monkeypatch, script):
    """A program in npm's place."""
    folder.mkdir()
    (folder / "npm").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")


def test_the_folder(tmp_path, monkeypatch):
    """With libraries in whose place there is a line of text; their hashes are compared all the same."""
    libraries = []
    for name, version, _, files in web.LIBRARIES:
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w:gz") as archive:
            for file in files:
                member = tarfile.TarInfo(file)
                member.size = len(file)
                archive.addfile(member, io.BytesIO(file.encode()))
        (tmp_path / f"{name.rpartition('/')[2]}.tgz").write_bytes(content.getvalue())
        found = base64.b64encode(hashlib.sha512(content.getvalue()).digest()).decode()
        libraries.append((name, version, found, files))
    # npm pack NAME@VERSION --silent --pack-destination FOLDER
    npm(tmp_path / "bin", monkeypatch, f'name=${{2%@*}}; cp "{tmp_path}/${{name##*/}}.tgz" "$5"')
    monkeypatch.setattr(web, "LIBRARIES", libraries)
    leaves, tokenizer = random_leaves(MODEL), tiny.tokenizer()
    pages = []
    for name, quantization in (("first", "q8_0"), ("again", "q8_0"), ("other", "q4_0")):
        web.export(leaves, MODEL, tokenizer, tmp_path / name / "Mine", quantization)
        pages.append(json.loads((tmp_path / name / "Mine/page.json").read_text()))
    assert pages[0] == pages[1] and pages[0]["version"] != pages[2]["version"]
    out = tmp_path / "first/Mine"
    assert {path.name for path in out.iterdir()} == {
        "index.html", "style.css", "chat.js", "model.js", "service-worker.js", "icon.svg", "page.json",
        "manifest.webmanifest", "model", "runtime",
    }  # fmt: skip
    assert (out / "runtime/transformers.min.js").read_text() == "package/dist/transformers.min.js"
    assert (out / "runtime/LICENSE.transformers").exists() and (out / "model" / onnx.DATA).exists()


def test_what_is_refused(tmp_path, monkeypatch):
    given = random_leaves(MODEL), MODEL, tiny.tokenizer(), tmp_path / "out"
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="a web page needs npm, .* install Node.js"):
        web.export(*given)
    npm(tmp_path / "failing", monkeypatch, "echo 'npm error network' >&2; exit 1")
    with pytest.raises(
        UserError, match=r"npm does not bring @huggingface/.*; it says: npm error network"
    ):
        web.export(*given)
    npm(tmp_path / "other", monkeypatch, 'echo other > "$5/other.tgz"')
    with pytest.raises(UserError, match=r"with the hash .*: it is not the package that this"):
        web.export(*given)
    assert not (tmp_path / "out").exists()
