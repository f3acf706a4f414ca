// Questions to begin with: examples of the catalog's own tasks.

import { get } from "./api.js";
import { h } from "./dom.js";

const SHOWN = 6;

/** Some tasks' first examples as buttons; `choose` is told the question of the one that is clicked. */
export async function exampleList(choose) {
  const { data } = await get("v1/tasks", { limit: 60, examples: 1 });
  const some = data.filter((task) => task.examples.length);
  const step = Math.max(1, some.length / SHOWN);
  const chosen = Array.from({ length: Math.min(SHOWN, some.length) }, (_, place) => some[Math.floor(place * step)]);
  return h(
    "ul",
    { class: "examples" },
    ...chosen.map((task) =>
      h(
        "li",
        {},
        h(
          "button",
          { onclick: () => choose(task.examples[0].input) },
          h("span", { class: "hint" }, task.id),
          h("span", { class: "text" }, task.examples[0].input),
        ),
      ),
    ),
  );
}
