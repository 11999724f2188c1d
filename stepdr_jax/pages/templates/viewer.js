// The trajectory viewer: episodes to filter, sort and walk through. What the page does not show yet stays packed.
(async () => {
  const holder = document.getElementById("episode-data"), viewer = document.querySelector(".viewer");
  if (!holder || !viewer) return;
  const list = viewer.querySelector(".list"), detail = viewer.querySelector(".detail"), filters = viewer.querySelector(".filters"), count = viewer.querySelector(".count");
  const whole = viewer.dataset.keys === "page"; // keys work wherever the focus is, not only inside the viewer
  const STEP = 300; // rows of the list that are drawn at a time

  const unpack = async (node) => {
    if (!node) return null;
    if (node.type === "application/json") return JSON.parse(node.textContent);
    const bytes = Uint8Array.from(atob(node.textContent.trim()), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate-raw"))).json();
  };
  let episodes, vocabulary, scales;
  try {
    [episodes, vocabulary, scales] = await Promise.all(["episode-data", "vocabulary", "scales"].map((id) => unpack(document.getElementById(id))));
  } catch (error) {
    detail.replaceChildren(el("p", "absent", `This page could not be unpacked (${error.message}). It needs a browser of 2023 or later: Chrome 80, Firefox 113, Safari 16.4.`));
    return;
  }
  episodes.forEach((e, i) => { e.link = e.link ?? String(i); });
  const blocks = new Map();
  const load = async (e) => {
    if (e.block === undefined) return e;
    if (!blocks.has(e.block)) blocks.set(e.block, unpack(document.getElementById("block-" + e.block)));
    if (blocks.size > 8) blocks.delete(blocks.keys().next().value);
    return { ...e, ...(await (blocks.get(e.block) ?? unpack(document.getElementById("block-" + e.block))))[e.at] };
  };

  // ---- filters and order
  const seeds = new Set(episodes.map((e) => e.seed).filter((seed) => seed !== null)).size;
  const short = (e) => e.where.replace("held out, ", "").replace("PPO, iteration", "iteration");
  const said = (v) => v === true ? "yes" : v === false ? "no" : String(v).replace("_", " ");
  const fields = { where: whole ? "iteration" : "where", seed: "seed", kind: "kind of task", lang: "language", outcome: "outcome", finish: "finish", masked: "masked", detailed: "with values" };
  const orders = { iteration: "iteration", reward: "reward", sampled: "tokens sampled", turns: "turns", gap: "largest log-prob gap" };
  const selects = {}, of = (e, name) => name === "masked" ? e.masked ?? "no" : name === "detailed" ? Boolean(e.detailed) : e[name];
  const control = (title, node) => filters.insertBefore(el("label", "", title, node), count);
  for (const name of Object.keys(fields)) {
    if ((name === "masked" || name === "detailed") && !whole) continue;
    const values = [...new Set(episodes.map((e) => of(e, name)).filter((v) => v !== null && v !== undefined && v !== ""))];
    if (name !== "where") values.sort();
    if (name === "masked" && values.length > 2) values.push("any cause");
    const select = el("select");
    select.append(new Option("all", ""), ...values.map((v) => new Option(said(v).replace("PPO, ", ""), String(v))));
    select.addEventListener("change", () => refresh());
    selects[name] = select; select.name = name;
    if (values.length > 1) control(fields[name], select);
  }
  const order = el("select"), search = el("input");
  order.name = "order";
  order.append(new Option("as recorded", ""));
  for (const [name, title] of Object.entries(orders)) if (new Set(episodes.map((e) => e[name] ?? null)).size > 1) order.append(new Option(title + " ↓", "-" + name), new Option(title + " ↑", "+" + name));
  if (order.options.length > 1 && whole) control("order", order);
  order.addEventListener("change", () => refresh());
  search.type = "search"; search.placeholder = "words or task id";
  search.addEventListener("input", () => refresh());
  if (whole) control("question", search);
  const fits = (e) => Object.entries(selects).every(([name, s]) => !s.value || (s.value === "any cause" ? Boolean(e.masked) : String(of(e, name) ?? "") === s.value))
    && (!search.value || `${e.query} ${e.task} ${e.link}`.toLowerCase().includes(search.value.toLowerCase()));

  // ---- list
  let visible = [], drawn = 0, current = null, token = 0, rubricsOpen = true, quiet = true;
  const row = (e) => {
    const reward = e.masked ? "masked" : e.reward === undefined || e.reward === null ? "" : shown(e.reward);
    const button = el("button", "", el("span", "query", e.query), el("span", "sub", el("span", "", short(e) + (seeds < 2 || e.seed === null ? "" : " · seed " + e.seed)), el("span", "", [e.outcome === "masked" ? "" : e.outcome, reward].filter(Boolean).join(" · "))));
    button.type = "button";
    button.addEventListener("click", () => show(e));
    button.setAttribute("aria-current", String(e === current));
    return el("li", "", button);
  };
  const draw = (until) => {
    list.append(...visible.slice(drawn, until).map(row));
    drawn = Math.max(drawn, Math.min(until, visible.length));
  };
  list.addEventListener("scroll", () => { if (drawn < visible.length && list.scrollTop + list.clientHeight > list.scrollHeight - 400) draw(drawn + STEP); }, { passive: true });
  const refresh = (wanted) => {
    visible = episodes.filter(fits);
    if (order.value) {
      const sign = order.value[0] === "-" ? -1 : 1, name = order.value.slice(1);
      visible.sort((a, b) => (a[name] ?? null) === null ? 1 : (b[name] ?? null) === null ? -1 : sign * (a[name] - b[name]));
    }
    count.textContent = `${visible.length.toLocaleString("en")} of ${episodes.length.toLocaleString("en")} episodes`;
    list.replaceChildren(); drawn = 0; draw(STEP);
    const next = wanted ?? (visible.includes(current) ? current : visible[0]);
    if (next) show(next, true); else { current = null; detail.replaceChildren(el("p", "quiet", "No episode fits these filters.")); }
  };
  const walk = (by) => { const next = visible[visible.indexOf(current) + by]; if (next) show(next, true); };

  // ---- keys
  let tokens = null, part = whole ? "tokens" : "conversation";
  const onKey = (event) => {
    if (event.target.closest("select, input") || event.ctrlKey || event.metaKey || event.altKey) return;
    const inList = event.target.closest(".list"), key = event.key;
    const by = key === "j" || key === "n" || (inList && key === "ArrowDown") ? 1 : key === "k" || key === "p" || (inList && key === "ArrowUp") ? -1 : 0;
    if (by) { event.preventDefault(); walk(by); if (inList && current) list.children[visible.indexOf(current)]?.firstChild.focus(); }
    else if (key === "/" && whole) { event.preventDefault(); search.focus(); }
    else if (key === "t") { part = part === "tokens" ? "conversation" : "tokens"; if (current) show(current); }
    else if (/^[1-9]$/.test(key) && tokens) tokens.pick(Number(key) - 1);
  };
  (whole ? document : viewer).addEventListener("keydown", onKey);
  search.addEventListener("keydown", (event) => { if (event.key === "Escape") { search.value = ""; search.blur(); refresh(); } });

  // ---- one episode
  const show = async (chosen, scroll) => {
    const mine = token += 1;
    current = chosen;
    const place = visible.indexOf(chosen);
    if (place >= drawn) draw(place + STEP);
    for (const button of list.querySelectorAll('[aria-current="true"]')) button.setAttribute("aria-current", "false");
    const entry = list.children[place];
    if (entry) {
      entry.firstChild.setAttribute("aria-current", "true");
      if (scroll) { const top = entry.offsetTop - list.offsetTop; if (top < list.scrollTop || top + entry.offsetHeight > list.scrollTop + list.clientHeight) list.scrollTop = top - 80; }
    }
    let episode;
    try { episode = await load(chosen); } catch (error) { detail.replaceChildren(el("p", "absent", `This episode could not be unpacked (${error.message}).`)); return; }
    if (mine !== token) return; // another one was chosen meanwhile
    tip.hidden = true;

    const go = (text, by) => { const b = el("button", "", text); b.type = "button"; b.disabled = !visible[place + by]; b.addEventListener("click", () => walk(by)); return b; };
    const anchor = el("a", "", "link to it"); anchor.href = "#episode=" + encodeURIComponent(chosen.link);
    const nav = el("div", "nav", go("← previous", -1), go("next →", 1), el("span", "quiet", place < 0 ? "" : `${place + 1} of ${visible.length}`), anchor);
    const others = episodes.filter((e) => e !== chosen && e.task === chosen.task && (e.seed === chosen.seed || e.seed === null || chosen.seed === null));
    const same = el("div", "others");
    if (others.length) {
      const near = others.length <= 8 ? others : [...new Set(Array.from({ length: 8 }, (_, i) => others[Math.round(i * (others.length - 1) / 7)]))];
      same.append(`Same task${others.length > near.length ? ` (${others.length} more episodes)` : ""} at `);
      for (const other of near) {
        const b = el("button", "chip" + tone(other.reward, other.reward >= 0.999), short(other) + (other.reward === undefined || other.reward === null ? "" : ": " + shown(other.reward)));
        b.type = "button";
        b.addEventListener("click", () => { for (const s of Object.values(selects)) s.value = ""; search.value = ""; refresh(other); });
        same.append(b);
      }
    }
    const parts = [nav, el("h3", "", episode.query), episodeChips(episode)];
    if (episode.gold !== undefined) parts.push(el("p", "quiet", "Expected: " + episode.gold));
    if (episode.missing) parts.push(el("p", "masked", whole || episode.masked ? `Masked: ${episode.missing}. This episode has weight 0 in every loss, in whitening and for the critic.` : "Not measured: " + episode.missing));
    parts.push(same);
    if (episode.rubrics && episode.rubrics.length) {
      const table = el("details", "rubrics", el("summary", "", `Reward ${episode.reward === null ? "none" : shown(episode.reward)}, rubric by rubric`), rubricTable(episode));
      table.open = rubricsOpen;
      table.addEventListener("toggle", () => { rubricsOpen = table.open; });
      parts.push(table);
    } else if (typeof episode.reward === "number") parts.push(el("p", "quiet", `The reward, ${shown(episode.reward)}, is by rule: there was no answer to judge.`));
    tokens = null;
    if (episode.tokens) {
      const tabs = el("div", "tabs"); tabs.setAttribute("role", "group");
      for (const name of ["conversation", "tokens"]) {
        const b = el("button", "", name === "tokens" ? "Tokens" : "Conversation");
        b.type = "button"; b.setAttribute("aria-pressed", String(part === name));
        b.addEventListener("click", () => { part = name; show(chosen); });
        tabs.append(b);
      }
      parts.push(tabs);
    }
    if (episode.tokens && part === "tokens") parts.push(tokens = tokenView(episode, vocabulary ?? {}, scales));
    else parts.push(conversation(episode, detail));
    const stats = Object.entries(episode.stats);
    if (stats.length) parts.push(el("h4", "", "Counts"), el("p", "quiet", stats.map(([k, v]) => k.replaceAll("_", " ") + " " + shown(v)).join(" · ")));
    detail.replaceChildren(...parts);
    detail.scrollTop = 0;
    if (!quiet) history.replaceState(null, "", "#episode=" + encodeURIComponent(chosen.link));
    quiet = false;
  };

  const linked = () => { const wanted = (location.hash.match(/^#episode=(.+)$/) || [])[1]; return wanted && episodes.find((e) => e.link === decodeURIComponent(wanted)); };
  refresh(linked() || episodes[Number(viewer.dataset.first || 0)]);
  if (!whole && linked()) viewer.scrollIntoView();
  window.addEventListener("hashchange", () => { const e = linked(); if (e && e !== current) { for (const s of Object.values(selects)) s.value = ""; search.value = ""; refresh(e); } });
})();
