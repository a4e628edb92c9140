"""The server: its clients, what it reads, how fast it answers, and whether it lives; ends in JSON.

`--short` tries less of everything: the JSON says how many turns, and how long the soak was.
mlx-lm's server has none of the APIs of Claude Code and Codex: their turns go to it as chat
completions.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import agent_programs
import agent_turns
import server_load
from label import label
from server_process import mlx_lms, ours

from qwen35_mlx.cli.local_models import SOURCE
from qwen35_mlx.convert import convert

ROOT = Path(__file__).parent.parent
SHORT_ENGINE = "--only-demo --rounds 1 --schemas 50".split()


def clients() -> tuple[int, int]:
    """How many checks pass: tests with libraries of PyPI, and programs of npm that are there."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not live"]
    run = subprocess.run(
        [*command, "tests/server/test_clients.py"], cwd=ROOT, capture_output=True, text=True
    )
    words = run.stdout.strip().splitlines()[-1].replace(",", "").split() if run.stdout else []
    counts = {words[i + 1]: int(words[i]) for i in range(len(words) - 1) if words[i].isdigit()}
    passed = counts.get("passed", 0)
    total = passed + counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0)
    for name, problem in agent_programs.run_all().items():
        print(f"{name}: {problem or 'ok'}", flush=True)
        total += 1
        passed += not problem
    return passed, total


def prefilled(folder: Path, names: list[str], num_turns: int) -> dict[str, float]:
    """Tokens read in so many turns of each agent, ours for one of mlx-lm's."""
    ratios = {}
    for name in names:
        with ours(folder) as server:
            our_read, our_total = agent_turns.num_prefilled(server, name, num_turns, True)
        with mlx_lms(folder) as server:
            their_read, their_total = agent_turns.num_prefilled(server, name, num_turns, False)
        print(
            f"{name}: ours read {our_read} of {our_total}, mlx-lm {their_read} of {their_total}",
            flush=True,
        )
        ratios[name] = round(our_read / their_read, 3)
    return ratios


def life(folder: Path, minutes: float, num_fuzzed: int) -> dict[str, Any]:
    """The soak and the fuzzing."""
    with ours(folder) as server:
        fuzzed = server_load.fuzz(server, num_fuzzed)
        result = server_load.soak(server, minutes)
    failures = [*fuzzed.failures, *result.tally.failures]
    for failure in failures[:20]:
        print(failure, flush=True)
    print(f"soak: {dict(result.tally.counts)}; fuzzing: {dict(fuzzed.counts)}", flush=True)
    return {
        "soak_minutes": result.minutes,
        "soak_crashes": result.crashes,
        "soak_memory_growth": result.memory_growth,
        "soak_file_growth": result.file_growth,
        "soak_failures": len(result.tally.failures),
        "fuzz_failures": len(fuzzed.failures),
    }


def engine(*options: str) -> dict[str, Any]:
    """The figures of the engine alone, from the bench of its own."""
    file = Path(__file__).parent / "bench_server_engine.py"
    run = subprocess.run([sys.executable, str(file), *options], capture_output=True, text=True)
    print(run.stdout, flush=True)
    if run.returncode:
        raise RuntimeError(run.stderr[-2000:])
    figures: dict[str, Any] = json.loads(run.stdout.strip().splitlines()[-1])
    return figures


def main() -> None:
    """All parts, or those that are named."""
    parts = ("clients", "prefilled", "engine", "life")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*parts, []], help=", ".join(parts))
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--soak-minutes", type=float, help="30, or 3 with --short")
    parser.add_argument("--agents", nargs="*", default=list(agent_turns.AGENTS))
    options = parser.parse_args()
    num_turns, num_fuzzed, minutes = (4, 300, 3) if options.short else (10, 10_000, 30)
    minutes = minutes if options.soak_minutes is None else options.soak_minutes
    wanted = options.parts or parts
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = convert(SOURCE, Path(scratch) / "demo", bits=4)
        if "clients" in wanted:
            figures["clients_passed"], figures["clients_total"] = clients()
        if "prefilled" in wanted:
            figures["prefilled_vs_mlx_lm"] = prefilled(folder, options.agents, num_turns)
            figures["num_turns"] = num_turns
        if "engine" in wanted:
            figures |= engine(*(SHORT_ENGINE if options.short else ()))
        if "life" in wanted:
            figures |= life(folder, minutes, num_fuzzed)
    print(json.dumps(label() | figures))


if __name__ == "__main__":
    main()
