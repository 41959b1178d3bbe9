// Grids of bytes, 1 where something is: masks, a cell per pixel, and blocks of them. {data: Uint8Array, width, height}

export function grid(width, height, data = new Uint8Array(width * height)) {
  return { data, width, height };
}

/** The part of a grid inside a box, as a grid of its own. */
export function cut(source, { left, top, right, bottom }) {
  const part = grid(right - left, bottom - top);
  for (let y = top; y < bottom; y++) {
    part.data.set(source.data.subarray(y * source.width + left, y * source.width + right), (y - top) * part.width);
  }
  return part;
}

/** The smallest box around everything that is set; null where nothing is. */
export function bounds({ data, width, height }) {
  let [left, top, right, bottom] = [width, -1, 0, 0];
  for (let y = 0; y < height; y++) {
    const row = data.subarray(y * width, (y + 1) * width);
    const first = row.indexOf(1);
    if (first < 0) continue;
    if (top < 0) top = y;
    bottom = y + 1;
    left = Math.min(left, first);
    right = Math.max(right, row.lastIndexOf(1) + 1);
  }
  return top < 0 ? null : { left, top, right, bottom };
}

/**
 * For each cell the squared distance to the nearest cell where `data` is `value`, Infinity where there is none. Exact
 * up to `reach` cells: the lower envelope of parabolas, columns first, then rows (Felzenszwalb and Huttenlocher 2012).
 */
export function squaredDistances({ data, width, height }, value, reach = Infinity) {
  const result = reach < 4096 ? new Float32Array(width * height) : new Float64Array(width * height);
  const line = new Float64Array(Math.max(width, height));
  const envelope = lowerEnvelope(line.length);
  for (let x = 0; x < width; x++) {
    for (let y = 0; y < height; y++) line[y] = data[y * width + x] === value ? 0 : Infinity;
    envelope(line, height, (y, distance) => (result[y * width + x] = distance > reach ** 2 ? Infinity : distance));
  }
  for (let y = 0; y < height; y++) {
    line.set(result.subarray(y * width, (y + 1) * width));
    envelope(line, width, (x, distance) => (result[y * width + x] = distance));
  }
  return result;
}

function lowerEnvelope(longest) {
  const vertex = new Int32Array(longest);
  const start = new Float64Array(longest + 1);
  return (line, length, put) => {
    let count = 0;
    for (let q = 0; q < length; q++) {
      if (line[q] === Infinity) continue;
      let from = -Infinity;
      while (count) {
        const v = vertex[count - 1];
        from = (line[q] + q * q - line[v] - v * v) / (2 * (q - v));
        if (from > start[count - 1]) break;
        count--;
      }
      vertex[count] = q;
      start[count] = count ? from : -Infinity;
      count++;
    }
    start[count] = Infinity;
    for (let q = 0, k = 0; q < length; q++) {
      while (k < count - 1 && start[k + 1] < q) k++;
      put(q, count ? (q - vertex[k]) ** 2 + line[vertex[k]] : Infinity);
    }
  };
}
