"""Training adapters through the swarm: the client's side.

``chain`` is one training session over all hops; ``remote`` makes it a function of torch's autograd;
``trainer`` runs whole trainings on it, with snapshots, and goes on when nodes or the client itself
were gone. Importing this package imports nothing heavy.
"""
