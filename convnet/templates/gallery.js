const { rows, classes, histogram, threshold, total } = JSON.parse(
  document.getElementById("data").textContent);
const STEP = 240; // cards made at a time
const get = (id) => document.getElementById(id);
const [slider, chooser, grid] = [get("threshold"), get("class"), get("grid")];
const percent = (p) => (Math.floor(p * 1000) / 10).toFixed(1) + "%";
const number = (n) => n.toLocaleString("en");
let level = threshold; // finer than the slider's steps until it is moved
let matching = []; // rows at or above the level, of the chosen class

function make(name, properties, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
}

function card([path, label, probability, thumbnail, link]) {
  const name = classes[label];
  const text = `${path}: ${name} ${probability}`;
  let picture = make("span", { className: "none" }, "no picture");
  if (thumbnail) {
    picture = make("img", { alt: "", src: "data:image/webp;base64," + thumbnail });
    picture.onload = () => picture.classList.toggle("crisp", picture.naturalWidth <= 64);
  }
  const answer = make("span", { className: "answer" },
    make("b", {}, name), make("span", {}, percent(probability)));
  // The mark keeps a path's own order of signs, while its start is cut off, not its end.
  const where = make("span", { className: "path" }, "\u200e" + path);
  const element = make(link ? "a" : "span", { className: "card", title: text },
    picture, answer, where);
  element.setAttribute("aria-label", text);
  if (link) element.href = link;
  // Arrow keys move between cards; Tab enters and leaves the grid.
  element.tabIndex = grid.children.length ? -1 : 0;
  return make("li", {}, element);
}

function grow(count) {
  while (count-- > 0 && grid.children.length < matching.length) {
    grid.append(card(matching[grid.children.length]));
  }
}

function show() {
  const chosen = chooser && chooser.value !== "" ? Number(chooser.value) : null;
  // Rows are sorted: the first that is too improbable ends the search.
  let end = rows.findIndex((row) => row[2] < level);
  if (end < 0) end = rows.length;
  const above = rows.slice(0, end);
  matching = chosen === null ? above : above.filter((row) => row[1] === chosen);
  get("level").textContent = Math.round(level * 1000) / 10 + "%";
  const all = rows.length < total ? `the ${number(rows.length)} here` : number(total);
  get("count").textContent = `${number(matching.length)} of ${all}`;
  get("nothing").hidden = matching.length > 0;
  get("histogram").querySelectorAll("rect").forEach((bar, index) => {
    bar.classList.toggle("in", (index + 0.5) / histogram.length >= level);
  });
  if (chooser) {
    const counts = new Map();
    for (const row of above) counts.set(row[1], (counts.get(row[1]) || 0) + 1);
    for (const option of chooser.options) {
      const label = option.value;
      const count = label === "" ? above.length : counts.get(Number(label)) || 0;
      option.textContent =
        `${label === "" ? "all" : classes[label]} (${number(count)})`;
    }
  }
  grid.replaceChildren();
  grow(STEP);
  scrollTo(0, 0);
}

function draw() {
  // Roots, so that few certain pictures are seen beside many improbable ones.
  const most = Math.sqrt(Math.max(...histogram, 1));
  histogram.forEach((count, index) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const height = count ? Math.max((20 * Math.sqrt(count)) / most, 0.6) : 0;
    const place = { x: index + 0.1, y: 20 - height, width: 0.8, height };
    for (const [name, value] of Object.entries(place)) bar.setAttribute(name, value);
    get("histogram").append(bar);
  });
}

function move(event) {
  const cards = grid.children;
  const now = [...cards].indexOf(document.activeElement.closest("li"));
  if (now < 0) return;
  const top = cards[0].offsetTop;
  let columns = 1;
  while (columns < cards.length && cards[columns].offsetTop === top) columns++;
  const steps = {
    ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
    Home: -now, End: matching.length - 1 - now,
  };
  if (!(event.key in steps)) return;
  event.preventDefault();
  const next = Math.min(Math.max(now + steps[event.key], 0), matching.length - 1);
  grow(next + 1 - cards.length);
  cards[now].firstChild.tabIndex = -1;
  cards[next].firstChild.tabIndex = 0;
  cards[next].firstChild.focus();
}

if (chooser) {
  const present = [...new Set(rows.map((row) => row[1]))].sort((a, b) => a - b);
  chooser.append(make("option", { value: "" }));
  for (const label of present) chooser.append(make("option", { value: label }));
  chooser.addEventListener("change", show);
}
slider.addEventListener("input", () => {
  level = Number(slider.value);
  show();
});
grid.addEventListener("keydown", move);
new IntersectionObserver((entries) => {
  if (entries.some((entry) => entry.isIntersecting)) grow(STEP);
}, { rootMargin: "1200px" }).observe(get("more"));
draw();
show();
