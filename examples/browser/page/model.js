// Opens and runs an explained ONNX file, as `vit-reciprocam export` and `insert` write it.
import * as ort from "./ort.wasm.bundle.min.mjs";

import { checkPreprocess } from "./picture.js";

const KEY = "vit_reciprocam"; // the metadata property that onnx/contract.py describes
const SCHEMAS = [3, 4]; // 4 may hold evidence in place of probabilities
const [GRAPH, METADATA] = [7, 14]; // numbers of these fields in ONNX's ModelProto

ort.env.wasm.wasmPaths = { wasm: new URL("ort-wasm-simd-threaded.wasm", import.meta.url).href };
ort.env.wasm.numThreads = 1; // for more, the server would have to send two special headers
ort.env.wasm.proxy = true; // runs in a worker, so that the page responds while a large model runs

/** Yield [number, bytes] for each field of a protobuf message that holds bytes. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let [value, scale, byte] = [0, 1, 128];
    for (; byte > 127; scale *= 128) {
      byte = bytes[at++];
      value += (byte & 127) * scale;
    }
    return value;
  };
  while (at < bytes.length) {
    const tag = varint();
    const kind = tag % 8;
    if (kind === 0) varint();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const length = varint();
      yield [(tag - kind) / 8, bytes.subarray(at, at + length)];
      at += length;
    } else throw new Error("not a protobuf message");
  }
  if (at > bytes.length) throw new Error("a truncated protobuf message");
}

/** Return the metadata of an ONNX file, or undefined if it is not an explained one. */
function readProperty(bytes, name) {
  let [value, hasGraph] = [undefined, false];
  try {
    for (const [number, content] of fields(bytes)) {
      hasGraph ||= number === GRAPH;
      if (number !== METADATA) continue;
      const [key, text] = [...fields(content)].map(([, part]) => new TextDecoder().decode(part));
      if (key === KEY) value = JSON.parse(text);
    }
  } catch {
    hasGraph = false;
  }
  if (!hasGraph) throw new Error(`${name} is not an ONNX file, or not a whole one.`);
  return value;
}

/**
 * Return the metadata of an explained file, checked.
 *
 * @throws {Error} with a sentence to show, if this page cannot explain with the file
 */
function readMetadata(bytes, name) {
  const metadata = readProperty(bytes, name);
  if (!metadata) {
    throw new Error(
      `${name} holds no explanation. "vit-reciprocam insert ${name} explained.onnx" adds one ` +
        "to a Vision Transformer's file.",
    );
  }
  if (!SCHEMAS.includes(metadata.schema)) {
    const writer = metadata.versions?.["vit-reciprocam"] ?? "of another version";
    throw new Error(
      `${name} was written by vit-reciprocam ${writer}, in a layout that this page does not ` +
        "read. Write it anew.",
    );
  }
  if (!metadata.preprocess) {
    throw new Error(
      `${name} does not say how pictures are prepared for it. Write it anew with its preprocessing.`,
    );
  }
  if (metadata.targets === "input" && !metadata.class_names) {
    throw new Error(`${name} does not name its classes, so none can be asked for. Write it anew.`);
  }
  checkPreprocess(metadata.preprocess);
  return metadata;
}

/**
 * Open a file's bytes and return {session, metadata}.
 *
 * @throws {Error} with a sentence to show, if this page cannot explain with the file
 */
export async function open(bytes, name) {
  if (typeof WebAssembly === "undefined") {
    throw new Error("This browser has no WebAssembly, which runs the model. Try another browser.");
  }
  const metadata = readMetadata(bytes, name);
  let session;
  try {
    session = await ort.InferenceSession.create(bytes);
  } catch (error) {
    throw new Error(
      `${name} cannot be opened here (weights in a second file are not supported): ${error.message}`,
    );
  }
  const images = session.inputMetadata.find((input) => input.name === metadata.images);
  if (images?.type !== "float32") {
    throw new Error(`${name} takes ${images?.type}, and this page gives float32 pictures only.`);
  }
  return { session, metadata };
}

/**
 * Compute prediction and maps in one run.
 *
 * @param {{session: ort.InferenceSession, metadata: object}} model
 * @param {Float32Array} input 3 x height x width, preprocessed
 * @returns {Promise<{probabilities: Float32Array, grid: number[], scores: Map<number, Float32Array>}>}
 *   the probability of each class; the number of each explained class -> its scores on the grid
 */
export async function explain({ session, metadata }, input) {
  const feeds = {
    [metadata.images]: new ort.Tensor("float32", input, [1, 3, ...metadata.preprocess.size]),
  };
  if (metadata.targets === "input") {
    const every = BigInt64Array.from(metadata.class_names, (_, index) => BigInt(index));
    feeds.targets = new ort.Tensor("int64", every, [1, every.length]);
  }
  const fetches = [metadata.logits, "scores", "classes"].filter((name) =>
    session.outputNames.includes(name),
  );
  const found = await session.run(feeds, fetches).catch((error) => {
    throw new Error(`The model cannot explain this picture here: ${error.message}`);
  });
  const prediction = found[metadata.logits].data;
  const [, count, ...grid] = found.scores.dims;
  const patches = grid[0] * grid[1];
  const scores = new Map();
  for (let k = 0; k < count; k++) {
    const index = found.classes ? Number(found.classes.data[k]) : k;
    scores.set(index, found.scores.data.slice(k * patches, (k + 1) * patches));
  }
  const probabilities = metadata.probabilities ? prediction : softmax(prediction);
  return { probabilities, grid, scores };
}

function softmax(logits) {
  const most = logits.reduce((a, b) => Math.max(a, b));
  const raised = Float64Array.from(logits, (value) => Math.exp(value - most));
  const total = raised.reduce((a, b) => a + b);
  return raised.map((value) => value / total);
}
