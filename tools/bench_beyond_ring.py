"""One model in 2 to 4 processes of this machine, beside one process; the last line is JSON.

python tools/bench_beyond_ring.py

Random models of both kinds, quantized or not, and chats with the demo. What a process reads is
counted by the system; what it copies out of mapped pages is added. Speed is not measured: the
processes share the cores.
"""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from label import label
from mlx.utils import tree_flatten
from ring_processes import outputs_of_ring, ring

import qwen35_mlx
from qwen35_mlx.chat.sessions import read_conversation
from qwen35_mlx.config import ModelConfig
from qwen35_mlx.convert import convert
from qwen35_mlx.model.language import Model

DEMO = Path(qwen35_mlx.__file__).parent / "demo"
SIZES = (2, 4)
# Numbers of processes, and the shares of those that have whole layers.
WAYS = ((2, ""), (4, ""), (2, "2,1"), (3, "3,2,1"))
# Where the machine is busy with other things, each message waits.
CHAT_S = 3600
NUM_DEATHS, REPORT_S, AT_A_TIME = 20, 10.0, 2
SMALL = dict(
    model_type="qwen3_5_text",
    vocab_size=2560,
    hidden_size=128,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    layer_types=["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    linear_num_key_heads=4,
    linear_num_value_heads=8,
    linear_key_head_dim=16,
    linear_value_head_dim=32,
    linear_conv_kernel_dim=4,
    rms_norm_eps=1e-6,
    max_position_embeddings=4096,
    hidden_act="silu",
    tie_word_embeddings=False,
    intermediate_size=512,
    rope_parameters=dict(
        rope_type="default",
        rope_theta=10000.0,
        partial_rotary_factor=0.25,
        mrope_section=[2, 1, 1],
        mrope_interleaved=True,
    ),
)
EXPERTS = SMALL | dict(
    model_type="qwen3_5_moe_text",
    num_experts=8,
    num_experts_per_tok=3,
    moe_intermediate_size=256,
    shared_expert_intermediate_size=256,
)
# What is in the way of a split: two key heads, widths of a single group.
NARROW = EXPERTS | dict(
    linear_num_key_heads=2, moe_intermediate_size=64, shared_expert_intermediate_size=64
)
# Mostly layers, so that what the interpreter takes is little beside them.
LARGE = SMALL | dict(
    vocab_size=2560,
    hidden_size=1024,
    num_hidden_layers=8,
    layer_types=SMALL["layer_types"] * 2,
    head_dim=128,
    linear_key_head_dim=64,
    linear_value_head_dim=128,
    intermediate_size=8192,
)
# Name: config, bits of groups of 64.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "dense": (SMALL, 0),
    "dense, two key heads": (SMALL | dict(linear_num_key_heads=2), 0),
    "experts": (EXPERTS, 0),
    "dense in groups of 64": (SMALL, 4),
    "experts in groups of 64": (EXPERTS, 4),
    "whole experts": (NARROW, 4),
    # With four processes attention is whole on each.
    "half a group a head": (SMALL | dict(num_attention_heads=4), 4),
}

# The model in argv[2]: the logits of a prompt, of three tokens one by one, and of three at a time.
LOGITS = """
import sys, mlx.core as mx, numpy as np, qwen35_mlx
from qwen35_mlx.model.cache import accept
def main():
    model, _ = qwen35_mlx.load(sys.argv[2])
    ids = [(7 * i + 3) % 2000 for i in range(40)]
    cache = model.make_cache()
    outputs = [model(mx.array([ids]), cache)]
    outputs += [model(mx.array([[i]]), cache) for i in ids[:3]]
    outputs.append(model.head(model.trunk(mx.array([ids[5:8]]), cache, keep_states=True)))
    accept(cache, 2)
    outputs.append(model(mx.array([[9]]), cache))
    np.save(sys.argv[3], np.array(mx.concatenate(outputs, axis=1)))
"""
QUESTIONS = (
    "What is the capital of France?",
    "And of Spain?",
    "What is 47 + 85?",
    "What is the opposite of hot?",
    "My name is Ada.",
    "What is my name?",
    "What is the capital of Japan?",
    "What is 12 + 30?",
    "What is the opposite of big?",
    "Say it again.",
)
CHAT = f"""
import sys, json, qwen35_mlx
def main():
    model, tokenizer = qwen35_mlx.load(sys.argv[2])
    chat = qwen35_mlx.Chat(model, tokenizer, sampling=dict(temperature=0), max_tokens=48)
    for question in {QUESTIONS!r}:
        for _ in chat.send(question):
            pass
    for _ in chat.send(chat.undo()):
        pass
    print(json.dumps([(m["role"], m["content"]) for m in chat.messages]))
"""
# What loading reads and holds beyond what the process had before, and its share of the weights.
LOADING = """
import sys, json, re, qwen35_mlx
from mlx.utils import tree_flatten
from qwen35_mlx.model import loading, shard
load, copy, copied = loading.load_model, shard.copy_mapped, []
def number(file, name):
    return int(re.search(name + r":\\s+(\\d+)", open("/proc/self/" + file).read())[1])
def counted(*arguments, **options):
    open("/proc/self/clear_refs", "w").write("5")
    before = number("io", "rchar"), number("status", "VmRSS")
    model, config = load(*arguments, **options)
    share = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    read = number("io", "rchar") - before[0] + sum(copied)
    held = 1024 * (number("status", "VmHWM") - before[1])
    print(json.dumps(dict(share=share, read=read, held=held)), flush=True)
    return model, config
def counting(target, mapped):
    copied.append(target.size)
    copy(target, mapped)
loading.load_model, shard.copy_mapped = counted, counting
def main():
    qwen35_mlx.load(sys.argv[2])
"""
# Collectives of one decoded token.
COLLECTIVES = """
import sys, mlx.core as mx, qwen35_mlx
calls = []
for name in ("all_sum", "all_gather"):
    def counting(*arguments, original=getattr(mx.distributed, name), **options):
        calls.append(original.__name__)
        return original(*arguments, **options)
    setattr(mx.distributed, name, counting)
def main():
    model, _ = qwen35_mlx.load(sys.argv[2])
    cache = model.make_cache()
    mx.eval(model(mx.array([[1, 2, 3]]), cache))
    before = len(calls)
    mx.eval(model(mx.array([[4]]), cache))
    print(len(calls) - before, len(model.layers))
"""
# A saved chat, then answers without end.
ENDLESS = """
import sys, qwen35_mlx
def main():
    model, tokenizer = qwen35_mlx.load(sys.argv[2])
    chat = qwen35_mlx.Chat(model, tokenizer, sampling=dict(temperature=0), max_tokens=8)
    for _ in chat.send("What is the capital of France?"):
        pass
    chat.save(sys.argv[3])
    print("ready", flush=True)
    while True:
        qwen35_mlx.generate(model, tokenizer, [1, 2, 3], max_tokens=400)
"""


def write_model(folder: Path, config: dict[str, Any], bits: int = 0) -> Path:
    """A random model in float32 with the demo's tokenizer, in the format that `load` reads."""
    mx.random.seed(0)
    model = Model(ModelConfig.from_hf(config))
    if bits:
        nn.quantize(model, 64, bits, class_predicate=model.quant_predicate)
    folder.mkdir(parents=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    block = {"quantization": {"bits": bits, "group_size": 64}} if bits else {}
    (folder / "config.json").write_text(json.dumps(config | block))
    for file in DEMO.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder


def alone(code: str, *arguments: str) -> str:
    """What one process prints that has the whole model."""
    command = [sys.executable, "-c", "import sys\nexec(sys.argv[1])\nmain()", code, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def logit_differences(home: Path) -> dict[tuple[int, str], float]:
    """The largest of any logit, by number of processes and shares."""
    worst = dict.fromkeys(WAYS, 0.0)
    for place, (name, (config, bits)) in enumerate(MODELS.items()):
        folder = write_model(home / f"model{place}", config, bits)
        alone(LOGITS, str(folder), str(home / "alone.npy"))
        wanted = np.load(home / "alone.npy")
        for size, split in WAYS:
            arguments = str(folder), str(home / "ring.npy")
            outputs_of_ring(size, LOGITS, home, *arguments, split=split)
            difference = float(np.abs(np.load(home / "ring.npy") - wanted).max())
            way = f"{size} processes{split and f', layers {split}'}"
            print(f"{name:28} {way}: logits within {difference:.1e}", flush=True)
            worst[size, split] = max(worst[size, split], difference)
    return worst


def same_chats(home: Path) -> bool:
    """Whether ten turns, the last of them twice, are the same in every number of processes."""
    folder = convert(DEMO, home / "demo", bits=4)
    wanted = alone(CHAT, str(folder))
    same = []
    for size, split in WAYS:
        arguments: Any = dict(timeout_s=CHAT_S, split=split)
        same.append(outputs_of_ring(size, CHAT, home, str(folder), **arguments)[0] == wanted)
    print(f"{len(json.loads(wanted))} messages of a chat, the same: {same}", flush=True)
    return all(same)


def loads(home: Path) -> tuple[float, float]:
    """Bytes read and bytes held beside a process's share, the largest of any."""
    folder = write_model(home / "large", LARGE)
    read = held = 0.0
    for size, split in WAYS:
        outputs = outputs_of_ring(size, LOADING, home, str(folder), split=split)
        for rank, output in enumerate(outputs):
            found = json.loads(output)
            ratios = found["read"] / found["share"], found["held"] / found["share"]
            way = f"{size}{split and f', layers {split}'}"
            print(
                f"process {rank} of {way}: share {found['share'] / 1e6:.0f} MB, read"
                f" {ratios[0]:.3f} of it, held {ratios[1]:.3f} of it",
                flush=True,
            )
            read, held = max(read, ratios[0]), max(held, ratios[1])
    return read, held


def collectives(home: Path) -> tuple[float, int]:
    """Of a decoded token: those of a layer, and the others."""
    folder, number, layers = home / "model0", 0, 1
    for size in SIZES:
        counted = outputs_of_ring(size, COLLECTIVES, home, str(folder))[0]
        number, layers = (int(word) for word in counted.split())
        print(f"{size} processes: {number} collectives a token in {layers} layers", flush=True)
    return number // layers, number % layers


def death(home: Path, place: int) -> bool:
    """Whether all others end in time and say which process is lost, and the session is whole."""
    own = home / f"death{place}"
    own.mkdir()
    size, session = SIZES[place % 5 == 4], own / "session.json"
    victim = place % 3 % size
    sign = (signal.SIGKILL, signal.SIGSTOP)[place % 2]
    with ring(size, ENDLESS, own, (str(home / "demo"), str(session))) as processes:
        stream = processes[0].stdout
        assert stream is not None and stream.readline() == "ready\n"
        time.sleep(0.1 * (place % 7))
        processes[victim].send_signal(sign)
        end = time.monotonic() + REPORT_S
        told = []
        for rank, process in enumerate(processes):
            if rank != victim:
                with suppress(subprocess.TimeoutExpired):
                    _, errors = process.communicate(timeout=max(0.1, end - time.monotonic()))
                    told.append(process.returncode == 1 and f"process {victim} of" in errors)
                    if not told[-1]:
                        print(f"{rank} of {size}, {victim} lost: {process.returncode} {errors}")
    whole = len(read_conversation(session)["messages"]) == 2
    return len(told) == size - 1 and all(told) and whole


def deaths(home: Path) -> int:
    """How many of the killed and suspended processes were reported."""
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        reported = list(pool.map(death, itertools.repeat(home), range(NUM_DEATHS)))
    print(
        f"{sum(reported)} of {NUM_DEATHS} lost processes reported in {REPORT_S:.0f} s", flush=True
    )
    return sum(reported)


def measure() -> dict[str, Any]:
    """All of it."""
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        differences, same = logit_differences(home), same_chats(home)
        read, held = loads(home)
        each, others = collectives(home)
        return {
            "ring_logit_difference": {n: x for (n, split), x in differences.items() if not split},
            "layers_logit_difference": {s: x for (_, s), x in differences.items() if s},
            "ring_chat_is_the_same": same,
            "rank_read_over_share": round(read, 4),
            "rank_peak_over_share": round(held, 4),
            "collectives_per_layer": each,
            "collectives_besides": others,
            "dead_peers_reported": deaths(home),
        }


def failures(result: dict[str, Any]) -> list[str]:
    """A line for each figure that is not as it has to be."""
    bars = {
        "ring_logit_difference": max(result["ring_logit_difference"].values()) <= 1e-4,
        "layers_logit_difference": max(result["layers_logit_difference"].values()) <= 1e-4,
        "ring_chat_is_the_same": result["ring_chat_is_the_same"],
        "rank_read_over_share": result["rank_read_over_share"] <= 1.1,
        "rank_peak_over_share": result["rank_peak_over_share"] <= 1.15,
        "collectives_per_layer": result["collectives_per_layer"] <= 2,
        "collectives_besides": result["collectives_besides"] <= 1,
        "dead_peers_reported": result["dead_peers_reported"] == NUM_DEATHS,
    }
    return [f"{name} fails: {result[name]}" for name, is_met in bars.items() if not is_met]


if __name__ == "__main__":
    measured = measure()
    print(*failures(measured), sep="\n")
    print(json.dumps(label() | measured))
    sys.exit(bool(failures(measured)))
