"""The folder of a federation: complete or absent, keys kept, secrets readable by their owners only."""

import re
import shutil
import stat
import subprocess
import tomllib
from itertools import count
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from clients.owner import load_owner
from fedsim.cli.calling import QUIET
from fedsim.cli.main import main
from fedsim.deploy.folder import Federation, init, load
from fedsim.errors import UserError
from fedsim.files import atomic_write

FEDERATION = Federation("trial", 2, ("server.example",))


@pytest.fixture
def folder(tmp_path):
    init(tmp_path / "federation", FEDERATION)
    return tmp_path / "federation"


def secrets(folder):
    """Returns the contents of all secret files, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.name == "key" or path.suffix == ".key"}


def test_the_folder_has_all_files_that_the_machines_need(folder):
    assert load(folder) == FEDERATION
    programs = [folder / "server" / "superlink.sh", *folder.glob("clients/*/supernode.sh")]
    assert len(programs) == 3
    for program in programs:
        assert program.stat().st_mode & stat.S_IXUSR
        subprocess.run(["bash", "-n", str(program)], check=True)
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    assert set(services) == {"superlink", "client-0", "client-1"}
    link = tomllib.loads((folder / "server" / "flwr" / "config.toml").read_text())["superlink"]
    assert link["trial"] == {"address": "127.0.0.1:9092", "root-certificates": str(folder / "server" / "ca.crt")}
    assert load_owner(folder / "clients" / "client-1" / "client.yaml").client == 1


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_verifies_the_units_once_their_programs_are_in_place(folder):
    units = sorted(folder.rglob("*.service"))
    assert len(units) == 3
    for unit in units:
        relocated = re.sub(
            r"(?m)^ExecStart=/opt/fedsim/(trial|client-\d)", f"ExecStart={unit.parent}", unit.read_text().replace("/server/", "/")
        )
        unit.write_text(relocated)
        done = subprocess.run(["systemd-analyze", "verify", str(unit)], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), unit


def test_a_copied_server_folder_names_its_own_certificate_and_is_accepted_by_status(folder, tmp_path, capsys):
    server = Path(shutil.copytree(folder / "server", tmp_path / "elsewhere" / "server"))
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "flower-superlink").write_text("#!/bin/sh\n")
    (programs / "flower-superlink").chmod(0o700)
    for _ in range(2):
        subprocess.run([server / "superlink.sh"], env={"PATH": f"{programs}:/usr/bin:/bin"}, check=True)
        link = tomllib.loads((server / "flwr" / "config.toml").read_text())["superlink"]
        assert link["trial"] == {"address": "127.0.0.1:9092", "root-certificates": str(server / "ca.crt")}
    assert load(server) == FEDERATION
    assert main(["deploy", "status", str(server)]) == 2
    assert "expected the server's folder" not in (error := capsys.readouterr().err)
    assert "flwr" in error, "nothing but the SuperLink, which does not run here, is missing"


def test_secrets_have_mode_0600_and_are_only_where_they_belong(folder):
    found = secrets(folder)
    assert set(found) == {"ca/ca.key", "server/server.key", "clients/client-0/key", "clients/client-1/key"}
    assert all(stat.S_IMODE((folder / name).stat().st_mode) == 0o600 for name in found)
    others = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file() and str(path.relative_to(folder)) not in found)
    assert b"PRIVATE KEY" not in others


def test_keys_and_owners_files_are_kept_and_reported_as_kept(folder):
    before = secrets(folder)
    owners = folder / "clients" / "client-0" / "client.yaml"
    owners.write_text("client: 0\nmax_local_steps: 7\n")
    lines = init(folder, Federation("trial", 3, ("server.example",)))
    assert [line.partition(":")[0] for line in lines] == ["kept"] * 4 + ["new"]
    assert {name: secrets(folder)[name] for name in before} == before
    assert load_owner(owners).max_local_steps == 7
    assert (folder / "clients" / "client-2" / "key").exists()


def test_other_host_names_get_a_new_server_certificate_from_the_same_authority(folder):
    before = secrets(folder)
    lines = init(folder, Federation("trial", 2, ("other.example",)))
    changed = {name for name, content in secrets(folder).items() if content != before[name]}
    assert changed == {"server/server.key"}
    assert [line.partition(":")[0] for line in lines] == ["kept", "replaced", "kept", "kept"]


def test_new_keys_replace_all_secrets(folder):
    before = secrets(folder)
    lines = init(folder, FEDERATION, new_keys=True)
    assert all(line.startswith("replaced") for line in lines)
    assert all(content != before[name] for name, content in secrets(folder).items())


@pytest.mark.parametrize("after", range(7))
def test_an_interrupted_key_replacement_is_completed_by_the_next_call(folder, after, monkeypatch):
    """The interruption comes after `after` files, each written whole."""
    written = count()
    with monkeypatch.context() as patch:

        def write(*arguments, **options):
            if next(written) == after:
                raise KeyboardInterrupt
            atomic_write(*arguments, **options)

        patch.setattr("fedsim.deploy.folder.atomic_write", write)
        with pytest.raises(KeyboardInterrupt):
            init(folder, load(folder), new_keys=True)
    init(folder, load(folder))
    ca, server = (folder / "ca/ca.crt").read_bytes(), (folder / "server/server.crt").read_bytes()
    x509.load_pem_x509_certificate(server).verify_directly_issued_by(x509.load_pem_x509_certificate(ca))
    pairs = {"ca/ca.key": ca, "server/server.key": server}
    for name, certificate in pairs.items():
        key = serialization.load_pem_private_key((folder / name).read_bytes(), None)
        assert x509.load_pem_x509_certificate(certificate).public_key() == key.public_key(), name
    for home in (folder / "clients").iterdir():
        assert (home / "ca.crt").read_bytes() == ca
        public = serialization.load_ssh_public_key((folder / f"server/keys/{home.name}.pub").read_bytes())
        assert serialization.load_ssh_private_key((home / "key").read_bytes(), None).public_key() == public
    assert all(line.startswith("kept") for line in init(folder, load(folder)))


def test_options_that_are_not_given_again_keep_their_values(folder, capsys):
    assert main(["deploy", "init", str(folder), "--clients", "3"]) == 0
    assert load(folder) == Federation("trial", 3, ("server.example",))
    assert "replaced" not in capsys.readouterr().out
    assert main(["deploy", "init", str(folder), "--new-keys", "--port", "9999"]) == 0
    assert load(folder) == Federation("trial", 3, ("server.example",), 9999)
    assert "server.example:9999" in (folder / "clients/client-2/supernode.sh").read_text()
    assert {line.split(":")[0] for line in capsys.readouterr().out.splitlines()[:-1]} == {"replaced"}


def test_programs_of_a_federation_set_the_variables_against_telemetry_and_progress_bars(folder):
    for script in (folder / "server/superlink.sh", folder / "clients/client-0/supernode.sh"):
        assert all(f"{name}={value}" in script.read_text() for name, value in QUIET.items())


def test_a_folder_with_other_files_is_refused_and_left_unchanged(tmp_path):
    (tmp_path / "letters.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other files"):
        init(tmp_path, FEDERATION)
    assert [path.name for path in tmp_path.iterdir()] == ["letters.txt"]


def test_a_folder_that_cannot_be_completed_is_not_created(tmp_path, monkeypatch):
    def fails(*arguments):
        raise OSError("disk full")

    monkeypatch.setattr("fedsim.deploy.folder._server_files", fails)
    with pytest.raises(OSError, match="disk full"):
        init(tmp_path / "federation", FEDERATION)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["deploy"], "Expected fedsim deploy init | register | status | up"),
        (["deploy", "int"], "Did you mean 'init'?"),
        (["deploy", "init"], "Expected one folder, got 0"),
        (["deploy", "init", "x", "--clients", "none"], "Expected --clients to be a whole number from 1"),
        (["deploy", "init", "x", "--clients"], "Expected a value after --clients"),
        (["deploy", "init", "x", "--name", "a b"], "Expected --name of letters"),
        (["deploy", "init", "x", "--hots", "a"], "Did you mean '--host'?"),
        (["deploy", "up"], "Expected --local N"),
        (["deploy", "up", "--local", "2", "sed=1"], "Unknown option 'sed'"),
        (["deploy", "up", "--local", "2", "federation.clients=5"], "got --local 2 and another. Leave out federation.clients"),
        (["deploy", "up", "--local", "2", "data.path=./nothing.jsonl"], "data.path: expected a file or folder, got ./nothing.jsonl"),
        (["deploy", "up", "--local", "2", "model.path=../no/model"], "model.path: expected a file or folder, got ../no/model"),
        (["deploy", "register"], "Expected the folder of a federation, got 0"),
        (["deploy", "register", "nowhere"], "Expected nowhere to be a federation's folder"),
        (["deploy", "status"], "Expected the folder of a federation"),
        (["deploy", "status", "nowhere"], "Expected nowhere to be a federation's folder"),
        (["run", "engine=deployment"], "Expected engine.superlink with engine=deployment"),
        (
            ["run", "engine=deployment", "engine.superlink=mien"],
            "engine.superlink: expected a SuperLink of Flower's configuration, one of mine, ",
        ),
        (["run", "engine=deployment", "engine.superlink=mien"], "Did you mean 'mine'? Give one of them, or point FLWR_HOME to "),
        (["deploy", "status", "--superlink", "mien"], "--superlink: expected a SuperLink of Flower's configuration"),
        (["worker"], "Expected fedsim worker FILE"),
        (["worker", "nowhere.yaml"], "Expected the client's file nowhere.yaml"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_exit_code_two(words, told, capsys, tmp_path, tmp_path_factory, monkeypatch):
    home = tmp_path_factory.mktemp("flwr")
    (home / "config.toml").write_text('[superlink]\ndefault = "mine"\n[superlink.mine]\naddress = "localhost:1"\n')
    monkeypatch.setenv("FLWR_HOME", str(home))
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
