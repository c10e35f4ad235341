// The panel of settings, and the request that they make of a conversation.

import { button, byId, el } from "./dom.js";
import { readKey, readSettings, writeKey, writeSettings } from "./store.js";

const ALTERNATIVES = 5;
const NUMBERS = [
  ["temperature", "Temperature", 0, 2, 0.1],
  ["top_p", "Top p", 0, 1, 0.05],
  ["top_k", "Top k", 0, 2 ** 31 - 1, 1],
  ["min_p", "Min p", 0, 1, 0.01],
  ["max_tokens", "Most tokens of an answer", 1, 2 ** 31 - 1, 1],
  ["seed", "Seed", 0, Number.MAX_SAFE_INTEGER, 1],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1],
  ["repetition_penalty", "Repetition penalty", 0.01, 100, 0.05],
];
const SAVED = ["probabilities", "shown", "format", "schema", "strict", "tool_choice"];
const EXAMPLE_SCHEMA = {
  type: "object",
  properties: { city: { type: "string" }, people: { type: "integer" } },
  required: ["city", "people"],
  additionalProperties: false,
};
const EXAMPLE_FUNCTION = {
  name: "weather",
  description: "The weather of a place today.",
  parameters: { type: "object", properties: { place: { type: "string" } }, required: ["place"] },
};

/** A setting that cannot be sent: the message says why, and `field` is where it stands. */
export class SettingsError extends Error {
  constructor(text, field) {
    super(text);
    this.field = field;
  }
}

/** Makes the fields, fills them with what this browser has kept, and keeps every change. */
export function setUpSettings({ onKey, onShown }) {
  for (const [name, text, min, max, step] of NUMBERS) {
    const input = el("input", { type: "number", id: name, min, max, step, inputMode: "decimal" });
    byId("parameters").append(el("label", { className: "row" }, el("span", {}, text), input));
  }
  const stops = el("textarea", { id: "stop-texts", rows: 2 });
  byId("parameters").append(el("label", {}, el("span", {}, "Texts that end it, one a line"), stops));
  fill(readSettings());
  const { key, isKept } = readKey();
  byId("key").value = key;
  byId("keep").checked = isKept;
  for (const name of ["key", "keep"]) {
    byId(name).addEventListener("change", () => {
      writeKey(currentKey(), byId("keep").checked);
      onKey();
    });
  }
  byId("forget").addEventListener("click", () => {
    byId("key").value = "";
    byId("keep").checked = false;
    writeKey("", false);
    byId("key").focus();
  });
  byId("add-function").addEventListener("click", () => {
    addFunction(JSON.stringify(EXAMPLE_FUNCTION, null, 2)).focus();
    save();
  });
  byId("options").addEventListener("input", save);
  byId("options").addEventListener("submit", (event) => event.preventDefault());
  byId("shown").addEventListener("change", onShown);
  byId("format").addEventListener("change", showSchema);
}

export const currentKey = () => byId("key").value.trim();
export const showsTokens = () => byId("shown").checked;

/** Chooses among the models that the server lists, and keeps the choice. */
export function showModels(cards) {
  const select = byId("model");
  const own = Object.fromEntries(cards.map((card) => [card.id, card.default_sampling_params ?? {}]));
  // An empty field shows what the model's makers advise, which then holds.
  const showOwn = () => {
    for (const [name] of NUMBERS) byId(name).placeholder = own[select.value]?.[name] ?? "";
  };
  select.onchange = showOwn;
  const before = select.value || readSettings().model;
  const options = cards.map((card) =>
    el("option", { value: card.id, textContent: card.parent ? `${card.id} (adapter)` : card.id }),
  );
  select.replaceChildren(...options);
  if (cards.some((card) => card.id === before)) select.value = before;
  showOwn();
}

/** Returns the body of a request. Throws SettingsError. */
export function requestOf(conversation, { goesOn = false } = {}) {
  const messages = conversation.messages.map(messageOf);
  if (goesOn) messages.at(-1).prefix = true;
  if (conversation.system.trim()) {
    messages.unshift({ role: "system", content: conversation.system });
  }
  const body = { messages, stream: true, stream_options: { include_usage: true } };
  if (byId("model").value) body.model = byId("model").value;
  for (const [name, text] of NUMBERS) {
    const field = byId(name);
    if (!field.value && !field.validity.badInput) continue;
    const { badInput, rangeOverflow, rangeUnderflow } = field.validity;
    if (badInput || rangeOverflow || rangeUnderflow) {
      throw new SettingsError(`${text} goes from ${field.min} to ${field.max}.`, field);
    }
    body[name] = Number(field.value);
  }
  const stops = byId("stop-texts").value.split("\n").filter((line) => line);
  if (stops.length) body.stop = stops;
  if (byId("probabilities").checked) {
    Object.assign(body, { logprobs: true, top_logprobs: ALTERNATIVES });
  }
  return Object.assign(body, formatOf(), toolsOf());
}

function messageOf({ role, content, calls, callId, name }) {
  if (role === "tool") return { role, content, tool_call_id: callId, name };
  if (!calls?.length) return { role, content };
  const tool_calls = calls.map((call) => ({
    id: call.id,
    type: "function",
    function: { name: call.name, arguments: call.arguments },
  }));
  return { role, content, tool_calls };
}

function formatOf() {
  const type = byId("format").value;
  if (type === "text") return {};
  if (type === "json_object") return { response_format: { type } };
  const schema = json(byId("schema"), "The JSON Schema");
  const json_schema = { name: "answer", schema, strict: byId("strict").checked };
  return { response_format: { type, json_schema } };
}

function toolsOf() {
  const fields = [...document.querySelectorAll("#functions textarea")];
  if (!fields.length) return {};
  const tools = fields.map((field) => ({ type: "function", function: json(field, "The function") }));
  return { tools, tool_choice: byId("tool_choice").value };
}

function json(field, name) {
  try {
    const value = JSON.parse(field.value);
    if (value !== null && typeof value === "object" && !Array.isArray(value)) return value;
  } catch (error) {
    throw new SettingsError(`${name} is not JSON: ${error.message}`, field);
  }
  throw new SettingsError(`${name} must be a JSON object.`, field);
}

function addFunction(text) {
  const area = el("textarea", { value: text, rows: 8, className: "code", spellcheck: false });
  area.setAttribute("aria-label", "A function, as JSON");
  const drop = button("Remove the function", () => {
    row.remove();
    save();
    byId("add-function").focus();
  });
  const row = el("div", { className: "function" }, area, drop);
  byId("functions").append(row);
  return area;
}

function showSchema() {
  byId("schema-part").hidden = byId("format").value !== "json_schema";
}

function fill(settings) {
  for (const [name] of NUMBERS) byId(name).value = settings[name] ?? "";
  byId("stop-texts").value = settings.stops ?? "";
  byId("schema").value = JSON.stringify(EXAMPLE_SCHEMA, null, 2);
  for (const name of SAVED) {
    const field = byId(name);
    if (settings[name] === undefined) continue;
    if (field.type === "checkbox") field.checked = settings[name] === true;
    else field.value = settings[name];
  }
  for (const text of settings.functions ?? []) addFunction(String(text));
  showSchema();
}

/** Keeps the settings; the key has a place of its own. */
export function save() {
  const settings = { model: byId("model").value, stops: byId("stop-texts").value };
  for (const [name] of NUMBERS) if (byId(name).value) settings[name] = byId(name).value;
  for (const name of SAVED) {
    const field = byId(name);
    settings[name] = field.type === "checkbox" ? field.checked : field.value;
  }
  const areas = document.querySelectorAll("#functions textarea");
  settings.functions = [...areas].map((area) => area.value);
  writeSettings(settings);
}
