// Token files: opening and checking shards (our own format and llm.c's), and a generator for when there are none.
//
// Own format, little-endian: a header of 256 int32, then the tokens at byte 1024, then two tables.
//   word  0 magic 20261120   1 version 1   2 bytes per token (2 or 4)   3 vocabulary size
//         4 (64 bits) tokens               6 (64 bits) documents        8 sources
//         9 bos (-1: none)  10 eos (-1)   12 (64 bits) tokenizer hash
//        14 (64 bits) file offset of the document table: {int64 first token, int32 source, int32 0} each
//        16 (64 bits) file offset of the source table: Source each
// Documents are contiguous: one ends where the next begins, and each begins with bos where there is one.
//
// llm.c: magic 20240520 version 1, uint16 tokens of GPT-2; magic 20240801 version 7, uint32 tokens of LLaMA-3;
// word 2 is the number of tokens. A document begins at every BOS.
#pragma once
#include "comm.h"
#include "types.h"
#include <algorithm>
#include <cerrno>
#include <fcntl.h>
#include <glob.h>
#include <memory>
#include <string>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#include <vector>

constexpr int32_t tokens_magic = 20261120, tokens_version = 1;
constexpr int32_t gpt2_magic = 20240520, llama3_magic = 20240801; // llm.c's
inline bool tokens_are(int32_t magic) { return magic == tokens_magic || magic == gpt2_magic || magic == llama3_magic; }
constexpr int64_t tokens_header_bytes = 1024;

// Where documents come from. The tags are put before a document's text when domain tags are asked for.
struct Source {
    char name[64]; // NUL-padded
    int32_t n_tags, tag[15];
};
static_assert(sizeof(Source) == 128);

struct DocumentEntry {
    int64_t begin;
    int32_t source, reserved;
};
static_assert(sizeof(DocumentEntry) == 16);

// One file, mapped read-only.
struct Shard {
    std::string path;
    std::shared_ptr<const uint8_t> bytes;
    int64_t size = 0;        // of the file
    int32_t token_bytes = 0; // 2 or 4
    int64_t tokens = 0;
    int32_t vocabulary = 0, bos = -1, eos = -1;
    uint64_t tokenizer = 0;         // hash, 0: unknown
    bool headless = false;          // the first document does not start with BOS (llm.c only)
    int64_t first_document = 0;     // number of its first document in the corpus
    std::vector<int64_t> begin;     // (documents + 1): first token of each document, then the end
    std::vector<int32_t> source_of; // (documents), empty when there are no sources
    std::vector<Source> sources;
};

// The documents of all shards in order, or of the generator.
struct Corpus {
    std::vector<Shard> shards; // none: the generator
    int64_t documents = 0;
    int64_t text = 0;           // tokens that are no document's own BOS; 0: unbounded
    int32_t V = 0;              // the model's vocabulary: larger ids are refused
    int32_t bos = -1, eos = -1; // as the shards name them, -1: they do not
    int32_t max_tags = 0;       // longest tag sequence of any source
    double mean = 0;            // generator: mean document length
    uint64_t seed = 0;
    int64_t cached = -1; // generator: the document in `cache`
    std::vector<int32_t> cache;
};

// A document as it is stored, its own BOS included in `tokens`.
struct Document {
    int64_t tokens;
    bool own_bos;
    const Source* source; // null: none
    const Shard* shard;   // null: generated
    int64_t begin;        // in the shard
};

inline int32_t shard_token(const Shard& s, int64_t i) {
    const uint8_t* p = s.bytes.get() + tokens_header_bytes + i * s.token_bytes;
    uint16_t half;
    uint32_t word;
    if (s.token_bytes == 2) return memcpy(&half, p, 2), int32_t(half);
    return memcpy(&word, p, 4), int32_t(word); // ids past 2^31 turn negative and are refused where they are read
}

// What a run knows its data by, whatever the files are called: where the documents begin, and a sample of the tokens.
inline std::string corpus_fingerprint(const Corpus& c, const Comm& world = {}) {
    uint64_t hash = 0;
    for (const Shard& s : c.shards) {
        hash = hash64(hash, s.tokenizer);
        for (int64_t begin : s.begin) hash = hash64(hash, uint64_t(begin));
        for (int64_t i = 0; i < 64 && s.tokens > 0; i++)
            hash = hash64(hash, uint64_t(shard_token(s, i * s.tokens / 64)));
        comm_alive(world);
    }
    char text[17];
    snprintf(text, sizeof text, "%016llx", (unsigned long long)hash);
    return text;
}

// The files named by a comma-separated list of paths and patterns; the matches of a pattern in byte order,
// which is the same on every rank whatever its locale.
inline std::vector<std::string> expand_paths(const std::string& list) {
    std::vector<std::string> paths;
    for (size_t at = 0; at <= list.size();) {
        size_t comma = std::min(list.find(',', at), list.size());
        std::string item = list.substr(at, comma - at);
        at = comma + 1;
        if (item.empty()) fail("'%s': an empty name in the list of token files", list.c_str());
        struct stat status;
        if (stat(item.c_str(), &status) == 0) {
            paths.push_back(item);
            continue;
        }
        glob_t found;
        if (glob(item.c_str(), GLOB_NOSORT, nullptr, &found) != 0)
            fail("%s: no such token file; make one with data/prepare.py", item.c_str());
        size_t first = paths.size();
        paths.insert(paths.end(), found.gl_pathv, found.gl_pathv + found.gl_pathc);
        std::sort(paths.begin() + first, paths.end());
        globfree(&found);
    }
    return paths;
}

inline void shard_map(Shard& s) {
    const char* path = s.path.c_str();
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) fail("%s: cannot open this token file: %s", path, strerror(errno));
    struct stat status;
    if (fstat(fd, &status) != 0) fail("%s: cannot read its size: %s", path, strerror(errno));
    if (!S_ISREG(status.st_mode)) fail("%s: not a regular file; name the token files, or a pattern in quotes", path);
    s.size = status.st_size;
    if (s.size == 0) fail("%s: the token file is empty", path);
    if (s.size < tokens_header_bytes)
        fail("%s: truncated: %lld bytes, the header alone has 1024", path, (long long)s.size);
    void* p = mmap(nullptr, size_t(s.size), PROT_READ, MAP_SHARED, fd, 0);
    if (p == MAP_FAILED) fail("%s: cannot map: %s", path, strerror(errno));
    close(fd);
    s.bytes = {(const uint8_t*)p, [n = size_t(s.size)](const uint8_t* q) { munmap((void*)q, n); }};
}

// llm.c: only the header's count and the BOS tokens tell what is inside, so the whole file is scanned once.
inline void shard_open_llmc(Shard& s, const int32_t* word, bool gpt2) {
    const char* path = s.path.c_str();
    int32_t version = gpt2 ? 1 : 7;
    if (word[1] != version) fail("%s: version %d of llm.c's format, expected %d", path, word[1], version);
    s.token_bytes = gpt2 ? 2 : 4, s.tokens = word[2];
    s.vocabulary = gpt2 ? 50257 : 128256, s.bos = gpt2 ? 50256 : 128000, s.eos = gpt2 ? 50256 : 128001;
    if (s.tokens < 0) fail("%s: absurd token count %lld", path, (long long)s.tokens);
    int64_t expected = tokens_header_bytes + s.tokens * s.token_bytes;
    if (s.size != expected)
        fail("%s: %s: %lld bytes, its header's %lld tokens need %lld", path,
             s.size < expected ? "truncated" : "too long", (long long)s.size, (long long)s.tokens, (long long)expected);
    s.headless = s.tokens > 0 && shard_token(s, 0) != s.bos;
    if (s.headless) s.begin.push_back(0);
    for (int64_t i = 0; i < s.tokens; i++)
        if (shard_token(s, i) == s.bos) s.begin.push_back(i);
    s.begin.push_back(s.tokens);
}

// A table of `count` entries must lie behind the tokens and inside the file. Returns its end.
inline int64_t table_end(const Shard& s, const char* what, int64_t at, int64_t count, int64_t entry) {
    int64_t first = tokens_header_bytes + s.tokens * s.token_bytes;
    if (count < 0 || count > s.size / entry)
        fail("%s: absurd number of %ss: %lld", s.path.c_str(), what, (long long)count);
    if (at < first || at > s.size - count * entry)
        fail("%s: the %s table (%lld entries at byte %lld) is not inside the file of %lld bytes behind its tokens; "
             "it is truncated or damaged",
             s.path.c_str(), what, (long long)count, (long long)at, (long long)s.size);
    return at + count * entry;
}

inline void read_sources(Shard& s, int64_t at, int64_t count) {
    s.sources.resize(size_t(count));
    if (count) memcpy(s.sources.data(), s.bytes.get() + at, size_t(count) * sizeof(Source));
    for (const Source& source : s.sources) {
        if (source.n_tags < 0 || source.n_tags > 15)
            fail("%s: source '%.64s' has %d tag tokens, outside 0..15", s.path.c_str(), source.name, source.n_tags);
        for (int i = 0; i < source.n_tags; i++)
            if (source.tag[i] < 0 || source.tag[i] >= s.vocabulary)
                fail("%s: source '%.64s': tag token %d is outside the vocabulary of %d", s.path.c_str(), source.name,
                     source.tag[i], s.vocabulary);
    }
}

inline void read_documents(Shard& s, int64_t at, int64_t count) {
    const char* path = s.path.c_str();
    if (s.tokens > 0 && count == 0) fail("%s: %lld tokens but no documents", path, (long long)s.tokens);
    s.begin.reserve(size_t(count) + 1);
    s.source_of.reserve(size_t(count));
    for (int64_t i = 0; i < count; i++) {
        DocumentEntry e;
        memcpy(&e, s.bytes.get() + at + i * int64_t(sizeof e), sizeof e);
        int64_t least = i ? s.begin.back() : 0, most = i ? s.tokens : 0;
        if (e.begin < least || e.begin > most)
            fail("%s: document %lld begins at token %lld, outside %lld..%lld: the document table is damaged", path,
                 (long long)i, (long long)e.begin, (long long)least, (long long)most);
        if (e.source < 0 || e.source >= int64_t(s.sources.size()))
            fail("%s: document %lld has source %d, the file has %zu sources", path, (long long)i, e.source,
                 s.sources.size());
        s.begin.push_back(e.begin);
        s.source_of.push_back(e.source);
    }
    s.begin.push_back(s.tokens);
}

inline void shard_open_own(Shard& s, const int32_t* word) {
    const char* path = s.path.c_str();
    int64_t documents, document_table, source_table;
    if (word[1] != tokens_version)
        fail("%s: version %d of the token format, this program reads %d; prepare the data again", path, word[1],
             tokens_version);
    memcpy(&s.tokens, word + 4, 8);
    memcpy(&documents, word + 6, 8);
    memcpy(&s.tokenizer, word + 12, 8);
    memcpy(&document_table, word + 14, 8);
    memcpy(&source_table, word + 16, 8);
    s.token_bytes = word[2], s.vocabulary = word[3], s.bos = word[9], s.eos = word[10];
    if (s.token_bytes != 2 && s.token_bytes != 4) fail("%s: %d bytes per token, expected 2 or 4", path, s.token_bytes);
    if (s.vocabulary < 1) fail("%s: absurd vocabulary size %d", path, s.vocabulary);
    for (int32_t id : {s.bos, s.eos})
        if (id < -1 || id >= s.vocabulary)
            fail("%s: bos or eos is %d, outside its vocabulary of %d", path, id, s.vocabulary);
    if (s.tokens < 0) fail("%s: absurd token count %lld", path, (long long)s.tokens);
    if (s.tokens > (s.size - tokens_header_bytes) / s.token_bytes)
        fail("%s: truncated: %lld bytes, too few for its header's %lld tokens", path, (long long)s.size,
             (long long)s.tokens);
    int64_t end = std::max(table_end(s, "document", document_table, documents, sizeof(DocumentEntry)),
                           table_end(s, "source", source_table, word[8], sizeof(Source)));
    if (end != s.size)
        fail("%s: %lld bytes, its tables end at %lld: the file is damaged", path, (long long)s.size, (long long)end);
    read_sources(s, source_table, word[8]);
    read_documents(s, document_table, documents);
}

inline void shard_open(Shard& s, int32_t V) {
    shard_map(s);
    const char* path = s.path.c_str();
    int32_t word[256];
    memcpy(word, s.bytes.get(), sizeof word);
    if (word[0] == tokens_magic) shard_open_own(s, word);
    else if (tokens_are(word[0])) shard_open_llmc(s, word, word[0] == gpt2_magic);
    else fail("%s: not a token file (magic %d); make one with data/prepare.py", path, word[0]);
    if (s.vocabulary > V)
        fail("%s: vocabulary of %d, the model has %d: tokenise with the model's own tokenizer", path, s.vocabulary, V);
}

// The document's number in the shard is i - first_document. Whether it has its own BOS follows from the
// format's promise, so that lengths are known without touching the tokens; corpus_read holds it to it.
inline Document shard_document(const Shard& s, int64_t i) {
    int64_t n = s.begin[i + 1] - s.begin[i];
    const Source* source = s.sources.empty() ? nullptr : &s.sources[s.source_of[i]];
    return {n, n > 0 && s.bos >= 0 && !(s.headless && i == 0), source, &s, s.begin[i]};
}

// Opens the shards named by `paths` for a model with V token ids, and checks everything but the tokens.
inline void corpus_open(Corpus& c, const std::string& paths, int32_t V) {
    c = Corpus{};
    c.V = V;
    for (const std::string& path : expand_paths(paths)) {
        Shard& s = c.shards.emplace_back();
        s.path = path;
        shard_open(s, V);
        const Shard& first = c.shards[0];
        if (s.vocabulary != first.vocabulary || s.bos != first.bos || s.tokenizer != first.tokenizer)
            fail("%s: made with another tokenizer than %s (vocabulary %d and %d, bos %d and %d); train on one",
                 path.c_str(), first.path.c_str(), s.vocabulary, first.vocabulary, s.bos, first.bos);
        s.first_document = c.documents;
        int64_t documents = int64_t(s.begin.size()) - 1;
        c.documents += documents;
        for (int64_t i = 0; i < documents; i++) {
            Document d = shard_document(s, i);
            c.text += d.tokens - d.own_bos;
        }
        for (const Source& source : s.sources) c.max_tags = std::max(c.max_tags, source.n_tags);
    }
    c.bos = c.shards[0].bos, c.eos = c.shards[0].eos;
    if (c.text == 0) fail("%s: no document holds a token besides its BOS: nothing to train on", paths.c_str());
}

// Documents without end and without a file: BOS, then tokens of a small alphabet that follow one of four
// rules, next = 5 * previous + b (mod M), with 15% of the tokens drawn at random. For M a power of two and b
// odd a rule visits the whole alphabet. A model learns the rules (they do not depend on the seed, so validation
// data may have another one) and, in context, which of them a document follows. Its loss then falls from ln V to
// 0.15 ln M - 0.85 ln 0.85 - 0.15 ln 0.15, that is 1.25 for M = 256.
constexpr int64_t generator_documents = int64_t(1) << 40;

inline void corpus_generate(Corpus& c, double mean, uint64_t seed, int32_t V, int32_t bos) {
    if (!(mean >= 2 && mean <= 1e6)) fail("the generator's mean document length is %g, outside 2..1e6", mean);
    if (V < 4) fail("the generator needs a vocabulary of at least 4, this one has %d", V);
    c = Corpus{};
    c.documents = generator_documents;
    c.V = V, c.bos = bos, c.mean = mean, c.seed = seed;
}

// Exponential with the given mean, at least 2 tokens with the BOS.
inline int64_t generated_length(const Corpus& c, int64_t document) {
    double u = hash_uniform(c.seed, uint64_t(document));
    return 2 + std::llround((c.mean - 2) * -std::log1p(-u));
}

inline void generate_document(Corpus& c, int64_t document) {
    if (c.cached == document) return;
    c.cached = document;
    c.cache.resize(size_t(generated_length(c, document)));
    uint64_t M = 1;
    while (M < 256 && M * 4 <= uint64_t(c.V)) M *= 2; // at most half the vocabulary, from V / 4 on
    const int32_t first = c.V / 4;
    const uint64_t key = hash64(~c.seed, uint64_t(document));
    const uint64_t b = hash64(0, key & 3) | 1;
    uint64_t value = key >> 32;
    c.cache[0] = c.bos;
    for (size_t i = 1; i < c.cache.size(); i++) {
        uint64_t random = hash64(key, i);
        bool noise = double(random >> 11) * 0x1.0p-53 < 0.15;
        value = (noise ? hash64(~key, i) : 5 * value + b) % M;
        int32_t id = first + int32_t(value);
        c.cache[i] = id + (c.bos >= first && id >= c.bos); // the BOS itself never stands inside a document
    }
}

inline Document corpus_document(const Corpus& c, int64_t i) {
    if (c.shards.empty()) return {generated_length(c, i), true, nullptr, nullptr, 0};
    auto after = std::upper_bound(c.shards.begin(), c.shards.end(), i,
                                  [](int64_t n, const Shard& s) { return n < s.first_document; });
    const Shard& s = *(after - 1); // shards without documents share their number with the next: the last is taken
    return shard_document(s, i - s.first_document);
}

// Tokens [offset, offset + count) of document i, each checked against the vocabulary.
inline void corpus_read(Corpus& c, int64_t i, int64_t offset, int64_t count, int32_t* out) {
    Document d = corpus_document(c, i);
    REQUIRE(offset >= 0 && count >= 0 && offset + count <= d.tokens, "read inside the document");
    if (!d.shard) {
        generate_document(c, i);
        std::copy_n(c.cache.begin() + offset, count, out);
        return;
    }
    const Shard& s = *d.shard;
    const char* path = s.path.c_str();
    // Also when the BOS is about to be stripped: were it text, a token would be lost in silence.
    if (d.own_bos && offset <= 1 && shard_token(s, d.begin) != s.bos)
        fail("%s: token %lld begins a document but is %d, not the BOS %d named in the header", path, (long long)d.begin,
             shard_token(s, d.begin), s.bos);
    for (int64_t k = 0; k < count; k++) {
        int64_t at = d.begin + offset + k;
        out[k] = shard_token(s, at);
        if (uint32_t(out[k]) >= uint32_t(c.V))
            fail("%s: token %lld (byte %lld) has id %u, outside the model's vocabulary of %d", path, (long long)at,
                 (long long)(tokens_header_bytes + at * s.token_bytes), uint32_t(out[k]), c.V);
    }
}
