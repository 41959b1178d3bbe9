// The network, on ONNX Runtime's WebAssembly, away from the page's own thread.
//
// In:  {type: "load", network}, {type: "fill", mask, settings, grow, feather, exact}, {type: "pixels", pixels}
// Out: {type: "loading", bytes, total}, {type: "loaded", threads}, {type: "read", box}, {type: "patch", box, colours,
//      shares, exact}, {type: "progress", done, crops}, {type: "done", crops, seconds}, {type: "error", message}

import { cut } from "./grid.js";
import { fillHoles } from "./inpaint.js";
import { feathered, grownMask } from "./masks.js";

let session, ort;
let pixelsCame = () => {};

self.onmessage = async ({ data }) => {
  try {
    if (data.type === "load") await load(data.network);
    else if (data.type === "fill") await fill(data);
    else if (data.type === "pixels") pixelsCame(data.pixels);
  } catch (error) {
    self.postMessage({ type: "error", message: explained(error) });
  }
};

async function load({ file, runtime, bytes }) {
  const total = bytes.network + bytes.runtime;
  const counts = [0, 0];
  const counted = (index) => (count) => {
    counts[index] = count;
    self.postMessage({ type: "loading", bytes: counts[0] + counts[1], total });
  };
  const [model, wasm] = await Promise.all([
    fetched(new URL(`../${file}`, import.meta.url), counted(0)),
    fetched(new URL(`../${runtime.wasm}`, import.meta.url), counted(1)),
  ]);
  ort = await import(new URL(`../${runtime.script}`, import.meta.url));
  ort.env.wasm.wasmBinary = wasm.buffer;
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  ort.env.logLevel = "error";
  session = await ort.InferenceSession.create(model, { executionProviders: ["wasm"], enableMemPattern: false });
  self.postMessage({ type: "loaded", threads: ort.env.wasm.numThreads });
}

async function fetched(url, count) {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url.pathname} cannot be loaded (${answer.status}). Reload the page.`);
  const parts = [];
  let length = 0;
  for (let reader = answer.body.getReader(), part; !(part = await reader.read()).done; count(length)) {
    parts.push(part.value);
    length += part.value.length;
  }
  const packed = parts[0]?.[0] === 0x1f && parts[0][1] === 0x8b; // gzip, unless the host has said so and it is undone
  const { readable, writable } = packed ? new DecompressionStream("gzip") : new TransformStream();
  const done = new Response(readable).arrayBuffer();
  await new Blob(parts).stream().pipeTo(writable);
  return new Uint8Array(await done);
}

async function fill({ mask, settings, grow, feather, exact }) {
  const grown = grownMask(mask, grow);
  const { hole, shares } = feather ? feathered(grown, feather) : { hole: grown, shares: null };
  let seconds = 0;
  const { crops } = await fillHoles({
    mask: hole,
    settings,
    read: (box) =>
      new Promise((resolve) => {
        pixelsCame = resolve;
        self.postMessage({ type: "read", box });
      }),
    run: async (image, seenHole, height, width) => {
      const started = performance.now();
      const { output } = await session.run({
        image: new ort.Tensor("float32", image, [1, 3, height, width]),
        mask: new ort.Tensor("float32", seenHole, [1, 1, height, width]),
      });
      seconds += (performance.now() - started) / 1000;
      return output.data;
    },
    paste: (box, colours, { data }, floats) => {
      const blended = shares && cut(shares, box).data;
      const parts = data.map((inside, at) => (inside ? (blended?.[at] ?? 255) : 0));
      self.postMessage({ type: "patch", box, colours, shares: parts, exact: exact ? floats : null }, [colours.buffer]);
    },
    progress: (done, crops) => self.postMessage({ type: "progress", done, crops }),
  });
  self.postMessage({ type: "done", crops, seconds });
}

function explained(error) {
  const text = String(error?.message ?? error);
  const memory = /memory|bad_alloc|allocat/i.test(text) || typeof error === "number"; // WebAssembly throws an address
  return memory
    ? "This browser ran out of memory. Paint a smaller hole, or close other tabs and reload the page."
    : text;
}
