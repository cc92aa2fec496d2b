// The network, through transformers.js and onnxruntime-web: loads, then writes what it is asked for.

import {
  AutoModelForCausalLM, AutoTokenizer, DynamicCache, InterruptableStoppingCriteria, TextStreamer, env,
} from "./runtime/transformers.min.js";

const tell = (kind, value) => self.postMessage({ kind, value });
const stopping = new InterruptableStoppingCriteria();
let last = null; // what was read and written last, and its keys and values

env.allowRemoteModels = false;
env.allowLocalModels = true;
env.useBrowserCache = false; // the service worker keeps the files
env.localModelPath = "./";
const wasm = env.backends.onnx.wasm;
wasm.wasmPaths = new URL("./runtime/", self.location).href;
// Up to four: phones have slow cores beside a few fast ones, for which those would wait.
wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;

async function load() {
  const parts = new Map();
  const progress_callback = ({ status, file, loaded, total }) => {
    if (status !== "progress" || !total) return;
    parts.set(file, [loaded, total]);
    const [have, all] = [...parts.values()].reduce(([a, b], [c, d]) => [a + c, b + d], [0, 0]);
    tell("progress", { part: have / all, file });
  };
  const settings = { dtype: "fp32", device: "wasm", progress_callback }; // the name of the file, not of what is in it
  const tokenizer = await AutoTokenizer.from_pretrained("model");
  const template = await fetch("model/chat_template.jinja");
  if (template.ok) tokenizer.chat_template = await template.text();
  const model = await AutoModelForCausalLM.from_pretrained("model", settings);
  tell("ready", wasm.numThreads);
  return { tokenizer, model };
}

async function write({ messages, text, chat, temperature, longest }) {
  const { tokenizer, model } = await loaded;
  const inputs = chat
    ? tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_dict: true })
    : tokenizer(text);
  const room = model.config.max_position_embeddings - inputs.input_ids.dims[1];
  if (room < 1) {
    const most = model.config.max_position_embeddings.toLocaleString();
    throw new Error(`the network reads ${most} tokens at most, and this is more. Begin a new conversation (⚙).`);
  }
  const cache = cached(inputs.input_ids.tolist()[0]);
  const read = inputs.input_ids.dims[1] - cache.get_seq_length();
  const begin = performance.now();
  let [tokens, first] = [0, 0];
  const streamer = new TextStreamer(tokenizer, {
    skip_prompt: true,
    skip_special_tokens: true,
    callback_function: (piece) => tell("piece", piece),
    token_callback_function: () => {
      if (!tokens++) first = (performance.now() - begin) / 1000;
    },
  });
  stopping.reset();
  const written = await model.generate({
    ...inputs,
    past_key_values: cache,
    max_new_tokens: Math.min(longest, room),
    do_sample: temperature > 0,
    temperature: temperature || 1,
    streamer,
    stopping_criteria: stopping,
  });
  last = { ids: written.tolist()[0].slice(0, cache.get_seq_length()), cache };
  tell("done", { read, tokens, first, seconds: (performance.now() - begin) / 1000 });
}

// The cache of what this text and the last have in common at their beginning, less the token whose logits
// are wanted: a conversation is read once. A cache grows while it is used: the last one's is gone then.
function cached(ids) {
  const differs = last ? ids.findIndex((id, i) => i === ids.length - 1 || id !== last.ids[i]) : 0;
  const parts = differs ? Object.entries(last.cache) : [];
  last = null;
  return new DynamicCache(Object.fromEntries(parts.map(([name, x]) => [name, x.slice(null, null, [0, differs])])));
}

const report = (error) => tell("failed", error.message ?? String(error));
self.onmessage = ({ data }) => (data.kind === "stop" ? stopping.interrupt() : write(data).catch(report));
const loaded = load();
loaded.catch(report);
