// CountSketch of dense rows: out[r, b] = sum over the columns i of bucket b of signs[i] * x[r, i].
//
// Columns come sorted by bucket, so that a thread adds up its own bucket in a fixed order and no atomics are needed. No includes; the
// tests compile this file as host C++ too.

#ifndef COUNT_SKETCH_HOST
#define THREAD ((int)threadIdx.x)
#define THREADS ((int)blockDim.x)
#define ENTRY extern "C" __global__ void
#endif

typedef long long index_t;

// columns: sorted by bucket, those of bucket b at starts[b] ... starts[b + 1] - 1; signs in the order of columns.
template <typename T>
__device__ void count_row(int thread, int threads, const T* x, const int* columns, const T* signs, const int* starts, int m,
                          T scale, T* out) {
    for (int b = thread; b < m; b += threads) {
        T sum = T(0);
        for (int k = starts[b]; k < starts[b + 1]; ++k) sum += signs[k] * x[columns[k]];
        out[b] = scale * sum;
    }
}

// A block per row.
#define COUNT_ROWS(T, NAME)                                                                                           \
    ENTRY NAME(const T* x, index_t stride, const int* columns, const T* signs, const int* starts, int m, T scale, T* out, \
               index_t stride_out) {                                                                                  \
        index_t row = blockIdx.x;                                                                                     \
        count_row<T>(THREAD, THREADS, x + row * stride, columns, signs, starts, m, scale, out + row * stride_out);    \
    }

COUNT_ROWS(float, count_rows_float32)
COUNT_ROWS(double, count_rows_float64)
