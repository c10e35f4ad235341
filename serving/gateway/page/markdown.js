// Markdown as chat models write it, rendered while it comes. Every node is made by a call, so no
// text of a model is ever read as markup. What has ended is not touched again: only the last block
// is rendered anew, and one that grows large is only added to until it ends. The work for an answer
// therefore grows with its length.

import { copyButton, el } from "./dom.js";
import { inline } from "./inline.js";

const LARGE = 3000; // characters of a block that is still rendered anew for each piece of text
const LONG = 200; // characters of a line that is text, whatever follows
const DEEPEST = 5; // lists and quotations within one another
const FENCE = /^ {0,3}(`{3,}|~{3,}) *([\w+#.-]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)(?:\s+#+)?\s*$/;
const RULE = /^ {0,3}([-*_])(?: *\1){2,} *$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])( +|$)/;
const TABLE_RULE = /^ *\|? *:?-+:? *(\| *:?-+:? *)*\|? *$/;

function kindOf(line) {
  if (!line.trim()) return "blank";
  if (QUOTE.test(line)) return "quote";
  if (line.length < LONG) {
    if (FENCE.test(line)) return "code";
    if (HEADING.test(line)) return "heading";
    if (RULE.test(line)) return "rule";
  }
  return ITEM.test(line) ? "list" : "text";
}

/** Renders Markdown into an element, piece by piece. */
export class Markdown {
  #root;
  #rest = ""; // the last line, while it is short and may become anything
  #block = null; // the one that may still change
  #isOpenLine = false; // the block's last line goes on
  #preview = []; // nodes of a last line that belongs to no block yet
  #depth;
  #level; // of the last heading: the next one is at most one deeper
  rendered = 0; // characters that became nodes, those of nodes that were replaced too

  constructor(root, { depth = 0, level = 2 } = {}) {
    this.#root = root;
    this.#depth = depth;
    this.#level = level;
  }

  /** Adds a piece of text. */
  append(text) {
    const pieces = text.split("\n");
    pieces.forEach((piece, i) => this.#add(piece, i < pieces.length - 1));
    this.#show();
  }

  /** Ends the text. */
  end() {
    this.#clearPreview();
    if (this.#rest) this.#take(this.#rest);
    this.#rest = "";
    this.#close();
  }

  #add(piece, isWholeLine) {
    if (this.#isOpenLine) {
      this.#block.lines.push(this.#block.lines.pop() + piece);
      this.#isOpenLine = !isWholeLine;
      return;
    }
    this.#rest += piece;
    if (isWholeLine) {
      this.#take(this.#rest);
      this.#rest = "";
    } else if (this.#rest.length >= LONG && this.#block?.kind !== "code") {
      this.#take(this.#rest);
      this.#rest = "";
      this.#isOpenLine = true;
    }
  }

  #take(line) {
    const block = this.#block;
    if (block?.kind === "code") {
      if (block.endsWith(line)) this.#close();
      else block.add(`${line}\n`);
      return;
    }
    const kind = this.#kindHere(line);
    if (this.#continues(block, line, kind)) {
      this.#push(block, line);
      return;
    }
    this.#close();
    if (kind === "code") {
      const [, fence, language] = FENCE.exec(line);
      this.#block = new CodeBlock(this.#root, fence, language);
    } else if (kind === "heading") {
      this.#root.append(this.#heading(line));
    } else if (kind === "rule") {
      this.#root.append(el("hr"));
    } else if (kind !== "blank") {
      this.#block = { kind, lines: [], nodes: [], list: null, tail: null };
      this.#push(this.#block, line);
    }
  }

  #kindHere(line) {
    const kind = kindOf(line);
    return this.#depth >= DEEPEST && (kind === "quote" || kind === "list") ? "text" : kind;
  }

  #continues(block, line, kind) {
    switch (block?.kind) {
      case "list": {
        if (kind === "blank" || /^ {2,}/.test(line)) return true;
        if (kind === "list") return isOrdered(line) === block.isOrdered;
        // Text may go on in the next line without being moved in, but not after an empty one.
        return kind === "text" && block.lines.at(-1).trim() !== "";
      }
      case "table":
        return kind === "text" && line.includes("|");
      default:
        return kind === block?.kind && kind !== "blank"; // text, quote
    }
  }

  #push(block, line) {
    if (block.kind === "quote") {
      block.lines.push(line.replace(QUOTE, ""));
      return;
    }
    if (block.kind === "list") this.#beginItem(block, line);
    block.lines.push(line);
    if (block.kind === "text" && block.lines.length === 2 && isTable(block.lines)) {
      block.kind = "table";
    }
  }

  #beginItem(block, line) {
    const item = ITEM.exec(line);
    if (!block.list) {
      block.isOrdered = isOrdered(line);
      block.indent = item[1].length;
      block.list = el(block.isOrdered ? "ol" : "ul");
      if (block.isOrdered) block.list.start = Number.parseInt(item[2], 10);
      this.#root.append(block.list);
    } else if (item && item[1].length <= block.indent + 1 && !block.inFence) {
      this.#render(block); // the item before has ended
      Object.assign(block, { lines: [], nodes: [], tail: null });
    }
    if (/^ *(```|~~~)/.test(line.replace(ITEM, ""))) block.inFence = !block.inFence;
  }

  /** Shows what has come. */
  #show() {
    this.#clearPreview();
    const block = this.#block;
    if (block?.kind === "code") {
      block.show(this.#rest);
      return;
    }
    const kind = this.#kindHere(this.#rest);
    const continues =
      this.#rest && this.#continues(block, this.#rest, kind) && !(kind === "list" && block.list);
    if (block) {
      const size = block.lines.reduce((sum, line) => sum + line.length + 1, 0);
      if (size > LARGE) this.#showLarge(block, continues ? this.#rest : "");
      else this.#render(block, continues ? this.#rest : null);
    }
    if (this.#rest.trim() && !continues) this.#previewRest(kind, block);
  }

  #previewRest(kind, block) {
    if (kind === "code") return; // the fence is no text
    const isNextItem = kind === "list" && block?.kind === "list";
    const place = el("div");
    const inner = new Markdown(place, { depth: this.#depth, level: this.#level });
    inner.#take(this.#rest);
    inner.end();
    this.rendered += inner.rendered;
    const source = isNextItem ? place.firstChild : place;
    this.#preview = [...source.childNodes];
    (isNextItem ? block.list : this.#root).append(...this.#preview);
  }

  #clearPreview() {
    for (const node of this.#preview) node.remove();
    this.#preview = [];
  }

  #close() {
    const block = this.#block;
    this.#block = null;
    this.#isOpenLine = false;
    if (block?.kind === "code") block.end();
    else if (block) this.#render(block);
  }

  #render(block, rest = null) {
    const lines = rest === null ? block.lines : [...block.lines, block.kind === "quote" ? rest.replace(QUOTE, "") : rest];
    for (const node of block.nodes) node.remove();
    block.nodes = [this.#node(block.kind, lines)];
    block.tail = null;
    (block.list ?? this.#root).append(...block.nodes);
  }

  /** Adds what is new of a block that is too large to be rendered again before it ends. */
  #showLarge(block, rest) {
    const text = block.lines.join("\n");
    if (!block.tail) {
      for (const node of block.nodes) node.remove();
      block.tail = document.createTextNode("");
      block.rest = document.createTextNode("");
      block.nodes = [el(block.list ? "li" : "p", {}, block.tail, block.rest)];
      (block.list ?? this.#root).append(...block.nodes);
    }
    const fresh = text.slice(block.tail.length);
    this.rendered += fresh.length + rest.length;
    block.tail.appendData(fresh);
    block.rest.data = rest && `\n${rest}`;
  }

  #node(kind, lines) {
    if (kind === "list") {
      const width = ITEM.exec(lines[0])[0].length;
      const indent = new RegExp(`^ {0,${width}}`);
      return this.#within("li", [lines[0].slice(width), ...lines.slice(1).map((line) => line.replace(indent, ""))]);
    }
    if (kind === "quote") return this.#within("blockquote", lines);
    this.rendered += lines.reduce((sum, line) => sum + line.length, 0);
    if (kind === "table") return table(lines);
    return el("p", {}, inline(lines.map((line) => line.trim()).join("\n")));
  }

  #within(tag, lines) {
    const element = el(tag);
    const inner = new Markdown(element, { depth: this.#depth + 1, level: this.#level });
    for (const line of lines) inner.#take(line);
    inner.end();
    this.rendered += inner.rendered;
    return element;
  }

  #heading(line) {
    const [, marks, text] = HEADING.exec(line);
    this.#level = Math.min(marks.length + 2, this.#level + 1, 6);
    this.rendered += text.length;
    return el(`h${this.#level}`, {}, inline(text));
  }
}

/** Code between fences, with its language and a button that copies it. */
class CodeBlock {
  kind = "code";
  #fence;
  #text = document.createTextNode(""); // whole lines
  #rest = document.createTextNode(""); // of the last line, what has come

  constructor(root, fence, language) {
    this.#fence = fence;
    const head = el(
      "figcaption",
      {},
      el("span", { textContent: language || "text" }),
      copyButton(() => this.#text.data, "Copy code"),
    );
    const code = el("code", {}, this.#text, this.#rest);
    root.append(el("figure", { className: "code" }, head, el("pre", { tabIndex: 0 }, code)));
  }

  endsWith(line) {
    const text = line.trim();
    return text.startsWith(this.#fence) && text === text[0].repeat(text.length);
  }

  add(line) {
    this.#text.appendData(line);
    this.#rest.data = "";
  }

  show(rest) {
    const mark = this.#fence[0];
    if (rest.trim() && rest.trim() === mark.repeat(rest.trim().length)) return; // perhaps its end
    if (rest.startsWith(this.#rest.data)) this.#rest.appendData(rest.slice(this.#rest.length));
    else this.#rest.data = rest;
  }

  end() {
    this.#text.appendData(this.#rest.data);
    this.#rest.data = "";
  }
}

function isOrdered(line) {
  return /\d/.test(ITEM.exec(line)[2]);
}

function isTable([head, rule]) {
  return head.includes("|") && rule.includes("-") && rule.length < LONG && TABLE_RULE.test(rule);
}

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/(?<!\\)\|$/, "");
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll("\\|", "|"));
}

function table([head, , ...rows]) {
  const titles = cells(head);
  const row = (line) => {
    const given = cells(line);
    return el("tr", {}, ...titles.map((_, i) => el("td", {}, inline(given[i] ?? ""))));
  };
  return el(
    "div",
    { className: "table", tabIndex: 0 },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, ...titles.map((title) => el("th", { scope: "col" }, inline(title))))),
      el("tbody", {}, ...rows.map(row)),
    ),
  );
}
