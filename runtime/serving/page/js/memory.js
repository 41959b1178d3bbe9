// What the browser keeps for us. One that refuses cookies refuses this too: then nothing is kept.

/** storage: "localStorage" or "sessionStorage". Return the text, or null. */
export function recall(storage, name) {
  try {
    return window[storage].getItem(name);
  } catch {
    return null;
  }
}

/** Return whether it is kept. */
export function keep(storage, name, text) {
  try {
    window[storage].setItem(name, text);
    return true;
  } catch {
    return false;
  }
}
