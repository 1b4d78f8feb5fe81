"""The token shards of train_llama: written, read, and the vocabulary file beside them. Needs numpy alone.

Little-endian. 256 x int32: magic, version, bytes per token (2 or 4), vocabulary, 64-bit counts of tokens [4] and
documents [6], [8] sources, [9] BOS, [10] EOS (-1: none), [12] 64-bit tokenizer hash, [14] [16] 64-bit file offsets
of the two tables. Then the tokens; per document {int64 first token, int32 source, int32 0}; per source
{char name[64], int32 number of tags, int32 tag[15]}. core/tokens.h reads it.
"""
import contextlib
import os
import sys

import numpy as np

MAGIC, VERSION, HEADER_BYTES = 20261120, 1, 1024
MAX_TAGS, NAME_BYTES = 15, 64
DOCUMENT = np.dtype([("begin", "<i8"), ("source", "<i4"), ("zero", "<i4")])
SOURCE = np.dtype([("name", f"S{NAME_BYTES}"), ("tags", "<i4"), ("tag", "<i4", MAX_TAGS)])


class Fault(Exception):
    """What a user did or has; its text is the one line that is printed."""


class Shard:
    """One file in the making, under a temporary name: add(), then close(), then publish()."""

    def __init__(self, path, vocab, bos=-1, eos=-1, hash=bytes(8)):
        self.path, self.temporary = path, f"{path}.tmp"
        self.vocab, self.bos, self.eos, self.hash = vocab, bos, eos, hash
        self.dtype = np.dtype("<u2" if vocab <= 65536 else "<u4")
        self.tokens, self.documents = 0, []  # (first token, source) of each
        self.file = open(self.temporary, "wb")
        self.file.write(bytes(HEADER_BYTES))

    @contextlib.contextmanager
    def named(self):
        """An error of writing, as of a full disk, gets the path that it does not carry."""
        try:
            yield
        except OSError as error:
            error.filename = error.filename or self.path
            raise

    def add(self, ids, source):
        self.documents.append((self.tokens, source))
        with self.named():
            self.file.write(np.ascontiguousarray(ids, self.dtype).tobytes())
        self.tokens += len(ids)

    def close(self, sources):
        """sources: [(name, tag ids)]"""
        documents = np.zeros(len(self.documents), DOCUMENT)
        if self.documents:
            documents["begin"], documents["source"] = np.array(self.documents, np.int64).T
        table = np.zeros(len(sources), SOURCE)
        for entry, (name, tags) in zip(table, sources):
            entry["name"], entry["tags"], entry["tag"][:len(tags)] = name.encode(), len(tags), tags
        at = HEADER_BYTES + self.tokens * self.dtype.itemsize
        word = np.zeros(256, "<i4")
        word[:4] = MAGIC, VERSION, self.dtype.itemsize, self.vocab
        word[4:8] = np.array([self.tokens, len(self.documents)], "<i8").view("<i4")
        word[8:11] = len(sources), self.bos, self.eos
        word[12:14] = np.frombuffer(self.hash, "<i4")
        word[14:18] = np.array([at, at + documents.nbytes], "<i8").view("<i4")
        with self.named():
            self.file.write(documents.tobytes() + table.tobytes())
            self.file.seek(0)
            self.file.write(word.tobytes())
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()

    def publish(self):
        os.replace(self.temporary, self.path)

    def abandon(self):
        with contextlib.suppress(OSError):  # the last bytes may not fit either
            self.file.close()
        if os.path.lexists(self.temporary):
            os.unlink(self.temporary)


def write_tokens(path, documents, vocab, bos=-1, eos=-1, source="test"):
    """A shard from lists of ids, taken as they are: with a BOS each must begin with it."""
    shard = Shard(str(path), vocab, bos, eos)
    for ids in documents:
        shard.add(np.asarray(ids), 0)
    shard.close([(source, [])])
    shard.publish()


def read_shard(path):
    """A dict: vocab, bos, eos, hash, tokens (array), begins (first token of each document, and the end), source
    (number, per document), sources [(name, tags)]."""
    raw = np.fromfile(path, np.uint8)
    word = raw[:HEADER_BYTES].view("<i4") if len(raw) >= HEADER_BYTES else np.zeros(256, "<i4")
    if word[0] != MAGIC or word[1] != VERSION or word[2] not in (2, 4):
        raise Fault(f"{path}: not a token shard of data/prepare.py")
    tokens, documents = (int(n) for n in word[4:8].view("<i8"))
    at, sources_at = (int(n) for n in word[14:18].view("<i8"))
    if (at, sources_at, len(raw)) != (HEADER_BYTES + tokens * int(word[2]), at + documents * DOCUMENT.itemsize,
                                      sources_at + int(word[8]) * SOURCE.itemsize):
        raise Fault(f"{path}: truncated or damaged")
    table, sources = raw[at:sources_at].view(DOCUMENT), raw[sources_at:].view(SOURCE)
    return dict(vocab=int(word[3]), bos=int(word[9]), eos=int(word[10]), hash=word[12:14].tobytes(),
                tokens=raw[HEADER_BYTES:at].view(f"<u{word[2]}").astype(np.int64),
                begins=np.append(table["begin"], tokens), source=table["source"].copy(),
                sources=[(s["name"].decode(), s["tag"][:s["tags"]].tolist()) for s in sources])


def inspect(path, out=None):
    """Prints what a shard holds."""
    s, out = read_shard(path), out or sys.stdout
    lengths = np.diff(s["begins"])
    print(f"{path}: {len(s['tokens']):,} tokens, {len(lengths):,} documents, vocabulary {s['vocab']}, "
          f"bos {s['bos']}, eos {s['eos']}, tokenizer {s['hash'].hex()}", file=out)
    for name, tags in s["sources"]:
        print(f"  source {name}{f', tag {tags}' if tags else ''}", file=out)
    for i, length in enumerate(lengths[:4]):
        ids = s["tokens"][s["begins"][i]:][:min(length, 16)].tolist()
        print(f"  document {i}: {length:,} tokens, source {s['sources'][s['source'][i]][0]}: {ids} ...", file=out)


def escape_piece(piece):
    """A line of the vocabulary file: valid UTF-8 as it is; control bytes, backslash and all else as \\xNN."""
    def escape(c):
        if "\udc80" <= c <= "\udcff":  # a byte that is not UTF-8
            return f"\\x{ord(c) - 0xDC00:02X}"
        return c if c.isprintable() and c != "\\" else "".join(f"\\x{b:02X}" for b in c.encode())
    return "".join(map(escape, piece.decode("utf-8", "surrogateescape")))


def write_vocab(path, pieces):
    with open(path, "w", encoding="utf-8", newline="\n") as f:
        f.writelines(escape_piece(p) + "\n" for p in pieces)
