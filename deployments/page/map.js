// Map: the catalog's tasks in two dimensions, where a question lies among them, and which adapters were tried on which.

import { get, post } from "./api.js";
import { bar, field, h, percent, say, svg } from "./dom.js";

const [WIDTH, HEIGHT, EDGE] = [900, 560, 28];
const NEAREST = 5;
const COLOURS = ["light-dark(#0a6868, #5fcbc4)", "light-dark(#b4540a, #f0a35e)", "light-dark(#6a4fb3, #b6a1f2)", "light-dark(#a8326b, #f08fbc)", "light-dark(#3c7a1e, #93cf74)", "light-dark(#1f63b0, #7fb6f5)", "light-dark(#8a6d00, #e0c14f)", "light-dark(#9b2f2f, #f09a90)"];
const OTHER = "light-dark(#7a848e, #8b95a0)";
const HEAT = 40; // rows and columns that are shown at once
const DEEPEST = 45; // percent of the colour at a score of 1: what is written on it can be read in light and dark

/** @param {HTMLElement} panel */
export async function show(panel) {
  const question = h("input", { type: "text", placeholder: "A question to place among the tasks" });
  const picture = h("div", { class: "panel" });
  const near = h("div", { class: "panel" }, h("h2", {}, "Nearest tasks"), h("p", { class: "hint" }, "Place a question to see them."));
  const heat = h("div", { class: "panel stack" }, h("h2", {}, "Adapters by task"));
  const form = h("form", { class: "panel", onsubmit: (event) => (event.preventDefault(), place()) }, h("div", { class: "row" }, field("Where does it lie?", question, { class: "field grow" }), h("button", { class: "primary" }, "Place it")));
  panel.append(h("div", { class: "stack" }, form, h("div", { class: "sides" }, picture, near), heat));

  async function place() {
    const text = question.value.trim();
    if (!text) return;
    try {
      const [routed, embedded] = await Promise.all([post("v1/route", { input: text }), post("v1/embeddings", { model: "lorauter", input: text })]);
      const [decision] = routed.data;
      const nearest = decision.tasks.slice(0, NEAREST);
      const shown = await get("v1/map", { task: nearest.map((task) => task.name) });
      draw(shown, project(embedded.data[0].embedding, shown.projection), nearest);
      near.replaceChildren(
        h("h2", {}, "Nearest tasks"),
        h("ol", { class: "bars", "aria-label": "Nearest tasks" }, ...nearest.map((task) => h("li", {}, h("span", { class: "name", title: task.name }, task.name), h("span", { class: "tier" }), bar(task.probability), h("span", { class: "number" }, percent(task.probability)), h("span", { class: "hint" }, `cosine ${task.score.toFixed(2)}`)))),
        h("p", { class: "hint" }, "The picture is flat, and the embeddings are not: what looks near need not be nearest."),
      );
      say(`Nearest: ${nearest.map((task) => task.name).join(", ")}`);
    } catch (error) {
      near.replaceChildren(h("p", { class: "error", role: "alert" }, error.message));
    }
  }

  function draw(shown, at = null, nearest = []) {
    const domains = [...new Set(shown.data.map((task) => task.domain))];
    const colours = new Map(domains.map((domain, place) => [domain, COLOURS[place] || OTHER]));
    const points = at ? [...shown.data, { x: at[0], y: at[1] }] : shown.data;
    const [x, y] = [scale(points.map((p) => p.x), WIDTH), scale(points.map((p) => p.y), HEIGHT)];
    const named = shown.data.length <= 40 ? new Set(shown.data.map((task) => task.id)) : new Set(nearest.map((task) => task.name));
    const unit = Math.max(1, WIDTH / (picture.clientWidth || WIDTH)); // of a picture that is drawn smaller than it is
    const radius = (shown.data.length > 200 ? 4 : 6) * unit;
    const places = new Map(shown.data.map((task) => [task.id, [x(task.x), HEIGHT - y(task.y)]]));
    const marks = shown.data.map((task) => {
      const [cx, cy] = places.get(task.id);
      return svg("circle", { cx, cy, r: radius, "data-task": task.id, vars: { "--colour": colours.get(task.domain) } }, svg("title", {}, `${task.id} (${task.domain})`));
    });
    const labels = labelled([...named].filter((name) => places.has(name)).map((name) => [name, ...places.get(name)]), unit);
    const you = at && [x(at[0]), HEIGHT - y(at[1])];
    const lines = you ? nearest.filter((task) => places.has(task.name)).map((task) => svg("line", { x1: you[0], y1: you[1], x2: places.get(task.name)[0], y2: places.get(task.name)[1] })) : [];
    const what = `${shown.data.length} tasks in two dimensions${at ? ", and the question among them" : ""}`;
    const others = domains.length > COLOURS.length;
    picture.replaceChildren(
      h("h2", {}, "Tasks by their embeddings"),
      shown.data.length < shown.total ? h("p", { class: "notice" }, `${shown.total} tasks are too many to draw: ${shown.data.length} of them are shown.`) : "",
      svg("svg", { class: "scatter", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": what }, ...lines, ...marks, ...labels, you && svg("circle", { class: "you", cx: you[0], cy: you[1], r: 9 * unit }, svg("title", {}, "your question"))),
      h("ul", { class: "legend" }, ...domains.slice(0, COLOURS.length).map((domain) => h("li", { vars: { "--colour": colours.get(domain) } }, domain || "no domain")), others && h("li", { vars: { "--colour": OTHER } }, "other domains"), you && h("li", { vars: { "--colour": "var(--text)" } }, "your question")),
    );
  }

  async function drawHeat(after = null) {
    const tasks = await get("v1/tasks", { limit: HEAT, after });
    const scored = tasks.data.map((task) => ({ id: task.id, scores: new Map((task.adapters || []).filter((adapter) => adapter.score !== null).map((adapter) => [adapter.name, adapter.score])) }));
    const counts = new Map();
    for (const { scores } of scored) for (const name of scores.keys()) counts.set(name, (counts.get(name) || 0) + 1);
    const adapters = [...counts].sort((a, b) => b[1] - a[1]).slice(0, HEAT).map(([name]) => name).sort();
    const paged = tasks.has_more || after;
    const about = adapters.length
      ? `Scores on the tasks' validation examples${counts.size > HEAT ? `; of ${counts.size} adapters the ${HEAT} that were tried on most tasks` : ""}${paged ? `; ${tasks.data.length} of ${tasks.total} tasks` : ""}.`
      : "No adapter was tried on these tasks; 'lorauter catalog build --match' does it.";
    heat.replaceChildren(
      h("h2", {}, "Adapters by task"),
      h("p", { class: "hint" }, about),
      adapters.length
        ? h(
            "div",
            { class: "table heat", tabindex: "0", role: "region", "aria-label": "Scores of adapters by task" },
            h(
              "table",
              {},
              h("thead", {}, h("tr", {}, h("td", {}), ...adapters.map((name) => h("th", { scope: "col" }, name)))),
              h("tbody", {}, ...scored.filter(({ scores }) => scores.size).map(({ id, scores }) => h("tr", {}, h("th", { scope: "row" }, id), ...adapters.map((name) => cell(scores.get(name)))))),
            ),
          )
        : "",
      paged ? h("div", { class: "row" }, after && h("button", { onclick: () => drawHeat() }, "First tasks"), tasks.has_more && h("button", { onclick: () => drawHeat(tasks.last_id) }, "Further tasks")) : "",
    );
  }

  draw(await get("v1/map"));
  await drawHeat();
}

/** Names beside their points, each where it covers none before it, if there is such a place. */
function labelled(points, unit) {
  const near = 10 * unit;
  const taken = points.map(([, x, y]) => [x - near / 2, y - near / 2, x + near / 2, y + near / 2]);
  return points.map(([name, x, y]) => {
    const width = 8.2 * unit * name.length;
    const places = [[x + near, y + near / 2], [x - near - width, y + near / 2], [x - width / 2, y + 2.2 * near], [x - width / 2, y - near]];
    const box = ([left, base]) => [left, base - 1.3 * near, left + width, base + 0.4 * near];
    const free = ([l, t, r, b]) => l > 0 && r < WIDTH && taken.every(([L, T, R, B]) => r < L || l > R || b < T || t > B);
    const chosen = places.find((place) => free(box(place))) || places[0];
    taken.push(box(chosen));
    return svg("text", { x: chosen[0], y: chosen[1], "font-size": 15 * unit }, name);
  });
}

const cell = (score) => (score === undefined ? h("td", {}, "") : h("td", { vars: { "--share": `${DEEPEST * Math.max(0, Math.min(1, score))}%` } }, score.toFixed(2)));

/** Where an embedding lies in the plane. */
function project(embedding, { mean, components }) {
  return components.map((axis) => axis.reduce((sum, weight, place) => sum + weight * (embedding[place] - mean[place]), 0));
}

/** From numbers to places between the edges. */
function scale(values, size) {
  const [low, high] = values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
  return (value) => EDGE + ((value - low) / (high - low || 1)) * (size - 2 * EDGE);
}
