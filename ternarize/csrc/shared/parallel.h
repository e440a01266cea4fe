// Threads for work on whole matrices, which is worth starting them. Many callers may do so at once.
#pragma once

#include <exception>
#include <mutex>
#include <thread>

#include "shared/formats.h"

namespace ternarize {

// A thread should have enough to do to be worth its start (tens of microseconds).
constexpr int64_t kWeightsPerThread = 1 << 18;
constexpr int kMostThreads = 256;

// Calls work(part, first, last) for consecutive parts of `rows` rows that are worth `weights` weights each,
// every part on its own thread, and returns the number of parts. Which rows a part has never changes a
// result. What a part throws (no memory is left) is thrown here, once all threads have ended.
template <class Work>
int parallel_for(int64_t rows, int64_t weights, int threads, Work work) {
  int64_t parts = rows * weights / kWeightsPerThread + 1;
  if (parts > threads) parts = threads;
  if (parts > rows) parts = rows;
  if (parts > kMostThreads) parts = kMostThreads;
  if (parts < 1) parts = 1;
  std::thread started[kMostThreads];
  std::mutex failing;
  std::exception_ptr failed;
  const auto run = [&](int64_t part) {
    try {
      work(static_cast<int>(part), rows * part / parts, rows * (part + 1) / parts);
    } catch (...) {  // out of a thread, or past threads that run, it would end the process
      const std::lock_guard<std::mutex> alone(failing);
      if (!failed) failed = std::current_exception();
    }
  };
  for (int64_t part = 1; part < parts; ++part) {
    try {
      started[part] = std::thread(run, part);
    } catch (const std::exception&) {  // no more threads, or memory for one, to be had: this one does it
      run(part);
    }
  }
  run(0);
  for (int64_t part = 1; part < parts; ++part)
    if (started[part].joinable()) started[part].join();
  if (failed) std::rethrow_exception(failed);
  return static_cast<int>(parts);
}

// The lowest index of those that work(first, last) finds. Each part stops at its own first one, and
// the parts are in order.
template <class Work>
int64_t first_of(int64_t rows, int64_t weights, int threads, Work work) {
  int64_t found[kMostThreads];
  const auto note = [&](int part, int64_t first, int64_t last) { found[part] = work(first, last); };
  const int parts = parallel_for(rows, weights, threads, note);
  for (int part = 0; part < parts; ++part)
    if (found[part] != kNone) return found[part];
  return kNone;
}

}  // namespace ternarize
