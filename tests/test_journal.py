"""The audit log: every later change to it is found."""

import json

import pytest

from fedsim.journal import Head, Journal, verified

KINDS = ("started", "joined", "asked", "charged", "accepted", "missing", "released", "absent", "left", "refused", "resumed", "finished")
"""Every kind of event, in some order."""


@pytest.fixture
def journal(tmp_path):
    """A journal with one line of each kind, and the head after it."""
    path = tmp_path / "journal.jsonl"
    log = Journal(path)
    for number, kind in enumerate(KINDS):
        log.append(kind, round=number, clients=[number], **({"goes_on_from": number} if kind == "resumed" else {}))
    log.close()
    return path, log.head


def check(path, end=None, **checkpoints):
    return verified(path, checkpoints, end)


def rewrite(path, change):
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(change(lines)))


def test_an_untouched_journal_verifies(journal):
    path, head = journal
    verdict = check(path, head)
    assert verdict.problems == []
    assert (verdict.head, verdict.superseded, verdict.finished) == (head, 0, True)


@pytest.mark.parametrize("kind", KINDS)
def test_a_changed_event_of_any_kind_is_found_at_its_line(journal, kind):
    path, head = journal
    number = KINDS.index(kind) + 1
    rewrite(path, lambda lines: [line.replace(f'"clients": [{number - 1}]'.encode(), b'"clients": [99]') for line in lines])
    problems = check(path, head).problems
    assert problems
    assert any(f"line {number}:" in problem or "summary.json" in problem for problem in problems)


@pytest.mark.parametrize("kind", KINDS)
def test_a_removed_event_of_any_kind_is_found(journal, kind):
    path, head = journal
    rewrite(path, lambda lines: [line for line in lines if f'"kind": "{kind}"'.encode() not in line])
    assert check(path, head).problems


@pytest.mark.parametrize("place", range(len(KINDS) - 1))
def test_two_swapped_events_are_found(journal, place):
    path, head = journal
    rewrite(path, lambda lines: [*lines[:place], lines[place + 1], lines[place], *lines[place + 2 :]])
    assert check(path, head).problems


@pytest.mark.parametrize("place", range(len(KINDS) + 1))
def test_an_inserted_event_is_found(journal, place):
    path, head = journal
    rewrite(path, lambda lines: [*lines[:place], lines[0], *lines[place:]])
    assert check(path, head).problems


@pytest.mark.parametrize("kept", range(len(KINDS)))
def test_a_missing_end_is_found_by_the_summary_and_by_a_later_checkpoint(journal, kept):
    path, head = journal
    rewrite(path, lambda lines: lines[:kept])
    assert check(path, head).problems
    (problem,) = check(path, round_7=head).problems
    assert f"round_7 fixes {head.lines} lines, but the journal has {kept}" in problem


def test_a_rewritten_chain_is_found_by_its_fixed_head(journal, tmp_path):
    path, head = journal
    forged = Journal(tmp_path / "forged.jsonl")
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        forged.append(entry["kind"], clients=[0])
    forged.close()
    assert check(tmp_path / "forged.jsonl").problems == []
    assert "summary.json" in check(tmp_path / "forged.jsonl", head).problems[0]
    assert "another line 12" in check(tmp_path / "forged.jsonl", round_3=head).problems[0]


@pytest.mark.parametrize("bits", range(8))
def test_a_single_flipped_bit_is_found(journal, bits):
    path, head = journal
    content = bytearray(path.read_bytes())
    content[len(content) * (bits + 1) // 9] ^= 1 << bits
    path.write_bytes(content)
    assert check(path, head).problems


def test_a_line_superseded_by_two_resumptions_counts_once(journal):
    path, _ = journal
    log = Journal(path)
    for goes_on_from in (4, 4):
        log.append("resumed", goes_on_from=goes_on_from)
    log.close()
    verdict = check(path, log.head)
    assert (verdict.problems, verdict.head.lines) == ([], 14)
    assert verdict.superseded == 9, "lines 5 to 12, and the first of the two"


def test_a_line_torn_by_a_kill_is_allowed_only_at_the_end_or_before_a_resumption(journal):
    path, _ = journal
    with open(path, "ab") as file:
        file.write(b'{"line": 13, "prev')
    assert check(path).problems == [], "the run was killed and has not gone on yet"
    log = Journal(path)
    log.append("resumed", goes_on_from=10)
    log.close()
    verdict = check(path, log.head)
    assert verdict.problems == []
    assert verdict.superseded == 3
    rewrite(path, lambda lines: [*lines[:-1], lines[-1].replace(b"resumed", b"asked")])
    assert check(path).problems == ["line 13 cannot be read, and no run was resumed after it"]


@pytest.mark.parametrize("line", ["ten", None, 3.5, True, -1, 14, [1]])
def test_a_resumption_from_an_unknown_line_is_reported_with_its_line(journal, line):
    path, _ = journal
    log = Journal(path)
    log.append("asked")
    log.append("resumed", goes_on_from=line)
    log.close()
    (problem,) = check(path, log.head).problems
    assert problem.startswith("line 14 continues from")


def test_a_journal_continues_where_it_ended(journal):
    path, head = journal
    log = Journal(path)
    assert log.head == head
    log.append("asked", round=13)
    log.close()
    assert check(path, log.head).problems == []
    assert Head.from_json(log.head.to_json()) == log.head
