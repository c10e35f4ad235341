// Marks within a line of Markdown: code, emphasis, links. See markdown.js.

import { el } from "./dom.js";

const DEEPEST = 5; // marks within one another
const MOST_TRIES = 8; // ends that are looked at for one beginning
const LINK = /!?\[([^[\]\n]{0,500})\]\(\s{0,9}<?([^()\s<>]{1,2000}(?:\([^()\s<>]{0,200}\))?[^()\s<>]{0,200})>?(?:\s{1,9}"[^"\n]{0,300}")?\s{0,9}\)/y;
const ADDRESS = /https?:\/\/[^\s<>"'`|\\^{}]{1,2000}/y;
const SPECIAL = /[\\`*_~[!<h]/g;
const MARKS = [
  ["***", "strong", "em"],
  ["**", "strong"],
  ["__", "strong"],
  ["~~", "del"],
  ["*", "em"],
  ["_", "em"],
];

/** Returns a text with its marks as nodes. */
export function inline(text, depth = 0) {
  const fragment = document.createDocumentFragment();
  const missing = new Set(); // marks that do not come again in this text
  let plain = 0; // where text begins that is not in a node yet
  let place = 0;
  const add = (node, end) => {
    fragment.append(...nodesBefore(), node);
    plain = place = end;
  };
  const nodesBefore = () => (plain < place ? [text.slice(plain, place)] : []);
  for (;;) {
    SPECIAL.lastIndex = place;
    const special = SPECIAL.exec(text);
    if (!special) break;
    place = special.index;
    const read = readAt(text, place, depth, missing);
    if (read) add(read.node, read.end);
    else place += 1;
  }
  if (plain < text.length) fragment.append(text.slice(plain));
  return fragment;
}

function readAt(text, place, depth, missing) {
  switch (text[place]) {
    case "\\":
      return /[!-/:-@[-`{-~]/.test(text[place + 1] ?? "")
        ? { node: text[place + 1], end: place + 2 }
        : null;
    case "`":
      return code(text, place, missing);
    case "[":
    case "!":
      return link(text, place, depth);
    case "<":
    case "h":
      return address(text, place);
    default:
      return emphasis(text, place, depth, missing);
  }
}

function code(text, place, missing) {
  const run = /`+/y;
  run.lastIndex = place;
  const [mark] = run.exec(text);
  if (missing.has(mark)) return { node: mark, end: place + mark.length };
  for (let end = text.indexOf(mark, place + mark.length); end >= 0; ) {
    run.lastIndex = end;
    const found = run.exec(text)[0];
    if (found.length === mark.length) {
      const inner = text.slice(place + mark.length, end).replace(/^ (.*\S.*) $/s, "$1");
      return { node: el("code", { textContent: inner }), end: end + mark.length };
    }
    end = text.indexOf(mark, end + found.length);
  }
  missing.add(mark);
  return { node: mark, end: place + mark.length };
}

function link(text, place, depth) {
  LINK.lastIndex = place;
  const match = LINK.exec(text);
  if (!match) return null;
  const [whole, label, target] = match;
  const isImage = whole[0] === "!";
  const end = place + whole.length;
  const url = safe(target);
  // A picture would tell its server that somebody reads this; a link asks first.
  const content = isImage ? `${label || "picture"} (picture)` : inline(label, depth + 1);
  if (!url || depth >= DEEPEST) return { node: whole, end };
  return { node: anchor(url, content), end };
}

function address(text, place) {
  const isBracketed = text[place] === "<";
  if (!isBracketed && /\w/.test(text[place - 1] ?? "")) return null;
  ADDRESS.lastIndex = place + (isBracketed ? 1 : 0);
  const match = ADDRESS.exec(text);
  if (!match) return null;
  let [found] = match;
  if (!isBracketed) found = found.replace(/[.,;:!?)\]*_~]+$/, "");
  const end = place + found.length;
  if (isBracketed && text[end + 1] !== ">") return null;
  const url = safe(found);
  return url ? { node: anchor(url, found), end: isBracketed ? end + 2 : end } : null;
}

/** Returns an address that a browser may be sent to; null for scripts and everything unusual. */
function safe(target) {
  try {
    const url = new URL(target);
    return ["http:", "https:", "mailto:"].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

function anchor(href, content) {
  return el("a", { href, target: "_blank", rel: "noopener noreferrer nofollow" }, content);
}

function emphasis(text, place, depth, missing) {
  if (depth >= DEEPEST) return null;
  for (const [mark, tag, innerTag] of MARKS) {
    if (!text.startsWith(mark, place)) continue;
    const begin = place + mark.length;
    if (missing.has(mark) || /\s|^$/.test(text[begin] ?? "")) continue;
    if (mark[0] === "_" && /\w/.test(text[place - 1] ?? "")) continue;
    const end = endOf(text, begin, mark, missing);
    if (end < 0) continue;
    const inner = inline(text.slice(begin, end), depth + 1);
    return { node: el(tag, {}, innerTag ? el(innerTag, {}, inner) : inner), end: end + mark.length };
  }
  return null;
}

function endOf(text, begin, mark, missing) {
  let end = text.indexOf(mark, begin + 1);
  if (end < 0) missing.add(mark);
  for (let tries = 0; end >= 0 && tries < MOST_TRIES; tries++) {
    const after = text[end + mark.length] ?? "";
    const isInWord = mark[0] === "_" && /\w/.test(after);
    // One star is no end where it is one of two.
    const isDouble = mark.length === 1 && (after === mark || text[end - 1] === mark);
    if (!/\s/.test(text[end - 1]) && !isInWord && !isDouble) return end;
    end = text.indexOf(mark, end + (isDouble ? 2 : 1));
  }
  return -1;
}
