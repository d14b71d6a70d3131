"""DP-SGD against the same training without it: `python experiments/benchmarks/private.py [--clients 25] [--repeats 3]`.

One process, in turns, so that a noisy machine disturbs both alike; tokens per second of local training, medians, and their ratio. Poisson
batches differ in size, so tokens are counted as they pass.
"""

import argparse
import statistics
import time

from fedsim.cli.compose import compose
from fedsim.session import Session, effective


def speed(session: Session, clients: int, round_: int) -> float:
    """Returns tokens per second of one round of local training."""
    tokens = 0

    def count(facts: object) -> None:
        nonlocal tokens
        tokens += facts.num_tokens  # type: ignore[attr-defined]

    session.on_pass = count
    begun = time.perf_counter()
    session.train(range(clients), round_, {}, noise=[1.0] * clients)
    return tokens / (time.perf_counter() - begun)


def main() -> None:
    """Prints both speeds and their ratio for each method named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=25)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--methods", default="fed_sb,ffa_lora")
    options = parser.parse_args()
    for method in options.methods.split(","):
        common = [f"method={method}", f"federation.clients={options.clients}", f"training.local_steps={options.steps}"]
        common += ["adapter.init=orthogonal"] if method == "fed_sb" else []
        sessions = [
            Session(effective(compose([*common, *private]))) for private in ([], ["privacy=example", "privacy.noise_multiplier=1.0"])
        ]
        for session in sessions:
            session.install_state(session.initial_state(session.derived_factors(1) or {}))
            speed(session, options.clients, 1)  # warm-up: tokens are made, memory is there
        pairs = [[speed(session, options.clients, 2 + i) for session in sessions] for i in range(options.repeats)]
        plain, private = (statistics.median(column) for column in zip(*pairs, strict=True))
        print(f"{method:<12} {plain:,.0f} tokens/s plain, {private:,.0f} private: DP-SGD costs {plain / private:.2f} x the time per token")


if __name__ == "__main__":
    main()
