"use strict";
// The trajectory viewer. Everything it shows is untrusted text: nodes are built with textContent, never from markup.
(() => {
  const holder = document.getElementById("episode-data");
  const viewer = document.querySelector(".viewer");
  if (!holder || !viewer) return;
  const episodes = JSON.parse(holder.textContent);
  const list = viewer.querySelector(".list"), detail = viewer.querySelector(".detail"), count = viewer.querySelector(".count");
  const CITATION = /\\cite\{([^{}]*)\}/g;

  const el = (name, className, ...children) => {
    const node = document.createElement(name);
    if (className) node.className = className;
    for (const child of children) if (child !== null && child !== undefined) node.append(child);
    return node;
  };
  const shown = (v) => v === null || v === undefined ? "–" : (Math.abs(v) >= 100 ? v.toFixed(0) : String(Number(v.toPrecision(3)))).replace("-", "−");
  const tone = (value, good) => value === null || value === undefined ? "" : good ? " good" : " bad";

  // ---- filters and list
  const seeds = new Set(episodes.map((e) => e.seed).filter((seed) => seed !== null)).size;
  const short = (e) => e.where.replace("held out, ", "").replace("PPO, iteration", "iteration");
  const fields = { where: "where", seed: "seed", kind: "kind", lang: "language", outcome: "outcome" };
  const selects = {};
  for (const name of Object.keys(fields)) {
    const values = [...new Set(episodes.map((e) => e[name]).filter((v) => v !== null && v !== undefined && v !== ""))];
    if (name !== "where") values.sort();
    const select = el("select");
    select.append(new Option("all", ""), ...values.map((v) => new Option(String(v), String(v))));
    select.addEventListener("change", () => refresh());
    selects[name] = select;
    if (values.length > 1) viewer.querySelector(".filters").insertBefore(el("label", "", fields[name], select), count);
  }
  let visible = [], current = null;
  const refresh = (wanted) => {
    visible = episodes.filter((e) => Object.entries(selects).every(([name, s]) => !s.value || String(e[name] ?? "") === s.value));
    count.textContent = `${visible.length} of ${episodes.length} episodes`;
    list.replaceChildren(...visible.map((e) => {
      const reward = e.reward === undefined ? "" : e.reward === null ? "" : shown(e.reward);
      const button = el("button", "", e.query, el("span", "sub", el("span", "", short(e) + (seeds < 2 || e.seed === null ? "" : " · seed " + e.seed)), el("span", "", [e.outcome, reward].filter(Boolean).join(" · "))));
      button.type = "button";
      button.addEventListener("click", () => show(e));
      return el("li", "", button);
    }));
    const next = wanted ?? (visible.includes(current) ? current : visible[0]);
    if (next) show(next, wanted !== undefined); else detail.replaceChildren(el("p", "quiet", "No episode fits these filters."));
  };
  viewer.addEventListener("keydown", (event) => {
    if (event.target.closest("select, input")) return;
    const step = event.key === "ArrowDown" || event.key === "j" ? 1 : event.key === "ArrowUp" || event.key === "k" ? -1 : 0;
    const next = step && event.target.closest(".list") ? visible[visible.indexOf(current) + step] : undefined;
    if (next) { event.preventDefault(); show(next); list.children[visible.indexOf(next)].firstChild.focus(); }
  });

  // ---- one episode
  const cites = (id, episode) => {
    const chip = el("button", "cite" + (episode.sources[id] ? "" : " lost"), id);
    chip.type = "button";
    chip.title = episode.sources[id] ? episode.sources[id][1] + " | " + episode.sources[id][0] : "this id was never observed in the episode";
    chip.addEventListener("click", () => {
      const target = detail.querySelector(`[data-source="${CSS.escape(id)}"]`);
      if (!target) return;
      target.scrollIntoView({ block: "center", behavior: "smooth" });
      target.classList.remove("flash"); void target.offsetWidth; target.classList.add("flash");
    });
    return chip;
  };
  const withCitations = (node, text, make) => {
    let at = 0;
    for (const match of text.matchAll(CITATION)) {
      node.append(text.slice(at, match.index), ...match[1].split(",").map((id) => make(id.trim())));
      at = match.index + match[0].length;
    }
    node.append(text.slice(at));
    return node;
  };
  const prettyCall = (text) => {
    try {
      const call = JSON.parse(text);
      return call.name + "  " + JSON.stringify(call.arguments, null, 1).replace(/\n\s*/g, " ");
    } catch { return text; }
  };

  const steps = (episode, used) => {
    const out = [];
    let turn = 0;
    const placed = new Set();
    for (const step of episode.steps) {
      if (step.role === "system") {
        out.push(el("details", "step", el("summary", "", "System prompt"), el("div", "message", step.text)));
      } else if (step.role === "user") {
        out.push(el("div", "step", el("div", "who", out.length < 2 ? "Question" : "Harness"), el("div", "message", step.text)));
      } else if (step.role === "assistant") {
        turn += 1;
        const node = el("div", "step", el("div", "who", `Turn ${turn}` + (step.untrained ? " · not trained on" : "") + (step.error ? " · " + step.error + " error" : "")));
        for (const [kind, text] of step.parts) {
          if (kind === "thought") node.append(el("div", "thought", text));
          else if (kind === "call") node.append(el("div", "call", prettyCall(text)));
          else if (kind === "answer") node.append(withCitations(el("div", "answer"), text, (id) => cites(id, episode)));
          else node.append(el("div", "message quiet", text));
        }
        if (!step.parts.length) node.append(el("div", "quiet", "(empty turn)"));
        out.push(node);
      } else {
        const box = withCitations(el("div", "observation" + (step.error ? " error" : "")), step.text, (id) => {
          const mark = el("span", "mark" + (used.has(id) ? " used" : ""), "[" + id + "]");
          if (!placed.has(id)) { mark.dataset.source = id; placed.add(id); }
          return mark;
        });
        out.push(el("div", "step", el("div", "who", "Observation" + (step.error ? " · " + step.error.replace("_", " ") : "")), box));
      }
    }
    return [out, placed];
  };

  const rubrics = (episode) => {
    const table = el("table");
    table.append(el("thead", "", el("tr", "", ...["Criterion", "Role", "Weight", "Verdict", "Adds"].map((t) => el("th", "", t)))));
    const body = el("tbody");
    const possible = episode.rubrics.reduce((sum, r) => sum + (r[4] !== "error" && r[2] > 0 ? r[2] : 0), 0);
    for (const [rid, criterion, weight, role, verdict, score, reason] of episode.rubrics) {
      const good = verdict === "error" ? null : role === "negative" ? score === 0 : score === 1;
      const text = el("td", "", criterion || rid);
      if (reason) text.append(el("div", "quiet", reason));
      const said = role === "negative" ? { satisfied: "flaw present", partial: "partly present", not: "absent" }[verdict] : { satisfied: "met", partial: "in part", not: "not met" }[verdict];
      const adds = score === null || !possible ? "–" : (weight * score >= 0 ? "+" : "−") + Math.abs(weight * score / possible).toFixed(2);
      body.append(el("tr", "", text, el("td", "", role), el("td", "number", String(weight).replace("-", "−")), el("td", "", el("span", "chip" + tone(good, good), said || verdict)), el("td", "number", adds)));
    }
    table.append(body);
    return table;
  };

  const tokens = (episode) => {
    const data = episode.tokens;
    const modes = [["advantage", "Advantage"], ["value", "Value"], ["logprob", "Log-probability"]].filter(([name]) => data[name]);
    const box = el("div", "tokens"), bar = el("div", "modes"), scale = el("span", "scale"), curve = el("div"), out = el("div", "", bar, curve, box);
    const spans = [];
    let k = -1;
    data.text.forEach((text, i) => {
      const sampled = data.sampled[i] === "1";
      if (sampled) k += 1;
      const span = el("span", sampled ? "sampled" : "given", text || (sampled ? "·" : ""));
      if (sampled) {
        const at = k;
        span.title = modes.map(([name, title]) => `${title} ${shown(data[name][at])}`).join("\n");
        spans.push(span);
      }
      box.append(span);
    });
    const draw = (mode) => {
      const values = mode ? data[mode] : [];
      const finite = values.filter((v) => v !== null);
      const most = Math.max(1e-9, ...finite.map(Math.abs));
      spans.forEach((span, i) => {
        const v = values[i];
        span.style.background = v === null || v === undefined ? "" : `color-mix(in srgb, var(${v < 0 ? "--c1" : "--c0"}) ${Math.round(62 * Math.abs(v) / most)}%, transparent)`;
      });
      for (const b of bar.querySelectorAll("button")) b.setAttribute("aria-pressed", String(b.dataset.mode === mode));
      const ramp = el("i");
      const negative = finite.some((v) => v < 0), positive = finite.some((v) => v > 0);
      ramp.style.background = `linear-gradient(90deg, ${negative ? "color-mix(in srgb, var(--c1) 62%, transparent)" : "transparent"}, transparent ${negative && positive ? "50%" : negative ? "100%" : "0%"}, ${positive ? "color-mix(in srgb, var(--c0) 62%, transparent)" : "transparent"})`;
      scale.replaceChildren(negative ? shown(-most) : "0", ramp, positive ? shown(most) : "0");
      curve.replaceChildren(finite.length > 1 ? plot(values, spans) : "");
    };
    const plot = (values, marks) => {
      const ns = "http://www.w3.org/2000/svg", svg = document.createElementNS(ns, "svg");
      const finite = values.filter((v) => v !== null), low = Math.min(0, ...finite), high = Math.max(0, ...finite), span = high - low || 1;
      const x = (i) => 34 + i / Math.max(values.length - 1, 1) * 560, y = (v) => 64 - (v - low) / span * 56;
      svg.setAttribute("viewBox", "0 0 600 72"); svg.setAttribute("class", "curve"); svg.setAttribute("preserveAspectRatio", "none");
      const path = (cls, d) => { const p = document.createElementNS(ns, "path"); p.setAttribute("class", cls); p.setAttribute("d", d); p.setAttribute("vector-effect", "non-scaling-stroke"); svg.append(p); return p; };
      path("zero", `M34 ${y(0)}H594`);
      path("line s0", "M" + values.map((v, i) => `${x(i).toFixed(1)} ${y(v ?? 0).toFixed(1)}`).join("L"));
      const pointer = path("pointer", "");
      const last = { mark: null };
      svg.addEventListener("pointermove", (event) => {
        const frame = svg.getBoundingClientRect();
        const i = Math.min(values.length - 1, Math.max(0, Math.round(((event.clientX - frame.left) / frame.width * 600 - 34) / 560 * (values.length - 1))));
        pointer.setAttribute("d", `M${x(i)} 6V66`);
        if (last.mark) last.mark.classList.remove("chosen");
        last.mark = marks[i]; last.mark.classList.add("chosen");
        box.scrollTop = last.mark.offsetTop - box.offsetTop - box.clientHeight / 2;
      });
      svg.addEventListener("pointerleave", () => { pointer.setAttribute("d", ""); if (last.mark) last.mark.classList.remove("chosen"); });
      return svg;
    };
    bar.append("Colour by ");
    for (const [name, title] of [...modes, ["", "nothing"]]) {
      const b = el("button", "", title);
      b.type = "button"; b.dataset.mode = name;
      b.addEventListener("click", () => draw(name));
      bar.append(b);
    }
    bar.append(scale);
    draw(modes.length ? modes[0][0] : "");
    return out;
  };

  const show = (episode, scroll) => {
    current = episode;
    [...list.children].forEach((li, i) => li.firstChild.setAttribute("aria-current", String(visible[i] === episode)));
    const answers = episode.steps.flatMap((s) => (s.parts || []).filter(([kind]) => kind === "answer").map(([, text]) => text));
    const used = new Set(answers.flatMap((text) => [...text.matchAll(CITATION)].flatMap((m) => m[1].split(",").map((id) => id.trim()))));
    const chips = el("div", "chips");
    const chip = (text, cls = "") => chips.append(el("span", "chip" + cls, text));
    chip(episode.where); if (episode.seed !== null) chip("seed " + episode.seed);
    if (episode.kind) chip(episode.kind.replace("_", " ")); if (episode.lang) chip(episode.lang);
    chip(episode.finish.replace("_", " "), episode.finish === "answered" ? "" : " bad");
    if (episode.reward !== undefined) chip(episode.reward === null ? "no reward: masked" : "reward " + shown(episode.reward), tone(episode.reward, episode.reward >= 0.999));
    if (episode.correct !== undefined && episode.correct !== null) chip(episode.correct ? "correct" : "wrong", tone(true, episode.correct));
    if (episode.cited !== undefined && episode.cited !== null) chip(episode.cited ? "citations resolve" : "no valid citation", tone(true, episode.cited));
    if (episode.dropped) chip("dropped: " + episode.dropped, " bad");
    const others = episodes.filter((e) => e !== episode && e.task === episode.task && (e.seed === episode.seed || e.seed === null || episode.seed === null));
    const row = el("div", "others");
    if (others.length) {
      row.append("Same task at ");
      for (const other of others.slice(0, 8)) {
        const b = el("button", "chip" + tone(other.reward, other.reward >= 0.999), short(other) + (other.reward === undefined || other.reward === null ? "" : " " + shown(other.reward)));
        b.type = "button";
        b.addEventListener("click", () => { for (const s of Object.values(selects)) s.value = ""; refresh(other); });
        row.append(b);
      }
    }
    const [nodes, placed] = steps(episode, used);
    const parts = [el("h3", "", episode.query), chips];
    if (episode.gold !== undefined) parts.push(el("p", "quiet", "Expected: " + episode.gold));
    if (episode.missing) parts.push(el("p", "quiet", "Not measured: " + episode.missing));
    parts.push(row, ...nodes);
    if (used.size) {
      parts.push(el("h4", "", "Cited sources"));
      for (const id of used) {
        const s = episode.sources[id];
        const node = el("div", "source");
        if (s) {
          node.append(el("b", "", s[1] || s[0]), " ", el("span", "chip" + (s[2] >= 2 ? " good" : s[2] <= 0 ? " bad" : ""), ["unreliable or unknown", "ordinary", "authoritative"][s[2]] || "authority " + s[2]), el("div", "where", [id, s[0], s[3]].filter(Boolean).join(" · ")), el("div", "message", s[4]));
          if (!placed.has(id)) node.dataset.source = id;
        } else node.append(el("b", "", id), " ", el("span", "chip bad", "never observed"));
        parts.push(node);
      }
    }
    if (episode.rubrics && episode.rubrics.length) parts.push(el("h4", "", "Reward per rubric"), el("div", "scroll", rubrics(episode)));
    if (episode.tokens) parts.push(el("h4", "", "Tokens: sampled ones are underlined, given ones are grey"), tokens(episode));
    const stats = Object.entries(episode.stats);
    if (stats.length) parts.push(el("h4", "", "Counts"), el("p", "quiet", stats.map(([k, v]) => k.replaceAll("_", " ") + " " + shown(v)).join(" · ")));
    detail.replaceChildren(...parts);
    detail.scrollTop = 0;
    if (scroll) { const at = visible.indexOf(episode); if (at >= 0) list.scrollTop = list.children[at].offsetTop - list.offsetTop - 80; }
  };

  const wanted = decodeURIComponent((location.hash.match(/^#episode=(\d+)$/) || [])[1] || "");
  refresh(wanted ? episodes[Number(wanted)] : episodes[Number(viewer.dataset.first || 0)]);
})();
