// Fills on the server: the file's own bytes and a mask go there, the file comes back in its own format.

import { keep, recall } from "./memory.js";

const BUSY_TRIES = 4;
let token = recall("sessionStorage", "misf.token");

/** The filled picture's file. askToken: () => Promise of a token or null, for a server that wants one. */
export async function fillOnServer({ picture, mask, strategy, grow, feather, signal, say, askToken }) {
  const { blob, extension } = await picture.file();
  const form = new FormData();
  form.append("image", blob, `picture.${extension}`);
  form.append("mask", await maskAsPng(mask), "mask.png");
  const query = new URLSearchParams({ strategy, grow, feather });
  for (let tries = 1; ; tries++) {
    const answer = await post(`inpaint?${query}`, form, signal);
    if (answer.ok) return answer.blob();
    if (answer.status === 401 && (token = await askToken())) {
      keep("sessionStorage", "misf.token", token);
    } else if (answer.status === 503 && tries < BUSY_TRIES) {
      const seconds = Math.min(30, Number(answer.headers.get("Retry-After")) || 2);
      say(`The server is busy. Trying again in ${seconds} s`);
      await wait(seconds * 1000, signal);
    } else {
      throw new Error(await explained(answer));
    }
  }
}

async function post(url, body, signal) {
  const headers = { Accept: "image/*", ...(token ? { Authorization: `Bearer ${token}` } : {}) };
  try {
    return await fetch(url, { method: "POST", body, signal, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The server does not answer. Check that it is running and reachable, then fill again.");
  }
}

async function explained(answer) {
  let said = "";
  try {
    const { error, detail } = await answer.json();
    said = typeof detail === "string" && detail ? detail : error;
  } catch {
    // No JSON: another machine between here and our server has answered.
  }
  const known = {
    401: "This server asks for a token that it knows. Fill again to enter one.",
    413: "The picture is larger than this server accepts. Reduce it, or ask its operator to raise the limit.",
    503: "The server is busy. Fill again in a minute.",
    504: "The fill took longer than this server allows. Paint less, or choose “the surroundings of each hole”.",
  };
  if (answer.status === 401) keep("sessionStorage", "misf.token", "");
  if (said) return known[answer.status] ? `${known[answer.status]} (${said})` : said;
  return known[answer.status] ?? `The server answered with an error (${answer.status}). Its log says more.`;
}

function wait(milliseconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, milliseconds);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
}

/** A PNG of one bit per pixel, white where the mask is 1. */
export async function maskAsPng({ data, width, height }) {
  const stride = 1 + Math.ceil(width / 8); // a row begins with its filter, none
  const rows = new Uint8Array(stride * height);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      if (data[y * width + x]) rows[y * stride + 1 + (x >> 3)] |= 0x80 >> (x & 7);
    }
  }
  const packed = new Blob([rows]).stream().pipeThrough(new CompressionStream("deflate"));
  const header = new DataView(new ArrayBuffer(13));
  header.setUint32(0, width);
  header.setUint32(4, height);
  header.setUint8(8, 1); // bits; then grey, deflate, filters, not interlaced: all 0
  const parts = [
    Uint8Array.of(0x89, 0x50, 0x4e, 0x47, 0x0d, 0x0a, 0x1a, 0x0a),
    ...chunk("IHDR", new Uint8Array(header.buffer)),
    ...chunk("IDAT", new Uint8Array(await new Response(packed).arrayBuffer())),
    ...chunk("IEND", new Uint8Array()),
  ];
  return new Blob(parts, { type: "image/png" });
}

function chunk(name, content) {
  const body = new Uint8Array(4 + content.length);
  body.set(Array.from(name, (letter) => letter.charCodeAt(0)));
  body.set(content, 4);
  const [length, check] = [content.length, crc32(body)].map((number) => {
    const view = new DataView(new ArrayBuffer(4));
    view.setUint32(0, number);
    return view.buffer;
  });
  return [length, body, check];
}

function crc32(bytes) {
  let crc = ~0;
  for (const byte of bytes) {
    crc ^= byte;
    for (let bit = 0; bit < 8; bit++) crc = (crc >>> 1) ^ (crc & 1 ? 0xedb88320 : 0);
  }
  return ~crc >>> 0;
}
