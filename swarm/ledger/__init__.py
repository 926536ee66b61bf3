"""Accounts of work that nodes, clients, operators and outsiders share.

Vouchers and transcripts, log and proofs, rules of money, audits. Pure but for tiles and commits,
which write files. The operator's process is `swarm/operator`.
"""
