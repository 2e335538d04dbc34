"""Files of text: decoder and encoder over a file of bytes."""

from __future__ import annotations

import asyncio
import codecs
import io
import os
from collections import deque
from collections.abc import AsyncIterator, Iterable
from typing import Any

from headrace.files._binary import AsyncFile, BinaryFile, collect_lines

TEXT_CHUNK = 16 * 1024


class TextFile(AsyncFile):
    """A file of text; made by :func:`open`. Its ``buffer`` is the :class:`BinaryFile` under it.

    Encoding, errors and newlines are what they are for the built-in ``open``. Positions are opaque numbers from
    :meth:`tell`. Between reading and writing there must be a ``seek``.
    """

    def __init__(
        self, buffer: BinaryFile, encoding: str, errors: str, newline: str | None, line_buffering: bool
    ) -> None:
        self.buffer = buffer
        self._encoding = encoding
        self._errors = errors
        self._newline = newline
        self._line_buffering = line_buffering
        plain: codecs.IncrementalDecoder | io.IncrementalNewlineDecoder
        plain = codecs.getincrementaldecoder(encoding)(errors)
        # Besides translating it sees to it that no "\r\n" is torn apart.
        self._decoder = plain if newline else io.IncrementalNewlineDecoder(plain, translate=newline is None)
        self._encoder = codecs.getincrementalencoder(encoding)(errors)
        if buffer.writable() and buffer._position:
            self._encoder.setstate(0)  # a byte order mark stands at the beginning only
        self._text = ""  # decoded already, and used up to `_used`
        self._used = 0
        # Where pieces of `_text` begin: (index, position in the file, state of the decoder).
        self._marks: deque[tuple[int, int, int]] = deque()
        self._lock = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<headrace.files.TextFile name={self.name!r} mode={self.mode!r} encoding={self._encoding!r}>"

    @property
    def name(self) -> Any:
        """The path, or the descriptor, that it was opened with."""
        return self.buffer.name

    @property
    def mode(self) -> str:
        """The mode of the file of bytes, without its ``b``."""
        return self.buffer.mode.replace("b", "")

    @property
    def closed(self) -> bool:
        """Whether :meth:`aclose` was called."""
        return self.buffer.closed

    @property
    def encoding(self) -> str:
        """The name of the encoding."""
        return self._encoding

    @property
    def errors(self) -> str:
        """How errors of encoding and decoding are handled."""
        return self._errors

    def fileno(self) -> int:
        """The descriptor. Don't close it, and don't move its position."""
        return self.buffer.fileno()

    def readable(self) -> bool:
        """Whether it was opened for reading."""
        return self.buffer.readable()

    def writable(self) -> bool:
        """Whether it was opened for writing."""
        return self.buffer.writable()

    def seekable(self) -> bool:
        """Whether it has positions."""
        return self.buffer.seekable()

    def isatty(self) -> bool:
        """Whether it's a terminal."""
        return self.buffer.isatty()

    # ---- reading --------------------------------------------------------------------------------------------

    async def read(self, size: int | None = -1) -> str:
        """The next `size` characters: fewer, or none, only at the end of the file. By default all that follow."""
        self.buffer._check_readable()
        async with self._lock:
            if size is None or size < 0:
                return await self._read_all()
            while (missing := size - (len(self._text) - self._used)) > 0:
                # A character has at least one byte: this many will be needed.
                if not await self._decode_more(missing):
                    break
            return self._take(size)

    async def _read_all(self) -> str:
        data = await self.buffer.read()
        text = self._text[self._used :] + self._decoder.decode(data, final=True)
        self._text, self._used = "", 0
        self._marks.clear()
        return text

    async def readline(self, limit: int = -1) -> str:
        """The next line with its end, or at most `limit` characters of it; empty at the end of the file."""
        self.buffer._check_readable()
        if not self._lock.locked() and limit < 0:
            end = self._line_end(self._used)
            if end:
                return self._take(end - self._used)
        async with self._lock:
            seen = 0
            while True:
                end = self._line_end(self._used + seen)
                length = (end or len(self._text)) - self._used
                if 0 <= limit <= length:
                    return self._take(limit)
                if end:
                    return self._take(length)
                seen = max(length - 1, 0)  # a line end of two characters may be half there
                # A long line is fetched in ever larger pieces; a stream might not have them.
                if not await self._decode_more(seen if self.seekable() else 0):
                    return self._take(len(self._text) - self._used)

    def _line_end(self, start: int) -> int:
        """The index behind the first line end from `start` on; 0 when there is none."""
        if self._newline is None:
            return self._text.find("\n", start) + 1
        if self._newline:
            found = self._text.find(self._newline, start)
            return found + len(self._newline) if found >= 0 else 0
        line_feed = self._text.find("\n", start)
        carriage = self._text.find("\r", start, line_feed if line_feed >= 0 else len(self._text))
        if carriage < 0:
            return line_feed + 1
        return carriage + (2 if self._text.startswith("\r\n", carriage) else 1)

    async def readlines(self, hint: int = -1) -> list[str]:
        """The lines that follow: all, or until they have `hint` characters."""
        return await collect_lines(self, hint)

    def __aiter__(self) -> AsyncIterator[str]:
        self.buffer._check_readable()
        return self

    async def __anext__(self) -> str:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def _decode_more(self, wanted: int = 0) -> bool:
        """Decodes some more of the file, if `wanted` is large as many bytes; False at its end."""
        file = self.buffer
        data = await (file.read(wanted) if wanted > TEXT_CHUNK else file.read1(TEXT_CHUNK))
        held, state = self._decoder.getstate()
        position = file._position - len(data) - len(held)
        text = self._decoder.decode(data, final=not data)
        self._text = self._text[self._used :]
        while len(self._marks) > 1 and self._marks[1][0] <= self._used:
            self._marks.popleft()
        self._marks = deque((index - self._used, *rest) for index, *rest in self._marks)  # type: ignore[misc]
        self._used = 0
        self._marks.append((len(self._text), position, state))
        self._text += text
        return bool(data)

    def _take(self, count: int) -> str:
        text = self._text[self._used : self._used + count]
        self._used += count
        return text

    # ---- writing --------------------------------------------------------------------------------------------

    async def write(self, text: str) -> int:
        """Writes a text; returns its length in characters. Buffered, as :meth:`BinaryFile.write`."""
        self.buffer._check_writable()
        if not isinstance(text, str):
            raise TypeError(f"a text file is written str, not {type(text).__name__}")
        async with self._lock:
            out = text.replace("\n", self._newline) if self._newline in ("\r", "\r\n") else text
            self._forget_text()
            await self.buffer.write(self._encoder.encode(out))
            if self._line_buffering and ("\n" in text or "\r" in text):
                await self.buffer.flush()
            return len(text)

    async def writelines(self, lines: Iterable[str]) -> None:
        """Writes each of them; nothing is put in between."""
        for line in lines:
            await self.write(line)

    async def flush(self) -> None:
        """Writes what was collected, so that other processes see it."""
        await self.buffer.flush()

    async def fsync(self, data_only: bool = False) -> None:
        """:meth:`flush`, and on to the disk: fsync(2), or with `data_only` fdatasync(2)."""
        await self.buffer.fsync(data_only)

    async def truncate(self, size: int | None = None) -> int:
        """Makes the file `size` bytes long, by default as long as the position; returns that."""
        return await self.buffer.truncate(await self.tell() if size is None else size)

    # ---- the position ---------------------------------------------------------------------------------------

    async def tell(self) -> int:
        """The position, as an opaque number for :meth:`seek`; 0 is the beginning."""
        self.buffer._check_open()
        async with self._lock:
            return await self._tell()

    async def _tell(self) -> int:
        """A position in bytes, and if need be a decoder's state (above bit 64) and characters to skip (above 128)."""
        mark = None
        for candidate in self._marks:
            if candidate[0] <= self._used:
                mark = candidate
        if mark is None:
            return await self.buffer.tell()
        self.buffer._check_seekable()
        index, position, state = mark
        held, now = self._decoder.getstate()
        if self._used == len(self._text) and not held and not now:
            return await self.buffer.tell()
        return position | state << 64 | (self._used - index) << 128

    async def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Moves to 0, to a position that :meth:`tell` returned, or by 0 from the end or from here."""
        file = self.buffer
        file._check_open()
        file._check_seekable()
        if whence != os.SEEK_SET and offset:
            raise io.UnsupportedOperation(
                "a text file can only seek to a told position, or by 0 from the end"
            )
        if offset < 0:
            raise ValueError(f"negative seek position {offset}")
        async with self._lock:
            if whence == os.SEEK_CUR:
                return await self._tell()
            if whence not in (os.SEEK_SET, os.SEEK_END):
                raise ValueError(f"whence must be 0 to 2, not {whence}")
            position, state, skip = offset & (1 << 64) - 1, offset >> 64 & (1 << 64) - 1, offset >> 128
            position = await file.seek(position, whence)
            self._forget_text()
            if whence == os.SEEK_SET and offset:  # state 0 isn't always that of the beginning: UTF-16
                self._decoder.setstate((b"", state))
            if position:
                self._encoder.setstate(0)
            else:
                self._encoder.reset()
            while len(self._text) < skip and await self._decode_more():
                pass
            self._used = min(skip, len(self._text))
            return offset if whence == os.SEEK_SET else position

    def _forget_text(self) -> None:
        self._text, self._used = "", 0
        self._marks.clear()
        self._decoder.reset()

    async def aclose(self) -> None:
        """Writes what is buffered, then closes: see :meth:`BinaryFile.aclose`."""
        await self.buffer.aclose()
