#include "fingerprint.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>

#include "../block/integer_division.h"

namespace resnet_fused {
namespace {

constexpr int64_t kLineBytes = 64, kLineWords = kLineBytes / 8;
// A sample is 1 KiB of a tensor: its lines are fetched side by side, in less than a microsecond. Up to 16 KiB, which is
// a norm's vector of 4096 floats, a tensor is read whole.
constexpr int64_t kSampledLines = 16, kWholeLines = 256;
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;  // 2^64 over the golden ratio

uint64_t mix(uint64_t hash, uint64_t value) {
  hash = (hash ^ value) * kOdd;
  return hash ^ (hash >> 29);
}

// Eight sums side by side, so that the compiler keeps them in one register; the position of each word counts.
uint64_t hash_words(const char* bytes, int64_t words, uint64_t position) {
  uint64_t lanes[kLineWords] = {}, factor = kOdd + 2 * position;
  int64_t i = 0;
  for (; i + kLineWords <= words; i += kLineWords, factor += 2) {
    uint64_t line[kLineWords];
    std::memcpy(line, bytes + 8 * i, kLineBytes);
    for (int64_t k = 0; k < kLineWords; ++k) lanes[k] += (line[k] ^ (line[k] >> 32)) * factor;
  }
  uint64_t hash = 0;
  for (const uint64_t lane : lanes) hash = mix(hash, lane);
  for (; i < words; ++i) {
    uint64_t word;
    std::memcpy(&word, bytes + 8 * i, 8);
    hash = mix(hash, word);
  }
  return hash;
}

uint64_t hash_tail(const char* bytes, int64_t size) {
  uint64_t word = 0;
  std::memcpy(&word, bytes, size);
  return word;
}

uint64_t hash_range(const char* bytes, int64_t size, uint64_t position) {
  uint64_t hash = hash_words(bytes, size / 8, position);
  return size % 8 ? mix(hash, hash_tail(bytes + size / 8 * 8, size % 8)) : hash;
}

uint64_t hash_whole(const char* bytes, int64_t size) {
  constexpr int64_t part = 1 << 18;
  const int64_t parts = ceil_div(size, part);
  std::vector<uint64_t> hashes(parts);
  at::parallel_for(0, parts, 4, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) hashes[i] = hash_range(bytes + i * part, std::min(part, size - i * part), i);
  });
  uint64_t hash = 0;
  for (const uint64_t each : hashes) hash = mix(hash, each);
  return hash;
}

uint64_t hash_sampled(const char* bytes, int64_t size) {
  const int64_t lines = size / kLineBytes;
  uint64_t hash = 0;
  for (int64_t i = 0; i < kSampledLines; ++i) {
    const int64_t line = i * (lines - 1) / (kSampledLines - 1);
    hash = mix(hash, hash_words(bytes + line * kLineBytes, kLineWords, i));
  }
  return hash;
}

// The bytes between the first and the last element; for a sliced tensor they include elements that are not its own.
int64_t extent(const at::Tensor& t) {
  int64_t last = 0;
  for (int64_t d = 0; d < t.dim(); ++d) {
    if (t.size(d) == 0) return 0;
    last += (t.size(d) - 1) * t.stride(d);
  }
  return (last + 1) * static_cast<int64_t>(t.element_size());
}

}  // namespace

std::optional<uint64_t> fingerprint(const std::vector<at::Tensor>& tensors, Reads reads) {
  uint64_t hash = tensors.size();
  for (const auto& t : tensors) {
    if (t.key_set().has(c10::DispatchKey::Python) || t.layout() != at::kStrided) return std::nullopt;
    hash =
        mix(hash, static_cast<uint64_t>(t.scalar_type()) << 32 | static_cast<uint64_t>(t.device().type()) << 16 |
                      static_cast<uint8_t>(t.device().index()));
    for (int64_t d = 0; d < t.dim(); ++d)
      hash = mix(hash, static_cast<uint64_t>(t.size(d)) << 32 ^ static_cast<uint64_t>(t.stride(d)));
    if (reads == Reads::metadata) continue;
    hash = mix(hash, reinterpret_cast<uint64_t>(t.const_data_ptr()));
    if (!t.is_inference()) hash = mix(hash, t._version());
    if (!t.device().is_cpu()) continue;
    const auto* bytes = static_cast<const char*>(t.const_data_ptr());
    const int64_t size = extent(t);
    const bool whole = reads == Reads::everything || t.is_inference() || size <= kWholeLines * kLineBytes;
    hash = mix(hash, whole ? hash_whole(bytes, size) : hash_sampled(bytes, size));
  }
  return hash;
}

}  // namespace resnet_fused
