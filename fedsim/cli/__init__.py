"""The entry: the command line, Hydra's composition and sweeps. Nothing below it knows Hydra."""
