// What each activation of activations.h computes, and its derivative; the same text for CPU and GPU. Each instruction
// set gets functions of its own: the file is included once in every namespace that has
//   ACTIVATION_FUNCTION                   a function's qualifiers: static inline, or those of a device
//   exponential(A), error_function(A)
//
// forward(z, slope) and derivative(z, slope) are PyTorch's, at the kinks too; NaN passes. `slope` is leaky_relu's
// parameter or prelu's learned value; the others ignore it. Where a derivative takes only two values, the derivative at
// the output equals the derivative at the input.

namespace activations {

struct identity {
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A) {
    return z;
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A, A) {
    return A(1);
  }
};

struct relu {
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A) {
    return z < 0 ? A(0) : z;
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A z, A) {
    return z <= 0 ? A(0) : A(1);
  }
};

struct relu6 {
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A) {
    const A low = z < 0 ? A(0) : z;
    return low > 6 ? A(6) : low;
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A z, A) {
    const A low = z <= 0 ? A(0) : A(1);
    return z >= 6 ? A(0) : low;
  }
};

struct leaky_relu {
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A slope) {
    return z > 0 ? z : z * slope;
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A z, A slope) {
    return z > 0 ? A(1) : slope;
  }
};

struct prelu : leaky_relu {};  // its slope's gradient is dout z where z <= 0

struct hardsigmoid {
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A) {
    return relu6::forward(z + 3, A(0)) / 6;
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A z, A) {
    const A below = z < 3 ? A(1) / 6 : A(0);
    return z > -3 ? below : A(0);
  }
};

struct hardswish {
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A) {
    return z * relu6::forward(z + 3, A(0)) / 6;
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A z, A) {
    const A above = z < 3 ? z / 3 + A(0.5) : A(1);
    return z <= -3 ? A(0) : above;
  }
};

// By e^-|z|: it does not overflow, and 1 - sigmoid is not a difference of nearly equal numbers.
template <class A>
ACTIVATION_FUNCTION A sigmoid(A z) {
  const A e = exponential(z < 0 ? z : -z), whole = A(1) / (A(1) + e);
  return z < 0 ? e * whole : whole;
}
template <class A>
ACTIVATION_FUNCTION A sigmoid_derivative(A z) {
  const A e = exponential(z < 0 ? z : -z), whole = A(1) / (A(1) + e);
  return e * whole * whole;
}

struct silu {
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A) {
    return z * sigmoid(z);
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A z, A) {
    return sigmoid(z) + z * sigmoid_derivative(z);
  }
};

struct gelu {  // z times the normal distribution's function at z (Hendrycks & Gimpel 2016, arXiv:1606.08415)
  template <class A>
  ACTIVATION_FUNCTION A distribution(A z) {
    return A(0.5) * (A(1) + error_function(z * A(0.70710678118654752)));
  }
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A) {
    return z * distribution(z);
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A z, A) {
    return distribution(z) + z * A(0.39894228040143268) * exponential(A(-0.5) * z * z);
  }
};

struct gelu_tanh {  // 0.5 z (1 + tanh(u)) = z sigmoid(2 u)
  template <class A>
  ACTIVATION_FUNCTION A twice_u(A z) {
    return A(1.5957691216057308) * (z + A(0.044715) * z * z * z);
  }
  template <class A>
  ACTIVATION_FUNCTION A forward(A z, A) {
    return z * sigmoid(twice_u(z));
  }
  template <class A>
  ACTIVATION_FUNCTION A derivative(A z, A) {
    const A u = twice_u(z);
    return sigmoid(u) + z * sigmoid_derivative(u) * A(1.5957691216057308) * (A(1) + A(0.134145) * z * z);
  }
};

}  // namespace activations
