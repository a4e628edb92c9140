"""Prompts of the turns of a conversation, and the points after which later prompts differ."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import PromptError
from ..prompt import THINK_CLOSE, THINK_OPEN, PromptText, encode_text, render_messages
from .output import ToolCall
from .prompt_cache import common_prefix
from .tool_calls import Schema, as_message

Message = Mapping[str, Any]
# How templates close a thought.
THOUGHT_END = f"\n{THINK_CLOSE}\n\n"


@dataclass(frozen=True)
class TurnPrompts:
    """Renders messages through the chat template, with these tools and options."""

    tokenizer: Any
    tools: Sequence[Schema] = ()
    enable_thinking: bool | None = None
    # Further variables of the template.
    options: Mapping[str, Any] = field(default_factory=dict)

    def render(self, messages: Sequence[Message], add_generation_prompt: bool) -> PromptText:
        """The messages as text."""
        template = dict(self.options)
        if self.tools:
            template["tools"] = list(self.tools)
        return render_messages(
            self.tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            enable_thinking=self.enable_thinking,
            **template,
        )

    def next_prompt(self, messages: Sequence[Message]) -> tuple[list[int], int, int]:
        """Ids of the next prompt, and their numbers before its last message and before the answer.

        These are the points after which later prompts differ: by another message, or by an answer
        that the template renders without its thought.
        """
        text, history = self.render(messages, True), self.render(messages, False)
        prompt = encode_text(self.tokenizer, text)
        if not prompt:
            raise PromptError("the prompt is empty", expected="at least one token")
        other = self.render([*messages[:-1], _user("\0")], False)
        # Only the short end is encoded; no token crosses its start.
        message = encode_text(self.tokenizer, text.part(common_prefix(text, other)))
        start = max(0, len(prompt) - len(message))
        opening = encode_text(self.tokenizer, text.part(len(history)))
        if opening and text.startswith(history) and prompt[-len(opening) :] == opening:
            return prompt, start, max(0, len(prompt) - len(opening))
        boundary = common_prefix(prompt, encode_text(self.tokenizer, history))
        return prompt, start, min(boundary, len(prompt) - 1)

    def system_end(self, messages: Sequence[Message]) -> int:
        """Number of ids for system prompt and tools, which conversations share; 0 if none."""
        system = [m for m in messages[:1] if m["role"] == "system"]
        return len(self.before_message(system)) if system or self.tools else 0

    def before_message(self, messages: Sequence[Message]) -> list[int]:
        """The ids with which every next prompt after `messages` begins."""
        one, other = (self.render([*messages, _user(text)], False) for text in ("a", "1"))
        return encode_text(self.tokenizer, one.part(0, common_prefix(one, other)))

    def renders_json_arguments(self) -> bool:
        """Whether the template renders the arguments of a call as JSON, not one by one."""
        call = as_message(ToolCall("probe", {"key": "a-probe"}, {}))
        answer = {"role": "assistant", "content": "", "reasoning_content": "", "tool_calls": [call]}
        try:
            return '"a-probe"' in self.render([_user("a"), answer], False)
        except PromptError:
            return False

    def thinks(self) -> bool:
        """Whether the template opens a thought."""
        return self.opens_thought(encode_text(self.tokenizer, self.render([_user("a")], True)))

    def opens_thought(self, prompt: Sequence[int]) -> bool:
        """Whether the template has opened a thought at the end of a prompt."""
        return bool(self.tokenizer.decode(prompt[-4:]).rstrip().endswith(THINK_OPEN))


def _user(text: str) -> Message:
    return {"role": "user", "content": text}
