// Memory: one block, placed by the same code that measures it.
#pragma once
#include "device.h"
#include <algorithm>
#include <string>
#include <vector>

// The first pass has no base and only counts; the second hands out pointers into the block. Because
// both run the same calls, what --plan prints is what a run takes.
struct Arena {
    static constexpr size_t alignment = 256;
    struct Part {
        std::string name;
        size_t bytes;
    };

    uint8_t* base = nullptr;
    size_t used = 0;
    std::vector<Part> parts;
    size_t host = 0; // bytes of the host's memory that go with it, which is not the arena's

    // `count` elements of E, entered under `part` in the table; null while measuring, and when there are none.
    template <class E> E* take(const char* part, size_t count) {
        size_t bytes = (count * sizeof(E) + alignment - 1) / alignment * alignment;
        auto same = [&](const Part& p) { return p.name == part; };
        auto line = std::find_if(parts.begin(), parts.end(), same);
        if (line == parts.end()) line = parts.insert(line, {part, 0});
        line->bytes += bytes;
        E* place = base && count ? (E*)(base + used) : nullptr;
        used += bytes;
        return place;
    }

    // Two sets of buffers that are never in use together, in the same place; the table shows the larger one.
    template <class A, class B> void overlay(A place_a, B place_b) {
        const Arena before = *this;
        place_a();
        const Arena a = *this;
        used = before.used, parts = before.parts;
        place_b();
        if (a.used > used) *this = a;
    }
};
