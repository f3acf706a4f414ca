// The page's frame: its parts as tabs, the key, and what is known of the service in the corner.

import { get, key, keyNeeded, onKeyNeeded } from "./api.js";
import { h } from "./dom.js";

const PARTS = { ask: "Ask", compare: "Compare", map: "Map", pool: "Pool", service: "Service", change: "Change" };
const main = document.getElementById("main");
const tabs = document.querySelector('[role="tablist"]');
const shown = new Map();

for (const [name, title] of Object.entries(PARTS)) {
  tabs.append(
    h("button", { role: "tab", id: `tab-${name}`, "aria-controls": name, onclick: () => open(name) }, title),
  );
  main.append(h("section", { role: "tabpanel", id: name, "aria-labelledby": `tab-${name}`, hidden: true }));
}

tabs.addEventListener("keydown", (event) => {
  const all = [...tabs.children];
  const at = all.indexOf(document.activeElement);
  const to = { ArrowRight: at + 1, ArrowLeft: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  const tab = all[(to + all.length) % all.length];
  tab.focus();
  tab.click();
});

/** Go to a part. (To set `location.hash` would take the focus from its tab.) */
function open(name) {
  history.pushState(null, "", `#${name}`);
  show();
}

/** Show the part that the address names; it is loaded when it is first looked at. */
async function show() {
  const wanted = location.hash.slice(1);
  const name = wanted in PARTS ? wanted : "ask";
  for (const tab of tabs.children) {
    const own = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(own));
    tab.tabIndex = own ? 0 : -1;
  }
  for (const panel of main.children) panel.hidden = panel.id !== name;
  document.title = `${PARTS[name]} · lorauter`;
  if (!shown.has(name)) shown.set(name, import(`./${name}.js`).then((part) => part.show(document.getElementById(name))));
  (await shown.get(name))?.looked?.();
}

const dialog = document.getElementById("key");
dialog.addEventListener("cancel", (event) => event.preventDefault());
onKeyNeeded(
  (wrong) =>
    new Promise((resolve) => {
      const input = dialog.querySelector("input");
      const error = dialog.querySelector(".error");
      error.hidden = !wrong;
      error.textContent = wrong || "";
      input.value = "";
      dialog.addEventListener(
        "close",
        () => {
          key.set(input.value.trim());
          resolve();
        },
        { once: true },
      );
      dialog.showModal();
    }),
);

/** Who is asking, and which catalog is in use. */
async function state() {
  const corner = document.getElementById("state");
  const [access, tasks] = await Promise.all([get("v1/access"), get("v1/tasks", { limit: 1 })]);
  const version = tasks.catalog_version;
  corner.replaceChildren(
    h("span", {}, `${tasks.total} tasks`),
    version && version !== "none" ? h("span", {}, "catalog ", h("code", { title: version }, version.slice(0, 8))) : "",
  );
  if (keyNeeded)
    corner.append(
      h("span", {}, `key ${access.name}`),
      h("button", { class: "small", onclick: () => (key.forget(), location.reload()) }, "Forget key"),
    );
  if (tasks.refused) corner.append(h("span", { class: "error", title: tasks.refused.reason }, `version ${tasks.refused.version.slice(0, 8)} is refused`));
}

addEventListener("popstate", show);
state().catch((error) => (document.getElementById("state").textContent = error.message));
show();
