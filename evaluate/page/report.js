"use strict";
// --- sorting: every heading of a table of results is a button. Numbers by size, texts by letters, empty cells last. ---
function value(row, column) {
  const cell = row.cells[column];
  const given = cell.dataset.order ?? cell.textContent.trim();
  const number = Number(given.replace(/,/g, ""));
  return { empty: given === "" || given === "–", number: given !== "" && !Number.isNaN(number) ? number : null, text: given };
}
function sort(table, column, heading) {
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.querySelectorAll("th")) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [value(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a.empty || b.empty) return a.empty - b.empty;
    const order = a.number !== null && b.number !== null ? a.number - b.number : a.text.localeCompare(b.text);
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}
function makeSortable(table) {
  const headings = table.querySelectorAll("thead th[data-column]");
  for (const heading of headings) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, Number(heading.dataset.column), heading));
    heading.append(button);
  }
}

// --- copying a table ---
async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // a page from disk may not be allowed to
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const before = button.textContent;
  button.textContent = "copied";
  setTimeout(() => { button.textContent = before; }, 1200);
}

// --- a region that scrolls shows on which side there is more ---
function showMore(region) {
  const right = region.scrollWidth - region.clientWidth - region.scrollLeft > 1;
  region.classList.toggle("more-right", right);
  region.classList.toggle("more-left", region.scrollLeft > 1);
}

// --- two runs side by side ---
function row(cells, head) {
  const line = document.createElement("tr");
  cells.forEach((text, n) => {
    const cell = document.createElement(head || n === 0 ? "th" : "td");
    cell.textContent = text;
    if (n > 0) cell.className = "number";
    line.append(cell);
  });
  return line;
}
function compareRuns(data) {
  const chosen = [...document.querySelectorAll("#run-table input:checked")].map((box) => box.value);
  const place = document.getElementById("pair");
  const boxes = document.querySelectorAll("#run-table input[type=checkbox]");
  for (const box of boxes) box.disabled = chosen.length === 2 && !box.checked;
  place.hidden = chosen.length === 0;
  if (chosen.length < 2) {
    place.textContent = "Choose a second run to compare with.";
    return;
  }
  const [first, second] = chosen.map((id) => data.runs[id]);
  const table = document.createElement("table");
  const body = document.createElement("tbody");
  const head = document.createElement("thead");
  head.append(row(["", first.name, second.name, "difference"], true));
  for (const key of Object.keys(first.metrics).filter((one) => one in second.metrics)) {
    const [a, b] = [first.metrics[key], second.metrics[key]];
    const sign = b >= a ? "+" : "−";
    body.append(row([key, String(+a.toPrecision(6)), String(+b.toPrecision(6)), sign + Math.abs(b - a).toPrecision(3)]));
  }
  const keys = [...new Set([...Object.keys(first.settings), ...Object.keys(second.settings)])];
  const differing = keys.filter((key) => first.settings[key] !== second.settings[key]);
  for (const key of differing) body.append(row([key, first.settings[key] ?? "–", second.settings[key] ?? "–", ""]));
  table.append(head, body);
  const note = document.createElement("p");
  note.className = "hint";
  note.textContent = differing.length ? "Above: metrics that both have, then every setting in which they differ."
    : "They differ in no recorded setting.";
  place.replaceChildren(table, note);
}

// --- search and filters of the list of runs ---
function makeFilters(data) {
  const list = document.getElementById("run-table");
  const search = document.getElementById("search");
  const choices = [...document.querySelectorAll(".controls select")];
  const texts = new Map([...list.tBodies[0].rows].map((one) => [one, (one.textContent + one.querySelector("a").hash).toLowerCase()]));
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const [one, text] of texts) {
      const fits = words.every((word) => text.includes(word)) &&
        choices.every((choice) => !choice.value || one.cells[choice.dataset.column].textContent === choice.value);
      one.hidden = !fits;
      document.getElementById(one.querySelector("a").hash.slice(1)).hidden = !fits;
      shown += fits;
    }
    document.getElementById("count").textContent = `${shown} of ${texts.size} runs`;
  }
  search.addEventListener("input", filter);
  for (const choice of choices) choice.addEventListener("change", filter);
  document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("change", () => compareRuns(data));
  filter();
}

// --- a link to a run opens it ---
function open() {
  const target = location.hash.length > 1 ? document.getElementById(decodeURIComponent(location.hash.slice(1))) : null;
  if (target instanceof HTMLDetailsElement) {
    target.open = true;
    target.hidden = false;
    target.scrollIntoView();
  }
}
window.addEventListener("hashchange", open);
document.addEventListener("click", (event) => {
  const link = event.target.closest('a[href^="#run-"]');
  if (link && link.hash === location.hash) open();
});

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  for (const table of document.querySelectorAll("figure.table table, table.sortable")) makeSortable(table);
  for (const region of document.querySelectorAll(".scroll")) {
    region.addEventListener("scroll", () => showMore(region));
    showMore(region);
  }
  for (const button of document.querySelectorAll("button[data-copy]")) {
    button.addEventListener("click", () => copy(data.tables[button.dataset.table][button.dataset.copy], button));
  }
  makeFilters(data);
}
window.addEventListener("resize", () => document.querySelectorAll(".scroll").forEach(showMore));
start();
open();
