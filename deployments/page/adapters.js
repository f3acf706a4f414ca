// An input for an adapter's name, which offers those that the service knows: ten thousand are no list to choose from.

import { get } from "./api.js";
import { h } from "./dom.js";

const OFFERED = 20;
let lists = 0;

/** The input, and the list of what it offers, which goes into the document too. */
export function adapterInput() {
  const list = h("datalist", { id: `adapters-${++lists}` });
  const input = h("input", { type: "text", list: list.id, autocomplete: "off", spellcheck: "false" });
  const offer = async () => {
    const { data } = await get("v1/adapters", { search: input.value, limit: OFFERED });
    list.replaceChildren(...data.map((adapter) => h("option", { value: adapter.id })));
  };
  input.addEventListener("input", offer);
  input.addEventListener("focus", offer, { once: true });
  return { input, list };
}
