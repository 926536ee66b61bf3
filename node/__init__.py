"""What a volunteer runs: ``swarm-node``. ``app`` wires it, ``service`` answers peers."""
