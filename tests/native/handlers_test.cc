// Every XLA FFI handler, called as XLA calls it, with operands, results and attributes that are
// wrong in many ways: it refuses what it cannot take, and touches no other memory. Buffers are as
// large as they are said to be, so that the address sanitizer sees what leaves them.
//
// The argument says how many calls there are, 20,000 by default.
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "check.h"
#include "registry.h"

namespace {

using Type = XLA_FFI_DataType;
constexpr Type F16 = XLA_FFI_DataType_F16, BF16 = XLA_FFI_DataType_BF16;
constexpr Type F32 = XLA_FFI_DataType_F32, F64 = XLA_FFI_DataType_F64;
constexpr Type S32 = XLA_FFI_DataType_S32, S64 = XLA_FFI_DataType_S64;
constexpr Type U32 = XLA_FFI_DataType_U32, C128 = XLA_FFI_DataType_C128;
constexpr Type PRED = XLA_FFI_DataType_PRED;
constexpr Type kTypes[] = {F16, BF16, F32, F64, S32, S64, U32, C128, PRED};

size_t size_of(Type type) {
  switch (type) {
    case PRED:
      return 1;
    case F16:
    case BF16:
      return 2;
    case F32:
    case S32:
    case U32:
      return 4;
    case C128:
      return 16;
    default:
      return 8;
  }
}

struct Tensor {
  Type type;
  std::vector<int64_t> shape;
  std::vector<double> values;  // repeated
  int aliases = -1;            // of a result: the operand in whose memory it is

  size_t count() const {
    size_t n = 1;
    for (int64_t size : shape) n *= static_cast<size_t>(size);
    return n;
  }
  size_t bytes() const { return count() * size_of(type); }
};

// An array of int64, unless it is a scalar or a string.
struct Attribute {
  enum Kind { kNumbers, kInteger, kReal, kBool, kString } kind;
  std::vector<int64_t> numbers;
  double real = 0;
  std::string text;
};

Attribute numbers(std::vector<int64_t> x) { return {Attribute::kNumbers, std::move(x), 0, {}}; }
Attribute integer(int64_t x) { return {Attribute::kInteger, {x}, 0, {}}; }
Attribute real(double x) { return {Attribute::kReal, {0}, x, {}}; }
Attribute boolean(bool x) { return {Attribute::kBool, {x}, 0, {}}; }
Attribute text(const char* x) { return {Attribute::kString, {0}, 0, x}; }

struct Call {
  std::string handler;
  std::vector<Tensor> operands, results;
  std::vector<std::pair<std::string, Attribute>> attributes;  // by name, in order
};

// -- What XLA has --------------------------------------------------------------------------------

struct Failure {
  std::string message;
  XLA_FFI_Error_Code code;
};

XLA_FFI_Error* create_error(XLA_FFI_Error_Create_Args* args) {
  return reinterpret_cast<XLA_FFI_Error*>(new Failure{args->message, args->errc});
}

void destroy_error(XLA_FFI_Error_Destroy_Args* args) {
  delete reinterpret_cast<Failure*>(args->error);
}

XLA_FFI_Error* schedule(XLA_FFI_ThreadPool_Schedule_Args* args) {
  args->task(args->data);
  return nullptr;
}

XLA_FFI_Error* count_threads(XLA_FFI_ThreadPool_NumThreads_Args* args) {
  *args->num_threads = 2;
  return nullptr;
}

XLA_FFI_Api make_api() {
  XLA_FFI_Api api{};
  api.struct_size = XLA_FFI_Api_STRUCT_SIZE;
  api.api_version = {XLA_FFI_Api_Version_STRUCT_SIZE, nullptr, XLA_FFI_API_MAJOR,
                     XLA_FFI_API_MINOR};
  api.XLA_FFI_Error_Create = create_error;
  api.XLA_FFI_Error_Destroy = destroy_error;
  api.XLA_FFI_ThreadPool_Schedule = schedule;
  api.XLA_FFI_ThreadPool_NumThreads = count_threads;
  return api;
}

// -- One call ------------------------------------------------------------------------------------

using Bytes = std::unique_ptr<char[]>;

template <typename T>
void fill_as(const Tensor& tensor, char* to) {
  for (size_t i = 0; i < tensor.bytes() / sizeof(T); ++i) {
    const double value = tensor.values[i % tensor.values.size()];
    const T as_type =
        std::is_integral_v<T> ? static_cast<T>(static_cast<int64_t>(value)) : static_cast<T>(value);
    std::memcpy(to + i * sizeof(T), &as_type, sizeof(T));
  }
}

Bytes fill(const Tensor& tensor) {
  Bytes data(new char[tensor.bytes()]);
  if (tensor.type == F64 || tensor.type == C128) {
    fill_as<double>(tensor, data.get());
  } else if (tensor.type == F32) {
    fill_as<float>(tensor, data.get());
  } else if (tensor.type == S64) {
    fill_as<int64_t>(tensor, data.get());
  } else if (tensor.type == S32 || tensor.type == U32) {
    fill_as<uint32_t>(tensor, data.get());
  } else {
    std::memset(data.get(), 1, tensor.bytes());
  }
  return data;
}

// The code of the error, or OK.
XLA_FFI_Error_Code make(const Call& call, jpk::Handler* handler) {
  static const XLA_FFI_Api api = make_api();
  std::vector<Bytes> data, before;
  std::vector<XLA_FFI_Buffer> buffers;
  for (const Tensor& operand : call.operands) {
    data.push_back(fill(operand));
    before.push_back(fill(operand));
  }
  for (const Tensor& result : call.results) {
    const bool aliases =
        result.aliases >= 0 && static_cast<size_t>(result.aliases) < call.operands.size() &&
        call.operands[static_cast<size_t>(result.aliases)].bytes() == result.bytes();
    data.push_back(aliases ? nullptr : Bytes(new char[result.bytes()]));
    if (!aliases) std::memset(data.back().get(), 0x5a, result.bytes());
  }
  std::vector<char> aliased(call.operands.size());
  const auto add = [&](const Tensor& tensor, char* memory) {
    buffers.push_back({XLA_FFI_Buffer_STRUCT_SIZE, nullptr, tensor.type, memory,
                       static_cast<int64_t>(tensor.shape.size()),
                       const_cast<int64_t*>(tensor.shape.data())});
  };
  for (size_t i = 0; i < call.operands.size(); ++i) add(call.operands[i], data[i].get());
  for (size_t i = 0; i < call.results.size(); ++i) {
    const Bytes& own = data[call.operands.size() + i];
    const size_t operand = static_cast<size_t>(call.results[i].aliases);
    if (!own) aliased[operand] = 1;
    add(call.results[i], own ? own.get() : data[operand].get());
  }
  std::vector<void*> pointers;
  for (XLA_FFI_Buffer& buffer : buffers) pointers.push_back(&buffer);
  std::vector<XLA_FFI_ArgType> arg_types(call.operands.size(), XLA_FFI_ArgType_BUFFER);
  std::vector<XLA_FFI_RetType> ret_types(call.results.size(), XLA_FFI_RetType_BUFFER);

  const size_t count = call.attributes.size();
  std::vector<XLA_FFI_ByteSpan> names(count), texts(count);
  std::vector<XLA_FFI_ByteSpan*> name_pointers(count);
  std::vector<XLA_FFI_Scalar> scalars(count);
  std::vector<XLA_FFI_Array> arrays(count);
  std::vector<XLA_FFI_AttrType> attribute_types(count);
  std::vector<void*> attributes(count);
  for (size_t i = 0; i < count; ++i) {
    const auto& [name, attribute] = call.attributes[i];
    names[i] = {name.data(), name.size()};
    name_pointers[i] = &names[i];
    const int64_t* first = attribute.numbers.data();
    if (attribute.kind == Attribute::kNumbers) {
      arrays[i] = {S64, attribute.numbers.size(), const_cast<int64_t*>(first)};
      attribute_types[i] = XLA_FFI_AttrType_ARRAY, attributes[i] = &arrays[i];
    } else if (attribute.kind == Attribute::kString) {
      texts[i] = {attribute.text.data(), attribute.text.size()};
      attribute_types[i] = XLA_FFI_AttrType_STRING, attributes[i] = &texts[i];
    } else {
      if (attribute.kind == Attribute::kReal) {
        scalars[i] = {F64, const_cast<double*>(&attribute.real)};
      } else {
        scalars[i] = {attribute.kind == Attribute::kBool ? PRED : S64, const_cast<int64_t*>(first)};
      }
      attribute_types[i] = XLA_FFI_AttrType_SCALAR, attributes[i] = &scalars[i];
    }
  }

  XLA_FFI_CallFrame frame{};
  frame.struct_size = XLA_FFI_CallFrame_STRUCT_SIZE;
  frame.api = &api;
  frame.stage = XLA_FFI_ExecutionStage_EXECUTE;
  frame.args = {XLA_FFI_Args_STRUCT_SIZE, nullptr, static_cast<int64_t>(arg_types.size()),
                arg_types.data(), pointers.data()};
  frame.rets = {XLA_FFI_Rets_STRUCT_SIZE, nullptr, static_cast<int64_t>(ret_types.size()),
                ret_types.data(), pointers.data() + arg_types.size()};
  frame.attrs = {XLA_FFI_Attrs_STRUCT_SIZE,   nullptr,
                 static_cast<int64_t>(count), attribute_types.data(),
                 name_pointers.data(),        attributes.data()};
  XLA_FFI_Error* error = handler(&frame);

  XLA_FFI_Error_Code code = XLA_FFI_Error_Code_OK;
  if (error) {
    const std::unique_ptr<Failure> failure(reinterpret_cast<Failure*>(error));
    code = failure->code;
    CHECK(!failure->message.empty(), "%s says nothing", call.handler.c_str());
  }
  for (size_t i = 0; i < call.operands.size(); ++i) {
    if (aliased[i] && !error) continue;
    CHECK(!std::memcmp(data[i].get(), before[i].get(), call.operands[i].bytes()),
          "%s writes operand %zu", call.handler.c_str(), i);
  }
  if (code == XLA_FFI_Error_Code_INVALID_ARGUMENT) {
    for (size_t i = 0; i < call.results.size(); ++i) {
      const Bytes& own = data[call.operands.size() + i];
      for (size_t k = 0; own && k < call.results[i].bytes(); ++k) {
        CHECK(own[k] == 0x5a, "%s writes what it refuses", call.handler.c_str());
      }
    }
  }
  return code;
}

// -- Calls that are right ------------------------------------------------------------------------

using Shape = std::vector<int64_t>;

// A call of a noise op on two leaves, of 5 elements and of two runs of 3, 6 apart, of a larger one.
Call noise(const char* handler, Type leaves, int64_t rows, std::vector<Tensor> shared,
           std::vector<std::pair<std::string, Attribute>> more) {
  Call call{handler, std::move(shared), {}, std::move(more)};
  call.operands.push_back({U32, {2, 2}, {0, 0, 0, 7}});
  for (const Shape& shape : {Shape{5}, Shape{2, 3}}) {
    call.operands.push_back({leaves, shape, {1}});
    call.results.push_back({leaves, shape, {0}});
    if (!rows) continue;
    Shape ring{rows};
    ring.insert(ring.end(), shape.begin(), shape.end());
    call.results.push_back({leaves, ring, {0}, static_cast<int>(call.operands.size())});
    call.operands.push_back({leaves, ring, {1}});
  }
  const auto add = [&](const char* name, std::vector<int64_t> x) {
    call.attributes.emplace_back(name, numbers(std::move(x)));
  };
  add("leaf_index", {0, 1}), add("first_tile", {0, 1});
  add("run", {5, 3}), add("axis_count", {0, 1}), add("axes", {2, 6});
  if (leaves != S32 && leaves != S64) {
    const int64_t bits = leaves == F64 ? 64 : 32;
    add("noise_bits", {bits, bits}), add("ring_bits", {bits, bits});
    call.attributes.emplace_back("accurate", boolean(false));
  }
  return call;
}

std::vector<Call> right_calls() {
  std::vector<Call> calls;
  for (const Type type : {F32, F64}) {
    for (const int64_t slots : {0, 1, 3}) {
      for (const int64_t words : {2, 8}) {
        const int64_t samples = slots ? slots : 1;
        const Tensor t{S32, {}, {1}}, scale{type, {}, {1}}, coef{type, {1, slots + 1}, {1, 0.5}};
        calls.push_back(noise("jpk_correlated_noise", type, slots,
                              {t, {U32, {samples, words}, {7}}, coef, scale},
                              {{"slots", integer(slots)}, {"filter", text("recurrence")}}));
        calls.push_back(
            noise("jpk_correlated_noise", type, slots,
                  {t, {U32, {samples, words}, {7}}, {type, {samples, slots + 1}, {1}}, scale},
                  {{"slots", integer(slots)}, {"filter", text("recurrence")}}));
        calls.push_back(noise("jpk_correlated_noise", type, slots,
                              {t, {U32, {samples + 2, words}, {7}}, {type, {1, 3}, {1}}, scale},
                              {{"slots", integer(slots)}, {"filter", text("moving_average")}}));
        for (const char* filter : {"buffers", "inverse_buffers"}) {
          calls.push_back(noise("jpk_correlated_noise", type, slots + 2,
                                {t, {U32, {samples, words}, {7}}, {type, {2, 2}, {0.5}}, scale},
                                {{"slots", integer(slots)}, {"filter", text(filter)}}));
        }
      }
    }
    for (const int64_t words : {2, 8}) {
      calls.push_back(
          noise("jpk_dense_noise", type, 0, {{U32, {words}, {7}}, {type, {3}, {1, 0.5}}}, {}));
    }
  }
  for (const Type type : {S32, S64}) {
    for (const int64_t slots : {0, 1, 3}) {
      const int64_t samples = slots ? slots : 1;
      const Tensor t{S32, {}, {1}};
      for (const bool in_doubles : {false, true}) {
        const Attribute spacing = numbers({1, 0, 0, 0, 0});
        calls.push_back(noise("jpk_grid_noise", type, slots,
                              {t, {U32, {samples, 8}, {7}}, {S32, {1, slots + 1}, {4, 1}}},
                              {{"slots", integer(slots)},
                               {"scale", real(8)},
                               {"spacing", spacing},
                               {"in_doubles", boolean(in_doubles)}}));
      }
      const Tensor weights{U32, {3, 2}, {0, 0x3ff00000}};  // 1.0
      calls.push_back(noise("jpk_grid_sums", type, slots,
                            {t, {U32, {samples + 2, 8}, {7}}, weights},
                            {{"slots", integer(slots)}, {"stddev", real(8)}}));
    }
  }
  for (const Type type : {F32, F64}) {
    const Tensor coef{type, {2, 3}, {1, 0.5}}, x{type, {2, 5, 2}, {1}};
    for (const char* handler : {"jpk_toeplitz_multiply", "jpk_toeplitz_solve"}) {
      for (const bool transpose : {false, true}) {
        calls.push_back({handler, {coef, x}, {x}, {{"transpose", boolean(transpose)}}});
      }
    }
    for (const bool differentiate : {false, true}) {
      std::vector<Tensor> results{{type, {2}, {0}}};
      if (differentiate) results.push_back({type, {2, 3}, {0}});
      calls.push_back(
          {"jpk_min_sep_norm",
           {coef},
           results,
           {{"max_participations", integer(2)}, {"min_sep", integer(2)}, {"n", integer(7)}}});
      calls.push_back({"jpk_participation_max",
                       {coef},
                       results,
                       {{"max_participations", integer(2)}, {"min_sep", integer(2)}}});
    }
    const Tensor rows{type, {2, 4, 3}, {1, 0.5, 0.25}}, of_rows{type, {2, 4}, {1}};
    const Tensor momentum{type, {2}, {0.5}};
    calls.push_back({"jpk_banded_error", {rows, of_rows, of_rows, momentum}, {of_rows}, {}});
    calls.push_back({"jpk_banded_error_gradients",
                     {rows, of_rows, of_rows, momentum, of_rows},
                     {rows, of_rows, of_rows, momentum},
                     {}});
  }
  calls.push_back({"jpk_toeplitz_spectra",
                   {{C128, {2, 3, 5}, {1}}, {C128, {2, 4, 5}, {1}}},
                   {{C128, {2, 4, 5}, {0}}},
                   {}});
  calls.push_back({"jpk_toeplitz_finish",
                   {{F64, {2, 3}, {1}}, {F64, {2, 20}, {1}}, {F64, {2, 2, 20}, {1}}},
                   {{F64, {2, 20}, {0}}},
                   {{"block", integer(8)}}});
  const Tensor key{U32, {2}, {7}}, span{S64, {2}, {0, 5}}, sigmas{F64, {2}, {1, 2}};
  const Tensor epsilons{F64, {3}, {0.5, 1, 2}}, found{F64, {2, 2, 3}, {0}};
  const Tensor gram{F64, {2, 2}, {1, 0, 0, 1}};
  calls.push_back({"jpk_privacy_loss_bins",
                   {key, span, gram, gram, sigmas, sigmas, epsilons},
                   {found, found, found},
                   {}});
  for (const int64_t scheme : {0, 1}) {
    calls.push_back({"jpk_privacy_loss_steps",
                     {key, span, {F64, {2}, {1, 0.5}}, sigmas, sigmas, epsilons},
                     {found, found, found},
                     {{"n", integer(6)},
                      {"p", real(0.5)},
                      {"period", integer(3)},
                      {"scheme", integer(scheme)}}});
  }
  for (Call& call : calls) {
    std::sort(call.attributes.begin(), call.attributes.end(),
              [](const auto& a, const auto& b) { return a.first < b.first; });
  }
  return calls;
}

// -- And wrong -----------------------------------------------------------------------------------

class Wrong {
 public:
  explicit Wrong(uint64_t seed) : random_(seed) {}

  template <typename T>
  T& one_of(std::vector<T>& from) {
    return from[below(from.size())];
  }

  void change(Call& call) {
    const uint64_t what = below(10);
    std::vector<Tensor>& tensors =
        below(3) && !call.operands.empty() ? call.operands : call.results;
    if (what < 7 && !tensors.empty()) return change(tensors, what);
    if (!call.attributes.empty()) change_attribute(call);
  }

  uint64_t below(size_t n) { return random_() % n; }

 private:
  int64_t odd() {
    constexpr int64_t kOdd[] = {std::numeric_limits<int64_t>::min(), -1, 0, 1, 2, 3, 7, 8,
                                std::numeric_limits<int64_t>::max()};
    return kOdd[below(std::size(kOdd))];
  }

  double odd_real() {
    constexpr double kOdd[] = {-1,
                               0,
                               1,
                               0.5,
                               1e-310,
                               1e300,
                               std::numeric_limits<double>::infinity(),
                               std::numeric_limits<double>::quiet_NaN()};
    return kOdd[below(std::size(kOdd))];
  }

  void change(std::vector<Tensor>& tensors, uint64_t what) {
    constexpr int64_t kSizes[] = {0, 1, 2, 3, 5, 9};
    Tensor& tensor = one_of(tensors);
    const int64_t size = kSizes[below(std::size(kSizes))];
    const size_t at = below(tensor.shape.size() + 1);
    if (what == 0) {
      tensor.type = kTypes[below(std::size(kTypes))];
    } else if (what == 1 && at < tensor.shape.size()) {
      tensor.shape.erase(tensor.shape.begin() + static_cast<ptrdiff_t>(at));
    } else if (what == 2) {
      tensor.shape.insert(tensor.shape.begin() + static_cast<ptrdiff_t>(at), size);
    } else if (what == 3 && at < tensor.shape.size()) {
      tensor.shape[at] = size;
    } else if (what == 4) {
      const bool whole = tensor.type == S32 || tensor.type == S64 || tensor.type == U32;
      const double extreme = tensor.type == S64 ? 0x1p62 : 2147483647;
      constexpr double kOdd[] = {-1, 0, 1, 2};
      tensor.values = {whole ? below(4) ? kOdd[below(4)] : extreme : odd_real()};
    } else if (what == 5 && below(4) == 0) {
      tensors.erase(tensors.begin() + static_cast<ptrdiff_t>(below(tensors.size())));
    } else if (what == 6) {
      Tensor another = tensor;
      if (below(2)) {
        tensor.aliases = -1;
      } else {
        tensors.push_back(std::move(another));
      }
    }
  }

  void change_attribute(Call& call) {
    const size_t at = below(call.attributes.size());
    Attribute& attribute = call.attributes[at].second;
    std::vector<int64_t>& list = attribute.numbers;
    switch (below(6)) {
      case 0:
        call.attributes.erase(call.attributes.begin() + static_cast<ptrdiff_t>(at));
        break;
      case 1:
        attribute = below(2) ? real(odd_real()) : below(2) ? integer(odd()) : numbers({odd()});
        break;
      default:
        if (attribute.kind == Attribute::kReal) {
          attribute.real = odd_real();
        } else if (attribute.kind == Attribute::kString) {
          constexpr const char* kFilters[] = {"",        "recurrence",      "moving_average",
                                              "buffers", "inverse_buffers", "another"};
          attribute.text = kFilters[below(std::size(kFilters))];
        } else if (attribute.kind == Attribute::kBool) {
          list[0] = static_cast<int64_t>(below(2));
        } else if (attribute.kind == Attribute::kInteger) {
          list[0] = odd();
        } else if (below(3) && !list.empty()) {
          one_of(list) = odd();
        } else if (below(2) && !list.empty()) {
          list.pop_back();
        } else {
          list.push_back(odd());
        }
    }
  }

  std::mt19937_64 random_;
};

}  // namespace

int main(int argc, char** argv) {
  const long count = argc > 1 ? std::atol(argv[1]) : 20000;
  std::vector<Call> calls = right_calls();
  for (const auto& [name, handler] : jpk::handlers()) {
    std::vector<Call> here;
    for (const Call& call : calls) {
      if (call.handler == name) here.push_back(call);
    }
    CHECK(!here.empty(), "%s is never called", name);
    if (here.empty()) continue;
    for (const Call& call : here) {
      CHECK(make(call, handler) == XLA_FFI_Error_Code_OK, "%s refuses what is right", name);
    }
    Wrong wrong(1);
    long refused = 0;
    const long each = count / static_cast<long>(jpk::handlers().size());
    for (long i = 0; i < each; ++i) {
      Call call = wrong.one_of(here);
      for (uint64_t changes = 1 + wrong.below(3); changes > 0; --changes) wrong.change(call);
      refused += make(call, handler) != XLA_FFI_Error_Code_OK;
    }
    std::printf("%s: %ld of %ld refused\n", name, refused, each);
    CHECK(each < 100 || (refused > each / 4 && refused < each), "%s refuses %ld", name, refused);
  }
  return report();
}
