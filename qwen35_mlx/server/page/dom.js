// Small helpers for elements.

export const find = (id) => document.getElementById(id);

export const element = (tag, properties = {}) =>
  Object.assign(document.createElement(tag), properties);

export function button(label, onclick) {
  return element("button", { type: "button", textContent: label, onclick });
}

// Over plain http from another machine there is no clipboard API.
export async function copyText(text, from) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    const area = element("textarea", { value: text, className: "unseen" });
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
  }
  const label = from.textContent;
  from.textContent = "Copied";
  setTimeout(() => (from.textContent = label), 1200);
}

export function download(name, type, text) {
  const link = element("a", { href: URL.createObjectURL(new Blob([text], { type })) });
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

let toastTimer;

// `action` is [label, function], offered as a button.
export function toast(message, action) {
  const [box, offer] = [find("toast"), find("toast").querySelector("button")];
  box.querySelector("span").textContent = message;
  offer.hidden = !action;
  offer.textContent = action?.[0] ?? "";
  offer.onclick = () => {
    box.hidden = true;
    action[1]();
  };
  box.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => (box.hidden = true), 8000);
}
