"""Reads the lazy-load database of an installed R package (data/Rdata.rdx and Rdata.rdb).

Only what a data set of text needs: character vectors and the lists around them, in R's XDR
serialisation (R Internals, section 1.8 "Serialization Formats"). Factors, numbers and attributes
are stepped over. `variables(folder)` gives {name: list of strings}.
"""

import bz2
import lzma
import struct
import zlib
from pathlib import Path


def variables(folder):
    """{variable: its strings, in order}, of the R package whose `data` folder this is."""
    index = _Reader(_inflate_file(Path(folder, "Rdata.rdx").read_bytes())).value()
    database = Path(folder, "Rdata.rdb").read_bytes()
    out = {}
    for name, (offset, length) in index["variables"].items():
        out[name] = _strings(_Reader(_inflate_entry(database[offset : offset + length])).value())
    return out


def _inflate_file(raw):
    for unpack in (lambda b: zlib.decompress(b, 47), bz2.decompress, lzma.decompress):
        try:
            return unpack(raw)
        except (zlib.error, OSError, lzma.LZMAError):
            continue
    return raw


def _inflate_entry(raw):
    """A database entry: big-endian size when unpacked, then zlib, or a method letter and its data."""
    (size,) = struct.unpack(">I", raw[:4])
    method = raw[4:5]
    if method == b"2":
        data = bz2.decompress(raw[5:])
    elif method == b"Z":
        filters = [{"id": lzma.FILTER_LZMA2, "preset": 6}]
        data = lzma.decompress(raw[5:], lzma.FORMAT_RAW, filters=filters)
    else:
        data = zlib.decompress(raw[4:])
    if len(data) != size:
        raise ValueError(f"R database entry unpacks to {len(data)} bytes, its header says {size}")
    return data


def _strings(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return [s for v in value for s in _strings(v)]
    return []


class _Reader:
    """One pass over R's XDR serialisation, version 2 or 3."""

    def __init__(self, data):
        self.data, self.at, self.references = data, 0, []
        if self.take(2) != b"X\n":
            raise ValueError("not R's XDR serialisation")
        version = self.int()
        self.take(8)  # the R versions that wrote it and that can read it
        if version == 3:
            self.take(self.int())  # the native encoding's name

    def take(self, n):
        piece = self.data[self.at : self.at + n]
        if len(piece) != n:
            raise ValueError("R serialisation ends early")
        self.at += n
        return piece

    def int(self):
        return struct.unpack(">i", self.take(4))[0]

    def value(self):
        flags = self.int()
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        if kind in (0xFE, 0xFD, 0xFB, 0xFA, 0xF2):  # NULL, global/missing/base environments
            return None
        if kind == 0xFF:  # a reference to something seen before
            return self.references[(flags >> 8 or self.int()) - 1]
        if kind == 0xEE:  # ALTREP: info, state, attributes
            _, state, _ = self.value(), self.value(), self.value()
            return state
        if kind == 1:  # symbol
            self.references.append(self.value())
            return self.references[-1]
        if kind == 9:  # one string
            n = self.int()
            return None if n < 0 else self.take(n).decode("utf-8", "replace")
        if kind == 2:  # pairlist cell: attributes, tag, value, rest; read in a loop, it is long
            items = []
            while True:
                if has_attributes:
                    self.value()
                tag = self.value() if has_tag else None
                items.append((tag, self.value()))
                flags = self.int()
                if flags & 0xFF != 2:
                    if flags & 0xFF != 0xFE:
                        raise ValueError(f"R pairlist ends in kind {flags & 0xFF}, not NULL")
                    return items
                has_attributes, has_tag = flags & 0x200, flags & 0x400
        if kind in (10, 13):  # logical, integer (factor codes)
            out = list(struct.unpack(f">{(n := self.int())}i", self.take(4 * n)))
        elif kind == 14:  # double
            out = list(struct.unpack(f">{(n := self.int())}d", self.take(8 * n)))
        elif kind in (16, 19, 20):  # character vector, list, expression
            out = [self.value() for _ in range(self.int())]
        else:
            raise ValueError(f"R serialisation kind {kind} is not one that a text data set holds")
        names = None
        if has_attributes:
            names = dict(self.value()).get("names")
        # A number list with names is the index's (offset, length) pairs; a named list is a dict.
        return dict(zip(names, out)) if names and kind == 19 else out
