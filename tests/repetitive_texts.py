"""Seeded texts that repeat themselves: wanted ones, which end, and loops, which do not."""

import base64
import random
from collections.abc import Callable

WORDS = (
    "river house green seven morning paper quiet mountain answer window garden simple yellow "
    "letter doctor winter number island market silver branch summer bridge camera dinner"
).split()
SENTENCES = (
    "I will not talk in class.", "All work and no play makes Jack a dull boy.", "Thank you!",
    "I must do my homework before I watch television.", "Ich soll den Unterricht nicht stören.",
    "No debo hablar en clase.", "I am sorry that I was late.", "我以后不再迟到。", "Be kind.",
)  # fmt: skip
Question = str
Maker = Callable[[random.Random], tuple[Question, str]]


def _sentence(rng: random.Random) -> str:
    words = " ".join(rng.choice(WORDS) for _ in range(rng.randint(4, 14)))
    return f"{words.capitalize()}."


def _paragraph(rng: random.Random, low: int = 2, high: int = 7) -> str:
    return " ".join(_sentence(rng) for _ in range(rng.randint(low, high)))


def _python(rng: random.Random) -> str:
    names = rng.sample(WORDS, rng.randint(3, 12))
    made = rng.choice(
        [
            lambda n: f"    def test_{n}(self):\n        self.assertEqual(f({n!r}), 0)\n\n",
            lambda n: f"    @property\n    def {n}(self):\n        return self._{n}\n\n",
            lambda n: "        x = 0\n        y = 0\n        z = 0\n",
            lambda n: "    pass\n",
            lambda n: f"{n} = [0] * 10\n",
        ]
    )
    return "class A:\n" + "".join(made(name) * rng.randint(1, 6) for name in names)


def _c(rng: random.Random) -> str:
    body = rng.choice(["    case %d:\n        break;\n", "    x[%d] = 0;\n", "    { 0, 0, 0 },\n"])
    return "".join(body % i if "%" in body else body for i in range(rng.randint(20, 150)))


def _html(rng: random.Random) -> str:
    row = rng.choice(
        ["<tr><td></td><td></td><td></td></tr>\n", "<br>\n", "  <li><a href=\"#\">Item</a></li>\n",
         "<div class=\"row\">\n  <div class=\"col\"></div>\n</div>\n"]
    )  # fmt: skip
    return "<body>\n" + row * rng.randint(20, 120) + "</body>\n"


def _table(rng: random.Random) -> str:
    cell = rng.choice(["  ", " 0 ", " - ", " yes ", " 0.00 ", " N/A "])
    columns = rng.randint(2, 9)
    row = "|" + "|".join([cell] * columns) + "|\n"
    return "|" + " a |" * columns + "\n|" + "---|" * columns + "\n" + row * rng.randint(20, 150)


def _modular(rng: random.Random) -> str:
    m, columns = rng.randint(2, 9), rng.randint(4, 12)
    rows = range(rng.randint(20, 60))
    return "".join("| " + " | ".join(str(i * j % m) for j in range(columns)) + " |\n" for i in rows)


def _csv(rng: random.Random) -> str:
    row = ",".join(rng.choice(["0", "", "null", "1.0", "x", "false"]) for _ in range(6))
    return "a,b,c,d,e,f\n" + f"{row}\n" * rng.randint(30, 250)


def _matrix(rng: random.Random) -> str:
    rows, columns = rng.randint(5, 48), rng.randint(5, 48)
    value = rng.choice(["0", "1", "0.0", "-1", "False", "None"])
    if rng.random() < 0.3:
        size = min(rows, columns)
        line = [[("1" if i == j else "0") for j in range(size)] for i in range(size)]
        return "[\n" + ",\n".join(f" [{', '.join(r)}]" for r in line) + "\n]"
    return "M = [\n" + ",\n".join([f" [{', '.join([value] * columns)}]"] * rows) + "\n]"


def _tensor(rng: random.Random) -> str:
    value = rng.choice(["0.", "0.0000", "1.", "0"])
    return "tensor([" + ", ".join([value] * rng.randint(100, 900)) + "])"


def _json(rng: random.Random) -> str:
    item = rng.choice(
        ['{"id": null, "name": "", "tags": []}', "{}", "[]", '{"x": 0, "y": 0}', '"", ""', "true"]
    )
    joint = rng.choice([",\n  ", ", ", ","])
    return "[\n  " + joint.join([item] * rng.randint(20, 120)) + "\n]"


def _art(rng: random.Random) -> str:
    kinds = ["/\\", "*", "=", "#", ". ", "~-", "█", "+--", "|   ", "░▒"]
    row = rng.choice(kinds) * rng.randint(5, 40)
    return f"{row}\n" * rng.randint(3, 40)


def _rule(rng: random.Random) -> str:
    return rng.choice(["-", "=", ".", "_", "*", " ", "─", "·"]) * rng.randint(50, 900)


def _list(rng: random.Random) -> str:
    item = rng.choice(
        ["- [ ] to do\n", "- \n", "* item\n", "- yes\n", "1. \n", "- [x] done and checked\n",
         "- Name: \n", "✅ passed\n", "ok\n"]
    )  # fmt: skip
    return item * rng.randint(30, 250)


def _lyrics(rng: random.Random) -> str:
    refrain = "".join(f"{_sentence(rng)[:-1]},\n" for _ in range(4))
    hook = rng.choice(["La la la la la la\n", "Na na na na, hey hey, goodbye\n", "Oh oh oh oh\n"])
    verses = [_paragraph(rng).replace(". ", ",\n") for _ in range(rng.randint(2, 5))]
    return "\n\n".join(f"{verse}\n\n{refrain * 2}{hook * rng.randint(4, 16)}" for verse in verses)


def _form(rng: random.Random) -> str:
    block = rng.choice(
        ["Name: ________\nDate: ________\nSignature: ________\n\n", "Day:\nMorning:\nNoon:\n\n",
         "| | | |\n", "Question:\nAnswer:\nPoints: 0\n---\n", "Name:\n\nAge:\n\n"]
    )  # fmt: skip
    return block * rng.randint(20, 90)


def _hex_dump(rng: random.Random) -> str:
    row = rng.choice(["00", "ff", "90"])
    lines = (f"{i * 16:08x}: {' '.join([row] * 16)}" for i in range(rng.randint(10, 70)))
    return "\n".join(lines)


def _hex(rng: random.Random) -> str:
    return rng.choice(["0x00, ", "00 ", "\\x00", "FF", "0000 "]) * rng.randint(100, 700)


def _base64(rng: random.Random) -> str:
    data = base64.b64encode(bytes(rng.randint(100, 2000))).decode()
    width = rng.choice([64, 76, 10_000])
    return "\n".join(data[i : i + width] for i in range(0, len(data), width))


def _sql(rng: random.Random) -> str:
    row = rng.choice(
        ["INSERT INTO t VALUES (NULL, 0, '');\n", "INSERT INTO users DEFAULT VALUES;\n",
         "(0, 0, 0, 'x'),\n", "SELECT 1;\n", "COMMIT;\n"]
    )  # fmt: skip
    return row * rng.randint(30, 200)


def _log(rng: random.Random) -> str:
    row = rng.choice(
        ["[INFO] connection closed\n", "PASS\n", "  at java.lang.Thread.run(Thread.java:748)\n",
         "Warning: unused variable 'x'\n", "64 bytes from 127.0.0.1: time=0.05 ms\n"]
    )  # fmt: skip
    return row * rng.randint(20, 150)


def _notes(rng: random.Random) -> str:
    row = rng.choice(
        ["C | G | Am | F |\n", "x---x---x---x---|\n", "e|--0--0--0--|\n", "do re mi\n"]
    )
    return row * rng.randint(20, 100)


def _steps(rng: random.Random) -> str:
    what = _sentence(rng)
    return "".join(f"Step {i}: {what}\n" for i in range(rng.randint(20, 120)))


def _requested_lines(rng: random.Random) -> tuple[Question, str]:
    sentence, count = rng.choice(SENTENCES), rng.randint(100, 300)
    asked = rng.choice(["Write the line %r %d times.", "%r: %d times, please!", "Repeat %r %d x"])
    number = rng.random() < 0.5
    joint = rng.choice(["\n", "\n\n"])
    lines = (f"{i + 1}. {sentence}" if number else sentence for i in range(count))
    # The question is not always there: the line is sign enough.
    return (asked % (sentence, count)) * (rng.random() < 0.7), joint.join(lines)


def _requested_in_line(rng: random.Random) -> tuple[Question, str]:
    sentence = rng.choice([*SENTENCES, "hello", "buffalo", "ha", "no"])
    count = rng.randint(100, 300)
    asked = rng.choice([f"Say {sentence!r} {count} times.", f"Say it {count} times in one line."])
    if rng.random() < 0.3:
        count, asked = 100, f"Write {sentence} a hundred times"
    return asked, " ".join([sentence] * count)


def _requested_unnumbered(rng: random.Random) -> tuple[Question, str]:
    sentence = rng.choice(SENTENCES)
    return f"Fill a page with: {sentence}", " ".join([sentence] * rng.randint(50, 120))


def _unasked(make: Callable[[random.Random], str]) -> Maker:
    return lambda rng: ("", make(rng))


WANTED: list[Maker] = [
    *map(
        _unasked,
        (
            _python, _c, _html, _table, _modular, _csv, _matrix, _tensor, _json, _art, _rule, _list,
            _lyrics, _form, _hex_dump, _hex, _base64, _sql, _log, _notes, _steps,
        ),
    ),
    _requested_lines, _requested_in_line, _requested_unnumbered,
]  # fmt: skip


def wanted_texts(count: int, seed: int = 0) -> list[tuple[Question, str]]:
    """Questions and answers that repeat themselves, of all kinds in turn."""
    rng = random.Random(seed)
    texts = []
    for i in range(count):
        question, text = WANTED[i % len(WANTED)](rng)
        texts.append((question, f"{_paragraph(rng)}\n\n{text}\n\n{_paragraph(rng)}"))
    return texts


UNITS: list[Callable[[random.Random], str]] = [
    lambda rng: f"{_sentence(rng)} ",
    lambda rng: f"{_sentence(rng)[:-1].lower()} ",
    lambda rng: f"{_paragraph(rng)} ",
    lambda rng: f"{_paragraph(rng)}\n\n",
    lambda rng: f"{_paragraph(rng, 20, 40)}\n\n",
    lambda rng: f"{_sentence(rng)}\n",
    lambda rng: "".join(f"{_sentence(rng)}\n" for _ in range(rng.randint(2, 6))),
    lambda rng: "Wait, let me check this again.\n\nActually, no.\n\n",
    lambda rng: "".join(f"    {rng.choice(WORDS)} = {rng.choice(WORDS)}()\n" for _ in range(5)),
    lambda rng: "    }\n    return x;\n}\n\n",
    lambda rng: rng.choice(["the ", "!", " 0", "\n", "a", "-", "\u3001", "ha", "\t", "</div>"]),
    lambda rng: rng.choice(['{"name": "x", "value": 0}, ', '"key": null,\n', "0, ", "1\n", "[[["]),
    lambda rng: f"| {rng.choice(WORDS)} | {rng.randint(0, 99)} |\n",
    lambda rng: rng.choice(["我以后不再迟到。", "이것은 문장입니다. ", "これは文です。", "Так. "]),
    lambda rng: f"{rng.choice(WORDS)} {rng.choice(WORDS)}, ",
]


def loops(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """A normal beginning, and a passage that then comes again and again."""
    rng = random.Random(seed)
    return [(f"{_paragraph(rng, 3, 20)}\n\n", UNITS[i % len(UNITS)](rng)) for i in range(count)]
