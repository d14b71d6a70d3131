"""The command line, Hydra composition and sweeps. No other package imports Hydra."""
