// Compare: the same question to several models and mixtures, side by side.

import { adapterInput } from "./adapters.js";
import { ask, sampling } from "./answer.js";
import { get } from "./api.js";
import { conditionBar, options } from "./conditions.js";
import { decisionView, timeLine } from "./decision.js";
import { differences } from "./diff.js";
import { field, h, say } from "./dom.js";
import { asCurl, asPython } from "./snippets.js";

/** @param {HTMLElement} panel */
export function show(panel) {
  const question = h("textarea", { rows: 3 });
  const tokens = h("input", { type: "number", min: 1, max: 100000, value: "64" });
  const temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: "" });
  const one = adapterInput();
  const more = adapterInput();
  const weights = new Map();
  const sliders = h("div", { class: "stack" });
  const mix = h("fieldset", { class: "panel stack", hidden: true }, h("legend", { class: "hint" }, "The mixture by hand"), sliders, h("div", { class: "row" }, field("Adapter", more.input, { class: "field grow" }), more.list, h("button", { type: "button", onclick: () => mixIn(more.input.value) }, "Add to the mixture")));
  const oneField = field("The one adapter", one.input, { class: "field grow", hidden: true });

  const kinds = {
    routed: ["Routed", true, () => ({ model: "lorauter", lorauter: options() })],
    base: ["Base model", true, () => ({ model: "base" })],
    one: ["One adapter", false, () => ({ model: one.input.value.trim() })],
    hand: ["By hand", false, () => ({ model: "lorauter", lorauter: { adapters: Object.fromEntries(weights) } })],
    paper: ["Paper's preset", true, () => ({ model: "lorauter", lorauter: { ...options(), preset: "paper" } })],
  };
  const boxes = Object.entries(kinds).map(([kind, [title, on]]) => [kind, h("input", { type: "checkbox", name: kind, checked: on, onchange: shown }), title]);
  const results = h("div", { class: "columns" });
  const run = h("button", { class: "primary", type: "submit" }, "Compare");
  const stop = h("button", { type: "button", hidden: true, onclick: () => running?.abort() }, "Stop");
  let running = null;

  function shown() {
    const on = new Set(boxes.filter(([, box]) => box.checked).map(([kind]) => kind));
    oneField.hidden = !on.has("one");
    mix.hidden = !on.has("hand");
    one.input.required = on.has("one");
    if (on.has("hand") && !weights.size)
      get("v1/adapters", { limit: 2 })
        .then(({ data }) => data.forEach((adapter) => mixIn(adapter.id)))
        .catch((error) => sliders.replaceChildren(h("p", { class: "error" }, error.message)));
  }

  function mixIn(name, weight = 0.5) {
    name = name.trim();
    if (!name || weights.has(name)) return;
    more.input.value = "";
    const value = h("span", { class: "mono" }, weight.toFixed(2));
    const slider = h("input", { type: "range", min: -1, max: 2, step: 0.05, value: String(weight), "aria-label": `Weight of ${name}` });
    slider.addEventListener("input", () => {
      weights.set(name, Number(slider.value));
      value.textContent = Number(slider.value).toFixed(2);
    });
    weights.set(name, weight);
    const row = h("div", { class: "row" }, field(name, slider, { class: "field grow" }), value, h("button", { type: "button", class: "small", "aria-label": `Take ${name} out`, onclick: () => (weights.delete(name), row.remove()) }, "×"));
    sliders.append(row);
  }

  async function compare(event) {
    event?.preventDefault();
    if (running || !question.value.trim()) return;
    running = new AbortController();
    [run.hidden, stop.hidden] = [true, false];
    const base = { messages: [{ role: "user", content: question.value }], ...sampling(tokens, temperature) };
    const columns = boxes.filter(([, box]) => box.checked).map(([kind, , title]) => column(title, { ...kinds[kind][2](), ...base }));
    results.replaceChildren(...columns.map((one) => one.element));
    const answers = await Promise.all(columns.map((one) => one.ask(running.signal)));
    running = null;
    [run.hidden, stop.hidden] = [false, true];
    if (answers[0] === null) return;
    columns.slice(1).forEach((one, place) => answers[place + 1] !== null && one.mark(answers[0]));
    say(`${answers.filter((answer) => answer !== null).length} answers`);
  }

  function column(title, body) {
    const text = h("p", { class: "answer" });
    const below = h("div", {});
    const copy = (word, make) => h("button", { class: "small", onclick: (event) => copied(event.target, make(body)) }, `Copy as ${word}`);
    const element = h("article", { class: "panel stack", "aria-label": title }, h("h2", {}, title), text, below, h("div", { class: "row" }, copy("curl", asCurl), copy("Python", asPython)));
    let said = "";
    return {
      element,
      async ask(signal) {
        try {
          const answer = await ask(body, (so_far) => ((said = so_far.text), (text.textContent = said)), signal);
          below.replaceChildren(decisionView(answer.decision, body.model, { compact: true }), timeLine(answer.timings));
          return said;
        } catch (error) {
          below.replaceChildren(error.name === "AbortError" ? h("p", { class: "hint" }, "Stopped.") : h("p", { class: "error", role: "alert" }, error.message));
          return null;
        }
      },
      mark: (other) => text.replaceChildren(...differences(said, other).map(([part, isNew]) => (isNew ? h("mark", {}, part) : part))),
    };
  }

  panel.append(
    h(
      "div",
      { class: "stack" },
      h(
        "form",
        { class: "panel stack", onsubmit: compare },
        field("The question", question),
        h("div", { class: "row", role: "group", "aria-label": "Answered by" }, ...boxes.map(([, box, title]) => h("label", { class: "check" }, box, title))),
        h("div", { class: "row" }, oneField, one.list, field("Tokens at most", tokens, { class: "field few" }), field("Temperature", temperature, { class: "field few" }), stop, run),
        mix,
        conditionBar(compare),
        h("p", { class: "hint" }, "What an answer says otherwise than the first is ", h("mark", {}, "marked"), "."),
      ),
      results,
    ),
  );
  shown();
}

/** Put a text where it can be pasted from. */
async function copied(button, text) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
    say("Copied");
  } catch {
    // Without a secure address there is no clipboard to write to: what is shown can be selected.
    button.parentElement.after(h("pre", { tabindex: "0" }, text));
  }
}
