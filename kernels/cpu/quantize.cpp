// fos::quantize, the amax of fos::amax(rht=True), and the exact operands of fos::dequantize, for CPUs.
//
// docs/contract.md defines every number. float32 throughout; build.py compiles with
// -ffp-contract=off and without fast-math, so that each operation rounds by itself, as written.
//
// Names: M rows, P padded columns, W elements a scale, G = P / W; a tile is 16x16 elements (2D blocks).

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

namespace {

constexpr float kAmaxMin = 0x1p-116f;  // below: Q * S / amax overflows, so the tensor quantizes to 0
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kMax = std::numeric_limits<float>::max();
constexpr int kRowsPerTask = 32;  // two tiles; a whole cache line of a transposed bf16 input

enum DType { kBFloat16, kFloat16, kFloat32 };
enum Rule { kMse, kMae, kAbsMax, kStatic };
enum Rounding { kNearest, kStochastic, kRealized };

// body(begin, end) over [0, n) on `threads` threads. Not OpenMP: torch brings a runtime of its own, and
// two runtimes spin at their barriers for the same cores.
template <class Body>
void parallel(int64_t n, int threads, const Body& body) {
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(threads, n));
  std::vector<std::thread> pool;
  for (int64_t t = 1; t < parts; ++t) pool.emplace_back([&, t] { body(n * t / parts, n * (t + 1) / parts); });
  body(int64_t{0}, n / parts);
  for (auto& thread : pool) thread.join();
}

uint32_t bits(float x) { uint32_t u; std::memcpy(&u, &x, 4); return u; }
float from_bits(uint32_t u) { float x; std::memcpy(&x, &u, 4); return x; }

float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, rest = h & 0x7fff;
  if (rest >= 0x7c00) return from_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  if (rest >= 0x400) return from_bits(sign | ((rest << 13) + (112u << 23)));
  return from_bits(sign | bits(float(rest) * 0x1p-24f));
}

// Round to nearest even in float32 that half can hold: 2^(e+13) as the magic addend of exponent e.
float round_to_half(float x) {
  const float a = std::fabs(x);
  if (!(a < kInf)) return x;
  const float magic = from_bits(std::max(bits(a) & 0x7f800000u, 113u << 23) + (13u << 23));
  const float r = (a + magic) - magic;
  return std::copysign(r >= 65520.0f ? kInf : r, x);
}

float round_to_bfloat16(float x) {
  if (std::isnan(x)) return x;
  const uint32_t u = bits(x);
  return from_bits((u + 0x7fff + ((u >> 16) & 1)) & 0xffff0000u);
}

struct Matrix {  // [batch, rows, cols] with strides in elements; a transposition is a swap of strides
  const void* data;
  int dtype;
  int64_t batch, rows, cols, stride_b, stride_r, stride_c;
};

template <int DTYPE>
float at(const void* data, int64_t index) {
  if constexpr (DTYPE == kBFloat16) return from_bits(uint32_t(static_cast<const uint16_t*>(data)[index]) << 16);
  else if constexpr (DTYPE == kFloat16) return half_to_float(static_cast<const uint16_t*>(data)[index]);
  else return static_cast<const float*>(data)[index];
}

template <int DTYPE>
void copy_rows(const Matrix& x, int64_t base, int64_t count, int64_t P, float* out) {
  if (x.stride_c == 1) {
    for (int64_t r = 0; r < count; ++r)
      for (int64_t c = 0; c < x.cols; ++c) out[r * P + c] = at<DTYPE>(x.data, base + r * x.stride_r + c);
  } else {
    for (int64_t c = 0; c < x.cols; ++c)
      for (int64_t r = 0; r < count; ++r)
        out[r * P + c] = at<DTYPE>(x.data, base + r * x.stride_r + c * x.stride_c);
  }
}

// Rows [first, first + count) of one matrix into `out` [count, P], zero-padded, rotated if asked.
void load(const Matrix& x, int64_t b, int64_t first, int64_t count, int64_t P, bool rht, float* out) {
  std::fill(out, out + count * P, 0.0f);
  const int64_t base = b * x.stride_b + first * x.stride_r;
  if (x.dtype == kBFloat16) copy_rows<kBFloat16>(x, base, count, P, out);
  else if (x.dtype == kFloat16) copy_rows<kFloat16>(x, base, count, P, out);
  else copy_rows<kFloat32>(x, base, count, P, out);
  if (!rht) return;
  static const float signs[16] = {1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1};
  for (int64_t g = 0; g < count * P; g += 16) {
    float* v = out + g;
    for (int i = 0; i < 16; ++i) v[i] *= signs[i];
    for (int h = 1; h < 16; h *= 2)
      for (int i = 0; i < 16; ++i)
        if (!(i & h)) {
          const float a = v[i], b2 = v[i + h];
          v[i] = a + b2;
          v[i + h] = a - b2;
        }
    for (int i = 0; i < 16; ++i) {
      v[i] *= 0.25f;
      if (x.dtype == kBFloat16) v[i] = round_to_bfloat16(v[i]);
      if (x.dtype == kFloat16) v[i] = round_to_half(v[i]);
    }
  }
}

// Philox-4x32-10 (Salmon et al., SC 2011): the dice of 16 elements.
void dice(uint64_t seed, uint64_t group, uint32_t stream, float* u) {
  uint32_t c[4] = {uint32_t(group), uint32_t(group >> 32), stream, 0};
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c[0], p1 = uint64_t(0xCD9E8D57u) * c[2];
    const uint32_t next[4] = {uint32_t(p1 >> 32) ^ c[1] ^ k0, uint32_t(p1), uint32_t(p0 >> 32) ^ c[3] ^ k1,
                              uint32_t(p0)};
    std::memcpy(c, next, 16);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < 16; ++i) u[i] = (float((c[i / 4] >> (8 * (i % 4))) & 255) + 0.5f) / 256.0f;
}

float step_of(float a) { return a < 2.0f ? 0.5f : a < 4.0f ? 1.0f : 2.0f; }

float round_nearest(float a) {
  a = std::min(a, 6.0f);
  const float magic = from_bits(std::max(bits(a) & 0x7f800000u, 127u << 23) + (22u << 23));
  return (a + magic) - magic;
}

float round_stochastic(float a, float u) {
  a = std::min(a, 6.0f);
  const float step = step_of(a);
  return std::min(std::floor(a / step + u) * step, 6.0f);
}

float round_e4m3(float s) {
  s = std::min(s, 448.0f);
  const float magic = from_bits(std::max(bits(s) & 0x7f800000u, 121u << 23) + (20u << 23));
  return (s + magic) - magic;
}

uint8_t encode_e4m3(float v) {
  return v < 0x1p-6f ? uint8_t(v * 512.0f) : uint8_t((bits(v) >> 20) - (120u << 3));
}

uint8_t encode_e2m1(float q) { return uint8_t(std::min(std::min(q * 2.0f, q + 2.0f), q * 0.5f + 4.0f)); }

struct Options {
  int format_mx, rule, rounding, tile, rht;
  uint32_t stream;
  uint64_t seed;
  float amax, q, qs;
};

// N elements (16, 32 or 256): the error of one candidate in the contract's order of summation.
template <int N>
float total(const float* t, int rule) {
  if (rule == kAbsMax) {
    float most = t[0];
    for (int i = 1; i < N; ++i) most = std::max(most, t[i]);
    return most;
  }
  float lane[8];
  if constexpr (N == 256) {
    float run[32];
    std::memcpy(run, t, sizeof run);
    for (int chunk = 1; chunk < 8; ++chunk)
      for (int i = 0; i < 32; ++i) run[i] += t[chunk * 32 + i];
    for (int j = 0; j < 8; ++j) lane[j] = ((run[j] + run[8 + j]) + run[16 + j]) + run[24 + j];
  } else {
    for (int j = 0; j < 8; ++j) lane[j] = t[j] + t[j + 8];
  }
  float sum = lane[0];
  for (int j = 1; j < 8; ++j) sum += lane[j];
  return sum;
}

template <int N>
float realized_error(const float* q, const float* ax, float scale, const Options& o) {
  float t[N];
  for (int i = 0; i < N; ++i) {
    const float d = std::fabs(((q[i] * scale) * o.amax) / o.qs - ax[i]);
    t[i] = o.rule == kMse ? d * d : d;
  }
  return total<N>(t, o.rule);
}

template <int N>
float expected_error(const float* y, float scale, const Options& o) {
  if (scale == 0.0f) return kInf;
  float t[N];
  for (int i = 0; i < N; ++i) {
    const float a = y[i], step = step_of(a), lo = step * std::floor(a / step), hi = lo + step;
    const float over = a - 6.0f, down = a - lo, up = hi - a;
    if (o.rule == kMse) t[i] = a >= 6.0f ? over * over : down * up;
    else if (o.rule == kMae) t[i] = a >= 6.0f ? over : (down * up) * (2.0f / step);
    else t[i] = a >= 6.0f ? over : down == 0.0f ? 0.0f : std::max(down, up);
  }
  return total<N>(t, o.rule) * (o.rule == kMse ? scale * scale : scale);
}

// y = |x| under one scale; zeros where the scale is 0.
template <int N>
void scaled(const float* ax, float scale, float encode, float* y) {
  const float inverse = scale == 0.0f ? 0.0f : std::min(1.0f / ((1.0f / encode) * scale), kMax);
  for (int i = 0; i < N; ++i) y[i] = ax[i] * inverse;
}

template <int N>
void round_block(const float* y, const float* u, int rounding, float* q) {
  if (rounding == kNearest) for (int i = 0; i < N; ++i) q[i] = round_nearest(y[i]);
  else for (int i = 0; i < N; ++i) q[i] = round_stochastic(y[i], u[i]);
}

// One block: magnitudes q of its N elements; returns the scale byte. `valid` = 0: all codes are 0.
template <int N>
uint8_t quantize_block(const float* ax, const float* u, const Options& o, float* q, bool* valid) {
  float peak = 0.0f;
  bool finite = true;
  for (int i = 0; i < N; ++i) {
    peak = std::max(peak, ax[i]);
    finite &= ax[i] < kInf;
  }
  *valid = false;
  if (o.format_mx) {
    if (!finite) return 0xff;
    const uint32_t b = bits(peak / o.q), byte = (b >> 23) + ((b & 0x7fffff) != 0);
    const float inverse = byte == 254 ? 0x1p-127f : from_bits((254 - byte) << 23);
    float y[N];
    for (int i = 0; i < N; ++i) y[i] = ax[i] * inverse;
    round_block<N>(y, u, o.rounding, q);
    *valid = true;
    return uint8_t(byte);
  }
  if (!finite || !(std::fabs(o.amax) < kInf)) return 0x7f;
  if (!(o.amax >= kAmaxMin)) return 0;
  const float encode = o.qs / o.amax, s = (peak / o.q) * encode;
  float scale = round_e4m3(s), y[N];
  scaled<N>(ax, scale, encode, y);
  if (o.rule == kStatic) {
    round_block<N>(y, u, o.rounding, q);
  } else {
    const float scale4 = round_e4m3(s * 1.5f);
    float y4[N], q4[N];
    scaled<N>(ax, scale4, encode, y4);
    bool four;
    if (o.rounding == kStochastic) {
      four = expected_error<N>(y4, scale4, o) < expected_error<N>(y, scale, o);
      round_block<N>(four ? y4 : y, u, o.rounding, q);
    } else {
      round_block<N>(y, u, o.rounding, q);
      round_block<N>(y4, u, o.rounding, q4);
      four = realized_error<N>(q4, ax, scale4, o) < realized_error<N>(q, ax, scale, o);
      if (four) std::memcpy(q, q4, sizeof q4);
    }
    if (four) scale = scale4;
  }
  *valid = scale != 0.0f;
  return encode_e4m3(scale);
}

int64_t scale_offset(int64_t m, int64_t g, int64_t G) {
  return ((m / 128) * (G / 4) + g / 4) * 512 + (m % 32) * 16 + ((m % 128) / 32) * 4 + g % 4;
}

// HEIGHT x WIDTH elements at (row, col) of the loaded rows: codes into the packed rows, scale bytes.
template <int HEIGHT, int WIDTH>
void block_at(const float* rows, int64_t count, int64_t row, int64_t col, int64_t first, int64_t b, const Matrix& x,
              int64_t P, const Options& o, uint8_t* values, uint8_t* scales) {
  constexpr int N = HEIGHT * WIDTH;
  float v[N] = {}, ax[N], u[N], q[N];
  const int height = int(std::min<int64_t>(HEIGHT, count - row));
  for (int i = 0; i < height; ++i) std::memcpy(v + i * WIDTH, rows + (row + i) * P + col, WIDTH * sizeof(float));
  for (int i = 0; i < N; ++i) ax[i] = std::fabs(v[i]);
  if (o.rounding != kNearest)
    for (int i = 0; i < HEIGHT; ++i)
      for (int j = 0; j < WIDTH; j += 16) {
        const int64_t m = b * x.rows + first + row + i;
        dice(o.seed, uint64_t(m * (P / 16) + (col + j) / 16), o.stream, u + i * WIDTH + j);
      }
  bool valid;
  const uint8_t byte = quantize_block<N>(ax, u, o, q, &valid);
  const int64_t G = P / WIDTH;
  for (int i = 0; i < height; ++i) {
    uint8_t* out = values + (row + i) * (P / 2) + col / 2;
    for (int j = 0; j < WIDTH; j += 2) {
      const int k = i * WIDTH + j;
      const uint8_t low = valid ? encode_e2m1(q[k]) | (v[k] < 0.0f ? 8 : 0) : 0;
      const uint8_t high = valid ? encode_e2m1(q[k + 1]) | (v[k + 1] < 0.0f ? 8 : 0) : 0;
      out[j / 2] = uint8_t(low | high << 4);
    }
    scales[scale_offset(first + row + i, col / WIDTH, G)] = byte;
  }
}

}  // namespace

extern "C" {

// values [batch, rows, P/2] and scales [batch, L], L = roundup(rows, 128) * P/W, zeroed by the caller.
void fos_quantize(const void* data, int dtype, int64_t batch, int64_t rows, int64_t cols, int64_t stride_b,
                  int64_t stride_r, int64_t stride_c, int64_t P, int format_mx, int rule, int rounding, int tile,
                  int rht, uint32_t stream, uint64_t seed, float amax, float q, float qs, uint8_t* values,
                  uint8_t* scales, int threads) {
  const Matrix x{data, dtype, batch, rows, cols, stride_b, stride_r, stride_c};
  const Options o{format_mx, rule, rounding, tile, rht, stream, seed, amax, q, qs};
  const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t length = (rows + 127) / 128 * 128 * (P / (format_mx ? 32 : 16));
  parallel(batch * tasks, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(std::min<int64_t>(kRowsPerTask, rows) * P);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tasks, first = task % tasks * kRowsPerTask;
      const int64_t count = std::min<int64_t>(kRowsPerTask, rows - first);
      load(x, b, first, count, P, rht, buffer.data());
      uint8_t* out = values + (b * rows + first) * (P / 2);
      uint8_t* scale = scales + b * length;
      for (int64_t row = 0; row < count; row += tile ? 16 : 1)
        for (int64_t col = 0; col < P; col += format_mx ? 32 : 16) {
          if (tile) block_at<16, 16>(buffer.data(), count, row, col, first, b, x, P, o, out, scale);
          else if (format_mx) block_at<1, 32>(buffer.data(), count, row, col, first, b, x, P, o, out, scale);
          else block_at<1, 16>(buffer.data(), count, row, col, first, b, x, P, o, out, scale);
        }
    }
  });
}

// Largest magnitude after padding and rotation; NaN if any element is.
float fos_amax(const void* data, int dtype, int64_t batch, int64_t rows, int64_t cols, int64_t stride_b,
               int64_t stride_r, int64_t stride_c, int64_t P, int rht, int threads) {
  const Matrix x{data, dtype, batch, rows, cols, stride_b, stride_r, stride_c};
  const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  std::atomic<uint32_t> most{0};  // bits of a magnitude order as integers do
  std::atomic<bool> nan{false};
  parallel(batch * tasks, threads, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(std::min<int64_t>(kRowsPerTask, rows) * P);
    float part = 0.0f;
    bool bad = false;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % tasks * kRowsPerTask;
      const int64_t count = std::min<int64_t>(kRowsPerTask, rows - first);
      load(x, task / tasks, first, count, P, rht, buffer.data());
      for (int64_t i = 0; i < count * P; ++i) {
        part = std::max(part, std::fabs(buffer[i]));
        bad |= std::isnan(buffer[i]);
      }
    }
    uint32_t seen = most;
    while (seen < bits(part) && !most.compare_exchange_weak(seen, bits(part))) {
    }
    if (bad) nan = true;
  });
  return nan ? std::numeric_limits<float>::quiet_NaN() : from_bits(most);
}

// code * scale of every element, float32 [batch, rows, P].
void fos_unscaled(const uint8_t* values, const uint8_t* scales, int64_t batch, int64_t rows, int64_t P, int format_mx,
                  float* out, int threads) {
  static const float grid[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  const int W = format_mx ? 32 : 16;
  const int64_t G = P / W, length = (rows + 127) / 128 * 128 * G;
  float decode[256], codes[16];
  for (int i = 0; i < 16; ++i) codes[i] = i < 8 ? grid[i] : -grid[i - 8];
  for (int i = 0; i < 256; ++i) {
    const int low = i & 127;
    const float e4m3 = low == 127 ? std::numeric_limits<float>::quiet_NaN()
                       : low < 8  ? low * 0x1p-9f
                                  : from_bits((uint32_t(low) << 20) + (120u << 23));
    const float e8m0 = i == 255 ? std::numeric_limits<float>::quiet_NaN() : std::ldexp(1.0f, i - 127);
    decode[i] = format_mx ? e8m0 : i < 128 ? e4m3 : -e4m3;
  }
  parallel(batch * rows, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const uint8_t* packed = values + row * (P / 2);
      const uint8_t* scale = scales + row / rows * length;
      for (int64_t g = 0; g < G; ++g) {
        const float s = decode[scale[scale_offset(row % rows, g, G)]];
        float* o = out + row * P + g * W;
        for (int j = 0; j < W / 2; ++j) {
          const uint8_t byte = packed[g * W / 2 + j];
          o[2 * j] = codes[byte & 15] * s;
          o[2 * j + 1] = codes[byte >> 4] * s;
        }
      }
    }
  });
}

}  // extern "C"
