"""TLS peers that do what no honest one does, and records that no TLS library would make."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import socket
import ssl
import struct
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from authorities import ca_file, issued

# Content types, and one message of the handshake's (RFC 8446 sections 5.1 and 4).
ALERT, HANDSHAKE, APPLICATION_DATA = 21, 22, 23
KEY_UPDATE = 24
CLOSE_NOTIFY = b"\x01\x00"

FIN, RST = "FIN", "RST"
V12, V13 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3

CIPHERS = {"TLS_AES_128_GCM_SHA256": ("sha256", 16), "TLS_AES_256_GCM_SHA384": ("sha384", 32)}


def client_context(version: ssl.TLSVersion | None = None, certificate: str | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=ca_file())
    return only(context, version, certificate)


def server_context(name: str, version: ssl.TLSVersion | None = None) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return only(context, version, name)


def only(context: ssl.SSLContext, version: ssl.TLSVersion | None, certificate: str | None) -> ssl.SSLContext:
    if version is not None:
        context.minimum_version = context.maximum_version = version
    if certificate is not None:
        files = issued(certificate)
        context.load_cert_chain(files.chain, files.key)
    return context


class TLSPeer(asyncio.Protocol):
    """One end of a TLS connection, without any limit or manners of its own: it answers nothing that it isn't told to.

    Parameters
    ----------
    at_most : int, optional
        How many bytes of what it has to say ever reach the wire; then the connection ends,
    end : {"FIN", "RST"}
        this way.
    """

    transport: Any

    def __init__(
        self,
        context: ssl.SSLContext,
        *,
        server_side: bool = False,
        server_hostname: str | None = None,
        session: ssl.SSLSession | None = None,
        at_most: int | None = None,
        end: str = FIN,
    ) -> None:
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.tls = context.wrap_bio(
            self.incoming, self.outgoing, server_side, server_hostname if not server_side else None, session
        )
        self.left = at_most
        self.end = end
        self.ended = False
        self.cut_off = False  # something that it had to say was dropped
        self.wire_bytes = 0  # received
        self.data = bytearray()
        self.handshake_done = asyncio.Event()
        self.changed = asyncio.Event()
        self.closed_by_peer = False  # its close_notify came
        self.lost = asyncio.Event()
        self.error: ssl.SSLError | None = None

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.advance()

    def data_received(self, data: bytes) -> None:
        self.wire_bytes += len(data)
        self.incoming.write(data)
        self.advance()

    def advance(self) -> None:
        """As far as the handshake and the records go."""
        try:
            if not self.handshake_done.is_set():
                self.tls.do_handshake()
                self.handshake_done.set()
            while data := self.tls.read(65536):
                self.data += data
            self.closed_by_peer = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            self.closed_by_peer = True
        except ssl.SSLError as exc:
            self.error = exc
        self.changed.set()
        self.flush()

    def flush(self) -> None:
        self.send_wire(self.outgoing.read())

    def write(self, data: bytes) -> None:
        self.tls.write(data)
        self.flush()

    def close_notify(self) -> None:
        try:
            self.tls.unwrap()
        except ssl.SSLWantReadError:
            pass
        self.flush()

    def send_wire(self, data: bytes) -> None:
        """Bytes as they are, as long as any may be sent."""
        if self.ended or self.transport.is_closing():
            self.cut_off |= bool(data)
            return
        if self.left is None:
            self.transport.write(data)
            return
        self.transport.write(data[: self.left])
        self.cut_off |= len(data) > self.left
        self.left = max(self.left - len(data), 0)
        if not self.left:
            self.finish()

    def finish(self) -> None:
        self.ended = True
        if self.end == FIN:
            self.transport.write_eof()
        else:
            self.reset()

    def reset(self) -> None:
        """Behind what was written."""
        if self.transport.get_write_buffer_size():
            asyncio.get_running_loop().call_soon(self.reset)
            return
        kernel_s = self.transport.get_extra_info("socket")
        kernel_s.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()
        self.changed.set()
        self.handshake_done.set()

    async def until(self, condition: Any) -> None:
        while not condition():
            self.changed.clear()
            await self.changed.wait()


class Plain(asyncio.Protocol):
    """A peer that says one thing, whatever comes, and then ends its stream if it's told to."""

    transport: Any

    def __init__(self, say: bytes = b"", *, end: str | None = None) -> None:
        self.say, self.end = say, end
        self.data = bytearray()
        self.lost = asyncio.Event()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.say)
        if self.end == FIN:
            transport.write_eof()

    def data_received(self, data: bytes) -> None:
        self.data += data

    def connection_lost(self, exc: BaseException | None) -> None:
        self.lost.set()


# ---- records by hand -----------------------------------------------------------------------------------------


def record(content_type: int, content: bytes, version: int = 0x0303) -> bytes:
    """A record that isn't encrypted."""
    return struct.pack("!BHH", content_type, version, len(content)) + content


def in_one_byte_records(content_type: int, content: bytes) -> bytes:
    return b"".join(record(content_type, content[i : i + 1]) for i in range(len(content)))


def expand(hash_name: str, secret: bytes, label: bytes, length: int) -> bytes:
    """HKDF-Expand-Label without a context (RFC 8446 section 7.1), for up to one block."""
    full = b"tls13 " + label
    info = struct.pack("!HB", length, len(full)) + full + b"\x00"
    return hmac.digest(secret, info + b"\x01", hash_name)[:length]


class Records:
    """Makes the records of one end of a TLS 1.3 connection by hand, from where its handshake ended.

    OpenSSL, which made that handshake, must not send anything afterwards: it doesn't know of these.
    """

    def __init__(self, cipher: str, keylog: Path, *, server_side: bool = False) -> None:
        self.hash_name, self.key_size = CIPHERS[cipher]
        label = f"{'SERVER' if server_side else 'CLIENT'}_TRAFFIC_SECRET_0 "
        lines = [line for line in keylog.read_text().splitlines() if line.startswith(label)]
        self.take_secret(bytes.fromhex(lines[-1].rpartition(" ")[2]))

    def take_secret(self, secret: bytes) -> None:
        self.secret = secret
        self.aead = AESGCM(expand(self.hash_name, secret, b"key", self.key_size))
        self.iv = int.from_bytes(expand(self.hash_name, secret, b"iv", 12), "big")
        self.sequence = 0

    def make(self, content_type: int, content: bytes) -> bytes:
        inner = content + bytes([content_type])
        head = struct.pack("!BHH", APPLICATION_DATA, 0x0303, len(inner) + 16)
        nonce = (self.iv ^ self.sequence).to_bytes(12, "big")
        self.sequence += 1
        return head + self.aead.encrypt(nonce, inner, head)

    def data(self, content: bytes) -> bytes:
        return self.make(APPLICATION_DATA, content)

    def close_notify(self) -> bytes:
        return self.make(ALERT, CLOSE_NOTIFY)

    def key_update(self, *, answer: bool = True) -> bytes:
        """Asks the peer to update its keys as well, unless it's told not to (RFC 8446 section 4.6.3)."""
        made = self.make(HANDSHAKE, bytes([KEY_UPDATE, 0, 0, 1, answer]))
        size = hashlib.new(self.hash_name).digest_size
        self.take_secret(expand(self.hash_name, self.secret, b"traffic upd", size))
        return made


class ByHand(TLSPeer):
    """A TLS 1.3 client, or server, that makes its records itself once the handshake is done."""

    def __init__(self, folder: Path, *, server_name: str, server_side: bool = False) -> None:
        context = server_context(server_name, V13) if server_side else client_context(V13)
        if server_side:
            context.num_tickets = 0  # they would count as records
        self.keylog = folder / "keys"
        context.keylog_filename = str(self.keylog)
        self.server_side = server_side
        super().__init__(context, server_side=server_side, server_hostname=server_name)

    async def records(self) -> Records:
        await self.handshake_done.wait()
        assert self.error is None
        cipher = self.tls.cipher()
        assert cipher is not None
        return Records(cipher[0], self.keylog, server_side=self.server_side)
