"""The operator of a swarm: mints budgets, reserves allowances, settles vouchers, keeps the log.

Off the data path: nodes serve without it, and settle when it is back. `books` has all rules in one
transaction each; `api` is the door; `app` wires. Nodes never import this, they speak HTTP to it.
"""
