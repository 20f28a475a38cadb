"use strict";
// Draws what the JSON above holds. All text from the data goes through textContent; nothing here makes HTML of it.

const data = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
const number = (value) => value.toLocaleString("en-US");
const percent = (share) => `${Math.round(share * 100)} %`;
const many = (count, thing) => `${number(count)} ${thing}${count === 1 ? "" : "s"}`;
const range = (bar) => (bar.from === bar.to ? number(bar.from) : `${number(bar.from)}–${number(bar.to)}`);
const some = (origins) => origins.slice(0, 3).join(", ") + (origins.length > 3 ? ", …" : "");

function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children.filter((child) => child !== null));
  return element;
}

// Characters that cannot be seen, or that would turn or hide the text around them, are shown by name.
const UNSEEN = /([\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\u{e0000}-\u{e007f}]|\p{Cs})/u;
const nameOf = (character) => `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
const named = (text) => text.split(UNSEEN).map((part, index) => (index % 2 ? nameOf(part) : part)).join("");

function visible(text) {
  const parts = text.split(UNSEEN).map((part, index) => (index % 2 ? make("span", { class: "control" }, nameOf(part)) : part));
  return parts.filter((part) => part !== "");
}

// The data as a whole

const table = data.table;
const several = table.train.examples + table.valid.examples > table.rows.kept; // a row may give an example a turn, and a pair has two
const unit = "pairs" in table ? "text" : several ? "example" : "row";

function showWhole() {
  const formats = [...new Set(table.sources.map((source) => source.format || "unknown"))].join(", ");
  $("what").append(...visible(`${data.data.join(", ")} · ${formats} · as ${data.model} reads it`));
  card("rows", number(table.rows.rows));
  for (const fate of ["kept", "truncated", "dropped", "bad"]) {
    const share = table.rows[fate] ? `${((100 * table.rows[fate]) / table.rows.rows).toFixed(1)} %` : "";
    card(fate, number(table.rows[fate]), share);
  }
  card("tokens", number(table.train.tokens), unit === "row" ? "to train on" : `in ${many(table.train.examples, unit)} to train on`);
  card("supervised", percent(table.train.supervised_share), many(table.train.supervised_tokens, "token"));
  card("held out", number(table.valid.examples), table.valid.examples ? `${unit === "row" ? "" : `${unit}s, `}${many(table.valid.tokens, "token")}` : "");
  card("duplicates", number(table.duplicates.count));
  for (const warning of table.warnings) $("warnings").append(make("li", {}, ...visible(warning)));
  if (table.examples) {
    const each = { row: "a row", example: "an example", text: "a text" }[unit];
    chart(`Tokens ${each}`, "tokens", table.histogram, table.lengths, table.max_length);
    chart(`Supervised tokens ${each}`, "supervised tokens", table.supervised_histogram, table.supervised_lengths, null);
  }
  finding("Suspicious", Object.entries(table.signs).map(([name, found]) => [found.count, `${name}: ${found.meaning}`, some(found.origins)]));
  finding("Keys that nothing reads", table.unused_keys.map((one) => [one.count, keyName(one), `first ${one.first}`]));
  finding("Not simply kept", table.reasons.slice(0, 12).map((one) => [one.count, `${one.fate}: ${one.reason}`, `first ${one.first}`]));
  finding("Every token before the cut is one of these", tokenColumns(table.token_columns));
  finding("Longest rows", table.longest.slice(0, 5).map((row) => [row.tokens, row.origin, ""]));
}

function keyName(one) {
  const whose = one.of === "row" ? "" : ` of a ${one.of}`;
  return `${one.key}${whose}${one.suggestion ? `: did you mean "${one.suggestion}"?` : ""}`;
}

function tokenColumns(counts) {
  const columns = Object.entries(counts).filter(([, one]) => typeof one === "object");
  const lines = columns.flatMap(([name, one]) => Object.entries(one).map(([kind, count]) => [count, `${name.replace("_", " ")}, ${kind}`, ""]));
  return lines.filter(([count]) => count);
}

function card(name, value, note) {
  $("cards").append(make("div", {}, make("dt", {}, name), make("dd", {}, value, note ? make("small", {}, note) : null)));
}

function finding(title, lines) {
  const line = ([count, text, origins]) => make("li", {}, make("b", {}, number(count)), make("span", {}, ...visible(text), make("small", {}, ...visible(origins))));
  if (lines.length) $("findings").append(make("section", { class: "panel" }, make("h2", {}, title), make("ul", {}, ...lines.map(line))));
}

// A bar filters the rows; `thing` is what its lengths count: tokens or supervised tokens.
function chart(title, thing, bars, summary, limit) {
  const most = Math.max(...bars.map((bar) => bar.count));
  const place = (element, index) => (element.style.left = `${(100 * index) / bars.length}%`, element);
  const buttons = bars.map((bar) => {
    const label = `${range(bar)} tokens: ${many(bar.count, unit)}`;
    const button = make("button", { class: "bar", title: label, "aria-label": label, "data-count": bar.count === most ? number(most) : "" });
    button.style.setProperty("--share", bar.count ? Math.max(bar.count / most, 0.015) : 0);
    const within = (example) => example[thing] >= bar.from && example[thing] <= bar.to;
    return filter(button, "length", (row) => row.examples.some(within), `, of ${range(bar)} ${thing}`);
  });
  const quarters = [0, 0.25, 0.5, 0.75].map((share) => Math.floor(share * bars.length));
  const labels = quarters.map((index) => place(make("span", {}, number(bars[index].from)), index));
  const axis = make("div", { class: "axis" }, ...labels, make("span", {}, number(bars[bars.length - 1].to)));
  const index = bars.findIndex((bar) => limit !== null && bar.to >= limit);
  if (index >= 0) {
    const at = index + (limit - bars[index].from + 1) / (bars[index].to - bars[index].from + 1);
    const side = at > bars.length / 2 ? "limit left" : "limit";
    buttons.push(place(make("span", { class: side }, `max_length ${number(limit)}`), Math.max(0, at))); // 0 where every row is longer
  }
  const numbers = Object.entries(summary).map(([name, value]) => `${name} ${number(value)}`);
  const group = make("div", { class: "bars", role: "group", "aria-label": title }, ...buttons);
  $("charts").append(make("section", { class: "panel" }, make("h2", {}, title), group, axis, make("p", { class: "numbers" }, numbers.join(" · "))));
}

// Which rows are listed

const rows = data.rows;
for (const row of rows) {
  row.kinds = [...row.signs, ...(row.duplicate_of ? ["duplicate"] : []), ...row.findings];
  row.text = row.examples.map((example) => example.pieces.join("")).join("\n");
  for (const example of row.examples) {
    example.special = new Set(example.special);
    example["supervised tokens"] = example.turns.reduce((sum, turn) => sum + turn.supervised_tokens, 0); // before the cut
    example.turns.reduce((start, turn) => (turn.start = start, turn.end = start + turn.tokens), 0);
  }
}
const haystack = (row) => (row.lower ??= [row.origin, row.reason, row.text || row.raw].join("\n").toLowerCase());
const chosen = { fate: null, kind: null, length: null }; // the pressed button of each group
let words = "";
let listed = [];
let current = -1;

// Makes a button of those that exclude each other in a group: pressed, only rows are listed for which `test` holds.
function filter(button, group, test, label = "") {
  const press = (one, pressed) => one?.button.setAttribute("aria-pressed", String(pressed));
  const own = { button, test, label };
  press(own, false);
  button.addEventListener("click", () => {
    press(chosen[group], false);
    chosen[group] = chosen[group] === own ? null : own;
    press(chosen[group], true);
    list();
  });
  return button;
}

function chips(parent, names, group, has) {
  for (const name of names) {
    const count = rows.filter((row) => has(row, name)).length;
    const chip = make("button", { class: "chip" }, `${name} ${number(count)}`);
    if (count) parent.append(filter(chip, group, (row) => has(row, name)));
  }
}

function list() {
  const before = listed[current];
  const pressed = Object.values(chosen).filter((one) => one !== null);
  listed = rows.filter((row) => pressed.every((one) => one.test(row)) && (!words || haystack(row).includes(words)));
  $("list").replaceChildren(...listed.map(entry));
  if (!listed.length) $("list").append(make("li", { class: "none" }, "No such row on this page."));
  const all = table.rows.rows;
  const sample = all > rows.length ? `; this page holds ${number(rows.length)} of ${number(all)}: those that lost something, suspicious, equal and longest ones, and a sample` : "";
  $("showing").textContent = `showing ${number(listed.length)} of ${many(rows.length, "row")}${chosen.length?.label ?? ""}${sample}`;
  select(Math.max(0, listed.indexOf(before)), false);
}

function entry(row, index) {
  const count = row.fate === "kept" ? make("span", { class: "count" }, row.tokens ? number(row.tokens) : "") : make("span", { class: `badge ${row.fate}` }, row.fate);
  const origin = make("span", { class: "origin", title: named(row.origin) }, make("bdi", { dir: "ltr" }, ...visible(row.origin)));
  const snippet = make("div", { class: "snippet", dir: "auto" }, ...visible(row.snippet || row.reason || row.raw.slice(0, 160)));
  const item = make("li", { role: "option", id: `row-${index}`, "aria-selected": "false" }, make("div", { class: "top" }, origin, count), snippet);
  item.addEventListener("click", () => select(index, false));
  return item;
}

function select(index, scroll = true) {
  hideToken();
  $(`row-${current}`)?.setAttribute("aria-selected", "false");
  current = Math.min(Math.max(index, 0), listed.length - 1); // -1 where no row is listed
  const item = $(`row-${current}`);
  item?.setAttribute("aria-selected", "true");
  $("list").setAttribute("aria-activedescendant", item?.id ?? "");
  if (scroll) item?.scrollIntoView({ block: "nearest" });
  $("row").replaceChildren(...(item ? shownRow(listed[current]) : []));
}

// One row

function shownRow(row) {
  const badge = (text, kind = "") => make("span", { class: `badge ${kind}` }, ...visible(text));
  const badges = [badge(row.fate, row.fate)];
  if (row.examples.length === 1 && row.examples[0].name) badges.push(badge(row.examples[0].name));
  if (row.part === "valid") badges.push(badge("held out"));
  if (row.tokens) badges.push(badge(`${many(row.tokens, "token")}, ${number(row.supervised_tokens)} supervised`));
  for (const sign of row.signs) badges.push(badge(sign, "sign"));
  if (row.duplicate_of) badges.push(badge(`equals ${row.duplicate_of}`, "sign"));
  for (const name of row.findings) if (name !== "left-out") badges.push(badge(name, "sign"));
  if (row.turns_with_text_left_out) badges.push(badge(`the template leaves out words of ${many(row.turns_with_text_left_out, "turn")}`, "sign"));
  const parts = [make("h2", {}, ...visible(row.origin)), make("div", { class: "badges" }, ...badges)];
  if (row.reason) {
    const hint = row.hint ? make("small", {}, ...visible(`hint: ${row.hint}`)) : null;
    parts.push(make("div", { class: `reason ${row.fate}` }, ...visible(row.reason), hint));
  }
  const legend = $("legend").content.cloneNode(true);
  if (row.shared_turns) legend.querySelector(".supervised").textContent = "supervised: what is compared";
  if (row.examples.length) parts.push(legend);
  const examples = row.examples.map((example) => shownExample(row, example));
  if (row.shared_turns) { // a prompt, and behind it the answers to it
    parts.push(...shownTurns(row.examples[0], 0, row.shared_turns));
    parts.push(make("div", { class: "pair" }, ...examples.map((shown) => make("section", {}, ...shown))));
  } else parts.push(...examples.flat());
  const raw = make("pre", { dir: "auto" }, ...visible(row.raw));
  if (row.raw) parts.push(row.examples.length ? make("details", {}, make("summary", {}, "The row as it is in the file"), raw) : raw);
  return parts;
}

function shownExample(row, example) {
  const supervised = example.supervised_tokens ? `, ${number(example.supervised_tokens)} supervised` : "";
  const name = example.name ? `${example.name}: ${many(example.tokens, "token")}${supervised}` : example.origin;
  const parts = row.examples.length > 1 ? [make("h2", {}, ...visible(name))] : [];
  parts.push(...shownTurns(example, row.shared_turns));
  const more = example.tokens - example.pieces.length;
  if (more) parts.push(make("p", { class: "knife" }, `… ${many(more, "more token")} that are not on this page`));
  return parts;
}

function shownTurns(example, first, behind) {
  const parts = [];
  const hits = hitTokens(example);
  for (const turn of example.turns.slice(first, behind)) {
    const supervised = turn.supervised_tokens ? `, ${number(turn.supervised_tokens)} supervised` : "";
    const heading = make("h3", {}, make("b", {}, ...visible(turn.role)), ` ${many(turn.tokens, "token")}${supervised}`);
    const label = `${named(turn.role)}: tokens, arrow keys go from one to the next`;
    const tokens = make("div", { class: "tokens", dir: "auto", tabindex: "0", role: "group", "aria-label": label });
    const end = Math.min(turn.end, example.pieces.length);
    for (let index = turn.start, after; index < end; index = after) {
      for (after = index + 1; after < end && example.pieces[after] === "" && after !== example.cut_at; after++);
      if (index === example.cut_at) tokens.append(make("div", { class: "knife" }, `✂ max_length: ${many(example.tokens - index, "token")} are cut off from here on`));
      tokens.append(tokenSpan(example, turn, index, after - index, hits));
    }
    if (turn.start < end) parts.push(make("section", { class: supervised ? "turn supervised" : "turn" }, heading, tokens));
  }
  return parts;
}

// The tokens of one character, such as an emoji, share a span: only the first of them has text.
function tokenSpan(example, turn, index, count, hits) {
  const cut = index >= example.cut_at;
  const classes = { supervised: !cut && example.weights[index] !== 0, special: example.special.has(index), cut, hit: hits.has(index) };
  const names = ["t", ...Object.keys(classes).filter((name) => classes[name])];
  const lines = example.pieces[index].split("\n").flatMap((line, i) => [...(i ? [make("span", { class: "newline" }, "\n")] : []), ...visible(line)]);
  const span = make("span", { class: names.join(" ") }, ...lines);
  span.token = { example, turn, index, count };
  return span;
}

// The tokens that a place where the searched words stand touches.
function hitTokens(example) {
  if (!words) return new Set();
  const pieces = example.pieces.map((piece) => piece.toLowerCase()); // which may be longer: İ becomes two characters
  const text = pieces.join("");
  const beside = words.length - 1;
  let end = 0;
  const hit = pieces.map((piece) => {
    const start = end;
    end += piece.length;
    return piece !== "" && text.slice(Math.max(0, start - beside), end + beside).includes(words);
  });
  return new Set([...hit.keys()].filter((index) => hit[index]));
}

// One token

let at = null;

function showToken(span) {
  hideToken();
  at = span;
  span.classList.add("at");
  const { example, turn, index, count } = span.token;
  const weight = example.weights[index];
  const supervised = index >= example.cut_at ? "cut off" : weight ? `supervised, weight ${weight}` : "not supervised";
  const text = example.pieces[index].replace(/ /g, "␣").replace(/\t/g, "⇥").replace(/\n/g, "↵") || "(the rest of a character)";
  const ids = example.token_ids.slice(index, index + count).join(", ");
  const place = count > 1 ? `tokens ${number(index)} to ${number(index + count - 1)}` : `token ${number(index)}`;
  const where = turn.message === null ? turn.role : `message ${turn.message} (${turn.role})`;
  const line = `id ${ids} · ${place} · ${supervised} · ${named(where)}${example.special.has(index) ? " · special" : ""}`;
  const box = $("token");
  box.replaceChildren(make("p", {}, make("code", {}, ...visible(text))), make("p", {}, line));
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

const ANYWHERE = { j: 1, k: -1 };
const IN_LIST = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -Infinity, End: Infinity };

$("search").addEventListener("keydown", (event) => {
  event.stopPropagation();
  if (event.key === "Escape") $("search").blur();
  if (event.key === "ArrowDown") $("list").focus();
});
addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const step = ANYWHERE[event.key] ?? (event.target === $("list") ? IN_LIST[event.key] : undefined);
  if (event.key === "/") $("search").focus();
  else if (step) select(current + step);
  else return;
  event.preventDefault();
});
let waiting = 0;
$("search").addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    words = $("search").value.trim().toLowerCase();
    list();
  }, 120);
});

showWhole();
chips($("fates"), ["kept", "truncated", "dropped", "bad"], "fate", (row, fate) => row.fate === fate);
chips($("kinds"), [...new Set(rows.flatMap((row) => row.kinds))], "kind", (row, kind) => row.kinds.includes(kind));
list();
