"use strict";
// Draws what the JSON above holds. All text from the data goes through textContent; nothing here makes HTML of it.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
const percent = (share) => `${Math.round(share * 100)} %`;
const many = (count, thing) => `${number(count)} ${thing}${count === 1 ? "" : "s"}`;

function make(tag, options = {}, ...children) {
  const { className, ...attributes } = options;
  const element = document.createElement(tag);
  if (className) element.className = className;
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

function draw(tag, attributes, text) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  return element;
}

// Characters that cannot be seen, or that would turn or hide the text around them, are shown by name.
const UNSEEN = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]|\p{Cs}/gu;
const nameOf = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;

function visible(text, { newlines = false } = {}) {
  const parts = [];
  let from = 0;
  const pattern = newlines ? new RegExp(`${UNSEEN.source}|\\n`, "gu") : UNSEEN;
  for (const match of text.matchAll(pattern)) {
    parts.push(text.slice(from, match.index));
    from = match.index + match[0].length;
    if (match[0] === "\n") parts.push(make("span", { className: "newline" }, "\n"));
    else parts.push(make("span", { className: "control" }, nameOf(match[0])));
  }
  parts.push(text.slice(from));
  return parts.filter((part) => part !== "");
}
const plainly = (text) => text.replace(UNSEEN, nameOf);

// The data as a whole

const table = data.table;
const unit = table.train.examples + table.valid.examples > table.rows.kept ? "example" : "row"; // a row may give one a turn

function card(name, value, note) {
  $("cards").append(make("div", {}, make("dt", {}, name), make("dd", {}, value, note ? make("small", {}, note) : null)));
}

function showWhole() {
  const formats = [...new Set(table.sources.map((source) => source.format || "unknown"))].join(", ");
  $("what").append(...visible(`${data.data.join(", ")} · ${formats} · as ${data.model} reads it`));
  card("rows", number(table.rows.rows));
  for (const fate of ["kept", "truncated", "dropped", "bad"]) {
    const share = table.rows.rows ? `${((100 * table.rows[fate]) / table.rows.rows).toFixed(1)} %` : "";
    card(fate, number(table.rows[fate]), table.rows[fate] ? share : "");
  }
  card("tokens", number(table.train.tokens), unit === "row" ? "to learn from" : `in ${many(table.train.examples, unit)} to learn from`);
  card("supervised", percent(table.train.supervised_share), `${many(table.train.supervised_tokens, "token")}`);
  card("held out", number(table.valid.examples), table.valid.examples ? `${unit === "row" ? "" : "examples, "}${many(table.valid.tokens, "token")}` : "");
  card("duplicates", number(table.duplicates.count));
  for (const warning of table.warnings) $("warnings").append(make("li", {}, ...visible(warning)));
  if (table.examples) {
    chart(`Tokens ${unit === "row" ? "a row" : "an example"}`, table.histogram, table.lengths, "tokens", table.max_length);
    chart(`Supervised tokens ${unit === "row" ? "a row" : "an example"}`, table.supervised_histogram, table.supervised_lengths, "learnt", null);
  }
  showFindings();
}

function chart(title, bars, summary, field, limit) {
  const panel = make("div", { className: "panel" }, make("h2", {}, title));
  const [width, height, bottom, top] = [560, 170, 22, 20];
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "group", "aria-label": title });
  const most = Math.max(...bars.map((bar) => bar.count));
  const step = width / bars.length;
  svg.append(draw("line", { class: "axis", x1: 0, x2: width, y1: height - bottom, y2: height - bottom }));
  bars.forEach((bar, index) => {
    const tall = bar.count ? Math.max(2, ((height - bottom - top) * bar.count) / most) : 0;
    const place = { x: index * step + 1, width: Math.max(1, step - 2) };
    const label = `${range(bar)} tokens: ${many(bar.count, unit)}`;
    const shape = draw("rect", { class: "bar", ...place, y: height - bottom - tall, height: tall, rx: 2 });
    const target = draw("rect", { class: "target", ...place, y: top, height: height - bottom - top, tabindex: 0, role: "button", "aria-label": label });
    target.append(draw("title", {}, label));
    const choose = () => filterByLength(field, bar, shape);
    target.addEventListener("click", choose);
    target.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), choose()));
    svg.append(shape, target);
    if (bar.count === most) svg.append(draw("text", { x: Math.min(Math.max((index + 0.5) * step, 14), width - 14), y: height - bottom - tall - 5, "text-anchor": "middle" }, number(bar.count)));
  });
  [0, 0.25, 0.5, 0.75].forEach((share) => {
    const index = Math.floor(share * bars.length);
    svg.append(draw("text", { x: index * step + 1, y: height - 6 }, number(bars[index].from)));
  });
  svg.append(draw("text", { x: width, y: height - 6, "text-anchor": "end" }, number(bars[bars.length - 1].to)));
  if (limit !== null) drawLimit(svg, bars, limit, { step, width, height, bottom });
  const numbers = Object.entries(summary).map(([name, value]) => `${name} ${number(value)}`);
  panel.append(svg, make("p", { className: "numbers" }, numbers.join(" · ")));
  $("charts").append(panel);
}

const range = (bar) => (bar.from === bar.to ? number(bar.from) : `${number(bar.from)}–${number(bar.to)}`);

function drawLimit(svg, bars, limit, { step, width, height, bottom }) {
  const index = bars.findIndex((bar) => bar.to >= limit);
  if (index < 0) return;
  const within = (limit - bars[index].from + 1) / (bars[index].to - bars[index].from + 1);
  const x = Math.max(1, (index + within) * step); // at the edge where every row is longer
  svg.append(
    draw("line", { class: "limit", x1: x, x2: x, y1: 14, y2: height - bottom }),
    draw("text", { class: "limit", x, y: 10, "text-anchor": x > width / 2 ? "end" : "start" }, `max_length ${number(limit)}`),
  );
}

function showFindings() {
  const finding = (title, lines) => lines.length && $("findings").append(make("div", { className: "panel" }, make("h2", {}, title), make("ul", {}, ...lines)));
  const line = (count, text, origins) => make("li", {}, make("b", {}, number(count)), make("span", {}, ...visible(text), make("small", {}, ...visible(origins))));
  const some = (origins) => origins.slice(0, 3).join(", ") + (origins.length > 3 ? ", …" : "");
  finding("Suspicious", Object.entries(table.signs).map(([name, found]) => line(found.count, `${name}: ${found.meaning}`, some(found.origins))));
  finding("Not simply kept", table.reasons.slice(0, 12).map((one) => line(one.count, `${one.fate}: ${one.reason}`, `first ${one.first}`)));
  finding("Longest rows", table.longest.slice(0, 5).map((row) => line(row.tokens, row.origin, "")));
}

// Which rows are listed

const FATES = ["kept", "truncated", "dropped", "bad"];
const rows = data.rows;
for (const row of rows) {
  row.kinds = [...row.signs, ...(row.duplicate_of ? ["duplicate"] : []), ...(row.left_out ? ["left-out"] : [])];
  row.text = row.examples.map((example) => example.pieces.join("")).join("\n");
}
const haystack = (row) => (row.lower ??= [row.origin, row.reason, row.text || row.raw].join("\n").toLowerCase());
const chosen = { fate: null, kind: null, length: null, words: "" };
let listed = [];
let current = -1;

function chips(parent, names, field) {
  for (const name of names) {
    const count = rows.filter((row) => (field === "fate" ? row.fate === name : row.kinds.includes(name))).length;
    if (!count) continue;
    const chip = make("button", { className: "chip", type: "button", "aria-pressed": "false" }, `${name} ${number(count)}`);
    chip.addEventListener("click", () => {
      chosen[field] = chosen[field] === name ? null : name;
      for (const other of parent.children) other.setAttribute("aria-pressed", String(other === chip && chosen[field] !== null));
      list();
    });
    parent.append(chip);
  }
}

function filterByLength(field, bar, shape) {
  const same = chosen.length?.shape === shape;
  chosen.length?.shape.classList.remove("on");
  chosen.length = same ? null : { field, bar, shape };
  if (!same) shape.classList.add("on");
  list();
}

function matches(row) {
  const { fate, kind, length, words } = chosen;
  if (fate && row.fate !== fate) return false;
  if (kind && !row.kinds.includes(kind)) return false;
  if (length && !row.examples.some((example) => example[length.field] >= length.bar.from && example[length.field] <= length.bar.to)) return false;
  return !words || haystack(row).includes(words);
}

function list() {
  const before = listed[current];
  listed = rows.filter(matches);
  $("list").replaceChildren(...listed.map(entry));
  if (!listed.length) $("list").append(make("li", { className: "none" }, "No such row on this page."));
  const whole = data.of > rows.length ? `; this page holds ${number(rows.length)} of ${number(data.of)}: those that lost something, suspicious, equal and longest ones, and a sample` : "";
  const length = chosen.length ? `, of ${range(chosen.length.bar)} ${chosen.length.field === "learnt" ? "supervised " : ""}tokens` : "";
  $("showing").textContent = `showing ${number(listed.length)} of ${many(rows.length, "row")}${length}${whole}`;
  select(Math.max(0, listed.indexOf(before)), false);
}

function entry(row, index) {
  const words = row.snippet || row.reason || row.raw.slice(0, 160);
  const badge = row.fate === "kept" ? null : make("span", { className: `badge ${row.fate}` }, row.fate);
  const item = make("li", { role: "option", id: `row-${index}`, "aria-selected": "false" },
    make("div", { className: "top" },
      make("span", { className: "origin", title: plainly(row.origin) }, make("bdi", { dir: "ltr" }, ...visible(row.origin))),
      badge ?? make("span", { className: "count" }, row.tokens ? number(row.tokens) : "")),
    make("div", { className: "snippet", dir: "auto" }, ...visible(words)));
  item.addEventListener("click", () => select(index, false));
  return item;
}

function select(index, scroll = true) {
  const entries = $("list").querySelectorAll("[role=option]");
  entries[current]?.setAttribute("aria-selected", "false");
  hideToken();
  current = listed.length ? Math.min(Math.max(index, 0), listed.length - 1) : -1;
  for (const one of entries) if (one.getAttribute("aria-selected") === "true") one.setAttribute("aria-selected", "false");
  if (current < 0) {
    $("list").removeAttribute("aria-activedescendant");
    $("row").replaceChildren();
    return;
  }
  entries[current].setAttribute("aria-selected", "true");
  $("list").setAttribute("aria-activedescendant", `row-${current}`);
  if (scroll) entries[current].scrollIntoView({ block: "nearest" });
  showRow(listed[current]);
}

// One row

function showRow(row) {
  const badges = [make("span", { className: `badge ${row.fate}` }, row.fate)];
  const badge = (text, className = "badge") => badges.push(make("span", { className }, ...visible(text)));
  if (row.part === "valid") badge("held out");
  if (row.tokens) badge(`${many(row.tokens, "token")}, ${number(row.learnt)} learnt`);
  for (const sign of row.signs) badge(sign, "badge sign");
  if (row.duplicate_of) badge(`equals ${row.duplicate_of}`, "badge sign");
  if (row.left_out) badge(`the template leaves out words of ${many(row.left_out, "turn")}`, "badge sign");
  const parts = [make("h2", {}, ...visible(row.origin)), make("div", { className: "badges" }, ...badges)];
  if (row.reason) {
    const hint = row.hint ? make("small", {}, ...visible(`hint: ${row.hint}`)) : null;
    parts.push(make("div", { className: `reason ${row.fate}` }, ...visible(row.reason), hint));
  }
  if (row.examples.length) parts.push(legend());
  for (const example of row.examples) parts.push(...shownExample(row, example));
  if (row.raw) {
    const raw = make("pre", { dir: "auto" }, ...visible(row.raw));
    parts.push(row.examples.length ? make("details", {}, make("summary", {}, "The row as it is in the file"), raw) : raw);
  }
  $("row").replaceChildren(...parts);
}

function legend() {
  const sample = (className, text) => make("span", { className }, text);
  return make("p", { className: "legend", "aria-hidden": "true" }, sample("t learnt", "the model learns to write this"), sample("t", "it only reads this"), sample("t special", "a special token"));
}

function shownExample(row, example) {
  const parts = row.examples.length > 1 ? [make("h2", {}, ...visible(example.origin))] : [];
  const hits = hitTokens(example);
  for (const turn of example.turns) {
    const heading = make("h3", {}, make("b", {}, ...visible(turn.role)), ` ${many(turn.end - turn.start, "token")}${turn.learnt ? `, ${number(turn.learnt)} learnt` : ""}`);
    const tokens = make("div", { className: "tokens", dir: "auto", tabindex: "0", role: "group", "aria-label": `${plainly(turn.role)}: tokens, arrow keys go from one to the next` });
    const section = make("section", { className: `turn${turn.learnt ? " learning" : ""}` }, heading);
    const end = Math.min(turn.end, example.pieces.length);
    for (let index = turn.start, after; index < end; index = after) {
      for (after = index + 1; after < end && example.pieces[after] === "" && after !== example.cut_at; after++);
      if (index === example.cut_at) tokens.append(make("div", { className: "knife" }, `✂ max_length: ${many(example.tokens - index, "token")} are cut off from here on`));
      tokens.append(tokenSpan(example, turn, index, after - index, hits));
    }
    if (turn.start < end) parts.push(section), section.append(tokens);
  }
  const more = example.tokens - example.pieces.length;
  if (more) parts.push(make("p", { className: "knife" }, `… ${many(more, "more token")} that are not on this page`));
  return parts;
}

// The tokens of one character, such as an emoji, share a span: only the first of them has text.
function tokenSpan(example, turn, index, count, hits) {
  const learnt = weightOf(example, index) !== 0 && index < example.cut_at;
  const names = ["t", learnt ? "learnt" : "", example.special.has(index) ? "special" : "", index >= example.cut_at ? "cut" : "", hits.has(index) ? "hit" : ""];
  const span = make("span", { className: names.filter(Boolean).join(" ") }, ...visible(example.pieces[index], { newlines: true }));
  span.token = { example, turn, index, count };
  return span;
}

function weightOf(example, index) {
  let end = 0;
  for (const [count, weight] of example.weights) {
    end += count;
    if (index < end) return weight;
  }
  return 0;
}

function hitTokens(example) {
  const hits = new Set();
  if (!chosen.words) return hits;
  const pieces = example.pieces.map((piece) => piece.toLowerCase()); // which may be longer: İ becomes two characters
  const text = pieces.join("");
  const found = [];
  for (let at = text.indexOf(chosen.words); at >= 0; at = text.indexOf(chosen.words, at + 1)) found.push(at);
  let start = 0;
  let next = 0;
  pieces.forEach((piece, index) => {
    const end = start + piece.length;
    while (next < found.length && found[next] + chosen.words.length <= start) next++;
    if (next < found.length && found[next] < end) hits.add(index);
    start = end;
  });
  return hits;
}

// One token

let at = null;

function showToken(span) {
  at?.classList.remove("at");
  at = span;
  span.classList.add("at");
  const { example, turn, index, count } = span.token;
  const weight = weightOf(example, index);
  const cut = index >= example.cut_at;
  const learnt = cut ? "cut off" : weight ? `supervised, weight ${weight}` : "not supervised";
  const piece = example.pieces[index];
  const text = piece ? visible(piece.replace(/ /g, "␣").replace(/\t/g, "⇥").replace(/\n/g, "↵")) : ["(the rest of a character)"];
  const ids = example.ids.slice(index, index + count).join(", ");
  const place = count > 1 ? `tokens ${number(index)} to ${number(index + count - 1)}` : `token ${number(index)}`;
  const where = turn.message === null ? turn.role : `message ${turn.message} (${turn.role})`;
  const line = `id ${ids} · ${place} · ${learnt} · ${plainly(where)}${example.special.has(index) ? " · special" : ""}`;
  const box = $("token");
  box.replaceChildren(make("p", {}, make("code", {}, ...text)), make("p", {}, line));
  box.hidden = false;
  const edges = span.getBoundingClientRect();
  const { width, height } = box.getBoundingClientRect();
  box.style.left = `${Math.max(8, Math.min(edges.left, innerWidth - width - 8))}px`;
  box.style.top = `${edges.top > height + 12 ? edges.top - height - 6 : edges.bottom + 6}px`;
}

function hideToken() {
  at?.classList.remove("at");
  at = null;
  $("token").hidden = true;
}

$("row").addEventListener("pointerover", (event) => {
  const span = event.target.closest(".t");
  if (span?.token) showToken(span);
  else hideToken();
});
$("row").addEventListener("pointerleave", hideToken);
$("row").addEventListener("focusout", hideToken);
addEventListener("scroll", hideToken, { passive: true });
$("row").addEventListener("keydown", (event) => {
  const tokens = event.target.closest(".tokens");
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (event.key === "Escape") return hideToken();
  if (!tokens || !step) return;
  event.preventDefault();
  const spans = [...tokens.querySelectorAll(".t")];
  const index = at ? spans.indexOf(at) + step : 0;
  const span = spans[Math.min(Math.max(index, 0), spans.length - 1)];
  span.scrollIntoView({ block: "nearest" });
  showToken(span);
  $("spoken").textContent = $("token").textContent;
});

// Keys and search

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const typing = event.target === $("search");
  if (typing) {
    if (event.key === "Escape") $("search").blur();
    if (event.key === "ArrowDown") $("list").focus();
    return;
  }
  const inList = event.target === $("list");
  const step = { j: 1, k: -1 }[event.key] ?? (inList ? { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity }[event.key] : undefined);
  if (event.key === "/") $("search").focus();
  else if (step) select(current + step);
  else return;
  event.preventDefault();
});
let waiting = 0;
$("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    chosen.words = $("search").value.trim().toLowerCase();
    list();
  }, 120);
});

for (const row of rows) for (const example of row.examples) example.special = new Set(example.special);
showWhole();
chips($("fates"), FATES, "fate");
chips($("kinds"), [...new Set(rows.flatMap((row) => row.kinds))], "kind");
list();
