"""Prints results on stdout: plans, conversions, benches, the doctor's report, sessions."""

import shlex
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..text.media_parts import media_parts, text_of
from . import terminal

if TYPE_CHECKING:
    from ..chat.sessions import SessionInfo
    from ..convert import Plan
    from ..evaluation.recall import Recall


def print_lines(lines: Iterable[str]) -> None:
    """Print formatted lines."""
    for line in lines:
        terminal.out.print(line, markup=False)


def print_plan(plan: "Plan") -> None:
    """Print the tensors, folded over layers, and totals; fewer columns on a narrow terminal."""
    from ..convert.report import aligned

    rows = [("module", "count", "shape", "source", "becomes", "bpw", "MB")]
    rows += [
        (
            row.name.removeprefix("language_model.").removeprefix("model."),
            str(row.count),
            "x".join(map(str, row.shape)),
            row.source_dtype,
            f"{row.bits}-bit g{row.group_size}" if row.bits else row.dtype,
            f"{8 * row.nbytes / max(row.num_parameters, 1):.2f}",
            f"{row.nbytes / 1e6:,.{2 if row.nbytes < 1e9 else 0}f}",
        )
        for row in plan.table()
    ]
    lines = aligned(rows)
    if terminal.out.is_terminal and len(lines[0]) > terminal.out.width:
        lines = aligned([(*row[:3], row[4], row[6]) for row in rows])
    print_lines(lines)
    terminal.out.print(_totals(plan))


def print_converted(plan: "Plan", folder: Path) -> None:
    """Print the size of a converted model, and the command that runs it."""
    terminal.out.print(_totals(plan))
    terminal.out.print(f"written to {folder}", markup=False)
    terminal.note(f"next: qwen35-mlx chat {shlex.quote(str(folder))}")


def _totals(plan: "Plan") -> str:
    return (
        f"{plan.num_parameters / 1e6:,.1f} M parameters, "
        f"{plan.bits_per_weight:.3f} bits per weight of the text model, "
        f"{plan.output_bytes / 1e6:,.1f} MB in {len(plan.shards)} file(s), "
        f"from {plan.source_bytes / 1e6:,.1f} MB"
    )


def print_sessions(infos: Sequence["SessionInfo"]) -> None:
    """Print one line per session, the last saved first."""
    if not infos:
        terminal.note("no sessions yet; qwen35-mlx chat --session NAME makes one")
        return
    width = max(len(info.name) for info in infos)
    for info in infos:
        saved = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.saved))
        turns = terminal.count(info.num_turns, "turn")
        if info.num_pictures:
            turns += f", {terminal.count(info.num_pictures, 'picture')}"
        turns += f": {info.first_words}"
        line = f"{info.name:{width}}  {saved}  {info.num_bytes / 1e6:,.1f} MB  "
        line = (line + (info.problem or turns)).translate(terminal.CONTROL)
        # `sessions NAME` prints the whole text.
        terminal.out.print(
            line[: terminal.out.width if terminal.out.is_terminal else None], markup=False
        )


def print_conversation(messages: Sequence[dict[str, Any]]) -> None:
    """Print every message with its role, also thoughts."""
    out = terminal.out
    for message in messages:
        out.print(f"[{message['role']}]", style="bold", markup=False)
        if thought := message.get("reasoning_content"):
            out.print(thought.translate(terminal.CONTROL), style="dim italic", markup=False)
        # In the file, a picture is a reference with its name and size.
        for part in media_parts(message["content"]):
            name, (width, height) = part[part["type"]]["name"], part[part["type"]]["original_size"]
            line = f"({part['type']}: {name}, {width}x{height})"
            out.print(line.translate(terminal.CONTROL), style="dim", markup=False)
        text = text_of(message["content"])
        out.print(text.translate(terminal.CONTROL) + "\n", markup=False)


def print_bench(result: dict[str, Any]) -> None:
    """Print one line per context, a second one for mlx-lm, and a third with the ratios."""
    from ..convert.report import aligned

    head = ("context", "", "prefill", "ttft", "warm", "ttft", "decode", "GB/s", "limit", "peak GB")
    table: list[tuple[str, ...]] = [head]
    for row in result["contexts"]:
        context = f"{row['context']:,}"
        table.append((context, "", *_times(row), *_bandwidth(row)))
        if "mlx_lm" in row:
            theirs = row["mlx_lm"]
            table.append((context, "mlx-lm", *_times(theirs), "", "", _gb(theirs)))
            prefill, warm, decode = (f"{ratio:.2f}x" for ratio in row["vs_mlx_lm"].values())
            table.append((context, "ratio", prefill, "", warm, "", decode, "", "", ""))
    limit = result["bandwidth_limit_gbps"]
    print_lines([
        f"{result['model']}, {result['bits_per_weight']:.2f} bits per weight",
        f"{result['machine']}, {result['os']}, MLX {result['mlx']}, "
        + (f"bandwidth limit {limit:,.0f} GB/s" if limit else "bandwidth limit unknown"),
        "tokens a second; ttft: seconds to the first token, prefill included",
        f"warm: a message of {result['warm_tokens']} tokens after an answer of "
        f"{result['new_tokens']}; medians of {result['median_of']}",
        "",
        *aligned(table),
        *_drafts(result.get("drafts")),
        *_experts(result.get("experts")),
    ])  # fmt: skip


def _drafts(found: dict[str, Any] | None) -> list[str]:
    """Two lines about answers with drafts; none without an MTP layer."""
    if not found:
        return []
    speed = f"decode {found['decode_tps']:,.1f} with drafts, {found['plain_decode_tps']:,.1f} "
    speed += f"without: {found['vs_plain']:.2f}x"
    return ["", speed, "; ".join(draft_figures(found["tokens_per_pass"], found["acceptance"]))]


def draft_figures(tokens_per_pass: float, acceptance: Mapping[str, Sequence[float]]) -> list[str]:
    """Tokens a pass, and for each kind of drafts the share of right ones by depth."""
    shares = [
        f"{kind} {' '.join(f'{share:.0%}' for share in by_depth)} right"
        for kind, by_depth in acceptance.items()
    ]
    return [f"{tokens_per_pass:.2f} tokens a pass", *shares]


def _experts(found: dict[str, float] | None) -> list[str]:
    """A line about experts that are read from disk."""
    if not found:
        return []
    return [
        f"experts from disk: {found['expert_slots']} of {found['experts']} of each layer in memory,"
        f" {found['expert_hit_rate']:.1%} hits, {found['expert_gb_per_s']:.2f} GB/s"
    ]


def _times(figures: dict[str, float]) -> tuple[str, ...]:
    names = ("prefill_tps", "ttft_s", "warm_prefill_tps", "warm_ttft_s", "decode_tps")
    return tuple(f"{figures[name]:,.{3 if name.endswith('_s') else 1}f}" for name in names)


def _bandwidth(row: dict[str, Any]) -> tuple[str, str, str]:
    percent = row["percent_of_bandwidth"]
    return (
        f"{row['decode_gb_per_s']:,.1f}",
        "-" if percent is None else f"{percent:.0f} %",
        _gb(row),
    )


def _gb(figures: dict[str, float]) -> str:
    return f"{figures['peak_memory_bytes'] / 1e9:,.2f}"


def print_recall(found: Sequence["Recall"]) -> None:
    """Print right answers of all questions, by depth and by length of the text."""
    print("depth     " + "".join(f"{row.num_tokens:>10,}" for row in found))
    for depth in range(num := len(found[0].asked)):
        cells = "".join(f"{f'{row.right[depth]}/{row.asked[depth]}':>10}" for row in found)
        print(f"{f'{100 * depth // num}-{100 * (depth + 1) // num} %':10}{cells}")
    print(f"{'all':10}" + "".join(f"{f'{sum(r.right)}/{sum(r.asked)}':>10}" for r in found))


def draw_bench(result: dict[str, Any], file: Path) -> None:
    """Draw prefill and decode speed over the context as a PNG."""
    from ..convert.plots import picture

    rows = result["contexts"]
    sizes = [row["context"] for row in rows]
    with picture(file, (10, 4.5)) as (figure, left, right):
        for axes, speed, title in (
            (left, "prefill_tps", "prefill"),
            (right, "decode_tps", "decode"),
        ):
            axes.plot(sizes, [row[speed] for row in rows], marker="o", label="qwen35-mlx")
            if "mlx_lm" in rows[0]:
                theirs = [row["mlx_lm"][speed] for row in rows]
                axes.plot(sizes, theirs, marker="s", label="mlx-lm")
            axes.set(xscale="log", title=title, xlabel="context, tokens", ylabel="tokens / s")
            axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
            axes.set_xticks([], minor=True)
            axes.set_ylim(bottom=0)
            axes.legend()
        figure.suptitle(
            f"{result['model']}, {result['bits_per_weight']:.2f} bits per weight, "
            f"{result['machine']}"
        )


def print_doctor(report: dict[str, Any]) -> None:
    """Print machine and kernels for people."""
    machine, kernels = report["machine"], report["kernels"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items())
    lines = [
        f"{machine['chip']}, {machine['os']}, {versions}",
        f"memory {machine['memory_gb']:,.1f} GB, disk {machine['disk_free_gb']:,.1f} GB free",
    ]
    if machine["metal"]:
        lines.append(f"the GPU may use {machine['gpu_limit_gb']:,.1f} GB")
    if command := machine["raise_gpu_limit"]:
        lines += [
            "this command gives the GPU more until the next restart:",
            f"  {command}",
        ]
    if machine["bandwidth_gb_per_s"]:
        lines.append(f"memory bandwidth {machine['bandwidth_gb_per_s']:g} GB/s")
    if kernels is None:
        lines.append("no GPU with Metal in use: the model runs on plain MLX operations")
    rows = kernels or []
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += _doctor_lines(op, [row for row in rows if row["op"] == op])
    print_lines(lines)


def _doctor_lines(op: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """The results of one operation: a line per size, or the problem of its kernel."""
    problems = dict.fromkeys(row["problem"] for row in rows if row["problem"])
    if len(problems) == 1 and all(row["problem"] for row in rows):
        return [f"{op}: not used: {next(iter(problems))}"]
    num_used = sum(row["used"] for row in rows)
    lines = [f"{op}: right, faster in {num_used} of {len(rows)}"]
    if problems:
        lines = [f"{op}: faster in {num_used} of {len(rows)}"]
    for row in rows:
        size = f"{row['bits']} bits g{row['group_size']:<3}{row['num_tokens']:>4} tokens"
        line = f"  {row['member']:<10} {size}: "
        if row["problem"]:
            lines.append(line + f"not used: {row['problem']}")
            continue
        share = row["bandwidth_share"]
        lines.append(
            f"{line}{row['speedup']:.2f}x, {row['metal_us']:,.1f} us at "
            f"{row['metal_gb_per_s']:,.0f} GB/s{f' ({share:.0%})' if share else ''}, "
            f"mlx {row['mlx_us']:,.1f} us"
        )
    return lines
