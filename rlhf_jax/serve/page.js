"use strict";
// A conversation is a list of turns: {text} of the user, then {answers, ...} of one model or of two sides.

const KEY = "rlhf-jax-key", SIDES = ["left", "right"];
const at = (id) => document.getElementById(id);
let turns = [], running = null, votesFile = null, listed = 0, asking = null;

const paragraph = (text) => element("div", { class: "text", dir: "auto" }, visible(text));
const button = (text, onclick, properties = {}) => element("button", { type: "button", onclick, ...properties }, text);

function say(text, where = "status") {
  at(where).textContent = text;
}

// --- requests

// The response of a request with the key, which is asked for where the server wants another.
async function call(path, options = {}) {
  for (;;) {
    const key = sessionStorage.getItem(KEY), headers = { ...options.headers };
    if (key) headers.Authorization = "Bearer " + key;
    const response = await fetch(path, { ...options, headers });
    if (response.status === 401) {
      if (sessionStorage.getItem(KEY) === key) await askKey(key !== null);  // another request may have asked
      continue;
    }
    if (!response.ok) throw new Error(await reason(response));
    return response;
  }
}

async function reason(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return "the server answered with status " + response.status;
  }
}

function askKey(isWrong) {
  asking = asking || new Promise((resolve, reject) => {
    const dialog = at("key-dialog");
    say(isWrong ? "The server does not know this key." : "", "key-wrong");
    at("key").value = "";
    at("key-form").onsubmit = (event) => {
      event.preventDefault();
      sessionStorage.setItem(KEY, at("key").value.trim());
      dialog.onclose = null;
      dialog.close();
      resolve();
    };
    dialog.onclose = () => reject(new Error("this server needs its key"));
    dialog.showModal();
  }).finally(() => { asking = null; });
  return asking;
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return call(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

// The data of the server-sent events of a response, as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) throw new Error("the connection ended before the answer");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part === "data: [DONE]") return;
      const found = JSON.parse(part.slice("data: ".length));
      if (found.error) throw new Error(found.error.message);
      yield found;
    }
  }
}

// --- conversation

function settings() {
  const number = (id) => (at(id).value === "" ? null : Number(at(id).value));
  return { temperature: number("temperature"), top_p: number("top-p"), max_tokens: number("max-tokens") };
}

const isFailed = (turn) => turn.answers && turn.answers.every((each) => each.error);
const keptText = (turn) => turn.answers[turn.kept].text;
// Whether two answers wait for a vote.
const isOpen = (turn) => Boolean(turn && turn.answers && turn.answers.length === 2 && turn.kept === null
  && turn.answers.every((each) => !each.error));

// The messages up to and without turn `end`. A question whose answer failed is left out with it.
function messagesBefore(end) {
  const found = at("system").value.trim() ? [{ role: "system", content: at("system").value }] : [];
  for (let i = 0; i < end; i += 2) {
    if (i + 1 < end && (turns[i + 1].kept === null || isFailed(turns[i + 1]))) continue;
    found.push({ role: "user", content: turns[i].text });
    if (i + 1 < end) found.push({ role: "assistant", content: keptText(turns[i + 1]) });
  }
  return found;
}

// Ask for an answer to the last turn, which is the user's.
async function answer() {
  const models = at("compare").checked ? [at("first").value, at("second").value] : [at("first").value];
  // Which side a model has is random, and is shown after the vote.
  if (models.length === 2 && crypto.getRandomValues(new Uint8Array(1))[0] % 2) models.reverse();
  const messages = messagesBefore(turns.length), options = settings();
  const answers = models.map((model) => ({ model, ...options, text: "", finish_reason: null, error: "",
    seed: crypto.getRandomValues(new Uint32Array(1))[0] }));
  const turn = { messages, answers, kept: models.length === 1 ? 0 : null, vote: null };
  turns.push(turn);
  running = new AbortController();
  say("Answering …");
  draw();
  scrollDown();
  await Promise.all(answers.map((each) => stream(messages, each, running.signal)));
  const isStopped = running.signal.aborted;
  running = null;
  const wrong = answers.find((each) => each.error);
  if (wrong && models.length === 2) turn.kept = answers.findIndex((each) => !each.error);
  if (turn.kept === -1) turn.kept = null;
  say(wrong ? "There was no answer." : isStopped ? "Stopped." : isOpen(turn) ? "Choose an answer." : "");
  const names = answers.length === 2 ? SIDES : ["answer"];
  say(answers.map((each, i) => `${names[i]}: ${visible(each.error || each.text || "no text")}`).join(". "), "announce");
  const wasBusy = document.activeElement === document.body || document.activeElement === at("stop");
  const near = isNearEnd();
  draw();
  if (near) scrollDown();
  if (wasBusy) at("message").focus();
}

async function stream(messages, each, signal) {
  const { model, temperature, top_p, max_tokens, seed } = each;
  try {
    const body = { model, messages, temperature, top_p, max_tokens, seed, stream: true };
    for await (const { choices } of events(await post("v1/chat/completions", body, signal))) {
      const [{ delta, finish_reason }] = choices;
      each.finish_reason = finish_reason || each.finish_reason;
      if (!delta.content) continue;
      const near = isNearEnd();
      each.text += delta.content;
      each.node.textContent = visible(each.text);
      if (near) scrollDown();
    }
  } catch (error) {
    if (!signal.aborted) each.error = error.message;
  }
}

const isNearEnd = () => innerHeight + scrollY > document.documentElement.scrollHeight - 60;

const scrollDown = () => scrollTo(0, document.documentElement.scrollHeight);

function send(text) {
  if (running || !text.trim()) return;
  if (isOpen(turns.at(-1))) return say("First choose an answer, a tie or skip.");
  if (!check()) return;
  turns.push({ text });
  at("message").value = "";
  answer();
}

// Whether the settings can be sent; otherwise they are shown with the browser's message.
function check() {
  const wrong = [...at("settings").querySelectorAll("input")].find((each) => !each.validity.valid);
  if (!wrong) return at("first").value !== "";
  at("settings").open = true;
  wrong.reportValidity();
  return false;
}

// Forget turn `index` and those after it, and answer the question before it again.
function again(index, text) {
  if (running || !check()) return;
  turns.length = index;
  if (text !== undefined) turns.push({ text });
  answer();
}

function draw() {
  const busy = running !== null;
  at("log").replaceChildren(...turns.map((turn, i) => (turn.answers ? drawAnswers(turn, i) : drawUser(turn, i))));
  at("log").setAttribute("aria-busy", String(busy));
  at("send").hidden = busy;
  at("stop").hidden = !busy;
  at("clear").disabled = busy;
}

function drawUser(turn, index) {
  const change = running ? null : button("Edit", () => edit(node, turn, index), { "aria-label": "Edit this message" });
  const node = element("div", { class: "turn user", role: "group", "aria-label": "You" },
    element("div", { class: "head" }, element("h3", {}, "You"), change), paragraph(turn.text));
  return node;
}

function edit(node, turn, index) {
  const area = element("textarea", { rows: "3", "aria-label": "Your message, edited", dir: "auto" });
  area.value = turn.text;
  const save = () => area.value.trim() && again(index, area.value);
  area.addEventListener("keydown", (event) => {
    if (isEnter(event)) { event.preventDefault(); save(); }
    if (event.key === "Escape") { draw(); at("message").focus(); }
  });
  const later = turns.length > index + 2 ? element("p", { class: "note" }, "What came after it is forgotten.") : null;
  node.replaceChildren(area, element("div", { class: "bar" }, button("Send again", save, { class: "main" }),
    button("Cancel", draw), ...(later ? [later] : [])));
  area.focus();
}

function drawAnswers(turn, index) {
  const two = turn.answers.length === 2, last = index === turns.length - 1, idle = !running || !last;
  const cards = turn.answers.map((each, i) => {
    const shown = !two || turn.vote || (idle && !isOpen(turn));
    const title = [two ? SIDES[i] : "", shown ? each.model : ""].filter(Boolean).join(": ");
    each.node = paragraph(each.text);
    const notes = { length: "cut at the largest number of tokens", null: idle && !each.error ? "stopped" : "" };
    const note = notes[each.finish_reason] || "";
    return element("div", { class: two && turn.kept === i && turn.vote ? "answer kept" : "answer", role: "group",
      "aria-label": title }, element("h3", {}, title), each.node,
    each.error ? element("p", { class: "wrong" }, visible(each.error)) : null,
    note ? element("p", { class: "note" }, note) : null);
  });
  const node = element("div", { class: "turn" }, element("div", { class: two ? "answers two" : "answers" }, ...cards));
  const bar = element("div", { class: "bar" });
  if (idle && two && turn.answers.every((each) => !each.error)) bar.append(...drawVote(turn, last));
  if (last && !running) bar.append(button("Regenerate", () => again(index)));
  node.append(bar);
  return node;
}

// --- votes

function drawVote(turn, last) {
  if (turn.vote) {
    const done = element("p", { class: "note" }, turn.note);
    return last && !running ? [done, button("Undo", () => undo(turn))] : [done];
  }
  const [left, right] = turn.answers.map((each) => each.text.trim());
  const finished = turn.answers.every((each) => each.finish_reason), differ = left && right && left !== right;
  const wrong = !finished ? "A stopped answer gets no vote: skip goes on with the left one."
    : differ ? "" : "These answers are equal or empty, and teach no preference.";
  const disabled = Boolean(wrong) && votesFile !== null;
  return [
    button("Left is better", () => vote(turn, "left"), { disabled, class: "main" }),
    button("Tie", () => vote(turn, "tie"), { disabled: !finished && votesFile !== null }),
    button("Right is better", () => vote(turn, "right"), { disabled, class: "main" }),
    button("Skip", () => vote(turn, "skip")),
    element("p", { class: "note" }, wrong || "After a tie or skip the left answer is continued."),
  ];
}

async function vote(turn, choice) {
  const kept = choice === "right" ? 1 : 0;
  const names = { left: "Left is better", right: "Right is better", tie: "Tie", skip: "Skipped" };
  let note = names[choice] + "; no vote is kept.";
  if (choice !== "skip" && votesFile) {
    if (turn.saving) return;
    turn.saving = true;
    try {
      const side = ({ text, model, temperature, top_p, max_tokens, seed, finish_reason }) =>
        ({ text, model, temperature, top_p, max_tokens, seed, finish_reason });
      const [left, right] = turn.answers.map(side);
      const { messages } = turn;
      turn.saved = await (await post("votes", { messages, left, right, vote: choice })).json();
      note = names[choice] + "; the vote is in the file.";
    } catch (error) {
      return say("The vote was not kept: " + error.message);
    } finally {
      turn.saving = false;
    }
  }
  Object.assign(turn, { kept, vote: choice, note });
  say(note);
  draw();
  at("message").focus();
}

async function undo(turn) {
  try {
    if (turn.saved) await call(`votes/${turn.saved.kind}/${turn.saved.id}`, { method: "DELETE" });
  } catch (error) {
    return say("The vote was not taken back: " + error.message);
  }
  Object.assign(turn, { kept: null, vote: null, saved: null });
  say("The vote was taken back.");
  draw();
}

async function list(isMore) {
  const kind = at("kind").value;
  try {
    const from = isMore ? listed : 0;
    const found = await (await call(`votes/${kind}?limit=50&offset=${from}`)).json();
    const rows = found.data.map((each) => drawRow(each, kind));
    if (isMore) at("rows").append(...rows);
    else at("rows").replaceChildren(...rows);
    listed = from + rows.length;
    at("more").hidden = listed >= found.total;
    at("export").disabled = !found.total;
    say(found.file ? `${found.total} in ${found.file}, the newest first` : "The server was started without --votes "
      + "FILE: no votes are kept.", "votes-status");
  } catch (error) {
    say(error.message, "votes-status");
  }
}

function drawRow({ id, row }, kind) {
  const remove = button("Delete", async () => {
    try {
      await call(`votes/${kind}/${id}`, { method: "DELETE" });
      await list(false);
      at("votes-title").focus();
    } catch (error) {
      say("Nothing was deleted: " + error.message, "votes-status");
    }
  });
  const swap = kind !== "pairs" ? null : button("Swap", async () => {
    const { chosen_side: side, prompt: messages } = row, other = SIDES.find((each) => each !== side);
    const answers = { [side]: { text: row.chosen, ...row.chosen_by }, [other]: { text: row.rejected, ...row.rejected_by } };
    try {
      await post("votes", { messages, ...answers, vote: other });
      await call(`votes/${kind}/${id}`, { method: "DELETE" });
      await list(false);
      at("votes-title").focus();
    } catch (error) {
      say("The vote was not changed: " + error.message, "votes-status");
    }
  }, { "aria-label": "Swap chosen and rejected" });
  const names = kind === "pairs" ? ["chosen", "rejected"] : SIDES;
  const isKnown = row && typeof row === "object" && names.every((name) => name in row);
  if (!isKnown) return element("article", {}, element("p", { class: "wrong" }, "This line is no vote of this page."),
    paragraph(typeof row === "string" ? row : JSON.stringify(row)), remove);
  const text = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 1));
  const turnsOf = Array.isArray(row.prompt) ? row.prompt : [{ role: "user", content: row.prompt }];
  const prompt = turnsOf.flatMap((each) => [element("h3", {}, visible(each.role)), paragraph(text(each.content))]);
  const sides = names.map((name) => {
    const { text: _, ...by } = row[name + "_by"] || {};
    const about = Object.entries(by).filter(([, value]) => value !== null).map((pair) => pair.join(" ")).join(", ");
    return element("div", { class: "answer " + name }, element("h3", {}, name), paragraph(text(row[name])),
      element("p", { class: "note" }, visible(about)));
  });
  return element("article", { "aria-label": "Vote" }, ...prompt, element("div", { class: "answers two" }, ...sides),
    element("div", { class: "bar" }, element("p", { class: "note" }, visible(row.time || "")), ...(swap ? [swap] : []), remove));
}

async function exportVotes() {
  try {
    const blob = await (await call(`votes/${at("kind").value}.jsonl`)).blob();
    const link = element("a", { href: URL.createObjectURL(blob), download: at("kind").value + ".jsonl" });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
  } catch (error) {
    say(error.message, "votes-status");
  }
}

// --- start

const isEnter = (event) => event.key === "Enter" && !event.shiftKey && !event.isComposing;

function showPage() {
  const name = location.hash === "#votes" ? "votes" : "chat";
  for (const id of ["chat", "votes"]) at(id).hidden = id !== name;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === "#" + name) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  if (name === "votes") list(false);
}

function showSettings() {
  const two = at("compare").checked, second = at("second").value;
  at("second-label").hidden = !two;
  const names = !two ? at("first").value : second === at("first").value ? "two answers of " + second
    : at("first").value + " and " + second + ", on random sides";
  at("summary").textContent = names + `, temperature ${at("temperature").value}`;
}

async function start() {
  const models = (await (await call("v1/models")).json()).data.filter((each) => each.kind === "chat");
  for (const id of ["first", "second"]) at(id).append(...models.map((each) => element("option", {}, each.id)));
  if (models.length > 1) {
    at("second").value = models[1].id;
    at("compare").checked = true;
  }
  if (!models.length) say("This server has no model that answers.");
  votesFile = (await (await call("votes/pairs?limit=0")).json()).file;
  say(votesFile ? `Votes are appended to ${votesFile}.` : "Votes are not kept: start the server with --votes FILE.", "kept");
  showSettings();
  showPage();
}

at("composer").addEventListener("submit", (event) => { event.preventDefault(); send(at("message").value); });
at("message").addEventListener("keydown", (event) => {
  const isTouch = matchMedia("(pointer: coarse)").matches;  // its keyboard has no Shift+Enter: Enter begins a line
  if (isEnter(event) && !isTouch) { event.preventDefault(); send(at("message").value); }
});
at("stop").addEventListener("click", () => running && running.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
at("clear").addEventListener("click", () => { turns = []; say(""); draw(); at("message").focus(); });
at("settings").addEventListener("input", showSettings);
at("kind").addEventListener("change", () => list(false));
at("more").addEventListener("click", () => list(true));
at("export").addEventListener("click", exportVotes);
at("key-cancel").addEventListener("click", () => at("key-dialog").close());
addEventListener("hashchange", showPage);
start().catch((error) => say(error.message));
