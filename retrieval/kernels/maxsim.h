// Micro kernels of the fused MaxSim: the products of a few document rows with some query vectors, for one processor.
//
// The compiler's feature macros choose them, with portable vector code as the fallback. Matrix tiles (AMX) are requested
// at run time.

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AMX_TILE__)
#include <immintrin.h>
#endif
#if defined(__AMX_TILE__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#define HAS_AMX 1
#endif

namespace {

constexpr int64_t LANES = 16;        // query vectors a tile
constexpr int64_t CACHED = 1 << 14;  // bytes of queries that rows are multiplied with in one go, so that they stay in the cache
constexpr int64_t FAR = 4096;        // bytes: longer rows are fetched in time by the processor itself
constexpr int64_t NEAR = 3072;       // bytes: rows are asked for at least so far ahead
constexpr int64_t LINE = 16;         // groups of 4 bytes in a line of the cache

// multiply(): c[row][lane] (+)= rows . q over `depth` groups of 4 bytes of every row, `first` when nothing is in c yet.
// Rows are padded to a `multiple` of so many groups.
// `q` holds tiles of LANES queries, each [depth][LANES][4 bytes], `pitch` bytes for a query; rows of `c` are `width` sums apart.

// While rows are multiplied, as many bytes of the next ones are asked for, in the order in which they lie in memory.
template <int LINES>
inline void prefetch(const uint8_t* ahead) {
    for (int line = 0; line < LINES; ++line) __builtin_prefetch(ahead + line * LINE * 4, 0, 2);
}

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif
typedef float Vector __attribute__((vector_size(WIDTH * 4)));

struct Float32 {
    typedef float Sum;
    typedef Vector Sums;
    static Vector load(const uint8_t* at) { Vector v; std::memcpy(&v, at, sizeof v); return v; }
    static Vector spread(const uint8_t* at) { float x; std::memcpy(&x, at, 4); return x - Vector{}; }
    static Vector zero() { return Vector{}; }
    static void dot(Vector& sum, Vector q, Vector row) { sum += q * row; }
};

#if defined(__AVX512BF16__)
struct BFloat16 {
    typedef float Sum;
    typedef __m512 Sums;
    static __m512i load(const uint8_t* at) { return _mm512_loadu_si512(at); }
    static __m512i spread(const uint8_t* at) { int32_t x; std::memcpy(&x, at, 4); return _mm512_set1_epi32(x); }
    static __m512 zero() { return _mm512_setzero_ps(); }
    static void dot(__m512& sum, __m512i q, __m512i row) { sum = _mm512_dpbf16_ps(sum, (__m512bh)q, (__m512bh)row); }
};
#endif

#if defined(__AVX512VNNI__)
struct Int8 {  // rows are bytes offset by 128, queries are signed
    typedef int32_t Sum;
    typedef int32_t Sums __attribute__((vector_size(64)));  // not __m512i, for which compilers copy sums between registers
    static __m512i load(const uint8_t* at) { return _mm512_loadu_si512(at); }
    static __m512i spread(const uint8_t* at) { int32_t x; std::memcpy(&x, at, 4); return _mm512_set1_epi32(x); }
    static Sums zero() { return Sums{}; }
    static void dot(Sums& sum, __m512i q, __m512i row) { sum = (Sums)_mm512_dpbusd_epi32((__m512i)sum, row, q); }
};
#endif

// Rows are reached from every third or fourth one, plus a few strides: so all addresses fit the processor's registers. The
// compiler would otherwise reckon every row from the first, and reload two dozen offsets at every step.
inline void hide(const uint8_t*& pointer) { asm("" : "+r"(pointer)); }

// The sums of neighbouring lanes of two vectors: half as many lanes of each, one after the other.
template <class V, int... I>
inline V add_pairs(V a, V b, std::integer_sequence<int, I...>) {
    constexpr int N = sizeof...(I);
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (2 * I)...) + __builtin_shufflevector(a, b, (2 * I + 1)...);
#else
    typedef int32_t Places __attribute__((vector_size(N * 4)));
    return __builtin_shuffle(a, b, Places{(2 * I)...}) + __builtin_shuffle(a, b, Places{(2 * I + 1)...});
#endif
}

// The sums of the lanes of COUNT vectors, in order, into `to`, which has room for LANES of them.
template <int COUNT, class Sum, int WIDE, class Sums>
inline void add_lanes(const Sums* sums, Sum* to) {
    typedef Sum Plain __attribute__((vector_size(WIDE * 4)));
    Plain x[COUNT];
    std::memcpy(x, sums, sizeof x);
#pragma GCC unroll 8
    for (int count = COUNT, lanes = WIDE; lanes > 1; lanes /= 2) {
        const int half = count > 1 ? count / 2 : 1;
#pragma GCC unroll 8
        for (int i = 0; i < half; ++i)
            x[i] = add_pairs(x[count > 1 ? 2 * i : 0], x[count > 1 ? 2 * i + 1 : 0], std::make_integer_sequence<int, WIDE>());
        count = half;
    }
    std::memcpy(to, x, sizeof x[0]);
}

template <class K, int ROWS, int TILES>
struct Simd {
    static constexpr int HOLD = ROWS % 4 == 0 ? 4 : 3;
    typedef typename K::Sum Sum;
    static constexpr int64_t rows = ROWS, lanes = TILES * LANES, group = LANES * 4, most_depth = CACHED / group, multiple = 1;
    static constexpr bool matrix = false, along = false;
    static constexpr int PARTS = TILES * LANES * 4 / int(sizeof(typename K::Sums));  // vectors a row of sums
    static constexpr int PER_TILE = PARTS / TILES;

    // Always inline: a call costs a tenth of what the bytes of a few rows take.
    __attribute__((always_inline)) static void multiply(const uint8_t* row, int64_t stride, const uint8_t* q, int64_t pitch,
                                                        Sum* c, int64_t width, bool first, const uint8_t* ahead,
                                                        int64_t depth) {
        const int64_t tile = pitch * LANES;
        typename K::Sums sum[ROWS][PARTS];
        for (int r = 0; r < ROWS; ++r)
            for (int p = 0; p < PARTS; ++p)
                if (first) sum[r][p] = K::zero();
                else std::memcpy(&sum[r][p], c + r * width + p * (LANES / PER_TILE), sizeof sum[r][p]);
        const uint8_t* base[ROWS / HOLD];
        for (int b = 0; b < ROWS / HOLD; ++b) {
            base[b] = row + b * HOLD * stride;
            hide(base[b]);
        }
        const int64_t pace = ahead ? ROWS * 4 : 0;  // bytes of the next rows asked for at each step, in order
        if (!ahead) ahead = q;
#pragma GCC unroll 2
        for (int64_t k = 0; k < depth; ++k, q += LANES * 4, ahead += pace) {
            __builtin_prefetch(ahead);
            if (ROWS > LINE) __builtin_prefetch(ahead + LINE * 4);
            decltype(K::load(q)) part[PARTS];
            for (int p = 0; p < PARTS; ++p)
                part[p] = K::load(q + (p / PER_TILE) * tile + (p % PER_TILE) * sizeof(sum[0][0]));
#pragma GCC unroll 32
            for (int r = 0; r < ROWS; ++r) {
#pragma GCC unroll 8
                for (int p = 0; p < PARTS; ++p) K::dot(sum[r][p], part[p], K::spread(base[r / HOLD] + r % HOLD * stride));
            }
#pragma GCC unroll 16
            for (int b = 0; b < ROWS / HOLD; ++b) base[b] += 4;
        }
        for (int r = 0; r < ROWS; ++r)
            for (int p = 0; p < PARTS; ++p)
                std::memcpy(c + r * width + p * (LANES / PER_TILE), &sum[r][p], sizeof sum[r][p]);
    }
};

// For few queries: products along the rows, each of which is read once, and lanes added up at the end. The next rows are
// asked for meanwhile. `q` holds V queries, `pitch` bytes apart, each [depth][4 bytes].
template <class K, int V>
struct Dots {
    typedef typename K::Sum Sum;
    typedef typename K::Sums Sums;
    static constexpr int WIDE = int(sizeof(Sums)) / 4, REGISTERS = WIDE == 16 ? 24 : 8;
    static constexpr int ROWS = REGISTERS / V < 8 ? REGISTERS / V : 8, ADDED = WIDE < 8 ? WIDE : 8;
    static constexpr int64_t rows = ROWS, lanes = V, group = 4, most_depth = CACHED / (V * 4), multiple = LINE;
    static constexpr bool matrix = false, along = true;

    static void multiply(const uint8_t* row, int64_t stride, const uint8_t* q, int64_t pitch, Sum* c, int64_t width,
                         bool first, const uint8_t*, int64_t depth) {
        Sums sum[ROWS * V];
#pragma GCC unroll 24
        for (int i = 0; i < ROWS * V; ++i) sum[i] = K::zero();
        // In the order in which they lie in memory, unless only a part of every row is needed now.
        const uint8_t* next = row + ROWS * stride * (1 + NEAR / (ROWS * stride));
        const int64_t pace = stride < FAR ? ROWS : 1, apart = stride < FAR ? WIDE * 4 : stride;
        for (int64_t k = 0; k < depth * 4; k += WIDE * 4) {
            decltype(K::load(q)) x[ROWS];
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; ++r) {
                __builtin_prefetch(next + k * pace + r * apart);
                x[r] = K::load(row + r * stride + k);
            }
#pragma GCC unroll 8
            for (int v = 0; v < V; ++v) {
                const auto part = K::load(q + v * pitch + k);
#pragma GCC unroll 8
                for (int r = 0; r < ROWS; ++r) K::dot(sum[r * V + v], part, x[r]);
            }
        }
        alignas(64) Sum added[ROWS * V + WIDE];
#pragma GCC unroll 8
        for (int i = 0; i < ROWS * V; i += ADDED) add_lanes<ADDED, Sum, WIDE>(sum + i, added + i);
        if (!first)
            for (int r = 0; r < ROWS; ++r)
                for (int v = 0; v < V; ++v) added[r * V + v] += c[r * width + v];
        if (V == 1 && width == 1) std::memcpy(c, added, ROWS * sizeof(Sum));
        else for (int r = 0; r < ROWS; ++r) std::memcpy(c + r * width, added + r * V, V * sizeof(Sum));
    }
};

// For one query vector and documents of one bit a dimension, which are not unpacked: a query's numbers are split into PLANES
// of bits, and bits that are set in both a plane and a row are counted. Sums are twice the sum of the numbers whose bit is set.
struct Bits {
    typedef int32_t Sum;
    static constexpr int PLANES = 8;
    static constexpr int64_t rows = 32, lanes = 1, group = 4, most_depth = CACHED, multiple = 2;
    static constexpr bool matrix = false, along = true;
#if defined(__AVX512VPOPCNTDQ__)
    static constexpr const char* name = "AVX-512 VPOPCNTDQ";
#else
    static constexpr const char* name = "bits";
#endif

    // The k-th number of a query, whose planes are `bytes` each.
    static void set(uint8_t* planes, int64_t bytes, int64_t k, int8_t number) {
        for (int p = 0; p < PLANES; ++p)
            if (number >> p & 1) planes[p * bytes + k / 8] |= uint8_t(1 << k % 8);
    }

    static void multiply(const uint8_t* row, int64_t stride, const uint8_t* planes, int64_t, Sum* c, int64_t width, bool,
                         const uint8_t*, int64_t depth) {
        int64_t sums[rows] = {};
        for (int64_t at = 0; at < depth * 4; at += 8) {
            uint64_t words[rows], plane[PLANES];
            for (int p = 0; p < PLANES; ++p) std::memcpy(plane + p, planes + p * depth * 4 + at, 8);
            if (stride == 8) std::memcpy(words, row, sizeof words);
            else for (int64_t r = 0; r < rows; ++r) std::memcpy(words + r, row + r * stride + at, 8);
            for (int64_t r = 0; r < rows; ++r) {
                int64_t sum = -int64_t(__builtin_popcountll(words[r] & plane[PLANES - 1]));  // the sign
#pragma GCC unroll 8
                for (int p = PLANES - 2; p >= 0; --p) sum = 2 * sum + __builtin_popcountll(words[r] & plane[p]);
                sums[r] += 2 * sum;
            }
        }
        for (int64_t r = 0; r < rows; ++r) c[r * width] = Sum(sums[r]);
    }
};

template <bool> struct Tiles {};  // what a thread must set up before it multiplies: nothing, unless by matrix tiles

#if HAS_AMX
bool amx_granted() {  // Linux gives matrix tiles to a process that asks
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    static const bool granted = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
    return granted;
}

struct AmxShape {  // every one of the eight tiles is 16 rows of 64 bytes
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

template <> struct Tiles<true> {
    Tiles() {
        AmxShape shape;
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
};

template <class S, int TILES>
struct Amx {
    typedef S Sum;
    static constexpr int64_t rows = 32, lanes = TILES * LANES, group = LANES * 4, most_depth = CACHED / group, multiple = LINE;
    static constexpr bool matrix = true, along = false;

    static void multiply(const uint8_t* row, int64_t stride, const uint8_t* q, int64_t pitch, Sum* c, int64_t width,
                         bool first, const uint8_t* ahead, int64_t depth) {
        const int64_t tile = pitch * LANES;
        Sum* c2 = c + 16 * width;
        if (first) {
            _tile_zero(0); _tile_zero(1);
            if (TILES == 2) { _tile_zero(2); _tile_zero(3); }
        } else {
            _tile_loadd(0, c, width * 4); _tile_loadd(1, c2, width * 4);
            if (TILES == 2) { _tile_loadd(2, c + LANES, width * 4); _tile_loadd(3, c2 + LANES, width * 4); }
        }
        for (int64_t k = 0; k < depth; k += LINE) {
            if (ahead) prefetch<rows>(ahead + k * 4 * rows);
            _tile_loadd(4, row + k * 4, stride);
            _tile_loadd(5, row + 16 * stride + k * 4, stride);
            _tile_loadd(6, q + k * LANES * 4, LANES * 4);
            if (std::is_same<Sum, float>::value) {
                _tile_dpbf16ps(0, 4, 6); _tile_dpbf16ps(1, 5, 6);
            } else {
                _tile_dpbusd(0, 4, 6); _tile_dpbusd(1, 5, 6);
            }
            if (TILES == 2) {
                _tile_loadd(7, q + tile + k * LANES * 4, LANES * 4);
                if (std::is_same<Sum, float>::value) {
                    _tile_dpbf16ps(2, 4, 7); _tile_dpbf16ps(3, 5, 7);
                } else {
                    _tile_dpbusd(2, 4, 7); _tile_dpbusd(3, 5, 7);
                }
            }
        }
        _tile_stored(0, c, width * 4); _tile_stored(1, c2, width * 4);
        if (TILES == 2) { _tile_stored(2, c + LANES, width * 4); _tile_stored(3, c2 + LANES, width * 4); }
    }
};
#endif

}  // namespace
