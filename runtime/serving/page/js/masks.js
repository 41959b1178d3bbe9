// What happens to a mask before the fill.

import { grid } from "./grid.js";

/** The hole and all that is at most `pixels` from it in a straight line, as grown_mask of runtime/pictures/masks.py. */
export function grownMask(mask, pixels) {
  if (!pixels) return mask;
  const { data, width, height } = mask;
  const ends = new Int32Array((width + 1) * height); // +1 where a run starts, -1 behind its end
  const reach = Array.from({ length: pixels + 1 }, (_, dy) => Math.floor(Math.sqrt(pixels ** 2 - dy ** 2)));
  for (let y = 0; y < height; y++) {
    const row = data.subarray(y * width, (y + 1) * width);
    for (let start = row.indexOf(1), stop; start >= 0; start = row.indexOf(1, stop)) {
      stop = row.indexOf(0, start);
      if (stop < 0) stop = width;
      for (let other = Math.max(0, y - pixels); other <= Math.min(height - 1, y + pixels); other++) {
        const wide = reach[Math.abs(other - y)];
        ends[other * (width + 1) + Math.max(0, start - wide)]++;
        ends[other * (width + 1) + Math.min(width, stop + wide)]--;
      }
      if (stop === width) break;
    }
  }
  const grown = grid(width, height);
  for (let y = 0; y < height; y++) {
    for (let x = 0, open = 0; x < width; x++) {
      open += ends[y * (width + 1) + x];
      if (open) grown.data[y * width + x] = 1;
    }
  }
  return grown;
}
