// XLA bindings of privacy_loss_sums.h.
#include <algorithm>
#include <cmath>
#include <string>

#include "ffi_reals.h"
#include "privacy_loss_sums.h"
#include "registry.h"

namespace jpk {
namespace {

namespace ffi = xla::ffi;
using Numbers = ffi::Buffer<ffi::DataType::F64>;

constexpr const char* kOp = "privacy_loss_sums";

// With these, no product of sizes overflows, and what is asked for is refused before it is.
constexpr int64_t kMostSteps = int64_t{1} << 48;
constexpr int64_t kMostTargets = int64_t{1} << 30;
constexpr double kMostBytes = 0x1p42;

bool all_finite(const Numbers& x) {
  return std::all_of(x.typed_data(), x.typed_data() + x.element_count(),
                     [](double v) { return std::isfinite(v); });
}

int64_t size(const Numbers& x) { return static_cast<int64_t>(x.element_count()); }

// What all schemes have: the key, the first sample and their number, what is asked for, and results
// [2, sigmas, epsilons].
struct Call {
  ffi::Buffer<ffi::DataType::U32> key;
  ffi::Buffer<ffi::DataType::S64> span;
  Numbers sigmas, margins, epsilons;
  ffi::Result<Numbers> sums, counts, maxima;

  std::string check() {
    if (key.element_count() != 2 || span.element_count() != 2) {
      return "needs a key of two words, and the first sample and the number of samples";
    }
    const int64_t first = span.typed_data()[0], count = span.typed_data()[1];
    if (first < 0 || count < 1 || count > kMost || first > kMost) {
      return "needs a first sample >= 0 and a number of samples >= 1";
    }
    if (size(sigmas) < 1 || size(epsilons) < 1 || size(margins) != size(sigmas)) {
      return "needs sigmas [s], as many margins, and epsilons [e]";
    }
    if (size(sigmas) > kMostTargets || size(epsilons) > kMostTargets) {
      return "needs at most 2^30 sigmas and epsilons";
    }
    for (auto result : {sums, counts, maxima}) {
      if (size(*result) != 2 * size(sigmas) * size(epsilons)) return "needs results [2, s, e]";
    }
    const double* sigma = sigmas.typed_data();
    const bool usable =
        std::all_of(sigma, sigma + size(sigmas), [](double v) { return v >= 1e-6 && v <= 1e6; });
    if (!usable) return "needs 1e-6 <= sigma <= 1e6";
    if (!all_finite(margins) || !all_finite(epsilons)) return "needs finite margins and epsilons";
    return "";
  }

  // make(key, targets) gives the blocks of one strand, of so many bytes.
  template <typename Make>
  std::string run(ffi::ThreadPool& pool, double bytes, const Make& make) {
    const double cells = 2.0 * static_cast<double>(size(sigmas)) *
                         static_cast<double>(size(epsilons)) * sizeof(privacy_loss::Cell);
    const double threads = static_cast<double>(pool.num_threads() + 1);
    const double all = threads * bytes + static_cast<double>(privacy_loss::kStrands) * cells;
    if (!(all <= kMostBytes)) return "needs at most 2^42 bytes of memory";
    const double* least =
        std::min_element(epsilons.typed_data(), epsilons.typed_data() + size(epsilons));
    const privacy_loss::Targets targets{sigmas.typed_data(),   margins.typed_data(), size(sigmas),
                                        epsilons.typed_data(), size(epsilons),       *least};
    const Key words{key.typed_data()[0], key.typed_data()[1]};
    privacy_loss::sum_up(
        pool, pool.num_threads(), static_cast<uint64_t>(span.typed_data()[0]), span.typed_data()[1],
        targets, [&] { return make(words, targets); }, sums->typed_data(), counts->typed_data(),
        maxima->typed_data());
    return "";
  }
};

ffi::Error run_bins(ffi::ThreadPool pool, ffi::Buffer<ffi::DataType::U32> key,
                    ffi::Buffer<ffi::DataType::S64> span, Numbers gram, Numbers factor,
                    Numbers sigmas, Numbers margins, Numbers epsilons, ffi::Result<Numbers> sums,
                    ffi::Result<Numbers> counts, ffi::Result<Numbers> maxima) {
  return guarded(kOp, [&]() -> std::string {
    Call call{key, span, sigmas, margins, epsilons, sums, counts, maxima};
    const std::string wrong = call.check();
    if (!wrong.empty()) return wrong;
    const auto square = [](const Numbers& x) {
      return x.dimensions().size() == 2 && x.dimensions()[0] == x.dimensions()[1];
    };
    const int64_t modes = square(gram) ? gram.dimensions()[0] : 0;
    if (modes < 1 || !square(factor) || size(factor) != size(gram)) {
      return "needs a Gram matrix [m, m], m >= 1, and its factor";
    }
    if (!all_finite(gram) || !all_finite(factor)) return "needs a finite Gram matrix and factor";
    const privacy_loss::Bins bins(modes, gram.typed_data(), factor.typed_data());
    return call.run(pool, privacy_loss::BinsBlocks::bytes(modes),
                    [&](Key words, const privacy_loss::Targets&) {
                      return privacy_loss::BinsBlocks(bins, words);
                    });
  });
}

ffi::Error run_steps(ffi::ThreadPool pool, ffi::Buffer<ffi::DataType::U32> key,
                     ffi::Buffer<ffi::DataType::S64> span, Numbers c, Numbers sigmas,
                     Numbers margins, Numbers epsilons, ffi::Result<Numbers> sums,
                     ffi::Result<Numbers> counts, ffi::Result<Numbers> maxima, int64_t scheme,
                     int64_t n, int64_t period, double p) {
  return guarded(kOp, [&]() -> std::string {
    Call call{key, span, sigmas, margins, epsilons, sums, counts, maxima};
    const std::string wrong = call.check();
    if (!wrong.empty()) return wrong;
    if (n < 1 || n > kMostSteps || period < 1 || period > kMostSteps || !(p >= 0 && p <= 1)) {
      return "needs n and period from 1 to 2^48 and 0 <= p <= 1";
    }
    if (scheme < privacy_loss::Steps::kMinSep || scheme > privacy_loss::Steps::kCyclic) {
      return "needs a scheme that it knows";
    }
    if (size(c) < 1 || size(c) > std::min(n, period)) {
      return "needs c of 1 to min(n, period) coefficients";
    }
    if (!all_finite(c)) return "needs finite c";
    const privacy_loss::Steps steps{
        static_cast<privacy_loss::Steps::Scheme>(scheme), n, period, p, size(c), c.typed_data()};
    return call.run(pool, privacy_loss::StepsBlocks::bytes(steps, size(sigmas)),
                    [&](Key words, const privacy_loss::Targets& targets) {
                      return privacy_loss::StepsBlocks(steps, words, targets);
                    });
  });
}

}  // namespace
}  // namespace jpk

JPK_HANDLER(jpk_privacy_loss_bins, jpk::run_bins,
            xla::ffi::Ffi::Bind()
                .Ctx<xla::ffi::ThreadPool>()
                .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()  // key
                .Arg<xla::ffi::Buffer<xla::ffi::DataType::S64>>()  // span
                .Arg<jpk::Numbers>()                               // gram
                .Arg<jpk::Numbers>()                               // factor
                .Arg<jpk::Numbers>()                               // sigmas
                .Arg<jpk::Numbers>()                               // margins
                .Arg<jpk::Numbers>()                               // epsilons
                .Ret<jpk::Numbers>()                               // sums
                .Ret<jpk::Numbers>()                               // counts
                .Ret<jpk::Numbers>());                             // maxima
JPK_HANDLER(jpk_privacy_loss_steps, jpk::run_steps,
            xla::ffi::Ffi::Bind()
                .Ctx<xla::ffi::ThreadPool>()
                .Arg<xla::ffi::Buffer<xla::ffi::DataType::U32>>()  // key
                .Arg<xla::ffi::Buffer<xla::ffi::DataType::S64>>()  // span
                .Arg<jpk::Numbers>()                               // c
                .Arg<jpk::Numbers>()                               // sigmas
                .Arg<jpk::Numbers>()                               // margins
                .Arg<jpk::Numbers>()                               // epsilons
                .Ret<jpk::Numbers>()                               // sums
                .Ret<jpk::Numbers>()                               // counts
                .Ret<jpk::Numbers>()                               // maxima
                .Attr<int64_t>("scheme")
                .Attr<int64_t>("n")
                .Attr<int64_t>("period")
                .Attr<double>("p"));
