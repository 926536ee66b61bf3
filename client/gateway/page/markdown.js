// Markdown to DOM nodes: the part of it that models write. Never innerHTML: what an answer holds
// becomes text and a fixed set of elements, so that no answer can bring script or load anything.

const INLINE = [
  ["code", /`([^`\n]+)`/],
  ["strong", /\*\*(?=\S)([\s\S]*?\S)\*\*/],
  ["em", /\*(?=\S)([^*\n]*?\S)\*/],
  ["em", /(?<![\w])_(?=\S)([^_\n]*?\S)_(?![\w])/],
  ["del", /~~(?=\S)([^~\n]*?\S)~~/],
  ["a", /\[([^\]\n]+)\]\(\s*(https?:\/\/[^\s)]+)\s*\)/],
  ["a", /(https?:\/\/[^\s<>()]+[^\s<>().,;:!?'"])/],
];
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const DEEPEST = 8;

/** A fragment with the elements of `source`. */
export function render(source) {
  const fragment = document.createDocumentFragment();
  blocks(source.replace(/\r\n?/g, "\n").split("\n"), fragment, 0);
  return fragment;
}

function blocks(lines, parent, depth) {
  let at = 0;
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if (!line.trim()) {
      at += 1;
    } else if ((match = /^\s*(```+|~~~+)\s*([\w+#.-]*)/.exec(line))) {
      at = fence(lines, at, match[1], parent);
    } else if ((match = /^(#{1,6})\s+(.*?)\s*#*\s*$/.exec(line))) {
      // The page has its own h1 and h2.
      inline(match[2], element(`h${Math.min(6, match[1].length + 2)}`, parent), 0);
      at += 1;
    } else if (/^\s*([-*_])(\s*\1){2,}\s*$/.test(line)) {
      element("hr", parent);
      at += 1;
    } else if (/^\s*>/.test(line) && depth < DEEPEST) {
      const start = at;
      while (at < lines.length && /^\s*>/.test(lines[at])) at += 1;
      const quoted = lines.slice(start, at).map((quote) => quote.replace(/^\s*>\s?/, ""));
      blocks(quoted, element("blockquote", parent), depth + 1);
    } else if (ITEM.test(line) && depth < DEEPEST) {
      at = list(lines, at, parent, depth);
    } else if (line.includes("|") && /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/.test(lines[at + 1] ?? "")) {
      at = table(lines, at, parent);
    } else {
      const start = at;
      do at += 1; while (at < lines.length && lines[at].trim() && !startsBlock(lines[at]));
      inline(lines.slice(start, at).join("\n"), element("p", parent), 0);
    }
  }
}

function startsBlock(line) {
  return /^\s*(```|~~~|>)/.test(line) || /^#{1,6}\s/.test(line) || ITEM.test(line);
}

function fence(lines, start, mark, parent) {
  if (start + 1 >= lines.length) return start + 1; // nothing in it yet
  const code = element("code", element("pre", parent));
  code.parentNode.tabIndex = 0;
  let at = start + 1;
  while (at < lines.length && !lines[at].trim().startsWith(mark)) at += 1;
  code.textContent = lines.slice(start + 1, at).join("\n");
  return at + 1;
}

function list(lines, start, parent, depth) {
  const [, indent, marker] = ITEM.exec(lines[start]);
  const ordered = /\d/.test(marker);
  const all = element(ordered ? "ol" : "ul", parent);
  if (ordered) all.start = parseInt(marker, 10);
  let at = start;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length !== indent.length || /\d/.test(match[2]) !== ordered) break;
    const inner = [match[3]];
    at += 1;
    // What is indented, and lines that just go on, belong to the item.
    while (at < lines.length) {
      const next = lines[at];
      const deeper = next.length - next.trimStart().length > indent.length;
      const goesOn = next.trim() ? deeper || !startsBlock(next) && lines[at - 1].trim() : /^\s/.test(lines[at + 1] ?? "");
      if (!goesOn) break;
      inner.push(next.slice(Math.min(next.length - next.trimStart().length, indent.length + marker.length + 1)));
      at += 1;
    }
    const item = element("li", all);
    if (inner.length === 1) inline(inner[0], item, 0);
    else blocks(inner, item, depth + 1);
    while (at + 1 < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1])) at += 1;
  }
  return at;
}

function table(lines, start, parent) {
  const wide = element("div", parent);
  wide.className = "wide";
  wide.tabIndex = 0;
  const body = element("table", wide);
  row(lines[start], "th", element("thead", body));
  const rows = element("tbody", body);
  let at = start + 2;
  while (at < lines.length && lines[at].includes("|")) row(lines[at++], "td", rows);
  return at;
}

function row(line, kind, parent) {
  const cells = line.trim().replace(/^\||\|$/g, "").split("|");
  const tr = element("tr", parent);
  for (const cell of cells) inline(cell.trim(), element(kind, tr), 0);
}

function inline(text, parent, depth) {
  while (text) {
    let first = null;
    for (const [kind, pattern] of depth < DEEPEST ? INLINE : []) {
      const match = pattern.exec(text);
      if (match && (first === null || match.index < first.match.index)) first = { kind, match };
    }
    if (first === null) {
      parent.append(text);
      return;
    }
    const { kind, match } = first;
    parent.append(text.slice(0, match.index));
    const child = element(kind, parent);
    if (kind === "code") {
      child.textContent = match[1];
    } else if (kind === "a") {
      child.href = match[2] ?? match[1];
      child.rel = "noopener noreferrer nofollow";
      child.target = "_blank";
      child.textContent = match[1];
    } else {
      inline(match[1], child, depth + 1);
    }
    text = text.slice(match.index + match[0].length);
  }
}

function element(name, parent) {
  return parent.appendChild(document.createElement(name));
}
