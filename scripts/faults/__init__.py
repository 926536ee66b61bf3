"""Faults on real nodes, and what sessions make of them; the command is ``scripts.chaos``."""
