"""Contexts from files, what certificates say of their owners, and channel bindings; against the openssl program."""

from __future__ import annotations

import datetime
import hashlib
import os
import shutil
import ssl
import subprocess
from pathlib import Path

import pytest
import trustme
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from authorities import ca_file, issued
from headrace import Certificate, CertificateError, HandshakeError
from headrace.security.certificates import (
    LARGEST_FILE,
    ServerCertificates,
    client_context,
    end_point_binding,
    expiry_of,
    identity_of,
    leaf_of,
)

openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the openssl program")

HARDENED = ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION


def one(name: str, **options: object) -> Certificate:
    files = issued(name)
    return Certificate(files.chain, files.key, **options)  # type: ignore[arg-type]


def test_a_server_s_context_is_hardened() -> None:
    context, leaf = ServerCertificates({None: one("a.example")}).select(None)
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert context.options & HARDENED == HARDENED
    assert context.options & ssl.OP_CIPHER_SERVER_PREFERENCE
    assert (
        not context.options & ssl.OP_IGNORE_UNEXPECTED_EOF
        if hasattr(ssl, "OP_IGNORE_UNEXPECTED_EOF")
        else True
    )
    assert context.verify_mode == ssl.CERT_NONE
    assert leaf == leaf_of(issued("a.example").chain)


@pytest.mark.parametrize(
    ("asked", "mode"), [("optional", ssl.CERT_OPTIONAL), ("required", ssl.CERT_REQUIRED)]
)
def test_no_tickets_where_clients_have_certificates(asked: str, mode: ssl.VerifyMode) -> None:
    described = one("a.example", client_certificate=asked, client_ca=ca_file())
    context, _ = ServerCertificates({None: described}).select(None)
    assert context.verify_mode == mode
    assert context.num_tickets == 0
    assert context.options & ssl.OP_NO_TICKET


def test_a_client_s_context_verifies() -> None:
    for context in (client_context(), client_context(ca_file())):
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert context.check_hostname
        assert context.options & HARDENED == HARDENED
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert len(client_context(ca_file()).get_ca_certs()) == 1


def test_names_are_selected() -> None:
    certificates = ServerCertificates(
        {
            "a.example": one("a.example"),
            "*.example": one("*.example"),
            "B.other": one("b.other"),
        }
    )

    def name(asked: str | None) -> str:
        return identity_of(certificates.select(asked)[1]).name

    assert name("a.example") == "a.example"
    assert name("A.EXAMPLE") == "a.example"
    assert name("x.example") == "*.example"
    assert name("b.OTHER") == "b.other"
    for unknown in (None, "example", "x.y.example", "other", ""):
        with pytest.raises(HandshakeError, match="no certificate for the server name"):
            name(unknown)
    assert certificates.only is None
    default = ServerCertificates({None: one("d.example"), "a.example": one("a.example")})
    assert identity_of(default.select(None)[1]).name == "d.example"
    assert identity_of(default.select("nowhere")[1]).name == "d.example"


def self_signed(path: Path, begins: int, ends: int, names: list[x509.GeneralName] | None = None) -> Path:
    """A certificate valid from ``begins`` to ``ends`` hours from now, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "self")]) if names is None else x509.Name([])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(now + datetime.timedelta(hours=begins))
        .not_valid_after(now + datetime.timedelta(hours=ends))
    )
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=True)
    certificate = builder.sign(key, hashes.SHA256())
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        + certificate.public_bytes(serialization.Encoding.PEM)
    )
    return path


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    expired = self_signed(tmp_path / "expired.pem", -48, -24)
    early = self_signed(tmp_path / "early.pem", 24, 48)
    empty = tmp_path / "empty.pem"
    empty.touch()
    broken = tmp_path / "broken.pem"
    broken.write_text("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n")
    large = tmp_path / "large.pem"
    with large.open("wb") as file:
        file.truncate(LARGEST_FILE + 1)
    locked = tmp_path / "locked.key"
    key = serialization.load_pem_private_key(issued("a.example").key.read_bytes(), None)
    locked.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    chain = issued("a.example").chain
    for described, text in [
        (Certificate(expired), r"expired\.pem expired on "),
        (Certificate(early), r"early\.pem isn't valid before "),
        (Certificate(tmp_path / "none.pem"), r"none\.pem can't be read: No such file"),
        (Certificate(tmp_path), "isn't a file|Is a directory"),
        (Certificate(empty), r"empty\.pem has no certificate in it"),
        (Certificate(broken), r"the first certificate in .*broken\.pem can't be read"),
        (Certificate(large), r"large\.pem is larger than"),
        (Certificate(chain, issued("b.example").key), "the private key doesn't match"),
        (Certificate(chain), "and its key can't be used"),
        (Certificate(chain, tmp_path / "none.key"), r"none\.key can't be used"),
        (Certificate(chain, locked), "the private key is encrypted: give its password"),
        (Certificate(chain, locked, password="wrong"), "and its key can't be used"),
        (one("a.example", client_certificate="required"), "whom to trust"),
        (one("a.example", client_certificate="required", client_ca=empty), r"empty\.pem has no certificates"),
        (one("a.example", client_certificate="maybe"), "client_certificate must be one of"),
    ]:
        with pytest.raises(CertificateError, match=text):
            ServerCertificates({None: described})
    ServerCertificates({None: Certificate(chain, locked, password="secret")})
    with pytest.raises(CertificateError, match="at least one"):
        ServerCertificates({})
    with pytest.raises(CertificateError, match="without a certificate"):
        client_context(private_key=locked)
    with pytest.raises(CertificateError, match=r"before 1\.2"):
        client_context(minimum_version=ssl.TLSVersion.TLSv1)
    with pytest.raises(CertificateError, match="isn't a list of revoked"):
        client_context(crl=empty)


def test_reload_takes_all_or_nothing(tmp_path: Path) -> None:
    first, second = tmp_path / "first.pem", tmp_path / "second.pem"
    self_signed(first, -1, 1)
    self_signed(second, -1, 1)
    certificates = ServerCertificates({"first": Certificate(first), "second": Certificate(second)})
    before = [certificates.select(name) for name in ("first", "second")]
    self_signed(first, -1, 1)
    second.write_text("nothing")
    with pytest.raises(CertificateError):
        certificates.reload()
    assert [certificates.select(name) for name in ("first", "second")] == before
    self_signed(second, -1, 1)
    certificates.reload()
    after = [certificates.select(name) for name in ("first", "second")]
    assert not {id(context) for context, _ in before} & {id(context) for context, _ in after}
    assert [leaf for _, leaf in after] == [leaf_of(first), leaf_of(second)]


def test_revoked_certificates_are_refused(tmp_path: Path) -> None:
    """The list is used: a server whose certificate is on it isn't connected to."""
    ca = trustme.CA()
    good, bad = ca.issue_cert("a.example"), ca.issue_cert("a.example")
    ca_path, crl = tmp_path / "ca.pem", tmp_path / "crl.pem"
    ca.cert_pem.write_to_path(str(ca_path))
    authority_key = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    now = datetime.datetime.now(datetime.UTC)
    serial = x509.load_pem_x509_certificate(bad.cert_chain_pems[0].bytes()).serial_number
    revoked = x509.RevokedCertificateBuilder().serial_number(serial).revocation_date(now).build()
    issuer = x509.load_pem_x509_certificate(ca.cert_pem.bytes()).subject
    crl.write_bytes(
        x509.CertificateRevocationListBuilder()
        .issuer_name(issuer)
        .last_update(now - datetime.timedelta(hours=1))
        .next_update(now + datetime.timedelta(hours=1))
        .add_revoked_certificate(revoked)
        .sign(authority_key, hashes.SHA256())  # type: ignore[arg-type]
        .public_bytes(serialization.Encoding.PEM)
    )
    context = client_context(ca_path, crl=crl)
    for certificate, accepted in ((good, True), (bad, False)):
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate.configure_cert(server)
        assert shake_hands(context, server) is accepted


def shake_hands(client: ssl.SSLContext, server: ssl.SSLContext) -> bool:
    there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = client.wrap_bio(back, there, server_hostname="a.example")
    far = server.wrap_bio(there, back, server_side=True)
    for _ in range(5):
        for end in (near, far):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLCertVerificationError:
                return False
    return True


def test_whom_a_certificate_names(tmp_path: Path) -> None:
    identity = identity_of(
        leaf_of(issued("a.example", "b.example", "192.0.2.1", "2001:db8::1", "c@d.example").chain)
    )
    assert identity.name == "a.example"
    assert identity.names[:5] == (
        "dns:a.example",
        "dns:b.example",
        "ip:192.0.2.1",
        "ip:2001:db8::1",
        "email:c@d.example",
    )
    assert identity.names[5].startswith("subject:")
    assert len(identity.names) == 6
    assert "certificate" not in repr(identity)
    uri = self_signed(tmp_path / "uri.pem", -1, 1, [x509.UniformResourceIdentifier("spiffe://a/b")])
    assert identity_of(leaf_of(uri)).names == ("uri:spiffe://a/b",)
    assert identity_of(leaf_of(self_signed(tmp_path / "cn.pem", -1, 1))).name == "CN=self"
    assert identity_of(leaf_of(self_signed(tmp_path / "no.pem", -1, 1, []))).name == "serial 5"
    assert expiry_of(leaf_of(uri)) > datetime.datetime.now(datetime.UTC)
    with pytest.raises(ValueError):  # the text is OpenSSL's
        identity_of(b"nothing")


@openssl
@pytest.mark.parametrize(
    ("options", "digest"),
    [
        (["-newkey", "rsa:2048", "-sha256"], "sha256"),
        (["-newkey", "rsa:2048", "-sha384"], "sha384"),
        (["-newkey", "rsa:2048", "-sha512"], "sha512"),
        (["-newkey", "rsa:2048", "-sha1"], "sha256"),
        (["-newkey", "rsa:2048", "-md5"], "sha256"),
        (["-newkey", "rsa:2048", "-sha384", "-sigopt", "rsa_padding_mode:pss"], "sha384"),
        (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-sha256"], "sha256"),
        (["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-sha512"], "sha512"),
        (["-newkey", "ed25519"], None),
        (["-newkey", "ed448"], None),
    ],
    ids=lambda value: "-".join(value[1:]).replace(":", "-") if isinstance(value, list) else None,
)
def test_channel_bindings(options: list[str], digest: str | None, tmp_path: Path) -> None:
    """RFC 5929 section 4.1: the hash of the certificate's own signature, and SHA-256 for MD5 and SHA-1."""
    path = tmp_path / "it.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-nodes",
            "-subj",
            "/CN=it",
            "-keyout",
            os.devnull,
            "-out",
            path,
            *options,
        ],
        check=True,
        capture_output=True,
        timeout=60,
    )
    der = leaf_of(path)
    assert end_point_binding(der) == (None if digest is None else hashlib.new(digest, der).digest())
