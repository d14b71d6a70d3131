"""Checkpoint files: unchanged bases are not rewritten, and with two copies of them damage to one file harms no other kept round."""

from pathlib import Path

import pytest
import torch

from fedsim.checkpoints import NO_BASES, Bases, Checkpoint, DamagedError, Store, load, saved


def checkpoint(round_: int, basis: float = 1.0) -> Checkpoint:
    tensors = {"R": torch.full((4, 4), float(round_)), "A": torch.full((4, 300), basis), "B": torch.full((200, 4), basis).bfloat16()}
    return Checkpoint(round_, tensors, {"round": round_}, Bases(frozenset("AB"), f"digest of {basis}"))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_loads_as(path: Path, expected: Checkpoint) -> None:
    found = load(path)
    assert (found.round, found.state, found.bases) == (expected.round, expected.state, expected.bases)
    assert found.tensors.keys() == expected.tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in expected.tensors.items())
    assert all(found.tensors[name].dtype == tensor.dtype for name, tensor in expected.tensors.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three rounds of a run, of which two are kept."""
    store = Store(tmp_path / "checkpoints", 2)
    for round_ in (1, 2, 3):
        store.writing(checkpoint(round_))()
    return tmp_path / "checkpoints"


def test_bases_are_stored_in_two_copies_apart_from_the_rounds(folder: Path) -> None:
    one, two, *rounds = names(folder)
    assert rounds == ["round_0002.safetensors", "round_0003.safetensors"]
    assert (folder / one).read_bytes() == (folder / two).read_bytes()
    assert (folder / one).stat().st_size > 4 * 4 * 300
    assert (folder / rounds[0]).stat().st_size < 1000
    for path, round_ in zip(saved(folder), (2, 3), strict=True):
        assert_loads_as(path, checkpoint(round_))


def test_unchanged_bases_are_not_written_again(folder: Path) -> None:
    store = Store(folder, 2)
    store.writing(checkpoint(4))()
    before = {name: (folder / name).stat().st_ino for name in names(folder) if name.startswith("bases")}
    store.writing(checkpoint(5))()
    assert {name: (folder / name).stat().st_ino for name in names(folder) if name.startswith("bases")} == before


@pytest.mark.parametrize("copy", [0, 1])
@pytest.mark.parametrize("harm", ["flipped", "cut", "gone"])
def test_one_damaged_copy_of_the_bases_harms_no_checkpoint_and_is_repaired_by_the_next_write(copy: int, harm: str, folder: Path) -> None:
    copies = sorted(folder.glob("bases_*"))
    path, other = copies[copy], copies[1 - copy]
    content = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-50] if harm == "cut" else content[:-50] + bytes([content[-50] ^ 1]) + content[-49:])
    for found, round_ in zip(saved(folder), (2, 3), strict=True):
        assert_loads_as(found, checkpoint(round_))
    Store(folder, 2).writing(checkpoint(4))()
    other.unlink()
    assert_loads_as(saved(folder)[-1], checkpoint(4))


def test_a_checkpoint_whose_bases_are_damaged_in_both_copies_is_refused(folder: Path) -> None:
    for path in folder.glob("bases_*"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DamagedError, match=r"bases_.*_1.*bases_.*_2"):
        load(saved(folder)[-1])


def test_bases_files_with_the_content_of_other_bases_are_refused(folder: Path, tmp_path: Path) -> None:
    Store(tmp_path / "other", 1).writing(checkpoint(1, basis=2.0))()
    others = sorted((tmp_path / "other").glob("bases_*"))
    for path, other in zip(sorted(folder.glob("bases_*")), others, strict=True):
        path.write_bytes(other.read_bytes())
    with pytest.raises(DamagedError, match="holds others"):
        load(saved(folder)[-1])


def test_old_bases_are_removed_only_when_no_kept_round_needs_them(folder: Path) -> None:
    store = Store(folder, 2)
    store.writing(checkpoint(4, basis=7.0))()
    assert len(list(folder.glob("bases_*"))) == 4
    for path, expected in zip(saved(folder), (checkpoint(3), checkpoint(4, basis=7.0)), strict=True):
        assert_loads_as(path, expected)
    store.writing(checkpoint(5, basis=7.0))()
    assert len(list(folder.glob("bases_*"))) == 2
    assert_loads_as(saved(folder)[0], checkpoint(4, basis=7.0))


def test_a_damaged_round_does_not_stop_the_next_one_from_being_written(folder: Path) -> None:
    saved(folder)[-1].write_bytes(b"nothing")
    Store(folder, 2).writing(checkpoint(4, basis=7.0))()
    assert_loads_as(saved(folder)[-1], checkpoint(4, basis=7.0))


def test_a_checkpoint_without_bases_is_one_file(tmp_path: Path) -> None:
    Store(tmp_path, 1).writing(Checkpoint(1, {"R": torch.ones(3)}, {}))()
    assert names(tmp_path) == ["round_0001.safetensors"]
    assert load(tmp_path / "round_0001.safetensors").bases == NO_BASES


def test_the_checksum_of_a_round_covers_the_digest_of_its_bases(folder: Path) -> None:
    path = saved(folder)[-1]
    path.write_bytes(path.read_bytes().replace(b"digest of 1.0", b"digest of 2.0"))
    with pytest.raises(DamagedError, match="does not match its checksum"):
        load(path)


def test_an_unreadable_disk_does_not_count_as_damage(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    with pytest.raises(PermissionError):
        load(saved(folder)[-1])


def test_bases_with_one_unreadable_copy_are_read_from_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes

    def unreadable(path: Path) -> bytes:
        if path.name.endswith("_1.safetensors"):
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", unreadable)
    assert_loads_as(saved(folder)[-1], checkpoint(3))
    for path in folder.glob("bases_*_2.*"):
        path.write_bytes(b"nothing")
    with pytest.raises(OSError, match="Input/output"):
        load(saved(folder)[-1])
