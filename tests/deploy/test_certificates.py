"""Keys and certificates of a federation, judged by Python's own TLS and by Flower's own loader."""

import socket
import ssl
import threading

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedsim.deploy.certificates import authority, client_key, server_certificate


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    ca, ca_key = authority("test")
    certificate, key = server_certificate(ca, ca_key, ["server.example", "127.0.0.1", "::1"])
    other, _ = authority("other")
    for name, content in {"ca.crt": ca, "server.crt": certificate, "server.key": key, "other.crt": other}.items():
        (folder / name).write_bytes(content)
    return folder


def handshake(files, trusted, host):
    """One TLS connection over a socket pair; raises what the client raises."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(files / "server.crt", files / "server.key")
    client = ssl.create_default_context(cafile=str(files / trusted))
    client.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve():
        try:
            server.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        client.wrap_socket(ours, server_hostname=host).close()
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("host", ["server.example", "127.0.0.1", "::1"])
def test_the_server_is_trusted_under_each_of_its_names(files, host):
    handshake(files, "ca.crt", host)


@pytest.mark.parametrize(("trusted", "host"), [("other.crt", "server.example"), ("ca.crt", "elsewhere.example"), ("ca.crt", "127.0.0.2")])
def test_another_authority_or_another_host_name_is_not_trusted(files, trusted, host):
    with pytest.raises(ssl.SSLCertVerificationError):
        handshake(files, trusted, host)


def test_the_server_certificate_cannot_sign_certificates(files):
    certificate = x509.load_pem_x509_certificate((files / "server.crt").read_bytes())
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_a_clients_keys_are_a_pair_in_the_format_that_flower_reads():
    public, private = client_key("client-0")
    assert public.startswith(b"ecdsa-sha2-nistp384 ")
    assert load_ssh_private_key(private, None).public_key() == load_ssh_public_key(public)
    assert client_key("client-0") != (public, private)
