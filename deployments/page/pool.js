// Pool: adapters and tasks, searched and paged by the service.

import { get } from "./api.js";
import { bar, field, figure, h, table } from "./dom.js";

const ROWS = 25;
const WAIT_MS = 200;

/** @param {HTMLElement} panel */
export function show(panel) {
  const lists = [pagedList("Adapters", "v1/adapters", adapterTable), pagedList("Tasks", "v1/tasks", taskTable)];
  panel.append(h("div", { class: "stack" }, ...lists.map((list) => list.element)));
  return { looked: () => lists.forEach((list) => list.load()) };
}

/** A list with a search and pages, whose rows `draw` makes a table of. */
function pagedList(title, path, draw) {
  const search = h("input", { type: "search", spellcheck: "false", autocomplete: "off" });
  const rows = h("div", {});
  const where = h("span", { class: "hint" });
  const back = h("button", { onclick: () => (before.pop(), load()) }, "Previous");
  const on = h("button", { onclick: () => (before.push(last), load()) }, "Next");
  let before = []; // the last row of each page before this one
  let last = null;
  let asked = 0;
  let timer = 0;
  search.addEventListener("input", () => {
    clearTimeout(timer);
    timer = setTimeout(() => ((before = []), load()), WAIT_MS);
  });

  async function load() {
    const number = ++asked;
    try {
      const page = await get(path, { limit: ROWS, after: before.at(-1), search: search.value.trim() });
      if (number !== asked) return; // a later one was asked for meanwhile
      last = page.last_id;
      const start = before.length * ROWS;
      where.textContent = page.data.length ? `${start + 1} to ${start + page.data.length} of ${page.total}` : "none";
      [back.disabled, on.disabled] = [!before.length, !page.has_more];
      rows.replaceChildren(draw(page.data));
    } catch (error) {
      rows.replaceChildren(h("p", { class: "error", role: "alert" }, error.message));
    }
  }

  const element = h("section", { class: "panel stack" }, h("h2", {}, title), h("div", { class: "row" }, field(`Search ${title.toLowerCase()}`, search, { class: "field grow" }), where, back, on), rows);
  return { element, load };
}

function adapterTable(adapters) {
  const most = Math.max(...adapters.map((adapter) => adapter.demand), 0);
  const tiers = ({ resident }) => ["device", "host", "disk"].filter((tier) => resident[tier]);
  return table(
    "Adapters",
    ["Adapter", "Version", "Serves", "#Score", "Resident (replicas)", "Wanted lately"],
    adapters.map((adapter) =>
      h(
        "tr",
        {},
        h("th", { scope: "row" }, adapter.id),
        h("td", {}, h("code", { title: adapter.version }, adapter.version.slice(0, 8))),
        h("td", {}, adapter.tasks.map((task) => task.id).slice(0, 4).join(", ") || h("span", { class: "muted" }, "no task"), adapter.tasks.length > 4 && h("span", { class: "muted" }, ` and ${adapter.tasks.length - 4} more`)),
        h("td", { class: "number" }, figure(Math.max(...adapter.tasks.map((task) => task.score ?? -Infinity)), 2)),
        h("td", {}, h("span", { class: "chips" }, ...tiers(adapter).map((tier) => h("span", { class: "chip bare" }, `${tier} ${adapter.resident[tier]}`)), !tiers(adapter).length && h("span", { class: "muted" }, "in the store"))),
        h("td", {}, figure(adapter.demand), most > 0 && bar(adapter.demand / most)),
      ),
    ),
  );
}

function described(adapter) {
  const score = adapter.score === null ? "" : ` ${adapter.score.toFixed(2)}`;
  return `${adapter.name}${score}${adapter.composed ? (adapter.stale ? " (composed, stale)" : " (composed)") : ""}`;
}

function taskTable(tasks) {
  return table(
    "Tasks",
    ["Task", "Domain", "Metric", "#Examples", "Adapters", ""],
    tasks.flatMap((task) => {
      const below = h("tr", { hidden: true }, h("td", { colspan: 6 }));
      const button = h("button", { class: "small", "aria-expanded": "false", "aria-label": `Examples of ${task.id}`, onclick: () => open(task.id, button, below) }, "Examples");
      const row = h(
        "tr",
        {},
        h("th", { scope: "row" }, task.id, task.description && h("div", { class: "hint" }, task.description)),
        h("td", {}, task.domain),
        h("td", {}, task.metric),
        h("td", { class: "number" }, task.validation_examples),
        h("td", {}, task.adapters.slice(0, 4).map(described).join(", ") || h("span", { class: "muted" }, "none")),
        h("td", {}, button),
      );
      return [row, below];
    }),
  );
}

async function open(name, button, below) {
  below.hidden = !below.hidden;
  button.setAttribute("aria-expanded", String(!below.hidden));
  if (below.hidden) return;
  const cell = below.firstChild;
  try {
    const { examples } = await get(`v1/tasks/${encodeURIComponent(name)}`);
    cell.replaceChildren(table(`Examples of ${name}`, ["Input", "Target"], examples.map((example) => h("tr", {}, h("td", { class: "text" }, example.input), h("td", { class: "text" }, example.target)))));
  } catch (error) {
    cell.replaceChildren(h("p", { class: "error", role: "alert" }, error.message));
  }
}
