// What has gone wrong, as it is told above the field for the next message.

import { button, byId, el } from "./dom.js";

let countdown = 0;

/** Tells a problem, and offers to act again when so many seconds have passed. */
export function waitAndOffer(text, seconds, act) {
  const again = button("Try again", act);
  const until = performance.now() + seconds * 1000;
  // Numbers that change each second are no news to a screen reader.
  const left = el("span", { "aria-hidden": "true" });
  const tick = () => {
    const rest = Math.ceil((until - performance.now()) / 1000);
    left.textContent = rest > 0 ? ` Try again in ${rest} s. ` : " ";
    again.disabled = rest > 0;
    if (rest <= 0) clearInterval(countdown);
  };
  showProblem(text, left, again);
  countdown = setInterval(tick, 250);
  tick();
}

/** Tells a problem, with what can be done about it, in place of the one before. */
export function showProblem(text, ...more) {
  clearProblem();
  byId("problem").replaceChildren(el("span", { textContent: `${text} ` }), ...more);
}

/** Takes away what is told. */
export function clearProblem() {
  clearInterval(countdown);
  delete byId("problem").dataset.of;
  byId("problem").replaceChildren();
}
