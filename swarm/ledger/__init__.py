"""Accounts of work that operators, nodes, clients and outsiders share: log, proofs, rules of money.

Pure but for `tiles`, which writes files. The operator's process is `swarm/operator`.
"""
