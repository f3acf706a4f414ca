// The service's HTTP API, with the tab's key. Addresses are relative to the page, whatever the service's own path is.

const KEY = "lorauter-key";
const address = (path) => new URL(path, document.baseURI);

/** What the service says is wrong. */
export class ApiError extends Error {
  constructor(status, error) {
    super(error?.message || `the service answered with status ${status}`);
    this.status = status;
    this.param = error?.param;
  }
}

export const keyNeeded = document.querySelector('meta[name="lorauter-keys"]').content === "needed";
export const key = {
  get: () => sessionStorage.getItem(KEY),
  set: (value) => sessionStorage.setItem(KEY, value),
  forget: () => sessionStorage.removeItem(KEY),
};

let whileAsked = null;
/** Has the user give a key; set by the page. @type {(wrong: string | null) => Promise<void>} */
let askForKey = async () => {};
export const onKeyNeeded = (ask) => (askForKey = ask);

function ask(wrong) {
  whileAsked ||= askForKey(wrong).finally(() => (whileAsked = null));
  return whileAsked;
}

/** Send a request, once there is a key where one is needed, and again with another one where it is wrong. */
async function send(path, options = {}) {
  if (keyNeeded && !key.get()) await ask(null);
  for (;;) {
    const used = key.get();
    const headers = { ...options.headers, ...(used ? { Authorization: `Bearer ${used}` } : {}) };
    const response = await fetch(address(path), { ...options, headers, cache: "no-store", credentials: "omit" });
    if (response.status !== 401) return response;
    if (key.get() === used) {
      key.forget();
      await ask((await problem(response)).message);
    }
  }
}

async function problem(response) {
  try {
    return new ApiError(response.status, (await response.json()).error);
  } catch {
    return new ApiError(response.status, null);
  }
}

async function answered(response) {
  if (!response.ok) throw await problem(response);
  return response;
}

const asJson = (body, signal) => ({
  method: "POST",
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
  signal,
});

/** GET a JSON answer; `params` become the query, lists several of it. */
export async function get(path, params = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(params))
    for (const one of [value].flat()) if (one !== null && one !== undefined && one !== "") query.append(name, one);
  return (await answered(await send(query.size ? `${path}?${query}` : path))).json();
}

export const text = async (path) => (await answered(await send(path))).text();
export const post = async (path, body, signal) => (await answered(await send(path, asJson(body, signal)))).json();
export const remove = async (path) => (await answered(await send(path, { method: "DELETE" }))).json();

/** The events of a streamed answer, as they come. Raises ApiError, one in the stream among them. */
export async function* stream(path, body, signal) {
  const response = await answered(await send(path, asJson(body, signal)));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const data = JSON.parse(event.slice(6));
      if (data.error) throw new ApiError(response.status, data.error);
      yield data;
    }
  }
}

/** POST a form; `progress` is told the share that is sent. (`fetch` tells nobody how far it is.) */
export async function upload(path, form, progress) {
  if (keyNeeded && !key.get()) await ask(null);
  const request = new XMLHttpRequest();
  request.open("POST", address(path));
  if (key.get()) request.setRequestHeader("Authorization", `Bearer ${key.get()}`);
  request.responseType = "json";
  return new Promise((resolve, reject) => {
    request.upload.onprogress = (event) => progress(event.lengthComputable ? event.loaded / event.total : null);
    request.onload = () =>
      request.status < 300 ? resolve(request.response) : reject(new ApiError(request.status, request.response?.error));
    request.onerror = () => reject(new ApiError(0, { message: "the connection broke; send it again" }));
    request.send(form);
  });
}
