"""The ports ``Transport`` and ``Directory`` over hivemind: libp2p streams and its Kademlia DHT.

The only package that imports hivemind. One p2pd daemon (a child process) carries the bytes; the DHT
node runs in our own event loop on the same daemon. hivemind trusts its peers more than we do, so
its DHT protocol is replaced by ``directory.SwarmDirectory``, where everything that hivemind leaves
open is bounded or checked.

``network`` is where to start: it puts ``daemon``, ``streams`` and ``directory`` together.
"""

from __future__ import annotations

import importlib.util
import sys

if "hivemind" not in sys.modules and (_spec := importlib.util.find_spec("hivemind")) is not None:
    # hivemind's __init__ imports its training half with scipy: 49 MB and 0.4 s that a node has
    # better uses for. An empty parent package lets its parts be imported alone.
    sys.modules["hivemind"] = importlib.util.module_from_spec(_spec)

from swarm.hivemind_network.daemon import NetworkSettings
from swarm.hivemind_network.network import HivemindNetwork

__all__ = ["HivemindNetwork", "NetworkSettings"]
