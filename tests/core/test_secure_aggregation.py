"""The protocol alone: masks cancel whoever drops out; the threshold holds; a masked vector is uniform."""

import itertools

import numpy as np
import pytest
from scipy import stats

from fedsim.core.secure_aggregation import MaskedSum, Party, complete, connected, fewest_survivors, mask, neighbour_graph, pair_mask

SIZE, SHARE = 50, 0.6


def vectors(clients, seed=0):
    generator = np.random.default_rng(seed)
    return {client: generator.integers(0, 1 << 32, SIZE, dtype=np.uint32) for client in clients}


class Round:
    """The parties of a round and what the server passes between them; `gone` is {client: stage from which it is silent}."""

    def __init__(self, graph, gone=None, share=SHARE):
        here = lambda stage: [client for client in graph if (gone or {}).get(client, 9) > stage]  # noqa: E731
        self.parties = {client: Party(client) for client in here(0)}
        self.publics = {client: party.public for client, party in self.parties.items()}
        peers = {client: [peer for peer in graph[client] if peer in self.publics] for client in self.parties}
        self.thresholds = {client: fewest_survivors(len(graph[client]) + 1, share) for client in self.parties}
        self.sealed = {
            client: self.parties[client].share({peer: self.publics[peer] for peer in peers[client]}, self.thresholds[client])
            for client in here(1)
        }
        for client in here(1):
            self.parties[client].take({peer: self.sealed[peer][client] for peer in peers[client] if peer in self.sealed})
        self.values, self.sum = vectors(graph), MaskedSum(SIZE)
        self.uploads = {client: self.parties[client].masked(self.values[client]) for client in here(2)}
        for client, upload in self.uploads.items():
            self.sum.add(client, upload)
        self.shares = {owner: {} for owner in self.sealed}
        for client in here(3):
            group = [member for member in [client, *graph[client]] if member in self.sealed]
            survivors = [member for member in group if member in self.uploads]
            for owner, share_ in self.parties[client].reveal(survivors, [m for m in group if m not in survivors]).items():
                self.shares[owner][client] = share_
        self.masked_with = {owner: [peer for peer in graph[owner] if peer in self.sealed] for owner in self.sealed}

    def total(self):
        return self.sum.unmasked(self.publics, self.masked_with, self.shares, self.thresholds)


def full_graph(count):
    return neighbour_graph(list(range(count)), 0, 0, 1)


@pytest.mark.parametrize("gone", [{}, {0: 0}, {0: 1}, {0: 2}, {0: 3}, {0: 0, 3: 1, 5: 2}, {4: 1, 6: 3}, {1: 2, 2: 2, 7: 2}])
@pytest.mark.parametrize("neighbours", [0, 8])
def test_the_sum_is_that_of_the_survivors_at_whichever_stage_clients_drop_out(gone, neighbours):
    graph = neighbour_graph(list(range(10)), neighbours, 3, 1)
    found = Round(graph, gone)
    survivors = [client for client in graph if gone.get(client, 9) > 2]
    assert np.array_equal(found.total(), sum(found.values[client] for client in survivors))
    assert found.sum.survivors == survivors


def test_with_fewer_answers_than_the_threshold_nothing_is_unmasked():
    with pytest.raises(ValueError, match="at least 6 shares, got 5"):
        Round(full_graph(10), dict.fromkeys(range(5), 3)).total()


@pytest.mark.parametrize("vanished", [None, 0])
def test_a_wrong_share_is_detected_and_nothing_is_unmasked(vanished):
    """A seed has no public part to check it against; without its own check the sum would be noise that looks like a sum."""
    found = Round(full_graph(4), {} if vanished is None else {vanished: 2})
    share = found.shares[0][1]
    found.shares[0][1] = bytes([share[0], share[1] ^ 1, *share[2:]])
    with pytest.raises(ValueError, match=r"shares of the (seed|masking key) of client 0"):
        found.total()


def test_a_client_reveals_nothing_below_the_threshold_never_both_secrets_of_one_client_and_only_once():
    party = Round(full_graph(5), dict.fromkeys(range(5), 3)).parties[0]  # nothing revealed so far
    for survivors, vanished, reason in (
        ([0, 1], [2, 3, 4], "at least 3 survivors"),
        ([0, 1, 2, 3], [3, 4], "at most once"),
        ([1, 2, 3], [0, 4], "with client 0"),
        ([0, 1, 2, 9], [3], "of the group"),
    ):
        with pytest.raises(ValueError, match=reason):
            party.reveal(survivors, vanished)
    assert len(party.reveal([0, 1, 2], [3, 4])) == 5
    with pytest.raises(ValueError, match="of the group"):
        party.reveal([0, 1, 2], [3, 4])


def test_a_client_refuses_a_threshold_of_half_of_its_group():
    party, others = Party(0), {client: Party(client).public for client in (1, 2, 3)}
    with pytest.raises(ValueError, match="above half of the 4 in the group, got 2"):
        party.share(others, 2)
    assert len(party.share(others, 3)) == 3


def three_that_have_shared():
    """Returns three clients, and the sealed shares of each by neighbour."""
    parties = {client: Party(client) for client in range(3)}
    publics = {client: party.public for client, party in parties.items()}
    return parties, {client: party.share({p: publics[p] for p in parties if p != client}, 2) for client, party in parties.items()}


def test_a_share_is_opened_only_by_its_receiver_and_only_unchanged():
    found = Round(full_graph(4))
    sealed = found.sealed[0]
    assert not any(found.parties[0].held)  # forgotten after the unmasking
    fresh, sent = three_that_have_shared()
    with pytest.raises(ValueError, match="that client 1 sealed for client 2"):
        fresh[2].take({1: sent[1][0]})
    with pytest.raises(ValueError, match="that client 1 sealed for client 2"):
        fresh[2].take({1: sent[1][2][:-1] + bytes([sent[1][2][-1] ^ 1])})
    with pytest.raises(ValueError, match="of a neighbour"):
        fresh[2].take({7: sealed[1]})
    with pytest.raises(ValueError, match="shares of 2 of the group"):
        fresh[2].masked(np.zeros(3, dtype=np.uint32))


def test_a_client_masks_only_once_a_round_because_two_uploads_would_reveal_their_difference():
    found = Round(full_graph(3), dict.fromkeys(range(3), 3))
    assert found.parties[0].seed == found.parties[0].masking == b""
    with pytest.raises(ValueError, match="one upload of client 0 in a round"):
        found.parties[0].masked(np.zeros(SIZE, dtype=np.uint32))


def test_a_masked_vector_is_uniform_and_differs_between_rounds_for_the_same_values():
    zeros = np.zeros(20_000, dtype=np.uint32)
    uploads = []
    for _ in range(2):
        parties, sent = three_that_have_shared()
        parties[0].take({1: sent[1][0], 2: sent[2][0]})
        uploads.append(parties[0].masked(zeros))
    for upload in uploads:
        counts = np.bincount(upload.view(np.uint8), minlength=256)
        assert stats.chisquare(counts).pvalue > 1e-4
    assert np.mean(uploads[0] == uploads[1]) < 0.001


def test_pair_masks_cancel_and_the_key_stream_is_that_of_aes_in_counter_mode():
    one, two = Party(1), Party(2)
    forth = pair_mask(1, one.masking, 2, two.public[1], SIZE)
    assert np.array_equal(forth + pair_mask(2, two.masking, 1, one.public[1], SIZE), np.zeros(SIZE, dtype=np.uint32))
    from Crypto.Cipher import AES  # another implementation

    stream = AES.new(bytes(32), AES.MODE_CTR, nonce=b"", initial_value=bytes(16)).encrypt(bytes(4 * SIZE))
    assert mask(bytes(32), SIZE).tobytes() == stream


@pytest.mark.parametrize(("clients", "neighbours"), [(2, 0), (9, 4), (10, 3), (6, 8), (7, 6)])
def test_neighbours_are_mutual_and_as_many_as_configured(clients, neighbours):
    graph = neighbour_graph(list(range(100, 100 + clients)), neighbours, 5, 2)
    wanted = min(clients - 1, 2 * ((neighbours + 1) // 2)) if neighbours else clients - 1
    assert all(len(set(peers)) == wanted and client not in peers for client, peers in graph.items())
    assert all(client in graph[peer] for client, peers in graph.items() for peer in peers)
    assert neighbour_graph(list(graph), neighbours, 5, 2).items() == graph.items()


def test_the_graph_is_connected_so_that_no_partial_sum_can_be_unmasked():
    graph = neighbour_graph(list(range(40)), 4, 0, 1)
    reached, edge = {0}, [0]
    while edge:
        edge = [peer for client in edge for peer in graph[client] if peer not in reached and not reached.add(peer)]
    assert reached == set(graph)


def test_the_threshold_applies_to_all_clients_and_to_every_group():
    assert [fewest_survivors(n, 0.6) for n in (2, 3, 5, 10, 25)] == [2, 2, 3, 6, 15]
    graph = neighbour_graph(list(range(12)), 4, 0, 1)
    assert complete(graph, list(graph), list(graph), 1.0)
    lonely = next(c for c in graph for pair in itertools.combinations(graph[c], 3) if complete(graph, [], set(graph) - set(pair), SHARE))
    left = set(graph) - set(graph[lonely][:3])
    assert complete(graph, [], left, SHARE)
    assert not complete(graph, [lonely], left, SHARE)


def test_survivors_in_two_parts_are_refused_because_each_part_could_be_unmasked():
    ring = {client: sorted((client + step) % 10 for step in (-2, -1, 1, 2)) for client in range(10)}
    left = [2, 3, 4, 7, 8, 9]  # 0, 1, 5 and 6 have dropped out, so that no mask is left between 4 and 7 or 9 and 2
    assert all(len({owner, *ring[owner]} & {*left}) >= fewest_survivors(5, 0.6) for owner in ring), "every secret could be recovered"
    assert not complete(ring, list(ring), left, 0.6)
    assert complete(ring, list(ring), [*left, 5], 0.6)


@pytest.mark.parametrize("seed", range(20))
def test_connected_agrees_with_the_powers_of_the_adjacency_matrix(seed):
    generator = np.random.default_rng(seed)
    graph = neighbour_graph(list(range(12)), 4, seed, 1)
    present = sorted(generator.choice(12, 6, replace=False).tolist())
    adjacency = np.array([[float(other in graph[one] or other == one) for other in present] for one in present])
    assert connected(graph, present) == bool((np.linalg.matrix_power(adjacency, len(present)) > 0).all())
