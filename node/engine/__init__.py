"""The only torch of a node. ``api`` is what the rest of the node sees of it."""
