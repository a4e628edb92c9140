// Shows Markdown while it streams. The server renders it: a finished block once, the last block
// again as it grows. What came since stands behind it as plain text.
import { render } from "./api.js";
import { button, copyText, element } from "./dom.js";

const MAX_CHARS = 30000; // The server takes 32,000.
const MIN_PAUSE_MS = 100;
const GROWING = new Set(["P", "UL", "OL", "LI", "PRE", "CODE", "BLOCKQUOTE", "H1", "H2", "H3", "H4"]);

export class MarkdownView {
  constructor(root) {
    this.root = root;
    this.tail = element("div");
    this.fresh = element("span", { className: "fresh" });
    this.tail.append(this.fresh);
    root.append(this.tail);
    this.source = ""; // Of the blocks that are not finished.
    this.shown = 0; // So many characters of it are rendered in `tail`.
    this.pause = MIN_PAUSE_MS;
    this.working = null;
  }

  push(text) {
    this.source += text;
    this.#showFresh();
    if (!this.stuck) this.working ??= this.#work();
  }

  // Resolves when all is rendered, or cannot be.
  async finish() {
    this.pause = 0;
    this.wake?.();
    await this.working;
  }

  async #work() {
    while (this.shown < this.source.length) {
      if (this.pause) {
        await new Promise((resolve) => {
          this.wake = resolve;
          setTimeout(resolve, this.pause);
        });
      }
      const text = this.source.slice(0, MAX_CHARS);
      const started = performance.now();
      try {
        this.#show(text, await render(text));
      } catch {
        break; // It stays plain text; the next piece of text tries again.
      }
      // A slow rendering takes at most a fifth of the server's time.
      if (this.pause) this.pause = Math.max(MIN_PAUSE_MS, 4 * (performance.now() - started));
      // One block that is too long; the rest stays plain text.
      this.stuck = text.length === MAX_CHARS && !this.moved;
      if (this.stuck) break;
    }
    this.working = null;
  }

  #show(text, { html, tail, tail_line: line }) {
    let end = 0;
    for (const newline of text.matchAll(/\r\n?|\n/g)) {
      if (line-- <= 0) break;
      end = newline.index + newline[0].length;
    }
    this.moved = end > 0;
    if (html) {
      const block = element("div", { innerHTML: html });
      addCopyButtons(block);
      this.tail.before(...block.childNodes);
    }
    this.source = this.source.slice(end);
    this.shown = text.length - end;
    this.tail.innerHTML = tail;
    addCopyButtons(this.tail);
    let last = this.tail;
    while (GROWING.has(last.lastElementChild?.tagName)) last = last.lastElementChild;
    this.#showFresh();
    last.append(this.fresh);
  }

  #showFresh() {
    // The space before it, which a paragraph loses at its end, comes with the next word.
    const space = this.source.slice(0, this.shown).match(/\s*$/)[0].length;
    const fresh = this.source.slice(this.shown - space);
    this.fresh.textContent = fresh.trim() ? fresh : "";
  }
}

function addCopyButtons(root) {
  for (const pre of root.querySelectorAll("pre")) {
    const bar = element("div", { className: "code-bar" });
    const copy = button("Copy", () => copyText(pre.querySelector("code").textContent, copy));
    bar.append(element("span", { textContent: pre.dataset.language ?? "" }), copy);
    pre.before(bar);
  }
}
