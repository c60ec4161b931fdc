// The page: files in, classes and their maps out. One run of the model per picture, none per map.
import { minMax, paint, positivePart, strongest } from "./map.js";
import { explain, open } from "./model.js";
import { decode, pixelsOf, region, tensor, view } from "./picture.js";

const LONGER_SIDE = 560; // pixels of the picture as it is shown
const MOST_CLASSES = 12; // in the list at a time
const PICTURE_ALONE = -1; // stands for no class: the picture is shown without a map

const part = (id) => document.getElementById(id);
const NO_BREAK = "\u00a0";
const percent = (value) =>
  `${value > 0 && value < 0.0005 ? `under${NO_BREAK}0.1` : (100 * value).toFixed(1)}${NO_BREAK}%`;
const digits = new Intl.NumberFormat("en", {
  minimumSignificantDigits: 3,
  maximumSignificantDigits: 3,
});
const finePercent = (value) =>
  `${value > 0 && value < 1e-6 ? `under${NO_BREAK}0.0001` : digits.format(100 * value)}${NO_BREAK}%`;

let model; // {session, metadata, name, demo}
let picture; // {bitmap, width, height, name}
let shown; // {probabilities, grid, scores, order} of this model and picture, once computed
let chosen = PICTURE_ALONE;

const nameOf = (index) => model.metadata.class_names?.[index] ?? `class ${index}`;

// --- what the user sees --------------------------------------------------------------------------

/** Draw the part of the picture that the model sees. */
function showPicture() {
  const { x, y, width, height } = region(picture, model.metadata.preprocess);
  const scale = LONGER_SIDE / Math.max(width, height);
  const canvas = part("picture");
  canvas.width = part("map").width = Math.max(1, Math.round(width * scale));
  canvas.height = part("map").height = Math.max(1, Math.round(height * scale));
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(picture.bitmap, x, y, width, height, 0, 0, canvas.width, canvas.height);
  canvas.setAttribute("aria-label", `The picture ${picture.name}`);
}

/** Draw the map of a class, which was computed with the prediction, over the picture. */
function showMap(index) {
  const canvas = part("map");
  canvas.hidden = index === PICTURE_ALONE;
  canvas.dataset.class = index;
  if (canvas.hidden) {
    part("caption").textContent = "The picture alone.";
    return;
  }
  const withEvidence = model.metadata.normalize === "evidence";
  const scale = withEvidence ? positivePart : minMax;
  const { low, high, flat, map } = scale(shown.scores.get(index));
  canvas.getContext("2d").putImageData(paint(map, shown.grid, canvas.width, canvas.height), 0, 0);
  const strong = document.createElement("strong");
  strong.textContent = nameOf(index);
  part("caption").replaceChildren(
    strong,
    withEvidence
      ? describeEvidence(low, high, flat, strongest(map, shown.grid))
      : flat
        ? `: ${finePercent(high)} wherever the model looks, so its map is empty.`
        : ` is strongest ${strongest(map, shown.grid)}. With one small window kept at a time, ` +
          `its probability goes from ${finePercent(low)} to ${finePercent(high)}.`,
  );
}

/** Say where the evidence for a class is strongest, and what it is worth. */
function describeEvidence(low, high, flat, place) {
  if (flat) return ": no window speaks for it, so its map is empty.";
  const unit = model.metadata.fuse?.length ? "" : " nats";
  const signed = (value) => `${value < 0 ? "−" : "+"}${digits.format(Math.abs(value))}`;
  return (
    ` is strongest ${place}. Compared with no window at all, the evidence of one window goes ` +
    `from ${signed(low)} to ${signed(high)}${unit}.`
  );
}

/** Make one row of the list. */
function classRow(index) {
  const alone = index === PICTURE_ALONE;
  const row = document.createElement("label");
  row.className = "class";
  row.dataset.class = index;
  const input = document.createElement("input");
  Object.assign(input, { type: "radio", name: "class", value: index, checked: index === chosen });
  const [share, name, number] = ["share", "name", "percent"].map((className) =>
    Object.assign(document.createElement("span"), { className }),
  );
  name.textContent = alone ? "the picture alone" : nameOf(index);
  if (!alone) {
    const probability = shown.probabilities[index];
    row.dataset.probability = probability;
    share.style.width = `${100 * probability}%`;
    number.textContent = percent(probability);
  }
  row.append(input, share, name, number);
  return row;
}

/** List the most probable of the classes whose name contains the search text. */
function showClasses() {
  const wanted = part("search").value.trim().toLowerCase();
  const found = shown.order.filter((index) => nameOf(index).toLowerCase().includes(wanted));
  const rows = [...found.slice(0, MOST_CLASSES), PICTURE_ALONE].map(classRow);
  part("classes").replaceChildren(...rows);
  const hidden = found.length - MOST_CLASSES;
  part("more").hidden = hidden <= 0 && found.length > 0;
  part("more").textContent = found.length ? `and ${hidden} less probable` : "No class of that name.";
}

function showError(error) {
  part("error").textContent = error.message;
  part("error").hidden = false;
}

// --- what the page does --------------------------------------------------------------------------

/** Predict and explain the picture. */
async function run() {
  const { metadata } = model;
  const began = performance.now();
  const input = tensor(view(pixelsOf(picture), metadata.preprocess), metadata.preprocess);
  const prepared = performance.now();
  const found = await explain(model, input);
  const done = performance.now();
  const { probabilities } = found;
  const order = [...found.scores.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  shown = { ...found, order };
  chosen = order[0];
  showPicture();
  part("search").value = "";
  part("search").hidden = order.length <= MOST_CLASSES;
  part("result").hidden = false;
  showClasses();
  showMap(chosen);
  part("status").textContent =
    `${picture.name}: prediction and ${order.length} maps in ${Math.round(done - prepared)} ms, ` +
    `after ${Math.round(prepared - began)} ms of preparing the picture.`;
  const about = model.demo
    ? `The bundled model is small and knows ${order.length} drawn things. A photograph it can only ` +
      'mistake for one of them: for photographs choose a model of your own, which "vit-reciprocam ' +
      'export" or "insert" has written.'
    : `${model.name}, explained by ${metadata.path} ReciproCAM.`;
  part("about").textContent = `${about} Shown is the part of the picture that the model sees.`;
}

async function readModel(file, demo = false) {
  const bytes = new Uint8Array(await file.arrayBuffer());
  return { ...(await open(bytes, file.name)), name: file.name, demo };
}

/** Use a model's file or a picture. If it cannot be used, the one before it stays. */
async function take(file) {
  const before = { model, picture };
  document.body.classList.add("working");
  part("error").hidden = true;
  part("status").textContent = `Reading ${file.name} …`;
  try {
    if (file.name.toLowerCase().endsWith(".onnx")) model = await readModel(file);
    else picture = { ...(await decode(file)), name: file.name };
    if (model && picture) {
      part("status").textContent = `${model.name} looks at ${picture.name} …`;
      await run();
    } else part("status").textContent = `Now choose a ${model ? "picture" : "model"}.`;
    await discard(before);
  } catch (error) {
    const failed = { model, picture };
    ({ model, picture } = before);
    part("status").textContent = "";
    showError(error);
    await discard(failed);
  }
  document.body.classList.remove("working");
}

/** Free what is no longer in use. */
async function discard(old) {
  if (old.picture !== picture) old.picture?.bitmap.close();
  if (old.model !== model) await old.model?.session.release();
}

/** Show the bundled model and picture. */
async function start() {
  part("status").textContent = "Loading the model …";
  const [onnx, png] = await Promise.all(
    ["demo.onnx", "demo.png"].map(async (name) => {
      const answer = await fetch(name);
      if (!answer.ok) throw new Error(`${name} is missing on the server. Build the page anew.`);
      return new File([await answer.blob()], name);
    }),
  );
  model = await readModel(onnx, true);
  picture = { ...(await decode(png)), name: "demo.png" };
  await run();
}

let queue = start().catch((error) => {
  part("status").textContent = "";
  showError(error);
});
const later = (files) => {
  for (const file of files) queue = queue.then(() => take(file));
};

for (const id of ["choose-picture", "choose-model"]) {
  part(id).addEventListener("change", ({ target }) => {
    later(target.files);
    target.value = ""; // so that the same file can be chosen again
  });
}
const dropping = (on) => (event) => {
  event.preventDefault();
  document.body.classList.toggle("dropping", on);
};
addEventListener("dragover", dropping(true));
addEventListener("dragleave", dropping(false));
addEventListener("drop", (event) => {
  dropping(false)(event);
  later(event.dataTransfer.files);
});

part("search").addEventListener("input", showClasses);
part("classes").addEventListener("change", ({ target }) => {
  chosen = Number(target.value);
  showMap(chosen);
});
part("classes").addEventListener("pointerover", ({ target }) => {
  const row = target.closest(".class");
  if (row) showMap(Number(row.dataset.class));
});
part("classes").addEventListener("pointerleave", () => showMap(chosen));
