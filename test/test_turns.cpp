// attention_anchor.cuh: maps whose tiles of keys add to tiles of queries in turn.
#include "attention_rows.h"
#include <map>
#include <queue>

// Tiles of keys with turns visit what they visit without, and who comes to a tile of queries is counted in the order of
// the list, wherever rows begin.
TEST_CASE("turns number the visitors of each tile of queries in the order of the map") {
    for (Mode mode : modes)
        for (size_t S : {1, 17, 200, 1000})
            for (bool pieces : {false, true}) {
                const Tokens t = make_tokens(mode, 3, S, S + size_t(mode));
                auto some = [&](uint64_t salt) {
                    return subset(t, [&, salt](size_t i) { return hash64(salt, i / 9) % 3 == 0; });
                };
                const Tokens q = pieces ? some(1) : t, k = pieces ? some(2) : t;
                AttentionMap plain, pairs, turns;
                attention_map_build(plain, q, k, {64, 64, 16, 32});
                attention_map_build(turns, q, k, {64, 64, 16, 32, 1, true});
                attention_map_build(pairs, q, k, {64, 64, 16, 32, 1});
                CHECK(turns.forward.tile == pairs.forward.tile); // the backward alone goes without
                CHECK(turns.backward.tiles.size() == plain.backward.tiles.size());
                using Visits = std::map<int32_t, bool>;        // by the first query: masked
                std::map<int32_t, int32_t> visitors, counters; // by the first query; the first query, by the counter
                for (size_t i = 0; i < plain.backward.tiles.size(); i++) {
                    auto visits = [&](const TileMap& m, bool count) {
                        Visits all;
                        const MapTile& tile = m.tiles[i];
                        for (int r = tile.first_range; r < tile.last_range; r++)
                            for (int32_t begin = m.ranges[r].begin; begin < m.ranges[r].end; begin += 16) {
                                CHECK(all.emplace(begin, m.ranges[r].masked).second);
                                if (!count) continue;
                                CHECK(m.ranges[r].turn == visitors[begin]++);
                                const int32_t counter = turn_counter(begin, tile.row, 16);
                                CHECK((counter >= 0 && counter < m.turns));
                                CHECK(counters.emplace(counter, begin).first->second == begin);
                            }
                        return all;
                    };
                    CHECK(turns.backward.tiles[i].begin == plain.backward.tiles[i].begin);
                    CHECK(visits(turns.backward, true) == visits(plain.backward, false));
                }
            }
}

// What ring_plan_bytes reserves for such a map.
TEST_CASE("turns leave a map four times tile_ranges_most ranges a tile at most") {
    for (Mode mode : modes)
        for (int32_t piece : {1, 100}) {
            Tokens t = make_tokens(mode, 1, 32768, 5, 2000);
            for (size_t i = 1; i < t.size() && piece > 1; i++) t.doc[i] = 1 + int32_t(hash64(6, i / piece) % 20);
            AttentionMap map;
            attention_map_build(map, t, t, {128, 128, 64, 128, 0, true});
            CHECK(map.backward.ranges.size() <= 4 * tile_ranges_most * map.backward.tiles.size());
        }
}

namespace {
// The visits of a tile in the order of a kernel: the counter, and its value from which on this tile may add.
struct Visit {
    int32_t counter, turn;
};
std::vector<std::vector<Visit>> visits_of(const TileMap& map, int tile) {
    std::vector<std::vector<Visit>> all;
    for (const MapTile& t : map.tiles) {
        std::vector<Visit>& visits = all.emplace_back();
        for (int32_t r = t.first_range; r < t.last_range; r++) {
            const VisitedRange& range = map.ranges[r];
            for (int32_t n = (range.end - range.begin + tile - 1) / tile; n-- > 0;)
                visits.push_back({turn_counter(range.begin + n * tile, t.row, tile), range.turn});
        }
    }
    return all;
}

// How long `workers` need for the tiles of `heads`, handed out in the order of the list, `together` heads at a time,
// where a visit takes 1 and `lag` passes until the next in turn sees what it has added; without turns nobody waits.
double time_of(const std::vector<std::vector<Visit>>& tiles, int heads, int together, int workers, bool turns,
               double lag) {
    struct Counter {
        int32_t count = 0;
        double since = 0;
        std::vector<int> waiting; // workers
    };
    struct Worker {
        int tile = -1, head = 0;
        size_t visit = 0;
    };
    std::map<std::pair<int, int32_t>, Counter> counters; // by head
    std::vector<Worker> all(workers);
    using Event = std::pair<double, int>; // when, the worker
    std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events;
    for (int i = 0; i < workers; i++) events.push({0, i});
    const int items = int(tiles.size()) * heads, block = int(tiles.size()) * together;
    int item = 0;
    double end = 0;
    while (!events.empty()) {
        const auto [now, i] = events.top();
        events.pop();
        Worker& w = all[i];
        if (w.tile < 0 || w.visit == tiles[w.tile].size()) {
            end = std::max(end, now);
            if (item == items) continue;
            w = {item % block / together, item / block * together + item % together, 0};
            item++;
            events.push({now + 1, i}); // its begin and its end take about a visit
            continue;
        }
        const Visit visit = tiles[w.tile][w.visit];
        if (turns) {
            Counter& c = counters[{w.head, visit.counter}];
            if (c.count < visit.turn) {
                c.waiting.push_back(i);
                continue;
            }
            if (now < c.since) {
                events.push({c.since, i});
                continue;
            }
            c.count++, c.since = now + lag;
            for (int other : c.waiting) events.push({c.since, other});
            c.waiting.clear();
        }
        w.visit++;
        events.push({now + 1, i});
    }
    CHECK(item == items); // else all wait for each other
    for (const Worker& w : all) CHECK((w.tile < 0 || w.visit == tiles[w.tile].size()));
    return end;
}
} // namespace

// The H200's multiprocessors, 32 heads, 4 of them together. A turn comes a visit after the one before, or two. What it
// costs is the beginning, when the tiles of a document that begin together line up, and documents that wait for others.
TEST_CASE("tiles in turn wait little, because of the order in which they visit") {
    auto time = [](const std::vector<std::vector<Visit>>& visits, bool turns, double lag) {
        return time_of(visits, 32, 4, 132, turns, lag);
    };
    for (double mean : {0., 2048.}) {
        const Tokens t = make_tokens(mean == 0 ? Mode::full : Mode::anchor, 1, 16384, 9, mean);
        AttentionMap map;
        attention_map_build(map, t, t, {128, 128, 64, 128, 0, true});
        const std::vector<std::vector<Visit>> visits = visits_of(map.backward, 64);
        const double free = time(visits, false, 0), one = time(visits, true, 1) / free;
        auto reordered = [&](auto less) {
            std::vector<std::vector<Visit>> other = visits;
            for (std::vector<Visit>& v : other) std::sort(v.begin(), v.end(), less);
            return time(other, true, 1) / free;
        };
        const double up = reordered([](const Visit& a, const Visit& b) { return a.counter < b.counter; });
        const double down = reordered([](const Visit& a, const Visit& b) { return a.counter > b.counter; });
        INFO("mean " << mean << ": " << one << ", from the first query on " << up << ", from the last one " << down);
        CHECK(one < 1.1);
        CHECK(time(visits, true, 2) < 1.25 * free);
        CHECK(up > one + 0.03);
        if (mean > 0) CHECK(down > one + 0.05); // own queries last, where a document ends
    }
}
