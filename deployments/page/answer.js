// One question to the service, and its answer as it comes.

import { stream } from "./api.js";

/**
 * Ask; `heard` is told the answer whenever there is more of it.
 * @param {Record<string, any>} body a chat's, without what makes it a stream that tells its timings
 * @param {(answer: Answer) => void} heard
 * @param {AbortSignal} signal
 * @returns {Promise<Answer>}
 * @typedef {{text: string, decision: any, timings: any, finish: string | null, tokens: number}} Answer
 */
export async function ask(body, heard, signal) {
  const answer = { text: "", decision: null, timings: null, finish: null, tokens: 0 };
  const asked = { ...body, lorauter: { ...body.lorauter, timings: true }, stream: true, stream_options: { include_usage: true } };
  for await (const event of stream("v1/chat/completions", asked, signal)) {
    const [choice] = event.choices;
    if (event.lorauter?.adapters) answer.decision = event.lorauter;
    answer.timings = event.lorauter?.timings || answer.timings;
    answer.text += choice?.delta.content || "";
    answer.finish = choice?.finish_reason || answer.finish;
    answer.tokens = event.usage?.completion_tokens || answer.tokens;
    heard(answer);
  }
  return answer;
}

/** What is left out where it is the service's own choice. */
export function sampling(tokens, temperature) {
  const body = {};
  if (tokens.value) body.max_tokens = Number(tokens.value);
  if (temperature.value) body.temperature = Number(temperature.value);
  return body;
}
