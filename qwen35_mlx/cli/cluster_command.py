"""The command cluster: chat, generate or serve with one model on several Macs."""

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import Qwen35Error
from ..files import MAX_CORPUS_BYTES, RING_VARIABLE, SPLIT_VARIABLE, read_stdin, read_text

RUNS = ("chat", "generate", "serve")
LOCAL, SSH_TIMEOUT_S = "127.0.0.1", 10
# By its entry point, because the script may be outside of PATH.
LAUNCH = (
    "from importlib.metadata import entry_points as e;"
    "next(iter(e(group='console_scripts', name='mlx.launch'))).load()()"
)
RUN = "from qwen35_mlx.cli.main import main; main()"
SHOW_FACTS = "from qwen35_mlx.cli.cluster_command import show_facts; show_facts()"
PORTS = range(32_323, 60_000, 64)
Host = dict[str, Any]


def cluster(
    arguments: Annotated[list[str], typer.Argument(metavar="COMMAND")],
    hosts: Annotated[str | None, typer.Option(metavar="NAMES")] = None,
    hostfile: Annotated[Path | None, typer.Option(metavar="FILE")] = None,
    split: Annotated[str | None, typer.Option(metavar="GBS")] = None,
    port: Annotated[int | None, typer.Option(min=1, max=65_000)] = None,
) -> None:
    """Run one model on several Macs, each of which holds a part.

    Every Mac needs remote login for this one's ssh key, and this Python, its packages and MODEL at
    the same path. Sessions and settings are those of this Mac.

    Args:
        arguments: After --: chat, generate or serve with a MODEL.
        hosts: Names or addresses of the Macs, this one first, with commas; connected by TCP.
        hostfile: File of `mlx.distributed_config`, in place of --hosts; for Thunderbolt 5 run it
            with --backend jaccl.
        split: Give each Mac whole layers by these shares, such as 192GB,96GB. Default: split every
            layer; by memory where equal parts do not fit.
        port: First port that the Macs use. Default: a free one.
    """
    model, reads_input = model_of(arguments)
    found, backend = read_hosts(hosts, hostfile)
    if split:
        from ..checkpoint.pipeline import read_split

        read_split(split, len(found))
    check(found, backend, model)
    hosts_content = json.dumps({"backend": backend, "envs": [], "hosts": found})
    first = port or _free_port(len(found))
    raise typer.Exit(launched(hosts_content, first, arguments, reads_input, split))


def launched(
    hosts: str, port: int, arguments: Sequence[str], reads_input: bool, split: str | None
) -> int:
    """Run a command under `mlx.launch`; returns the exit code of rank 0."""
    with tempfile.TemporaryDirectory(prefix="qwen35-mlx-") as scratch:
        folder = Path(scratch)
        file, status = folder / "hosts.json", folder / "status"
        file.write_text(hosts)
        if sys.stdin and sys.stdin.isatty() and sys.stdout and sys.stdout.isatty():
            # The terminal's own name, because macOS cannot poll /dev/tty.
            (folder / "terminal").write_text(os.ttyname(sys.stdin.fileno()))
        elif reads_input:
            # A prompt or a picture; rank 0 has the exact limits of both.
            (folder / "input").write_bytes(read_stdin(MAX_CORPUS_BYTES))
        options = ["--hostfile", str(file), "--starting-port", str(port)]
        options += ["--env", f"{RING_VARIABLE}={scratch}"]
        options += ["--env", f"{SPLIT_VARIABLE}={split}", "--"] if split else ["--"]
        command = [sys.executable, "-c", LAUNCH, *options, sys.executable, "-c", RUN, *arguments]
        # Ctrl-C and typed text are for rank 0: the pipe stays open and empty.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            with subprocess.Popen(command, stdin=subprocess.PIPE) as launch:
                launch.wait()
        finally:
            signal.signal(signal.SIGINT, before)
        # No status file: rank 0 did not end normally.
        return int(status.read_text()) if status.exists() else 1


def take_part(run: Callable[[], object]) -> None:
    """Run the program on rank 0; on other ranks, follow rank 0 until it ends."""
    folder = Path(os.environ[RING_VARIABLE])
    from .command import user_errors

    try:
        with user_errors():
            from ..model.loading import load_part
            from ..model.ring import follow, group, leader

            if group().rank():
                follow(load=load_part)
                return
            latency_us, size = leader().latency_us(), group().size()
    except typer.Exit as end:
        sys.exit(end.exit_code)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    terminal, given = folder / "terminal", folder / "input"
    if terminal.exists():
        # Use the terminal directly, because mlx.launch passes only lines.
        opened = os.open(terminal.read_text(), os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(opened, stream)
    else:
        os.dup2(os.open(given if given.exists() else os.devnull, os.O_RDONLY), 0)
    from .terminal import note

    note(f"{size} Macs, {latency_us:,.0f} us latency between them")
    status: Any = 1
    try:
        run()
        status = 0
    except SystemExit as end:
        status = end.code
        raise
    finally:
        with suppress(OSError):
            (folder / "status").write_text(str(status or 0))


def facts_of(model: str) -> dict[str, Any]:
    """Facts that must be equal on all hosts, and the state of RDMA over Thunderbolt."""
    from importlib.metadata import version

    from .. import __version__

    rdma = None
    if program := shutil.which("rdma_ctl"):
        rdma = subprocess.run([program, "status"], capture_output=True, text=True).stdout.strip()
    return {
        "qwen35-mlx": __version__,
        "MLX": version("mlx"),
        "model": _digest(Path(model)) if os.path.isdir(model) else None,
        "rdma": rdma,
    }


def show_facts() -> None:
    """Print the facts of this host; the model is the argument."""
    print(json.dumps(facts_of(sys.argv[1])))


def _digest(folder: Path) -> str:
    """SHA-256 of config.json, the tokenizer, and the headers and sizes of the weights."""
    from ..checkpoint.headers import raw_header, weight_files

    digest = hashlib.sha256()
    for name in ("config.json", "tokenizer.json"):
        if (folder / name).is_file():
            digest.update((folder / name).read_bytes())
    for name in weight_files(folder):
        size = (folder / name).stat().st_size
        digest.update(f"{name} {size}\n".encode() + raw_header(folder / name))
    return digest.hexdigest()


def model_of(arguments: Sequence[str]) -> tuple[str, bool]:
    """The model that a command names, and whether the command reads standard input."""
    from .main import app

    if not arguments or arguments[0] not in RUNS:
        raise Qwen35Error(
            "not a command for several Macs",
            got=" ".join(arguments) or "none",
            expected=f"-- {', '.join(RUNS)} with a MODEL",
        )
    commands: Any = typer.main.get_command(app)
    given = commands.commands[arguments[0]].make_context(arguments[0], list(arguments[1:])).params
    model = given.get("model")
    if not model or not os.path.isdir(model):
        raise Qwen35Error(
            "several Macs need a converted model in a folder",
            got=model or "no MODEL",
            expected="a folder, the same on every Mac",
        )
    return os.path.abspath(model), arguments[0] != "serve" and not given.get("prompt")


def read_hosts(names: str | None, file: Path | None) -> tuple[list[Host], str]:
    """Hosts in the form of `mlx.launch`, this one first, and the backend that joins them."""
    if (names is None) == (file is None):
        raise Qwen35Error("which Macs?", got=names and file, expected="--hosts or --hostfile")
    backend = "ring"
    if file is not None:
        try:
            content = json.loads(read_text(file))
            found = content["hosts"] if isinstance(content, dict) else content
            backend = content.get("backend") or backend if isinstance(content, dict) else backend
            hosts = [{"ssh": h["ssh"], "ips": h["ips"], "rdma": h.get("rdma", [])} for h in found]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Qwen35Error(
                f"{file} is no hostfile", got=repr(error), expected="what mlx.launch reads"
            ) from None
    else:
        each = [name.strip() for name in (names or "").split(",")]
        hosts = [{"ssh": name, "ips": [_address(name)], "rdma": []} for name in each]
    for host in hosts:
        if not str(host["ssh"]) or str(host["ssh"]).startswith("-"):
            raise Qwen35Error("not the name of a Mac", got=repr(host["ssh"]))
    if len(hosts) < 2 or not hosts[0]["ips"] or not _is_here(hosts[0]["ips"][0]):
        raise Qwen35Error(
            "the Macs are not as expected",
            got=", ".join(host["ssh"] for host in hosts),
            expected="two or more, the first of them this one",
            hint=f"this one is {socket.gethostname()}",
        )
    if hosts[0]["ips"][0].startswith("127.") and not hosts[1]["ips"][0].startswith("127."):
        # A host may resolve its own name to a loopback address.
        hosts[0]["ips"] = [_address_towards(hosts[1]["ips"][0])]
    # mlx.launch starts this address without ssh.
    hosts[0]["ssh"] = LOCAL
    return hosts, str(backend)


def _address(name: str) -> str:
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise Qwen35Error(
            f"no address of {name}",
            got=error,
            expected="a name or an address in this network, such as studio.local",
        ) from None


def _address_towards(address: str) -> str:
    """This machine's address on the route to another one; sends nothing."""
    with socket.socket(type=socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return str(probe.getsockname()[0])


def _is_here(address: str) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def check(hosts: Sequence[Host], backend: str, model: str) -> None:
    """Raise Qwen35Error with everything that is missing or different on a host."""
    own = facts_of(model)
    with ThreadPoolExecutor(len(hosts)) as pool:
        answers = list(pool.map(lambda host: _ask(host["ssh"], model), hosts[1:]))
    problems = []
    for host, answer in zip((host["ssh"] for host in hosts), [own, *answers], strict=True):
        if isinstance(answer, str):
            problems.append(f"{host}: {answer}")
            continue
        for name in ("qwen35-mlx", "MLX"):
            if answer[name] != own[name]:
                problems.append(f"{host}: {name} {answer[name]}, here {own[name]}")
        if answer["model"] != own["model"]:
            what = "another model" if answer["model"] else "no model"
            problems.append(f"{host}: {what} at {model}; copy this one there")
        if backend.startswith("jaccl") and "enabled" not in (answer["rdma"] or ""):
            problems.append(
                f"{host}: RDMA is {answer['rdma'] or 'missing, which needs macOS 26.2'}; start in "
                "recovery and run rdma_ctl enable"
            )
    if problems:
        raise Qwen35Error(
            "the Macs cannot run this together",
            got="".join(f"\n    {problem}" for problem in problems),
            expected="the same programs, the same model and a link on every one",
        )


def _ask(host: str, model: str) -> dict[str, Any] | str:
    """The facts of a host, or the reason why they are unknown."""
    if host == LOCAL:
        return facts_of(model)
    remote = shlex.join([sys.executable, "-c", SHOW_FACTS, model])
    options = ["-o", "BatchMode=yes", "-o", f"ConnectTimeout={SSH_TIMEOUT_S}"]
    try:
        asked = subprocess.run(
            ["ssh", *options, "--", host, remote],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=4 * SSH_TIMEOUT_S,
        )
        if not asked.returncode:
            return dict(json.loads(asked.stdout.splitlines()[-1]))
    except FileNotFoundError:
        return "ssh is not installed here"
    except (subprocess.TimeoutExpired, ValueError, IndexError):
        return "no usable answer over ssh"
    said = (asked.stderr.strip().splitlines() or [f"exit {asked.returncode}"])[-1]
    if asked.returncode == 255:
        return f"ssh fails: {said}; allow remote login, then ssh-copy-id {host}"
    if asked.returncode in (126, 127):
        return f"no {sys.executable}; install qwen35-mlx at the same path"
    return f"qwen35-mlx does not start: {said}"


def _free_port(number: int) -> int:
    """The first of `number` consecutive free ports."""
    for first in PORTS:
        try:
            for port in range(first, first + number):
                with socket.socket() as probe:
                    probe.bind(("", port))
            return first
        except OSError:
            continue
    raise Qwen35Error("no free ports", expected=f"{number} in a row", hint="--port")
