// Ask: a conversation, with each answer's decision beside it.

import { ask, sampling } from "./answer.js";
import { conditionBar, options } from "./conditions.js";
import { decisionView, timeLine } from "./decision.js";
import { field, h, say } from "./dom.js";
import { exampleList } from "./examples.js";

/** @param {HTMLElement} panel */
export function show(panel) {
  const turns = h("section", { class: "stack", "aria-label": "Conversation" });
  const intro = h("div", { class: "stack panel" }, h("h2", {}, "Ask what an adapter may know"), h("p", { class: "hint" }, "Nobody names an adapter: the question is matched against the catalog's tasks, and answered under a mixture of the adapters that serve them."));
  const question = h("textarea", { rows: 2, placeholder: "A question, or one of the examples" });
  const model = h("select", {}, h("option", { value: "lorauter" }, "routed"), h("option", { value: "base" }, "base model"));
  const tokens = h("input", { type: "number", min: 1, max: 100000, value: "" });
  const temperature = h("input", { type: "number", min: 0, max: 2, step: 0.1, value: "" });
  const send = h("button", { class: "primary", type: "submit" }, "Ask");
  const stop = h("button", { type: "button", hidden: true, onclick: () => running?.abort() }, "Stop");
  const fresh = h("button", { type: "button", hidden: true, onclick: begin }, "New conversation");
  const form = h(
    "form",
    { class: "panel composer stack", onsubmit: (event) => (event.preventDefault(), submit(question.value)) },
    conditionBar(again),
    field("Your question", question),
    h("div", { class: "row" }, h("details", { class: "grow" }, h("summary", {}, "Options"), h("div", { class: "row" }, field("Answered by", model, { class: "field few" }), field("Tokens at most", tokens, { class: "field few" }), field("Temperature", temperature, { class: "field few" }))), fresh, stop, send),
  );
  let running = null;
  let messages = [];

  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      form.requestSubmit();
    }
  });

  function begin() {
    running?.abort();
    messages = [];
    turns.replaceChildren();
    intro.hidden = false;
    fresh.hidden = true;
    question.focus();
  }

  function again() {
    const asked = messages.findLastIndex((message) => message.role === "user");
    if (asked < 0 || running) return;
    const { content } = messages[asked];
    messages = messages.slice(0, asked);
    submit(content);
  }

  async function submit(content) {
    if (running || !content.trim()) return;
    question.value = "";
    intro.hidden = true;
    fresh.hidden = false;
    const text = h("p", { class: "answer", "data-role": "answer" });
    const side = h("div", { class: "panel", role: "group", "aria-label": "Decision" }, h("p", { class: "hint" }, "Routing…"));
    const turn = h("article", { class: "turn sides" }, h("div", {}, h("p", { class: "question" }, content), text), side);
    turns.append(turn);
    turn.scrollIntoView({ block: "nearest" });
    running = new AbortController();
    [send.hidden, stop.hidden] = [true, false];
    messages.push({ role: "user", content });
    const body = { model: model.value, messages, ...sampling(tokens, temperature), lorauter: model.value === "lorauter" ? options() : {} };
    let answer = null;
    const heard = (so_far) => {
      if (!answer && so_far.decision) side.replaceChildren(h("h2", {}, "Decision"), decisionView(so_far.decision, body.model));
      answer = so_far;
      text.textContent = so_far.text;
    };
    try {
      await ask(body, heard, running.signal);
      say(`The answer: ${answer.text}`);
    } catch (error) {
      if (error.name !== "AbortError") {
        turn.firstChild.append(h("p", { class: "error", role: "alert" }, error.message));
        if (!answer) side.remove();
      } else turn.firstChild.append(h("p", { class: "hint" }, "Stopped."));
    } finally {
      running = null;
      [send.hidden, stop.hidden] = [false, true];
    }
    if (answer?.timings) side.append(timeLine(answer.timings));
    if (answer?.text) messages.push({ role: "assistant", content: answer.text });
    else messages.pop();
    if (answer) side.append(h("p", { class: "facts" }, h("span", {}, `${answer.tokens || "–"} tokens`), answer.finish === "length" && h("span", {}, "cut at the most tokens")));
  }

  panel.append(h("div", { class: "stack" }, intro, turns, form));
  exampleList((text) => submit(text))
    .then((list) => intro.append(list))
    .catch((error) => intro.append(h("p", { class: "error" }, error.message)));
}
