// What folded.cu and general.cu share: the steps of a stage, activations with one kink, and the lanes of a warp as one value.
//
// Code for a warp works on values that hold one number for each lane. On a GPU such a value is the thread's own scalar. The tests compile
// this file as host C++ with PLANES_HOST and supply a type of 32 numbers with the same operations. No includes.

#ifndef PLANES_CUH
#define PLANES_CUH

typedef long long index_t;

#ifndef PLANES_HOST
#define ENTRY extern "C" __global__ void
#define LANE_CODE __device__ __forceinline__

template <typename R> struct OfLanes { typedef R type; };

// The value whose number in every lane is f(lane).
template <typename R, typename F> LANE_CODE R per_lane(F f) { return f((int)(threadIdx.x & 31)); }
template <typename F> LANE_CODE void for_each_lane(F f) { f((int)(threadIdx.x & 31)); }
template <typename R> LANE_CODE R lane_value(R value, int) { return value; }
template <typename R> LANE_CODE R shuffle(R value, int source) { return __shfl_sync(0xffffffffu, value, source); }
LANE_CODE double lane_total(double value) {
    #pragma unroll
    for (int step = 16; step; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
    return value;
}
#endif

// With --prec-sqrt=false --prec-div=false --ftz=true, reciprocal, reciprocal_root and root are one instruction of the special function unit.
LANE_CODE float reciprocal(float x) { return 1.0f / x; }
LANE_CODE float reciprocal_root(float x) { return rsqrtf(x); }
LANE_CODE float root(float x) { return sqrtf(x); }
LANE_CODE float fused(float x, float y, float z) { return fmaf(x, y, z); }
LANE_CODE float larger(float x, float y) { return fmaxf(x, y); }
LANE_CODE float smaller(float x, float y) { return fminf(x, y); }
LANE_CODE float magnitude(float x) { return fabsf(x); }
LANE_CODE float signed_as(float x, float sign) { return copysignf(x, sign); }
LANE_CODE double root(double x) { return sqrt(x); }
LANE_CODE double fused(double x, double y, double z) { return fma(x, y, z); }
LANE_CODE double larger(double x, double y) { return fmax(x, y); }
LANE_CODE double magnitude(double x) { return fabs(x); }
LANE_CODE double signed_as(double x, double sign) { return copysign(x, sign); }
LANE_CODE double select_above(double x, double limit, double then, double otherwise) { return x > limit ? then : otherwise; }

enum Kind { CONVOLVE, RECTIFY, NORMALISE, SAVE, EXCHANGE, ADD };

// One step of a stage.
//   variant: the number of its compiled form
//   map: where √v of its variance map begins among those of an image
//   trainable: whether S is added to T
//   live: whether T is not zero everywhere before it
//   first, second: σ_w²/q², σ_b² of CONVOLVE; curve, line of RECTIFY
//   gain: the most by which a sum of |T| over the entries grows (NORMALISE: to be multiplied by the shares of both images)
// The rest is for general.cu:
//   rows, columns: sides of the image, `_in` before the step; filter; stride; before: l; wraps: whether indices wrap
//   times: how many times the offset of the stage's output the offset of a plane is, `_in` before the step
struct Step {
    int kind, variant, map, trainable, live;
    double first, second, gain;
    int rows_in, columns_in, rows, columns, filter_rows, filter_columns, stride_rows, stride_columns;
    int before_rows, before_columns, wraps, times_rows_in, times_columns_in, times_rows, times_columns;
};

// 1/d where d > 0. Where d = 0 it may be any finite number, because S is exactly 0 there.
template <typename V> LANE_CODE V inverse_of(V d, float) { return reciprocal(larger(d, 1e-30f)); }
template <typename V> LANE_CODE V inverse_of(V d, double) { return 1.0 / larger(d, 1e-290); }

// In float64, cosines within SNAP of ±1 count as ±1: the sums S and v differ by less from rounding, and κ₀ would show its square root.
#define SNAP 4e-15
// The largest float32 below 1: keeps 1/r finite, and costs κ₁ 6e-8.
#define LARGEST_COSINE 0.99999994f

// (pi - arccos c)/pi, sqrt(1 - c^2)/pi and 1/sqrt(1 - c^2); c is clipped. POSITIVE: c >= 0 is known.
template <bool POSITIVE, typename V>
LANE_CODE void arc(V& c, V& kappa0, V& sine, V& inverse, float) {
    V a = smaller(POSITIVE ? c : magnitude(c), LARGEST_COSINE);
    V u = fused(-a, a, 1.0f);
    inverse = reciprocal_root(u);
    sine = u * inverse * 0.31830988618f;
    // arccos(a)/(pi sqrt(1 - a)): absolute error of kappa0 2.8e-8 before rounding
    V p = fused(a, 0.0008313364232890308f, -0.0038207992911338806f);
    p = fused(a, p, 0.008837210014462471f);
    p = fused(a, p, -0.015660030767321587f);
    p = fused(a, p, 0.028277341276407242f);
    p = fused(a, p, -0.06830646842718124f);
    p = fused(a, p, 0.4999999701976776f);
    V s = root(1.0f - a);
    if (POSITIVE) {
        kappa0 = fused(-s, p, 1.0f);
        c = a;
    } else {
        kappa0 = 0.5f + signed_as(fused(-s, p, 0.5f), c);
        c = signed_as(a, c);
    }
}

// arccos(1 - 2u) / (pi sqrt(u)) for 0 <= u <= 1/2, as in rectified.cu
__constant__ double ANGLE[] = {
    0.6366197723675813, 0.10610329539465757, 0.04774648291454946, 0.028420526655701855, 0.019341697383177887,
    0.01424388721307388, 0.011023453040310762, 0.00918336661030528, 0.004739397713978679, 0.023401135798025028,
    -0.07899325324799172, 0.3151309812596417, -0.8506118806027071, 1.7400906292496103, -2.5300746753939136,
    2.5243030920944345, -1.5414694256632964, 0.4489910596897837
};

template <bool POSITIVE, typename V>
LANE_CODE void arc(V& c, V& kappa0, V& sine, V& inverse, double) {
    V a = magnitude(c);
    a = select_above(a, 1.0 - SNAP, 1.0, a);
    c = signed_as(a, c);
    sine = root((1.0 - a) * (1.0 + a)) * 0.3183098861837907;
    V u = (1.0 - a) * 0.5, p = ANGLE[17];
    #pragma unroll
    for (int k = 16; k >= 0; --k) p = fused(u, p, ANGLE[k]);
    kappa0 = 0.5 + signed_as(fused(-root(u), p, 0.5), c);
    inverse = 0.0 * a;
}

// S <- curve d kappa1(c) - line S, T <- T (curve kappa0(c) - line), c = S/d. In float32 |T|/sqrt(1 - c^2) is added to doubt: an error ε
// of c becomes ε/pi times that in T/curve.
// PLAIN: curve = 1, line = 0.
template <bool PLAIN, bool POSITIVE, bool TANGENT, typename R, typename V>
LANE_CODE void rectify(V& s, V& t, V d, R curve, R line, V& doubt) {
    V c = s * inverse_of(d, R(0)), kappa0, sine, inverse;
    arc<POSITIVE>(c, kappa0, sine, inverse, R(0));
    if (TANGENT) doubt = fused(magnitude(t), inverse, doubt);
    V next = d * fused(c, kappa0, sine);
    if (PLAIN) {
        s = next;
        if (TANGENT) t = t * kappa0;
    } else {
        s = fused(s, -line, next * curve);
        if (TANGENT) t = t * fused(kappa0, curve, -line);
    }
}

#endif
