"""Secure aggregation: the server learns only the sum of the clients' vectors (Bonawitz et al. 2017; SecAgg+, Bell et al. 2020).

Each pair of neighbours agrees on a mask that one adds and the other subtracts, and each client adds a mask of its own. Its neighbours
hold shares of the secrets behind both, sealed from the server: they reveal the own mask of a client whose vector arrived, or the pair masks
of one that vanished, never both. A sum is unmasked only if `threshold` of each group (a client and its neighbours) answer.

The adversary is an honest-but-curious server that colludes with fewer clients than the threshold; clients have no signing keys, so nothing
stops a server that invents clients. Keys are X25519, seals ChaCha20-Poly1305, masks AES-256 in counter mode. (Flower's SecAgg+ of 1.41
folds a mask's seed to 32 bits for a generator that is not cryptographic, and so is not used.)
"""

import hashlib
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from fedsim.core.participation import ceil_fraction
from fedsim.core.quantization import Integers
from fedsim.core.secret_sharing import SHARE_BYTES, combine, split
from fedsim.seeding import numpy_generator

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
CHECK_BYTES = 8
"""Checksum at the end of a seed: a wrong share gives another seed, which would silently unmask a sum into noise."""
SEALED_BYTES = NONCE_BYTES + 2 * SHARE_BYTES + TAG_BYTES
Public = tuple[bytes, bytes]
"""A client's public keys of a round: for sealing, and for pair masks."""
Graph = dict[int, list[int]]
"""The clients of a round with their neighbours."""


def fewest_survivors(clients: int, threshold: float) -> int:
    """Returns how many of `clients` must stay to the end, at least two."""
    return max(2, ceil_fraction(threshold, clients))


def complete(graph: Graph, owners: Collection[int], present: Collection[int], threshold: float) -> bool:
    """Whether the present clients are enough of all, enough of each owner's group to recover the owner's secrets, and connected.

    If they fall into parts without a mask between them, the shares that unmask the sum also unmask the sum of each part.
    """
    here = set(present)
    groups = ({owner, *graph[owner]} for owner in owners)
    enough = len(here) >= fewest_survivors(len(graph), threshold)
    return enough and all(len(group & here) >= fewest_survivors(len(group), threshold) for group in groups) and connected(graph, here)


def connected(graph: Graph, present: Collection[int]) -> bool:
    """Whether all present clients are connected through neighbours that are present."""
    left = set(present)
    reached = [left.pop()] if left else []
    while reached:
        found = left.intersection(graph[reached.pop()])
        left -= found
        reached += found
    return not left


def neighbour_graph(clients: Sequence[int], neighbours: int, seed: int, server_round: int) -> Graph:
    """Returns each client's neighbours, in ascending order: all others, or `neighbours` of them on a ring in seeded order.

    0 means all; an odd number is rounded up to an even one, because neighbours are mutual.
    """
    count = len(clients)
    reach = -(-neighbours // 2)
    if neighbours == 0 or 2 * reach >= count - 1:
        return {client: [other for other in clients if other != client] for client in clients}
    ring = [clients[i] for i in numpy_generator(seed, "neighbours", server_round).permutation(count)]
    steps = [step for step in range(-reach, reach + 1) if step]
    places = {client: place for place, client in enumerate(ring)}
    return {client: sorted(ring[(places[client] + step) % count] for step in steps) for client in clients}


@dataclass
class Party:
    """One client's secrets of one round. `threshold` is that of its group; `held` has its shares of its group's secrets, own included."""

    client: int
    sealing: bytes = field(default_factory=lambda: X25519PrivateKey.generate().private_bytes_raw())
    masking: bytes = field(default_factory=lambda: X25519PrivateKey.generate().private_bytes_raw())
    seed: bytes = field(default_factory=lambda: _with_checksum(secrets.token_bytes(KEY_BYTES - CHECK_BYTES)))
    threshold: int = 0
    peers: dict[int, Public] = field(default_factory=dict)
    held: dict[int, bytes] = field(default_factory=dict)  # a share of the seed, then one of the masking key

    @property
    def public(self) -> Public:
        """The client's public keys."""
        return _public(self.sealing), _public(self.masking)

    def share(self, peers: Mapping[int, Public], threshold: int) -> dict[int, bytes]:
        """Returns each neighbour's sealed shares of both secrets; keeps this client's own.

        Raises ValueError for a threshold of half of the group or less: each half could then be asked for one of the secrets.
        """
        if 2 * threshold <= len(peers) + 1:
            raise ValueError(f"Expected a threshold above half of the {len(peers) + 1} in the group, got {threshold}.")
        self.peers, self.threshold = dict(peers), threshold
        group = [self.client, *peers]
        points = [client + 1 for client in group]
        seeds, keys = split(self.seed, threshold, points), split(self.masking, threshold, points)
        shares = {client: seeds[client + 1] + keys[client + 1] for client in group}
        self.held = {self.client: shares.pop(self.client)}
        return {peer: self._seal(peer, plain) for peer, plain in shares.items()}

    def take(self, sealed: Mapping[int, bytes]) -> None:
        """Opens and keeps the shares sealed for this client. Raises ValueError if not from a neighbour, changed, or for another client."""
        for peer, data in sealed.items():
            if peer not in self.peers:
                raise ValueError(f"Expected shares of a neighbour of client {self.client}, got some of client {peer}.")
            try:
                plain = self._cipher(peer).decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], _address(peer, self.client))
            except Exception as error:  # InvalidTag, or ValueError for a wrong length
                raise ValueError(f"Expected shares that client {peer} sealed for client {self.client}, got others.") from error
            self.held[peer] = plain

    def masked(self, values: Integers) -> Integers:
        """Returns values + own mask + pair masks with all neighbours whose shares were taken, and forgets the masks.

        Two vectors under the same masks would reveal their difference. Raises ValueError the second time, and below the threshold.
        """
        if not self.seed:
            raise ValueError(f"Expected one upload of client {self.client} in a round, got a request for another.")
        if len(self.held) < self.threshold:
            raise ValueError(f"Expected shares of {self.threshold} of the group of client {self.client}, got {len(self.held)}.")
        total = values + mask(self.seed, len(values))
        for peer in self.held:
            if peer != self.client:
                total += pair_mask(self.client, self.masking, peer, self.peers[peer][1], len(values))
        self.seed, self.masking = b"", b""
        return total

    def reveal(self, survivors: Collection[int], vanished: Collection[int]) -> dict[int, bytes]:
        """Returns a share of each survivor's seed and of each vanished client's masking key, and forgets all: a round is unmasked once.

        Raises ValueError for a client on both lists, one without a held share, fewer survivors than the threshold, or without this client.
        """
        if set(survivors) & set(vanished) or not {*survivors, *vanished} <= set(self.held):
            raise ValueError(f"Expected each of the group of client {self.client} at most once, got {survivors} and {vanished}.")
        if len(set(survivors)) < self.threshold or self.client not in survivors:
            raise ValueError(f"Expected at least {self.threshold} survivors with client {self.client}, got {sorted(survivors)}.")
        shares = {client: self.held[client][:SHARE_BYTES] for client in survivors}
        shares |= {client: self.held[client][SHARE_BYTES:] for client in vanished}
        self.held = {}
        return shares

    def _seal(self, peer: int, plain: bytes) -> bytes:
        nonce = secrets.token_bytes(NONCE_BYTES)
        return nonce + self._cipher(peer).encrypt(nonce, plain, _address(self.client, peer))

    def _cipher(self, peer: int) -> ChaCha20Poly1305:
        return ChaCha20Poly1305(_shared_key(self.sealing, self.peers[peer][0], b"fedsim seal"))


class MaskedSum:
    """The server's sum of masked vectors, and its unmasking; it holds one vector, the sum."""

    def __init__(self, size: int) -> None:
        self._total: Integers = np.zeros(size, dtype=np.uint32)
        self.survivors: list[int] = []

    def add(self, client: int, masked: Integers) -> None:
        """Adds one client's masked vector."""
        self._total += masked
        self.survivors.append(client)

    def unmasked(
        self,
        publics: Mapping[int, Public],
        masked_with: Mapping[int, Iterable[int]],  # by client that shared secrets: its neighbours that did too
        shares: Mapping[int, Mapping[int, bytes]],  # by owner and holder
        thresholds: Mapping[int, int],
    ) -> Integers:
        """Returns the sum of the survivors' vectors. Raises ValueError if the shares of a needed secret are too few or wrong."""
        survivors, total = set(self.survivors), self._total.copy()
        for owner, neighbours in masked_with.items():
            secret = combine({holder + 1: share for holder, share in shares[owner].items()}, thresholds[owner])
            if owner in survivors:
                if _with_checksum(secret[:-CHECK_BYTES]) != secret:
                    raise ValueError(f"Expected shares of the seed of client {owner}, got others.")
                total -= mask(secret, len(total))
                continue
            if _public(secret) != publics[owner][1]:
                raise ValueError(f"Expected shares of the masking key of client {owner}, got others.")
            for peer in survivors.intersection(neighbours):  # cancels the survivor's mask towards the vanished client
                total += pair_mask(owner, secret, peer, publics[peer][1], len(total))
        return total


def mask(key: bytes, size: int) -> Integers:
    """Returns uniform residues: the key stream of AES-256 in counter mode. A key must be used only once."""
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor().update(bytes(4 * size))
    return np.frombuffer(stream, dtype="<u4").astype(np.uint32)


def pair_mask(client: int, private: bytes, peer: int, public: bytes, size: int) -> Integers:
    """Returns the mask that `client` adds towards `peer`; the peer adds its negative."""
    both = mask(_shared_key(private, public, b"fedsim mask"), size)
    return both if client < peer else np.zeros_like(both) - both


def _with_checksum(random: bytes) -> bytes:
    return random + hashlib.sha256(random).digest()[:CHECK_BYTES]


def _shared_key(private: bytes, public: bytes, purpose: bytes) -> bytes:
    secret = X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    return HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=purpose).derive(secret)


def _public(private: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def _address(sender: int, receiver: int) -> bytes:
    return f"{sender} {receiver}".encode()
