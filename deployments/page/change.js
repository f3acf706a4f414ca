// Change: tasks and adapters added, composed and removed, and the catalog's versions, for who has an admin's key.

import { adapterInput } from "./adapters.js";
import { get, keyNeeded, post, remove, upload } from "./api.js";
import { field, h, percent, table } from "./dom.js";

const VERSIONS = 20;

/** @param {HTMLElement} panel */
export async function show(panel) {
  const access = await get("v1/access");
  if (!access.roles.includes("admin")) {
    const why = keyNeeded ? `The key ${access.name} has not the role 'admin'.` : "This service has no keys, and so nobody may change what it serves. 'lorauter keys new --role admin' makes one; the README says where it goes.";
    panel.append(h("p", { class: "notice" }, why));
    return;
  }
  const versions = h("div", { class: "stack" });
  const note = h("p", { role: "status" });
  const redraw = async (said = "") => {
    note.textContent = said;
    if (access.adapters === null) await drawVersions(versions, redraw);
  };
  panel.append(
    h(
      "div",
      { class: "stack" },
      h("div", { class: "columns" }, taskForm(redraw), uploadForm(redraw), composeForm(redraw), removeForm(redraw)),
      h("section", { class: "panel stack", "aria-label": "Versions" }, h("h2", {}, "Versions of the catalog"), note, access.adapters === null ? versions : h("p", { class: "hint" }, "They are for keys that are limited to no adapters.")),
    ),
  );
  redraw();
}

/** A form that does one thing, and says how it went. */
function form(title, fields, word, act) {
  const result = h("p", { role: "status" });
  const button = h("button", { class: "primary", type: "submit" }, word);
  async function submit(event) {
    event.preventDefault();
    button.disabled = true;
    result.className = "hint";
    result.textContent = "Working…";
    try {
      result.textContent = await act();
    } catch (error) {
      result.className = "error";
      result.textContent = error.message;
    }
    button.disabled = false;
  }
  return h("form", { class: "panel stack", "aria-label": title, onsubmit: submit }, h("h2", {}, title), ...fields, h("div", { class: "row" }, button), result);
}

const published = (answer) => `It is in the catalog's version ${answer.catalog_version?.slice(0, 8) || "that is served now"}; the replicas take it over within seconds.`;

function taskForm(done) {
  const name = h("input", { type: "text", spellcheck: "false" });
  const domain = h("input", { type: "text" });
  const metric = h("select", {}, ...["em", "rouge", "bleu"].map((one) => h("option", {}, one)));
  const description = h("input", { type: "text" });
  const examples = h("textarea", { rows: 6, spellcheck: "false", placeholder: "Is this film good? I loved it. => yes" });
  const file = h("input", { type: "file", accept: ".json,application/json" });
  return form(
    "Add a task",
    [
      h("div", { class: "row" }, field("Name", name, { class: "field grow" }), field("Domain", domain, { class: "field grow" }), field("Metric", metric, { class: "field few" })),
      field("Description", description),
      field("Examples, one a line: input => target", examples),
      field("Or a task file", file),
    ],
    "Add the task",
    async () => {
      const task = file.files.length ? JSON.parse(await file.files[0].text()) : { name: name.value.trim(), domain: domain.value.trim(), metric: metric.value, description: description.value.trim(), validation: lines(examples.value) };
      const answer = await post("v1/tasks", task);
      done();
      return `The task ${answer.id} is added. ${published(answer)}`;
    },
  );
}

/** Examples of their lines. */
function lines(text) {
  return text.split("\n").filter((line) => line.trim()).map((line, place) => {
    const at = line.lastIndexOf("=>");
    if (at < 0) throw new Error(`line ${place + 1} has no =>; write: input => target`);
    return { input: line.slice(0, at).trim(), target: line.slice(at + 2).trim() };
  });
}

function uploadForm(done) {
  const name = h("input", { type: "text", required: true, spellcheck: "false" });
  const config = h("input", { type: "file", required: true, accept: ".json" });
  const weights = h("input", { type: "file", required: true, accept: ".safetensors" });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Sent" });
  const sent = h("span", { class: "hint" });
  const progress = h("div", { class: "field", hidden: true }, bar, sent);
  return form(
    "Upload an adapter",
    [field("Name", name), field("adapter_config.json", config), field("adapter_model.safetensors", weights), progress],
    "Upload it",
    async () => {
      const parts = new FormData();
      parts.append("name", name.value.trim());
      parts.append("config", config.files[0]);
      parts.append("weights", weights.files[0]);
      progress.hidden = false;
      const answer = await upload("v1/adapters", parts, (share) => {
        if (share === null) bar.removeAttribute("value");
        else bar.value = share;
        sent.textContent = share === 1 ? "All of it is sent; it is being checked." : share === null ? "" : `${percent(share)} is sent`;
      }).finally(() => (progress.hidden = true));
      done();
      const serves = answer.tasks.length ? `It serves ${answer.tasks.join(", ")}.` : "It serves no task yet.";
      return [`The adapter ${answer.id} of rank ${answer.rank} is added.`, serves, ...(answer.warnings || []), published(answer)].join(" ");
    },
  );
}

function composeForm(done) {
  const name = h("input", { type: "text", required: true, spellcheck: "false" });
  const bar = h("progress", { max: 1, value: 0, "aria-label": "Composed" });
  const state = h("span", { class: "hint" });
  const cancel = h("button", { class: "small", type: "button" }, "Cancel");
  const progress = h("div", { class: "field", hidden: true }, bar, state, h("div", { class: "row" }, cancel));
  return form(
    "Compose an adapter",
    [field("For the task", name), h("p", { class: "hint" }, "From the other adapters, by the task's examples. It takes seconds on a GPU, and minutes on a CPU."), progress],
    "Compose it",
    async () => {
      let told = await post("v1/compositions", { task: name.value.trim() });
      const path = `v1/compositions/${told.id}`;
      cancel.onclick = () => post(`${path}/cancel`, {}).catch((error) => (state.textContent = error.message));
      progress.hidden = false;
      try {
        while (["queued", "running", "publishing"].includes(told.status)) {
          bar.value = told.progress;
          state.textContent = told.ahead ? `${told.status}, behind ${told.ahead}` : told.status;
          await new Promise((resolve) => setTimeout(resolve, 1000));
          told = await get(path);
        }
      } finally {
        progress.hidden = true;
      }
      if (told.error) throw new Error(told.error.message);
      if (!told.kept) return `Nothing was changed: the composition is ${told.status}${told.reason ? `; ${told.reason}` : ""}.`;
      done();
      const { before, after } = told.scores.right;
      return `The adapter ${told.adapter} of rank ${told.rank} is added: of left-out examples ${percent(after)} come out right, before ${percent(before)}. ${published(told)}`;
    },
  );
}

function removeForm(done) {
  const kind = h("select", {}, h("option", { value: "adapters" }, "adapter"), h("option", { value: "tasks" }, "task"));
  const { input, list } = adapterInput();
  input.required = true;
  return form("Remove", [field("What", kind), field("Name", input), list], "Remove it", async () => {
    const name = input.value.trim();
    if (!(await sure(`Remove the ${kind.selectedOptions[0].textContent} ${name}?`))) return "Nothing was removed.";
    const answer = await remove(`v1/${kind.value}/${encodeURIComponent(name)}`);
    input.value = "";
    done();
    return `${answer.id} is removed. ${published(answer)}`;
  });
}

/** Whether the user says so. */
function sure(question) {
  return new Promise((resolve) => {
    const dialog = h("dialog", { "aria-label": question }, h("form", { method: "dialog" }, h("p", {}, question), h("div", { class: "row" }, h("button", { value: "yes", class: "primary" }, "Yes"), h("button", { value: "no" }, "No"))));
    dialog.addEventListener("close", () => (dialog.remove(), resolve(dialog.returnValue === "yes")));
    document.body.append(dialog);
    dialog.showModal();
  });
}

async function drawVersions(element, redraw, after = null) {
  try {
    const page = await get("v1/catalog/versions", { limit: VERSIONS, after });
    const row = (version) => {
      const back = h("button", { class: "small", onclick: () => use(version.id, back, redraw) }, "Use this one");
      return h("tr", {}, h("th", { scope: "row" }, h("code", {}, version.id)), h("td", {}, new Date(1000 * version.created).toLocaleString()), h("td", { class: "number" }, version.tasks ?? "–"), h("td", { class: "number" }, version.adapters ?? "–"), h("td", {}, version.problem || changes(version.changes)), h("td", {}, version.current ? h("span", { class: "chip" }, "in use") : !version.problem && back));
    };
    element.replaceChildren(
      table("Versions of the catalog", ["Version", "Written", "#Tasks", "#Adapters", "Changed since the one before", ""], page.data.map(row)),
      after || page.has_more ? h("div", { class: "row" }, after && h("button", { onclick: () => drawVersions(element, redraw) }, "Newest"), page.has_more && h("button", { onclick: () => drawVersions(element, redraw, page.data.at(-1).id) }, "Older")) : "",
    );
  } catch (error) {
    element.replaceChildren(h("p", { class: "error", role: "alert" }, error.message));
  }
}

/** What changed, in words. */
function changes(of) {
  if (!of) return h("span", { class: "muted" }, "the oldest that is kept");
  const words = Object.entries(of).flatMap(([kind, ways]) =>
    Object.entries(ways)
      .filter(([, { count }]) => count)
      .map(([way, { count, names }]) => `${count === 1 ? kind.slice(0, -1) : `${count} ${kind}`} ${way}: ${names.slice(0, 5).join(", ")}${count > 5 ? ", …" : ""}`),
  );
  return words.length ? h("ul", { class: "chips" }, ...words.map((word) => h("li", {}, word))) : h("span", { class: "muted" }, "nothing of tasks or adapters");
}

async function use(version, button, redraw) {
  if (!(await sure(`Serve the catalog's version ${version}?`))) return;
  button.disabled = true;
  try {
    const answer = await post("v1/catalog/current", { version });
    const missing = answer.missing_adapters.length ? ` Of its adapters the store no longer has ${answer.missing_adapters.join(", ")}: mixtures go without them.` : "";
    await redraw(`Version ${version} is published; the replicas take it over within seconds.${missing}`);
  } catch (error) {
    button.disabled = false;
    button.after(h("span", { class: "error", role: "alert" }, error.message));
  }
}
