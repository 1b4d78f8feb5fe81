// CRC-32C (Castagnoli): finds every single flipped bit, and every burst of up to 32 bits, in any file.
#pragma once
#include "types.h"
#include <array>
#ifdef __SSE4_2__
#include <nmmintrin.h>
#endif

// table[k][b]: the remainder of byte b followed by k zero bytes, for the bit-reversed polynomial 0x1EDC6F41.
using Crc32cTable = std::array<std::array<uint32_t, 256>, 8>;
constexpr Crc32cTable make_crc32c_table() {
    Crc32cTable table = {};
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t crc = byte;
        for (int bit = 0; bit < 8; bit++) crc = (crc >> 1) ^ (crc & 1 ? 0x82F63B78u : 0);
        table[0][byte] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int byte = 0; byte < 256; byte++)
            table[k][byte] = (table[k - 1][byte] >> 8) ^ table[0][table[k - 1][byte] & 0xff];
    return table;
}

// The portable form, eight bytes a step, one table for each.
inline uint32_t crc32c_portable(uint32_t crc, const void* data, size_t bytes) {
    static constexpr Crc32cTable table = make_crc32c_table();
    auto* p = (const uint8_t*)data;
    crc = ~crc;
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        word ^= crc;
        crc = 0;
        for (int k = 0; k < 8; k++) crc ^= table[7 - k][(word >> (8 * k)) & 0xff];
    }
    for (; bytes > 0; bytes--, p++) crc = (crc >> 8) ^ table[0][(crc ^ *p) & 0xff];
    return ~crc;
}

// The checksum of what came before (0 at the start) continued over these bytes: any split gives the same value.
inline uint32_t crc32c(uint32_t crc, const void* data, size_t bytes) {
#ifdef __SSE4_2__
    auto* p = (const uint8_t*)data;
    uint64_t state = uint32_t(~crc);
    for (; bytes >= 8; bytes -= 8, p += 8) {
        uint64_t word;
        memcpy(&word, p, 8);
        state = _mm_crc32_u64(state, word);
    }
    for (; bytes > 0; bytes--, p++) state = _mm_crc32_u8(uint32_t(state), *p);
    return ~uint32_t(state);
#else
    return crc32c_portable(crc, data, bytes);
#endif
}
