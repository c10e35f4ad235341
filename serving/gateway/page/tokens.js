// An answer as its tokens. A colour tells how likely each was; pointing at it, or going to it with
// the arrow keys, tells the number; pressing it lists what might have come in its place.

import { button, byId, el } from "./dom.js";

const STEPS = 5; // of colours

/** Returns a token of an answer as it is kept: text, logprob, alternatives, bytes if needed. */
export function tokenOf(entry) {
  const pair = (token) =>
    token.token.includes("\ufffd")
      ? [token.token, round(token.logprob), token.bytes]
      : [token.token, round(token.logprob)];
  const [text, logprob, bytes] = pair(entry);
  return [text, logprob, (entry.top_logprobs ?? []).map(pair), ...(bytes ? [bytes] : [])];
}

/** Returns the text of tokens up to `count`, and then of one alternative; null if it is no text. */
export function textBefore(tokens, count, alternative) {
  const encoder = new TextEncoder();
  const bytes = tokens.slice(0, count).map(([text, , , raw]) => raw ?? encoder.encode(text));
  bytes.push(alternative[2] ?? encoder.encode(alternative[0]));
  const whole = new Uint8Array(bytes.flatMap((piece) => [...piece]));
  try {
    return new TextDecoder("utf-8", { fatal: true }).decode(whole);
  } catch {
    return null;
  }
}

/** Shows tokens in an element, piece by piece. */
export class Tokens {
  #root;
  #tokens;
  #goOn;
  #line = null;
  #spans = [];
  #current = 0;

  /** `goOn(place, alternative)` is called to answer anew from an alternative. */
  constructor(root, tokens, goOn) {
    this.#root = root;
    this.#tokens = tokens;
    this.#goOn = goOn;
    root.tabIndex = 0;
    root.setAttribute("role", "group");
    root.setAttribute("aria-label", "Tokens. Arrow keys go through them, Enter lists others.");
    root.addEventListener("pointerover", (event) => this.#point(event.target));
    root.addEventListener("pointerleave", () => hideBubble(true));
    root.addEventListener("click", (event) => this.#press(event.target));
    root.addEventListener("keydown", (event) => this.#onKey(event));
    root.addEventListener("blur", () => hideBubble(true));
  }

  /** Adds what has come since the last time. */
  append() {
    for (let i = this.#spans.length; i < this.#tokens.length; i++) {
      const [text, logprob] = this.#tokens[i];
      // A line is an element of its own, so that the browser lays out only the last one again.
      if (!this.#line || this.#tokens[i - 1]?.[0].endsWith("\n")) {
        this.#line = el("div");
        this.#root.append(this.#line);
      }
      const step = Math.min(STEPS - 1, Math.floor((1 - Math.exp(logprob)) * STEPS));
      const span = el("span", { textContent: text, className: `t t${step}` });
      this.#spans.push(span);
      this.#line.append(span);
    }
  }

  #point(target) {
    const place = this.#spans.indexOf(target);
    if (place < 0 || bubble().dataset.pinned) return;
    showBubble(target, [describe(this.#tokens[place])], false);
  }

  #press(target) {
    const place = this.#spans.indexOf(target);
    if (place >= 0) this.#list(place);
  }

  #list(place) {
    const [text, logprob, others] = this.#tokens[place];
    const rows = others.map((other) => {
      const isSame = other[0] === text && other[1] === logprob;
      const before = isSame ? null : textBefore(this.#tokens, place, other);
      const act = () => {
        hideBubble();
        this.#goOn(place, other);
      };
      const choose = button("Go on from here", act, { disabled: before === null });
      choose.setAttribute("aria-label", `Go on with ${shown(other[0]).trim()}`);
      return el(
        "li",
        {},
        el("code", { textContent: shown(other[0]) }),
        el("span", { textContent: percent(other[1]) }),
        isSame ? el("span", { textContent: "taken" }) : choose,
      );
    });
    const list = rows.length ? [el("ol", {}, ...rows)] : [el("p", {}, "The server told no others.")];
    showBubble(this.#spans[place], [describe(this.#tokens[place]), ...list], true, this.#root);
  }

  #onKey(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity }[event.key];
    if (step !== undefined) {
      event.preventDefault();
      this.#spans[this.#current]?.classList.remove("current");
      const last = this.#spans.length - 1;
      this.#current = Math.max(0, Math.min(last, this.#current + step));
      const span = this.#spans[this.#current];
      span?.classList.add("current");
      span?.scrollIntoView({ block: "nearest" });
      if (span) showBubble(span, [describe(this.#tokens[this.#current])], false);
    } else if (event.key === "Enter" && this.#spans.length) {
      event.preventDefault();
      this.#list(this.#current);
    }
  }
}

function describe([text, logprob]) {
  const words = `${shown(text)} ${percent(logprob)}, logarithm ${logprob.toFixed(3)}`;
  return el("p", { textContent: words });
}

const shown = (text) => (text.trim() ? text.replaceAll("\n", "\u21b5") : JSON.stringify(text));
const round = (number) => Math.round(number * 1e4) / 1e4;

function percent(logprob) {
  const value = 100 * Math.exp(logprob);
  return `${value >= 10 ? value.toFixed(1) : value.toPrecision(2)} %`;
}

function bubble() {
  return (
    byId("bubble") ??
    document.body.appendChild(el("div", { id: "bubble", hidden: true, role: "status" }))
  );
}

function showBubble(target, content, isPinned, back = null) {
  const made = bubble();
  made.replaceChildren(...content);
  made.hidden = false;
  if (isPinned) {
    made.dataset.pinned = "yes";
    made.setAttribute("role", "dialog");
    made.setAttribute("aria-label", "What might have come here");
    const close = () => {
      hideBubble();
      back?.focus();
    };
    made.append(button("Close", close));
    made.onkeydown = (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation(); // it would stop an answer
      close();
    };
    made.querySelector("button:not(:disabled)").focus({ preventScroll: true });
  }
  const place = target.getClientRects()[0] ?? target.getBoundingClientRect();
  const { offsetWidth: width, offsetHeight: height } = made;
  const left = Math.max(8, Math.min(place.left, innerWidth - width - 8));
  const isBelow = place.bottom + height + 12 < innerHeight;
  made.style.left = `${left}px`;
  made.style.top = `${isBelow ? place.bottom + 4 : Math.max(8, place.top - height - 4)}px`;
}

/** Hides what is told of a token; one that was pressed stays if `onlyPointed`. */
export function hideBubble(onlyPointed = false) {
  const made = bubble();
  if (onlyPointed && made.dataset.pinned) return;
  delete made.dataset.pinned;
  made.setAttribute("role", "status");
  made.removeAttribute("aria-label");
  made.hidden = true;
}
