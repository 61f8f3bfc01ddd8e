// What drawings are made of: numbers, elements, grids of coloured cells, columns, curves.
const D = JSON.parse(document.getElementById("data").textContent);
const N = D.tokens.length;
const GAP = D.tokens.findIndex((one, i) => i && one.position > D.tokens[i - 1].position + 1); // first after those left out
const state = { token: N - 1, head: 0 };
const SVG = "http://www.w3.org/2000/svg";
const unpacked = new Map();

// Arrays come as base64 of little-endian float32.
function numbers(text) {
  if (!unpacked.has(text)) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    unpacked.set(text, new Float32Array(bytes.buffer));
  }
  return unpacked.get(text);
}

function format(x, digits = 4) {
  if (x === 0) return "0";
  if (!Number.isFinite(x)) return "hidden";
  const size = Math.abs(x);
  const text = size >= 1e5 || size < 1e-4 ? x.toExponential(digits - 1) : String(Number(x.toPrecision(digits)));
  return text.replace("-", "−").replace("e−", "e-");
}

const percent = (x) => (x > 0 && x < 0.0095 ? "less than 1 %" : `${Math.round(100 * x)} %`);

function make(tag, attributes = {}, ...children) {
  const found = tag.startsWith("svg:") ? document.createElementNS(SVG, tag.slice(4)) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else if (value !== undefined) found.setAttribute(key, value);
  }
  found.append(...children);
  return found;
}

const token = (i) => make("span", { class: "token" }, D.tokens[i].text);
const spell = (i) => `${D.tokens[i].text} (${D.tokens[i].position})`;

// Colours of the theme that is on, as [r, g, b].
function colour(name) {
  const value = getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  if (!value.startsWith("#")) return value.split(",").map(Number);
  return [1, 3, 5].map((at) => parseInt(value.slice(at, at + 2), 16));
}

const tip = document.querySelector(".tip");
function point(event, text) {
  tip.hidden = !text;
  if (!text) return;
  tip.textContent = text;
  const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
  tip.style.transform = `translate(${left}px, ${event.clientY + 18}px)`;
}

// One pixel a cell, which the style stretches. value(r, c) is a number, NaN for a hidden cell; most has the full colour.
function grid({ rows, columns, value, most, paint = null, width = "100%", height, tell, marked = -1, choose = null }) {
  const canvas = make("canvas", { width: columns, height: rows });
  const brush = canvas.getContext("2d"), image = brush.createImageData(columns, rows);
  const [warm, cool, hidden] = [paint || colour("warm"), colour("cool"), colour("line")];
  for (let r = 0, at = 0; r < rows; r++) {
    for (let c = 0; c < columns; c++, at += 4) {
      const x = value(r, c), part = Math.min(1, Math.abs(x) / (most || 1));
      image.data.set(Number.isNaN(x) ? [...hidden, 170] : [...(x < 0 ? cool : warm), 255 * Math.pow(part, 0.7)], at);
    }
  }
  brush.putImageData(image, 0, 0);
  canvas.style.width = width;
  canvas.style.height = height;
  const box = make("div", { class: "cells" }, canvas);
  box.style.width = width;
  if (marked >= 0) {
    const mark = make("i", { class: "mark" });
    mark.style.top = `${(100 * marked) / rows}%`;
    mark.style.height = `${100 / rows}%`;
    box.append(mark);
  }
  if (GAP > 0 && rows === N) box.append(cut("top"));
  if (GAP > 0 && columns === N && rows === N) box.append(cut("left"));
  const place = (event) => {
    const frame = canvas.getBoundingClientRect();
    const r = Math.floor((rows * (event.clientY - frame.top)) / frame.height);
    const c = Math.floor((columns * (event.clientX - frame.left)) / frame.width);
    return [Math.max(0, Math.min(rows - 1, r)), Math.max(0, Math.min(columns - 1, c))];
  };
  box.addEventListener("mousemove", (event) => point(event, tell(...place(event))));
  box.addEventListener("mouseleave", (event) => point(event, ""));
  if (choose) box.addEventListener("click", (event) => choose(...place(event)));
  return box;
}

function cut(side) {  // the line where tokens are left out
  const line = make("i", { class: `cutting ${side}` });
  line.style[side] = `${(100 * GAP) / N}%`;
  return line;
}

function largest(values) {
  let most = 0;
  for (const x of values) if (Number.isFinite(x)) most = Math.max(most, Math.abs(x));
  return most;
}

const rowHeight = () => (N <= 16 ? 20 : 13);

// All drawn tokens below each other, each with the first numbers of its vector and its length.
function vectors(site) {
  const values = numbers(site.v), lengths = numbers(site.length), w = site.width, high = rowHeight();
  const labels = make("div", { class: "labels" }), ends = make("div", { class: "ends" });
  for (let i = 0; i < N; i++) {
    labels.append(make("button", { class: i === state.token ? "on" : "", tabindex: -1, onclick: () => choose(i) }, token(i)));
    const bar = make("i", { class: "bar" });
    bar.style.width = `${(4.5 * lengths[i]) / largest(lengths)}rem`;
    ends.append(make("div", {}, bar, format(lengths[i], 3)));
  }
  const cells = grid({
    rows: N, columns: w, most: largest(values), height: `${N * high}px`, marked: state.token,
    value: (r, c) => values[r * w + c], choose: (r) => choose(r),
    tell: (r, c) => `${spell(r)}, number ${c}: ${format(values[r * w + c])}`,
  });
  const box = make("div", { class: "stacked" }, labels, cells, ends);
  box.style.setProperty("--high", `${high}px`);
  const more = site.of > w ? `the first ${w} of ${site.of.toLocaleString("en")} numbers` : `all ${w} numbers`;
  return make("figure", {}, box, make("figcaption", {}, `Each row is a token: ${more}, `, ...legend(largest(values)), "; at the right the length of the whole vector."));
}

function legend(most) {
  return [make("span", { class: "warm" }, "above 0"), " and ", make("span", { class: "cool" }, "below 0"), `, full colour at ±${format(most, 3)}`];
}

// Vectors of the chosen token below each other, on one scale of colours unless each has its own.
function strips(parts, own = false) {
  const all = Math.max(...parts.map((part) => largest(part.values)));
  const box = make("div", { class: "strips" });
  for (const { label, values, note, from = 0 } of parts) {  // from: the value without colour
    const most = own ? largest(values.map((x) => x - from)) : all;
    const cells = grid({
      rows: 1, columns: values.length, most, height: "26px",
      value: (r, c) => values[c] - from, tell: (r, c) => `${label}, number ${c}: ${format(values[c])}`,
    });
    box.append(make("div", {}, label), cells, make("div", { class: "note" }, note || ""));
  }
  return box;
}

const of = (site, i = state.token) => numbers(site.v).subarray(i * site.width, (i + 1) * site.width);
const lengthOf = (site, i = state.token) => numbers(site.length)[i];

// Values of the chosen token as text, and what else is worth a number.
function facts(...pairs) {
  const line = make("p", { class: "facts" });
  for (const [what, value] of pairs) line.append(make("span", {}, `${what} `, make("b", {}, value)));
  return line;
}

function first(values, what = "") {
  const shown = Array.from(values.slice(0, 6), (x) => format(x)).join("  ");
  return make("p", { class: "first" }, "first values of ", token(state.token), `${what}: `, make("code", { class: "values" }, shown));
}

const top = (site) => site.place[state.token].map((at, k) => `${at}: ${format(numbers(site.largest)[state.token * site.place[0].length + k], 3)}`).join(", ");

// One column a token: series are [name, class, value(i)].
function columns(series, label = (i) => D.tokens[i].text, count = N, chosen = (i) => i === state.token, pick = (i) => choose(i)) {
  let most = 0;
  for (const [, , value] of series) for (let i = 0; i < count; i++) most = Math.max(most, value(i));
  const box = make("div", { class: count > 20 ? "columns-of dense" : "columns-of" });
  for (let i = 0; i < count; i++) {
    const bars = make("div", { class: "bars" });
    for (const [name, kind, value] of series) {
      const bar = make("i", { class: kind });
      bar.style.height = `${Math.max(0.5, (100 * value(i)) / (most || 1))}%`;
      bars.append(bar);
    }
    const told = () => `${label(i)}: ${series.map(([name, , value]) => `${name} ${format(value(i))}`).join(", ")}`;
    const mark = `${chosen(i) ? "on" : ""} ${GAP > 0 && i === GAP && count === N ? "after-gap" : ""}`;
    const value = series.length === 1 && count <= 20 ? [make("small", {}, format(series[0][2](i), 3))] : [];
    box.append(make("button", {
      class: mark, tabindex: -1, onclick: () => pick(i), onmousemove: (event) => point(event, told()), onmouseleave: (event) => point(event, ""),
    }, bars, make("span", { class: "token" }, label(i)), ...value));
  }
  return box;
}

// A plot of a curve over a histogram, in real units.
function plot({ curve, low, high, bottom, up, bins, dots = [], lines = [], across = [], x = "", y = "" }) {
  const [w, h, left, base] = curve ? [640, 300, 46, 262] : [640, 170, 46, 132];
  const px = (v) => left + ((v - low) / (high - low)) * (w - left - 10);
  const py = (v) => base - ((v - bottom) / (up - bottom)) * (base - 12);
  const root = make("svg:svg", { viewBox: `0 0 ${w} ${h}`, class: "plot", role: "img", "aria-label": `${y} against ${x}` });
  const most = Math.log1p(Math.max(...bins.counts));
  bins.counts.forEach((count, i) => {
    if (!count) return;
    const size = (bins.high - bins.low) / bins.counts.length, from = px(bins.low + i * size), to = px(bins.low + (i + 1) * size);
    const tall = 90 * (Math.log1p(count) / most);
    const bar = make("svg:rect", { x: from, y: base - tall, width: Math.max(1, to - from - 1), height: tall, class: "bin" });
    bar.append(make("svg:title", {}, `${count.toLocaleString("en")} between ${format(bins.low + i * size, 3)} and ${format(bins.low + (i + 1) * size, 3)}`));
    root.append(bar);
  });
  for (const at of lines) root.append(make("svg:line", { x1: px(at), x2: px(at), y1: 12, y2: base, class: "edge" }));
  for (const at of across) root.append(make("svg:line", { x1: left, x2: w - 10, y1: py(at), y2: py(at), class: "edge" }));
  const path = (fn) => Array.from({ length: 121 }, (_, i) => low + ((high - low) * i) / 120).filter((v) => fn(v) >= bottom && fn(v) <= up).map((v, i) => `${i ? "L" : "M"}${px(v).toFixed(1)} ${py(fn(v)).toFixed(1)}`).join("");
  if (curve) root.append(make("svg:path", { d: path((v) => v), class: "edge" }), make("svg:path", { d: path(curve), class: "curve" }));
  for (const [dx, dy, text, kind] of dots) {
    const dot = make("svg:circle", { cx: px(dx), cy: py(dy), r: 4, class: kind || "dot" });
    dot.append(make("svg:title", {}, text));
    root.append(dot);
  }
  root.append(make("svg:line", { x1: left, x2: w - 10, y1: base, y2: base, class: "axis" }));
  for (const at of ticks(low, high)) root.append(make("svg:text", { x: px(at), y: base + 16, "text-anchor": "middle" }, format(at)));
  if (curve) for (const at of ticks(bottom, up)) root.append(make("svg:text", { x: left - 6, y: py(at) + 4, "text-anchor": "end" }, format(at)));
  root.append(make("svg:text", { x: w - 10, y: base + 33, "text-anchor": "end", class: "name" }, x), make("svg:text", { x: 0, y: 10, class: "name" }, curve ? y : ""));
  return root;
}

function ticks(low, high) {
  const rough = (high - low) / 6, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((k) => k * power >= rough);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + 1e-9; at += step) found.push(Number(at.toPrecision(6)));
  return found;
}
