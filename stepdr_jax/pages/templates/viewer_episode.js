// One episode: what was said, what it was worth, and why. All text is untrusted: textContent only.
const tone = (value, good) => value === null || value === undefined ? "" : good ? " good" : " bad";

const conversation = (() => {
  const CITATION = /\\cite\{([^{}]*)\}/g;
  const cites = (id, episode, detail) => {
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

  const steps = (episode, used, detail) => {
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
          else if (kind === "answer") node.append(withCitations(el("div", "answer"), text, (id) => cites(id, episode, detail)));
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

  const sources = (episode, used, placed) => [...used].map((id) => {
    const s = episode.sources[id], node = el("div", "source");
    if (!s) { node.append(el("b", "", id), " ", el("span", "chip bad", "never observed")); return node; }
    node.append(el("b", "", s[1] || s[0]), " ", el("span", "chip" + (s[2] >= 2 ? " good" : s[2] <= 0 ? " bad" : ""), ["unreliable or unknown", "ordinary", "authoritative"][s[2]] || "authority " + s[2]), el("div", "where", [id, s[0], s[3]].filter(Boolean).join(" · ")), el("div", "message", s[4]));
    if (!placed.has(id)) node.dataset.source = id;
    return node;
  });

  return (episode, detail) => {
    const answers = episode.steps.flatMap((s) => (s.parts || []).filter(([kind]) => kind === "answer").map(([, text]) => text));
    const used = new Set(answers.flatMap((text) => [...text.matchAll(CITATION)].flatMap((m) => m[1].split(",").map((id) => id.trim()))));
    const [nodes, placed] = steps(episode, used, detail);
    return el("div", "", ...nodes, ...(used.size ? [el("h4", "", "Cited sources"), ...sources(episode, used, placed)] : []));
  };
})();

const rubricTable = (episode) => {
  const body = el("tbody"), possible = episode.rubrics.reduce((sum, r) => sum + (r[4] !== "error" && r[2] > 0 ? r[2] : 0), 0);
  let failed = 0, fatal = false;
  for (const [rid, criterion, weight, role, verdict, score, reason, deadly] of episode.rubrics) {
    const lost = score === null || verdict === "error";
    const good = lost ? null : role === "negative" ? score === 0 : score === 1;
    if (lost) failed += 1;
    if (deadly && score) fatal = true;
    const words = role === "negative" ? { satisfied: "flaw present", partial: "flaw in part", not_satisfied: "flaw absent" } : { satisfied: "met", partial: "in part", not_satisfied: "not met" };
    const adds = lost ? "not counted" : !score ? "0" : possible ? (weight > 0 ? "+" : "−") + Math.abs(weight * score / possible).toFixed(2) : "–";
    const text = el("td", "", criterion || rid, deadly ? el("span", "chip bad", "fatal") : null, reason ? el("div", "quiet", reason) : null);
    const chip = lost ? el("span", "chip failed", "judge failed") : el("span", "chip" + tone(good, good), words[verdict] || verdict);
    body.append(el("tr", "", text, el("td", "", role), el("td", "number", String(weight).replace("-", "−")), el("td", "", chip), el("td", "number", adds)));
  }
  const head = el("thead", "", el("tr", "", ...["Criterion", "Role", "Weight", "Verdict", "Adds"].map((t) => el("th", "", t))));
  const sum = el("tr", "sum", el("td", "", "Reward"), el("td"), el("td"), el("td"), el("td", "number", episode.reward === null ? "none: masked" : shown(episode.reward)));
  const notes = [];
  if (failed) notes.push(`${failed} of ${episode.rubrics.length} judgments failed: those rubrics count neither for nor against.`);
  if (fatal) notes.push("A fatal flaw is present: the whole reward is 0.");
  return el("div", "scroll", el("table", "", head, body, el("tfoot", "", sum)), notes.length ? el("p", "quiet", notes.join(" ")) : null);
};

const episodeChips = (episode) => {
  const chips = el("div", "chips"), chip = (text, cls = "") => chips.append(el("span", "chip" + cls, text));
  chip(episode.where); if (episode.seed !== null) chip("seed " + episode.seed);
  if (episode.kind) chip(episode.kind.replace("_", " ")); if (episode.lang) chip(episode.lang);
  chip(episode.finish.replace("_", " "), episode.finish === "answered" ? "" : " bad");
  if (episode.reward !== undefined && episode.reward !== null) chip("reward " + shown(episode.reward), tone(episode.reward, episode.reward >= 0.999));
  if (episode.missing) chip("masked", " bad");
  if (episode.correct !== undefined && episode.correct !== null) chip(episode.correct ? "correct" : "wrong", tone(true, episode.correct));
  if (episode.cited !== undefined && episode.cited !== null) chip(episode.cited ? "citations resolve" : "no valid citation", tone(true, episode.cited));
  if (episode.dropped) chip("dropped: " + episode.dropped, " bad");
  return chips;
};
