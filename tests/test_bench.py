"""`qwen35-mlx bench`: what is measured, and figures that agree with each other in all outputs."""

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest
from everyday import everyday
from mlx.utils import tree_flatten

from qwen35_mlx import machine
from qwen35_mlx.cli.report import _drafts
from qwen35_mlx.convert import plan
from qwen35_mlx.convert.mac_models import activation_bytes, bytes_per_token
from qwen35_mlx.errors import Qwen35Error
from qwen35_mlx.evaluation import bench as measuring
from qwen35_mlx.evaluation.bench import mlx_lm_program
from qwen35_mlx.memory import state_bytes


class Clock:
    """Stands still unless a conversation moves it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def conversation(self, read_s: float, token_s: float, calls: list[Any]) -> Any:
        """Takes `read_s` a token read and `token_s` a token said."""

        def turn(ids: list[int], num_tokens: int) -> Iterator[int]:
            calls.append((list(ids), num_tokens))
            self.now += read_s * len(ids)
            for i in range(num_tokens):
                self.now += token_s if i else 0.0
                yield 7 + i

        return turn


def model_of(context_length: int) -> Any:
    return SimpleNamespace(context_length=context_length)


@pytest.mark.parametrize(
    ("context_length", "longest", "expected"),
    [
        (300_000, 262_144, [512, 4096, 32_768, 262_144]),
        (300_000, None, [512, 4096, 32_768]),
        (300_000, 5000, [512, 4096, 5000]),
        (300_000, 100, [100]),
        (4096, None, [512, 4096 - measuring.ROOM]),
    ],
)
def test_contexts(context_length: int, longest: int | None, expected: list[int]) -> None:
    assert measuring.contexts(model_of(context_length), longest) == expected


@pytest.mark.parametrize("longest", [0, 4000])
def test_a_context_that_leaves_no_room_for_the_answer_is_refused(longest: int) -> None:
    with pytest.raises(Qwen35Error, match="the context does not fit the model"):
        measuring.contexts(model_of(4096), longest)


def test_a_run_times_reading_decoding_and_a_message_after_it() -> None:
    clock, calls = Clock(), []
    run = measuring.measure(clock.conversation(0.5, 2.0, calls), [1] * 100, 5, 64, clock)
    assert (run.ttft_s, run.decode_s) == (50.0, 8.0)
    # Warm: the last token of the answer and new ones are read, none of the prompt again.
    assert run.warm_ttft_s == 0.5 * 64
    assert [(len(ids), n) for ids, n in calls] == [(100, 5), (64, 1)]
    assert calls[1][0][0] == 7 + 4


def test_figures_follow_from_medians_of_the_times() -> None:
    runs = [measuring.Run(s, 2 * s, s / 2, int(s)) for s in (1.0, 2.0, 9.0)]
    figures = measuring.medians(runs, context=1000)
    assert figures["ttft_s"] == 2.0 and figures["prefill_tps"] == 500.0
    assert figures["decode_tps"] == (measuring.NEW_TOKENS - 1) / 4.0
    assert figures["warm_prefill_tps"] == measuring.WARM_TOKENS / 1.0
    assert figures["peak_memory_bytes"] == 9


def test_programs_run_in_turns_and_neither_is_always_first() -> None:
    order: list[str] = []
    clock = Clock()

    def program(name: str) -> Callable[[], Any]:
        def make() -> Any:
            order.append(name)
            return clock.conversation(1.0, 1.0, [])

        return make

    programs = {name: program(name) for name in "ab"}
    runs = measuring.measure_in_turns(programs, [1, 2], 3, clock)
    assert "".join(order) == "abbaab"
    assert {name: len(those) for name, those in runs.items()} == {"a": 3, "b": 3}


def test_bandwidth_and_ratios(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = demo
    clock = Clock()
    monkeypatch.setattr(measuring, "bandwidth_limit", lambda: 100.0)
    programs = {
        "qwen35_mlx": lambda: clock.conversation(0.01, 0.1, []),
        "mlx_lm": lambda: clock.conversation(0.02, 0.05, []),
    }
    (row,) = measuring.bench(model, programs, [50], 2, clock=clock)
    assert row["prefill_tps"] == pytest.approx(100) and row["decode_tps"] == pytest.approx(10)
    gbps = 10 * row["decode_bytes_per_token"] / 1e9
    assert row["decode_gb_per_s"] == row["percent_of_bandwidth"] == pytest.approx(gbps)
    assert row["vs_mlx_lm"] == pytest.approx(
        {"prefill_tps": 2.0, "warm_prefill_tps": 2.0, "decode_tps": 0.5}
    )


def test_bytes_of_a_token_count_weights_once_and_grow_with_the_context(demo: Any) -> None:
    model, _ = demo
    arrays = dict(tree_flatten(model.parameters())).values()
    weights = sum(array.nbytes for array in arrays)
    none, some = (measuring.bytes_per_token(model, n) for n in (0, 1000))
    config = model.config
    full = config.layer_types.count("full_attention")
    item_bytes = 4
    per_token = 2 * full * config.num_key_value_heads * config.head_dim * item_bytes
    assert some - none == 1000 * per_token
    assert none > weights if config.tie_word_embeddings else none < 2 * weights


def test_bytes_of_a_token_are_those_that_plan_counts(demo: Any, converted_demo: Path) -> None:
    planned = plan(converted_demo)
    counts = (
        measuring.bytes_per_token(demo[0], 0) - 2 * state_bytes(demo[0].config, 4),
        bytes_per_token(planned) - 2 * state_bytes(planned.config, activation_bytes(planned)),
    )
    # Norms, scales and biases are in float32 here.
    assert counts[0] == pytest.approx(counts[1], rel=0.12)


@pytest.mark.slow
def test_drafts_are_measured_beside_none(demo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "MAX_ANSWER", 10)
    clock = itertools.count()
    found = measuring.drafting(*demo, 1, lambda: next(clock))
    # Every token took a second.
    assert found is not None and found["plain_decode_tps"] == found["decode_tps"] == 1.0
    assert found["vs_plain"] == 1.0 and found["tokens_per_pass"] > 1
    assert set(found["acceptance"]) <= {"mtp", "lookup"} and found["acceptance"]["mtp"]
    lines = _drafts(found)
    assert lines[1] == "decode 1.0 with drafts, 1.0 without: 1.00x"
    assert "tokens a pass" in lines[2] and "right" in lines[2]


def test_a_model_without_an_mtp_layer_is_measured_without_drafts(scripted: Any) -> None:
    assert measuring.drafting(scripted([5], vocab_size=16), None) is None and _drafts(None) == []


def test_our_conversation_reads_only_what_is_new(scripted: Any) -> None:
    model = scripted([5], vocab_size=16)
    turn = measuring.our_conversation(model)
    assert list(turn([1, 2, 3, 4], 3)) == [5, 5, 5]
    assert model.num_read == 4 + 2
    assert list(turn([5, 6], 1)) == [5]
    assert model.num_read == 4 + 2 + 2


def test_mlx_lm_runs_on_our_arrays_and_says_the_same(demo: Any, converted_demo: Path) -> None:
    model, _ = demo
    before = mx.get_active_memory()
    program = mlx_lm_program(converted_demo, model)
    weights = sum(array.nbytes for array in dict(tree_flatten(model.parameters())).values())
    assert mx.get_active_memory() - before < weights / 10
    ids = measuring.prompt_ids(20, model.config.vocab_size)
    ours, theirs = measuring.our_conversation(model), program()
    said = list(ours(ids, 6))
    assert said == list(theirs(ids, 6))
    # mlx-lm has read the last token already.
    assert list(ours([said[-1], *ids[:5]], 6)) == list(theirs(ids[:5], 6))


def test_a_missing_mlx_lm_is_named_with_its_line(
    demo: Any, converted_demo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlx_lm.utils", None)
    with pytest.raises(Qwen35Error, match="pip install mlx-lm"):
        mlx_lm_program(converted_demo, demo[0])


def test_a_machine_without_mlx_lm_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    version = machine.version

    def installed(package: str) -> str:
        if package == "mlx-lm":
            raise PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(machine, "version", installed)
    assert "mlx-lm" not in machine.describe().versions


@pytest.mark.parametrize(
    ("chip", "memory_gib", "gbps"),
    [
        ("Apple M3 Ultra", None, 819), ("M3 Max", 36, 300), ("M3 Max", 128.0, 400),
        ("M4 Max", 64, 546), ("M4 Max", 36, 410), ("Apple M1", 16, 68), ("M9", 64, None),
        ("AMD EPYC", 64, None),
    ],
)  # fmt: skip
def test_bandwidth_of_a_chip(chip: str, memory_gib: float | None, gbps: float | None) -> None:
    assert machine.bandwidth_gbps(chip, memory_gib) == gbps


def test_the_label_names_a_hub_model_by_its_id_and_a_folder_by_its_last_name(
    converted_demo: Path,
) -> None:
    # A folder of the hub's cache is named after a commit.
    assert measuring.label(converted_demo, "owner/name")["model"] == "owner/name"
    label = measuring.label(converted_demo, str(converted_demo))
    assert label["model"] == "demo-4bit"
    assert str(converted_demo.parent) not in json.dumps(label)


def test_a_commit_is_that_of_our_checkout_or_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    # Installed into an environment that lies in a checkout of something else.
    monkeypatch.setattr(measuring, "__file__", str(tmp_path / "a" / "b" / "bench.py"))
    assert measuring.commit() is None


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NEW_TOKENS", "WARM_TOKENS"):
        monkeypatch.setattr(measuring, name, 4)
    monkeypatch.setattr(measuring, "ROOM", 8)
    monkeypatch.setattr(measuring, "FIRST_CONTEXT", 6)
    monkeypatch.setattr(measuring, "MAX_ANSWER", 4)
    monkeypatch.setattr(measuring, "QUESTIONS", measuring.QUESTIONS[:1])


@pytest.mark.slow
@pytest.mark.usefixtures("short")
def test_the_command_prints_a_table_a_picture_and_json(
    run_cli: Any, converted_demo: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "speed.png"
    result = run_cli(
        "bench", converted_demo, "--max-context", 20, "--runs", 2, "--vs-mlx-lm", "--png", picture
    )
    assert result.exit_code == 0, result.output
    assert picture.read_bytes().startswith(b"\x89PNG")
    *table, last = result.stdout.splitlines()
    found = json.loads(last)
    assert (found["format"], found["model"], found["median_of"]) == (1, "demo-4bit", 2)
    assert found["mlx"] == mx.__version__ and 4 < found["bits_per_weight"] < 5
    assert found["bandwidth_limit_gbps"] is None or mx.metal.is_available()
    assert str(converted_demo) not in last
    assert [row["context"] for row in found["contexts"]] == [6, 20]
    for row in found["contexts"]:
        for figures in (row, row["mlx_lm"]):
            assert figures["prefill_tps"] * figures["ttft_s"] == pytest.approx(row["context"])
            warm = figures["warm_prefill_tps"] * figures["warm_ttft_s"]
            assert warm == pytest.approx(measuring.WARM_TOKENS)
            assert figures["decode_tps"] > 0 and figures["peak_memory_bytes"] > 0
        for speed, ratio in row["vs_mlx_lm"].items():
            assert ratio * row["mlx_lm"][speed] == pytest.approx(row[speed])
        decode = f"{row['decode_tps']:,.1f}"
        ratio_line = f"{row['vs_mlx_lm']['decode_tps']:.2f}x"
        assert any(decode in line for line in table)
        assert any(ratio_line in line for line in table)
    assert max(map(len, table)) <= 80


@pytest.mark.usefixtures("short")
def test_json_alone_goes_to_standard_output(run_cli: Any, converted_demo: Path) -> None:
    result = run_cli("bench", converted_demo, "--max-context", 8, "--runs", 1, "--json")
    (line,) = result.stdout.splitlines()
    found = json.loads(line)
    assert "mlx_lm" not in found["contexts"][0] and "acceptance_rate" not in line
    assert all(math.isfinite(v) for v in found["contexts"][0].values() if v is not None)


def test_a_context_beyond_the_model_is_refused_before_it_is_loaded(
    run_cli: Any, converted_demo: Path
) -> None:
    result = run_cli("bench", converted_demo, "--max-context", 10**9)
    assert result.exit_code == 1 and "does not fit the model" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", everyday([((),), (("--vs-mlx-lm",),), (("--png", "x.png"),), (("--json",),)], 1)
)
def test_options_of_the_command_reach_what_they_name(
    run_cli: Any, converted_demo: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    seen: dict[str, Any] = {}

    def bench(model: Any, programs: Any, sizes: list[int], runs: int, progress: Any) -> list[int]:
        seen.update(programs=programs, sizes=sizes, runs=runs)
        return [7]

    def draw(*given: Any) -> None:
        # What was measured is printed all the same.
        seen.update(drawn=given)
        raise OSError("no room")

    monkeypatch.setattr(measuring, "bench", bench)
    monkeypatch.setattr(measuring, "MAX_ANSWER", 2)
    monkeypatch.setattr("qwen35_mlx.evaluation.bench.mlx_lm_program", lambda *given: given)
    monkeypatch.setattr("qwen35_mlx.cli.report.draw_bench", draw)
    monkeypatch.setattr("qwen35_mlx.cli.report.print_bench", lambda *_: print("table"))
    result = run_cli("bench", converted_demo, "--max-context", 600, "--runs", 2, *options)
    *table, last = result.stdout.splitlines()
    found = json.loads(last)
    assert (found["median_of"], found["contexts"], found["kernels"]) == (2, [7], "auto")
    assert (seen["sizes"], seen["runs"]) == ([512, 600], 2)
    assert ("mlx_lm" in seen["programs"]) == ("--vs-mlx-lm" in options)
    if "--vs-mlx-lm" in options:
        assert seen["programs"]["mlx_lm"][0] == converted_demo
    assert seen.get("drawn", (None, None))[1] == (Path("x.png") if "--png" in options else None)
    assert table == ([] if "--json" in options else ["table"])


@pytest.mark.parametrize(
    ("limit", "gbps"), [(10**9, 400.0), (None, None)], ids=["a Mac", "no Metal"]
)
def test_the_bandwidth_limit_is_that_of_the_chip(
    monkeypatch: pytest.MonkeyPatch, limit: int | None, gbps: float | None
) -> None:
    fake = machine.Machine("Apple M3 Max", "macOS", 128 * 2**30, limit, 0, {})
    monkeypatch.setattr(measuring, "describe", lambda: fake)
    assert measuring.bandwidth_limit() == gbps


def test_a_commit_without_git_is_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(measuring, "__file__", str(tmp_path / "a" / "b" / "bench.py"))
    assert measuring.commit() is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert measuring.commit() is None
