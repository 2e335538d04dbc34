"""Wrap tokens: against the RFCs' vectors, against MIT krb5, and against whoever changes, repeats or leaves out."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headrace.errors import AuthenticationError, FramingError
from headrace.security import enctypes
from headrace.security.contexts import MessageProtection
from headrace.security.enctypes import CHECKSUM_KEY, ENCRYPTION_KEY, ENCTYPES, INTEGRITY_KEY
from headrace.security.kerberos import (
    HEADER,
    VARIABLE,
    KerberosProtection,
    sealed_kinds,
    supported_enctype,
)
from realm import ENCTYPES as REALM_ENCTYPES
from realm import Realm

NUMBERS = [17, 18, 19, 20]
LARGE = [
    around + by for around in (4096, 12_288, 64_512, 65_536) for by in (-17, -16, -15, -1, 0, 1, 15, 16, 17)
]
SIZES = [*range(301), *LARGE]
h = bytes.fromhex


@pytest.fixture(params=["native", "python"], autouse=True)
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which of the two makes sealed tokens."""
    monkeypatch.setenv(VARIABLE, request.param)
    sealed_kinds(request.param)
    return str(request.param)


every_enctype = pytest.mark.parametrize("number", NUMBERS)
both_protections = pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "signed"])


# ---- the RFCs' vectors ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "bits", "folded"),
    [
        (b"012345", 64, "be072631276b1955"),
        (b"password", 56, "78a07b6caf85fa"),
        (b"Rough Consensus, and Running Code", 64, "bb6ed30870b7f0e0"),
        (b"password", 168, "59e4a8ca7c0385c3c37b3f6d2000247cb6e6bd5b3e"),
        (b"MASSACHVSETTS INSTITVTE OF TECHNOLOGY", 192, "db3b0d8f0b061e603282b308a50841229ad798fab9540c1b"),
        (b"Q", 168, "518a54a215a8452a518a54a215a8452a518a54a215"),
        (b"ba", 168, "fb25d531ae8974499f52fd92ea9857c4ba24cf297e"),
        (b"kerberos", 64, "6b65726265726f73"),
        (b"kerberos", 128, "6b65726265726f737b9b5b2b93132b93"),
        (b"kerberos", 168, "8372c236344e5f1550cd0747e15d62ca7a5a3bcea4"),
        (b"kerberos", 256, "6b65726265726f737b9b5b2b93132b935c9bdcdad95c9899c4cae4dee6d6cae4"),
    ],
)
def test_nfold(data: bytes, bits: int, folded: str) -> None:
    """RFC 3961 appendix A.1."""
    assert enctypes.nfold(data, bits // 8) == h(folded)


AES_128 = "42263c6e89f4fc28b8df68ee09799f15"  # RFC 3962 appendix B: "password", 1 iteration
AES_256 = "fe697b52bc0d3ce14432ba036a92e65bbb52280990a2fa27883998d72af30161"
SHA2_128 = "3705d96080c17728a0e800eab6e0d23c"  # RFC 8009 appendix A
SHA2_256 = "6d404d37faf79f9df0d33568d320669800eb4836472ea8a026d16b7182460c52"


@pytest.mark.parametrize(
    ("number", "key", "purpose", "derived"),
    [  # of types 17 and 18 the RFC has no vectors: those of MIT krb5's own tests
        (17, AES_128, CHECKSUM_KEY, "34280a382bc92769b2da2f9ef066854b"),
        (17, AES_128, ENCRYPTION_KEY, "5b14fc4e250e14ddf9dccf1af6674f53"),
        (17, AES_128, INTEGRITY_KEY, "4ed31063621684f09ae8d89991af3e8f"),
        (18, AES_256, CHECKSUM_KEY, "bfab388bdcb238e9f9c98d6a878304f04d30c82556375ac507a7a852790f4674"),
        (18, AES_256, ENCRYPTION_KEY, "c7cfd9cd75fe793a586a542d87e0d1396f1134a104bb1a9190b8c90ada3ddf37"),
        (18, AES_256, INTEGRITY_KEY, "97151b4c76945063e2eb0529dc067d97d7bba90776d8126d91f34f3101aea8ba"),
        (19, SHA2_128, CHECKSUM_KEY, "b31a018a48f54776f403e9a396325dc3"),
        (19, SHA2_128, ENCRYPTION_KEY, "9b197dd1e8c5609d6e67c3e37c62c72e"),
        (19, SHA2_128, INTEGRITY_KEY, "9fda0e56ab2d85e1569a688696c26a6c"),
        (20, SHA2_256, CHECKSUM_KEY, "ef5718be86cc84963d8bbb5031e9f5c4ba41f28faf69e73d"),
        (20, SHA2_256, ENCRYPTION_KEY, "56ab22bee63d82d7bc5227f6773f8ea7a5eb1c825160c38312980c442e5c7e49"),
        (20, SHA2_256, INTEGRITY_KEY, "69b16514e3cd8e56b82010d5c73012b622c4d00ffc23ed1f"),
    ],
)
def test_derived_keys(number: int, key: str, purpose: int, derived: str) -> None:
    assert enctypes.derive_key(ENCTYPES[number], h(key), 2, purpose) == h(derived)


SAMPLES = [  # type, key, usage, confounder, message, ciphertext; shorter ones than a block never are in a token
    (17, "9062430c8cda3388922e6d6a509f5b7a", 2, "94b491f481485b9a0678cd3c4ea386ad", b"9 bytesss".hex(),
     "68fb9679601f45c78857b2bf820fd6e53eca8d42fd4b1d7024a09205abb7cd2ec26c355d2f"),
    (18, "f1c795e9248a09338d82c3f8d5b567040b0110736845041347235b1404231398", 4,
     "e45ca518b42e266ad98e165e706ffb60", b"30 bytes bytes bytes bytes byt".hex(),
     ("d1137a4d634cfece924dbc3bf6790648bd5cff7de0e7b99460211d0daef3d79a295c688858f3b34b9cbd6eebae81daf6b734d4d498b6714f"
      "1c1d")),
    (19, SHA2_128, 2, "7bca285e2fd4130fb55b1a5c83bc5b24", "000102030405",
     "84d7f30754ed987bab0bf3506beb09cfb55402cef7e6877ce99e247e52d16ed4421dfdf8976c"),
    (19, SHA2_128, 2, "56ab21713ff62c0a1457200f6fa9948f", "000102030405060708090a0b0c0d0e0f",
     "3517d640f50ddc8ad3628722b3569d2ae07493fa8263254080ea65c1008e8fc295fb4852e7d83e1e7c48c37eebe6b0d3"),
    (19, SHA2_128, 2, "a7a4e29a4728ce10664fb64e49ad3fac", "000102030405060708090a0b0c0d0e0f1011121314",
     "720f73b18d9859cd6ccb4346115cd336c70f58edc0c4437c5573544c31c813bce1e6d072c186b39a413c2f92ca9b8334a287ffcbfc"),
    (20, SHA2_256, 2, "b80d3251c1f6471494256ffe712d0b9a", "000102030405",
     "4ed7b37c2bcac8f74f23c1cf07e62bc7b75fb3f637b9f559c7f664f69eab7b6092237526ea0d1f61cb20d69d10f2"),
    (20, SHA2_256, 2, "53bf8a0d105265d4e276428624ce5e63", "000102030405060708090a0b0c0d0e0f",
     ("bc47ffec7998eb91e8115cf8d19dac4bbbe2e163e87dd37f49beca92027764f68cf51f14d798c2273f35df574d1f932e40c4ff25"
      "5b36a266")),
    (20, SHA2_256, 2, "763e65367e864f02f55153c7e3b58af1", "000102030405060708090a0b0c0d0e0f1011121314",
     ("40013e2df58e8751957d2878bcd2d6fe101ccfd556cb1eae79db3c3ee86429f2b2a602ac86fef6ecb647d6295fae077a1feb5175"
      "08d2c16b4192e01f62")),
]  # fmt: skip


def encrypted(
    number: int, key: bytes, usage: int, data: bytes, trailer: bytes, confounder: bytes | None = None
) -> bytes:
    fixed = iter([confounder]) if confounder else None
    return enctypes.Encryptor(ENCTYPES[number], key, usage, fixed).encrypt(b"", data, trailer)


@pytest.mark.parametrize(("number", "key", "usage", "confounder", "message", "ciphertext"), SAMPLES)
def test_sample_encryptions(
    number: int, key: str, usage: int, confounder: str, message: str, ciphertext: str
) -> None:
    """RFC 8009 appendix A; of types 17 and 18 MIT krb5's own."""
    assert encrypted(number, h(key), usage, h(message), b"", h(confounder)) == h(ciphertext)
    assert encrypted(number, h(key), usage, h(message)[:3], h(message)[3:], h(confounder)) == h(ciphertext)
    decryptor = enctypes.Decryptor(ENCTYPES[number], h(key), usage)
    for _ in range(3):  # the state of the cipher is that of a new one each time
        assert decryptor.decrypt(memoryview(h(ciphertext))) == h(message)


CHICKEN = b"I would like the General Gau's Chicken, please, and wonton soup."
STOLEN = {
    17: "c6353568f2bf8cb4d8a580362da7ff7f97",
    31: "fc00783e0efdb2c1d445d4c8eff7ed2297687268d6ecccc0c07b25e25ecfe5",
    32: "39312523a78662d5be7fcbcc98ebf5a897687268d6ecccc0c07b25e25ecfe584",
    47: "97687268d6ecccc0c07b25e25ecfe584b3fffd940c16a18c1b5549d2f838029e39312523a78662d5be7fcbcc98ebf5",
    48: "97687268d6ecccc0c07b25e25ecfe5849dad8bbb96c4cdc03bc103e1a194bbd839312523a78662d5be7fcbcc98ebf5a8",
    64: "97687268d6ecccc0c07b25e25ecfe58439312523a78662d5be7fcbcc98ebf5a84807efe836ee89a526730dbc2f7bc840"
    "9dad8bbb96c4cdc03bc103e1a194bbd8",
}


@pytest.mark.parametrize("size", STOLEN)
def test_ciphertext_stealing(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """RFC 3962 appendix B: the key is the cipher's own there, and the message's first block the confounder."""
    monkeypatch.setattr(enctypes, "derive_key", lambda enctype, key, usage, purpose: key)
    found = encrypted(17, b"chicken teriyaki", 0, CHICKEN[16:size], b"", CHICKEN[:16])
    assert found[:-12] == h(STOLEN[size])
    decryptor = enctypes.Decryptor(ENCTYPES[17], b"chicken teriyaki", 0)
    assert decryptor.decrypt(memoryview(found)) == CHICKEN[16:size]


@pytest.mark.parametrize(
    ("number", "key", "usage", "data", "checksum"),
    [
        (17, "9062430c8cda3388922e6d6a509f5b7a", 3, b"eight nine ten eleven twelve thirteen",
         "01a4b088d45628f6946614e3"),
        (18, "b1ae4cd8462aff1677053cc9279aac30b796fb81ce21474dd3ddbcfea4ec76d7", 4, b"fourteen",
         "e08739e3279e2903ec8e3836"),
        (19, SHA2_128, 2, bytes(range(0x15)), "d78367186643d67b411cba9139fc1dee"),
        (20, SHA2_256, 2, bytes(range(0x15)), "45ee791567eefca37f4ac1e0222de80d43c3bfa06699672a"),
    ],
)  # fmt: skip
def test_checksums(number: int, key: str, usage: int, data: bytes, checksum: str) -> None:
    """RFC 8009 appendix A; of types 17 and 18 MIT krb5's own."""
    ours = enctypes.Checksum(ENCTYPES[number], h(key), usage)
    for split in (0, 5, len(data)):
        assert ours.of(data[:split], data[split:]) == h(checksum)
    assert ours.matches(data, b"", h(checksum))
    assert not ours.matches(data, b"\0", h(checksum))


# ---- two of ours ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """What both sides of a context know."""

    enctype: int
    key: bytes
    acceptor_subkey: bool = True
    sealed: bool = True
    first: int = 1000  # the initiator's number
    second: int = 2_000_000  # the acceptor's

    def side(self, *, initiator: bool) -> KerberosProtection:
        ours, theirs = (self.first, self.second) if initiator else (self.second, self.first)
        return KerberosProtection(
            enctype=self.enctype,
            key=self.key,
            initiator=initiator,
            acceptor_subkey=self.acceptor_subkey,
            send_sequence=ours,
            receive_sequence=theirs,
            sealed=self.sealed,
        )

    @property
    def initiator(self) -> KerberosProtection:
        return self.side(initiator=True)

    @property
    def acceptor(self) -> KerberosProtection:
        return self.side(initiator=False)


def values(number: int, **more: Any) -> Values:
    return Values(number, bytes(range(7, 7 + ENCTYPES[number].key_size)), **more)


@dataclass(frozen=True)
class Forger:
    """Makes tokens that the other side might send, and some that it wouldn't; with the right key."""

    values: Values
    initiator: bool = True
    filler: int = 0
    rotation: int = 0
    flags: int = 0  # XORed into those of the header
    third: int = 0xFF  # the header's byte behind the flags
    sealed_rotation: int = 0  # RRC in the copy of the header
    sealed_number: int = 0  # added to the number there

    def token(self, data: bytes, number: int) -> bytes:
        values = self.values
        usage = 24 if self.initiator else 22
        flags = (not self.initiator) | values.sealed << 1 | values.acceptor_subkey << 2
        flags ^= self.flags
        if values.sealed:
            extra = self.filler
            copy = HEADER.pack(
                0x0504, flags, self.third, extra, self.sealed_rotation, number + self.sealed_number
            )
            body = encrypted(values.enctype, values.key, usage, data, copy)
        else:
            extra = ENCTYPES[values.enctype].mac_size
            signed = HEADER.pack(0x0504, flags, self.third, 0, 0, number)
            checksum = enctypes.Checksum(ENCTYPES[values.enctype], values.key, usage).of(data, signed)
            body = data + checksum
        turn = self.rotation % len(body)
        header = HEADER.pack(0x0504, flags, self.third, extra, self.rotation, number)
        return header + body[len(body) - turn :] + body[: len(body) - turn]

    def filled(self, data: bytes, number: int) -> bytes:
        return self.token(data + b"x" * self.filler, number)


@every_enctype
@both_protections
def test_overhead(number: int, sealed: bool) -> None:
    one: MessageProtection = values(number, sealed=sealed).initiator
    assert one.sealed is sealed
    assert one.overhead == 16 + sealed * 32 + ENCTYPES[number].mac_size
    for size in (0, 1, 16, 300):
        assert len(one.wrap(bytes(size))) == size + one.overhead


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.sampled_from(NUMBERS),
    sealed=st.booleans(),
    subkey=st.booleans(),
    first=st.integers(0, 2**64 - 1),
    second=st.integers(0, 2**64 - 1),
    messages=st.lists(st.tuples(st.booleans(), st.binary(max_size=70), st.integers(0, 3)), max_size=12),
)
def test_round_trip(
    number: int, sealed: bool, subkey: bool, first: int, second: int, messages: list[tuple[bool, bytes, int]]
) -> None:
    agreed = values(number, sealed=sealed, acceptor_subkey=subkey, first=first, second=second)
    client, server = agreed.initiator, agreed.acceptor
    kinds: list[Callable[[Any], Any]] = [
        bytes,
        bytearray,
        memoryview,
        lambda data: memoryview(b"-" + data)[1:],
    ]
    for to_server, data, kind in messages:
        sender, receiver = (client, server) if to_server else (server, client)
        token = sender.wrap(kinds[kind](data))
        assert receiver.unwrap(kinds[(kind + 1) % 4](token)) == data


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    number=st.sampled_from(NUMBERS),
    sealed=st.booleans(),
    messages=st.lists(
        st.tuples(st.binary(max_size=70), st.integers(0, 90), st.integers(0, 0xFFFF)), min_size=1, max_size=5
    ),
)
def test_filler_and_rotation(number: int, sealed: bool, messages: list[tuple[bytes, int, int]]) -> None:
    """Between usual tokens, too: they don't change the state."""
    agreed = values(number, sealed=sealed)
    receiver = agreed.acceptor
    position = agreed.first
    for data, filler, rotation in messages:
        forger = Forger(agreed, filler=filler if sealed else 0, rotation=rotation)
        assert receiver.unwrap(forger.filled(data, position)) == data
        assert receiver.unwrap(Forger(agreed).token(data, position + 1)) == data
        position += 2


@every_enctype
def test_numbers_begin_again_behind_the_last(number: int) -> None:
    agreed = values(number, first=2**64 - 1)
    client, server = agreed.initiator, agreed.acceptor
    for data in (b"last", b"first"):
        assert server.unwrap(client.wrap(data)) == data


def test_results_don_t_share_the_working_space() -> None:
    agreed = values(18)
    client, server = agreed.initiator, agreed.acceptor
    tokens = [client.wrap(bytes([i]) * 50) for i in range(3)]
    assert [server.unwrap(token) for token in tokens] == [bytes([i]) * 50 for i in range(3)]
    assert len({token[16:] for token in (client.wrap(b"same") for _ in range(200))}) == 200


# ---- what must be refused ------------------------------------------------------------------------------------------


def refused(receiver: KerberosProtection, token: bytes, match: str | None = None) -> None:
    with pytest.raises(FramingError, match=match):
        receiver.unwrap(token)
    with pytest.raises(FramingError, match="earlier token has failed"):
        receiver.wrap(b"")


@every_enctype
@both_protections
def test_every_flipped_bit_is_refused(number: int, sealed: bool) -> None:
    """The body's length is odd: a rotation by a power of two is never one by a multiple of it."""
    agreed = values(number, sealed=sealed)
    token = agreed.initiator.wrap(b"twenty-one bytes here")
    assert len(token) % 2
    for bit in range(8 * len(token)):
        changed = bytearray(token)
        changed[bit // 8] ^= 1 << bit % 8
        refused(agreed.acceptor, bytes(changed))
    assert agreed.acceptor.unwrap(token) == b"twenty-one bytes here"


@every_enctype
@both_protections
def test_every_flipped_bit_is_refused_in_an_unusual_token(number: int, sealed: bool) -> None:
    agreed = values(number, sealed=sealed)
    token = Forger(agreed, filler=5 if sealed else 0, rotation=11).filled(
        b"sixteen bytes in" * 2, agreed.first
    )
    for bit in range(8 * len(token)):
        changed = bytearray(token)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            assert agreed.acceptor.unwrap(bytes(changed)) == b"sixteen bytes in" * 2
        except FramingError:
            continue
        assert bit // 8 in (6, 7)  # RRC
        assert (int.from_bytes(changed[6:8], "big") - 11) % (len(token) - 16) == 0


@every_enctype
@both_protections
def test_every_truncated_or_longer_token_is_refused(number: int, sealed: bool) -> None:
    agreed = values(number, sealed=sealed)
    token = agreed.initiator.wrap(b"twenty-one bytes here")
    for size in range(len(token)):
        refused(agreed.acceptor, token[:size])
        refused(agreed.acceptor, token[:16] + token[17 + size :])
    for more in (1, 4, 16, len(token)):
        refused(agreed.acceptor, token + bytes(more))
        refused(agreed.acceptor, token + token[:more])


@every_enctype
@both_protections
def test_repeated_reordered_and_missing_tokens(number: int, sealed: bool) -> None:
    agreed = values(number, sealed=sealed)
    client = agreed.initiator
    tokens = [client.wrap(bytes([i])) for i in range(3)]
    server = agreed.acceptor
    server.unwrap(tokens[0])
    refused(server, tokens[0], "number 1000 was repeated or is late; 1001 is the next")
    refused(agreed.acceptor, tokens[1], "number 1001 came too early: others are missing; 1000 is the next")
    server = agreed.acceptor
    server.unwrap(tokens[0])
    refused(server, tokens[2], "others are missing")


@every_enctype
@both_protections
def test_own_tokens_sent_back(number: int, sealed: bool) -> None:
    """Also where the numbers would fit."""
    agreed = values(number, sealed=sealed, first=7, second=7)
    for side in (agreed.initiator, agreed.acceptor):
        refused(side, side.wrap(b"mine"), "own side")
    # Nor with the direction's bit turned: each direction has its own keys.
    token = bytearray(agreed.initiator.wrap(b"mine"))
    token[2] ^= 1
    refused(agreed.initiator, bytes(token), "checksum")


@every_enctype
def test_protection_is_as_agreed(number: int) -> None:
    sealed, signed = values(number), values(number, sealed=False)
    refused(sealed.acceptor, signed.initiator.wrap(b"in clear" * 9), "sealed")
    refused(sealed.initiator, signed.acceptor.wrap(b"in clear" * 9), "sealed")
    refused(signed.acceptor, sealed.initiator.wrap(b"secret"), "sealed")


@every_enctype
@both_protections
def test_the_key_is_as_agreed(number: int, sealed: bool) -> None:
    agreed = values(number, sealed=sealed)
    refused(agreed.acceptor, replace(agreed, acceptor_subkey=False).initiator.wrap(b"x"), "another key")
    refused(replace(agreed, acceptor_subkey=False).acceptor, agreed.initiator.wrap(b"x"), "another key")
    refused(agreed.acceptor, replace(agreed, key=bytes(len(agreed.key))).initiator.wrap(b"x"), "checksum")


@every_enctype
@both_protections
def test_what_is_no_token(number: int, sealed: bool) -> None:
    agreed = values(number, sealed=sealed)
    for start in (b"\x04\x04", b"\x60\x40", b"GE", b"\x05\x05"):
        refused(agreed.acceptor, start + agreed.initiator.wrap(bytes(40))[2:], "isn't a Wrap token")
    refused(agreed.acceptor, Forger(agreed, third=0).token(b"x", agreed.first), "isn't a Wrap token")
    for junk in (b"", b"\x05", bytes(15), bytes(16)):
        refused(agreed.acceptor, junk, "too short")
    refused(agreed.acceptor, bytes(200))


@every_enctype
@both_protections
def test_unknown_flags_are_ignored(number: int, sealed: bool) -> None:
    """RFC 4121 section 4.2.2; the peer itself has set them, or the checksum is wrong."""
    agreed = values(number, sealed=sealed)
    assert agreed.acceptor.unwrap(Forger(agreed, flags=0xF8).token(b"flags", agreed.first)) == b"flags"


@every_enctype
def test_filler_within_bounds(number: int) -> None:
    agreed = values(number)
    data = b"ten bytes."
    for filler in range(11):
        forger = Forger(agreed, filler=filler)
        assert agreed.acceptor.unwrap(forger.token(data, agreed.first)) == data[: 10 - filler]
    for filler in (11, 26, 27, 100, 0xFFFF):
        refused(agreed.acceptor, Forger(agreed, filler=filler).token(data, agreed.first), "are filler")


@every_enctype
def test_the_sealed_copy_of_the_header(number: int) -> None:
    agreed = values(number)
    assert agreed.acceptor.unwrap(Forger(agreed, sealed_rotation=28).token(b"x", agreed.first)) == b"x"
    refused(agreed.acceptor, Forger(agreed, sealed_number=1).token(b"x", agreed.first), "was sealed")
    # A header that is expected, and a copy with filler.
    token = bytearray(Forger(agreed, filler=1).token(b"xy", agreed.first))
    token[4:6] = bytes(2)
    refused(agreed.acceptor, bytes(token), "was sealed")


@every_enctype
def test_the_size_of_an_unsealed_token_s_checksum(number: int) -> None:
    agreed = values(number, sealed=False)
    token = agreed.initiator.wrap(bytes(100))
    for size in (0, 1, ENCTYPES[number].mac_size - 1, ENCTYPES[number].mac_size + 1, 116, 0xFFFF):
        refused(agreed.acceptor, token[:4] + size.to_bytes(2, "big") + token[6:], "checksum has")


@every_enctype
@both_protections
def test_a_rotation_by_the_whole_body_changes_nothing(number: int, sealed: bool) -> None:
    """RRC is protected by nothing; all it can do is nothing."""
    agreed = values(number, sealed=sealed)
    token = agreed.initiator.wrap(b"round")
    for times in (1, 2, 100):
        turned = token[:6] + (times * (len(token) - 16)).to_bytes(2, "big") + token[8:]
        assert agreed.acceptor.unwrap(turned) == b"round"


@every_enctype
@both_protections
def test_nothing_works_after_a_failure(number: int, sealed: bool) -> None:
    agreed = values(number, sealed=sealed)
    good = agreed.initiator.wrap(b"good")

    def wrong_type(side: Any) -> None:
        with pytest.raises(TypeError):
            side.wrap("text")

    def not_contiguous(side: Any) -> None:
        with pytest.raises((BufferError, ValueError, TypeError)):
            side.wrap(memoryview(bytes(100))[::2])

    def wrong_token(side: Any) -> None:
        with pytest.raises(FramingError):
            side.unwrap(good + b"!")

    def no_token(side: Any) -> None:
        with pytest.raises(TypeError):
            side.unwrap(None)

    for failure in (wrong_type, not_contiguous, wrong_token, no_token):
        side = agreed.acceptor
        failure(side)
        assert "lost" in repr(side)
        for _ in range(2):
            with pytest.raises(FramingError, match="earlier token has failed"):
                side.unwrap(good)
            with pytest.raises(FramingError, match="earlier token has failed"):
                side.wrap(b"")


@every_enctype
@both_protections
def test_secrets_aren_t_shown(number: int, sealed: bool) -> None:
    agreed = values(number, sealed=sealed)
    token = agreed.initiator.wrap(b"a secret message")
    shown = [repr(agreed.acceptor), str(agreed.acceptor)]
    for changed in (
        token[:-1],
        token[:-1] + b"!",
        token[:2] + b"\0" + token[3:],
        b"GET / HTTP/1.1 and so on" * 4,
    ):
        with pytest.raises(FramingError) as caught:
            agreed.acceptor.unwrap(changed)
        shown.append(repr(caught.value))
    for secret in (agreed.key, token[16:], b"GET / HTTP"):
        for start in range(len(secret) - 4):
            part = secret[start : start + 4]
            assert not any(part.hex() in text or repr(part)[2:-1] in text for text in shown)
    assert not hasattr(agreed.acceptor, "__dict__")


# ---- how it's made -------------------------------------------------------------------------------------------------


def test_supported_enctypes() -> None:
    assert [number for number in range(-200, 200) if supported_enctype(number)] == NUMBERS


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"enctype": 23}, "encryption type 23"),
        ({"key": bytes(31)}, "has 32 bytes, not 31"),
        ({"key": bytes(16)}, "has 32 bytes, not 16"),
        ({"first": -1}, "64 bits"),
        ({"second": 1 << 64}, "64 bits"),
    ],
)
def test_wrong_values(wrong: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        replace(values(18), **wrong).side(initiator=True)


def lucid(protocol: int = 1, enctype: int = 18, subkey: tuple[int, bytes] | None = None) -> Any:
    keys = SimpleNamespace(
        ctx_key_type=enctype,
        ctx_key=bytes(range(32)),
        acceptor_subkey_type=subkey[0] if subkey else None,
        acceptor_subkey=subkey[1] if subkey else None,
    )
    return SimpleNamespace(
        version=1,
        protocol=protocol,
        cfx_kd=keys if protocol else None,
        is_initiator=True,
        send_seq=5,
        recv_seq=6,
    )


def test_exported_contexts_that_are_refused() -> None:
    with pytest.raises(AuthenticationError, match="RFC 1964"):
        KerberosProtection.from_lucid(lucid(protocol=0), sealed=True)
    with pytest.raises(AuthenticationError, match="encryption type 23"):
        KerberosProtection.from_lucid(lucid(enctype=23), sealed=True)
    with pytest.raises(AuthenticationError, match="encryption type 26"):
        KerberosProtection.from_lucid(lucid(subkey=(26, bytes(32))), sealed=True)


def test_exported_contexts_with_and_without_a_subkey() -> None:
    without = KerberosProtection.from_lucid(lucid(), sealed=True)
    shared = {"initiator": False, "send_sequence": 6, "receive_sequence": 5, "sealed": True}
    other = KerberosProtection(enctype=18, key=bytes(range(32)), acceptor_subkey=False, **shared)  # type: ignore[arg-type]
    assert other.unwrap(without.wrap(b"session key")) == b"session key"
    with_one = KerberosProtection.from_lucid(lucid(subkey=(19, bytes(16))), sealed=True)
    other = KerberosProtection(enctype=19, key=bytes(16), acceptor_subkey=True, **shared)  # type: ignore[arg-type]
    assert other.unwrap(with_one.wrap(b"subkey")) == b"subkey"


# ---- MIT krb5 ------------------------------------------------------------------------------------------------------

BY_NUMBER = {number: name for name, (_, number) in REALM_ENCTYPES.items()}


class Meeting:
    """Contexts between a user and a service, in a realm of one enctype."""

    def __init__(self, realms: Callable[[str], Realm]) -> None:
        self._realms = realms

    def contexts(self, number: int, *, mutual: bool = True) -> tuple[Any, Any]:
        """(an initiator's, an acceptor's) that are complete."""
        gssapi = importlib.import_module("gssapi")
        realm = self._realms(BY_NUMBER[number])
        wanted = gssapi.RequirementFlag
        flags = wanted.confidentiality | wanted.integrity
        flags |= wanted.replay_detection | wanted.out_of_sequence_detection
        if mutual:
            flags |= wanted.mutual_authentication
        with realm.applied():
            name = gssapi.Name(f"{realm.services[0]}@{realm.name}", gssapi.NameType.kerberos_principal)
            initiator = gssapi.SecurityContext(name=name, flags=flags, usage="initiate")
            acceptor = gssapi.SecurityContext(usage="accept")
            reply = acceptor.step(initiator.step())
            if mutual:
                initiator.step(reply)
        assert initiator.complete
        assert acceptor.complete
        return initiator, acceptor

    def mixed(self, number: int, *, we_initiate: bool, sealed: bool) -> tuple[KerberosProtection, Any]:
        """(ours, MIT's) of one context."""
        initiator, acceptor = self.contexts(number)
        ours, theirs = (initiator, acceptor) if we_initiate else (acceptor, initiator)
        made = KerberosProtection.from_lucid(exported(ours), sealed=sealed)
        assert made.enctype == number
        return made, theirs


def exported(context: Any) -> Any:
    """A context's keys and numbers; it can't be used any more."""
    return importlib.import_module("gssapi").raw.ext_krb5.krb5_export_lucid_sec_context(context, 1)


@pytest.fixture(scope="module")
def meeting(realms: Callable[[str], Realm]) -> Meeting:
    return Meeting(realms)


def unwrapped(context: Any, token: bytes) -> tuple[bytes, bool]:
    found = context.unwrap(token)
    return found.message, found.encrypted


both_roles = pytest.mark.parametrize("we_initiate", [True, False], ids=["initiator", "acceptor"])


@every_enctype
@both_roles
@both_protections
def test_all_sizes_with_mit(meeting: Meeting, number: int, we_initiate: bool, sealed: bool) -> None:
    ours, theirs = meeting.mixed(number, we_initiate=we_initiate, sealed=sealed)
    data = os.urandom(max(SIZES))
    for size in SIZES:
        message = data[:size]
        token = ours.wrap(message)
        assert unwrapped(theirs, token) == (message, sealed)
        wrapped = theirs.wrap(message, sealed)
        assert wrapped.encrypted is sealed
        assert len(wrapped.message) == len(token)
        assert ours.unwrap(wrapped.message) == message


@every_enctype
@both_roles
@both_protections
def test_without_a_subkey_of_the_acceptor_s(
    meeting: Meeting, number: int, we_initiate: bool, sealed: bool
) -> None:
    """There's none where the acceptor hasn't answered."""
    ours, theirs = meeting.contexts(number, mutual=False)
    if not we_initiate:
        ours, theirs = theirs, ours
    lucid_context = exported(ours)
    assert lucid_context.cfx_kd.acceptor_subkey is None
    made = KerberosProtection.from_lucid(lucid_context, sealed=sealed)
    for size in range(40):
        assert unwrapped(theirs, made.wrap(bytes(size))) == (bytes(size), sealed)
        assert made.unwrap(theirs.wrap(bytes(size), sealed).message) == bytes(size)


@every_enctype
@both_roles
@both_protections
def test_mit_takes_filler_and_rotation(
    meeting: Meeting, number: int, we_initiate: bool, sealed: bool
) -> None:
    """So what we take of the kind is what was meant."""
    ours, theirs = meeting.contexts(number)
    if not we_initiate:
        ours, theirs = theirs, ours
    lucid_context = exported(ours)
    keys = lucid_context.cfx_kd
    agreed = Values(number, keys.acceptor_subkey or keys.ctx_key, keys.acceptor_subkey is not None, sealed)
    position = lucid_context.send_seq
    for size in (0, 1, 15, 16, 17, 100):
        for filler in (0, 1, 16, 300) if sealed else (0,):
            for rotation in (0, 1, 12, 28, 60, 1000, 0xFFFF):
                forger = Forger(agreed, initiator=we_initiate, filler=filler, rotation=rotation)
                message = os.urandom(size)
                assert unwrapped(theirs, forger.filled(message, position)) == (message, sealed)
                position += 1


@every_enctype
@both_roles
def test_mit_s_unsealed_token_on_a_sealed_connection(
    meeting: Meeting, number: int, we_initiate: bool
) -> None:
    ours, theirs = meeting.mixed(number, we_initiate=we_initiate, sealed=True)
    refused(ours, theirs.wrap(bytes(100), False).message, "sealed")


@every_enctype
@both_protections
def test_mit_s_tokens_changed_or_out_of_order(meeting: Meeting, number: int, sealed: bool) -> None:
    ours, theirs = meeting.mixed(number, we_initiate=False, sealed=sealed)
    first, second = (theirs.wrap(data, sealed).message for data in (b"first", b"second"))
    assert ours.unwrap(first) == b"first"
    refused(ours, first, "repeated")
    ours, theirs = meeting.mixed(number, we_initiate=False, sealed=sealed)
    theirs.wrap(b"dropped", sealed)
    refused(ours, theirs.wrap(b"kept", sealed).message, "missing")
    ours, theirs = meeting.mixed(number, we_initiate=False, sealed=sealed)
    refused(ours, second)
