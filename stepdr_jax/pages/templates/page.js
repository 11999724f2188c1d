"use strict";
// Theme, current section in the contents, and values under the pointer of a plot.
(() => {
  const root = document.documentElement;
  const order = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  const read = () => { try { return localStorage.getItem("theme") || "auto"; } catch { return "auto"; } };
  const apply = (theme) => {
    if (theme === "auto") root.removeAttribute("data-theme"); else root.dataset.theme = theme;
    if (button) button.textContent = "Theme: " + theme;
  };
  apply(root.dataset.theme || read());
  if (button) button.addEventListener("click", () => {
    const next = order[(order.indexOf(root.dataset.theme || "auto") + 1) % order.length];
    try { localStorage.setItem("theme", next); } catch { /* a page opened from a file may not store */ }
    apply(next);
  });

  const links = new Map([...document.querySelectorAll("nav.contents a")].map((a) => [a.hash.slice(1), a]));
  const sections = [...document.querySelectorAll("main section[id]")];
  const follow = () => {
    let current = sections[0];
    for (const section of sections) if (section.getBoundingClientRect().top < 160) current = section;
    links.forEach((a, id) => a.classList.toggle("here", Boolean(current) && id === current.id));
  };
  document.addEventListener("scroll", follow, { passive: true });
  follow();

  const shown = (v) => v === null ? "–" : Math.abs(v) >= 100 ? v.toFixed(0) : String(Number(v.toPrecision(3)));
  for (const svg of document.querySelectorAll("svg[data-lines]")) {
    const { x: [low, high, left, right], unit, lines } = JSON.parse(svg.dataset.lines);
    const figure = svg.closest("figure");
    const box = svg.viewBox.baseVal;
    let tip = null, pointer = null;
    const leave = () => { if (tip) { tip.remove(); pointer.remove(); tip = pointer = null; } };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const frame = svg.getBoundingClientRect();
      const at = (event.clientX - frame.left) / frame.width * box.width;
      const wanted = low + (at - left) / (right - left) * (high - low);
      let best = null;
      for (const [, , xs] of lines) for (const value of xs) if (best === null || Math.abs(value - wanted) < Math.abs(best - wanted)) best = value;
      if (best === null || at < left - 8 || at > right + 8) return leave();
      if (!tip) {
        tip = figure.appendChild(document.createElement("div"));
        tip.className = "tip";
        pointer = svg.appendChild(document.createElementNS("http://www.w3.org/2000/svg", "path"));
        pointer.setAttribute("class", "pointer");
      }
      const rows = [unit + " " + shown(best)];
      for (const [name, , xs, ys] of lines) { const i = xs.indexOf(best); if (i >= 0) rows.push(name + "  " + shown(ys[i])); }
      tip.replaceChildren(...rows.map((row) => { const line = document.createElement("div"); line.textContent = row; return line; }));
      const x = left + (best - low) / (high - low) * (right - left);
      pointer.setAttribute("d", `M${x} 10V${box.height - 36}`);
      const inside = figure.getBoundingClientRect();
      const place = frame.left - inside.left + x / box.width * frame.width;
      tip.style.top = frame.top - inside.top + 14 + "px";
      if (place > inside.width / 2) { tip.style.left = "auto"; tip.style.right = inside.width - place + 10 + "px"; }
      else { tip.style.right = "auto"; tip.style.left = place + 10 + "px"; }
    });
  }
})();
