"""Differential privacy: what was spent, how much noise a budget needs, and the record of it."""
