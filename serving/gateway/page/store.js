// What this browser keeps: the conversation and the settings in localStorage, and the key in
// sessionStorage, which ends with the tab, or in localStorage if the person asks for that.

const PLACE = `mixtral-jax:${new URL(".", document.baseURI).pathname}:`; // of this server alone
const VERSION = 1;
const MOST_KEPT_TOKENS = 4000; // whose probabilities are kept too: there is room for 5 MB or so
const ROLES = ["user", "assistant", "tool"];

/** Returns a conversation without a message. */
export function emptyConversation() {
  return { version: VERSION, system: "", messages: [] };
}

/** Returns the key, and whether it outlives the tab. */
export function readKey() {
  const kept = get(() => localStorage, "key");
  return { key: kept ?? get(() => sessionStorage, "key") ?? "", isKept: kept !== null };
}

export function writeKey(key, isKept) {
  remove("key");
  if (key) put(() => (isKept ? localStorage : sessionStorage), "key", key);
}

export function readSettings() {
  return parsed(get(() => localStorage, "settings")) ?? {};
}

export function writeSettings(settings) {
  put(() => localStorage, "settings", JSON.stringify(settings));
}

/** Returns the theme that was chosen, `light` or `dark`; null: as the machine has it. */
export function readTheme() {
  return get(() => localStorage, "theme");
}

export function writeTheme(theme) {
  put(() => localStorage, "theme", theme);
}

/** Returns the conversation of the last visit. */
export function readConversation() {
  try {
    return checked(parsed(get(() => localStorage, "conversation")));
  } catch {
    return emptyConversation();
  }
}

/**
 * Keeps a conversation; without probabilities, where they are too many, or `isQuick`: an answer that
 * still comes is kept often. Returns whether there was room.
 */
export function writeConversation(conversation, isQuick) {
  let left = isQuick ? -1 : MOST_KEPT_TOKENS;
  const messages = conversation.messages.toReversed().map((message) => {
    left -= message.tokens?.length ?? 0;
    return left < 0 ? { ...message, tokens: undefined } : message;
  });
  const kept = { ...conversation, messages: messages.toReversed() };
  return put(() => localStorage, "conversation", JSON.stringify(kept));
}

/** Returns a conversation from the text of a file; throws an Error that says what is wrong. */
export function importConversation(text) {
  return checked(JSON.parse(text));
}

function checked(given) {
  if (given?.version !== VERSION || !Array.isArray(given.messages)) {
    throw new Error("This file is not a conversation that this page has exported.");
  }
  const messages = given.messages.map((message, i) => {
    if (!ROLES.includes(message?.role) || typeof message.content !== "string") {
      throw new Error(`Message ${i + 1} of the file is none that this page has written.`);
    }
    const calls = Array.isArray(message.calls) ? message.calls.filter(isCall) : undefined;
    const tokens = Array.isArray(message.tokens) ? message.tokens.filter(isToken) : undefined;
    return { ...pick(message), calls, tokens };
  });
  return { version: VERSION, system: String(given.system ?? ""), messages };
}

function pick({ role, content, model, usage, seconds, finish, isPartial, callId, name }) {
  const numbers = Object.entries(usage ?? {}).filter(([, value]) => Number.isFinite(value));
  return {
    role,
    content,
    model: typeof model === "string" ? model : undefined,
    usage: numbers.length ? Object.fromEntries(numbers) : undefined,
    seconds: Number.isFinite(seconds) ? seconds : undefined,
    finish: typeof finish === "string" ? finish : undefined,
    isPartial: isPartial === true || undefined,
    callId: typeof callId === "string" ? callId : undefined,
    name: typeof name === "string" ? name : undefined,
  };
}

const isCall = (call) => [call?.id, call?.name, call?.arguments].every((x) => typeof x === "string");
const isPair = (pair) => typeof pair?.[0] === "string" && typeof pair?.[1] === "number";
const isToken = (token) => isPair(token) && Array.isArray(token[2]) && token[2].every(isPair);

function get(storage, name) {
  try {
    return storage().getItem(PLACE + name);
  } catch {
    return null; // the browser keeps nothing for this page
  }
}

function put(storage, name, value) {
  try {
    storage().setItem(PLACE + name, value);
    return true;
  } catch {
    return false;
  }
}

function remove(name) {
  for (const storage of [() => localStorage, () => sessionStorage]) {
    try {
      storage().removeItem(PLACE + name);
    } catch {
      // Nothing is kept there.
    }
  }
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return null;
  }
}
