// One function a kind of panel; each fills `box` for the chosen token and head.
const layerOf = (name) => name.split(".")[1];
const headsOf = (name) => D.sites[name].heads;

function placed(position) {
  const found = D.tokens.find((one) => one.position === position);
  return found ? `${found.text} at position ${position}` : `position ${position}`;
}

function scored(name) {  // value of a head's score of a drawn query and a drawn key, NaN where the mask hides it
  const site = D.sites[name], values = numbers(site.v), found = D.scores[layerOf(name)];
  return (head, q, k) => {
    const at = D.tokens[q].position, key = D.tokens[k].position;
    const shown = key >= found.first[at] && key < found.first[at] + found.count[at];
    return shown || name.endsWith("raw") ? values[(head * N + q) * N + k] : NaN;
  };
}

function heads(name, options) {  // one head large, all of them small
  const count = headsOf(name), value = scored(name), head = Math.min(state.head, count - 1);
  let most = 0;
  for (let h = 0; h < count; h++) for (let q = 0; q < N; q++) for (let k = 0; k < N; k++) most = Math.max(most, Math.abs(value(h, q, k)) || 0);
  const side = Math.max(9, Math.min(30, Math.floor(400 / N)));
  const paint = options.plain ? colour(D.scores[layerOf(name)].window ? "local" : "global") : null;
  const one = (h, width, extra = {}) => grid({ rows: N, columns: N, value: (q, k) => value(h, q, k), most, paint, width: `${width}px`, height: `${width}px`, ...extra });
  const tell = (h) => (q, k) => `head ${h}: ${spell(q)} looks at ${spell(k)}: ${format(value(h, q, k))}`;
  const labels = make("div", { class: "labels" });
  for (let i = 0; i < N; i++) labels.append(make("button", { class: i === state.token ? "on" : "", tabindex: -1, onclick: () => choose(i) }, token(i)));
  const below = make("div", { class: "below" });
  for (let i = 0; i < N; i++) below.append(token(i));
  const large = make("div", { class: "large" }, labels, one(head, side * N, { tell: tell(head), marked: state.token, choose: (q) => choose(q) }), make("span"), below);
  large.style.setProperty("--high", `${side}px`);
  const small = make("div", { class: "small" });
  for (let h = 0; h < count; h++) {
    small.append(make("button", { class: h === head ? "on" : "", "aria-pressed": h === head, onclick: () => pick(h) }, one(h, 76, { tell: tell(h) }), `head ${h}`));
  }
  const colours = options.plain ? [`full colour at ${format(most, 3)}`] : legend(most);
  return make("figure", {}, make("div", { class: "attention" }, large, small), make("figcaption", {}, `Head ${head}: rows are the tokens that look (queries), columns those that are looked at (keys); `, ...colours, options.masked ? "; grey is hidden by the mask." : "."));
}

const draws = {
  tokens(box) {
    const flow = make("div", { class: "flow" });
    D.tokens.forEach((one, i) => {
      if (i && one.position > D.tokens[i - 1].position + 1) flow.append(make("span", { class: "dim gap" }, `… ${(one.position - D.tokens[i - 1].position - 1).toLocaleString("en")} more …`));
      const name = one.id === D.bos && !i ? "BOS, " : "";
      flow.append(make("button", { class: i === state.token ? "on" : "", onclick: () => choose(i) }, token(i), make("small", {}, `${name}id ${one.id}`), make("small", {}, `position ${one.position}`)));
    });
    box.append(flow);
  },
  embedding(box, name) {
    const site = D.sites[name], rows = D.sites.rows;
    box.append(strips([
      { label: "row of the table", values: of(rows), note: `length ${format(lengthOf(rows), 3)}` },
      { label: `times ${format(D.scale)}`, values: of(site), note: `length ${format(lengthOf(site), 3)}` },
    ]), vectors(site), first(of(site)));
  },
  layers(box) {
    const at = (key) => (i) => numbers(D.layers[i][key])[state.token];
    box.append(
      columns([["attention adds", "attention-bar", at("attention")], ["the MLP adds", "mlp-bar", at("mlp")], ["the stream then has", "stream-bar", at("after")]],
        (i) => `${i} ${D.layers[i].local ? "local" : "global"}`, D.layers.length, () => false, (i) => { location.hash = `at-${i + 1}`; }),
      make("p", { class: "keyed" }, make("i", { class: "attention-bar" }), " attention adds ", make("i", { class: "mlp-bar" }), " the MLP adds ", make("i", { class: "stream-bar" }), " the residual stream after the layer"),
      facts(["stream before layer 0:", format(numbers(D.layers[0].before)[state.token])], ["after the last layer:", format(at("after")(D.layers.length - 1))]));
  },
  vectors(box, name) {
    const site = D.sites[name];
    box.append(vectors(site), first(of(site)), facts(["length", format(lengthOf(site))], ["largest numbers", top(site)]));
  },
  scale(box, name) {
    const inverse = numbers(D.sites[name].v);
    box.append(columns([["rms", "stream-bar", (i) => 1 / inverse[i]]]), make("p", { class: "keyed" }, "The root mean square (rms) of each token's vector, which is multiplied by 1 / rms."), first([inverse[state.token]], ", 1 / rms"),
      facts(["rms before", format(1 / inverse[state.token])], ["multiplied by", format(inverse[state.token])]));
  },
  normalized(box, name, [source, scale]) {
    const before = D.sites[source], after = D.sites[name], root = Math.sqrt(after.of);
    box.append(strips([
      { label: "before", values: of(before), note: `rms ${format(lengthOf(before) / root, 3)}` },
      { label: "after", values: of(after), note: `rms ${format(lengthOf(after) / root, 3)}` },
    ], true), first(of(after)), facts(["times", format(numbers(D.sites[scale].v)[state.token])], ["largest numbers", top(after)]));
  },
  gain(box, name, [source]) {
    const before = D.sites[source], after = D.sites[name];
    box.append(strips([
      { label: "normalized", values: of(before), note: `length ${format(lengthOf(before), 3)}` },
      { label: "gain, 1 + w", values: numbers(after.gain), from: 1, note: `${format(after.least, 3)} to ${format(after.most, 3)}` },
      { label: "result", values: of(after), note: `length ${format(lengthOf(after), 3)}` },
    ], true), make("p", { class: "keyed" }, "The gain is ", make("span", { class: "warm" }, "above 1"), " or ", make("span", { class: "cool" }, "below 1"), "; each row has colours of its own."), first(of(after)), facts(["gain: mean", format(after.mean)], ["least", format(after.least)], ["largest", format(after.most)], ["largest results", top(after)]));
  },
  heads(box, name) {
    const site = D.sites[name], w = site.width, count = site.heads, values = numbers(site.v).subarray(state.token * count * w);
    const called = name.endsWith("hook_k") ? "key head" : name.endsWith("hook_v") ? "value head" : "head", shared = called !== "head";
    const head = shared ? Math.floor(Math.min(state.head, count * D.group - 1) / D.group) : Math.min(state.head, count - 1);
    const readers = (h) => Array.from({ length: D.group }, (_, k) => h * D.group + k).join(", ");
    const labels = make("div", { class: "labels" });
    for (let h = 0; h < count; h++) labels.append(make("button", { class: h === head ? "on" : "", tabindex: -1, onclick: () => pick(shared ? h * D.group : h) }, shared ? `${called} ${h}, for heads ${readers(h)}` : `head ${h}`));
    const most = largest(values.subarray(0, count * w));
    const cells = grid({ rows: count, columns: w, most, height: `${count * 20}px`, marked: head, value: (r, c) => values[r * w + c], choose: (r) => pick(shared ? r * D.group : r), tell: (r, c) => `${called} ${r}, number ${c}: ${format(values[r * w + c])}` });
    const stacked = make("div", { class: "stacked" }, labels, cells);
    stacked.style.setProperty("--high", "20px");
    box.append(make("figure", {}, stacked, make("figcaption", {}, "The chosen token's heads below each other, ", `the first ${w} numbers of each, `, ...legend(most), ".")), first(values.subarray(head * w, head * w + w), `, ${called} ${head}`));
  },
  rotation(box, name) {
    const site = D.sites[name], shared = name.endsWith("_k");
    const head = Math.min(shared ? Math.floor(state.head / D.group) : state.head, site.heads - 1), p = site.pairs.length;
    const start = (state.token * site.heads + head) * p * 2;
    const before = numbers(site.before).subarray(start), after = numbers(site.after).subarray(start);
    const row = make("div", { class: "dials" });
    site.pairs.forEach((pair, k) => {
      const [a, b, x, y] = [before[2 * k], before[2 * k + 1], after[2 * k], after[2 * k + 1]];
      const size = Math.hypot(a, b) || 1, turn = ((((Math.atan2(y, x) - Math.atan2(b, a)) * 180) / Math.PI) % 360 + 360) % 360;
      const arm = (u, v, kind) => make("svg:line", { x1: 0, y1: 0, x2: (40 * u) / size, y2: (-40 * v) / size, class: kind });
      const dial = make("svg:svg", { viewBox: "-48 -48 96 96", role: "img", "aria-label": `pair ${pair}` }, make("svg:circle", { r: 42, class: "ring" }), arm(a, b, "was"), arm(x, y, "is"));
      row.append(make("div", {}, dial, make("small", {}, `numbers ${pair}, ${pair + site.half}`), make("small", {}, `turned by ${format(turn > 359.95 ? 0 : turn, 3)}°`)));
    });
    const wide = numbers(D.sites[name].v).subarray((state.token * site.heads + head) * site.width);
    box.append(make("figure", {}, row, make("figcaption", {}, `Some pairs of ${shared ? "key head" : "head"} ${head}, before (dotted) and after. The token stands at position ${D.tokens[state.token].position}; full turns are left out of the angles, and the length stays.`)), first(wide.subarray(0, site.width), `, ${shared ? "key head" : "head"} ${head}`));
  },
  scores(box, name) {
    const head = Math.min(state.head, headsOf(name) - 1), value = scored(name);
    const row = Array.from({ length: N }, (_, k) => value(head, state.token, k));
    box.append(heads(name, {}), first(row, `, head ${head}, looking at the first tokens`));
  },
  cap(box, name, [source]) {
    const found = D.scores[layerOf(name)], cap = D.cap, value = scored(source);
    const bent = (x) => cap * Math.tanh(x / cap), slope = 1 - Math.tanh(found.most / cap) ** 2;
    const head = Math.min(state.head, headsOf(source) - 1), dots = [];
    for (let k = 0; k < N; k++) {
      const at = D.tokens[state.token].position, key = D.tokens[k].position;
      if (key < found.first[at] || key >= found.first[at] + found.count[at]) continue;
      const x = value(head, state.token, k);
      dots.push([x, bent(x), `${spell(k)}: ${format(x)} becomes ${format(bent(x))}`]);
    }
    dots.push([found.most, bent(found.most), `the largest of the layer: ${format(found.most)}`, "most"]);
    const [h, q, k] = found.at;
    box.append(make("figure", {}, plot({ curve: bent, low: -found.reach, high: found.reach, bottom: -1.1 * cap, up: 1.1 * cap, across: [-cap, cap], bins: { low: -found.reach, high: found.reach, counts: found.bins }, dots, x: "raw score", y: "after the cap" }),
      make("figcaption", {}, "The curve bends scores between the two dashed lines, the cap. Dots are the scores of ", token(state.token), ` in head ${head}; the ring is the largest score of the layer. Below, on a logarithmic scale, how many scores of all heads and tokens are where.`)),
    facts(["largest score", format(found.most)], ["it becomes", format(bent(found.most))], ["as a share of the cap", percent(Math.abs(found.most) / cap)], ["slope there", format(slope, 3)], ["mean size of a score", format(found.mean, 3)], ["scores beyond half the cap", found.half ? percent(found.half) : "none"]),
    make("p", { class: "dim" }, `The largest score is in head ${h}, where ${placed(q)} looks at ${placed(k)}.`));
  },
  mask(box, name) {
    const found = D.scores[layerOf(name)], t = D.length, step = Math.ceil(t / 384), n = Math.ceil(t / step), at = D.tokens[state.token].position;
    const sees = (q, k) => k >= found.first[q] && k < found.first[q] + found.count[q];
    const side = Math.min(360, n * Math.max(1, Math.min(22, Math.floor(360 / n))));
    const cells = grid({ rows: n, columns: n, most: 1, paint: colour(found.window ? "local" : "global"), width: `${side}px`, height: `${side}px`, marked: t > 200 ? -1 : Math.floor(at / step), value: (q, k) => (sees(q * step, k * step) ? (q * step === at ? 1 : 0.55) : k > q ? 0 : NaN), tell: (q, k) => `position ${q * step} ${sees(q * step, k * step) ? "sees" : "does not see"} position ${k * step}` });
    const from = found.first[at], last = from + found.count[at] - 1;
    const words = make("div", {});
    words.append(make("p", {}, token(state.token), ` at position ${at} sees ${found.count[at].toLocaleString("en")} key${found.count[at] === 1 ? "" : "s"}: position${from === last ? "" : "s"} ${from === last ? from : `${from} to ${last}`}.`));
    if (found.window) {
      const ruler = make("div", { class: "ruler" });
      const most = Math.max(t, found.window);
      for (const [what, size, kind] of [["window", found.window, "local"], ["text", t, "dim"]]) {
        const bar = make("i", { class: kind });
        bar.style.width = `${(100 * size) / most}%`;
        ruler.append(make("span", {}, `${what} ${size.toLocaleString("en")}`), make("div", {}, bar));
      }
      words.append(ruler, make("p", {}, t > found.window ? `Grey keys are ${found.window.toLocaleString("en")} or more positions back: a global layer would see them.` : "This text fits into the window, so here the layer hides nothing that a global layer would show."));
    }
    words.append(facts(["keys seen, of those that are not later", percent(found.seen)]));
    box.append(make("figure", { class: "beside" }, make("div", {}, cells, make("figcaption", {}, `rows look, columns are looked at; all ${t.toLocaleString("en")} positions`)), words));
  },
  masked(box, name, [source]) {
    const value = scored(name), raw = scored(source), head = Math.min(state.head, headsOf(name) - 1);
    const row = Array.from({ length: N }, (_, k) => value(head, state.token, k));
    let moved = 0;
    for (let k = 0; k < N; k++) if (!Number.isNaN(row[k])) moved = Math.max(moved, Math.abs(row[k] - raw(head, state.token, k)));
    box.append(heads(name, { masked: true }), first(row, `, head ${head}, looking at the first tokens`), facts([`the cap moved a ${D.length > N ? "drawn " : ""}score of this row by at most`, format(moved, 3)]));
  },
  pattern(box, name) {
    const head = Math.min(state.head, headsOf(name) - 1), value = scored(name);
    const row = Array.from({ length: N }, (_, k) => value(head, state.token, k) || 0);
    const rest = numbers(D.sites[name].rest)[head * N + state.token];
    const best = row.map((x, k) => [x, k]).sort((a, b) => b[0] - a[0]).slice(0, 3);
    const sum = row.reduce((a, b) => a + b, 0);
    box.append(heads(name, { plain: true, masked: true }), make("p", {}, token(state.token), ` in head ${head} looks at`), columns([["weight", D.scores[layerOf(name)].window ? "local-bar" : "global-bar", (k) => row[k]]]),
      first(row, `, head ${head}, on the first tokens`), facts([D.length > N ? "most on, of the drawn tokens" : "most on", best.map(([x, k]) => `${D.tokens[k].text} ${format(x, 3)}`).join(", ")], ["sum", format(sum + rest, 4)], ...(D.length > N ? [["of that on tokens that are not drawn", format(rest, 3)]] : [])));
  },
  sum(box, name, [before, added]) {
    const [a, b, c] = [before, added, name].map((one) => D.sites[one]);
    const row = (site, label) => ({ label, values: of(site), note: `length ${format(lengthOf(site), 3)}` });
    box.append(strips([row(a, "before"), row(b, "+ added"), row(c, "= after")]),
      columns([["before", "stream-bar faint", (i) => lengthOf(a, i)], ["added", name.endsWith("mid") ? "attention-bar" : "mlp-bar", (i) => lengthOf(b, i)], ["after", "stream-bar", (i) => lengthOf(c, i)]]),
      make("p", { class: "keyed" }, make("i", { class: "stream-bar faint" }), " length before ", make("i", { class: name.endsWith("mid") ? "attention-bar" : "mlp-bar" }), " of what is added ", make("i", { class: "stream-bar" }), " after"),
      first(of(c)), facts(["what is added is", `${percent(lengthOf(b) / lengthOf(a))} as long as the stream before`], ["largest numbers", top(c)]));
  },
  gelu(box, name) {
    const site = D.sites[name], gelu = (x) => 0.5 * x * (1 + Math.tanh(Math.sqrt(2 / Math.PI) * (x + 0.044715 * x ** 3)));
    const reach = Math.max(site.reach, 2), dots = Array.from(of(site), (x, i) => [x, gelu(x), `neuron ${i}: ${format(x)}`]);
    box.append(make("figure", {}, plot({ curve: gelu, low: -reach, high: reach, bottom: -0.5, up: reach, bins: { low: -site.reach, high: site.reach, counts: site.hist[state.token] }, dots, x: "gate", y: "GELU(gate)" }),
      make("figcaption", {}, `The curve is GELU; dots are the first ${site.width} neurons of the chosen token. Below, on a logarithmic scale, all ${site.of.toLocaleString("en")} of them.`)),
    first(of(site)), facts(["gates above 0", percent(numbers(site.positive)[state.token])], ["largest", top(site)]));
  },
  spread(box, name) {
    const site = D.sites[name];
    box.append(strips([{ label: `first ${site.width}`, values: of(site), note: `of ${site.of.toLocaleString("en")}` }]), first(of(site)), facts(["length", format(lengthOf(site))], ["largest", top(site)]));
  },
  product(box, name, [gate, up]) {
    const [a, b, c] = [gate, up, name].map((one) => D.sites[one]);
    box.append(strips([{ label: "gate", values: of(a) }, { label: "beside it", values: of(b) }, { label: "product", values: of(c) }], true), first(of(c)), facts(["length", format(lengthOf(c))], ["largest, by neuron", top(c)]));
  },
  logits(box, name) {
    const site = D.sites[name], all = D.next, best = numbers(all.raw).subarray(state.token * all.ids[0].length);
    box.append(make("figure", {}, plot({ low: -all.reach, high: all.reach, bottom: 0, up: 1, bins: { low: -all.reach, high: all.reach, counts: all.hist[state.token] }, lines: [best[0]], x: "raw logit" }), make("figcaption", {}, `How many of the ${site.of.toLocaleString("en")} raw logits are where, on a logarithmic scale; the dashed line is the largest, that of `, make("span", { class: "token" }, all.text[state.token][0]), ".")),
      first(of(site)), facts(["largest", `${all.text[state.token][0]} ${format(best[0])}`]));
  },
  final(box, name) {
    const site = D.sites[name], cap = D.final, all = D.next, k = all.ids[0].length, bent = (x) => cap * Math.tanh(x / cap), reach = Math.max(all.reach, 1.2 * cap);
    const raw = numbers(all.raw).subarray(state.token * k, state.token * k + k), capped = numbers(all.capped).subarray(state.token * k, state.token * k + k);
    const dots = Array.from(raw, (x, i) => [x, capped[i], `${all.text[state.token][i]}: ${format(x)} becomes ${format(capped[i])}`]);
    box.append(make("figure", {}, plot({ curve: bent, low: -reach, high: reach, bottom: -1.1 * cap, up: 1.1 * cap, across: [-cap, cap], bins: { low: -all.reach, high: all.reach, counts: all.hist[state.token] }, dots, x: "raw logit", y: "logit" }), make("figcaption", {}, "Dots are the ten likeliest tokens. Below, on a logarithmic scale, the raw logits of all tokens.")),
      first(of(site)), facts(["largest raw logit", format(raw[0])], ["it becomes", format(capped[0])], ["as a share of the cap", percent(Math.abs(raw[0]) / cap)], ["slope there", format(1 - Math.tanh(raw[0] / cap) ** 2, 3)]));
  },
  next(box) {
    const all = D.next, k = all.ids[0].length, at = state.token * k, table = make("table", { class: "next" });
    table.append(make("tr", {}, ...["token", "id", "raw logit", "logit", "probability", "", "without the cap"].map((one) => make("th", {}, one))));
    for (let i = 0; i < k; i++) {
      const [raw, capped, chance, bare] = ["raw", "capped", "chance", "bare"].map((key) => numbers(all[key])[at + i]);
      const bar = make("i", {});
      bar.style.width = `${12 * chance}rem`;
      const cells = [all.ids[state.token][i], format(raw), format(capped), format(chance, 3)].map((one) => make("td", { class: "number" }, String(one)));
      table.append(make("tr", {}, make("td", {}, make("span", { class: "token" }, all.text[state.token][i])), ...cells, make("td", {}, bar), make("td", { class: "number" }, format(bare, 3))));
    }
    const came = state.token < N - 1 && D.tokens[state.token + 1].position === D.tokens[state.token].position + 1;
    box.append(make("p", {}, "After ", token(state.token), came ? " the text goes on with " : " the text ends, and the model expects:", came ? token(state.token + 1) : "", came ? "; the model expects:" : ""), make("div", { class: "scroll" }, table));
  },
};

const panels = Array.from(document.querySelectorAll(".panel"), (element) => ({ element, box: element.querySelector(".draw"), draw: draws[element.dataset.draws], beside: JSON.parse(element.dataset.beside), stale: true }));

function render(panel) {
  panel.stale = false;
  panel.box.replaceChildren();
  panel.draw(panel.box, panel.element.id, panel.beside);
}

let waiting = 0;
function refresh() {  // what is in view at once, the rest when there is time
  const strip = document.querySelector(".strip");
  strip.replaceChildren(...D.tokens.map((one, i) => make("button", { class: `${i === state.token ? "on" : ""} ${i === GAP ? "after-gap" : ""}`, "aria-pressed": i === state.token, title: `position ${one.position}, id ${one.id}`, onclick: () => choose(i) }, token(i))));
  const chosen = strip.children[state.token];
  strip.scrollLeft = chosen.offsetLeft - strip.clientWidth / 2;
  for (const panel of panels) panel.stale = true;
  for (const panel of panels) {
    const frame = panel.element.getBoundingClientRect();
    if (frame.bottom > -200 && frame.top < innerHeight + 200) render(panel);
  }
  clearTimeout(waiting);
  waiting = setTimeout(function more() {
    const end = performance.now() + 12;
    for (const panel of panels) {
      if (panel.stale) render(panel);
      if (performance.now() > end) break;
    }
    if (panels.some((panel) => panel.stale)) waiting = setTimeout(more, 0);
  }, 0);
}

function choose(i) { state.token = Math.max(0, Math.min(N - 1, i)); point(null, ""); refresh(); }
function pick(h) { const most = Math.max(1, ...Object.values(D.sites).map((site) => site.heads || 0)); state.head = Math.max(0, Math.min(most - 1, h)); point(null, ""); refresh(); }

let current = 0;
function go(step) {
  current = Math.max(0, Math.min(panels.length - 1, current + step));
  const to = panels[current].element;
  to.scrollIntoView({ block: "start" });
  to.focus({ preventScroll: true });
}

function follow() {  // mark in the side's list what is being read
  let at = 0;
  panels.forEach((panel, i) => { if (panel.element.getBoundingClientRect().top < 160) at = i; });
  current = at;
  for (const link of document.querySelectorAll("nav a.on")) link.classList.remove("on");
  const link = document.querySelector(`nav a[href="#${CSS.escape(panels[at].element.id)}"]`) || Array.from(document.querySelectorAll("nav a")).find((one) => one.hash === `#${panels[at].element.id}`);
  if (!link) return;
  link.classList.add("on");
  for (const item of document.querySelectorAll("nav > ol > li")) item.classList.toggle("open", item.contains(link));
  const list = document.querySelector("nav");
  const y = link.getBoundingClientRect().top - list.getBoundingClientRect().top;
  if (y < 20 || y > list.clientHeight - 30) list.scrollTop += y - list.clientHeight / 2;
}

function reveal() {  // a summary that a link leads to opens
  const to = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (to && to.tagName === "DETAILS") to.open = true;
}

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const acts = { ArrowLeft: () => choose(state.token - 1), ArrowRight: () => choose(state.token + 1), j: () => go(1), k: () => go(-1), "[": () => pick(state.head - 1), "]": () => pick(state.head + 1) };
  if (acts[event.key]) { event.preventDefault(); acts[event.key](); }
});
addEventListener("scroll", () => requestAnimationFrame(follow), { passive: true });
addEventListener("hashchange", reveal);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", refresh);
refresh();
reveal();
follow();
