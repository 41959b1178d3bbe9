// Fills in this browser: starts the worker that holds the network, gives it pixels and takes its fills.

let worker, loaded;
let report = () => {}; // what is told how the loading goes

/** Load the network, once, ahead of the first fill. */
export function load(network) {
  loaded ??= new Promise((resolve, reject) => {
    worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
    worker.onerror = (event) =>
      fail(new Error(event.message || "The network cannot be started in this browser."), reject);
    worker.onmessage = ({ data }) => {
      if (data.type === "loading") report(data.bytes, data.total);
      else if (data.type === "loaded") resolve(data);
      else if (data.type === "error") fail(new Error(data.message), reject);
    };
    worker.postMessage({ type: "load", network });
  });
  return loaded;
}

const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

/** Drop the worker, and the memory it has: the next fill starts another. */
function fail(error, reject) {
  worker?.terminate();
  worker = loaded = undefined;
  reject(error);
}

/**
 * Return {picture, crops, seconds}: the picture with its holes filled.
 * say(text, share): progress. show(picture): what is filled so far. exact(patch): takes each patch as the worker sends
 * it, with its colours as floats; null: it has none.
 */
export async function fillInBrowser({
  network,
  picture,
  mask,
  strategy,
  grow,
  feather,
  signal,
  say,
  show,
  exact = null,
}) {
  report = (bytes, total) => say(`Loading the network, ${megabytes(bytes)} of ${megabytes(total)}`, bytes / total);
  say("Starting the network");
  const cancelled = new Promise((_, reject) => signal.addEventListener("abort", () => reject(signal.reason)));
  await Promise.race([load(network), cancelled]);
  say("Filling");
  return new Promise((resolve, reject) => {
    let filled = picture;
    let pending = Promise.resolve(); // patches are put in place one after the other, before the next crop is read
    signal.addEventListener("abort", () => fail(signal.reason, reject));
    const answers = {
      read: ({ box }) => {
        const pixels = filled.read(box);
        worker.postMessage({ type: "pixels", pixels }, [pixels.buffer]);
      },
      patch: async (patch) => {
        exact?.(patch);
        const pixels = filled.read(patch.box);
        blend(pixels, patch);
        filled = await filled.patched(patch.box, pixels);
        show(filled);
      },
      progress: ({ done, crops }) =>
        say(crops > 1 ? `Filling, ${done} of ${crops} parts` : "Filling", crops > 1 ? done / crops : null),
      error: ({ message }) => fail(new Error(message), reject),
      done: ({ crops, seconds }) => resolve({ picture: filled, crops, seconds }),
    };
    worker.onerror = (event) => fail(new Error(event.message), reject);
    worker.onmessage = ({ data }) => {
      pending = pending.then(() => answers[data.type](data)).catch((error) => fail(error, reject));
    };
    const settings = { strategy, workingSize: network.working_size };
    worker.postMessage({ type: "fill", mask, settings, grow, feather, exact: exact !== null });
  });
}

/** Lay the fill over RGBA pixels by its shares of 0 to 255, rounded as Pillow's paste does. */
function blend(pixels, { colours, shares }) {
  shares.forEach((share, at) => {
    if (!share) return;
    for (let channel = 0; channel < 3; channel++) {
      const sum = colours[at * 3 + channel] * share + pixels[at * 4 + channel] * (255 - share) + 128;
      pixels[at * 4 + channel] = ((sum >> 8) + sum) >> 8;
    }
  });
}
