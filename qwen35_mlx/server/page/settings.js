// Settings of this browser: the dialog, and the fields of a request that follow from them.
import { key, setKey } from "./api.js";
import { find } from "./dom.js";

const NUMBERS = [
  "temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "seed",
  "max_tokens", "thinking_budget",
];

export const settings = JSON.parse(localStorage.getItem("settings") ?? "{}");

export function keep(changes) {
  Object.assign(settings, changes);
  localStorage.setItem("settings", JSON.stringify(settings));
  document.documentElement.dataset.theme = settings.theme ?? "";
}

export function requestFields() {
  const fields = {};
  for (const name of NUMBERS) {
    if (settings[name]) fields[name] = Number(settings[name]);
  }
  if (settings.thinking) fields.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return fields;
}

// `system` is the conversation's; `onDone` gets the new one. `wanted` says why a key is asked for.
export function openSettings(system, onDone, wanted = "") {
  const dialog = find("settings");
  const fields = dialog.querySelector("form").elements;
  for (const name of [...NUMBERS, "theme", "model"]) fields[name].value = settings[name] ?? "";
  if (!fields.model.value) fields.model.selectedIndex = 0;
  fields.key.value = key;
  fields.system.value = system;
  find("key-wanted").textContent = wanted;
  find("key-wanted").hidden = !wanted;
  dialog.onclose = () => {
    if (dialog.returnValue !== "save") return;
    const names = [...NUMBERS, "theme", "model", "system"];
    keep(Object.fromEntries(names.map((name) => [name, fields[name].value])));
    setKey(fields.key.value.trim());
    onDone(fields.system.value);
  };
  dialog.returnValue = "";
  dialog.showModal();
  if (wanted) fields.key.focus();
}
