// The owner's page. The token comes behind the address's #, is kept for this tab, and goes along as
// a header: other pages cannot send it, and other ports do not see it.

const $ = (id) => document.getElementById(id);
const PERIOD_MS = 3000;
const STATES = {
  starting: "Starting", joining: "Joining", loading: "Loading", online: "Working",
  moving: "Moving to other blocks", draining: "Handing over", resting: "Resting", stopped: "Stopped",
};
const form = $("limits");
let edited = false;

if (location.hash.length > 1) {
  sessionStorage.setItem("token", location.hash.slice(1));
  history.replaceState(null, "", location.pathname);
}

async function call(path, body) {
  const reply = await fetch(`/api/${path}`, {
    method: body === undefined ? "GET" : "POST",
    headers: {
      Authorization: `Bearer ${sessionStorage.getItem("token") ?? ""}`,
      ...(body === undefined ? {} : { "Content-Type": "application/json" }),
    },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const answer = await reply.json();
  if (!reply.ok) throw new Error(answer.error);
  return answer;
}

async function act(path, body) {
  try {
    show(await call(path, body));
    return "";
  } catch (error) {
    if (path === "owner") gone(error.message);
    return error.message;
  }
}

function gone(message) {
  $("state").textContent = "No word from the node";
  $("state").dataset.state = "gone";
  $("why").textContent = message;
  for (const button of document.querySelectorAll("button")) button.disabled = true;
}

function show({ status, limits, readings, reasons, rests_until: until, today, month_bytes: month, days }) {
  for (const button of document.querySelectorAll("button")) button.disabled = false;
  $("name").textContent = status.display_name || "My node";
  $("state").textContent = STATES[status.state] ?? status.state;
  $("state").dataset.state = status.state;
  $("why").textContent = explain(status, reasons, until);
  $("resume").hidden = !reasons.includes("paused");
  $("pauses").hidden = reasons.includes("paused");
  showToday(today);
  showDays(days);
  if (!edited) showLimits(limits);
  $("month").textContent = `${bytes(month)} so far this month`;
  $("heat").textContent = told(readings.temperature_c, (value) => `${value.toFixed(0)} °C now`);
  $("power").textContent = told(readings.power_w, (value) => `${value.toFixed(0)} W now`);
  $("memory").textContent = told(readings.memory_free_bytes, (value) => `${bytes(value)} free now`);
  $("disk").textContent = told(readings.disk_free_bytes, (value) => `${bytes(value)} free now`);
}

function explain(status, reasons, until) {
  if (reasons.length) {
    const why = reasons.join(", ");
    return `${why.charAt(0).toUpperCase()}${why.slice(1)}.${until ? ` Until ${until}.` : ""}`;
  }
  if (status.end_block > status.first_block) {
    const sessions = `${status.sessions} session${status.sessions === 1 ? "" : "s"}`;
    return `Blocks ${status.first_block} to ${status.end_block - 1} of ${status.model}, ${sessions} now.`;
  }
  return "";
}

function told(value, text) {
  return value === null ? "this computer does not tell" : text(value);
}

function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let power = 0;
  while (value >= 1000 && power < units.length - 1) {
    value /= 1000;
    power += 1;
  }
  return `${value.toFixed(value < 10 && power ? 1 : 0)} ${units[power]}`;
}

function hours(seconds) {
  const minutes = Math.floor(seconds / 60);
  return `${Math.floor(minutes / 60)} h ${String(minutes % 60).padStart(2, "0")}`;
}

function showToday(day) {
  const facts = [
    ["Tokens for others", day.tokens.toLocaleString()],
    ["Sessions", day.sessions.toLocaleString()],
    ["Worked", hours(day.online_s)],
    ["Rested", hours(day.resting_s)],
    ["Sent", bytes(day.sent_bytes)],
    ["Received", bytes(day.received_bytes)],
  ];
  if (day.energy_wh) facts.push(["Energy", `${day.energy_wh.toFixed(0)} Wh`]);
  $("today").replaceChildren(...facts.map(([name, value]) => {
    const pair = document.createElement("div");
    pair.appendChild(document.createElement("dt")).textContent = name;
    pair.appendChild(document.createElement("dd")).textContent = value;
    return pair;
  }));
}

function showDays(days) {
  const most = Math.max(1, ...days.map((day) => day.tokens));
  const known = new Map(days.map((day) => [day.day, day.tokens]));
  const total = days.reduce((sum, day) => sum + day.tokens, 0);
  const bars = [];
  const end = new Date();
  for (let back = 29; back >= 0; back -= 1) {
    const when = new Date(end.getFullYear(), end.getMonth(), end.getDate() - back);
    const key = [when.getFullYear(), when.getMonth() + 1, when.getDate()]
      .map((part) => String(part).padStart(2, "0")).join("-");
    const tokens = known.get(key) ?? 0;
    const height = tokens ? Math.max(3, (tokens / most) * 112) : 2;
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    for (const [name, value] of Object.entries({ x: (29 - back) * 20 + 3, y: 116 - height, width: 14, height, rx: 2 })) {
      bar.setAttribute(name, value);
    }
    if (!tokens) bar.setAttribute("class", "none");
    bar.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "title"))
      .textContent = `${key}: ${tokens.toLocaleString()} tokens`;
    bars.push(bar);
  }
  $("chart").replaceChildren($("chart-text"), ...bars);
  $("chart-text").textContent = `Tokens per day in the last 30 days, ${total.toLocaleString()} together`;
  $("chart-caption").textContent = `${total.toLocaleString()} tokens; most on one day ${most > 1 ? most.toLocaleString() : 0}`;
}

// --- limits

function showLimits(limits) {
  for (const input of form.elements) {
    if (!(input.name in limits)) continue;
    const value = limits[input.name];
    if (input.type === "checkbox") input.checked = value;
    else input.value = value === null ? "" : input.dataset.unit ? value / Number(input.dataset.unit) : value;
  }
}

function readLimits() {
  const changes = {};
  for (const input of form.elements) {
    if (!input.name) continue;
    if (input.type === "checkbox") changes[input.name] = input.checked;
    else if (input.value.trim() === "") changes[input.name] = null;
    else changes[input.name] = input.dataset.unit ? Number(input.value) * Number(input.dataset.unit) : input.value;
  }
  return changes;
}

form.addEventListener("input", () => {
  edited = true;
  $("saved").textContent = "";
});
form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const changes = readLimits();
  edited = false;
  const failure = await act("limits", { changes });
  edited = Boolean(failure);
  $("saved").textContent = failure || "Saved.";
  $("saved").classList.toggle("failed", Boolean(failure));
});

// --- buttons

for (const button of document.querySelectorAll("[data-pause]")) {
  button.addEventListener("click", () => act("pause", { for_s: button.dataset.pause ? Number(button.dataset.pause) : null }));
}
$("resume").addEventListener("click", () => act("resume", {}));
$("drain").addEventListener("click", async () => {
  if (confirm("Hand over, leave the swarm and end the node? It starts again by swarm-node join.")) {
    await act("drain", {});
  }
});

async function follow() {
  await act("owner");
  setTimeout(follow, PERIOD_MS);
}
follow();
