// Threads that take every step of a layer together, each with its part of the hidden units, and
// meet after it: for few rows and many units, where the batch cannot be shared out.
#pragma once

#include <sched.h>
#include <time.h>

#include "rows.h"

namespace FUSED_RNN_NAMESPACE {

class Team {
  static constexpr int kClosed = 1 << 30;
  static constexpr int kSpins = 4096;  // before others are let run; some 30 us

  const int wanted_;
  const int64_t patience_;
  int joined_ = 0;  // and kClosed, from when on nobody can join
  alignas(64) int arrived_ = 0;
  alignas(64) int round_ = 0;

  static int64_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec * 1000000000ll + time.tv_nsec;
  }

  static void wait(int turn) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
    if (turn >= kSpins) sched_yield();
  }

 public:
  // patience: for threads that have not come, ns.
  Team(int64_t wanted, int64_t patience) : wanted_(int(wanted)), patience_(patience) {}

  // The caller's number, or -1 if it comes too late. A pool may have fewer threads than it is given
  // tasks, or one for all of them: nobody waits long for a thread that may never come.
  int join() {
    int seen = __atomic_load_n(&joined_, __ATOMIC_ACQUIRE);
    do {
      if (seen & kClosed) return -1;
    } while (!__atomic_compare_exchange_n(&joined_, &seen, seen + 1, false, __ATOMIC_ACQ_REL,
                                          __ATOMIC_ACQUIRE));
    const int number = seen;
    const int64_t end = now() + patience_;
    for (int turn = 0;; ++turn) {
      seen = __atomic_load_n(&joined_, __ATOMIC_ACQUIRE);
      if (seen & kClosed) return number;
      if (seen == wanted_ || now() > end)
        __atomic_compare_exchange_n(&joined_, &seen, seen | kClosed, false, __ATOMIC_ACQ_REL,
                                    __ATOMIC_ACQUIRE);
      else
        wait(turn);
    }
  }

  int size() const { return __atomic_load_n(&joined_, __ATOMIC_ACQUIRE) & ~kClosed; }

  // Returns when all `size` members are here. What each has written before, all see after it.
  void meet(int size) {
    const int round = __atomic_load_n(&round_, __ATOMIC_ACQUIRE);
    if (__atomic_add_fetch(&arrived_, 1, __ATOMIC_ACQ_REL) == size) {
      __atomic_store_n(&arrived_, 0, __ATOMIC_RELAXED);
      __atomic_store_n(&round_, round + 1, __ATOMIC_RELEASE);
    } else {
      for (int turn = 0; __atomic_load_n(&round_, __ATOMIC_ACQUIRE) == round; ++turn) wait(turn);
    }
  }
};

// One thread of a team, or one that works alone.
struct Member {
  Team* team = nullptr;
  int number = 0, size = 1;

  bool first() const { return number == 0; }
  Range part(int64_t count) const { return Range(count, number, size); }
  void meet() const {
    if (size > 1) team->meet(size);
  }
  // After a meeting, on rows that the product is about to read: much of them is in others' caches.
  template <class A>
  void fetch(const A* const* rows, int64_t count, int64_t width) const {
    if (size == 1) return;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t k = 0; k < width; k += Vec<A>::kWidth) __builtin_prefetch(rows[i] + k);
  }
};

// Of the schedule's members, as many as there is work for in steps of `panels`; 1 where more
// threads have rows of their own. The other options pass through memory that belongs to a thread.
inline int64_t members_for(const Layer& a, const Schedule& schedule, int64_t panels) {
  const bool plain = !a.w_hr && !a.h_mask && !a.keep && !a.keep_share;
  const int64_t members = panels < schedule.members ? panels : schedule.members;
  return plain && members >= schedule.shares ? members : 1;
}

// Calls task(member) on the threads of a team of at most `wanted`.
template <class Task>
void together(const Schedule& schedule, int64_t wanted, const Task& task) {
  Team team(wanted, schedule.patience);
  parallel(schedule, wanted, [&](int64_t) {
    const int number = team.join();
    if (number >= 0) task(Member{&team, number, team.size()});
  });
}

}  // namespace FUSED_RNN_NAMESPACE
