// What each phase of a launch is given: plain structs, filled by csrc/cuda/plan, read by the kernels.
//
// Activations are NHWC: [pixels, channels]. Weights are [K, R, S, C]. Names are those of docs/architecture.md.
#pragma once

#include "../../block/activations.h"
#include "scalars.cuh"

namespace resnet_fused::cuda {

// n / d for 0 <= n < 2^31 by a product and a shift: q = n m / 2^(31 + l), l = ceil(log2 d), m = ceil(2^(31 + l) / d).
struct Divisor {
  uint32_t divisor = 1, multiplier = 1u << 31, shift = 31;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)) {
    while ((uint64_t{1} << (shift - 31)) < divisor) ++shift;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << shift) + divisor - 1) / divisor);
  }
};

// One value per channel; stride 0: one for all. Without data: absent.
struct Vector {
  const void* data = nullptr;
  Scalar type = Scalar::f32;
  int32_t stride = 1;
};
struct OutVector {
  void* data = nullptr;
  Scalar type = Scalar::f32;
};

// norm(y) = gamma (y - mean) / sqrt(var + eps) + beta, var biased. Without a mean: the identity.
struct Norm {
  Vector mean, var, gamma, beta;
  double eps = 0;
};

// --- prologue --------------------------------------------------------------------------------------------------------

// What is made of stored values while they are loaded, by rows of coefficients [rows, channels]:
//   normalize  (x - center) scale + shift             rows: scale, shift, center, shift - center scale
//   gradient   k_dz x + (k_y (y - center) + k)        rows: k_dz, k, center, k - k_y center, k_y;  x = dz
// 16-bit values take the row with the center folded in. That loses digits where |mean| is far above the deviation, but
// none that 16 bits would show.
enum class Source : int32_t { raw, normalize, gradient };
enum TableRow { kRowScale, kRowShift, kRowCenter, kRowFolded, kRowYScale, kTableRows };

// Only relu is computed here. Any other activation would occupy registers through a product's whole loop, so a pass
// before the product computes it, in its epilogue, and writes the result out.
//
// x, y: [pixels, channels]. wide: rows can be read 8 values at a time, aligned to 16 bytes; products need that.
struct Operand {
  const void* x = nullptr;
  const void* y = nullptr;
  const float* table = nullptr;
  int32_t channels = 0;
  Source source = Source::raw;
  bool relu = false;
  bool wide = false;
};

// --- epilogue --------------------------------------------------------------------------------------------------------

// Which value gives the derivative of the activation that the gradient v passes back through.
enum class Mask : int32_t {
  none,
  by_out,   // its own output, where the derivative takes two values
  by_norm,  // its argument, recomputed from y: factor * y_norm(y)
  by_sum,   // ... from y and s: factor * y_norm(y) + residual_scale * residual_norm(s)
  by_bits   // one bit per value: [pixels, ceil(channels / 8)] bytes; a relu's
};
enum class Reduce : int32_t { none, statistics, sums };
// What the third of the three sums adds up. dout: v before the mask, z: the argument of the mask's activation.
enum class Third : int32_t {
  skip,        // v (s - mean_s)
  slope,       // dout z where z <= 0: the gradient of prelu's slope
  activation,  // dout act(z): the gradient of a factor of act(z)
};

// What follows from sum dz and sum dz (y - mean) for v = factor * norm(y) (Ioffe & Szegedy 2015, arXiv:1502.03167).
struct VectorGradients {
  Norm norm;
  Vector factor;
  float* table = nullptr;  // of dy, see Source::gradient
  OutVector dgamma, dbeta, dbias;
  double* dfactor = nullptr;  // one per channel
  bool batch = false;         // the norm's statistics are the batch's: gradients flow through them
};

// partials: [lanes, 3, channels]. tickets: one per block of channels, zero before and after.
struct Reduction {
  double* partials = nullptr;
  int32_t* tickets = nullptr;
  double rows = 0;                // values per channel
  Norm norm;                      // statistics: of the norm that reads the values (gamma, beta, eps)
  float* stats = nullptr;         // statistics: [2, channels], mean and biased variance
  float* table = nullptr;         // statistics: the norm's, see Source::normalize
  VectorGradients first, second;  // sums over y and over s
  double* sums = nullptr;         // sums: [2, channels], sum dz and sum dz (y - mean)
  double* third = nullptr;        // sums: [channels], the third where it is not the skip path's
};

//   v = factor * acc + bias + residual_scale * residual_norm(residual)
//   v = act(v); act_first: v = factor * act(acc + bias) + residual_scale * residual_norm(residual) instead
//   or with a mask v = v * act'(what the mask is by)
//   out = v, bits = (v > 0); then dx = k_dz v + k_y (y - mean) + k where asked for
//   statistics of v, or sums of v, v (y - mean) and, in a pass alone, of what `third` says
struct Epilogue {
  void* out = nullptr;
  void* dx = nullptr;
  const float* dx_table = nullptr;
  uint8_t* bits = nullptr;
  const void* mask_by = nullptr;
  const void* residual = nullptr;
  const void* y = nullptr;  // what the mask by norm and the sums read
  const void* s = nullptr;  // what the mask by sum and the third sum read, in a pass
  Vector factor, bias, second_bias, residual_scale;
  Vector slopes;   // prelu's
  Activation act;  // relu in line, the others by activations.cuh
  Norm y_norm, s_norm, residual_norm;
  Norm norm;  // applied to acc first: where no product comes before
  int32_t channels = 0;
  Mask mask = Mask::none;
  Reduce reduce = Reduce::none;
  Third third = Third::skip;
  bool act_first = false;
  bool wide = false;  // as in Operand, for every tensor here
  Reduction reduction;
};

// --- phases ----------------------------------------------------------------------------------------------------------

struct Geometry {
  int32_t kernel[2] = {1, 1}, stride[2] = {1, 1}, padding[2] = {0, 0}, dilation[2] = {1, 1};
};

// The tile of a product that one worker computes at a time: result rows x result columns.
enum class TileShape : int32_t { small, large };  // 64 x 64, 128 x 64

// The operands of a convolution: `source` is read through the taps of `weight`, forward or transposed. Channels are
// multiples of 8 and everything is aligned to 16 bytes.
struct Product {
  Operand source;
  const void* weight = nullptr;
  int32_t source_height = 0, source_width = 0, result_channels = 0;
  Geometry geometry;
};

// forward      y[pixel, k]  = sum over taps, c of P[tap of pixel, c] W[k, tap, c]
// transposed   dP[pixel, c] = sum over taps, k of dy[tap of pixel, k] W[k, tap, c]
// The transposed form with a stride walks the pixels class by class; a pixel's class is its position modulo the stride.
// All pixels of a class have the same taps that contribute: those that meet the stride's grid.
//
// Reads source [batch, source_height, source_width, C] and weight [K, R, S, C]; writes [batch, height, width,
// result_channels] through the epilogue.
struct Convolution {
  Product product;
  int32_t batch = 0, height = 0, width = 0;                                         // of the result
  int32_t class_height = 0, class_width = 0, classes[2] = {1, 1}, class_tiles = 0;  // pixels of a class; its tiles
  Divisor per_image, per_row;                                                       // pixels of a class
  TileShape tile = TileShape::small;
  int32_t buffers = 2;  // of one step each, in shared memory: the depth of the pipeline
  bool transposed = false;
  bool tf32 = false;
  Epilogue epilogue;
};

// dW[k, tap, c] = sum over pixels of dy[pixel, k] P[tap of pixel, c]; workers share the pixels in splits.
// Reads dy [batch, height, width, K] and source [batch, source_height, source_width, C]; writes dweight [K, R, S, C].
// partials: [splits, K, R, S, C] with more than one split. tickets: one per tile.
struct WeightGradient {
  Operand dy, source;
  void* dweight = nullptr;
  float* partials = nullptr;
  int32_t* tickets = nullptr;
  int32_t source_height = 0, source_width = 0, batch = 0, height = 0, width = 0;
  int32_t splits = 1;
  Divisor per_image, per_row;
  Geometry geometry;
  TileShape tile = TileShape::small;
  int32_t buffers = 2;  // of one step each, in shared memory: the depth of the pipeline
  bool tf32 = false;
};

// A pass over [pixels, channels] without a product: reads and writes tensors of that shape through source and epilogue.
struct Pointwise {
  Operand source;
  int64_t pixels = 0;
  int32_t packs_log2 = 0;  // of 8 channels, side by side in a worker
  Epilogue epilogue;
};

// Writes the table [kTableRows, channels] of a norm whose statistics are known before the launch, or of the gradient
// through such a norm.
struct Table {
  Norm norm;
  float* table = nullptr;
  const double* sums = nullptr;  // [2, channels], where the gradient goes through the statistics, too
  double rows = 0;               // values per channel behind the sums
  int32_t channels = 0;
  bool gradient = false;
};

// Evaluation: a whole block for one tile of result pixels; everything between its convolutions stays on the chip.
// Reads x [batch, H, W, C] through the first stage's source, writes [batch, height, width, result_channels].
struct ChainStage {
  Product product;  // the first stage's reads memory, the others what the stage before left on the chip
  Vector bias;
  int32_t rows[2] = {0, 0};   // extent of the result's region of one tile
  Divisor per_row;            // of the region
  int32_t size[2] = {0, 0};   // of the whole result
  int32_t shared_offset = 0;  // of the result, in bytes; the last stage's goes to the epilogue
  Activation act;             // of the result
  Vector slopes;              // prelu's
};
struct Chain {
  static constexpr int kMost = 3;
  ChainStage stage[kMost];
  int32_t count = 0;
  Product projection;  // 1 x 1, added to the last result; without a weight there is none
  int32_t batch = 0;
  int32_t tiles[2] = {0, 0};
  Divisor tiles_per_image, tiles_per_row;
  int32_t shared_constants = 0;  // where the epilogue's constants begin, in bytes
  int32_t buffers = 2;           // of one step each, in shared memory: the depth of the pipeline
  bool tf32 = false;
  Epilogue epilogue;
};

enum class Kind : int32_t { convolution, weight_gradient, pointwise, table, chain };

struct alignas(16) Phase {
  Kind kind = Kind::table;
  bool barrier = false;  // before it: it reads what an earlier phase of the launch wrote
  union {
    Convolution convolution;
    WeightGradient weight_gradient;
    Pointwise pointwise;
    Table table;
    Chain chain;
  };
  Phase() : table() {}
};

// What a launch walks. barrier: a counter, zero before and after.
struct Program {
  static constexpr int kMost = 16;
  int32_t count = 0;
  int32_t* barrier = nullptr;
  Phase phases[kMost];
};

constexpr int kThreads = 256;

}  // namespace resnet_fused::cuda
