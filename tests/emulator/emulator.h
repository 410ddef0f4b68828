// What a driver includes: memory for a kernel, a launch, and the report of it.
//
//   Memory<float> x("x", 100);
//   Launch launch{.name = "double", .grid = {2}, .block = {64}, .seed = seed};
//   Report report = run(launch, double_kernel<float>, x.data(), 100);
//   if (!report.ok()) puts(report.text().c_str());
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace fused_rnn::emulator {

struct Extent {
  int x = 1, y = 1, z = 1;
  int count() const { return x * y * z; }
};

struct Launch {
  const char* name = "kernel";
  Extent grid = {}, block = {};
  size_t shared_bytes = 0;  // dynamic shared memory
  int cluster = 1;          // blocks a cluster, along x
  uint64_t seed = 0;
  // Primitives run without one byte changing or one thread getting past a barrier: by then threads
  // that spin in loops of their own spin for ever.
  uint64_t idle_limit = 1 << 22;
};

struct Report {
  // Accesses out of range or misaligned and misuse of a primitive, of which the first ends the
  // launch; guard zones overwritten; races (ThreadSanitizer build).
  std::vector<std::string> errors;
  std::string deadlock;  // who waits where
  uint64_t primitives = 0, switches = 0;

  bool ok() const { return errors.empty() && deadlock.empty(); }
  std::string text() const;
};

Report run(const Launch& launch, const std::function<void()>& thread);

template <class... Parameters, class... Arguments>
Report run(const Launch& launch, void (*kernel)(Parameters...), Arguments&&... arguments) {
  return run(launch, std::function<void()>([&] { kernel(arguments...); }));
}

// A kernel that reads what nobody wrote gets this; as any float type it is NaN.
constexpr unsigned char kUnwritten = 0xff;

// Global memory as bytes, between two guard zones. The emulator knows it until it is destroyed.
class Allocation {
 public:
  Allocation(const char* name, size_t bytes);
  ~Allocation();
  Allocation(const Allocation&) = delete;
  Allocation& operator=(const Allocation&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

template <class T>
class Memory {
 public:
  Memory(const char* name, size_t count) : allocation_(name, count * sizeof(T)), count_(count) {}
  Memory(const char* name, const std::vector<T>& values) : Memory(name, values.size()) {
    for (size_t i = 0; i < count_; ++i) data()[i] = values[i];
  }
  T* data() const { return static_cast<T*>(allocation_.data()); }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + count_; }
  void fill(T value) const {
    for (T& x : *this) x = value;
  }

 private:
  Allocation allocation_;
  size_t count_;
};

}  // namespace fused_rnn::emulator
