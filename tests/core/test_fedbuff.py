from collections import Counter

import numpy as np
import pytest

from fedsim.core.fedbuff import Queue, advance, staleness_weight


def speeds(clients, seed=0):
    """Returns the seconds that each client takes."""
    return np.random.default_rng(seed).lognormal(0, 1, clients).tolist()


def flushes(count, clients=12, concurrency=6, buffer=3, seconds=None, vanishes=lambda client: False, queue=None, first=0):
    """Returns `count` flushes from version `first` on, each with the queue after it."""
    seconds, queue = seconds or speeds(clients), queue or Queue()
    found = []
    for version in range(first, first + count):
        flush = advance(queue, version, range(clients), concurrency, buffer, seconds.__getitem__, vanishes, seed=1)
        found.append((flush, queue.to_json()))
    return found


def test_the_staleness_weight_is_one_over_the_square_root_of_one_plus_the_age():
    assert [staleness_weight(age) for age in (0, 3, 8)] == pytest.approx([1.0, 0.5, 1 / 3])


def test_updates_arrive_as_in_a_simulation_second_by_second():
    """The reference checks all clients every half second instead of keeping a queue of events."""
    clients, concurrency, buffer, seconds = 10, 4, 3, [round(0.5 + 3 * each) / 2 + 0.5 for each in speeds(10)]  # whole half seconds
    started = []
    expected, version, time, inside, working, sent = [], 0, 0.0, [], {}, Counter()
    found = flushes(8, clients, concurrency, buffer, seconds)
    for flush, _ in found:
        started += [job.client for job in flush.begun]
    order = iter(started)  # who takes a free place is drawn; the test checks when
    while version < 8:
        for client, (end, since) in list(working.items()):  # in the order in which they began
            if end <= time and len(inside) < buffer:
                inside.append((client, version - since))
                del working[client]
        if len(inside) == buffer:
            expected.append(inside)
            version, inside = version + 1, []
            sent.clear()
            continue
        while len(working) < concurrency:
            client = next(order, None)
            if client is None:
                break
            assert client not in working
            assert not sent[client]
            sent[client] += 1
            working[client] = (time + seconds[client], version)
        if all(end > time for end, _ in working.values()):
            time += 0.5
    ages = [[(job.client, version - job.version) for job in flush.arrived] for version, (flush, _) in enumerate(found)]
    assert [sorted(each) for each in ages] == [sorted(each) for each in expected]
    assert max(age for each in ages for _, age in each) > 0


def test_buffer_and_concurrency_of_all_clients_give_synchronous_rounds():
    for version, (flush, queue) in enumerate(flushes(4, clients=5, concurrency=5, buffer=5)):
        assert {job.client for job in flush.begun} == {job.client for job in flush.arrived} == {*range(5)}
        assert {job.version for job in flush.arrived} == {version}
        assert queue["working"] == []
        assert queue["time"] == pytest.approx((version + 1) * max(speeds(5)))


def test_no_client_works_twice_at_once_or_twice_from_one_version():
    for version, (flush, queue) in enumerate(flushes(30)):
        begun = [job.client for job in flush.begun]
        assert len(begun) == len(set(begun))
        assert len(flush.arrived) == 3
        busy = [job[2] for job in queue["working"]]
        assert len(busy) == len(set(busy)) <= 6
        assert all(job[3] <= version for job in queue["working"])


def test_a_client_that_drops_out_frees_its_place_and_does_not_fill_the_buffer():
    found = flushes(10, vanishes=lambda client: client < 4)
    assert all(job.client >= 4 for flush, _ in found for job in flush.arrived)
    assert any(flush.lost for flush, _ in found)
    assert all(len(flush.arrived) == 3 for flush, _ in found)
    (only, _), *_ = flushes(1, clients=4, vanishes=lambda client: True)
    assert not only.arrived
    assert len(only.lost) == 4


def test_a_queue_from_json_continues_as_the_original_would():
    whole = flushes(9)
    queue = Queue.from_json(whole[4][1])
    assert flushes(4, queue=queue, first=5) == whole[5:]
