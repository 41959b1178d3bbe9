// Pillow's resize, number for number, so that the network sees in a browser what it sees in misf-run: bilinear over
// all the pixels that fall together, or bicubic; columns first, then rows; 8 bits in fixed point, floats in double
// precision (src/libImaging/Resample.c of Pillow).

const FILTERS = {
  bilinear: { support: 1, weight: (x) => Math.max(0, 1 - Math.abs(x)) },
  bicubic: {
    support: 2,
    weight(x) {
      const [a, d] = [-0.5, Math.abs(x)];
      if (d < 1) return ((a + 2) * d - (a + 3)) * d * d + 1;
      return d < 2 ? (((d - 5) * d + 8) * d - 4) * a : 0;
    },
  },
};
const FIXED_POINT = 2 ** 22;

/**
 * The picture at another size.
 * data: Uint8Array or Float32Array of height, width, channels; from, to: [height, width].
 */
export function resize(data, channels, from, to, filter = "bilinear") {
  const [height, width] = from;
  const across =
    to[1] === width ? data : pass(data, height, width, to[1], channels, width * channels, channels, filter);
  if (to[0] === height) return across;
  return pass(across, to[1], height, to[0], channels, channels, to[1] * channels, filter, true);
}

/** One direction: `lines` lines of `length` pixels become `wanted` pixels long; down: along columns. */
function pass(data, lines, length, wanted, channels, lineStep, pixelStep, filter, down = false) {
  const bytes = !(data instanceof Float32Array);
  const result = bytes ? new Uint8ClampedArray(lines * wanted * channels) : new Float32Array(lines * wanted * channels);
  const [outLine, outPixel] = down ? [channels, lines * channels] : [wanted * channels, channels];
  coefficients(length, wanted, FILTERS[filter]).forEach(({ first, weights }, at) => {
    const taps = bytes ? weights.map((weight) => Math.trunc(weight * FIXED_POINT + Math.sign(weight) * 0.5)) : weights;
    for (let line = 0; line < lines; line++) {
      for (let channel = 0; channel < channels; channel++) {
        let sum = bytes ? FIXED_POINT / 2 : 0;
        let source = line * lineStep + first * pixelStep + channel;
        for (let tap = 0; tap < taps.length; tap++, source += pixelStep) sum += data[source] * taps[tap];
        result[line * outLine + at * outPixel + channel] = bytes ? Math.floor(sum / FIXED_POINT) : sum;
      }
    }
  });
  return result;
}

function coefficients(length, wanted, { support, weight }) {
  const scale = length / wanted;
  const stretch = Math.max(1, scale);
  return Array.from({ length: wanted }, (_, at) => {
    const center = (at + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - support * stretch + 0.5));
    const stop = Math.min(length, Math.trunc(center + support * stretch + 0.5));
    const weights = Array.from({ length: stop - first }, (_, tap) =>
      weight((tap + first - center + 0.5) * (1 / stretch)),
    );
    const total = weights.reduce((sum, value) => sum + value, 0);
    return { first, weights: Float64Array.from(weights, (value) => (total ? value / total : value)) };
  });
}
