// node build.mjs [FOLDER]: put the whole page into one folder (by default dist) and print its size.
import { cpSync, mkdirSync, readFileSync, readdirSync, rmSync } from "node:fs";
import { dirname, join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { gzipSync } from "node:zlib";

const here = dirname(fileURLToPath(import.meta.url));
const runtime = join(here, "node_modules/onnxruntime-web/dist");
const assets = join(here, "../../src/vit_reciprocam/assets");
const out = resolve(process.argv[2] ?? join(here, "dist"));

rmSync(out, { recursive: true, force: true });
mkdirSync(out, { recursive: true });
cpSync(join(here, "page"), out, { recursive: true });
// The smallest build of the runtime: WebAssembly on the processor, neither WebGPU nor WebNN.
for (const name of ["ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"]) {
  cpSync(join(runtime, name), join(out, name));
}
for (const name of ["demo.onnx", "demo.png"]) {
  cpSync(join(assets, name), join(out, name));
}

const row = (name, bytes, gzip) =>
  console.log(`${name.padEnd(30)}${String(bytes).padStart(12)}${String(gzip).padStart(12)}`);
let [bytes, zipped] = [0, 0];
row("file", "bytes", "gzip");
for (const name of readdirSync(out).sort()) {
  const content = readFileSync(join(out, name));
  const small = gzipSync(content, { level: 9 }).length;
  row(name, content.length, small);
  [bytes, zipped] = [bytes + content.length, zipped + small];
}
row("all", bytes, zipped);
