#!/usr/bin/env python3
"""Text or token rows -> token shards for train_llama.

    # bytes as tokens: needs no tokenizer file
    python data/prepare.py notes.txt -o data/notes

    # books, one JSON object {"text": ...} a line, with LLaMA-2's SentencePiece model; two books held out
    python data/prepare.py books.jsonl -o data/books --tokenizer tokenizer.model --val_documents 2

    # many files, a Hugging Face tokenizer, 1% held out, tag tokens that --domain_tags puts before each document
    python data/prepare.py slimpajama/ -o data/slim --tokenizer Meta-Llama-3-8B/tokenizer.json \\
        --val_fraction 0.01 --tags 'RedPajamaBook=Book: ' --tags '*=Web: '

    # rows that are tokenised already: {"input_ids": [...], "source": [{"source", "start", "end"}, ...]}
    python data/prepare.py upsampled-128k/*.parquet -o data/mix --tokenizer tokenizer.model

    # what is in a shard
    python data/prepare.py --inspect data/books_000000.bin

    then:  ./train_llama -i 'data/books_0*.bin' -j 'data/books_val_*.bin' --vocab_file data/books.vocab

INPUT: .jsonl (.jsonl.gz), .parquet, anything else is plain text; a folder stands for the files in it. Each row is
one document, so is a text file unless --split cuts it. A row names its source by "source" or "meta"; else it is
--source, else the file's name. Rows of token ids are cut by their source ranges (end exclusive), else at BOS; a
document that was cut at a row's end is joined again when the next row clearly goes on with it.

Every document begins with BOS if the tokenizer has one, and stays whole in one shard. No token is dropped unless
--min_tokens or --max_documents ask for it. Texts pass through a megabyte at a time (a longer document whole); the
shards get their names when all is done.
"""
import argparse
import dataclasses
import gzip
import hashlib
import json
import os
import pathlib
import re
import sys
import zlib

import numpy as np

from text_tokenizer import open_tokenizer
from token_file import MAX_TAGS, NAME_BYTES, Fault, Shard, inspect, write_vocab

BATCH_BYTES = 1 << 20  # text that is tokenised at once, by all cores


# Reading: every file is a stream of pieces, a text or a run of ids, each with its source.

@dataclasses.dataclass
class Piece:
    """A document, or a part of one where a row of ids was cut."""
    source: str
    where: str                # file and line, for messages
    text: str = None
    ids: np.ndarray = None
    row_begin: bool = False   # the piece opens a row of ids
    row_end: bool = False     # the piece reaches the row's end: the document may go on in the next row


def list_inputs(paths):
    files = []
    for path in map(pathlib.Path, paths):
        if path.is_dir():
            inside = sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith("."))
            if not inside:
                raise Fault(f"{path}: the folder holds no files")
            files += inside
        elif path.is_file():
            files.append(path)
        else:
            raise Fault(f"{path}: no such file or folder")
    return files


def read_pieces(path, args, tokenizer, bar):
    default = args.source or path.name.split(".")[0]
    name = path.name.lower()
    if name.endswith((".json", ".json.gz")):
        raise Fault(f"{path}: a .json file is no text; write one document a line, as {{\"text\": ...}}, to a .jsonl")
    if name.endswith((".jsonl", ".jsonl.gz")):
        rows = read_jsonl(path, bar)
    elif name.endswith(".parquet"):
        rows = read_parquet(path, bar)
    else:
        return read_text(path, args.split, default, bar)
    return (piece for where, row in rows for piece in row_pieces(row, where, default, args.text_key, tokenizer))


def read_jsonl(path, bar):
    number, zipped = 0, path.suffix.lower() == ".gz"
    with open(path, "rb") as raw:
        try:
            for line in gzip.open(raw) if zipped else raw:
                number += 1
                bar.update(raw.tell() - bar.n_file if zipped else len(line))
                if line.strip():
                    yield f"{path}:{number}", parse_row(line, f"{path}:{number}")
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise Fault(f"{path}:{number + 1}: damaged gzip: {error}") from None


def parse_row(line, where):
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise Fault(f"{where}: not JSON: {error}") from None
    if not isinstance(row, dict):
        raise Fault(f"{where}: a JSON object is expected, not {type(row).__name__}")
    return row


def read_parquet(path, bar):
    import pyarrow
    import pyarrow.parquet
    try:
        file = pyarrow.parquet.ParquetFile(path)
        rows, done, size = max(file.metadata.num_rows, 1), 0, path.stat().st_size
        for batch in file.iter_batches(batch_size=16):
            for row in batch.to_pylist():
                bar.update(size * (done + 1) // rows - size * done // rows)
                done += 1
                yield f"{path}: row {done}", row
    except pyarrow.ArrowException as error:
        raise Fault(f"{path}: not readable as parquet: {str(error).splitlines()[0]}") from None


def read_text(path, split, source, bar):
    """One document; with --split a line that matches ends a document and is itself no text."""
    separator = split and re.compile(r"\s*" if split == "blank" else split)
    lines, first = [], 1
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            bar.update(len(line))
            try:
                line = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise Fault(f"{path}:{number}: not UTF-8: {error.reason} at byte {error.start} of the line") from None
            if separator and separator.fullmatch(line.rstrip("\r\n")):
                yield Piece(source, f"{path}:{first}", "".join(lines))
                lines, first = [], number + 1
            else:
                lines.append(line)
    yield Piece(source, f"{path}:{first}", "".join(lines))


def row_source(row, default):
    meta = row.get("meta") if isinstance(row.get("meta"), dict) else {}
    names = [row.get("source")] + [meta.get(k) for k in ("source", "redpajama_set_name", "set_name")]
    return next((n for n in names if isinstance(n, str) and n), default)


def row_pieces(row, where, default, text_key, tokenizer):
    source = row_source(row, default)
    if row.get("input_ids") is not None:
        yield from cut_row(row, where, source, tokenizer)
    elif isinstance(row.get(text_key), str):
        yield Piece(source, where, row[text_key])
    elif text_key in row:
        raise Fault(f'{where}: "{text_key}" is not a string')
    else:
        raise Fault(f'{where}: neither "{text_key}" nor "input_ids" in the row, only '
                    f'{", ".join(sorted(row)[:8]) or "nothing"}; --text_key names another field')


def check_ids(ids, where, tokenizer):
    if ids == []:
        return np.zeros(0, np.int32)
    try:
        array = np.asarray(ids)
    except ValueError:  # ragged
        array = np.zeros(0, object)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise Fault(f"{where}: input_ids must be a list of integers")
    wrong = np.flatnonzero((array < 0) | (array >= tokenizer.vocab))
    if len(wrong):
        raise Fault(f"{where}: input_ids[{wrong[0]}] is {array[wrong[0]]}, outside the vocabulary of {tokenizer.vocab}")
    return array.astype(np.int32)


def cut_row(row, where, default, tokenizer):
    """A row of ids by its source ranges; what no range covers is kept, as pieces of the default source."""
    if tokenizer.name == "bytes":
        raise Fault(f"{where}: rows of input_ids need the tokenizer they were made with (--tokenizer FILE), or at "
                    "least --vocab_size, --bos and --eos")
    ids = check_ids(row["input_ids"], where, tokenizer)
    ranges = row.get("source")
    if isinstance(ranges, list) and ranges:
        cuts = sorted(checked_range(r, where, len(ids)) for r in ranges)
    else:  # a document begins at each BOS
        begins = [0] + [int(i) for i in np.flatnonzero(ids == tokenizer.bos) if i > 0]
        cuts = [(b, e, default) for b, e in zip(begins, begins[1:] + [len(ids)])]
    end = 0
    for begin, stop, source in cuts + [(len(ids), len(ids), default)]:
        if begin < end:
            raise Fault(f"{where}: source ranges overlap at token {begin}")
        for b, e, s in ((end, begin, default), (begin, stop, source)):
            if e > b:
                yield Piece(s, where, ids=ids[b:e], row_begin=b == 0, row_end=e == len(ids))
        end = stop


def checked_range(entry, where, length):
    begin, stop, source = (entry.get(k) for k in ("start", "end", "source")) if isinstance(entry, dict) else [None] * 3
    if type(begin) is not int or type(stop) is not int or not isinstance(source, str):
        raise Fault(f'{where}: "source" must list objects {{"source": name, "start": integer, "end": integer}}')
    if not 0 <= begin <= stop <= length:
        raise Fault(f"{where}: source range {begin}..{stop} is outside the row's {length} tokens")
    return begin, stop, source


def join_pieces(pieces, tokenizer, count):
    """Documents from pieces. One that reached its row's end waits; it is joined with the piece that opens the next
    row when that has the same source and plainly goes on: no EOS before it, and no BOS where documents have one."""
    held, eos_used, bos, eos = None, False, tokenizer.bos, tokenizer.eos
    for piece in pieces:
        if held is not None:
            goes_on = piece.row_begin and piece.source == held.source and held.ids[-1][-1] != eos
            if bos >= 0:
                goes_on = goes_on and held.ids[0][0] == bos and piece.ids[0] != bos
            if goes_on and (bos >= 0 or eos_used):
                count["joined"] += 1
                held.ids.append(piece.ids)
                if not piece.row_end:
                    yield dataclasses.replace(held, ids=np.concatenate(held.ids))
                    held = None
                continue
            yield dataclasses.replace(held, ids=np.concatenate(held.ids))
            held = None
        if piece.row_end:
            held = dataclasses.replace(piece, ids=[piece.ids])
        else:
            yield piece
        eos_used |= piece.ids is not None and piece.ids[-1] == eos
    if held is not None:
        yield dataclasses.replace(held, ids=np.concatenate(held.ids))


def tokenise(pieces, tokenizer):
    """(source, where, ids) of each document in order; texts are gathered so that all cores have work."""
    waiting, gathered = [], 0

    def flush():
        texts = [p.text for p in waiting if p.ids is None]
        encoded = iter(tokenizer.encode(texts) if texts else [])
        for p in waiting:
            yield p.source, p.where, next(encoded) if p.ids is None else p.ids
        waiting.clear()
    for piece in pieces:
        try:
            gathered += len(piece.text.encode()) if piece.ids is None else 4 * len(piece.ids)
        except UnicodeEncodeError as error:
            raise Fault(f"{piece.where}: half a surrogate pair at character {error.start} of the text") from None
        waiting.append(piece)
        if gathered >= BATCH_BYTES:
            yield from flush()
            gathered = 0
    yield from flush()


# Writing.

class Sources:
    """Names in the order they were met, with the tag tokens that --tags gives them."""

    def __init__(self, tags, tokenizer):
        self.tags, self.tokenizer, self.table, self.number = {}, tokenizer, [], {}
        for entry in tags:
            name, equals, text = entry.partition("=")
            if not name or not equals:
                raise Fault(f"--tags '{entry}': SOURCE=TEXT is expected, as 'books=Book: ' or '*={{source}}: '")
            self.tags[name] = text

    def find(self, name, where):
        if name not in self.number:
            if any("\ud800" <= character <= "\udfff" for character in name):
                raise Fault(f"{where}: half a surrogate pair in the source name {ascii(name)}")
            if len(name.encode()) >= NAME_BYTES or "\0" in name:
                raise Fault(f"{where}: the source name '{name[:80]}' is longer than {NAME_BYTES - 1} bytes")
            text = self.tags.get(name, self.tags.get("*", "")).replace("{source}", name)
            ids = self.tokenizer.encode([text])[0].tolist() if text else []
            if len(ids) > MAX_TAGS:
                raise Fault(f"--tags: '{text}' of source '{name}' is {len(ids)} tokens; at most {MAX_TAGS} fit")
            self.number[name] = len(self.table)
            self.table.append((name, ids))
        return self.number[name]


class Writer:
    """The shards PREFIX_000000.bin, PREFIX_000001.bin, ...; a document is never cut."""

    def __init__(self, prefix, limit, tokenizer):
        self.prefix, self.limit, self.tokenizer = prefix, limit, tokenizer
        self.shards, self.tokens, self.documents = [], 0, 0

    def add(self, ids, source, sources):
        if not self.shards or self.shards[-1].tokens + len(ids) > self.limit:
            if self.shards:
                self.shards[-1].close(sources.table)
            t = self.tokenizer
            self.shards.append(Shard(f"{self.prefix}_{len(self.shards):06}.bin", t.vocab, t.bos, t.eos, t.hash))
        self.shards[-1].add(ids, source)
        self.tokens += len(ids)
        self.documents += 1

    def finish(self, sources):
        if self.shards:
            self.shards[-1].close(sources.table)


def earlier_shards(prefix):
    folder, name = os.path.split(os.path.abspath(prefix))
    ours = re.compile(re.escape(name) + r"(_val)?_\d{6}\.bin")
    return sorted(os.path.join(folder, f) for f in os.listdir(folder) if ours.fullmatch(f))


# The run.

def held_out(number, args):
    """By a hash of the document's number, so that the split is the same every time."""
    uniform = int.from_bytes(hashlib.sha256(number.to_bytes(8, "little")).digest()[:8], "little") / 2**64
    return number < args.val_documents or uniform < args.val_fraction


def finish_document(ids, own_bos, args, tokenizer, count):
    if tokenizer.bos >= 0 and not own_bos:
        ids = np.concatenate([[tokenizer.bos], ids])
        count["bos"] += 1
    if args.add_eos and ids[-1] != tokenizer.eos:
        ids = np.concatenate([ids, [tokenizer.eos]])
        count["eos"] += 1
    return ids


def write_documents(documents, args, tokenizer, sources, train, val, count):
    """Returns the lengths of the documents written, as {bits: number}, and [documents, tokens] per source."""
    lengths, per_source = {}, []
    for source, where, ids in documents:
        number = train.documents + val.documents
        own_bos = tokenizer.bos >= 0 and len(ids) > 0 and ids[0] == tokenizer.bos
        text = len(ids) - own_bos
        if text == 0 or text < args.min_tokens:
            count["empty" if text == 0 else "short"] += 1
            count["dropped"] += text
            continue
        if args.max_documents and number == args.max_documents:
            count["stopped"] = 1
            break
        ids = finish_document(ids, own_bos, args, tokenizer, count)
        s = sources.find(source, where)
        (val if held_out(number, args) else train).add(ids, s, sources)
        if s == len(per_source):
            per_source.append([0, 0])
        per_source[s][0] += 1
        per_source[s][1] += len(ids)
        bits = len(ids).bit_length()
        lengths[bits] = lengths.get(bits, 0) + 1
    for writer in (train, val):
        writer.finish(sources)
    return lengths, per_source


def prepare(args, out=None):
    tokenizer = open_tokenizer(args.tokenizer, args.vocab_size, args.bos, args.eos)
    if args.add_eos and tokenizer.eos < 0:
        raise Fault("--add_eos: this tokenizer has no EOS; name one with --eos")
    files, sources = list_inputs(args.input), Sources(args.tags, tokenizer)
    os.makedirs(os.path.dirname(os.path.abspath(args.output)), exist_ok=True)
    old = earlier_shards(args.output)
    if old and not args.force:
        raise Fault(f"{old[0]} exists; choose another PREFIX, or --force to replace its {len(old)} shards")
    if os.path.exists(args.output + ".vocab") and not args.force:
        raise Fault(f"{args.output}.vocab exists; choose another PREFIX, or --force to replace it")
    train, val = (Writer(args.output + suffix, args.shard_tokens, tokenizer) for suffix in ("", "_val"))
    count = dict.fromkeys(["bos", "eos", "joined", "empty", "short", "dropped", "stopped"], 0)
    with Progress(sum(f.stat().st_size for f in files)) as bar:
        pieces = (p for f in files for p in bar.begin(read_pieces(f, args, tokenizer, bar)))
        try:
            documents = tokenise(join_pieces(pieces, tokenizer, count), tokenizer)
            lengths, per_source = write_documents(documents, args, tokenizer, sources, train, val, count)
            if not train.documents:
                raise Fault("no document for the training shards: the input is empty, or all of it is held out")
        except BaseException:
            for shard in train.shards + val.shards:
                shard.abandon()
            raise
    for path in old:
        os.unlink(path)
    for shard in train.shards + val.shards:
        shard.publish()
    pieces = tokenizer.pieces()
    if pieces is not None:
        write_vocab(args.output + ".vocab", pieces + [b""] * (tokenizer.vocab - len(pieces)))
    report(count, lengths, per_source, train, val, sources, tokenizer, out or sys.stdout)
    if (args.val_fraction or args.val_documents) and not val.documents:
        print("note: no document fell into the validation part; --val_documents takes a number", file=sys.stderr)


def report(count, lengths, per_source, train, val, sources, tokenizer, out):
    def say(text):
        print(text, file=out)
    added = f"{count['bos']:,} BOS" + (f" and {count['eos']:,} EOS" if count["eos"] else "")
    say(f"{train.documents + val.documents:,} documents, {train.tokens + val.tokens:,} tokens, of these {added} added; "
        f"vocabulary {tokenizer.vocab}, tokenizer {tokenizer.name} {tokenizer.hash.hex()}")
    for writer, what in ((train, "train"), (val, "val")):
        if writer.shards:
            span = " .. ".join(dict.fromkeys([writer.shards[0].path, writer.shards[-1].path]))
            say(f"  {what:<5} {writer.documents:,} documents, {writer.tokens:,} tokens in {span}")
    say("tokens in a document:")
    for bits in range(min(lengths), max(lengths) + 1):
        n = lengths.get(bits, 0)
        say(f"  {2**bits // 2:>11,} .. {2**bits - 1:<11,} {n:>11,}  {'#' * -(-40 * n // max(lengths.values()))}")
    say("by source:")
    for (name, tags), (documents, tokens) in zip(sources.table, per_source):
        say(f"  {name:<24} {documents:>11,} documents {tokens:>15,} tokens{f'  tag {tags}' if tags else ''}")
    if count["joined"]:
        say(f"joined again where a row had cut a document: {count['joined']:,} times")
    if count["empty"]:
        say(f"empty documents skipped: {count['empty']:,}")
    short = f", in {count['short']:,} documents shorter than --min_tokens" if count["short"] else ""
    say(f"dropped tokens: {count['dropped']:,}{short}")
    if count["stopped"]:
        say("stopped at --max_documents; the rest of the input was not used")


class Progress:
    """A bar over the bytes of the input, on a terminal that has tqdm; it also knows the place in the current file."""

    def __init__(self, total):
        try:
            from tqdm import tqdm
            self.bar = tqdm(total=total, unit="B", unit_scale=True, desc="prepare", disable=not sys.stderr.isatty())
        except ImportError:
            self.bar = None
        self.n_file = 0

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        if self.bar is not None:
            self.bar.close()

    def begin(self, pieces):
        self.n_file = 0
        return pieces

    def update(self, n):
        self.n_file += n
        if self.bar is not None:
            self.bar.update(n)


def positive(text):
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive integer")
    return int(text)


def fraction(text):
    value = float(text) if re.fullmatch(r"0?\.\d+|0", text) else -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"'{text}' is not a fraction below 1, as 0.01")
    return value


def pattern(text):
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"'{text}' is not a regular expression: {error}")
    return text


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("input", nargs="*", metavar="INPUT", help="files or folders")
    add("-o", "--output", metavar="PREFIX", help="writes PREFIX_000000.bin .., PREFIX_val_000000.bin .., PREFIX.vocab")
    add("--tokenizer", metavar="FILE", help="SentencePiece .model, Hugging Face tokenizer.json, or 'bytes' (default)")
    add("--source", metavar="NAME", help="source of documents that name none (default: the file's name)")
    add("--tags", action="append", default=[], metavar="SOURCE=TEXT",
        help="tag of a source, tokenised into the shards for --domain_tags; '*': all others, {source}: its name")
    add("--split", type=pattern, metavar="REGEX",
        help="plain text: a line that matches ends a document ('blank': an empty line)")
    add("--text_key", default="text", metavar="KEY", help="field that holds a row's text (default: text)")
    add("--shard_tokens", type=positive, default=10**8, metavar="N", help="tokens in a shard (default: 100 million)")
    add("--val_fraction", type=fraction, default=0, metavar="X", help="share of documents held out, by a hash")
    add("--val_documents", type=positive, default=0, metavar="N", help="hold out the first N documents")
    add("--min_tokens", type=positive, default=0, metavar="N", help="drop shorter documents")
    add("--max_documents", type=positive, default=0, metavar="N", help="stop after this many")
    add("--add_eos", action="store_true", help="end each document with EOS")
    add("--vocab_size", type=positive, metavar="N", help="vocabulary named in the shards (default: the tokenizer's)")
    add("--bos", type=int, metavar="ID", help="BOS, -1 for none (default: the tokenizer's)")
    add("--eos", type=int, metavar="ID", help="EOS, -1 for none (default: the tokenizer's)")
    add("--force", action="store_true", help="replace shards that have this PREFIX")
    add("--inspect", metavar="SHARD", help="print what a shard holds, and exit")
    args = parser.parse_args()
    if args.inspect:
        return inspect(args.inspect)
    if not args.input or not args.output:
        parser.error("INPUT and -o PREFIX are needed")
    prepare(args)


if __name__ == "__main__":
    try:
        main()
    except Fault as fault:
        sys.exit(f"prepare.py: {fault}")
    except OSError as error:
        sys.exit(f"prepare.py: {error.filename or 'file'}: {error.strerror or error}")
