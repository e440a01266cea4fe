// Threads for work on whole matrices, which is worth starting them. Many callers may do so at once.
#pragma once

#include <system_error>
#include <thread>

#include "shared/formats.h"

namespace ternarize {

// A thread should have enough to do to be worth its start (tens of microseconds).
constexpr int64_t kWeightsPerThread = 1 << 18;
constexpr int kMostThreads = 256;

// Calls work(part, first, last) for consecutive parts of the rows of a matrix, each on its own thread,
// and returns the number of parts. Which rows a part has never changes a result.
template <class Matrix, class Work>
int parallel_for(const Matrix& x, int threads, Work work) {
  int64_t parts = x.rows * x.cols / kWeightsPerThread + 1;
  if (parts > threads) parts = threads;
  if (parts > x.rows) parts = x.rows;
  if (parts > kMostThreads) parts = kMostThreads;
  if (parts < 1) parts = 1;
  std::thread started[kMostThreads];
  const auto run = [&](int64_t part) {
    work(static_cast<int>(part), x.rows * part / parts, x.rows * (part + 1) / parts);
  };
  for (int64_t part = 1; part < parts; ++part) {
    try {
      started[part] = std::thread(run, part);
    } catch (const std::system_error&) {  // no more threads to be had: this one does it
      run(part);
    }
  }
  run(0);
  for (int64_t part = 1; part < parts; ++part)
    if (started[part].joinable()) started[part].join();
  return static_cast<int>(parts);
}

// The lowest index of those that work(first, last) finds. Each part stops at its own first one, and
// the parts are in order.
template <class Matrix, class Work>
int64_t first_of(const Matrix& x, int threads, Work work) {
  int64_t found[kMostThreads];
  const int parts = parallel_for(x, threads, [&](int part, int64_t first, int64_t last) {
    found[part] = work(first, last);
  });
  for (int part = 0; part < parts; ++part)
    if (found[part] != kNone) return found[part];
  return kNone;
}

}  // namespace ternarize
