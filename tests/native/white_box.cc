// A Python module that opens the kernels up to white_box_test.py. Built once per instruction set,
// under the name JPK_WHITE_BOX_NAME; element-wise functions take and return NumPy arrays.
#include <pybind11/complex.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <complex>
#include <tuple>
#include <vector>

#include "correlated_noise.h"
#include "min_sep_norm.h"
#include "participation_max.h"
#include "privacy_loss_sums.h"
#include "toeplitz.h"
#include "toeplitz_fft.h"

namespace py = pybind11;

namespace jpk {
namespace {

template <typename T>
T uniform(uint64_t words) {
  return Gaussian<T>::uniform(static_cast<uint32_t>(words >> 32), static_cast<uint32_t>(words));
}

// As normal_block picks the branch.
template <typename T>
T erf_inv(T u, bool accurate) {
  const T w = Gaussian<T>::minus_log(u);
  return w >= Gaussian<T>::kCentral ? Gaussian<T>::any(u, accurate) : Gaussian<T>::central(u, w);
}

template <typename T>
uint16_t narrowed(double x) {
  T to;
  narrow(x, to);
  return to.bits;
}

JPK_TARGET_CLONES void normal_block_f32(Key key, const uint32_t* hi, const uint32_t* lo,
                                        bool accurate, float* z) {
  normal_block<float>(key, hi, lo, accurate, z);
}

JPK_TARGET_CLONES void normal_block_f64(Key key, const uint32_t* hi, const uint32_t* lo,
                                        bool accurate, double* z) {
  normal_block<double>(key, hi, lo, accurate, z);
}

template <typename T>
auto normal(void (*block)(Key, const uint32_t*, const uint32_t*, bool, T*)) {
  return [block](uint32_t k0, uint32_t k1, uint64_t first, bool accurate) {
    uint32_t hi[kBlock], lo[kBlock];
    for (uint64_t i = 0; i < kBlock; ++i) {
      hi[i] = static_cast<uint32_t>((first + i) >> 32), lo[i] = static_cast<uint32_t>(first + i);
    }
    py::array_t<T> z(kBlock);
    block({k0, k1}, hi, lo, accurate, z.mutable_data());
    return z;
  };
}

struct DeafPool {
  template <typename Task>
  void Schedule(Task&&) {}
};

// One step on leaves (grad, out, ring, {grad type, noise type, ring type}); out and ring are
// written. Types are positions in FloatType, arrays of 16-bit floats are viewed as uint16.
void step(
    int64_t t, const std::vector<std::tuple<uint32_t, uint32_t>>& step_keys,
    const std::vector<double>& coef, double output_scale, bool accurate,
    const std::vector<std::tuple<py::array, py::array, py::array, std::vector<int>>>& leaves) {
  std::vector<Key> keys;
  for (auto [k0, k1] : step_keys) keys.push_back({k0, k1});
  std::vector<Leaf> list;
  int64_t first_tile = 0;
  for (auto [grad, out, ring, types] : leaves) {
    list.push_back({grad.data(), out.mutable_data(), ring.mutable_data(), grad.size(), first_tile,
                    static_cast<uint32_t>(list.size()), FloatType(types.at(0)),
                    FloatType(types.at(1)), FloatType(types.at(2))});
    first_tile += list.back().parts();
  }
  DeafPool pool;
  Step step = make_step(Filter::kRecurrence, t, static_cast<int64_t>(coef.size()) - 1, keys.data(),
                        output_scale, accurate);
  set_recurrence(step, coef.data(), 1);
  correlated_noise(pool, 1, step, list);
}

using Vector = py::array_t<double, py::array::c_style>;

Reals reals(const Vector& x) { return {const_cast<double*>(x.data()), true}; }

// T x, or the solution of T y = x, of float64 vectors.
Vector toeplitz_product(const Vector& coef, const Vector& x, bool solve) {
  Vector y(x.size());
  const toeplitz::Batch batch{1, coef.size(), x.size(), 1, x.size(), false};
  DeafPool pool;
  if (solve) {
    toeplitz::solve(pool, 2, batch, reals(coef), reals(x), reals(y));
  } else {
    toeplitz::multiply(pool, 2, batch, reals(coef), reals(x), reals(y));
  }
  return y;
}

auto complex_product(const py::array_t<std::complex<double>>& a,
                     const py::array_t<std::complex<double>>& b) {
  py::array_t<std::complex<double>> c(a.size());
  auto* to = reinterpret_cast<double*>(c.mutable_data());
  std::fill(to, to + 2 * a.size(), 0.0);
  toeplitz::add_complex_products(reinterpret_cast<const double*>(a.data()),
                                 reinterpret_cast<const double*>(b.data()), a.size(), to);
  return c;
}

// A function of a row and the pointer that its gradient goes to: value and gradient.
template <typename Function>
auto with_gradient(const Vector& row, const Function& function) {
  Vector gradient(row.size());
  const double value = function(row.data(), gradient.mutable_data());
  return std::make_tuple(value, gradient);
}

// Sums [sign, sigma, epsilon] of samples 0 .. count - 1. make(targets) gives the blocks.
template <typename Make>
Vector privacy_loss(const Vector& sigmas, const Vector& margins, const Vector& epsilons,
                    int64_t count, const Make& make) {
  const double* least = std::min_element(epsilons.data(), epsilons.data() + epsilons.size());
  const privacy_loss::Targets targets{sigmas.data(),   margins.data(),  sigmas.size(),
                                      epsilons.data(), epsilons.size(), *least};
  Vector sums(2 * sigmas.size() * epsilons.size()), counts(sums.size()), maxima(sums.size());
  DeafPool pool;
  privacy_loss::sum_up(
      pool, 2, 0, count, targets, [&] { return make(targets); }, sums.mutable_data(),
      counts.mutable_data(), maxima.mutable_data());
  return sums;
}

PYBIND11_MODULE(JPK_WHITE_BOX_NAME, m) {
  m.def("toeplitz", toeplitz_product);
  m.def("complex_product", complex_product);
  m.def("min_sep_norm", [](const Vector& coef, int64_t n, int64_t sep, int64_t k) {
    return with_gradient(coef, [&](const double* c, double* gradient) {
      return min_sep_norm(c, coef.size(), n, sep, k, gradient);
    });
  });
  m.def("participation_max", [](const Vector& x, int64_t sep, int64_t k) {
    return with_gradient(x, [&](const double* row, double* gradient) {
      return participation_max(row, x.size(), sep, k, gradient);
    });
  });
  m.def("privacy_loss_bins", [](const Vector& gram, const Vector& factor, const Vector& sigmas,
                                const Vector& margins, const Vector& epsilons, int64_t count) {
    const privacy_loss::Bins bins(gram.shape(0), gram.data(), factor.data());
    return privacy_loss(sigmas, margins, epsilons, count, [&](const privacy_loss::Targets&) {
      return privacy_loss::BinsBlocks(bins, {1, 2});
    });
  });
  m.def("privacy_loss_steps",
        [](int scheme, int64_t n, int64_t period, double p, const Vector& c, const Vector& sigmas,
           const Vector& margins, const Vector& epsilons, int64_t count) {
          const privacy_loss::Steps steps{
              static_cast<privacy_loss::Steps::Scheme>(scheme), n, period, p, c.size(), c.data()};
          return privacy_loss(sigmas, margins, epsilons, count,
                              [&](const privacy_loss::Targets& targets) {
                                return privacy_loss::StepsBlocks(steps, {1, 2}, targets);
                              });
        });
  m.def("exp", py::vectorize(exp_lane));
  m.def("log", py::vectorize(log_lane));
  m.def("threefry", py::vectorize([](uint32_t k0, uint32_t k1, uint32_t x0, uint32_t x1) {
          threefry2x32({k0, k1}, x0, x1);
          return static_cast<uint64_t>(x0) << 32 | x1;
        }));
  m.def("split", py::vectorize([](uint32_t k0, uint32_t k1, uint32_t i) {
          const Key key = split({k0, k1}, i);
          return static_cast<uint64_t>(key.k0) << 32 | key.k1;
        }));
  // Words of the blocks first, first + 1, .. in a domain, [kWords, kLanes].
  m.def("chacha20", [](const std::vector<uint32_t>& key, uint32_t domain, uint64_t first) {
    chacha20::Key words;
    std::copy_n(key.begin(), 8, words.words);
    chacha20::Input in;
    in.set_key(words), in.set_domain(static_cast<chacha20::Domain>(domain)), in.set_blocks(first);
    py::array_t<uint32_t> out({chacha20::kWords, chacha20::kLanes});
    chacha20::all_blocks(in, reinterpret_cast<uint32_t (*)[chacha20::kLanes]>(out.mutable_data()));
    return out;
  });
  m.def("uniform_f32", py::vectorize(uniform<float>));
  m.def("uniform_f64", py::vectorize(uniform<double>));
  m.def("erf_inv_f32", py::vectorize(erf_inv<float>));
  m.def("erf_inv_f64", py::vectorize(erf_inv<double>));
  m.def("normal_f32", normal<float>(normal_block_f32));
  m.def("normal_f64", normal<double>(normal_block_f64));
  m.attr("BLOCK") = kBlock;
  m.def("widen_f16", py::vectorize([](uint16_t bits) { return widen(Float16{bits}); }));
  m.def("widen_bf16", py::vectorize([](uint16_t bits) { return widen(BFloat16{bits}); }));
  m.def("narrow_f16", py::vectorize(narrowed<Float16>));
  m.def("narrow_bf16", py::vectorize(narrowed<BFloat16>));
  m.def("step", step);
}

}  // namespace
}  // namespace jpk
