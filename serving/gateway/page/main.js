// The conversation: what is asked, answered, stopped, changed and kept.

import { chatEvents, listModels, ServerError } from "./api.js";
import { button, byId, download } from "./dom.js";
import { MessageView } from "./message.js";
import { clearProblem, showProblem, waitAndOffer } from "./problem.js";
import {
  currentKey,
  requestOf,
  save as saveSettings,
  SettingsError,
  setUpSettings,
  showModels,
  showsTokens,
} from "./settings.js";
import {
  emptyConversation,
  importConversation,
  readConversation,
  readTheme,
  writeConversation,
  writeTheme,
} from "./store.js";
import { hideBubble } from "./tokens.js";

const SAVE_EVERY = 2000; // milliseconds, while an answer comes
const NEAR = 80; // pixels from the end within which the page follows an answer

let conversation = emptyConversation();
let views = [];
let running = null; // the AbortController of the answer that comes
let follows = true;
let refreshes = 0; // of the list of models
const scroller = byId("scroller");

const acts = {
  grown: followEnd,
  regenerate(view) {
    if (running) return;
    const place = views.indexOf(view);
    const before = conversation.messages.slice(place);
    truncate(place);
    answer(null, before);
  },
  edited(view, text) {
    if (running) return;
    const { message } = view;
    message.content = text;
    delete message.tokens;
    view.render();
    if (message.role === "user") {
      truncate(views.indexOf(view) + 1);
      answer();
    }
    keep();
  },
  branch(view, place, alternative) {
    if (running) return;
    const { message } = view;
    truncate(views.indexOf(view) + 1);
    const [text, logprob, bytes] = alternative;
    const others = message.tokens[place][2];
    const before = message.tokens.slice(0, place).map(([piece]) => piece);
    message.tokens = [
      ...message.tokens.slice(0, place),
      bytes ? [text, logprob, others, bytes] : [text, logprob, others],
    ];
    message.content = [...before, text].join("");
    delete message.calls;
    answer(view);
  },
  giveResults(view, results) {
    if (running) return;
    truncate(views.indexOf(view) + 1);
    view.message.results = results;
    view.message.calls.forEach((call, i) =>
      add({ role: "tool", content: results[i], callId: call.id, name: call.name }),
    );
    answer();
  },
};

function add(message) {
  conversation.messages.push(message);
  const view = new MessageView(message, acts, { isTokens: showsTokens() });
  views.push(view);
  byId("messages").append(view.element);
  byId("empty").hidden = true;
  return view;
}

function truncate(length) {
  running?.abort();
  hideBubble(); // it may be of a message that goes
  for (const view of views.splice(length)) view.element.remove();
  conversation.messages.length = Math.min(length, conversation.messages.length);
  byId("empty").hidden = views.length > 0;
}

function show(given) {
  truncate(0);
  if (byId("problem").dataset.of !== "door") clearProblem(); // it was of an answer that is gone
  conversation = { ...given, messages: [] };
  byId("system").value = conversation.system;
  for (const message of given.messages) add(message);
  const last = views.at(-1);
  if (last?.message.isPartial) offerMore(last, "This answer broke off.");
  follows = true;
  followEnd();
}

/**
 * Asks for the next answer, or for more of the one that `more` shows. The messages of `before` come
 * back if there is no answer in their place.
 */
async function answer(more = null, before = []) {
  if (running) return;
  clearProblem();
  let body;
  try {
    body = requestOf(conversation, { goesOn: more !== null });
  } catch (error) {
    if (!(error instanceof SettingsError)) throw error;
    showProblem(error.message);
    openSettings(true);
    error.field.focus();
    return;
  }
  const view = more ?? add({ role: "assistant", content: "" });
  const { message } = view;
  const controller = new AbortController();
  setRunning(controller);
  for (const name of ["finish", "usage", "seconds"]) delete message[name];
  message.isPartial = true;
  view.begin();
  follows = true;
  followEnd();
  say("The answer begins.");
  let savedAt = performance.now();
  try {
    for await (const events of chatEvents(body, currentKey(), controller.signal)) {
      view.take(events);
      if (performance.now() - savedAt > SAVE_EVERY) {
        savedAt = performance.now();
        keep(true);
      }
    }
    delete message.isPartial;
    view.end();
    if (message.finish === "length") offerMore(view, "The answer was cut at its most tokens.");
    say(`The answer is complete: ${message.usage?.completion ?? message.count} tokens.`);
  } catch (error) {
    if (controller.signal.aborted) {
      message.finish = "stopped";
      delete message.isPartial;
      view.end();
      if (message.content) offerMore(view, "Stopped.");
      say("The answer was stopped.");
    } else if (error instanceof ServerError) {
      view.end();
      const place = views.indexOf(view);
      explain(error, view, () => (before.length ? acts.regenerate(views[place]) : answer(more)));
    } else {
      view.end();
      throw error;
    }
  } finally {
    // What has nothing to show is no message.
    if (!message.content && !message.calls && !message.finish) dropEmpty(view, before);
    if (running === controller) setRunning(null);
    keep();
    followEnd();
  }
}

function dropEmpty(view, before) {
  const place = views.indexOf(view);
  if (place < 0) return;
  truncate(place);
  before.forEach(add);
}

function explain(error, view, again) {
  const text = [error.message, error.detail].filter(Boolean).join(" ");
  if (error.kind === "cut" && (view.message.content || view.message.calls)) {
    offerMore(view, text);
    say(text);
    return;
  }
  if (error.kind === "key") {
    showProblem(text, button("Enter the key", askKey));
    byId("problem").dataset.of = "door";
  } else if (error.kind === "busy") {
    waitAndOffer(text, error.retryAfter ?? 1, again);
  } else {
    showProblem(text, button("Try again", again));
  }
}

function offerMore(view, text) {
  const more = view.message.calls ? [] : [button("Go on", () => answer(view))];
  view.note(text, ...more, button("Regenerate", () => acts.regenerate(view)));
}

function askKey() {
  openSettings(true);
  byId("key").focus();
}

function say(text) {
  byId("status").textContent = text;
}

function setRunning(controller) {
  running = controller;
  const hadFocus = [byId("send"), byId("stop")].includes(document.activeElement);
  byId("send").hidden = controller !== null;
  byId("stop").hidden = controller === null;
  if (hadFocus) byId(controller ? "stop" : "send").focus();
  for (const name of ["new", "import"]) byId(name).disabled = controller !== null;
}

function keep(isQuick = false) {
  if (!writeConversation(conversation, isQuick)) {
    say("This browser has no room for the conversation; export it to keep it.");
  }
}

function followEnd() {
  if (follows) scroller.scrollTop = scroller.scrollHeight;
}

function openSettings(isOpen) {
  byId("settings").hidden = !isOpen;
  byId("toggle").setAttribute("aria-expanded", String(isOpen));
}

async function refreshModels() {
  // What the server says of the key before is no news, however late it comes.
  const number = ++refreshes;
  const isStale = () => number !== refreshes;
  try {
    const models = await listModels(currentKey());
    if (isStale()) return;
    showModels(models);
    // What is told of an answer stays.
    if (byId("problem").dataset.of === "door") clearProblem();
  } catch (error) {
    if (!(error instanceof ServerError)) throw error;
    if (isStale()) return;
    if (error.kind === "key") showProblem(error.message, button("Enter the key", askKey));
    else showProblem(error.message, button("Try again", refreshModels));
    byId("problem").dataset.of = "door";
  }
}

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  byId("dark").setAttribute("aria-pressed", String(theme === "dark"));
}

function submit(event) {
  event.preventDefault();
  const prompt = byId("prompt");
  if (running || !prompt.value.trim()) return;
  add({ role: "user", content: prompt.value });
  prompt.value = "";
  answer();
}

function setUp() {
  const prefersDark = matchMedia("(prefers-color-scheme: dark)");
  setTheme(readTheme() ?? (prefersDark.matches ? "dark" : "light"));
  prefersDark.addEventListener("change", () => {
    if (!readTheme()) setTheme(prefersDark.matches ? "dark" : "light");
  });
  byId("dark").addEventListener("click", () => {
    const theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
    writeTheme(theme);
    setTheme(theme);
  });
  setUpSettings({
    onKey: refreshModels,
    onShown: () => views.forEach((view) => view.show(showsTokens())),
  });
  byId("composer").addEventListener("submit", submit);
  byId("prompt").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
  });
  byId("stop").addEventListener("click", () => running?.abort());
  byId("new").addEventListener("click", () => {
    show({ ...emptyConversation(), system: conversation.system });
    keep();
    byId("prompt").focus();
  });
  byId("toggle").addEventListener("click", () => openSettings(byId("settings").hidden));
  byId("close").addEventListener("click", () => {
    openSettings(false);
    byId("toggle").focus();
  });
  byId("model").addEventListener("change", saveSettings);
  byId("system").addEventListener("input", () => {
    conversation.system = byId("system").value;
    keep();
  });
  byId("export").addEventListener("click", () =>
    download("conversation.json", JSON.stringify(conversation, null, 2)),
  );
  byId("import").addEventListener("click", () => byId("file").click());
  byId("file").addEventListener("change", importFile);
  scroller.addEventListener("scroll", () => {
    follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    hideBubble();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && running) running.abort();
  });
  addEventListener("pagehide", () => keep());
  openSettings(matchMedia("(min-width: 70rem)").matches);
  show(readConversation());
  refreshModels();
  // On a telephone this would bring up the keyboard.
  if (!matchMedia("(pointer: coarse)").matches) byId("prompt").focus();
}

async function importFile() {
  const [file] = byId("file").files;
  byId("file").value = "";
  if (!file) return;
  try {
    show(importConversation(await file.text()));
    keep();
  } catch (error) {
    showProblem(`${file.name} cannot be imported. ${error.message}`);
  }
}

setUp();
