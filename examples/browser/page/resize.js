// Resampling as Pillow does it, to the last bit: one pass across and one down, in which each output
// is a weighted sum of inputs. If the picture shrinks, the filter is widened, so that no pixel is
// skipped. A canvas would be quicker, but every browser resamples in its own way, and predictions
// depend on it.
// Since version 13, Pillow resamples some tall pictures downwards first, and bytes are rounded
// between the passes: for these the result may differ by a step or two.

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

/** Name -> [reach, weight at a distance >= 0], in pixels of the coarser of input and output. */
const FILTERS = {
  bilinear: [1, (x) => (x < 1 ? 1 - x : 0)],
  bicubic: [
    2, // the cubic of Keys (1981) with a = -1/2
    (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? -0.5 * (((x - 5) * x + 8) * x - 4) : 0),
  ],
  lanczos: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};
export const INTERPOLATIONS = Object.keys(FILTERS);

/** Return, for each of `size` outputs, its first input and the weights of its inputs. */
function weights(inputs, size, interpolation) {
  const [reach, weight] = FILTERS[interpolation];
  const step = inputs / size;
  const widened = Math.max(step, 1);
  return Array.from({ length: size }, (_, output) => {
    const centre = (output + 0.5) * step;
    const first = Math.max(0, Math.trunc(centre - reach * widened + 0.5));
    const end = Math.min(inputs, Math.trunc(centre + reach * widened + 0.5));
    const each = [];
    for (let input = first; input < end; input++) {
      each.push(weight(Math.abs(input - centre + 0.5) / widened));
    }
    const total = each.reduce((a, b) => a + b, 0);
    return { first, each: each.map((value) => value / total) };
  });
}

/** Pillow's arithmetic for bytes: weights are rounded to steps of 2^-22, sums to whole bytes. */
const STEPS = 2 ** 22;
const inSteps = ({ first, each }) => ({
  first,
  each: each.map((value) => Math.trunc(value * STEPS + Math.sign(value) / 2)),
});

/** Resample along one axis of `inputs` elements, each of which is `across` adjacent values. */
function pass(data, table, inputs, across) {
  const bytes = data instanceof Uint8ClampedArray;
  const lines = data.length / (inputs * across);
  const out = new data.constructor(lines * table.length * across);
  for (let line = 0, place = 0; line < lines; line++) {
    for (const { first, each } of table) {
      const start = (line * inputs + first) * across;
      for (let offset = 0; offset < across; offset++, place++) {
        let sum = 0;
        for (let k = 0, at = start + offset; k < each.length; k++, at += across) {
          sum += each[k] * data[at];
        }
        out[place] = bytes ? Math.floor(sum / STEPS + 0.5) : sum;
      }
    }
  }
  return out;
}

/**
 * Return pixels at another size.
 *
 * @param {{data: Uint8ClampedArray | Float32Array, width: number, height: number}} pixels
 *   row after row; bytes are rounded after each pass, floats are not
 * @param {number} width
 * @param {number} height
 * @param {string} interpolation one of INTERPOLATIONS
 */
export function resize(pixels, width, height, interpolation) {
  const channels = pixels.data.length / (pixels.width * pixels.height);
  const bytes = pixels.data instanceof Uint8ClampedArray;
  const table = (inputs, size) => {
    const all = weights(inputs, size, interpolation);
    return bytes ? all.map(inSteps) : all;
  };
  let { data } = pixels;
  if (width !== pixels.width) {
    data = pass(data, table(pixels.width, width), pixels.width, channels);
  }
  if (height !== pixels.height) {
    data = pass(data, table(pixels.height, height), pixels.height, width * channels);
  }
  return { data, width, height };
}
