// fused_rnn._C: what is not a tensor op. It tells how the package was built and what this
// processor offers, plans CUDA launches (plan.h), and calls the one kernel that is too short for
// the dispatcher; the ops are in libfused_rnn_cpu.so, which knows nothing of Python.

// DLPack's own header, a C standard with a version of its own, refuses to be read beside torch's
// stable ABI only because torch keeps it in a folder that is not stable.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/headeronly/version.h>

#include <initializer_list>
#include <map>
#include <string>
#include <vector>

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "plan_binding.h"

namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "clang " __clang_version__;
#else
constexpr const char* kCompiler = "g++ " __VERSION__;
#endif

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const fused_rnn::Isa& isa : fused_rnn::kIsas) names.emplace_back(isa.name);
  return names;
}

std::map<std::string, bool> cpu_features() {
#if defined(__x86_64__)
#define FUSED_RNN_FEATURE(name)              \
  {                                          \
    name, bool(__builtin_cpu_supports(name)) \
  }
  return {FUSED_RNN_FEATURE("avx2"),     FUSED_RNN_FEATURE("fma"),
          FUSED_RNN_FEATURE("avx512f"),  FUSED_RNN_FEATURE("avx512bw"),
          FUSED_RNN_FEATURE("avx512dq"), FUSED_RNN_FEATURE("avx512vl")};
#else
  return {};
#endif
}

pybind11::dict build_info() {
  pybind11::dict info;
  info["compiler"] = kCompiler;
  info["flags"] = FUSED_RNN_FLAGS;
  info["instruction_sets"] = instruction_sets();
  info["torch"] = TORCH_VERSION;
  return info;
}

// What small_step() needs from torch, and the kernel's address. torch offers DLPack's exchange
// table so that compiled code can look into a tensor without torch's own headers, in a fifth of a
// microsecond: an op call takes ten to twenty, more than the step.
struct Connection {
  const DLPackExchangeAPI* torch = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyObject* is_neg = nullptr;
  decltype(&fused_rnn_cell) kernel = nullptr;
} connection;

void connect(pybind11::type tensor, pybind11::type parameter, uintptr_t kernel) {
  const pybind11::capsule table = tensor.attr("__dlpack_c_exchange_api__");
  const auto* torch = table.get_pointer<const DLPackExchangeAPI>();
  if (torch->header.version.major != DLPACK_MAJOR_VERSION)
    throw pybind11::import_error("torch's DLPack exchange table is of another major version");
  connection = {torch, reinterpret_cast<PyTypeObject*>(tensor.ptr()),
                reinterpret_cast<PyTypeObject*>(parameter.ptr()),
                pybind11::object(tensor.attr("is_neg")).release().ptr(),
                reinterpret_cast<decltype(&fused_rnn_cell)>(kernel)};
}

// The memory of a tensor, if it is a plain contiguous CPU tensor of the wanted dtype and shape. A
// view may carry its sign as a bit beside the memory; DLPack does not tell.
class Plain {
  DLDataType type_;

 public:
  explicit Plain(DLDataType type) : type_(type) {}

  static bool is_negated(PyObject* tensor) {
    PyObject* const said = PyObject_Vectorcall(connection.is_neg, &tensor, 1, nullptr);
    Py_XDECREF(said);  // of True and False there is one each
    return said != Py_False;
  }

  static bool view(pybind11::handle object, DLTensor* out) {
    const PyTypeObject* type = Py_TYPE(object.ptr());
    if (type != connection.tensor && type != connection.parameter) return false;
    if (!is_negated(object.ptr()) &&
        connection.torch->dltensor_from_py_object_no_sync(object.ptr(), out) == 0)
      return true;
    PyErr_Clear();  // torch has no plain memory for it; the caller has another way
    return false;
  }

  // None is null where it may be.
  bool get(pybind11::handle object, bool optional, std::initializer_list<int64_t> shape,
           void** data) const {
    if (optional && object.is_none()) return *data = nullptr, true;
    DLTensor t;
    return view(object, &t) && get(t, shape, data);
  }

  bool get(const DLTensor& t, std::initializer_list<int64_t> shape, void** data) const {
    if (t.device.device_type != kDLCPU || t.dtype.code != type_.code ||
        t.dtype.bits != type_.bits || t.dtype.lanes != 1 || t.ndim != int(shape.size()))
      return false;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      if (t.shape[i] != shape.begin()[i]) return false;
      if (t.strides && t.shape[i] != 1 && t.strides[i] != stride) return false;
      stride *= t.shape[i];
    }
    *data = static_cast<char*>(t.data) + t.byte_offset;
    return true;
  }
};

int scalar_of(DLDataType type) {
  if (type.code == kDLBfloat && type.bits == 16) return fused_rnn::kBFloat16;
  if (type.code != kDLFloat) return -1;
  return type.bits == 32   ? fused_rnn::kFloat
         : type.bits == 64 ? fused_rnn::kDouble
         : type.bits == 16 ? fused_rnn::kHalf
                           : -1;
}

// One step of a cell into h1 and c1; false, with nothing done, where an operand is not plain
// memory of the right kind and size, or where there are more rows and more multiplications.
bool small_step(int cell, pybind11::handle x, pybind11::handle h, pybind11::handle c,
                pybind11::handle w_ih, pybind11::handle w_hh, pybind11::handle b_ih,
                pybind11::handle b_hh, pybind11::handle h1, pybind11::handle c1, int64_t rows,
                int64_t products) {
  DLTensor input, state;
  if (!connection.kernel || !Plain::view(x, &input) || !Plain::view(h, &state)) return false;
  if (input.ndim != 2 || state.ndim != 2 || cell < 0 || cell >= fused_rnn::kCellCount) return false;
  const int scalar = scalar_of(input.dtype);
  const int64_t N = input.shape[0], I = input.shape[1], H = state.shape[1];
  const int64_t gates = fused_rnn::kCellShapes[cell].gates * H;
  const bool no_c = fused_rnn::kCellShapes[cell].states == 1;
  if (N > rows && N * gates * (I + H) > products) return false;
  const Plain plain(input.dtype);
  void *px, *ph, *pc, *pw_ih, *pw_hh, *pb_ih, *pb_hh, *ph1, *pc1;
  if (scalar < 0 || !plain.get(input, {N, I}, &px) || !plain.get(state, {N, H}, &ph) ||
      !plain.get(c, no_c, {N, H}, &pc) || !plain.get(w_ih, false, {gates, I}, &pw_ih) ||
      !plain.get(w_hh, false, {gates, H}, &pw_hh) || !plain.get(b_ih, true, {gates}, &pb_ih) ||
      !plain.get(b_hh, true, {gates}, &pb_hh) || !plain.get(h1, false, {N, H}, &ph1) ||
      !plain.get(c1, no_c, {N, H}, &pc1))
    return false;
  connection.kernel(cell, scalar, N, I, H, px, ph, pc, pw_ih, pw_hh, pb_ih, pb_hh, ph1, pc1);
  return true;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "How fused_rnn was built, and what this processor offers.";
  m.def("build_info", &build_info,
        "Compiler, flags, the instruction sets compiled in (best first), and the torch built "
        "against.");
  m.def("cpu_features", &cpu_features,
        "The features that the choice of an instruction set depends on; empty where there is "
        "nothing to choose.");
  m.def("connect", &connect, "Tell small_step() torch's tensor types and the kernel's address.");
  m.def("small_step", &small_step,
        "One step of a cell into h1 and c1, or False with nothing done where an operand is not "
        "plain contiguous CPU memory of the right dtype and shape, or the step is not small.");
  m.def(
      "instruction_set", [] { return fused_rnn::best_isa().name; },
      "The instruction set whose kernels run in this process.");
  fused_rnn::bind_plan(m);
}
