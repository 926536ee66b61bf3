"""What the owner of a computer allows: when it works, and how much of it is used.

``limits`` says what is allowed, ``sensors`` reads the computer, ``readings`` decides (pure),
``guard`` waits and tells the node to leave or come back, ``bandwidth`` slows streams down,
``diary`` remembers each day. ``page`` is the owner's page, a process of its own that speaks to the
node through its control socket.
"""
