"""A stored image as a file of its own, read piece by piece: what nobody asks for is not read.

In: ImageRef   Out: a binary file, positioned at the image's first byte   Next: decode.py
Reasons: image_missing, image_unreadable, image_empty.
"""

from __future__ import annotations

import io
import os
import stat
from typing import Any, BinaryIO, cast

from sicog_mcore.data.sample import ImageRef
from sicog_mcore.errors import SampleError

MAX_FILE_BYTES = 1 << 30
FIRST_BYTES = 4096  # of a file, read in one go: most headers end here


def open_range(ref: ImageRef) -> BinaryIO:
    """Opens an image; the file must be closed, as any other.

    Raises:
        SampleError: image_missing; image_unreadable (no regular file, no permission, too many bytes, shard became
            shorter), also where reading fails later; image_empty.
    """
    try:
        status = os.stat(ref.path)  # before it is opened: a pipe would wait for its writer
        length = status.st_size if ref.length < 0 else ref.length
        if not stat.S_ISREG(status.st_mode) or length > MAX_FILE_BYTES:
            detail = f"{ref.path} is no regular file of at most {MAX_FILE_BYTES} bytes; check the row"
            raise SampleError("image_unreadable", detail)
        descriptor = os.open(ref.path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError) as error:
        detail = f"no file {ref.path}; check the row and the images folder of its source"
        raise SampleError("image_missing", detail) from error
    except (OSError, ValueError) as error:
        raise SampleError("image_unreadable", f"{ref.path}: {error}") from error
    found = max(0, min(length, status.st_size - ref.offset))
    if not length or found < length:
        os.close(descriptor)
        if not length:
            raise SampleError("image_empty", f"{ref.path} has no bytes")
        raise SampleError("image_unreadable", f"{ref.path}: found {found} bytes at {ref.offset}, expected {length}")
    return cast(BinaryIO, io.BufferedReader(_Range(descriptor, ref, length), FIRST_BYTES))


class _Range(io.RawIOBase):
    """Bytes ``offset`` to ``offset + length`` of an open file, which it closes."""

    def __init__(self, descriptor: int, ref: ImageRef, length: int) -> None:
        self._descriptor, self._ref, self._length = descriptor, ref, length
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise ValueError(f"position {start + offset} is in front of the image")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), max(0, self._length - self._at))
        if not wanted:
            return 0
        try:
            data = os.pread(self._descriptor, wanted, self._ref.offset + self._at)
        except OSError as error:
            raise SampleError("image_unreadable", f"{self._ref.path}: {error}") from error
        if not data:  # the file has become shorter since it was opened
            detail = f"found {self._at} bytes at {self._ref.offset}, expected {self._length}"
            raise SampleError("image_unreadable", f"{self._ref.path}: {detail}")
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            os.close(self._descriptor)
        super().close()
