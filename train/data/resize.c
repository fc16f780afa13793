/* Pillow's resize, bit for bit, of pixels of four bytes: `_resize_and_crop` of images.py, for processors with AVX2.

   A pixel of the result is a sum of pixels of the source, along rows first and then along columns, in whole numbers: weights of
   BITS bits, rounded and clipped to a byte after either. (torch's 8-bit resize has weights of 16 bits: of a million values, 4000 are
   1/255 off, and one 2/255.)

   Built by `pip install` where there is a compiler (setup.py); images.py does without it where there is none. */

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>

enum { BITS = 22, ROWS = 4 }; /* ROWS at a time: a large picture's weights are more than the first cache holds */

int of_supported(void) { return __builtin_cpu_supports("avx2"); }

/* Eight bytes as eight int32. */
#define LOAD(place) _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(place)))
#define MULTIPLY_ADD(sum, x, y) sum = _mm256_add_epi32(sum, _mm256_mullo_epi32(x, y))

/* source: [rows, stride bytes]. first: [width], where each sum begins, in pixels. weights: [width, taps * 4], each four times,
   for the bytes of a pixel; taps is even. result: [rows, line bytes], of which width * 4 are written.

   rows: 1 or ROWS, known to the compiler. */
__attribute__((target("avx2"), always_inline)) static inline void narrow(int rows, const uint8_t *source, int64_t stride,
                                                                         const int32_t *first, const int32_t *weights,
                                                                         int64_t width, int64_t taps, uint8_t *result,
                                                                         int64_t line) {
  const __m128i half = _mm_set1_epi32(1 << (BITS - 1));
  for (int64_t x = 0; x < width; x++) {
    const uint8_t *from = source + 4 * (int64_t)first[x];
    const int32_t *weight = weights + x * taps * 4;
    __m256i sums[ROWS]; /* two pixels each */
    for (int y = 0; y < rows; y++) sums[y] = _mm256_setzero_si256();
    for (int64_t i = 0; i < taps * 4; i += 8) {
      const __m256i two = _mm256_loadu_si256((const __m256i *)(weight + i));
      for (int y = 0; y < rows; y++) MULTIPLY_ADD(sums[y], LOAD(from + y * stride + i), two);
    }
    for (int y = 0; y < rows; y++) {
      __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(sums[y]), _mm256_extracti128_si256(sums[y], 1));
      sum = _mm_srai_epi32(_mm_add_epi32(sum, half), BITS);
      sum = _mm_packs_epi32(sum, sum); /* clips */
      int32_t pixel = _mm_cvtsi128_si32(_mm_packus_epi16(sum, sum));
      memcpy(result + y * line + 4 * x, &pixel, 4);
    }
  }
}

/* source: [*, width * 4]. first: [height]. weights: [height, taps]. width is a multiple of 8. result: [3, height, width]. */
__attribute__((target("avx2"))) static void lower(const uint8_t *source, const int32_t *first, const int32_t *weights,
                                                  int64_t height, int64_t taps, uint8_t *result, int64_t width) {
  const __m256i half = _mm256_set1_epi32(1 << (BITS - 1));
  const __m128i by_channel = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  for (int64_t y = 0; y < height; y++)
    for (int64_t x = 0; x < width; x += 8) {
      __m256i sums[4] = {half, half, half, half}; /* two pixels each */
      for (int64_t tap = 0; tap < taps; tap++) {
        const uint8_t *from = source + (first[y] + tap) * width * 4 + x * 4;
        const __m256i weight = _mm256_set1_epi32(weights[y * taps + tap]);
        for (int i = 0; i < 4; i++) MULTIPLY_ADD(sums[i], LOAD(from + 8 * i), weight);
      }
      for (int i = 0; i < 4; i += 2) {
        __m256i words = _mm256_packs_epi32(_mm256_srai_epi32(sums[i], BITS), _mm256_srai_epi32(sums[i + 1], BITS));
        words = _mm256_permute4x64_epi64(words, 0xd8); /* in the order of the pixels */
        __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        uint8_t four[16]; /* pixels: their reds, greens, blues */
        _mm_storeu_si128((__m128i *)four, _mm_shuffle_epi8(bytes, by_channel));
        for (int channel = 0; channel < 3; channel++)
          memcpy(result + (channel * height + y) * width + x + 2 * i, four + 4 * channel, 4);
      }
    }
}

/* source: [rows, stride bytes] of pixels of four bytes. between: [rows, padded * 4]. result: [3, height, padded], padded being
   `width` rounded up to a multiple of 8; what lies beyond `width` means nothing. */
__attribute__((target("avx2"))) void of_resize(const uint8_t *source, int64_t stride, int64_t rows, const int32_t *across_first,
                                               const int32_t *across_weights, int64_t width, int64_t across_taps,
                                               const int32_t *down_first, const int32_t *down_weights, int64_t height,
                                               int64_t down_taps, uint8_t *between, uint8_t *result) {
  const int64_t padded = (width + 7) / 8 * 8, line = padded * 4;
  int64_t y = 0;
  for (; y + ROWS <= rows; y += ROWS)
    narrow(ROWS, source + y * stride, stride, across_first, across_weights, width, across_taps, between + y * line, line);
  for (; y < rows; y++)
    narrow(1, source + y * stride, stride, across_first, across_weights, width, across_taps, between + y * line, line);
  lower(between, down_first, down_weights, height, down_taps, result, padded);
}

#else

int of_supported(void) { return 0; }
void of_resize(void) {}

#endif
