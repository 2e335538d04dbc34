"""Peers on .NET's own NegotiateStream: ``negotiate_peer.py 8`` or ``3.1``; see ``negotiate_peers.py``.

Tasks come as lines of JSON on the standard input, answers go as lines of JSON to the standard output: a runtime takes
seconds to start, so one process does many tasks, one after the other.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

FRAMEWORKS = {"8": ("net8.0", "8.0.0"), "3.1": ("netcoreapp3.1", "3.1.0")}


def root_of(runtime: str) -> Path:
    """Where a runtime's ``dotnet`` lies."""
    package, folders = {"8": ("dnv", ("net", "runtime", ".net")), "3.1": ("dotnetcore2", ("bin",))}[runtime]
    spec = importlib.util.find_spec(package)
    assert spec is not None
    return Path(next(iter(spec.submodule_search_locations or []))).joinpath(*folders)


def start_runtime(runtime: str) -> None:
    moniker, version = FRAMEWORKS[runtime]
    options = {
        "tfm": moniker,
        "framework": {"name": "Microsoft.NETCore.App", "version": version},
        "configProperties": {"System.Globalization.Invariant": True},
    }
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "runtimeconfig.json"
        config.write_text(json.dumps({"runtimeOptions": options}))
        from clr_loader import get_coreclr
        from pythonnet import load

        load(get_coreclr(runtime_config=str(config), dotnet_root=str(root_of(runtime))))
        import clr

    for name in (
        "System.Net.Security",
        "System.Net.Sockets",
        "System.Net.Primitives",
        "System.Security.Principal",
    ):
        clr.AddReference(name)


def connection(task: dict[str, Any]) -> Any:
    """The task's connection: made, or waited for; a server tells its port first."""
    from System.Net import IPAddress
    from System.Net.Sockets import TcpClient, TcpListener

    if task["role"] == "client":
        return TcpClient("127.0.0.1", task["port"])
    listener = TcpListener(IPAddress.Loopback, 0)
    listener.Start()
    tell(port=listener.LocalEndpoint.Port)
    client = listener.AcceptTcpClient()
    listener.Stop()
    return client


def authenticate(stream: Any, task: dict[str, Any]) -> None:
    from System.Net import CredentialCache, NetworkCredential
    from System.Net.Security import ProtectionLevel
    from System.Security.Principal import TokenImpersonationLevel

    protection = getattr(ProtectionLevel, task["protection"])
    impersonation = getattr(TokenImpersonationLevel, task["impersonation"])
    credential = CredentialCache.DefaultNetworkCredentials
    if task.get("user"):
        credential = NetworkCredential(task["user"], task["password"], task["domain"])
    if task["role"] == "client":
        stream.AuthenticateAsClient(credential, task["target"], protection, impersonation)
    else:
        stream.AuthenticateAsServer(credential, protection, impersonation)


def transfer(stream: Any, task: dict[str, Any]) -> tuple[int, str]:
    """Sends the payload in writes of the given size, and reads as many bytes as it's told to expect."""
    from System import Array, Byte

    payload = Path(task["payload"]).read_bytes()
    size = task["write"]
    for position in range(0, len(payload), size):
        stream.Write(
            Array[Byte](payload[position : position + size]), 0, len(payload[position : position + size])
        )
    stream.Flush()
    buffer = Array.CreateInstance(Byte, 65536)
    digest, received = hashlib.sha256(), 0
    while received < task["expect"] and (count := stream.Read(buffer, 0, buffer.Length)):
        digest.update(bytes(buffer)[:count])
        received += count
    return received, digest.hexdigest()


def work(task: dict[str, Any]) -> None:
    from System import Exception as DotNetException
    from System.Net.Security import NegotiateStream

    client = connection(task)
    stream = NegotiateStream(client.GetStream(), False)
    try:
        authenticate(stream, task)
        identity = stream.RemoteIdentity
        facts = {
            "mutual": stream.IsMutuallyAuthenticated,
            "encrypted": stream.IsEncrypted,
            "signed": stream.IsSigned,
            "impersonation": str(stream.ImpersonationLevel),
            "name": identity.Name,
            "type": identity.AuthenticationType,
        }
        received, digest = transfer(stream, task)
        tell(received=received, sha256=digest, **facts)
    except DotNetException as exc:
        tell(failed=type(exc).__name__, message=str(exc.Message))
    finally:
        stream.Dispose()
        client.Close()


def tell(**fields: Any) -> None:
    print(json.dumps(fields), flush=True)


def main() -> None:
    start_runtime(sys.argv[1])
    tell(ready=True)
    for line in sys.stdin:
        work(json.loads(line))


if __name__ == "__main__":
    main()
