// Sums of the features of the pixels under a filter, each pixel's shifted round by a number of its own; see sums.py.
//
// One thread for each entry of the result. No includes: the tests compile this file as host C++ too.

#ifndef PIXEL_SUMS_HOST
#define ENTRY_INDEX ((long long)blockIdx.x * blockDim.x + threadIdx.x)
#define ENTRY extern "C" __global__ void
#endif

typedef long long index_t;

// out[r] = weights * sum_a roll(source[image * rows_in + pixels[pixel, a]], -shifts[filter[pixel, a]]) + addend_weights * addend[r], for
// the output pixels r = first ... first + rows - 1 of all images; addend may be null.
template <typename T>
__device__ void sum_entry(index_t entry, const T* source, index_t rows_in, index_t rows_out, const int* pixels, const int* filter,
                          const int* counts, int size, const int* shifts, const T* weights, const T* addend, const T* addend_weights,
                          T* out, int width, index_t first, index_t rows) {
    if (entry >= rows * width) return;
    index_t row = entry / width;
    int j = (int)(entry - row * width);
    index_t image = (first + row) / rows_out;
    index_t pixel = first + row - image * rows_out;
    T total = T(0);
    for (int a = 0; a < counts[pixel]; ++a) {
        int from = j + shifts[filter[pixel * size + a]];
        if (from >= width) from -= width;
        total += source[(image * rows_in + pixels[pixel * size + a]) * width + from];
    }
    total *= weights[j];
    if (addend) total += addend_weights[j] * addend[entry];
    out[entry] = total;
}

#define SHIFTED_SUMS(T, NAME)                                                                                                 \
    ENTRY shifted_sums_##NAME(const T* source, index_t rows_in, index_t rows_out, const int* pixels, const int* filter,       \
                              const int* counts, int size, const int* shifts, const T* weights, const T* addend,              \
                              const T* addend_weights, T* out, int width, index_t first, index_t rows) {                      \
        sum_entry<T>(ENTRY_INDEX, source, rows_in, rows_out, pixels, filter, counts, size, shifts, weights, addend,           \
                     addend_weights, out, width, first, rows);                                                                \
    }

SHIFTED_SUMS(float, float32)
SHIFTED_SUMS(double, float64)
