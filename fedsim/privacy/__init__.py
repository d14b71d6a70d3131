"""Differential privacy: the spent budget, the noise that a budget needs, and the ledger of both."""
