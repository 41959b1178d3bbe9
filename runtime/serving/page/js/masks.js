// What happens to a mask before the fill.

import { bounds, cut, grid, squaredDistances } from "./grid.js";

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

/**
 * The fill's share of every pixel, 0 to 255: all in the hole, falling linearly to nothing at a distance of `pixels` + 1;
 * and the hole that the network fills for it, all that has any share. As feathered of runtime/pictures/masks.py.
 */
export function feathered(mask, pixels) {
  const [shares, hole] = [grid(mask.width, mask.height), grid(mask.width, mask.height)];
  const around = bounds(mask);
  if (!around) return { shares, hole };
  const reach = pixels + 1;
  const box = {
    left: Math.max(0, around.left - reach),
    top: Math.max(0, around.top - reach),
    right: Math.min(mask.width, around.right + reach),
    bottom: Math.min(mask.height, around.bottom + reach),
  };
  const distances = squaredDistances(cut(mask, box), 1, reach);
  for (let y = box.top, from = 0; y < box.bottom; y++) {
    for (let x = box.left, at = y * mask.width + x; x < box.right; x++, at++, from++) {
      const share = Math.fround(1 - Math.fround(Math.fround(Math.sqrt(distances[from])) / reach)); // as NumPy's float32
      if (!(share > 0)) continue;
      hole.data[at] = 1;
      shares.data[at] = Math.round(Math.fround(share * 255));
    }
  }
  return { shares, hole };
}
