// Service: replicas, load, speed and the caches, of the last minutes, as the metrics have them.

import { get, keyNeeded, text } from "./api.js";
import { duration, figure, h, percent, svg, table } from "./dom.js";
import { added, by, parse, quantile, total } from "./metrics.js";

const EVERY_MS = 5000;
const KEPT = 120; // readings: ten minutes
const WINDOW = 24; // readings that the figures are of: two minutes

/** @param {HTMLElement} panel */
export async function show(panel) {
  const access = await get("v1/access");
  if (keyNeeded && !(access.roles.includes("admin") && access.adapters === null)) {
    panel.append(h("p", { class: "notice" }, `The key ${access.name} has not the role 'admin' over all adapters, of which this tells.`));
    return {};
  }
  const readings = [];
  const figures = h("div", { class: "figures" });
  const tables = h("div", { class: "stack" });
  const about = h("p", { class: "hint" }, "Reading the metrics…");
  panel.append(h("div", { class: "stack" }, about, figures, tables));
  let timer = 0;

  async function read() {
    clearTimeout(timer);
    if (panel.hidden || document.hidden) return;
    try {
      const [metrics, deployments, load] = await Promise.all([text("metrics"), get("v1/deployments"), get("load")]);
      const samples = parse(metrics);
      const last = readings.at(-1);
      // Ray brings its metrics up to date only now and then: the same ones again are no news of a pause.
      if (!last || metrics !== last.metrics) readings.push({ at: Date.now() / 1000, samples, metrics });
      if (readings.length > KEPT) readings.shift();
      draw(deployments.data, load.server_load);
    } catch (error) {
      about.textContent = error.message;
      about.className = "error";
      return; // what is not allowed now will not be in five seconds
    }
    timer = setTimeout(read, EVERY_MS);
  }

  function draw(deployments, load) {
    const now = readings.at(-1);
    const then = readings.at(-Math.min(WINDOW, readings.length));
    const seconds = now.at - then.at;
    const since = (name, where) => added(then.samples, now.samples, name, where);
    const rate = (name, where) => (seconds ? since(name, where) / seconds : null);
    const failed = (labels) => ["failed", "broken", "refused"].includes(labels.outcome);
    const asked = (labels) => labels.endpoint?.startsWith("/v1/");
    about.className = "hint";
    about.textContent = seconds ? `Of the last ${seconds < 90 ? `${Math.round(seconds)} s` : `${Math.round(seconds / 60)} minutes`}; read every ${EVERY_MS / 1000} s while this is open.` : "Figures of time come with the second reading, within seconds.";
    const line = (of) => readings.slice(1).map((reading, place) => of(readings[place], reading, reading.at - readings[place].at));
    figures.replaceChildren(
      tile("Requests in progress", figure(load, 0), line((_, b) => total(b.samples, "requests_running"))),
      tile("Waiting in replicas", figure(total(now.samples, "requests_waiting"), 0), line((_, b) => total(b.samples, "requests_waiting"))),
      tile("Tokens a second", figure(rate("completion_tokens_total")), line((a, b, s) => added(a.samples, b.samples, "completion_tokens_total") / s)),
      tile("First token, median", duration(quantile(then.samples, now.samples, "time_to_first_token_seconds", 0.5) ?? NaN), line((a, b) => quantile(a.samples, b.samples, "time_to_first_token_seconds", 0.5) || 0)),
      tile("First token, 95th percentile", duration(quantile(then.samples, now.samples, "time_to_first_token_seconds", 0.95) ?? NaN), line((a, b) => quantile(a.samples, b.samples, "time_to_first_token_seconds", 0.95) || 0)),
      tile("Requests a second", figure(rate("requests_total", asked), 2), line((a, b, s) => added(a.samples, b.samples, "requests_total", asked) / s)),
      tile("Errors and refusals", figure(since("requests_total", failed), 0), line((a, b) => added(a.samples, b.samples, "requests_total", failed))),
    );
    tables.replaceChildren(
      section("Deployments", ["Deployment", "State", "Replicas"], deployments.map((one) => h("tr", {}, h("th", { scope: "row" }, one.id), h("td", {}, one.status.toLowerCase()), h("td", {}, Object.entries(one.replicas).map(([state, count]) => `${count} ${state.toLowerCase()}`).join(", ") || "none")))),
      section("Replicas of the model", ["Replica", "#Running", "#Waiting", "#Cache used", "#Preemptions"], replicas(now.samples)),
      section("Adapters by tier", ["Tier", "#Resident", "#Hits", "#Loads", "#Found there", "#Mean load", "#Evictions"], tiers(then.samples, now.samples)),
      section("Requests by outcome", ["Outcome", "#Lately", "#In all"], outcomes(then.samples, now.samples)),
    );
  }

  document.addEventListener("visibilitychange", read);
  return { looked: read };
}

const section = (title, heads, rows) => h("section", { class: "panel" }, h("h2", {}, title), table(title, heads, rows));
const number = (value) => h("td", { class: "number" }, value);

/** A figure with its course: a line that is not there to be read. */
function tile(title, value, course) {
  const most = Math.max(...course, 1e-9);
  const points = course.map((one, place) => `${(100 * place) / Math.max(1, course.length - 1)} ${38 - (34 * one) / most}`);
  return h("div", { class: "panel figure" }, h("span", { class: "hint" }, title), h("b", {}, value), svg("svg", { class: "spark", viewBox: "0 0 100 40", preserveAspectRatio: "none", "aria-hidden": "true" }, points.length > 1 && svg("path", { d: `M${points.join("L")}` })));
}

function replicas(samples) {
  const [running, waiting, used, preempted] = ["requests_running", "requests_waiting", "cache_used", "preemptions_total"].map((name) => by(samples, name, "replica"));
  return [...running.keys()].sort().map((name) => h("tr", {}, h("th", { scope: "row" }, h("code", {}, name)), number(figure(running.get(name), 0)), number(figure(waiting.get(name) || 0, 0)), number(percent(used.get(name) || 0)), number(figure(preempted.get(name) || 0, 0))));
}

function tiers(then, now) {
  return ["device", "host", "disk"].map((tier) => {
    const own = (labels) => labels.tier === tier;
    const [hits, loads, seconds, evictions] = ["adapter_hits_total", "adapter_loads_total", "adapter_load_seconds_total", "adapter_evictions_total"].map((name) => (then === now ? total(now, name, own) : added(then, now, name, own)));
    return h("tr", {}, h("th", { scope: "row" }, tier), number(figure(total(now, "adapters_resident", own), 0)), number(figure(hits, 0)), number(figure(loads, 0)), number(hits + loads ? percent(hits / (hits + loads)) : "–"), number(duration(loads ? seconds / loads : null)), number(figure(evictions, 0)));
  });
}

function outcomes(then, now) {
  const [was, is] = [by(then, "requests_total", "outcome"), by(now, "requests_total", "outcome")];
  return [...is].sort((a, b) => b[1] - a[1]).map(([outcome, count]) => h("tr", {}, h("th", { scope: "row" }, outcome), number(figure(count - (was.get(outcome) || 0), 0)), number(figure(count, 0))));
}
