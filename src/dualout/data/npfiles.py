"""Arrays in .npy and .npz files, mapped where they lie uncompressed; nothing is ever unpickled."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from dualout.errors import InputError
from dualout.machine import memory

_LOCAL_HEADER = struct.Struct("<4s22xHH")


def npy_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped.

    Raises:
        InputError: when it is none, or is truncated.
    """
    with _explained(path):
        _check_start(path, npy.MAGIC_PREFIX, "a .npy file")
        return np.load(path, mmap_mode="r", allow_pickle=False)


def npz_arrays(path: Path) -> dict[str, zipfile.ZipInfo]:
    """The arrays in a .npz file, by name; none is read.

    Raises:
        InputError: when it is no such file.
    """
    with _explained(path), zipfile.ZipFile(path) as archive:
        return {info.filename.removesuffix(".npy"): info for info in archive.infolist()}


def npz_array(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    """One array of a .npz file: mapped if it is stored as it is (`numpy.savez`), else read into memory.

    Raises:
        InputError: when it is damaged, or too large for this machine's memory.
    """
    with _explained(path, info.filename):
        if info.compress_type == zipfile.ZIP_STORED and not info.flag_bits & 1:
            return _mapped(path, info)
        most = memory()
        if most and info.file_size > most:
            raise InputError(
                f"{info.filename} in {path} takes {info.file_size / 2**30:.1f} GiB in memory, this machine has "
                f"{most / 2**30:.1f}; store it uncompressed (numpy.savez), then it is mapped from the file"
            )
        with zipfile.ZipFile(path) as archive, archive.open(info) as stream:
            return npy.read_array(stream, allow_pickle=False)


def _mapped(path: Path, info: zipfile.ZipInfo) -> np.ndarray:
    with path.open("rb") as file:
        file.seek(info.header_offset)
        magic, name, extra = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
        if magic != b"PK\3\4":
            raise ValueError("its zip directory is wrong")
        start = file.seek(info.header_offset + _LOCAL_HEADER.size + name + extra)
        version = npy.read_magic(file)
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read_header(file)
        if dtype.hasobject:
            raise ValueError("it holds Python objects, which are never loaded")
        offset = file.tell()
    if offset + int(np.prod(shape, dtype=object)) * dtype.itemsize > start + info.file_size:
        raise ValueError(f"it is shorter than its shape {shape} says")
    if 0 in shape:
        return np.empty(shape, dtype)
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran else "C")


def _check_start(path: Path, magic: bytes, what: str) -> None:
    with path.open("rb") as file:
        start = file.read(len(magic))
    if start != magic:
        raise InputError(f"{path} is not {what}: it begins with {start.hex(' ') or 'nothing'}")


@contextmanager
def _explained(path: Path, member: str = "") -> Iterator[None]:
    where = f"{member} in {path}" if member else str(path)
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"no file at {path}") from error
    except zipfile.BadZipFile as error:
        raise InputError(f"{where} is damaged or no .npz file: {error}") from error
    except MemoryError as error:
        raise InputError(f"{where} is too large for this machine's memory") from error
    except Exception as error:  # the parsers of zip, deflate and npy raise whatever damaged bytes lead them to
        raise InputError(f"{where} cannot be read: {error or type(error).__name__}") from error
