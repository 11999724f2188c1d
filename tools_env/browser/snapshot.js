// Runs in a frame: returns its visible text as lines, with every element that can be used numbered from `first`.
// {lines: [[text, top, bottom]], names: [text of each element], elements: [the elements]}
(first) => {
  const MOST_NODES = 30000, MOST_CHARS = 200000, MOST_NAME = 120;
  const BLOCK = new Set(("ADDRESS ARTICLE ASIDE BLOCKQUOTE BODY DD DETAILS DIV DL DT FIELDSET FIGCAPTION FIGURE FOOTER FORM " +
    "H1 H2 H3 H4 H5 H6 HEADER HR LI MAIN NAV OL OPTION P PRE SECTION SUMMARY TABLE TR UL").split(" "));
  const SKIP = new Set("SCRIPT STYLE NOSCRIPT TEMPLATE HEAD SVG CANVAS VIDEO AUDIO OBJECT EMBED IFRAME".split(" "));
  const ROLES = new Set(("button link checkbox radio tab menuitem menuitemcheckbox menuitemradio option switch combobox " +
    "textbox searchbox slider spinbutton").split(" "));
  const lines = [], names = [], elements = [];
  let current = null, nodes = 0, chars = 0;
  const squeeze = (text) => text.replace(/\s+/g, " ");
  const cut = (text) => { text = squeeze(text).trim(); return text.length > MOST_NAME ? text.slice(0, MOST_NAME) + "…" : text; };
  const flush = () => { if (current && current[0].trim()) lines.push([squeeze(current[0]).trim(), current[1], current[2]]); current = null; };
  const put = (text, rect) => {
    if (!current) current = ["", rect.top, rect.bottom];
    current[0] += text;
    current[2] = Math.max(current[2], rect.bottom);
    chars += text.length;
  };
  const shown = (element) => !element.checkVisibility || element.checkVisibility({visibilityProperty: true, opacityProperty: true});
  const role = (element) => {
    const tag = element.tagName, told = (element.getAttribute("role") || "").toLowerCase();
    if (tag === "A" && element.hasAttribute("href")) return "link";
    if (tag === "BUTTON" || tag === "SUMMARY") return ROLES.has(told) ? told : "button";
    if (tag === "TEXTAREA") return "textbox";
    if (tag === "SELECT") return "select";
    if (tag === "INPUT") {
      const type = (element.type || "text").toLowerCase();
      if (type === "hidden") return "";
      if (["submit", "button", "reset", "image"].includes(type)) return "button";
      if (["checkbox", "radio"].includes(type)) return type;
      return type === "text" ? "textbox" : `${type} box`;
    }
    if (ROLES.has(told)) return told;
    if (element.isContentEditable && !(element.parentElement && element.parentElement.isContentEditable)) return "textbox";
    if (element.hasAttribute("onclick")) return "button";
    const parent = element.parentElement;
    if (tag !== "LABEL" && parent && getComputedStyle(element).cursor === "pointer" && getComputedStyle(parent).cursor !== "pointer") return "button";
    return "";
  };
  const named = (element) => {
    const by = (element.getAttribute("aria-labelledby") || "").split(/\s+/).map((id) => id && element.getRootNode().getElementById(id));
    const label = element.labels && element.labels[0];
    return cut(element.getAttribute("aria-label") || by.filter(Boolean).map((e) => e.textContent).join(" ") ||
      (label && label.innerText) || (["INPUT", "SELECT", "TEXTAREA"].includes(element.tagName) ? "" : element.innerText) ||
      (element.querySelector && (element.querySelector("img[alt]") || {}).alt) || element.title || element.placeholder ||
      (element.tagName === "INPUT" && ["submit", "button", "reset"].includes(element.type) ? element.value || element.type : "") ||
      element.alt || element.name || element.getAttribute("href") || "");
  };
  const state = (element, kind) => {
    let text = element.disabled || element.getAttribute("aria-disabled") === "true" ? ", disabled" : "";
    if (kind === "checkbox" || kind === "radio" || kind === "switch")
      text += element.checked || element.getAttribute("aria-checked") === "true" ? ", on" : ", off";
    else if (kind === "select") {
      const options = [...element.options];
      text += ` = ${cut(options.filter((o) => o.selected).map((o) => o.text).join(", "))}; of: ${options.slice(0, 20).map((o) => cut(o.text)).join(" / ")}`;
      if (options.length > 20) text += ` ... ${options.length} in all`;
    } else if (kind === "password box") text += element.value ? " = (filled)" : "";
    else if ("value" in element && kind.endsWith("box") && element.value) text += ` = ${cut(element.value)}`;
    return text;
  };
  const walk = (node) => {
    if (++nodes > MOST_NODES || chars > MOST_CHARS) return;
    if (node.nodeType === Node.TEXT_NODE) {
      if (node.data.trim()) {
        const range = document.createRange();
        range.selectNodeContents(node);
        const rect = range.getBoundingClientRect();
        if (rect.width || rect.height) put(node.data, rect);
      } else if (node.data && current) current[0] += " ";
      return;
    }
    if (node.nodeType !== Node.ELEMENT_NODE) return;
    const tag = node.tagName.toUpperCase();
    if (SKIP.has(tag)) return;
    const contents = getComputedStyle(node).display === "contents";
    if (!contents && !shown(node)) return;
    const block = BLOCK.has(tag);
    if (tag === "BR" || block) flush();
    if (tag === "TD" || tag === "TH") { if (current) current[0] += " | "; }
    const rect = node.getBoundingClientRect();
    const kind = role(node);
    if (kind && (rect.width || rect.height || contents)) {
      const name = named(node);
      elements.push(node);
      names.push(name);
      put(` [${first + elements.length - 1} ${kind}${name ? " " + name : ""}${state(node, kind)}] `, rect);
      if (block) flush();
      return;
    }
    if (/^H[1-6]$/.test(tag)) put("#".repeat(+tag[1]) + " ", rect);
    else if (tag === "LI") put("- ", rect);
    else if (tag === "IMG" && node.alt && rect.width) put(` (picture: ${cut(node.alt)}) `, rect);
    const children = node.shadowRoot ? node.shadowRoot.childNodes
      : tag === "SLOT" && node.assignedNodes().length ? node.assignedNodes() : node.childNodes;
    for (const child of children) walk(child);
    if (block) flush();
  };
  if (document.body) walk(document.body);
  flush();
  if (nodes > MOST_NODES || chars > MOST_CHARS) lines.push(["... the page goes on; the rest is not read", 1e9, 1e9]);
  return {lines, names, elements};
}
