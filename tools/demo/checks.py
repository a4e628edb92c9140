"""Checks of the demo model's answers, by skill; stricter than a human would be."""

import json
import re
from typing import Any

from split import Sample


def is_right(sample: Sample, answer: str) -> bool:
    """Whether `answer`, without its thought, is what `sample` expects."""
    answer = answer.strip()
    if sample.skill == "tool call":
        return parse_call(answer) == sample.expected
    if sample.skill == "json":
        try:
            return bool(json.loads(answer) == sample.expected)
        except ValueError:
            return False
    if sample.skill.startswith("arithmetic"):
        numbers = re.findall(r"-?\d+", answer)
        return bool(numbers) and numbers[-1].lstrip("-") == str(sample.expected)
    if sample.skill in ("sorting", "reversing", "repeating"):
        return answer.partition(": ")[2] == sample.expected
    return re.search(rf"(?<!\w){re.escape(sample.expected)}(?!\w)", answer) is not None


CALL = re.compile(
    r"\s*<tool_call>\n<function=([^>\n]+)>\n(.*)</function>\n</tool_call>\s*", re.DOTALL
)
PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n(.*?)\n</parameter>\n", re.DOTALL)


def parse_call(text: str) -> dict[str, Any] | None:
    """Name and arguments (all-digit values as integers) of a single tool call, or None."""
    if (call := CALL.fullmatch(text)) is None or PARAMETER.sub("", call[2]):
        return None
    values = {key: int(v) if v.isdigit() else v for key, v in PARAMETER.findall(call[2])}
    return {"name": call[1], "arguments": values}
