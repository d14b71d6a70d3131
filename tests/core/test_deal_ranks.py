from hypothesis import given
from hypothesis import strategies as st

from fedsim.core.ranks import deal_ranks

SHARES = st.dictionaries(st.integers(1, 64), st.floats(0.01, 10.0), min_size=1, max_size=5)


@given(st.integers(1, 60), SHARES, st.integers(0, 100))
def test_every_client_gets_a_rank_and_shares_are_met_to_within_one_client(clients, shares, seed):
    dealt = deal_ranks(clients, shares, seed)
    assert len(dealt) == clients
    assert set(dealt) <= set(shares)
    for rank, share in shares.items():
        assert abs(dealt.count(rank) - clients * share / sum(shares.values())) < 1 + 1e-9


def test_the_remaining_clients_go_to_the_largest_remainders():
    assert sorted(deal_ranks(10, {4: 0.55, 8: 0.31, 16: 0.14}, 0)) == [4] * 6 + [8] * 3 + [16]  # 5.5, 3.1, 1.4


def test_shares_need_not_sum_to_one_and_their_order_does_not_matter():
    assert deal_ranks(7, {2: 3, 4: 4}, 1) == deal_ranks(7, {4: 0.4, 2: 0.3}, 1)


def test_the_assignment_of_ranks_is_drawn_from_the_seed():
    shares = {2: 1.0, 4: 1.0}
    dealt = [tuple(deal_ranks(12, shares, seed)) for seed in range(20)]
    assert dealt == [tuple(deal_ranks(12, shares, seed)) for seed in range(20)]
    assert len(set(dealt)) > 15
    assert {each[0] for each in dealt} == {2, 4}
