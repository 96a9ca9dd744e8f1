// NNGP and NTK of networks of activations with one kink at 0: half deficits of correlations, and the recursion through the layers.
//
// One thread for each entry. The formulas, the constants and their order are those of rectified.py; rectified_device.py launches this.
// The body of a kernel is a device function of (row, column), so the tests compile this file as host C++ and compare it with the pass on
// the CPU. No includes. Entry points are at the end, for float and for double.

#ifndef RECTIFIED_HOST
#define COLUMN ((int)(blockIdx.x * blockDim.x + threadIdx.x))
#define FIRST_ROW ((index_t)blockIdx.y)
#define ROW_STEP ((index_t)gridDim.y)
#define ENTRY extern "C" __global__ void
#endif

typedef long long index_t;

__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
__device__ inline float magnitude(float x) { return fabsf(x); }
__device__ inline double magnitude(double x) { return fabs(x); }
__device__ inline float signed_as(float x, float sign) { return copysignf(x, sign); }
__device__ inline double signed_as(double x, double sign) { return copysign(x, sign); }

template <typename T, int N>
__device__ inline T horner(const T (&coefficients)[N], T u) {
    T value = coefficients[N - 1];
    #pragma unroll
    for (int k = N - 2; k >= 0; --k) value = value * u + coefficients[k];
    return value;
}

// arccos(1 - 2u) / (pi sqrt(u)) for 0 <= u <= 1/2
__device__ inline float angle(float u) {
    const float c[] = {
        0.63661975f, 0.10610513f, 0.04767082f, 0.029590627f, 0.010651533f, 0.0480901f, -0.057350665f, 0.06982063f
    };
    return horner(c, u);
}
__device__ inline double angle(double u) {
    const double c[] = {
        0.6366197723675813, 0.10610329539465757, 0.04774648291454946, 0.028420526655701855, 0.019341697383177887,
        0.01424388721307388, 0.011023453040310762, 0.00918336661030528, 0.004739397713978679, 0.023401135798025028,
        -0.07899325324799172, 0.3151309812596417, -0.8506118806027071, 1.7400906292496103, -2.5300746753939136,
        2.5243030920944345, -1.5414694256632964, 0.4489910596897837
    };
    return horner(c, u);
}

// (kappa_1(1 - 2u) - (1 - 2u)) / (2 u sqrt(u)) for 0 <= u <= 1/2
__device__ inline float excess(float u) {
    const float c[] = {
        0.42441317f, 0.042440366f, 0.013671694f, 0.005971923f, 0.0053461646f, -0.002538177f, 0.0067551485f
    };
    return horner(c, u);
}
__device__ inline double excess(double u) {
    const double c[] = {
        0.42441318157838753, 0.0424413181578411, 0.013641852264516096, 0.0063156723876073755, 0.0035166792891146046,
        0.002191214329823703, 0.0014720317120508653, 0.0010572811700541385, 0.00067262746036401,
        0.0012597601736624407, -0.0028177961739383954, 0.012477810365699157, -0.03309506816247499,
        0.06829298424981407, -0.09940641606716766, 0.09978982784741613, -0.06125749471144344, 0.018089761859256853
    };
    return horner(c, u);
}

// v = (1 - |c|)/2 with the sign of c, in place; counts those below `near`, off the diagonal of a symmetric matrix.
template <typename T>
__device__ inline void half_deficit(T* v, index_t i, int j, int m, T near, bool symmetric, unsigned long long* count) {
    T c = v[i * m + j];
    T u = (T(1) - magnitude(c)) / 2;
    if (u < 0) u = 0;
    if (symmetric && i == j) {
        u = 0;
    } else if (u < near) {
        atomicAdd(count, 1ull);
    }
    v[i * m + j] = signed_as(u, c);
}

// One layer without negative correlations and without a bias; `general_step` is for all others.
template <typename T>
__device__ inline void positive_step(T& v, T& t, T p, T trainable) {
    T r = p * root(v);
    T next = v * (T(1) - r * excess(v));
    t = (T(1) - r * angle(v)) * t + trainable * (T(1) - 2 * next);
    v = next;
}

template <typename T>
__device__ inline void general_step(T& v, T& t, const T* step, T alpha, T beta, T alpha_y, T beta_y) {
    T q = step[1], u = magnitude(v), r = step[0] * root(u);
    T turn = r * angle(u), bulge = u * (r * excess(u));
    bool positive = signed_as(T(1), v) > 0;
    // (1 - f)/2 and (1 + f)/2, each without cancellation where it is small
    T minus = positive ? u - bulge : step[2] + q * u - bulge;
    T plus = positive ? T(1) - minus : step[3] - q * u + bulge;
    T slope = positive ? T(1) - turn : turn - q;
    T product = alpha * alpha_y, apart = alpha - alpha_y, difference = beta - beta_y, total = beta + beta_y;
    minus = product * minus + (apart * apart + difference * difference) / 4;
    plus = product * plus + (apart * apart + total * total) / 4;
    T sign = minus <= plus ? T(1) : T(-1);
    T next = minus <= plus ? minus : plus;
    if (next < 0) next = 0;
    t = product * slope * t + step[4] * sign * (T(1) - 2 * next);
    v = signed_as(next, sign);
}

// All steps of one entry. A symmetric matrix is read on and below its diagonal and written on both sides.
//   v (n, m): half deficits; nngp, ntk (n, m): results; either may be null, and either may be v
//   kinds (steps,): 0 linear, 1 positive, 2 general; constants (steps, 5): P, Q, (1-Q)/2, (1+Q)/2, trainable
//   alpha, beta (general steps, n), deviations (n,): `RowConstants` of x; alpha_y, beta_y, deviations_y alike, with m for n: of y
template <typename T>
__device__ inline void recursion(const T* v, T* nngp, T* ntk, index_t i, int j, int n, int m, bool symmetric, int steps,
                                 const int* kinds, const T* constants, const T* alpha, const T* beta, const T* deviations,
                                 const T* alpha_y, const T* beta_y, const T* deviations_y) {
    if (symmetric && j > i) return;
    T u = v[i * m + j], t = 0;
    index_t general = 0;
    for (int h = 0; h < steps; ++h) {
        const T* step = constants + 5 * h;
        if (kinds[h] == 0) {
            t += step[4] * signed_as(T(1) - 2 * magnitude(u), u);
        } else if (kinds[h] == 1) {
            positive_step(u, t, step[0], step[4]);
        } else {
            general_step(u, t, step, alpha[general * n + i], beta[general * n + i], alpha_y[general * m + j],
                         beta_y[general * m + j]);
            ++general;
        }
    }
    T scale = deviations[i] * deviations_y[j], s = scale * signed_as(T(1) - 2 * magnitude(u), u);
    t *= scale;
    if (nngp) nngp[i * m + j] = s;
    if (ntk) ntk[i * m + j] = t;
    if (symmetric && nngp) nngp[(index_t)j * m + i] = s;
    if (symmetric && ntk) ntk[(index_t)j * m + i] = t;
}

#define HALF_DEFICITS(T, NAME)                                                                                        \
    ENTRY NAME(T* v, int n, int m, T near, int symmetric, unsigned long long* count) {                                \
        if (COLUMN >= m) return;                                                                                      \
        for (index_t i = FIRST_ROW; i < n; i += ROW_STEP) half_deficit(v, i, COLUMN, m, near, symmetric != 0, count); \
    }

#define RECURSION(T, NAME)                                                                                            \
    ENTRY NAME(const T* v, T* nngp, T* ntk, int n, int m, int symmetric, int steps, const int* kinds,                 \
               const T* constants, const T* alpha, const T* beta, const T* deviations, const T* alpha_y,              \
               const T* beta_y, const T* deviations_y) {                                                              \
        if (COLUMN >= m) return;                                                                                      \
        for (index_t i = FIRST_ROW; i < n; i += ROW_STEP)                                                             \
            recursion(v, nngp, ntk, i, COLUMN, n, m, symmetric != 0, steps, kinds, constants, alpha, beta,            \
                      deviations, alpha_y, beta_y, deviations_y);                                                     \
    }

HALF_DEFICITS(float, half_deficits_float32)
HALF_DEFICITS(double, half_deficits_float64)
RECURSION(float, recursion_float32)
RECURSION(double, recursion_float64)
