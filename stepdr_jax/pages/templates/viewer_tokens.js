// The token view of an episode: its ids as text, coloured by one of their numbers. All text is untrusted: textContent only.
const el = (name, className, ...children) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  for (const child of children) if (child !== null && child !== undefined) node.append(child);
  return node;
};
const shown = (v) => v === null || v === undefined ? "–" : (v === 0 ? "0" : Math.abs(v) >= 100 ? v.toFixed(0) : Math.abs(v) < 1e-3 ? v.toExponential(1) : String(Number(v.toPrecision(3)))).replaceAll("-", "−");

const tokenTexts = (ids, vocabulary) => {
  // Text of each token. Bytes that only make a character together stand at the last of their tokens, the others are "".
  const texts = [], decoder = new TextDecoder("utf-8");
  let missing = 0; // bytes that the last character still lacks
  const close = () => { if (missing) texts[texts.length - 1] += decoder.decode(); missing = 0; };
  for (const id of ids) {
    const piece = vocabulary[id];
    if (!Array.isArray(piece)) { close(); texts.push(piece ?? `⟨${id}⟩`); continue; }
    if ((piece[0] & 0xc0) !== 0x80) close();
    for (const byte of piece) missing = (byte & 0xc0) === 0x80 ? Math.max(0, missing - 1) : byte >= 0xf0 ? 3 : byte >= 0xe0 ? 2 : byte >= 0xc0 ? 1 : 0;
    texts.push(decoder.decode(Uint8Array.from(piece), { stream: true }));
  }
  close();
  return texts;
};

// Characters that reorder what stands around them are named, so that no text can pose as other text.
const unmasked = (text) => text.replace(/[\u200e\u200f\u202a-\u202e\u2066-\u2069]/g, (c) => `⟨U+${c.charCodeAt(0).toString(16).toUpperCase()}⟩`);

const MODES = {
  advantage: { title: "Advantage", unit: "of reward, before whitening; blue raises the token's probability, orange lowers it" },
  value: { title: "Value", unit: "reward that the critic expected here, before its update" },
  gap: { title: "Log-prob gap", unit: "nats, trainer − sampler; float32: below 1e−4 in the mean and 1e−3 at most, bfloat16: below 0.02 in the mean", least: 1e-3 },
  sampler: { title: "Log-prob", unit: "nats, of the sampler; strong: a token that was unlikely" },
};
let tokenMode = "advantage", sameScale = true;
const tip = document.body.appendChild(el("div", "tip token-tip"));
tip.hidden = true; tip.setAttribute("role", "status");

const tokenView = (episode, vocabulary, scales) => {
  const data = episode.tokens, texts = tokenTexts(data.ids, vocabulary);
  const series = { ...data };
  if (data.trainer && data.sampler) series.gap = data.trainer.map((v, i) => v === null || data.sampler[i] === null ? null : v - data.sampler[i]);
  if (!series.sampler && data.trainer) series.sampler = data.trainer;
  const modes = Object.keys(MODES).filter((name) => series[name]);
  const bar = el("div", "modes"), legend = el("div", "key"), curves = el("div", "curves"), box = el("div", "tokens");
  const spans = [], turns = [], where = []; // where[k]: [position, turn]
  box.tabIndex = 0; box.setAttribute("role", "group");
  box.setAttribute("aria-label", "Tokens; arrow keys walk through the sampled ones");

  let at = 0, turn = 0;
  data.runs.forEach((length, run) => {
    const end = at + length;
    if (length && run % 2 === 0) {
      const label = `${turn ? "Observation" : "Prompt"} · ${length} tokens, not sampled`;
      box.append(el("div", "given", el("div", "who", label), unmasked(texts.slice(at, end).join(""))));
    } else if (length) {
      turn += 1; turns.push(spans.length);
      const version = data.version ? ` · weights of version ${[...new Set(data.version.slice(spans.length, spans.length + length))].join(", ")}` : "";
      const block = el("div", "turn", el("div", "who", `Turn ${turn} · ${length} tokens sampled${version}`));
      for (let i = at; i < end; i += 1) {
        const whole = texts[i] !== "" && !/^\s+$/.test(texts[i]);
        const span = el("span", whole ? "" : "part", texts[i] === "" ? "·" : unmasked(texts[i]).replace(/\n/g, "↵\n"));
        span.dataset.k = spans.length;
        where.push([i, turn]); spans.push(span); block.append(span);
      }
      box.append(block);
    }
    at = end;
  });

  // ---- what is said of one token
  let chosen = -1;
  const leave = () => { tip.hidden = true; if (chosen >= 0) spans[chosen].classList.remove("chosen"); chosen = -1; };
  const bytesOf = (i) => Array.isArray(vocabulary[data.ids[i]]) ? vocabulary[data.ids[i]].map((b) => b.toString(16).padStart(2, "0")).join(" ") : null;
  const choose = (k, scroll) => {
    if (k < 0 || k >= spans.length) return;
    if (chosen >= 0) spans[chosen].classList.remove("chosen");
    chosen = k; spans[k].classList.add("chosen");
    const [i, of] = where[k], bytes = bytesOf(i), number = (name) => series[name] ? series[name][k] : undefined;
    const rows = [[JSON.stringify(unmasked(texts[i])) + (bytes ? ` bytes ${bytes}` : ""), `id ${data.ids[i]}`], ["turn", `${of}, token ${k + 1} of ${spans.length}`]];
    if (number("advantage") !== undefined) rows.push(["advantage", shown(number("advantage"))]);
    if (number("value") !== undefined) rows.push(["value", shown(number("value"))]);
    for (const name of ["sampler", "trainer"]) if (data[name]) rows.push([`log-prob, ${name}`, shown(data[name][k]) + (data[name][k] === null ? "" : ` (p ${shown(Math.exp(data[name][k]))})`)]);
    if (series.gap) rows.push(["gap", shown(series.gap[k])]);
    if (data.version) rows.push(["weights", `version ${data.version[k]}`]);
    tip.replaceChildren(...rows.map(([name, value]) => el("div", "", el("span", "", name), el("span", "", value))));
    tip.hidden = false;
    if (scroll) spans[k].scrollIntoView({ block: "nearest" });
    const place = spans[k].getBoundingClientRect(), size = tip.getBoundingClientRect(), wide = document.documentElement.clientWidth;
    const below = place.bottom + 8 + size.height < document.documentElement.clientHeight;
    tip.style.left = Math.max(8, Math.min(place.left, wide - size.width - 8)) + "px";
    tip.style.top = (below ? place.bottom + 8 : Math.max(8, place.top - size.height - 8)) + "px";
  };
  const under = (event) => { const span = event.target.closest("[data-k]"); return span ? Number(span.dataset.k) : -1; };
  box.addEventListener("pointerover", (event) => { const k = under(event); if (k >= 0) choose(k); else leave(); });
  box.addEventListener("pointerleave", leave);
  box.addEventListener("focus", () => { if (chosen < 0 && box.matches(":focus-visible")) choose(0, true); });
  box.addEventListener("blur", leave);
  box.addEventListener("keydown", (event) => {
    const next = { ArrowRight: chosen + 1, ArrowLeft: chosen - 1, Home: 0, End: spans.length - 1 }[event.key];
    const other = { ArrowDown: turns.find((k) => k > chosen), ArrowUp: turns.findLast((k) => k < chosen) }[event.key];
    if (event.key === "Escape") leave();
    if (next === undefined && other === undefined) return;
    event.preventDefault(); event.stopPropagation(); choose(next ?? other, true);
  });

  // ---- colours
  const draw = (mode) => {
    const values = mode ? series[mode] : [], finite = values.filter((v) => v !== null);
    const own = Math.max(...finite.map(Math.abs), MODES[mode]?.least ?? 1e-6);
    const most = sameScale && scales && scales[mode] ? Math.max(scales[mode], MODES[mode].least ?? 0) : own;
    spans.forEach((span, k) => {
      const v = values[k];
      const strength = v === null || v === undefined ? 0 : Math.min(1, Math.abs(v) / most);
      span.style.setProperty("--k", strength.toFixed(3));
      span.classList.toggle("below", v < 0 && strength > 0.04 && mode !== "sampler");
      span.classList.toggle("rare", mode === "sampler");
    });
    for (const b of bar.querySelectorAll("button")) b.setAttribute("aria-pressed", String(b.dataset.mode === mode));
    legend.replaceChildren();
    if (mode) {
      const one = mode === "sampler";
      const ramp = el("i", one ? "ramp rare" : "ramp");
      legend.append(el("span", "scale", shown(-most), ramp, one ? "0" : shown(most)), el("span", "", MODES[mode].unit));
    }
    curves.replaceChildren();
    if (series.value) curves.append(plot("Value", series.value, episode.reward));
    if (mode && mode !== "value" && finite.length > 1) curves.append(plot(MODES[mode].title, series[mode]));
  };

  // ---- a curve over the sampled tokens, with turn boundaries
  const plot = (title, values, reward) => {
    const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
    const finite = values.filter((v) => v !== null), goal = typeof reward === "number" ? [reward] : [];
    const low = Math.min(0, ...goal, ...finite), high = Math.max(0, ...goal, ...finite), span = high - low || 1;
    const last = Math.max(values.length - 1, 1), x = (k) => k / last * 600, y = (v) => 68 - (v - low) / span * 64;
    svg.setAttribute("viewBox", "0 0 600 72"); svg.setAttribute("preserveAspectRatio", "none"); svg.setAttribute("aria-hidden", "true");
    const path = (cls, d) => { const p = document.createElementNS(ns, "path"); p.setAttribute("class", cls); p.setAttribute("d", d); p.setAttribute("vector-effect", "non-scaling-stroke"); svg.append(p); return p; };
    path("grid", turns.map((k) => `M${x(k)} 0V72`).join(""));
    path("zero", `M0 ${y(0)}H600`);
    if (goal.length) path("goal", `M0 ${y(reward)}H600`);
    const step = Math.max(1, Math.floor(values.length / 1500)), points = [];
    for (let k = 0; k < values.length; k += step) if (values[k] !== null) points.push(`${x(k).toFixed(1)} ${y(values[k]).toFixed(1)}`);
    path("line s0", "M" + points.join("L"));
    const pointer = path("pointer", "");
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const k = Math.min(values.length - 1, Math.max(0, Math.round((event.clientX - frame.left) / frame.width * last)));
      pointer.setAttribute("d", `M${x(k)} 0V72`);
      choose(k); spans[k].parentNode.scrollIntoView({ block: "nearest" });
    });
    svg.addEventListener("pointerleave", () => { pointer.setAttribute("d", ""); leave(); });
    let free = -1; // percent of the width from which a label has room
    const marks = turns.flatMap((k, i) => {
      const left = x(k) / 6;
      if (left < free) return [];
      free = left + 14;
      const mark = el("span", "", `turn ${i + 1}`);
      mark.style.left = Math.min(left, 88) + "%";
      return [mark];
    });
    const told = `${title} over the ${values.length} sampled tokens: ${shown(values[0])} at the first, ${shown(values[values.length - 1])} at the last` + (goal.length ? `; dashed: the reward, ${shown(reward)}` : "");
    const axis = el("div", "axis", el("span", "", shown(high)), el("span", "", shown(low)));
    return el("div", "curve", el("div", "who", told), el("div", "plot-row", axis, svg), el("div", "turns", ...marks));
  };

  bar.append("Colour by ");
  [...modes, ""].forEach((name, i) => {
    const b = el("button", "", name ? MODES[name].title : "nothing");
    b.type = "button"; b.dataset.mode = name; b.title = `key ${i + 1}`;
    b.addEventListener("click", () => { tokenMode = name; draw(name); });
    bar.append(b);
  });
  if (scales && Object.keys(scales).length) {
    const input = el("input"); input.type = "checkbox"; input.checked = sameScale;
    input.addEventListener("change", () => { sameScale = input.checked; draw(current()); });
    bar.append(el("label", "check", input, "one scale for all episodes"));
  }
  const current = () => tokenMode === "" || modes.includes(tokenMode) ? tokenMode : modes[0] ?? "";
  draw(current());
  const note = series.value ? null : el("p", "quiet", "Values, advantages and the trainer's log-probabilities are kept for a few episodes of an iteration.");
  const out = el("div", "", bar, legend, note, curves, box);
  out.pick = (i) => { const b = bar.querySelectorAll("button")[i]; if (b) b.click(); };
  return out;
};
