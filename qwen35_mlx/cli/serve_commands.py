"""The commands serve and launch."""

import os
import re
import shutil
import tempfile
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import Qwen35Error, extra
from . import completion, options
from .chat_commands import chosen_model

if TYPE_CHECKING:
    from ..server.clients import Endpoint

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="MODEL", autocompletion=completion.models)
    ] = None,
    demo: bool = False,
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8080,
    host: str = "127.0.0.1",
    api_key: options.Key = None,
    allow_host: Annotated[list[str] | None, typer.Option(metavar="NAME")] = None,
    name: Annotated[str | None, typer.Option("--model-name")] = None,
    max_context: options.RunContext = None,
    queue: Annotated[int, typer.Option(min=1)] = 64,
    cache_dir: options.CacheDir = None,
    cache_limit: options.CacheLimit = 50.0,
    adapter_path: Annotated[list[str] | None, typer.Option(metavar="NAME=DIR")] = None,
    kernels: options.Kernels = "auto",
    kv_bits: options.KvBits = "auto",
    experts_memory: options.ExpertsMemory = None,
    force: options.Force = False,
) -> None:
    """Serve a model to agents, programs and a browser.

    Speaks OpenAI's, Anthropic's and Ollama's APIs, and shows a chat at the root. Ctrl-C ends it.

    Args:
        model: Converted folder, or hub id. Default: the model converted last on this machine, else
            the bundled demo.
        demo: Serve the bundled demo model.
        port: Port to listen on; 0 takes a free one.
        host: Address to listen on. Any but 127.0.0.1 admits other machines and needs --api-key.
        allow_host: Name by which clients may call this server, besides localhost and addresses.
            Repeat the option for several. Default: none.
        name: Name of the model for clients. Default: its folder's name.
        queue: Maximum number of waiting requests; further ones get error 429.
        adapter_path: An adapter that requests may name: the model MODEL:NAME, or the field
            adapters. Repeat the option for several. Default: none.
    """
    with extra("server", "the server is not installed"):
        from ..server.run import bind
        from ..server.run import serve as run
    if host not in LOCAL_HOSTS and not api_key:
        raise Qwen35Error(
            "other machines would use this server without a key",
            got=f"--host {host}",
            expected="--api-key KEY beside it, or --host 127.0.0.1",
        )
    if api_key and not re.fullmatch("[!-~]+", api_key):
        # Not shown: it is a secret.
        raise Qwen35Error("no client can send this key", expected="ASCII characters without spaces")
    for known in allow_host or ():
        if not re.fullmatch(r"[\w.-]+", known):
            raise Qwen35Error(
                "--allow-host takes a name",
                got=known,
                expected="such as studio.local, without http:// and a port",
            )
    adapters = named_adapters(adapter_path or [])
    from ..server.clients import Endpoint, settings_text, shown_url

    # Before the model loads, because that can take minutes.
    bound = bind(host, port)
    from .progress import spinner
    from .terminal import note

    folder, is_demo = chosen_model(model, demo, hints=False)
    name = name or ("demo" if is_demo else None)
    url = shown_url(host, bound.getsockname()[1])
    loading = spinner(f"Loading {folder}")
    made: list[Any] = []

    def make() -> Any:
        """The application with a running engine."""
        from ..checkpoint.adapter import read_adapter
        from ..engine.prefix_store import PrefixStore
        from ..engine.scheduler import Engine, Limits
        from ..engine.segments import open_folder
        from ..model.adapters import with_adapter
        from ..model.loading import load
        from ..server.app import make_app
        from ..server.service import Settings

        loaded, tokenizer = load(
            folder,
            kernels=kernels,
            context=max_context,
            force=force,
            kv_bits=kv_bits,
            experts_memory=experts_memory,
        )
        disk = open_folder(cache_dir, loaded, cache_limit * 1e9) if cache_dir else nullcontext()
        engine = Engine(
            loaded,
            tokenizer,
            store=PrefixStore(loaded, disk=held.enter_context(disk)),
            limits=Limits(max_queued=queue),
            adapters={
                adapter: with_adapter(loaded, read_adapter(path))
                for adapter, path in adapters.items()
            },
        )
        path = Path(folder)
        settings = Settings.of(
            loaded,
            tokenizer,
            path,
            model_id=name or (path.resolve().name if path.is_dir() else folder),
            aliases=[folder],
            adapters=list(adapters),
            api_key=api_key,
            hosts=allow_host or [],
        )
        engine.start()
        made.append(settings)
        return make_app(engine, settings, tokenizer)

    def is_ready() -> None:
        loading.stop()
        (settings,) = made
        print(url, flush=True)
        names = ", ".join([settings.model_id, *(f":{adapter}" for adapter in adapters)])
        note(f"serving {names}, {settings.context_length:,} tokens of context\n")
        note(settings_text(Endpoint(url, settings.model_id, settings.context_length, api_key)))

    with ExitStack() as held, loading:
        run(make, bound, is_ready)


def named_adapters(given: list[str]) -> dict[str, str]:
    """Folders of adapters by name."""
    adapters: dict[str, str] = {}
    for pair in given:
        name, equals, folder = pair.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name) or name in ("latest", *adapters):
            raise Qwen35Error(
                "--adapter-path of a server needs a name",
                got=repr(pair),
                expected="NAME=DIR, NAME of letters, digits, . _ and -, another one for each",
            )
        adapters[name] = folder
    return adapters


def launch(
    client: Annotated[str, typer.Argument(metavar="CLIENT")],
    arguments: Annotated[list[str] | None, typer.Argument(metavar="ARGS")] = None,
    url: str = "http://127.0.0.1:8080",
    api_key: options.Key = None,
) -> None:
    """Start an agent with its settings for the running server.

    The agent's own settings stay as they are: these go into its environment and a scratch folder.

    Args:
        client: qwen-code, claude, opencode or codex.
        arguments: Arguments for the client, after --. Default: none.
        url: Address of the running server.
    """
    from ..server.clients import LAUNCHES, command_of, prepared

    if client not in LAUNCHES:
        raise Qwen35Error("unknown client", got=client, expected=", ".join(LAUNCHES))
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    prepared_launch = LAUNCHES[client](running_server(url, api_key))
    path = shutil.which(prepared_launch.program)
    command = command_of(prepared_launch, arguments or [], path)
    # It stays while the client runs, which replaces this process.
    folder = Path(tempfile.mkdtemp(prefix="qwen35-mlx-"))
    os.execve(command[0], command, os.environ | prepared(prepared_launch, folder))


def running_server(url: str, api_key: str | None) -> "Endpoint":
    """The running server at an address, with its model."""
    import json
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    from ..server.clients import Endpoint

    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        with urlopen(Request(f"{url}/v1/models", headers=headers), timeout=10) as answer:
            model = json.load(answer)["data"][0]
        return Endpoint(url, model["id"], model["context_length"], api_key)
    except HTTPError as error:
        hints = {401: "give its key with --api-key", 503: "its model is loading; try again soon"}
        raise Qwen35Error(
            "the server refuses",
            got=f"{error.code} at {url}",
            expected="200",
            hint=hints.get(error.code, "another program may run there; --url names the server"),
        ) from None
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise Qwen35Error(
            "no server answers",
            got=f"{error} at {url}",
            expected="a server of qwen35-mlx",
            hint="start one with qwen35-mlx serve, or name another with --url",
        ) from None
