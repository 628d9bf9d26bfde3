// The live page: draws each snapshot that the server sends. Every text is set as text, never as markup.
"use strict";

const byId = (id) => document.getElementById(id);
let latest = null;

function el(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function ago(ms) {
  if (!ms) return "never";
  const seconds = Math.max(0, (Date.now() - ms) / 1000);
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} days ago`;
}

function moment(ms) {
  if (!ms) return el("span", { class: "quiet" }, "no commit yet");
  const text = new Date(ms).toISOString().replace("T", " ").slice(0, 19) + " UTC";
  return el("time", { datetime: new Date(ms).toISOString(), title: text, "data-ms": ms }, `${text}, ${ago(ms)}`);
}

function size(bytes) {
  return bytes >= 104858 ? `${(bytes / 1048576).toFixed(1)} MiB` : `${Math.round(bytes / 1024)} KiB`;
}

function tone(words) {
  if (/^(protected|started|deployed|created)/.test(words)) return "good";
  if (/^(NOT PROTECTED|failed|suspended|destroyed)/.test(words)) return "bad";
  return "busy";
}

function pill(words) {
  return el("span", { class: `pill ${tone(words)}` }, words.replace(/ \(lag.*/, ""));
}

function databaseRow(database) {
  const slash = database.path.lastIndexOf("/");
  return el("tr", {},
    el("td", {}, database.app || "(platform)"),
    el("td", { title: database.path }, database.path.slice(slash + 1)),
    el("td", {}, pill(database.words), database.reason ? el("div", { class: "quiet" }, database.reason) : null),
    el("td", { class: "number" }, `${database.lag_s.toFixed(1)} s`),
    el("td", {}, moment(database.durable_ms)),
    el("td", {}, el("code", {}, database.durable)),
    el("td", { class: "number" }, size(database.size_bytes)));
}

function machineRow(machine) {
  return el("tr", {},
    el("td", {}, el("code", {}, machine.id)),
    el("td", {}, pill(machine.state)),
    el("td", {}, `v${machine.release}`),
    el("td", {}, machine.group),
    el("td", {}, machine.started_ms ? moment(machine.started_ms) : ""),
    el("td", { class: "quiet" }, machine.words));
}

function appCard(app) {
  const kept = app.purge_after_ms ? `its data is kept until ${new Date(app.purge_after_ms).toISOString().slice(0, 16).replace("T", " ")} UTC` : "";
  return el("article", { class: "card" },
    el("h3", {}, app.name, " ", pill(app.state), " ", el("span", { class: "quiet" }, app.release ? `v${app.release}` : "no release")),
    app.url && !app.destroyed_ms ? el("a", { href: app.url, rel: "noreferrer" }, app.url) : null,
    app.words || kept ? el("p", {}, app.words || kept) : null,
    app.machines.length ? el("div", { class: "scroll" }, el("table", {},
      el("thead", {}, el("tr", {}, ...["Machine", "State", "Release", "Group", "Started", ""].map((name) => el("th", {}, name)))),
      el("tbody", {}, ...app.machines.map(machineRow)))) : null);
}

function safety(node) {
  const bad = node.databases.filter((database) => database.words.startsWith("NOT PROTECTED")).length;
  const busy = node.databases.filter((database) => database.words.startsWith("catching up")).length;
  const count = `${node.databases.length} database${node.databases.length === 1 ? "" : "s"}`;
  if (bad) return ["bad", `${bad} of ${count} NOT PROTECTED`];
  if (busy) return ["busy", `${count}, ${busy} catching up`];
  if (!node.durable) return ["busy", "starting: nothing is known to be protected yet"];
  return ["good", `All ${count} protected`];
}

function draw(snapshot) {
  latest = snapshot;
  const node = snapshot.node;
  const [mood, words] = safety(node);
  byId("safety").className = `card banner ${mood}`;
  byId("safety").textContent = words;
  byId("node").textContent = `${node.name} · ${node.region}`;
  byId("engine").textContent = node.engine;
  byId("bucket").textContent = node.bucket;
  byId("troubles").hidden = !node.troubles.length;
  byId("troubles").replaceChildren(...node.troubles.map((trouble) => el("p", { class: "card bad", role: "alert" }, trouble)));
  byId("apps").replaceChildren(...(snapshot.apps.length ? snapshot.apps.map(appCard)
    : [el("p", { class: "card quiet" }, "No app yet. Write a minipaas.toml and type: minipaas deploy")]));
  byId("databases").replaceChildren(...node.databases.map(databaseRow));
  byId("events").replaceChildren(...snapshot.events.slice(0, 20).map((event) => el("tr", {},
    el("td", {}, moment(event.at_ms)), el("td", {}, event.app), el("td", {}, event.text))));
}

function listen() {
  const source = new EventSource("events");
  source.addEventListener("snapshot", (event) => {
    byId("live").textContent = "live";
    byId("live").className = "good";
    draw(JSON.parse(event.data));
  });
  source.onerror = () => {
    byId("live").textContent = "no connection; trying again";
    byId("live").className = "bad";
  };
}

setInterval(() => {
  for (const time of document.querySelectorAll("time[data-ms]")) {
    time.textContent = `${time.title}, ${ago(Number(time.dataset.ms))}`;
  }
}, 1000);
listen();
