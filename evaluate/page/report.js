"use strict";
// Sorting: every heading of a table of results is a button. Numbers by size, texts by letters, empty cells last.
function value(row, column) {
  const cell = row.cells[column];
  const given = cell.dataset.order ?? cell.textContent.trim();
  const number = Number(given.replace(/,/g, ""));
  return { empty: given === "" || given === "–", number: given !== "" && !Number.isNaN(number) ? number : null, text: given };
}
function sort(table, column, heading) {
  const down = heading.getAttribute("aria-sort") === "ascending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", down ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows].map((row) => [value(row, column), row]);
  rows.sort(([a], [b]) => {
    if (a.empty || b.empty) return a.empty - b.empty;
    const order = a.number !== null && b.number !== null ? a.number - b.number : a.text.localeCompare(b.text);
    return down ? -order : order;
  });
  table.tBodies[0].append(...rows.map(([, row]) => row));
}
for (const table of document.querySelectorAll("figure.table table, table.sortable")) {
  [...table.tHead.rows[0].cells].forEach((heading, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...heading.childNodes);
    button.addEventListener("click", () => sort(table, column, heading));
    heading.append(button);
  });
}
// Search and filters of the list of runs.
const list = document.getElementById("run-table");
const search = document.getElementById("search");
const choices = [...document.querySelectorAll(".controls select")];
const texts = new Map([...list.tBodies[0].rows].map((row) => [row, (row.textContent + row.querySelector("a").hash).toLowerCase()]));
function filter() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const [row, text] of texts) {
    const fits = words.every((word) => text.includes(word)) &&
      choices.every((choice) => !choice.value || row.cells[choice.dataset.column].textContent === choice.value);
    row.hidden = !fits;
    document.getElementById(row.querySelector("a").hash.slice(1)).hidden = !fits;
    shown += fits;
  }
  document.getElementById("count").textContent = `${shown} of ${texts.size} runs`;
}
search.addEventListener("input", filter);
for (const choice of choices) choice.addEventListener("change", filter);
document.querySelector(".controls").addEventListener("submit", (event) => event.preventDefault());
filter();
// A link to a run opens it.
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
open();
