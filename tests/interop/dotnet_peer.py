"""A peer on .NET's own SslStream: ``dotnet_peer.py JSON``; see ``peers.py``. Runs in a process of its own."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

RUNTIME = {
    "runtimeOptions": {
        "tfm": "net8.0",
        "framework": {"name": "Microsoft.NETCore.App", "version": "8.0.0"},
        "configProperties": {"System.Globalization.Invariant": True},
    }
}


def start_runtime() -> None:
    spec = importlib.util.find_spec("dnv")
    assert spec is not None
    root = Path(next(iter(spec.submodule_search_locations or []))) / "net" / "runtime" / ".net"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "runtimeconfig.json"
        config.write_text(json.dumps(RUNTIME))
        from clr_loader import get_coreclr
        from pythonnet import load

        load(get_coreclr(runtime_config=str(config), dotnet_root=str(root)))
        import clr

    for name in (
        "System.Net.Security",
        "System.Net.Sockets",
        "System.Net.Primitives",
        "System.Security.Cryptography",
    ):
        clr.AddReference(name)


def accept(task: dict[str, Any]) -> Any:
    from System.Net import IPAddress
    from System.Net.Sockets import TcpListener

    listener = TcpListener(IPAddress.Loopback, 0)
    listener.Start()
    print("READY", listener.LocalEndpoint.Port, flush=True)
    client = listener.AcceptTcpClient()
    listener.Stop()
    return client


def connect(task: dict[str, Any]) -> Any:
    from System.Net.Sockets import TcpClient

    return TcpClient("127.0.0.1", task["port"])


def secure(client: Any, task: dict[str, Any]) -> Any:
    from System.Net.Security import RemoteCertificateValidationCallback, SslStream
    from System.Security.Authentication import SslProtocols
    from System.Security.Cryptography.X509Certificates import (
        X509Certificate2,
        X509CertificateCollection,
        X509Chain,
        X509ChainTrustMode,
        X509RevocationMode,
    )

    authority = X509Certificate2(task["ca"])

    def verify(sender: Any, certificate: Any, chain: Any, errors: Any) -> bool:
        if certificate is None:
            return not task["mutual"] and task["role"] == "server"
        ours = X509Chain()
        ours.ChainPolicy.TrustMode = X509ChainTrustMode.CustomRootTrust
        ours.ChainPolicy.CustomTrustStore.Add(authority)
        ours.ChainPolicy.RevocationMode = X509RevocationMode.NoCheck
        return bool(ours.Build(X509Certificate2(certificate)))

    version = SslProtocols.Tls13 if task["version"] == "TLSv1.3" else SslProtocols.Tls12
    certificate = X509Certificate2(task["pfx"], "interop")
    stream = SslStream(client.GetStream(), False, RemoteCertificateValidationCallback(verify))
    if task["role"] == "server":
        stream.AuthenticateAsServer(certificate, task["mutual"], version, False)
    else:
        certificates = X509CertificateCollection()
        if task["mutual"]:
            certificates.Add(certificate)
        stream.AuthenticateAsClient(task["name"], certificates, version, False)
    return stream


def transfer(stream: Any, task: dict[str, Any]) -> tuple[int, str]:
    from System import Array, Byte

    stream.Write(Array[Byte](Path(task["payload"]).read_bytes()))
    stream.Flush()
    buffer = Array.CreateInstance(Byte, 65536)
    digest, received = hashlib.sha256(), 0
    while count := stream.Read(buffer, 0, buffer.Length):
        digest.update(bytes(buffer)[:count])
        received += count
    return received, digest.hexdigest()


def main(task: dict[str, Any]) -> None:
    start_runtime()
    client = (accept if task["role"] == "server" else connect)(task)
    stream = secure(client, task)
    received, digest = transfer(stream, task)
    print(
        json.dumps(
            {
                "version": str(stream.SslProtocol),
                "cipher": str(stream.NegotiatedCipherSuite),
                "received": received,
                "sha256": digest,
            }
        ),
        flush=True,
    )
    stream.ShutdownAsync().Wait()
    client.Close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
