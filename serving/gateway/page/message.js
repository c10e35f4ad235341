// A message of the conversation as it is shown: its text, its calls, its figures and its buttons.
// While an answer comes, all that has come since the last frame of the screen is shown at once.

import { button, copyButton, el } from "./dom.js";
import { Markdown } from "./markdown.js";
import { Tokens, tokenOf } from "./tokens.js";

const FIGURES_EVERY = 250; // milliseconds
const NAMES = { user: "You", assistant: "Answer", tool: "Result" };
const ENDS = { length: "cut at its most tokens", stopped: "stopped", tool_calls: "calls tools" };
const tokensOf = (count) => `${count} ${count === 1 ? "token" : "tokens"}`;
let number = 0;

/** Shows a message, and adds to it what comes. `acts` are called by its buttons. */
export class MessageView {
  #acts;
  #body = el("div", { className: "body" });
  #calls = el("div", { className: "calls" });
  #note = el("div", { className: "note-of" });
  #figures = el("span", { className: "figures" });
  #buttons = el("span", { className: "buttons" });
  #title = el("h2", { id: `message-${++number}` });
  #text = null; // the Markdown, or the tokens
  #shownLength = 0;
  #frame = 0;
  #figuresAt = 0;
  #firstAt = 0;
  #count = 0;
  #isTokens = false;

  constructor(message, acts, { isTokens = false } = {}) {
    this.message = message;
    this.#acts = acts;
    this.#isTokens = isTokens;
    this.element = el(
      "article",
      { className: `message ${message.role}`, "aria-labelledby": this.#title.id },
      this.#title,
      this.#body,
      this.#calls,
      this.#note,
      el("footer", {}, this.#figures, this.#buttons),
    );
    this.render();
  }

  /** Shows the message as it is now, whole. */
  render() {
    this.#showTitle();
    this.#beginText();
    this.#addText();
    this.#endText();
    this.#showCalls();
    this.#showFigures(true);
    this.#showButtons();
  }

  /** Makes ready for what `take` brings. */
  begin() {
    this.element.setAttribute("aria-busy", "true");
    this.#firstAt = 0;
    this.#count = 0;
    this.#note.replaceChildren();
    this.#buttons.replaceChildren();
    this.#beginText();
    this.#addText();
  }

  /** Takes events of the stream; the next frame of the screen shows them. */
  take(events) {
    const { message } = this;
    for (const event of events) {
      if (event.usage) message.usage = this.#usage(event.usage);
      message.model = event.model ?? message.model;
      const choice = event.choices[0];
      if (!choice) continue;
      const { content, tool_calls: calls } = choice.delta;
      if (content || choice.logprobs) {
        this.#firstAt ||= performance.now();
        this.#count += choice.logprobs?.content.length ?? 1;
        message.seconds = (performance.now() - this.#firstAt) / 1000;
      }
      if (content) message.content += content;
      for (const call of calls ?? []) (message.calls ??= []).push({ id: call.id, ...call.function });
      if (choice.logprobs) (message.tokens ??= []).push(...choice.logprobs.content.map(tokenOf));
      if (choice.finish_reason) message.finish = choice.finish_reason;
    }
    this.#frame ||= requestAnimationFrame(() => this.#showFrame());
  }

  /** Ends the answer, however it ended. */
  end() {
    cancelAnimationFrame(this.#frame);
    this.#frame = 0;
    this.message.count = this.#count;
    this.element.removeAttribute("aria-busy");
    this.#addText();
    this.#endText();
    if (isJson(this.message.content) && !this.#showsTokens) this.#beginText();
    this.#showTitle();
    this.#showCalls();
    this.#showFigures(true);
    this.#showButtons();
  }

  /** Shows the answer as its tokens, or as a text. */
  show(isTokens) {
    this.#isTokens = isTokens;
    if (!this.element.hasAttribute("aria-busy")) this.render();
  }

  /** Says something below the message, with buttons of what can be done. */
  note(text, ...buttons) {
    this.#note.replaceChildren(el("p", { textContent: text }), ...buttons);
  }

  #showTitle() {
    const { role, model, name } = this.message;
    this.#title.textContent = NAMES[role];
    if (model || name) this.#title.append(el("span", { textContent: ` ${model ?? name}` }));
  }

  #usage(usage) {
    return {
      prompt: usage.prompt_tokens,
      completion: usage.completion_tokens,
      cached: usage.prompt_tokens_details?.cached_tokens ?? 0,
    };
  }

  get #showsTokens() {
    return this.#isTokens && this.message.tokens?.length > 0;
  }

  #beginText() {
    const { message } = this;
    const fresh = el("div", { className: "body" });
    this.#body.replaceWith(fresh);
    this.#body = fresh;
    this.#shownLength = 0;
    const json = message.role === "user" ? null : isJson(message.content);
    if (this.#showsTokens) {
      fresh.classList.add("tokens");
      this.#text = new Tokens(fresh, message.tokens, (...given) => this.#acts.branch(this, ...given));
    } else if (message.role === "user") {
      fresh.classList.add("plain");
      this.#text = { append: (text) => fresh.append(text), end() {} };
    } else {
      this.#text = new Markdown(fresh);
      if (json) {
        this.#text.append(`\`\`\`json\n${JSON.stringify(json, null, 2)}\n\`\`\`\n`);
        this.#shownLength = message.content.length;
      }
    }
  }

  #addText() {
    const { content, tokens } = this.message;
    // The first tokens may come when the text has begun as one without any.
    if (this.#isTokens && tokens?.length && !(this.#text instanceof Tokens)) this.#beginText();
    if (content.length > this.#shownLength || this.#text instanceof Tokens) {
      this.#text.append(content.slice(this.#shownLength));
      this.#shownLength = content.length;
    }
  }

  #endText() {
    this.#text.end?.();
  }

  #showFrame() {
    this.#frame = 0;
    this.#addText();
    this.#showFigures(false);
    this.#acts.grown();
  }

  #showFigures(isLast) {
    const now = performance.now();
    if (!isLast && now - this.#figuresAt < FIGURES_EVERY) return;
    this.#figuresAt = now;
    const { usage, seconds, finish, role } = this.message;
    if (role !== "assistant") return;
    const count = isLast && usage ? usage.completion : this.#count;
    const words = count ? [tokensOf(count)] : [];
    const timed = this.#count || this.message.count || count;
    if (timed > 1 && seconds > 0) words.push(`${((timed - 1) / seconds).toFixed(1)} tokens/s`);
    if (isLast && usage) {
      const cached = usage.cached ? `, ${usage.cached} of them cached` : "";
      words.push(`prompt ${tokensOf(usage.prompt)}${cached}`);
    }
    if (isLast && ENDS[finish]) words.push(ENDS[finish]);
    this.#figures.textContent = words.join(" \u00b7 ");
  }

  #showButtons() {
    const { role, tokens } = this.message;
    const made = [copyButton(() => this.message.content)];
    if (role !== "tool") made.push(button("Edit", () => this.#edit()));
    if (role === "assistant") {
      made.push(button("Regenerate", () => this.#acts.regenerate(this)));
      if (tokens?.length) {
        const toggle = button("Tokens", () => {
          this.show(!this.#isTokens);
          this.#buttons.querySelector("[aria-pressed]")?.focus();
        });
        toggle.setAttribute("aria-pressed", String(this.#isTokens));
        made.push(toggle);
      }
    }
    this.#buttons.replaceChildren(...made);
  }

  #showCalls() {
    const { calls, results } = this.message;
    if (!calls?.length) {
      this.#calls.replaceChildren();
      return;
    }
    const fields = calls.map((call, i) => {
      const area = el("textarea", { rows: 3, value: results?.[i] ?? "" });
      area.setAttribute("aria-label", `Result of ${call.name}`);
      return area;
    });
    const cards = calls.map((call, i) =>
      el(
        "div",
        { className: "call" },
        el("p", {}, "Calls ", el("code", { textContent: call.name })),
        el("pre", { tabIndex: 0 }, el("code", { textContent: pretty(call.arguments) })),
        el("label", {}, "Its result", fields[i]),
      ),
    );
    const send = button("Send results", () =>
      this.#acts.giveResults(this, fields.map((field) => field.value)),
    );
    this.#calls.replaceChildren(...cards, send);
  }

  #edit() {
    const isQuestion = this.message.role === "user";
    const area = el("textarea", { value: this.message.content, rows: 4 });
    area.setAttribute("aria-label", "The message");
    const done = (changed) => {
      if (changed) this.#acts.edited(this, area.value);
      else this.render();
    };
    this.#body.replaceChildren(area);
    this.#buttons.replaceChildren(
      button(isQuestion ? "Save and answer" : "Save", () => done(true)),
      button("Cancel", () => done(false)),
    );
    area.addEventListener("keydown", (event) => {
      if (event.key !== "Escape") return;
      event.stopPropagation(); // it would stop an answer
      done(false);
    });
    area.focus();
  }
}

/** Returns the object that a text is, if it is nothing else. */
function isJson(text) {
  if (!/^\s*[{[]/.test(text) || text.length > 200_000) return null;
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}

function pretty(text) {
  const value = isJson(text);
  return value ? JSON.stringify(value, null, 2) : text;
}
