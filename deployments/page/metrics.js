// Prometheus' text, read: samples by metric, sums over labels, and what came between two readings.

/** @typedef {{name: string, labels: Record<string, string>, value: number}} Sample */

/** @returns {Map<string, Sample[]>} */
export function parse(text) {
  const found = new Map();
  for (const line of text.split("\n")) {
    const match = /^(\w+)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!match || line.startsWith("#")) continue;
    const [, name, labels = "", value] = match;
    const sample = { name, labels: {}, value: value === "+Inf" ? Infinity : Number(value) };
    for (const [, key, quoted] of labels.matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)) sample.labels[key] = quoted.replace(/\\(.)/g, (_, c) => (c === "n" ? "\n" : c));
    if (!found.has(name)) found.set(name, []);
    found.get(name).push(sample);
  }
  return found;
}

/** The sum of a metric's samples, by the value of a label, or of all ("") without one. */
export function by(samples, name, label = null, where = () => true) {
  const sums = new Map();
  for (const sample of samples.get(`ray_lorauter_${name}`) || []) {
    if (!where(sample.labels)) continue;
    const key = label ? sample.labels[label] || "" : "";
    sums.set(key, (sums.get(key) || 0) + sample.value);
  }
  return sums;
}

export const total = (samples, name, where) => by(samples, name, null, where).get("") || 0;

/** What came to a counter between two readings; one that began anew counts from 0. */
export function added(before, after, name, where) {
  const [was, is] = [total(before, name, where), total(after, name, where)];
  return is >= was ? is - was : is;
}

/** A histogram's quantile of what came between two readings, linear within a bucket; null where nothing came. */
export function quantile(before, after, name, share) {
  const bounds = [...by(after, `${name}_bucket`, "le").entries()].map(([le, count]) => [le === "+Inf" ? Infinity : Number(le), count - (by(before, `${name}_bucket`, "le").get(le) || 0)]).sort((a, b) => a[0] - b[0]);
  const all = bounds.at(-1)?.[1];
  if (!(all > 0)) return null;
  let [low, below] = [0, 0];
  for (const [bound, count] of bounds) {
    if (count >= share * all) return bound === Infinity ? low : low + ((bound - low) * (share * all - below)) / (count - below || 1);
    [low, below] = [bound, count];
  }
  return low;
}
