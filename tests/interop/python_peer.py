"""A peer on CPython's blocking TLS sockets: ``python_peer.py JSON``; see ``peers.py``."""

from __future__ import annotations

import hashlib
import json
import socket
import ssl
import sys
from pathlib import Path
from typing import Any


def context_of(task: dict[str, Any]) -> ssl.SSLContext:
    server = task["role"] == "server"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    version = {"TLSv1.2": ssl.TLSVersion.TLSv1_2, "TLSv1.3": ssl.TLSVersion.TLSv1_3}[task["version"]]
    context.minimum_version = context.maximum_version = version
    context.load_verify_locations(task["ca"])
    if server or task["mutual"]:
        context.load_cert_chain(task["chain"], task["key"])
    if server and task["mutual"]:
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def raw_socket(task: dict[str, Any]) -> socket.socket:
    if task["role"] == "client":
        return socket.create_connection(("127.0.0.1", task["port"]))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print("READY", listener.getsockname()[1], flush=True)
        return listener.accept()[0]


def main(task: dict[str, Any]) -> None:
    server = task["role"] == "server"
    name = None if server else task["name"]
    with context_of(task).wrap_socket(raw_socket(task), server_side=server, server_hostname=name) as tls:
        tls.sendall(Path(task["payload"]).read_bytes())
        digest, received = hashlib.sha256(), 0
        while data := tls.recv(65536):
            digest.update(data)
            received += len(data)
        cipher = tls.cipher()
        assert cipher is not None
        answer = {
            "version": tls.version(),
            "cipher": cipher[0],
            "received": received,
            "sha256": digest.hexdigest(),
        }
        tls.unwrap()
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
