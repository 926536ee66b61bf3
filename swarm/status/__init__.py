"""The public status page of a swarm: what it serves, by whom, how well, and how that has changed.

``crawler`` reads the directory, ``observatory`` remembers in SQLite and makes one ``Snapshot`` each
period, ``web`` shows it. What reaches a model from the outside (a client's canary session) comes in
through ``probing.Prober``: this package knows no client.

All names are from strangers: ``plain_text`` takes out what they must not do to readers, and the
templates escape them. No page shows a network address or a prompt.
"""
