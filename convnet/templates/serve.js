"use strict";
// Pictures wait in `queue`, go to /predict a few at a time, and their answers into the
// gallery, most probable first. All names are set as text, never as markup.
const SENDERS = 3; // Requests under way.
const FILES = 16; // Pictures in a request.
const SHOWN = 240; // Pictures drawn, until more are asked for.
const ERRORS = 500;
const TRIES = 6;

const $ = (id) => document.getElementById(id);
const model = JSON.parse($("model").textContent);
const perRequest = Math.min(FILES, model.maxFiles);
// A request's form takes some bytes besides its files.
const bytesPerRequest = model.maxBytes * 0.98 - 16000;
const number = (value) => value.toLocaleString("en");
const percent = (value) => `${(100 * value).toFixed(value > 0.9995 || value < 0.1 ? 2 : 1)} %`;

let queue = [];
let answers = []; // {file, name, label, probability, chances: class -> probability, node}
let failures = []; // {name, reason}
let senders = 0;
let flying = 0; // Pictures under way.
let generation = 0; // Counts up at "Clear": what is still under way is dropped.
let shown = SHOWN;
let wait = 0; // The time before which nothing is sent.
const burst = { start: 0, done: 0, end: 0 };

// --- pictures come in

function add(entries) {
  const kept = entries.filter(({ name }) => {
    const base = name.split("/").pop();
    return !base.startsWith(".") && !["thumbs.db", "desktop.ini"].includes(base.toLowerCase());
  });
  if (!kept.length) return;
  if (!queue.length && !senders) Object.assign(burst, { start: performance.now(), done: 0, end: 0 });
  for (const entry of kept) {
    if (entry.file.size > bytesPerRequest) {
      fail(entry, `larger than ${(bytesPerRequest / 1e6).toFixed(1)} MB`);
    } else {
      queue.push(entry);
    }
  }
  $("results").hidden = false;
  document.body.classList.add("busy");
  pump();
  draw();
}

const fromList = (files) =>
  Array.from(files, (file) => ({ file, name: file.webkitRelativePath || file.name }));

// The files of a dropped folder, in it and below.
async function walk(entry, found) {
  if (entry.isFile) {
    const file = await new Promise((resolve) => entry.file(resolve, () => resolve(null)));
    const name = entry.fullPath.replace(/^\//, "");
    if (file) found.push({ file, name });
    else failures.push({ name, reason: "the browser cannot read it" });
  } else if (entry.isDirectory) {
    const reader = entry.createReader();
    for (;;) { // Browsers hand out a hundred at a time.
      const some = await new Promise((resolve) => reader.readEntries(resolve, () => resolve([])));
      if (!some.length) break;
      for (const child of some) await walk(child, found);
      say(`Reading folders: ${number(found.length)} files`);
    }
  }
}

async function dropped(transfer) {
  // Both lists end with the event: they are read before anything is awaited.
  const files = fromList(transfer.files);
  const entries = Array.from(transfer.items ?? [], (item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.some((entry) => entry.isDirectory)) return add(files);
  const found = [];
  for (const entry of entries) await walk(entry, found);
  say("");
  add(found);
}

// --- pictures go out

function take() {
  const batch = [];
  let bytes = 0;
  while (queue.length && batch.length < perRequest) {
    bytes += queue[0].file.size + 400 + 3 * queue[0].name.length;
    if (batch.length && bytes > bytesPerRequest) break;
    batch.push(queue.shift());
  }
  return batch;
}

function pump() {
  while (senders < SENDERS && queue.length) {
    const mine = generation;
    const batch = take();
    senders += 1;
    flying += batch.length;
    send(batch, mine).finally(() => {
      if (mine !== generation) return;
      senders -= 1;
      flying -= batch.length;
      pump();
      if (!senders && !queue.length) burst.end = performance.now();
      draw();
    });
  }
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

async function send(batch, mine) {
  const form = new FormData();
  for (const { file, name } of batch) form.append("file", file, name);
  let reason = "";
  for (let tries = 0; tries < TRIES; ) {
    while (performance.now() < wait) await sleep(wait - performance.now());
    if (mine !== generation) return;
    let response, body;
    try {
      response = await fetch(`predict?top=${model.top}`, { method: "POST", body: form });
      body = await response.json();
    } catch {
      reason = "the server does not answer, or the file has changed";
      tries += 1;
      await sleep(400 * 2 ** tries);
      continue;
    }
    if (mine !== generation) return;
    if (response.status === 503) {
      // Busy is no failure: try again as long as it takes.
      wait = performance.now() + 1000 * Number(response.headers.get("Retry-After") || 1);
      say(`Waiting: ${body.error}.`, true);
      continue;
    }
    say("");
    const rows = Array.isArray(body) ? body : [body];
    if (rows.length === batch.length) rows.forEach((row, i) => receive(batch[i], row));
    else batch.forEach((entry) => fail(entry, body.error || `status ${response.status}`));
    return;
  }
  if (mine === generation) batch.forEach((entry) => fail(entry, reason));
}

function receive(entry, row) {
  burst.done += 1;
  if (row.error !== undefined) return fail(entry, row.error);
  answers.push({ ...entry, row, chances: new Map(row.top), node: null });
  draw();
}

function fail({ name }, reason) {
  failures.push({ name, reason });
  draw();
}

// --- what is seen

let drawing = false;
function draw() {
  if (drawing) return;
  drawing = true;
  setTimeout(() => {
    drawing = false;
    render();
  }, 150);
}

function say(text, trouble = false) {
  if ($("message").textContent !== text) $("message").textContent = text;
  $("message").classList.toggle("trouble", trouble);
}

function card(answer) {
  const node = document.createElement("li");
  const figure = node.appendChild(document.createElement("figure"));
  const image = figure.appendChild(document.createElement("img"));
  image.loading = "lazy";
  image.decoding = "async";
  image.onerror = () => figure.classList.add("blank"); // TIFF, in most browsers.
  image.src = answer.url = URL.createObjectURL(answer.file);
  const bar = figure.appendChild(document.createElement("div"));
  bar.className = "bar";
  bar.appendChild(document.createElement("i"));
  const caption = figure.appendChild(document.createElement("figcaption"));
  for (const [tag, style] of [["span", "chance"], ["span", "truth"], ["code", ""]]) {
    caption.appendChild(document.createElement(tag)).className = style;
  }
  caption.lastChild.textContent = answer.name;
  figure.title = answer.row.top.slice(0, 5).map(([label, p]) => `${label}: ${percent(p)}`).join("\n");
  return node;
}

// Of a class that is not among the answer's, only a bound is known: it comes last.
const chance = (answer, label) =>
  label === null ? answer.row.probability : answer.chances.get(label) ?? 0;

function label() {
  const value = $("class").value;
  return value === "" ? null : model.classes[Number(value)];
}

function render() {
  const wanted = label();
  const least = Number($("threshold").value) / 100;
  $("least").textContent = `${$("threshold").value} %`;
  const found = answers
    .map((answer) => [chance(answer, wanted), answer])
    .filter(([p]) => p >= least)
    .sort(([p, a], [q, b]) => q - p || (a.name < b.name ? -1 : a.name > b.name ? 1 : 0));
  const visible = found.slice(0, shown);
  const gallery = $("gallery");
  const keep = new Set(visible.map(([, answer]) => (answer.node ??= card(answer))));
  for (const node of Array.from(gallery.children)) if (!keep.has(node)) node.remove();
  let next = gallery.firstChild;
  for (const [p, answer] of visible) {
    const { node } = answer;
    if (node === next) next = next.nextSibling;
    else gallery.insertBefore(node, next);
    const [said, title] = node.querySelectorAll("figcaption > span");
    said.textContent = percent(p);
    title.textContent = answer.row.label;
    title.className = wanted === null || wanted === answer.row.label ? "truth" : "said";
    node.querySelector(".bar i").style.width = `${100 * p}%`;
    node.querySelector("img").alt = `${answer.name}: ${wanted ?? answer.row.label}, ${percent(p)}`;
  }
  const rest = found.length - visible.length;
  $("more").hidden = rest <= 0;
  $("more").textContent = `Show ${number(Math.min(rest, SHOWN))} more of ${number(rest)}`;
  $("empty").hidden = found.length > 0 || !answers.length;
  const done = answers.length + failures.length;
  const coming = queue.length + flying;
  const total = done + coming;
  $("progress").max = Math.max(total, 1);
  $("progress").value = done;
  $("progress").classList.toggle("done", !coming);
  $("done").textContent = number(answers.length);
  $("waiting").textContent = coming ? `${number(coming)} to come` : "all done";
  $("found").textContent = number(found.length);
  $("found-of").textContent = `${wanted ?? "any class"}, at least ${$("threshold").value} %`;
  $("bad").textContent = number(failures.length);
  const seconds = ((burst.end || performance.now()) - burst.start) / 1000;
  if (burst.done) $("speed").textContent = number(Number((burst.done / Math.max(seconds, 1e-3)).toPrecision(3)));
  $("errors").hidden = !failures.length;
  const table = $("reasons");
  for (const { name, reason } of failures.slice(table.rows.length, ERRORS)) {
    const row = table.insertRow();
    row.insertCell().appendChild(document.createElement("code")).textContent = name;
    row.insertCell().textContent = reason;
  }
  $("more-errors").textContent =
    failures.length > ERRORS ? `and ${number(failures.length - ERRORS)} more.` : "";
}

// --- the person acts

function clear() {
  generation += 1;
  for (const { url } of answers) if (url) URL.revokeObjectURL(url);
  [queue, answers, failures] = [[], [], []];
  [senders, flying, shown, wait] = [0, 0, SHOWN, 0];
  Object.assign(burst, { start: 0, done: 0, end: 0 });
  $("gallery").replaceChildren();
  $("reasons").replaceChildren();
  $("speed").textContent = "–";
  $("results").hidden = true;
  document.body.classList.remove("busy");
  say("");
  $("choose-files").focus();
}

function save() {
  const rows = [
    ...answers.map(({ row }) => row),
    ...failures.map(({ name, reason }) => ({ path: name, error: reason })),
  ];
  const text = rows.map((row) => JSON.stringify(row) + "\n").join("");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "application/x-ndjson" }));
  link.download = "predictions.jsonl";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

for (const [button, input] of [["choose-files", "files"], ["choose-folder", "folder"]]) {
  $(button).addEventListener("click", () => $(input).click());
  $(input).addEventListener("change", () => {
    add(fromList($(input).files));
    $(input).value = ""; // The same pictures may be chosen again.
  });
}
// The whole page takes drops: beside the field, the browser would open the picture.
addEventListener("dragover", (event) => {
  event.preventDefault();
  document.body.classList.add("over");
});
addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) document.body.classList.remove("over");
});
addEventListener("drop", (event) => {
  event.preventDefault();
  document.body.classList.remove("over");
  dropped(event.dataTransfer);
});
addEventListener("paste", (event) => add(fromList(event.clipboardData.files)));
$("class").addEventListener("change", () => {
  shown = SHOWN;
  render();
});
$("threshold").addEventListener("input", draw);
$("more").addEventListener("click", () => {
  shown += SHOWN;
  render();
});
$("clear").addEventListener("click", clear);
$("save").addEventListener("click", save);
