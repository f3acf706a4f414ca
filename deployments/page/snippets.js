// A request as a command or a program, to be taken elsewhere. The key stays here: they read it from the environment.

import { keyNeeded } from "./api.js";

const base = () => new URL("v1", document.baseURI).href;

/** For a POSIX shell. */
export function asCurl(body) {
  const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
  const lines = [`curl -s ${quoted(`${base()}/chat/completions`)}`, "-H 'Content-Type: application/json'"];
  if (keyNeeded) lines.push('-H "Authorization: Bearer $LORAUTER_KEY"');
  return [...lines, `-d ${quoted(JSON.stringify(body))}`].join(" \\\n  ");
}

/** For Python, with OpenAI's library. */
export function asPython(body) {
  const { lorauter, ...rest } = body;
  const options = Object.entries(rest).map(([name, value]) => `    ${name}=${literal(value)},`);
  if (lorauter && Object.keys(lorauter).length) options.push(`    extra_body={"lorauter": ${literal(lorauter)}},`);
  const key = keyNeeded ? 'os.environ["LORAUTER_KEY"]' : '"unused"';
  return [
    ...(keyNeeded ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(base())}, api_key=${key})`,
    "answer = client.chat.completions.create(",
    ...options,
    ")",
    "print(answer.choices[0].message.content)",
    "",
  ].join("\n");
}

/** A JSON value as Python writes it. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  if (typeof value === "object") return `{${Object.entries(value).map(([k, v]) => `${literal(k)}: ${literal(v)}`).join(", ")}}`;
  return JSON.stringify(value);
}
