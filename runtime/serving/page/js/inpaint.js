// Inpainter.fill of runtime/inpainter.py in JavaScript: crops, the network on each, and its fill at full resolution.

import { planCrops, roundHalfEven } from "./crops.js";
import { grid } from "./grid.js";
import { resize } from "./resize.js";

/**
 * Fill the holes of a picture; return {crops}.
 *
 * read(box): Promise of the picture's pixels there, RGBA bytes, with what was pasted before.
 * run(image, mask, height, width): Promise of the finished crop; all Float32Array, image and answer 3,H,W in [0,1],
 * mask H,W of 0 and 1. paste(box, colours, hole, floats): takes the fill, RGB bytes of the box, the grid of pixels that
 * it is for, and the colours before rounding. progress(done, crops).
 */
export async function fillHoles({ mask, settings, read, run, paste, progress }) {
  const crops = planCrops(mask, settings);
  const waiting = grid(mask.width, mask.height, mask.data.slice());
  progress(0, crops.length);
  for (const [done, crop] of crops.entries()) {
    const native = [crop.box.bottom - crop.box.top, crop.box.right - crop.box.left];
    const image = asFloats(resize(withoutAlpha(await read(crop.box)), 3, native, crop.size));
    const hole = reducedMask(waiting, crop, native);
    const fill = await run(image, hole, ...crop.size);
    if (!fill.every(Number.isFinite))
      throw new Error("The network returned numbers that are no colours. Export it in fp32.");
    const exact = fullResolution(fill, crop, native);
    await paste(crop.core, asBytes(exact), crop.hole, exact);
    for (let y = 0, at = 0; y < crop.hole.height; y++) {
      const row = (crop.core.top + y) * waiting.width + crop.core.left;
      for (let x = 0; x < crop.hole.width; x++, at++) if (crop.hole.data[at]) waiting.data[row + x] = 0;
    }
    progress(done + 1, crops.length);
  }
  return { crops: crops.length };
}

function withoutAlpha(pixels) {
  const colours = new Uint8Array((pixels.length / 4) * 3);
  for (let from = 0, to = 0; from < pixels.length; from += 4, to += 3) {
    colours[to] = pixels[from];
    colours[to + 1] = pixels[from + 1];
    colours[to + 2] = pixels[from + 2];
  }
  return colours;
}

/** Bytes H,W,3 as floats 3,H,W in [0,1]. */
function asFloats(colours) {
  const area = colours.length / 3;
  const planes = new Float32Array(colours.length);
  for (let at = 0; at < area; at++) {
    for (let channel = 0; channel < 3; channel++) planes[channel * area + at] = colours[at * 3 + channel] / 255;
  }
  return planes;
}

function asBytes(exact) {
  return Uint8Array.from(exact, (value) => roundHalfEven(Math.fround(Math.min(1, Math.max(0, value)) * 255)));
}

/** The holes at the size that the network sees: every pixel into which a hole pixel bleeds is hole. */
function reducedMask(waiting, { box, size }, native) {
  const hole = new Float32Array(native[0] * native[1]);
  for (let y = box.top, at = 0; y < box.bottom; y++) {
    for (let x = box.left; x < box.right; x++) hole[at++] = waiting.data[y * waiting.width + x];
  }
  return resize(hole, 1, native, size).map((value) => (value > 0 ? 1 : 0));
}

/** The part of a prediction 3,h,w that lies over the crop's core, at the picture's own resolution, H,W,3. */
function fullResolution(fill, { box, size, core }, native) {
  const planes = [0, 1, 2].map((channel) => {
    const plane = fill.subarray(channel * size[0] * size[1], (channel + 1) * size[0] * size[1]);
    return resize(plane, 1, size, native, "bicubic");
  });
  const exact = new Float32Array((core.bottom - core.top) * (core.right - core.left) * 3);
  for (let y = core.top, to = 0; y < core.bottom; y++) {
    for (let x = core.left; x < core.right; x++) {
      const from = (y - box.top) * native[1] + x - box.left;
      for (const plane of planes) exact[to++] = plane[from];
    }
  }
  return exact;
}
