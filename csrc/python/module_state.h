// Whether a tree of Python modules is still as it was described; asked at every call of a fused block.
#pragma once

#include <pybind11/pybind11.h>

namespace resnet_fused {

// snapshot: (objects, dict, items, dict, items, ...) with objects = (object, its class, ...) and items = (key, value,
// ...), made by resnet_fused/modules/module_state.py. True if every object still has its class and every dict has
// exactly these keys and values, in this order.
bool unchanged(const pybind11::tuple& snapshot);

}  // namespace resnet_fused
