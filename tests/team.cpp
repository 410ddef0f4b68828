// Team (csrc/cpu/team.h) with the thread sanitizer: who joins, and what is seen after a meeting.
#define FUSED_RNN_NAMESPACE team_test
#include "../csrc/cpu/team.h"

#include <stdio.h>
#include <stdlib.h>

#include <thread>
#include <vector>

using team_test::Member;
using team_test::Team;

namespace {

constexpr int64_t kSecond = 1000000000;

void expect(bool what, const char* sentence) {
  if (what) return;
  fprintf(stderr, "%s\n", sentence);
  exit(1);
}

// Each member adds up what all have left in the last round, as a step reads the last step's states.
void take_rounds(int threads, int rounds) {
  Team team(threads, 60 * kSecond);
  std::vector<long> cells[2] = {std::vector<long>(threads, 1), std::vector<long>(threads, 0)};
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i)
    pool.emplace_back([&] {
      const int number = team.join();
      expect(number >= 0 && number < threads && team.size() == threads, "not all have joined");
      const Member member{&team, number, team.size()};
      for (int round = 0; round < rounds; ++round) {
        long sum = 0;
        for (const long cell : cells[round % 2]) sum += cell;
        cells[(round + 1) % 2][number] = sum % 1000003;
        member.meet();
      }
    });
  for (std::thread& thread : pool) thread.join();
  long expected = 1;
  for (int round = 0; round < rounds; ++round) expected = expected * threads % 1000003;
  for (const long cell : cells[rounds % 2]) expect(cell == expected, "a round was missed");
}

// All tasks on one thread: the first works alone, as soon as its patience ends.
void come_one_after_the_other() {
  Team team(3, 1000);
  expect(team.join() == 0 && team.size() == 1, "the first is not alone");
  Member{&team, 0, 1}.meet();
  expect(team.join() == -1 && team.join() == -1, "a late one has joined");
  expect(team.size() == 1, "a late one is counted");
}

// Thousands of teams, of threads that come at any time: each number once, one size for all.
void come_at_any_time() {
  constexpr int kTeams = 2000, kThreads = 3;
  std::vector<Team*> teams;
  for (int i = 0; i < kTeams; ++i) teams.push_back(new Team(kThreads, i % 50 * 100));
  std::vector<std::vector<int>> numbers(kThreads, std::vector<int>(kTeams));
  std::vector<std::thread> pool;
  for (int i = 0; i < kThreads; ++i)
    pool.emplace_back([&, i] {
      for (int k = 0; k < kTeams; ++k) {
        const int number = numbers[i][k] = teams[k]->join();
        if (number >= 0) Member{teams[k], number, teams[k]->size()}.meet();
      }
    });
  for (std::thread& thread : pool) thread.join();
  for (int k = 0; k < kTeams; ++k) {
    std::vector<int> seen(kThreads, 0);
    for (int i = 0; i < kThreads; ++i)
      if (numbers[i][k] >= 0) ++seen[numbers[i][k]];
    for (int number = 0; number < kThreads; ++number)
      expect(seen[number] == (number < teams[k]->size()), "a number is missing or given twice");
    delete teams[k];
  }
}

}  // namespace

int main() {
  take_rounds(2, 20000);
  take_rounds(5, 2000);
  come_one_after_the_other();
  come_at_any_time();
  puts("ok");
}
