// Tensors as kernels take them, and the phase without a product.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "plan.h"

namespace resnet_fused::cuda {

bool aligned(const void* p);  // to 16 bytes

// [C], or nothing; kept.
Vector vector_of(Plan& plan, const std::optional<at::Tensor>& t);

// [N, C, H, W] in channels_last, as it is stored; the caller has to hold the tensor.
Operand operand_of(const at::Tensor& u);

// Gives an epilogue over [pixels, channels] its width and, where it reduces, room for the partials of `blocks` blocks
// of channels.
void complete(Plan& plan, Epilogue& e, int64_t channels, int64_t pixels, int64_t blocks);

// Whether an epilogue does nothing but store.
bool only_stores(const Epilogue& e);

// A pass over `input`, whose results the epilogue stores.
void add_pass(Plan& plan, const Operand& input, int64_t pixels, Epilogue epilogue);

// The table of `channels` of a norm, or with `gradient` of dy; sums: [2, C] over `rows` values per channel, or nothing.
void add_table(
    Plan& plan, const Norm& norm, float* table, int64_t channels, bool gradient = false, const double* sums = nullptr,
    double rows = 0);

}  // namespace resnet_fused::cuda
