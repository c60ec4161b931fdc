// Turns scores into a coloured map, as vit_reciprocam draws it in Python.
import { resize } from "./resize.js";

/** Evenly spaced colours of matplotlib's viridis (CC0), from weak to strong. */
const VIRIDIS = (
  "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c " +
  "1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
)
  .split(" ")
  .map((colour) => [0, 2, 4].map((at) => parseInt(colour.slice(at, at + 2), 16)));

/** Scale the scores of one class to [0, 1], or to 0 everywhere if they differ by rounding only. */
export function minMax(scores) {
  const low = scores.reduce((a, b) => Math.min(a, b));
  const high = scores.reduce((a, b) => Math.max(a, b));
  const flat = high - low <= (4 * Math.max(Math.abs(low), Math.abs(high))) / 2 ** 23;
  return { low, high, flat, map: scores.map((value) => (flat ? 0 : (value - low) / (high - low))) };
}

/** Scale the evidence for one class: its positive part over its maximum, or 0 if there is none. */
export function positivePart(evidence) {
  const low = evidence.reduce((a, b) => Math.min(a, b));
  const high = evidence.reduce((a, b) => Math.max(a, b));
  const flat = high <= 0;
  return { low, high, flat, map: evidence.map((value) => (flat ? 0 : Math.max(value, 0) / high)) };
}

/** Return a map of [rows, columns] in [0, 1] as a smooth coloured picture of width x height. */
export function paint(map, [rows, columns], width, height) {
  const smooth = resize({ data: map, width: columns, height: rows }, width, height, "bicubic");
  const image = new ImageData(width, height);
  smooth.data.forEach((value, at) => {
    const place = Math.min(1, Math.max(0, value)) * (VIRIDIS.length - 1);
    const below = Math.min(Math.floor(place), VIRIDIS.length - 2);
    for (let channel = 0; channel < 3; channel++) {
      const [a, b] = [VIRIDIS[below][channel], VIRIDIS[below + 1][channel]];
      image.data[4 * at + channel] = a + (place - below) * (b - a);
    }
    image.data[4 * at + 3] = 255;
  });
  return image;
}

/** Say in words where a map is strongest. */
export function strongest(map, [rows, columns]) {
  const at = map.indexOf(map.reduce((a, b) => Math.max(a, b)));
  const third = (place, count) => Math.floor((3 * (place + 0.5)) / count);
  const row = ["upper", "", "lower"][third(Math.floor(at / columns), rows)];
  const column = ["left", "", "right"][third(at % columns, columns)];
  return row || column ? `at the ${[row, column].filter(Boolean).join(" ")}` : "in the middle";
}
