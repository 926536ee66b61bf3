"""Federated rounds over HTTP: an aggregator that participants choose, and those who take part.

``rounds`` decides what happens when, ``service`` is the aggregator's door, ``member`` takes part;
how the sum stays secret is ``finetune.secure_sum``. Not for free-for-alls: all are invited by name.
"""
