// Packs documents into training rows of S tokens: which token, document, position and label stands where.
//
// | attention   | doc                       | pos                          | BOS                                   |
// |-------------|---------------------------|------------------------------|---------------------------------------|
// | full        | all 0                     | 0..S-1                       | each document's own is kept           |
// | intra       | from 1                    | 0..S-1                       | kept                                  |
// | intra_reset | from 1                    | from 0 in each document      | kept                                  |
// | anchor      | anchor 0, then from 1     | 0..S-1                       | stripped; one anchor added, token 0   |
//
// A document that does not fit is cut and goes on as the first document of the next row, and the data goes on
// into the next epoch: every token of the input that is not a document's BOS is an input exactly once an epoch.
//
// The label is the next token of the same document, wherever that one lies; behind a document's last token it is
// set by the boundary mode. The anchor's label is the token at position 1. A label that is a tag is masked (-1).
//
// Every rank makes the same rows; who trains on which is the caller's. A row's layout follows from lengths alone,
// so that skipping rows costs no reading.
#pragma once
#include "tokens.h"

enum class Attention { full, intra, intra_reset, anchor };
inline constexpr const char* attention_names[] = {"full", "intra", "intra_reset", "anchor"};
// Whether document 0 exists, whose first token all see: in full mode it is everything.
inline bool has_anchor(Attention a) { return a == Attention::full || a == Attention::anchor; }

// The label of a document's last token: none, the token next to it in the row (none at the row's end), or BOS.
enum class Boundary { mask, next, bos };
inline constexpr const char* boundary_names[] = {"mask", "next", "bos"};

struct PackOptions {
    Attention attention = Attention::anchor;
    Boundary boundary = Boundary::mask;
    bool domain_tags = false; // each document starts with its source's tags (behind its own BOS), in every row anew
    bool interleave = false;  // documents of 64..2048 tokens are cut in 2 or 3, and the row's chunks shuffled
    bool shuffle = false;     // documents in a hashed order, another one each epoch
    size_t S = 4096;          // tokens in a row
    int32_t V = 0;            // the model's vocabulary
    uint64_t seed = 0;
    int32_t bos = -1;   // the model's BOS, or EOS if it has none: used when the shards name no BOS
    double mean = 1024; // generator: mean document length
};

// Where the next row starts; with the same data and options it determines all rows to come.
struct Cursor {
    int64_t epoch = 0;
    int64_t document = 0; // position in the epoch's order
    int64_t offset = 0;   // tokens of it already used, its own BOS included
    int64_t rows = 0;     // rows made so far
};

// Padding occurs only under domain tags, where a document's tags and first token do not fit any more: token 0,
// label -1, a document of its own at the row's end (doc 0 in full mode, where causality hides it from the rest).
struct Row {
    std::vector<int32_t> token, doc, pos, label; // (S)
    int64_t counted = 0;                         // labels >= 0
    int64_t inputs = 0;                          // tokens of the data; no BOS, anchor, tag or padding
    int64_t anchors = 0, tags = 0, padding = 0;
    int64_t documents = 0; // as they appear in the row: one cut by its start or end counts
};

// What a row holds of a document: [own BOS] [tags] text, `size` tokens in all.
struct Segment {
    int64_t document, offset; // in the corpus; its first text token
    const Source* source;
    int32_t own_bos, tags, text; // counts
    bool ends;                   // holds the document's last token
    size_t at;                   // in the loader's buffer; there the next token follows unless it ends

    int32_t head() const { return own_bos + tags; }
    int32_t size() const { return own_bos + tags + text; }
    bool is_tag(int32_t i) const { return i >= own_bos && i < own_bos + tags; }
};

// Tokens [from, to) of a segment. A row is its anchor, then its chunks in order, then padding.
struct Chunk {
    int32_t segment, from, to;
};

struct Loader {
    PackOptions options;
    Corpus corpus;
    Cursor cursor;
    int32_t bos = -1;              // the anchor, and the label of Boundary::bos
    std::vector<Segment> segments; // of the row at hand
    std::vector<Chunk> chunks;
    std::vector<int32_t> buffer; // the segments' tokens back to back
};

// Independent hash streams under one seed.
enum : uint64_t { stream_order = 1, stream_chunks = 2, stream_generator = 3 };

// A permutation of [0, n) in O(1) memory: six Feistel rounds on the smallest even number of bits that holds n,
// walked along the cycle until the value falls below n again (less than 4 steps in the mean, since 2^bits < 4n).
inline int64_t permuted(int64_t i, int64_t n, uint64_t key) {
    int half = 1;
    while (half < 31 && (int64_t(1) << 2 * half) < n) half++;
    const uint64_t mask = (uint64_t(1) << half) - 1;
    uint64_t x = uint64_t(i);
    do {
        uint64_t left = x >> half, right = x & mask;
        for (uint64_t round = 0; round < 6; round++) {
            uint64_t next = left ^ (hash64(key + round, right) & mask);
            left = right, right = next;
        }
        x = left << half | right;
    } while (x >= uint64_t(n));
    return int64_t(x);
}

// Number in the corpus of the document at a position of an epoch's order.
inline int64_t document_at(const Loader& l, int64_t epoch, int64_t position) {
    if (!l.options.shuffle) return position;
    return permuted(position, l.corpus.documents, hash64(hash64(l.options.seed, stream_order), uint64_t(epoch)));
}

// Opens the token files (a comma-separated list of paths and patterns), or the generator when there are none.
inline void loader_open(Loader& l, const std::string& paths, const PackOptions& o) {
    REQUIRE(o.S < size_t(1) << 31, "positions are 32-bit numbers");
    l = Loader{};
    l.options = o;
    if (paths.empty()) corpus_generate(l.corpus, o.mean, hash64(o.seed, stream_generator), o.V, o.bos);
    else corpus_open(l.corpus, paths, o.V);
    l.bos = l.corpus.bos >= 0 ? l.corpus.bos : o.bos;
    if (l.bos < 0 || l.bos >= o.V)
        fail("BOS (or EOS) is %d, outside the vocabulary of %d: the data or the model must name one", l.bos, o.V);
    size_t least = 2 + size_t(o.domain_tags ? l.corpus.max_tags : 0); // anchor or BOS, tags, one token
    if (o.S < least) fail("a context of %zu is too short to pack: it must be at least %zu", o.S, least);
}

// Goes on from a saved cursor.
inline void loader_seek(Loader& l, const Cursor& c) {
    bool sound = c.epoch >= 0 && c.rows >= 0 && c.document >= 0 && c.document < l.corpus.documents && c.offset >= 0;
    if (!sound || c.offset > corpus_document(l.corpus, document_at(l, c.epoch, c.document)).tokens)
        fail("the saved position (epoch %lld, document %lld, token %lld) is not inside this data; resume with the data "
             "and options the run was started with",
             (long long)c.epoch, (long long)c.document, (long long)c.offset);
    l.cursor = c;
}

// Steps over used-up and empty documents to one with tokens left, and over its BOS where that is stripped.
inline Document next_document(Loader& l, int64_t* number) {
    Cursor& c = l.cursor;
    for (;;) {
        *number = document_at(l, c.epoch, c.document);
        Document d = corpus_document(l.corpus, *number);
        if (c.offset == 0 && d.own_bos && l.options.attention == Attention::anchor) c.offset = 1;
        if (c.offset < d.tokens) return d;
        c.offset = 0;
        if (++c.document == l.corpus.documents) c.document = 0, c.epoch++;
    }
}

// Whether all tokens have been taken once: the next row would begin with the first ones again.
inline bool loader_ended(Loader& l) {
    int64_t document;
    next_document(l, &document);
    return l.cursor.epoch > 0;
}

// Lays out one row's segments and moves the cursor behind them.
inline void layout_segments(Loader& l) {
    const PackOptions& o = l.options;
    int64_t room = int64_t(o.S) - (o.attention == Attention::anchor);
    l.segments.clear();
    for (size_t at = 0; room > 0;) {
        Segment s{};
        Document d = next_document(l, &s.document);
        s.own_bos = d.own_bos && l.cursor.offset == 0;
        s.offset = l.cursor.offset + s.own_bos;
        int64_t left = d.tokens - s.offset;
        s.source = d.source;
        if (o.domain_tags && d.source && left > 0) s.tags = d.source->n_tags;
        if (s.tags > 0 && s.head() + 1 > room) break; // tags are not parted from their text: the rest is padding
        s.text = int32_t(std::min(left, room - s.head()));
        s.ends = s.text == left;
        s.at = at;
        at += size_t(s.size()) + !s.ends;
        l.cursor.offset = s.offset + s.text;
        room -= s.size();
        l.segments.push_back(s);
    }
}

// Chunks in row order. Interleaved, every order of the chunks that keeps each document's own is equally likely:
// the segments' numbers are shuffled, each as often as it has chunks, and then taken in turn.
inline void layout_chunks(Loader& l) {
    const uint64_t key = hash64(hash64(l.options.seed, stream_chunks), uint64_t(l.cursor.rows));
    uint64_t draws = 0;
    auto draw = [&](uint64_t n) { return int64_t(hash64(key, draws++) % n); }; // bias below n / 2^64
    std::vector<Chunk> cuttings;                                               // document after document
    std::vector<size_t> next_of;                                               // (segments) in `cuttings`
    std::vector<int32_t> order;                                                // segment of each place in the row
    for (int32_t i = 0; i < int32_t(l.segments.size()); i++) {
        const Segment& s = l.segments[i];
        int32_t cuts = 0, cut[2] = {};
        if (l.options.interleave && s.size() >= 64 && s.size() <= 2048) { // BOS, tags and first token stay together
            cuts = 1 + int32_t(draw(2));
            for (int32_t k = 0; k < cuts; k++) cut[k] = s.head() + 1 + int32_t(draw(uint64_t(s.text - 1 - k)));
            if (cuts == 2 && cut[1] >= cut[0]) cut[1]++; // the second among the places that are left
            std::sort(cut, cut + cuts);
        }
        next_of.push_back(cuttings.size());
        for (int32_t k = 0; k <= cuts; k++) cuttings.push_back({i, k ? cut[k - 1] : 0, k < cuts ? cut[k] : s.size()});
        order.insert(order.end(), size_t(cuts) + 1, i);
    }
    if (l.options.interleave)
        for (size_t n = order.size(); n > 1; n--) std::swap(order[n - 1], order[size_t(draw(n))]);
    l.chunks.clear();
    for (int32_t i : order) l.chunks.push_back(cuttings[next_of[i]++]);
}

// Whether the chunk exists and its first token may be the label of the token before it in the row.
inline bool labels_its_neighbour(const Loader& l, size_t chunk) {
    return chunk < l.chunks.size() && !l.segments[l.chunks[chunk].segment].is_tag(l.chunks[chunk].from);
}

// The row's counts, from its layout alone.
inline void count_row(const Loader& l, Row& row) {
    const PackOptions& o = l.options;
    row.counted = row.inputs = row.tags = 0;
    row.anchors = o.attention == Attention::anchor;
    row.documents = int64_t(l.segments.size());
    int64_t used = row.anchors;
    for (const Segment& s : l.segments) {
        row.inputs += s.text;
        row.tags += s.tags;
        used += s.size();
        row.counted += s.size() - s.ends;                  // each has a next token, save the document's last,
        if (s.tags) row.counted -= s.tags - 1 + s.own_bos; // and a tag is nobody's label
        row.counted += s.ends && o.boundary == Boundary::bos;
    }
    row.padding = int64_t(o.S) - used;
    row.counted += row.anchors && labels_its_neighbour(l, 0);
    if (o.boundary != Boundary::next) return;
    for (size_t i = 0; i < l.chunks.size(); i++) {
        const Segment& s = l.segments[l.chunks[i].segment];
        row.counted += s.ends && l.chunks[i].to == s.size() && labels_its_neighbour(l, i + 1);
    }
}

inline void read_segments(Loader& l) {
    const Segment& last = l.segments.back();
    l.buffer.resize(last.at + size_t(last.size()) + !last.ends);
    for (const Segment& s : l.segments) {
        int32_t* out = l.buffer.data() + s.at;
        if (s.own_bos) corpus_read(l.corpus, s.document, 0, 1, out);
        for (int32_t i = 0; i < s.tags; i++) out[s.own_bos + i] = s.source->tag[i];
        corpus_read(l.corpus, s.document, s.offset, s.text + !s.ends, out + s.head());
    }
}

inline void fill_chunk(const Loader& l, size_t chunk, size_t p, Row& row) {
    const PackOptions& o = l.options;
    const Chunk& c = l.chunks[chunk];
    const Segment& s = l.segments[c.segment];
    const int32_t* token = l.buffer.data() + s.at;
    for (int32_t i = c.from; i < c.to; i++, p++) {
        row.token[p] = token[i];
        row.doc[p] = o.attention == Attention::full ? 0 : c.segment + 1;
        row.pos[p] = o.attention == Attention::intra_reset ? i : int32_t(p);
        bool has_next = i + 1 < s.size() || !s.ends;
        if (has_next) row.label[p] = s.is_tag(i + 1) ? -1 : token[i + 1];
        else if (o.boundary == Boundary::bos) row.label[p] = l.bos;
        else if (o.boundary == Boundary::next && labels_its_neighbour(l, chunk + 1)) {
            const Chunk& next = l.chunks[chunk + 1];
            row.label[p] = l.buffer[l.segments[next.segment].at + size_t(next.from)];
        } else row.label[p] = -1;
    }
}

inline void plan_row(Loader& l, Row& row) {
    layout_segments(l);
    layout_chunks(l);
    count_row(l, row);
    l.cursor.rows++;
}

// The next row.
inline void loader_next(Loader& l, Row& row) {
    plan_row(l, row);
    read_segments(l);
    const size_t S = l.options.S;
    for (auto* v : {&row.token, &row.doc, &row.pos, &row.label}) v->resize(S);
    size_t p = 0;
    if (row.anchors) {
        const Chunk& first = l.chunks[0];
        int32_t neighbour = l.buffer[l.segments[first.segment].at + size_t(first.from)];
        row.token[0] = l.bos, row.doc[0] = 0, row.pos[0] = 0;
        row.label[0] = labels_its_neighbour(l, 0) ? neighbour : -1;
        p = 1;
    }
    for (size_t i = 0; i < l.chunks.size(); i++) {
        fill_chunk(l, i, p, row);
        p += size_t(l.chunks[i].to - l.chunks[i].from);
    }
    for (size_t first = p; p < S; p++) {
        row.token[p] = 0, row.label[p] = -1;
        row.doc[p] = l.options.attention == Attention::full ? 0 : int32_t(l.segments.size()) + 1;
        row.pos[p] = int32_t(l.options.attention == Attention::intra_reset ? p - first : p);
    }
}

// Steps over the next row without reading a token. Returns its counts; the arrays stay empty.
inline Row loader_skip(Loader& l) {
    Row row;
    plan_row(l, row);
    return row;
}
