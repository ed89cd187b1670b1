// A chat beside what the memory does. Everything comes from the server's own interface; text is only ever set as text.

const $ = (id) => document.getElementById(id);
const SLOTS_SHOWN = 24;
const NEARLY = 0.9; // of the likest word's likeness, for others to be shown beside it
const DECAY_TURNS = 10;
const NOTHING_SAID = "Nothing was said yet.";
let model = null;
let talking = null; // AbortController of the reply that is coming
let lastTrace = null;
let shown = "write";

class ApiError extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function call(path, options = {}) {
  const headers = { ...(options.body ? { "content-type": "application/json" } : {}) };
  const key = sessionStorage.getItem("key");
  if (key) headers.authorization = `Bearer ${key}`;
  const answer = await fetch(path, { ...options, headers });
  if (answer.ok) return answer;
  let message = `status ${answer.status}`;
  try { message = (await answer.json()).error.message; } catch { /* not ours: the status says it */ }
  throw new ApiError(answer.status, message);
}

const get = async (path) => (await call(path)).json();
const post = async (path, body) => (await call(path, { method: "POST", body: JSON.stringify(body) })).json();
const sessionPath = (rest = "") => `v1/memory/${encodeURIComponent($("session").value)}${rest}`;

function say(text, wrong = false) {
  $("status").textContent = text;
  $("status").classList.toggle("error", wrong);
}

// Every action ends in words, whatever happens.
async function doing(what) {
  try {
    say("");
    await what();
  } catch (error) {
    if (error.name === "AbortError") { say("Stopped; this turn was not kept."); return; }
    say(error.message, true);
    if (error.status === 401) { $("access").open = true; $("key").focus(); }
  }
}

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function addTurn(user, reply) {
  const item = element("li");
  const answer = element("p", "reply", reply ?? "");
  item.append(element("p", "user", user ?? "(not kept)"));
  if (user !== null && !$("ephemeral").checked) {
    const forget = element("button", "forget", "forget");
    forget.setAttribute("aria-label", `Forget: ${user.slice(0, 60)}`);
    forget.addEventListener("click", () => doing(async () => {
      await post(sessionPath("/forget"), { text: user, reply: answer.textContent || null });
      item.classList.add("faded");
      await showMemory(false);
      say("Forgotten. The text stays until the session is deleted.");
    }));
    item.append(forget);
  }
  item.append(answer);
  $("turns").append(item);
  $("turns").scrollTop = $("turns").scrollHeight;
  return answer;
}

async function* events(answer) {
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

// A turn whose reply did not end is taken back, as the server does; one that did is kept, whatever happens after it.
async function talk(text) {
  talking = new AbortController();
  $("send").disabled = true;
  $("stop").hidden = false;
  try {
    await hear(text, talking.signal);
    talking = null;
    $("stop").hidden = true;
    try { await showMemory(); } catch (error) {
      throw new ApiError(error.status, `This turn was kept, but its memory cannot be shown: ${error.message}`);
    }
  } finally {
    talking = null;
    $("send").disabled = false;
    $("stop").hidden = true;
  }
}

async function hear(text, signal) {
  const answer = addTurn(text, "");
  let id = null;
  let finished = false;
  try {
    // New messages alone are sent: `conversation` takes every one as new, also one that was said before.
    const memory = $("ephemeral").checked ? { store: false } : { conversation: $("session").value };
    const body = JSON.stringify({ model, input: text, stream: true, ...memory });
    for await (const event of events(await call("v1/responses", { method: "POST", body, signal }))) {
      if (event.type === "error") throw new ApiError(500, event.message);
      if (event.type === "response.created" && !$("ephemeral").checked) id = event.response.id;
      if (event.type === "response.output_text.delta") answer.textContent += event.delta;
      finished ||= event.type === "response.completed" || event.type === "response.incomplete";
      $("turns").scrollTop = $("turns").scrollHeight;
    }
    if (!finished) throw new ApiError(0, "The reply broke off; this turn was not kept.");
  } catch (error) {
    if (finished) return;
    const kept = id && await keptResponse(id);
    if (kept) {
      answer.textContent = kept.output[0]?.content[0]?.text ?? answer.textContent;
      return;
    }
    answer.parentElement.remove();
    if (!$("message").value) $("message").value = text;
    throw error;
  }
}

// A reply may have been kept without its end having come here.
async function keptResponse(id) {
  try { return await get(`v1/responses/${encodeURIComponent(id)}`); } catch { return null; }
}

function bytes(count) {
  if (count < 1e3) return `${count} B`;
  return count < 1e6 ? `${(count / 1e3).toFixed(1)} KB` : `${(count / 1e6).toFixed(1)} MB`;
}

async function showMemory(withTrace = true) {
  let memory = { bytes: 0, kv_cache_bytes: 0, slots: [], turns: 0 };
  const ephemeral = $("ephemeral").checked;
  $("no-memory").hidden = !ephemeral;
  $("contents").hidden = ephemeral;
  if (!ephemeral) {
    try { memory = await get(sessionPath(`?slots=${SLOTS_SHOWN}`)); } catch (error) { if (error.status !== 404) throw error; }
  }
  $("state-size").textContent = bytes(memory.bytes);
  $("kv-size").textContent = bytes(memory.kv_cache_bytes);
  const most = Math.max(memory.bytes, memory.kv_cache_bytes, 1);
  $("state-bar").style.width = `${(100 * memory.bytes) / most}%`;
  $("kv-bar").style.width = `${(100 * memory.kv_cache_bytes) / most}%`;
  showSlots(memory.slots);
  if (!withTrace) return;
  lastTrace = null;
  noMap = NOTHING_SAID;
  let wrong = null;
  if (memory.turns) {
    try { lastTrace = await get(sessionPath("/trace")); } catch (error) {
      noMap = `There is no map of the last turn: ${error.message}.`;
      if (error.status !== 409 && error.status !== 413) wrong = error; // no text is kept, or too much of it to trace
    }
  }
  drawMap();
  if (wrong) throw wrong;
}

function showSlots(slots) {
  const strongest = slots.length ? slots[0].strength : 1;
  $("slots").replaceChildren(...slots.map((slot) => {
    const item = element("li");
    const bar = element("span", "bar");
    const fill = element("i");
    const share = slot.strength / strongest;
    fill.style.width = `${100 * share}%`;
    bar.append(fill);
    const near = slot.words.filter((word) => word.score > NEARLY * slot.words[0].score || word === slot.words[0]);
    const words = element("span", "words", near.map((word) => JSON.stringify(word.text).slice(1, -1)).join(" · "));
    words.style.opacity = 0.45 + 0.55 * share;
    const empty = element("button", "", "empty");
    empty.setAttribute("aria-label", `Empty slot ${slot.slot} of head ${slot.head}`);
    empty.addEventListener("click", () => doing(async () => {
      await post(sessionPath("/forget"), { head: slot.head, slot: slot.slot });
      await showMemory(false);
    }));
    const strength = element("span", "quiet", slot.strength.toFixed(2));
    item.append(element("span", "quiet", `${slot.head}:${slot.slot}`), bar, strength, words, empty);
    return item;
  }));
}

let mapNote = ""; // what stands below the map, unless there is nothing in it
let noMap = NOTHING_SAID; // why there is none

function drawMap() {
  const canvas = $("map");
  const tokens = lastTrace?.tokens ?? [];
  const strongestOf = (list) => list.reduce((most, value) => Math.max(most, value), 0);
  const everything = lastTrace?.[shown] ?? []; // tokens x slots that were written or read
  const used = (lastTrace?.slots ?? []).map((_, s) => s).filter((s) => everything.some((token) => token[s] > 0));
  const values = everything.map((token) => used.map((s) => token[s]));
  const rows = used.length;
  const width = 16;
  const height = rows ? Math.max(2, Math.min(6, Math.floor(480 / rows))) : 1;
  canvas.width = Math.max(1, tokens.length * width);
  canvas.height = Math.max(1, rows * height);
  const pen = canvas.getContext("2d");
  const heat = getComputedStyle(document.documentElement).getPropertyValue("--heat");
  const most = Math.max(1e-6, strongestOf(values.map(strongestOf)));
  values.forEach((token, x) => token.forEach((value, y) => {
    if (value <= 0) return;
    pen.fillStyle = `rgba(${heat}, ${Math.sqrt(value / most)})`;
    pen.fillRect(x * width, y * height, width - 1, height);
  }));
  $("map-tokens").replaceChildren(...tokens.map((token) => element("span", "", token.replace("\n", "⏎"))));
  const strongest = tokens
    .map((token, n) => [token.trim(), strongestOf(values[n] ?? [])])
    .filter(([token]) => token).sort((a, b) => b[1] - a[1]).slice(0, 5).map(([token]) => token);
  const what = shown === "write" ? "written" : "read";
  canvas.setAttribute("aria-label", tokens.length
    ? `${tokens.length} tokens, ${rows} slots; most strongly ${what}: ${strongest.join(", ")}` : noMap);
  mapNote ||= $("map-note").textContent;
  $("map-note").textContent = !tokens.length ? noMap : rows ? mapNote : `Nothing of the last turn was ${what}.`;
}

async function showSession() {
  $("turns").replaceChildren();
  const ephemeral = $("ephemeral").checked;
  for (const id of ["fork", "decay", "delete", "session"]) $(id).disabled = ephemeral;
  if (!ephemeral) {
    try {
      for (const turn of (await get(sessionPath("/transcript"))).data) addTurn(turn.user, turn.reply);
    } catch (error) { if (error.status !== 404) throw error; }
  }
  await showMemory();
}

async function begin() {
  $("session").value = localStorage.getItem("session") || "page";
  $("ephemeral").checked = sessionStorage.getItem("ephemeral") === "yes";
  await doing(async () => {
    model = (await get("v1/models")).data[0].id;
    await showSession();
  });
  document.body.dataset.ready = "yes";
}

$("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = $("message").value.trim();
  if (!text || $("send").disabled) return;
  $("message").value = "";
  doing(() => talk(text));
});
$("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("say").requestSubmit(); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && talking) talking.abort(); });
$("stop").addEventListener("click", () => talking?.abort());
$("session").addEventListener("change", () => {
  localStorage.setItem("session", $("session").value.trim() || "page");
  $("session").value = localStorage.getItem("session");
  doing(showSession);
});
$("ephemeral").addEventListener("change", () => {
  sessionStorage.setItem("ephemeral", $("ephemeral").checked ? "yes" : "no");
  doing(async () => {
    await showSession();
    say($("ephemeral").checked ? "Each message meets an empty memory, and nothing is kept." : "");
  });
});
$("fork").addEventListener("click", () => doing(async () => {
  const name = `${$("session").value.slice(0, 180)} ${new Date().toISOString().slice(0, 19).replace("T", " ")}`;
  await post(sessionPath("/fork"), { name });
  $("session").value = name;
  localStorage.setItem("session", name);
  await showSession();
  say(`In session “${name}” now.`);
}));
$("decay").addEventListener("click", () => doing(async () => {
  await post(sessionPath("/decay"), { ticks: DECAY_TURNS });
  await showMemory(false);
  say(`The memory has faded as if ${DECAY_TURNS} ticks of its clock had passed.`);
}));
$("delete").addEventListener("click", () => doing(async () => {
  if (!window.confirm(`Delete session “${$("session").value}” with everything that is kept of it?`)) return;
  await call(sessionPath(), { method: "DELETE" });
  await showSession();
  say("Deleted.");
}));
for (const what of ["write", "read"]) {
  $(`show-${what}`).addEventListener("click", () => {
    shown = what;
    for (const one of ["write", "read"]) $(`show-${one}`).setAttribute("aria-pressed", String(one === what));
    drawMap();
  });
}
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key").value.trim());
  $("key").value = "";
  $("access").open = false;
  begin();
});
window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
begin();
