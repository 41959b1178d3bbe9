// The page: what is open, what was done, and what the controls do. A state is a picture and the shapes painted on it;
// states are never changed, so undo and redo only go back and forth.

import { fillInBrowser, load } from "./browser.js";
import { listen } from "./gestures.js";
import { keep, recall } from "./memory.js";
import { keepDecoded, openPicture } from "./picture.js";
import { fillOnServer } from "./server.js";
import { maskOf } from "./shapes.js";
import { View } from "./view.js";

const SAMPLES = { astronaut: "Astronaut", chelsea: "Cat", coffee: "Coffee", rocket: "Rocket" };
const SMALLEST = 2; // brush, in pixels of the picture

const at = (id) => document.getElementById(id);
const view = new View(at("canvas"));
const brush = { tool: "brush", size: 40, frozen: false };
const states = []; // {picture, shapes, original}
let now = -1;
let busy = null; // the AbortController of what is going on
let saved = null; // the picture that was downloaded last
let page = { server: true, network: null };

const state = () => states[now];

// What is done

async function open(blob, name) {
  if (busy) return;
  await work("Opening", async () => {
    const picture = await openPicture(blob, name);
    await enter({ picture, shapes: [], original: picture });
    view.fit();
    brush.size = Math.max(SMALLEST, Math.round(Math.min(picture.width, picture.height) * 0.07));
    refresh();
    say(`${name} is open.`);
    if (inBrowser()) load(page.network).catch(() => {}); // the fill loads it again, and says what is wrong
    view.canvas.focus({ preventScroll: true });
  });
}

/** Go on to a new state; what had been undone is gone. */
async function enter(next) {
  states.splice(now + 1, Infinity, next);
  now = states.length - 1;
  await show();
}

async function show() {
  const { picture, original, shapes } = state();
  if (view.scene.share !== null && picture === original) compare(false);
  await keepDecoded([picture, original]);
  const resized =
    view.scene.picture && (view.scene.picture.width !== picture.width || view.scene.picture.height !== picture.height);
  at("start").hidden = true;
  view.canvas.hidden = at("zoom").hidden = false;
  view.show({ picture, before: original, shapes });
  if (resized) view.fit();
  refresh();
}

async function step(by) {
  if (busy || !states[now + by]) return;
  now += by;
  await work("Opening", show);
  say(by < 0 ? "Undone." : "Done again.");
}

function painted(shape) {
  if (busy) return;
  enter({ ...state(), shapes: [...state().shapes, shape] });
}

async function fill() {
  if (busy) return busy.abort();
  if (!state()?.shapes.length) return;
  const { picture, shapes, original } = state();
  await work("Filling", async (signal) => {
    const mask = maskOf(shapes, picture.width, picture.height);
    if (!mask.data.includes(1)) throw new Error("Nothing is painted inside the picture. Paint over what is to go.");
    const options = {
      picture,
      mask,
      signal,
      strategy: at("strategy").value,
      grow: Number(at("grow").value),
      feather: Number(at("feather").value),
    };
    const started = performance.now();
    const filled = inBrowser()
      ? (
          await fillInBrowser({
            ...options,
            network: page.network,
            say: progress,
            show: (picture) => view.show({ picture }),
          })
        ).picture
      : await openPicture(await fillOnServer({ ...options, say: progress, askToken }), picture.name);
    await enter({ picture: filled, shapes: [], original });
    say(`Filled in ${((performance.now() - started) / 1000).toFixed(1)} s.`);
  });
  if (!busy) view.show({ picture: state().picture });
}

async function download() {
  if (busy || !state()) return;
  const { picture } = state();
  await work("Writing the file", async () => {
    const { blob, kind, extension } = await picture.file();
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    const stem = picture.name.replace(/\.[^.]+$/, "") || "picture";
    link.download = picture === state().original ? picture.name : `${stem}_filled.${extension}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    saved = picture;
    const changed = kind === picture.kind ? "" : ` as ${kind}, since this browser cannot write ${picture.kind}`;
    say(`Saved ${link.download}${changed}.`);
  });
}

/** Do something that takes time: progress and a way to cancel meanwhile, one line where it fails. */
async function work(text, job) {
  busy = new AbortController();
  at("error").hidden = true;
  const started = performance.now();
  const shown = setTimeout(() => progress(text), 150);
  const clock = setInterval(() => {
    const seconds = Math.round((performance.now() - started) / 1000);
    if (seconds > 1) at("doing").textContent = `${at("doing").dataset.text}, ${seconds} s`;
  }, 1000);
  refresh();
  try {
    await job(busy.signal);
  } catch (error) {
    if (error.name === "AbortError") say("Cancelled.");
    else fail(error);
  } finally {
    clearTimeout(shown);
    clearInterval(clock);
    at("progress").hidden = true;
    busy = null;
    refresh();
  }
}

function progress(text, share = null) {
  at("progress").hidden = false;
  if (share === null) at("bar").removeAttribute("value");
  else at("bar").value = share;
  at("doing").textContent = at("doing").dataset.text = text;
}

function fail(error) {
  at("error").hidden = false;
  at("error").firstElementChild.textContent = error.message;
}

const say = (text) => (at("status").textContent = text);

function compare(on) {
  if (on && (!state() || state().picture === state().original)) return;
  at("divider").hidden = !on;
  at("compare").setAttribute("aria-pressed", String(on));
  view.show({ share: on ? at("share").value / 1000 : null });
  if (on) at("share").focus({ preventScroll: true });
}

function askToken() {
  const dialog = at("token");
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue === "use" ? at("secret").value : null), {
      once: true,
    });
  });
}

// How it looks

function inBrowser() {
  return Boolean(page.network) && (!page.server || document.querySelector("[name=where]:checked").value === "browser");
}

function refresh() {
  const current = state();
  const { picture, shapes, original } = current ?? {};
  at("undo").disabled = Boolean(busy) || now <= 0;
  at("redo").disabled = Boolean(busy) || now >= states.length - 1;
  at("compare").disabled = !current || picture === original;
  at("download").disabled = Boolean(busy) || !current;
  at("tools").disabled = at("size").disabled = !current;
  at("clear").disabled = Boolean(busy) || !shapes?.length;
  brush.frozen = Boolean(busy);
  at("fill").disabled = !busy && !shapes?.length;
  at("fill").textContent = busy ? "Cancel" : "Fill";
  if (current) {
    const name = document.createElement("b");
    name.textContent = picture.name;
    at("about").replaceChildren(name, ` ${picture.width} × ${picture.height} ${picture.kind}`);
    document.title = `${picture.name} - misf`;
  }
  at("size-value").textContent = current ? `${brush.size} px` : "";
  if (current) at("size").value = sliderOf(brush.size);
  at("note").textContent = note(picture);
}

function note(picture) {
  const here = ["localhost", "127.0.0.1", "[::1]"].includes(location.hostname);
  if (!inBrowser()) return `The picture is filled by ${here ? "the server on this computer" : location.host}.`;
  const lost = picture?.source.carries ?? [];
  return `The picture stays on this device.${lost.length ? ` The download will not have ${listed(lost)}.` : ""}`;
}

const listed = (words) => (words.length > 1 ? `${words.slice(0, -1).join(", ")} and ${words.at(-1)}` : words[0]);

// Small brushes matter as much as large ones: the slider is logarithmic.
const largest = () => Math.max(64, Math.round(Math.max(state().picture.width, state().picture.height) / 2));
const sliderOf = (size) => Math.round((100 * Math.log(size / SMALLEST)) / Math.log(largest() / SMALLEST));
const sizeOf = (value) => Math.round(SMALLEST * (largest() / SMALLEST) ** (value / 100));

function resizeBrush(factor) {
  if (!state()) return;
  const wanted = brush.size * factor;
  const rounded = factor > 1 ? Math.ceil(wanted) : Math.floor(wanted);
  brush.size = Math.min(largest(), Math.max(SMALLEST, rounded));
  if (view.scene.cursor) view.show({ cursor: { ...view.scene.cursor, size: brush.size } });
  refresh();
}

// What the controls do

const hand = listen(at("stage"), view, { brush, painted, sized: resizeBrush, said: say });

function choose(tool) {
  brush.tool = tool;
  document.querySelector(`[name=tool][value=${tool}]`).checked = true;
  view.show({ cursor: null });
  compare(false);
  hand.look();
}

for (const input of document.querySelectorAll("[name=tool]"))
  input.addEventListener("change", () => choose(input.value));
for (const id of ["open", "choose"]) at(id).addEventListener("click", () => at("file").click());
at("file").addEventListener("change", () => {
  const [file] = at("file").files;
  if (file) open(file, file.name);
  at("file").value = "";
});
at("undo").addEventListener("click", () => step(-1));
at("redo").addEventListener("click", () => step(1));
at("compare").addEventListener("click", () => compare(view.scene.share === null));
at("download").addEventListener("click", download);
at("fill").addEventListener("click", fill);
at("clear").addEventListener("click", () => enter({ ...state(), shapes: [] }));
at("zoom-in").addEventListener("click", () => view.zoom(1.5));
at("zoom-out").addEventListener("click", () => view.zoom(1 / 1.5));
at("zoom-fit").addEventListener("click", () => view.fit());
at("no-token").addEventListener("click", () => at("token").close());
at("help").addEventListener("click", () => at("keys").showModal());
at("error")
  .querySelector("button")
  .addEventListener("click", () => (at("error").hidden = true));
at("size").addEventListener("input", () => {
  brush.size = sizeOf(Number(at("size").value));
  at("size-value").textContent = `${brush.size} px`;
  const { left, top, width, height } = at("stage").getBoundingClientRect();
  const [x, y] = view.toPicture(left + width / 2, top + height / 2);
  view.show({ cursor: { x, y, size: brush.size } }); // where there is no mouse, nothing else shows the size
});
at("size").addEventListener("change", () => view.show({ cursor: null }));
for (const id of ["grow", "feather"]) {
  at(id).addEventListener("input", () => {
    at(`${id}-value`).textContent = `${at(id).value} px`;
    view.show({ grow: Number(at("grow").value), feather: Number(at("feather").value) });
  });
}
for (const input of document.querySelectorAll("[name=where]")) input.addEventListener("change", refresh);
at("share").addEventListener("input", () => {
  const share = at("share").value / 1000;
  at("divider").style.setProperty("--share", `${share * 100}%`);
  view.show({ share });
});
at("theme").addEventListener("click", () => {
  const { style } = document.documentElement;
  const dark = style.colorScheme ? style.colorScheme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  style.colorScheme = dark ? "light" : "dark";
  keep("localStorage", "misf.theme", style.colorScheme);
});
document.documentElement.style.colorScheme = recall("localStorage", "misf.theme") ?? "";

const narrow = matchMedia("(max-width: 760px)");
const unfold = () => (at("more").open = !narrow.matches);
narrow.addEventListener("change", unfold);
unfold();

const draw = view.draw.bind(view);
view.draw = () => {
  draw();
  at("zoom-level").textContent = `${Math.round(view.scale * 100)} %`;
};

// Files come by drop and paste too

for (const type of ["dragover", "dragleave", "drop"]) {
  window.addEventListener(type, (event) => {
    event.preventDefault();
    at("stage").classList.toggle("over", type === "dragover");
    if (type === "drop") take(event.dataTransfer);
  });
}
window.addEventListener("paste", (event) => {
  if (!document.querySelector("dialog[open]")) take(event.clipboardData); // else it is the token
});

function take(transfer) {
  const files = [...(transfer?.files ?? [])];
  const file = files.find(({ type }) => type.startsWith("image/")) ?? files[0];
  if (file) open(file, file.name || "pasted.png");
  else if (transfer?.types.length) fail(new Error("There is no picture in it. Drop or paste a picture file."));
}

for (const [name, text] of Object.entries(SAMPLES)) {
  const [button, image] = [document.createElement("button"), document.createElement("img")];
  Object.assign(image, { src: `samples/${name}.jpg`, alt: text, draggable: false });
  button.type = "button";
  button.append(image);
  button.addEventListener("click", async () => {
    const answer = await fetch(image.src).catch(() => null);
    if (answer?.ok) open(await answer.blob(), `${name}.jpg`);
    else fail(new Error("The sample cannot be loaded. Choose a picture of your own."));
  });
  at("samples").append(button);
}

at("single-keys").checked = recall("localStorage", "misf.single-keys") !== "off";
at("single-keys").addEventListener("change", (event) => {
  keep("localStorage", "misf.single-keys", event.target.checked ? "on" : "off");
});

window.addEventListener("keydown", (event) => {
  if (document.querySelector("dialog[open]") || event.target.matches("select")) return;
  const control = event.ctrlKey || event.metaKey;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const tools = { b: "brush", e: "eraser", r: "rectangle", l: "lasso", h: "hand" };
  const actions = control
    ? { z: () => step(event.shiftKey ? 1 : -1), y: () => step(1), o: () => at("file").click(), s: download }
    : {
        "[": () => resizeBrush(1 / 1.15),
        "]": () => resizeBrush(1.15),
        "+": () => view.zoom(1.25),
        "=": () => view.zoom(1.25),
        "-": () => view.zoom(1 / 1.25),
        0: () => view.fit(),
        1: () => view.zoom(1 / view.scale),
        c: () => compare(view.scene.share === null),
        f: () => busy ?? fill(),
        "?": () => at("keys").showModal(),
        Escape: () => {
          if (busy) busy.abort();
          else if (view.scene.live) hand.cancel();
          else if (view.scene.share !== null) compare(false);
          else at("error").hidden = true;
        },
      };
  if (!control && event.key.length === 1 && !at("single-keys").checked) return; // speech input types such keys
  if (!control && !event.altKey && key in tools && state()) choose(tools[key]);
  else if (!event.altKey && actions[key]) actions[key]();
  else return;
  event.preventDefault();
});

window.addEventListener("beforeunload", (event) => {
  const current = state();
  if (current && current.picture !== current.original && current.picture !== saved) event.preventDefault();
});

// What this place offers

try {
  page = await (await fetch("page.json")).json();
} catch {
  fail(new Error("The page is not complete: page.json is missing. Serve the whole folder."));
}
at("where").hidden = !(page.server && page.network);
refresh();
if (page.network && "serviceWorker" in navigator) isolate();

/** WebAssembly has threads only on pages with certain headers; a service worker adds them where the host does not. */
async function isolate() {
  await navigator.serviceWorker.register("service-worker.js");
  await navigator.serviceWorker.ready;
  if (crossOriginIsolated || recall("sessionStorage", "misf.isolated") || state() || busy) return;
  if (keep("sessionStorage", "misf.isolated", "tried")) location.reload();
}
