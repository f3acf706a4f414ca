// Elements, made so that what they show is text and never HTML.

const SVG = "http://www.w3.org/2000/svg";

/**
 * An element.
 * @param {string} tag
 * @param {Record<string, any>} [attributes] `on...` are listeners, `vars` custom properties of CSS, `value` and the like
 *   properties, and false and null are left out.
 * @param {...(Node | string | number | null | undefined | false)} children
 * @returns {any}
 */
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** The same, of a drawing. */
export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, of] of Object.entries(value)) element.style.setProperty(key, of);
    else if (name === "value") element.value = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

let fields = 0;

/** A control below its label. */
export function field(label, control, attributes = {}) {
  control.id ||= `field-${++fields}`;
  return h("div", { class: "field", ...attributes }, h("label", { for: control.id }, label), control);
}

/** Say something to those who hear the page. */
export function say(text) {
  document.getElementById("said").textContent = text;
}

export const percent = (share) => `${(100 * share).toFixed(share < 0.0995 && share > 0 ? 1 : 0)} %`;
export const bar = (share) => h("span", { class: "bar", "aria-hidden": "true" }, h("i", { vars: { "--share": `${Math.max(0, Math.min(1, share)) * 100}%` } }));

/** Seconds for people. */
export function duration(seconds) {
  if (seconds === null || seconds === undefined || Number.isNaN(seconds)) return "–";
  if (seconds >= 1) return `${seconds.toFixed(2)} s`;
  return `${(1000 * seconds).toFixed(seconds < 0.01 ? 1 : 0)} ms`;
}

/** A number for people. */
export function figure(value, digits = 1) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value >= 1000 ? Math.round(value).toLocaleString("en") : value.toFixed(Number.isInteger(value) ? 0 : digits);
}

/** A table with a name for those who hear it; heads that begin with # are of numbers. */
export function table(caption, heads, rows) {
  return h(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": caption },
    h(
      "table",
      {},
      h("thead", {}, h("tr", {}, ...heads.map((head) => (head ? h("th", { scope: "col", class: head.startsWith("#") && "number" }, head.replace("#", "")) : h("td"))))),
      h("tbody", {}, ...rows),
    ),
  );
}
