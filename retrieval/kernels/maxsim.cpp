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
#include <limits>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace {

constexpr int64_t GROUP = 512;       // query vectors scored in one pass over a block of documents
constexpr int64_t FEW = 8;           // query vectors that are multiplied along the rows; twice as many,
constexpr int64_t CROWD = 2048;      // if rows are a multiple of so many bytes: side by side they crowd few sets of the cache
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

struct Hit {
    float score;
    int64_t position;
    bool operator<(const Hit& other) const {  // better ones first, equal ones by position
        return score != other.score ? score > other.score : position < other.position;
    }
};

// The best `k` of what is offered in ascending order of positions. Hits are collected and cut to `k` from time to time, which
// costs less than a heap.
struct Best {
    std::vector<Hit> hits;
    float least = -std::numeric_limits<float>::infinity();  // a hit must have a larger score

    void offer(float score, int64_t position, size_t k) {
        if (!(score > least) && hits.size() >= k) return;
        hits.push_back({score, position});
        if (hits.size() >= 2 * k + 64) cut(k);
    }
    void cut(size_t k) {
        if (hits.size() <= k) return;
        std::nth_element(hits.begin(), hits.begin() + (k - 1), hits.end());
        hits.resize(k);
        least = hits[k - 1].score;
    }
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
    std::vector<Segment> segments;
    int64_t slab_count;
    int64_t dim;
    Kind stored;           // how rows lie in memory
    int64_t stored_bytes;  // of a row
    Kind computed;         // what the micro kernel multiplies: FLOAT32, BFLOAT16 or INT8
    int64_t depth;         // groups of 4 bytes of a multiplied row
    int64_t whole;         // query vectors are multiplied so many at a time
    int64_t pitch;         // bytes that a packed query vector takes
    const uint8_t* queries;  // packed as the micro kernel reads them: [groups][lanes], `pitch` bytes each
    const int32_t* corrections;  // [groups][lanes], to be taken off integer sums
    const float* query_scales;   // [count, r_q], or null
    int64_t count, r_q;    // queries, and vectors of each
    float* out;            // [count, out_stride]
    int64_t out_stride;
    int64_t block;         // documents that a thread takes at a time
    int64_t blocks;        // of all segments
    bool check;            // look for NaN and infinity in the documents
    int64_t k;             // keep only the best so many of every query, or 0: all scores go to `out`
    std::atomic<int64_t> next{0}, workers{0};
    std::atomic<bool> bad{false}, overflow{false};
    std::vector<std::vector<Best>> best;  // with k: [threads][count]

    int64_t group() const { return std::min(count, GROUP / r_q); }                  // queries scored in one pass
    int64_t lanes() const { return (group() * r_q + whole - 1) / whole * whole; }     // of a group
};

float from_bfloat16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

// One stored vector as the row that the micro kernel reads: unchanged, widened to float, or as bytes offset by 128.
void decode(const uint8_t* from, Kind stored, Kind computed, int64_t dim, uint8_t* to) {
    if (stored == computed) {
        std::memcpy(to, from, dim * (stored == FLOAT32 ? 4 : stored == BFLOAT16 ? 2 : 1));
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

struct Walk {  // over the vectors of a slab, one document after another
    Walk(const Job& job, const Segment& segment, const Slab& slab, int64_t start, int64_t at)
        : job(job), segment(segment), slab(slab), document(start + at / slab.used), vector(at % slab.used) {}
    void next() {
        if (++vector == slab.used) vector = 0, ++document;
    }
    const uint8_t* row() const {
        const int64_t ahead = document + 1 + 8 / slab.used;  // documents, so that their rows are on the way when needed
        if (ahead < segment.n) {
            const uint8_t* later = slab.data + segment.which(ahead) * slab.document + vector * slab.vector;
            for (int64_t line = 0; line < job.stored_bytes; line += LINE * 4) __builtin_prefetch(later + line);
        }
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
    if (scales)
        for (int64_t i = 0; i < r_q; ++i) sum += best[i] * scales[i];
    else
        for (int64_t i = 0; i < r_q; ++i) sum += best[i];
    return sum;
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

template <class One, class Two>
void work(Job& job) {
    typedef typename One::Sum Sum;
    std::vector<Best>* kept = job.k ? &job.best[job.workers.fetch_add(1)] : nullptr;
    bool finite = true, fits = true;
    static_assert(STRIP % One::rows == 0 && STRIP % Two::rows == 0, "strips are whole tiles");
    const int64_t row_bytes = job.depth * 4, lanes = job.lanes();
    // Whole tiles, and not too many a power of two: that would crowd a few sets of the cache.
    const int64_t width = (lanes + LANES - 1) / LANES * LANES + (lanes >= 128 ? LANES : 0);
    const bool as_is = job.stored == job.computed && job.stored_bytes == row_bytes;
    Buffer rows(STRIP * row_bytes), sums_buffer(STRIP * width * 4), best_buffer(job.block * width * 4);
    Sum* sums = reinterpret_cast<Sum*>(sums_buffer.data);
    float* best = reinterpret_cast<float*>(best_buffer.data);
    [[maybe_unused]] Tiles<One::matrix> configured;

    size_t at_segment = 0;
    for (int64_t block; (block = job.next.fetch_add(1)) < job.blocks;) {
        while (at_segment + 1 < job.segments.size() && job.segments[at_segment + 1].first_block <= block) ++at_segment;
        const Segment& segment = job.segments[at_segment];
        const int64_t start = (block - segment.first_block) * job.block, documents = std::min(job.block, segment.n - start);
        for (int64_t q0 = 0; q0 < job.count; q0 += job.group()) {
            const int64_t group = q0 / job.group(), queries = std::min(job.group(), job.count - q0);
            const uint8_t* packed = job.queries + group * lanes * job.pitch;
            auto keep = [&](int64_t query, int64_t document, float score) {
                fits &= std::fabs(score) <= LARGEST;
                if (kept) (*kept)[query].offer(score, segment.place + document, job.k);
                else job.out[query * job.out_stride + segment.place + document] = score;
            };
            // Where documents and queries are one vector each, products are scores.
            const bool single = job.r_q == 1 && job.slab_count == 1 && segment.slabs->used == 1;
            if (!single) std::fill(best, best + documents * width, -std::numeric_limits<float>::infinity());
            for (int64_t s = 0; s < job.slab_count; ++s) {
                const Slab& slab = segment.slabs[s];
                const bool flat = as_is && !segment.index && slab.used * slab.vector == slab.document;
                for (int64_t at = 0, total = documents * slab.used; at < total; at += STRIP) {
                    const int64_t count = std::min(STRIP, total - at);
                    const uint8_t* from = slab.data + start * slab.document + at * slab.vector;
                    int64_t stride = slab.vector;
                    if (!flat || count < STRIP) {
                        Walk at_row{job, segment, slab, start, at};
                        for (int64_t r = 0; r < count; ++r, at_row.next())
                            decode(at_row.row(), job.stored, job.computed, job.dim, rows.data + r * row_bytes);
                        from = rows.data;
                        stride = row_bytes;
                    }
                    multiply_strip<One, Two>(job, packed, from, stride, flat && stride < FAR, count, sums, width);
                    // A value that is not finite affects all products of its row, an overflow only some, so all are checked.
                    if (job.check) finite &= all_finite(sums, count * width);
                    if (single) {
                        const int32_t* corrections = job.corrections + group * lanes;
                        for (int64_t r = 0; r < count; ++r) {
                            const float* scale = slab.scales;
                            if (scale) scale += segment.which(start + at + r) * slab.scale_document;
                            if (scale && job.check) finite &= bool(std::isfinite(*scale));
                            for (int64_t q = 0; q < queries; ++q) {
                                float score = value(sums[r * width + q], corrections[q]);
                                if (scale) score *= *scale;
                                if (job.query_scales) score *= job.query_scales[q0 + q];
                                keep(q0 + q, start + at + r, score);
                            }
                        }
                        continue;
                    }
                    int64_t document = at / slab.used, vector = at % slab.used;
                    for (int64_t r = 0, together; r < count; r += together, ++document, vector = 0) {
                        together = std::min(slab.used - vector, count - r);
                        const float* scales = slab.scales;
                        if (scales) scales += segment.which(start + document) * slab.scale_document + vector;
                        if (scales && job.check)
                            for (int64_t i = 0; i < together; ++i) finite &= bool(std::isfinite(scales[i]));
                        take_maxima(sums + r * width, width, together, job.corrections + group * lanes, scales, lanes,
                                    best + document * width);
                    }
                }
            }
            for (int64_t q = 0; q < queries && !single; ++q) {
                const float* scales = job.query_scales ? job.query_scales + (q0 + q) * job.r_q : nullptr;
                for (int64_t d = 0; d < documents; ++d)
                    keep(q0 + q, start + d, add_up(best + d * width + q * job.r_q, scales, job.r_q));
            }
        }
    }
    if (!finite) job.bad = true;
    if (!fits) job.overflow = true;
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
    return {work<One, Two>, computed, name, One::lanes, One::matrix || One::along ? LINE : 1, One::along};
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
    const bool few = vectors <= FEW || (vectors <= 2 * FEW && bytes % CROWD == 0);
    if (stored == BFLOAT16) {
#if HAS_AMX && defined(__AMX_BF16__)
        if (amx_granted()) return choice<Amx<float, 1>, Amx<float, 2>>(BFLOAT16, "AMX");
#endif
#if defined(__AVX512BF16__)
        if (few) return choose_dots<BFloat16>(vectors, BFLOAT16, "AVX-512 BF16");
        return choice<Simd<BFloat16, 24, 1>, Simd<BFloat16, 12, 2>>(BFLOAT16, "AVX-512 BF16");
#endif
    } else if (stored != FLOAT32) {
#if HAS_AMX && defined(__AMX_INT8__)
        if (amx_granted()) return choice<Amx<int32_t, 1>, Amx<int32_t, 2>>(INT8, "AMX");
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

// Queries [count, r_q, dim], whose values the computed kind represents exactly, as the micro kernels read them.
void pack(const Job& job, bool along, const float* queries, uint8_t* packed, int32_t* corrections) {
    const int64_t per = job.computed == FLOAT32 ? 1 : job.computed == BFLOAT16 ? 2 : 4, lanes = job.lanes();
    const int64_t next = along ? 4 : LANES * 4;  // bytes from one group of 4 to the next
    for (int64_t v = 0; v < job.count * job.r_q; ++v) {
        const int64_t in_group = job.group() * job.r_q, lane = v / in_group * lanes + v % in_group;
        uint8_t* first = packed + (along ? lane * job.pitch : lane / LANES * LANES * job.pitch + lane % LANES * 4);
        int32_t total = 0;  // callers ensure that dim * 127 * 128 fits
        for (int64_t k = 0; k < job.dim; ++k) {
            const float x = queries[v * job.dim + k];
            uint8_t* to = first + k / per * next + k % per * (4 / per);
            if (per == 1) std::memcpy(to, &x, 4);
            if (per == 2) {
                uint32_t bits;
                std::memcpy(&bits, &x, 4);
                const uint16_t high = uint16_t(bits >> 16);
                std::memcpy(to, &high, 2);
            }
            if (per == 4) {
                *to = uint8_t(int8_t(x));
                total += int32_t(x);
            }
        }
        corrections[lane] = 128 * total;
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

// What is the same for all queries of a call.
struct Call {
    const Slab* slabs;
    int64_t slab_count;
    const int64_t* sizes;  // documents of each segment
    int64_t segment_count, dim;
    Kind kind;
    int64_t r_q;
    bool check;
};

// An index must ascend if there is more than one segment.
void add_segments(Job& job, const Call& call, const int64_t* index, int64_t n) {
    const int64_t* from = index;
    int64_t first = 0, place = 0;
    job.blocks = 0;
    for (int64_t s = 0; s < call.segment_count; first += call.sizes[s++]) {
        int64_t count = call.sizes[s];
        const int64_t* begin = from;
        if (index) {
            from = s + 1 == call.segment_count ? index + n : std::lower_bound(from, index + n, first + count);
            count = from - begin;
        }
        if (!count) continue;
        job.segments.push_back({call.slabs + s * call.slab_count, first, begin, place, count, job.blocks});
        place += count;
        job.blocks += (count + job.block - 1) / job.block;
    }
}

// Score `count` queries against the documents of an index [n], or all n of them. With k, the best ones go to out and
// positions [count, k]; `by_index` has positions found in the index, rather than places in it.
int32_t run(const Call& call, const int64_t* index, int64_t n, const float* queries, const float* query_scales, int64_t count,
            float* out, int64_t out_stride, int64_t threads, int64_t k, int64_t* positions, bool by_index) {
    const int64_t bits[] = {32, 16, 8, 4, 1}, stored_bytes = (call.dim * bits[call.kind] + 7) / 8;
    const Choice choice = choose(call.kind, stored_bytes, count * call.r_q);
    Job job;
    job.slab_count = call.slab_count, job.dim = call.dim;
    job.stored = call.kind, job.computed = choice.computed;
    job.stored_bytes = stored_bytes;
    const int64_t per = job.computed == FLOAT32 ? 1 : job.computed == BFLOAT16 ? 2 : 4;
    job.depth = ((call.dim + per - 1) / per + choice.multiple - 1) / choice.multiple * choice.multiple;
    job.query_scales = query_scales, job.count = count, job.r_q = call.r_q, job.whole = choice.whole;
    job.pitch = (job.depth + (choice.along ? LINE : 0)) * 4;  // not a power of two, which would crowd a few sets of the cache
    job.out = out, job.out_stride = out_stride, job.check = call.check, job.k = k;
    job.block = n >= 8 * STRIP * threads ? STRIP : std::max<int64_t>(8, STRIP / 4);
    add_segments(job, call, index, n);
    const int64_t groups = (count + job.group() - 1) / job.group(), lanes = groups * job.lanes();
    Buffer packed(lanes * job.pitch);
    std::vector<int32_t> corrections(lanes + LANES);  // read in whole tiles
    pack(job, choice.along, queries, packed.data, corrections.data());
    job.queries = packed.data, job.corrections = corrections.data();

    const int64_t useful = std::max<int64_t>(1, std::min(threads, job.blocks));
    if (k) job.best.assign(useful, std::vector<Best>(count));
    if (!on_threads(useful, [&] { choice.worker(job); })) return 2;
    if (job.bad) return 1;
    if (job.overflow) return 3;
    if (!k) return 0;
    std::atomic<int64_t> next{0};
    const bool merged = on_threads(std::min(threads, count), [&] {  // the hits of all threads
        for (int64_t q; (q = next.fetch_add(1)) < count;) {
            Best all = std::move(job.best[0][q]);
            for (size_t t = 1; t < job.best.size(); ++t)
                all.hits.insert(all.hits.end(), job.best[t][q].hits.begin(), job.best[t][q].hits.end());
            all.cut(k);
            std::sort(all.hits.begin(), all.hits.end());
            for (size_t i = 0; i < all.hits.size(); ++i) {
                out[q * k + i] = all.hits[i].score;
                positions[q * k + i] = by_index ? index[all.hits[i].position] : all.hits[i].position;
            }
        }
    });
    return merged ? 0 : 2;
}

}  // namespace

extern "C" {

// The instructions that documents of a kind are multiplied with.
const char* metaembed_instructions(int32_t kind) { return choose(Kind(kind), 1, 1).name; }

// Documents are those of all segments, one after another: `sizes` of them, slabs [segment_count, slab_count]. All functions
// return 0, or 1 when `check` found a value that is not finite, 2 when memory ran out, 3 when a score overflowed.

// Scores of `count` queries against all `n` documents, or those of an index [n], into out [count, out_stride]; or, with k > 0,
// the best k <= n of every query into out and positions [count, k]: places among the n, equal scores by place.
int32_t metaembed_scores(const Slab* slabs, int64_t slab_count, const int64_t* sizes, int64_t segment_count,
                         const int64_t* index, int64_t n, int64_t dim, int32_t kind, const float* queries,
                         const float* query_scales, int64_t count, int64_t r_q, float* out, int64_t out_stride, int32_t check,
                         int32_t threads, int64_t k, int64_t* positions) try {
    const Call call{slabs, slab_count, sizes, segment_count, dim, Kind(kind), r_q, check != 0};
    return run(call, index, n, queries, query_scales, count, out, out_stride, threads, k, positions, false);
} catch (...) {
    return 2;
}

// Score every query with its own candidates: the first counts[q] of a row of candidates [count, width], which ascend. The best k of
// them go to out and positions [count, k], equal scores by position; the rest of a row is not written.
int32_t metaembed_rescore(const Slab* slabs, int64_t slab_count, const int64_t* sizes, int64_t segment_count,
                          const int64_t* candidates, const int64_t* counts, int64_t width, int64_t dim, int32_t kind,
                          const float* queries, const float* query_scales, int64_t count, int64_t r_q, float* out,
                          int32_t check, int32_t threads, int64_t k, int64_t* positions) try {
    const Call call{slabs, slab_count, sizes, segment_count, dim, Kind(kind), r_q, check != 0};
    const int64_t outer = count < threads ? 1 : threads, inner = outer == 1 ? threads : 1;  // threads share queries, or one
    std::atomic<int64_t> next{0};
    std::atomic<int32_t> status{0};
    const bool done = on_threads(outer, [&] {
        for (int64_t q; (q = next.fetch_add(1)) < count && !status;) {
            if (!counts[q]) continue;
            const int32_t failed = run(call, candidates + q * width, counts[q], queries + q * r_q * dim,
                                       query_scales ? query_scales + q * r_q : nullptr, 1, out + q * k, 0, inner, k,
                                       positions + q * k, true);
            if (failed) status = failed;
        }
    });
    return done ? int32_t(status) : 2;
} catch (...) {
    return 2;
}

}  // extern "C"
