"""What a file is by its first bytes, for the message that says that it is no checkpoint."""

from __future__ import annotations

import codecs

SIGNATURES: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer and not the file itself: fetch that by git lfs pull"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GIF8", "a GIF picture"),
    (b"BM", "a BMP picture"),
    (b"II*\0", "a TIFF picture"),
    (b"MM\0*", "a TIFF picture"),
    (b"%PDF", "a PDF document"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"\x28\xb5\x2f\xfd", "compressed with zstd: unpack it first"),
    (b"7z\xbc\xaf", "a 7z archive: unpack it first"),
    (b"Rar!", "a RAR archive: unpack it first"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PAR1", "a Parquet file"),
    (b"ARROW1", "an Arrow file"),
    (b"GGUF", "a GGUF model"),
    (b"SQLite format", "a SQLite database"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
)


def kind_of(start: bytes) -> str:
    """Such as ``a PNG picture``, from a file's first 512 bytes."""
    for signature, what in SIGNATURES:
        if start.startswith(signature):
            return what
    if start[:4] == b"RIFF" and start[8:12] == b"WEBP":
        return "a WebP picture"
    if start[257:262] == b"ustar":
        return "a tar archive, as torch wrote before version 0.2, or unpacked: neither is read"
    head = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if head.startswith((b"<!doctype html", b"<html", b"<head", b"<script")):
        return "a web page and not the file itself: the download gave its page, or a page that asks to sign in"
    if head.startswith((b"<?xml", b"<svg", b"<error")):
        return "an XML document, perhaps the error that a download gave"
    if start[:1] == b"\x80":
        return "a pickle, but none of torch.save"
    if is_text(start):
        return "JSON text" if head[:1] in (b"{", b"[") else "text"
    return ""


def is_text(start: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(start)  # which may end within a character
    except UnicodeDecodeError:
        return False
    return all(c.isprintable() or c in "\r\n\t" for c in text)
