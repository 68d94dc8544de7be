"use strict";
// Draws what Python laid out. Every name comes from a file: text nodes only, never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { nodes, groups, tensors } = data;
const SIGN = { same: "", added: "+", removed: "−", changed: "~", weights: "≈" };
const BOX = { width: 170, height: 40, gap: 34, pad: 14, head: 26 };
const state = { open: new Set(data.open), side: "both", selected: null, x: 0, y: 0, scale: 1 };
const $ = (id) => document.getElementById(id);
const svg = $("graph"), view = $("view");
const firstGroup = new Map();
groups.forEach((group) => group.parts.forEach((part) => { if (part[0] === 0) firstGroup.set(part[1], group.id); }));
const byId = new Map(groups.map((group) => [group.id, group]));

function make(tag, attributes = {}, text = null) {
  const element = document.createElement(tag);
  return fill(element, attributes, text);
}
function draw(tag, attributes = {}, text = null) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, text);
}
function fill(element, attributes, text) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== null) element.textContent = text;
  return element;
}
function short(text, length = 25) { return text.length > length ? text.slice(0, length - 1) + "…" : text; }
function statusOf(group) {
  const kinds = Object.keys(group.counts).filter((kind) => kind !== "same");
  if (!kinds.length) return "same";
  return kinds.length === 1 && !group.counts.same ? kinds[0] : "changed";
}
function countsText(group) {
  return Object.entries(group.counts).filter(([kind]) => kind !== "same")
    .map(([kind, count]) => `${SIGN[kind]}${count}`).join(" ");
}
function hidden(part) {
  const counts = part[0] === 0 ? { [nodes[part[1]].status]: 1 } : byId.get(part[1]).counts;
  const other = state.side === "before" ? "added" : state.side === "after" ? "removed" : null;
  return other !== null && Object.keys(counts).length === 1 && counts[other] > 0;
}

// -- positions: rows and places from Python, moved apart where a group is open ------------------------------------------

function measure(group) {
  const sizes = group.parts.map((part) => {
    if (hidden(part)) return { width: BOX.width, height: BOX.height, hidden: true };
    if (part[0] === 1 && state.open.has(part[1])) return measure(byId.get(part[1]));
    return { width: BOX.width, height: BOX.height };
  });
  const heights = [];
  group.places.forEach(([row], i) => { heights[row] = Math.max(heights[row] || 0, sizes[i].height); });
  group.edges.forEach(([, , points]) => points.forEach(([row]) => { heights[row] = heights[row] || BOX.height; }));
  const tops = [];
  let y = BOX.head + BOX.pad;
  for (let row = 0; row < heights.length; row += 1) { tops[row] = y; y += (heights[row] || 0) + BOX.gap; }
  const wide = group.places.map(([, x], i) => [x, sizes[i].width - BOX.width]).filter(([, extra]) => extra > 0)
    .sort((a, b) => a[0] - b[0]);
  const columns = [];
  for (const [x, extra] of wide) { // parts that stand in one column need room once
    const last = columns[columns.length - 1];
    if (last && last[0] === x) last[1] = Math.max(last[1], extra); else columns.push([x, extra]);
  }
  const moved = (x) => columns.reduce((sum, [place, extra]) => (place < x ? sum + extra : sum), x) + BOX.pad;
  const places = group.places.map(([row, x]) => [moved(x), tops[row]]);
  const right = Math.max(BOX.width, ...places.map(([x], i) => x + sizes[i].width));
  const points = group.edges.map(([, , way]) => way.map(([row, x]) => [moved(x) + BOX.width / 2, tops[row]
    + (heights[row] || BOX.height) / 2, (heights[row] || BOX.height) / 2]));
  return { width: right + BOX.pad, height: Math.max(y - BOX.gap + BOX.pad, BOX.head + 20), places, sizes, points };
}

function drawGroup(group, size, x, y, into) {
  group.edges.forEach(([from, to], i) => {
    if (size.sizes[from].hidden || size.sizes[to].hidden) return;
    const start = [x + size.places[from][0] + size.sizes[from].width / 2, y + size.places[from][1] + size.sizes[from].height];
    const end = [x + size.places[to][0] + size.sizes[to].width / 2, y + size.places[to][1]];
    if (end[1] < start[1]) { start[1] -= size.sizes[from].height; end[1] += size.sizes[to].height; }
    let path = `M${start[0]},${start[1]}`, last = start;
    for (const [px, py, half] of [...size.points[i].map(([a, b, h]) => [x + a, y + b, h]), [end[0], end[1], 0]]) {
      const top = end[1] >= start[1] ? py - half : py + half, middle = (last[1] + top) / 2;
      path += ` C${last[0]},${middle} ${px},${middle} ${px},${top}`;
      last = [px, top];
      if (half) { last = [px, end[1] >= start[1] ? py + half : py - half]; path += ` L${last[0]},${last[1]}`; }
    }
    const kinds = [group.parts[from], group.parts[to]].map((part) => (part[0] === 0 ? nodes[part[1]].status : "same"));
    const kind = kinds.includes("removed") ? "removed" : kinds.includes("added") ? "added" : "same";
    into.append(draw("path", { d: path, class: `edge ${kind}`, "marker-end": "url(#arrow)" }));
  });
  group.parts.forEach((part, i) => {
    if (size.sizes[i].hidden) return;
    drawPart(part, size.sizes[i], x + size.places[i][0], y + size.places[i][1], into);
  });
}

function drawPart(part, size, x, y, into) {
  const isGroup = part[0] === 1, item = isGroup ? byId.get(part[1]) : nodes[part[1]];
  const status = isGroup ? statusOf(item) : item.status, open = isGroup && state.open.has(item.id);
  const id = `${part[0]}:${part[1]}`;
  const element = draw("g", { class: `part ${isGroup ? "group" : "node"} ${status}${open ? " open" : ""}`,
    tabindex: "0", role: "button", "data-id": id, "aria-label": `${status} ${isGroup ? item.path || item.name : item.name}` });
  if (isGroup) element.setAttribute("aria-expanded", String(open));
  if (state.selected === id) element.classList.add("selected");
  element.append(draw("rect", { class: "box", x, y, width: size.width, height: size.height, rx: isGroup ? 8 : 3 }));
  const title = isGroup ? `${open ? "▾" : "▸"} ${item.name}${item.kind === "fold" ? "  the same change in each" : ""}`
    : item.label;
  const shown = isGroup && item.kind === "fold" && statusOf(item) === "same" ? `${open ? "▾" : "▸"} ${item.name}  alike` : title;
  element.append(draw("text", { x: x + 8, y: y + 17 }, `${SIGN[status] ? SIGN[status] + " " : ""}${short(shown, open ? 60 : 25)}`));
  if (!open) element.append(draw("text", { class: "small", x: x + 8, y: y + 32 },
    short(isGroup ? countsText(item) || `${item.parts.length} parts` : item.type, 30)));
  into.append(element);
  if (open) drawGroup(item, size, x, y, into);
}

function render() {
  const top = byId.get(0), size = measure(top), layer = draw("g");
  drawGroup(top, size, 0, 0, layer);
  view.replaceChildren(layer);
  place();
  renderTree();
}
function place() { view.setAttribute("transform", `translate(${state.x},${state.y}) scale(${state.scale})`); }

// -- the tree of modules --------------------------------------------------------------------------------------------

function renderTree() {
  const list = (group) => {
    const ul = make("ul", { role: "group" });
    for (const part of group.parts) {
      if (part[0] !== 1 || hidden(part)) continue;
      const child = byId.get(part[1]), li = make("li"), open = state.open.has(child.id), status = statusOf(child);
      const inner = child.parts.some((each) => each[0] === 1);
      const row = make("button", { class: `row ${status}-text`, "data-id": `1:${child.id}`, role: "treeitem",
        "aria-expanded": String(open) }, `${open ? "▾" : "▸"} ${child.name} ${countsText(child)}`);
      if (state.selected === `1:${child.id}`) row.setAttribute("aria-current", "true");
      li.append(row);
      if (open && inner) li.append(list(child));
      ul.append(li);
    }
    return ul;
  };
  $("tree").replaceChildren(list(byId.get(0)));
}

// -- what is known of one part ------------------------------------------------------------------------------------------

function bars(values, label) {
  const width = 340, height = 70, most = Math.max(...values, 1e-300), chart = draw("svg", { width: "100%", height,
    viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": label });
  values.forEach((value, i) => {
    const step = width / values.length, tall = Math.max(1, (height - 4) * value / most);
    chart.append(draw("rect", { class: "bar", x: i * step, y: height - tall, width: Math.max(1, step - 1), height: tall }));
  });
  return chart;
}
function link(id, text) { return make("button", { class: "row", "data-id": id }, text); }
function facts(rows) {
  const table = make("table");
  for (const [name, value] of rows) {
    if (value === null || value === undefined || value === "") continue;
    const row = make("tr");
    row.append(make("td", { class: "soft" }, name), make("td", {}, String(value)));
    table.append(row);
  }
  return table;
}
function number(value) { return typeof value === "number" ? Number(value.toPrecision(4)).toString() : value; }
function tensorDetails(name) {
  const tensor = tensors[name], box = make("div");
  box.append(make("h3", { class: `${tensor.status}-text` }, `${SIGN[tensor.status]} @${name}`));
  box.append(facts([["type", tensor.type], ["before", tensor.before], ["largest change", number(tensor.largest)],
    ["relative change", number(tensor.relative)], ["share of numbers", number(tensor.share)],
    ["effective rank", number(tensor.rank)], ["held", tensor.held]]));
  if (tensor.bars) { box.append(make("div", { class: "soft" }, tensor.bars_of), bars(tensor.bars, tensor.bars_of)); }
  return box;
}
function details(id) {
  const [kind, numberText] = id.split(":"), index = Number(numberText), panel = $("details");
  panel.replaceChildren();
  if (kind === "1") {
    const group = byId.get(index);
    panel.append(make("h2", {}, group.path ? `${group.path}${group.kind === "module" ? "" : ` (${group.name})`}` : group.name));
    panel.append(facts([["layer", data.sites && data.sites[group.path]], ...Object.entries(group.counts)]));
    for (const name of group.tensors.slice(0, 40)) panel.append(tensorDetails(name));
    if (group.tensors.length > 40) panel.append(make("p", {}, `and ${group.tensors.length - 40} more tensors`));
    return;
  }
  const node = nodes[index];
  panel.append(make("h2", {}, node.name));
  panel.append(facts([["status", node.change], ["operation", node.operation], ["module", node.path], ["type", node.type],
    ["paired by", data.sites ? "" : node.how], ["added by pass", node.origin], ["its options", node.options], ["source", node.source]]));
  if (node.before && node.before !== node.after) panel.append(make("h3", { class: "removed-text" }, "− before"), make("pre", {}, node.before));
  if (node.after) panel.append(make("h3", {}, node.before && node.before !== node.after ? "+ after" : "operation"), make("pre", {}, node.after));
  if (node.reads.length) panel.append(make("h3", {}, "reads"), ...node.reads.map((i) => link(`0:${i}`, nodes[i].name)));
  const readers = nodes.flatMap((other, i) => (other.reads.includes(index) ? [i] : []));
  if (readers.length) panel.append(make("h3", {}, "read by"), ...readers.map((i) => link(`0:${i}`, nodes[i].name)));
  for (const name of node.tensors) panel.append(tensorDetails(name));
}

// -- doing --------------------------------------------------------------------------------------------------------------

function holders(id) {
  const [kind, numberText] = id.split(":");
  let group = kind === "0" ? byId.get(firstGroup.get(Number(numberText))) : byId.get(byId.get(Number(numberText)).parent);
  const found = [];
  while (group) { found.push(group.id); group = byId.get(group.parent); }
  return found;
}
function show(id, { centre = false } = {}) {
  state.selected = id;
  holders(id).forEach((group) => state.open.add(group));
  render();
  details(id);
  if (centre) centreOn(id);
  const target = view.querySelector(`[data-id="${id}"]`);
  if (target && document.activeElement && document.activeElement.closest("#graph")) target.focus();
}
function toggle(id) {
  const group = Number(id.split(":")[1]);
  if (state.open.has(group)) state.open.delete(group); else state.open.add(group);
  show(id);
}
function centreOn(id) {
  const box = view.querySelector(`[data-id="${id}"] > rect`);
  if (!box) return;
  const [x, y, width] = ["x", "y", "width"].map((name) => Number(box.getAttribute(name)));
  state.x = svg.clientWidth / 2 - (x + Math.min(width, 400) / 2) * state.scale;
  state.y = svg.clientHeight / 3 - y * state.scale;
  place();
}
function zoom(factor, x = svg.clientWidth / 2, y = svg.clientHeight / 2) {
  const scale = Math.min(3, Math.max(0.03, state.scale * factor));
  state.x = x - (x - state.x) * scale / state.scale;
  state.y = y - (y - state.y) * scale / state.scale;
  state.scale = scale;
  place();
}
function fit() {
  const box = view.getBBox();
  state.scale = Math.min(1, Math.max(0.03, (svg.clientWidth - 30) / (box.width || 1)));
  state.x = (svg.clientWidth - box.width * state.scale) / 2 - box.x * state.scale;
  state.y = 10 - box.y * state.scale;
  place();
}
function side(name) {
  state.side = name;
  document.querySelectorAll("[data-side]").forEach((each) => each.setAttribute("aria-pressed", String(each.dataset.side === name)));
  render();
}
function search() {
  const words = $("search").value.trim().toLowerCase(), results = $("results");
  results.replaceChildren();
  if (!words) return;
  const fits = (text) => text.toLowerCase().includes(words);
  const found = [];
  for (const group of groups) if (group.id && fits(group.path || group.name)) found.push([`1:${group.id}`, group.path || group.name]);
  nodes.forEach((node, i) => { if (found.length < 200 && (fits(node.name) || node.tensors.some(fits))) found.push([`0:${i}`, node.name]); });
  for (const [id, name] of found.slice(0, 200)) results.append(link(id, name));
  if (!found.length) results.append(make("div", { class: "soft" }, "nothing is called so"));
}
function nextChange(step) {
  const changed = nodes.flatMap((node, i) => (node.status === "same" ? [] : [i]));
  if (!changed.length) return;
  const [kind, now] = (state.selected || "0:-1").split(":");
  const at = kind === "0" ? changed.indexOf(Number(now)) : -1;
  show(`0:${changed[(at + step + changed.length) % changed.length]}`, { centre: true });
}

document.addEventListener("click", (event) => {
  const side_ = event.target.closest("[data-side]"), act = event.target.closest("[data-act]");
  if (side_) side(side_.dataset.side);
  else if (act) ({ in: () => zoom(1.3), out: () => zoom(1 / 1.3), fit, next: () => nextChange(1) })[act.dataset.act]();
  else {
    const part = event.target.closest("[data-id]");
    if (!part || state.dragged) return;
    const id = part.dataset.id, inGraph = Boolean(part.closest("#graph"));
    if (id === "1:0") return;
    if (id.startsWith("1:") && (inGraph || part.closest("#tree"))) toggle(id); else show(id, { centre: !inGraph });
  }
});
document.addEventListener("keydown", (event) => {
  const typing = event.target.tagName === "INPUT", part = event.target.closest && event.target.closest("[data-id]");
  if (typing) {
    if (event.key === "Escape") { $("search").value = ""; search(); $("search").blur(); }
    if (event.key === "Enter" && $("results").firstChild && $("results").firstChild.dataset) show($("results").firstChild.dataset.id, { centre: true });
    if (event.key === "ArrowDown" && $("results").firstChild) { $("results").firstChild.focus(); event.preventDefault(); }
    return;
  }
  if (event.key === "Enter" || event.key === " ") {
    if (part && part.closest("#graph")) { event.preventDefault(); const id = part.dataset.id; if (id.startsWith("1:")) toggle(id); else show(id); }
    return;
  }
  const rows = [...document.querySelectorAll("nav .row")], at = rows.indexOf(event.target);
  if (at >= 0 && (event.key === "ArrowDown" || event.key === "ArrowUp")) {
    const next = rows[at + (event.key === "ArrowDown" ? 1 : -1)];
    if (next) next.focus();
    event.preventDefault();
  } else if (at >= 0 && (event.key === "ArrowRight" || event.key === "ArrowLeft") && event.target.dataset.id.startsWith("1:")) {
    const id = event.target.dataset.id, open = state.open.has(Number(id.slice(2)));
    if (open !== (event.key === "ArrowRight")) { toggle(id); const row = document.querySelector(`#tree [data-id="${id}"]`); if (row) row.focus(); }
  } else {
    const keys = { "/": () => $("search").focus(), b: () => side("before"), a: () => side("after"), x: () => side("both"),
      n: () => nextChange(1), p: () => nextChange(-1), f: fit, "+": () => zoom(1.3), "-": () => zoom(1 / 1.3) };
    if (!keys[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    keys[event.key]();
  }
});
$("search").addEventListener("input", search);
svg.addEventListener("wheel", (event) => {
  event.preventDefault();
  const box = svg.getBoundingClientRect();
  zoom(Math.exp(-event.deltaY / 500), event.clientX - box.left, event.clientY - box.top);
}, { passive: false });
svg.addEventListener("pointerdown", (event) => { state.drag = [event.clientX, event.clientY]; state.dragged = false; });
window.addEventListener("pointermove", (event) => {
  if (!state.drag) return;
  const dx = event.clientX - state.drag[0], dy = event.clientY - state.drag[1];
  if (!state.dragged && Math.hypot(dx, dy) < 4) return;
  state.dragged = true;
  state.x += dx; state.y += dy; state.drag = [event.clientX, event.clientY];
  place();
});
window.addEventListener("pointerup", () => { state.drag = null; });

function drawTreemap() {
  const map = draw("svg", { viewBox: "0 0 360 300", width: "100%", role: "img", "aria-label": "parameters by module" });
  const paths = new Map(groups.filter((group) => group.kind === "module").map((group) => [group.path, group.id]));
  for (const [x, y, width, height, path, count, kind] of data.treemap) {
    let owner = path;
    while (owner && !paths.has(owner)) owner = owner.slice(0, Math.max(0, owner.lastIndexOf(".")));
    const area = draw("g", { "data-id": `1:${paths.get(owner) || 0}` });
    area.append(draw("title", {}, `${path}: ${count.toLocaleString("en")} numbers`),
      draw("rect", { class: `area ${kind}`, x, y, width, height }));
    if (width > 50 && height > 14) area.append(draw("text", { class: "small", x: x + 3, y: y + 11 },
      short(path.split(".").slice(-2).join("."), Math.floor(width / 6))));
    map.append(area);
  }
  $("treemap").append(map);
}

render();
fit();
if (data.treemap) drawTreemap();
const first = nodes.findIndex((node) => node.status !== "same");
if (first >= 0) { // readable, at the first change
  state.scale = Math.max(state.scale, 0.8);
  const shown = [`0:${first}`, ...holders(`0:${first}`).map((group) => `1:${group}`)];
  const found = shown.find((id) => view.querySelector(`[data-id="${id}"]`));
  if (found) centreOn(found);
}
document.documentElement.dataset.ready = "true";
