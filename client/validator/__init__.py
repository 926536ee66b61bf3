"""A validating organisation's program: hidden challenges, and the signed verdicts about them.

Start with ``process``, which wires the parts; ``docket`` decides what happens next.
"""
