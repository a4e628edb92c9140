// Pictures of the message being written: by button, paste and drop.
import { button, element, find, toast } from "./dom.js";

const MAX_SIDE = 2560;
const MAX_BYTES = 3_000_000;
const KEPT_TYPES = ["image/png", "image/jpeg", "image/webp", "image/gif"];

export let pictures = []; // Data URLs.

export function setPictures(urls) {
  pictures = urls;
  find("pictures").replaceChildren(...urls.map((url, index) => {
    const item = element("li");
    const remove = button("×", () => setPictures(pictures.filter((other) => other !== url)));
    remove.setAttribute("aria-label", `Remove picture ${index + 1}`);
    item.append(element("img", { src: url, alt: `Picture ${index + 1}` }), remove);
    return item;
  }));
}

async function addFiles(files) {
  for (const file of files) {
    try {
      const url = await readPicture(file);
      if (!pictures.includes(url)) setPictures([...pictures, url]);
    } catch {
      toast(`${file.name || "What was pasted"} is not a picture that this browser can open.`);
    }
  }
  find("text").focus();
}

// Small files stay as they are; others are drawn again, at most MAX_SIDE wide and high.
async function readPicture(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= MAX_BYTES && KEPT_TYPES.includes(file.type)) {
    const reader = new FileReader();
    await new Promise((resolve, reject) => {
      reader.onload = resolve;
      reader.onerror = reject;
      reader.readAsDataURL(file);
    });
    return reader.result;
  }
  const [width, height] = [bitmap.width, bitmap.height].map((n) => Math.max(1, Math.round(n * scale)));
  const canvas = element("canvas", { width, height });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, width, height);
  return canvas.toDataURL("image/jpeg", 0.92);
}

export function listenForPictures() {
  const input = find("picture-file");
  find("add-picture").onclick = () => input.click();
  input.onchange = async () => {
    await addFiles(input.files);
    input.value = "";
  };
  document.addEventListener("paste", (event) => {
    const files = [...event.clipboardData.files];
    if (!files.length) return;
    event.preventDefault();
    addFiles(files);
  });
  document.addEventListener("dragover", (event) => {
    if (!event.dataTransfer.types.includes("Files")) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (!event.relatedTarget) document.body.classList.remove("dropping");
  });
  document.addEventListener("drop", (event) => {
    document.body.classList.remove("dropping");
    if (!event.dataTransfer.files.length) return;
    event.preventDefault();
    addFiles(event.dataTransfer.files);
  });
}
