// One answer of the model: waiting, thought, text, error and figures, as they come.
import { complete } from "./api.js";
import { element } from "./dom.js";
import { MarkdownView } from "./markdown.js";

const number = (value) =>
  value.toLocaleString("en", { maximumFractionDigits: value < 20 ? 1 : 0 });

export class AnswerView {
  constructor(message) {
    this.message = message;
    this.root = element("li", { className: "assistant" });
    this.wait = element("div", { className: "wait", hidden: true });
    this.waitText = element("span");
    this.bar = element("progress", { max: 1, hidden: true });
    this.bar.setAttribute("aria-label", "Prompt read");
    this.wait.append(this.waitText, this.bar);
    this.thought = element("details", { className: "thought", hidden: true });
    this.summary = element("summary");
    this.thoughtText = document.createTextNode("");
    const frame = element("div");
    frame.append(this.thoughtText);
    this.thought.append(this.summary, frame);
    this.text = element("div", { className: "markdown" });
    this.markdown = new MarkdownView(this.text);
    this.error = element("p", { className: "error", hidden: true });
    this.error.setAttribute("role", "alert");
    this.foot = element("footer");
    this.stats = element("span", { className: "stats" });
    this.foot.append(this.stats);
    this.root.append(this.wait, this.thought, this.text, this.error, this.foot);
    if (message.thought) this.addThought(message.thought);
    if (message.content) this.addText(message.content);
    if (message.content || message.thought || message.stats || message.stopped) this.finish();
  }

  addThought(text) {
    this.thought.hidden = false;
    this.thoughtText.appendData(text);
  }

  addText(text) {
    this.markdown.push(text);
  }

  showWait(text, share) {
    this.wait.hidden = false;
    this.waitText.textContent = text;
    this.bar.hidden = share === undefined;
    if (share !== undefined) this.bar.value = share;
  }

  // Seconds and speed, a few times a second while it runs.
  tick() {
    const { thoughtSeconds: seconds, content } = this.message;
    if (seconds === undefined) return;
    this.summary.textContent = content || !this.running
      ? `Thought for ${number(Math.max(0.1, seconds))} s` : `Thinking, ${Math.floor(seconds)} s`;
  }

  start() {
    this.running = true;
    this.root.classList.add("running");
    this.showWait("Waiting for the server");
  }

  finish() {
    this.running = false;
    this.root.classList.remove("running");
    this.wait.hidden = true;
    this.tick();
    const { error, stopped, cut, stats } = this.message;
    this.error.textContent = error ?? "";
    this.error.hidden = !error;
    const parts = [];
    if (stopped) parts.push("stopped");
    if (cut) parts.push("ended at the limit of tokens");
    if (stats?.tokens) parts.push(`${number(stats.tokens)} tokens`);
    if (stats?.perSecond) parts.push(`${number(stats.perSecond)} tokens/s`);
    if (stats?.prompt) {
      const cached = stats.cached ? ` (${number(stats.cached)} cached)` : "";
      parts.push(`prompt ${number(stats.prompt)}${cached}`);
    }
    this.stats.textContent = parts.join(" · ");
    return this.markdown.finish();
  }
}

// Asks the server, fills `message` and its view; never throws. `onText` is called as text comes.
export async function runAnswer(message, view, request, signal, onText) {
  let [first, last, pieces, usage, timings, finished] = [0, 0, 0, null, null, false];
  view.start();
  const ticker = setInterval(() => {
    if (message.thoughtSeconds !== undefined && !message.content) {
      message.thoughtSeconds = (performance.now() - first) / 1000;
    }
    view.tick();
    // The server counts at the end; until then a piece is about a token.
    if (pieces > 8 && last > first) {
      const perSecond = (pieces - 1) / ((last - first) / 1000);
      view.stats.textContent = `about ${number(perSecond)} tokens/s`;
    }
  }, 250);
  try {
    for await (const chunk of complete(request, signal)) {
      usage = chunk.usage ?? usage;
      timings = chunk.timings ?? timings;
      const progress = chunk.prompt_progress;
      if (progress && !first) showProgress(view, progress);
      const choice = chunk.choices?.[0];
      if (choice?.finish_reason) {
        finished = true;
        message.cut = choice.finish_reason === "length";
      }
      const thought = choice?.delta?.reasoning_content ?? choice?.delta?.reasoning;
      const text = choice?.delta?.content;
      if (!thought && !text) continue;
      last = performance.now();
      first ||= last;
      pieces++;
      view.wait.hidden = true;
      if (thought) {
        message.thought = (message.thought ?? "") + thought;
        message.thoughtSeconds ??= 0;
        view.addThought(thought);
      }
      if (text) {
        if (message.thought && !message.content) message.thoughtSeconds = (last - first) / 1000;
        message.content += text;
        view.addText(text);
      }
      onText();
    }
    if (!finished) message.error = "The server ended the answer without saying why.";
  } catch (error) {
    if (error.name === "AbortError") message.stopped = true;
    else message.error = error.message;
    message.status = error.status;
  }
  clearInterval(ticker);
  message.stats = {
    prompt: usage?.prompt_tokens,
    cached: usage?.prompt_tokens_details?.cached_tokens,
    tokens: usage?.completion_tokens,
    perSecond: timings?.predicted_per_second
      ?? (usage && last > first ? (usage.completion_tokens - 1) / ((last - first) / 1000) : null),
  };
  await view.finish();
}

function showProgress(view, { total, cache = 0, processed, time_ms: ms }) {
  const rate = ms > 0 ? (processed - cache) / (ms / 1000) : 0;
  const speed = rate > 0 ? `, ${number(rate)} tokens/s` : "";
  const text = `Reading the prompt: ${number(processed)} of ${number(total)} tokens${speed}`;
  view.showWait(text, total ? processed / total : 0);
}
