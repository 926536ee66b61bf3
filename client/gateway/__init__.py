"""An OpenAI-compatible HTTP server in front of a swarm, and a chat page: ``swarm gateway``.

``commands`` is the command, ``process`` the life of the process, ``web`` the routes. A request's
way: ``bodies`` checks it, ``limits`` and ``turns`` let it in, ``answers`` has it answered by the
swarm, ``replies`` words it as OpenAI does. Nothing here is needed by the SDK or by nodes.
"""
