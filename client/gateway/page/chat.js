// The chat page: a client of /v1 like any other. What is said stays in this page's memory.

import { render } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const turns = []; // {role, content}
let models = [];
let running = null; // AbortController of the answer in the making

// --- models, and adapters as "model@adapter"

async function readModels() {
  let reply;
  try {
    reply = await fetch("/v1/models", { headers: authorization() });
  } catch {
    return say("The gateway cannot be reached.", true);
  }
  if (reply.status === 401) {
    say("This gateway needs an API key.", true);
    return openSettings();
  }
  if (!reply.ok) return say("The gateway cannot list its models.", true);
  models = (await reply.json()).data;
  const names = [...new Set(models.map((model) => split(model.id)[0]))];
  fill($("model"), names.map((name) => [name, name]));
  $("model").disabled = false;
  showAdapters();
  const waiting = models.filter((model) => model.swarm?.available === false).length === models.length;
  say(waiting ? "The swarm is not complete yet: some blocks have no node." : "");
}

function split(id) {
  const at = id.indexOf("@");
  return at < 0 ? [id, ""] : [id.slice(0, at), id.slice(at + 1)];
}

function showAdapters() {
  const name = $("model").value;
  const adapters = models.map((model) => split(model.id)).filter(([base, adapter]) => base === name && adapter);
  fill($("adapter"), [["", "no adapter"], ...adapters.map(([, adapter]) => [adapter, adapter])]);
  $("adapter-choice").hidden = adapters.length === 0;
}

function chosenModel() {
  const adapter = $("adapter-choice").hidden ? "" : $("adapter").value;
  return $("model").value + (adapter && `@${adapter}`);
}

function fill(select, options) {
  const before = select.value;
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
  if (options.some(([value]) => value === before)) select.value = before;
}

function authorization() {
  const key = sessionStorage.getItem("key");
  return key ? { Authorization: `Bearer ${key}` } : {};
}

// --- one answer

async function ask(text) {
  turns.push({ role: "user", content: text });
  $("welcome").hidden = true;
  addTurn("user").textContent = text;
  const view = new AnswerView();
  running = new AbortController();
  showRunning(true);
  const started = performance.now();
  let outcome = "";
  try {
    await stream(view, running.signal);
  } catch (error) {
    outcome = error.name === "AbortError" ? "stopped" : error.message;
  }
  running = null;
  showRunning(false);
  view.finish(outcome);
  if (view.text) turns.push({ role: "assistant", content: view.text });
  else turns.pop();
  if (outcome && outcome !== "stopped") say(outcome, true);
  else say(`${outcome === "stopped" ? "Stopped" : "Done"} after ${((performance.now() - started) / 1000).toFixed(1)} s.`);
}

async function stream(view, signal) {
  const system = $("system").value.trim();
  const body = {
    model: chosenModel(),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...turns],
    temperature: Number($("temperature").value),
    max_tokens: Math.max(1, Number($("max-tokens").value) || 512),
    stream: true,
    stream_options: { include_chain: true },
  };
  let reply;
  try {
    reply = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "Content-Type": "application/json", ...authorization() },
      body: JSON.stringify(body),
      signal,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The gateway cannot be reached.");
  }
  if (!reply.ok) throw new Error(await explain(reply));
  for await (const event of events(reply.body)) {
    if (event.error) throw new Error(event.error.message);
    const choice = event.choices?.[0];
    if (choice?.delta?.content) view.add(choice.delta.content);
    for (const served of event.swarm ?? []) view.serve(served);
    if (choice?.finish_reason === "length") view.cut = true;
  }
}

async function explain(reply) {
  let message = `The gateway answered with status ${reply.status}.`;
  try {
    message = (await reply.json()).error.message;
  } catch { /* no JSON: the status must do */ }
  if (reply.status === 401) openSettings();
  return message.charAt(0).toUpperCase() + message.slice(1);
}

async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The connection was lost in the middle of the answer.");
    waiting += value;
    let end;
    while ((end = waiting.indexOf("\n\n")) >= 0) {
      const event = waiting.slice(0, end);
      waiting = waiting.slice(end + 2);
      if (event === "data: [DONE]") return;
      if (event.startsWith("data: ")) yield JSON.parse(event.slice(6));
    }
  }
}

// --- what is shown

class AnswerView {
  text = "";
  cut = false;
  #turn = addTurn("assistant");
  #answer = this.#turn.appendChild(document.createElement("div"));
  #served = this.#turn.appendChild(document.createElement("div"));
  #hops = "";
  #due = 0;

  constructor() {
    this.#answer.className = "answer growing";
    this.#answer.append(document.createElement("p"));
    this.#answer.setAttribute("aria-busy", "true");
    this.#served.className = "served";
    follow();
  }

  add(text) {
    this.text += text;
    this.#due ||= requestAnimationFrame(() => {
      this.#due = 0;
      this.#show();
    });
  }

  serve({ chain, tokens_per_s: speed }) {
    const hops = JSON.stringify(chain);
    const healed = this.#hops && hops !== this.#hops;
    this.#hops = hops;
    const list = document.createElement("ol");
    list.className = "chain";
    list.setAttribute("aria-label", "Nodes that serve this answer");
    for (const hop of chain) {
      const item = list.appendChild(document.createElement("li"));
      const name = item.appendChild(document.createElement("span"));
      name.className = "hop";
      name.textContent = `${hop.name} · ${hop.first_block}–${hop.end_block - 1}`;
      name.title = `${hop.name}, blocks ${hop.first_block} to ${hop.end_block - 1}, ${hop.peer_id}`;
    }
    const before = this.#served.querySelector(".changed");
    this.#served.replaceChildren(list);
    if (healed || before) this.#note("A node left; another one took over.", "changed");
    if (speed) this.#note(`${speed.toFixed(1)} tokens per second`, "speed");
    follow();
  }

  finish(outcome) {
    cancelAnimationFrame(this.#due);
    this.#show();
    this.#answer.classList.remove("growing");
    this.#answer.removeAttribute("aria-busy");
    if (this.cut) this.#note("Cut off at the longest answer that the settings allow.", "cut");
    if (outcome === "stopped") this.#note("Stopped.", "cut");
    else if (outcome) this.#note(outcome, "failed");
  }

  #note(text, kind) {
    const note = this.#served.appendChild(document.createElement("div"));
    note.className = kind;
    note.textContent = text;
  }

  #show() {
    if (this.text) this.#answer.replaceChildren(render(this.text));
    follow();
  }
}

function addTurn(role) {
  const turn = $("turns").appendChild(document.createElement("li"));
  turn.className = `turn ${role}`;
  const who = turn.appendChild(document.createElement("span"));
  who.className = "hidden";
  who.textContent = role === "user" ? "You: " : "Answer: ";
  return role === "user" ? turn.appendChild(document.createElement("span")) : turn;
}

let atEnd = true;
$("conversation").addEventListener("scroll", () => {
  const { scrollHeight, scrollTop, clientHeight } = $("conversation");
  atEnd = scrollHeight - scrollTop - clientHeight < 60;
}, { passive: true });

function follow() {
  if (atEnd) $("conversation").scrollTop = $("conversation").scrollHeight;
}

function showRunning(is) {
  $("send").hidden = is;
  $("stop").hidden = !is;
  if (is) say("Answering …");
  $("text").focus();
}

function say(text, failed = false) {
  $("status").textContent = text;
  $("status").classList.toggle("failed", failed);
}

// --- the form

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("text").value.trim();
  if (!text || running || $("model").disabled) return;
  $("text").value = "";
  grow();
  atEnd = true;
  ask(text);
});
$("text").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    $("ask").requestSubmit();
  }
});
$("text").addEventListener("input", grow);
$("stop").addEventListener("click", () => running?.abort());
$("new").addEventListener("click", () => {
  running?.abort();
  turns.length = 0;
  $("turns").replaceChildren();
  $("welcome").hidden = false;
  say("");
  $("text").focus();
});
$("model").addEventListener("change", showAdapters);
for (const idea of document.querySelectorAll(".idea")) {
  idea.addEventListener("click", () => {
    $("text").value = idea.textContent;
    $("ask").requestSubmit();
  });
}

function grow() {
  $("text").rows = Math.min(10, $("text").value.split("\n").length);
}

// --- settings

function openSettings() {
  $("key").value = sessionStorage.getItem("key") ?? "";
  if (!$("settings").open) $("settings").showModal();
}
$("show-settings").addEventListener("click", openSettings);
$("settings").addEventListener("close", () => {
  const key = $("key").value.trim();
  if (key === (sessionStorage.getItem("key") ?? "")) return;
  if (key) sessionStorage.setItem("key", key);
  else sessionStorage.removeItem("key");
  readModels();
});
function showTemperature() {
  $("temperature-shown").value = $("temperature").value;
}
$("temperature").addEventListener("input", showTemperature);

showTemperature();
readModels();
$("text").focus({ preventScroll: true });
