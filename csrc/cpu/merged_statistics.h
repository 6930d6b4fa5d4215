// Statistics of parts merged into those of the whole: Chan, Golub & LeVeque 1979, in double and in the parts' order.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

namespace resnet_fused::cpu {

class MergedStatistics {
 public:
  explicit MergedStatistics(int64_t channels) : mean_(channels, 0.0), m2_(channels, 0.0) {}

  // of(channel): {mean, sum of squared deviations} of a part of `rows` rows
  template <class Of>
  void add(double rows, const Of& of) {
    const double weight = rows / (seen_ + rows), cross = seen_ * weight;
    const int64_t channels = static_cast<int64_t>(mean_.size());
    for (int64_t c = 0; c < channels; ++c) {
      const auto [mean, m2] = of(c);
      const double delta = mean - mean_[c];
      mean_[c] += delta * weight;
      m2_[c] += m2 + delta * delta * cross;
    }
    seen_ += rows;
  }

  // Mean and biased variance.
  template <class A>
  void write(A* mean, A* variance) const {
    for (size_t c = 0; c < mean_.size(); ++c) {
      mean[c] = static_cast<A>(mean_[c]);
      variance[c] = static_cast<A>(m2_[c] / seen_);
    }
  }

 private:
  std::vector<double> mean_, m2_;
  double seen_ = 0;
};

}  // namespace resnet_fused::cpu
