// A driver is a table of cases: `driver CASE COUNT [FIRST]` runs one under COUNT seeds from FIRST
// (0) on and prints, for each, "seed 3: ok" or what was wrong. Results must be bit-equal between
// seeds.
#pragma once

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <initializer_list>
#include <string>

#include "emulator.h"

namespace fused_rnn::emulator {

struct Outcome {
  std::string problem, result;

  Outcome& add(const Report& report) {
    problem += report.text();
    return *this;
  }
  // Records the first element that is not `expected(i)`, if nothing was wrong before, and keeps all
  // for the comparison between seeds.
  template <class T, class Expected>
  Outcome& compare(const char* name, const Memory<T>& got, Expected expected) {
    result.append(reinterpret_cast<const char*>(got.data()), got.size() * sizeof(T));
    for (size_t i = 0; problem.empty() && i < got.size(); ++i) {
      const T want = expected(int(i));
      if (memcmp(&got[i], &want, sizeof(T)) == 0) continue;
      problem += "wrong result: " + std::string(name) + "[" + std::to_string(i) + "] is " +
                 show(got[i]) + ", expected " + show(want) + "\n";
    }
    return *this;
  }

 private:
  template <class T>
  static std::string show(T x) {
    if constexpr (requires { std::to_string(x); }) {
      return std::to_string(x);
    } else {
      char text[8];
      snprintf(text, sizeof(text), "0x%04x", unsigned(x.bits));
      return text;
    }
  }
};

struct Case {
  const char* name;
  Outcome (*run)(uint64_t seed);
};

inline int run_cases(int count, char** words, std::initializer_list<Case> cases) {
  if (count == 2 && strcmp(words[1], "--list") == 0) {
    for (const Case& one : cases) puts(one.name);
    return 0;
  }
  for (const Case& one : cases) {
    if (count < 3 || count > 4 || strcmp(words[1], one.name) != 0) continue;
    std::string result;
    const int first = count == 4 ? atoi(words[3]) : 0;
    for (int seed = first; seed < first + atoi(words[2]); ++seed) {
      Outcome outcome = one.run(uint64_t(seed));
      if (seed == first) result = outcome.result;
      if (outcome.result != result) outcome.problem += "the result differs from the first seed's\n";
      printf("seed %d: %s\n", seed, outcome.problem.empty() ? "ok" : outcome.problem.c_str());
    }
    return 0;
  }
  fprintf(stderr, "usage: %s CASE COUNT [FIRST], or --list\n", words[0]);
  return 2;
}

}  // namespace fused_rnn::emulator
