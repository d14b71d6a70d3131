"""The keys that a SuperLink admits, with and without the files that record them."""

import json

import pytest

from fedsim.cli.main import main
from fedsim.deploy.flower import flwr
from fedsim.deploy.folder import init
from fedsim.deploy.local import local_federation
from fedsim.deploy.registering import registered_clients, registered_names
from fedsim.errors import UserError


def nodes(superlink):
    """Returns the nodes that the SuperLink itself lists as admitted."""
    return {int(node["node-id"]) for node in flwr("supernode", "list", superlink)["nodes"] if node["status"] != "unregistered"}


def test_a_key_is_registered_once_found_again_without_its_record_and_revoked_when_it_is_replaced(tmp_path, capsys):
    with local_federation(2, tmp_path / "federation", connect=False) as local:
        server, superlink = local.folder / "server", local.federation.name
        registered = server / "registered"
        first = registered_names(registered)
        assert set(first.values()) == {"client-0", "client-1"}
        assert nodes(superlink) == set(first)
        (registered / "client-1.json").unlink()  # as if it had been killed before it wrote the record
        assert main(["deploy", "register", str(local.folder)]) == 0
        assert capsys.readouterr().out.splitlines() == ["client-0: registered before", "client-1: registered"]
        assert registered_names(registered) == first
        assert main(["deploy", "status", str(local.folder)]) == 0
        assert [line.split()[2:4] for line in capsys.readouterr().out.splitlines()[1:3]] == [["registered", "never"]] * 2
        local.end("superlink")
        (server / "state.db").rename(tmp_path / "state.db")  # a SuperLink that has lost its state
        local.start_superlink()
        assert main(["deploy", "status", str(local.folder)]) == 0
        assert [line.split()[2:5] for line in capsys.readouterr().out.splitlines()[1:3]] == [["unknown", "unknown", "-"]] * 2
        assert main(["deploy", "register", str(local.folder)]) == 0
        assert capsys.readouterr().out.splitlines() == ["client-0: registered", "client-1: registered"]
        first = registered_names(registered)
        assert nodes(superlink) == set(first)
        init(local.folder, local.federation, new_keys=True)
        local.end("superlink")
        local.start_superlink()  # with its new certificate, and the clients that it knew
        assert main(["deploy", "register", str(server)]) == 0
        assert capsys.readouterr().out.splitlines() == [f"client-{client}: registered; its earlier key is revoked" for client in range(2)]
        second = registered_names(registered)
        assert nodes(superlink) == set(second)
        assert not set(first) & set(second)


def test_keys_are_not_recorded_as_registered_without_a_superlink(tmp_path, capsys):
    assert main(["deploy", "init", str(tmp_path / "federation")]) == 0
    assert main(["deploy", "register", str(tmp_path / "federation")]) == 2
    assert "fedsim: flwr supernode" in capsys.readouterr().err
    assert not list((tmp_path / "federation" / "server" / "registered").iterdir())


def test_registered_files_map_nodes_to_clients(tmp_path):
    assert registered_clients(tmp_path / "none") == {}
    (tmp_path / "client-3.json").write_text(json.dumps({"node-id": "3733465847505234999", "public-key": "a"}))
    (tmp_path / "somebody.json").write_text(json.dumps({"node-id": "5", "public-key": "b"}))
    assert registered_clients(tmp_path) == {3733465847505234999: 3}
    (tmp_path / "client-4.json").write_text("{}")
    with pytest.raises(UserError, match=r"client-4.json: expected node-id and public-key. Remove it and run"):
        registered_clients(tmp_path)
