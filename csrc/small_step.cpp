// fused_rnn._C.small_step: one step of a cell, or of all layers of a module, without torch's
// dispatcher. An op call takes longer than the step; so does looking up weights in Python. torch
// offers DLPack's exchange table so that compiled code can look into a tensor, and make one,
// without torch's own headers.
#include "small_step.h"

// DLPack's own header, a C standard with a version of its own, refuses to be read beside torch's
// stable ABI only because torch keeps it in a folder that is not stable.
#undef TORCH_TARGET_VERSION
#include <ATen/dlpack.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <memory>
#include <new>
#include <string>
#include <utility>

#include "cpu/isa.h"
#include "cpu/kernels.h"

namespace fused_rnn {
namespace {

struct Connection {
  const DLPackExchangeAPI* torch = nullptr;
  PyTypeObject *tensor = nullptr, *parameter = nullptr;
  PyCFunction is_neg = nullptr;
  decltype(&fused_rnn_cell) kernel = nullptr;
  int64_t rows = 0, products = 0;  // a step is small with as few of either
} connection;

// The function behind a method without arguments, which takes a third of the time to call.
PyCFunction method(pybind11::type type, const char* name) {
  const pybind11::object found = type.attr(name);
  const PyMethodDef* const def = Py_TYPE(found.ptr()) == &PyMethodDescr_Type
                                     ? reinterpret_cast<PyMethodDescrObject*>(found.ptr())->d_method
                                     : nullptr;
  if (!def || def->ml_flags != METH_NOARGS)
    throw pybind11::import_error(std::string(name) + " of torch's tensors is no such method");
  return def->ml_meth;
}

void connect(pybind11::type tensor, pybind11::type parameter, uintptr_t kernel, int64_t rows,
             int64_t products) {
  const pybind11::capsule table = tensor.attr("__dlpack_c_exchange_api__");
  const auto* torch = table.get_pointer<const DLPackExchangeAPI>();
  if (torch->header.version.major != DLPACK_MAJOR_VERSION)
    throw pybind11::import_error("torch's DLPack exchange table is of another major version");
  connection = {torch,
                reinterpret_cast<PyTypeObject*>(tensor.ptr()),
                reinterpret_cast<PyTypeObject*>(parameter.ptr()),
                method(tensor, "is_neg"),
                reinterpret_cast<decltype(&fused_rnn_cell)>(kernel),
                rows,
                products};
}

// Tensors, or None, that nobody can take away while torch lets other threads run.
class Held {
  PyObject* items_[4] = {};

 public:
  Held() = default;
  Held(const Held&) = delete;
  ~Held() {
    for (PyObject* item : items_) Py_XDECREF(item);
  }
  void set(int i, PyObject* item) {
    Py_INCREF(item);
    items_[i] = item;
  }
  PyObject* operator[](int i) const { return items_[i]; }
};

// Whether it may be plain memory. A view may carry its sign as a bit beside the memory, which
// DLPack does not tell. To be asked of all operands before the first pointer is taken: torch lets
// other threads run meanwhile.
bool is_candidate(PyObject* object) {
  const PyTypeObject* type = Py_TYPE(object);
  if (type != connection.tensor && type != connection.parameter) return false;
  PyObject* const negated = connection.is_neg(object, nullptr);
  Py_XDECREF(negated);  // of True and False there is one each
  if (!negated) PyErr_Clear();
  return negated == Py_False;
}

bool view(PyObject* candidate, DLTensor* out) {
  if (connection.torch->dltensor_from_py_object_no_sync(candidate, out) == 0) return true;
  PyErr_Clear();  // torch has no plain memory for it; the caller has another way
  return false;
}

char* memory(const DLTensor& t) { return static_cast<char*>(t.data) + t.byte_offset; }

// The memory of contiguous CPU tensors of one dtype.
struct Plain {
  DLDataType type;

  bool get(PyObject* candidate, std::initializer_list<int64_t> shape, char** data) const {
    DLTensor t;
    return view(candidate, &t) && get(t, shape, data);
  }

  bool get(const DLTensor& t, std::initializer_list<int64_t> shape, char** data) const {
    if (t.device.device_type != kDLCPU || t.dtype.code != type.code || t.dtype.bits != type.bits ||
        t.dtype.lanes != 1 || t.ndim != int(shape.size()))
      return false;
    int64_t stride = 1;
    for (int i = t.ndim - 1; i >= 0; --i) {
      if (t.shape[i] != shape.begin()[i]) return false;
      if (t.strides && t.shape[i] != 1 && t.strides[i] != stride) return false;
      stride *= t.shape[i];
    }
    *data = memory(t);
    return t.data || stride == 0;  // the memory of a tensor that is not empty may have been freed
  }
};

int scalar_of(DLDataType type) {
  if (type.code == kDLBfloat && type.bits == 16) return kBFloat16;
  if (type.code != kDLFloat) return -1;
  return type.bits == 32 ? kFloat : type.bits == 64 ? kDouble : type.bits == 16 ? kHalf : -1;
}

// A contiguous CPU tensor to be: torch makes one around memory that is there in half the time in
// which it gets it itself.
class NewTensor {
  static constexpr size_t kAlignment = 64;  // as torch's own

  struct alignas(kAlignment) Head {
    DLManagedTensorVersioned managed;
    int64_t shape[3], strides[3];
  };
  Head* head_ = nullptr;

  static void free_memory(DLManagedTensorVersioned* managed) { std::free(managed->manager_ctx); }

 public:
  NewTensor() = default;
  NewTensor(const NewTensor&) = delete;
  ~NewTensor() {
    if (head_) free_memory(&head_->managed);
  }

  // False if there is no memory for it.
  bool take(DLDataType type, std::initializer_list<int64_t> shape, char** data) {
    size_t bytes = type.bits / 8;
    for (int64_t size : shape) bytes *= size;
    // malloc keeps small pieces at hand, which aligned_alloc walks past.
    size_t room = sizeof(Head) + bytes + kAlignment;
    void *const memory = std::malloc(room), *aligned = memory;
    if (!memory) return false;
    std::align(kAlignment, sizeof(Head) + bytes, aligned, room);
    head_ = new (aligned) Head{};
    DLManagedTensorVersioned& m = head_->managed;
    m.version = {DLPACK_MAJOR_VERSION, DLPACK_MINOR_VERSION};
    m.manager_ctx = memory;
    m.deleter = &free_memory;
    m.dl_tensor.data = *data = static_cast<char*>(aligned) + sizeof(Head);
    m.dl_tensor.device = {kDLCPU, 0};
    m.dl_tensor.ndim = int32_t(shape.size());
    m.dl_tensor.dtype = type;
    m.dl_tensor.shape = head_->shape;
    m.dl_tensor.strides = head_->strides;
    int64_t stride = 1;
    for (int i = m.dl_tensor.ndim - 1; i >= 0; --i) {
      head_->shape[i] = shape.begin()[i];
      head_->strides[i] = stride;
      stride *= head_->shape[i];
    }
    return true;
  }

  // Null, with Python's error set, if torch refuses.
  PyObject* release() {
    void* tensor = nullptr;
    Head* const head = std::exchange(head_, nullptr);  // torch's from here on
    const int failed =
        connection.torch->managed_tensor_to_py_object_no_sync(&head->managed, &tensor);
    return failed ? nullptr : static_cast<PyObject*>(tensor);
  }
};

constexpr int64_t kMostLayers = 16;

// The weights of a layer, of which biases may be None, as given to small_step(): a tuple, or names
// in a dictionary. False if they are something else.
bool hold_weights(PyObject* weights, PyObject* names, Held* held) {
  const bool named = names != Py_None;
  PyObject* const given = named ? names : weights;
  if (!(PyTuple_Check(given) || (named && PyList_Check(given))) ||
      (named && !PyDict_Check(weights)))
    return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(given);
  if (count != 4 && !(named && count == 2)) return false;
  for (int i = 0; i < 4; ++i) {
    PyObject* item = i < count ? PySequence_Fast_GET_ITEM(given, i) : Py_None;
    if (named && i < count) item = PyDict_GetItem(weights, item);  // clears any error
    if (!item || (item == Py_None && i < 2)) return false;
    held->set(i, item);
  }
  return true;
}

struct LayerWeights {
  char* of[4] = {};  // w_ih, w_hh, b_ih, b_hh

  bool get(const Plain& plain, const Held& held, int64_t gates, int64_t I, int64_t H) {
    return plain.get(held[0], {gates, I}, &of[0]) && plain.get(held[1], {gates, H}, &of[1]) &&
           (held[2] == Py_None || plain.get(held[2], {gates}, &of[2])) &&
           (held[3] == Py_None || plain.get(held[3], {gates}, &of[3]));
  }
};

PyObject* pair(PyObject* first, PyObject* second) {
  PyObject* const tuple = first && second ? PyTuple_New(2) : nullptr;
  if (!tuple) {
    Py_XDECREF(first);
    Py_XDECREF(second);
    return nullptr;
  }
  PyTuple_SET_ITEM(tuple, 0, first);
  PyTuple_SET_ITEM(tuple, 1, second);
  return tuple;
}

constexpr const char* kSmallStepDoc =
    "small_step(cell, x, state, weights, names=None)\n\n"
    "The next state of a cell, in the form of the one given: (h, c), or of one state h or, without "
    "names, (h,). With `names`, weights are looked up in a dictionary; where names are those of "
    "each of L layers, states are "
    "[L,N,H], and the result is (y, state), y the last layer's h in memory of its own. None, with "
    "nothing done, where an operand is not plain contiguous CPU memory of the right dtype and "
    "shape, or the step is not as small as connect() was told.";

// Called by CPython's own rules: pybind11's way to a function of so many arguments takes a
// twentieth of the whole step.
PyObject* small_step(PyObject*, PyObject* const* operand, Py_ssize_t count) {
  if (count != 4 && count != 5)
    return PyErr_Format(PyExc_TypeError, "small_step() takes 4 or 5 arguments, got %zd", count);
  const int64_t cell = PyLong_AsLongLong(operand[0]);
  if (PyErr_Occurred()) return nullptr;
  if (!connection.kernel || cell < 0 || cell >= kCellCount) Py_RETURN_NONE;
  const int states = kCellShapes[cell].states;
  PyObject *const x = operand[1], *const state = operand[2],
                  *const names = count > 4 ? operand[4] : Py_None;

  const bool alone = !PyTuple_Check(state);  // h, which is how modules have it, not (h,)
  if (alone ? states != 1 : PyTuple_GET_SIZE(state) != states) Py_RETURN_NONE;
  if (!alone && states == 1 && names != Py_None) Py_RETURN_NONE;
  PyObject* const before[2] = {alone ? state : PyTuple_GET_ITEM(state, 0),
                               states == 2 ? PyTuple_GET_ITEM(state, 1) : nullptr};
  const bool stacked = PyList_Check(names);
  const int64_t layers = stacked ? PyList_GET_SIZE(names) : 1;
  if (layers < 1 || layers > kMostLayers) Py_RETURN_NONE;
  Held held[kMostLayers];
  for (int64_t k = 0; k < layers; ++k)
    if (!hold_weights(operand[3], stacked ? PyList_GET_ITEM(names, k) : names, &held[k]))
      Py_RETURN_NONE;
  if (!is_candidate(x) || !is_candidate(before[0]) || (states == 2 && !is_candidate(before[1])))
    Py_RETURN_NONE;
  for (int64_t k = 0; k < layers; ++k)
    for (int i = 0; i < 4; ++i)
      if (held[k][i] != Py_None && !is_candidate(held[k][i])) Py_RETURN_NONE;

  DLTensor input, h;
  if (!view(x, &input) || !view(before[0], &h) || input.ndim != 2 || h.ndim != 2 + stacked)
    Py_RETURN_NONE;
  const Plain plain = {input.dtype};
  const int scalar = scalar_of(input.dtype);
  const int64_t N = input.shape[0], I = input.shape[1], H = h.shape[h.ndim - 1];
  const int64_t gates = kCellShapes[cell].gates * H;
  const int64_t work = N * gates * ((layers > 1 ? std::max(I, H) : I) + H);  // of a layer
  if (scalar < 0 || (N > connection.rows && work > connection.products)) Py_RETURN_NONE;
  char *from, *old[2] = {}, *next[2] = {}, *last = nullptr;
  const auto get_state = [&](const DLTensor& t, char** data) {
    return stacked ? plain.get(t, {layers, N, H}, data) : plain.get(t, {N, H}, data);
  };
  DLTensor c;
  if (!plain.get(input, {N, I}, &from) || !get_state(h, &old[0]) ||
      (states == 2 && !(view(before[1], &c) && get_state(c, &old[1]))))
    Py_RETURN_NONE;
  LayerWeights weights[kMostLayers];
  for (int64_t k = 0; k < layers; ++k)
    if (!weights[k].get(plain, held[k], gates, k ? H : I, H)) Py_RETURN_NONE;

  NewTensor y, after[2];
  bool enough = !stacked || y.take(input.dtype, {N, H}, &last);
  for (int i = 0; i < states; ++i)
    enough = enough && (stacked ? after[i].take(input.dtype, {layers, N, H}, &next[i])
                                : after[i].take(input.dtype, {N, H}, &next[i]));
  if (!enough) return PyErr_NoMemory();

  // Other threads may run meanwhile where it takes long; the caller holds the operands.
  PyThreadState* const thread = layers * work > connection.products ? PyEval_SaveThread() : nullptr;
  const int64_t bytes = N * H * input.dtype.bits / 8;
  const auto layer = [&](char* state, int64_t k) { return state ? state + k * bytes : nullptr; };
  for (int64_t k = 0; k < layers; ++k) {
    char* const* w = weights[k].of;
    connection.kernel(int(cell), scalar, N, k ? H : I, H, k ? layer(next[0], k - 1) : from,
                      layer(old[0], k), layer(old[1], k), w[0], w[1], w[2], w[3], layer(next[0], k),
                      layer(next[1], k));
  }
  if (stacked && bytes) std::memcpy(last, layer(next[0], layers - 1), bytes);
  if (thread) PyEval_RestoreThread(thread);

  PyObject* result = after[0].release();
  if (states == 2) {
    result = result ? pair(result, after[1].release()) : nullptr;
  } else if (!alone && result) {
    PyObject* const tuple = PyTuple_New(1);
    if (tuple) PyTuple_SET_ITEM(tuple, 0, result);
    result = tuple;
  }
  if (stacked && result) result = pair(y.release(), result);
  return result;
}

// Of what the fast calling convention needs a pointer to, for ever.
PyMethodDef small_step_method = {
    "small_step", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&small_step)),
    METH_FASTCALL, kSmallStepDoc};

}  // namespace

void bind_small_step(pybind11::module_& m) {
  m.def("connect", &connect,
        "Tell small_step() torch's tensor types, the kernel's address, and up to how many rows or "
        "multiplications a step is small.");
  m.attr("small_step") =
      pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&small_step_method, nullptr));
}

}  // namespace fused_rnn
