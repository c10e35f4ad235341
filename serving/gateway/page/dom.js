// Elements are made by calls, never from markup: what a model writes can only become text.

/** Returns an element. Keys of `fields` are its properties; those with a dash, its attributes. */
export function el(tag, fields = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(fields)) {
    if (name === "on") {
      for (const [type, act] of Object.entries(value)) element.addEventListener(type, act);
    } else if (name.includes("-") || name === "role") {
      if (value !== null) element.setAttribute(name, value);
    } else {
      element[name] = value;
    }
  }
  element.append(...children);
  return element;
}

/** Returns a button that acts when it is pressed. */
export function button(text, act, fields = {}) {
  return el("button", { type: "button", textContent: text, on: { click: act }, ...fields });
}

/** Returns the element of an id. */
export const byId = (id) => document.getElementById(id);

/** Copies a text to the clipboard; returns whether that worked. */
export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Browsers have no clipboard on plain HTTP from another machine, only this older way.
    const area = el("textarea", { value: text, className: "aside" });
    const before = document.activeElement;
    document.body.append(area);
    area.select();
    const copied = document.execCommand("copy");
    area.remove();
    before?.focus();
    return copied;
  }
}

/** Returns a button that copies what `text` returns, and says for a while that it did. */
export function copyButton(text, label = "Copy") {
  const made = button(label, async () => {
    made.textContent = (await copy(text())) ? "Copied" : "Not copied";
    setTimeout(() => (made.textContent = label), 2000);
  });
  return made;
}

/** Offers a text as a file to keep. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  el("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 10_000);
}
