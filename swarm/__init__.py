"""A peer-to-peer swarm of volunteer compute for language models.

``swarm.protocol`` is what peers say, ``swarm`` how they find and choose each other, ``swarm.node``
what a volunteer runs and ``swarm.client`` what a user runs.
"""
