from __future__ import annotations
import ssl
from typing import Any
Pump = Any
class StdlibPump:
    def __init__(self, context, server_side, server_hostname, session):
        self._in = ssl.MemoryBIO(); self._out = ssl.MemoryBIO()
        self.ssl_object = context.wrap_bio(self._in, self._out, server_side, server_hostname, session)
    def handshake(self, data):
        self._in.write(data)
        try: self.ssl_object.do_handshake()
        except ssl.SSLWantReadError: return False
        return True
    def decrypt(self, data, plaintext):
        incoming = self._in; incoming.write(data); read = self.ssl_object.read; pending = self.ssl_object.pending
        while True:
            try:
                piece = read(16384)
            except ssl.SSLWantReadError: return True
            except ssl.SSLZeroReturnError: return False
            if not piece: return False
            plaintext.append(piece)
            if not incoming.pending and not pending(): return True
    def encrypt(self, data):
        size = len(data)
        try: sent = self.ssl_object.write(data)
        except ssl.SSLWantReadError: return 0
        if sent == size: return size
        view = memoryview(data)
        while sent < size:
            try: sent += self.ssl_object.write(view[sent:])
            except ssl.SSLWantReadError: return sent
        return sent
    def outgoing(self):
        return self._out.read() if self._out.pending else b""
    def close(self):
        try: self.ssl_object.unwrap()
        except ssl.SSLWantReadError: pass
        except ssl.SSLError as e:
            if e.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY": raise
def make_pump(*a): return StdlibPump(*a)
