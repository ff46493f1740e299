// The coefficients of a spherical interpolation, in float64, from the products of two tensors.
//
// The same formula as the merge method slerp (merging/methods/spherical.py). Arc cosine and sine are those of Sun's
// fdlibm, below one unit in the last place; CUDA's own call a function for large arguments, and keep a stack for it.
#pragma once

constexpr double STRAIGHT_ABOVE = 0.9995;  // cosines of vectors that are too nearly parallel for the arc
constexpr double SHORT = 1e-8;             // lengths that count as none

template <int COUNT>
__device__ inline double polynomial(double x, const double (&coefficients)[COUNT]) {
  double sum = coefficients[COUNT - 1];
#pragma unroll
  for (int i = COUNT - 2; i >= 0; --i) sum = __fma_rn(sum, x, coefficients[i]);
  return sum;
}

// (asin(x) - x) / x^3 as a function of z = x^2, for |x| <= 1/2.
__device__ inline double arcsine_tail(double z) {
  const double above[] = {1.66666666666666657415e-01,  -3.25565818622400915405e-01, 2.01212532134862925881e-01,
                          -4.00555345006794114027e-02, 7.91534994289814532176e-04,  3.47933107596021167570e-05};
  const double below[] = {1.0, -2.40339491173441421878e+00, 2.02094576023350569471e+00, -6.88283971605453293030e-01,
                          7.70381505559019352791e-02};
  return polynomial(z, above) / polynomial(z, below);
}

// The angle in [0, pi] with this cosine.
__device__ inline double arccosine(double x) {
  const double half_pi = 1.57079632679489655800e+00, half_pi_low = 6.12323399573676603587e-17;
  if (fabs(x) <= 0.5) return half_pi - (x - (half_pi_low - x * (x * x * arcsine_tail(x * x))));
  // acos(|x|) = 2 asin(sqrt((1 - |x|) / 2)), with the rounding of the root made good.
  const double z = (1.0 - fabs(x)) * 0.5, root = sqrt(z);
  const double low = root > 0.0 ? __fma_rn(-root, root, z) / (2.0 * root) : 0.0;
  const double angle = 2.0 * (root + (z * arcsine_tail(z) * root + low));
  return x > 0.0 ? angle : 2.0 * half_pi - (angle - 2.0 * half_pi_low);
}

// sin(x): x less n quarters of a turn, then a polynomial for sine or cosine. Where neighbours of x are quarters of a
// turn apart the remainder is cut off, so that the result is at least a sine.
__device__ inline double sine(double x) {
  const double n = rint(x * 6.36619772367581382433e-01);
  double y = __fma_rn(-n, 1.57079632679489655800e+00, x);
  y = __fma_rn(-n, 6.12323399573676603587e-17, y);
  y = y > 0.8 ? 0.8 : y < -0.8 ? -0.8 : y;  // and NaN stays
  const double z = y * y;
  const double of_sine[] = {-1.66666666666666324348e-01, 8.33333333332248946124e-03,  -1.98412698298579493134e-04,
                            2.75573137070700676789e-06,  -2.50507602534068634195e-08, 1.58969099521155010221e-10};
  const double of_cosine[] = {4.16666666666666019037e-02,  -1.38888888888741095749e-03, 2.48015872894767294178e-05,
                              -2.75573143513906633035e-07, 2.08757232129817482790e-09,  -1.13596475577881948265e-11};
  const int quarter = static_cast<int>(n - 4.0 * floor(0.25 * n));
  const double sine_of_y = __fma_rn(y * z, polynomial(z, of_sine), y);
  const double cosine_of_y = 1.0 - __fma_rn(-z * z, polynomial(z, of_cosine), 0.5 * z);
  const double result = quarter & 1 ? cosine_of_y : sine_of_y;
  return quarter & 2 ? -result : result;
}

__device__ inline double clipped(double cosine) { return fmin(fmax(cosine, -1.0), 1.0); }

__device__ inline float2 coefficients_of(double aa, double ab, double bb, double t, int normalize) {
  const float near = __fsub_rn(1.0f, static_cast<float>(t)), far = static_cast<float>(t);
  if (t == 0.0 || t == 1.0) return {near, far};
  // Inputs that are not finite have no angle.
  if (!(fabs(aa) + fabs(ab) + fabs(bb) < INFINITY)) return {NAN, NAN};
  aa = fmax(aa, 0.0), bb = fmax(bb, 0.0);
  const double length_a = sqrt(aa), length_b = sqrt(bb);
  const double square_a = length_a > SHORT ? aa : 1.0, square_b = length_b > SHORT ? bb : 1.0;
  const double cosine = clipped(ab / sqrt(square_a * square_b));
  double weight_a = near, weight_b = far;
  if (fabs(cosine) <= STRAIGHT_ABOVE) {
    const double angle = arccosine(cosine), whole = sine(angle);
    weight_a = sine((1.0 - t) * angle) / whole;
    weight_b = sine(t * angle) / whole;
  }
  if (normalize) {
    if (cosine < -STRAIGHT_ABOVE || length_a <= SHORT || length_b <= SHORT) return {near, far};
    const double square = weight_a * (weight_a + cosine * weight_b) + weight_b * (cosine * weight_a + weight_b);
    const double scale = ((1.0 - t) * length_a + t * length_b) / sqrt(fmax(square, 0.0));
    weight_a = scale * weight_a / length_a;
    weight_b = scale * weight_b / length_b;
  }
  return {static_cast<float>(weight_a), static_cast<float>(weight_b)};
}
