// Token files and packing. The oracle rebuilds every row token by token from documents whose text ids are all
// different, so that a token tells which document and place it comes from.
#include "token_files.h"
#include <map>
#include <set>

using namespace token_files;

namespace {

// Documents of every kind: empty, only a BOS, one token, cut by rows, 64..2048 tokens and longer.
std::vector<Text> make_texts(bool bos, int count, uint64_t seed) {
    const int sizes[] = {0, 1, 2, 5, 40, 63, 64, 65, 300, 1, 17, 2049, 130, 0, 700, 90};
    std::vector<Text> texts;
    int32_t id = first_text;
    for (int i = 0; i < count; i++) {
        int size = i < 16 ? sizes[i] : int(hash64(seed, i) % 200);
        Text t{{}, bos && !(size == 0 && i % 2), int(hash64(seed + 1, i) % 3)};
        for (int k = 0; k < size; k++) t.ids.push_back(id++);
        texts.push_back(t);
    }
    REQUIRE(id <= vocabulary, "write shorter texts: ids are unique");
    return texts;
}

void write_two_shards(const Folder& folder, const std::vector<Text>& texts, bool bos) {
    size_t half = texts.size() / 2;
    write_file(folder / "a.bin", own_shard({texts.begin(), texts.begin() + half}, 2, bos));
    write_file(folder / "b.bin", own_shard({texts.begin() + half, texts.end()}, 4, bos));
}

// One place of an oracle's row. `next` is the token after it in its own segment or, beyond the row's end, in its
// document; -2 behind a document's last.
struct Place {
    enum Kind { anchor, bos, tag, text, pad } kind;
    int32_t token, next, segment, index;
    bool next_is_tag;
};

// Rebuilds rows from the texts, one token at a time, epoch after epoch in the loader's order.
struct Oracle {
    const std::vector<Text>& texts;
    PackOptions o;
    const Loader& loader;
    int64_t epoch = 0;
    size_t document = 0, used = 0; // position in the epoch's order; text tokens used
    bool bos_done = false;

    Place place(Place::Kind kind, int32_t token, int32_t segment) { return {kind, token, -2, segment, 0, false}; }

    // The next segment, at most `room` long, with the places' `next` set; empty: the row ends early.
    std::vector<Place> take(const Text& t, size_t room, int32_t segment) {
        std::vector<Place> s;
        if (t.own_bos && !bos_done && o.attention != Attention::anchor) s.push_back(place(Place::bos, bos_id, segment));
        const Source& source = three_sources[t.source];
        if (o.domain_tags && used < t.ids.size())
            for (int i = 0; i < source.n_tags; i++) s.push_back(place(Place::tag, source.tag[i], segment));
        if (o.domain_tags && source.n_tags && used < t.ids.size() && s.size() >= room) return {};
        while (s.size() < room && used < t.ids.size()) s.push_back(place(Place::text, t.ids[used++], segment));
        bos_done = true;
        for (size_t i = 0; i < s.size(); i++) {
            s[i].index = int32_t(i);
            if (i + 1 < s.size()) s[i].next = s[i + 1].token, s[i].next_is_tag = s[i + 1].kind == Place::tag;
            else if (used < t.ids.size()) s[i].next = t.ids[used];
        }
        return s;
    }

    // A row before any interleaving.
    std::vector<Place> row() {
        std::vector<Place> row;
        int32_t segments = 0;
        if (o.attention == Attention::anchor) row.push_back(place(Place::anchor, bos_id, 0));
        while (row.size() < o.S) {
            const Text& t = texts[size_t(document_at(loader, epoch, int64_t(document)))];
            bool bos_left = t.own_bos && !bos_done && o.attention != Attention::anchor;
            if (used == t.ids.size() && !bos_left) {
                used = 0, bos_done = false;
                if (++document == texts.size()) document = 0, epoch++;
                continue;
            }
            std::vector<Place> s = take(t, o.S - row.size(), ++segments);
            while (s.empty() && row.size() < o.S) row.push_back(place(Place::pad, 0, segments));
            row.insert(row.end(), s.begin(), s.end());
        }
        int32_t pads = 0;
        for (Place& p : row)
            if (p.kind == Place::pad) p.index = pads++;
        return row;
    }
};

int32_t expected_label(const std::vector<Place>& row, size_t p, const PackOptions& o) {
    const Place& at = row[p];
    bool neighbour = p + 1 < row.size() && row[p + 1].kind != Place::pad && row[p + 1].kind != Place::tag;
    if (at.kind == Place::pad || at.next_is_tag) return -1;
    if (at.kind == Place::anchor) return neighbour ? row[p + 1].token : -1;
    if (at.next != -2) return at.next;
    if (o.boundary == Boundary::bos) return bos_id;
    return o.boundary == Boundary::next && neighbour ? row[p + 1].token : -1;
}

// The oracle's row in the order the loader chose: checks that each segment's places keep their order, that it
// is cut into at most 3 pieces, if any, and that anchor and padding stay where they are.
std::vector<Place> follow_order(const std::vector<Place>& plain, const Ids& doc, const Loader& l) {
    std::map<int32_t, std::vector<Place>> of;
    for (const Place& p : plain) of[p.segment].push_back(p);
    std::map<int32_t, size_t> used, runs;
    std::vector<Place> row;
    for (size_t p = 0; p < doc.size(); p++) {
        size_t& next = used[doc[p]];
        REQUIRE(next < of[doc[p]].size(), "the row has more tokens of this document than the oracle's");
        row.push_back(of[doc[p]][next++]);
        runs[doc[p]] += p == 0 || doc[p] != doc[p - 1];
    }
    for (auto& [segment, places] : of) {
        size_t size = places.size();
        bool document = places[0].kind != Place::anchor && places[0].kind != Place::pad;
        bool cut = l.options.interleave && size >= 64 && size <= 2048 && document;
        CHECK(runs[segment] <= (cut ? 3 : 1));
    }
    for (size_t p = 0; p < doc.size(); p++)
        if (plain[p].kind == Place::anchor || plain[p].kind == Place::pad) CHECK(row[p].segment == plain[p].segment);
    return row;
}

// What the rows so far held: how often each text token was an input, and how often the label of a text token of
// the first epoch.
struct Totals {
    std::vector<int> input = std::vector<int>(vocabulary), label = std::vector<int>(vocabulary);
    int64_t inputs = 0, moved = 0;
};

// Compares one row of the loader with the oracle's, field by field.
void check_row(const Row& row, const std::vector<Place>& plain, const Ids& doc, const Loader& l, Totals& totals) {
    const PackOptions& o = l.options;
    std::vector<Place> want = follow_order(plain, doc, l);
    int64_t counted = 0, count[5] = {}, wrong = 0;
    std::set<int32_t> segments;
    for (size_t p = 0; p < o.S; p++) {
        const Place& w = want[p];
        int32_t label = expected_label(want, p, o);
        wrong += row.token[p] != w.token || row.label[p] != label;
        wrong += row.pos[p] != (o.attention == Attention::intra_reset ? w.index : int32_t(p));
        wrong += row.doc[p] != (o.attention == Attention::full ? 0 : w.segment);
        counted += label >= 0;
        count[w.kind]++;
        if (w.kind != Place::pad && w.kind != Place::anchor) segments.insert(w.segment);
        if (w.kind == Place::text && totals.input[w.token]++ == 0 && label >= 0) totals.label[label]++;
        totals.moved += w.token != plain[p].token;
    }
    CHECK(wrong == 0);
    CHECK(row.counted == counted);
    CHECK(row.anchors == count[Place::anchor]);
    CHECK(row.inputs == count[Place::text]);
    CHECK(row.tags == count[Place::tag]);
    CHECK(row.padding == count[Place::pad]);
    CHECK(row.documents == int64_t(segments.size()));
    totals.inputs += row.inputs;
}

bool same_row(const Row& a, const Row& b) {
    return a.token == b.token && a.doc == b.doc && a.pos == b.pos && a.label == b.label && a.counted == b.counted;
}

bool same_cursor(const Cursor& a, const Cursor& b) {
    return a.epoch == b.epoch && a.document == b.document && a.offset == b.offset && a.rows == b.rows;
}

// Conservation, from the texts alone: the rows' text is the epochs' documents back to back, up to where they
// got; and in the first epoch each token is the label of a text token once, unless it begins its document.
void check_totals(const std::vector<Text>& texts, const Loader& l, const Totals& totals) {
    std::vector<int> want(vocabulary);
    int64_t left = totals.inputs;
    for (int64_t epoch = 0; left > 0; epoch++)
        for (size_t i = 0; i < texts.size(); i++)
            for (int32_t id : texts[size_t(document_at(l, epoch, int64_t(i)))].ids)
                if (left-- > 0) want[id]++;
    CHECK(totals.input == want);
    if (l.options.boundary != Boundary::mask) return;
    for (const Text& t : texts)
        for (size_t i = 0; i < t.ids.size(); i++) want[t.ids[i]] = i > 0;
    CHECK(totals.label == want);
}

// Two epochs of rows against the oracle, skipping beside it, and restoring the cursor now and then. Full mode
// hides the documents; its layout is that of intra.
void check_packing(const std::vector<Text>& texts, const std::string& paths, const PackOptions& o) {
    PackOptions shown = o;
    if (o.attention == Attention::full) shown.attention = Attention::intra;
    Loader l, skipper, resumed, numbered;
    loader_open(l, paths, o);
    loader_open(skipper, paths, o);
    loader_open(resumed, paths, o);
    loader_open(numbered, paths, shown);
    Oracle oracle{texts, o, l};
    Totals totals;
    Row row, again, with_documents;
    while (oracle.epoch < 2) {
        Cursor before = l.cursor;
        loader_next(l, row);
        loader_next(numbered, with_documents);
        check_row(row, oracle.row(), with_documents.doc, l, totals);
        Row skipped = loader_skip(skipper);
        CHECK(same_cursor(l.cursor, skipper.cursor));
        CHECK(skipped.counted == row.counted);
        CHECK((skipped.inputs == row.inputs && skipped.tags == row.tags && skipped.documents == row.documents));
        if (before.rows % 7 == 3) {
            loader_seek(resumed, before);
            loader_next(resumed, again);
            CHECK(same_row(row, again));
        }
    }
    check_totals(texts, l, totals);
    CHECK((totals.moved > 0) == o.interleave);
}

} // namespace

TEST_CASE("packing: every mode against the oracle, nothing lost and nothing twice") {
    Folder folder;
    for (bool bos : {true, false}) {
        std::vector<Text> texts = make_texts(bos, 40, 3 + bos);
        write_two_shards(folder, texts, bos);
        std::string paths = folder / "a.bin" + "," + (folder / "b.bin");
        int variant = 0;
        for (Attention attention : {Attention::full, Attention::intra, Attention::intra_reset, Attention::anchor})
            for (Boundary boundary : {Boundary::mask, Boundary::next, Boundary::bos})
                for (bool tags : {false, true})
                    for (bool interleave : {false, true})
                        for (size_t S : {size_t(17), size_t(64), size_t(257), size_t(1000), size_t(17000)}) {
                            PackOptions o = options_for(S);
                            o.attention = attention, o.boundary = boundary;
                            o.domain_tags = tags, o.interleave = interleave, o.shuffle = variant++ % 3 == 1;
                            INFO(attention_names[int(attention)], " ", boundary_names[int(boundary)], " ", S);
                            INFO("tags ", tags, " interleave ", interleave, " shuffle ", o.shuffle);
                            check_packing(texts, paths, o);
                        }
    }
}

TEST_CASE("packing: documents of one token, rows longer than the data, every epoch in one row") {
    Folder folder;
    std::vector<Text> texts = {{{200}, true, 0}, {{}, true, 1}, {{201}, true, 1}, {{}, false, 0}, {{202}, true, 2}};
    write_file(folder / "a.bin", own_shard(texts, 2, true));
    for (Attention attention : {Attention::full, Attention::intra, Attention::anchor})
        for (bool tags : {false, true})
            for (size_t S : {size_t(17), size_t(100)}) {
                PackOptions o = options_for(S);
                o.attention = attention, o.domain_tags = tags, o.boundary = Boundary::next;
                check_packing(texts, folder / "a.bin", o);
            }
}

TEST_CASE("interleave: segments of 64 to 2048 tokens are cut in 2 or 3, and only those") {
    Folder folder;
    std::vector<Text> texts;
    int32_t id = first_text;
    for (int size : {63, 64, 65, 2047, 2048, 2049}) {
        texts.push_back({{}, false, 0});
        while (size--) texts.back().ids.push_back(id++);
    }
    write_file(folder / "a.bin", own_shard(texts, 4, false));
    PackOptions o = options_for(6337); // the anchor and one epoch
    o.interleave = true;
    Loader l;
    loader_open(l, folder / "a.bin", o);
    std::map<size_t, int> seen[6];
    std::set<int32_t> leaders, first_cuts;
    for (int row = 0; row < 200; row++) {
        loader_skip(l);
        REQUIRE(l.segments.size() == 6, "a row is the six documents");
        size_t pieces[6] = {};
        for (const Chunk& c : l.chunks) {
            CHECK(c.from < c.to);
            pieces[c.segment]++;
            if (c.segment == 1 && c.from == 0) first_cuts.insert(c.to);
        }
        for (int i = 0; i < 6; i++) seen[i][pieces[i]]++;
        leaders.insert(l.chunks[0].segment);
    }
    for (int i : {0, 5}) CHECK((seen[i].size() == 1 && seen[i][1] == 200));
    for (int i : {1, 2, 3, 4}) {
        CHECK(seen[i].size() == 2);
        CHECK(seen[i][2] + seen[i][3] == 200);
        CHECK(std::abs(seen[i][2] - 100) < 36); // five standard deviations of a fair coin
    }
    CHECK(leaders.size() == 6);
    CHECK(first_cuts.size() > 40); // of 63 places
    CHECK(*first_cuts.begin() >= 1);
    CHECK(*first_cuts.rbegin() <= 63);
}

TEST_CASE("shuffle: a permutation of the documents, another one each epoch and seed, and even") {
    for (int64_t n = 1; n < 300; n++) {
        std::set<int64_t> seen;
        for (int64_t i = 0; i < n; i++) seen.insert(permuted(i, n, uint64_t(n)));
        CHECK((int64_t(seen.size()) == n && *seen.begin() == 0 && *seen.rbegin() == n - 1));
    }
    const int64_t large = generator_documents - 1;
    std::set<int64_t> seen;
    for (int64_t i = 0; i < 1000; i++) seen.insert(permuted(large - 1 - i, large, 9));
    CHECK((seen.size() == 1000 && *seen.begin() >= 0 && *seen.rbegin() < large));

    Loader l;
    PackOptions o = options_for(64);
    o.shuffle = true;
    loader_open(l, "", o);
    l.corpus.documents = 10;
    const int epochs = 20000;
    std::vector<int> place(100); // how often document d stands at position p: 2000 each, deviation 42
    for (int e = 0; e < epochs; e++)
        for (int p = 0; p < 10; p++) place[size_t(10 * p + document_at(l, e, p))]++;
    for (int count : place) CHECK(std::abs(count - epochs / 10) < 6 * 42);
    std::set<Ids> orders;
    for (uint64_t seed : {1, 2})
        for (int e = 0; e < 10; e++) {
            Ids order;
            l.options.seed = seed;
            for (int p = 0; p < 10; p++) order.push_back(int32_t(document_at(l, e, p)));
            orders.insert(order);
        }
    CHECK(orders.size() == 20);
}

TEST_CASE("rings: the rows of two rings, each skipping the other's, are those of one") {
    Folder folder;
    write_file(folder / "a.bin", own_shard(make_texts(true, 40, 3), 2, true));
    PackOptions o = options_for(100);
    o.shuffle = o.interleave = o.domain_tags = true;
    Loader one, ring[2];
    loader_open(one, folder / "a.bin", o);
    for (Loader& l : ring) loader_open(l, folder / "a.bin", o);
    for (int r = 0; r < 150; r++) {
        Row want, row;
        loader_next(one, want);
        loader_next(ring[r % 2], row);
        CHECK(same_row(want, row));
        Row skipped = loader_skip(ring[1 - r % 2]);
        CHECK((skipped.counted == want.counted && skipped.token.empty()));
    }
}

TEST_CASE("options and cursors that do not fit are refused") {
    Folder folder;
    const std::string path = folder / "x.bin";
    write_file(path, own_shard({{Ids(50, 200), false, 2}}, 2, false));
    auto message = [&](PackOptions o, Cursor c = {}) {
        return fails_with([&] {
            Loader l;
            loader_open(l, path, o);
            loader_seek(l, c);
        });
    };
    PackOptions o = options_for(17);
    o.domain_tags = true;
    CHECK(message(o) == "");
    o.S = 16;
    CHECK(message(o).find("context of 16 is too short to pack: it must be at least 17") != std::string::npos);
    for (int32_t bos : {-1, vocabulary}) {
        o = options_for(64), o.bos = bos;
        CHECK(message(o).find("outside the vocabulary") != std::string::npos);
    }
    o = options_for(64);
    CHECK(message(o, {7, 0, 50, 99}) == "");
    const Cursor unsound[] = {{-1, 0, 0, 0}, {0, 1, 0, 0}, {0, -1, 0, 0}, {0, 0, 51, 0}, {0, 0, -1, 0}, {0, 0, 0, -1}};
    for (const Cursor& c : unsound) CHECK(message(o, c).find("is not inside this data") != std::string::npos);
    for (double mean : {1.0, -1.0, std::nan("")}) {
        o.mean = mean;
        CHECK(fails_with([&] {
                  Loader l;
                  loader_open(l, "", o);
              }).find("mean document length") != std::string::npos);
    }
}
