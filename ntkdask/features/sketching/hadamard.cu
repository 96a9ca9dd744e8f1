// Walsh-Hadamard transforms of rows in shared memory, and the signed, sampled products of them that sketches need.
//
// Each kernel is a sequence of phases with a barrier between them. A phase is a device function of (thread, threads,
// buffer): it is written for any number of threads, so the tests compile this file as host C++ and run the threads of a
// phase one after the other. No includes. Entry points are at the end, for float and for double.

#ifndef HADAMARD_HOST
#define THREAD ((int)threadIdx.x)
#define THREADS ((int)blockDim.x)
#define PHASES(statement) { statement; __syncthreads(); }
#define ENTRY extern "C" __global__ void
#endif

typedef long long index_t;

// One gap every 32 elements: a radix-8 pass over the lowest bits would otherwise meet 8-way bank conflicts.
__device__ inline int skew(int i) { return i + (i >> 5); }

// buffer = signs * x, zeros from d to size; signs may be null.
template <typename T>
__device__ void load_row(int thread, int threads, T* buffer, const T* x, const T* signs, int d, int size) {
    for (int i = thread; i < size; i += threads)
        buffer[skew(i)] = i < d ? (signs ? signs[i] * x[i] : x[i]) : T(0);
}

// 2^bits values transformed in registers, highest bit first: the same order of additions as on the CPU.
template <typename T>
__device__ inline void transform_values(T* v, int bits) {
    #pragma unroll
    for (int bit = 2; bit >= 0; --bit) {
        if (bit >= bits) continue;
        #pragma unroll
        for (int j = 0; j < 8; ++j)
            if (!(j & (1 << bit)) && j < (1 << bits)) {
                T a = v[j], b = v[j | (1 << bit)];
                v[j] = a + b;
                v[j | (1 << bit)] = a - b;
            }
    }
}

// Index bits low ... low+bits-1 of the buffer, bits <= 3; groups of 2^bits elements belong to one thread.
template <typename T>
__device__ void butterflies(int thread, int threads, T* buffer, int size, int low, int bits) {
    for (int group = thread; group < (size >> bits); group += threads) {
        int first = ((group >> low) << (low + bits)) | (group & ((1 << low) - 1));
        T v[8];
        #pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < (1 << bits)) v[j] = buffer[skew(first + (j << low))];
        transform_values(v, bits);
        #pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < (1 << bits)) buffer[skew(first + (j << low))] = v[j];
    }
}

template <typename T>
__device__ void store_row(int thread, int threads, const T* buffer, T* out, int size) {
    for (int i = thread; i < size; i += threads) out[i] = buffer[skew(i)];
}

// out[j] = scale * a[rows_a[j]] * b[rows_b[j]]; without b when it is null.
template <typename T>
__device__ void store_samples(int thread, int threads, const T* a, const unsigned* rows_a, const T* b,
                              const unsigned* rows_b, bool skewed, T scale, T* out, int m) {
    for (int j = thread; j < m; j += threads) {
        int p = (int)rows_a[j], q = b ? (int)rows_b[j] : 0;
        T value = a[skewed ? skew(p) : p];
        if (b) value *= b[skewed ? skew(q) : q];
        out[j] = scale * value;
    }
}

// One group of 2^bits elements of a row in global memory; signs and padding are applied on load.
template <typename T>
__device__ void pass_group(int group, const T* x, const T* signs, int d, T* out, int low, int bits) {
    int first = ((group >> low) << (low + bits)) | (group & ((1 << low) - 1));
    T v[8];
    #pragma unroll
    for (int j = 0; j < 8; ++j)
        if (j < (1 << bits)) {
            int i = first + (j << low);
            v[j] = i < d ? (signs ? signs[i] * x[i] : x[i]) : T(0);
        }
    transform_values(v, bits);
    #pragma unroll
    for (int j = 0; j < 8; ++j)
        if (j < (1 << bits)) out[first + (j << low)] = v[j];
}

// All bits of a buffer from the highest to the lowest, three at a time.
#define TRANSFORM(T, buffer, size)                                                     \
    {                                                                                  \
        int high = 0;                                                                  \
        while ((1 << high) < (size)) ++high;                                           \
        while (high > 0) {                                                             \
            int bits = high < 3 ? high : 3;                                            \
            high -= bits;                                                              \
            PHASES(butterflies<T>(THREAD, THREADS, buffer, size, high, bits))          \
        }                                                                              \
    }

// A block per chunk of a row: grid = rows * chunks.
#define HADAMARD_ROWS(T, NAME)                                                                                        \
    ENTRY NAME(const T* x, index_t stride, const T* signs, int d, T* out, index_t stride_out, int size, int chunks) { \
        extern __shared__ double shared[];                                                                            \
        T* buffer = (T*)shared;                                                                                       \
        index_t row = blockIdx.x / chunks, start = (index_t)(blockIdx.x % chunks) * size;                             \
        int rest = d - start < 0 ? 0 : (int)(d - start < size ? d - start : size);                                    \
        PHASES(load_row<T>(THREAD, THREADS, buffer, x + row * stride + start, signs ? signs + start : signs, rest, size)) \
        TRANSFORM(T, buffer, size)                                                                                    \
        PHASES(store_row<T>(THREAD, THREADS, buffer, out + row * stride_out + start, size))                           \
    }

// grid = (groups of a row / block, rows); x and out may be the same memory.
#define HADAMARD_PASS(T, NAME)                                                                                        \
    ENTRY NAME(const T* x, index_t stride, const T* signs, int d, T* out, index_t stride_out, index_t n, int size,    \
               int low, int bits) {                                                                                   \
        for (index_t row = blockIdx.y; row < n; row += gridDim.y)                                                     \
            PHASES(int group = blockIdx.x * THREADS + THREAD;                                                         \
                   if (group < (size >> bits))                                                                        \
                       pass_group<T>(group, x + row * stride, signs, d, out + row * stride_out, low, bits))           \
    }

// A block per row; y is null for a single factor.
#define SAMPLED_ROWS(T, NAME)                                                                                         \
    ENTRY NAME(const T* x, index_t stride_x, const T* signs_x, int d_x, int size_x, const unsigned* rows_x,           \
               const T* y, index_t stride_y, const T* signs_y, int d_y, int size_y, const unsigned* rows_y,           \
               int m, T scale, T* out, index_t stride_out) {                                                          \
        extern __shared__ double shared[];                                                                            \
        T* a = (T*)shared;                                                                                            \
        T* b = y ? a + skew(size_x) + 1 : (T*)0;                                                                      \
        index_t row = blockIdx.x;                                                                                     \
        PHASES(load_row<T>(THREAD, THREADS, a, x + row * stride_x, signs_x, d_x, size_x))                             \
        TRANSFORM(T, a, size_x)                                                                                       \
        if (y) {                                                                                                      \
            PHASES(load_row<T>(THREAD, THREADS, b, y + row * stride_y, signs_y, d_y, size_y))                         \
            TRANSFORM(T, b, size_y)                                                                                   \
        }                                                                                                             \
        PHASES(store_samples<T>(THREAD, THREADS, a, rows_x, b, rows_y, true, scale, out + row * stride_out, m))       \
    }

// A block per row of transforms that lie in global memory; b is null for a single factor.
#define GATHER_SAMPLES(T, NAME)                                                                                       \
    ENTRY NAME(const T* a, int size_a, const unsigned* rows_a, const T* b, int size_b, const unsigned* rows_b,        \
               int m, T scale, T* out, index_t stride_out) {                                                          \
        index_t row = blockIdx.x;                                                                                     \
        const T* second = b ? b + row * size_b : b;                                                                   \
        PHASES(store_samples<T>(THREAD, THREADS, a + row * size_a, rows_a, second, rows_b, false, scale,              \
                                out + row * stride_out, m))                                                           \
    }

HADAMARD_ROWS(float, hadamard_rows_float32)
HADAMARD_ROWS(double, hadamard_rows_float64)
HADAMARD_PASS(float, hadamard_pass_float32)
HADAMARD_PASS(double, hadamard_pass_float64)
SAMPLED_ROWS(float, sampled_rows_float32)
SAMPLED_ROWS(double, sampled_rows_float64)
GATHER_SAMPLES(float, gather_samples_float32)
GATHER_SAMPLES(double, gather_samples_float64)
