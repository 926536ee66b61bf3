"""What people gain who try to get more out of an operator than they put in.

    python -m scripts.bench.economy [--json]

The table of docs/economy.md. The books are the real ones (swarm/simulation/economy.py).
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

from swarm.simulation.economy import all_outcomes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    outcomes = all_outcomes()
    if options.json:
        print(json.dumps([asdict(outcome) for outcome in outcomes]))
    else:
        print("| strategy | put in | got out | of it spendable | allowed | |")
        print("|---|---|---|---|---|---|")
        for each in outcomes:
            print(
                f"| {each.strategy} | {each.put_in:,.1f} | {each.got_out:,.1f} |"
                f" {each.spendable:,.1f} | {each.limit:,.1f} | {each.note} |"
            )
    if not all(outcome.holds for outcome in outcomes):
        sys.exit("somebody gains more than the design allows")


if __name__ == "__main__":
    main()
