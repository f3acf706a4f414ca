// How a question was routed: its likeliest tasks, the mixture, and what each step took.

import { adapterActs, taskActs } from "./conditions.js";
import { bar, duration, figure, h, percent } from "./dom.js";

const TIERS = {
  device: "It was on the device.",
  host: "It was in host memory.",
  disk: "It was on the node's disk.",
  peer: "It came from another node.",
  store: "It came from the store.",
};
const UNSHOWN = {
  unsure: "it is not certain enough which task it is of",
  not_yours: "the key has no adapter that was made for the task",
  unchecked: "nobody has found out whether they help this task",
  no_help: "they do not help this task",
  too_long: "they take too many tokens",
  no_room: "the context has no room for them",
  not_one_turn: "it is more than one question",
  held: "the answer is held to a form of its own",
};
const FEW = 5;
const SHARP = 0.95;

/** What kind of decision it is, in a word and a sentence. */
export function verdict(decision, model) {
  const [heaviest] = decision.adapters;
  if (model === "base") return ["base", "The base model alone, as it was asked for."];
  if (decision.confidence === null) return ["by hand", "The adapters were named, and nothing was routed."];
  if (!heaviest && decision.shown?.task) return ["by example", "The base model alone answers this task best after examples of it."];
  if (!heaviest) return ["fell back", "It fits no known task: the base model answers alone."];
  if (heaviest.weight >= SHARP) return ["sharp", "It is clear which adapter to use."];
  return ["soft", `A mixture of ${decision.adapters.length} adapters: no one of them is clearly the one to use.`];
}

/** A decision; `compact` leaves out what there is no room for side by side. */
export function decisionView(decision, model, { compact = false } = {}) {
  const [word, why] = verdict(decision, model);
  const parts = [
    h(
      "p",
      { class: "facts" },
      h("span", { class: `chip ${word === "soft" ? "soft" : ""}`, title: why, "data-verdict": word }, word),
      decision.confidence !== null && h("span", {}, "confidence ", h("b", {}, percent(decision.confidence))),
      decision.catalog_version && h("span", {}, "catalog ", h("code", { title: decision.catalog_version }, decision.catalog_version.slice(0, 8))),
    ),
  ];
  if (!compact) parts.push(h("p", { class: "hint" }, why));
  if (decision.tasks.length) parts.push(h("h3", {}, "Likeliest tasks"), taskBars(decision.tasks, compact ? 3 : FEW));
  if (decision.adapters.length) parts.push(h("h3", {}, "Mixture"), adapterBars(decision.adapters));
  if (decision.shown) parts.push(h("p", { class: "hint", "data-shown": decision.shown.places.length }, shownLine(decision.shown)));
  for (const left of decision.left_out || [])
    parts.push(h("p", { class: "error" }, `${left.name} is left out: ${left.cause.replace("_", " ")}`));
  return h("div", { class: "decision" }, ...parts);
}

/** Which examples went before the question, or why none did. */
function shownLine({ task, places, why }) {
  if (why) return `No examples went before it: ${UNSHOWN[why] || why}.`;
  return `${places.length} example${places.length > 1 ? "s" : ""} of ${task} went before it: ${places.map((place) => `#${place + 1}`).join(", ")}.`;
}

function taskBars(tasks, few) {
  const row = (task) =>
    h(
      "li",
      {},
      h("span", { class: "name", title: `${task.name}: cosine ${task.score.toFixed(3)}` }, task.name),
      h("span", { class: "tier" }),
      bar(task.probability),
      h("span", { class: "number" }, percent(task.probability)),
      h("span", { class: "acts" }, ...taskActs(task.name)),
    );
  const first = h("ol", { class: "bars", "aria-label": "Likeliest tasks" }, ...tasks.slice(0, few).map(row));
  if (tasks.length <= few) return first;
  const rest = h("details", {}, h("summary", {}, `${tasks.length - few} more`), h("ol", { class: "bars" }, ...tasks.slice(few).map(row)));
  return h("div", {}, first, rest);
}

function adapterBars(adapters) {
  return h(
    "ol",
    { class: "bars", "aria-label": "Mixture" },
    ...adapters.map((adapter) =>
      h(
        "li",
        {},
        h(
          "span",
          { class: "name", title: `version ${adapter.version}${adapter.composed ? ", composed from others" : ""}` },
          adapter.name,
        ),
        h("span", { class: "tier", title: TIERS[adapter.tier] }, adapter.tier),
        bar(Math.abs(adapter.weight)),
        h("span", { class: "number" }, adapter.weight.toFixed(2)),
        h("span", { class: "acts" }, ...adapterActs(adapter.name)),
      ),
    ),
  );
}

/** The steps up to the first token as a line, and how fast the others came. */
export function timeLine(timings) {
  const { embed_s, retrieve_s, adapters_s, queue_s, first_token_s } = timings;
  const known = [embed_s, retrieve_s, adapters_s, queue_s].reduce((sum, step) => sum + (step || 0), 0);
  const steps = [
    ["embed", embed_s, "light-dark(#0a6868, #5fcbc4)"],
    ["retrieve", retrieve_s, "light-dark(#4a78b5, #7fb0ee)"],
    ["adapters", adapters_s, "light-dark(#8a5a9e, #c896dc)"],
    ["queue", queue_s, "light-dark(#b06a00, #f2bd6b)"],
    ["prompt and way", Math.max(0, first_token_s - known), "light-dark(#8d969f, #77818b)"],
  ].filter(([, seconds]) => seconds !== null);
  return h(
    "div",
    { class: "timings" },
    h("h3", {}, "Time line"),
    h("div", { class: "line", "aria-hidden": "true" }, ...steps.map(([, seconds, colour]) => h("i", { vars: { "--share": `${(100 * seconds) / first_token_s}%`, "--colour": colour } }))),
    h("ul", { class: "legend" }, ...steps.map(([name, seconds, colour]) => h("li", { vars: { "--colour": colour } }, `${name} ${duration(seconds)}`))),
    h(
      "p",
      { class: "facts" },
      h("span", {}, "first token ", h("b", {}, duration(first_token_s))),
      h("span", {}, h("b", {}, figure(timings.tokens_per_second)), " tokens/s"),
    ),
  );
}
