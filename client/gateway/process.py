"""The life of a gateway's process: join, load, listen, and stop without cutting answers off."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from swarm.catalogue.adapter import AdapterFiles, check_fits
from swarm.catalogue.checkpoint import Checkpoint, resolve_checkpoint
from swarm.client.app import SwarmClient
from swarm.client.config import ClientSettings
from swarm.client.gateway.admission import Admission
from swarm.client.gateway.keys import KeyFile
from swarm.client.gateway.metrics import GatewayMetrics
from swarm.client.gateway.settings import GatewaySettings
from swarm.client.gateway.shelf import ServedModel, Shelf, SwarmView
from swarm.client.gateway.turns import Turns
from swarm.client.gateway.web import Gateway
from swarm.client.generate import LocalModel
from swarm.client.metrics import ClientMetrics
from swarm.protocol.errors import AdapterError, ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listening:
    """A gateway that answers."""

    url: str
    models: tuple[str, ...]
    needs_keys: bool


async def run_gateway(
    settings: GatewaySettings,
    client_settings: ClientSettings,
    ready: Callable[[Listening], None],
) -> None:
    """Serve until SIGINT or SIGTERM; a second one ends running answers at once.

    Raises SwarmErrors that say what to do.
    """
    if not settings.models:
        raise ConfigError("no model to serve; name one or more by --model")
    keys = KeyFile(settings.keys_file)
    if not settings.is_loopback and not settings.without_keys and not keys.all():
        raise ConfigError(
            f"{settings.host} is open to others and there are no API keys; make one by "
            "swarm gateway keys add NAME, or say --without-keys to serve everybody"
        )
    client_metrics = ClientMetrics()
    stop = asyncio.Event()
    with _stop_on_signals(stop):
        async with AsyncExitStack() as stack:
            client = await SwarmClient.connect(client_settings, observer=client_metrics)
            stack.push_async_callback(client.close)
            models = []
            unused = set(settings.adapters)
            for name in settings.models:
                path = str(await client.find_ends(name))
                local, adapters = await asyncio.to_thread(
                    _load, path, client_settings.dtype, settings.adapters
                )
                stack.callback(local.close)
                unused -= adapters.keys()
                called = local.blocks_of(client).model_name
                by_name = {text.partition("=")[0]: files for text, files in adapters.items()}
                models.append(ServedModel(called, local, client, by_name))
                stack.callback(models[-1].close)
            if unused:
                raise ConfigError(f"adapter {min(unused)} is for none of the models")
            if len({model.name for model in models}) < len(models):
                raise ConfigError("two of the models have the same name; rename a folder")
            await serve(settings, client, models, client_metrics, keys, ready, stop)


def _load(
    name: str, dtype: str, adapters: tuple[str, ...]
) -> tuple[LocalModel, dict[str, AdapterFiles]]:
    """A model, and those of the adapters that are for it. Raises CheckpointError, AdapterError."""
    checkpoint = Checkpoint.open(resolve_checkpoint(name))
    fitting: dict[str, AdapterFiles] = {}
    for text in adapters:
        files = AdapterFiles.open(Path(text.partition("=")[2]).expanduser())
        with contextlib.suppress(AdapterError):
            check_fits(files.index, checkpoint)
            fitting[text] = files
    return LocalModel.load(name, dtype=dtype), fitting


async def serve(
    settings: GatewaySettings,
    client: SwarmView,
    models: list[ServedModel],
    client_metrics: ClientMetrics,
    keys: KeyFile,
    ready: Callable[[Listening], None],
    stop: asyncio.Event,
) -> None:
    """Listen until ``stop``, then let answers finish."""
    turns = Turns(settings.maximum_answers, settings.maximum_waiting)
    metrics = GatewayMetrics(client_metrics, turns)
    shelf = Shelf(models)
    admission = Admission(settings, keys, turns, metrics)
    gateway = Gateway(settings, client, shelf, admission, metrics)
    runner = web.AppRunner(
        gateway.application(),
        # A client that leaves ends what was made for it, at once.
        handler_cancellation=True,
        keepalive_timeout=settings.body_timeout_s,
        access_log=None,
        logger=_quiet_logger(),
        # Compressed bodies are refused, not unpacked: a small one may hold a huge one.
        auto_decompress=False,
        shutdown_timeout=1.0,
    )
    await runner.setup()
    try:
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(shelf.watch())
            listener = _listen(settings)
            await web.SockSite(runner, listener, backlog=1024).start()
            host, port = _address(listener)
            names = tuple(model.name for model in models)
            ready(Listening(f"http://{host}:{port}", names, admission.needs_keys))
            await stop.wait()
            await gateway.finish(settings.grace_s)
            watching.cancel()
    finally:
        await runner.cleanup()


def _quiet_logger() -> logging.Logger:
    """For aiohttp, whose tracebacks of malformed requests repeat their headers, and so keys."""
    logger = logging.getLogger("swarm.client.gateway.http")

    def without_traceback(record: logging.LogRecord) -> bool:
        record.exc_info = record.exc_text = None
        return True

    logger.addFilter(without_traceback)
    return logger


def _listen(settings: GatewaySettings) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {settings.host} port {settings.port} ({error.strerror}); "
            "choose another by --port"
        ) from None
    return listener


def _address(listener: socket.socket) -> tuple[str, int]:
    address = listener.getsockname()
    host = f"[{address[0]}]" if ":" in address[0] else str(address[0])
    return host, int(address[1])


@contextmanager
def _stop_on_signals(stop: asyncio.Event) -> Iterator[None]:
    """The first SIGINT or SIGTERM sets ``stop``, the second one cancels the current task."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()

    def received() -> None:
        if stop.is_set() and task is not None:
            task.cancel()
        stop.set()

    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, received)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
