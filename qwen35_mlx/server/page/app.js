// The page: conversations, their messages, and what the keys and buttons do.
import { AnswerView, runAnswer } from "./answer.js";
import { models } from "./api.js";
import { button, copyText, download, element, find, toast } from "./dom.js";
import { listenForPictures, pictures, setPictures } from "./pictures.js";
import { keep, openSettings, requestFields, settings } from "./settings.js";
import * as store from "./store.js";

const SAVE_EVERY_MS = 2000;
// A conversation: {id, title, updated, system, messages: [{role, content, pictures, thought, …}]}.
let current = null;
let editing = null; // Index of the message that the composer holds.
const runs = new Map(); // Id of a conversation -> {conversation, view, stop} of its running answer.
const deleted = new Set(); // Ids; an answer that still runs must not bring them back.
let served = [];
let follows = true; // The view follows the text as it comes.

async function kept(promise) {
  try {
    return await promise;
  } catch (error) {
    toast(`This browser does not keep the conversation: ${error.message}`);
  }
}

// ---- conversations

function newConversation() {
  show({ id: `c${Date.now().toString(36)}`, title: "", system: settings.system ?? "", messages: [] });
  find("text").focus();
}

async function open(id) {
  const running = runs.get(id)?.conversation;
  const conversation = running ?? (await kept(store.load(id)));
  if (!conversation) return newConversation();
  const last = conversation.messages.at(-1);
  // The page was closed while it came.
  if (!running && last?.role === "assistant" && !last.stats) last.stopped = true;
  show(conversation);
}

function show(conversation) {
  current = conversation;
  history.replaceState(null, "", conversation.messages.length ? `#${conversation.id}` : " ");
  document.body.classList.remove("sidebar-open");
  find("toggle-sidebar").ariaExpanded = "false";
  // What is being written stays; what is being edited belongs to the other conversation.
  if (editing !== null) cancelEdit();
  find("messages").replaceChildren(...conversation.messages.map(messageView));
  follows = true;
  refresh();
}

async function save(conversation) {
  if (deleted.has(conversation.id)) return;
  conversation.updated = Date.now();
  await kept(store.save(conversation));
  await listConversations();
}

let listed = "";

async function listConversations() {
  const conversations = (await kept(store.list())) ?? [];
  // Made again only if it changed, or a row would lose the focus.
  const shape = JSON.stringify([current.id, conversations.map(({ id, title }) => [id, title])]);
  if (shape === listed) return;
  listed = shape;
  const rows = conversations.map(({ id, title }) => {
    const row = element("li");
    const link = button(title || "Untitled", () => open(id));
    if (id === current.id) link.ariaCurrent = "page";
    row.append(link);
    return row;
  });
  find("conversations").replaceChildren(...rows);
}

function refresh() {
  const { id, title, messages } = current;
  const running = runs.has(id);
  find("title").hidden = find("menu").hidden = !messages.length;
  find("empty").hidden = messages.length > 0;
  find("title").value = title;
  document.title = title || "Chat";
  find("send").hidden = running;
  find("stop").hidden = !running;
  const stats = messages.at(-1)?.stats;
  const used = stats?.prompt ? stats.prompt + (stats.tokens ?? 0) : 0;
  const limit = contextLength();
  find("context").textContent = used && limit
    ? `${used.toLocaleString("en")} of ${limit.toLocaleString("en")} tokens` : "";
  listConversations();
  scrollDown();
}

async function deleteConversation() {
  const gone = current;
  runs.get(gone.id)?.stop();
  deleted.add(gone.id);
  await kept(store.remove(gone.id));
  newConversation();
  toast("The conversation is deleted.", ["Undo", () => {
    deleted.delete(gone.id);
    save(gone).then(() => show(gone));
  }]);
}

function exportConversation(type) {
  const name = (current.title.replace(/[^\p{L}\p{N}]+/gu, "-").slice(0, 60) || "conversation") + `.${type}`;
  if (type === "json") return download(name, "application/json", JSON.stringify(current, null, 1));
  const parts = current.messages.map(({ role, content, pictures = [] }) =>
    [`## ${role === "user" ? "You" : "Answer"}`, ...pictures.map(() => "*(picture)*"), content].join("\n\n"));
  download(name, "text/markdown", [`# ${current.title}`, ...parts].join("\n\n") + "\n");
}

// ---- messages

function messageView(message) {
  const conversation = current;
  if (message.role === "assistant") {
    const running = runs.get(conversation.id);
    if (running?.view.message === message) return running.view.root;
    const view = new AnswerView(message);
    const copy = button("Copy", () => copyText(message.content, copy));
    const again = button("Retry", () => retry(conversation, message));
    again.className = "retry";
    view.foot.append(copy, again);
    view.root.view = view;
    return view.root;
  }
  const item = element("li", { className: "user" });
  for (const url of message.pictures ?? []) {
    const picture = element("img", { src: url, alt: "Picture sent" });
    picture.onclick = () => picture.classList.toggle("large");
    item.append(picture);
  }
  if (message.content) item.append(element("div", { className: "text", textContent: message.content }));
  const foot = element("footer");
  const copy = button("Copy", () => copyText(message.content, copy));
  foot.append(copy, button("Edit", () => edit(message)));
  item.append(foot);
  return item;
}

function cutBefore(conversation, index) {
  conversation.messages.length = index;
  [...find("messages").children].slice(index).forEach((item) => item.remove());
}

function send() {
  const content = find("text").value.trim();
  if (runs.has(current.id) || (!content && !pictures.length)) return;
  if (editing !== null) cutBefore(current, editing);
  const message = { role: "user", content, pictures };
  current.title ||= content.replace(/\s+/g, " ").slice(0, 60) || "Picture";
  current.messages.push(message);
  find("messages").append(messageView(message));
  cancelEdit();
  answer(current);
}

async function answer(conversation) {
  const request = {
    model: settings.model || served[0]?.id || "",
    messages: requestMessages(conversation),
    stream: true,
    stream_options: { include_usage: true },
    return_progress: true,
    prompt_cache_key: conversation.id,
    ...requestFields(),
  };
  const message = { role: "assistant", content: "" };
  conversation.messages.push(message);
  const item = messageView(message);
  find("messages").append(item);
  const stopper = new AbortController();
  runs.set(conversation.id, { conversation, view: item.view, stop: () => stopper.abort() });
  history.replaceState(null, "", `#${conversation.id}`);
  follows = true;
  refresh();
  save(conversation);
  let saved = Date.now();
  find("status").textContent = "The model is answering.";
  await runAnswer(message, item.view, request, stopper.signal, () => {
    if (Date.now() - saved < SAVE_EVERY_MS) return;
    saved = Date.now();
    save(conversation);
  });
  runs.delete(conversation.id);
  find("status").textContent = message.error ? "" : "The answer is complete.";
  if (message.status === 401) askForKey(message.error);
  await save(conversation);
  if (conversation === current) refresh();
}

function requestMessages({ system, messages }) {
  const sent = messages.filter(({ role, content }) => role === "user" || content);
  const all = sent.map(({ role, content, pictures = [] }) => {
    if (!pictures.length) return { role, content };
    const parts = pictures.map((url) => ({ type: "image_url", image_url: { url } }));
    return { role, content: content ? [...parts, { type: "text", text: content }] : parts };
  });
  return system.trim() ? [{ role: "system", content: system }, ...all] : all;
}

function retry(conversation, message) {
  if (runs.has(conversation.id)) return;
  cutBefore(conversation, conversation.messages.indexOf(message));
  answer(conversation);
}

function edit(message) {
  if (runs.has(current.id)) return;
  editing = current.messages.indexOf(message);
  find("editing").hidden = false;
  setText(message.content);
  setPictures(message.pictures ?? []);
  find("text").focus();
}

function cancelEdit() {
  editing = null;
  find("editing").hidden = true;
  setText("");
  setPictures([]);
}

function setText(text) {
  find("text").value = text;
  fitText();
}

function fitText() {
  find("text").style.height = "auto";
  find("text").style.height = `${find("text").scrollHeight}px`;
}

// ---- the server

async function findModels() {
  try {
    served = await models();
  } catch (error) {
    if (error.status === 401) askForKey(error.message);
    else toast(error.message, ["Try again", findModels]);
    return;
  }
  const choice = find("settings").querySelector("[name=model]");
  choice.replaceChildren(...served.map(({ id }) => element("option", { value: id, textContent: id })));
  if (!served.some(({ id }) => id === settings.model)) keep({ model: "" });
  find("model-name").textContent = (settings.model || served[0]?.id || "No model").split("/").at(-1);
  refresh();
}

function contextLength() {
  const model = served.find(({ id }) => id === settings.model) ?? served[0] ?? {};
  return model.max_model_len ?? model.context_length ?? model.meta?.n_ctx_train;
}

const askForKey = (message) => changeSettings(`The server asks for its API key: ${message}`);

function changeSettings(wanted = "") {
  if (find("settings").open) return;
  openSettings(current.system, (system) => {
    current.system = system;
    if (current.messages.length) save(current);
    findModels();
  }, wanted);
}

// ---- scrolling

const scroller = find("scroller");

function scrollDown() {
  if (follows) scroller.scrollTop = scroller.scrollHeight;
}

// When a person last did something: text that becomes shorter scrolls up as well.
const PERSON_MS = 1000;
let touchedAt = -PERSON_MS;
for (const kind of ["wheel", "touchmove", "pointerdown", "keydown"])
  addEventListener(kind, () => (touchedAt = performance.now()), { capture: true, passive: true });

let lastTop = 0;
scroller.onscroll = () => {
  // Text that has just come puts the end far away, too; only going up ends the following. Near the
  // end too: a wheel goes up in small steps.
  const left = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight;
  if (left < 2) follows = true;
  else if (scroller.scrollTop < lastTop) follows &&= performance.now() - touchedAt > PERSON_MS;
  else if (left < 48) follows = true;
  lastTop = scroller.scrollTop;
  find("latest").hidden = follows;
};
// Before it has scrolled: text that comes meanwhile would scroll it back.
scroller.onwheel = (event) => {
  if (event.deltaY < 0 && scroller.scrollTop > 0) follows = false;
};
new ResizeObserver(scrollDown).observe(find("messages"));
new ResizeObserver(scrollDown).observe(scroller);

// ---- keys and buttons

const stop = () => runs.get(current.id)?.stop();
find("latest").onclick = () => {
  follows = true;
  scrollDown();
};
find("composer").onsubmit = (event) => {
  event.preventDefault();
  send();
};
find("text").oninput = fitText;
find("text").onkeydown = (event) => {
  // While a word is composed, Enter belongs to the input method.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  send();
};
document.addEventListener("keydown", (event) => {
  if (find("settings").open) return;
  if (event.key === "Escape") {
    if (runs.has(current.id)) stop();
    else if (editing !== null) cancelEdit();
    find("menu").open = false;
    document.body.classList.remove("sidebar-open");
  } else if (event.key.toLowerCase() === "k" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    newConversation();
  }
});
document.addEventListener("click", (event) => {
  if (!find("menu").contains(event.target) || event.target.type === "button") find("menu").open = false;
});
find("title").onchange = () => {
  current.title = find("title").value.trim();
  save(current);
};
find("thinking").value = settings.thinking ?? "";
find("thinking").onchange = () => keep({ thinking: find("thinking").value });
find("toggle-sidebar").onclick = () => {
  const isOpen = document.body.classList.toggle("sidebar-open");
  find("toggle-sidebar").ariaExpanded = String(isOpen);
};
scroller.onclick = () => document.body.classList.remove("sidebar-open");
find("new").onclick = newConversation;
find("stop").onclick = stop;
find("cancel-edit").onclick = cancelEdit;
find("open-settings").onclick = () => changeSettings();
find("export-markdown").onclick = () => exportConversation("md");
find("export-json").onclick = () => exportConversation("json");
find("delete").onclick = deleteConversation;
window.onhashchange = () => location.hash && open(location.hash.slice(1));

keep({});
listenForPictures();
const wanted = location.hash.slice(1);
newConversation();
if (wanted) await open(wanted);
findModels();
