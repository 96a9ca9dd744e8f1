// Exact convolutional kernels, one warp for each slab: convolutions of stride 1 on images of at most 32 columns and 32 rows.
//
// A slab (dy, dx) holds the entries p = (h, w), p' = ((h + dy) mod H, (w + dx) mod W): the plane of offset (dy, dx) and, folded into
// the rest of the image, its wrapped partners (MATH.md §3), so that no lane idles. Lane w of a warp holds column w, and each of its rows
// of S and T is a register. Sums over a filter are register arithmetic down the rows and shuffles along them; with "same" padding they
// stop where the fold wraps. The slab stays in registers until the readout or the pooling. Several narrow images share a warp.
//
// planes/cuda_source.py writes macros before this text, and planes/device.py launches it. The macros below let the file compile by
// itself. No float is added atomically, so equal launches give equal bits. The tests run it as host C++.

#ifndef PLANES_CUH
#include "planes.cuh"
#endif

#ifndef PLANE_REAL
#define PLANE_REAL float
#define PLANE_TANGENT 1
#define PLANE_THREADS 128
#define PLANE_BLOCKS 4
#define PLANE_H 8
#define PLANE_W 8
#define PLANE_SEGMENT 8
#define PLANE_NORMALISES 1
#define PLANE_POOL_H 2
#define PLANE_POOL_W 2
#define PLANE_BOXES(F) F(0, 3, 3, 1, 1, false)
#define PLANE_RECTIFIERS(F) F(0, true, false)
#define PLANE_STEPS {CONVOLVE, 0, 0, 1, 0, 1.0 / 9, 0.0}, {RECTIFY, 0, 0, 0, 0, 1.0, 0.0, 1.0}
#define PLANE_STEP_COUNT 2
#endif

constexpr int H = PLANE_H, W = PLANE_W, SEGMENT = PLANE_SEGMENT, SEGMENTS = 32 / SEGMENT;
typedef PLANE_REAL Real;
typedef OfLanes<Real>::type Values;
typedef OfLanes<int>::type Integers;

__constant__ Step STEPS[] = {PLANE_STEPS};

// Where the lanes of a warp are: lane l is column l mod SEGMENT of the slab (dy, first + (l / SEGMENT)·apart).
struct Frame {
    int dy, first, apart, limit;  // slabs with column offsets >= limit are not computed
    LANE_CODE int column(int lane) const { return lane % SEGMENT; }
    LANE_CODE int offset(int lane) const { return first + (lane / SEGMENT) * apart; }
    LANE_CODE bool valid(int lane) const { return column(lane) < W && offset(lane) < limit; }
    LANE_CODE int left(int lane) const { return column(lane) < W ? column(lane) : W - 1; }
    LANE_CODE int right(int lane) const { return (left(lane) + offset(lane)) % W; }
};

// Whether the fold, which is before row `cut`, lies between rows low < high.
LANE_CODE bool is_cut(int cut, int low, int high) {
    return high - low == 1 ? cut == high : (unsigned)(cut - low - 1) < (unsigned)(high - low);
}

// Sums over the rows of the filter. A row h + a counts unless a fold lies between it and h: after row H − 1, and before row H − dy.
// Weights 0 and 1, which S and T share, take the place of branches.
template <int QH, int LH, bool WRAP, bool BOTH>
LANE_CODE void sum_columns(const Values (&s)[H], const Values (&t)[H], Values (&sums)[H], Values (&sums_t)[H], int cut) {
    #pragma unroll
    for (int h = 0; h < H; ++h) {
        sums[h] = s[h];
        if (BOTH) sums_t[h] = t[h];
        #pragma unroll
        for (int a = -LH; a < QH - LH; ++a) {
            if (a == 0) continue;
            if (WRAP) {
                sums[h] = sums[h] + s[((h + a) % H + H) % H];
                if (BOTH) sums_t[h] = sums_t[h] + t[((h + a) % H + H) % H];
            } else if (h + a >= 0 && h + a < H) {
                const Real weight = is_cut(cut, a < 0 ? h + a : h, a < 0 ? h : h + a) ? Real(0) : Real(1);
                sums[h] = fused(s[h + a], weight, sums[h]);
                if (BOTH) sums_t[h] = fused(t[h + a], weight, sums_t[h]);
            }
        }
    }
}

// A[S]·q² and, if BOTH, A[T]·q², in place.
template <int QH, int QW, int LH, int LW, bool WRAP, bool BOTH>
LANE_CODE void box(Values (&s)[H], Values (&t)[H], const Frame& frame) {
    Values sums[H], sums_t[H];
    sum_columns<QH, LH, WRAP, BOTH>(s, t, sums, sums_t, H - frame.dy);
    Integers sources[QW];
    Values weights[QW];
    #pragma unroll
    for (int k = 0; k < QW; ++k) {
        const int b = k - LW;
        sources[k] = per_lane<int>([&](int lane) {
            int w = frame.left(lane) + b;
            return lane / SEGMENT * SEGMENT + (w % W + W) % W;
        });
        weights[k] = per_lane<Real>([&](int lane) {
            int w = frame.left(lane) + b, w2 = frame.right(lane) + b;
            return WRAP || (w >= 0 && w < W && w2 >= 0 && w2 < W) ? Real(1) : Real(0);
        });
    }
    #pragma unroll
    for (int h = 0; h < H; ++h) {
        s[h] = sums[h];
        if (BOTH) t[h] = sums_t[h];
        #pragma unroll
        for (int k = 0; k < QW; ++k) {
            if (k == LW) continue;
            s[h] = fused(shuffle(sums[h], sources[k]), weights[k], s[h]);
            if (BOTH) t[h] = fused(shuffle(sums_t[h], sources[k]), weights[k], t[h]);
        }
    }
}

template <bool BOTH>
LANE_CODE void box_of(int variant, Values (&s)[H], Values (&t)[H], const Frame& frame) {
#define CASE(V, QH, QW, LH, LW, WRAP)                     \
    case V:                                               \
        box<QH, QW, LH, LW, WRAP, BOTH>(s, t, frame);     \
        break;
    switch (variant) { PLANE_BOXES(CASE) default: break; }
#undef CASE
}

LANE_CODE void convolve(const Step& step, Values (&s)[H], Values (&t)[H], const Frame& frame) {
    const Real scale = Real(step.first), bias = Real(step.second), grows = Real(step.trainable);
    if (!step.live) {
        box_of<false>(step.variant, s, t, frame);
        #pragma unroll
        for (int h = 0; h < H; ++h) {
            s[h] = fused(s[h], scale, bias);
            if (PLANE_TANGENT) t[h] = s[h] * grows;
        }
        return;
    }
    box_of<PLANE_TANGENT>(step.variant, s, t, frame);
    #pragma unroll
    for (int h = 0; h < H; ++h) {
        s[h] = fused(s[h], scale, bias);
        if (PLANE_TANGENT) t[h] = fused(t[h], scale, s[h] * grows);
    }
}

// √v of both sides at a node. Those of y begin at row dy of the slab; they are stored twice, so that row h + dy exists.
struct Roots {
    const Real *x, *y;
    LANE_CODE Roots(const Real* roots_x, const Real* roots_y, const Step& step, const Frame& frame)
        : x(roots_x + step.map), y(roots_y + 2 * step.map + frame.dy * W) {}
    LANE_CODE Values product(int h, const Frame& frame) const {
        return per_lane<Real>([&](int lane) { return x[h * W + frame.left(lane)] * y[h * W + frame.right(lane)]; });
    }
};

template <bool PLAIN, bool POSITIVE>
LANE_CODE void rectify_rows(const Step& step, Values (&s)[H], Values (&t)[H], const Roots& roots, const Frame& frame,
                            Values& doubt) {
    const Real curve = Real(step.first), line = Real(step.second);
    #pragma unroll
    for (int h = 0; h < H; ++h) {
        rectify<PLAIN, POSITIVE, PLANE_TANGENT, Real>(s[h], t[h], roots.product(h, frame), curve, line, doubt);
    }
}

LANE_CODE void normalise_rows(Values (&s)[H], Values (&t)[H], const Roots& roots, const Frame& frame) {
    #pragma unroll
    for (int h = 0; h < H; ++h) {
        Values inverse = inverse_of(roots.product(h, frame), Real(0));
        s[h] = s[h] * inverse;
        if (PLANE_TANGENT) t[h] = t[h] * inverse;
    }
}

// All steps of the stage; returns the doubt in T of each lane. shares: 1/Σ√v of x's and y's image at every node.
LANE_CODE Values run_steps(Values (&s)[H], Values (&t)[H], const Real* roots_x, const Real* roots_y, const float* shares_x,
                           const float* shares_y, const Frame& frame) {
    Values total = per_lane<Real>([&](int) { return Real(0); });
    for (int k = 0; k < PLANE_STEP_COUNT; ++k) {
        const Step& step = STEPS[k];
        if (step.kind == CONVOLVE) {
            convolve(step, s, t, frame);
            total = total * Real(step.gain);
            continue;
        }
        Roots roots(roots_x, roots_y, step, frame);
        const int node = step.map / (H * W);
        if (PLANE_NORMALISES && step.kind == NORMALISE) {
            normalise_rows(s, t, roots, frame);
            total = total * Real(float(step.gain) * shares_x[node] * shares_y[node]);
            continue;
        }
        Values doubt = per_lane<Real>([&](int) { return Real(0); });
#define CASE(V, PLAIN, POSITIVE)                                              \
    case V:                                                                   \
        rectify_rows<PLAIN, POSITIVE>(step, s, t, roots, frame, doubt);       \
        break;
        switch (step.variant) { PLANE_RECTIFIERS(CASE) default: break; }
#undef CASE
        total = fused(doubt, Real(step.first), total * Real(step.gain));
    }
    return total;
}

// The inputs of a stage: x (n, channels, H, W) and y (m, channels, 2H, W), or, with channels = 0, the sums of `addends` pooled arrays x
// (pairs, S and T, addends, H, W, H, W), offsets before pixels. scale: a factor on products of images.
struct Source {
    const Real *x, *y;
    int channels, addends;
    Real scale;
};

LANE_CODE void read_images(const Source& source, index_t i, index_t j, Values (&s)[H], const Frame& frame) {
    const Real *x = source.x + i * source.channels * H * W, *y = source.y + (2 * j * source.channels * H + frame.dy) * W;
    #pragma unroll
    for (int h = 0; h < H; ++h) s[h] = per_lane<Real>([&](int) { return Real(0); });
    for (int channel = 0; channel < source.channels; ++channel) {
        #pragma unroll
        for (int h = 0; h < H; ++h) {
            Values left = per_lane<Real>([&](int lane) { return x[h * W + frame.left(lane)]; });
            Values right = per_lane<Real>([&](int lane) { return y[h * W + frame.right(lane)]; });
            s[h] = fused(left, right, s[h]);
        }
        x += H * W;
        y += 2 * H * W;
    }
    #pragma unroll
    for (int h = 0; h < H; ++h) s[h] = s[h] * source.scale;
}

LANE_CODE void read_pooled(const Source& source, index_t pair, int part, Values (&s)[H], const Frame& frame) {
    const index_t size = (index_t)H * W * H * W;
    const int parts = PLANE_TANGENT ? 2 : 1;
    const Real* from = source.x + (pair * parts + part) * source.addends * size + (index_t)frame.dy * W * H * W;
    #pragma unroll
    for (int h = 0; h < H; ++h) {
        s[h] = per_lane<Real>([&](int lane) { return from[(frame.offset(lane) % W * H + h) * W + frame.left(lane)]; });
    }
    if (source.addends < 2) return;
    from += size;
    #pragma unroll
    for (int h = 0; h < H; ++h) {
        s[h] = s[h] + per_lane<Real>([&](int lane) { return from[(frame.offset(lane) % W * H + h) * W + frame.left(lane)]; });
    }
}

struct Inputs {
    Source source;
    const Real *roots_x, *roots_y;
    const float *shares_x, *shares_y;
    const int *pairs_x, *pairs_y;  // the row of x and the row of y of each pair of the batch
    int nodes;  // number of the stage's variance maps
};

LANE_CODE Values run_slab(const Inputs& in, index_t pair, Values (&s)[H], Values (&t)[H], const Frame& frame) {
    const index_t i = in.pairs_x[pair], j = in.pairs_y[pair];
    if (in.source.channels) {
        read_images(in.source, i, j, s, frame);
        #pragma unroll
        for (int h = 0; PLANE_TANGENT && h < H; ++h) t[h] = per_lane<Real>([&](int) { return Real(0); });
    } else {
        read_pooled(in.source, pair, 0, s, frame);
        if (PLANE_TANGENT) read_pooled(in.source, pair, 1, t, frame);
    }
    const index_t maps = (index_t)in.nodes * H * W;
    return run_steps(s, t, in.roots_x + i * maps, in.roots_y + 2 * j * maps, in.shares_x + i * in.nodes,
                     in.shares_y + j * in.nodes, frame);
}

LANE_CODE double sum_lanes(const Values& v, const Frame& frame) {
    return lane_total(per_lane<double>([&](int lane) { return frame.valid(lane) ? (double)lane_value(v, lane) : 0.0; }));
}

#define INPUTS                                                                                                            \
    const Real *x, const Real *y, int channels, int addends, Real scale, const Real *roots_x, const Real *roots_y,        \
        const float *shares_x, const float *shares_y, const int *pairs_x, const int *pairs_y, int nodes
#define TAKE_INPUTS \
    Inputs { {x, y, channels, addends, scale}, roots_x, roots_y, shares_x, shares_y, pairs_x, pairs_y, nodes }

#if PLANE_POOL_H
constexpr int PH = PLANE_POOL_H, PW = PLANE_POOL_W, HP = H / PH, WP = W / PW, TARGET = HP * WP;

// Adds a slab to the pooled planes. Its offset is that of a pooled plane times the window, plus (ey, ex). So row r of a window belongs to
// the next pooled plane (carry) if r + ey >= PH, and columns alike (next). One phase adds to the warp's own planes and another to those
// of its neighbour, with a barrier in between.
LANE_CODE void pool_rows(const Values (&s)[H], Real* sums, const Frame& frame, int ey, int ex, bool next) {
    const Integers first = per_lane<int>([&](int lane) { return frame.offset(lane) / PW; });
    #pragma unroll
    for (int row = 0; row < HP; ++row) {
        #pragma unroll
        for (int carry = 0; carry < 2; ++carry) {
            if (carry && ey == 0) continue;
            Values value = per_lane<Real>([&](int) { return Real(0); });
            #pragma unroll
            for (int r = 0; r < PH; ++r) {
                if ((r + ey >= PH) == (carry == 1)) value = value + s[row * PH + r];
            }
            Values window = value;
            #pragma unroll
            for (int k = 1; k < PW; ++k) {
                Integers source = per_lane<int>([&](int lane) { return lane + k < 32 ? lane + k : lane; });
                Values moved = shuffle(value, source);
                Values counts = per_lane<Real>([&](int lane) {
                    int c = frame.column(lane) % PW;
                    return c + k < (next ? PW : PW - ex) ? Real(1) : Real(0);
                });
                window = fused(moved, counts, window);
            }
            for_each_lane([&](int lane) {
                if (!frame.valid(lane) || frame.column(lane) % PW != (next ? PW - ex : 0)) return;
                int plane = (lane_value(first, lane) + (next ? 1 : 0)) % WP;
                sums[((carry * WP + plane) * HP + row) * WP + frame.column(lane) / PW] += lane_value(window, lane);
            });
        }
    }
}

// A stage before a pooling. A block makes the pooled planes (Δy, ·) of a pair, and the part of the planes (Δy + 1, ·) that it carries.
//   pooled (pairs, S and T, 2, HP, WP, HP, WP): means; their sum over the third axis is the pooled array, offsets before pixels
//   doubts (pairs, HP, warps, 3): zero, zero and the doubt of every warp
//   shared memory: (S and T, 2, WP, HP, WP)
ENTRY __launch_bounds__(PLANE_THREADS, PLANE_BLOCKS) slab_pools(INPUTS, Real* pooled, double* doubts) {
    constexpr int PARTS = PLANE_TANGENT ? 2 : 1, SUMS = 2 * WP * TARGET;
    extern __shared__ double shared[];
    Real* sums = (Real*)shared;
    const Inputs in = TAKE_INPUTS;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, plane = blockIdx.x;
    const index_t pair = blockIdx.y;
    for_each_lane([&](int lane) {
        for (int k = 32 * warp + lane; k < PARTS * SUMS; k += blockDim.x) sums[k] = 0;
    });
    __syncthreads();
    double doubt = 0;
    for (int base = 0; base < WP; base += warps * SEGMENTS) {
        for (int e = 0; e < PH * PW; ++e) {
            const int ey = e / PW, ex = e % PW;
            const Frame frame = {plane * PH + ey, (base + warp * SEGMENTS) * PW + ex, PW, W};
            const bool busy = frame.first < W;
            Values s[H], t[H];
            if (busy) {
                const Values d = run_slab(in, pair, s, t, frame);
                doubt += sum_lanes(d, frame);
            }
            for (int next = 0; next < (ex ? 2 : 1); ++next) {
                if (busy) {
                    pool_rows(s, sums, frame, ey, ex, next == 1);
                    if (PLANE_TANGENT) pool_rows(t, sums + SUMS, frame, ey, ex, next == 1);
                }
                __syncthreads();
            }
        }
    }
    const Real share = Real(1) / Real(PH * PW * PH * PW);
    for_each_lane([&](int lane) {
        for (int k = 32 * warp + lane; k < PARTS * SUMS; k += blockDim.x) {
            const int part = k / SUMS, carry = k / (WP * TARGET) % 2, rest = k % (WP * TARGET);
            const int to = carry ? (plane + 1) % HP : plane;
            pooled[(((pair * PARTS + part) * 2 + carry) * HP + to) * WP * TARGET + rest] = sums[k] * share;
        }
        if (lane == 0) {
            double* out = doubts + 3 * ((pair * HP + plane) * warps + warp);
            out[0] = out[1] = 0;
            out[2] = doubt;
        }
    });
}
#else
LANE_CODE double sum_rows(const Values (&s)[H], const Frame& frame) {
    // float64 beyond four rows: float32 alone would lose a digit
    OfLanes<double>::type sums = per_lane<double>([&](int lane) {
        double sum = 0;
        #pragma unroll
        for (int h = 0; h < H; h += 4) {
            Real rows = lane_value(s[h], lane);
            #pragma unroll
            for (int k = h + 1; k < h + 4 && k < H; ++k) rows += lane_value(s[k], lane);
            sum += (double)rows;
        }
        return frame.valid(lane) ? sum : 0.0;
    });
    return lane_total(sums);
}

// The last stage.
//   blocks: on the first axis dy and groups of dx, on the second the pairs of the batch
//   wanted: how many dx to compute: W, or 1 for the slab (0, 0) alone
//   out (pairs, blocks of a pair · warps, 3), float64: Σ S, Σ T and doubt of every warp
ENTRY __launch_bounds__(PLANE_THREADS, PLANE_BLOCKS) slab_sums(INPUTS, int wanted, double* out) {
    const Inputs in = TAKE_INPUTS;
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, groups = (wanted + warps * SEGMENTS - 1) / (warps * SEGMENTS);
    const int dy = blockIdx.x / groups, group = blockIdx.x % groups;
    const Frame frame = {dy, (group * warps + warp) * SEGMENTS, 1, wanted};
    if (frame.first >= wanted) return;
    const index_t pair = blockIdx.y;
    Values s[H], t[H];
    const Values doubt = run_slab(in, pair, s, t, frame);
    const double sum_s = sum_rows(s, frame), sum_t = PLANE_TANGENT ? sum_rows(t, frame) : 0.0, sum_d = sum_lanes(doubt, frame);
    const int per_row = (wanted + SEGMENTS - 1) / SEGMENTS, rows = gridDim.x / groups;
    double* to = out + 3 * (pair * rows * per_row + dy * per_row + frame.first / SEGMENTS);
    for_each_lane([&](int lane) {
        if (lane == 0) {
            to[0] = sum_s;
            to[1] = sum_t;
            to[2] = sum_d;
        }
    });
}
#endif
