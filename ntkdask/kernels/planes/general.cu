// Exact convolutional kernels, one block for each plane: any stage of planes/program.py, with the planes in shared memory.
//
// A plane of offset δ is an array over p, with p' = p + δ: modulo the image with PLANE_FOLDED (a slab, as in folded.cu); otherwise
// the entries with p' outside the image are zero. A step reads one array and writes the other; residual branches save arrays.
// Slower than folded.cu, for stages that folded.cu cannot take: with strides, "valid" padding, residuals or wide images.
//
// planes/cuda_source.py writes macros before this text, and planes/device.py launches it. The macros below let the file compile by itself.

#ifndef PLANES_CUH
#include "planes.cuh"
#endif

#ifndef PLANE_REAL
#define PLANE_REAL double
#define PLANE_TANGENT 1
#define PLANE_FOLDED 0
#define PLANE_H 5
#define PLANE_W 4
#define PLANE_OUT_H 3
#define PLANE_OUT_W 2
#define PLANE_STRIDE_H 2
#define PLANE_STRIDE_W 2
#define PLANE_LARGEST 20
#define PLANE_SAVED 1
#define PLANE_MAPS 20
#define PLANE_RECTIFIERS(F) F(0, true, false)
#define PLANE_STEPS {SAVE}, {RECTIFY, 0, 0, 0, 0, 1.0, 0.0, 1.0, 5, 4, 5, 4}, {ADD, 0, 0, 0, 0, 0.0, 0.0, 0.0, 5, 4, 5, 4}
#define PLANE_STEP_COUNT 3
#endif

typedef PLANE_REAL Real;
constexpr int PARTS = PLANE_TANGENT ? 2 : 1;

__constant__ Step STEPS[] = {PLANE_STEPS};

LANE_CODE int modulo(int k, int n) { return (k % n + n) % n; }

// Offset of a plane and the size of its image; entry e is the pixel p = (e / columns, e % columns).
struct Plane {
    int dy, dx, rows, columns;
    // The number of the pixel p' of an entry; -1 outside the image.
    LANE_CODE int partner(int e) const {
        int h = e / columns + dy, w = e % columns + dx;
        if (PLANE_FOLDED) return modulo(h, rows) * columns + modulo(w, columns);
        return h >= 0 && h < rows && w >= 0 && w < columns ? h * columns + w : -1;
    }
};

// S and T of a plane, with room for PLANE_LARGEST entries each.
struct Pair {
    Real *s, *t;
};

LANE_CODE void convolve(const Step& step, const Pair& from, const Pair& to, const Plane& plane) {
    for (int e = threadIdx.x; e < plane.rows * plane.columns; e += blockDim.x) {
        const int partner = plane.partner(e);
        Real s = 0, t = 0;
        if (partner >= 0) {
            const int top = e / plane.columns * step.stride_rows - step.before_rows;
            const int left = e % plane.columns * step.stride_columns - step.before_columns;
            const int top2 = partner / plane.columns * step.stride_rows - step.before_rows;
            const int left2 = partner % plane.columns * step.stride_columns - step.before_columns;
            for (int a = 0; a < step.filter_rows; ++a) {
                for (int b = 0; b < step.filter_columns; ++b) {
                    int h = top + a, w = left + b, h2 = top2 + a, w2 = left2 + b;
                    if (step.wraps) {
                        h = modulo(h, step.rows_in);
                        w = modulo(w, step.columns_in);
                    } else if (h < 0 || h >= step.rows_in || w < 0 || w >= step.columns_in || h2 < 0 ||
                               h2 >= step.rows_in || w2 < 0 || w2 >= step.columns_in) {
                        continue;
                    }
                    s += from.s[h * step.columns_in + w];
                    if (PLANE_TANGENT) t += from.t[h * step.columns_in + w];
                }
            }
            s = s * Real(step.first) + Real(step.second);
            t = t * Real(step.first) + (step.trainable ? s : Real(0));
        }
        to.s[e] = s;
        if (PLANE_TANGENT) to.t[e] = t;
    }
}

// An activation or LayerNorm on the plane `now`; x, y: √v of either image at its node. Returns this thread's doubt.
LANE_CODE Real apply(const Step& step, const Pair& now, const Plane& plane, const Real* x, const Real* y) {
    Real doubt = 0;
    for (int e = threadIdx.x; e < plane.rows * plane.columns; e += blockDim.x) {
        const int partner = plane.partner(e);
        if (partner < 0) continue;
        Real s = now.s[e], t = PLANE_TANGENT ? now.t[e] : Real(0), d = x[e] * y[partner];
        if (step.kind == NORMALISE) {
            const Real inverse = inverse_of(d, Real(0));
            s *= inverse;
            t *= inverse;
        } else {
#define CASE(V, PLAIN, POSITIVE)                                                                   \
    case V:                                                                                        \
        rectify<PLAIN, POSITIVE, PLANE_TANGENT, Real>(s, t, d, Real(step.first), Real(step.second), doubt); \
        break;
            switch (step.variant) { PLANE_RECTIFIERS(CASE) default: break; }
#undef CASE
        }
        now.s[e] = s;
        if (PLANE_TANGENT) now.t[e] = t;
    }
    return doubt;
}

LANE_CODE void copy(const Pair& from, const Pair& to, int size) {
    for (int e = threadIdx.x; e < size; e += blockDim.x) {
        to.s[e] = from.s[e];
        if (PLANE_TANGENT) to.t[e] = from.t[e];
    }
}

LANE_CODE void add(const Pair& from, const Pair& to, int size) {
    for (int e = threadIdx.x; e < size; e += blockDim.x) {
        to.s[e] += from.s[e];
        if (PLANE_TANGENT) to.t[e] += from.t[e];
    }
}

LANE_CODE void exchange(Pair& a, Pair& b) {
    const Pair c = a;
    a = b;
    b = c;
}

// All steps on arrays[0], which holds the result in the end; arrays[1] is scratch, the last PLANE_SAVED are for residual branches.
// Returns this thread's doubt in T. plane: becomes that of the result.
LANE_CODE double run_steps(Pair (&arrays)[2 + PLANE_SAVED], int dy, int dx, const Real* roots_x, const Real* roots_y,
                           const float* shares_x, const float* shares_y, Plane& plane) {
    int saved = 2, node = 0;
    double total = 0;
    for (int k = 0; k < PLANE_STEP_COUNT; ++k) {
        const Step& step = STEPS[k];
        plane = {dy * step.times_rows, dx * step.times_columns, step.rows, step.columns};
        const int size = step.rows * step.columns;
        if (step.kind == CONVOLVE) {
            convolve(step, arrays[0], arrays[1], plane);
            total *= step.gain;
            exchange(arrays[0], arrays[1]);
        } else if (step.kind == SAVE) {
            copy(arrays[0], arrays[saved++], size);
        } else if (step.kind == EXCHANGE) {
            exchange(arrays[0], arrays[saved - 1]);
        } else if (step.kind == ADD) {
            add(arrays[--saved], arrays[0], size);
        } else {
            const Real doubt = apply(step, arrays[0], plane, roots_x + step.map, roots_y + step.map);
            total *= step.gain * (step.kind == NORMALISE ? (double)shares_x[node] * shares_y[node] : 1.0);
            total += (double)doubt * step.first;
            ++node;
        }
        __syncthreads();
    }
    return total;
}

// Read the plane `now` of images x (n, channels, H, W) and y alike, or, with channels = 0, of the sums of `addends` pooled arrays x
// (pairs, S and T, addends, H, W, H, W).
LANE_CODE void read(const Real* x, const Real* y, int channels, int addends, Real scale, index_t i, index_t j, index_t pair,
                    const Pair& now, const Plane& plane) {
    const int pixels = PLANE_H * PLANE_W;
    for (int e = threadIdx.x; e < pixels; e += blockDim.x) {
        const int partner = plane.partner(e);
        Real s = 0, t = 0;
        if (partner >= 0 && channels) {
            for (int c = 0; c < channels; ++c) s += x[(i * channels + c) * pixels + e] * y[(j * channels + c) * pixels + partner];
            s *= scale;
        } else if (partner >= 0) {
            const index_t size = (index_t)pixels * pixels;
            const index_t slab = modulo(plane.dy, PLANE_H) * PLANE_W + modulo(plane.dx, PLANE_W);
            for (int k = 0; k < addends; ++k) {
                const index_t at = (pair * PARTS * addends + k) * size + slab * pixels + e;
                s += x[at];
                if (PLANE_TANGENT) t += x[at + addends * size];
            }
        }
        now.s[e] = s;
        if (PLANE_TANGENT) now.t[e] = t;
    }
}

// Sum of the values of all threads by a binary tree, so that every run adds in the same order.
LANE_CODE double block_total(double value, double* room) {
    room[threadIdx.x] = value;
    __syncthreads();
    for (int half = blockDim.x / 2; half; half /= 2) {
        if ((int)threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
        __syncthreads();
    }
    const double total = room[0];
    __syncthreads();
    return total;
}

// Run the stage on one plane of one pair.
//   blocks: on the first axis the `offsets` (count, 2) of the planes to compute, on the second the pairs of the batch
//   threads: a power of two
//   sums (pairs, count, 3): Σ S, Σ T and doubt of each plane
//   planes (pairs, S and T, OUT_H·OUT_W offsets, OUT_H·OUT_W), or null: the planes themselves
//   shared memory: a double for each thread, then 2 + PLANE_SAVED arrays of S and T
ENTRY plane_steps(const Real* x, const Real* y, int channels, int addends, Real scale, const Real* roots_x, const Real* roots_y,
                  const float* shares_x, const float* shares_y, const int* pairs_x, const int* pairs_y, int nodes,
                  const int* offsets, double* sums, Real* planes) {
    extern __shared__ double shared[];
    Real* room = (Real*)(shared + blockDim.x);
    Pair arrays[2 + PLANE_SAVED];
    for (int k = 0; k < 2 + PLANE_SAVED; ++k) arrays[k] = {room + k * PARTS * PLANE_LARGEST, room + (k * PARTS + 1) * PLANE_LARGEST};
    const int dy = offsets[2 * blockIdx.x], dx = offsets[2 * blockIdx.x + 1];
    const index_t pair = blockIdx.y, i = pairs_x[pair], j = pairs_y[pair];
    Plane plane = {dy * PLANE_STRIDE_H, dx * PLANE_STRIDE_W, PLANE_H, PLANE_W};
    read(x, y, channels, addends, scale, i, j, pair, arrays[0], plane);
    __syncthreads();
    double doubt = run_steps(arrays, dy, dx, roots_x + i * PLANE_MAPS, roots_y + j * PLANE_MAPS, shares_x + i * nodes,
                             shares_y + j * nodes, plane);
    const int pixels = PLANE_OUT_H * PLANE_OUT_W;
    const index_t slab = modulo(dy, PLANE_OUT_H) * PLANE_OUT_W + modulo(dx, PLANE_OUT_W);
    double s = 0, t = 0;
    for (int e = threadIdx.x; e < pixels; e += blockDim.x) {
        s += arrays[0].s[e];
        if (PLANE_TANGENT) t += arrays[0].t[e];
        // two planes share a slab: entries that do not belong to this one belong to the other
        if (planes && plane.partner(e) >= 0) {
            for (int part = 0; part < PARTS; ++part)
                planes[((pair * PARTS + part) * pixels + slab) * pixels + e] = part ? arrays[0].t[e] : arrays[0].s[e];
        }
    }
    s = block_total(s, shared);
    t = block_total(t, shared);
    doubt = block_total(doubt, shared);
    if (threadIdx.x == 0) {
        double* to = sums + 3 * (pair * gridDim.x + blockIdx.x);
        to[0] = s;
        to[1] = t;
        to[2] = doubt;
    }
}

// Means over the windows of both pixels, from planes (pairs, S and T, H·W offsets, H·W pixels) to pooled (pairs, S and T, HP·WP, HP·WP);
// offsets are modulo the image. One thread sums an entry, in a fixed order. Entries of planes that were not computed have no meaning.
ENTRY pool_planes(const Real* planes, Real* pooled, index_t arrays, int rows, int columns, int window_rows, int window_columns) {
    const int hp = rows / window_rows, wp = columns / window_columns, pixels = hp * wp;
    const index_t size = (index_t)pixels * pixels, full = (index_t)rows * columns * rows * columns;
    const index_t stride = (index_t)gridDim.x * blockDim.x;
    for (index_t k = (index_t)blockIdx.x * blockDim.x + threadIdx.x; k < arrays * size; k += stride) {
        const Real* from = planes + k / size * full;
        const int entry = (int)(k % size), slab = entry / pixels, pixel = entry % pixels;
        const int h = pixel / wp, w = pixel % wp, h2 = (h + slab / wp) % hp, w2 = (w + slab % wp) % wp;
        Real sum = 0;
        for (int a = 0; a < window_rows * window_columns; ++a) {
            const int y = h * window_rows + a / window_columns, x = w * window_columns + a % window_columns;
            for (int b = 0; b < window_rows * window_columns; ++b) {
                const int y2 = h2 * window_rows + b / window_columns, x2 = w2 * window_columns + b % window_columns;
                const int offset = modulo(y2 - y, rows) * columns + modulo(x2 - x, columns);
                sum += from[((index_t)offset * rows + y) * columns + x];
            }
        }
        pooled[k] = sum / Real(window_rows * window_columns * window_rows * window_columns);
    }
}
