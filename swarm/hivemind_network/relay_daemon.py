"""A daemon that relays for others, and is asked whether it really does.

p2pd sets up two relays in one process: the one that we ask for, and another one that ends every
circuit after two minutes or 128 KiB. The one that is set up last answers, for as long as it runs.
With several cores that is decided by chance, and on some machines nearly always wrongly (35 of 40
starts on two idle cores); no option changes it. With one core (``GOMAXPROCS=1``) it is nearly
always the right one: 60 of 60 starts on an idle machine, 79 of 80 on a busy one. One core relays as
much as two did here, 230 MB/s. A daemon cannot ask itself, so a second one with a key of its own
asks it for a place.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from pathlib import Path

from hivemind.p2p import P2P

from swarm.hivemind_network.daemon import NetworkSettings, start_daemon, stop_daemon
from swarm.hivemind_network.relays import reserve
from swarm.hivemind_network.requests import connect, own_addresses
from swarm.protocol.errors import NetworkError
from swarm.protocol.identity import Identity, PeerId

logger = logging.getLogger(__name__)

ATTEMPTS = 6
ASK_TIMEOUT_S = 5.0
ASKING = NetworkSettings(listen_addresses=("/ip4/127.0.0.1/tcp/0",), serve_directory=False)


async def start_relay_daemon(identity_path: Path, settings: NetworkSettings) -> P2P:
    """Start until it relays as it was told to; after some attempts, take it as it is.

    A seed that relays a little is better than none. Raises NetworkError when it does not start.
    """
    with tempfile.TemporaryDirectory(prefix="swarm-relay-") as folder:
        key = Path(folder) / "identity.key"
        Identity.generate().save(key)
        asking = await start_daemon(key, ASKING)
        try:
            for _ in range(ATTEMPTS):
                daemon = await start_daemon(identity_path, settings)
                if await relays(daemon, asking):
                    return daemon
                logger.info("the network daemon relays a little only; starting it again")
                await stop_daemon(daemon)
        finally:
            await stop_daemon(asking)
    logger.warning("our daemon relays a little only: nodes behind routers need other relays")
    return await start_daemon(identity_path, settings)


async def relays(daemon: P2P, asking: P2P) -> bool:
    """Whether it gives places that are of use; true when that cannot be found out from here."""
    peer = PeerId(daemon.peer_id.to_base58())
    try:
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await connect(asking, peer, await own_addresses(daemon))
        except (NetworkError, TimeoutError) as error:
            logger.debug("our own relay cannot be asked: %s", error)
            return True
        try:
            async with asyncio.timeout(ASK_TIMEOUT_S):
                await reserve(asking, peer)
        except TimeoutError:
            logger.debug("our own relay takes its time")
        except NetworkError as error:
            logger.debug("our own relay: %s", error)
            return False
    except BaseException:
        await stop_daemon(daemon)
        raise
    return True
