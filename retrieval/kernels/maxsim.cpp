// Fused MaxSim for documents with equal numbers of vectors, on any CPU.
//
// The products of a few document rows with some query vectors stay in registers, and a row is read once, front to back, as
// it lies in memory: plain tensors and any prefix of the vectors need no copy of the documents. Of many query vectors each
// is a lane, over which a row's numbers are spread one after the other, and the maximum over a document's vectors is
// elementwise. With few query vectors most lanes would be idle, so the lanes then run along the row and are added at its end.
//
// Compiled on the machine that runs it, for its processor (-march=native). Every product is summed in one fixed
// order, so scores depend neither on threads nor on the start of a block.

#include "maxsim.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <functional>
#include <new>
#include <numeric>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t GROUP = 512;       // query vectors scored in one pass over a block of documents
constexpr int64_t FEW = 8;           // query vectors that are multiplied along the rows; twice as many,
constexpr int64_t FEWER = 4;         // the same for integers where there are matrix tiles, of which they would use a quarter
constexpr int64_t CROWD = 2048;      // if rows are a multiple of so many bytes: side by side they crowd few sets of the cache
constexpr int64_t AHEAD = 32;        // document rows that are asked for before they are needed, where they lie apart
constexpr int64_t ONE_IN = 64;       // documents is looked at to guess a score,
constexpr int64_t WORTH_A_GUESS = 32;  // if there are so many times as many as are kept
constexpr double FOR_A_THREAD = 1 << 23;  // products that are worth a thread
constexpr int64_t MOST_KEYS = 1 << 22;    // that are collected at a time, for all queries together
constexpr float LARGEST = 1e15f;     // a score beyond this is an overflow, not a number
constexpr int64_t STRIP = 96;        // document rows multiplied before their maxima are taken; all kernels' rows divide it

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2, INT4 = 3, BINARY = 4 };

// ------------------------------------------------------------------------------------------------------- documents

struct Slab {  // some of the vectors of every document
    const uint8_t* data;
    const float* scales;   // one a vector, or null
    int64_t document;      // bytes from one document to the next
    int64_t vector;        // bytes from one vector to the next
    int64_t scale_document;  // scales from one document to the next
    int64_t used;          // vectors of it that the budget takes
};

// A score and a position in one number: of two documents the better one has the larger key, of two equal ones the first.
typedef uint64_t Key;

inline Key make_key(float score, int64_t position) {
    score += 0.0f;  // -0 becomes 0, which equals it
    int32_t bits;
    std::memcpy(&bits, &score, 4);
    const uint32_t ordered = uint32_t(bits) ^ (uint32_t(bits >> 31) | 0x80000000u);
    return Key(ordered) << 32 | uint32_t(~position);
}
inline int64_t position_of(Key key) { return uint32_t(~key); }
inline float score_of(Key key) {
    uint32_t bits = uint32_t(key >> 32);
    bits ^= ((bits >> 31) - 1) | 0x80000000u;
    float score;
    std::memcpy(&score, &bits, 4);
    return score;
}

// The k-th largest of different keys, which are moved about. No branch depends on a comparison: half of these would be mispredicted.
Key kth_largest(Key* keys, size_t n, size_t k) {
    while (n > 16) {
        const Key a = keys[0], b = keys[n / 2], c = keys[n - 1];
        const Key pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
        size_t larger = 0;
        for (size_t i = 0; i < n; ++i) {
            const Key x = keys[i];
            keys[i] = keys[larger];
            keys[larger] = x;
            larger += x > pivot;
        }
        if (k <= larger) n = larger;
        else if (k == larger + 1) return pivot;
        else keys += larger, n -= larger, k -= larger;
    }
    std::sort(keys, keys + n, std::greater<Key>());
    return keys[k - 1];
}

// The best `k` of what is offered in ascending order of positions, which they keep. Keys are collected and cut to `k` from time
// to time, which costs less than a heap.
struct Best {
    std::vector<Key> keys, scratch;
    size_t k = 0;

    bool full() const { return keys.size() >= 2 * k + 64; }
    Key cut(size_t most) {  // returns the least that is left
        if (keys.size() <= most) return 0;
        scratch = keys;
        const Key edge = kth_largest(scratch.data(), scratch.size(), most);
        keep_from(edge);
        return edge;
    }
    void keep_from(Key edge) {
        size_t kept = 0;
        for (size_t i = 0; i < keys.size(); ++i) {
            keys[kept] = keys[i];
            kept += keys[i] >= edge;
        }
        keys.resize(kept);
    }
};

struct Stage {  // of a cascade, as the caller describes it
    const Slab* const* slabs;  // of each segment
    const int64_t* sizes;      // documents of each segment
    int64_t slab_count, segment_count, dim, kind, check;
    const float* queries;      // [count, at least r_q, dim], not rounded
    int64_t query_stride;      // numbers from one query to the next
    int64_t r_q;               // vectors of a query
    int64_t keep;              // documents

    int64_t vectors() const {  // of a document
        int64_t sum = 0;
        for (int64_t s = 0; s < slab_count; ++s) sum += slabs[0][s].used;
        return sum;
    }
    int64_t documents() const { return std::accumulate(sizes, sizes + segment_count, int64_t(0)); }
};

struct Which {  // documents are scored: those of an index [n], or all n, and which of them may be found
    const int64_t* index;
    int64_t n;
    const uint8_t* allowed;  // by position, or null: all
};

struct Segment {  // documents that lie together, of which some are scored
    const Slab* slabs;
    int64_t first;         // the position of its first document among those of all segments
    const int64_t* index;  // which are scored, as positions among those of all segments, or null: all, in order
    int64_t place, n;      // where they begin in the order in which documents are scored, and how many
    int64_t first_block;   // blocks of all segments before

    int64_t which(int64_t d) const { return index ? index[d] - first : d; }
};

struct Job {
    Job(const Stage& stage, const Which& documents, int64_t count) : stage(stage), documents(documents), count(count) {}

    const Stage& stage;
    Which documents;
    int64_t count;         // queries
    std::vector<Segment> segments;
    Kind stored;           // how rows lie in memory
    int64_t stored_bytes;  // of a row
    Kind computed;         // what the micro kernel multiplies: FLOAT32, BFLOAT16, INT8 or BINARY
    int64_t depth;         // groups of 4 bytes of a multiplied row
    int64_t whole;         // query vectors are multiplied so many at a time
    int64_t pitch;         // bytes that a packed query vector takes
    const uint8_t* queries;      // packed as the micro kernel reads them: [groups][lanes], `pitch` bytes each
    const int32_t* corrections;  // [groups][lanes], to be taken off integer sums
    const float* scales;         // [groups][lanes], that sums are multiplied with
    float* out;            // all scores: [count, out_stride], or null
    int64_t out_stride;
    std::vector<std::vector<Best>> best;  // or the best ones: [threads][count]
    const float* least = nullptr;         // scores must be larger: [count]
    int64_t block;         // documents that a thread takes at a time
    int64_t blocks;        // of all segments
    std::atomic<int64_t> next{0}, workers{0};
    std::atomic<bool> bad{false}, overflow{false};

    int64_t group() const { return std::min(count, GROUP / stage.r_q); }                // queries scored in one pass
    int64_t lanes() const { return (group() * stage.r_q + whole - 1) / whole * whole; }  // of a group
    int64_t groups() const { return (count + group() - 1) / group(); }
    // Where documents and queries are one vector each, products are scores.
    bool single() const { return stage.r_q == 1 && stage.slab_count == 1 && stage.slabs[0]->used == 1; }
};

float from_bfloat16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// One stored vector as the row that the micro kernel reads: unchanged, widened to float, or as bytes offset by 128.
void decode(const uint8_t* from, const Job& job, uint8_t* to) {
    const Kind stored = job.stored, computed = job.computed;
    const int64_t dim = job.stage.dim;
    if (stored == computed) {
        if (job.stored_bytes % 64) std::memcpy(to, from, job.stored_bytes);
        else for (int64_t i = 0; i < job.stored_bytes; i += 64) std::memcpy(to + i, from + i, 64);  // which is no call
        return;
    }
    float* f = reinterpret_cast<float*>(to);
    const bool wide = computed == FLOAT32;
    if (stored == BFLOAT16) {
        const uint16_t* x = reinterpret_cast<const uint16_t*>(from);
        for (int64_t i = 0; i < dim; ++i) f[i] = from_bfloat16(x[i]);
    } else if (stored == INT8) {
        for (int64_t i = 0; i < dim; ++i) f[i] = float(int(from[i]) - 128);
    } else if (stored == INT4) {  // the low half of a byte is the even dimension
        if (wide)
            for (int64_t i = 0; i < dim; ++i) f[i] = float(int(from[i / 2] >> (i % 2 * 4) & 15) - 8);
        else
            for (int64_t i = 0; i < dim / 2; ++i) {
                to[2 * i] = uint8_t((from[i] & 15) + 120);
                to[2 * i + 1] = uint8_t((from[i] >> 4) + 120);
            }
        if (!wide && dim % 2) to[dim - 1] = uint8_t((from[dim / 2] & 15) + 120);
    } else {  // BINARY, lowest bit first
        if (wide) {
            for (int64_t i = 0; i < dim; ++i) f[i] = from[i / 8] >> (i % 8) & 1 ? 1.0f : -1.0f;
            return;
        }
        int64_t i = 0;
#if defined(__AVX512BW__)
        for (; i + 64 <= dim; i += 64) {
            uint64_t bits;
            std::memcpy(&bits, from + i / 8, 8);
            _mm512_storeu_si512(to + i, _mm512_mask_blend_epi8(bits, _mm512_set1_epi8(127), _mm512_set1_epi8(char(129))));
        }
#endif
        for (; i < dim; ++i) to[i] = from[i / 8] >> (i % 8) & 1 ? 129 : 127;
    }
}

// Asks for a document of a slab, so that it is on the way when it is needed.
inline void prefetch_document(const Job& job, const Segment& segment, const Slab& slab, int64_t d) {
    if (d >= segment.n) return;
    const int64_t which = segment.which(d), bytes = (slab.used - 1) * slab.vector + job.stored_bytes;
    const uint8_t* from = slab.data + which * slab.document;
    for (int64_t line = 0; line < bytes; line += LINE * 4) __builtin_prefetch(from + line);
    if (!slab.scales) return;
    const float* scales = slab.scales + which * slab.scale_document;
    for (int64_t i = 0; i < slab.used; i += LINE) __builtin_prefetch(scales + i);
}

struct Walk {  // over the vectors of a slab, one document after another
    Walk(const Job& job, const Segment& segment, const Slab& slab, int64_t start, int64_t at)
        : job(job), segment(segment), slab(slab), document(start + at / slab.used), vector(at % slab.used) {}
    void next() {
        if (++vector == slab.used) vector = 0, ++document;
    }
    const uint8_t* row() const {
        if (!vector) prefetch_document(job, segment, slab, document + 1 + AHEAD / slab.used);
        return slab.data + segment.which(document) * slab.document + vector * slab.vector;
    }
    const Job& job;
    const Segment& segment;
    const Slab& slab;
    int64_t document, vector;
};

struct Buffer {  // aligned, zeroed
    explicit Buffer(size_t bytes) : data(static_cast<uint8_t*>(::operator new(bytes + 64, std::align_val_t(64)))) {
        std::memset(data, 0, bytes + 64);
    }
    ~Buffer() { ::operator delete(data, std::align_val_t(64)); }
    Buffer(const Buffer&) = delete;
    uint8_t* data;
};

// ---------------------------------------------------------------------------------------------------------- driver

// A strip of rows with all query vectors of a group: sums[row][lane]. `ahead`: the rows that follow are needed next.
template <class One, class Two>
void multiply_strip(const Job& job, const uint8_t* queries, const uint8_t* rows, int64_t stride, bool ahead, int64_t count,
                    typename One::Sum* sums, int64_t width) {
    const int64_t lanes = job.lanes();
    const int64_t step = One::along || lanes > Two::lanes ? Two::most_depth : job.depth;  // few queries stay in the cache whole
    for (int64_t k = 0; k < job.depth; k += step) {
        const int64_t depth = std::min(step, job.depth - k);
        int64_t lane = 0;
        auto multiply = [&](auto kernel) {
            typedef decltype(kernel) K;
            const uint8_t* q = queries + lane * job.pitch + k * K::group;
            for (int64_t r = 0; r < count; r += K::rows)
                K::multiply(rows + r * stride + k * 4, stride, q, job.pitch, sums + r * width + lane, width, k == 0,
                            lane == 0 && ahead ? rows + (r + K::rows) * stride + k * K::rows * 4 : nullptr, depth);
            lane += K::lanes;
        };
        while (lane + Two::lanes <= lanes) multiply(Two());
        while (lane < lanes) multiply(One());
    }
}

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));

inline float value(float sum, int32_t) { return sum; }
inline float value(int32_t sum, int32_t correction) { return float(sum - correction); }
inline Floats values(Floats sums, Ints) { return sums; }
inline Floats values(Ints sums, Ints corrections) { return __builtin_convertvector(sums - corrections, Floats); }

// Of `rows` vectors of one document, with their scales if they have some: the largest values so far, into `best`. A few rows
// at a time, so that `best` is not read and written for each, and sums are read in about the order in which they lie.
template <class Sum>
void take_maxima(const Sum* sums, int64_t width, int64_t rows, const int32_t* corrections, const float* scales,
                 int64_t lanes, float* best) {
    constexpr int64_t AT_ONCE = 8;
    for (int64_t r0 = 0; r0 < rows; r0 += AT_ONCE) {
        const int64_t end = std::min(rows, r0 + AT_ONCE);
        for (int64_t l = 0; l < lanes; l += LANES) {
            Floats most;
            Ints correction;
            std::memcpy(&most, best + l, sizeof most);
            std::memcpy(&correction, corrections + l, sizeof correction);
            for (int64_t r = r0; r < end; ++r) {
                typename std::conditional<std::is_same<Sum, float>::value, Floats, Ints>::type sum;
                std::memcpy(&sum, sums + r * width + l, sizeof sum);
                Floats value = values(sum, correction);
                if (scales) value *= scales[r];
                most = most < value ? value : most;
            }
            std::memcpy(best + l, &most, sizeof most);
        }
    }
}

float add_up(const float* best, const float* scales, int64_t r_q) {
    float sum = 0;
    for (int64_t i = 0; i < r_q; ++i) sum += best[i] * scales[i];
    return sum;
}

// A bit for every lane that is set.
inline uint32_t bits_of(Ints mask) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask);
#else
    uint32_t bits = 0;
    for (int64_t l = 0; l < LANES; ++l) bits |= uint32_t(mask[l] & 1) << l;
    return bits;
#endif
}

template <class V, class T>
inline V load(const T* from) {
    V to;
    std::memcpy(&to, from, sizeof to);
    return to;
}

// Whether so many sums, a multiple of LANES, are all finite.
inline bool all_finite(const float* sums, int64_t count) {
    Floats poison{};  // NaN once one of them is not finite
    for (int64_t i = 0; i < count; i += LANES) {
        Floats some;
        std::memcpy(&some, sums + i, sizeof some);
        poison += some * 0.0f;
    }
    bool finite = true;
    for (int64_t l = 0; l < LANES; ++l) finite &= poison[l] == 0;
    return finite;
}
inline bool all_finite(const int32_t*, int64_t) { return true; }

// What one thread does: it takes block after block of documents and scores them with all queries.
template <class One, class Two>
struct Worker {
    typedef typename One::Sum Sum;
    typedef typename std::conditional<std::is_same<Sum, float>::value, Floats, Ints>::type Sums;
    static_assert(STRIP % One::rows == 0 && STRIP % Two::rows == 0, "strips are whole tiles");

    Job& job;
    const Stage& stage = job.stage;
    const int64_t row_bytes = job.depth * 4, lanes = job.lanes(), group = job.group();
    const bool single = job.single(), lonely = single && One::along && One::lanes == 1;  // one query vector
    // Sums of a row: whole tiles, and not too many a power of two, which would crowd a few sets of the cache.
    const int64_t width = lonely ? 1 : (lanes + LANES - 1) / LANES * LANES + (lanes >= 128 ? LANES : 0);
    const bool as_is = job.stored == job.computed && job.stored_bytes == row_bytes;
    Buffer rows{size_t(STRIP * row_bytes)}, sums_buffer{size_t(STRIP * width * 4)},
        best_buffer{single ? 0 : size_t(job.block * width * 4)};
    Sum* const sums = reinterpret_cast<Sum*>(sums_buffer.data);
    float* const best = reinterpret_cast<float*>(best_buffer.data);  // [documents of a block, width]
    std::vector<Best>* const found = job.out ? nullptr : &job.best[job.workers.fetch_add(1)];
    std::vector<float> least = std::vector<float>(job.groups() * lanes + LANES, INFINITY);  // scores must be larger
    bool finite = true, fits = true;
    [[maybe_unused]] Tiles<One::matrix> configured{};

    explicit Worker(Job& job) : job(job) {
        for (int64_t q = 0; q < job.count; ++q) least[q / group * lanes + q % group] = job.least ? job.least[q] : -INFINITY;
    }

    void run() {
        size_t at = 0;
        for (int64_t block; (block = job.next.fetch_add(1)) < job.blocks;) {
            while (at + 1 < job.segments.size() && job.segments[at + 1].first_block <= block) ++at;
            const Segment& segment = job.segments[at];
            const int64_t start = (block - segment.first_block) * job.block;
            const int64_t end = std::min(start + job.block, segment.n);
            for (int64_t q0 = 0; q0 < job.count; q0 += group) {
                if (single) score_singles(segment, start, end, q0);
                else score_documents(segment, start, end, q0);
            }
        }
        if (!finite) job.bad = true;
        if (!fits) job.overflow = true;
    }

    // A strip of `count` rows with the query vectors of a group. A value that is not finite affects all products of its row,
    // an overflow only some, so all are checked.
    void multiply(const uint8_t* from, int64_t stride, bool ahead, int64_t count, int64_t q0) {
        const uint8_t* packed = job.queries + q0 / group * lanes * job.pitch;
        multiply_strip<One, Two>(job, packed, from, stride, ahead, count, sums, width);
        if (stage.check) finite &= all_finite(sums, count * width);
    }

    // The same with rows from the `at`-th of the documents from `start` on, which are copied unless they lie one after another.
    void multiply_rows(const Segment& segment, const Slab& slab, int64_t start, int64_t at, int64_t count, int64_t q0) {
        const bool flat = as_is && !segment.index && slab.used * slab.vector == slab.document;
        if (flat && count == STRIP)
            return multiply(slab.data + start * slab.document + at * slab.vector, slab.vector, slab.vector < FAR, count, q0);
        Walk walk{job, segment, slab, start, at};
        for (int64_t r = 0; r < count; ++r, walk.next()) decode(walk.row(), job, rows.data + r * row_bytes);
        multiply(rows.data, row_bytes, false, count, q0);
    }

    const float* scales_of(const Segment& segment, const Slab& slab, int64_t d) {
        if (!slab.scales) return nullptr;
        const float* scales = slab.scales + segment.which(d) * slab.scale_document;
        if (stage.check)
            for (int64_t i = 0; i < slab.used; ++i) finite &= bool(std::isfinite(scales[i]));
        return scales;
    }

    void score_documents(const Segment& segment, int64_t start, int64_t end, int64_t q0) {
        const int64_t documents = end - start;
        const int32_t* corrections = job.corrections + q0 / group * lanes;
        std::fill(best, best + documents * width, -INFINITY);
        for (int64_t s = 0; s < stage.slab_count; ++s) {
            const Slab& slab = segment.slabs[s];
            // Documents that lie apart, but are whole tiles each, need not be copied.
            const bool apart = as_is && slab.used % One::rows == 0 && slab.used % Two::rows == 0 &&
                               (segment.index || slab.used * slab.vector != slab.document);
            for (int64_t d = 0; d < documents && apart; ++d) {
                const float* scales = scales_of(segment, slab, start + d);
                prefetch_document(job, segment, slab, start + d + 2);
                for (int64_t at = 0, count; at < slab.used; at += count) {
                    count = std::min(STRIP, slab.used - at);
                    multiply(slab.data + segment.which(start + d) * slab.document + at * slab.vector, slab.vector, false, count, q0);
                    take_maxima(sums, width, count, corrections, scales ? scales + at : nullptr, lanes, best + d * width);
                }
            }
            for (int64_t at = 0, total = apart ? 0 : documents * slab.used; at < total; at += STRIP) {
                const int64_t count = std::min(STRIP, total - at);
                multiply_rows(segment, slab, start, at, count, q0);
                int64_t d = at / slab.used, vector = at % slab.used;
                for (int64_t r = 0, together; r < count; r += together, ++d, vector = 0) {
                    together = std::min(slab.used - vector, count - r);
                    const float* scales = scales_of(segment, slab, start + d);
                    take_maxima(sums + r * width, width, together, corrections, scales ? scales + vector : nullptr, lanes,
                                best + d * width);
                }
            }
        }
        for (int64_t q = 0; q < std::min(group, job.count - q0); ++q) {
            const int64_t lane = q0 / group * lanes + q;
            const float* scales = job.scales + q0 / group * lanes + q * stage.r_q;
            for (int64_t d = 0; d < documents; ++d) {
                const float score = add_up(best + d * width + q * stage.r_q, scales, stage.r_q);
                fits &= std::fabs(score) <= LARGEST;
                if (!found) job.out[(q0 + q) * job.out_stride + segment.place + start + d] = score;
                else if (score > least[lane]) offer(q0 + q, lane, score, segment.first + segment.which(start + d));
            }
        }
    }

    void score_singles(const Segment& segment, int64_t start, int64_t end, int64_t q0) {
        const Slab& slab = *segment.slabs;
        float scales[STRIP];
        std::fill(scales, scales + STRIP, 1.0f);
        for (int64_t d = start; d < end; d += STRIP) {
            const int64_t count = std::min(STRIP, end - d);
            multiply_rows(segment, slab, d, 0, count, q0);
            if (slab.scales && slab.scale_document == 1 && !segment.index) std::memcpy(scales, slab.scales + d, count * 4);
            else if (slab.scales)
                for (int64_t r = 0; r < count; ++r) scales[r] = slab.scales[segment.which(d + r) * slab.scale_document];
            if (stage.check)
                for (int64_t r = 0; r < count; ++r) finite &= bool(std::isfinite(scales[r]));
            if (lonely) take_of_one(segment, d, count, scales);
            else take_of_many(segment, d, count, scales, q0);
        }
    }

    // Scores of one query: a lane is a document. Few of them exceed the least.
    void take_of_one(const Segment& segment, int64_t start, int64_t count, const float* scales) {
        const Ints correction = job.corrections[0] - Ints{};
        const float query_scale = job.scales[0];
        uint32_t wrong = 0;
        for (int64_t r = 0; r < count; r += LANES) {
            const uint32_t there = count - r < LANES ? (1u << (count - r)) - 1 : 0xffff;
            const Floats score = values(load<Sums>(sums + r), correction) * load<Floats>(scales + r) * query_scale;
            wrong |= there & bits_of(~((score <= LARGEST) & (score >= -LARGEST)));
            if (!found) {
                std::memcpy(job.out + segment.place + start + r, &score, std::min(LANES, count - r) * 4);
                continue;
            }
            for (uint32_t bits = there & bits_of(score > least[0]); bits; bits &= bits - 1) {
                const int l = __builtin_ctz(bits);
                if (score[l] > least[0]) offer(0, 0, score[l], segment.first + segment.which(start + r + l));
            }
        }
        fits &= !wrong;
    }

    // Scores of many queries: a lane is a query.
    void take_of_many(const Segment& segment, int64_t start, int64_t count, const float* scales, int64_t q0) {
        const int64_t lane = q0 / group * lanes, queries = std::min(group, job.count - q0);
        uint32_t wrong = 0;
        for (int64_t r = 0; r < count; ++r) {
            for (int64_t l = 0; l < queries; l += LANES) {
                Floats score = values(load<Sums>(sums + r * width + l), load<Ints>(job.corrections + lane + l));
                score = score * scales[r] * load<Floats>(job.scales + lane + l);
                wrong |= bits_of(~((score <= LARGEST) & (score >= -LARGEST)));
                if (!found) {
                    for (int64_t i = l; i < std::min(queries, l + LANES); ++i)
                        job.out[(q0 + i) * job.out_stride + segment.place + start + r] = score[i - l];
                    continue;
                }
                for (uint32_t bits = bits_of(score > load<Floats>(&least[lane + l])); bits; bits &= bits - 1) {
                    const int64_t i = l + __builtin_ctz(bits);
                    offer(q0 + i, lane + i, score[i - l], segment.first + segment.which(start + r));
                }
            }
        }
        fits &= !wrong;
    }

    void offer(int64_t query, int64_t lane, float score, int64_t position) {
        if (job.documents.allowed && !job.documents.allowed[position]) return;
        Best& best = (*found)[query];
        best.keys.push_back(make_key(score, position));
        if (best.full()) least[lane] = score_of(best.cut(best.k));
    }
};

template <class One, class Two>
void work(Job& job) {
    Worker<One, Two>(job).run();
}

struct Choice {
    void (*worker)(Job&);
    Kind computed;
    const char* name;
    int64_t whole;     // see Job
    int64_t multiple;  // a row is padded to this many groups of 4 bytes
    bool along;        // whether queries are packed for `Dots`
};

template <class One, class Two>
Choice choice(Kind computed, const char* name) {
    return {work<One, Two>, computed, name, One::lanes, One::multiple, One::along};
}

template <class K>
Choice choose_dots(int64_t vectors, Kind computed, const char* name) {
    if (vectors == 1) return choice<Dots<K, 1>, Dots<K, 1>>(computed, name);
    if (vectors == 2) return choice<Dots<K, 2>, Dots<K, 2>>(computed, name);
    if (vectors <= 4) return choice<Dots<K, 4>, Dots<K, 4>>(computed, name);
    return choice<Dots<K, 8>, Dots<K, 8>>(computed, name);
}

// For documents of a kind, whose stored vectors take so many bytes, and so many query vectors.
Choice choose(Kind stored, int64_t bytes, int64_t vectors) {
    if (stored == BINARY && vectors == 1) return choice<Bits, Bits>(BINARY, Bits::name);
    const bool few = vectors <= FEW || (vectors <= 2 * FEW && bytes % CROWD == 0);
    if (stored == BFLOAT16) {
#if HAS_AMX && defined(__AMX_BF16__)
        if (amx_granted() && vectors > 1) return choice<Amx<float, 1>, Amx<float, 2>>(BFLOAT16, "AMX");
#endif
#if defined(__AVX512BF16__)
        if (few) return choose_dots<BFloat16>(vectors, BFLOAT16, "AVX-512 BF16");
        return choice<Simd<BFloat16, 24, 1>, Simd<BFloat16, 12, 2>>(BFLOAT16, "AVX-512 BF16");
#endif
    } else if (stored != FLOAT32) {
#if HAS_AMX && defined(__AMX_INT8__)
        if (amx_granted() && vectors > FEWER) return choice<Amx<int32_t, 1>, Amx<int32_t, 2>>(INT8, "AMX");
#endif
#if defined(__AVX512VNNI__)
        if (few) return choose_dots<Int8>(vectors, INT8, "AVX-512 VNNI");
        return choice<Simd<Int8, 24, 1>, Simd<Int8, 12, 2>>(INT8, "AVX-512 VNNI");
#endif
    }
#if defined(__AVX512F__)
    typedef Simd<Float32, 24, 1> One;
    typedef Simd<Float32, 12, 2> Two;
    const char* const name = "AVX-512";
#elif defined(__AVX2__)
    typedef Simd<Float32, 6, 1> One, Two;
    const char* const name = "AVX2";
#elif defined(__aarch64__)
    typedef Simd<Float32, 6, 1> One, Two;
    const char* const name = "NEON";
#else
    typedef Simd<Float32, 3, 1> One, Two;
    const char* const name = "portable vectors";
#endif
    return few ? choose_dots<Float32>(vectors, FLOAT32, name) : choice<One, Two>(FLOAT32, name);
}

int64_t numbers_in_4_bytes(Kind computed) {
    return computed == FLOAT32 ? 1 : computed == BFLOAT16 ? 2 : computed == INT8 ? 4 : 32;
}

// Rounds a query vector as the documents' kind asks for (`quantization.round_queries`), and returns the scale that undoes it.
float round_query(Kind stored, int64_t dim, const float* from, float* to) {
    std::memcpy(to, from, dim * 4);
    if (stored == FLOAT32) return 1;
    if (stored == BFLOAT16) {
        for (int64_t i = 0; i < dim; ++i) {
            uint32_t bits;
            std::memcpy(&bits, to + i, 4);
            to[i] = from_bfloat16(uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16));
        }
        return 1;
    }
    float most = 0;
    for (int64_t i = 0; i < dim; ++i) most = std::max(most, std::fabs(to[i]));
    const float scale = most / 127, divisor = scale > 0 ? scale : 1;
    for (int64_t i = 0; i < dim; ++i) to[i] = std::min(127.0f, std::max(-127.0f, std::nearbyint(to[i] / divisor)));
    return scale;
}

// A vector in int8, as `quantization.encode` makes it to the last bit, and its scale. Returns false if a number is NaN or too large.
bool encode_int8(const float* from, int64_t dim, uint8_t* to, float* scale) {
    uint32_t largest = 0;  // numbers without their signs are ordered as their bits are, with infinity and NaN above all others
    for (int64_t i = 0; i < dim; ++i) {
        uint32_t bits;
        std::memcpy(&bits, from + i, 4);
        largest = std::max(largest, bits & 0x7fffffff);
    }
    float most;
    std::memcpy(&most, &largest, 4);
    *scale = most / 127;
    const float divisor = *scale > 0 ? *scale : 1;
    for (int64_t i = 0; i < dim; ++i)
        to[i] = uint8_t(int32_t(std::min(127.0f, std::max(-127.0f, std::rint(from[i] / divisor)))) + 128);
    return most <= LARGEST;  // which NaN is not
}

// Query vectors `q0` and up as the micro kernels read them, with what is to be taken off their sums, and their scales.
void pack(const Job& job, bool along, int64_t q0, uint8_t* packed, int32_t* corrections, float* scales) {
    const int64_t per = numbers_in_4_bytes(job.computed), lanes = job.lanes(), dim = job.stage.dim, r_q = job.stage.r_q;
    const int64_t next = along ? 4 : LANES * 4;  // bytes from one group of 4 to the next
    std::vector<float> rounded(dim);
    for (int64_t v = 0; v < job.count * r_q; ++v) {
        const int64_t in_group = job.group() * r_q, lane = v / in_group * lanes + v % in_group;
        uint8_t* first = packed + (along ? lane * job.pitch : lane / LANES * LANES * job.pitch + lane % LANES * 4);
        int32_t total = 0;  // callers ensure that dim * 127 * 128 fits
        scales[lane] = round_query(job.stored, dim, job.stage.queries + (q0 + v / r_q) * job.stage.query_stride + v % r_q * dim,
                                   rounded.data());
        for (int64_t k = 0; k < dim; ++k) {
            const float x = rounded[k];
            uint8_t* to = first + k / per * next + k % per * (4 / per);
            if (per == 1) std::memcpy(to, &x, 4);
            if (per == 2) {
                uint32_t bits;
                std::memcpy(&bits, &x, 4);
                const uint16_t high = uint16_t(bits >> 16);
                std::memcpy(to, &high, 2);
            }
            if (per == 4) *to = uint8_t(int8_t(x));
            if (per == 32) Bits::set(first, job.depth * 4, k, int8_t(x));
            if (per > 2) total += int32_t(x);
        }
        corrections[lane] = job.computed == BINARY ? total : 128 * total;
    }
}

// Run `work` on so many threads, or on as many as the system grants. Returns false if one of them ran out of memory.
template <class Work>
bool on_threads(int64_t threads, Work work) {
    std::atomic<bool> failed{false};
    auto run = [&] {
        try {
            work();
        } catch (...) {
            failed = true;
        }
    };
    std::vector<std::thread> helpers;
    helpers.reserve(std::max<int64_t>(threads, 1));
    for (int64_t t = 1; t < threads; ++t) {
        try {
            helpers.emplace_back(run);
        } catch (const std::system_error&) {
            break;  // a limit on threads: the others do the work
        }
    }
    run();
    for (auto& helper : helpers) helper.join();
    return !failed;
}

// An index must ascend if there is more than one segment.
void add_segments(Job& job) {
    const Stage& stage = job.stage;
    const int64_t *index = job.documents.index, *from = index, n = job.documents.n;
    int64_t first = 0, place = 0;
    job.blocks = 0;
    for (int64_t s = 0; s < stage.segment_count; first += stage.sizes[s++]) {
        int64_t count = stage.sizes[s];
        const int64_t* begin = from;
        if (index) {
            from = s + 1 == stage.segment_count ? index + n : std::lower_bound(from, index + n, first + count);
            count = from - begin;
        }
        if (!count) continue;
        job.segments.push_back({stage.slabs[s], first, begin, place, count, job.blocks});
        place += count;
        job.blocks += (count + job.block - 1) / job.block;
    }
}

enum Status { GOOD = 0, BAD_DOCUMENTS = 1, NO_MEMORY = 2, OVERFLOW_OF_SCORES = 3 };

// Scores `count` queries from the `q0`-th on: all scores go to `out`, or the best ones are collected in `found`.
Status run(const Stage& stage, const Which& documents, int64_t q0, int64_t count, int64_t threads, float* out,
           int64_t out_stride, Best* found, const float* least = nullptr) {
    Job job(stage, documents, count);
    job.least = least;
    job.stored = Kind(stage.kind);
    const int64_t bits[] = {32, 16, 8, 4, 1}, n = documents.n;
    job.stored_bytes = (stage.dim * bits[job.stored] + 7) / 8;
    const Choice choice = choose(job.stored, job.stored_bytes, count * stage.r_q);
    job.computed = choice.computed, job.whole = choice.whole;
    const int64_t per = numbers_in_4_bytes(job.computed), planes = job.computed == BINARY ? Bits::PLANES : 1;
    job.depth = ((stage.dim + per - 1) / per + choice.multiple - 1) / choice.multiple * choice.multiple;
    // Not a power of two, which would crowd a few sets of the cache.
    job.pitch = (job.depth * planes + (choice.along ? LINE : 0)) * 4;
    job.out = out, job.out_stride = out_stride;
    job.block = n < 8 * STRIP * threads ? STRIP / 4 : job.single() ? 8 * STRIP : STRIP;
    add_segments(job);
    const int64_t lanes = job.groups() * job.lanes();
    Buffer packed(lanes * job.pitch);
    std::vector<int32_t> corrections(lanes + LANES);  // read in whole tiles
    std::vector<float> scales(lanes + LANES);
    pack(job, choice.along, q0, packed.data, corrections.data(), scales.data());
    job.queries = packed.data, job.corrections = corrections.data(), job.scales = scales.data();

    const double products = double(n) * stage.vectors() * stage.dim * count * stage.r_q;
    const int64_t worthwhile = 1 + int64_t(std::min(products / FOR_A_THREAD, 1e6));
    const int64_t useful = std::max<int64_t>(1, std::min({threads, job.blocks, worthwhile}));
    if (found) {
        job.best.assign(useful, std::vector<Best>(count));
        for (auto& of_thread : job.best)
            for (int64_t q = 0; q < count; ++q) of_thread[q].k = found[q].k;
    }
    if (!on_threads(useful, [&] { choice.worker(job); })) return NO_MEMORY;
    if (job.bad) return BAD_DOCUMENTS;
    if (job.overflow) return OVERFLOW_OF_SCORES;
    if (!found) return GOOD;
    std::atomic<int64_t> next{0};
    const bool merged = on_threads(std::min(useful, count), [&] {  // the keys of all threads
        for (int64_t q; (q = next.fetch_add(1)) < count;) {
            std::swap(found[q], job.best[0][q]);
            auto& keys = found[q].keys;
            for (int64_t t = 1; t < useful; ++t) {
                const auto& more = job.best[t][q].keys;
                keys.insert(keys.end(), more.begin(), more.end());
                std::inplace_merge(keys.begin(), keys.end() - more.size(), keys.end(),
                                   [](Key a, Key b) { return position_of(a) < position_of(b); });
            }
            found[q].cut(found[q].k);
        }
    });
    return merged ? GOOD : NO_MEMORY;
}

// The best of very many documents: a sample of them tells which score not many more than `keep` of all will exceed, so that
// few are collected. If the sample was misleading, and fewer do, all are collected.
Status run_guessing(const Stage& stage, const Which& documents, int64_t q0, int64_t count, int64_t threads, Best* found) {
    const int64_t n = documents.n, keep = found[0].k;
    if (stage.r_q == 1 && stage.vectors() == 1 && !documents.index && keep >= 64 && n >= WORTH_A_GUESS * keep) {
        std::vector<int64_t> sample;
        for (int64_t start = 0; start < n; start += ONE_IN * LANES)
            for (int64_t i = start; i < std::min(n, start + LANES); ++i)
                if (!documents.allowed || documents.allowed[i]) sample.push_back(i);
        const double expected = double(keep) / ONE_IN;
        std::vector<Best> best(count);
        std::vector<float> least(count);
        for (auto& one : best) one.k = size_t(expected + 4 * std::sqrt(expected) + 4);
        const Which some{sample.data(), int64_t(sample.size()), nullptr};
        if (const Status status = run(stage, some, q0, count, threads, nullptr, 0, best.data())) return status;
        for (int64_t q = 0; q < count; ++q) {
            const bool enough = best[q].keys.size() == best[q].k;
            least[q] = enough ? score_of(*std::min_element(best[q].keys.begin(), best[q].keys.end())) : -INFINITY;
        }
        if (const Status status = run(stage, documents, q0, count, threads, nullptr, 0, found, least.data())) return status;
        if (std::all_of(found, found + count, [&](const Best& one) { return one.keys.size() == size_t(keep); })) return GOOD;
        for (int64_t q = 0; q < count; ++q) found[q].keys.clear();
    }
    return run(stage, documents, q0, count, threads, nullptr, 0, found);
}

// Leaves only what is within the margin of the k-th best, of scores that are sums over r_q vectors.
void keep_near(Best& found, size_t k, float margin, int64_t r_q) {
    if (std::isnan(margin) || found.keys.size() <= k) return;
    found.scratch = found.keys;
    const float least = score_of(kth_largest(found.scratch.data(), found.scratch.size(), k)) - margin * float(r_q);
    found.keep_from(make_key(least, UINT32_MAX));
}

// The stages after the first, for one query: `found` are the documents of the first one, and those of the last one then.
Status narrow(const Stage* stages, int64_t stage_count, int64_t q, float margin, int64_t threads, Best& found,
              int64_t* scored) {
    const size_t k = stages[stage_count - 1].keep;
    std::vector<int64_t> candidates;
    for (int64_t s = 1; s < stage_count; ++s) {
        keep_near(found, k, margin, stages[s - 1].r_q);
        scored[s] = 0;
        if (found.keys.size() <= k && s + 1 < stage_count) continue;  // there is nothing to choose, only to score at last
        scored[s] = found.keys.size();
        candidates.clear();
        for (Key key : found.keys) candidates.push_back(position_of(key));  // in order
        found.keys.clear();
        found.k = std::min<size_t>(stages[s].keep, candidates.size());
        const Which documents{candidates.data(), int64_t(candidates.size()), nullptr};
        const Status status = run(stages[s], documents, q, 1, threads, nullptr, 0, &found);
        if (status) return status;
    }
    return GOOD;
}

}  // namespace

extern "C" {

// All functions return a Status, and documents are those of all segments, one after another.

// The instructions that documents of a kind are multiplied with.
const char* metaembed_instructions(int32_t kind) { return choose(Kind(kind), 1, LANES).name; }

// Scores of `count` queries against all `n` documents, or those of an index [n], into out [count, out_stride].
int32_t metaembed_scores(const Stage* stage, int64_t count, const int64_t* index, int64_t n, int32_t threads, float* out,
                         int64_t out_stride) try {
    return run(*stage, {index, n, nullptr}, 0, count, threads, out, out_stride, nullptr);
} catch (...) {
    return NO_MEMORY;
}

// Each stage scores what the one before kept, the first one all `allowed` documents (a byte for each; null: all), and keeps
// the best ones; of at most `keep`, with a margin (NaN: without) only those within it of the k-th best. The last one keeps k:
// out and positions [count, width], best first, equal scores by position. scored [count, stage_count]: how many were.
int32_t metaembed_cascade(const Stage* stages, int64_t stage_count, int64_t count, const uint8_t* allowed, float margin,
                          int32_t threads, float* out, int64_t* positions, int64_t width, int64_t* scored) try {
    const Stage& first = stages[0];
    const int64_t n = first.documents();
    int64_t available = n;
    std::vector<int64_t> index;
    Which documents{nullptr, n, nullptr};
    if (allowed) {
        available = std::accumulate(allowed, allowed + n, int64_t(0));
        const bool single = first.r_q == 1 && first.vectors() == 1;
        if (available * 4 < n * (single ? 1 : 3)) {  // so few are read one by one
            for (int64_t i = 0; i < n; ++i)
                if (allowed[i]) index.push_back(i);
            documents = {index.data(), available, nullptr};
        } else if (available < n) documents.allowed = allowed;
    }
    if (!available) return GOOD;
    const int64_t keep = std::min(first.keep, available), step = std::max<int64_t>(1, MOST_KEYS / keep);
    for (int64_t q0 = 0; q0 < count; q0 += step) {
        const int64_t some = std::min(step, count - q0);
        std::vector<Best> found(some);
        for (auto& best : found) best.k = keep;
        if (const Status status = run_guessing(first, documents, q0, some, threads, found.data())) return status;
        // Threads share the queries; if they are few, the documents of each.
        const int64_t outer = some < threads ? 1 : threads, inner = outer == 1 ? threads : 1;
        std::atomic<int64_t> next{0};
        std::atomic<int32_t> status{GOOD};
        const bool done = on_threads(stage_count > 1 ? outer : 1, [&] {
            for (int64_t i; (i = next.fetch_add(1)) < some && !status;) {
                const int64_t q = q0 + i;
                auto& keys = found[i].keys;
                scored[q * stage_count] = available;
                if (const Status failed = narrow(stages, stage_count, q, margin, inner, found[i], scored + q * stage_count))
                    status = failed;
                std::sort(keys.begin(), keys.end(), std::greater<Key>());
                for (size_t j = 0; j < std::min(keys.size(), size_t(width)); ++j) {
                    out[q * width + j] = score_of(keys[j]);
                    positions[q * width + j] = position_of(keys[j]);
                }
            }
        });
        if (!done) return NO_MEMORY;
        if (status) return status;
    }
    return GOOD;
} catch (...) {
    return NO_MEMORY;
}

// Encodes float vectors of `n` documents, so many numbers apart and contiguous each, in int8 into the slabs that they are stored in.
int32_t metaembed_encode(const float* from, int64_t n, int64_t document, int64_t vector, int64_t dim, const Slab* slabs,
                         int64_t slab_count) {
    bool finite = true;
    for (int64_t d = 0; d < n; ++d) {
        const float* next = from + d * document;
        for (int64_t s = 0; s < slab_count; ++s) {
            const Slab& slab = slabs[s];
            uint8_t* to = const_cast<uint8_t*>(slab.data) + d * slab.document;
            float* scales = const_cast<float*>(slab.scales) + d * slab.scale_document;
            for (int64_t v = 0; v < slab.used; ++v, next += vector) finite &= encode_int8(next, dim, to + v * slab.vector, scales + v);
        }
    }
    return finite ? GOOD : BAD_DOCUMENTS;
}

}  // extern "C"
