"use strict";
const { key, file, records } = JSON.parse(document.getElementById("data").textContent);
const $ = (id) => document.getElementById(id);
let at = 0;
let made = {}; // id -> {decision, text}
let kept = true; // whether the browser keeps progress
function newest(...states) { // the storage is for tomorrow, the history's state for a reload at once
  return states.filter((each) => each && each.key === key).sort((a, b) => b.time - a.time)[0] || {};
}
try {
  const saved = newest(JSON.parse(localStorage.getItem(key) || "null"), history.state);
  made = saved.made || {};
  at = Math.min(saved.at || 0, records.length - 1);
} catch { kept = false; }

function save() {
  const state = { key, time: Date.now(), at, made };
  try {
    localStorage.setItem(key, JSON.stringify(state));
    history.replaceState(state, "");
    kept = true;
  } catch { kept = false; }
}

function element(kind, properties) { return Object.assign(document.createElement(kind), properties); }

function fit() { // the whole text is seen
  $("text").style.height = "auto";
  $("text").style.height = `${$("text").scrollHeight + 2}px`;
}

function show() {
  const record = records[at];
  const mine = made[record.id];
  const editing = !$("text").readOnly;
  $("name").textContent = record.name;
  $("facts").textContent = record.facts;
  $("images").replaceChildren(...record.images.map((image) => image.data
    ? element("img", { src: image.data, alt: image.name })
    : element("p", { textContent: image.fault })));
  $("turns").replaceChildren(...record.turns.map((text) =>
    element("div", { className: "turn", textContent: text })));
  if (!editing) $("text").value = mine && mine.decision !== "drop" ? mine.text : record.original;
  fit();
  $("edit").firstChild.textContent = editing ? "Save" : "Edit";
  $("edit").lastChild.textContent = editing ? "Ctrl+Enter" : "E";
  for (const name of ["keep", "drop", "edit"])
    $(name).setAttribute("aria-pressed", String(mine !== undefined && mine.decision === name));
  $("hint").textContent = editing
    ? "Escape leaves the text as it was."
    : kept ? "" : "This browser keeps no progress for this page: export before you close it.";
  const counts = { keep: 0, edit: 0, drop: 0 };
  for (const { id } of records) if (made[id]) counts[made[id].decision] += 1;
  const done = counts.keep + counts.edit + counts.drop;
  $("count").textContent = `record ${at + 1} of ${records.length}; decided ${done}: ` +
    `${counts.keep} kept, ${counts.edit} edited, ${counts.drop} dropped`;
  $("bar").replaceChildren(...Object.keys(counts).map((name) => {
    const part = element("i", {});
    part.style.width = `${(100 * counts[name]) / records.length}%`;
    part.style.background = `var(--${name})`;
    return part;
  }));
}

function go(to) {
  $("text").readOnly = true;
  at = Math.max(0, Math.min(records.length - 1, to));
  save();
  show();
}

function decide(decision, text) {
  const record = records[at];
  made[record.id] = { decision, text };
  $("text").readOnly = true;
  if (at < records.length - 1) go(at + 1);
  else { save(); show(); }
}

function edit() {
  $("text").readOnly = false;
  $("text").focus();
  show();
}

function finish() {
  const text = $("text").value.trim();
  if (!text) return;
  decide(text === records[at].original ? "keep" : "edit", text);
  $("text").blur();
}

function undecided() {
  const order = records.map((_, i) => (at + 1 + i) % records.length);
  const found = order.find((i) => !made[records[i].id]);
  go(found === undefined ? at : found);
}

// line ends of Unicode are escaped: some programs split lines there
function line(value) {
  return JSON.stringify(value).replace(/[\u0085\u2028\u2029]/g,
    (sign) => "\\u" + sign.charCodeAt(0).toString(16).padStart(4, "0")) + "\n";
}

function download() {
  const lines = records.filter(({ id }) => made[id]).map(({ id, original }) =>
    line({ id, decision: made[id].decision, text: made[id].text, original }));
  const link = element("a", { download: file });
  link.href = URL.createObjectURL(new Blob(lines, { type: "application/jsonl" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

const acts = {
  keep: () => decide("keep", records[at].original),
  drop: () => decide("drop", records[at].original),
  edit: () => ($("text").readOnly ? edit() : finish()),
  clear: () => { delete made[records[at].id]; go(at); },
  back: () => go(at - 1),
  next: () => go(at + 1),
  open: undecided,
  export: download,
};
const keys = { k: "keep", d: "drop", e: "edit", u: "clear", n: "open", x: "export",
  ArrowLeft: "back", ArrowRight: "next" };

for (const name of Object.keys(acts)) $(name).addEventListener("click", acts[name]);
$("text").addEventListener("input", fit);
document.addEventListener("keydown", (event) => {
  if (!$("text").readOnly) {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) finish();
    else if (event.key === "Escape") { $("text").blur(); go(at); }
    else return;
  } else {
    const name = keys[event.key.length === 1 ? event.key.toLowerCase() : event.key];
    if (!name || event.ctrlKey || event.metaKey || event.altKey) return;
    acts[name]();
  }
  event.preventDefault();
});
show();
