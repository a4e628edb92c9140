// Talks to the server: models, streamed answers, rendered Markdown.
// Addresses are relative, so the page also works behind a proxy that adds a path.

export let key = localStorage.getItem("key") ?? "";

export function setKey(value) {
  key = value;
  localStorage.setItem("key", value);
}

export class ServerError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

async function ask(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    const options = { method: body ? "POST" : "GET", headers, signal };
    response = await fetch(path, body ? { ...options, body: JSON.stringify(body) } : options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached.");
  }
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 2000);
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // Not an error object: what the server said is shown as it is.
  }
  throw new ServerError(message || `The server answered ${response.status}.`, response.status);
}

export const models = async () => (await (await ask("v1/models")).json()).data;

export const render = async (text) => (await ask("page/render", { text })).json();

// Yields the chunks of a chat completion.
export async function* complete(body, signal) {
  const response = await ask("v1/chat/completions", body, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  try {
    for (;;) {
      const { done, value } = await reader.read().catch((error) => {
        if (error.name === "AbortError") throw error;
        return { done: true };
      });
      if (done) throw new ServerError("The connection ended before the answer was complete.");
      const lines = (buffer + value).split(/\r?\n/);
      buffer = lines.pop();
      for (const line of lines) {
        if (!line.startsWith("data:")) continue;
        const data = line.slice(5).trim();
        if (data === "[DONE]") return;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new ServerError(chunk.error.message ?? JSON.stringify(chunk.error));
        yield chunk;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
