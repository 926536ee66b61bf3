"""Simulated swarms: the product's own code in virtual time, under churn and outages.

Every simulation runs real code up to some depth and models the rest. What is real at which level:

- ``sessions`` (tens of nodes): everything but torch: membership, records with Ed25519 signatures,
  placement, routing, chains, node services and healing over ``swarm.memory_network``; the engine is
  a toy whose outputs depend on every token that it has seen.
- ``membership`` (to 10,000 nodes, minutes): ``Announcer``, ``read_nodes``, shards, record
  validation and the code that reads views for placement, over ``swarm.memory_network``. Simulated
  peers may sign with a keyed hash instead of Ed25519 (``cheap_signatures``).
- ``placement`` (to 10,000 nodes, days): ``swarm.placement`` and ``node.rebalancing`` of every node;
  the directory is modelled (announcements are seen at once, crashed nodes linger), computing and
  sessions are not there.
- ``routing`` (to 10,000 nodes): the router's sampling and its choice among asked candidates; the
  load of nodes is a closed-loop fluid model.

Churn, hardware, cities, countries and organisations are the same everywhere (``population``,
``churn``); ``petals`` is the rule that we compare with.
"""
