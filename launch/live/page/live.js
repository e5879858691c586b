
// --- the live part: asks the server what goes on, and takes over the new page when a run has finished ---
const EVERY = 3000;
function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}
function curve(points) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 100 100");
  svg.setAttribute("preserveAspectRatio", "none");
  const [xs, ys] = [points.map((point) => point[0]), points.map((point) => point[1])];
  const [left, right, low, high] = [Math.min(...xs), Math.max(...xs), Math.min(...ys), Math.max(...ys)];
  const line = document.createElementNS("http://www.w3.org/2000/svg", "polyline");
  line.setAttribute("points", points.map(([x, y]) =>
    `${(100 * (x - left) / (right - left || 1)).toFixed(2)},${(96 - 92 * (y - low) / (high - low || 1)).toFixed(2)}`).join(" "));
  svg.append(line);
  return svg;
}
function runCard(run) {
  const card = element("article", `card ${run.state}`);
  card.append(element("h3", "", run.name));
  const said = element("p", "");
  said.append(element("span", "state", run.state), ` · ${run.stage} · ${run.detail}`);
  card.append(said);
  if (run.share !== null) {
    const bar = element("div", "bar");
    const done = element("i");
    done.style.width = `${100 * run.share}%`;
    bar.append(done);
    card.append(bar);
  }
  for (const [key, points] of Object.entries(run.curves)) {
    const last = points[points.length - 1][1];
    if (points.length > 1 && (key === "loss" || key.includes("/top1") || !("loss" in run.curves))) {
      card.append(element("p", "dim", `${key}: ${points[0][1].toPrecision(4)} → ${last.toPrecision(4)}`), curve(points));
    } else card.append(element("p", "dim", `${key}: ${last.toPrecision(4)}`));
  }
  return card;
}
function suiteCard(suite) {
  const card = element("article", `card${suite.counts.failed ? " stale" : ""}`);
  card.append(element("h3", "", `suite ${suite.name}`));
  const counts = Object.entries(suite.counts).map(([state, count]) => `${count} ${state}`).join(", ");
  card.append(element("p", "", suite.problem || counts));
  return card;
}
function choices() {
  return {
    open: [...document.querySelectorAll("details[id][open]")].map((one) => one.id),
    search: document.getElementById("search").value,
    selects: [...document.querySelectorAll(".controls select")].map((one) => [one.dataset.column, one.value]),
    chosen: [...document.querySelectorAll("#run-table input:checked")].map((one) => one.value),
    y: scrollY,
  };
}
function restore(before) {
  for (const id of before.open) document.getElementById(id)?.setAttribute("open", "");
  document.getElementById("search").value = before.search;
  for (const [column, value] of before.selects) {
    const select = document.querySelector(`.controls select[data-column="${column}"]`);
    if ([...select.options].some((option) => option.value === value || option.text === value)) select.value = value;
  }
  for (const box of document.querySelectorAll("#run-table input")) box.checked = before.chosen.includes(box.value);
  document.getElementById("search").dispatchEvent(new Event("input"));
  document.getElementById("run-table").dispatchEvent(new Event("change"));
  scrollTo(0, before.y);
}
async function renew() {
  const fresh = new DOMParser().parseFromString(await (await fetch("/")).text(), "text/html");
  const before = choices();
  for (const part of ["header", "main", "#data"]) document.querySelector(part).replaceWith(fresh.querySelector(part));
  document.getElementById("live").dataset.version = fresh.getElementById("live").dataset.version;
  start();
  restore(before);
}
async function look() {
  const note = document.getElementById("live-note");
  try {
    const answer = await fetch("/state.json");
    if (!answer.ok) throw new Error(await answer.text());
    const state = await answer.json();
    document.getElementById("live-suites").replaceChildren(...state.suites.map(suiteCard));
    document.getElementById("live-runs").replaceChildren(...state.runs.map(runCard));
    const count = (name) => state.runs.filter((run) => run.state === name).length;
    note.textContent = state.runs.length === 0 ? "No run is under way."
      : `${count("running")} running, ${count("stale")} stale, ${count("stopped")} stopped` + (state.more ? `, ${state.more} more` : "") + ".";
    if (state.version !== document.getElementById("live").dataset.version) await renew();
  } catch (error) {
    note.textContent = error instanceof TypeError ? "The server does not answer; this page shows what it said last." : String(error.message);
  }
  setTimeout(look, EVERY);
}
look();
