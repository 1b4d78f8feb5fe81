// e^x for float without branches, so that GCC turns a plain loop of it into vector code.
//
//   n = round(x / ln 2), r = x - n ln 2, |r| <= 0.347;   e^x = 2^n e^r
//   e^r = 1 + r + r^2 q(r), q of degree 4 with the least relative error (3.1e-9, a twentieth of half an ulp)
//
// Error below 1 ulp (test_swiglu walks through the floats). NaN gives NaN, a result beyond the largest float gives
// inf, and x < -86.99 gives 0: what is lost is below 1.7e-38, and every denormal result would cost a trap.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>

inline float fast_exp(float x) {
    // Clamp to [-87, 89] on the bit patterns: the unsigned ones grow as negative floats fall, the signed ones grow with
    // positive floats. Comparing the floats would keep a branch in the loop, unless GCC has -fno-trapping-math.
    constexpr uint32_t lowest = std::bit_cast<uint32_t>(-87.0f);
    constexpr int32_t highest = std::bit_cast<int32_t>(89.0f);
    uint32_t pattern = std::bit_cast<uint32_t>(x);
    uint32_t low = pattern < lowest ? pattern : lowest;
    float y = std::bit_cast<float>(int32_t(low) < highest ? int32_t(low) : highest);
    uint32_t nan = -uint32_t((pattern & 0x7fffffffu) > 0x7f800000u);

    // Adding 1.5 * 2^23 leaves the rounded n in the low bits of the float's pattern.
    constexpr float shift = 12582912.0f;
    float shifted = y * 1.44269504088896341f + shift;
    float n = shifted - shift;
    // ln 2 in two parts; the first has 9 bits, so n times it is exact without a fused multiply-add.
    float r = y - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;

    // The coefficients are those of 2 e^r: its scale 2^(n - 1) is still a float where e^x nearly overflows.
    float q = 2.762908e-3f;
    q = q * r + 1.6737490e-2f;
    q = q * r + 8.3336782e-2f;
    q = q * r + 3.33330408e-1f;
    q = q * r + 9.9999987e-1f;
    float p = r * r * q + 2.0f * r + 2.0f;

    // The 9 low bits of shift's pattern are 0, so this leaves n + 126 as the exponent; n = -126 makes the scale 0.
    float scale = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) + 126u) << 23);
    return std::bit_cast<float>(std::bit_cast<uint32_t>(p * scale) | nan);
}

inline double fast_exp(double x) { return std::exp(x); }
