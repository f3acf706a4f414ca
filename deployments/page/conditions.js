// What questions are routed without: tasks and adapters that were excluded by a click, and those that alone are allowed.

import { h, say } from "./dom.js";

const KINDS = { exclude_tasks: "without task", exclude_adapters: "without", allow_adapters: "only" };
const chosen = Object.fromEntries(Object.keys(KINDS).map((kind) => [kind, new Set()]));
const bars = [];

/** As the `lorauter` object of a request has them. */
export const options = () =>
  Object.fromEntries(
    Object.entries(chosen)
      .filter(([, names]) => names.size)
      .map(([kind, names]) => [kind, [...names]]),
  );

function change(kind, name, on) {
  chosen[kind][on ? "add" : "delete"](name);
  say(`${KINDS[kind]} ${name}: ${on ? "from the next question on" : "no more"}`);
  bars.forEach((draw) => draw());
}

/** Buttons that exclude a task. */
export const taskActs = (name) => [act("exclude_tasks", name, "exclude", "×")];
/** Buttons that exclude an adapter, or allow no other. */
export const adapterActs = (name) => [act("exclude_adapters", name, "exclude", "×"), act("allow_adapters", name, "only use", "only")];

const act = (kind, name, word, sign) =>
  h("button", { class: "small", type: "button", "aria-label": `${word} ${name}`, title: `${word} ${name}`, onclick: () => change(kind, name, true) }, sign);

/** What is in force, each with a button that ends it; `again` asks the last question anew. */
export function conditionBar(again) {
  const bar = h("div", { class: "chips", hidden: true });
  const draw = () => {
    const chips = Object.entries(chosen).flatMap(([kind, names]) =>
      [...names].map((name) =>
        h(
          "span",
          { class: "chip" },
          `${KINDS[kind]} ${name}`,
          h("button", { class: "plain", "aria-label": `no longer ${KINDS[kind]} ${name}`, onclick: () => change(kind, name, false) }, "×"),
        ),
      ),
    );
    bar.hidden = !chips.length;
    bar.replaceChildren(...chips, h("button", { class: "small", onclick: again }, "Ask again"));
  };
  bars.push(draw);
  draw();
  return bar;
}
