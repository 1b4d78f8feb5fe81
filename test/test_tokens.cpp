// Token files: what is read, from where, and everything that is refused; and the generator.
#include "token_files.h"
#include <set>

using namespace token_files;

TEST_CASE("paths: lists and patterns, in byte order") {
    Folder folder;
    for (const char* name : {"x_b.bin", "x_B.bin", "x_a.bin", "y.bin", "odd[1].bin"})
        write_file(folder / name, own_shard({{{int32_t(100 + name[2])}, true, 0}}, 2, true));
    auto names = [&](const std::string& list) {
        std::string all;
        for (const std::string& path : expand_paths(list)) all += path.substr(folder.path.size() + 1) + " ";
        return all;
    };
    CHECK(names(folder / "x_*.bin") == "x_B.bin x_a.bin x_b.bin ");
    CHECK(names((folder / "y.bin") + "," + (folder / "x_[ab].bin")) == "y.bin x_a.bin x_b.bin ");
    CHECK(names(folder / "odd[1].bin") == "odd[1].bin ");
    Corpus c;
    corpus_open(c, folder / "x_*.bin", vocabulary);
    CHECK((c.documents == 3 && c.text == 3 && c.bos == bos_id));
    Ids token(2);
    for (int i = 0; i < 3; i++) {
        corpus_read(c, i, 0, 2, token.data());
        CHECK(token == Ids{bos_id, 100 + "Bab"[i]});
    }
}

TEST_CASE("llm.c shards: documents begin at BOS, with or without one at the start") {
    Folder folder;
    for (int version : {1, 7}) {
        int32_t magic = version == 1 ? 20240520 : 20240801, bos = version == 1 ? 50256 : 128000;
        write_file(folder / "a.bin", llmc_shard(magic, version, {bos, 5, 6, bos, bos, 7}));
        write_file(folder / "b.bin", llmc_shard(magic, version, {8, 9, bos, 10}));
        Loader l;
        PackOptions o = options_for(9);
        o.V = 130000, o.attention = Attention::intra;
        loader_open(l, folder / "?.bin", o);
        CHECK((l.corpus.documents == 5 && l.corpus.text == 6 && l.bos == bos));
        Row row;
        loader_next(l, row);
        CHECK(row.token == Ids{bos, 5, 6, bos, bos, 7, 8, 9, bos});
        CHECK(row.doc == Ids{1, 1, 1, 2, 3, 3, 4, 4, 5});
        CHECK(row.label == Ids{5, 6, -1, -1, 7, -1, 9, -1, 10});
        CHECK((row.inputs == 5 && row.counted == 5));
        o.attention = Attention::anchor, o.boundary = Boundary::next;
        loader_open(l, folder / "?.bin", o);
        loader_next(l, row);
        CHECK(row.token == Ids{bos, 5, 6, 7, 8, 9, 10, 5, 6});
        CHECK(row.doc == Ids{0, 1, 1, 2, 3, 3, 4, 5, 5});
        CHECK(row.label == Ids{5, 6, 7, 8, 9, 10, 5, 6, -1});
        CHECK((l.cursor.epoch == 1 && l.cursor.document == 0 && l.cursor.offset == 3));
    }
    write_file(folder / "a.bin", llmc_shard(20240801, 7, {128000, 3}));
    auto opened = [&](int32_t V) {
        return fails_with([&] {
            Corpus c;
            corpus_open(c, folder / "a.bin", V);
        });
    };
    CHECK(opened(128256) == "");
    CHECK(opened(32000).find("vocabulary of 128256, the model has 32000") != std::string::npos);
    write_file(folder / "b.bin", llmc_shard(20240520, 1, {50256, 3}));
    std::string both = fails_with([&] {
        Corpus c;
        corpus_open(c, folder / "?.bin", 130000);
    });
    CHECK(both.find("another tokenizer") != std::string::npos);
}

TEST_CASE("shards made with different tokenizers are not mixed") {
    Folder folder;
    const Bytes shard = own_shard({{{200, 201}, true, 0}}, 4, true);
    write_file(folder / "a.bin", shard);
    for (size_t at : {12, 36, 48, 0}) { // vocabulary size, bos, tokenizer hash; none
        Bytes other = shard;
        if (at) put(other, at == 36 ? -1 : vocabulary - 1, at);
        write_file(folder / "b.bin", other);
        std::string message = fails_with([&] {
            Corpus c;
            corpus_open(c, folder / "?.bin", vocabulary);
        });
        CHECK((message.find("b.bin: made with another tokenizer than") != std::string::npos) == (at > 0));
        CHECK((message == "") == (at == 0));
    }
}

// The message when these files are opened and packed for one epoch.
static std::string opening(const std::string& paths) {
    std::string message = fails_with([&] {
        Loader l;
        Row row;
        for (loader_open(l, paths, options_for(64)); l.cursor.epoch == 0;) loader_next(l, row);
    });
    CHECK(std::count(message.begin(), message.end(), '\n') == !message.empty()); // one line
    return message;
}

TEST_CASE("readers refuse: missing, empty, truncated, wrong magic or version, absurd sizes, damaged tables") {
    Folder folder;
    const std::vector<Text> texts = {{{200, 201, 202}, true, 0}, {{203}, true, 1}, {{204, 205}, true, 2}};
    const Bytes own = own_shard(texts, 2, true), gpt2 = llmc_shard(20240520, 1, {50256, 4, 5});
    const size_t documents = 1024 + 9 * 2, sources = documents + 3 * 16;
    const std::string path = folder / "x.bin";
    auto refused = [&](Bytes b, const char* expected) {
        write_file(path, b);
        std::string message = opening(path);
        INFO("message: ", message, "expected: ", expected);
        CHECK(message.find(expected) != std::string::npos);
        CHECK(message.find(path) != std::string::npos);
    };
    auto changed = [](Bytes b, auto value, size_t at) { return put(b, value, at), b; };
    auto cut = [](Bytes b, size_t size) { return b.resize(size), b; };
    write_file(path, own);
    CHECK(opening(path) == "");
    write_file(path, gpt2);
    CHECK(opening(path) == "");

    CHECK(opening(folder / "none.bin").find("none.bin: no such token file") != std::string::npos);
    CHECK(opening(folder / "none*").find("none*: no such token file") != std::string::npos);
    CHECK(opening(path + ",,").find("empty name") != std::string::npos);
    CHECK(opening(folder.path).find("not a regular file") != std::string::npos);
    refused({}, "is empty");
    for (size_t size : {1, 4, 1023}) refused(cut(own, size), "truncated");
    for (size_t size = 1024; size < own.size(); size++) {
        write_file(path, cut(own, size));
        CHECK(opening(path).find(path) != std::string::npos);
    }
    for (size_t size : {1024, 1025, 1029}) refused(cut(gpt2, size), "truncated");
    refused(cut(gpt2, 1031), "too long");
    refused(cut(own, own.size() + 1), "the file is damaged");
    refused(changed(own, 0x46554747, 0), "not a token file");
    refused(changed(own, 2, 4), "version 2 of the token format, this program reads 1");
    refused(changed(gpt2, 7, 4), "version 7 of llm.c's format, expected 1");
    refused(changed(gpt2, -1, 8), "absurd token count -1");
    refused(changed(gpt2, 0x7fffffff, 8), "truncated");
    for (int bytes : {0, 1, 3, 8, -2}) refused(changed(own, bytes, 8), "bytes per token, expected 2 or 4");
    for (int size : {0, -5}) refused(changed(own, size, 12), "absurd vocabulary size");
    for (int64_t count : {int64_t(-1), INT64_MIN}) refused(changed(own, count, 16), "absurd token count");
    for (int64_t count : {int64_t(1000), INT64_MAX, int64_t(1) << 62}) refused(changed(own, count, 16), "truncated");
    for (int64_t count : {int64_t(-1), int64_t(1) << 60, INT64_MAX})
        refused(changed(own, count, 24), "absurd number of documents");
    refused(changed(own, int64_t(0), 24), "9 tokens but no documents");
    refused(changed(own, int64_t(40), 24), "document table");
    for (int count : {-1, 0x7fffffff}) refused(changed(own, count, 32), "absurd number of sources");
    refused(changed(own, 4, 32), "source table");
    for (int id : {-2, vocabulary, 0x7fffffff}) {
        refused(changed(own, id, 36), "bos or eos");
        refused(changed(own, id, 40), "bos or eos");
    }
    for (int64_t at : {INT64_MIN, int64_t(-8), int64_t(1024), int64_t(documents - 1), int64_t(own.size()), INT64_MAX}) {
        refused(changed(own, at, 56), "document table");
        refused(changed(own, at, 64), "source table");
    }
    refused(changed(own, int64_t(1), documents), "document 0 begins at token 1, outside 0..0");
    for (int64_t at : {int64_t(-1), int64_t(10), INT64_MAX, INT64_MIN})
        refused(changed(own, at, documents + 16), "document 1 begins at token");
    refused(changed(own, int64_t(3), documents + 32), "document 2 begins at token 3, outside 4..9");
    for (int source : {-1, 3, 0x7fffffff}) refused(changed(own, source, documents + 8), "document 0 has source");
    for (int n : {-1, 16}) refused(changed(own, n, sources + 64), "tag tokens, outside 0..15");
    for (int tag : {-1, vocabulary}) refused(changed(own, tag, sources + 128 + 68), "source 'book': tag token");
    refused(changed(own, vocabulary + 1, 12), "vocabulary of 60001, the model has 60000");
    refused(own_shard({}, 2, true), "nothing to train on");
    refused(own_shard({{{}, true, 0}, {{}, false, 0}}, 2, true), "nothing to train on");
    refused(llmc_shard(20240520, 1, {50256, 50256}), "nothing to train on");
    refused(llmc_shard(20240520, 1, {}), "nothing to train on");
}

TEST_CASE("a token id out of range is named with file and offset, where it is read and only there") {
    Folder folder;
    for (uint32_t id : {uint32_t(vocabulary), 65535u, 0x7fffffffu, 0xfffffff0u}) {
        int token_bytes = id > 65535 ? 4 : 2;
        std::vector<Text> texts = {{Ids(100, 200), true, 0}, {Ids(100, 201), true, 1}};
        const std::string path = folder / "x.bin";
        Bytes b = own_shard(texts, token_bytes, true);
        memcpy(b.data() + 1024 + 150 * token_bytes, &id, size_t(token_bytes));
        write_file(path, b);
        std::string want = path + ": token 150 (byte " + std::to_string(1024 + 150 * token_bytes) + ") has id " +
                           std::to_string(id) + ", outside the model's vocabulary of 60000";
        CHECK(opening(path).find(want) != std::string::npos);
        CHECK(fails_with([&] { // skipping reads no token, and the first row holds none of the second document
                  Loader l;
                  Row row;
                  loader_open(l, path, options_for(64));
                  loader_next(l, row);
                  while (l.cursor.epoch == 0) loader_skip(l);
              }) == "");

        b = own_shard(texts, token_bytes, true);
        put(b, uint16_t(207), 1024 + 101 * size_t(token_bytes)); // where the second document's BOS should be
        write_file(path, b);
        want = path + ": token 101 begins a document but is 207, not the BOS 1";
        CHECK(opening(path).find(want) != std::string::npos);
    }
}

TEST_CASE("generator: a pure function of seed and document, of the asked length, and learnable") {
    auto document = [](Corpus& c, int64_t i) {
        Ids ids(size_t(corpus_document(c, i).tokens));
        corpus_read(c, i, 0, int64_t(ids.size()), ids.data());
        return ids;
    };
    for (int32_t V : {4, 17, 512, 32000}) {
        Corpus a, b, other;
        for (Corpus* c : {&a, &b}) corpus_generate(*c, 100, 7, V, 1);
        corpus_generate(other, 100, 8, V, 1);
        std::vector<Ids> forward;
        for (int i = 0; i < 50; i++) forward.push_back(document(a, i));
        for (int i = 49; i >= 0; i--) CHECK(document(b, i) == forward[size_t(i)]);
        CHECK(document(other, 0) != forward[0]);
        for (const Ids& ids : forward) {
            CHECK((ids.size() >= 2 && ids[0] == 1));
            for (size_t i = 1; i < ids.size(); i++) CHECK((ids[i] >= 0 && ids[i] < V && ids[i] != 1));
        }
    }
    Corpus c;
    corpus_generate(c, 100, 7, 512, 1);
    double sum = 0, squares = 0, n = 20000;
    for (int i = 0; i < n; i++) {
        double tokens = double(corpus_document(c, i).tokens);
        sum += tokens, squares += tokens * tokens;
    }
    double mean = sum / n, deviation = std::sqrt(squares / n - mean * mean);
    CHECK(std::fabs(mean - 100) < 5 * 98 / std::sqrt(n)); // an exponential's deviation is its mean
    CHECK(std::fabs(deviation - 98) < 5);

    // The commonest successor of each token is the document's rule. It is followed in 85% of the places, the rules
    // are few, and they are the same for every seed.
    std::set<Ids> rules[2];
    for (int seed = 0; seed < 2; seed++) {
        corpus_generate(c, 20000, uint64_t(seed), 512, 1);
        for (int64_t i = 0; i < 40; i++) {
            Ids ids = document(c, i);
            if (ids.size() < 8000) continue; // 31 visits a token: the commonest is the rule's almost surely
            std::vector<Ids> count(512, Ids(512));
            for (size_t k = 1; k + 1 < ids.size(); k++) count[size_t(ids[k])][size_t(ids[k + 1])]++;
            Ids rule;
            double followed = 0;
            for (const Ids& row : count) {
                rule.push_back(int32_t(std::max_element(row.begin(), row.end()) - row.begin()));
                followed += *std::max_element(row.begin(), row.end());
            }
            CHECK(std::fabs(followed / double(ids.size()) - 0.85) < 0.03);
            rules[seed].insert(rule);
        }
    }
    CHECK(rules[0].size() == 4);
    CHECK(rules[0] == rules[1]);

    Loader l; // packs like any other data
    PackOptions o = options_for(1024);
    o.mean = 100, o.shuffle = true;
    loader_open(l, "", o);
    Row row;
    for (int r = 0; r < 20; r++) {
        loader_next(l, row);
        CHECK((row.inputs == 1023 && row.padding == 0 && row.documents > 1));
    }
}
