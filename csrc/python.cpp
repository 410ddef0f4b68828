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

#include <algorithm>
#include <initializer_list>
#include <map>
#include <string>
#include <utility>
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
  PyObject *is_neg = nullptr, *empty_like = nullptr;
  decltype(&fused_rnn_cell) kernel = nullptr;
} connection;

void connect(pybind11::type tensor, pybind11::type parameter, pybind11::object empty_like,
             uintptr_t kernel) {
  const pybind11::capsule table = tensor.attr("__dlpack_c_exchange_api__");
  const auto* torch = table.get_pointer<const DLPackExchangeAPI>();
  if (torch->header.version.major != DLPACK_MAJOR_VERSION)
    throw pybind11::import_error("torch's DLPack exchange table is of another major version");
  connection = {torch,
                reinterpret_cast<PyTypeObject*>(tensor.ptr()),
                reinterpret_cast<PyTypeObject*>(parameter.ptr()),
                pybind11::object(tensor.attr("is_neg")).release().ptr(),
                empty_like.release().ptr(),
                reinterpret_cast<decltype(&fused_rnn_cell)>(kernel)};
}

// The memory of a tensor, if it is a plain contiguous CPU tensor of the wanted dtype and shape. A
// view may carry its sign as a bit beside the memory; DLPack does not tell.
class Plain {
  DLDataType type_;

 public:
  explicit Plain(DLDataType type) : type_(type) {}

  // Of all operands before the first pointer is taken: torch lets other threads run meanwhile.
  static bool is_candidate(PyObject* object) {
    const PyTypeObject* type = Py_TYPE(object);
    if (type != connection.tensor && type != connection.parameter) return false;
    PyObject* const negated = PyObject_Vectorcall(connection.is_neg, &object, 1, nullptr);
    Py_XDECREF(negated);  // of True and False there is one each
    if (!negated) PyErr_Clear();
    return negated == Py_False;
  }

  // Of a candidate.
  static bool view(PyObject* object, DLTensor* out) {
    if (connection.torch->dltensor_from_py_object_no_sync(object, out) == 0) return true;
    PyErr_Clear();  // torch has no plain memory for it; the caller has another way
    return false;
  }

  // None is null where it may be.
  bool get(PyObject* object, bool optional, std::initializer_list<int64_t> shape,
           void** data) const {
    if (optional && object == Py_None) return *data = nullptr, true;
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

// The next state of a cell, as a tensor of its own beside the one before it.
class NextState {
  PyObject* tensor_ = nullptr;

 public:
  NextState() = default;
  NextState(const NextState&) = delete;
  ~NextState() { Py_XDECREF(tensor_); }

  // False, with Python's error set, if there is no memory for it.
  bool take(PyObject* before, void** data) {
    DLTensor t;
    tensor_ = PyObject_Vectorcall(connection.empty_like, &before, 1, nullptr);
    if (!tensor_ || connection.torch->dltensor_from_py_object_no_sync(tensor_, &t)) return false;
    *data = static_cast<char*>(t.data) + t.byte_offset;
    return true;
  }
  PyObject* release() { return std::exchange(tensor_, nullptr); }
};

bool is_tuple(PyObject* object, Py_ssize_t size) {
  return PyTuple_Check(object) && PyTuple_GET_SIZE(object) == size;
}

struct LayerWeights {
  void *w_ih, *w_hh, *b_ih, *b_hh;
};
constexpr int64_t kMostLayers = 16;

bool are_candidates(PyObject* tuple, Py_ssize_t first_optional) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tuple); ++i) {
    PyObject* const item = PyTuple_GET_ITEM(tuple, i);
    if (!(i >= first_optional && item == Py_None) && !Plain::is_candidate(item)) return false;
  }
  return true;
}

// (cell, x, states, weights, rows, products): the next states of one step of a cell, as a tuple;
// None, with nothing done, where an operand is not plain memory of the right kind and size, or
// where there are more rows and more multiplications. Where weights are a tuple of those of L
// layers, states are [L,N,H]. Called by CPython's own rules: pybind11's way to a function of so
// many arguments takes a twentieth of the whole step.
PyObject* small_step(PyObject*, PyObject* const* operand, Py_ssize_t count) {
  if (count != 6)
    return PyErr_Format(PyExc_TypeError, "small_step() takes 6 arguments, got %zd", count);
  const int64_t cell = PyLong_AsLongLong(operand[0]), rows = PyLong_AsLongLong(operand[4]),
                products = PyLong_AsLongLong(operand[5]);
  if (PyErr_Occurred()) return nullptr;
  PyObject *const before = operand[2], *const given = operand[3];
  if (!connection.kernel || cell < 0 || cell >= fused_rnn::kCellCount ||
      !is_tuple(before, fused_rnn::kCellShapes[cell].states) || !PyTuple_Check(given) ||
      PyTuple_GET_SIZE(given) == 0)
    Py_RETURN_NONE;
  const bool stacked = PyTuple_Check(PyTuple_GET_ITEM(given, 0));
  const int64_t layers = stacked ? PyTuple_GET_SIZE(given) : 1;
  const auto four = [&](int64_t k) { return stacked ? PyTuple_GET_ITEM(given, k) : given; };
  DLTensor input, state;
  if (layers > kMostLayers || !Plain::is_candidate(operand[1]) || !are_candidates(before, 2))
    Py_RETURN_NONE;
  for (int64_t k = 0; k < layers; ++k)
    if (!is_tuple(four(k), 4) || !are_candidates(four(k), 2)) Py_RETURN_NONE;
  if (!Plain::view(operand[1], &input) || !Plain::view(PyTuple_GET_ITEM(before, 0), &state) ||
      input.ndim != 2 || state.ndim != (stacked ? 3 : 2))
    Py_RETURN_NONE;
  const int64_t N = input.shape[0], I = input.shape[1], H = state.shape[state.ndim - 1];
  const int64_t gates = fused_rnn::kCellShapes[cell].gates * H;
  const int64_t work = N * gates * ((layers > 1 ? std::max(I, H) : I) + H);  // of a layer
  const int scalar = scalar_of(input.dtype), states = fused_rnn::kCellShapes[cell].states;
  const Plain plain(input.dtype);
  if (scalar < 0 || (N > rows && work > products)) Py_RETURN_NONE;

  NextState next[2];  // like h, which c has to be like
  void *x, *h, *c = nullptr, *after[2] = {};
  for (int i = 0; i < states; ++i)
    if (!next[i].take(PyTuple_GET_ITEM(before, 0), &after[i])) return nullptr;
  const auto get_state = [&](int i, void** data) {
    PyObject* const tensor = PyTuple_GET_ITEM(before, i);
    return stacked ? plain.get(tensor, false, {layers, N, H}, data)
                   : plain.get(tensor, false, {N, H}, data);
  };
  if (!plain.get(operand[1], false, {N, I}, &x) || !get_state(0, &h) ||
      (states == 2 && !get_state(1, &c)))
    Py_RETURN_NONE;
  LayerWeights weights[kMostLayers];
  for (int64_t k = 0; k < layers; ++k) {
    LayerWeights& w = weights[k];
    const auto weight = [&](int i) { return PyTuple_GET_ITEM(four(k), i); };
    if (!plain.get(weight(0), false, {gates, k ? H : I}, &w.w_ih) ||
        !plain.get(weight(1), false, {gates, H}, &w.w_hh) ||
        !plain.get(weight(2), true, {gates}, &w.b_ih) ||
        !plain.get(weight(3), true, {gates}, &w.b_hh))
      Py_RETURN_NONE;
  }
  const int64_t bytes = N * H * input.dtype.bits / 8;
  const auto layer = [&](void* state, int64_t k) {
    return state ? static_cast<char*>(state) + k * bytes : nullptr;
  };
  // Other threads may run meanwhile where it takes long; the caller holds the operands.
  PyThreadState* const thread = layers * work > products ? PyEval_SaveThread() : nullptr;
  for (int64_t k = 0; k < layers; ++k) {
    const LayerWeights& w = weights[k];
    connection.kernel(int(cell), scalar, N, k ? H : I, H, k ? layer(after[0], k - 1) : x,
                      layer(h, k), layer(c, k), w.w_ih, w.w_hh, w.b_ih, w.b_hh, layer(after[0], k),
                      layer(after[1], k));
  }
  if (thread) PyEval_RestoreThread(thread);
  PyObject* const results = PyTuple_New(states);
  for (int i = 0; results && i < states; ++i) PyTuple_SET_ITEM(results, i, next[i].release());
  return results;
}

// Of what the fast calling convention needs a pointer to, for ever.
PyMethodDef small_step_method = {
    "small_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&small_step)),
    METH_FASTCALL,
    "small_step(cell, x, states, weights, rows, products)\n\n"
    "The next states of one step of a cell, or with the weights of L layers, of those ([L,N,H]), "
    "as "
    "a tuple; None, with nothing done, where an operand is not plain "
    "contiguous CPU memory of the right dtype and shape, or there are more than "
    "`rows` rows and `products` multiplications."};

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
  m.attr("small_step") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&small_step_method, nullptr));
  m.def(
      "instruction_set", [] { return fused_rnn::best_isa().name; },
      "The instruction set whose kernels run in this process.");
  fused_rnn::bind_plan(m);
}
