// A picture as the page holds it: the file as it came, what the browser made of it, and what was filled here since.

const KINDS = [
  ["image/jpeg", "JPEG", "jpg", (b) => b[0] === 0xff && b[1] === 0xd8],
  ["image/png", "PNG", "png", (b, text) => b[0] === 0x89 && text.slice(1, 4) === "PNG"],
  ["image/webp", "WebP", "webp", (b, text) => text.startsWith("RIFF") && text.slice(8, 12) === "WEBP"],
  ["image/avif", "AVIF", "avif", (b, text) => /^....ftyp(avif|avis)/s.test(text)],
  ["image/heic", "HEIC", "heic", (b, text) => /^....ftyp(hei|hev|mif1|msf1)/s.test(text)],
  ["image/tiff", "TIFF", "tif", (b, text) => text.startsWith("II*\0") || text.startsWith("MM\0*")],
  ["image/gif", "GIF", "gif", (b, text) => text.startsWith("GIF8")],
  ["image/bmp", "BMP", "bmp", (b, text) => text.startsWith("BM")],
];
const PREVIEW = 2560; // a larger picture is drawn from a copy of this side while it is seen small
const DECODED = new Set(); // sources that hold pixels

class Source {
  constructor(blob, kind, carries) {
    [this.type, this.kind, this.extension] = kind;
    this.blob = blob;
    this.carries = carries;
  }

  async decode() {
    if (this.base) return;
    this.base = await createImageBitmap(this.blob);
    const side = Math.max(this.base.width, this.base.height);
    if (side > PREVIEW) {
      const [resizeWidth, resizeHeight] = [this.base.width, this.base.height].map((x) =>
        Math.round((x * PREVIEW) / side),
      );
      this.preview = await createImageBitmap(this.base, { resizeWidth, resizeHeight, resizeQuality: "high" });
    }
    DECODED.add(this);
  }

  release() {
    this.base?.close();
    this.preview?.close();
    this.base = this.preview = undefined;
    DECODED.delete(this);
  }
}

/** Return a Picture of a file; an Error that can be shown where the browser cannot read it. */
export async function openPicture(blob, name) {
  const bytes = new Uint8Array(await blob.slice(0, 1 << 16).arrayBuffer());
  const text = new TextDecoder("latin1").decode(bytes);
  const kind = KINDS.find(([, , , fits]) => fits(bytes, text));
  if (!blob.size) throw new Error(`${name} is empty. Choose another picture.`);
  if (!kind) throw new Error(`${name} is not a picture that we know. Choose a JPEG, PNG, WebP or AVIF file.`);
  const source = new Source(blob, kind, carried(kind[0], bytes, text));
  try {
    await source.decode();
  } catch {
    const readable = ["JPEG", "PNG", "WebP", "GIF", "BMP"].includes(source.kind);
    throw new Error(
      readable
        ? `${name} is damaged, or too large for this browser. Try another copy of it.`
        : `This browser cannot show ${source.kind} files. Save ${name} as JPEG or PNG, and open that.`,
    );
  }
  return new Picture(source, name, source.base.width, source.base.height, []);
}

/** What the file carries that a canvas cannot keep. */
function carried(type, bytes, text) {
  const found = [];
  if (/Exif\0\0|eXIf|EXIF/.test(text)) found.push("EXIF data");
  if (/ICC_PROFILE|iCCP|ICCP/.test(text)) found.push("the colour profile (colours become sRGB)");
  if (type === "image/png" && bytes[24] === 16) found.push("16 bits per channel (it becomes 8)");
  return found;
}

export class Picture {
  constructor(source, name, width, height, patches) {
    Object.assign(this, { source, name, width, height, patches });
  }

  get kind() {
    return this.source.kind;
  }

  /** The same picture with a part of it replaced: pixels is RGBA of the box. */
  async patched({ left, top, right, bottom }, pixels) {
    const data = new ImageData(pixels, right - left, bottom - top);
    const patch = {
      left,
      top,
      bitmap: await createImageBitmap(data),
      clear: pixels.some((v, at) => at % 4 === 3 && v < 255),
    };
    return new Picture(this.source, this.name, this.width, this.height, [...this.patches, patch]);
  }

  /** Draw it in its own pixels; `scale` says how large they are seen, for the choice of copy. */
  draw(context, scale = 1) {
    const { base, preview } = this.source;
    if (!base) return;
    const copy = preview && scale * this.width < preview.width ? preview : base;
    context.drawImage(copy, 0, 0, this.width, this.height);
    for (const { left, top, bitmap, clear } of this.patches) {
      if (clear) context.clearRect(left, top, bitmap.width, bitmap.height);
      context.drawImage(bitmap, left, top);
    }
  }

  /** The pixels of a box, RGBA. */
  read({ left, top, right, bottom }) {
    const canvas = new OffscreenCanvas(right - left, bottom - top);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    context.translate(-left, -top);
    this.draw(context);
    return context.getImageData(0, 0, canvas.width, canvas.height).data;
  }

  /** The file: as it came where nothing was filled in this browser, else encoded here, as PNG where it must be. */
  async file() {
    if (!this.patches.length) return { blob: this.source.blob, kind: this.kind, extension: this.source.extension };
    let blob;
    try {
      const canvas = new OffscreenCanvas(this.width, this.height);
      this.draw(canvas.getContext("2d"));
      blob = await canvas.convertToBlob({ type: this.source.type, quality: 0.95 });
    } catch {
      throw new Error(
        `This browser cannot write a picture of ${this.width} × ${this.height} pixels. Try another browser.`,
      );
    }
    const [, kind, extension] = KINDS.find(([type]) => type === blob.type);
    return { blob, kind, extension };
  }
}

/** Hold the pixels of these pictures, and of no others. */
export async function keepDecoded(pictures) {
  const wanted = new Set(pictures.map(({ source }) => source));
  for (const source of DECODED) if (!wanted.has(source)) source.release();
  for (const source of wanted) await source.decode();
}
