const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs, SVG = "http://www.w3.org/2000/svg", COLOURS = 6;
const shown = new Set(RUNS.map((_, i) => i));  // indices of the runs that are drawn
const view = { log: false, smooth: 0 };
const charts = [];

// --- elements

function drawn(name, attributes, text = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  return node;
}

function section(title, ...children) {
  const id = title.toLowerCase().replace(/[^a-z]+/g, "-");
  const node = element("section", { id, "aria-label": title }, element("h2", {}, title), ...children);
  document.getElementById("main").append(node);
  document.getElementById("sections").append(element("a", { href: "#" + id }, title));
  return node;
}

// The `numbers` columns after the first are numbers.
function table(head, rows, numbers = 0) {
  const cell = (kind, value, i) => {
    const node = element(kind, i > 0 && i <= numbers ? { class: "number" } : {});
    node.append(...(Array.isArray(value) ? value : [value ?? "–"]));
    return node;
  };
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": head.join(", ") },
    element("table", head.length > 4 ? { class: "wide" } : {},
      element("thead", {}, element("tr", {}, ...head.map((each, i) => cell("th", each, i)))),
      element("tbody", {}, ...rows.map((row) => element("tr", {}, ...row.map((each, i) => cell("td", each, i)))))));
}

// --- numbers

function show(value) {
  if (typeof value !== "number") return String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en");
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(3);
  return size >= 1000 ? value.toLocaleString("en", { maximumFractionDigits: 1 }) : String(Number(value.toPrecision(4)));
}

function seconds(value) {
  if (value === null || value === undefined) return null;
  if (value < 120) return show(Number(value.toPrecision(3))) + " s";
  return value < 7200 ? show(Number((value / 60).toPrecision(3))) + " min" : show(Number((value / 3600).toPrecision(3))) + " h";
}

const percent = (value) => (100 * value).toFixed(1) + "%";
const PATTERNS = DATA.metrics.flatMap((each, order) => each.names.map((name) => ({
  ...each, order, exact: name,
  pattern: new RegExp("^" + name.replace(/[.+?^${}()|[\]\\]/g, "\\$&").replace(/\*|[A-Z_]{4,}/g, ".*") + "$") })));

function known(name) {
  const found = PATTERNS.find((each) => each.exact === name)
    || (name.startsWith("held_out_") ? known(name.slice(9)) : PATTERNS.find((each) => each.pattern.test(name)));
  return found || { unit: "", meaning: "", order: 1e6 };
}

function swatch(run, held = false) {
  const node = drawn("svg", { class: "swatch", viewBox: "0 0 22 8", "aria-hidden": "true" });
  node.append(drawn("line", { x1: 0, x2: 22, y1: 4, y2: 4, class: "k" + run % COLOURS, "stroke-width": 3,
    "stroke-dasharray": dashes(run, held) }));
  return node;
}

const dashes = (run, held) => held ? "2 3" : ["none", "9 3", "5 2 1.5 2"][Math.floor(run / COLOURS) % 3];

// --- curves

function ticks(low, high, count) {
  const step = (high - low) / count, size = 10 ** Math.floor(Math.log10(step));
  const nice = size * [1, 2, 2.5, 5, 10].find((each) => each * size >= step * 0.999);
  const found = [];
  for (let i = Math.ceil(low / nice - 1e-9); i * nice <= high + nice * 1e-9; i++) found.push(Number((i * nice).toPrecision(12)));
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of high / low < 50 ? [1, 2, 5] : [1]) if (m * 10 ** e >= low * 0.999 && m * 10 ** e <= high * 1.001) found.push(m * 10 ** e);
  }
  return found.length > 1 && found.length < 9 ? found : [low, high].map((each) => Number(each.toPrecision(3)));
}

function smoothed(values, weight) {
  let mean = 0, total = 0;  // of an exponential average, without the pull of its start at 0
  return values.map((value) => {
    if (typeof value !== "number") return value;
    mean = weight * mean + (1 - weight) * value;
    total = weight * total + (1 - weight);
    return mean / total;
  });
}

class Chart {
  // lines: [{ run, held, steps, values, of }], all of one metric of one stage.
  constructor(stage, name, lines) {
    lines.sort((a, b) => a.run - b.run || a.held - b.held);
    Object.assign(this, { stage, name, lines, cursor: null });
    const { unit, meaning } = known(name);
    this.unit = unit;
    const caption = element("figcaption", { title: meaning }, name, element("span", {}, unit ? " · " + unit : ""));
    this.svg = drawn("svg", { tabindex: "0", role: "img", height: 190 });
    this.readout = element("div", { class: "readout", "aria-live": "polite" });
    this.node = element("figure", {}, caption, this.svg, this.readout);
    this.svg.addEventListener("pointermove", (event) => this.point(event));
    this.svg.addEventListener("pointerdown", (event) => this.point(event));
    this.svg.addEventListener("pointerleave", () => this.move(null));
    this.svg.addEventListener("keydown", (event) => this.key(event));
    charts.push(this);
  }

  draw() {
    const width = this.svg.clientWidth;
    if (!width) return;  // not open yet
    const height = 190, left = 52, right = 10, top = 8, bottom = 30;
    const lines = this.lines.filter((line) => shown.has(line.run));
    const finite = lines.flatMap((line) => line.values.filter((value) => typeof value === "number"));
    this.steps = [...new Set(lines.flatMap((line) => line.steps))].sort((a, b) => a - b);
    this.svg.replaceChildren();
    if (!finite.length) {
      this.svg.append(drawn("text", { x: left, y: 60 }, lines.length ? "no finite value" : "no run is shown"));
      return this.move(null);
    }
    let low = finite.reduce((a, b) => Math.min(a, b)), high = finite.reduce((a, b) => Math.max(a, b));
    const log = view.log && low > 0;
    if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) / 10 || 1), high + (Math.abs(high) / 10 || 1)];
    const first = this.steps[0], last = Math.max(this.steps[this.steps.length - 1], first + 1);
    const part = (value) => log ? Math.log(value / low) / Math.log(high / low) : (value - low) / (high - low);
    this.x = (step) => left + (step - first) / (last - first) * (width - left - right);
    this.y = (value) => top + (1 - part(value)) * (height - top - bottom);
    this.back = (x) => first + (x - left) / (width - left - right) * (last - first);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    for (const value of log ? logTicks(low, high) : ticks(low, high, 5)) {
      this.svg.append(drawn("line", { class: "grid", x1: left, x2: width - right, y1: this.y(value), y2: this.y(value) }),
        drawn("text", { x: left - 6, y: this.y(value) + 4, "text-anchor": "end" }, short(value)));
    }
    for (const value of ticks(first, last, Math.max(2, Math.floor(width / 75))).filter(Number.isInteger)) {
      this.svg.append(drawn("text", { x: this.x(value), y: height - 15, "text-anchor": "middle" }, show(value)));
    }
    this.svg.append(drawn("text", { x: (left + width - right) / 2, y: height - 2, "text-anchor": "middle" }, "step"));
    const unit = [this.unit, log ? "log scale" : view.log ? "not log: ≤ 0" : ""].filter(Boolean).join(", ");
    if (unit) this.svg.append(drawn("text", { x: 11, y: (height - bottom) / 2, "text-anchor": "middle",
      transform: `rotate(-90 11 ${(height - bottom) / 2})` }, unit));
    for (const line of lines) this.curve(line);
    this.marks = drawn("g", {});
    this.svg.append(this.marks);
    const [a, b] = [finite[0], finite[finite.length - 1]];
    this.svg.setAttribute("aria-label", `${this.name} of ${this.stage}, ${lines.length} line(s): first ${show(a)}, ` +
      `last ${show(b)}, least ${show(low)}, greatest ${show(high)} ${this.unit}. Left and right arrow keys read values.`);
    this.move(null);
  }

  curve(line) {
    const colour = "k" + line.run % COLOURS;
    const smooth = view.smooth > 0 && line.values.length > 20 && !line.held;
    const path = (values) => {
      let d = "", pen = false;
      values.forEach((value, i) => {
        if (typeof value !== "number") { pen = false; return; }
        d += `${pen ? "L" : "M"}${this.x(line.steps[i]).toFixed(1)} ${this.y(value).toFixed(1)}`;
        pen = true;
      });
      return d;
    };
    const add = (values, extra) => this.svg.append(drawn("path", { d: path(values), class: `curve ${colour} ${extra}`,
      "stroke-dasharray": dashes(line.run, line.held) }));
    if (smooth) add(line.values, "raw");
    add(smooth ? smoothed(line.values, view.smooth) : line.values, "");
    if (line.held || line.values.length < 25) line.values.forEach((value, i) => {
      if (typeof value === "number") this.svg.append(drawn("circle", { cx: this.x(line.steps[i]), cy: this.y(value), r: 2.6, class: colour }));
    });
    line.values.forEach((value, i) => {  // where a value is not finite
      if (typeof value !== "number") this.svg.append(drawn("text", { x: this.x(line.steps[i]), y: 158, "text-anchor": "middle" }, "×"));
    });
  }

  point(event) {
    if (!this.back) return;
    const box = this.svg.getBoundingClientRect();
    this.move(nearest(this.steps, this.back(event.clientX - box.left)));
  }

  key(event) {
    const last = this.steps.length - 1, at = this.cursor === null ? (event.key === "ArrowLeft" ? last + 1 : -1) : this.cursor;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: last, PageUp: at - 10, PageDown: at + 10, Escape: null }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    this.move(to === null ? null : Math.max(0, Math.min(last, to)));
  }

  // Shows the values at an index of this.steps, or the last ones.
  move(index) {
    this.cursor = index;
    this.readout.replaceChildren();
    const lines = this.lines.filter((line) => shown.has(line.run));
    if (!this.marks || !this.steps.length || !lines.length) return;
    this.marks.replaceChildren();
    const step = index === null ? null : this.steps[index];
    if (step !== null) this.marks.append(drawn("line", { class: "cursor", x1: this.x(step), x2: this.x(step), y1: 8, y2: 160 }));
    this.readout.append(element("span", { class: "faint" }, step === null ? "last:" : `step ${show(step)}:`));
    for (const line of lines) {
      const i = step === null ? line.values.length - 1 : line.steps.lastIndexOf(step);
      if (i < 0) continue;
      const value = line.values[i], side = line.held ? "held out" : lines.some((each) => each.held) ? "training" : "";
      const label = [RUNS.length > 1 ? RUNS[line.run].name : "", side];
      this.readout.append(" ", element("span", {}, swatch(line.run, line.held), label.filter(Boolean).join(", ") + " " + show(value)));
      if (step !== null && typeof value === "number") {
        this.marks.append(drawn("circle", { cx: this.x(step), cy: this.y(value), r: 4, class: "k" + line.run % COLOURS }));
      }
    }
    const thinned = lines.find((line) => line.of > line.values.length);
    if (thinned) this.readout.append(" ", element("span", { class: "faint" },
      `(${show(thinned.values.length)} of ${show(thinned.of)} values: the extremes of every range)`));
  }
}

function short(value) {
  const size = Math.abs(value);
  for (const [unit, name] of [[1e9, "G"], [1e6, "M"], [1e4, "k"]]) {
    if (size >= unit) return Number((value / (name === "k" ? 1e3 : unit)).toPrecision(4)) + name;
  }
  return size && size < 1e-3 ? value.toExponential(1).replace(".0e", "e") : String(Number(value.toPrecision(5)));
}

function nearest(sorted, wanted) {
  let low = 0, high = sorted.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low && wanted - sorted[low - 1] < sorted[low] - wanted ? low - 1 : low;
}

function stageNames() {
  return [...new Set(RUNS.flatMap((run) => run.stages.map((stage) => stage.name)))];
}

function chartsOf(stage) {
  const found = new Map();
  RUNS.forEach((run, index) => {
    for (const { name, series } of run.stages) {
      if (name !== stage) continue;
      for (const [metric, line] of Object.entries(series)) {
        const base = metric.startsWith("held_out_") ? metric.slice(9) : metric;
        const held = base !== metric && RUNS.some((each) => each.stages.some((s) => s.name === stage && base in s.series));
        const key = held ? base : metric;
        if (!found.has(key)) found.set(key, []);
        found.get(key).push({ ...line, run: index, held });
      }
    }
  });
  const order = [...found.keys()].sort((a, b) => known(a).order - known(b).order || a.localeCompare(b));
  return order.map((name) => new Chart(stage, name, found.get(name)));
}

const redraw = () => charts.forEach((chart) => chart.draw());

function legend() {
  if (RUNS.length < 2) return null;
  return element("div", { class: "bar", role: "group", "aria-label": "Runs that are drawn" }, ...RUNS.map((run, i) =>
    element("label", {}, element("input", { type: "checkbox", checked: true, onchange: (event) => {
      event.target.checked ? shown.add(i) : shown.delete(i);
      redraw();
    } }), " ", swatch(i), run.name)));
}

function curves() {
  const choose = (event) => { view.smooth = Number(event.target.value); redraw(); };
  const options = [["0", "none"], ["0.6", "a little"], ["0.9", "much"], ["0.97", "very much"]];
  const bar = element("div", { class: "bar" },
    element("label", {}, element("input", { type: "checkbox", id: "log", onchange: (event) => { view.log = event.target.checked; redraw(); } }), " log scale"),
    element("label", {}, "smoothing ", element("select", { id: "smooth", onchange: choose }, ...options.map(([value, text]) => element("option", { value }, text)))),
    element("label", {}, "find ", element("input", { type: "search", id: "find", placeholder: "name of a metric", oninput: find })),
    element("span", { class: "faint" }, "Hover, touch or arrow keys show values. Dotted: held out."));
  const node = section("Curves", legend(), bar);
  for (const stage of stageNames()) {
    const all = chartsOf(stage), main = all.filter((each) => known(each.name).first), rest = all.filter((each) => !known(each.name).first);
    node.append(element("h3", {}, stage), element("div", { class: "charts" }, ...main.map((each) => each.node)));
    if (rest.length) node.append(element("details", { ontoggle: redraw },
      element("summary", {}, `${rest.length} more of ${stage}`), element("div", { class: "charts" }, ...rest.map((each) => each.node))));
  }
  function find(event) {
    const word = event.target.value.trim().toLowerCase();
    for (const chart of charts) chart.node.hidden = !`${chart.stage} ${chart.name}`.toLowerCase().includes(word);
    node.querySelectorAll("details").forEach((each) => { each.open = Boolean(word) && Boolean(each.querySelector("figure:not([hidden])")); });
    redraw();
  }
}

// --- runs, warnings, throughput, configuration

const latest = (run, event) => run.events.filter((each) => each.event === event).pop();

function outcome(run) {
  const last = run.events.filter((each) => ["start", "end"].includes(each.event)).pop();
  if (!last) return "unknown (no start in events.jsonl)";
  return last.event === "end" ? last.outcome : "started, not ended: it runs, or it was killed";
}

function runs() {
  section("Runs", table(["run", "stages", "outcome", "commands", "machine"], RUNS.map((run, i) => {
    const start = latest(run, "start"), machine = start && start.machine;
    const stages = run.stages.map((s) => `${s.name} ${show(s.throughput.steps)} steps${s.finished ? "" : " (not finished)"}`);
    const described = machine ? [`${machine.devices} (mesh ${machine.mesh})`, element("br"), `${machine.processor}, ${machine.cores} cores` +
      (machine.memory ? `, ${(machine.memory / 2 ** 30).toFixed(0)} GiB` : "") + (machine.processes > 1 ? `, ${machine.processes} processes` : ""),
      element("br"), element("small", {}, `JAX ${machine.jax}, Python ${machine.python}, ${machine.system}`)] : ["not recorded"];
    const starts = run.events.filter((each) => each.event === "start");
    const when = starts.length ? `${starts.length}, first ${starts[0].time}` : "not recorded";
    return [[swatch(i), run.name], stages.join(", ") || "none yet", visible(outcome(run)), when, described];
  })));
}

function warnings() {
  const lines = RUNS.flatMap((run) => [
    ...run.events.filter((each) => !["start", "end"].includes(each.event)).map((each) => [run, each.time, each.message]),
    ...run.faults.map((text) => [run, "this report", text])]);
  const node = section("Warnings");
  if (!lines.length) node.append(element("p", {}, RUNS.every((run) => run.events.length) ? "None was raised." : "None is recorded."));
  for (const [run, when, text] of lines) node.append(element("div", { class: "warning" },
    element("span", { class: "faint" }, `${RUNS.length > 1 ? run.name + ", " : ""}${when}: `), visible(text)));
}

function throughput() {
  const rows = RUNS.flatMap((run, i) => run.stages.map(({ name, throughput: t }) => {
    const total = Object.values(t.phases).reduce((a, b) => a + b, 0);
    const phases = Object.entries(t.phases).map(([phase, s]) => `${phase} ${seconds(s)} (${percent(s / total)})`);
    const share = t.share === null ? (t.limit === null ? "not known here" : null) : percent(t.share);
    return [[swatch(i), `${run.name} ${name}`], show(t.steps), seconds(t.seconds), seconds(t.total),
      t.tokens_per_second === null ? null : show(Math.round(t.tokens_per_second)), share, phases.join(", ") || null];
  }));
  section("Throughput", table(["run and stage", "steps", "per step", "all steps", "tokens/s", "of the limit", "phases of a step"], rows, 5),
    element("p", { class: "faint" }, "Medians over the steps; the first steps compile. The limit is the tokens per second of the " +
      "GPU's data sheet, for rows of full length; it is known for the GPUs of rlhf-jax plan, and not for CPUs."));
}

function evaluation() {
  const found = RUNS.filter((run) => Object.keys(run.evaluation.numbers).length);
  if (!found.length) return;
  const node = section("Evaluation");
  for (const run of found) {
    const { numbers, intervals, policies, pairs } = run.evaluation;
    if (RUNS.length > 1) node.append(element("h3", {}, run.name));
    const shares = /(good|ended|rate|accuracy|share)$/;
    const cell = (name) => {
      if (!(name in numbers)) return null;
      const text = (value) => typeof value === "number" && shares.test(name) ? percent(value) : show(value);
      const range = intervals[name];
      return [text(numbers[name]), ...(range ? [" ", element("small", {}, `${text(range[0])} to ${text(range[1])}`)] : [])];
    };
    const used = new Set(), measures = [];
    const longest = [...policies].sort((a, b) => b.length - a.length);  // ppo_ema before ppo
    for (const name of Object.keys(numbers)) {
      const policy = longest.find((each) => name.startsWith(each + "_"));
      if (!policy) continue;
      used.add(name);
      const measure = name.slice(policy.length + 1);
      if (!measures.includes(measure)) measures.push(measure);
    }
    const labels = { good: "judged good", score: "mean score", length: "mean length, tokens", ended: "ended by EOS", win_rate: "wins over the first", perplexity: "perplexity of demonstrations", kl: "KL to the first, nats per answer" };
    if (measures.length) node.append(table(["over " + (numbers.prompts ?? "held-out") + " prompts", ...policies],
      measures.map((measure) => [labels[measure] || measure.replaceAll("_", " "), ...policies.map((policy) => cell(`${policy}_${measure}`))]), policies.length));
    const ranged = (part, name) => name in part ? [percent(part[name]), " ", ...(part[`${name}_interval`] || []).length
      ? [element("small", {}, part[`${name}_interval`].map(percent).join(" to "))] : []] : null;
    if (pairs.length) node.append(table(["reward model on", "pairs", "accuracy", "the longer is chosen"],
      pairs.map((part) => [visible(part.of), show(part.pairs), ranged(part, "accuracy"), ranged(part, "longer")]), 3));
    const others = Object.keys(numbers).filter((name) => !used.has(name) && name !== "prompts");
    if (others.length) node.append(table(["measure", "value"], others.map((name) => [name.replaceAll("_", " "), cell(name)]), 1));
  }
  node.append(element("p", { class: "faint" }, "Small: 95% intervals over the prompts (shares by Wilson, scores by the normal distribution)."));
}

function configuration() {
  const node = section("Configuration");
  const names = [...new Set(RUNS.flatMap((run) => Object.keys(run.keys)))];
  const differing = names.filter((name) => new Set(RUNS.map((run) => run.keys[name])).size > 1);
  if (RUNS.length > 1) node.append(element("p", {}, `${differing.length} of ${names.length} keys differ:`),
    table(["key", ...RUNS.map((run) => run.name)], differing.map((name) => [name, ...RUNS.map((run) => visible(run.keys[name] ?? "absent"))])));
  for (const run of RUNS) node.append(element("details", {}, element("summary", {}, `config.toml of ${run.name}`),
    element("pre", { class: "config" }, visible(run.config) || "none")));
}

// --- rollouts

const PAGE = 20;

function cards(holder, items, make) {
  let count = 0;
  const list = element("div"), more = element("button", { type: "button", onclick: () => add() });
  const add = () => {
    for (const item of items.slice(count, count + PAGE)) list.append(make(item));
    count = Math.min(count + PAGE, items.length);
    more.textContent = `Show ${Math.min(PAGE, items.length - count)} more of ${show(items.length - count)}`;
    more.hidden = count >= items.length;
  };
  holder.replaceChildren(element("p", { class: "faint", role: "status" }, `${show(items.length)} found`), list, more);
  add();
}

function rolloutCard(rollout, run, withPrompt = true) {
  const numbers = Object.entries(rollout).filter(([name, value]) =>
    value !== null && !["stage", "step", "prompt", "response", "finish_reason"].includes(name));
  const head = element("div", { class: "head" }, element("strong", {}, `${rollout.stage} step ${show(rollout.step)}`),
    ...numbers.map(([name, value]) => element("span", {}, `${name} ${show(value)}`)),
    rollout.finish_reason ? element("span", { class: "faint" }, `ended by ${rollout.finish_reason}`) : null);
  return element("article", { class: "card" }, head,
    withPrompt ? element("pre", { class: "prompt", dir: "auto" }, visible(run.rollouts.prompts[rollout.prompt]).trim()) : null,
    element("pre", { class: "answer", dir: "auto" }, visible(rollout.response)));
}

function records(run) {
  const { fields, rows } = run.rollouts;
  return rows.map((row) => Object.fromEntries(fields.map((name, i) => [name, row[i]])));
}

function select(label, options, id, change) {
  const node = element("select", { id, onchange: change }, ...options.map(([value, text]) => element("option", { value }, text)));
  return [element("label", {}, label + " ", node), node];
}

function sampled(run, holder) {
  const all = records(run);
  if (!all.length) { holder.replaceChildren(element("p", {}, "This run has no rollouts: PPO and GRPO write them.")); return; }
  const places = [...new Set(all.map((each) => `${each.stage} ${each.step}`))];
  const list = element("div");
  const numbers = run.rollouts.fields.filter((name) => !["stage", "step", "prompt", "response", "finish_reason"].includes(name));
  const sorts = [["", "as sampled"], ...numbers.flatMap((name) => [["-" + name, `greatest ${name}`], [name, `least ${name}`]])];
  const [stepLabel, step] = select("step", [["", "all"], ...places.map((each) => [each, each])], "step", update);
  const [sortLabel, sort] = select("sort by", sorts, "sort", update);
  const [endLabel, end] = select("ended by", [["", "any"], ["eos", "eos"], ["length", "length"]], "end", update);
  const search = element("input", { type: "search", id: "search", placeholder: "prompt or response", oninput: update });
  function update() {
    const word = search.value.toLowerCase(), name = sort.value.replace(/^-/, ""), sign = sort.value.startsWith("-") ? -1 : 1;
    const found = all.filter((each) => (!step.value || step.value === `${each.stage} ${each.step}`)
      && (!end.value || each.finish_reason === end.value)
      && (!word || each.response.toLowerCase().includes(word) || run.rollouts.prompts[each.prompt].toLowerCase().includes(word)));
    const key = (each) => typeof each[name] === "number" ? sign * each[name] : Infinity;  // others come last
    if (name) found.sort((a, b) => key(a) === key(b) ? 0 : key(a) - key(b));
    cards(list, found, (each) => rolloutCard(each, run));
  }
  holder.replaceChildren(element("div", { class: "bar" }, stepLabel, sortLabel, endLabel, element("label", {}, "find ", search)), list);
  update();
}

function repeated(run, holder) {
  const groups = new Map();
  for (const each of records(run)) {
    const key = each.stage + " " + each.prompt;
    groups.set(key, [...(groups.get(key) || []), each]);
  }
  const apart = ([first, ...others]) => others.length ? others[others.length - 1].step - first.step : 0;
  const found = [...groups.values()].filter((group) => apart(group) > 0).sort((a, b) => apart(b) - apart(a));
  if (!found.length) { holder.replaceChildren(element("p", {}, "No prompt of these rollouts was sampled at two steps.")); return; }
  const list = element("div");
  const search = element("input", { type: "search", id: "search", placeholder: "prompt", oninput: update });
  function update() {
    const word = search.value.toLowerCase();
    cards(list, found.filter((group) => run.rollouts.prompts[group[0].prompt].toLowerCase().includes(word)), (group) =>
      element("article", { class: "card" }, element("pre", { class: "prompt", dir: "auto" }, visible(run.rollouts.prompts[group[0].prompt]).trim()),
        element("div", { class: "sides" }, ...group.map((each) => rolloutCard(each, run, false)))));
  }
  holder.replaceChildren(element("div", { class: "bar" }, element("label", {}, "find ", search)), list);
  update();
}

function evaluated(run, holder) {
  const { rows, policies, of } = run.evaluation;
  if (!rows.length) { holder.replaceChildren(element("p", {}, "This run has no evaluate.jsonl: rlhf-jax evaluate writes it.")); return; }
  const [first, last] = [policies[0], policies[policies.length - 1]];
  const gain = (row) => row[`${last}_score`] - row[`${first}_score`];
  const list = element("div");
  const sorts = [["", "as evaluated"], ["-1", `greatest gain of ${last} over ${first}`], ["1", `greatest loss of ${last} to ${first}`]];
  const [sortLabel, sort] = select("sort by", sorts, "sort", update);
  const search = element("input", { type: "search", id: "search", placeholder: "prompt or answer", oninput: update });
  const prompt = (row) => Array.isArray(row.prompt) ? row.prompt.map(([role, text]) => `${role}: ${text}`).join("\n") : String(row.prompt);
  function update() {
    const word = search.value.toLowerCase();
    const found = rows.filter((row) => !word || JSON.stringify(Object.values(row)).toLowerCase().includes(word));
    if (sort.value) found.sort((a, b) => Number(sort.value) * (gain(a) - gain(b)));
    cards(list, found, (row) => element("article", { class: "card" }, element("pre", { class: "prompt", dir: "auto" }, visible(prompt(row))),
      element("div", { class: "sides" }, ...policies.map((policy) => {
        const score = row[`${policy}_score`], good = row[`${policy}_good`];
        const verdict = good === undefined || good === null ? "" : good ? "good" : "not good";
        return element("div", {}, element("div", { class: "head" }, element("strong", {}, policy),
          score === undefined ? null : element("span", {}, `score ${show(score)}`), element("span", { class: "faint" }, verdict)),
        element("pre", { class: "answer", dir: "auto" }, visible(row[`${policy}_answer`] ?? "")));
      }))));
  }
  const left = of > rows.length ? element("p", { class: "faint" }, `${show(rows.length)} of ${show(of)} answered prompts are in this page; all are in evaluate.jsonl.`) : "";
  holder.replaceChildren(element("div", { class: "bar" }, sortLabel, element("label", {}, "find ", search)), left, list);
  update();
}

function rollouts() {
  const views = [["Sampled in training", sampled], ["One prompt at several steps", repeated], ["Before and after, held out", evaluated]];
  const holder = element("div"), note = element("p", { class: "faint" });
  let chosen = 0;
  const [label, which] = select("run", RUNS.map((run, i) => [String(i), run.name]), "run", update);
  const buttons = views.map(([title], i) => element("button", { type: "button", "aria-pressed": "false", onclick: () => { chosen = i; update(); } }, title));
  function update() {
    const run = RUNS[Number(which.value)], { of, rows } = run.rollouts;
    buttons.forEach((each, i) => each.setAttribute("aria-pressed", String(i === chosen)));
    note.textContent = of > rows.length ? `${show(rows.length)} of ${show(of)} rollouts are in this page: of every step shown the best, ` +
      "the worst, the furthest from the reference, the longest, the shortest and some at random, so their means are not those of the run. " +
      `All: rlhf-jax rollouts ${run.name}.` : `All ${show(of)} rollouts of the run are in this page.`;
    note.hidden = !of;
    views[chosen][1](run, holder);
  }
  section("Rollouts", element("div", { class: "bar", role: "group", "aria-label": "What is shown" }, RUNS.length > 1 ? label : null, ...buttons), note, holder);
  update();
}

const title = RUNS.length > 1 ? `${RUNS.length} runs: ${RUNS.map((run) => run.name).join(", ")}` : RUNS[0].name;
document.title = `Report: ${title}`;
document.getElementById("title").textContent = title;
document.getElementById("foot").textContent = `Written ${DATA.written} by rlhf_jax ${DATA.version}. This page loads nothing from elsewhere.`;
for (const part of [runs, warnings, curves, throughput, evaluation, rollouts, configuration]) part();
redraw();
let width = innerWidth;
addEventListener("resize", () => { if (innerWidth !== width) { width = innerWidth; redraw(); } });
