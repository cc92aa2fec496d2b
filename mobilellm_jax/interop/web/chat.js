// The page: what is written and read. The network computes in model.js, in a thread of its own.

const at = (id) => document.getElementById(id);
const page = await (await fetch("page.json")).json();
const messages = []; // of the conversation, as chat templates take them
let writing = null; // the reply that is being written
const chats = () => at("mode").value === "chat";

at("name").textContent = document.title = page.name;
at("about").textContent = page.about;
at("mode").value = page.chat ? "chat" : "text";
at("mode").disabled = !page.chat;
at("mode").onchange = () => {
  at("prompt").placeholder = chats() ? "Ask something" : "Begin a text, and it goes on";
};
at("mode").onchange();
const show = () => (at("shown").textContent = at("temperature").value);
at("temperature").oninput = show;
show();

await keepForOffline();
const model = new Worker("model.js", { type: "module" });
model.onerror = (event) => failed(event.message || "its thread did not start");
model.onmessage = ({ data }) => ({ progress, ready, piece, done, failed })[data.kind](data.value);

// Files pass through a service worker, which keeps them. It also says of them what browsers ask of pages
// with threads; the page itself has to be loaded through it for that.
async function keepForOffline() {
  if (!navigator.serviceWorker) return;
  const state = await navigator.serviceWorker.register(`service-worker.js?${page.version}`).catch(() => null);
  if (!state) return;
  await navigator.serviceWorker.ready;
  if (!navigator.serviceWorker.controller)
    await new Promise((resolve) => (navigator.serviceWorker.oncontrollerchange = resolve));
  if (!crossOriginIsolated && !sessionStorage.reloaded) {
    sessionStorage.reloaded = true;
    location.reload();
    await new Promise(() => {});
  }
}

function progress({ part, file }) {
  at("progress").value = part;
  at("state").textContent = `Loading ${file} …`;
}

function ready(threads) {
  at("loading").remove();
  at("about").textContent = `${page.about} · ${threads} thread${threads === 1 ? "" : "s"}`;
  at("prompt").disabled = at("send").disabled = false;
  at("prompt").focus();
  document.body.dataset.state = "ready";
}

function said(kind, text) {
  const bubble = document.createElement("article");
  bubble.className = kind;
  bubble.append(document.createElement("p"));
  bubble.firstChild.textContent = text;
  at("conversation").append(bubble);
  bubble.scrollIntoView({ block: "end" });
  return bubble;
}

function piece(text) {
  writing.firstChild.textContent += text;
  at("conversation").scrollTop = at("conversation").scrollHeight;
}

function done({ read, tokens, seconds, first }) {
  const speed = document.createElement("p");
  speed.className = "speed";
  const rate = tokens > 1 ? ((tokens - 1) / (seconds - first)).toFixed(1) : "–";
  speed.textContent = `${rate} tokens/s · first after ${first.toFixed(2)} s · ${read} read, ${tokens} written`;
  writing.append(speed);
  writing.classList.remove("writing");
  if (answers()) messages.push({ role: "assistant", content: writing.firstChild.textContent });
  idle();
}

const answers = () => writing.dataset.chat === "true";

function idle() {
  writing = null;
  at("send").textContent = "↑";
  at("send").ariaLabel = "Send";
  document.body.dataset.state = "ready";
}

function failed(message) {
  at("loading")?.remove();
  said("theirs failed", `It cannot go on: ${message}`);
  if (writing) {
    writing.classList.remove("writing");
    if (answers()) messages.pop(); // what was asked
    idle();
  }
}

at("composer").onsubmit = (event) => {
  event.preventDefault();
  if (writing) return model.postMessage({ kind: "stop" });
  const text = at("prompt").value;
  if (!text.trim()) return;
  at("prompt").value = "";
  const chat = chats();
  if (chat) {
    messages.push({ role: "user", content: text });
    said("mine", text);
  }
  writing = said("theirs writing", chat ? "" : text);
  writing.dataset.chat = chat;
  at("send").textContent = "■";
  at("send").ariaLabel = "Stop";
  document.body.dataset.state = "writing";
  const [temperature, longest] = [Number(at("temperature").value), Number(at("longest").value)];
  model.postMessage({ kind: "write", messages, text, chat, temperature, longest });
};

at("prompt").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!writing) at("composer").requestSubmit();
  }
};

at("clear").onclick = () => {
  if (writing) return;
  messages.length = 0;
  document.querySelectorAll("article").forEach((bubble) => bubble.remove());
  at("settings").open = false;
};
