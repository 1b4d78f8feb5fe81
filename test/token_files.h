// Little token files for the tests, written field by field as the formats are described.
#pragma once
#include "../core/dataloader.h"
#include "check.h"
#include "fails.h"
#include <filesystem>
#include <fstream>

namespace token_files {

using Ids = std::vector<int32_t>;
using Bytes = std::vector<uint8_t>;

constexpr int32_t vocabulary = 60000, bos_id = 1, first_text = 100; // tags are 2..99

// Removed with all its files at the end of the test.
struct Folder {
    std::string path;
    Folder() {
        char name[] = "/tmp/test_tokens_XXXXXX";
        REQUIRE(mkdtemp(name), "make /tmp writable");
        path = name;
    }
    Folder(const Folder&) = delete;
    ~Folder() { std::filesystem::remove_all(path); }
    std::string operator/(const char* name) const { return path + "/" + name; }
};

template <class N> void put(Bytes& b, N value, size_t at) {
    if (b.size() < at + sizeof value) b.resize(at + sizeof value);
    memcpy(b.data() + at, &value, sizeof value);
}
template <class N> void append(Bytes& b, N value) { put(b, value, b.size()); }

inline void write_file(const std::string& path, const Bytes& b) {
    std::ofstream(path, std::ios::binary).write((const char*)b.data(), std::streamsize(b.size()));
}

inline void append_ids(Bytes& b, const Ids& ids, int token_bytes) {
    for (int32_t id : ids)
        if (token_bytes == 2) append(b, uint16_t(id));
        else append(b, uint32_t(id));
}

inline Source make_source(const char* name, Ids tags) {
    Source s{};
    strncpy(s.name, name, sizeof s.name - 1);
    s.n_tags = int32_t(tags.size());
    std::copy(tags.begin(), tags.end(), s.tag);
    return s;
}

// No tags, some, and as many as there can be.
inline const std::vector<Source> three_sources = {
    make_source("plain", {}), make_source("book", {2, 3, 4}),
    make_source("code", {5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19})};

// A document as the oracle sees it; in the file its BOS stands before the ids.
struct Text {
    Ids ids;
    bool own_bos;
    int source;
};

// A shard in our own format. An empty text without a BOS is a document of length 0.
inline Bytes own_shard(const std::vector<Text>& texts, int token_bytes, bool bos) {
    Bytes b(1024), table;
    int64_t tokens = 0;
    for (const Text& t : texts) {
        append(table, DocumentEntry{tokens, t.source, 0});
        if (t.own_bos) append_ids(b, {bos_id}, token_bytes);
        append_ids(b, t.ids, token_bytes);
        tokens += int64_t(t.ids.size()) + t.own_bos;
    }
    const int32_t head[] = {20261120, 1, token_bytes, vocabulary};
    for (int i = 0; i < 4; i++) put(b, head[i], size_t(4 * i));
    put(b, tokens, 16);
    put(b, int64_t(texts.size()), 24);
    put(b, int32_t(three_sources.size()), 32);
    put(b, bos ? bos_id : -1, 36);
    put(b, int32_t(2), 40);
    put(b, uint64_t(77), 48);
    put(b, int64_t(b.size()), 56);
    b.insert(b.end(), table.begin(), table.end());
    put(b, int64_t(b.size()), 64);
    for (const Source& s : three_sources) append(b, s);
    return b;
}

inline Bytes llmc_shard(int32_t magic, int32_t version, const Ids& ids) {
    Bytes b(1024);
    put(b, magic, 0);
    put(b, version, 4);
    put(b, int32_t(ids.size()), 8);
    append_ids(b, ids, version == 1 ? 2 : 4);
    return b;
}

inline PackOptions options_for(size_t S) {
    PackOptions o;
    o.S = S, o.V = vocabulary, o.bos = bos_id, o.seed = 5;
    return o;
}

} // namespace token_files
