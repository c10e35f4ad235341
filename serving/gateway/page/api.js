// The server's own routes, as any client of OpenAI's API uses them.

const TEXTS = {
  401: "The server does not know this key.",
  403: "This key may not do that.",
  429: "The server has too much to do for this key right now.",
  503: "The model is not ready.",
};

/** A failure, with what a person can do about it: `kind` is offline, cut, key, busy or refused. */
export class ServerError extends Error {
  constructor(kind, text, { detail = "", retryAfter = null } = {}) {
    super(text);
    this.kind = kind;
    this.detail = detail;
    this.retryAfter = retryAfter; // seconds
  }
}

/** Returns the served model and its adapters, as /v1/models lists them. */
export async function listModels(key) {
  const response = await ask("v1/models", key, {});
  return (await response.json()).data;
}

/**
 * Asks for a chat as a stream, and yields the events that came together as one list.
 * Throws ServerError; of kind `cut` where the answer broke off after it had begun.
 */
export async function* chatEvents(body, key, signal) {
  const response = await ask("v1/chat/completions", key, {
    method: "POST",
    headers: { "content-type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let isWhole = false;
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      const events = [];
      for (const line of lines) {
        if (line === "data: [DONE]") isWhole = true;
        else if (line.startsWith("data: ")) events.push(JSON.parse(line.slice(6)));
      }
      const failed = events.find((event) => event.error);
      yield events.filter((event) => !event.error);
      if (failed) throw cut(failed.error.message);
    }
  } catch (error) {
    if (signal?.aborted || error instanceof ServerError) throw error;
    throw cut("");
  } finally {
    reader.cancel().catch(() => {});
  }
  if (!isWhole) throw cut("");
}

function cut(detail) {
  return new ServerError("cut", "The answer broke off: the connection or the server ended.", {
    detail,
  });
}

async function ask(path, key, options) {
  const headers = { ...options.headers, ...(key ? { authorization: `Bearer ${key}` } : {}) };
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), {
      ...options,
      headers,
      cache: "no-store",
    });
  } catch (error) {
    if (options.signal?.aborted) throw error;
    throw new ServerError("offline", "The server cannot be reached. It may be starting again.");
  }
  if (response.ok) return response;
  let detail = "";
  try {
    const body = await response.json();
    detail = body.error?.message ?? body.message ?? "";
  } catch {
    // A proxy in front of the server answers in its own words.
  }
  const kind = { 401: "key", 403: "key", 429: "busy", 503: "busy" }[response.status] ?? "refused";
  const text = TEXTS[response.status] ?? `The server refused this (status ${response.status}).`;
  const after = Number.parseFloat(response.headers.get("retry-after"));
  throw new ServerError(kind, key || kind !== "key" ? text : "The server asks for a key.", {
    detail,
    retryAfter: Number.isFinite(after) ? after : null,
  });
}
