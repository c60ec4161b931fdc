// Turns an image file into the model's input, as vit_reciprocam.Preprocess does in Python.
import { INTERPOLATIONS, resize } from "./resize.js";

const MOST_PIXELS = 80_000_000;
const LONGEST_SIDE = 16_384; // pixels; a canvas cannot be longer

/** Round to the nearest integer, halves to the nearest even one, as Python's round does. */
function round(value) {
  const below = Math.floor(value);
  const part = value - below;
  return part < 0.5 || (part === 0.5 && below % 2 === 0) ? below : below + 1;
}

/**
 * Decode a file to {bitmap, width, height}, upright.
 *
 * @throws {Error} with a sentence to show, if it is not a picture that this page can use
 */
export async function decode(file) {
  let bitmap;
  try {
    bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  } catch {
    throw new Error(
      `${file.name} is not a picture that this browser can read. Choose a PNG, JPEG or WebP file.`,
    );
  }
  const { width, height } = bitmap;
  if (width * height > MOST_PIXELS || Math.max(width, height) > LONGEST_SIDE) {
    bitmap.close();
    throw new Error(`${file.name} is too large: ${width}×${height} pixels. Make it smaller.`);
  }
  return { bitmap, width, height };
}

/** Return a picture's pixels, four bytes each, with transparency laid on white. */
export function pixelsOf({ bitmap, width, height }) {
  const canvas = new OffscreenCanvas(width, height);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, width, height);
  context.drawImage(bitmap, 0, 0);
  return context.getImageData(0, 0, width, height);
}

/** Return the size to resize to, and where in the resized picture the centre crop begins. */
function plan({ width, height }, { size, resize: how, crop_pct: share, half }) {
  const [wantHeight, wantWidth] = size.map((side) => Math.floor(side / share));
  let [toWidth, toHeight] = [wantWidth, wantHeight];
  if (how === "shortest" && wantHeight === wantWidth) {
    const long = Math.trunc((wantHeight * Math.max(width, height)) / Math.min(width, height));
    [toWidth, toHeight] = width <= height ? [wantWidth, long] : [long, wantHeight];
  } else if (how === "shortest") {
    const ratio = Math.min(height / wantHeight, width / wantWidth);
    [toWidth, toHeight] = [round(width / ratio), round(height / ratio)];
  }
  if (toWidth * toHeight > MOST_PIXELS) {
    throw new Error(
      `A picture of ${width}×${height} pixels is too long and thin for this model. Crop it.`,
    );
  }
  const halved = half === "down" ? Math.floor : round;
  const [top, left] = [halved((toHeight - size[0]) / 2), halved((toWidth - size[1]) / 2)];
  return { toWidth, toHeight, top, left };
}

/** Return the rectangle of the picture that the model sees. */
export function region(picture, preprocess) {
  const { toWidth, toHeight, top, left } = plan(picture, preprocess);
  const [across, down] = [picture.width / toWidth, picture.height / toHeight];
  const [x, y] = [round(left * across), round(top * down)];
  return {
    x,
    y,
    width: Math.max(1, round((left + preprocess.size[1]) * across) - x),
    height: Math.max(1, round((top + preprocess.size[0]) * down) - y),
  };
}

/** Return the pixels that the model sees, resized and cropped. */
export function view(pixels, preprocess) {
  const { toWidth, toHeight, top, left } = plan(pixels, preprocess);
  const resized = resize(pixels, toWidth, toHeight, preprocess.interpolation);
  const [height, width] = preprocess.size;
  const data = new Uint8ClampedArray(4 * width * height);
  for (let y = 0; y < height; y++) {
    const start = 4 * ((top + y) * toWidth + left);
    data.set(resized.data.subarray(start, start + 4 * width), 4 * y * width);
  }
  return { data, width, height };
}

/** Return the model's input: normalised floats, channel after channel. */
export function tensor({ data, width, height }, { mean, std }) {
  const plane = width * height;
  return Float32Array.from({ length: 3 * plane }, (_, at) => {
    const channel = Math.floor(at / plane);
    return (data[4 * (at % plane) + channel] / 255 - mean[channel]) / std[channel];
  });
}

/**
 * Refuse a preprocessing that this page cannot do.
 *
 * @throws {Error} with a sentence to show
 */
export function checkPreprocess({ interpolation }) {
  if (!INTERPOLATIONS.includes(interpolation)) {
    throw new Error(
      `The model wants pictures resized by "${interpolation}", ` +
        `which this page cannot do (only ${INTERPOLATIONS.join(", ")}).`,
    );
  }
}
